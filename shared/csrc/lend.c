/* SPDX-License-Identifier: Apache-2.0
 *
 * Lending and taking back. The order of the stores of an operation is the protocol (docs/protocol.md); each is: handles, arm, ledger, ring,
 * committed index (the commit point), index in the lane, disarm.
 */
#include "rb_internal.h"

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
    rb_add(&l->rec->copied, 1);
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
        k = space == RB_RING_FAULT ? rb_odd(l) : RB_MIN(k, space);
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
        rb_add(&l->rec->packets, k);
        rb_add(&l->rec->bytes, bytes);
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
        rb_add(&l->rec->foreign, 1);
}

/* At most `most` of what is in the return ring. */
static uint32_t take_some(struct rb_server *s, struct rb_leg_ctx *l, uint32_t most)
{
    const uint64_t lent_word = RB_WORD(RB_W_LENT, l->number), home_word = RB_WORD(RB_W_HOME, 0);
    const uint32_t count = s->c->pool_count[0], mask = l->ring.rmask, rc = l->ring.rc;
    const uint32_t *returned = l->ring.returned;
    uint32_t n = rb_ring_returned(&l->ring, 1), *handle = s->rec->handles, bad = 0;
    rb_a64 *ledger = s->ledger;
    n = n == RB_RING_FAULT ? rb_odd(l) : RB_MIN(RB_MIN(n, most), RB_MAX_BURST);
    if (!n)
        return 0;
    for (uint32_t i = 0; i < n; i++) { /* a private copy: the peer can change nothing of it any more */
        handle[i] = *(const volatile uint32_t *)&returned[(rc + i) & mask];
        if ((i & 15) == 0) /* once a line */
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
            return (int)rb_odd(l);
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
        n = n == RB_RING_FAULT ? rb_odd(l) : RB_MIN(RB_MIN(n, (uint32_t)max), RB_MAX_BURST);
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
                    rb_add(&l->rec->foreign, 1);
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
                        rb_add(&l->rec->copied, 1);
                    }
                    rb_set(&s->ledger[at], RB_WORD_LEVEL0(w));
                    if (origin)
                        origin->again = true;
                    if (!copied) {
                        rb_add(&l->rec->drops[fits ? RB_DROP_NO_BUFFER : RB_DROP_BAD], rb_desc_length(&d) != 0);
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
                        rb_add(&l->rec->drops[RB_DROP_BAD], 1);
                    continue;
                }
            } else {
                rb_set(&s->ledger[at], RB_WORD(RB_W_HOME, 0));
                if (!fits || !rb_desc_length(&d)) { /* length 0: a granted buffer given back */
                    s->stack[s->free++] = d.handle;
                    if (!fits)
                        rb_add(&l->rec->drops[RB_DROP_BAD], 1);
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
        rb_add(&l->rec->packets, handed);
        rb_add(&l->rec->bytes, bytes);
    }
    rb_set(&l->rec->lent, l->lent);
    rb_server_grant(s, l);
    return (int)out;
}
