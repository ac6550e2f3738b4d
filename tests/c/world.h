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
    uint32_t nobody, free, lent, quarantined, devices, unread, returned, held;
};

static void census_ring(rb_cluster *c, uint32_t leg, uint32_t handle, uint16_t *seen, uint32_t *count)
{
    uint32_t at = rb_number(c, handle);
    if (!handle)
        return;
    CHECK(at != UINT32_MAX);
    if (seen[at])
        fprintf(stderr, "buffer %u is in the rings of leg %u and again in those of leg %u\n", at, seen[at] - 1u, leg);
    CHECK(!seen[at]);
    seen[at] = (uint16_t)(leg + 1);
    (*count)++;
}

/* Every buffer of the cluster, exactly once: nobody's, home and in no ring, or lent on one leg and, along the chain of loans, in the rings of the last leg
 * or in a hand. Only while nobody moves anything. */
static inline struct census check_conservation(rb_cluster *c)
{
    struct census n = {0};
    struct rb_state *s = c->reg->state;
    uint16_t *seen = calloc(c->buffers, sizeof *seen);
    uint32_t exist = 0;
    CHECK(seen && rb_enter(c->reg) == 0);
    for (uint32_t l = 0; l < RB_MAX_LEGS; l++) {
        struct rb_leg *leg = rb_leg_of(c, l);
        struct rb_ring r;
        if (!leg->kind || leg->kind == RB_LEG_DIRECT || rb_place_ring(c, rb_get(&leg->place), &r, NULL) < 0)
            continue;
        uint32_t p = rb_get(&r.ctl->p), from = rb_get(&r.ctl->c), rp = rb_get(&r.ctl->rp), rc = rb_get(&r.ctl->rc);
        if (p - from <= r.slots)
            for (uint32_t i = from; i != p; i++)
                census_ring(c, l, r.forward[i & r.mask].handle, seen, &n.unread);
        if (rp - rc <= r.returns)
            for (uint32_t i = rc; i != rp; i++)
                census_ring(c, l, r.returned[i & r.rmask], seen, &n.returned);
    }
    for (uint32_t at = 0; at < c->buffers; at++) {
        uint32_t book = c->reg->extent[at / RB_EXTENT];
        if (rb_number(c, rb_handle_of(c, at)) != at)
            continue;
        exist++;
        if (!book) {
            CHECK(!seen[at]);
            n.nobody++;
            continue;
        }
        CHECK(s->book[book - 1].used);
        uint64_t w = rb_get(&c->reg->ledgers[(uint64_t)(book - 1) * s->capacity + at]);
        switch (RB_WORD_KIND(w)) {
        case RB_W_HOME:
            if (seen[at])
                fprintf(stderr, "buffer %u is home in book %u and in the rings of leg %u\n", at, book - 1, seen[at] - 1u);
            CHECK(!seen[at]);
            n.free++;
            break;
        case RB_W_LENT: {
            uint32_t leg = RB_WORD_LEG(w), from = book;
            for (int hops = 0; hops < 8; hops++) { /* along the chain of loans */
                CHECK(rb_leg_of(c, leg)->kind != RB_LEG_NONE && rb_get(&rb_leg_of(c, leg)->book) == from);
                uint32_t next = rb_get(&rb_leg_of(c, leg)->client_book);
                uint64_t v = next ? rb_get(&c->reg->ledgers[(uint64_t)(next - 1) * s->capacity + at]) : 0;
                if (!RB_WORD_SUBKIND(v) || RB_WORD_ORIGIN(v) != leg)
                    break;
                leg = RB_WORD_SUBLEG(v);
                from = next;
            }
            /* A VM sends on whichever leg of its domain. */
            int vm = s->lane[rb_get(&rb_leg_of(c, leg)->place) >> 32].domain != 0;
            if (seen[at] && !vm && seen[at] != leg + 1)
                fprintf(stderr, "buffer %u is lent on leg %u and in the rings of leg %u\n", at, leg, seen[at] - 1u);
            CHECK(!seen[at] || vm || seen[at] == leg + 1);
            n.lent++;
            n.held += !seen[at];
            break;
        }
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
    free(seen);
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

/* What a program in VM `lane` sees: that lane, direct lanes if `direct`, and the pool; its locks are in a directory of its own. */
static inline rb_cluster *attach_guest(rb_cluster *host, int lane, int direct)
{
    rb_segment_info info[32];
    rb_segment seg[8];
    char dir[128];
    rb_cluster *guest;
    int n = rb_cluster_segments(host, info, 32), k = 0;
    for (int i = 0; i < n; i++)
        if (info[i].kind == 1 || (int)info[i].id == lane || (direct && strncmp(info[i].vm, "direct:", 7) == 0)) {
            int fd = open(info[i].path, O_RDWR | O_CLOEXEC);
            CHECK(fd >= 0 && k < 8);
            seg[k++] = (rb_segment){sizeof seg[0], fd, 0, info[i].size, 1};
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
