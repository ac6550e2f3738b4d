/* SPDX-License-Identifier: Apache-2.0
 *
 * Lending and taking back. The order of the stores of an operation is the protocol (docs/protocol.md); each is: handles, arm, ledger, ring,
 * committed index (the commit point), index in the lane, disarm.
 */
#include "rb_bell.h"

/* ---- lending ---------------------------------------------------------------------------------------------------- */

/* What lending one buffer does to the ledger. */
struct loan {
    uint32_t number;
    uint64_t word, mask;     /* mask 0: it is not shared */
    struct rb_leg_ctx *back; /* this same book lent it before, on this leg; its loan ends */
    bool back_shared;
};

/* A shared buffer in our hand goes on: one more bit, if that can be. */
static int share_on(struct rb_server *s, struct rb_leg_ctx *l, uint64_t mask, struct loan *loan)
{
    uint64_t bit = rb_leg_bit(s, l), w = loan->word;
    if (!bit || mask & bit || (RB_WORD_SUBKIND(w) == RB_W_LENT && RB_WORD_SUBLEG(w) == l->number) || rb_fan_conflict(s, l, mask))
        return 0;
    loan->mask = mask | bit;
    return 1;
}

/* What lending it on leg l makes of its word; 0 when the book has no room for one more level. */
static int lend_word(struct rb_server *s, struct rb_leg_ctx *l, uint32_t hand, uint32_t flags, struct loan *loan)
{
    const uint32_t number = loan->number;
    const uint64_t w = rb_get(&s->ledger[number]);
    loan->back = NULL;
    loan->mask = 0;
    loan->word = RB_WORD(RB_W_LENT, l->number);
    if (hand == RB_HAND_HOME)
        return 1;
    if (hand == RB_HAND_SHARED) {
        loan->word = w;
        return share_on(s, l, rb_get(&s->masks[number]), loan);
    }
    struct rb_end *from = s->c->end[hand - RB_HAND_BORROWED];
    struct rb_leg_ctx *own = s->leg[from->leg];
    if (own && rb_get(&own->rec->book) == s->book + 1) { /* this book is also the lender it came from */
        uint64_t mask = rb_shared_word(w) ? rb_get(&s->masks[number]) : 0;
        loan->back = own;
        loan->back_shared = (mask & own->bit) != 0;
        if (!loan->back_shared) {
            if (RB_WORD_SUBKIND(w))
                loan->word = (w & ~(0xffffull << 21)) | (uint64_t)l->number << 21;
            return 1;
        }
        if (mask != own->bit) { /* others have it as well */
            loan->word = w;
            return share_on(s, l, mask & ~own->bit, loan);
        }
        if (RB_WORD_SUBKIND(w) == RB_SUB_SHARED)
            loan->word = (w & ~(0x3ffffull << 19)) | RB_WORD_SUB(RB_W_LENT, l->number, 0);
        return 1;
    }
    /* One loop among processes is told apart by the two levels; whatever would need a third is copied. */
    if (RB_WORD_SUBKIND(w) || (RB_WORD_KIND(w) == RB_W_LENT && RB_WORD_LEG(w) == l->number) ||
        (RB_WORD_KIND(w) == RB_W_SHARED && rb_get(&s->masks[number]) & l->bit))
        return 0;
    uint32_t book = rb_get(&l->rec->client_book);
    if (book && RB_WORD_SUBKIND(rb_get(&s->c->reg->ledgers[(uint64_t)(book - 1) * s->c->reg->state->capacity + number])))
        return 0;
    loan->word = w | RB_WORD_SUB(RB_W_LENT, l->number, from->leg) | (flags & RB_SHARED ? RB_SUB_FIXED : 0);
    return 1;
}

int rb_server_copy(struct rb_server *s, rb_desc *desc)
{
    struct rb_cluster *c = s->c;
    if (!s->free)
        return -1;
    uint32_t fresh = s->stack[--s->free];
    rb_desc to = {.handle = fresh, .word = desc->word & ~((uint32_t)RB_SHARED << 29), .ts = desc->ts};
    memcpy(rb_data(c, &to), rb_data(c, desc), rb_desc_length(desc));
    rb_hand_back(c, desc->handle);
    c->where[rb_number(c, fresh)] = RB_HAND_HOME;
    *desc = to;
    return 0;
}

/* How many of the first n descriptors are buffers of this book in our hand, the usual case. They leave the hand. */
static inline uint32_t from_hand(struct rb_cluster *c, const rb_desc *d, uint32_t n, uint32_t *handle, uint64_t *bytes)
{
    const uint32_t count = c->pool_count[0], size = c->buffer_size;
    uint32_t *where = c->where;
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

/* The same for buffers borrowed at one end with which this book has nothing else to do yet: they all get one word. */
static uint32_t from_one_end(struct rb_server *s, struct rb_leg_ctx *l, const rb_desc *d, uint32_t n, uint32_t *number, uint64_t *word, uint64_t *bytes)
{
    struct rb_cluster *c = s->c;
    const uint32_t count = c->pool_count[0], size = c->buffer_size, book = rb_get(&l->rec->client_book);
    const uint32_t hand = d->handle - 1 < count - 1 ? c->where[d->handle] & RB_HAND : RB_HAND_NONE;
    const rb_a64 *ledger = s->ledger, *theirs = book ? &c->reg->ledgers[(uint64_t)(book - 1) * c->reg->state->capacity] : NULL;
    uint32_t *where = c->where;
    struct rb_end *from = hand >= RB_HAND_BORROWED && !c->extras ? c->end[hand - RB_HAND_BORROWED] : NULL;
    struct rb_leg_ctx *own = from ? s->leg[from->leg] : NULL;
    uint64_t sum = 0;
    uint32_t i;
    if (!from || (own && rb_get(&own->rec->book) == s->book + 1))
        return 0;
    for (i = 0; i < n; i++) {
        uint32_t h = d[i].handle, w = d[i].word;
        if (__builtin_expect((h - 1 >= count - 1) | ((w & 0x7fff) + (w >> 15 & 0x3fff) > size) | (w >> 29 & RB_SHARED), 0) ||
            __builtin_expect(((where[h] & RB_HAND) ^ hand) | rb_get(&ledger[h]), 0) || (theirs && RB_WORD_SUBKIND(rb_get(&theirs[h]))))
            break;
        where[h] &= ~(uint32_t)RB_HAND;
        number[i] = h;
        sum += w & 0x7fff;
    }
    *word = RB_WORD_SUB(RB_W_LENT, l->number, from->leg);
    *bytes += sum;
    return i;
}

/* The same for buffers of a pool that a VM transmits from, where whom they are lent to maps it. */
static uint32_t from_far(struct rb_cluster *c, const struct rb_leg_ctx *l, const rb_desc *d, uint32_t n, uint32_t *handle, uint64_t *bytes)
{
    uint32_t i;
    for (i = 0; i < n; i++) {
        uint32_t pool = d[i].handle >> 24, at = pool && pool < RB_MAX_POOLS && l->pools >> pool & 1 ? rb_number(c, d[i].handle) : UINT32_MAX;
        if (at == UINT32_MAX || c->where[at] != RB_HAND_HOME || !rb_fits(c, d[i].word))
            break;
        c->where[at] = RB_HAND_NONE;
        handle[i] = at;
        *bytes += d[i].word & 0x7fff;
    }
    return i;
}

/* The other cases, one at a time: borrowed, or not mapped by whom it is for. 1, or 0 when it is not ours to lend. */
static uint32_t from_elsewhere(struct rb_server *s, struct rb_leg_ctx *l, rb_desc *d, struct loan *loan, uint64_t *bytes)
{
    struct rb_cluster *c = s->c;
    uint32_t hand;
    loan->number = rb_number(c, d->handle);
    hand = loan->number == UINT32_MAX ? RB_HAND_NONE : c->where[loan->number] & RB_HAND;
    if (hand == RB_HAND_NONE || hand == RB_HAND_PEEK || !rb_fits(c, d->word))
        return 0;
    if (!(l->pools >> (d->handle >> 24) & 1) || !lend_word(s, l, hand, rb_desc_flags(d), loan)) {
        if (rb_server_copy(s, d) < 0)
            return 0;
        rb_add(&l->rec->copied, 1);
        *loan = (struct loan){.number = rb_number(c, d->handle), .word = RB_WORD(RB_W_LENT, l->number)};
    }
    if (loan->back) {
        loan->back->shared -= loan->back_shared;
        rb_set(&loan->back->rec->lent, --loan->back->lent);
    }
    if (loan->mask) {
        d->word |= (uint32_t)RB_SHARED << 29;
        l->shared++;
    }
    rb_unhand(c, loan->number);
    *bytes += d->word & 0x7fff;
    return 1;
}

static int lend(struct rb_server *s, struct rb_leg_ctx *l, rb_desc *desc, int n)
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
        struct loan loan = {.word = RB_WORD(RB_W_LENT, l->number)};
        uint64_t bytes = 0;
        k = space == RB_RING_FAULT ? rb_odd(l) : RB_MIN(k, space);
        if (l->lent + k > l->credit) {
            rb_server_take(s, l);
            k = RB_MIN(k, l->credit > l->lent ? l->credit - l->lent : 0);
        }
        while (k && k < (uint32_t)n - done && rb_desc_flags(&d[k - 1]) & RB_MORE)
            k--; /* a packet in several buffers goes whole, or not at all */
        if (!k) { /* a new consumer may be waiting for our answer */
            if (rb_load_acquire(&l->ring.ctl->session) != rb_get(&l->rec->echoed))
                rb_renew(s, l);
            break;
        }
        uint32_t got = from_hand(c, d, k, number, &bytes);
        if (__builtin_expect(got == 0, 0))
            got = from_far(c, l, d, k, number, &bytes);
        if (got == 0)
            got = from_one_end(s, l, d, k, number, &loan.word, &bytes);
        if (got == 0 && (got = from_elsewhere(s, l, d, &loan, &bytes)) != 0)
            number[0] = loan.number;
        if (got == 0) {
            if (!done)
                return rb_fail(EINVAL, "bad-descriptor", NULL, "descriptor %u is not in this handle's hand, or does not fit its buffer", d->handle);
            break;
        }
        k = got;
        if (__builtin_expect(l->observer != NULL, 0))
            rb_observe(s, l->observer, d, k); /* now: once it is lent its consumer may write into it */
        for (uint32_t i = 0; i < k; i++)
            rec->handles[i] = d[i].handle;
        rb_arm(rec, RB_OP_LEND, l->number, k, l->ring.p);
        if (__builtin_expect(loan.mask != 0, 0)) {
            rb_set(&s->masks[number[0]], loan.mask);
            rb_order();
        }
        for (uint32_t i = 0; i < k; i++)
            rb_set(&ledger[number[i]], loan.word);
        rb_order();
        rb_ring_write(&l->ring, d, k);
        rb_order();
        rb_set(&l->rec->committed[RB_IX_P], l->ring.p);
        rb_order();
        rb_ring_publish(&l->ring);
        rb_disarm(rec);
        if (__builtin_expect(l->bell != NULL, 0))
            rb_bell_look(l->bell, &l->ring.ctl->client_bell, l->ring.p);
        l->lent += k;
        rb_set(&l->rec->lent, l->lent);
        rb_add(&l->rec->packets, k);
        rb_add(&l->rec->bytes, bytes);
        done += k;
    }
    /* Last in, first out: what came back a moment ago is still in cache, so take some before it is needed; not at every burst, since each look
     * at the consumer's index costs a line's way between two cores. */
    if (l->lent > RB_MIN(l->credit / 2, 1024u) || s->free < RB_BURST)
        rb_server_take_some(s, l, RB_MAX_BURST);
    return (int)done;
}

static int lend_this(void *s, void *l, rb_desc *desc, int n) { return lend(s, l, desc, n); }

int rb_server_lend(struct rb_server *s, struct rb_leg_ctx *l, rb_desc *desc, int n)
{
    uint64_t dropped;
    if (__builtin_expect(!l->filter, 1))
        return lend(s, l, desc, n);
    if (l->paused)
        return 0;
    int done = rb_filter_send(l->filter, s->c, desc, n, lend_this, s, l, &dropped);
    if (dropped)
        rb_add(&l->rec->drops[RB_DROP_FILTER], dropped);
    return done;
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
    } else if (rb_shared_word(w) && rb_unshare(s, at, handle, l->bit)) {
        l->lent--;
        l->shared--;
    } else
        rb_add(&l->rec->foreign, 1);
}

/* Sub-loans that come back go on to where they were borrowed, and are published there together. */
struct giver {
    uint32_t leg; /* + 1; 0 = none yet */
    struct rb_end *end; /* NULL: nobody to whom it could be given as simply */
    uint32_t *returned, rp, mask;
};

static void gave(struct giver *g)
{
    if (!g->end)
        return;
    g->end->ring.rp = g->rp;
    rb_ring_gave(&g->end->ring);
    g->end = NULL;
}

static void give_to(struct rb_server *s, struct giver *g, uint32_t leg)
{
    gave(g);
    g->leg = leg + 1;
    struct rb_end *end = s->acting ? NULL : rb_client_end_of(s->c, leg);
    if (end && end->echoed && rb_client_usable(end))
        *g = (struct giver){.leg = leg + 1, .end = end, .returned = end->ring.returned, .rp = end->ring.rp, .mask = end->ring.rmask};
}

/* At most `most` of what is in the return ring. */
uint32_t rb_server_take_some(struct rb_server *s, struct rb_leg_ctx *l, uint32_t most)
{
    const uint64_t lent_word = RB_WORD(RB_W_LENT, l->number), home_word = RB_WORD(RB_W_HOME, 0), shared_word = RB_WORD(RB_W_SHARED, 0);
    const uint64_t bit = l->bit, sub_word = RB_WORD_SUB(RB_W_LENT, l->number, 0), sub_mask = RB_WORD_SUB(3, 0xffff, 0);
    const uint32_t count = s->c->pool_count[0], rc = l->ring.rc, *where = s->c->where;
    struct giver to = {0};
    uint32_t n = rb_ring_returned(&l->ring, 1), *handle = s->rec->handles;
    rb_a64 *ledger = s->ledger, *masks = s->masks;
    n = n == RB_RING_FAULT ? rb_odd(l) : RB_MIN(RB_MIN(n, most), RB_MAX_BURST);
    if (!n)
        return 0;
    rb_ring_take(&l->ring, handle, n);
    rb_arm(s->rec, RB_OP_TAKE, l->number, n, rc);
    uint32_t *top = s->stack + s->free, odd[RB_MAX_BURST], odds = 0, shared = 0;
    const uint64_t first = handle[0] - 1 < count - 1 ? rb_get(&ledger[handle[0]]) : 0;
    const uint64_t sub = (first & sub_mask) == sub_word && !RB_WORD_LEVEL0(first) ? first : 0; /* what was borrowed where the first was */
    if (sub || RB_WORD_SUBKIND(first) == RB_SUB_SHARED)
        give_to(s, &to, RB_WORD_ORIGIN(first));
    uint32_t i = 0;
    for (; i < n; i++) { /* the usual case: it was lent here, and is at home now */
        uint32_t h = handle[i];
        if (__builtin_expect(h - 1 >= count - 1, 0) || __builtin_expect(rb_get(&ledger[h]) != lent_word, 0))
            break;
        rb_set(&ledger[h], home_word);
        top[i] = h;
    }
    top += i;
    const uint32_t fanned = i;
    for (; i < n && (first == shared_word || RB_WORD_SUBKIND(first) == RB_SUB_SHARED); i++) { /* the same for what others had as well */
        uint32_t h = handle[i];
        if (__builtin_expect(h - 1 >= count - 1, 0) || __builtin_expect(rb_get(&ledger[h]) != first, 0))
            break;
        uint64_t having = rb_get(&masks[h]), rest = having & ~bit;
        if (rest == having)
            break;
        if (rest) {
            rb_set(&masks[h], rest);
            continue;
        }
        if (where[h] & RB_HAND || (first != shared_word && !to.end))
            break;
        if (first == shared_word) {
            rb_set(&ledger[h], home_word);
            *top++ = h;
        } else {
            rb_set(&ledger[h], RB_WORD_LEVEL0(first));
            to.returned[to.rp++ & to.mask] = h;
        }
    }
    shared += i - fanned;
    for (; i < n; i++) { /* what is not as usual later: a call in the loop would cost its registers */
        uint32_t h = handle[i];
        if (__builtin_expect(h - 1 >= count - 1, 0)) {
            odd[odds++] = h;
            continue;
        }
        uint64_t w = rb_get(&ledger[h]), having;
        if (sub && w == sub && to.end) {
            rb_set(&ledger[h], 0);
            if ((to.rp & 15) == 0) /* the peer read that line last */
                rb_prefetch_write(&to.returned[(to.rp + 2 * RB_BURST) & to.mask]);
            to.returned[to.rp++ & to.mask] = h;
            continue;
        }
        if (w != lent_word) {
            if ((w & sub_mask) == sub_word || !bit || !rb_shared_word(w) || !((having = rb_get(&masks[h])) & bit) ||
                (having == bit && (w != shared_word || where[h] & RB_HAND))) {
                odd[odds++] = h;
                continue;
            }
            shared++;
            if (having != bit) { /* others still have it */
                rb_set(&masks[h], having & ~bit);
                continue;
            }
        }
        rb_set(&ledger[h], home_word);
        *top++ = h;
    }
    s->free = (uint32_t)(top - s->stack);
    l->lent -= n - odds;
    l->shared -= shared;
    uint32_t given = 0;
    for (uint32_t i = 0; i < odds; i++) {
        uint32_t h = odd[i];
        uint64_t w = h - 1 < count - 1 ? rb_get(&ledger[h]) : 0;
        if ((w & sub_mask) == sub_word) {
            if (__builtin_expect(to.leg != RB_WORD_ORIGIN(w) + 1, 0))
                give_to(s, &to, RB_WORD_ORIGIN(w));
            if (to.end) {
                rb_set(&ledger[h], RB_WORD_LEVEL0(w));
                to.returned[to.rp++ & to.mask] = h;
                given++;
                continue;
            }
        }
        gave(&to); /* it may have to go to the same end */
        to.leg = 0;
        rb_server_apply_take(s, l, h);
    }
    l->lent -= given;
    gave(&to);
    rb_order();
    rb_set(&l->rec->committed[RB_IX_RC], l->ring.rc);
    rb_order();
    rb_store_release(&l->ring.ctl->rc, l->ring.rc);
    rb_disarm(s->rec);
    rb_set(&l->rec->lent, l->lent);
    return n;
}

int rb_server_take(struct rb_server *s, struct rb_leg_ctx *l)
{
    uint32_t total = 0, n;
    if (l->kind != RB_LEG_LEND)
        return 0;
    while (total <= l->ring.returns && (n = rb_server_take_some(s, l, RB_MAX_BURST)) > 0) /* a VM that writes without end is not waited for */
        total += n;
    return (int)total;
}
