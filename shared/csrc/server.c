/* SPDX-License-Identifier: Apache-2.0
 *
 * The lender and its book. One thread acts for one book; everything here runs in that thread, or, for a book whose owner is dead,
 * under the recovery lock. The order of the stores of an operation is the protocol (docs/protocol.md); each is: handles, arm, ledger, ring, committed
 * index (the commit point), index in the lane, disarm.
 */
#include "rb_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* ---- claiming buffers ----------------------------------------------------------------------------------------- */

void rb_server_home(struct rb_server *s, uint32_t number, uint32_t handle)
{
    rb_set(&s->ledger[number], RB_WORD(RB_W_HOME, 0));
    s->stack[s->free++] = handle;
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
    for (uint32_t e = 0; rc == 0 && s->home < need && e < (c->buffers + RB_EXTENT - 1) / RB_EXTENT; e++) {
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
    l->index = s->actives;
    s->active[s->actives++] = l;
    s->leg[number] = l;
    *out = l;
    return 0;
}

void rb_server_drop_leg(struct rb_server *s, struct rb_leg_ctx *l)
{
    s->active[l->index] = s->active[--s->actives];
    s->active[l->index]->index = l->index;
    s->leg[l->number] = NULL;
    if (l->claimed) /* what was claimed for it will do for the next */
        s->need -= RB_MIN(s->need, l->credit);
    for (uint32_t i = 0; i < s->actives; i++)
        if (s->active[i]->observer == l)
            s->active[i]->observer = NULL;
    for (uint32_t i = 0; i < RB_MAX_ENDS; i++)
        if (s->c->end[i] && s->c->end[i]->ctx == l)
            s->c->end[i]->ctx = NULL;
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

static void count_word(struct rb_server *s, uint32_t number, uint64_t w, void *arg)
{
    struct rb_leg_ctx *l;
    (void)arg;
    if (RB_WORD_KIND(w) && s->c->reg->extent[number / RB_EXTENT] == s->book + 1) {
        s->home++;
        if (RB_WORD_KIND(w) == RB_W_HOME && !RB_WORD_SUBKIND(w))
            s->stack[s->free++] = rb_handle_of(s->c, number);
        else if (RB_WORD_KIND(w) == RB_W_LENT)
            rb_server_leg(s, RB_WORD_LEG(w), &l) == 0 ? l->lent++ : s->lost++;
        else if (RB_WORD_KIND(w) == RB_W_DEVICE)
            s->quiescing++;
        else if (RB_WORD_KIND(w) == RB_W_QUARANTINED)
            s->quarantined++;
    }
    if (RB_WORD_SUBKIND(w) == RB_W_LENT && rb_server_leg(s, RB_WORD_SUBLEG(w), &l) == 0)
        l->lent++;
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
    if (rc < 0)
        return rc;
    for (uint32_t i = 0; i < s->actives; i++)
        s->active[i]->lent = 0;
    rb_each_written(s, count_word, NULL);
    s->need = 2 * RB_BURST;
    for (uint32_t i = 0; i < s->actives; i++) {
        rb_set(&s->active[i]->rec->lent, s->active[i]->lent);
        s->need += s->active[i]->credit;
        s->active[i]->claimed = true;
    }
    return 0;
}

int rb_server_act(struct rb_cluster *c, uint32_t book, struct rb_server *s)
{
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
        free(s->active[i]);
    }
    free(s->active);
    free(s->stack);
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

/* ---- lending ---------------------------------------------------------------------------------------------------- */

static inline void arm(struct rb_book_record *r, enum rb_op op, uint32_t leg, uint32_t count, uint32_t base)
{
    rb_order();
    rb_set(&r->intent, RB_INTENT(op, leg, count, base));
    rb_order();
}
static inline void disarm(struct rb_book_record *r)
{
    rb_order();
    rb_set(&r->intent, 0);
}
static uint32_t take_some(struct rb_server *s, struct rb_leg_ctx *l, uint32_t most);
static inline void add(rb_a64 *counter, uint64_t n) { rb_set(counter, rb_get(counter) + n); }

/* An index of the peer is outside its window: a VM that was reset, until its next program has looked, or a hostile one. Nothing to take, no
 * room; counted once a session. */
static uint32_t odd(struct rb_leg_ctx *l)
{
    if (!l->odd)
        add(&l->rec->foreign, 1);
    l->odd = true;
    return 0;
}

/* The word that lending `number` on leg l makes of the present one; 0 when the book has no room for one more level. */
static uint64_t lend_word(struct rb_server *s, struct rb_leg_ctx *l, uint32_t number, uint32_t hand, struct rb_leg_ctx **back)
{
    uint64_t w = rb_get(&s->ledger[number]);
    *back = NULL;
    if (hand == RB_HAND_HOME)
        return RB_WORD(RB_W_LENT, l->number);
    struct rb_end *from = s->c->end[hand - RB_HAND_BORROWED];
    struct rb_leg_ctx *own = s->leg[from->leg];
    if (own && rb_get(&own->rec->book) == s->book + 1) { /* this book is also the lender it came from */
        *back = own;
        return RB_WORD_SUBKIND(w) ? (w & ~(0xffffull << 21)) | (uint64_t)l->number << 21 : RB_WORD(RB_W_LENT, l->number);
    }
    /* One loop among processes is told apart by the two levels; whatever would need a third is copied. */
    if (RB_WORD_SUBKIND(w) || (RB_WORD_KIND(w) == RB_W_LENT && RB_WORD_LEG(w) == l->number))
        return 0;
    uint32_t book = rb_get(&l->rec->client_book);
    if (book && RB_WORD_SUBKIND(rb_get(&s->c->reg->ledgers[(uint64_t)(book - 1) * s->c->reg->state->capacity + number])))
        return 0;
    return w | RB_WORD_SUB(RB_W_LENT, l->number, from->leg);
}

/* Replace desc by a copy in a buffer of this book. 0, or -1 when there is none. */
static int copy_out(struct rb_server *s, struct rb_leg_ctx *l, rb_desc *desc)
{
    struct rb_cluster *c = s->c;
    if (!s->free)
        return -1;
    uint32_t fresh = s->stack[--s->free];
    rb_desc to = {.handle = fresh, .word = desc->word, .ts = desc->ts};
    memcpy(rb_data(c, &to), rb_data(c, desc), rb_desc_length(desc));
    rb_hand_back(c, desc->handle);
    c->where[rb_number(c, fresh)] = RB_HAND_HOME;
    *desc = to;
    add(&l->rec->copied, 1);
    return 0;
}

/* How many of the first n descriptors are buffers of this book in our hand, the usual case. They leave the hand. */
static inline uint32_t from_hand(struct rb_cluster *c, const rb_desc *d, uint32_t n, uint32_t *handle, uint64_t *bytes)
{
    const uint32_t count = c->pool_count[0], size = c->buffer_size;
    uint16_t *where = c->where;
    uint64_t sum = 0;
    uint32_t i;
    for (i = 0; i < n; i++) {
        uint32_t h = d[i].handle, w = d[i].word;
        if (__builtin_expect((h - 1 >= count - 1) | ((w & 0x7fff) + (w >> 15 & 0x3fff) > size), 0) || __builtin_expect(where[h] != RB_HAND_HOME, 0))
            break;
        where[h] = RB_HAND_NONE; /* a handle twice in one burst fails the second time */
        handle[i] = h;
        sum += w & 0x7fff;
    }
    *bytes += sum;
    return i;
}

/* The other cases, one at a time: borrowed, or in another pool. 1, or 0 when it is not ours to lend. */
static uint32_t from_elsewhere(struct rb_server *s, struct rb_leg_ctx *l, rb_desc *d, uint32_t *number, uint64_t *word, uint64_t *bytes)
{
    struct rb_cluster *c = s->c;
    struct rb_leg_ctx *back = NULL;
    uint32_t at = rb_number(c, d->handle), hand = at == UINT32_MAX ? RB_HAND_NONE : c->where[at];
    if (hand == RB_HAND_NONE || !rb_fits(c, d->word))
        return 0;
    *word = lend_word(s, l, at, hand, &back);
    if (!*word) {
        if (copy_out(s, l, d) < 0)
            return 0;
        at = rb_number(c, d->handle);
        *word = RB_WORD(RB_W_LENT, l->number);
    }
    if (back)
        rb_set(&back->rec->lent, --back->lent);
    c->where[at] = RB_HAND_NONE;
    *number = at;
    *bytes += d->word & 0x7fff;
    return 1;
}

int rb_server_lend(struct rb_server *s, struct rb_leg_ctx *l, rb_desc *desc, int n)
{
    struct rb_cluster *c = s->c;
    struct rb_book_record *rec = s->rec;
    rb_a64 *ledger = s->ledger;
    uint32_t done = 0;
    if (l->paused)
        return 0;
    while (done < (uint32_t)n) {
        uint32_t k = RB_MIN((uint32_t)n - done, RB_MAX_BURST), space = rb_ring_space(&l->ring, k), number[RB_MAX_BURST];
        rb_desc *d = desc + done;
        uint64_t word = RB_WORD(RB_W_LENT, l->number), bytes = 0;
        k = space == RB_RING_FAULT ? odd(l) : RB_MIN(k, space);
        if (l->lent + k > l->credit) {
            rb_server_take(s, l);
            k = RB_MIN(k, l->credit > l->lent ? l->credit - l->lent : 0);
        }
        if (!k) { /* a new consumer may be waiting for our answer */
            if (rb_load_acquire(&l->ring.ctl->session) != rb_get(&l->rec->echoed))
                rb_renew(s, l);
            break;
        }
        uint32_t got = from_hand(c, d, k, number, &bytes);
        if (got == 0 && !(got = from_elsewhere(s, l, d, number, &word, &bytes))) {
            if (!done)
                return rb_fail(EINVAL, "bad-descriptor", NULL, "descriptor %u is not in this handle's hand, or does not fit its buffer", d->handle);
            break;
        }
        k = got;
        if (__builtin_expect(l->observer != NULL, 0))
            rb_observe(s, l->observer, d, k); /* now: once it is lent its consumer may write into it */
        for (uint32_t i = 0; i < k; i++)
            rec->handles[i] = d[i].handle;
        arm(rec, RB_OP_LEND, l->number, k, l->ring.p);
        for (uint32_t i = 0; i < k; i++)
            rb_set(&ledger[number[i]], word);
        rb_order();
        rb_ring_write(&l->ring, d, k);
        rb_order();
        rb_set(&l->rec->committed[RB_IX_P], l->ring.p);
        rb_order();
        rb_ring_publish(&l->ring);
        disarm(rec);
        l->lent += k;
        rb_set(&l->rec->lent, l->lent);
        add(&l->rec->packets, k);
        add(&l->rec->bytes, bytes);
        done += k;
    }
    /* Last in, first out: what came back a moment ago is still in cache, so take some before it is needed; not at every burst, since each look
     * at the consumer's index costs a line's way between two cores. */
    if (l->lent > RB_MIN(l->credit / 2, 1024u) || s->free < RB_BURST)
        take_some(s, l, RB_MAX_BURST);
    return (int)done;
}

/* ---- taking back ------------------------------------------------------------------------------------------------ */

/* One handle that came back on l (or was sent by the VM, then l is the leg it was sent on). Returns 1 when it was lent there. */
void rb_server_apply_take(struct rb_server *s, struct rb_leg_ctx *l, uint32_t handle)
{
    uint32_t at = rb_number(s->c, handle);
    uint64_t w = at == UINT32_MAX ? 0 : rb_get(&s->ledger[at]);
    if (w == RB_WORD(RB_W_LENT, l->number)) {
        rb_server_home(s, at, handle);
        l->lent--;
    } else if (RB_WORD_SUBKIND(w) == RB_W_LENT && RB_WORD_SUBLEG(w) == l->number) {
        rb_set(&s->ledger[at], RB_WORD_LEVEL0(w));
        l->lent--;
        if (!s->acting)
            rb_give(s->c, RB_WORD_ORIGIN(w), handle);
    } else
        add(&l->rec->foreign, 1);
}

/* At most `most` of what is in the return ring. */
static uint32_t take_some(struct rb_server *s, struct rb_leg_ctx *l, uint32_t most)
{
    const uint64_t lent_word = RB_WORD(RB_W_LENT, l->number), home_word = RB_WORD(RB_W_HOME, 0);
    const uint32_t count = s->c->pool_count[0], mask = l->ring.rmask, rc = l->ring.rc;
    const uint32_t *returned = l->ring.returned;
    uint32_t n = rb_ring_returned(&l->ring, 1), *handle = s->rec->handles, bad = 0;
    rb_a64 *ledger = s->ledger;
    n = n == RB_RING_FAULT ? odd(l) : RB_MIN(RB_MIN(n, most), RB_MAX_BURST);
    if (!n)
        return 0;
    for (uint32_t i = 0; i < n; i++) { /* a private copy: the peer can change nothing of it any more */
        handle[i] = *(const volatile uint32_t *)&returned[(rc + i) & mask];
        __builtin_prefetch(&returned[(rc + i + 2 * RB_BURST) & mask], 0);
    }
    arm(s->rec, RB_OP_TAKE, l->number, n, rc);
    uint32_t *top = s->stack + s->free;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t h = handle[i];
        if (__builtin_expect(h - 1 >= count - 1, 0) || __builtin_expect(rb_get(&ledger[h]) != lent_word, 0)) {
            bad++;
            s->free = (uint32_t)(top - s->stack);
            rb_server_apply_take(s, l, h);
            top = s->stack + s->free;
            continue;
        }
        rb_set(&ledger[h], home_word);
        *top++ = h;
    }
    s->free = (uint32_t)(top - s->stack);
    l->lent -= n - bad;
    l->ring.rc = rc + n;
    rb_order();
    rb_set(&l->rec->committed[RB_IX_RC], l->ring.rc);
    rb_order();
    rb_store_release(&l->ring.ctl->rc, l->ring.rc);
    disarm(s->rec);
    rb_set(&l->rec->lent, l->lent);
    return n;
}

int rb_server_take(struct rb_server *s, struct rb_leg_ctx *l)
{
    uint32_t total = 0, n;
    if (l->kind != RB_LEG_LEND)
        return 0;
    while (total <= l->ring.returns && (n = take_some(s, l, RB_MAX_BURST)) > 0) /* a VM that writes without end is not waited for */
        total += n;
    return (int)total;
}

/* ---- a sending VM: grant and collect ------------------------------------------------------------------------------ */

int rb_server_grant(struct rb_server *s, struct rb_leg_ctx *l)
{
    uint32_t n = RB_MIN(RB_MIN(l->credit > l->lent ? l->credit - l->lent : 0, RB_MAX_BURST), s->free);
    uint32_t out = l->ring.rp - l->ring.rc;
    if (l->paused || l->kind != RB_LEG_GRANT || n < RB_MIN(l->credit / 4, 32u))
        return 0;
    if (l->ring.returns - out < n) {
        uint32_t rc = rb_load_acquire(&l->ring.ctl->rc);
        if (l->ring.rp - rc > l->ring.returns)
            return (int)odd(l);
        l->ring.rc = rc;
        n = RB_MIN(n, l->ring.returns - (l->ring.rp - rc));
    }
    if (!n)
        return 0;
    for (uint32_t i = 0; i < n; i++)
        s->rec->handles[i] = s->stack[s->free - 1 - i];
    arm(s->rec, RB_OP_GRANT, l->number, n, l->ring.rp);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t handle = s->stack[--s->free];
        rb_set(&s->ledger[rb_number(s->c, handle)], RB_WORD(RB_W_LENT, l->number));
        l->ring.returned[(l->ring.rp + i) & l->ring.rmask] = handle;
    }
    l->ring.rp += n;
    rb_order();
    rb_set(&l->rec->committed[RB_IX_RP], l->ring.rp);
    rb_order();
    rb_store_release(&l->ring.ctl->rp, l->ring.rp);
    disarm(s->rec);
    l->lent += n;
    rb_set(&l->rec->lent, l->lent);
    return (int)n;
}

/* The leg on which a VM of l's domain holds the buffer; NULL when it does not. */
static struct rb_leg_ctx *holder_leg(struct rb_server *s, struct rb_leg_ctx *l, uint64_t w, int *sub)
{
    uint32_t leg;
    if (RB_WORD_SUBKIND(w) == RB_W_LENT) {
        leg = RB_WORD_SUBLEG(w);
        *sub = 1;
    } else if (RB_WORD_KIND(w) == RB_W_LENT) {
        leg = RB_WORD_LEG(w);
        *sub = 0;
    } else
        return NULL;
    struct rb_leg_ctx *from = s->leg[leg];
    return from && (from == l || (from->domain == l->domain && l->domain)) ? from : NULL;
}

int rb_server_collect(struct rb_server *s, struct rb_leg_ctx *l, rb_desc *desc, int max)
{
    struct rb_cluster *c = s->c;
    uint32_t n, out = 0, read = 0;
    uint64_t bytes = 0, handed = 0;
    if (l->paused)
        return 0;
    for (; out == 0 && read <= l->ring.slots; read += n) { /* a VM that sends rubbish without end is not waited for */
        n = rb_ring_ready(&l->ring, 1);
        n = n == RB_RING_FAULT ? odd(l) : RB_MIN(RB_MIN(n, (uint32_t)max), RB_MAX_BURST);
        if (!n)
            break;
        uint32_t base = l->ring.c;
        rb_ring_read(&l->ring, desc, n); /* a private copy: the VM can change nothing of it any more */
        for (uint32_t i = 0; i < n; i++)
            s->rec->handles[i] = desc[i].handle;
        arm(s->rec, RB_OP_COLLECT, l->number, n, base);
        for (uint32_t i = 0; i < n; i++) {
            rb_desc d = desc[i];
            uint32_t at = rb_number(c, d.handle);
            int sub = 0;
            uint64_t w = at == UINT32_MAX ? 0 : rb_get(&s->ledger[at]);
            struct rb_leg_ctx *from = w ? holder_leg(s, l, w, &sub) : NULL;
            if (!from) {
                if (d.handle)
                    add(&l->rec->foreign, 1);
                continue;
            }
            rb_set(&from->rec->lent, --from->lent);
            int fits = rb_fits(c, d.word);
            if (sub) {
                struct rb_end *origin = rb_client_end_of(c, RB_WORD_ORIGIN(w));
                if (!origin || !origin->echoed) { /* its lender takes it home with the next session, maybe while we hold it: pass on a copy */
                    int copied = fits && rb_desc_length(&d) && s->free;
                    if (copied) {
                        rb_desc to = {.handle = s->stack[--s->free], .word = d.word, .ts = d.ts};
                        memcpy(rb_data(c, &to), rb_data(c, &d), rb_desc_length(&d));
                        c->where[rb_number(c, to.handle)] = RB_HAND_HOME;
                        d = to;
                        add(&l->rec->copied, 1);
                    }
                    rb_set(&s->ledger[at], RB_WORD_LEVEL0(w));
                    if (origin)
                        origin->again = true;
                    if (!copied) {
                        add(&l->rec->drops[fits ? RB_DROP_NO_BUFFER : RB_DROP_BAD], rb_desc_length(&d) != 0);
                        continue;
                    }
                    bytes += rb_desc_length(&d);
                    handed++;
                    desc[out++] = d;
                    continue;
                }
                rb_set(&s->ledger[at], RB_WORD_LEVEL0(w));
                c->where[at] = (uint16_t)(RB_HAND_BORROWED + origin->index);
                if (!fits || !rb_desc_length(&d)) {
                    rb_hand_back(c, d.handle);
                    if (!fits)
                        add(&l->rec->drops[RB_DROP_BAD], 1);
                    continue;
                }
            } else {
                rb_set(&s->ledger[at], RB_WORD(RB_W_HOME, 0));
                if (!fits || !rb_desc_length(&d)) { /* length 0: a granted buffer given back */
                    s->stack[s->free++] = d.handle;
                    if (!fits)
                        add(&l->rec->drops[RB_DROP_BAD], 1);
                    continue;
                }
                c->where[at] = RB_HAND_HOME;
            }
            bytes += rb_desc_length(&d);
            handed++;
            desc[out++] = d;
        }
        rb_order();
        rb_set(&l->rec->committed[RB_IX_C], l->ring.c);
        rb_order();
        rb_ring_consumed(&l->ring);
        disarm(s->rec);
    }
    if (__builtin_expect(l->observer != NULL, 0))
        rb_observe(s, l->observer, desc, out);
    if (handed) {
        add(&l->rec->packets, handed);
        add(&l->rec->bytes, bytes);
    }
    rb_set(&l->rec->lent, l->lent);
    rb_server_grant(s, l);
    return (int)out;
}

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
        return (int)odd(r);
    if (r->lent + RB_BURST > r->credit)
        rb_server_take(s, r);
    room = RB_MIN(RB_MIN(room, RB_BURST), r->credit > r->lent ? r->credit - r->lent : 0);
    if (!room)
        return 0; /* full: it waits in the VM's ring, and the VM drops and counts */
    int n = rb_server_collect(s, t, desc, (int)room), k = n > 0 ? rb_server_lend(s, r, desc, n) : 0;
    if (k < n) {
        add(&r->rec->drops[RB_DROP_FULL], (uint64_t)(n - RB_MAX(k, 0)));
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
    if (s->c->waiting && did && !s->acting)
        rb_end_finish(s->c);
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
            if (!s->acting && l->kind == RB_LEG_GRANT)
                l->claimed = rb_server_claim(s, l->credit, "the grant of a sending VM") == 0;
        }
        uint32_t release = rb_get(&rec->release);
        l->domain = c->reg->state->lane[l->place >> 32].domain;
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
        if (rb_get(&rec->wanted) != rb_get(&rec->place))
            leg_move(s, l);
        else if (c->reg->state->place[l->place >> 32][(uint32_t)l->place - 1].used == 2)
            rb_place_live(c, l->place); /* whoever moved it here died before it said so */
    }
    rb_observe_link(s);
    if (!pending) {
        s->epoch = epoch;
        rb_store_release(&s->rec->seen, epoch);
    }
    rb_leave(c->reg);
    return 0;
}
