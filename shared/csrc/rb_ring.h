/* SPDX-License-Identifier: Apache-2.0
 *
 * Loan rings: the memory between a producer and a consumer, without ledger. A queue is a forward ring of descriptors and a
 * return ring of handles, each written by one side. Both sides keep their own indices in private memory; the peer's index is
 * cached and read again only when the cache says there is not enough.
 *
 * The consumer's rule: copy the descriptors out, publish the index, and only then return or send on any of them.
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

static inline void rb_ring_write(struct rb_ring *r, const rb_desc *desc, uint32_t n)
{
    uint32_t at = r->p & r->mask, first = r->slots - at;
    if (n <= first)
        memcpy(&r->forward[at], desc, n * sizeof *desc);
    else {
        memcpy(&r->forward[at], desc, first * sizeof *desc);
        memcpy(&r->forward[0], desc + first, (n - first) * sizeof *desc);
    }
    r->p += n;
}
static inline void rb_ring_publish(struct rb_ring *r) { rb_store_release(&r->ctl->p, r->p); }

static inline void rb_ring_read(struct rb_ring *r, rb_desc *desc, uint32_t n)
{
    uint32_t at = r->c & r->mask, first = r->slots - at;
    if (n <= first)
        memcpy(desc, &r->forward[at], n * sizeof *desc);
    else {
        memcpy(desc, &r->forward[at], first * sizeof *desc);
        memcpy(desc + first, &r->forward[0], (n - first) * sizeof *desc);
    }
    r->c += n;
}
static inline void rb_ring_consumed(struct rb_ring *r) { rb_store_release(&r->ctl->c, r->c); }

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

#endif
