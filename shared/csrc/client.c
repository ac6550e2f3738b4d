/* SPDX-License-Identifier: Apache-2.0
 *
 * The borrower: an end that needs no ledger. It is the same on a host and in a guest; only how the lane was found differs. Everything it
 * needs is in the lane and in its own memory.
 */
#include "rb_bell.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>
#include <unistd.h>

static void boot_id(uint8_t out[16])
{
    FILE *f = fopen("/proc/sys/kernel/random/boot_id", "re");
    char text[64] = "";
    unsigned v, n = 0;
    if (f) {
        if (!fgets(text, sizeof text, f))
            text[0] = 0;
        fclose(f);
    }
    memset(out, 0, 16);
    for (char *p = text; *p && n < 16; p += *p == '-' ? 1 : 2)
        if (*p != '-' && sscanf(p, "%2x", &v) == 1)
            out[n++] = (uint8_t)v;
}

/* Is the lane still what it was? One line of memory, read at every burst: nothing else tells a program in a guest that its device was
 * unplugged. */
int rb_client_check(struct rb_end *end)
{
    struct rb_header *h = &end->lane->header;
    if (rb_load_acquire(&h->generation) != end->c->generation || h->magic != RB_MAGIC) {
        end->closing = true;
        return rb_fail(ENODEV, "detached", NULL, "queue %s was detached, or its cluster destroyed", end->address);
    }
    uint32_t epoch = rb_load_acquire(&h->epoch);
    if (epoch == end->lane_epoch && !end->closing)
        return 0;
    end->lane_epoch = epoch;
    end->closing = false;
    int answers = end->kind == RB_LEG_DIRECT && (end->flags & RB_TX); /* then the session is the peer's */
    if (rb_get(&h->state) != RB_SEG_OPEN || rb_get(&end->entry->ready) != 1 || end->entry->queue != end->queue ||
        (!answers && rb_get(&end->ring.ctl->session) != end->session)) {
        end->closing = true;
        return rb_fail(ENODEV, "detached", NULL, "queue %s is being detached", end->address);
    }
    return 0;
}

/* The same where packets move: a call costs an emulated processor more than what it checks. */
static inline int unchanged(struct rb_end *end)
{
    const struct rb_header *h = &end->lane->header;
    if (__builtin_expect(rb_get(&h->generation) == end->c->generation && h->magic == RB_MAGIC && rb_load_acquire(&h->epoch) == end->lane_epoch &&
                             !end->closing, 1))
        return 0;
    return rb_client_check(end);
}

/* A new session: the lender takes home what was held here before, and says so with its echo. */
static void ask(struct rb_end *end)
{
    struct rb_ctl *ctl = end->ring.ctl;
    end->echoed = end->again = false;
    end->session = 0;
    while (!end->session || end->session == rb_get(&ctl->echo))
        if (getrandom(&end->session, sizeof end->session, 0) != sizeof end->session)
            end->session = rb_now_ns();
    rb_store_release(&ctl->session, end->session);
    if (end->bell) {
        if (end->flags & RB_TX)
            rb_set(&ctl->client_bell, end->session);
        rb_bell_ring(end->bell);
    }
}

/* The indices as the lane has them. One's own can be anything after a crash of the VM; then the peer's is taken: nothing is unread. Only
 * after the echo, since until then the lender may still be completing what its dead predecessor began. */
static void start_from_lane(struct rb_end *end)
{
    struct rb_ring *r = &end->ring;
    struct rb_ctl *ctl = r->ctl;
    int sends = end->flags & RB_TX;
    r->p = rb_load_acquire(&ctl->p);
    r->c = rb_load_acquire(&ctl->c);
    r->rp = rb_load_acquire(&ctl->rp);
    r->rc = rb_load_acquire(&ctl->rc);
    if (r->p - r->c > r->slots) {
        if (sends)
            rb_store_release(&ctl->p, r->p = r->c);
        else
            rb_store_release(&ctl->c, r->c = r->p);
    }
    if (r->rp - r->rc > r->returns) {
        if (sends)
            rb_store_release(&ctl->rc, r->rc = r->rp);
        else
            rb_store_release(&ctl->rp, r->rp = r->rc);
    }
}

int rb_client_open(struct rb_end *end)
{
    struct rb_ring *r = &end->ring;
    struct rb_ctl *ctl = r->ctl;
    int sends = end->flags & RB_TX;
    struct rb_holder me;

    if (sends) {
        end->stock = calloc(r->returns + RB_MAX_BURST, sizeof *end->stock);
        if (!end->stock)
            return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    }
    end->lane_epoch = rb_load_acquire(&end->lane->header.epoch);
    rb_holder_me(&me);
    if (end->kind == RB_LEG_DIRECT && sends) { /* the producer of a direct lane is its lender: it echoes */
        end->session = rb_get(&ctl->session);
        end->echoed = true;
        start_from_lane(end);
        return 0;
    }
    ctl->abi = RB_ABI_VERSION;
    boot_id(ctl->boot_id);
    memcpy(ctl->name, me.name, sizeof ctl->name);
    rb_set(&ctl->open, (uint32_t)me.pid);
    end->c->direct_rx += end->kind == RB_LEG_DIRECT;
    ask(end);
    return 0;
}

/* Nothing is consumed before the lender has seen this session. */
static int echoed(struct rb_end *end)
{
    if (end->echoed)
        return 1;
    if (rb_load_acquire(&end->ring.ctl->echo) != end->session)
        return 0;
    if (end->again) {
        ask(end);
        return 0;
    }
    start_from_lane(end);
    end->echoed = true;
    return 1;
}

static int fault(struct rb_end *end)
{
    return rb_fail(EPROTO, "bad-lane", "detach and attach it again", "the indices of queue %s are impossible: its memory was overwritten", end->address);
}

int rb_also(struct rb_end *end, uint32_t at)
{
    struct rb_cluster *c = end->c;
    if ((c->where[at] & RB_HAND) == RB_HAND_BORROWED + end->index)
        return 0;
    if (!end->also && !(end->also = calloc(1, c->room / 8 + 1)))
        return -ENOMEM;
    if (end->also[at / 8] >> at % 8 & 1)
        return 0;
    end->also[at / 8] |= (uint8_t)(1u << at % 8);
    c->extras++;
    return 1;
}

static int client_recv(struct rb_end *end, rb_desc *desc, int max)
{
    struct rb_cluster *c = end->c;
    struct rb_ring *r = &end->ring;
    const uint32_t mine = RB_HAND_BORROWED + end->index, first = c->pool_count[0], size = c->buffer_size;
    const uint8_t *pool = c->pool[0];
    uint32_t *where = c->where;
    uint64_t bytes = 0;
    uint32_t out = 0;
    int rc = unchanged(end);
    if (rc < 0 || !(end->echoed || echoed(end)) || rb_get(&end->entry->paused))
        return rc;
    while (out == 0) {
        uint32_t n = rb_ring_ready(r, 1);
        if (n == RB_RING_FAULT)
            return fault(end);
        n = RB_MIN(n, (uint32_t)max);
        if (!n)
            return 0;
        rb_ring_read(r, desc, n);
        rb_ring_consumed(r);
        rb_pools_look(c);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t handle = desc[i].handle, word = desc[i].word, at = rb_number_in(c, first, handle);
            if (at == UINT32_MAX || (word & 0x7fff) + (word >> 15 & 0x3fff) > size) {
                end->st.drops[RB_DROP_BAD] += handle != 0;
                continue;
            }
            if (__builtin_expect(where[at] & RB_HAND, 0)) { /* a shared one that came another way before? */
                int rc = (word & 0x7fff) ? rb_also(end, at) : 0;
                if (rc <= 0) {
                    end->st.drops[rc < 0 ? RB_DROP_NO_BUFFER : RB_DROP_BAD]++;
                    if (rc < 0)
                        rb_client_give(end, handle);
                    continue;
                }
                bytes += word & 0x7fff;
                desc[out++] = desc[i];
                continue;
            }
            if (!(word & 0x7fff)) { /* empty buffers that a direct producer leaves behind */
                rb_client_give(end, handle);
                continue;
            }
            __builtin_prefetch((at == handle ? pool : c->pool[handle >> 24]) + (uint64_t)(handle & RB_INDEX_MASK) * size + (word >> 15 & 0x3fff));
            where[at] |= mine;
            bytes += word & 0x7fff;
            if (out != i)
                desc[out] = desc[i];
            out++;
        }
    }
    end->st.bytes += bytes;
    end->st.packets += out;
    return (int)out;
}

/* Is there still somebody to give buffers back to? */
int rb_client_usable(struct rb_end *end)
{
    return rb_client_check(end) == 0 || rb_load_acquire(&end->lane->header.generation) == end->c->generation;
}

/* Into the return ring: it has room for all that can be lent. */
int rb_client_give(struct rb_end *end, uint32_t handle)
{
    if (!rb_client_usable(end))
        return 0;
    rb_desc d = {.handle = handle};
    rb_ring_give(&end->ring, &d, 1);
    rb_ring_gave(&end->ring);
    return 1;
}

static int consumer_count(struct rb_end *end)
{
    if (!echoed(end)) /* which is when the indices become known */
        return 0;
    uint32_t n = rb_load_acquire(&end->ring.ctl->p) - end->ring.c;
    return n <= end->ring.slots ? (int)n : 0;
}

static int consumer_ready(struct rb_end *end)
{
    struct rb_header *h = &end->lane->header;
    if (rb_load_acquire(&h->generation) != end->c->generation || rb_load_acquire(&h->epoch) != end->lane_epoch)
        return 1;
    if (!end->echoed)
        return rb_load_acquire(&end->ring.ctl->echo) == end->session;
    return !rb_get(&end->entry->paused) && rb_load_acquire(&end->ring.ctl->p) != end->ring.c;
}

static void leave(struct rb_end *end)
{
    if (rb_load_acquire(&end->lane->header.generation) == end->c->generation)
        rb_set(&end->ring.ctl->open, 0);
}

static void rx_close(struct rb_end *end)
{
    end->c->direct_rx -= end->kind == RB_LEG_DIRECT;
    leave(end);
}

const struct rb_end_ops rb_client_rx_ops = {
    .recv = client_recv, .ready = consumer_ready, .count = consumer_count, .close = rx_close,
};

/* ---- sending as a client: the server of a grant queue, or the peer VM of a direct one, hands out empties --------------------- */

/* A direct producer takes back what its peer returned: its own empties, and packets of other queues that go home through them. */
static void take_back(struct rb_end *end, uint32_t handle)
{
    uint32_t at = rb_number(end->c, handle & ~RB_WENT_ON);
    uint32_t *where = at == UINT32_MAX ? NULL : &end->c->where[at], from = where && RB_OUT_BY(*where, end) ? RB_OUT_FROM(*where) : 0;
    if (from) {
        *where &= RB_HAND;
        end->out -= end->out > 0;
    }
    if (!where || (*where & RB_HAND) || handle & RB_WENT_ON)
        return;
    if (from >= RB_HAND_BORROWED && from != RB_HAND_BORROWED + end->index && end->c->end[from - RB_HAND_BORROWED])
        rb_client_give(end->c->end[from - RB_HAND_BORROWED], handle);
    else if (end->stocked < end->ring.returns)
        end->stock[end->stocked++] = handle;
}

static void refill(struct rb_end *end)
{
    struct rb_ring *r = &end->ring;
    uint32_t n = rb_ring_returned(r, 1);
    if (n == RB_RING_FAULT && end->kind == RB_LEG_DIRECT) { /* a predecessor's loans came on top: what was overwritten comes home with the group */
        r->rp = rb_load_acquire(&r->ctl->rp);
        r->rc = r->rp - r->returns;
        n = r->returns;
    }
    if (n == RB_RING_FAULT || !n)
        return;
    const uint32_t own = end->kind == RB_LEG_DIRECT ? RB_OUT(RB_HAND_BORROWED + end->index, end) : RB_HAND_NONE;
    const uint32_t first = end->c->pool_count[0], room = r->returns, mask = r->rmask, rc = r->rc;
    const volatile uint32_t *returned = r->returned;
    uint32_t *where = end->c->where;
    uint32_t *stock = end->stock, top = end->stocked, out = end->out;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t handle = returned[(rc + i) & mask];
        if (__builtin_expect(handle - 1 >= first - 1, 0) || __builtin_expect(where[handle] != own, 0)) {
            /* of another queue or pool, never sent by this program, or gone to the host */
            end->stocked = top;
            end->out = out;
            take_back(end, handle);
            top = end->stocked;
            out = end->out;
            continue;
        }
        where[handle] = RB_HAND_NONE;
        out -= out > 0;
        if (top < room)
            stock[top++] = handle;
    }
    end->stocked = top;
    end->out = out;
    r->rc = rc + n;
    rb_store_release(&r->ctl->rc, r->rc);
}

/* The consumer of a direct lane came anew: what its predecessor had in hand is ours again, as far as we know of it. */
static __attribute__((noinline)) void direct_answer(struct rb_end *end, uint64_t session)
{
    struct rb_ring *r = &end->ring;
    refill(end);
    uint32_t c = rb_load_acquire(&r->ctl->c);
    uint8_t *unread = calloc(1, end->c->room / 8 + 1);
    if (!unread)
        return;
    for (uint32_t i = c; r->p - c <= r->slots && i != r->p; i++) {
        uint32_t at = rb_number(end->c, r->forward[i & r->mask].handle);
        if (at != UINT32_MAX)
            unread[at / 8] |= (uint8_t)(1u << at % 8);
    }
    for (uint32_t at = 0; at < end->c->buffers; at++)
        if (RB_OUT_BY(end->c->where[at], end) && !(end->c->where[at] & RB_HAND) && !(unread[at / 8] >> at % 8 & 1))
            take_back(end, rb_handle_of(end->c, at));
    free(unread);
    end->session = session;
    rb_store_release(&r->ctl->echo, session);
}

static inline void direct_echo(struct rb_end *end)
{
    uint64_t session = rb_load_acquire(&end->ring.ctl->session);
    if (session != end->session || rb_get(&end->ring.ctl->echo) != session)
        direct_answer(end, session);
}

static int client_alloc(struct rb_end *end, rb_desc *desc, int n)
{
    struct rb_cluster *c = end->c;
    int rc = unchanged(end), out = 0;
    if (rc < 0 || !(end->echoed || echoed(end)))
        return rc;
    if (end->stocked < (uint32_t)n) {
        if (end->kind == RB_LEG_DIRECT)
            direct_echo(end); /* a new consumer returns nothing before it has our answer */
        refill(end);
    }
    const uint32_t mine = RB_HAND_BORROWED + end->index, first = c->pool_count[0], *stock = end->stock;
    uint32_t *where = c->where;
    uint32_t top = end->stocked;
    while (out < n && top) {
        uint32_t handle = stock[--top], *at = &where[rb_number_in(c, first, handle)];
        if (__builtin_expect(*at & RB_HAND, 0))
            continue; /* a peer returned it twice, and it is in hand already */
        *at |= mine;
        uint64_t empty[2] = {handle | (uint64_t)RB_BUFFER_HEADER << 47, 0};
        memcpy(&desc[out++], empty, sizeof empty);
    }
    end->stocked = top;
    return out;
}

/* A buffer of a direct queue goes to the host: its producer must know that it does not come back this way. */
static void went_on(struct rb_cluster *c, uint32_t handle, uint32_t hand)
{
    struct rb_end *from = hand >= RB_HAND_BORROWED ? c->end[hand - RB_HAND_BORROWED] : NULL;
    rb_desc note = {.handle = handle | RB_WENT_ON};
    if (from && from->kind == RB_LEG_DIRECT && (from->flags & RB_RX))
        rb_ring_give(&from->ring, &note, 1);
}

/* The first of n descriptors that may go, out of the hand and into the ring: how many. An emulated processor pays for each access to memory, so
 * everything is in registers, and what differs from call to call is a constant of its own copy of the loop. */
static inline __attribute__((always_inline)) uint32_t put(struct rb_end *end, const rb_desc *desc, uint32_t n, bool direct, bool odd, uint64_t *sum)
{
    struct rb_cluster *c = end->c;
    struct rb_ring *r = &end->ring;
    const uint32_t first = c->pool_count[0], size = c->buffer_size, by = RB_OUT(0, end);
    uint32_t *where = c->where;
    const rb_desc *d = desc, *end_of_run;
    uint64_t bytes = 0;
    do { /* at most twice: up to the end of the ring, and from its beginning */
        uint32_t done = (uint32_t)(d - desc), from = (r->p + done) & r->mask;
        struct rb_slot *slot = &r->forward[from];
        end_of_run = d + RB_MIN(n - done, r->slots - from);
        for (; d < end_of_run; d++, slot++) {
            uint64_t pair[2];
            memcpy(pair, d, sizeof pair);
            uint32_t handle = (uint32_t)pair[0], word = (uint32_t)(pair[0] >> 32), at = handle, hand;
            if (__builtin_expect(handle - 1 >= first - 1, 0) && (at = rb_number(c, handle)) == UINT32_MAX)
                break;
            if (!(hand = where[at] & RB_HAND) || (word & 0x7fff) + (word >> 15 & 0x3fff) > size)
                break;
            where[at] = direct ? hand << 10 | by : where[at] & ~(uint32_t)RB_HAND;
            bytes += word & 0x7fff;
            memcpy(slot, pair, sizeof pair);
            if (odd && c->extras)
                rb_unhand_extra(c, at);
            if (odd && !direct)
                went_on(c, handle, hand);
        }
    } while (d == end_of_run && d < desc + n);
    *sum = bytes;
    return (uint32_t)(d - desc);
}

static int client_send(struct rb_end *end, rb_desc *desc, int n)
{
    struct rb_cluster *c = end->c;
    struct rb_ring *r = &end->ring;
    uint64_t bytes = 0;
    uint32_t i;
    int rc = unchanged(end);
    if (rc < 0 || !(end->echoed || echoed(end)) || rb_get(&end->entry->paused))
        return rc;
    if (end->kind == RB_LEG_DIRECT) {
        direct_echo(end);
        if (end->out + (uint32_t)n > r->returns / 2)
            refill(end);
        n = RB_MIN(n, (int)(r->returns - RB_MIN(end->out, r->returns))); /* all of it must fit on its way back */
    }
    uint32_t space = rb_ring_space(r, (uint32_t)n);
    if (space == RB_RING_FAULT)
        return fault(end);
    n = (int)RB_MIN((uint32_t)n, space);
    rb_ring_ahead_write(r, (uint32_t)n);
    const bool odd = c->extras || c->direct_rx; /* in hand by two ways, or from a direct queue whose producer is told */
    if (end->kind == RB_LEG_DIRECT)
        i = odd ? put(end, desc, (uint32_t)n, true, true, &bytes) : put(end, desc, (uint32_t)n, true, false, &bytes);
    else if (odd)
        i = put(end, desc, (uint32_t)n, false, true, &bytes);
    else
        i = put(end, desc, (uint32_t)n, false, false, &bytes);
    if (!i)
        return n ? rb_fail(EINVAL, "bad-descriptor", NULL, "descriptor %u is not in this handle's hand, or does not fit its buffer", desc[0].handle) : 0;
    r->p += i;
    rb_ring_publish(r);
    if (__builtin_expect(end->bell != NULL, 0)) {
        rb_bell_look(end->bell, &r->ctl->server_bell, r->p);
        if (end->bell->lost)
            rb_bell_drop(end);
    }
    for (uint32_t e = 0; c->direct_rx && e < RB_MAX_ENDS; e++)
        if (c->end[e] && c->end[e]->kind == RB_LEG_DIRECT && (c->end[e]->flags & RB_RX))
            rb_ring_gave(&c->end[e]->ring);
    end->out += i;
    end->st.packets += i;
    end->st.bytes += bytes;
    rb_set(&r->ctl->packets, end->st.packets);
    rb_set(&r->ctl->bytes, end->st.bytes);
    return (int)i;
}

static int producer_count(struct rb_end *end)
{
    uint32_t n = end->ring.p - rb_load_acquire(&end->ring.ctl->c);
    return n <= end->ring.slots ? (int)n : 0;
}

static int producer_ready(struct rb_end *end)
{
    struct rb_header *h = &end->lane->header;
    if (rb_load_acquire(&h->generation) != end->c->generation || rb_load_acquire(&h->epoch) != end->lane_epoch)
        return 1;
    if (!end->echoed)
        return rb_load_acquire(&end->ring.ctl->echo) == end->session;
    return producer_count(end) < (int)end->ring.slots;
}

static void client_service(struct rb_end *end)
{
    if (end->kind == RB_LEG_DIRECT && rb_client_check(end) == 0) {
        direct_echo(end);
        refill(end);
    }
}

/* Empties go back as descriptors of length 0; those for which there is no room come home with the next session. */
static void tx_close(struct rb_end *end)
{
    if (rb_client_check(end) == 0 && echoed(end)) {
        struct rb_ring *r = &end->ring;
        refill(end);
        while (end->stocked) {
            rb_desc d = {.handle = end->stock[end->stocked - 1]};
            if (rb_ring_space(r, 1) - 1 >= r->slots)
                break;
            rb_desc_set(&d, 0, RB_BUFFER_HEADER, 0);
            rb_ring_write(r, &d, 1);
            end->stocked--;
        }
        rb_ring_publish(r);
        if (end->bell)
            rb_bell_ring(end->bell);
    }
    if (end->kind != RB_LEG_DIRECT)
        leave(end);
    for (uint32_t at = 0; end->kind == RB_LEG_DIRECT && at < end->c->buffers; at++)
        if (RB_OUT_BY(end->c->where[at], end)) /* the next end with this number has not sent it */
            end->c->where[at] &= RB_HAND;
}

const struct rb_end_ops rb_client_tx_ops = {
    .send = client_send, .alloc = client_alloc, .ready = producer_ready, .count = producer_count, .service = client_service, .close = tx_close,
};
