/* SPDX-License-Identifier: Apache-2.0
 *
 * Measuring the loan rings: bare (level 0), with a ledger word per buffer (1), with intent records and committed indices too, in the order of
 * lend.c (2), and the library's whole path with its checks of what is in hand (3: rb_alloc, rb_send, rb_recv, rb_return on a real cluster). Producer and consumer are two threads or two processes,
 * pinned. Buffers come back and are used again last in, first out, at every level.
 */
#include "rb_internal.h"

#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define POOL 4096u
#define BUFFER 2048u

struct shared { /* between the two ends, apart from the rings */
    rb_a32 ready, done;
    rb_a64 received, failed;
    uint64_t started, ended;
};

struct bench {
    rb_bench_options o;
    struct shared *s;
    uint32_t id;
    /* levels 0 and 1 */
    uint8_t *memory, *pool;
    size_t bytes;
    rb_a64 *ledger;
    struct rb_book_record *book; /* intent */
    rb_a32 *committed;
    struct rb_ring ring, back;
};

/* The default credit circulates. */
static uint32_t credit_of(uint32_t slots) { return RB_MIN(slots + 2 * RB_BURST, POOL - 1); }

static void pin(int core)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    sched_setaffinity(0, sizeof set, &set); /* one core only, or not allowed: then the figure says so by itself */
}

/* Whoever finds nothing, or no room, waits a little before looking again, then longer: each look takes the line with the index away from the peer,
 * for 25 ns or for 250, as the two cores lie. */
static inline void wait_a_little(uint32_t pauses, uint32_t *tries)
{
    pauses <<= *tries < 3 ? (*tries)++ : 3;
    while (pauses--)
        rb_pause();
}
#define LOOK_AGAIN_EMPTY 32u
#define LOOK_AGAIN_FULL 16u

static inline void write_packet(uint8_t *p, uint32_t touch, uint64_t v)
{
    for (uint32_t i = 0; i < touch; i += 8)
        memcpy(p + i, &v, 8);
}
static inline uint64_t read_packet(const uint8_t *p, uint32_t touch)
{
    uint64_t v, sum = 0;
    for (uint32_t i = 0; i < touch; i += 64) {
        memcpy(&v, p + i, 8);
        sum += v;
    }
    return sum;
}

/* ---- bare rings and ledger -------------------------------------------------------------------------------------------- */

static inline __attribute__((always_inline)) void arm(struct rb_book_record *book, enum rb_op op, uint32_t n, uint32_t base)
{
    rb_order();
    rb_set(&book->intent, RB_INTENT(op, 0, n, base));
    rb_order();
}

static inline __attribute__((always_inline)) void commit(rb_a32 *committed, uint32_t index)
{
    rb_order();
    rb_set(committed, index);
    rb_order();
}

static inline __attribute__((always_inline)) void disarm(struct rb_book_record *book)
{
    rb_order();
    rb_set(&book->intent, 0);
}

/* What came back, at most four bursts: checked against the ledger and pushed. Returns the new height of the stack. */
static inline __attribute__((always_inline)) uint32_t take(struct bench *b, struct rb_ring *r, uint32_t *stack, uint32_t top, const int level)
{
    uint32_t copy[RB_MAX_BURST], *handle = level >= 2 ? b->book->handles : level ? copy : stack + top;
    const uint32_t n = RB_MIN(RB_MIN(rb_ring_returned(r, 1), 4 * b->o.burst), RB_MAX_BURST), rc = r->rc;
    rb_a64 *ledger = b->ledger;
    uint32_t good = 0;
    if (!n)
        return top;
    rb_ring_take(r, handle, n);
    if (level >= 2)
        arm(b->book, RB_OP_TAKE, n, rc);
    for (; good < n && level; good++) {
        uint32_t h = handle[good];
        if (__builtin_expect(h >= POOL, 0) || __builtin_expect(rb_get(&ledger[h]) != RB_WORD(RB_W_LENT, 0), 0))
            break;
        rb_set(&ledger[h], RB_WORD(RB_W_HOME, 0));
        stack[top + good] = h;
    }
    if (level >= 2)
        commit(&b->committed[RB_IX_RC], r->rc);
    rb_store_release(&r->ctl->rc, r->rc);
    if (level >= 2)
        disarm(b->book);
    if (level && good < n) /* nobody here returns what it was not lent */
        rb_set(&b->s->failed, rb_get(&b->s->failed) + n - good);
    return top + (level ? good : n);
}

static inline __attribute__((always_inline)) uint64_t produce(struct bench *b, const uint32_t burst, const uint32_t touch, const int level)
{
    uint32_t stack[POOL + RB_MAX_BURST], top = 0;
    uint64_t number = 0;
    struct rb_ring r = b->ring;
    uint64_t sent = 0, until = 0;
    uint32_t tries = 0;
    for (uint32_t i = credit_of(b->o.slots); i >= 1; i--)
        stack[top++] = i;
    for (uint32_t turn = 0;; turn++) {
        if ((turn & 255) == 0) {
            uint64_t now = rb_mono_ns();
            until = until ? until : now + (uint64_t)(b->o.seconds * 1e9);
            if (now >= until)
                break;
        }
        if (top < RB_MAX_BURST)
            top = take(b, &r, stack, top, level);
        uint32_t n = RB_MIN(RB_MIN(rb_ring_space(&r, burst), burst), top);
        if (n < burst) {
            wait_a_little(LOOK_AGAIN_FULL, &tries);
            continue;
        }
        tries = 0;
        top -= burst;
        const uint32_t *handle = stack + top;
        for (uint32_t i = 0; i < burst && touch; i++)
            rb_prefetch_write(b->pool + (uint64_t)handle[i] * BUFFER + 64);
        for (uint32_t i = 0; i < burst && touch; i++)
            write_packet(b->pool + (uint64_t)handle[i] * BUFFER + 64, touch, number + i);
        if (level >= 2) {
            memcpy(b->book->handles, handle, burst * sizeof *handle);
            arm(b->book, RB_OP_LEND, burst, r.p);
        }
        if (level >= 1) {
            rb_a64 *ledger = b->ledger;
#pragma GCC unroll 4
            for (uint32_t i = 0; i < burst; i++)
                rb_set(&ledger[handle[i]], RB_WORD(RB_W_LENT, 0));
        }
        rb_ring_ahead_write(&r, burst);
        for (uint32_t i = 0; i < burst; i++)
            rb_ring_put(&r, i, handle[i], 64 | 64u << 15, number + i);
        number += burst;
        r.p += burst;
        if (level >= 2)
            commit(&b->committed[RB_IX_P], r.p);
        rb_ring_publish(&r);
        if (level >= 2)
            disarm(b->book);
        sent += burst;
    }
    return sent;
}

/* Constants, so that what a level leaves out costs nothing. */
static inline __attribute__((always_inline)) void produce_at(struct bench *b, const uint32_t burst)
{
    switch (b->o.level * 2 + (b->o.touch != 0)) {
    case 0: produce(b, burst, 0, 0); break;
    case 1: produce(b, burst, b->o.touch, 0); break;
    case 2: produce(b, burst, 0, 1); break;
    case 3: produce(b, burst, b->o.touch, 1); break;
    case 4: produce(b, burst, 0, 2); break;
    default: produce(b, burst, b->o.touch, 2);
    }
}

static inline __attribute__((always_inline)) uint64_t consume_some(struct bench *b, struct rb_ring *r, uint64_t number, const uint32_t n, const uint32_t touch)
{
    rb_desc desc[RB_MAX_BURST];
    rb_ring_read(r, desc, n);
    rb_ring_consumed(r);
    uint64_t failed = (desc[0].ts != number) + (desc[n - 1].ts != number + n - 1);
    for (uint32_t i = 0; i < n && touch; i++) /* all at once: the misses overlap */
        __builtin_prefetch(b->pool + (uint64_t)desc[i].handle * BUFFER + 64);
    for (uint32_t i = 0; i < n && touch; i++)
        failed += read_packet(b->pool + (uint64_t)desc[i].handle * BUFFER + 64, touch) != (number + i) * (touch / 64);
    rb_ring_give(r, desc, n);
    rb_ring_gave(r);
    return failed;
}

static inline __attribute__((always_inline)) void consume(struct bench *b, const uint32_t burst, const uint32_t touch)
{
    struct rb_ring r = b->ring;
    struct shared *s = b->s;
    uint64_t got = 0, failed = 0;
    uint32_t tries = 0;
    for (;;) {
        uint32_t n = RB_MIN(rb_ring_ready(&r, burst), burst);
        if (!n) {
            if (rb_load_acquire(&s->done) && rb_ring_ready(&r, 1) == 0)
                break;
            wait_a_little(LOOK_AGAIN_EMPTY, &tries);
            continue;
        }
        tries = 0;
        failed += n == burst ? consume_some(b, &r, got, burst, touch) : consume_some(b, &r, got, n, touch);
        got += n;
    }
    rb_set(&s->failed, rb_get(&s->failed) + failed);
    rb_store_release(&s->received, got);
}

/* ---- the library's own path ----------------------------------------------------------------------------------------------- */

static int produce_library(struct bench *b, rb_cluster *c)
{
    rb_desc desc[RB_MAX_BURST];
    rb_end *tx;
    char address[32];
    uint64_t until = 0, number = 0;
    uint32_t tries = 0;
    snprintf(address, sizeof address, "%u@0", b->id);
    int rc = rb_open(&tx, c, address, RB_TX);
    if (rc < 0) {
        rb_store_release(&b->s->ready, 4);
        return rc;
    }
    rb_store_release(&b->s->ready, 1);
    while (rb_load_acquire(&b->s->ready) != 2)
        rb_service(c); /* answer the consumer's session */
    b->s->started = rb_mono_ns();
    for (uint32_t turn = 0;; turn++) {
        if ((turn & 255) == 0) {
            uint64_t now = rb_mono_ns();
            until = until ? until : now + (uint64_t)(b->o.seconds * 1e9);
            if (now >= until)
                break;
        }
        int n = rb_alloc(tx, desc, (int)b->o.burst), sent = 0;
        for (int i = 0; i < n; i++) {
            rb_desc_set(&desc[i], 64, 64, 0);
            desc[i].ts = number;
            if (b->o.touch)
                write_packet(c->pool[0] + (uint64_t)desc[i].handle * BUFFER + 64, b->o.touch, number);
            number++;
        }
        while (sent < n) {
            rc = rb_send(tx, desc + sent, n - sent, 0);
            if (rc < 0) {
                rb_store_release(&b->s->done, 1);
                return rc;
            }
            sent += rc;
            tries = rc ? 0 : tries;
            if (sent < n)
                wait_a_little(LOOK_AGAIN_FULL, &tries);
        }
    }
    rb_store_release(&b->s->done, 1);
    while (rb_load_acquire(&b->s->ready) != 3)
        rb_service(c);
    return 0;
}

static int consume_library(struct bench *b)
{
    rb_cluster *c;
    rb_end *rx;
    rb_desc desc[RB_MAX_BURST];
    char address[32];
    uint64_t got = 0, failed = 0;
    uint32_t tries = 0;
    snprintf(address, sizeof address, "%u@0", b->id);
    while (!rb_load_acquire(&b->s->ready))
        rb_pause();
    if (rb_load_acquire(&b->s->ready) == 4)
        return -ECANCELED;
    int rc = rb_cluster_attach(b->id, &c);
    if (rc < 0 || (rc = rb_open(&rx, c, address, RB_RX)) < 0) {
        rb_store_release(&b->s->ready, 2);
        rb_store_release(&b->s->ready, 3);
        return rc;
    }
    rb_store_release(&b->s->ready, 2);
    for (;;) {
        int n = rb_recv(rx, desc, (int)b->o.burst, 0);
        if (n <= 0) {
            if (n < 0 || (rb_load_acquire(&b->s->done) && rb_empty(rx)))
                break;
            wait_a_little(LOOK_AGAIN_EMPTY, &tries);
            continue;
        }
        tries = 0;
        for (int i = 0; i < n; i++) {
            failed += desc[i].ts != got + (uint64_t)i;
            if (b->o.touch)
                failed += read_packet(c->pool[0] + (uint64_t)desc[i].handle * BUFFER + 64, b->o.touch) != desc[i].ts * (b->o.touch / 64);
        }
        got += (uint64_t)n;
        rb_return(c, desc, n);
    }
    b->s->ended = rb_mono_ns();
    rb_set(&b->s->failed, failed);
    rb_store_release(&b->s->received, got);
    rb_store_release(&b->s->ready, 3);
    rb_cluster_close(c);
    return 0;
}

/* ---- round trips ----------------------------------------------------------------------------------------------------------------- */

#define ROUNDS 200000u

static void echo_back(struct bench *b)
{
    struct rb_ring in = b->ring, out = b->back;
    rb_desc d;
    for (uint32_t i = 0; i < ROUNDS; i++) {
        while (rb_ring_ready(&in, 1) == 0)
            rb_pause();
        rb_ring_read(&in, &d, 1);
        rb_ring_consumed(&in);
        read_packet(b->pool + (uint64_t)d.handle * BUFFER + 64, b->o.touch);
        rb_ring_write(&out, &d, 1);
        rb_ring_publish(&out);
    }
}

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static int round_trips(struct bench *b, rb_bench_result *result)
{
    struct rb_ring out = b->ring, in = b->back;
    uint64_t *ns = malloc(ROUNDS * sizeof *ns);
    if (!ns)
        return -ENOMEM;
    for (uint32_t i = 0; i < ROUNDS; i++) {
        rb_desc d = {.handle = 1, .word = 64, .ts = i};
        uint64_t t = rb_mono_ns();
        write_packet(b->pool + BUFFER + 64, b->o.touch, i);
        rb_ring_write(&out, &d, 1);
        rb_ring_publish(&out);
        while (rb_ring_ready(&in, 1) == 0)
            rb_pause();
        rb_ring_read(&in, &d, 1);
        rb_ring_consumed(&in);
        ns[i] = rb_mono_ns() - t;
    }
    qsort(ns, ROUNDS, sizeof *ns, by_value);
    static const double part[] = {0, 0.5, 0.99, 0.999, 1};
    for (int k = 0; k < 5; k++)
        result->latency_ns[k] = (double)ns[RB_MIN((uint32_t)(part[k] * ROUNDS), ROUNDS - 1)];
    result->packets = ROUNDS;
    free(ns);
    return 0;
}

/* ---- running the two ends -------------------------------------------------------------------------------------------------------- */

static void *other_end(void *arg)
{
    struct bench *b = arg;
    pin(b->o.cores[1] ? b->o.cores[1] - 1 : 1);
    if (b->o.latency)
        echo_back(b);
    else if (b->o.level == 3)
        consume_library(b);
    else {
        if (b->o.touch)
            consume(b, b->o.burst, b->o.touch);
        else if (b->o.burst == 32)
            consume(b, 32, 0);
        else
            consume(b, b->o.burst, 0);
        b->s->ended = rb_mono_ns();
    }
    return NULL;
}

static void ring_at(struct rb_ring *r, uint8_t *at, uint32_t slots)
{
    memset(r, 0, sizeof *r);
    r->ctl = (struct rb_ctl *)at;
    r->forward = (struct rb_slot *)(at + 4096);
    r->slots = slots;
    r->mask = slots - 1;
    r->returned = (uint32_t *)(at + 4096 + 16ull * slots);
    r->returns = (uint32_t)rb_pow2(credit_of(slots));
    r->rmask = r->returns - 1;
}

static int memory_of(struct bench *b)
{
    size_t ring = 4096 + 16ull * b->o.slots + 4ull * POOL;
    b->bytes = 4096 + 2 * ring + 8ull * POOL + 4096 + (size_t)POOL * BUFFER;
    b->memory = mmap(NULL, b->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (b->memory == MAP_FAILED)
        return rb_fail(errno, "no-memory", NULL, "no memory to measure with: %s", strerror(errno));
    b->s = (struct shared *)b->memory;
    ring_at(&b->ring, b->memory + 4096, b->o.slots);
    ring_at(&b->back, b->memory + 4096 + ring, b->o.slots);
    b->ledger = (rb_a64 *)(b->memory + 4096 + 2 * ring);
    b->book = (struct rb_book_record *)((uint8_t *)b->ledger + 8ull * POOL);
    b->committed = (rb_a32 *)((uint8_t *)b->book + 2048);
    b->pool = (uint8_t *)b->book + 4096;
    for (uint32_t i = 0; i < POOL; i++)
        rb_set(&b->ledger[i], RB_WORD(RB_W_HOME, 0));
    return 0;
}

static int bench_cluster(struct bench *b, rb_cluster **c)
{
    rb_cluster_options o = {.struct_size = sizeof o, .buffers = 2 * POOL, .queues = 1, .slots = b->o.slots, .pages = RB_PAGES_4K};
    int rc = -EEXIST;
    for (b->id = 65535; b->id > 65000 && rc == -EEXIST; b->id--)
        if ((rc = rb_cluster_create(b->id, &o, c)) == 0)
            break;
    return rc;
}

int rb_bench_ring(const rb_bench_options *options, rb_bench_result *result)
{
    struct bench b = {0};
    rb_cluster *c = NULL;
    cpu_set_t before;
    pthread_t thread;
    pid_t child = 0;
    memcpy(&b.o, options, RB_MIN(options->struct_size, sizeof b.o));
    memset(result, 0, sizeof *result);
    b.o.burst = b.o.burst ? b.o.burst : 32;
    b.o.slots = b.o.slots ? b.o.slots : 1024;
    b.o.seconds = b.o.seconds > 0 ? b.o.seconds : 0.5;
    if (b.o.burst > RB_MAX_BURST || b.o.slots < b.o.burst || b.o.slots > RB_MAX_SLOTS || (b.o.slots & (b.o.slots - 1)) || b.o.touch % 64 ||
        b.o.touch > 1024 || b.o.level > 3)
        return rb_fail(EINVAL, "bad-option", "burst 1 to 256, slots a power of two, touch a multiple of 64 up to 1024, level 0 to 3",
                       "these settings cannot be measured");
    int rc = memory_of(&b);
    if (rc == 0 && b.o.level == 3)
        rc = bench_cluster(&b, &c);
    if (rc < 0)
        goto out;
    sched_getaffinity(0, sizeof before, &before);
    if (b.o.processes) {
        child = fork();
        if (child == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            other_end(&b);
            _exit(0);
        }
        rc = child < 0 ? rb_fail(errno, "failed", NULL, "no process could be started: %s", strerror(errno)) : 0;
    } else if ((rc = pthread_create(&thread, NULL, other_end, &b)) != 0)
        rc = rb_fail(rc, "failed", NULL, "no thread could be started: %s", strerror(rc));
    if (rc < 0)
        goto out;
    pin(b.o.cores[0] ? b.o.cores[0] - 1 : 0);
    if (b.o.latency)
        rc = round_trips(&b, result);
    else if (b.o.level == 3)
        rc = produce_library(&b, c);
    else {
        b.s->started = rb_mono_ns();
        b.o.burst == 32 ? produce_at(&b, 32) : produce_at(&b, b.o.burst);
        rb_store_release(&b.s->done, 1);
    }
    if (child > 0)
        while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
            ;
    else
        pthread_join(thread, NULL);
    sched_setaffinity(0, sizeof before, &before);
    if (!b.o.latency) {
        result->packets = rb_load_acquire(&b.s->received);
        result->checks_failed = rb_get(&b.s->failed);
        result->seconds = (double)(b.s->ended - b.s->started) / 1e9;
        if (result->seconds > 0 && result->packets) {
            result->mpps = (double)result->packets / result->seconds / 1e6;
            result->ns_per_packet = 1000 / result->mpps;
        }
    }
out:
    if (c)
        rb_cluster_close(c);
    if (b.memory && b.memory != MAP_FAILED)
        munmap(b.memory, b.bytes);
    return rc;
}
