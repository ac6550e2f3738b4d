/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ring_limits: what bounds a single-producer single-consumer ring between two cores of this machine.
 *
 *     ring_limits [--cores A,B] [--seconds S] [--rounds N] [--pages 4k|thp] [--only WORD] [--json]
 *
 * A minimal ring of 16-byte descriptors (own code, indices 128 bytes apart, the peer's index cached) is measured in
 * many shapes that differ in one property each: kind of store, prefetch distance, how often an index is published, how
 * much is waited for, number of slots. The "loan" shapes add the way back (a return ring of 4-byte handles, a
 * last-in first-out free stack), then the ledger word per buffer, then the intent record.
 *
 * All shapes run one after the other, round after round (A B C A B C), each run at other addresses of one arena, since
 * where a line lies in the chip moves the figures; medians and the best of the rounds are printed.
 *
 * Every burst carries its number in its first descriptor, and the consumer compares; a mismatch ends the program.
 *
 * Build: cc -std=gnu11 -O2 -Wall -Wextra -Werror ring_limits.c -o ring_limits -pthread
 */
#define _GNU_SOURCE
#ifdef __x86_64__
#include <cpuid.h>
#endif
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define BURST 32u
#define SETS 8u
#define WARM 8192u        /* bursts before the clock starts */
#define CHECK 256u        /* bursts between two looks at the clock */
#define MAX_SLOTS 65536u
#define MAX_ROUNDS 101u
#define ARENA (64u << 20)
#define INLINE static inline __attribute__((always_inline))

enum store { STRUCT, WORDS, WIDE, STREAM, DIRECT };
#define NO_PAUSE 1000u

struct desc {
    uint64_t word[2];     /* handle and length, time stamp */
};

/* What one variant of the ring does. Constant at compile time where the code is instantiated, but for slots. */
struct shape {
    const char *name;
    unsigned slots;
    enum store store;
    unsigned ahead_w;     /* bytes ahead of the producer to fetch for writing, 0 = none */
    unsigned ahead_r;     /* bytes ahead of the consumer to fetch, 0 = none */
    unsigned publish;     /* bursts per store of the producer's index */
    unsigned ack;         /* bursts per store of the consumer's index */
    unsigned room;        /* bursts of space to wait for when the ring looks full */
    unsigned data;        /* bursts to wait for when the ring looks empty */
    unsigned patience;    /* pauses between two looks at the peer's index */
    bool demote;          /* push written lines out of the own cache (cldemote) */
    bool loan;            /* return ring and free stack */
    bool by_credit;       /* space from the count of lent buffers, the consumer's index is not read */
    unsigned take;        /* take back when fewer than this many buffers are free; 0 = before each burst */
    unsigned ledger;      /* 1: a word per buffer; 2: and the intent record; 3: and the committed indices */
    unsigned credit;      /* buffers in circulation, 0 = slots + 2 bursts */
    bool known;           /* fetch ahead only what the cached index says the peer has left */
    bool merge;           /* ledger word and slot stored in one loop; else two loops, one stream of lines each */
    bool early;           /* fetch for writing before this burst's stores, else after them */
    unsigned back_w;      /* bytes ahead in the return ring that the consumer fetches for writing */
    unsigned back_r;      /* bytes ahead in the return ring that the producer fetches (always only what is known) */
};

/* The table below names only what differs; constant-folded wherever it is used on the path. */
INLINE struct shape filled(struct shape s)
{
    s.slots = s.slots ? s.slots : 1024;
    s.publish = s.publish ? s.publish : 1;
    s.ack = s.ack ? s.ack : 1;
    s.room = s.room ? s.room : 1;
    s.data = s.data ? s.data : 1;
    s.patience = s.patience == NO_PAUSE ? 0 : s.patience ? s.patience : 1;
    return s;
}

#define UNLIKELY(x) __builtin_expect((x), 0)
#define LENT UINT64_C(0x100000001)
typedef uint64_t pair __attribute__((vector_size(16), may_alias));

/* The shared lines. Each index has its own 128 bytes (two lines: the adjacent-line prefetcher fetches pairs). */
struct ring {
    _Alignas(128) _Atomic uint32_t produced;
    _Alignas(128) _Atomic uint32_t consumed;
    _Alignas(128) _Atomic uint32_t returned;
    _Alignas(128) _Atomic bool stop;
    _Alignas(128) uint64_t timed;
    double ns;
    bool wrong;
    _Alignas(128) struct desc *slot;
    uint32_t *back;
    uint32_t back_mask;
    unsigned credit;
};

/* The producer's private memory, and what it would keep in the state segment. */
struct book {
    _Alignas(64) _Atomic uint64_t armed;
    uint32_t handle[BURST];
    _Alignas(64) _Atomic uint32_t committed[2];
    _Alignas(64) uint32_t stack[MAX_SLOTS * 2];
    _Alignas(64) _Atomic uint64_t word[MAX_SLOTS * 2];
};

static struct book *book;
static unsigned core[2] = {0, 1};
static double seconds = 0.2;

INLINE void pause_cpu(void)
{
#ifdef __x86_64__
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb");
#endif
}

static double now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

INLINE void copy_in(struct desc *to, const struct desc *from, unsigned n, enum store kind)
{
#ifdef __x86_64__
    if (kind == WIDE || kind == DIRECT) {
        for (unsigned i = 0; i < n; i += 4)
            if (kind == WIDE)
                __asm__ __volatile__("vmovdqu64 %1, %%zmm16\n\tvmovdqa64 %%zmm16, %0"
                                     : "=m"(*(char(*)[64])(to + i)) : "m"(*(const char(*)[64])(from + i)) : "memory");
            else
                __asm__ __volatile__("movdir64b (%1), %0" : : "r"(to + i), "r"(from + i) : "memory");
        return;
    }
    if (kind == STREAM) {
        for (unsigned i = 0; i < n; i++)
            __asm__ __volatile__("movdqu %1, %%xmm0\n\tmovntdq %%xmm0, %0"
                                 : "=m"(to[i]) : "m"(from[i]) : "xmm0", "memory");
        return;
    }
#endif
    if (kind == WORDS)
        for (unsigned i = 0; i < n; i++) {
            __atomic_store_n(&to[i].word[0], from[i].word[0], __ATOMIC_RELAXED);
            __atomic_store_n(&to[i].word[1], from[i].word[1], __ATOMIC_RELAXED);
        }
    else
        for (unsigned i = 0; i < n; i++)
            to[i] = from[i];
}

INLINE void after_store(struct desc *to, unsigned n, const struct shape s)
{
#ifdef __x86_64__
    if (s.store == STREAM || s.store == DIRECT)
        __asm__ __volatile__("sfence" : : : "memory");
    if (s.demote)
        for (unsigned i = 0; i < n; i += 4)
            __asm__ __volatile__("cldemote %0" : : "m"(to[i]));
#else
    (void)to, (void)n, (void)s;
#endif
}

/* GCC emits prefetchw only with -mprfchw, which the x86-64 baseline lacks; older processors take it as a no-op. */
INLINE void fetch_to_write(const void *line)
{
#ifdef __x86_64__
    __asm__ __volatile__("prefetchw %0" : : "m"(*(const char *)line));
#else
    __builtin_prefetch(line, 1, 3);
#endif
}

/* Fetches the burst that lies `bytes` past pos; at most `left` slots from pos on. */
INLINE void ahead(struct desc *slot, uint32_t pos, uint32_t mask, unsigned bytes, bool write, uint32_t left)
{
    if (!bytes || left < bytes / 16 + BURST)
        return;
    for (unsigned i = 0; i < BURST; i += 4) {
        const void *line = &slot[(pos + bytes / 16 + i) & mask];
        if (write)
            fetch_to_write(line);
        else
            __builtin_prefetch(line, 0, 3);
    }
}

INLINE void wait_a_little(unsigned patience)
{
    for (unsigned i = 0; i < patience; i++)
        pause_cpu();
}

/* Arms the intent record: the handles first, then the word that makes them count. */
INLINE void arm(const uint32_t *handle, uint64_t word)
{
    memcpy(book->handle, handle, sizeof(book->handle));
    atomic_signal_fence(memory_order_seq_cst);
    atomic_store_explicit(&book->armed, word, memory_order_relaxed);
    atomic_signal_fence(memory_order_seq_cst);
}

INLINE void commit(unsigned ring, uint32_t index)
{
    atomic_signal_fence(memory_order_seq_cst);
    atomic_store_explicit(&book->committed[ring], index, memory_order_relaxed);
    atomic_signal_fence(memory_order_seq_cst);
}

/*
 * Takes one burst of returned handles, pushes the good ones; returns how many those were. What lives in memory that
 * an atomic store might alias is copied to locals first: GCC reloads everything else after each atomic store, and a
 * counter kept in memory then costs a store-to-load round trip for each buffer.
 */
INLINE uint32_t take_back(struct ring *r, const struct shape s, uint32_t back, uint32_t *top)
{
    const uint32_t *from = r->back + (back & r->back_mask);
    const uint32_t credit = r->credit;
    _Atomic uint64_t *word = book->word;
    uint32_t handle[BURST], n = 0, bad = 0;

    memcpy(handle, from, sizeof(handle));
    if (!s.ledger) {
        memcpy(top, handle, sizeof(handle));
        return BURST;
    }
    if (s.ledger >= 2)
        arm(handle, (uint64_t)back << 32 | BURST << 8 | 2);
#pragma GCC unroll 4
    for (unsigned i = 0; i < BURST; i++) {
        uint32_t h = handle[i];
        if (UNLIKELY(h - 1 >= credit) || UNLIKELY(atomic_load_explicit(&word[h], memory_order_relaxed) != LENT)) {
            bad |= 1u << i;
            continue;
        }
        atomic_store_explicit(&word[h], 0, memory_order_relaxed);
    }
    if (UNLIKELY(bad)) {
        for (unsigned i = 0; i < BURST; i++)
            if (!(bad >> i & 1))
                top[n++] = handle[i];
    } else {
        memcpy(top, handle, sizeof(handle));
        n = BURST;
    }
    if (s.ledger >= 3)
        commit(1, back + BURST);
    if (s.ledger >= 2)
        atomic_store_explicit(&book->armed, 0, memory_order_relaxed);
    return n;
}

INLINE void lend(const struct shape s, const uint32_t *stack, struct desc *to, uint64_t n, uint32_t head)
{
    _Atomic uint64_t *word = book->word;
    uint32_t handle[BURST];

    memcpy(handle, stack, sizeof(handle));
    if (s.ledger >= 2)
        arm(handle, (uint64_t)head << 32 | BURST << 8 | 1);
    if (s.ledger && !s.merge)
        for (unsigned i = 0; i < BURST; i++)
            atomic_store_explicit(&word[handle[i]], LENT, memory_order_relaxed);
    for (unsigned i = 0; i < BURST; i++) {
        if (s.ledger && s.merge)
            atomic_store_explicit(&word[handle[i]], LENT, memory_order_relaxed);
        *(pair *)(to + i) = (pair){handle[i] | (uint64_t)64 << 32, n};
    }
}

INLINE void producer(struct ring *r, const struct shape s)
{
    static struct desc set[SETS][BURST] __attribute__((aligned(64)));
    const uint32_t mask = s.slots - 1;
    uint32_t head = 0, tail = 0, back = 0, back_seen = 0, free_count = 0;
    uint32_t *stack = book->stack;
    struct desc *slot = r->slot;
    uint64_t n = 0;

    for (unsigned k = 0; k < SETS; k++)
        for (unsigned i = 0; i < BURST; i++)
            set[k][i] = (struct desc){{k, i}};
    if (s.loan)
        for (free_count = 0; free_count < r->credit; free_count++) {
            stack[free_count] = free_count + 1;
            atomic_store_explicit(&book->word[free_count + 1], 0, memory_order_relaxed);
        }
    for (;; n++) {
        if (s.loan && (s.take == 0 || free_count < s.take || free_count < BURST)) {
            do {
                if (back_seen == back) {
                    back_seen = atomic_load_explicit(&r->returned, memory_order_acquire);
                    if (back_seen == back && free_count < BURST) {
                        if (atomic_load_explicit(&r->stop, memory_order_relaxed))
                            return;
                        wait_a_little(s.patience);
                    }
                }
                for (unsigned k = 0; back_seen != back && k < (s.take ? 4u : 1u); k++) {
                    uint32_t got;
                    if (s.back_r && back_seen - back >= s.back_r / 4 + BURST)
                        for (unsigned i = 0; i < BURST; i += 16)
                            __builtin_prefetch(&r->back[(back + s.back_r / 4 + i) & r->back_mask], 0, 3);
                    got = take_back(r, s, back, stack + free_count);
                    if (got != BURST) {
                        r->wrong = true;
                        return;
                    }
                    free_count += got;
                    back += BURST;
                }
            } while (free_count < BURST);
        }
        if (!s.by_credit && s.slots - (head - tail) < BURST) {
            for (;;) {
                tail = atomic_load_explicit(&r->consumed, memory_order_acquire);
                if (s.slots - (head - tail) >= BURST * s.room)
                    break;
                if (atomic_load_explicit(&r->stop, memory_order_relaxed))
                    return;
                wait_a_little(s.patience);
            }
        }
        if (s.by_credit && (n & 15) == 0 && atomic_load_explicit(&r->stop, memory_order_relaxed))
            return;
        if (s.by_credit)   /* what is free in the ring is at least what is not lent */
            tail = head - (r->credit - free_count);
        if (s.early)
            ahead(slot, head + BURST, mask, s.ahead_w, true, s.known ? s.slots - (head + BURST - tail) : UINT32_MAX);
        if (s.loan) {
            free_count -= BURST;
            lend(s, stack + free_count, slot + (head & mask), n, head);
        } else {
            struct desc *out = set[n % SETS];
            copy_in(slot + (head & mask), out, BURST, s.store);
            out[0].word[0] = n + SETS;
        }
        after_store(slot + (head & mask), BURST, s);
        if (!s.early)
            ahead(slot, head + BURST, mask, s.ahead_w, true, s.known ? s.slots - (head + BURST - tail) : UINT32_MAX);
        head += BURST;
        if (s.ledger >= 3)
            commit(0, head);
        if (s.publish == 1 || (n + 1) % s.publish == 0)
            atomic_store_explicit(&r->produced, head, memory_order_release);
        if (s.ledger >= 2) {
            atomic_signal_fence(memory_order_seq_cst);
            atomic_store_explicit(&book->armed, 0, memory_order_relaxed);
        }
    }
}

INLINE void consumer(struct ring *r, const struct shape s)
{
    static struct desc in[BURST] __attribute__((aligned(64)));
    uint32_t mask = s.slots - 1, tail = 0, head = 0, back = 0;
    uint64_t n = 0, limit = WARM, base = 0;
    double start = 0, end = 0;
    bool wrong = false;

    for (;;) {
        for (; n < limit; n++) {
            if (head - tail < BURST) {
                for (;;) {
                    head = atomic_load_explicit(&r->produced, memory_order_acquire);
                    if (head - tail >= BURST * s.data)
                        break;
                    wait_a_little(s.patience);
                }
            }
            struct desc *from = r->slot + (tail & mask);
            ahead(r->slot, tail + BURST, mask, s.ahead_r, false, s.known ? head - (tail + BURST) : UINT32_MAX);
            for (unsigned i = 0; i < BURST; i++)
                in[i] = from[i];
            __asm__ __volatile__("" : : "r"(in) : "memory");
            wrong |= in[0].word[s.loan] != n;
            tail += BURST;
            if (!s.by_credit && (s.ack == 1 || (n + 1) % s.ack == 0))
                atomic_store_explicit(&r->consumed, tail, memory_order_release);
            if (s.by_credit)   /* the index is still published: recovery and other readers want it */
                atomic_store_explicit(&r->consumed, tail, memory_order_relaxed);
            if (s.loan) {
                uint32_t *to = r->back + (back & r->back_mask);
                if (s.back_w)
                    for (unsigned i = 0; i < BURST; i += 16)
                        fetch_to_write(&r->back[(back + s.back_w / 4 + i) & r->back_mask]);
                for (unsigned i = 0; i < BURST; i++)
                    to[i] = (uint32_t)in[i].word[0];
                back += BURST;
                if (s.ack == 1 || (n + 1) % s.ack == 0)
                    atomic_store_explicit(&r->returned, back, memory_order_release);
            }
        }
        end = now_ns();
        if (!base) {
            base = n;
            start = end;
        } else if (end - start >= seconds * 1e9) {
            break;
        }
        limit = n + CHECK;
    }
    r->timed = (n - base) * BURST;
    r->ns = end - start;
    r->wrong |= wrong;
    atomic_store_explicit(&r->stop, true, memory_order_relaxed);
}

/* The shapes: what is not named is 1024 slots, 16-byte stores, no fetching ahead, indices at every burst, 1 pause. */
#define LOAN .loan = true
#define BOTH .ahead_w = 512, .ahead_r = 512, .known = 1
#define BACK .take = 256, .back_w = 128, .back_r = 256
#define P LOAN, BOTH, BACK
#define SHAPES(X) \
    X(f01, "fwd base: struct stores") \
    X(f02, "fwd 8-byte word stores", .store = WORDS) \
    X(f03, "fwd 64-byte AVX-512 stores", .store = WIDE) \
    X(f04, "fwd non-temporal stores", .store = STREAM) \
    X(f05, "fwd movdir64b stores", .store = DIRECT) \
    X(f06, "fwd cldemote after stores", .demote = 1) \
    X(f07, "fwd prefetchw next", .ahead_w = 1) \
    X(f08, "fwd prefetchw +512", .ahead_w = 512) \
    X(f09, "fwd prefetcht0 next, unknown", .ahead_r = 1) \
    X(f10, "fwd prefetcht0 next, known", .ahead_r = 1, .known = 1) \
    X(f11, "fwd prefetcht0 +512, known", .ahead_r = 512, .known = 1) \
    X(f12, "fwd both +512, unknown", .ahead_w = 512, .ahead_r = 512) \
    X(f13, "fwd both next, known", .ahead_w = 1, .ahead_r = 1, .known = 1) \
    X(f14, "fwd both +512, known", BOTH) \
    X(f15, "fwd both +1536, known", .ahead_w = 1536, .ahead_r = 1536, .known = 1) \
    X(f16, "fwd both +512, known, publish 2", BOTH, .publish = 2) \
    X(f17, "fwd both +512, known, ack 4", BOTH, .ack = 4) \
    X(f18, "fwd both +512, known, 8 pauses", BOTH, .patience = 8) \
    X(f19, "fwd publish per 4 bursts", .publish = 4) \
    X(f20, "fwd ack per 4 bursts", .ack = 4) \
    X(f21, "fwd wait for 8 bursts of room", .room = 8) \
    X(f22, "fwd wait for 4 bursts of data", .data = 4) \
    X(f23, "fwd no pause", .patience = NO_PAUSE) \
    X(f24, "fwd 8 pauses", .patience = 8) \
    X(f25, "fwd 256 slots", .slots = 256) \
    X(f26, "fwd 4096 slots", .slots = 4096) \
    X(f27, "fwd 2048 slots, both +512, known", .slots = 2048, BOTH) \
    X(f28, "fwd 4096 slots, both +512, known", .slots = 4096, BOTH) \
    X(f29, "fwd 16384 slots", .slots = 16384) \
    X(f30, "fwd 16384 slots, both +512, known", .slots = 16384, BOTH) \
    X(l31, "loan base", LOAN) \
    X(l32, "loan space by credit 992", LOAN, .by_credit = 1, .credit = 992) \
    X(l33, "loan take below 64", LOAN, .take = 64) \
    X(l34, "loan take below 256", LOAN, .take = 256) \
    X(l35, "loan w next", LOAN, .ahead_w = 1, .known = 1) \
    X(l36, "loan take 256, bw br", LOAN, BACK) \
    X(l37, "loan take 256, bw, br, w+512", LOAN, .ahead_w = 512, BACK, .known = 1) \
    X(l38, "loan take 256, bw, br, w+512 r next", LOAN, .ahead_w = 512, .ahead_r = 1, BACK, .known = 1) \
    X(l39, "loan P: take 256 bw br w+512 r+512", P) \
    X(l40, "loan P, ack 4", P, .ack = 4) \
    X(l41, "loan P, ack 2, publish 2", P, .publish = 2, .ack = 2) \
    X(l42, "loan P, 8 pauses", P, .patience = 8) \
    X(l43, "loan P, by credit 992", P, .by_credit = 1, .credit = 992) \
    X(l44, "loan P, 4096 slots", P, .slots = 4096) \
    X(l45, "loan P, 4096 slots, credit 1024", P, .slots = 4096, .credit = 1024) \
    X(l46, "loan P + ledger", P, .ledger = 1) \
    X(l47, "loan P + ledger + intent", P, .ledger = 2) \
    X(l48, "full (ledger intent committed) bare", LOAN, .ledger = 3) \
    X(l49, "full, bw br", LOAN, BACK, .ledger = 3, .known = 1) \
    X(l50, "full, bw br w next", LOAN, .ahead_w = 1, BACK, .ledger = 3, .known = 1) \
    X(l51, "full, bw br w+512", LOAN, .ahead_w = 512, BACK, .ledger = 3, .known = 1) \
    X(l52, "full P", P, .ledger = 3) \
    X(l60, "full P, returns fetched 1 burst on", LOAN, BOTH, .take = 256, .back_w = 128, .back_r = 128, .ledger = 3) \
    X(l61, "full P, returns fetched 4 bursts on", LOAN, BOTH, .take = 256, .back_w = 128, .back_r = 512, .ledger = 3) \
    X(l53, "full P, one loop", P, .ledger = 3, .merge = 1) \
    X(l54, "full P, r next", LOAN, .ahead_w = 512, .ahead_r = 1, BACK, .ledger = 3, .known = 1) \
    X(l55, "full P, ack 4", P, .ack = 4, .ledger = 3) \
    X(l56, "full P, 8 pauses", P, .patience = 8, .ledger = 3) \
    X(l57, "full P, by credit 992", P, .by_credit = 1, .ledger = 3, .credit = 992) \
    X(l58, "full P, 4096 slots", P, .slots = 4096, .ledger = 3) \
    X(l59, "full P, 4096 slots, credit 1024", P, .slots = 4096, .ledger = 3, .credit = 1024)

#define SHAPE(n, ...) filled((struct shape){.name = n __VA_OPT__(,) __VA_ARGS__})
#define MAKE(id, ...) \
    __attribute__((noinline)) static void p_##id(struct ring *r) { producer(r, SHAPE(__VA_ARGS__)); } \
    __attribute__((noinline)) static void c_##id(struct ring *r) { consumer(r, SHAPE(__VA_ARGS__)); }
SHAPES(MAKE)

#define ROW(id, n, ...) {p_##id, c_##id, {.name = n __VA_OPT__(,) __VA_ARGS__}},
static const struct row {
    void (*produce)(struct ring *);
    void (*consume)(struct ring *);
    struct shape shape;
} rows[] = {SHAPES(ROW)};
#define COUNT (sizeof(rows) / sizeof(*rows))

struct task {
    void (*body)(struct ring *);
    struct ring *ring;
    unsigned core;
};

static void *pinned(void *arg)
{
    struct task *task = arg;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(task->core, &set);
    if (pthread_setaffinity_np(pthread_self(), sizeof(set), &set) != 0) {
        fprintf(stderr, "ring_limits: core %u is not available\n", task->core);
        exit(1);
    }
    task->body(task->ring);
    return NULL;
}

static void both(struct ring *ring, void (*first)(struct ring *), void (*second)(struct ring *))
{
    struct task task[2] = {{first, ring, core[0]}, {second, ring, core[1]}};
    pthread_t thread[2];
    for (int i = 0; i < 2; i++)
        if (pthread_create(&thread[i], NULL, pinned, &task[i]) != 0) {
            fprintf(stderr, "ring_limits: no thread\n");
            exit(1);
        }
    for (int i = 0; i < 2; i++)
        pthread_join(thread[i], NULL);
}

/* Ping-pong on one line: half a round trip is the latency of one transfer of ownership. */
#define TRIPS 200000u
static void ping(struct ring *r)
{
    double start = now_ns();
    for (uint32_t i = 1; i <= TRIPS; i++) {
        atomic_store_explicit(&r->produced, i, memory_order_release);
        while (atomic_load_explicit(&r->consumed, memory_order_acquire) != i)
            ;
    }
    r->ns = (now_ns() - start) / TRIPS / 2;
}

static void pong(struct ring *r)
{
    for (uint32_t i = 1; i <= TRIPS; i++) {
        while (atomic_load_explicit(&r->produced, memory_order_acquire) != i)
            ;
        atomic_store_explicit(&r->consumed, i, memory_order_release);
    }
}

static struct ring *place(char *arena, unsigned slots, unsigned credit)
{
    /* Anywhere in the arena, at a page's start: other physical lines, other slices of the last-level cache. */
    size_t need = (1u << 20) + MAX_SLOTS * sizeof(struct desc);
    size_t at = ((size_t)rand() % ((ARENA - 2 * need) / 4096)) * 4096;
    struct ring *r = (void *)(arena + at);
    memset(r, 0, sizeof(*r));
    r->slot = (void *)(arena + at + 4096);
    r->back = (void *)(arena + at + 4096 + slots * sizeof(struct desc));
    r->back_mask = slots * 2 - 1;
    r->credit = credit ? credit : slots + 2 * BURST;
    memset(r->slot, 0, slots * sizeof(struct desc));
    memset(r->back, 0, slots * 2 * sizeof(uint32_t));
    return r;
}

static bool possible(const struct shape *s)
{
#ifdef __x86_64__
    if (s->store == WIDE)
        return __builtin_cpu_supports("avx512f");
    if (s->store == DIRECT) {
        unsigned a = 0, b = 0, c = 0, d = 0;
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c >> 28 & 1);
    }
    return true;
#else
    return s->store == WORDS || s->store == STRUCT;
#endif
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int usage(const char *why)
{
    fprintf(stderr, "ring_limits: %s\nusage: ring_limits [--cores A,B] [--seconds S] [--rounds N] [--pages 4k|thp] "
                    "[--only WORD] [--json]\n", why);
    return 2;
}

int main(int argc, char **argv)
{
    static double ns[COUNT][MAX_ROUNDS], ratio[COUNT][MAX_ROUNDS], trip[MAX_ROUNDS];
    const char *only = NULL;
    bool json = false, thp = false;
    unsigned rounds = 9;
    char *arena, rest;

    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(argv[i], "--json")) {
            json = true;
            continue;
        }
        if (!strcmp(argv[i], "--cores")) {
            if (sscanf(value, "%u,%u%c", &core[0], &core[1], &rest) != 2 || core[0] == core[1])
                return usage("--cores wants two different cores, for example 0,1");
        } else if (!strcmp(argv[i], "--seconds")) {
            seconds = atof(value);
        } else if (!strcmp(argv[i], "--rounds")) {
            rounds = (unsigned)atoi(value);
        } else if (!strcmp(argv[i], "--pages")) {
            thp = !strcmp(value, "thp");
        } else if (!strcmp(argv[i], "--only")) {
            only = value;
        } else {
            return usage("unknown option");
        }
        i++;
    }
    if (rounds < 1 || rounds > MAX_ROUNDS || seconds <= 0)
        return usage("--rounds is 1 to 101, --seconds above 0");

    arena = mmap(NULL, ARENA + (2u << 20), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    book = aligned_alloc(4096, (sizeof(*book) + 4095) & ~(size_t)4095);
    if (arena == MAP_FAILED || !book) {
        fprintf(stderr, "ring_limits: no memory\n");
        return 1;
    }
    arena = (char *)(((uintptr_t)arena + (2u << 20) - 1) & ~(uintptr_t)((2u << 20) - 1));
    madvise(arena, ARENA, thp ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    memset(arena, 0, ARENA);
    memset(book, 0, sizeof(*book));

    for (unsigned round = 0; round < rounds; round++) {
        struct ring *r = place(arena, filled(rows[0].shape).slots, 0);
        both(r, ping, pong);
        trip[round] = r->ns;
        double base[2] = {0, 0};
        for (unsigned k = 0; k < COUNT; k++) {
            const struct shape filled_shape = filled(rows[k].shape), *s = &filled_shape;
            bool is_base = strstr(s->name, "base") != NULL;
            if (!possible(s) || (only && !is_base && !strstr(s->name, only)))
                continue;
            r = place(arena, s->slots, s->credit);
            both(r, rows[k].produce, rows[k].consume);
            if (r->wrong) {
                fprintf(stderr, "ring_limits: %s: wrong data arrived\n", s->name);
                return 1;
            }
            ns[k][round] = r->ns / (double)r->timed;
            if (is_base)
                base[s->loan] = ns[k][round];
            ratio[k][round] = base[s->loan] / ns[k][round];
        }
        fprintf(stderr, "\rround %u of %u", round + 1, rounds);
    }
    fprintf(stderr, "\n");
    qsort(trip, rounds, sizeof(*trip), ascending);
    if (json)
        printf("{\"burst\": %u, \"rounds\": %u, \"line_transfer_ns\": %.1f, \"shapes\": [", BURST, rounds,
               trip[rounds / 2]);
    else
        printf("one line from core to core and seen: median %.1f ns, best %.1f ns\n%-38s %8s %8s %8s %8s\n",
               trip[rounds / 2], trip[0], "ns per descriptor, burst 32", "median", "best", "worst", "vs base");
    bool first = true;
    for (unsigned k = 0; k < COUNT; k++) {
        if (ns[k][0] == 0)
            continue;
        qsort(ns[k], rounds, sizeof(**ns), ascending);
        qsort(ratio[k], rounds, sizeof(**ratio), ascending);
        if (json)
            printf("%s{\"name\": \"%s\", \"slots\": %u, \"ns\": %.4f, \"best\": %.4f, \"worst\": %.4f, "
                   "\"vs_base\": %.4f}", first ? "" : ", ", rows[k].shape.name, filled(rows[k].shape).slots,
                   ns[k][rounds / 2], ns[k][0], ns[k][rounds - 1], ratio[k][rounds / 2]);
        else
            printf("%-38s %8.3f %8.3f %8.3f %8.2f\n", rows[k].shape.name, ns[k][rounds / 2], ns[k][0],
                   ns[k][rounds - 1], ratio[k][rounds / 2]);
        first = false;
    }
    if (json)
        printf("]}\n");
    return 0;
}
