/* SPDX-License-Identifier: Apache-2.0 */
/* What test_xdp.c's commands have in common: options, memory, devices opened and closed, stacks of buffers, frames with a pattern. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/capability.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "xdp_abi.h"

#define HEADER 64u
#define CANARY 0xa5
#define BURST 64u
#define DEADLINE_S 20.0

static const struct rb_xdp_ops *ops;
static struct {
    const char *netns, *ifname, *peer, *out, *end, *broken;
    uint32_t mode, chunk, flags, queue, count, length;
    double seconds;
    bool huge;
} opt = {.chunk = 2048, .flags = RB_XDP_RX, .queue = RB_XDP_ALL_QUEUES, .count = 10000, .length = 64, .seconds = 2};

static int first_netns;
static uint8_t *memory;
static uint64_t memory_size;

__attribute__((format(printf, 1, 2), noreturn)) static void die(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    fputs("test_xdp: ", stderr);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fputc('\n', stderr);
    exit(1);
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void print_string(const char *name, const char *s)
{
    printf("\"%s\": \"", name);
    for (; *s; s++)
        if (*s == '"' || *s == '\\')
            printf("\\%c", *s);
        else
            putchar(*s);
    printf("\"");
}

static void print_error(int r, const struct rb_xdp_error *e)
{
    printf("{\"result\": %d, \"errno\": \"%s\", \"holder\": %d, ", r, r < 0 ? strerrorname_np(-r) : "", e->holder);
    print_string("text", e->text);
    printf(", ");
    print_string("cure", e->cure);
    printf("}\n");
    fflush(stdout);
}

static void make_memory(uint32_t buffers)
{
    unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | (opt.huge ? MFD_HUGETLB : 0);
    int fd = memfd_create("test_xdp", flags);

    memory_size = (uint64_t)buffers * opt.chunk;
    if (opt.huge)
        memory_size = (memory_size + (2u << 20) - 1) & ~((2ull << 20) - 1);
    if (fd < 0 || ftruncate(fd, (off_t)memory_size) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW))
        die("memfd of %llu bytes: %s", (unsigned long long)memory_size, strerror(errno));
    int prot = opt.broken && !strcmp(opt.broken, "ro") ? PROT_READ : PROT_READ | PROT_WRITE;
    memory = mmap(NULL, memory_size, prot, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        die("mmap: %s", strerror(errno));
    close(fd);
    for (uint32_t i = 0; prot & PROT_WRITE && i < buffers; i++)
        memset(memory + (uint64_t)i * opt.chunk, CANARY, HEADER);
}

static bool header_intact(uint64_t addr)
{
    const uint8_t *h = memory + addr / opt.chunk * opt.chunk;

    for (unsigned i = 0; i < HEADER; i++)
        if (h[i] != CANARY)
            return false;
    return true;
}

static int try_open(const char *ifname, uint32_t flags, struct rb_xdp **dev, struct rb_xdp_error *err)
{
    struct rb_xdp_options o = {
        .size = sizeof o,
        .ifname = ifname,
        .umem_base = memory,
        .umem_size = memory_size,
        .chunk_size = opt.chunk,
        .headroom = HEADER,
        .queue = opt.queue,
        .flags = flags,
        .mode = opt.mode,
    };

    if (opt.broken && !strcmp(opt.broken, "memory"))
        o.umem_base = memory + 8;
    if (opt.broken && !strcmp(opt.broken, "size"))
        o.umem_size -= 8;
    if (opt.broken && !strcmp(opt.broken, "ring"))
        o.tx_size = 1000;
    memset(err, 0x55, sizeof *err); /* the call must set all of it */
    return ops->open(&o, dev, err);
}

static struct rb_xdp *must_open(const char *ifname, uint32_t flags)
{
    struct rb_xdp_error err;
    struct rb_xdp *dev;
    int r = try_open(ifname, flags, &dev, &err);

    if (r) {
        print_error(r, &err);
        die("open %s: %s; %s", ifname, err.text, err.cure);
    }
    return dev;
}

static void must_close(struct rb_xdp *dev)
{
    struct rb_xdp_error err;
    int r = ops->close(dev, &err);

    if (r)
        die("close: %d %s", r, err.text);
}

static void print_info(const char *name, struct rb_xdp *dev)
{
    struct rb_xdp_info i;
    struct rb_xdp_stats s;

    ops->info(dev, &i);
    if (ops->stats(dev, &s))
        die("no statistics");
    if (strcmp(i.mode, ops->mode(dev)))
        die("info says %s, mode says %s", i.mode, ops->mode(dev));
    printf("\"%s\": {\"mode\": \"%s\", \"queues\": %u, \"dispatcher\": %s, \"receives\": %s, \"needs_fill\": %s, "
           "\"max_frame\": %u, \"mtu\": %u, \"rx_dropped\": %llu, \"fill_empty\": %llu, \"tx_invalid\": %llu, "
           "\"ring_full\": %llu, \"kicks\": %llu, ",
           name, i.mode, i.queues, i.dispatcher ? "true" : "false", i.receives ? "true" : "false",
           i.needs_fill ? "true" : "false", i.max_frame, i.mtu, (unsigned long long)s.rx_dropped,
           (unsigned long long)s.rx_fill_ring_empty_descs, (unsigned long long)s.tx_invalid_descs,
           (unsigned long long)s.rx_ring_full, (unsigned long long)s.kicks);
    print_string("note", i.note);
    printf("}");
}

/* ---- buffers: a stack of free ones, and who has each ---- */

struct stack {
    uint64_t addr[8192];
    uint32_t n;
};

static void put_back(struct stack *s, uint64_t addr)
{
    s->addr[s->n++] = addr / opt.chunk * opt.chunk;
}

static struct stack *stack_of(uint32_t first, uint32_t count)
{
    struct stack *s = calloc(1, sizeof *s);

    for (uint32_t i = 0; i < count; i++)
        put_back(s, (uint64_t)(first + i) * opt.chunk);
    return s;
}

static void fill_from(struct rb_xdp *dev, struct stack *s)
{
    uint32_t room = ops->fill_space(dev), want = s->n < room ? s->n : room;

    if (!want)
        return;
    uint32_t got = ops->fill(dev, s->addr + (s->n - want), want);
    if (got != want) /* there was room: all must be taken, but take the tail off only for what was */
        die("fill took %u of %u with room for %u", got, want, room);
    s->n -= got;
    int r = ops->wake(dev, RB_XDP_RX);
    if (r && r != -EAGAIN)
        die("wake for receive: %s", strerror(-r));
}

static uint8_t pattern(uint32_t seq, uint32_t i)
{
    return (uint8_t)(seq * 2654435761u >> 24) ^ (uint8_t)(i * 31);
}

/* An Ethernet frame of a local experimental type with a sequence number and bytes that follow from it. */
static void write_frame(uint8_t *p, uint32_t seq, uint32_t len)
{
    static const uint8_t head[14] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x88, 0xb5};

    memcpy(p, head, sizeof head);
    memcpy(p + 14, &seq, 4);
    for (uint32_t i = 18; i < len; i++)
        p[i] = pattern(seq, i);
}

static bool check_frame(const uint8_t *p, uint32_t len, uint32_t want_len, uint32_t *seq)
{
    if (len != want_len || p[12] != 0x88 || p[13] != 0xb5)
        return false;
    memcpy(seq, p + 14, 4);
    for (uint32_t i = 18; i < len; i++)
        if (p[i] != pattern(*seq, i))
            return false;
    return true;
}

static bool is_test_frame(const uint8_t *p, uint32_t len)
{
    return len >= 18 && p[12] == 0x88 && p[13] == 0xb5;
}

/* Send up to a burst of new frames; the sequence goes on. */
static uint32_t send_some(struct rb_xdp *dev, struct stack *s, uint32_t *seq, uint32_t count, uint32_t length)
{
    struct rb_xdp_frame f[BURST];
    uint32_t n = count - *seq, at = HEADER + RB_XDP_KERNEL_HEADROOM;

    n = n < BURST ? n : BURST;
    n = n < s->n ? n : s->n;
    n = n < ops->tx_space(dev, n) ? n : ops->tx_space(dev, n);
    for (uint32_t i = 0; i < n; i++) {
        f[i] = (struct rb_xdp_frame){.addr = s->addr[s->n - 1 - i] + at, .len = length};
        write_frame(memory + f[i].addr, *seq + i, length);
    }
    int k = n ? ops->send(dev, f, n) : 0;
    if (k != (int)n)
        die("send took %d of %u with room", k, n);
    s->n -= n;
    *seq += n;
    int r = ops->wake(dev, RB_XDP_TX);
    if (r && r != -EAGAIN)
        die("wake for send: %s", strerror(-r));
    return n;
}

static void take_completions(struct rb_xdp *dev, struct stack *s)
{
    uint64_t addrs[BURST];
    uint32_t n;

    while ((n = ops->complete(dev, addrs, BURST)))
        for (uint32_t i = 0; i < n; i++)
            put_back(s, addrs[i]);
}

static void wait_for(struct rb_xdp *dev)
{
    struct pollfd p[8];
    int fds[8];
    uint32_t n = ops->fds(dev, fds, 8);

    for (uint32_t i = 0; i < n && i < 8; i++)
        p[i] = (struct pollfd){.fd = fds[i], .events = POLLIN};
    poll(p, n < 8 ? n : 8, 10);
}

/* ---- commands ---- */
