/* SPDX-License-Identifier: Apache-2.0
 *
 * What the dead left behind. Three cases, told apart strictly (tests/model says why):
 * - A server died: whoever acts for it completes or undoes its one armed intent, from `state` alone, and rewrites the lane's index from
 *   the committed one. Under the recovery lock, and again from the start when the one who did it dies too.
 * - A client died: nobody but its lender may take home what it held, and only when a successor (or a reaper in its name) has written a new
 *   session, which consumes nothing until the lender has echoed it.
 * - A VM let go of a lane: its lender takes home all that is not unread.
 */
#include "hook.h"
#include "rb_bell.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>

int rb_book_dead(struct rb_registry *reg, uint32_t book)
{
    return reg->state->book[book].used && rb_byte_holder(reg, RB_LOCK_BOOK + book) == 0;
}

/* ---- intents ----------------------------------------------------------------------------------------------------- */

/* A bit of a shared buffer, in the ledger alone. */
static int clear_bit(struct rb_server *s, uint32_t at, uint64_t w, uint64_t bit)
{
    uint64_t mask = rb_get(&s->masks[at]);
    if (!(mask & bit))
        return 0;
    if (mask != bit)
        rb_set(&s->masks[at], mask & ~bit);
    else if (RB_WORD_SUBKIND(w) == RB_SUB_SHARED)
        rb_set(&s->ledger[at], RB_WORD_LEVEL0(w));
    else if (!RB_WORD_SUBKIND(w))
        rb_set(&s->ledger[at], RB_WORD(RB_W_HOME, 0));
    return 1;
}

/* One entry of a lend or grant that was not committed: set back only what reads exactly as this operation would have written it. */
static void undo_lend(struct rb_server *s, uint32_t leg, uint32_t handle)
{
    uint32_t at = rb_number(s->c, handle);
    uint64_t w = at == UINT32_MAX ? 0 : rb_get(&s->ledger[at]);
    if (RB_WORD_SUBKIND(w) == RB_W_LENT && RB_WORD_SUBLEG(w) == leg)
        rb_set(&s->ledger[at], RB_WORD_LEVEL0(w));
    else if (w == RB_WORD(RB_W_LENT, leg))
        rb_set(&s->ledger[at], RB_WORD(RB_W_HOME, 0));
    else if (rb_shared_word(w) && s->leg[leg])
        clear_bit(s, at, w, s->leg[leg]->bit);
}

/* One entry of a take or collect that was not committed: validated and applied as the first time; what was applied already no longer
 * validates and is skipped. */
static void redo_take(struct rb_server *s, struct rb_leg_ctx *l, uint32_t handle)
{
    uint32_t at = rb_number(s->c, handle);
    uint64_t w = at == UINT32_MAX ? 0 : rb_get(&s->ledger[at]);
    enum rb_by by;
    struct rb_leg_ctx *from = w ? rb_holder_leg(s, l, at, w, &by) : NULL;
    if (!from)
        return;
    if (by == RB_BY_BIT)
        clear_bit(s, at, w, from->bit);
    else
        rb_set(&s->ledger[at], by == RB_BY_SUB ? RB_WORD_LEVEL0(w) : RB_WORD(RB_W_HOME, 0));
}

/* Each output for itself: committed, or not. */
static void recover_fan(struct rb_server *s, uint32_t n)
{
    for (uint64_t mask = rb_get(&s->rec->outputs); mask; mask &= mask - 1) {
        uint32_t i = (uint32_t)__builtin_ctzll(mask), to = rb_get(&s->rec->output[i]);
        struct rb_leg_ctx *l;
        if (!to || to & RB_OUTPUT_DEVICE || rb_server_leg(s, to - 1, &l) < 0)
            continue;
        rb_a32 *committed = &l->rec->committed[RB_IX_P];
        for (uint32_t k = 0; rb_get(committed) == rb_get(&s->rec->bases[i]) && k < n; k++)
            undo_lend(s, l->number, s->rec->handles[k]);
        rb_order();
        rb_store_release(&l->ring.ctl->p, rb_get(committed));
        l->ring.p = rb_get(committed);
        l->ring.c = l->ring.p - l->ring.slots;
    }
}

void rb_recover_intent(struct rb_server *s)
{
    uint64_t intent = rb_get(&s->rec->intent);
    enum rb_op op = RB_INTENT_OP(intent);
    uint32_t n = RB_INTENT_COUNT(intent), base = RB_INTENT_BASE(intent), leg = RB_INTENT_LEG(intent);
    struct rb_leg_ctx *l;
    if (op == RB_OP_NONE)
        return;
    if (op == RB_OP_FAN && n <= RB_MAX_BURST) {
        recover_fan(s, n);
    } else if (n <= RB_MAX_BURST && leg < RB_MAX_LEGS && rb_server_leg(s, leg, &l) == 0) {
        static const int index_of[] = {[RB_OP_LEND] = RB_IX_P, [RB_OP_TAKE] = RB_IX_RC, [RB_OP_GRANT] = RB_IX_RP, [RB_OP_COLLECT] = RB_IX_C};
        rb_a32 *committed = &l->rec->committed[index_of[op]];
        rb_a32 *in_lane = op == RB_OP_LEND ? &l->ring.ctl->p : op == RB_OP_TAKE ? &l->ring.ctl->rc : op == RB_OP_GRANT ? &l->ring.ctl->rp : &l->ring.ctl->c;
        if (rb_get(committed) == base) {
            for (uint32_t i = 0; i < n; i++) {
                uint32_t handle = s->rec->handles[i];
                if (op == RB_OP_LEND || op == RB_OP_GRANT)
                    undo_lend(s, leg, handle);
                else
                    redo_take(s, l, handle);
            }
            rb_order();
            if (op == RB_OP_TAKE || op == RB_OP_COLLECT)
                rb_set(committed, base + n);
        }
        rb_order();
        rb_store_release(in_lane, rb_get(committed));
        l->ring.p = l->kind == RB_LEG_LEND ? rb_get(&l->rec->committed[RB_IX_P]) : l->ring.p;
        l->ring.c = l->kind == RB_LEG_LEND ? l->ring.p - l->ring.slots : rb_get(&l->rec->committed[RB_IX_C]);
        l->ring.rc = l->kind == RB_LEG_LEND ? rb_get(&l->rec->committed[RB_IX_RC]) : l->ring.rc;
        l->ring.rp = l->kind == RB_LEG_LEND ? l->ring.rc : rb_get(&l->rec->committed[RB_IX_RP]);
        if (l->kind != RB_LEG_LEND) {
            l->ring.p = l->ring.c;
            l->ring.rc = l->ring.rp - l->ring.returns;
        }
    }
    rb_order();
    rb_set(&s->rec->intent, 0);
}

/* ---- sessions ------------------------------------------------------------------------------------------------------ */

struct reclaim {
    struct rb_leg_ctx *l;
    uint8_t *keep; /* a bit per buffer that is still in a ring */
    rb_a64 *client_ledger;
    enum rb_reclaim how;
};

static int bit(const uint8_t *bits, uint32_t i) { return bits[i / 8] >> i % 8 & 1; }
static void set_bit(uint8_t *bits, uint32_t i) { bits[i / 8] |= (uint8_t)(1u << i % 8); }

static int lent_on(struct rb_server *s, uint32_t number, uint32_t leg)
{
    uint64_t w = rb_get(&s->ledger[number]);
    return w == RB_WORD(RB_W_LENT, leg) || (RB_WORD_SUBKIND(w) == RB_W_LENT && RB_WORD_SUBLEG(w) == leg) ||
           (rb_shared_word(w) && s->leg[leg] && rb_get(&s->masks[number]) & s->leg[leg]->bit);
}

/* And is that by its bit? */
static int shared_on(struct rb_server *s, uint32_t number, uint32_t leg)
{
    uint64_t w = rb_get(&s->ledger[number]);
    return rb_shared_word(w) && !(RB_WORD_SUBKIND(w) == RB_W_LENT && RB_WORD_SUBLEG(w) == leg);
}

/* Mark what is unread between two indices of a forward ring, newest first, and zero what cannot be right: a handle that is not lent on this
 * leg, or one that was met already. A guest can have written anything there. */
static void keep_forward(struct rb_server *s, struct rb_leg_ctx *l, uint32_t from, uint32_t to, uint8_t *keep, const struct rb_ring *copy)
{
    for (uint32_t i = to; i != from; i--) {
        struct rb_slot *slot = &l->ring.forward[(i - 1) & l->ring.mask];
        const volatile struct rb_slot *once = slot;
        struct rb_slot was = {once->handle, once->word, once->ts};
        uint32_t at = rb_number(s->c, was.handle);
        if (at == UINT32_MAX || !lent_on(s, at, l->number) || bit(keep, at) || !rb_fits(s->c, was.word))
            slot->handle = was.handle = 0; /* consumers skip it */
        else
            set_bit(keep, at);
        if (copy) /* what was checked, whatever the slot says by now */
            copy->forward[(i - 1) & copy->mask] = was;
    }
}

static void keep_grants(struct rb_server *s, struct rb_leg_ctx *l, uint32_t from, uint32_t to, uint8_t *keep)
{
    for (uint32_t i = to; i != from; i--) {
        uint32_t *slot = &l->ring.returned[(i - 1) & l->ring.rmask], at = rb_number(s->c, *(volatile uint32_t *)slot);
        if (at == UINT32_MAX || !lent_on(s, at, l->number) || bit(keep, at))
            *slot = 0;
        else
            set_bit(keep, at);
    }
}

/* What the VM has sent and this server has not collected yet may be lent on any leg of its domain. */
static void keep_sent(struct rb_server *s, struct rb_leg_ctx *t, uint8_t *keep)
{
    uint32_t p = rb_load_acquire(&t->ring.ctl->p);
    if (p - t->ring.c > t->ring.slots)
        return;
    for (uint32_t i = t->ring.c; i != p; i++) {
        uint32_t at = rb_number(s->c, *(volatile uint32_t *)&t->ring.forward[i & t->ring.mask].handle);
        if (at != UINT32_MAX)
            set_bit(keep, at);
    }
}

/* The VM is about to let go of l, and what it received there and sent on is still to be collected from other legs: it is lent on those from
 * now on, one word each, so that it can be read after l has left the VM's domain. */
void rb_leg_hand_over(struct rb_server *s, struct rb_leg_ctx *l)
{
    for (uint32_t k = 0; k < s->actives && l->domain; k++) {
        struct rb_leg_ctx *t = s->active[k];
        uint32_t p = rb_load_acquire(&t->ring.ctl->p);
        if (t == l || t->kind != RB_LEG_GRANT || t->domain != l->domain || p - t->ring.c > t->ring.slots)
            continue;
        for (uint32_t i = t->ring.c; i != p; i++) {
            uint32_t at = rb_number(s->c, *(volatile uint32_t *)&t->ring.forward[i & t->ring.mask].handle);
            if (at == UINT32_MAX || !lent_on(s, at, l->number))
                continue;
            uint64_t w = rb_get(&s->ledger[at]);
            if (shared_on(s, at, l->number)) {
                uint64_t bit = rb_leg_bit(s, t), mask = rb_get(&s->masks[at]);
                if (!bit || mask & bit) /* it stays l's, and comes home with the next session there */
                    continue;
                rb_set(&s->masks[at], (mask & ~l->bit) | bit);
                l->shared--;
                t->shared++;
                l->lent--;
                t->lent++;
                continue;
            }
            rb_set(&s->ledger[at], RB_WORD_SUBKIND(w) ? (w & ~(0xffffull << 21)) | (uint64_t)t->number << 21 : RB_WORD(RB_W_LENT, t->number));
            l->lent--;
            t->lent++;
        }
        rb_set(&t->rec->lent, t->lent);
    }
}

static void reclaim_word(struct rb_server *s, uint32_t number, uint64_t w, void *arg)
{
    struct reclaim *r = arg;
    struct rb_leg_ctx *l = r->l;
    if (RB_WORD_KIND(w) == RB_W_QUARANTINED && RB_WORD_LEG(w) == l->number && r->how != RB_RECLAIM_QUARANTINE) {
        rb_server_home(s, number, rb_handle_of(s->c, number));
        s->quarantined -= s->quarantined > 0;
        return;
    }
    if (!lent_on(s, number, l->number) || bit(r->keep, number))
        return;
    if (RB_WORD_SUBKIND(w) && r->how == RB_RECLAIM_QUARANTINE)
        return; /* borrowed itself: it stays lent until the VM is gone, or its lender would fill it */
    if (r->client_ledger) { /* its client has lent it on: it comes back by itself */
        uint64_t v = rb_get(&r->client_ledger[number]);
        if (RB_WORD_SUBKIND(v) && RB_WORD_ORIGIN(v) == l->number)
            return;
    }
    if (shared_on(s, number, l->number)) {
        if (r->how == RB_RECLAIM_QUARANTINE) /* as above: others read it, and it stays this VM's until the VM is gone */
            return;
        if (rb_unshare(s, number, rb_handle_of(s->c, number), l->bit)) {
            l->lent--;
            l->shared--;
        }
        return;
    }
    l->lent--;
    if (RB_WORD_SUBKIND(w)) {
        rb_set(&s->ledger[number], RB_WORD_LEVEL0(w));
        if (!s->acting)
            rb_give(s->c, RB_WORD_ORIGIN(w), rb_handle_of(s->c, number));
    } else if (r->how == RB_RECLAIM_QUARANTINE) {
        rb_set(&s->ledger[number], RB_WORD(RB_W_QUARANTINED, l->number));
        s->quarantined++;
    } else
        rb_server_home(s, number, rb_handle_of(s->c, number));
}

/* Take home what is lent on l and neither unread nor lent on by its client. */
static int reclaim(struct rb_server *s, struct rb_leg_ctx *l, enum rb_reclaim how, const struct rb_ring *copy, uint32_t *unread_from)
{
    struct reclaim r = {.l = l, .how = how};
    r.keep = calloc(1, s->c->room / 8 + 1);
    if (!r.keep)
        return -ENOMEM; /* nothing is lost: the next session tries again */
    /* The peer's indices afresh: what was cached is of its earlier life. */
    l->odd = false;
    if (l->kind == RB_LEG_LEND) {
        uint32_t c = rb_load_acquire(&l->ring.ctl->c);
        l->ring.c = l->ring.p - c <= l->ring.slots ? c : l->ring.p - l->ring.slots;
        l->ring.rp = l->ring.rc;
        rb_server_take(s, l);
    } else if (l->kind == RB_LEG_GRANT) {
        l->ring.p = l->ring.c;
        l->ring.rc = l->ring.rp - l->ring.returns;
    }
    uint32_t client_book = rb_get(&l->rec->client_book);
    if (client_book && client_book != s->book + 1)
        r.client_ledger = s->c->reg->ledgers + (uint64_t)(client_book - 1) * s->c->reg->state->capacity;
    if (how == RB_RECLAIM_KEEP_UNREAD && l->kind == RB_LEG_LEND) {
        uint32_t c = rb_load_acquire(&l->ring.ctl->c);
        if (l->ring.p - c > l->ring.slots)
            c = l->ring.p;
        keep_forward(s, l, c, l->ring.p, r.keep, copy);
        if (unread_from)
            *unread_from = c;
    }
    if (how == RB_RECLAIM_KEEP_UNREAD && l->kind == RB_LEG_GRANT && !rb_get(&l->rec->release)) {
        uint32_t rc = rb_load_acquire(&l->ring.ctl->rc);
        if (l->ring.rp - rc <= l->ring.returns)
            keep_grants(s, l, rc, l->ring.rp, r.keep);
    }
    for (uint32_t i = 0; i < s->actives && l->domain && how == RB_RECLAIM_KEEP_UNREAD; i++)
        if (s->active[i]->kind == RB_LEG_GRANT && s->active[i]->domain == l->domain)
            keep_sent(s, s->active[i], r.keep);
    rb_each_written(s, reclaim_word, &r);
    rb_set(&l->rec->lent, l->lent);
    free(r.keep);
    return 0;
}

int rb_leg_reclaim(struct rb_server *s, struct rb_leg_ctx *l, enum rb_reclaim how) { return reclaim(s, l, how, NULL, NULL); }

/* The same, and what is unread goes to the forward ring of `to`, from the index written to `unread_from`. 0, or -errno: nothing was done. */
int rb_leg_carry(struct rb_server *s, struct rb_leg_ctx *l, const struct rb_ring *to, uint32_t *unread_from)
{
    return reclaim(s, l, RB_RECLAIM_KEEP_UNREAD, to, unread_from);
}

void rb_renew(struct rb_server *s, struct rb_leg_ctx *l)
{
    uint64_t session = rb_load_acquire(&l->ring.ctl->session), begin = l->vm ? rb_mono_ns() : 0;
    /* Each costs a look at the whole ledger: a VM that writes sessions without end gets a small share of the time. */
    if (l->vm && begin < l->renew_after)
        return;
    if (l->vm) { /* a VM that booted anew holds nothing on any of its legs */
        uint8_t boot[16];
        memcpy(boot, l->ring.ctl->boot_id, sizeof boot);
        for (uint32_t i = 0; i < s->actives; i++) {
            struct rb_leg_ctx *o = s->active[i];
            uint8_t was[16];
            memcpy(was, o->rec->boot_id, sizeof was);
            static const uint8_t none[16];
            if (o != l && o->place >> 32 == l->place >> 32 && memcmp(was, none, 16) != 0 && memcmp(was, boot, 16) != 0) {
                if (rb_leg_reclaim(s, o, RB_RECLAIM_KEEP_UNREAD) < 0)
                    return; /* no echo without it: the next look tries again */
                memcpy(o->rec->boot_id, boot, sizeof boot);
            }
        }
        memcpy(l->rec->boot_id, boot, sizeof boot);
    }
    if (rb_leg_reclaim(s, l, RB_RECLAIM_KEEP_UNREAD) < 0)
        return;
    /* A VM can have overwritten the server's indices as well. */
    rb_store_release(l->kind == RB_LEG_LEND ? &l->ring.ctl->p : &l->ring.ctl->c, l->kind == RB_LEG_LEND ? l->ring.p : l->ring.c);
    rb_store_release(l->kind == RB_LEG_LEND ? &l->ring.ctl->rc : &l->ring.ctl->rp, l->kind == RB_LEG_LEND ? l->ring.rc : l->ring.rp);
    rb_order();
    rb_set(&l->rec->echoed, session);
    rb_bell_promise(l);
    rb_store_release(&l->ring.ctl->echo, session);
    if (l->bell)
        rb_bell_ring(l->bell);
    if (l->vm) {
        uint64_t now = rb_mono_ns();
        l->renew_after = now + 8 * (now - begin);
    }
}

struct of_leg {
    uint32_t leg;
    int found;
};
static void count_origin(struct rb_server *s, uint32_t number, uint64_t w, void *arg)
{
    struct of_leg *f = arg;
    (void)s;
    (void)number;
    f->found += RB_WORD_SUBKIND(w) && RB_WORD_ORIGIN(w) == f->leg;
}

/* May somebody else take the place of the leg's last borrower? Not while that one's book has lent on what it received there: those buffers are
 * with others, and a new session would bring them home. Recovery lock held. */
int rb_borrower_done(struct rb_cluster *c, uint32_t number)
{
    struct rb_leg *leg = rb_leg_of(c, number);
    uint32_t book = rb_get(&leg->client_book);
    struct rb_server s;
    if (!book)
        return 0;
    if (rb_book_dead(c->reg, book - 1) && rb_server_act(c, book - 1, &s) == 0) {
        rb_server_service(&s);
        rb_server_end(&s);
        rb_server_done(&s);
        if (!rb_get(&leg->client_book))
            return 0;
    }
    struct rb_server looked = {.c = c, .book = book - 1, .ledger = c->reg->ledgers + (uint64_t)(book - 1) * c->reg->state->capacity};
    struct of_leg f = {.leg = number};
    rb_each_written(&looked, count_origin, &f);
    if (!f.found)
        return 0;
    int32_t pid = rb_byte_holder(c->reg, RB_LOCK_BOOK + book - 1);
    if (pid) {
        rb_fail(EBUSY, "busy", NULL, "process %d still has %d buffers of queue %u@%u lent on to others", pid, f.found, c->id, number / 2);
        return rb_cure(EBUSY, "wait until they are read, or end it: kill %d", pid);
    }
    rb_fail(EBUSY, "busy", NULL, "a dead process has %d buffers of queue %u@%u lent on to others", f.found, c->id, number / 2);
    return rb_cure(EBUSY, "let their receivers read them, then: ringbar cluster list");
}

/* ---- taking over ----------------------------------------------------------------------------------------------------- */

/* Make the dead book this handle's own. Recovery lock held. */
int rb_adopt(struct rb_cluster *c, uint32_t book)
{
    struct rb_server *s;
    int rc;
    if (c->server) {
        struct rb_server other;
        if ((rc = rb_server_act(c, book, &other)) < 0)
            return rc;
        rb_server_service(&other);
        rc = rb_server_end(&other) ? 0 : -EBUSY;
        rb_server_done(&other);
        if (rc < 0) {
            rb_fail(EBUSY, "busy", NULL, "a dead process still has buffers lent on this queue, and this handle already serves others");
            return rb_cure(EBUSY, "open the queue first, or with a handle of its own: attach to cluster %u once more", c->id);
        }
        return 1; /* the dead book ended: its queues are free */
    }
    s = calloc(1, sizeof *s);
    if (!s)
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    if ((rc = rb_byte_lock(c->reg, RB_LOCK_BOOK + book)) < 0) {
        free(s);
        return rb_fail(EBUSY, "busy", NULL, "another process is taking this queue over just now");
    }
    rc = rb_server_act(c, book, s);
    if (rc < 0) {
        rb_byte_unlock(c->reg, RB_LOCK_BOOK + book);
        free(s);
        return rc;
    }
    s->acting = false;
    rb_holder_me(&s->rec->owner);
    c->server = s;
    s->epoch = rb_get(&s->rec->epoch) - 1; /* look at everything once */
    rb_server_sync(s);
    return 0;
}

static uint64_t new_session(void)
{
    uint64_t v = 0;
    while (!v)
        if (getrandom(&v, sizeof v, 0) != sizeof v)
            v = rb_now_ns();
    return v;
}

int rb_reap_all(struct rb_cluster *c)
{
    struct rb_state *state = c->reg->state;
    int found = 0, rc = rb_enter(c->reg);
    if (rc < 0)
        return rc;
    rb_observe_reap(c);
    for (uint32_t b = 0; b < RB_MAX_BOOKS; b++) {
        struct rb_server s;
        if (!rb_book_dead(c->reg, b))
            continue;
        found += state->book[b].owner.pid != 0;
        state->book[b].owner.pid = 0;
        if (rb_server_act(c, b, &s) < 0)
            continue;
        rb_zc_release(&s);
        rb_hook_sweep();
        rb_server_sync(&s);
        rb_server_service(&s);
        rb_server_end(&s);
        rb_server_done(&s);
    }
    for (uint32_t q = 0; q < RB_MAX_QUEUES; q++)
        for (unsigned e = 0; e < 2 && state->queue[q].used; e++) {
            struct rb_holder *h = &state->queue[q].end[e];
            struct rb_leg *leg = rb_leg_of(c, 2 * q + RB_LEG_R);
            struct rb_ring r;
            if (h->lane || !h->pid || rb_byte_holder(c->reg, RB_LOCK_END + 2 * q + e))
                continue;
            found++;
            if (e == 1 && leg->kind == RB_LEG_LEND && rb_get(&leg->client_book) && rb_borrower_done(c, 2 * q + RB_LEG_R) < 0)
                continue; /* it has lent on what it received here: once that is back */
            /* In the dead consumer's name: its lender will take home what it held. */
            if (e == 1 && leg->kind == RB_LEG_LEND && rb_place_ring(c, rb_get(&leg->place), &r, NULL) == 0 &&
                rb_get(&r.ctl->open) == (uint32_t)h->pid) {
                rb_set(&leg->client_book, 0);
                rb_set(&r.ctl->open, 0);
                rb_store_release(&r.ctl->session, new_session());
            }
            memset(h, 0, sizeof *h);
        }
    rb_taker_reap(c);
    rb_feed_reap(c);
    rb_leave(c->reg);
    return found;
}

int rb_book_list(rb_cluster *c, rb_book_info *out, int n)
{
    int count = 0;
    if (!c->reg)
        return 0;
    for (uint32_t b = 0; b < RB_MAX_BOOKS; b++) {
        struct rb_book_record *r = &c->reg->state->book[b];
        if (!r->used)
            continue;
        if (count < n) {
            rb_book_info *o = &out[count];
            const rb_a64 *ledger = c->reg->ledgers + (uint64_t)b * c->reg->state->capacity;
            memset(o, 0, sizeof *o);
            o->id = b;
            o->pid = rb_byte_holder(c->reg, RB_LOCK_BOOK + b);
            memcpy(o->name, r->owner.name, sizeof o->name);
            for (uint32_t e = 0; e < c->reg->state->capacity / RB_EXTENT; e++) /* of all pools, mapped here or not */
                for (uint32_t i = 0; i < RB_EXTENT && c->reg->extent[e] == b + 1; i++) {
                    uint64_t w = rb_get(&ledger[e * RB_EXTENT + i]);
                    uint32_t kind = RB_WORD_KIND(w);
                    o->home += kind != 0;
                    o->free += kind == RB_W_HOME; /* with what its own hand holds */
                    o->lent += kind == RB_W_LENT;
                    o->shared += kind == RB_W_SHARED;
                    o->quarantined += kind == RB_W_QUARANTINED;
                    if (kind == RB_W_DEVICE)
                        (*(o->pid ? &o->devices : &o->quiescing))++;
                }
        }
        count++;
    }
    return count;
}
