/* SPDX-License-Identifier: Apache-2.0
 * Sleeping until a peer rings, and ringing: bell.c tells how. */
#ifndef RB_BELL_H
#define RB_BELL_H
#include "rb_internal.h"

#define RB_BELL_MS 250 /* longest sleep */
#define RB_POLL_MS 5   /* longest wait between two looks at what others are owed, without bells */

struct rb_bell {
    int wait, ring;  /* sleep on the one; write to the other */
    int lease;       /* in a VM: readable when whoever gave these has gone; else -1 */
    uint32_t rung;   /* the peer's arming that was answered */
    bool lost;       /* seen when it was rung: the lease is over */
    uint32_t serial; /* counts bells of a handle: which are new to an end */
};

void rb_bell_ring(const struct rb_bell *b);
void rb_bell_answer(struct rb_bell *b, uint32_t arming);
void rb_bell_free(struct rb_cluster *c, struct rb_bell *b);
/* The producer's half, after P was published: `word` is the consumer's. One fence; a system call only when the consumer sleeps. */
static inline void rb_bell_look(struct rb_bell *b, rb_a64 *word, uint32_t p)
{
    rb_fence();
    uint64_t armed = rb_get(word);
    if (__builtin_expect(RB_ARMING(armed) != b->rung && (uint32_t)armed != p, 0))
        rb_bell_answer(b, RB_ARMING(armed));
}
void rb_bell_join(struct rb_server *s, struct rb_leg_ctx *l); /* the bell of a VM's leg, if there is one and this process may have it */
void rb_bell_ring_lane(struct rb_cluster *c, uint32_t lane);  /* all programs of a VM: something about the lane changed. Recovery lock held */
void rb_bell_promise(struct rb_leg_ctx *l);                   /* its server rings, or does not */
int rb_bell_has(const struct rb_end *end);
void rb_bell_drop(struct rb_end *end); /* a client's: from now on it polls */
int rb_bell_listen(struct rb_end *end, int timeout_ms); /* an armed end sleeps: 0 when time is over */
int rb_bell_fd(struct rb_end *end);
void rb_bell_again(struct rb_end *end); /* of an end with rb_bell_fd that has found nothing: wake me */
void rb_bell_wake(struct rb_end *end);  /* any thread, a signal handler too */
void rb_bell_close(struct rb_end *end);
#endif
