/* SPDX-License-Identifier: Apache-2.0
 * Opening ends by address, and closing them: who serves a queue, who borrows on it, and who is in the way. */
#include "rb_bell.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static int bad_address(const char *address)
{
    rb_fail(EINVAL, "bad-address", NULL, "\"%s\" is no address of a queue or device", address);
    return rb_cure(EINVAL, "queues are CLUSTER@QUEUE, as 99@0; interfaces are zc:IFACE, zc:IFACE@QUEUE, IFACE or stack:IFACE; files are pcap:PATH");
}

/* ---- kinds of devices ----------------------------------------------------------------------------------------------- */

enum { STEER = 1, BUSY_POLL = 2, PROMISCUOUS = 4, FANOUT = 8, SNAPLEN = 16, REPLAY = 32, CAPTURE = 64, XDP_MODE = 128, OBSERVE = 256 };

static const struct kind {
    const char *prefix; /* that its addresses begin with */
    rb_device_open *open;
    unsigned options; /* that it knows */
} kinds[] = {
    {"zc:", rb_zc_open, STEER | BUSY_POLL | PROMISCUOUS | XDP_MODE},
    {"pcap:", rb_pcap_open, SNAPLEN | REPLAY | CAPTURE},
    {"tap:", rb_tap_open, 0},
    {"stack:", rb_stack_open, OBSERVE},
    {"", rb_eth_open, PROMISCUOUS | FANOUT | SNAPLEN}, /* whatever is left is the name of an interface */
};

static int unknown_option(const char *what, const char *address, const char *kind)
{
    rb_fail(EINVAL, "bad-option", NULL, "%s means nothing for %s", what, address);
    return rb_cure(EINVAL, "leave it away: it is for %s", kind);
}

static int check_options(const char *address, const rb_open_options *o, unsigned known)
{
    if (o->steer && !(known & STEER))
        return unknown_option("a steering rule", address, "zc:IFACE");
    if (o->busy_poll_us && !(known & BUSY_POLL))
        return unknown_option("busy polling", address, "zc:IFACE");
    if (o->promiscuous && !(known & PROMISCUOUS))
        return unknown_option("promiscuous mode", address, "zc:IFACE and IFACE");
    if (o->fanout_group && !(known & FANOUT))
        return unknown_option("a fan-out group", address, "IFACE");
    if (o->snaplen && !(known & SNAPLEN))
        return unknown_option("a snapshot length", address, "IFACE and pcap:PATH");
    if ((o->speed != 0 || o->pps != 0 || o->gbps != 0 || o->loops || o->preload) && !(known & REPLAY))
        return unknown_option("a speed of replaying", address, "pcap:PATH");
    if ((o->name || o->format || o->rotate_bytes || o->rotate_seconds != 0) && !(known & CAPTURE))
        return unknown_option("a property of a capture file", address, "pcap:PATH");
    if (o->observe && !(known & OBSERVE))
        return unknown_option("observing", address, "stack:IFACE");
    if (o->flags & RB_METADATA && !(known & XDP_MODE))
        return unknown_option("metadata of a driver", address, "zc:IFACE");
    if (o->flags & (RB_GENERIC | RB_DRIVER) && !(known & XDP_MODE))
        return unknown_option("an XDP mode", address, "zc:IFACE");
    return 0;
}

static int open_device(struct rb_end *end, const char *address, const rb_open_options *o)
{
    for (unsigned i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (strncmp(address, kinds[i].prefix, strlen(kinds[i].prefix)) == 0) {
            int rc = check_options(address, o, kinds[i].options);
            return rc < 0 ? rc : kinds[i].open(end, address, o);
        }
    return bad_address(address);
}

/* ---- queues ---------------------------------------------------------------------------------------------------------- */

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
int rb_serve(struct rb_cluster *c, uint32_t number, struct rb_leg_ctx **out)
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
        if ((rc = l->own ? rb_pool_claim(s, l->own) : rb_server_claim(s, leg->credit, what)) < 0) {
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
    s->feed_epoch = s->epoch - 1; /* there may be hops to it */
    *out = s->leg[number];
    return *out ? 0 : rb_fail(ENODEV, "detached", NULL, "queue %u@%u was detached just now", c->id, number / 2);
}

/* The leg's server is dead or has not come yet: answer the new session in its place. Recovery lock held. */
void rb_answer_for(struct rb_cluster *c, struct rb_end *end)
{
    struct rb_leg *leg = rb_leg_of(c, end->leg);
    uint32_t book = rb_get(&leg->book);
    struct rb_server s;
    if (!book) {
        rb_set(&leg->echoed, end->session);
        rb_store_release(&end->ring.ctl->echo, end->session);
    } else if (rb_own_server(c, book))
        rb_server_service(rb_own_server(c, book));
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
        rb_answer_for(c, end);
    return rc;
}

int rb_open_queue(struct rb_end *end, uint32_t queue)
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
        end->ops = &rb_lend_ops;
        rc = rb_serve(c, end->leg, &end->ctx);
        if (rc == -EBUSY)
            rb_deputise(c, end->leg);
        if (rc == -EBUSY && (rc = rb_feed_open(end)) < 0) /* it says why it cannot, where nobody can feed it */
            rc = rb_serve(c, end->leg = 2 * queue + RB_LEG_R, &end->ctx);
    } else if (t->kind == RB_LEG_GRANT && rb_get(&r->book) && rb_get(&r->book) == rb_get(&t->book) && rb_get(&r->lent)) {
        rc = open_borrowed(end, r); /* what is on its way to a receiver already comes first; the rest follows it */
    } else if (t->kind == RB_LEG_GRANT) { /* a VM sends on it */
        end->leg = 2 * queue + RB_LEG_T;
        end->ops = &rb_collect_ops;
        c->opening = end->leg + 1;
        rc = rb_serve(c, end->leg, &end->ctx);
        c->opening = 0;
        if (rc == -EBUSY)
            rb_deputise(c, end->leg);
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
    rb_open_options o = {.struct_size = sizeof o, .flags = flags};
    return rb_open_with(out, c, address, &o);
}

int rb_open_with(rb_end **out, rb_cluster *c, const char *address, const rb_open_options *options)
{
    rb_open_options o = {0};
    if (options)
        memcpy(&o, options, RB_MIN(options->struct_size, sizeof o));
    const uint32_t flags = o.flags;
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
    end->timer = end->sleep = end->tick = -1;
    end->wake = -1;
    snprintf(end->st.mode, sizeof end->st.mode, "loan");
    rc = parse_queue(c, address, &queue);
    if (rc == 0)
        rc = check_options(address, &o, 0);
    if (rc == 0 && (flags & RB_RX) && (flags & RB_TX))
        rc = rb_fail(EINVAL, "bad-option", "open its two ends one by one", "a queue's end receives or sends, not both");
    if (rc == 0) {
        end->queue = queue;
        snprintf(end->address, sizeof end->address, "%u@%u", c->id, queue);
        rc = c->reg ? rb_open_queue(end, queue) : open_in_guest(end, queue);
    } else if (rc == -EAGAIN)
        rc = open_device(end, address, &o);
    if (rc < 0) {
        free(end->stock);
        free(end);
        return rc;
    }
    c->end[index] = end;
    if (o.filter && (rc = rb_filter(end, o.filter)) < 0) {
        rb_close(end);
        return rc;
    }
    *out = end;
    return 0;
}

void rb_end_free(struct rb_end *end)
{
    if (end->timer >= 0)
        close(end->timer);
    rb_bell_close(end);
    free(end->filter);
    free(end->stock);
    free(end->also);
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
    rb_fan_forget(end);
    rb_feed_forget(end);
    if (here) {
        for (uint32_t at = 0; at < c->buffers; at++) { /* what is still in hand from here */
            if ((c->where[at] & RB_HAND) == RB_HAND_BORROWED + end->index)
                rb_hand_back(c, rb_handle_of(c, at));
            if (end->also && end->also[at / 8] >> at % 8 & 1) {
                rb_desc d = {.handle = rb_handle_of(c, at)};
                end->also[at / 8] &= (uint8_t)~(1u << at % 8);
                c->extras--;
                rb_give_back(c, RB_HAND_BORROWED + end->index, &d, 1);
            }
        }
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
        if (!end->device && (end->promised || end->wants))
            rb_copying_close(end);
        if (!end->device && c->locks) {
            int rx = (end->flags & RB_RX) != 0;
            if (c->reg && rb_enter(c->reg) == 0) {
                memset(&c->reg->state->queue[end->queue].end[rx], 0, sizeof(struct rb_holder));
                rb_leave(c->reg);
            }
            rb_byte_unlock(c->locks, RB_LOCK_END + 2 * end->queue + (unsigned)rx);
        }
        if (end->taker)
            rb_taker_leave(c, end->taker - 1);
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
        if (l->leaving && rb_let_go(s, l))
            continue; /* another is in its place, or it no longer leaves */
        still += l->leaving;
        i++;
    }
    c->waiting = still;
}
