/* SPDX-License-Identifier: Apache-2.0
 *
 * Queues, and where their rings are. A queue is a leg towards its consumer (R), and, when a VM sends on it, a leg from that VM (T). A
 * leg's rings lie in one entry of one lane, its place: the host's own lanes for legs between host processes, a VM's lane for that
 * VM's. All of this changes only under the recovery lock.
 */
#include "rb_internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define HOST_LANE_BYTES (8ull << 20)

struct rb_leg *rb_leg_of(struct rb_cluster *c, uint32_t leg) { return &c->reg->state->leg[leg]; }

int rb_queue_check(struct rb_cluster *c, uint32_t queue)
{
    if (queue < RB_MAX_QUEUES && c->reg->state->queue[queue].used)
        return 0;
    rb_fail(ENOENT, "no-such-queue", NULL, "there is no queue %u@%u", c->id, queue);
    return rb_cure(ENOENT, "ringbar queue create %u", c->id);
}

struct rb_lane *rb_lane_get(struct rb_cluster *c, uint32_t lane)
{
    struct rb_lane_map *m = &c->lane[lane];
    struct rb_mapping map = {0};
    if (!c->reg)
        return m->lane;
    uint64_t life = c->reg->state->lane_life[lane];
    if (m->lane && m->life == life)
        return m->lane;
    struct rb_segment_record *r = &c->reg->state->lane[lane];
    if (m->lane)
        rb_lane_unmap(c, lane); /* its number was given to another lane since */
    if (!r->domain) {
        if (rb_segment_open(r->path, c->id, RB_KIND_LANE, c->generation, 1, &map, NULL) < 0)
            return NULL;
    } else if (rb_segment_map(r, &map) < 0) /* the VM may have overwritten its header, and others depend on this server */
        return NULL;
    *m = (struct rb_lane_map){map.base, map.size, life};
    return m->lane;
}

void rb_lane_unmap(struct rb_cluster *c, uint32_t lane)
{
    struct rb_lane_map *m = &c->lane[lane];
    bool used = false;
    for (uint32_t i = 0; c->server && i < c->server->actives; i++) {
        uint8_t *at = (uint8_t *)c->server->active[i]->ring.ctl;
        used |= at >= (uint8_t *)m->lane && at < (uint8_t *)m->lane + m->size;
    }
    for (uint32_t i = 0; i < RB_MAX_ENDS; i++)
        used |= c->end[i] && c->end[i]->lane == m->lane;
    if (!used) /* else it stays mapped while this process lives: rather that than a pointer to nothing */
        munmap(m->lane, m->size);
    *m = (struct rb_lane_map){0};
}

void rb_lane_sweep(struct rb_cluster *c, uint32_t lane)
{
    struct rb_segment_record *r = &c->reg->state->lane[lane];
    if (rb_get(&r->state) != RB_SEG_GONE)
        return;
    for (uint32_t n = 0; n < RB_MAX_LEGS; n++) {
        struct rb_leg *l = rb_leg_of(c, n);
        if (l->kind && (rb_get(&l->place) >> 32 == lane || rb_get(&l->wanted) >> 32 == lane) && rb_get(&l->place))
            return;
    }
    unlink(r->path);
    rb_set(&r->state, RB_SEG_FREE);
}

static struct rb_place_record *place_of(struct rb_cluster *c, uint64_t place)
{
    return &c->reg->state->place[place >> 32][(uint32_t)place - 1];
}

void rb_lane_touch(struct rb_lane *lane) { rb_store_release(&lane->header.epoch, rb_get(&lane->header.epoch) + 1); }

static uint64_t ring_bytes(uint32_t slots, uint32_t returns) { return (uint64_t)slots * sizeof(struct rb_slot) + (uint64_t)returns * 4; }

/* First gap of `bytes` in the lane's ring space; 0 when there is none. */
static uint64_t find_gap(const struct rb_place_record *record, uint64_t size, uint64_t bytes)
{
    uint64_t at = RB_LANE_RINGS_AT;
    for (int moved = 1; moved;) {
        moved = 0;
        for (uint32_t i = 0; i < RB_LANE_QUEUES; i++) {
            uint64_t from = record[i].forward_at, n = ring_bytes(record[i].slots, record[i].returns);
            if (record[i].used && from < at + bytes && at < from + n) {
                at = (from + n + 127) & ~127ull;
                moved = 1;
            }
        }
        if (at + bytes > size)
            return 0;
    }
    return at;
}

int rb_place_find(struct rb_cluster *c, uint32_t lane_number, uint32_t queue, uint32_t kind, uint32_t slots, uint32_t credit, uint64_t *place)
{
    struct rb_lane *lane = rb_lane_get(c, lane_number);
    if (!lane)
        return -ENODEV;
    uint32_t returns = (uint32_t)rb_pow2(RB_MAX(credit, 2u));
    struct rb_place_record *record = c->reg->state->place[lane_number];
    uint64_t size = c->lane[lane_number].size, at = find_gap(record, size, ring_bytes(slots, returns));
    for (uint32_t i = 0; i < RB_LANE_QUEUES && at; i++) {
        struct rb_lane_entry *e = &lane->entry[i];
        if (record[i].used)
            continue;
        record[i] = (struct rb_place_record){
            .used = 2, .queue = queue, .slots = slots, .returns = returns, .forward_at = at, .return_at = at + (uint64_t)slots * sizeof(struct rb_slot)};
        memset(&lane->ctl[i], 0, sizeof lane->ctl[i]);
        e->queue = queue;
        e->kind = kind;
        e->slots = slots;
        e->returns = returns;
        e->credit = credit;
        e->forward_at = at;
        e->return_at = at + (uint64_t)slots * sizeof(struct rb_slot);
        rb_set(&e->paused, 0);
        rb_store_release(&e->ready, 2); /* reserved: rb_place_live shows it */
        *place = (uint64_t)lane_number << 32 | (i + 1);
        return 0;
    }
    return rb_fail(ENOSPC, "lane-full", "detach the VM and attach it again with all its queues, or use queues with fewer slots",
                   "the lane has no room for another queue of %u slots", slots);
}

void rb_place_live(struct rb_cluster *c, uint64_t place)
{
    struct rb_lane *lane = rb_lane_get(c, (uint32_t)(place >> 32));
    if (!lane)
        return;
    place_of(c, place)->used = 1;
    rb_store_release(&lane->entry[(uint32_t)place - 1].ready, 1);
    rb_lane_touch(lane);
}

void rb_place_free(struct rb_cluster *c, uint64_t place)
{
    if (!place)
        return;
    place_of(c, place)->used = 0;
    struct rb_lane *lane = rb_lane_get(c, (uint32_t)(place >> 32));
    if (!lane)
        return;
    rb_store_release(&lane->entry[(uint32_t)place - 1].ready, 0);
    rb_lane_touch(lane);
}

/* Make a lane segment and its record; returns its number. Recovery lock held. */
int rb_lane_new(struct rb_cluster *c, uint64_t size, const char *vm, const char *identity)
{
    struct rb_state *s = c->reg->state;
    for (uint32_t i = 0; i < RB_MAX_LANES; i++) {
        struct rb_segment_record *r = &s->lane[i];
        struct rb_mapping m = {0};
        uint32_t pages = RB_PAGES_4K;
        if (rb_get(&r->state) != RB_SEG_FREE)
            continue;
        memset(r, 0, sizeof *r);
        int rc = rb_segment_create(c->id, RB_KIND_LANE, i, rb_pow2(size), &pages, -1, 0, c->generation, r->path, NULL, &m);
        if (rc < 0)
            return rc;
        struct rb_lane *lane = m.base;
        lane->abi_min = lane->abi_max = RB_ABI_VERSION;
        snprintf(lane->vm, sizeof lane->vm, "%s", vm);
        r->size = m.size;
        r->pages = pages;
        r->domain = *vm ? ++s->domains : 0;
        snprintf(r->vm, sizeof r->vm, "%s", vm);
        snprintf(r->identity, sizeof r->identity, "%s", identity);
        if (c->lane[i].lane)
            rb_lane_unmap(c, i);
        memset(s->place[i], 0, sizeof s->place[i]);
        memset(&s->bell[i], 0, sizeof s->bell[i]);
        c->lane[i] = (struct rb_lane_map){lane, m.size, ++s->lane_life[i]};
        rb_set(&r->state, RB_SEG_OPEN);
        return (int)i;
    }
    return rb_fail(ENOSPC, "too-many-lanes", NULL, "cluster %u has %u lanes, which is the most", c->id, RB_MAX_LANES);
}

int rb_host_place(struct rb_cluster *c, uint32_t queue, uint32_t slots, uint32_t credit, uint64_t *place)
{
    struct rb_state *s = c->reg->state;
    for (uint32_t i = 0; i < RB_MAX_LANES; i++)
        if (rb_get(&s->lane[i].state) == RB_SEG_OPEN && !s->lane[i].vm[0] && rb_place_find(c, i, queue, RB_LEG_LEND, slots, credit, place) == 0)
            return 0;
    uint64_t need = RB_LANE_RINGS_AT + ring_bytes(slots, (uint32_t)rb_pow2(credit));
    int lane = rb_lane_new(c, RB_MAX(HOST_LANE_BYTES, need), "", "");
    return lane < 0 ? lane : rb_place_find(c, (uint32_t)lane, queue, RB_LEG_LEND, slots, credit, place);
}

int rb_place_ring(struct rb_cluster *c, uint64_t place, struct rb_ring *r, struct rb_lane_entry **entry)
{
    uint32_t number = (uint32_t)(place >> 32), index = (uint32_t)place - 1;
    if (!place || index >= RB_LANE_QUEUES || number >= RB_MAX_LANES)
        return rb_fail(ENODEV, "detached", NULL, "a queue of cluster %u has no rings any more", c->id);
    struct rb_lane *lane = rb_lane_get(c, number);
    if (!lane)
        return -ENODEV;
    struct rb_place_record e;
    uint64_t size = c->lane[number].size;
    if (c->reg)
        e = c->reg->state->place[number][index]; /* not the table in the lane, where a VM can write */
    else {
        const struct rb_lane_entry *in_lane = &lane->entry[index];
        e = (struct rb_place_record){.slots = in_lane->slots, .returns = in_lane->returns, .forward_at = in_lane->forward_at, .return_at = in_lane->return_at};
    }
    if (e.slots < 2 || e.slots > RB_MAX_SLOTS || (e.slots & (e.slots - 1)) || e.returns < 2 || (e.returns & (e.returns - 1)) ||
        e.returns > 4 * RB_MAX_SLOTS || e.forward_at < RB_LANE_RINGS_AT || e.forward_at > size || ring_bytes(e.slots, e.returns) > size - e.forward_at ||
        e.return_at != e.forward_at + (uint64_t)e.slots * sizeof(struct rb_slot) || (e.forward_at & 15))
        return rb_fail(EPROTO, "bad-lane", "detach the VM and attach it again", "the table of a lane of cluster %u was overwritten", c->id);
    memset(r, 0, sizeof *r);
    r->ctl = &lane->ctl[index];
    r->forward = (struct rb_slot *)((uint8_t *)lane + e.forward_at);
    r->returned = (uint32_t *)((uint8_t *)lane + e.return_at);
    r->slots = e.slots;
    r->mask = e.slots - 1;
    r->returns = e.returns;
    r->rmask = e.returns - 1;
    if (entry)
        *entry = &lane->entry[index];
    return 0;
}

void rb_leg_init(struct rb_cluster *c, uint32_t number, uint32_t kind, uint32_t slots, uint32_t credit, uint64_t place)
{
    struct rb_leg *l = rb_leg_of(c, number);
    memset(l, 0, sizeof *l);
    l->slots = slots;
    l->credit = credit;
    l->returns = (uint32_t)rb_pow2(RB_MAX(credit, 2u));
    rb_set(&l->place, place);
    rb_set(&l->wanted, place);
    l->kind = kind;
}

/* ---- the sizing rule ---------------------------------------------------------------------------------------- */

/* All credits and grants, and what the devices were promised: each is claimed by exactly one book. */
static uint64_t promised(struct rb_state *s)
{
    uint64_t sum = 2 * RB_BURST;
    for (uint32_t q = 0; q < RB_MAX_QUEUES; q++)
        if (s->queue[q].used)
            sum += s->queue[q].credit;
    return sum;
}

int rb_queue_create(rb_cluster *c, int id, const rb_queue_options *options)
{
    rb_queue_options o = {0};
    uint64_t place;
    int rc = rb_alive(c);
    if (rc < 0)
        return rc;
    if (!c->reg)
        return rb_fail(ENOTSUP, "guest", "ringbar queue create, on the host", "queues are made on the host");
    if (options)
        memcpy(&o, options, RB_MIN(options->struct_size, sizeof o));
    if (!o.slots)
        o.slots = 4096;
    if (o.slots < 2 || o.slots > RB_MAX_SLOTS || (o.slots & (o.slots - 1))) {
        uint32_t near = o.slots <= 2 ? 2 : o.slots >= RB_MAX_SLOTS ? RB_MAX_SLOTS : (uint32_t)rb_pow2(o.slots);
        if (near > 2 && near > o.slots && near - o.slots > o.slots - near / 2)
            near /= 2;
        rb_fail(EINVAL, "bad-size", NULL, "a queue cannot have %u slots: powers of two from 2 to %u can be had", o.slots, RB_MAX_SLOTS);
        return rb_cure(EINVAL, "--slots %u is the nearest", near);
    }
    if (!o.credit)
        o.credit = o.slots + 2 * RB_BURST;
    if (o.credit > 2 * RB_MAX_SLOTS) {
        rb_fail(EINVAL, "bad-size", NULL, "a credit of %u is too large", o.credit);
        return rb_cure(EINVAL, "--credit %u is the largest", 2 * RB_MAX_SLOTS);
    }
    if ((rc = rb_enter(c->reg)) < 0)
        return rc;
    struct rb_state *s = c->reg->state;
    if (id < 0)
        for (id = 0; id < (int)RB_MAX_QUEUES && (s->queue[id].used || rb_leg_of(c, 2 * (uint32_t)id)->kind); id++)
            ;
    uint64_t sum = promised(s) + o.credit, have = s->buffers - RB_EXTENT;
    if (id >= (int)RB_MAX_QUEUES)
        rc = rb_fail(EINVAL, "bad-number", NULL, "queue numbers go from 0 to %u", RB_MAX_QUEUES - 1);
    else if (rb_leg_of(c, 2 * (uint32_t)id)->kind && !s->queue[id].used) {
        rb_fail(EBUSY, "busy", NULL, "queue %u@%d was destroyed, and the process that served it has not looked since", c->id, id);
        rc = rb_cure(EBUSY, "take another number");
    } else if (s->queue[id].used) {
        rb_fail(EEXIST, "queue-exists", NULL, "queue %u@%d exists", c->id, id);
        rc = rb_cure(EEXIST, "ringbar queue destroy %u@%d", c->id, id);
    } else if (sum > have) {
        rb_fail(ENOSPC, "pool-too-small", NULL, "the pool of cluster %u has %u buffers, and its queues could lend %llu with this one", c->id, s->buffers,
                (unsigned long long)sum);
        rc = rb_cure(ENOSPC, "make the cluster with --buffers %llu", (unsigned long long)rb_pow2(sum + RB_EXTENT));
        if (have > promised(s))
            rc = rb_cure(ENOSPC, "make the cluster with --buffers %llu, or the queue with --credit %llu or less",
                         (unsigned long long)rb_pow2(sum + RB_EXTENT), (unsigned long long)(have - promised(s)));
    } else if ((rc = rb_host_place(c, (uint32_t)id, o.slots, o.credit, &place)) == 0) {
        struct rb_queue *q = &s->queue[id];
        memset(q, 0, sizeof *q);
        if (s->filter[id].count) { /* of a queue that had this number before */
            s->filter[id].count = 0;
            s->filter[id].text[0] = 0;
            s->filter[id].version++;
        }
        q->slots = o.slots;
        q->credit = o.credit;
        q->direct = o.direct;
        rb_leg_init(c, 2 * (uint32_t)id + RB_LEG_R, RB_LEG_LEND, o.slots, o.credit, place);
        rb_place_live(c, place);
        rb_leg_init(c, 2 * (uint32_t)id + RB_LEG_T, RB_LEG_NONE, o.slots, o.credit, 0);
        q->used = 1;
        rc = id;
    }
    rb_leave(c->reg);
    return rc;
}

int rb_queue_remove(struct rb_cluster *c, uint32_t queue)
{
    int rc;
    if ((rc = rb_queue_check(c, queue)) == 0) {
        struct rb_queue *q = &c->reg->state->queue[queue];
        for (unsigned e = 0; e < 2 && rc == 0; e++) {
            int32_t pid = rb_byte_holder(c->reg, RB_LOCK_END + 2 * queue + e);
            if (pid) {
                rb_fail(EBUSY, "busy", NULL, "queue %u@%u is open in process %d (%s)", c->id, queue, pid, q->end[e].name);
                rc = rb_cure(EBUSY, "end it: kill %d", pid);
            } else if (q->end[e].lane) {
                const char *vm = c->reg->state->lane[q->end[e].lane - 1].vm;
                rb_fail(EBUSY, "busy", NULL, "queue %u@%u is attached to %s", c->id, queue, vm);
                rc = rb_cure(EBUSY, "ringbar detach %s %u@%u", vm, c->id, queue);
            }
        }
        for (unsigned l = 0; l < 2 && rc == 0; l++) {
            struct rb_leg *leg = rb_leg_of(c, 2 * queue + l);
            uint32_t book = rb_get(&leg->book);
            if (!leg->kind)
                continue;
            if (book) { /* whoever serves it takes home what is lent, now or when it next looks */
                rb_set(&leg->release, 3);
                rb_settle(c, book, 200);
            } else {
                rb_place_free(c, rb_get(&leg->place));
                leg->kind = RB_LEG_NONE;
            }
        }
        if (rc == 0 && q->observes)
            c->reg->state->queue[q->observes - 1].observer = 0;
        for (uint32_t hop = 0; rc == 0 && hop < RB_MAX_QUEUES; hop++)
            if (c->reg->state->queue[hop].feeds == queue + 1)
                c->reg->state->queue[hop].feeds = UINT32_MAX;
        if (rc == 0)
            q->used = 0;
    }
    return rc;
}

int rb_queue_destroy(rb_cluster *c, uint32_t queue)
{
    int rc = rb_alive(c);
    if (rc < 0 || (rc = rb_enter(c->reg)) < 0)
        return rc;
    rc = rb_queue_remove(c, queue);
    rb_leave(c->reg);
    return rc;
}

int rb_queue_pause(rb_cluster *c, uint32_t queue, int pause)
{
    int rc = rb_alive(c);
    if (rc < 0 || (rc = rb_enter(c->reg)) < 0)
        return rc;
    if ((rc = rb_queue_check(c, queue)) == 0)
        for (unsigned l = 0; l < 2; l++) {
            struct rb_leg *leg = rb_leg_of(c, 2 * queue + l);
            uint64_t place = rb_get(&leg->place);
            struct rb_lane *lane = leg->kind ? rb_lane_get(c, (uint32_t)(place >> 32)) : NULL;
            if (!lane)
                continue;
            rb_set(&leg->paused, (uint32_t)pause);
            rb_set(&lane->entry[(uint32_t)place - 1].paused, (uint32_t)pause);
            rb_lane_touch(lane);
            uint32_t book = rb_get(&leg->book);
            if (book) {
                struct rb_book_record *b = &c->reg->state->book[book - 1];
                rb_store_release(&b->epoch, rb_get(&b->epoch) + 1);
            }
        }
    rb_leave(c->reg);
    return rc;
}

int rb_queue_list(rb_cluster *c, uint32_t *ids, int n)
{
    int count = 0;
    if (!c->reg) {
        for (uint32_t l = 0; l < c->lanes; l++)
            for (uint32_t i = 0; i < RB_LANE_QUEUES; i++)
                if (rb_get(&c->lane[l].lane->entry[i].ready)) {
                    uint32_t q = c->lane[l].lane->entry[i].queue;
                    int known = 0;
                    for (int k = 0; k < RB_MIN(count, n); k++)
                        known |= ids[k] == q;
                    if (known)
                        continue;
                    if (count < n)
                        ids[count] = q;
                    count++;
                }
        return count;
    }
    for (uint32_t q = 0; q < RB_MAX_QUEUES; q++)
        if (c->reg->state->queue[q].used) {
            if (count < n)
                ids[count] = q;
            count++;
        }
    return count;
}

/* ---- what people see ------------------------------------------------------------------------------------------ */

static void holder_info(struct rb_cluster *c, uint32_t queue, unsigned e, int32_t *pid, uint64_t *since, char *vm, char *name)
{
    const struct rb_holder *h = &c->reg->state->queue[queue].end[e];
    *pid = rb_byte_holder(c->reg, RB_LOCK_END + 2 * queue + e);
    if (*pid || h->lane) {
        *since = h->since_ns;
        memcpy(name, h->name, sizeof h->name);
    }
    if (!h->lane)
        return;
    memcpy(vm, c->reg->state->lane[h->lane - 1].vm, 128);
    /* The program in the VM, as it says itself: for people, and kept printable. */
    const struct rb_leg *l = rb_leg_of(c, 2 * queue + (e ? RB_LEG_R : RB_LEG_T));
    struct rb_ring r;
    if (l->kind && rb_place_ring(c, rb_get(&l->place), &r, NULL) == 0 && (*pid = (int32_t)(rb_get(&r.ctl->open) & INT32_MAX)) != 0) {
        memcpy(name, r.ctl->name, 31);
        for (char *p = name; *p; p++)
            *p = *p > ' ' && *p < 127 ? *p : '?';
    }
}

/* Packets that a client has sent and nobody has read yet; not the empties that it gave back, which lie there too. The ring is the client's to
 * write: what it says is for people, and each slot is looked at once. */
static uint32_t sent_unread(const struct rb_ring *r)
{
    uint32_t c = rb_get(&r->ctl->c), n = RB_MIN(rb_load_acquire(&r->ctl->p) - c, r->slots), packets = 0;
    for (uint32_t i = 0; i < n; i++) {
        rb_desc d = {.word = ((volatile struct rb_slot *)r->forward)[(c + i) & r->mask].word};
        packets += rb_desc_length(&d) != 0;
    }
    return packets;
}

static void leg_info(struct rb_cluster *c, uint32_t number, rb_queue_info *info)
{
    struct rb_leg *l = rb_leg_of(c, number);
    struct rb_ring r;
    if (!l->kind || rb_place_ring(c, rb_get(&l->place), &r, NULL) < 0)
        return;
    uint32_t p = rb_get(&r.ctl->p), cons = rb_get(&r.ctl->c), rp = rb_get(&r.ctl->rp), rc = rb_get(&r.ctl->rc), lent = rb_get(&l->lent);
    uint32_t unread = RB_MIN(p - cons, l->slots), back = RB_MIN(rp - rc, l->returns);
    if (l->kind == RB_LEG_LEND) {
        info->count += unread;
        info->lent += lent;
        info->held += lent > unread + back ? lent - unread - back : 0;
        info->packets += rb_get(&l->packets);
        info->bytes += rb_get(&l->bytes);
        info->waiting = rb_get(&r.ctl->session) != rb_get(&r.ctl->echo);
    } else {
        info->granted = lent;
        if (!info->count)
            info->count = sent_unread(&r);
        info->rx_packets += rb_get(&l->packets);
        info->rx_bytes += rb_get(&l->bytes);
        if (l->kind == RB_LEG_DIRECT) {
            info->lent += lent;
            info->packets = rb_get(&r.ctl->packets);
            info->bytes = rb_get(&r.ctl->bytes);
        }
    }
    info->copied += rb_get(&l->copied);
    info->foreign += rb_get(&l->foreign);
    uint32_t book = rb_get(&l->book);
    if (book && !info->server_pid)
        info->server_pid = rb_byte_holder(c->reg, RB_LOCK_BOOK + book - 1);
    const rb_a64 *ledger = book ? c->reg->ledgers + (uint64_t)(book - 1) * c->reg->state->capacity : NULL;
    for (uint32_t i = 0; ledger && rb_get(&l->release) == 2 && i < c->reg->state->capacity; i++)
        info->quarantined += RB_WORD_KIND(rb_get(&ledger[i])) == RB_W_QUARANTINED && RB_WORD_LEG(rb_get(&ledger[i])) == number;
    for (int i = 0; i < RB_DROP_REASONS; i++)
        info->drops[i] += rb_get(&l->drops[i]);
}

int rb_queue_get_info(rb_cluster *c, uint32_t queue, rb_queue_info *info)
{
    memset(info, 0, sizeof *info);
    info->id = queue;
    info->feeds = -1;
    if (!c->reg) {
        for (uint32_t l = 0; l < c->lanes; l++)
            for (uint32_t i = 0; i < RB_LANE_QUEUES; i++) {
                struct rb_lane *lane = c->lane[l].lane;
                struct rb_lane_entry *e = &lane->entry[i];
                if (!rb_get(&e->ready) || e->queue != queue)
                    continue;
                info->slots = e->slots;
                info->credit = e->credit;
                info->paused = rb_get(&e->paused);
                info->direct = e->kind == RB_LEG_DIRECT;
                struct rb_ring r;
                if (rb_place_ring(c, (uint64_t)l << 32 | (i + 1), &r, NULL) < 0)
                    continue;
                info->count = e->kind == RB_LEG_LEND ? RB_MIN(rb_get(&r.ctl->p) - rb_get(&r.ctl->c), r.slots) : sent_unread(&r);
                info->packets = rb_get(&lane->ctl[i].packets);
                info->bytes = rb_get(&lane->ctl[i].bytes);
            }
        if (info->slots)
            return 0;
        return rb_fail(ENOENT, "no-such-queue", "attach it on the host: ringbar attach VM QUEUE", "queue %u@%u is not attached to this VM", c->id, queue);
    }
    int rc = rb_queue_check(c, queue);
    if (rc < 0)
        return rc;
    const struct rb_queue *q = &c->reg->state->queue[queue];
    info->slots = q->slots;
    info->credit = q->credit;
    info->direct = q->direct;
    info->feeds = q->feeds && q->feeds <= RB_MAX_QUEUES ? (int32_t)q->feeds - 1 : -1;
    memcpy(info->filter, c->reg->state->filter[queue].text, sizeof info->filter - 1);
    info->paused = rb_get(&rb_leg_of(c, 2 * queue + RB_LEG_R)->paused);
    holder_info(c, queue, 0, &info->producer_pid, &info->producer_since, info->producer_vm, info->producer_name);
    holder_info(c, queue, 1, &info->consumer_pid, &info->consumer_since, info->consumer_vm, info->consumer_name);
    leg_info(c, 2 * queue + RB_LEG_R, info);
    leg_info(c, 2 * queue + RB_LEG_T, info);
    return 0;
}
