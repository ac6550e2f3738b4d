/* SPDX-License-Identifier: Apache-2.0
 *
 * A book, as the process that acts for it sees it: the buffers that are at home in it, the legs it serves, and how both are found again in its
 * ledger. One thread acts for one book, or, for a book whose owner is dead, whoever holds the recovery lock.
 */
#include "rb_bell.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* ---- claiming buffers ----------------------------------------------------------------------------------------- */

void rb_server_home(struct rb_server *s, uint32_t number, uint32_t handle)
{
    rb_set(&s->ledger[number], RB_WORD(RB_W_HOME, 0));
    rb_server_push(s, handle);
}

static int grow_stack(struct rb_server *s, uint32_t room)
{
    if (room <= s->room)
        return 0;
    uint32_t *stack = realloc(s->stack, room * sizeof *stack);
    if (!stack)
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    s->stack = stack;
    s->room = room;
    return 0;
}

static uint32_t unclaimed(struct rb_registry *reg)
{
    uint32_t n = 0;
    for (uint32_t e = 0; e < (reg->state->buffers + RB_EXTENT - 1) / RB_EXTENT; e++)
        n += reg->extent[e] == 0;
    return n;
}

int rb_server_claim(struct rb_server *s, uint32_t more, const char *for_what)
{
    struct rb_cluster *c = s->c;
    uint32_t need = s->need + more, extents = need > s->home ? (need - s->home + RB_EXTENT - 1) / RB_EXTENT : 0;
    int rc = rb_enter(c->reg);
    if (rc < 0)
        return rc;
    /* An extent may hold a pool's header, so one more than the division says can be needed. */
    if (extents && unclaimed(c->reg) < extents + 1) {
        uint64_t short_of = (uint64_t)(extents + 1 - unclaimed(c->reg)) * RB_EXTENT;
        rb_fail(ENOSPC, "pool-too-small", NULL, "the pool of cluster %u is too small: %s needs %u buffers, %llu more than are left", c->id, for_what, more,
                (unsigned long long)short_of);
        rc = rb_cure(ENOSPC, "make the cluster with --buffers %llu, or close what is no longer used",
                     (unsigned long long)rb_pow2(c->reg->state->buffers + short_of));
    }
    if (rc == 0)
        rc = grow_stack(s, s->home + (extents + 1) * RB_EXTENT);
    for (uint32_t e = 0; rc == 0 && s->home < need && e < (c->pool_count[0] + RB_EXTENT - 1) / RB_EXTENT; e++) { /* of the common pool */
        if (c->reg->extent[e])
            continue;
        uint32_t before = s->free;
        for (uint32_t i = RB_EXTENT; i-- > 0;) {
            uint32_t handle = rb_handle_of(c, e * RB_EXTENT + i);
            if (rb_number(c, handle) == e * RB_EXTENT + i)
                rb_server_home(s, e * RB_EXTENT + i, handle);
        }
        rb_order();
        c->reg->extent[e] = (uint8_t)(s->book + 1);
        s->home += s->free - before;
    }
    if (rc == 0)
        s->need = need;
    rb_leave(c->reg);
    return rc;
}

/* ---- a book and its legs -------------------------------------------------------------------------------------- */

static void server_init(struct rb_cluster *c, uint32_t book, struct rb_server *s)
{
    memset(s, 0, sizeof *s);
    s->c = c;
    s->book = book;
    s->rec = &c->reg->state->book[book];
    s->ledger = c->reg->ledgers + (uint64_t)book * c->reg->state->capacity;
    s->masks = c->reg->masks + (uint64_t)book * c->reg->state->capacity;
    s->need = 2 * RB_BURST;
}

int rb_server_get(struct rb_cluster *c, struct rb_server **out)
{
    int rc;
    if (c->server) {
        *out = c->server;
        return 0;
    }
    if ((rc = rb_enter(c->reg)) < 0)
        return rc;
    rc = -ENOSPC;
    for (uint32_t b = 0; b < RB_MAX_BOOKS; b++) {
        struct rb_book_record *r = &c->reg->state->book[b];
        if (r->used || rb_byte_lock(c->reg, RB_LOCK_BOOK + b) < 0)
            continue;
        struct rb_server *s = calloc(1, sizeof *s);
        if (!s) {
            rb_byte_unlock(c->reg, RB_LOCK_BOOK + b);
            rc = rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
            break;
        }
        server_init(c, b, s);
        rb_holder_me(&r->owner);
        rb_set(&r->intent, 0);
        for (uint32_t i = 0; i < RB_MAX_OUTPUTS; i++)
            rb_set(&r->output[i], 0);
        rb_set(&r->seen, rb_get(&r->epoch));
        s->epoch = rb_get(&r->epoch);
        r->used = 1;
        c->server = *out = s;
        for (uint32_t i = 0; i < RB_MAX_ENDS; i++) /* its borrowings may be lent on from now on */
            if (c->end[i] && !c->end[i]->ctx && !c->end[i]->device)
                rb_set(&rb_leg_of(c, c->end[i]->leg)->client_book, b + 1);
        rc = 0;
        break;
    }
    if (rc == -ENOSPC)
        rb_fail(ENOSPC, "too-many-servers", "close one of them", "cluster %u has %u serving threads, which is the most", c->id, RB_MAX_BOOKS);
    rb_leave(c->reg);
    return rc;
}

void rb_leg_pools(struct rb_server *s, struct rb_leg_ctx *l)
{
    uint32_t lane = (uint32_t)(l->place >> 32);
    l->pools = l->vm ? rb_get(&s->c->reg->state->lane[lane].pools) : UINT32_MAX;
    uint32_t own = l->vm && l->kind == RB_LEG_GRANT ? rb_pool_own(s->c, lane) : 0;
    l->own = own ? own : l->own; /* to the end: then its pool is nobody's already */
}

int rb_server_leg(struct rb_server *s, uint32_t number, struct rb_leg_ctx **out)
{
    struct rb_leg *rec = rb_leg_of(s->c, number);
    struct rb_leg_ctx *l = s->leg[number];
    if (l) {
        *out = l;
        return 0;
    }
    l = calloc(1, sizeof *l);
    struct rb_leg_ctx **active = l ? realloc(s->active, (s->actives + 1) * sizeof *active) : NULL;
    if (!active) {
        free(l);
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    }
    s->active = active;
    l->number = number;
    l->rec = rec;
    l->kind = rec->kind;
    l->credit = rec->credit;
    l->place = rb_get(&rec->place);
    l->paused = rb_get(&rec->paused);
    uint32_t lane = (uint32_t)(l->place >> 32);
    l->domain = s->c->reg->state->lane[lane].domain;
    l->vm = s->c->reg->state->lane[lane].vm[0] != 0;
    rb_leg_pools(s, l);
    int rc = rb_place_ring(s->c, l->place, &l->ring, NULL);
    if (rc < 0) {
        free(l);
        return rc;
    }
    /* Own indices come from `state`, never from the lane, where a guest can write. */
    l->ring.p = rb_get(&rec->committed[RB_IX_P]);
    l->ring.c = rb_get(&rec->committed[RB_IX_C]);
    l->ring.rp = rb_get(&rec->committed[RB_IX_RP]);
    l->ring.rc = rb_get(&rec->committed[RB_IX_RC]);
    if (l->kind == RB_LEG_LEND) {
        l->ring.c = l->ring.p - l->ring.slots; /* full until read */
        l->ring.rp = l->ring.rc;
    } else {
        l->ring.p = l->ring.c;
        l->ring.rc = l->ring.rp - l->ring.returns;
    }
    rb_filter_sync(s, l);
    for (uint32_t i = 0; i < RB_MAX_OUTPUTS; i++)
        if (rb_get(&s->rec->output[i]) == number + 1)
            l->bit = 1ull << i;
    l->index = s->actives;
    s->active[s->actives++] = l;
    s->leg[number] = l;
    rb_bell_join(s, l);
    *out = l;
    return 0;
}

void rb_server_drop_leg(struct rb_server *s, struct rb_leg_ctx *l)
{
    s->active[l->index] = s->active[--s->actives];
    s->active[l->index]->index = l->index;
    s->leg[l->number] = NULL;
    if (l->bit && !l->shared)
        rb_set(&s->rec->output[__builtin_ctzll(l->bit)], 0);
    if (l->claimed && !l->own) /* what was claimed for it will do for the next */
        s->need -= RB_MIN(s->need, l->credit);
    for (uint32_t i = 0; i < s->actives; i++)
        if (s->active[i]->observer == l)
            s->active[i]->observer = NULL;
    for (uint32_t i = 0; i < RB_MAX_ENDS; i++)
        if (s->c->end[i] && s->c->end[i]->ctx == l)
            s->c->end[i]->ctx = NULL;
    rb_bell_free(s->c, l->bell);
    free(l->filter);
    free(l);
}

void rb_each_written(struct rb_server *s, void (*each)(struct rb_server *s, uint32_t number, uint64_t word, void *arg), void *arg)
{
    struct rb_registry *reg = s->c->reg;
    off_t base = (off_t)((uint8_t *)s->ledger - (uint8_t *)reg->state), end = base + (off_t)s->c->buffers * 8, at = base;
    while (at < end) {
        off_t data = lseek(reg->state_fd, at, SEEK_DATA);
        if (data < 0 || data >= end)
            return;
        off_t hole = lseek(reg->state_fd, data, SEEK_HOLE);
        hole = hole < 0 || hole > end ? end : hole;
        for (uint32_t i = (uint32_t)((data - base) / 8); i < (uint32_t)((hole - base) / 8); i++) {
            uint64_t w = rb_get(&s->ledger[i]);
            if (w)
                each(s, i, w, arg);
        }
        at = hole;
    }
}

static void count_shared(struct rb_server *s, uint64_t mask)
{
    for (; mask; mask &= mask - 1) {
        uint32_t to = rb_get(&s->rec->output[__builtin_ctzll(mask)]);
        struct rb_leg_ctx *l;
        if (to & RB_OUTPUT_DEVICE)
            s->quiescing++;
        else if (to && rb_server_leg(s, to - 1, &l) == 0) {
            l->lent++;
            l->shared++;
        } else
            s->lost++;
    }
}

static void count_word(struct rb_server *s, uint32_t number, uint64_t w, void *arg)
{
    struct rb_leg_ctx *l;
    (void)arg;
    if (RB_WORD_KIND(w) && s->c->reg->extent[number / RB_EXTENT] == s->book + 1) {
        s->home += number < s->c->pool_count[0];
        if (RB_WORD_KIND(w) == RB_W_HOME && !RB_WORD_SUBKIND(w))
            rb_server_push(s, rb_handle_of(s->c, number));
        else if (RB_WORD_KIND(w) == RB_W_LENT)
            rb_server_leg(s, RB_WORD_LEG(w), &l) == 0 ? l->lent++ : s->lost++;
        else if (RB_WORD_KIND(w) == RB_W_DEVICE)
            s->quiescing++;
        else if (RB_WORD_KIND(w) == RB_W_QUARANTINED)
            s->quarantined++;
    }
    if (RB_WORD_SUBKIND(w) == RB_W_LENT && rb_server_leg(s, RB_WORD_SUBLEG(w), &l) == 0)
        l->lent++;
    if (rb_shared_word(w))
        count_shared(s, rb_get(&s->masks[number]));
}

int rb_server_rebuild(struct rb_server *s)
{
    s->free = s->home = s->quiescing = s->quarantined = s->lost = 0;
    for (uint32_t l = 0; l < RB_MAX_LEGS; l++) { /* legs of this book, also those with nothing lent */
        struct rb_leg *rec = rb_leg_of(s->c, l);
        struct rb_leg_ctx *ctx;
        if (rec->kind && rb_get(&rec->book) == s->book + 1 && rb_server_leg(s, l, &ctx) < 0)
            continue; /* its memory is gone: what is lent there stays lent, the others go on */
    }
    uint32_t room = 0;
    for (uint32_t e = 0; e < (s->c->buffers + RB_EXTENT - 1) / RB_EXTENT; e++)
        room += s->c->reg->extent[e] == s->book + 1 ? RB_EXTENT : 0;
    int rc = grow_stack(s, room);
    if (rc < 0 || (rc = rb_pool_stacks(s)) < 0)
        return rc;
    for (uint32_t i = 0; i < s->actives; i++)
        s->active[i]->lent = s->active[i]->shared = 0;
    rb_each_written(s, count_word, NULL);
    s->need = 2 * RB_BURST;
    /* What is at home says what was claimed: a leg that came along with a VM's lane, and that nobody lent on, was promised nothing. */
    for (int grants = 1; grants >= 0; grants--)
        for (uint32_t i = 0; i < s->actives; i++) {
            struct rb_leg_ctx *l = s->active[i];
            if ((l->kind == RB_LEG_GRANT) != grants)
                continue;
            rb_set(&l->rec->lent, l->lent);
            l->claimed = !l->own && s->need + l->credit <= s->home;
            s->need += l->claimed ? l->credit : 0;
        }
    return 0;
}

int rb_server_act(struct rb_cluster *c, uint32_t book, struct rb_server *s)
{
    rb_pools_look(c);
    server_init(c, book, s);
    s->acting = true;
    rb_recover_intent(s);
    int rc = rb_server_rebuild(s);
    if (rc < 0)
        rb_server_done(s);
    return rc;
}

void rb_server_done(struct rb_server *s)
{
    for (uint32_t i = 0; i < s->actives; i++) {
        rb_set(&s->active[i]->rec->lent, s->active[i]->lent);
        rb_bell_free(s->c, s->active[i]->bell);
        free(s->active[i]->filter);
        free(s->active[i]);
    }
    for (uint32_t p = 0; p < RB_MAX_POOLS; p++) {
        free(s->own[p].stack);
        s->own[p] = (struct rb_own){0};
    }
    free(s->active);
    free(s->stack);
    free(s->feed);
    s->feed = NULL;
    s->feeds = 0;
    s->active = NULL;
    s->stack = NULL;
}

static void clear_word(struct rb_server *s, uint32_t number, uint64_t w, void *arg)
{
    (void)w;
    (void)arg;
    rb_set(&s->ledger[number], 0);
}

/* The book ends when nothing is lent: its buffers are nobody's then. Returns 1 when it ended. Recovery lock held. */
int rb_server_end(struct rb_server *s)
{
    struct rb_cluster *c = s->c;
    rb_pools_look(c);
    uint32_t out = s->quarantined + s->in_devices + s->quiescing + s->lost;
    for (uint32_t i = 0; i < s->actives; i++)
        out += s->active[i]->lent;
    if (out)
        return 0;
    for (uint32_t e = 0; e < (c->buffers + RB_EXTENT - 1) / RB_EXTENT; e++)
        if (c->reg->extent[e] == s->book + 1)
            c->reg->extent[e] = 0;
    rb_order();
    rb_each_written(s, clear_word, NULL);
    for (uint32_t l = 0; l < RB_MAX_LEGS; l++) {
        if (rb_get(&rb_leg_of(c, l)->book) == s->book + 1)
            rb_set(&rb_leg_of(c, l)->book, 0);
        if (rb_get(&rb_leg_of(c, l)->client_book) == s->book + 1)
            rb_set(&rb_leg_of(c, l)->client_book, 0);
    }
    for (uint32_t l = 0; l < RB_MAX_LANES; l++)
        if (rb_get(&c->reg->state->lane[l].book) == s->book + 1)
            rb_set(&c->reg->state->lane[l].book, 0);
    s->rec->used = 0;
    rb_pool_sweep(c);
    return 1;
}

int rb_server_close(struct rb_cluster *c)
{
    struct rb_server *s = c->server;
    if (!s)
        return 0;
    rb_server_service(s);
    if (rb_enter(c->reg) == 0) {
        if (!rb_server_end(s))
            s->rec->owner.pid = 0; /* what is lent stays readable; whoever opens one of its queues takes the book over */
        rb_byte_unlock(c->reg, RB_LOCK_BOOK + s->book);
        rb_leave(c->reg);
    }
    rb_server_done(s);
    free(s);
    c->server = NULL;
    return 0;
}
