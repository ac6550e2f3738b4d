/* SPDX-License-Identifier: Apache-2.0
 *
 * Sending on a queue that another process serves: a VM's, above all, since all of a VM's lane is one book's; or one whose last sender has closed it, and
 * has loans out still. Who opens it gets a queue of its own instead, which the server empties into the one that was meant: one descriptor hop, set up by
 * itself. The server borrows on the hop and lends on, so neither a copy nor a new rule of the protocol is needed. A hop goes when its sender is gone and
 * all is through; when the server goes, the sender takes its place and empties its own hop.
 */
#include "rb_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define SLOTS 1024u /* of a hop */

static struct rb_queue *queue_of(struct rb_cluster *c, uint32_t queue) { return &c->reg->state->queue[queue]; }

static void wake(struct rb_cluster *c, uint32_t book)
{
    if (!book)
        return;
    struct rb_book_record *b = &c->reg->state->book[book - 1];
    rb_store_release(&b->epoch, rb_get(&b->epoch) + 1);
}

/* Whose book the leg towards queue's receiver is, or will be: number + 1. */
static uint32_t server_of(struct rb_cluster *c, uint32_t queue)
{
    struct rb_leg *leg = rb_leg_of(c, 2 * queue + RB_LEG_R);
    uint32_t book = rb_get(&leg->book);
    const struct rb_segment_record *lane = &c->reg->state->lane[rb_get(&leg->place) >> 32];
    return book || !lane->vm[0] ? book : rb_get(&lane->book);
}

/* ---- who sends ------------------------------------------------------------------------------------------------------------- */

struct rb_server *rb_own_server(const struct rb_cluster *c, uint32_t book)
{
    for (; c && book; c = c->deputy)
        if (c->server && c->server->book + 1 == book)
            return c->server;
    return NULL;
}

/* Where a dead process's buffers are still out, empties of a VM that sends for example, or all of a direct queue, its book has to be taken over, and one
 * handle has one book: then a second handle does it, and what this one sends to the queues of that book goes by a hop. */
int rb_deputise(struct rb_cluster *c, uint32_t number)
{
    struct rb_leg *leg = rb_leg_of(c, number);
    const struct rb_segment_record *lane = &c->reg->state->lane[rb_get(&leg->place) >> 32];
    const uint32_t book = rb_get(&leg->book) || !lane->vm[0] ? rb_get(&leg->book) : rb_get(&lane->book);
    struct rb_leg_ctx *l;
    int rc;
    if (!c->server || !book || !rb_book_dead(c->reg, book - 1))
        return -EBUSY;
    if (!c->deputy && (rc = rb_cluster_attach(c->id, &c->deputy)) < 0)
        return rc;
    rc = rb_serve(c->deputy, number, &l);
    return rc == -EBUSY ? rb_deputise(c->deputy, number) : rc;
}

/* Its server is dead, or has let go: this process serves the VM from now on, and its own hop is found there. */
static void succeed(struct rb_end *end)
{
    struct rb_cluster *c = end->c;
    uint32_t queue = end->feeds - 1, book = server_of(c, queue);
    struct rb_leg_ctx *l;
    uint64_t now;
    if (rb_own_server(c, book) || (now = rb_mono_ns()) - end->looked < 50000000u)
        return;
    end->looked = now;
    if ((book && !rb_book_dead(c->reg, book - 1)) || rb_enter(c->reg) < 0)
        return;
    book = server_of(c, queue);
    if ((!book || rb_book_dead(c->reg, book - 1)) && rb_serve(c, 2 * queue + RB_LEG_R, &l) < 0)
        rb_deputise(c, 2 * queue + RB_LEG_R);
    rb_leave(c->reg);
}

static int feed_send(struct rb_end *end, rb_desc *desc, int n)
{
    succeed(end);
    return rb_lend_ops.send(end, desc, n);
}
static int feed_alloc(struct rb_end *end, rb_desc *desc, int n) { return rb_lend_ops.alloc(end, desc, n); }
static int feed_ready(struct rb_end *end) { return rb_lend_ops.ready(end); }
static int feed_count(struct rb_end *end) { return rb_lend_ops.count(end); }
static void feed_service(struct rb_end *end) { succeed(end); } /* rb_service looks after the deputy */

/* The holder's byte of the queue that was meant goes as well. */
static void feed_close(struct rb_end *end)
{
    struct rb_cluster *c = end->c;
    uint32_t queue = end->feeds - 1;
    rb_lend_ops.close(end);
    if (rb_enter(c->reg) == 0) {
        memset(&queue_of(c, queue)->end[0], 0, sizeof(struct rb_holder));
        wake(c, server_of(c, queue));
        rb_leave(c->reg);
    }
    rb_byte_unlock(c->locks, RB_LOCK_END + 2 * queue);
}

static const struct rb_end_ops feed_ops = {
    .send = feed_send, .alloc = feed_alloc, .ready = feed_ready, .count = feed_count, .service = feed_service, .close = feed_close,
};

int rb_feed_open(struct rb_end *end)
{
    struct rb_cluster *c = end->c;
    const uint32_t queue = end->queue, book = server_of(c, queue);
    struct rb_server *own = rb_own_server(c, book);
    if (queue_of(c, queue)->observes || !book || rb_book_dead(c->reg, book - 1) || (own && own == c->server) ||
        (!own && rb_byte_holder(c->reg, RB_LOCK_BOOK + book - 1) == (int32_t)getpid()))
        return -EBUSY;
    int hop = RB_MAX_QUEUES - 1; /* from the far end: people count from 0 */
    while (hop >= 0 && (queue_of(c, (uint32_t)hop)->used || rb_leg_of(c, 2 * (uint32_t)hop)->kind))
        hop--;
    rb_queue_options o = {.struct_size = sizeof o, .slots = RB_MIN(queue_of(c, queue)->slots, SLOTS)};
    int rc = hop < 0 ? -EBUSY : rb_queue_create(c, hop, &o);
    if (rc < 0)
        return rc;
    end->queue = (uint32_t)hop;
    if ((rc = rb_open_queue(end, end->queue)) < 0) {
        rb_queue_remove(c, (uint32_t)hop);
        end->queue = queue;
        return rc;
    }
    queue_of(c, (uint32_t)hop)->feeds = end->feeds = queue + 1;
    end->ops = &feed_ops;
    wake(c, book);
    return 0;
}

int rb_feed_answered(struct rb_end *end)
{
    struct rb_cluster *c = end->c;
    const uint32_t book = server_of(c, end->feeds - 1);
    int32_t pid = book ? rb_byte_holder(c->reg, RB_LOCK_BOOK + book - 1) : 0;
    if (!pid || rb_own_server(c, book) || rb_byte_holder(c->reg, RB_LOCK_END + 2 * end->queue + 1))
        return 1;
    rb_fail(ETIMEDOUT, "no-answer", NULL, "process %d (%s), which serves queue %s, does not pass on what is sent", pid, c->reg->state->book[book - 1].owner.name,
            end->address);
    return rb_cure(ETIMEDOUT, "wait until it does, or end it: kill %d", pid);
}

/* ---- who serves the VM ----------------------------------------------------------------------------------------------------- */

struct rb_feed {
    uint32_t hop, to;    /* queues: that it comes by, and that it goes to */
    struct rb_end *end;  /* of the hop; NULL: not open */
    uint32_t waiting;    /* received, and not lent yet */
    rb_desc desc[2 * RB_BURST];
};

/* The sender's end of a hop: whether anybody has it. */
static bool sender(struct rb_cluster *c, uint32_t hop) { return rb_byte_holder(c->reg, RB_LOCK_END + 2 * hop) != 0; }

static bool unread(struct rb_cluster *c, uint32_t hop)
{
    struct rb_ring r;
    return rb_place_ring(c, rb_get(&rb_leg_of(c, 2 * hop + RB_LEG_R)->place), &r, NULL) == 0 && rb_get(&r.ctl->p) != rb_get(&r.ctl->c);
}

/* A hop that nobody sends on and nobody empties any more goes, once nothing that came by it is out. Recovery lock held. */
static void remove_hop(struct rb_cluster *c, uint32_t hop)
{
    uint32_t book = rb_get(&rb_leg_of(c, 2 * hop + RB_LEG_R)->book);
    if (sender(c, hop) || rb_byte_holder(c->reg, RB_LOCK_END + 2 * hop + 1))
        return;
    if (book && !(c->server && c->server->book + 1 == book) && !rb_book_dead(c->reg, book - 1))
        return; /* its sender has closed it, and takes its buffers home by itself */
    if (rb_borrower_done(c, 2 * hop + RB_LEG_R) == 0)
        rb_queue_remove(c, hop);
}

void rb_feed_reap(struct rb_cluster *c)
{
    for (uint32_t hop = 0; hop < RB_MAX_QUEUES; hop++) {
        const struct rb_queue *q = queue_of(c, hop);
        if (q->used && q->feeds && (q->feeds > RB_MAX_QUEUES || !unread(c, hop))) /* else whoever serves the VM next empties it */
            remove_hop(c, hop);
    }
}

static struct rb_feed *feed_of(struct rb_server *s, uint32_t hop, bool make)
{
    for (uint32_t i = 0; i < s->feeds; i++)
        if (s->feed[i].hop == hop)
            return &s->feed[i];
    struct rb_feed *all = make ? realloc(s->feed, (s->feeds + 1) * sizeof *all) : NULL;
    if (!all)
        return NULL;
    s->feed = all;
    all[s->feeds] = (struct rb_feed){.hop = hop, .to = queue_of(s->c, hop)->feeds - 1};
    return &all[s->feeds++];
}

void rb_feed_forget(struct rb_end *end)
{
    struct rb_server *s = end->c->server;
    for (uint32_t i = 0; s && i < s->feeds; i++)
        if (s->feed[i].end == end) {
            s->feed[i].end = NULL; /* what is in hand from it goes back with it */
            s->feed[i].waiting = 0;
        }
}

/* One hop to a queue that is served here. Recovery lock held. */
static void look_at(struct rb_server *s, uint32_t hop)
{
    struct rb_cluster *c = s->c;
    struct rb_feed *f = feed_of(s, hop, true);
    char address[32];
    if (!f)
        return;
    if (f->end && !sender(c, hop) && f->end->echoed && !f->waiting && rb_count(f->end) == 0) {
        rb_close(f->end); /* at once, or when the VM has given back what came by it */
    } else if (!f->end && (sender(c, hop) || unread(c, hop))) {
        snprintf(address, sizeof address, "%u@%u", c->id, hop);
        if (rb_open(&f->end, c, address, RB_RX) < 0)
            f->end = NULL; /* who had it before is not done with it yet */
    } else if (!f->end)
        remove_hop(c, hop);
}

static void look(struct rb_server *s)
{
    struct rb_cluster *c = s->c;
    if (c->leaving || rb_enter(c->reg) < 0)
        return;
    s->looking = true;
    s->feed_epoch = s->epoch;
    for (uint32_t hop = 0; hop < RB_MAX_QUEUES; hop++) {
        const struct rb_queue *q = queue_of(c, hop);
        const struct rb_leg_ctx *l = q->used && q->feeds && q->feeds <= RB_MAX_QUEUES ? s->leg[2 * (q->feeds - 1) + RB_LEG_R] : NULL;
        struct rb_feed *f;
        if (l && l->kind == RB_LEG_LEND) {
            look_at(s, hop);
        } else if (s->feeds && (f = feed_of(s, hop, false)) != NULL) { /* another serves the queue by now, or it is gone */
            if (f->end)
                rb_close(f->end);
            *f = s->feed[--s->feeds];
        }
    }
    s->looking = false;
    rb_leave(c->reg);
}

/* As much as there is room for is taken and lent on, whole packets only. The rest waits in the hop, and then its sender does. */
static int pass_on(struct rb_server *s, struct rb_feed *f)
{
    struct rb_leg_ctx *l = s->leg[2 * f->to + RB_LEG_R];
    int n, k = 0;
    if (!f->end || !l || l->kind != RB_LEG_LEND || l->paused)
        return 0;
    uint32_t room = rb_ring_space(&l->ring, RB_BURST);
    if (room == RB_RING_FAULT)
        return (int)rb_odd(l);
    if (l->lent + RB_BURST > l->credit)
        rb_server_take(s, l);
    room = RB_MIN(RB_MIN(room, RB_BURST), l->credit > l->lent ? l->credit - l->lent : 0);
    if (room && f->waiting < RB_BURST && (n = f->end->ops->recv(f->end, f->desc + f->waiting, (int)room)) > 0)
        f->waiting += (uint32_t)n;
    uint32_t whole = f->waiting;
    while (whole && whole < 2 * RB_BURST && rb_desc_flags(&f->desc[whole - 1]) & RB_MORE)
        whole--; /* the rest of it comes */
    if (whole && (k = rb_server_lend(s, l, f->desc, (int)whole)) < 0) {
        rb_return(s->c, f->desc, (int)f->waiting);
        f->waiting = 0;
        return 0;
    }
    f->waiting -= (uint32_t)k;
    memmove(f->desc, f->desc + k, f->waiting * sizeof *f->desc);
    return k;
}

int rb_feed_service(struct rb_server *s)
{
    int did = 0;
    uint64_t now;
    if (s->looking)
        return 0;
    if (__builtin_expect(s->feed_epoch != s->epoch, 0))
        look(s);
    if (__builtin_expect(s->feeds == 0, 1))
        return 0;
    if ((now = rb_mono_ns()) - s->feed_looked > 100000000u) { /* who died tells nobody */
        s->feed_looked = now;
        look(s);
    }
    for (uint32_t i = 0; i < s->feeds; i++)
        did += pass_on(s, &s->feed[i]);
    return did;
}
