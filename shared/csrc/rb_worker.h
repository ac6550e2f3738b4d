/* SPDX-License-Identifier: Apache-2.0
 * What all worker kinds have in common: a thread, pause and stop, counters. A kind is a loop body (worker.c, flow.c). */
#ifndef RB_WORKER_H
#define RB_WORKER_H
#include "rb_internal.h"

struct rb_worker {
    pthread_t thread;
    rb_cluster *c[2]; /* handles that belong to the thread while it runs */
    rb_worker_options options;
    rb_a32 stop, pause, paused, running;
    _Atomic int32_t error;
    char message[256];
    rb_a64 packets, bytes, dropped, bursts, loops, idle_loops, cycles_busy, cycles_total;
    /* One turn: what moved, 0 = nothing to do, -errno = the end (-ENODATA: a good end). */
    int (*turn)(struct rb_worker *w);
    int (*stats)(struct rb_worker *w, void *out);
    void (*finish)(struct rb_worker *w); /* in the thread, when it ends */
    void (*free)(struct rb_worker *w);
    void *kind;
};

static inline void rb_count_up(rb_a64 *counter, uint64_t n) { rb_set(counter, rb_get(counter) + n); }
int rb_worker_launch(struct rb_worker *w, const rb_worker_options *options);
static inline uint64_t rb_cycles(void)
{
#if defined(__x86_64__)
    return __builtin_ia32_rdtsc();
#else
    return rb_mono_ns();
#endif
}
#endif
