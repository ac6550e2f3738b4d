/* SPDX-License-Identifier: Apache-2.0
 *
 * Loan rings: the memory between a producer and a consumer, without ledger. A queue is a forward ring of descriptors and a
 * return ring of handles, each written by one side. Both sides keep their own indices in private memory; the peer's index is
 * cached and read again only when the cache says there is not enough.
 *
 * The consumer's rule: copy the descriptors out, publish the index, and only then return or send on any of them.
 *
 * Moving a line between two cores takes some hundred nanoseconds, so what counts is how many such moves are under way at once: the
 * producer asks for the slots of its next burst before it needs them, and so does the consumer, never past what the cached
 * index of the peer says is its own. Both or neither: one alone is slower than none.
 *
 * A peer's index is never believed: a distance greater than the ring makes the call return RB_RING_FAULT.
 */
#ifndef RB_RING_H
#define RB_RING_H
#include "rb_layout.h"

#include <string.h>

#define RB_RING_FAULT UINT32_MAX

struct rb_ring {
    struct rb_ctl *ctl;
    struct rb_slot *forward;
    uint32_t *returned;
    uint32_t slots, mask, returns, rmask;
    uint32_t p, c, rp, rc; /* own ones are the truth, the peer's are as last read */
};

/* Free slots for the producer, at least `want` if there are so many. */
static inline uint32_t rb_ring_space(struct rb_ring *r, uint32_t want)
{
    uint32_t used = r->p - r->c;
    if (r->slots - used < want) {
        uint32_t c = rb_load_acquire(&r->ctl->c);
        if (r->p - c > r->slots)
            return RB_RING_FAULT;
        r->c = c;
        used = r->p - c;
    }
    return r->slots - used;
}

/* Unread packets for the consumer. */
static inline uint32_t rb_ring_ready(struct rb_ring *r, uint32_t want)
{
    if (r->p - r->c < want) {
        uint32_t p = rb_load_acquire(&r->ctl->p);
        if (p - r->c > r->slots)
            return RB_RING_FAULT;
        r->p = p;
    }
    return r->p - r->c;
}

static inline void rb_prefetch_write(const void *p)
{
#if defined(__x86_64__)
    __asm__ volatile("prefetchw %0" : : "m"(*(const char *)p));
#else
    __builtin_prefetch(p, 1);
#endif
}

#define RB_AHEAD 128u /* slots: 2 KiB. Cores that exchange a line in 25 ns gain from it, those that need 150 ns lose nothing. */

static inline void rb_ring_ahead_write(const struct rb_ring *r, uint32_t n)
{
    if (r->p + RB_AHEAD + n - r->c <= r->slots)
        for (uint32_t i = 0; i < n; i += 4)
            rb_prefetch_write(&r->forward[(r->p + RB_AHEAD + i) & r->mask]);
}

/* A slot in one store: two of half the size fill the store buffer twice as fast while lines are under way. Whoever has just made the values passes
 * them and not a descriptor in memory: a load wider than the stores that made it would wait until those have left the store buffer. */
typedef uint64_t rb_words __attribute__((vector_size(16), aligned(4), may_alias));

static inline void rb_ring_put(struct rb_ring *r, uint32_t i, uint32_t handle, uint32_t word, uint64_t ts)
{
    *(rb_words *)&r->forward[(r->p + i) & r->mask] = (rb_words){handle | (uint64_t)word << 32, ts};
}

static inline void rb_ring_write(struct rb_ring *r, const rb_desc *desc, uint32_t n)
{
    rb_ring_ahead_write(r, n);
    for (uint32_t i = 0; i < n; i++)
        rb_ring_put(r, i, desc[i].handle, desc[i].word, desc[i].ts);
    r->p += n;
}
static inline void rb_ring_publish(struct rb_ring *r) { rb_store_release(&r->ctl->p, r->p); }

static inline void rb_ring_read(struct rb_ring *r, rb_desc *desc, uint32_t n)
{
    for (uint32_t i = RB_AHEAD; i < RB_AHEAD + n && i < r->p - r->c; i += 4)
        __builtin_prefetch(&r->forward[(r->c + i) & r->mask], 0);
    for (uint32_t i = 0; i < n; i++)
        *(rb_words *)&desc[i] = *(const rb_words *)&r->forward[(r->c + i) & r->mask];
    r->c += n;
}
static inline void rb_ring_consumed(struct rb_ring *r) { rb_store_release(&r->ctl->c, r->c); }

/* Handles back; there is room for all that can be lent. Not yet published: rb_ring_gave. */
static inline void rb_ring_give(struct rb_ring *r, const rb_desc *desc, uint32_t n)
{
    const uint32_t p = r->rp, at = p & r->rmask;
    uint32_t *returned = r->returned, i = 0;
    rb_prefetch_write(&returned[(p + n + 16) & r->rmask]);
    rb_prefetch_write(&returned[(p + n + 32) & r->rmask]);
    for (; i + 4 <= n && at + n <= r->returns; i += 4)
        *(rb_words *)&returned[at + i] =
            (rb_words){desc[i].handle | (uint64_t)desc[i + 1].handle << 32, desc[i + 2].handle | (uint64_t)desc[i + 3].handle << 32};
    for (; i < n; i++)
        returned[(at + i) & r->rmask] = desc[i].handle;
    r->rp = p + n;
}
static inline void rb_ring_gave(struct rb_ring *r) { rb_store_release(&r->ctl->rp, r->rp); }

/* Handles in the return ring for its reader. */
static inline uint32_t rb_ring_returned(struct rb_ring *r, uint32_t want)
{
    if (r->rp - r->rc < want) {
        uint32_t rp = rb_load_acquire(&r->ctl->rp);
        if (rp - r->rc > r->returns)
            return RB_RING_FAULT;
        r->rp = rp;
    }
    return r->rp - r->rc;
}

/* Copies n handles that rb_ring_returned has counted: a private copy, of which the peer can change nothing any more. Not yet published. */
static inline void rb_ring_take(struct rb_ring *r, uint32_t *handle, uint32_t n)
{
    const uint32_t at = r->rc & r->rmask;
    uint32_t i;
    for (i = n; i < 2 * n && i < r->rp - r->rc; i += 16) /* the next lines, if they are written */
        __builtin_prefetch(&r->returned[(r->rc + i) & r->rmask], 0);
    for (i = 0; i + 4 <= n && at + n <= r->returns; i += 4)
        *(rb_words *)&handle[i] = *(const rb_words *)&r->returned[at + i];
    for (; i < n; i++)
        handle[i] = r->returned[(at + i) & r->rmask];
    rb_order(); /* or the compiler might read them again */
    r->rc += n;
}

#endif
