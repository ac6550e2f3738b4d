/* SPDX-License-Identifier: Apache-2.0
 *
 * Lending a burst to several outputs. It is one operation: handles, arm, masks and words, slots, and then for each output its committed index and the
 * index in its lane. Whoever recovers it sees for each output whether that was reached, and clears the bits of the others.
 */
#include "rb_bell.h"
#include "rb_fan.h"

/* A packet on its way through the fan. */
struct item {
    uint32_t number, hand;
    uint64_t mask, prior;  /* the outputs it goes to; those that have it already */
    uint64_t extra;        /* level 1: of which loan it is one */
    bool sub;              /* level 1 */
    bool back_shared;
    struct rb_leg_ctx *back;
};

/* Free slots and credit of an output, for at most n. */
static uint32_t room_for(struct rb_server *s, struct rb_leg_ctx *l, uint32_t n)
{
    uint32_t room = rb_ring_space(&l->ring, n);
    if (l->paused)
        return 0;
    room = room == RB_RING_FAULT ? rb_odd(l) : RB_MIN(room, n);
    if (l->lent + n > l->credit) {
        rb_server_take(s, l);
        room = RB_MIN(room, l->credit > l->lent ? l->credit - l->lent : 0);
    }
    if (!room && rb_load_acquire(&l->ring.ctl->session) != rb_get(&l->rec->echoed))
        rb_renew(s, l); /* a new consumer waits for our answer */
    return room;
}

static void observe(struct rb_server *s, struct output *o, const rb_desc *d, const uint64_t *mask, uint32_t n, uint64_t bit)
{
    rb_desc seen[RB_MAX_BURST];
    uint32_t k = 0, room = room_for(s, o->l, n);
    for (uint32_t i = 0; i < n && k < room; i++)
        if (mask[i] & bit)
            seen[k++] = d[i];
    if (k)
        rb_observe(s, o->l->observer, seen, k);
}

/* A packet in several buffers that begins at `from` goes to an output whole, or not at all. */
static void keep_whole(struct rb_fan *f, const rb_desc *d, uint64_t *mask, uint32_t from, uint32_t n)
{
    uint32_t end = from + 1, b;
    while (end < n && rb_desc_flags(&d[end - 1]) & RB_MORE)
        end++;
    EACH_BIT(mask[from] & ~f->devices, b)
        for (uint32_t i = from; f->out[b].room - f->out[b].put < end - from && i < end; i++)
            mask[i] &= ~(1ull << b);
}

/* To a device, whose bit or number the words have by now: what it does not take loses it again. */
static void to_device(struct rb_fan *f, uint32_t b, const rb_desc *d, uint64_t *mask, const struct item *it, uint32_t n)
{
    struct rb_server *s = f->c->server;
    struct rb_end *end = f->out[b].end;
    const uint64_t bit = 1ull << b;
    rb_desc out[RB_MAX_BURST];
    uint32_t which[RB_MAX_BURST], k = 0, done = 0;
    for (uint32_t i = 0; i < n; i++)
        if (mask[i] & bit) {
            which[k] = i;
            out[k++] = d[i];
        }
    while (done < k) {
        int rc = end->ops->share(end, out + done, (int)(k - done));
        if (rc > 0) {
            done += (uint32_t)rc;
            continue;
        }
        const uint32_t until = rc == -EINVAL ? done + 1 : k; /* too short a frame, for example: the others can go */
        rb_drop(end, (int)(until - done), rc == -EINVAL ? RB_DROP_BAD : RB_DROP_FULL);
        for (; done < until; done++) {
            const uint32_t i = which[done], number = rb_number(f->c, d[i].handle), sub = it && it[i].sub;
            const uint64_t w = rb_get(&s->ledger[number]);
            uint64_t others = 0;
            mask[i] &= ~bit;
            if (sub ? RB_WORD_SUBKIND(w) == RB_SUB_SHARED : RB_WORD_KIND(w) == RB_W_SHARED)
                others = rb_get(&s->masks[number]) & ~bit;
            if (others)
                rb_set(&s->masks[number], others);
            else /* nobody else got it: it is still the caller's */
                rb_set(&s->ledger[number], sub ? RB_WORD_LEVEL0(w) : (w & ~0x7ffffull) | RB_WORD(RB_W_HOME, 0));
        }
    }
}

static uint64_t prepare(struct rb_fan *f, const rb_desc *d, struct item *it);

/* Lend n packets that have left the hand (but for one that is odd), n at most RB_MAX_BURST, each to the outputs in its mask. Where one has no room,
 * its bit is cleared. `it` NULL: all of them are home. */
static inline __attribute__((always_inline)) void lend_burst(struct rb_fan *f, const rb_desc *d, uint64_t *mask, struct item *it, uint32_t n)
{
    struct rb_server *s = f->c->server;
    struct rb_book_record *rec = s->rec;
    const uint32_t first = f->c->pool_count[0];
    struct rb_slot slot[RB_MAX_BURST];
    uint64_t any = 0, all = UINT64_MAX, full = 0, bytes = 0;
    uint32_t b, count = 0;
    for (uint32_t i = 0; i < n; i++) {
        any |= mask[i];
        all &= mask[i];
    }
    if (!any)
        return;
    EACH_BIT(any & ~f->devices, b)
        if (__builtin_expect(f->out[b].l->observer != NULL, 0))
            observe(s, &f->out[b], d, mask, n, 1ull << b);
    EACH_BIT(any & ~f->devices, b)
    {
        struct output *o = &f->out[b];
        o->room = room_for(s, o->l, n);
        o->put = o->shares = 0;
        o->bytes = 0;
        full |= (uint64_t)(o->room < n) << b;
        rb_set(&rec->bases[b], o->l->ring.p);
    }
    if (it && n == 1 && (it->prior || it->back)) { /* some of it may have come back by now */
        const uint64_t want = *mask;
        it->hand = s->c->where[it->number] & RB_HAND;
        it->mask = want;
        *mask &= prepare(f, d, it);
        if (*mask != want)
            full = any = *mask;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint64_t to = mask[i] | (it ? it[i].prior : 0);
        uint32_t word = to & (to - 1) ? d[i].word | SHARED_FLAG : it && it[i].sub ? d[i].word : d[i].word & ~SHARED_FLAG;
        uint64_t pair[2] = {d[i].handle | (uint64_t)word << 32, d[i].ts};
        memcpy(&slot[i], pair, sizeof pair);
        bytes += word & 0x7fff;
    }
    const bool usual = any == all && !full; /* all to all of them */
    if (usual) {
        EACH_BIT(any & ~f->devices, b)
        {
            struct output *o = &f->out[b];
            struct rb_ring *r = &o->l->ring;
            rb_ring_ahead_write(r, n);
            for (uint32_t i = 0; i < n; i++)
                *(rb_words *)&r->forward[(r->p + i) & r->mask] = *(const rb_words *)&slot[i];
            o->put = n;
            o->shares = any & (any - 1) || (it && it->prior) ? n : 0;
            o->bytes = bytes;
        }
    } else {
        for (uint32_t i = 0; i < n; i++) {
            if (__builtin_expect(rb_desc_flags(&d[i]) & RB_MORE, 0) && !(i && rb_desc_flags(&d[i - 1]) & RB_MORE))
                keep_whole(f, d, mask, i, n);
            EACH_BIT(mask[i] & ~f->devices, b)
            {
                struct output *o = &f->out[b];
                struct rb_ring *r = &o->l->ring;
                if (o->put == o->room) {
                    mask[i] &= ~(1ull << b);
                    continue;
                }
                memcpy(&r->forward[(r->p + o->put++) & r->mask], &slot[i], sizeof *slot);
                o->bytes += slot[i].word & 0x7fff;
            }
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        rec->handles[count] = d[i].handle;
        count += mask[i] != 0;
    }
    rb_set(&rec->outputs, any & ~f->devices);
    rb_order();
    rb_set(&rec->intent, RB_INTENT(RB_OP_FAN, 0, count, 0));
    rb_order();
    for (uint32_t i = 0; i < n; i++) {
        const struct item *t = it ? &it[i] : NULL;
        const uint64_t to = mask[i] | (t ? t->prior : 0);
        const uint32_t number = t ? t->number : rb_number_in(f->c, first, d[i].handle);
        uint64_t base = 0;
        if (!mask[i])
            continue;
        if (t && t->hand != RB_HAND_HOME) {
            base = rb_get(&s->ledger[number]);
            base = (t->sub ? base & ~(0x3ffffull << 19) : base & ~0x7ffffull) | t->extra;
        }
        if (to & (to - 1)) {
            rb_set(&s->masks[number], to);
            rb_order();
            rb_set(&s->ledger[number], base | (t && t->sub ? RB_WORD_SUB(RB_SUB_SHARED, 0, 0) : RB_WORD(RB_W_SHARED, 0)));
            if (!usual)
                EACH_BIT(mask[i] & ~f->devices, b)
                    f->out[b].shares++;
        } else if (__builtin_expect(to & f->devices, 0)) {
            uint32_t device = f->out[__builtin_ctzll(to)].end->ops->number(f->out[__builtin_ctzll(to)].end);
            rb_set(&s->ledger[number], base | (t && t->sub ? RB_WORD_SUB(RB_W_DEVICE, device, 0) : RB_WORD(RB_W_DEVICE, device)));
        } else {
            uint32_t leg = f->out[__builtin_ctzll(to)].l->number;
            rb_set(&s->ledger[number], base | (t && t->sub ? RB_WORD_SUB(RB_W_LENT, leg, 0) : RB_WORD(RB_W_LENT, leg)));
        }
        if (t && t->back) { /* what this same book lent it as before */
            t->back->shared -= t->back_shared;
            rb_set(&t->back->rec->lent, --t->back->lent);
        }
    }
    rb_order();
    EACH_BIT(any & ~f->devices, b)
    {
        struct output *o = &f->out[b];
        struct rb_leg_ctx *l = o->l;
        if (!o->put)
            continue;
        l->ring.p += o->put;
        rb_set(&l->rec->committed[RB_IX_P], l->ring.p);
        rb_order();
        rb_ring_publish(&l->ring);
        if (__builtin_expect(l->bell != NULL, 0))
            rb_bell_look(l->bell, &l->ring.ctl->client_bell, l->ring.p);
        l->lent += o->put;
        l->shared += o->shares;
        rb_set(&l->rec->lent, l->lent);
        rb_add(&l->rec->packets, o->put);
        rb_add(&l->rec->bytes, o->bytes);
    }
    rb_order();
    rb_set(&rec->intent, 0);
    EACH_BIT(any & f->devices, b)
        to_device(f, b, d, mask, it, n);
    EACH_BIT(any & ~f->devices, b)
    {
        struct rb_leg_ctx *l = f->out[b].l;
        if (l->lent > RB_MIN(l->credit / 2, 1024u) || s->free < RB_BURST)
            rb_server_take_some(s, l, RB_MAX_BURST);
    }
}

static void lend_home(struct rb_fan *f, const rb_desc *d, uint64_t *mask, uint32_t n) { lend_burst(f, d, mask, NULL, n); }
static void lend_one(struct rb_fan *f, const rb_desc *d, uint64_t *mask, struct item *it) { lend_burst(f, d, mask, it, 1); }
static void lend_all(struct rb_fan *f, const rb_desc *d, uint64_t *mask, struct item *it, uint32_t n) { lend_burst(f, d, mask, it, n); }

/* What a buffer's word says but for the loan that is about to be made; and which of the outputs can have this very buffer. */
static uint64_t prepare(struct rb_fan *f, const rb_desc *d, struct item *it)
{
    struct rb_cluster *c = f->c;
    struct rb_server *s = c->server;
    const uint64_t w = rb_get(&s->ledger[it->number]), mask = rb_shared_word(w) ? rb_get(&s->masks[it->number]) : 0;
    uint64_t can = it->mask, taken = 0;
    uint32_t b;
    if (d->handle >> 24) /* of a pool that not everybody maps */
        EACH_BIT(it->mask, b)
            if (!f->out[b].l || !(f->out[b].l->pools >> (d->handle >> 24) & 1))
                can &= ~(1ull << b);
    it->prior = it->extra = 0;
    it->sub = it->back_shared = false;
    it->back = NULL;
    if (it->hand == RB_HAND_SHARED) {
        it->prior = mask;
        it->sub = RB_WORD_SUBKIND(w) == RB_SUB_SHARED;
    } else if (it->hand >= RB_HAND_BORROWED) {
        struct rb_end *from = c->end[it->hand - RB_HAND_BORROWED];
        struct rb_leg_ctx *own = s->leg[from->leg];
        if (own && rb_get(&own->rec->book) == s->book + 1) { /* this book is also the lender it came from */
            it->back = own;
            it->back_shared = (mask & own->bit) != 0;
            it->prior = it->back_shared ? mask & ~own->bit : 0;
            it->sub = RB_WORD_SUBKIND(w) != 0 && !(it->back_shared && RB_WORD_KIND(w) == RB_W_SHARED);
            if (it->sub && RB_WORD_KIND(w) == RB_W_SHARED)
                return 0; /* one mask serves one level */
        } else if (RB_WORD_SUBKIND(w) || RB_WORD_KIND(w) == RB_W_SHARED) {
            return 0; /* no room in the word for one more loan */
        } else {
            it->sub = true;
            it->extra = RB_WORD_SUB(0, 0, from->leg) | (rb_desc_flags(d) & RB_SHARED ? RB_SUB_FIXED : 0);
            if (RB_WORD_KIND(w) == RB_W_LENT && f->c->server->leg[RB_WORD_LEG(w)])
                taken |= f->c->server->leg[RB_WORD_LEG(w)]->bit;
            EACH_BIT(can & ~f->devices, b)
            {
                uint32_t book = rb_get(&f->out[b].l->rec->client_book);
                if (book && RB_WORD_SUBKIND(rb_get(&c->reg->ledgers[(uint64_t)(book - 1) * c->reg->state->capacity + it->number])))
                    taken |= 1ull << b;
            }
        }
    }
    if (!it->sub && RB_WORD_SUBKIND(w) == RB_W_LENT && s->leg[RB_WORD_SUBLEG(w)])
        taken |= s->leg[RB_WORD_SUBLEG(w)]->bit;
    can &= ~(it->prior | taken);
    EACH_BIT(can & f->conflicting, b)
        if (can >> b & 1)
            can &= ~f->out[b].conflicts;
    if (it->prior)
        EACH_BIT(can & ~f->devices, b)
            if (rb_fan_conflict(s, f->out[b].l, it->prior))
                can &= ~(1ull << b);
    return can;
}

/* A packet that needs more than a word: part of its outputs get a copy, or it is shared already. */
static uint64_t send_odd(struct rb_fan *f, rb_desc d, struct item *it, uint64_t can)
{
    struct rb_cluster *c = f->c;
    struct rb_server *s = c->server;
    uint64_t want = it->mask, rest = want & ~can, got = 0;
    uint32_t b;
    while (rest) { /* one copy goes to as many as can share it */
        struct item copy = {.mask = rest, .hand = RB_HAND_HOME};
        if (!s->free) {
            rb_server_service(s);
            if (!s->free)
                break;
        }
        rb_desc to = {.handle = s->stack[--s->free], .word = d.word & ~SHARED_FLAG, .ts = d.ts};
        memcpy(rb_data(c, &to), rb_data(c, &d), rb_desc_length(&d));
        copy.number = rb_number(c, to.handle);
        uint64_t mask = prepare(f, &to, &copy);
        rest &= ~mask;
        lend_one(f, &to, &mask, &copy);
        got |= mask;
        EACH_BIT(mask, b)
        {
            if (f->out[b].l)
                rb_add(&f->out[b].l->rec->copied, 1);
            else
                f->out[b].end->st.copied++;
        }
        if (!mask)
            rb_give_back(c, RB_HAND_HOME, &to, 1);
    }
    count_missed(f, rest, RB_DROP_NO_BUFFER);
    lend_one(f, &d, &can, it);
    if (can)
        rb_unhand(c, it->number);
    else
        rb_return(c, &d, 1);
    count_missed(f, want & f->lending & ~(got | can | rest), RB_DROP_FULL);
    return want & ~(got | can);
}

/* The usual case: packets that are home, up to the first that is not, or that needs a second look. How many. */
static uint32_t send_home(struct rb_fan *f, const rb_desc *d, const uint64_t *mask, uint32_t n, uint64_t *missed, const uint64_t *served, int *sent)
{
    struct rb_cluster *c = f->c;
    const uint32_t first = c->pool_count[0], size = c->buffer_size;
    const uint64_t lending = f->lending | f->devices, conflicting = f->conflicting;
    uint64_t to[RB_MAX_BURST], lost = 0;
    uint32_t *where = c->where, i, *top;
    for (i = 0; i < n; i++) {
        uint32_t h = d[i].handle, w = d[i].word;
        to[i] = mask[i] & lending;
        if (__builtin_expect((h - 1 >= first - 1) | ((w & 0x7fff) + (w >> 15 & 0x3fff) > size), 0) ||
            __builtin_expect(where[h] != RB_HAND_HOME || to[i] & conflicting, 0))
            break;
        where[h] = RB_HAND_NONE; /* a handle twice in one burst fails the second time */
    }
    lend_home(f, d, to, i);
    top = c->server ? c->server->stack + c->server->free : NULL;
    for (uint32_t k = 0; k < i; k++) {
        uint64_t missing = mask[k] & lending & ~to[k];
        missed[k] |= missing;
        lost |= missing;
        if (!to[k])
            *top++ = d[k].handle;
        *sent += (to[k] | served[k]) != 0;
    }
    if (top)
        c->server->free = (uint32_t)(top - c->server->stack);
    for (uint32_t k = 0; k < i && lost; k++)
        count_missed(f, mask[k] & f->lending & ~to[k], RB_DROP_FULL);
    return i;
}

int rb_fan_lend(struct rb_fan *f, const rb_desc *d, const uint64_t *mask, uint32_t n, uint64_t *missed, const uint64_t *served)
{
    struct rb_cluster *c = f->c;
    const uint32_t first = c->pool_count[0];
    struct item it[RB_MAX_BURST];
    const uint64_t lent = f->lending | f->devices;
    uint64_t to[RB_MAX_BURST], rest = 0;
    uint32_t from = 0, i;
    int sent = 0;
    while (from < n) {
        from += send_home(f, d + from, mask + from, n - from, missed + from, served + from, &sent);
        for (i = from; i < n; i++) { /* others that need no second look */
            struct item *t = &it[i];
            uint32_t at = rb_number_in(c, first, d[i].handle), hand = at == UINT32_MAX ? RB_HAND_NONE : c->where[at] & RB_HAND;
            *t = (struct item){.number = at, .hand = hand, .mask = mask[i] & lent};
            to[i] = t->mask;
            if (hand == RB_HAND_NONE || hand == RB_HAND_PEEK) {
                c->errors++;
                to[i] = 0;
                t->hand = RB_HAND_NONE;
                continue;
            }
            if (!rb_fits(c, d[i].word)) {
                count_missed(f, t->mask, RB_DROP_BAD);
                to[i] = 0;
                rb_unhand(c, at);
                continue;
            }
            rest = t->mask ? prepare(f, &d[i], t) : 0;
            if (t->mask != rest || t->prior || t->back)
                break;
            rb_unhand(c, at);
        }
        lend_all(f, d + from, to + from, it + from, i - from);
        for (uint32_t k = from; k < i; k++) {
            uint64_t lost = mask[k] & lent & ~to[k];
            missed[k] |= lost;
            if (!to[k] && it[k].hand)
                rb_give_back(c, it[k].hand, &d[k], 1);
            if (lost && it[k].hand && rb_fits(c, d[k].word))
                count_missed(f, lost & f->lending, RB_DROP_FULL);
            sent += (to[k] | served[k]) != 0;
        }
        from = i;
        if (i < n) {
            uint64_t lost = send_odd(f, d[i], &it[i], rest);
            missed[i] |= lost;
            sent += ((mask[i] & lent & ~lost) | served[i]) != 0;
            from++;
        }
    }
    return sent;
}
