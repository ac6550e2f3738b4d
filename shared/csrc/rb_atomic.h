/* SPDX-License-Identifier: Apache-2.0
 *
 * The only place with memory ordering.
 *
 * Between the two ends of a lane there are exactly these ordered accesses: the four indices of a queue, the session and its
 * echo, each written by one side with release and read by the other with acquire. Everything in between (slots, handles,
 * packet bytes) is plain, since the index publishes it. A peer in a VM is a peer like any other: its processor, real or
 * emulated, keeps the order of its own release stores.
 *
 * One more pair exists where an end sleeps until its peer rings: the consumer stores that it sleeps and then loads P, the producer stores P and then
 * loads whether somebody sleeps. Each puts a full fence between the two, or both could miss the other.
 *
 * `state` is different: it is read again only after its writer died, so the order that counts is the order in which the
 * stores were made by the writer's program. A killed process has made a prefix of its stores; only the compiler could change
 * which prefix. So words of `state` are relaxed atomics with rb_order() between the steps, which costs no instruction.
 */
#ifndef RB_ATOMIC_H
#define RB_ATOMIC_H
#include <stdatomic.h>
#include <stdint.h>

typedef _Atomic uint32_t rb_a32;
typedef _Atomic uint64_t rb_a64;

#define rb_load_acquire(p) atomic_load_explicit((p), memory_order_acquire)
#define rb_store_release(p, v) atomic_store_explicit((p), (v), memory_order_release)
#define rb_get(p) atomic_load_explicit((p), memory_order_relaxed)
#define rb_set(p, v) atomic_store_explicit((p), (v), memory_order_relaxed)
/* A store before it and a load after it keep their order: see above. */
#if defined(__SANITIZE_THREAD__) /* which knows no fences */
static inline void rb_fence(void)
{
    static rb_a32 word;
    atomic_fetch_add(&word, 1);
}
#else
#define rb_fence() atomic_thread_fence(memory_order_seq_cst)
#endif
/* Keeps the compiler from moving stores to `state` over this line. */
#define rb_order() atomic_signal_fence(memory_order_seq_cst)

static inline void rb_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}
#endif
