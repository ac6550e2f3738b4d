/* SPDX-License-Identifier: Apache-2.0
 *
 * For tests that look inside: a checker that finds every buffer of a cluster exactly once, packets that prove themselves, and processes that can be
 * killed after any machine instruction.
 */
#ifndef WORLD_H
#define WORLD_H
#include "check.h"
#include "rb_internal.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>

static inline rb_cluster *make_cluster(uint32_t id, uint32_t buffers, uint32_t queues, uint32_t slots)
{
    rb_cluster_options o = {.struct_size = sizeof o, .buffers = buffers, .buffer_size = 256, .queues = queues, .slots = slots, .pages = RB_PAGES_4K, .persistent = 1};
    rb_cluster *c;
    OK(rb_cluster_create(id, &o, &c));
    return c;
}

static inline rb_end *open_end(rb_cluster *c, uint32_t queue, uint32_t flags)
{
    char address[32];
    rb_end *end;
    snprintf(address, sizeof address, "%u@%u", c->id, queue);
    OK(rb_open(&end, c, address, flags));
    return end;
}

/* ---- packets that prove themselves -------------------------------------------------------------------------- */

struct packet {
    uint64_t sequence, check;
    uint8_t body[48];
};

static inline uint64_t packet_sum(const struct packet *p)
{
    uint64_t h = p->sequence * 0x9e3779b97f4a7c15ull;
    for (size_t i = 0; i < sizeof p->body; i++)
        h = (h ^ p->body[i]) * 0x100000001b3ull;
    return h;
}

static inline void packet_write(rb_cluster *c, rb_desc *d, uint64_t sequence)
{
    rb_desc_set(d, sizeof(struct packet), rb_desc_offset(d) ? rb_desc_offset(d) : RB_BUFFER_HEADER, 0);
    struct packet *p = rb_data(c, d);
    CHECK(p);
    p->sequence = sequence;
    for (size_t i = 0; i < sizeof p->body; i++)
        p->body[i] = (uint8_t)(sequence * 31 + i * 7);
    p->check = packet_sum(p);
}

/* Its sequence number; the test fails when it is not what somebody wrote. */
static inline uint64_t packet_read(rb_cluster *c, const rb_desc *d)
{
    CHECK(rb_desc_length(d) == sizeof(struct packet));
    const struct packet *p = rb_data(c, d);
    CHECK(p && p->check == packet_sum(p));
    return p->sequence;
}

/* n new packets out on `tx`, numbered from *sequence. Returns how many went. */
static inline int send_packets(rb_end *tx, int n, uint64_t *sequence)
{
    rb_desc d[256];
    int got = rb_alloc(tx, d, n), sent;
    OK(got);
    for (int i = 0; i < got; i++)
        packet_write(tx->c, &d[i], *sequence + (uint64_t)i);
    OK(sent = rb_send(tx, d, got, 0));
    rb_return(tx->c, d + sent, got - sent);
    *sequence += (uint64_t)sent;
    return sent;
}

/* ---- conservation ---------------------------------------------------------------------------------------------- */

struct census {
    uint32_t nobody, free, lent, shared, quarantined, devices, unread, returned, held;
};

/* In which rings each buffer was met. */
struct met {
    uint32_t *first; /* per buffer: entry + 1 */
    struct met_entry {
        uint32_t leg, next;
    } *entry;
    uint32_t entries;
};

static inline int met_on(const struct met *m, uint32_t at, uint32_t leg)
{
    for (uint32_t i = m->first[at]; i; i = m->entry[i - 1].next)
        if (m->entry[i - 1].leg == leg)
            return 1;
    return 0;
}

static inline void census_ring(rb_cluster *c, uint32_t leg, uint32_t handle, struct met *m, uint32_t *count)
{
    uint32_t at = rb_number(c, handle);
    if (!handle)
        return;
    CHECK(at != UINT32_MAX);
    if (met_on(m, at, leg))
        fprintf(stderr, "buffer %u is in the rings of leg %u twice\n", at, leg);
    CHECK(!met_on(m, at, leg));
    CHECK((m->entry = realloc(m->entry, (m->entries + 1) * sizeof *m->entry)) != NULL);
    m->entry[m->entries++] = (struct met_entry){leg, m->first[at]};
    m->first[at] = m->entries;
    (*count)++;
}

/* Where a loan on `leg` of `book` ends: along the chain of loans, which branches where a buffer is shared. */
static inline void census_ends(rb_cluster *c, uint32_t at, uint32_t book, uint32_t leg, uint32_t *end, uint32_t *ends, int hops)
{
    struct rb_state *s = c->reg->state;
    CHECK(hops < 8 && *ends < 256);
    CHECK(rb_leg_of(c, leg)->kind != RB_LEG_NONE && rb_get(&rb_leg_of(c, leg)->book) == book);
    uint32_t next = rb_get(&rb_leg_of(c, leg)->client_book);
    uint64_t v = next ? rb_get(&c->reg->ledgers[(uint64_t)(next - 1) * s->capacity + at]) : 0;
    if (!RB_WORD_SUBKIND(v) || RB_WORD_ORIGIN(v) != leg) {
        end[(*ends)++] = leg;
        return;
    }
    if (RB_WORD_SUBKIND(v) == RB_W_LENT) {
        census_ends(c, at, next, RB_WORD_SUBLEG(v), end, ends, hops + 1);
        return;
    }
    if (RB_WORD_SUBKIND(v) != RB_SUB_SHARED)
        return;
    uint64_t mask = rb_get(&c->reg->masks[(uint64_t)(next - 1) * s->capacity + at]);
    CHECK(mask);
    for (; mask; mask &= mask - 1) {
        uint32_t to = rb_get(&s->book[next - 1].output[__builtin_ctzll(mask)]);
        CHECK(to);
        if (!(to & RB_OUTPUT_DEVICE))
            census_ends(c, at, next, to - 1, end, ends, hops + 1);
    }
}

/* Every buffer of the cluster, exactly once: nobody's, home and in no ring, or lent and, at each end of its loans, in the rings of that leg or in a
 * hand. A shared one as often as its masks say. Only while nobody moves anything. */
static inline struct census check_conservation(rb_cluster *c)
{
    struct census n = {0};
    struct rb_state *s = c->reg->state;
    rb_pools_look(c);
    struct met met = {.first = calloc(c->buffers, sizeof *met.first)};
    uint32_t exist = 0;
    CHECK(met.first && rb_enter(c->reg) == 0);
    for (uint32_t l = 0; l < RB_MAX_LEGS; l++) {
        struct rb_leg *leg = rb_leg_of(c, l);
        struct rb_ring r;
        if (!leg->kind || leg->kind == RB_LEG_DIRECT || rb_place_ring(c, rb_get(&leg->place), &r, NULL) < 0)
            continue;
        uint32_t p = rb_get(&r.ctl->p), from = rb_get(&r.ctl->c), rp = rb_get(&r.ctl->rp), rc = rb_get(&r.ctl->rc);
        if (p - from <= r.slots)
            for (uint32_t i = from; i != p; i++)
                census_ring(c, l, r.forward[i & r.mask].handle, &met, &n.unread);
        if (rp - rc <= r.returns)
            for (uint32_t i = rc; i != rp; i++)
                census_ring(c, l, r.returned[i & r.rmask], &met, &n.returned);
    }
    for (uint32_t at = 0; at < c->buffers; at++) {
        uint32_t book = c->reg->extent[at / RB_EXTENT], end[256], ends = 0;
        if (rb_number(c, rb_handle_of(c, at)) != at)
            continue;
        exist++;
        if (!book) {
            CHECK(!met.first[at]);
            n.nobody++;
            continue;
        }
        CHECK(s->book[book - 1].used);
        uint64_t w = rb_get(&c->reg->ledgers[(uint64_t)(book - 1) * s->capacity + at]);
        switch (RB_WORD_KIND(w)) {
        case RB_W_HOME:
            if (met.first[at])
                fprintf(stderr, "buffer %u is home in book %u and in the rings of leg %u\n", at, book - 1, met.entry[met.first[at] - 1].leg);
            CHECK(!met.first[at]);
            n.free++;
            break;
        case RB_W_SHARED: {
            uint64_t mask = rb_get(&c->reg->masks[(uint64_t)(book - 1) * s->capacity + at]);
            CHECK(mask);
            for (; mask; mask &= mask - 1) {
                uint32_t to = rb_get(&s->book[book - 1].output[__builtin_ctzll(mask)]);
                CHECK(to);
                if (!(to & RB_OUTPUT_DEVICE))
                    census_ends(c, at, book, to - 1, end, &ends, 0);
            }
            n.shared++;
            goto lent;
        }
        case RB_W_LENT:
            census_ends(c, at, book, RB_WORD_LEG(w), end, &ends, 0);
        lent:
            n.lent++;
            for (uint32_t i = met.first[at]; i; i = met.entry[i - 1].next) {
                uint32_t leg = met.entry[i - 1].leg, found = 0;
                for (uint32_t k = 0; k < ends; k++) { /* a VM sends on whichever leg of its domain */
                    uint32_t domain = s->lane[rb_get(&rb_leg_of(c, end[k])->place) >> 32].domain;
                    found |= end[k] == leg || (domain && domain == s->lane[rb_get(&rb_leg_of(c, leg)->place) >> 32].domain);
                }
                if (!found)
                    fprintf(stderr, "buffer %u is in the rings of leg %u, where it is not lent: the word is %llx, %u ends, the first %u\n", at, leg,
                            (unsigned long long)w, ends, end[0]);
                CHECK(found);
            }
            for (uint32_t k = 0; k < ends; k++)
                n.held += !met_on(&met, at, end[k]);
            break;
        case RB_W_QUARANTINED:
            n.quarantined++;
            break;
        case RB_W_DEVICE:
            n.devices++;
            break;
        default:
            fprintf(stderr, "buffer %u: book %u has the word %llx\n", at, book - 1, (unsigned long long)w);
            CHECK(!"a word that nobody writes");
        }
    }
    CHECK(n.nobody + n.free + n.lent + n.quarantined + n.devices == exist);
    rb_leave(c->reg);
    free(met.first);
    free(met.entry);
    return n;
}

/* Nothing is lent, and after the last server has left all belongs to nobody again. */
static inline void check_all_home(rb_cluster *c)
{
    struct census n = check_conservation(c);
    CHECK(n.lent == 0 && n.unread == 0 && n.returned == 0 && n.quarantined == 0 && n.devices == 0);
    OK(rb_reap_all(c));
    rb_book_info b[RB_MAX_BOOKS];
    int books = rb_book_list(c, b, RB_MAX_BOOKS);
    for (int i = 0; i < books; i++)
        CHECK(b[i].home == b[i].free && b[i].lent == 0);
    if (!books) {
        n = check_conservation(c);
        CHECK(n.free == 0 && n.lent == 0);
    }
}

/* ---- processes ----------------------------------------------------------------------------------------------------- */

static inline uint64_t test_random(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

static inline void *shared_memory(size_t size)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(p != MAP_FAILED);
    return p;
}

static inline void must_exit_well(pid_t pid)
{
    int status;
    CHECK(waitpid(pid, &status, 0) == pid);
    if (!WIFEXITED(status) || WEXITSTATUS(status))
        fprintf(stderr, "process %d: status %x\n", (int)pid, (unsigned)status);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* Runs `op` in a child that is killed after `steps` machine instructions of it, or -steps nanoseconds where that is negative. `prepare` runs
 * whole. Returns the instructions that were executed, and in *whole whether op came to its end. */
static inline long killed_after(long steps, void (*prepare)(void), void (*op)(void), int *whole)
{
    int status;
    long n = 0;
    fflush(stdout);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) != 0)
            _exit(77);
        prepare();
        raise(SIGSTOP);
        op();
        raise(SIGSTOP);
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77) {
        printf("skipped: ptrace is not permitted here\n");
        exit(77);
    }
    CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP);
    *whole = 0;
    if (steps < 0) {
        uint64_t until = rb_mono_ns() + (uint64_t)-steps;
        CHECK(ptrace(PTRACE_CONT, pid, NULL, NULL) == 0);
        while (rb_mono_ns() < until)
            rb_pause();
    }
    while (n < steps) {
        CHECK(ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL) == 0);
        CHECK(waitpid(pid, &status, 0) == pid);
        CHECK(WIFSTOPPED(status));
        if (WSTOPSIG(status) == SIGSTOP) {
            *whole = 1;
            break;
        }
        CHECK(WSTOPSIG(status) == SIGTRAP);
        n++;
    }
    CHECK(kill(pid, SIGKILL) == 0);
    CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
    return n;
}
/* ---- VMs without a VM ------------------------------------------------------------------------------------------ */

/* What a program in VM `lane` sees, by the functions of a PCI slot: that lane, direct lanes if `direct`, and the pools, of which a VM with one of its
 * own writes only that; its locks are in a directory of its own. */
static inline rb_cluster *attach_guest(rb_cluster *host, int lane, int direct)
{
    rb_segment_info info[32];
    rb_segment seg[8] = {0};
    char dir[128];
    rb_cluster *guest;
    int n = rb_cluster_segments(host, info, 32), k = 0, own = (int)rb_pool_own(host, (uint32_t)lane);
    for (int pass = 0; pass < 3; pass++) /* the lane, the pools, what is left */
        for (int i = 0; i < n; i++) {
            int of = info[i].kind == 1 ? 1 : (int)info[i].id == lane ? 0 : direct && strncmp(info[i].vm, "direct:", 7) == 0 ? 2 : 3;
            int writable = info[i].kind != 1 || (int)info[i].id == own;
            uint32_t function = of == 1 ? info[i].id + 1 : 0;
            if (info[i].state != RB_SEG_OPEN || of != pass)
                continue;
            for (int taken = of == 2; taken;) {
                taken = 0;
                for (int j = 0; j < k; j++)
                    taken |= seg[j].function == function;
                function += (uint32_t)taken;
            }
            int fd = open(info[i].path, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
            CHECK(fd >= 0 && k < 8);
            seg[k++] = (rb_segment){sizeof seg[0], fd, 0, info[i].size, (uint32_t)writable, 1, function};
        }
    snprintf(dir, sizeof dir, "%s/guest%d", test_dir, lane);
    setenv("RINGBAR_RUN", dir, 1);
    OK(rb_cluster_attach_segments(host->id, seg, (uint32_t)k, &guest));
    setenv("RINGBAR_RUN", test_dir, 1);
    while (k)
        close(seg[--k].fd);
    return guest;
}
#endif
