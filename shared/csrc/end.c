/* SPDX-License-Identifier: Apache-2.0
 *
 * The public calls on ends: opening by address, moving packets, waiting. What an end does is in its operations: served queues below,
 * borrowed ones in client.c, devices in their own files.
 */
#include "rb_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

/* ---- ends that this process serves ------------------------------------------------------------------------------ */

static int detached(struct rb_end *end)
{
    return rb_fail(ENODEV, "detached", NULL, "queue %s was detached, or its cluster destroyed", end->address);
}

static inline int in_step(struct rb_server *s)
{
    return rb_load_acquire(&s->rec->epoch) == s->epoch ? 0 : rb_server_sync(s);
}

static int lend_send(struct rb_end *end, rb_desc *desc, int n)
{
    struct rb_server *s = end->c->server;
    int rc = in_step(s);
    if (rc < 0 || !end->ctx)
        return rc < 0 ? rc : detached(end);
    return rb_server_lend(s, end->ctx, desc, n);
}

static int lend_alloc(struct rb_end *end, rb_desc *desc, int n)
{
    struct rb_server *s = end->c->server;
    int i;
    if (s->free < (uint32_t)n)
        rb_server_service(s);
    for (i = 0; i < n && s->free; i++) {
        desc[i].handle = s->stack[--s->free];
        rb_prefetch_write(end->c->pool[desc[i].handle >> 24] + (uint64_t)(desc[i].handle & RB_INDEX_MASK) * end->c->buffer_size + RB_BUFFER_HEADER);
        desc[i].ts = 0;
        rb_desc_set(&desc[i], 0, RB_BUFFER_HEADER, 0);
        end->c->where[rb_number(end->c, desc[i].handle)] = RB_HAND_HOME;
    }
    return i;
}

static int lend_count(struct rb_end *end)
{
    uint32_t n = end->ctx ? end->ctx->ring.p - rb_load_acquire(&end->ctx->ring.ctl->c) : 0;
    return end->ctx && n <= end->ctx->ring.slots ? (int)n : 0;
}

static int lend_ready(struct rb_end *end)
{
    struct rb_leg_ctx *l = end->ctx;
    if (!l || rb_load_acquire(&end->c->server->rec->epoch) != end->c->server->epoch)
        return 1;
    return !l->paused && lend_count(end) < (int)l->ring.slots && (l->lent < l->credit || rb_load_acquire(&l->ring.ctl->rp) != l->ring.rc);
}

static int collect_recv(struct rb_end *end, rb_desc *desc, int n)
{
    struct rb_server *s = end->c->server;
    int rc = in_step(s);
    if (rc < 0 || !end->ctx)
        return rc < 0 ? rc : detached(end);
    return rb_server_collect(s, end->ctx, desc, n);
}

static int collect_count(struct rb_end *end)
{
    uint32_t n = end->ctx ? rb_load_acquire(&end->ctx->ring.ctl->p) - end->ctx->ring.c : 0;
    return end->ctx && n <= end->ctx->ring.slots ? (int)n : 0;
}

static int collect_ready(struct rb_end *end)
{
    if (!end->ctx || rb_load_acquire(&end->c->server->rec->epoch) != end->c->server->epoch)
        return 1;
    return !end->ctx->paused && collect_count(end) > 0;
}

/* Nothing keeps this book bound to the queue any more? Then another may serve it. */
static int let_go(struct rb_server *s, struct rb_leg_ctx *l)
{
    if (l->lent || rb_enter(s->c->reg) < 0)
        return 0;
    if (rb_get(&l->rec->book) == s->book + 1 && rb_leg_of(s->c, l->number | RB_LEG_T)->kind == RB_LEG_NONE && rb_get(&l->rec->wanted) == l->place) {
        rb_set(&l->rec->book, 0);
        rb_server_drop_leg(s, l);
    } else
        l->leaving = false; /* a VM's by now */
    rb_leave(s->c->reg);
    return 1;
}

static void served_close(struct rb_end *end)
{
    struct rb_server *s = end->c->server;
    struct rb_leg_ctx *l = end->ctx;
    end->ctx = NULL;
    if (!l || !s || l->kind != RB_LEG_LEND || l->vm)
        return;
    rb_server_take(s, l);
    if (!let_go(s, l)) {
        l->leaving = true; /* when the last of them is back */
        end->c->waiting++;
    }
}

static const struct rb_end_ops lend_ops = {
    .send = lend_send, .alloc = lend_alloc, .ready = lend_ready, .count = lend_count, .close = served_close,
};
static const struct rb_end_ops collect_ops = {
    .recv = collect_recv, .ready = collect_ready, .count = collect_count, .close = served_close,
};

/* ---- opening -------------------------------------------------------------------------------------------------------- */

static int bad_address(const char *address)
{
    rb_fail(EINVAL, "bad-address", NULL, "\"%s\" is no address of a queue or device", address);
    return rb_cure(EINVAL, "queues are CLUSTER@QUEUE, as 99@0; NICs are zc:IFACE or zc:IFACE@QUEUE");
}

/* "99@0" or "zc:99@0" for this cluster: the queue's number. -EAGAIN: it is not a queue at all. */
static int parse_queue(struct rb_cluster *c, const char *address, uint32_t *queue)
{
    unsigned long id, q;
    char *rest;
    const char *p = strncmp(address, "zc:", 3) == 0 ? address + 3 : address;
    if (*p < '0' || *p > '9')
        return -EAGAIN;
    id = strtoul(p, &rest, 10);
    if (*rest != '@' || rest[1] < '0' || rest[1] > '9')
        return -EAGAIN;
    q = strtoul(rest + 1, &rest, 10);
    if (*rest || id > 65535 || q >= RB_MAX_QUEUES)
        return bad_address(address);
    if (id != c->id) {
        rb_fail(EINVAL, "bad-address", NULL, "%s is a queue of cluster %lu, and this handle is attached to %u", address, id, c->id);
        return rb_cure(EINVAL, "attach to cluster %lu for it", id);
    }
    *queue = (uint32_t)q;
    return 0;
}

static int busy_end(struct rb_cluster *c, uint32_t queue, int rx, int32_t pid)
{
    const char *what = rx ? "receiving" : "sending";
    if (!c->reg) {
        rb_fail(EBUSY, "busy", NULL, "the %s end of %u@%u is held by process %d", what, c->id, queue, pid);
        return rb_cure(EBUSY, "kill %d", pid);
    }
    struct rb_holder *h = &c->reg->state->queue[queue].end[rx];
    uint64_t since = h->since_ns ? (rb_now_ns() - h->since_ns) / 1000000000u : 0;
    if (h->lane) {
        const char *vm = c->reg->state->lane[h->lane - 1].vm;
        rb_fail(EBUSY, "busy", NULL, "the %s end of %u@%u is attached to VM %s, for %llu s", what, c->id, queue, vm, (unsigned long long)since);
        return rb_cure(EBUSY, "ringbar detach %s %u@%u", vm, c->id, queue);
    }
    rb_fail(EBUSY, "busy", NULL, "the %s end of %u@%u is held by process %d (%s), for %llu s", what, c->id, queue, pid, h->name, (unsigned long long)since);
    if (pid == (int32_t)getpid())
        return rb_cure(EBUSY, "close it first: this process has it open");
    return rb_cure(EBUSY, "kill %d", pid);
}

/* Make sure this handle's book serves the leg. Recovery lock held. */
static int serve(struct rb_cluster *c, uint32_t number, struct rb_leg_ctx **out)
{
    struct rb_leg *leg = rb_leg_of(c, number);
    struct rb_segment_record *lane = &c->reg->state->lane[rb_get(&leg->place) >> 32];
    struct rb_server *s;
    for (int tries = 0; tries < 3; tries++) {
        uint32_t book = rb_get(&leg->book);
        if (!book && lane->vm[0])
            book = rb_get(&lane->book);
        if (!book || (c->server && c->server->book + 1 == book))
            break;
        if (!rb_book_dead(c->reg, book - 1)) {
            int32_t pid = rb_byte_holder(c->reg, RB_LOCK_BOOK + book - 1);
            if (pid == (int32_t)getpid())
                rb_fail(EBUSY, "busy", "use that handle, or close it", "queue %u@%u is served by another handle of this process", c->id, number / 2);
            else {
                rb_fail(EBUSY, "busy", NULL, "queue %u@%u is served by process %d (%s)%s%s", c->id, number / 2, pid, c->reg->state->book[book - 1].owner.name,
                        lane->vm[0] ? ", which serves VM " : "", lane->vm);
                rb_cure(EBUSY, "open both queues in that program, or end it: kill %d", pid);
            }
            return -EBUSY;
        }
        int rc = rb_adopt(c, book - 1);
        if (rc < 0)
            return rc;
    }
    int rc = rb_server_get(c, &s);
    if (rc < 0)
        return rc;
    struct rb_leg_ctx *l;
    if ((rc = rb_server_leg(s, number, &l)) < 0)
        return rc;
    if (!l->claimed) {
        char what[64];
        snprintf(what, sizeof what, "queue %u@%u", c->id, number / 2);
        if ((rc = rb_server_claim(s, leg->credit, what)) < 0) {
            if (rb_get(&leg->book) != s->book + 1)
                rb_server_drop_leg(s, l);
            return rc;
        }
        l->claimed = true;
    }
    l->leaving = false;
    rb_set(&leg->book, s->book + 1);
    lane = &c->reg->state->lane[rb_get(&leg->place) >> 32];
    if (lane->vm[0]) { /* one server for all of a VM's lane: its other legs are this book's too */
        rb_set(&lane->book, s->book + 1);
        rb_server_sync(s);
    }
    rb_observe_link(s);
    *out = s->leg[number];
    return *out ? 0 : rb_fail(ENODEV, "detached", NULL, "queue %u@%u was detached just now", c->id, number / 2);
}

/* The leg's server is dead or has not come yet: answer the new session in its place. Recovery lock held. */
static void answer_for(struct rb_cluster *c, struct rb_end *end)
{
    struct rb_leg *leg = rb_leg_of(c, end->leg);
    uint32_t book = rb_get(&leg->book);
    struct rb_server s;
    if (!book) {
        rb_set(&leg->echoed, end->session);
        rb_store_release(&end->ring.ctl->echo, end->session);
    } else if (c->server && c->server->book + 1 == book)
        rb_server_service(c->server);
    else if (rb_book_dead(c->reg, book - 1) && rb_server_act(c, book - 1, &s) == 0) {
        rb_server_service(&s);
        rb_server_done(&s);
    }
}

static int open_borrowed(struct rb_end *end, struct rb_leg *leg)
{
    struct rb_cluster *c = end->c;
    uint32_t book = rb_get(&leg->client_book);
    int rc = 0;
    if (book && rb_book_dead(c->reg, book - 1) && (!c->server || c->server->book + 1 != book))
        rc = rb_adopt(c, book - 1); /* it may have lent on what it borrowed here */
    if (rc >= 0 && (!c->server || rb_get(&leg->client_book) != c->server->book + 1))
        rc = rb_borrower_done(c, end->leg);
    if (rc >= 0 && rb_get(&leg->wanted) != rb_get(&leg->place))
        rc = rb_fail(EBUSY, "busy", "try again", "the server of %s has not yet taken it back from a VM that was detached", end->address);
    if (rc < 0)
        return rc;
    rc = rb_place_ring(c, rb_get(&leg->place), &end->ring, &end->entry);
    if (rc < 0)
        return rc;
    end->lane = rb_lane_get(c, (uint32_t)(rb_get(&leg->place) >> 32));
    end->kind = leg->kind;
    end->ops = &rb_client_rx_ops;
    rb_set(&leg->client_book, c->server ? c->server->book + 1 : 0);
    if ((rc = rb_client_open(end)) == 0)
        answer_for(c, end);
    return rc;
}

static int open_on_host(struct rb_end *end, uint32_t queue)
{
    struct rb_cluster *c = end->c;
    int rx = (end->flags & RB_RX) != 0, rc = rb_queue_check(c, queue);
    if (rc < 0 || (rc = rb_enter(c->reg)) < 0)
        return rc;
    struct rb_queue *q = &c->reg->state->queue[queue];
    struct rb_leg *r = rb_leg_of(c, 2 * queue + RB_LEG_R), *t = rb_leg_of(c, 2 * queue + RB_LEG_T);
    unsigned byte = RB_LOCK_END + 2 * queue + (unsigned)rx;
    if (q->direct && r->kind == RB_LEG_DIRECT) {
        rb_fail(EBUSY, "busy", "open it in the VMs", "%s is a direct queue between two VMs", end->address);
        rc = -EBUSY;
    } else if (q->end[rx].lane || rb_byte_lock(c->reg, byte) < 0)
        rc = busy_end(c, queue, rx, rb_byte_holder(c->reg, byte));
    if (rc < 0) {
        rb_leave(c->reg);
        return rc;
    }
    end->leg = 2 * queue + RB_LEG_R;
    if (!rx) {
        end->ops = &lend_ops;
        rc = serve(c, end->leg, &end->ctx);
    } else if (t->kind == RB_LEG_GRANT && rb_get(&r->book) && rb_get(&r->book) == rb_get(&t->book) && rb_get(&r->lent)) {
        rc = open_borrowed(end, r); /* what is on its way to a receiver already comes first; the rest follows it */
    } else if (t->kind == RB_LEG_GRANT) { /* a VM sends on it */
        end->leg = 2 * queue + RB_LEG_T;
        end->ops = &collect_ops;
        c->opening = end->leg + 1;
        rc = serve(c, end->leg, &end->ctx);
        c->opening = 0;
        uint32_t book = rb_get(&t->book) ? rb_get(&t->book) : rb_get(&c->reg->state->lane[rb_get(&t->place) >> 32].book);
        if (rc == -EBUSY && book && (!rb_get(&r->book) || rb_get(&r->book) == book)) {
            /* The VM's lane is served by another process: it feeds us over a host queue, one descriptor hop. */
            end->leg = 2 * queue + RB_LEG_R;
            rb_set(&r->book, book);
            struct rb_book_record *b = &c->reg->state->book[book - 1];
            rb_store_release(&b->epoch, rb_get(&b->epoch) + 1);
            rc = open_borrowed(end, r);
        }
    } else
        rc = open_borrowed(end, r);
    if (rc < 0)
        rb_byte_unlock(c->reg, byte);
    else
        rb_holder_me(&q->end[rx]);
    rb_leave(c->reg);
    return rc < 0 ? rc : 0;
}

static int open_in_guest(struct rb_end *end, uint32_t queue)
{
    struct rb_cluster *c = end->c;
    int rx = (end->flags & RB_RX) != 0;
    unsigned byte = RB_LOCK_END + 2 * queue + (unsigned)rx;
    for (uint32_t l = 0; l < c->lanes; l++)
        for (uint32_t i = 0; i < RB_LANE_QUEUES; i++) {
            struct rb_lane_entry *e = &c->lane[l].lane->entry[i];
            if (rb_load_acquire(&e->ready) != 1 || e->queue != queue || (e->kind != RB_LEG_DIRECT && e->kind != (rx ? RB_LEG_LEND : RB_LEG_GRANT)))
                continue;
            int rc = rb_place_ring(c, (uint64_t)l << 32 | (i + 1), &end->ring, &end->entry);
            if (rc < 0)
                return rc;
            if (rb_byte_lock(c->locks, byte) < 0)
                return busy_end(c, queue, rx, rb_byte_holder(c->locks, byte));
            end->lane = c->lane[l].lane;
            end->kind = e->kind;
            end->ops = rx ? &rb_client_rx_ops : &rb_client_tx_ops;
            end->leg = 2 * queue + (rx ? RB_LEG_R : RB_LEG_T);
            if ((rc = rb_client_open(end)) < 0)
                rb_byte_unlock(c->locks, byte);
            return rc;
        }
    rb_fail(ENOENT, "no-such-queue", NULL, "this VM does not %s %u@%u", rx ? "receive from" : "send on", c->id, queue);
    return rb_cure(ENOENT, "on the host: ringbar attach VM %s%u@%u", rx ? "" : "--tx ", c->id, queue);
}

int rb_open(rb_end **out, rb_cluster *c, const char *address, uint32_t flags)
{
    uint32_t queue = 0, index = 0;
    int rc = rb_alive(c);
    if (rc < 0)
        return rc;
    if (!(flags & (RB_RX | RB_TX)))
        return rb_fail(EINVAL, "bad-option", NULL, "say whether to receive or to send");
    rb_end_finish(c);
    while (index < RB_MAX_ENDS && c->end[index])
        index++;
    if (index == RB_MAX_ENDS)
        return rb_fail(ENOSPC, "too-many-ends", "close some", "a handle has at most %u ends", RB_MAX_ENDS);
    struct rb_end *end = aligned_alloc(64, (sizeof *end + 63) & ~63ul);
    if (!end)
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    memset(end, 0, sizeof *end);
    end->c = c;
    end->index = index;
    end->flags = flags;
    end->timer = -1;
    snprintf(end->st.mode, sizeof end->st.mode, "loan");
    rc = parse_queue(c, address, &queue);
    if (rc == 0 && (flags & RB_RX) && (flags & RB_TX))
        rc = rb_fail(EINVAL, "bad-option", "open its two ends one by one", "a queue's end receives or sends, not both");
    if (rc == 0) {
        end->queue = queue;
        snprintf(end->address, sizeof end->address, "%u@%u", c->id, queue);
        rc = c->reg ? open_on_host(end, queue) : open_in_guest(end, queue);
    } else if (rc == -EAGAIN) {
        if (strncmp(address, "zc:", 3) != 0 || !address[3])
            rc = bad_address(address);
        else if (!c->reg)
            rc = rb_fail(ENOTSUP, "guest", "open it on the host", "NICs cannot be opened through a cluster that lives on the host");
        else
            rc = rb_zc_open(end, address);
    }
    if (rc < 0) {
        free(end->stock);
        free(end->origin);
        free(end);
        return rc;
    }
    c->end[index] = end;
    *out = end;
    return 0;
}

void rb_end_free(struct rb_end *end)
{
    if (end->timer >= 0)
        close(end->timer);
    free(end->stock);
    free(end->origin);
    free(end);
}

struct find_origin {
    uint32_t leg;
    int found;
};
static void has_origin(struct rb_server *s, uint32_t number, uint64_t w, void *arg)
{
    struct find_origin *f = arg;
    (void)s;
    (void)number;
    f->found |= RB_WORD_SUBKIND(w) && RB_WORD_ORIGIN(w) == f->leg;
}

void rb_close(rb_end *end)
{
    if (!end)
        return;
    struct rb_cluster *c = end->c;
    int here = c->fork_count == rb_fork_count;
    if (here) {
        for (uint32_t at = 0; at < c->buffers; at++) /* what is still in hand from here */
            if (c->where[at] == RB_HAND_BORROWED + end->index)
                rb_hand_back(c, rb_handle_of(c, at));
        if (end->lane && c->server && !end->lingering) {
            struct find_origin f = {.leg = end->leg};
            rb_server_service(c->server);
            rb_each_written(c->server, has_origin, &f);
            if (f.found) { /* lent on: it stays until all came back, with its lock, unseen */
                end->lingering = true;
                c->waiting++;
                return;
            }
        }
        if (end->ops->close)
            end->ops->close(end);
        if (!end->device && c->locks) {
            int rx = (end->flags & RB_RX) != 0;
            if (c->reg && rb_enter(c->reg) == 0) {
                memset(&c->reg->state->queue[end->queue].end[rx], 0, sizeof(struct rb_holder));
                rb_leave(c->reg);
            }
            rb_byte_unlock(c->locks, RB_LOCK_END + 2 * end->queue + (unsigned)rx);
        }
    }
    c->end[end->index] = NULL;
    rb_end_free(end);
}

void rb_end_finish(struct rb_cluster *c)
{
    struct rb_server *s = c->server;
    uint32_t still = 0;
    if (!c->waiting)
        return;
    c->waiting = 0; /* no second time while we are at it */
    for (uint32_t i = 0; i < RB_MAX_ENDS; i++)
        if (c->end[i] && c->end[i]->lingering) {
            struct find_origin f = {.leg = c->end[i]->leg};
            if (s)
                rb_each_written(s, has_origin, &f);
            if (f.found)
                still++;
            else
                rb_close(c->end[i]);
        }
    for (uint32_t i = 0; s && i < s->actives;) {
        struct rb_leg_ctx *l = s->active[i];
        if (l->leaving && let_go(s, l))
            continue; /* another is in its place, or it no longer leaves */
        still += l->leaving;
        i++;
    }
    c->waiting = still;
}

/* ---- giving back ------------------------------------------------------------------------------------------------------ */

struct rb_end *rb_client_end_of(struct rb_cluster *c, uint32_t leg)
{
    for (uint32_t i = 0; i < RB_MAX_ENDS; i++)
        if (c->end[i] && c->end[i]->lane && c->end[i]->leg == leg)
            return c->end[i];
    return NULL;
}

int rb_give(struct rb_cluster *c, uint32_t origin_leg, uint32_t handle)
{
    struct rb_end *end = rb_client_end_of(c, origin_leg);
    if (end && !end->echoed)
        end->again = true; /* dropped here: the lender finds it with the next session */
    return end && end->echoed ? rb_client_give(end, handle) : 0;
}

int rb_hand_back(struct rb_cluster *c, uint32_t handle)
{
    rb_desc d = {.handle = handle};
    return rb_return(c, &d, 1);
}

int rb_return(rb_cluster *c, const rb_desc *desc, int n)
{
    uint16_t *where = c->where;
    int done = 0, from = 0;
    if (c->fork_count != rb_fork_count)
        return rb_alive(c);
    while (from < n) { /* in runs of the same origin, which is usually all of them */
        uint32_t at = rb_number(c, desc[from].handle), hand = at == UINT32_MAX ? RB_HAND_NONE : where[at];
        int to = from;
        for (; to < n; to++) {
            at = rb_number(c, desc[to].handle);
            if (at == UINT32_MAX || where[at] != hand)
                break;
            where[at] = RB_HAND_NONE;
        }
        if (hand == RB_HAND_NONE) {
            c->errors++;
            from++;
            continue;
        }
        struct rb_end *end = hand == RB_HAND_HOME ? NULL : c->end[hand - RB_HAND_BORROWED];
        uint32_t *stack = hand == RB_HAND_HOME ? c->server->stack : end ? end->stock : NULL; /* stock: unsent empties of a sending client */
        if (stack) {
            uint32_t *top = hand == RB_HAND_HOME ? &c->server->free : &end->stocked;
            for (int i = from; i < to; i++)
                stack[(*top)++] = desc[i].handle;
        } else if (end && rb_client_usable(end)) {
            rb_ring_give(&end->ring, desc + from, (uint32_t)(to - from));
            rb_ring_gave(&end->ring);
        }
        done += to - from;
        from = to;
    }
    return done;
}

/* ---- moving packets ------------------------------------------------------------------------------------------------------- */

static inline int may_go_on(struct rb_end *end)
{
    struct rb_cluster *c = end->c;
    if (c->fork_count != rb_fork_count || (c->reg && rb_get(&c->reg->state->header.generation) != c->generation))
        return rb_alive(c);
    if (rb_get(&end->broken)) {
        rb_set(&end->broken, 0);
        return rb_fail(EINTR, "stopped", NULL, "stopped by rb_break");
    }
    return 0;
}

static int own_book(struct rb_cluster *c, uint32_t book) { return c->server && c->server->book + 1 == book; }

static int unserved(struct rb_cluster *c, const struct rb_leg *leg)
{
    uint32_t book = rb_get(&leg->book);
    return !book || (!own_book(c, book) && rb_book_dead(c->reg, book - 1));
}

/* Whether a server lives the kernel tells, which takes its time: not at every look. */
static int time_to_look(struct rb_end *end)
{
    uint64_t now = rb_mono_ns();
    if (now - end->looked < 10000000u)
        return 0;
    end->looked = now;
    return 1;
}

/* Our session was not answered, and whoever should have is dead: another answers for it. */
static void answer_for_the_dead(struct rb_end *end)
{
    struct rb_cluster *c = end->c;
    if (!unserved(c, rb_leg_of(c, end->leg)) || rb_enter(c->reg) < 0)
        return;
    answer_for(c, end);
    rb_leave(c->reg);
}

/* A VM was bound to the sending end after this receiving end had been opened, or whoever served it died, and nobody serves that VM: this
 * handle does, and passes on what comes from it to its own end. */
static void feed_myself(struct rb_end *end)
{
    struct rb_cluster *c = end->c;
    struct rb_leg *t = rb_leg_of(c, 2 * end->queue + RB_LEG_T), *r = rb_leg_of(c, 2 * end->queue + RB_LEG_R);
    struct rb_leg_ctx *l;
    if (t->kind != RB_LEG_GRANT || own_book(c, rb_get(&t->book)))
        return;
    if (rb_get(&t->book) && !time_to_look(end))
        return;
    if (!unserved(c, t) || !(own_book(c, rb_get(&r->book)) || unserved(c, r)))
        return;
    if (rb_enter(c->reg) < 0)
        return;
    if (t->kind == RB_LEG_GRANT && unserved(c, t) && rb_get(&t->place) && serve(c, 2 * end->queue + RB_LEG_T, &l) == 0) {
        rb_server_sync(c->server);
        if (rb_get(&r->book) == c->server->book + 1)
            rb_set(&r->client_book, c->server->book + 1);
    }
    rb_leave(c->reg);
}

int rb_answered(rb_end *end)
{
    struct rb_cluster *c = end->c;
    int rc = rb_alive(c);
    if (rc < 0 || !end->lane || end->kind == RB_LEG_DIRECT || end->echoed || rb_load_acquire(&end->ring.ctl->echo) == end->session)
        return rc < 0 ? rc : 1;
    if (!c->reg) {
        rb_fail(ETIMEDOUT, "no-answer", NULL, "no process on the host that serves queue %s has answered", end->address);
        return rb_cure(ETIMEDOUT, "on the host, see whether there is one, or open the other end: ringbar status %u", c->id);
    }
    struct rb_leg *leg = rb_leg_of(c, end->leg);
    answer_for_the_dead(end);
    if (rb_load_acquire(&end->ring.ctl->echo) == end->session)
        return 1;
    uint32_t book = rb_get(&leg->book);
    int32_t pid = book ? rb_byte_holder(c->reg, RB_LOCK_BOOK + book - 1) : 0;
    rb_fail(ETIMEDOUT, "no-answer", NULL, "process %d (%s), which serves queue %s, has not answered", pid, book ? c->reg->state->book[book - 1].owner.name : "",
            end->address);
    if (pid == (int32_t)getpid())
        return rb_cure(ETIMEDOUT, "it is this one: receive, send or rb_service with the handle that serves it");
    return rb_cure(ETIMEDOUT, "wait until it does, or end it: kill %d", pid);
}

/* A whole timeout went by. A server that is only busy answers much sooner. */
static int nothing_came(struct rb_end *end, int timeout_ms)
{
    int rc = timeout_ms < (end->c->reg ? 1000 : 5000) ? 0 : rb_answered(end);
    return RB_MIN(rc, 0);
}

int rb_recv(rb_end *end, rb_desc *desc, int n, int timeout_ms)
{
    uint64_t until = 0;
    if (!end->ops->recv)
        return rb_fail(EINVAL, "bad-option", "open it with RB_RX", "%s was opened for sending", end->address);
    for (;;) {
        int rc = may_go_on(end);
        if (rc < 0 || n <= 0 || (rc = end->ops->recv(end, desc, n)) != 0)
            return rc;
        if (end->lane && end->c->reg) {
            if (!end->echoed && time_to_look(end))
                answer_for_the_dead(end);
            feed_myself(end);
        }
        if (end->c->server)
            rb_server_service(end->c->server);
        if (!timeout_ms)
            return 0;
        if (timeout_ms > 0 && !until)
            until = rb_mono_ns() + (uint64_t)timeout_ms * 1000000u;
        uint64_t now = until ? rb_mono_ns() : 0;
        if (until && now >= until)
            return nothing_came(end, timeout_ms);
        rc = rb_wait(end, until ? RB_MIN((int)((until - now) / 1000000u) + 1, 5) : 5);
        if (rc < 0)
            return rc;
    }
}

int rb_send(rb_end *end, rb_desc *desc, int n, int timeout_ms)
{
    uint64_t until = 0;
    int done = 0;
    if (!end->ops->send)
        return rb_fail(EINVAL, "bad-option", "open it with RB_TX", "%s was opened for receiving", end->address);
    for (;;) {
        int rc = n < 0 ? 0 : may_go_on(end);
        if (n <= 0)
            return rc;
        if (rc == 0 && done < n) {
            rc = end->ops->send(end, desc + done, n - done);
            done += RB_MAX(rc, 0);
        }
        if (rc < 0)
            return done ? done : rc;
        if (done == n || !timeout_ms) {
            end->st.refused += (uint64_t)(n - done);
            return done;
        }
        if (timeout_ms > 0 && !until)
            until = rb_mono_ns() + (uint64_t)timeout_ms * 1000000u;
        if (until && rb_mono_ns() >= until)
            return done ? done : nothing_came(end, timeout_ms);
        if (end->c->server)
            rb_server_service(end->c->server);
        rc = rb_wait(end, 1);
        if (rc < 0)
            return done ? done : rc;
    }
}

int rb_alloc(rb_end *end, rb_desc *desc, int n)
{
    int rc = may_go_on(end);
    if (rc < 0 || n <= 0)
        return rc;
    if (!end->ops->alloc)
        return rb_fail(EINVAL, "bad-option", "open it with RB_TX", "%s was opened for receiving", end->address);
    if (!end->c->writable) {
        rb_fail(EACCES, "read-only", NULL, "this VM may only read the packets of cluster %u", end->c->id);
        return rb_cure(EACCES, "on the host: ringbar attach VM --pool rw --replug");
    }
    return end->ops->alloc(end, desc, n);
}

void *rb_data(rb_cluster *c, const rb_desc *d)
{
    return rb_number(c, d->handle) == UINT32_MAX || !rb_fits(c, d->word)
               ? NULL
               : c->pool[d->handle >> 24] + (uint64_t)(d->handle & RB_INDEX_MASK) * c->buffer_size + rb_desc_offset(d);
}

void *rb_buffer_header(rb_cluster *c, const rb_desc *d)
{
    return rb_number(c, d->handle) == UINT32_MAX ? NULL : c->pool[d->handle >> 24] + (uint64_t)(d->handle & RB_INDEX_MASK) * c->buffer_size;
}

int rb_writable(rb_cluster *c) { return c->writable; }

void rb_headers(rb_cluster *c, const rb_desc *d, int n, uint32_t width, uint8_t *out)
{
    for (int i = 0; i < n; i++, out += width) {
        const uint8_t *data = rb_data(c, &d[i]);
        uint32_t have = data ? RB_MIN(rb_desc_length(&d[i]), width) : 0;
        if (have)
            memcpy(out, data, have);
        memset(out + have, 0, width - have);
    }
}

int rb_service(rb_cluster *c)
{
    int rc = rb_alive(c), did = 0;
    if (rc < 0)
        return rc;
    if (c->server)
        did = rb_server_service(c->server);
    for (uint32_t i = 0; i < RB_MAX_ENDS; i++)
        if (c->end[i] && c->end[i]->ops->service)
            c->end[i]->ops->service(c->end[i]);
    return did;
}

/* ---- waiting ---------------------------------------------------------------------------------------------------------------- */

int rb_wait(rb_end *end, int timeout_ms)
{
    uint64_t start = rb_mono_ns();
    long step = 20000;
    for (uint32_t i = 0;; i++) {
        int rc = may_go_on(end);
        if (rc < 0)
            return rc;
        if (end->ops->ready(end))
            return 1;
        if (i < 256) {
            rb_pause();
            continue;
        }
        uint64_t gone = rb_mono_ns() - start;
        if (timeout_ms >= 0 && gone >= (uint64_t)timeout_ms * 1000000u)
            return 0;
        /* The owner of a cluster that lives with its process is dead, and nothing is left to read: the end. */
        if (end->c->reg && i % 64 == 0 && !rb_owner_alive(end->c->reg))
            return rb_fail(ENODEV, "detached", NULL, "the process that owned cluster %u is gone", end->c->id);
        nanosleep(&(struct timespec){.tv_nsec = step}, NULL);
        step = RB_MIN(step * 3 / 2, 1000000);
    }
}

void rb_break(rb_end *end) { rb_store_release(&end->broken, 1); }

int rb_fd(rb_end *end)
{
    if (end->ops->fd)
        return end->ops->fd(end);
    if (end->timer < 0) {
        end->timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
        if (end->timer < 0)
            return rb_fail(errno, "failed", NULL, "no timer could be made: %s", strerror(errno));
        struct itimerspec each = {.it_interval.tv_nsec = 1000000, .it_value.tv_nsec = 1000000};
        timerfd_settime(end->timer, 0, &each, NULL);
    }
    return end->timer;
}

int rb_count(rb_end *end) { return end->ops->count ? end->ops->count(end) : 0; }
int rb_empty(rb_end *end) { return rb_count(end) == 0; }

int rb_full(rb_end *end)
{
    uint32_t slots = end->ctx ? end->ctx->ring.slots : end->ring.slots;
    return slots && rb_count(end) >= (int)slots;
}

int rb_stats_get(rb_end *end, rb_stats *st)
{
    *st = end->st;
    if (end->ops->stats)
        end->ops->stats(end, st);
    else if (end->ctx) {
        st->packets = rb_get(&end->ctx->rec->packets);
        st->bytes = rb_get(&end->ctx->rec->bytes);
        st->copied = rb_get(&end->ctx->rec->copied);
        for (int i = 0; i < RB_DROP_REASONS; i++)
            st->drops[i] = rb_get(&end->ctx->rec->drops[i]);
    }
    return 0;
}

void rb_drop(rb_end *end, int n, int reason)
{
    if (n <= 0 || reason < 0 || reason >= RB_DROP_REASONS)
        return;
    end->st.drops[reason] += (uint64_t)n;
    if (end->ctx)
        rb_set(&end->ctx->rec->drops[reason], rb_get(&end->ctx->rec->drops[reason]) + (uint64_t)n);
    else if (end->lane && end->ring.ctl && (end->flags & RB_TX))
        rb_set(&end->ring.ctl->dropped, rb_get(&end->ring.ctl->dropped) + (uint64_t)n);
}

const char *rb_address(rb_end *end) { return end->address; }
