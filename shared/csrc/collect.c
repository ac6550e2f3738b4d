/* SPDX-License-Identifier: Apache-2.0
 *
 * A VM that sends: it is granted empties, and what it sends is taken back from it, checked, and in the server's hand. The order of the stores is that of
 * lend.c.
 */
#include "rb_internal.h"

int rb_server_grant(struct rb_server *s, struct rb_leg_ctx *l)
{
    uint32_t *stack = l->own ? s->own[l->own].stack : s->stack, *free = l->own ? &s->own[l->own].free : &s->free;
    uint32_t n = RB_MIN(RB_MIN(l->credit > l->lent ? l->credit - l->lent : 0, RB_MAX_BURST), *free);
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
        s->rec->handles[i] = stack[*free - 1 - i];
    rb_arm(s->rec, RB_OP_GRANT, l->number, n, l->ring.rp);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t handle = stack[--*free];
        rb_set(&s->ledger[rb_number(s->c, handle)], RB_WORD(RB_W_LENT, l->number));
        l->ring.returned[(l->ring.rp + i) & l->ring.rmask] = handle;
    }
    l->ring.rp += n;
    rb_order();
    rb_set(&l->rec->committed[RB_IX_RP], l->ring.rp);
    rb_order();
    rb_store_release(&l->ring.ctl->rp, l->ring.rp);
    rb_disarm(s->rec);
    l->lent += n;
    rb_set(&l->rec->lent, l->lent);
    return (int)n;
}

struct rb_leg_ctx *rb_holder_leg(struct rb_server *s, struct rb_leg_ctx *l, uint32_t number, uint64_t w, enum rb_by *by)
{
    uint64_t mask = rb_shared_word(w) ? rb_get(&s->masks[number]) : 0;
    uint32_t leg = UINT32_MAX;
    struct rb_leg_ctx *from;
    if (RB_WORD_SUBKIND(w) == RB_W_LENT) {
        leg = RB_WORD_SUBLEG(w);
        *by = RB_BY_SUB;
    } else if (RB_WORD_KIND(w) == RB_W_LENT) {
        leg = RB_WORD_LEG(w);
        *by = RB_BY_WORD;
    }
    for (;;) {
        if (leg == l->number)
            return l;
        if (leg < RB_MAX_LEGS && l->kind == RB_LEG_GRANT && l->domain && rb_server_leg(s, leg, &from) == 0 && from->domain == l->domain)
            return from;
        if (!mask)
            return NULL;
        uint32_t to = rb_get(&s->rec->output[__builtin_ctzll(mask)]);
        mask &= mask - 1;
        leg = to && !(to & RB_OUTPUT_DEVICE) ? to - 1 : UINT32_MAX;
        *by = RB_BY_BIT;
    }
}

/* A copy of what a VM sent, since the buffer itself cannot be passed on. 1, or 0 when there is no buffer for it. */
static int copy_in(struct rb_server *s, struct rb_leg_ctx *l, rb_desc *d)
{
    struct rb_cluster *c = s->c;
    if (!s->free) {
        rb_add(&l->rec->drops[RB_DROP_NO_BUFFER], 1);
        return 0;
    }
    rb_desc to = {.handle = s->stack[--s->free], .word = d->word & ~((uint32_t)RB_SHARED << 29), .ts = d->ts};
    memcpy(rb_data(c, &to), rb_data(c, d), rb_desc_length(d));
    c->where[rb_number(c, to.handle)] = RB_HAND_HOME;
    *d = to;
    rb_add(&l->rec->copied, 1);
    return 1;
}

/* One descriptor that a VM sent on l: 1 when it is in our hand now, with whatever has to be said of its buffer; 0 when nothing is to be passed on. */
static int collect_one(struct rb_server *s, struct rb_leg_ctx *l, rb_desc *d)
{
    const uint32_t shared_flag = (uint32_t)RB_SHARED << 29;
    struct rb_cluster *c = s->c;
    uint32_t at = rb_number(c, d->handle);
    enum rb_by by = RB_BY_WORD;
    uint64_t w = at == UINT32_MAX ? 0 : rb_get(&s->ledger[at]), others = 0;
    struct rb_leg_ctx *from = w ? rb_holder_leg(s, l, at, w, &by) : NULL;
    if (from && by == RB_BY_BIT) {
        others = rb_get(&s->masks[at]) & ~from->bit;
        if (!others && RB_WORD_KIND(w) == RB_W_SHARED && RB_WORD_SUBKIND(w))
            from = NULL; /* what it is a loan of has not come back */
    }
    if (!from) {
        if (d->handle)
            rb_add(&l->rec->foreign, 1);
        return 0;
    }
    if (by == RB_BY_BIT)
        from->shared--;
    rb_set(&from->rec->lent, --from->lent);
    int fits = rb_fits(c, d->word), packet = fits && rb_desc_length(d), sub = by == RB_BY_SUB || (by == RB_BY_BIT && RB_WORD_SUBKIND(w) == RB_SUB_SHARED);
    if (!fits)
        rb_add(&l->rec->drops[RB_DROP_BAD], 1);
    if (by == RB_BY_BIT && !packet) { /* given back; what others have of it, or our own hand, stays theirs */
        rb_unshare(s, at, d->handle, from->bit);
        return 0;
    }
    struct rb_end *origin = sub ? rb_client_end_of(c, RB_WORD_ORIGIN(w)) : NULL;
    /* Its lender takes it home with the next session, maybe while we hold it; or it is in our hand by another way too: pass on a copy. */
    if (packet && ((sub && (!origin || !origin->echoed)) || c->where[at] & RB_HAND)) {
        packet = copy_in(s, l, d);
        if (origin)
            origin->again |= !origin->echoed;
        if (by == RB_BY_BIT)
            rb_unshare(s, at, rb_handle_of(c, at), from->bit);
        else if (sub) {
            rb_set(&s->ledger[at], RB_WORD_LEVEL0(w));
            if (origin && origin->echoed)
                rb_client_give(origin, rb_handle_of(c, at));
        } else
            rb_server_home(s, at, rb_handle_of(c, at));
        return packet;
    }
    if (others) { /* others have it: it stays shared, and ours is the hold */
        rb_set(&s->masks[at], others);
        c->where[at] |= RB_HAND_SHARED;
        d->word |= shared_flag;
        return 1;
    }
    if (sub) {
        rb_set(&s->ledger[at], RB_WORD_LEVEL0(w));
        if (packet) {
            c->where[at] |= RB_HAND_BORROWED + origin->index;
            d->word = (d->word & ~shared_flag) | (w & RB_SUB_FIXED ? shared_flag : 0);
        } else if (origin && origin->echoed)
            rb_client_give(origin, d->handle);
        else if (origin)
            origin->again = true;
        return packet;
    }
    rb_set(&s->ledger[at], RB_WORD(RB_W_HOME, 0));
    if (packet) {
        c->where[at] |= RB_HAND_HOME;
        d->word &= ~shared_flag;
    } else /* length 0: a granted buffer given back */
        rb_server_push(s, d->handle);
    return packet;
}

int rb_server_collect(struct rb_server *s, struct rb_leg_ctx *l, rb_desc *desc, int max)
{
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
        rb_arm(s->rec, RB_OP_COLLECT, l->number, n, base);
        for (uint32_t i = 0; i < n; i++) {
            rb_desc d = desc[i];
            if (!collect_one(s, l, &d))
                continue;
            bytes += rb_desc_length(&d);
            handed++;
            desc[out++] = d;
        }
        rb_order();
        rb_set(&l->rec->committed[RB_IX_C], l->ring.c);
        rb_order();
        rb_ring_consumed(&l->ring);
        rb_disarm(s->rec);
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
