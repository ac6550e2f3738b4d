/* SPDX-License-Identifier: Apache-2.0
 *
 * VMs on the host's side: a lane of their own, queues bound to it and released again. Plugging the memory into the VM is the caller's
 * business (ringbar.qemu); this file only decides whose memory it is. A VM's lane is served by one book. Direct queues have a lane of their own, mapped
 * by both VMs, which makes them one trust group: one domain, one serving book.
 */
#include "rb_bell.h"

#include <stdio.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#define VM_LANE_BYTES (8ull << 20)

static struct rb_segment_record *record_of(struct rb_cluster *c, uint32_t lane)
{
    if (lane < RB_MAX_LANES && rb_get(&c->reg->state->lane[lane].state) != RB_SEG_FREE && c->reg->state->lane[lane].vm[0])
        return &c->reg->state->lane[lane];
    rb_fail(ENOENT, "no-such-lane", NULL, "cluster %u has no lane %u", c->id, lane);
    return NULL;
}

static int host_only(struct rb_cluster *c)
{
    int rc = rb_alive(c);
    return rc < 0 ? rc : c->reg ? 0 : rb_fail(ENOTSUP, "guest", "do it on the host", "VMs are attached on the host");
}

int rb_lane_create(rb_cluster *c, const char *vm, const char *identity)
{
    int rc = host_only(c), found = -1;
    if (rc < 0 || (rc = rb_enter(c->reg)) < 0)
        return rc;
    if (!*vm || strlen(vm) >= 128 || strncmp(vm, "direct:", 7) == 0)
        rc = rb_fail(EINVAL, "bad-address", NULL, "\"%.40s\" is no name for a VM", vm);
    for (uint32_t i = 0; i < RB_MAX_LANES && rc == 0; i++) {
        struct rb_segment_record *r = &c->reg->state->lane[i];
        if (rb_get(&r->state) == RB_SEG_FREE || strcmp(r->vm, vm) != 0)
            continue;
        if (rb_get(&r->state) == RB_SEG_OPEN && strcmp(r->identity, identity) == 0)
            found = (int)i;
        else if (rb_get(&r->state) == RB_SEG_OPEN) {
            rb_fail(EBUSY, "busy", NULL, "cluster %u still has the lane of an earlier life of VM %s", c->id, vm);
            rc = rb_cure(EBUSY, "ringbar detach %s %u", vm, c->id);
        }
    }
    if (rc == 0)
        rc = found >= 0 ? found : rb_lane_new(c, VM_LANE_BYTES, vm, identity);
    if (rc >= 0 && found < 0) /* the caller plugs what is there now */
        rb_set(&c->reg->state->lane[rc].pools, rb_pools_open(c));
    rb_leave(c->reg);
    return rc;
}

void rb_book_bump(struct rb_cluster *c, uint32_t book)
{
    if (!book)
        return;
    struct rb_book_record *b = &c->reg->state->book[book - 1];
    rb_store_release(&b->epoch, rb_get(&b->epoch) + 1);
}

/* Have the book act on what was changed: here when it is ours or its owner is dead, else ask and wait a little. Recovery lock held once;
 * given up while waiting. Returns 1 when done, 0 when the owner has not looked yet (it will). */
int rb_settle(struct rb_cluster *c, uint32_t book, int timeout_ms)
{
    struct rb_server s;
    if (!book)
        return 1;
    rb_book_bump(c, book);
    if (rb_own_server(c, book))
        return rb_server_sync(rb_own_server(c, book)) == 0;
    if (rb_book_dead(c->reg, book - 1)) {
        if (rb_server_act(c, book - 1, &s) < 0)
            return 0;
        rb_server_sync(&s);
        rb_server_done(&s);
        return 1;
    }
    struct rb_book_record *b = &c->reg->state->book[book - 1];
    uint32_t epoch = rb_get(&b->epoch);
    uint64_t until = rb_mono_ns() + (uint64_t)timeout_ms * 1000000u;
    rb_leave(c->reg);
    while ((int32_t)(rb_load_acquire(&b->seen) - epoch) < 0 && rb_mono_ns() < until && !rb_book_dead(c->reg, book - 1))
        nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
    int rc = rb_enter(c->reg);
    if (rc == 0 && rb_book_dead(c->reg, book - 1))
        return rb_settle(c, book, timeout_ms);
    return rc == 0 && (int32_t)(rb_load_acquire(&b->seen) - epoch) >= 0;
}

static void end_if_dead(struct rb_cluster *c, uint32_t book)
{
    struct rb_server s;
    if (!book || !rb_book_dead(c->reg, book - 1) || rb_server_act(c, book - 1, &s) < 0)
        return;
    rb_server_sync(&s);
    rb_server_service(&s);
    rb_server_end(&s);
    rb_server_done(&s);
}

/* A leg whose book is nobody yet: its rings can be moved by whoever has the lock, in the name of a book of its own. */
static int move_unserved(struct rb_cluster *c, uint32_t number, uint64_t place)
{
    struct rb_leg *leg = rb_leg_of(c, number);
    rb_place_free(c, rb_get(&leg->place));
    for (int i = 0; i < 4; i++)
        rb_set(&leg->committed[i], 0);
    rb_set(&leg->echoed, 0);
    rb_order();
    rb_set(&leg->wanted, place);
    rb_set(&leg->place, place);
    rb_place_live(c, place);
    return 0;
}

static int lane_of_direct(struct rb_cluster *c, uint32_t queue)
{
    char name[32];
    snprintf(name, sizeof name, "direct:%u", queue);
    for (uint32_t i = 0; i < RB_MAX_LANES; i++)
        if (rb_get(&c->reg->state->lane[i].state) == RB_SEG_OPEN && strcmp(c->reg->state->lane[i].vm, name) == 0)
            return (int)i;
    struct rb_queue *q = &c->reg->state->queue[queue];
    uint64_t bytes = RB_LANE_RINGS_AT + 16ull * q->slots + 4 * rb_pow2(q->credit);
    return rb_lane_new(c, RB_MAX(1ull << 20, bytes), name, "");
}

/* Both VMs of a direct queue are one domain, served by one book. */
static int join_group(struct rb_cluster *c, struct rb_segment_record *a, struct rb_segment_record *b)
{
    uint32_t book = rb_get(&a->book) ? rb_get(&a->book) : rb_get(&b->book), from = b->domain;
    if (rb_get(&a->book) && rb_get(&b->book) && rb_get(&a->book) != rb_get(&b->book)) {
        rb_fail(EBUSY, "busy", NULL, "VMs %s and %s are served by two processes, and a direct queue makes them one trust group", a->vm, b->vm);
        return rb_cure(EBUSY, "serve both in one program (ringbar pipeline), then attach again");
    }
    for (uint32_t i = 0; i < RB_MAX_LANES; i++) {
        struct rb_segment_record *r = &c->reg->state->lane[i];
        if (rb_get(&r->state) != RB_SEG_FREE && r->vm[0] && r->domain == from) {
            r->domain = a->domain;
            rb_set(&r->book, book);
        }
    }
    rb_book_bump(c, book); /* it has the old domains in private memory */
    rb_set(&a->book, book);
    return 0;
}

/* Make the direct queue's rings and put its empties where the producer finds them: in the return ring. */
static int open_direct(struct rb_cluster *c, uint32_t queue, struct rb_segment_record *vm_lane)
{
    struct rb_queue *q = &c->reg->state->queue[queue];
    struct rb_leg *leg = rb_leg_of(c, 2 * queue + RB_LEG_R);
    struct rb_server *s;
    struct rb_leg_ctx *l;
    int lane = lane_of_direct(c, queue), rc;
    if (lane < 0)
        return lane;
    struct rb_segment_record *r = &c->reg->state->lane[lane];
    for (unsigned e = 0; e < 2; e++)
        if (q->end[e].lane && (rc = join_group(c, &c->reg->state->lane[q->end[e].lane - 1], vm_lane)) < 0)
            return rc;
    r->domain = vm_lane->domain;
    if (leg->kind == RB_LEG_DIRECT)
        return 0;
    for (unsigned e = 0; e < 2; e++) {
        int32_t pid = rb_byte_holder(c->reg, RB_LOCK_END + 2 * queue + e);
        if (pid) {
            rb_fail(EBUSY, "busy", NULL, "the %s end of %u@%u is held by process %d (%s), and it is to go between two VMs", e ? "receiving" : "sending", c->id, queue,
                    pid, q->end[e].name);
            return rb_cure(EBUSY, "kill %d", pid);
        }
    }
    if (rb_get(&leg->lent))
        return rb_fail(EBUSY, "busy", "read them on the host first", "%u@%u still holds packets from a process of the host", c->id, queue);
    uint32_t book = rb_get(&vm_lane->book);
    if (book && !(c->server && c->server->book + 1 == book)) {
        if (!rb_book_dead(c->reg, book - 1)) {
            rb_fail(EBUSY, "busy", NULL, "VM %s is served by process %d, which must give the buffers of the direct queue", vm_lane->vm,
                    rb_byte_holder(c->reg, RB_LOCK_BOOK + book - 1));
            return rb_cure(EBUSY, "attach direct queues before programs open the VM's other queues");
        }
        if ((rc = rb_adopt(c, book - 1)) < 0)
            return rc;
    }
    uint64_t place;
    if ((rc = rb_server_get(c, &s)) < 0 || (rc = rb_server_claim(s, q->credit, "a direct queue")) < 0 ||
        (rc = rb_place_find(c, (uint32_t)lane, queue, RB_LEG_DIRECT, q->slots, q->credit, &place)) < 0)
        return rc;
    rb_place_free(c, rb_get(&leg->place));
    rb_leg_init(c, 2 * queue + RB_LEG_R, RB_LEG_DIRECT, q->slots, q->credit, place);
    rb_set(&leg->book, s->book + 1);
    rb_set(&vm_lane->book, s->book + 1);
    rb_set(&r->book, s->book + 1);
    if (s->leg[2 * queue + RB_LEG_R])
        rb_server_drop_leg(s, s->leg[2 * queue + RB_LEG_R]);
    if ((rc = rb_server_leg(s, 2 * queue + RB_LEG_R, &l)) < 0)
        return rc;
    /* Nobody maps it yet, so there is no order to keep, only the ledger before the ring: a crash here leaves them lent to the group, which ends
     * with its last member. */
    uint32_t n = RB_MIN(q->credit, s->free);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t handle = s->stack[--s->free];
        rb_set(&s->ledger[rb_number(c, handle)], RB_WORD(RB_W_LENT, l->number));
        l->ring.returned[i] = handle;
    }
    l->lent = n;
    rb_set(&leg->lent, n);
    rb_store_release(&l->ring.ctl->rp, n);
    rb_place_live(c, place);
    return 0;
}

int rb_lane_bind(rb_cluster *c, uint32_t lane, uint32_t queue, uint32_t direction)
{
    int rc = host_only(c), rx = direction == RB_VM_RX;
    if (rc < 0 || (rc = rb_enter(c->reg)) < 0)
        return rc;
    struct rb_segment_record *rec = record_of(c, lane);
    struct rb_queue *q = &c->reg->state->queue[queue];
    if (!rec)
        rc = -ENOENT;
    else if ((rc = rb_queue_check(c, queue)) == 0 && q->end[rx].lane == lane + 1)
        rc = 1; /* unchanged */
    else if (rc == 0) {
        int32_t pid = rb_byte_holder(c->reg, RB_LOCK_END + 2 * queue + (unsigned)rx);
        if (pid || q->end[rx].lane) {
            if (q->end[rx].lane) {
                const char *other = c->reg->state->lane[q->end[rx].lane - 1].vm;
                rb_fail(EBUSY, "busy", NULL, "the %s end of %u@%u is attached to VM %s", rx ? "receiving" : "sending", c->id, queue, other);
                rc = rb_cure(EBUSY, "ringbar detach %s %u@%u", other, c->id, queue);
            } else {
                rb_fail(EBUSY, "busy", NULL, "the %s end of %u@%u is held by process %d (%s)", rx ? "receiving" : "sending", c->id, queue, pid, q->end[rx].name);
                rc = rb_cure(EBUSY, "kill %d", pid);
            }
        }
    }
    if (rc == 0 && q->direct && !rx && rb_pool_own(c, lane))
        rc = rb_fail(ENOTSUP, "not-supported", "attach it with --pool rw", "a VM that transmits from a pool of its own cannot send on direct queue %u@%u", c->id, queue);
    if (rc == 0 && !q->direct && rx && rb_pools_open(c) & ~rb_get(&rec->pools) && rb_get(&rb_leg_of(c, 2 * queue + RB_LEG_R)->lent))
        rc = rb_fail(EBUSY, "needs-replug", "let its receiver read them first, or add --replug",
                     "queue %u@%u holds packets, and VM %s does not see the pool of every VM that sends", c->id, queue, rec->vm);
    if (rc == 0 && q->direct)
        rc = open_direct(c, queue, rec);
    else if (rc == 0) {
        uint32_t number = 2 * queue + (rx ? RB_LEG_R : RB_LEG_T);
        struct rb_leg *leg = rb_leg_of(c, number);
        uint64_t place = 0;
        if (rx)
            rc = rb_borrower_done(c, number);
        if (rx && rb_get(&rec->book) && rb_get(&leg->book) && rb_get(&rec->book) != rb_get(&leg->book)) { /* what the dead served may be free by now */
            end_if_dead(c, rb_get(&rec->book));
            end_if_dead(c, rb_get(&leg->book));
        }
        uint32_t lane_book = rb_get(&rec->book), book = rx ? rb_get(&leg->book) : 0;
        if (rc < 0)
            ;
        else if (!rx && leg->kind == RB_LEG_GRANT)
            rc = rb_fail(EBUSY, "busy", "read them, or wait", "packets that a VM sent on %u@%u before are still unread", c->id, queue);
        else if (rx && book && lane_book && book != lane_book) {
            int32_t feeder = rb_byte_holder(c->reg, RB_LOCK_BOOK + book - 1);
            if (feeder)
                rb_fail(EBUSY, "busy", NULL, "queue %u@%u is fed by process %d, and VM %s is served by another", c->id, queue, feeder, rec->vm);
            else
                rb_fail(EBUSY, "busy", NULL, "queue %u@%u holds packets of a dead process, and VM %s is served by another", c->id, queue, rec->vm);
            rc = feeder ? rb_cure(EBUSY, "feed all queues of a VM from one program (ringbar pipeline)") : rb_cure(EBUSY, "ringbar count -i %u@%u --seconds 1", c->id, queue);
        } else
            rc = rb_place_find(c, lane, queue, rx ? RB_LEG_LEND : RB_LEG_GRANT, q->slots, q->credit, &place);
        if (rc == 0) { /* before the lock is given up for a while below */
            memset(&q->end[rx], 0, sizeof q->end[rx]);
            q->end[rx].lane = lane + 1;
            q->end[rx].since_ns = rb_now_ns();
        }
        if (rc == 0 && rx) {
            rb_set(&leg->client_book, 0);
            if (book) {
                rb_set(&rec->book, book);
                rb_set(&leg->wanted, place);
                rb_settle(c, book, 2000);
            } else
                move_unserved(c, number, place);
            if (lane_book && !book)
                rb_set(&leg->book, lane_book);
            if (rb_leg_of(c, 2 * queue + RB_LEG_T)->kind) /* a VM sends on it: its server passes on */
                rb_book_bump(c, rb_get(&rb_leg_of(c, 2 * queue + RB_LEG_T)->book));
        } else if (rc == 0) {
            rb_leg_init(c, number, RB_LEG_GRANT, q->slots, q->credit, place);
            /* A consumer that waits on the host's ring already is fed by whoever serves the VM. */
            rb_set(&leg->book, lane_book);
            rb_place_live(c, place);
            rb_settle(c, lane_book, 2000);
        }
        if (rc == 0 && rb_get(&rec->book) && !lane_book) /* the lane has got a server: its other legs are that book's too */
            for (uint32_t n = 0; n < RB_MAX_LEGS; n++) {
                struct rb_leg *o = rb_leg_of(c, n);
                if (o->kind && !rb_get(&o->book) && rb_get(&o->place) >> 32 == lane)
                    rb_set(&o->book, rb_get(&rec->book));
            }
        if (rc == 0)
            rb_book_bump(c, rb_get(&rec->book));
    }
    if (rc == 0 && q->direct) {
        memset(&q->end[rx], 0, sizeof q->end[rx]);
        q->end[rx].lane = lane + 1;
        q->end[rx].since_ns = rb_now_ns();
    }
    rb_leave(c->reg);
    return rc;
}

/* The VM's end of one leg goes: its book takes home what it held. how: 1 all of it, 2 quarantine. Recovery lock held. */
static int release_leg(struct rb_cluster *c, uint32_t number, uint32_t how, int timeout_ms)
{
    struct rb_leg *leg = rb_leg_of(c, number);
    uint32_t book = rb_get(&leg->book);
    uint64_t place = rb_get(&leg->place);
    if (leg->kind == RB_LEG_NONE)
        return 1;
    if (leg->kind == RB_LEG_LEND && (how == 1 || !book)) {
        uint64_t wanted;
        int rc = rb_host_place(c, number / 2, leg->slots, leg->credit, &wanted);
        if (rc < 0)
            return rc;
        if (!book)
            return move_unserved(c, number, wanted) == 0;
        rb_place_free(c, rb_get(&leg->wanted) != place ? rb_get(&leg->wanted) : 0);
        rb_set(&leg->wanted, wanted);
    }
    if (!book) { /* nothing was ever lent on it */
        rb_place_free(c, place);
        leg->kind = RB_LEG_NONE;
        rb_set(&leg->place, 0);
        return 1;
    }
    rb_set(&leg->release, how);
    return rb_settle(c, book, timeout_ms);
}

/* A direct queue: home when its last member has let go. */
static void release_direct(struct rb_cluster *c, uint32_t queue)
{
    struct rb_queue *q = &c->reg->state->queue[queue];
    struct rb_leg *leg = rb_leg_of(c, 2 * queue + RB_LEG_R);
    uint32_t book = rb_get(&leg->book), lane = (uint32_t)(rb_get(&leg->place) >> 32);
    uint64_t place;
    struct rb_server s, *mine = NULL;
    struct rb_leg_ctx *l;
    if (q->end[0].lane || q->end[1].lane || leg->kind != RB_LEG_DIRECT || !book)
        return;
    if (c->server && c->server->book + 1 == book)
        mine = c->server;
    else if (rb_book_dead(c->reg, book - 1) && rb_server_act(c, book - 1, &s) == 0)
        mine = &s;
    if (!mine) {
        rb_set(&leg->release, 1); /* its living owner does it */
        if (rb_settle(c, book, 2000) == 0)
            return; /* when it looks again; until then nothing is given out twice */
    } else {
        if (rb_server_leg(mine, 2 * queue + RB_LEG_R, &l) == 0) {
            rb_leg_reclaim(mine, l, RB_RECLAIM_ALL);
            rb_server_drop_leg(mine, l);
        }
        if (mine == &s) {
            rb_set(&leg->book, 0);
            rb_server_end(&s);
            rb_server_done(&s);
        }
    }
    struct rb_lane *memory = rb_lane_get(c, lane);
    if (memory) {
        rb_set(&memory->header.state, RB_SEG_GONE);
        rb_lane_touch(memory);
    }
    unlink(c->reg->state->lane[lane].path);
    rb_set(&c->reg->state->lane[lane].state, RB_SEG_FREE);
    if (rb_host_place(c, queue, q->slots, q->credit, &place) == 0) {
        rb_leg_init(c, 2 * queue + RB_LEG_R, RB_LEG_LEND, q->slots, q->credit, place);
        rb_place_live(c, place);
        rb_book_bump(c, mine == &s ? 0 : book); /* its owner forgets the old rings */
    }
}

static int unbind(struct rb_cluster *c, uint32_t queue, int rx, uint32_t how)
{
    struct rb_queue *q = &c->reg->state->queue[queue];
    struct rb_leg *leg = rb_leg_of(c, 2 * queue + (rx ? RB_LEG_R : RB_LEG_T));
    int rc = 1;
    if (rb_leg_of(c, 2 * queue + RB_LEG_R)->kind == RB_LEG_DIRECT) {
        if (how == 1) {
            memset(&q->end[rx], 0, sizeof q->end[rx]);
            release_direct(c, queue);
        }
        return 1;
    }
    struct rb_lane *lane = leg->kind ? rb_lane_get(c, (uint32_t)(rb_get(&leg->place) >> 32)) : NULL;
    if (lane && c->reg->state->lane[rb_get(&leg->place) >> 32].domain) {
        rb_store_release(&lane->entry[(uint32_t)rb_get(&leg->place) - 1].ready, 2); /* the guest's next burst sees it */
        rb_lane_touch(lane);
        rb_bell_ring_lane(c, (uint32_t)(rb_get(&leg->place) >> 32));
    }
    rc = release_leg(c, 2 * queue + (rx ? RB_LEG_R : RB_LEG_T), how, 2000);
    if (rc >= 0 && how == 1)
        memset(&q->end[rx], 0, sizeof q->end[rx]);
    return rc;
}

int rb_lane_unbind(rb_cluster *c, uint32_t lane, uint32_t queue, uint32_t direction)
{
    int rc = host_only(c), rx = direction == RB_VM_RX;
    if (rc < 0 || (rc = rb_enter(c->reg)) < 0)
        return rc;
    if (!record_of(c, lane))
        rc = -ENOENT;
    else if ((rc = rb_queue_check(c, queue)) == 0) {
        if (c->reg->state->queue[queue].end[rx].lane != lane + 1)
            rc = rb_fail(ENOENT, "not-attached", "see: ringbar status", "queue %u@%u is not attached there", c->id, queue);
        else
            rc = unbind(c, queue, rx, 1);
    }
    rb_leave(c->reg);
    return RB_MIN(rc, 0);
}

int rb_lane_announce(rb_cluster *c, uint32_t lane_number, int timeout_ms)
{
    int rc = host_only(c), busy = 1;
    if (rc < 0 || (rc = rb_enter(c->reg)) < 0)
        return rc;
    struct rb_segment_record *rec = record_of(c, lane_number);
    struct rb_lane *lane = rec ? rb_lane_get(c, lane_number) : NULL;
    if (lane) {
        rb_set(&rec->state, RB_SEG_CLOSING);
        rb_set(&lane->header.state, RB_SEG_CLOSING);
        rb_lane_touch(lane);
        rb_bell_ring_lane(c, lane_number);
    }
    rb_leave(c->reg);
    if (!lane)
        return -ENOENT;
    uint64_t until = rb_mono_ns() + (uint64_t)timeout_ms * 1000000u;
    while (busy) {
        busy = 0;
        for (uint32_t i = 0; i < RB_LANE_QUEUES; i++)
            busy |= rb_get(&lane->entry[i].ready) && rb_get(&lane->ctl[i].open);
        if (!busy || rb_mono_ns() >= until)
            break;
        nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
    }
    return !busy;
}

int rb_lane_remove(rb_cluster *c, uint32_t lane_number, int still_mapped)
{
    int rc = host_only(c);
    if (rc < 0 || (rc = rb_enter(c->reg)) < 0)
        return rc;
    struct rb_segment_record *rec = record_of(c, lane_number);
    struct rb_lane *lane = rec ? rb_lane_get(c, lane_number) : NULL;
    if (!lane) {
        rb_leave(c->reg);
        return -ENOENT;
    }
    rb_set(&rec->state, RB_SEG_CLOSING);
    rb_set(&lane->header.state, RB_SEG_GONE);
    rb_lane_touch(lane);
    for (uint32_t q = 0; q < RB_MAX_QUEUES; q++)
        for (int rx = 0; rx < 2; rx++)
            if (c->reg->state->queue[q].used && c->reg->state->queue[q].end[rx].lane == lane_number + 1)
                unbind(c, q, rx, still_mapped ? 2 : 1);
    if (!still_mapped) {
        rb_set(&c->reg->state->bell[lane_number].pid, 0);
        rb_pool_close(c, lane_number);
        rec->vm[0] = 0;
        rb_set(&rec->state, RB_SEG_GONE);
        rb_lane_sweep(c, lane_number); /* or when its server has drained the last leg: a successor may have to map it still */
    }
    rb_leave(c->reg);
    return 0;
}

int rb_lane_reset(rb_cluster *c, uint32_t lane_number)
{
    int rc = host_only(c);
    if (rc < 0 || (rc = rb_enter(c->reg)) < 0)
        return rc;
    for (uint32_t leg = 0; leg < RB_MAX_LEGS; leg++) {
        struct rb_leg *l = rb_leg_of(c, leg);
        uint64_t place = rb_get(&l->place), session = 0;
        struct rb_lane *lane = l->kind != RB_LEG_NONE && l->kind != RB_LEG_DIRECT && place && place >> 32 == lane_number ? rb_lane_get(c, lane_number) : NULL;
        if (!lane)
            continue;
        struct rb_ctl *ctl = &lane->ctl[(uint32_t)place - 1];
        rb_set(&ctl->open, 0);
        if (!rb_get(&ctl->session))
            continue; /* never opened */
        while (!session || session == rb_get(&l->echoed))
            if (getrandom(&session, sizeof session, 0) != sizeof session)
                session = rb_now_ns();
        rb_store_release(&ctl->session, session);
    }
    rb_leave(c->reg);
    return 0;
}

int rb_lane_bindings(rb_cluster *c, uint32_t lane_number, rb_binding *out, int n)
{
    int count = 0, rc = host_only(c);
    if (rc < 0)
        return rc;
    for (uint32_t q = 0; q < RB_MAX_QUEUES; q++)
        for (int rx = 0; rx < 2; rx++) {
            if (!c->reg->state->queue[q].used || c->reg->state->queue[q].end[rx].lane != lane_number + 1)
                continue;
            uint64_t place = rb_get(&rb_leg_of(c, 2 * q + (rx ? RB_LEG_R : RB_LEG_T))->place);
            struct rb_lane *lane = place ? rb_lane_get(c, (uint32_t)(place >> 32)) : NULL;
            if (count < n)
                out[count] = (rb_binding){q, rx ? RB_VM_RX : RB_VM_TX, lane && rb_get(&lane->ctl[(uint32_t)place - 1].open) != 0};
            count++;
        }
    return count;
}
