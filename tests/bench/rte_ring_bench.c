/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rte_ring_bench: how fast DPDK's rte_ring moves descriptors between two cores.
 *
 * The peer that `ringbar bench ring` measures itself against: one SP/SC ring of 16-byte elements (rte_ring_elem),
 * bulk enqueue and bulk dequeue, one producer and one consumer, each pinned to its own core. No device, no huge
 * page, no file outside DPDK's runtime directory is used.
 *
 *     rte_ring_bench [--cores A,B] [--seconds S] [--runs N] [--burst N] [--slots N]
 *
 * What a run is: the consumer takes WARM elements, reads the clock, takes elements for S seconds, reads the clock;
 * only then is the producer told to stop, so the whole timed part is steady state. What is left is drained, and the
 * number consumed must be the number produced. Every burst carries its number in its first element, checked by the
 * consumer in the timed part too (one compare a burst, nothing per element that would slow the peer). Before the
 * runs one untimed pass fills both words of every element and checks each for order and contents.
 *
 * Prints one JSON object on standard output; figures at its top level are medians over "runs".
 * Exit status: 0 measured, 1 failed or data arrived wrong, 2 usage.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <rte_cycles.h>
#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_launch.h>
#include <rte_lcore.h>
#include <rte_pause.h>
#include <rte_ring.h>
#include <rte_ring_elem.h>
#include <rte_version.h>

#define MAX_BURST 512u
#define MAX_RUNS 1000u
#define SETS 8u              /* prepared bursts: a stamp is stored long before it is copied, no store-forward stall */
#define WARM (1u << 20)      /* elements before the clock starts */
#define CHECK_EVERY 256u     /* bursts between two looks at the clock */
#define VERIFY (1u << 20)    /* elements of the untimed pass, each checked */

struct element {
    uint64_t word[2];
};
_Static_assert(sizeof(struct element) == 16, "a descriptor is 16 bytes");

struct job {
    struct rte_ring *ring;
    unsigned burst;
    bool every;              /* fill and check every element, not only the first of each burst */
    double seconds;
    atomic_bool stop;        /* set by the consumer, read by the producer now and then */
    uint64_t produced;       /* bursts; the producer's, read after it has ended */
    uint64_t consumed;       /* bursts */
    uint64_t timed;          /* elements between the two readings of the clock */
    uint64_t cycles;
    double ns;
    bool wrong;
};

static uint64_t mix(uint64_t x)
{
    return x * UINT64_C(0x9e3779b97f4a7c15) ^ (x >> 7);
}

static double now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* Inlined with constant burst sizes below, as DPDK's own test does: the peer gets its best code. */
static inline __attribute__((always_inline)) void produce(struct job *job, unsigned burst)
{
    static struct element set[SETS][MAX_BURST] __attribute__((aligned(64)));
    struct rte_ring *ring = job->ring;
    uint64_t n = 0;

    for (unsigned s = 0; s < SETS; s++)
        for (unsigned i = 0; i < burst; i++)
            set[s][i] = (struct element){{s, i}};
    while (!atomic_load_explicit(&job->stop, memory_order_relaxed)) {
        for (unsigned k = 0; k < CHECK_EVERY; k++, n++) {
            struct element *out = set[n % SETS];
            if (job->every)
                for (unsigned i = 0; i < burst; i++)
                    out[i] = (struct element){{n * burst + i, mix(n * burst + i)}};
            while (rte_ring_sp_enqueue_bulk_elem(ring, out, sizeof(*out), burst, NULL) == 0) {
                if (atomic_load_explicit(&job->stop, memory_order_relaxed))
                    goto done;
                rte_pause();
            }
            if (!job->every)
                out[0].word[0] = n + SETS;
        }
    }
done:
    job->produced = n;
}

static inline __attribute__((always_inline)) bool take(struct job *job, unsigned burst, struct element *in)
{
    if (rte_ring_sc_dequeue_bulk_elem(job->ring, in, sizeof(*in), burst, NULL) == 0)
        return false;
    if (job->every) {
        for (unsigned i = 0; i < burst; i++) {
            uint64_t want = job->consumed * burst + i;
            job->wrong |= in[i].word[0] != want || in[i].word[1] != mix(want);
        }
    } else {
        job->wrong |= in[0].word[0] != job->consumed;
    }
    /* The array is read by nobody else: without this the compiler could drop the copies nobody looks at. */
    __asm__ __volatile__("" : : "r"(in) : "memory");
    job->consumed++;
    return true;
}

static inline __attribute__((always_inline)) void consume(struct job *job, unsigned burst)
{
    static struct element in[MAX_BURST] __attribute__((aligned(64)));
    uint64_t warm = (job->every ? VERIFY : WARM) / burst, base;
    double start_ns, end_ns;
    uint64_t start;

    while (job->consumed < warm)
        if (!take(job, burst, in))
            rte_pause();
    base = job->consumed;
    start = rte_rdtsc();
    start_ns = end_ns = now_ns();
    while (end_ns - start_ns < job->seconds * 1e9) {
        for (unsigned k = 0; k < CHECK_EVERY; k++)
            while (!take(job, burst, in))
                rte_pause();
        end_ns = now_ns();
    }
    job->cycles = rte_rdtsc() - start;
    job->ns = end_ns - start_ns;
    job->timed = (job->consumed - base) * burst;
    atomic_store_explicit(&job->stop, true, memory_order_relaxed);
}

static int producer(void *arg)
{
    struct job *job = arg;
    if (job->burst == 32)
        produce(job, 32);
    else
        produce(job, job->burst);
    return 0;
}

/* One run. Returns NULL, or what went wrong. */
static const char *run(struct job *job, unsigned other)
{
    static struct element in[MAX_BURST];
    int e;

    job->produced = job->consumed = job->timed = 0;
    job->wrong = false;
    atomic_store(&job->stop, false);
    rte_ring_reset(job->ring);
    e = rte_eal_remote_launch(producer, job, other);
    if (e != 0)
        return strerror(-e);
    if (job->burst == 32)
        consume(job, 32);
    else
        consume(job, job->burst);
    rte_eal_wait_lcore(other);
    while (take(job, job->burst, in))
        ;
    if (job->produced != job->consumed)
        return "the consumer did not get what the producer sent";
    if (job->wrong)
        return "elements arrived out of order or changed";
    return NULL;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(const double *values, unsigned n)
{
    double sorted[MAX_RUNS];
    memcpy(sorted, values, n * sizeof(*values));
    qsort(sorted, n, sizeof(*sorted), ascending);
    return n % 2 ? sorted[n / 2] : (sorted[n / 2 - 1] + sorted[n / 2]) / 2;
}

static int usage(const char *why)
{
    fprintf(stderr, "rte_ring_bench: %s\nusage: rte_ring_bench [--cores A,B] [--seconds S] [--runs N] [--burst N] "
                    "[--slots N]\n", why);
    return 2;
}

int main(int argc, char **argv)
{
    static double mpps[MAX_RUNS], ns[MAX_RUNS], cycles[MAX_RUNS];
    const char *cores = "0,1";
    unsigned runs = 5, burst = 32, slots = 1024, a, b;
    double seconds = 0.5;
    char rest, prefix[64];
    struct job job;
    uint64_t elements = 0;
    const char *fault;

    for (int i = 1; i < argc; i += 2) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(argv[i], "--cores"))
            cores = value;
        else if (!strcmp(argv[i], "--seconds"))
            seconds = atof(value);
        else if (!strcmp(argv[i], "--runs"))
            runs = (unsigned)atoi(value);
        else if (!strcmp(argv[i], "--burst"))
            burst = (unsigned)atoi(value);
        else if (!strcmp(argv[i], "--slots"))
            slots = (unsigned)atoi(value);
        else
            return usage("unknown option");
    }
    if (sscanf(cores, "%u,%u%c", &a, &b, &rest) != 2 || a == b)
        return usage("--cores wants two different cores, for example 0,1");
    if (runs < 1 || runs > MAX_RUNS || seconds <= 0 || seconds > 60)
        return usage("--runs is 1 to 1000, --seconds above 0 to 60");
    if (slots < 2 || slots > 65536 || (slots & (slots - 1)) || burst < 1 || burst > MAX_BURST || burst >= slots)
        return usage("--slots is a power of two to 65536, --burst 1 to 512 and below --slots");

    snprintf(prefix, sizeof(prefix), "--file-prefix=ringbar-%d", (int)getpid());
    char *eal[] = {argv[0], "-l", (char *)(uintptr_t)cores, "--main-lcore", NULL, "--no-huge", "-m", "256", "--no-pci",
                   "--no-telemetry", "--no-shconf", "--log-level=3", prefix, NULL};
    char main_core[16];
    snprintf(main_core, sizeof(main_core), "%u", a);
    eal[4] = main_core;
    if (rte_eal_init((int)(sizeof(eal) / sizeof(*eal)) - 1, eal) < 0) {
        fprintf(stderr, "rte_ring_bench: DPDK does not start on cores %s: %s\n", cores, rte_strerror(rte_errno));
        return 1;
    }
    /* A ring of N slots holds N - 1 elements, as in DPDK's own test. */
    memset(&job, 0, sizeof(job));
    job.ring = rte_ring_create_elem("bench", sizeof(struct element), slots, (int)rte_socket_id(),
                                    RING_F_SP_ENQ | RING_F_SC_DEQ);
    if (!job.ring) {
        fprintf(stderr, "rte_ring_bench: no ring: %s\n", rte_strerror(rte_errno));
        rte_eal_cleanup();
        return 1;
    }
    job.burst = burst;
    job.every = true;
    fault = run(&job, b);
    job.every = false;
    job.seconds = seconds;
    for (unsigned r = 0; r < runs && !fault; r++) {
        fault = run(&job, b);
        if (job.timed == 0)
            break;
        ns[r] = job.ns / (double)job.timed;
        mpps[r] = 1e3 / ns[r];
        cycles[r] = (double)job.cycles / (double)job.timed;
        elements += job.timed;
    }
    rte_ring_free(job.ring);
    rte_eal_cleanup();
    if (fault) {
        fprintf(stderr, "rte_ring_bench: %s\n", fault);
        return 1;
    }
    printf("{\"name\": \"rte_ring\", \"api\": \"rte_ring_elem SP/SC bulk\", \"dpdk\": \"%s\", \"mpps\": %.3f, "
           "\"ns_per_element\": %.4f, \"cycles_per_element\": %.4f, \"elements\": %" PRIu64 ", \"element_bytes\": %zu, "
           "\"burst\": %u, \"slots\": %u, \"cores\": [%u, %u], \"seconds\": %g, \"tsc_mhz\": %.1f, \"runs\": [",
           rte_version(), median(mpps, runs), median(ns, runs), median(cycles, runs), elements, sizeof(struct element),
           burst, slots, a, b, seconds, (double)rte_get_tsc_hz() / 1e6);
    for (unsigned r = 0; r < runs; r++)
        printf("%s{\"mpps\": %.3f, \"ns_per_element\": %.4f, \"cycles_per_element\": %.4f}", r ? ", " : "", mpps[r],
               ns[r], cycles[r]);
    printf("]}\n");
    return 0;
}
