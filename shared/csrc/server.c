/* SPDX-License-Identifier: Apache-2.0
 * What a lender owes its borrowers beyond single bursts: returns taken in, grants refilled, sessions answered, VMs relayed, legs moved. */
#include "rb_bell.h"

#include <stdio.h>
#include <stdlib.h>

/* ---- what a lender owes ------------------------------------------------------------------------------------------- */

static struct rb_end *reader_of(struct rb_cluster *c, const struct rb_leg_ctx *l)
{
    for (uint32_t i = 0; i < RB_MAX_ENDS; i++)
        if (c->end[i] && c->end[i]->ctx == l)
            return c->end[i];
    return NULL;
}

/* Move what VM-to-elsewhere queues have from their T leg to their R leg, both served here. */
static int relay(struct rb_server *s, struct rb_leg_ctx *t)
{
    struct rb_leg_ctx *r = s->leg[t->number - RB_LEG_T + RB_LEG_R];
    struct rb_queue *q = &s->c->reg->state->queue[t->number / 2];
    const struct rb_holder *to = &q->end[1];
    rb_desc desc[RB_BURST];
    if (!r || r->kind != RB_LEG_LEND || r->paused || (!to->lane && !to->pid))
        return 0;
    if (reader_of(s->c, t))
        return 0; /* a program of ours reads it */
    uint32_t room = rb_ring_space(&r->ring, RB_BURST);
    if (room == RB_RING_FAULT)
        return (int)rb_odd(r);
    if (r->lent + RB_BURST > r->credit)
        rb_server_take(s, r);
    room = RB_MIN(RB_MIN(room, RB_BURST), r->credit > r->lent ? r->credit - r->lent : 0);
    if (!room)
        return 0; /* full: it waits in the VM's ring, and the VM drops and counts */
    int n = rb_server_collect(s, t, desc, (int)room), k = n > 0 ? rb_server_lend(s, r, desc, n) : 0;
    if (k < n) {
        rb_add(&r->rec->drops[RB_DROP_FULL], (uint64_t)(n - RB_MAX(k, 0)));
        rb_return(s->c, desc + RB_MAX(k, 0), n - RB_MAX(k, 0));
    }
    return n;
}

static int service_leg(struct rb_server *s, struct rb_leg_ctx *l)
{
    int did = 0;
    if (l->kind == RB_LEG_DIRECT)
        return 0; /* its two ends are both clients: the sending one echoes */
    if (rb_load_acquire(&l->ring.ctl->session) != rb_get(&l->rec->echoed))
        rb_renew(s, l);
    if (l->kind == RB_LEG_LEND) {
        if (l->lent)
            did = rb_server_take(s, l);
    } else if (l->kind == RB_LEG_GRANT && !s->acting) {
        did = relay(s, l) + rb_server_grant(s, l);
    }
    return did;
}

int rb_server_service(struct rb_server *s)
{
    int did = 0;
    if (!s->acting && rb_load_acquire(&s->rec->epoch) != s->epoch)
        rb_server_sync(s);
    for (uint32_t i = 0; i < s->actives; i++)
        did += service_leg(s, s->active[i]);
    if (!s->acting)
        did += rb_feed_service(s);
    if (s->c->waiting && did && !s->acting)
        rb_end_finish(s->c);
    if (__builtin_expect(s->closing != 0, 0) && !s->acting)
        rb_pool_release(s);
    rb_set(&s->rec->free, s->free);
    return did;
}

/* Carry the rings of l to the place somebody wants them at. Its client is gone or has not come yet. */
static void leg_move(struct rb_server *s, struct rb_leg_ctx *l)
{
    uint64_t wanted = rb_get(&l->rec->wanted);
    struct rb_ring to, *from = &l->ring;
    uint32_t c;
    if (l->kind != RB_LEG_LEND || rb_place_ring(s->c, wanted, &to, NULL) < 0 || to.slots != from->slots || to.returns != from->returns)
        return;
    rb_leg_hand_over(s, l);
    if (rb_leg_carry(s, l, &to, &c) < 0)
        return;
    to.p = from->p;
    to.rc = to.rp = from->rc;
    to.c = to.p - to.slots;
    rb_set(&to.ctl->c, c);
    rb_set(&to.ctl->rp, from->rc);
    rb_set(&to.ctl->rc, from->rc);
    rb_set(&to.ctl->session, 0);
    rb_set(&to.ctl->echo, 0);
    rb_store_release(&to.ctl->p, from->p);
    rb_set(&l->rec->echoed, 0);
    rb_order();
    rb_set(&l->rec->place, wanted);
    rb_order();
    rb_place_free(s->c, l->place);
    rb_place_live(s->c, wanted);
    rb_lane_sweep(s->c, (uint32_t)(l->place >> 32));
    l->ring = to;
    l->place = wanted;
    l->odd = false;
    uint32_t lane = (uint32_t)(wanted >> 32);
    l->domain = s->c->reg->state->lane[lane].domain;
    l->vm = s->c->reg->state->lane[lane].vm[0] != 0;
    rb_bell_free(s->c, l->bell);
    l->bell = NULL;
}

/* Does somebody wait for what a VM sends on this queue, other than a program that reads it right here? */
static int read_elsewhere(struct rb_cluster *c, uint32_t t)
{
    const struct rb_holder *to = &c->reg->state->queue[t / 2].end[1];
    return to->lane || rb_byte_holder(c->reg, RB_LOCK_END + 2 * (t / 2) + 1) != 0;
}

/* What goes with a leg that a VM sends on: the leg towards whoever receives from that queue, and with it that VM's lane, as far as nobody
 * serves them yet. */
static void take_on(struct rb_server *s)
{
    struct rb_cluster *c = s->c;
    const uint32_t me = s->book + 1;
    for (int moved = 1; moved;) {
        moved = 0;
        for (uint32_t n = 0; n < RB_MAX_LEGS; n++) {
            struct rb_leg *leg = rb_leg_of(c, n), *t = rb_leg_of(c, n | RB_LEG_T);
            struct rb_segment_record *lane = &c->reg->state->lane[rb_get(&leg->place) >> 32];
            if (!leg->kind || rb_get(&leg->book))
                continue;
            int relayed = !(n & RB_LEG_T) && t->kind == RB_LEG_GRANT && rb_get(&t->book) == me && c->opening != (n | RB_LEG_T) + 1 &&
                          read_elsewhere(c, n | RB_LEG_T) &&
                          !(s->leg[n | RB_LEG_T] && reader_of(c, s->leg[n | RB_LEG_T]));
            uint32_t book = lane->vm[0] ? rb_get(&lane->book) : 0;
            if (book != me && (!relayed || book))
                continue;
            if (lane->vm[0])
                rb_set(&lane->book, me);
            rb_set(&leg->book, me);
            moved = 1;
        }
    }
}

int rb_server_sync(struct rb_server *s)
{
    struct rb_cluster *c = s->c;
    int rc = rb_enter(c->reg);
    if (rc < 0)
        return rc;
    uint32_t epoch = rb_load_acquire(&s->rec->epoch);
    bool pending = false;
    rb_pools_look(c);
    if (!s->acting)
        take_on(s);
    for (uint32_t n = 0; n < RB_MAX_LEGS; n++) {
        struct rb_leg *rec = rb_leg_of(c, n);
        struct rb_leg_ctx *l = s->leg[n];
        int mine = rec->kind && rb_get(&rec->book) == s->book + 1;
        if (!mine) {
            if (l)
                rb_server_drop_leg(s, l);
            continue;
        }
        if (!l) {
            if (rb_server_leg(s, n, &l) < 0)
                continue;
            if (!s->acting && l->kind == RB_LEG_GRANT && !l->own)
                l->claimed = rb_server_claim(s, l->credit, "the grant of a sending VM") == 0;
        }
        rb_leg_pools(s, l);
        if (!s->acting && l->own && !l->claimed)
            l->claimed = rb_pool_claim(s, l->own) == 0;
        uint32_t release = rb_get(&rec->release);
        l->domain = c->reg->state->lane[l->place >> 32].domain;
        rb_filter_sync(s, l);
        l->paused = rb_get(&rec->paused) || release == 2; /* nothing more to a VM that is being forced off */
        if (release == 3) { /* the queue is being destroyed */
            rb_leg_reclaim(s, l, RB_RECLAIM_ALL);
            rb_set(&rec->book, 0);
            rb_set(&rec->release, 0);
            rb_server_drop_leg(s, l);
            continue;
        }
        if (release) {
            if (release == 1 && l->kind == RB_LEG_GRANT && rb_ring_ready(&l->ring, 1) - 1 < l->ring.slots && (reader_of(c, l) || read_elsewhere(c, n))) {
                pending = true; /* what the VM sent before it let go is still to be read */
                continue;
            }
            if (release == 1)
                rb_leg_hand_over(s, l);
            rb_leg_reclaim(s, l, release == 2 ? RB_RECLAIM_QUARANTINE : l->kind == RB_LEG_GRANT ? RB_RECLAIM_ALL : RB_RECLAIM_KEEP_UNREAD);
            if (release == 1 && l->kind == RB_LEG_GRANT) {
                uint64_t place = l->place;
                rec->kind = RB_LEG_NONE;
                rb_set(&rec->book, 0);
                rb_set(&rec->place, 0);
                rb_set(&rec->wanted, 0);
                rb_set(&rec->lent, 0);
                rb_place_free(c, place);
                rb_server_drop_leg(s, l);
                rb_set(&rec->release, 0);
                rb_lane_sweep(c, (uint32_t)(place >> 32));
                struct rb_leg_ctx *r = s->leg[n - RB_LEG_T]; /* it was relayed to */
                if (r && !r->vm && !reader_of(c, r) && !r->leaving) {
                    if (!r->lent && !rb_get(&r->rec->release) && rb_get(&r->rec->wanted) == r->place) {
                        rb_set(&r->rec->book, 0);
                        rb_server_drop_leg(s, r);
                        continue;
                    }
                    r->leaving = true;
                    c->waiting++;
                }
                continue;
            }
            if (release == 1)
                rb_set(&rec->release, 0);
        }
        if (rb_get(&rec->wanted) != rb_get(&rec->place)) {
            const bool was_a_vms = l->vm;
            leg_move(s, l);
            if (was_a_vms && !l->vm && !s->acting && !reader_of(c, l) && !l->leaving) { /* it came with the VM, and nobody here sends on it */
                if (!l->lent && rb_leg_of(c, n | RB_LEG_T)->kind == RB_LEG_NONE) {
                    rb_set(&rec->book, 0);
                    rb_server_drop_leg(s, l);
                    continue;
                }
                l->leaving = true;
                c->waiting++;
            }
        } else if (c->reg->state->place[l->place >> 32][(uint32_t)l->place - 1].used == 2)
            rb_place_live(c, l->place); /* whoever moved it here died before it said so */
        rb_bell_join(s, l);
    }
    rb_observe_link(s);
    s->closing = 0;
    for (uint32_t p = 1; p < RB_MAX_POOLS; p++)
        if (s->own[p].stack && rb_get(&c->reg->state->pool[p].state) == RB_SEG_CLOSING)
            s->closing |= 1u << p;
    if (s->closing)
        rb_pool_release(s);
    if (!pending) {
        s->epoch = epoch;
        rb_store_release(&s->rec->seen, epoch);
    }
    rb_leave(c->reg);
    return 0;
}
