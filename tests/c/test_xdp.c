/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Drives the AF_XDP plug-in without the core, inside a network namespace made by tests/integration/test_xdp_plugin.py.
 *
 *   test_xdp PLUGIN COMMAND [--netns NAME] [--if A] [--peer B] [--out C] [--end D] [--mode M] [--chunk N] [--huge]
 *            [--flags rx|tx|rxtx] [--queue N] [--count N] [--length N] [--seconds S] [--broken HOW]
 *
 *   pair     send COUNT frames from A, receive them on B, check every byte and both buffer headers, give all back
 *   forward  the same through a bridge: A -> B, the *same buffer* out of C -> D; two UMEMs on one memory
 *   addrx    open A to send only, send, then let it receive too
 *   hold     open A, say so, receive until standard input ends, close, report
 *   orphan   as hold, but a forked child outlives this process
 *   try      open A and close it at once; --broken memory|ro|size|ring|memlock|capabilities|bpf|netns spoils something first
 *   fill-first   open A, look that packets still reach the stack before the first fill (the caller looks), then fill
 *   bad-tx   frames that may not be sent are refused, none is lost
 *   cleanup | attached | probe
 *   bench    64-byte frames A -> B -> C -> D for SECONDS: generator thread, forwarder thread
 *
 * Prints one JSON document a line; the exit status is 0 when all was as it should be, 1 otherwise.
 */
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
    n = n < ops->tx_space(dev) ? n : ops->tx_space(dev);
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

static int run_pair(bool through)
{
    make_memory(8192);
    struct stack *a = stack_of(1, 2000), *b = stack_of(2001, 4000);
    struct rb_xdp *ta = must_open(opt.ifname, RB_XDP_TX), *rb = must_open(opt.peer, RB_XDP_RX);
    struct rb_xdp *tc = through ? must_open(opt.out, RB_XDP_TX) : NULL;
    struct rb_xdp *rd = through ? must_open(opt.end, RB_XDP_RX) : NULL;
    struct stack *d = through ? stack_of(6001, 2000) : NULL;
    uint32_t seq = 0, received = 0, expected = 0, bad = 0, reordered = 0, headers = 0, noise = 0, seen = 0;
    double start = now(), until = start + DEADLINE_S, took = 0;

    fill_from(rb, b);
    if (through)
        fill_from(rd, d);
    while (received < opt.count && now() < until) {
        struct rb_xdp *rx = through ? rd : rb;
        struct stack *home = through ? d : b;
        struct rb_xdp_frame f[BURST];
        uint32_t n;

        if (seq - received < 1024) /* never more on the way than the rings hold: nothing may be lost */
            send_some(ta, a, &seq, opt.count, opt.length);
        take_completions(ta, a);
        if (through) {
            uint32_t room = ops->tx_space(tc);

            n = ops->recv(rb, f, room < BURST ? room : BURST);
            for (uint32_t i = 0; i < n; i++)
                if (is_test_frame(memory + f[i].addr, f[i].len)) {
                    if (ops->send(tc, &f[i], 1) != 1)
                        die("a received frame could not be sent on");
                } else {
                    put_back(b, f[i].addr);
                }
            int r = ops->wake(tc, RB_XDP_TX);
            if (r && r != -EAGAIN)
                die("wake for send: %s", strerror(-r));
            take_completions(tc, b);
            fill_from(rb, b);
        }
        n = ops->recv(rx, f, BURST);
        for (uint32_t i = 0; i < n; i++) {
            if (!is_test_frame(memory + f[i].addr, f[i].len)) {
                noise++; /* the kernel's own, such as router solicitations */
            } else {
                bad += !check_frame(memory + f[i].addr, f[i].len, opt.length, &seen);
                reordered += seen != expected;
                expected = seen + 1;
                received++;
            }
            headers += !header_intact(f[i].addr);
            put_back(home, f[i].addr);
        }
        fill_from(rx, home);
        if (!n)
            wait_for(rx);
    }
    took = now() - start;
    while (ops->tx_pending(ta) && now() < until)
        ops->wake(ta, RB_XDP_TX), take_completions(ta, a);
    printf("{\"sent\": %u, \"received\": %u, \"bad\": %u, \"reordered\": %u, \"headers_touched\": %u, \"noise\": %u, "
           "\"senders_buffers_back\": %u, \"mpps\": %.3f, ", seq, received, bad, reordered, headers, noise, a->n,
           (double)received / took / 1e6);
    print_info("tx", ta);
    printf(", ");
    print_info("rx", through ? rd : rb);
    printf("}\n");
    bool good = seq == opt.count && received == seq && !bad && !reordered && !headers && a->n == 2000;
    must_close(ta);
    must_close(rb);
    if (through) {
        must_close(tc);
        must_close(rd);
    }
    free(a);
    free(b);
    free(d);
    return !good;
}

static int run_addrx(void)
{
    struct rb_xdp_error err;

    make_memory(4096);
    struct stack *a = stack_of(1, 1000), *b = stack_of(1001, 1000);
    struct rb_xdp *dev = must_open(opt.ifname, RB_XDP_TX);
    uint32_t seq = 0, received = 0;
    double until = now() + DEADLINE_S;

    if (ops->attached(opt.ifname))
        die("a device that only sends has attached a program");
    send_some(dev, a, &seq, 10, 64);
    int r = ops->add_rx(dev, RB_XDP_ALL_QUEUES, &err);
    if (r)
        die("add_rx: %s", err.text);
    if (ops->add_rx(dev, RB_XDP_ALL_QUEUES, &err) || !ops->attached(opt.ifname))
        die("add_rx again changed something");
    fill_from(dev, b);
    printf("{\"ready\": true}\n"); /* the caller now sends to us until we have seen COUNT packets */
    fflush(stdout);
    while (received < opt.count && now() < until) {
        struct rb_xdp_frame f[BURST];
        uint32_t n = ops->recv(dev, f, BURST);

        for (uint32_t i = 0; i < n; i++)
            put_back(b, f[i].addr);
        received += n;
        fill_from(dev, b);
        if (!n)
            wait_for(dev);
    }
    printf("{\"received\": %u, ", received);
    print_info("dev", dev);
    printf("}\n");
    must_close(dev);
    free(a);
    free(b);
    return received < opt.count;
}

static int run_hold(bool orphan, bool wait_to_fill)
{
    make_memory(4096);
    struct stack *s = stack_of(1, 4000);
    struct rb_xdp *dev = must_open(opt.ifname, opt.flags);
    uint64_t received = 0;
    char c;
    pid_t child = 0;

    if (!wait_to_fill && opt.flags & RB_XDP_RX)
        fill_from(dev, s);
    if (orphan) {
        int ready[2];

        if (pipe2(ready, O_CLOEXEC))
            die("pipe: %s", strerror(errno));
        child = fork();
        if (!child) { /* dead in the child: every verb must be harmless */
            struct rb_xdp_frame f[4];
            uint64_t addr = 0;
            int fds[4];
            bool quiet = !ops->recv(dev, f, 4) && !ops->fill(dev, &addr, 1) && ops->send(dev, f, 1) == -ENODEV &&
                         !ops->complete(dev, &addr, 1) && ops->wake(dev, RB_XDP_RX | RB_XDP_TX) == -ENODEV &&
                         !ops->tx_space(dev) && !ops->fill_space(dev) && !ops->fds(dev, fds, 4);

            if (write(ready[1], quiet ? "y" : "n", 1) != 1)
                _exit(1);
            close(STDOUT_FILENO);
            pause(); /* outlives its parent, until the caller kills it */
            _exit(0);
        }
        if (read(ready[0], &c, 1) != 1 || c != 'y')
            die("the device is not dead in the forked child");
    }
    printf("{\"ready\": true, \"child\": %d, ", child);
    print_info("dev", dev);
    printf("}\n");
    fflush(stdout);
    for (;;) {
        struct rb_xdp_frame f[BURST];
        struct pollfd p[2] = {{.fd = STDIN_FILENO, .events = POLLIN}, {.fd = -1, .events = POLLIN}};
        uint32_t n;

        ops->fds(dev, &p[1].fd, 1);
        poll(p, 2, 1000);
        if (p[0].revents) {
            if (read(STDIN_FILENO, &c, 1) <= 0)
                break;
            if (c == 'f') { /* fill now, and say so */
                fill_from(dev, s);
                printf("{\"filled\": true}\n");
            } else {
                printf("{\"received\": %llu}\n", (unsigned long long)received);
            }
            fflush(stdout);
        }
        n = ops->recv(dev, f, BURST);
        for (uint32_t i = 0; i < n; i++)
            put_back(s, f[i].addr);
        received += n;
        if (n)
            fill_from(dev, s);
    }
    printf("{\"received\": %llu, ", (unsigned long long)received);
    print_info("dev", dev);
    printf("}\n");
    must_close(dev);
    free(s);
    return 0;
}

static void drop_capabilities(uint64_t drop)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];

    if (syscall(SYS_capget, &header, data))
        die("capget: %s", strerror(errno));
    for (unsigned i = 0; i < 2; i++) {
        data[i].effective &= ~(uint32_t)(drop >> (32 * i));
        data[i].permitted = data[i].effective;
    }
    if (syscall(SYS_capset, &header, data))
        die("capset: %s", strerror(errno));
}

static int run_try(void)
{
    struct rb_xdp_error err;
    struct rb_xdp *dev;
    int r;

    make_memory(256);
    if (opt.broken && !strcmp(opt.broken, "memlock")) {
        struct rlimit little = {65536, 65536};

        setrlimit(RLIMIT_MEMLOCK, &little);
        drop_capabilities(1ull << 14); /* CAP_IPC_LOCK lifts the limit */
    }
    if (opt.broken && !strcmp(opt.broken, "capabilities"))
        drop_capabilities(UINT64_MAX);
    if (opt.broken && !strcmp(opt.broken, "bpf"))
        drop_capabilities(~(1ull << 13)); /* CAP_NET_RAW stays: sockets, but no programs */
    r = try_open(opt.ifname, opt.flags, &dev, &err);
    if (r) {
        if (dev)
            die("a failed open returned a device");
        print_error(r, &err);
        return 0;
    }
    printf("{\"result\": 0, ");
    print_info("dev", dev);
    printf("}\n");
    if (opt.broken && !strcmp(opt.broken, "netns") && setns(first_netns, CLONE_NEWNET)) /* close from elsewhere */
        die("setns: %s", strerror(errno));
    must_close(dev);
    return 0;
}

static int run_bad_tx(void)
{
    make_memory(64);
    struct rb_xdp *dev = must_open(opt.ifname, RB_XDP_TX);
    const struct rb_xdp_frame bad[] = {
        {.addr = memory_size, .len = 64},                       /* outside */
        {.addr = UINT64_MAX - 10, .len = 64},
        {.addr = memory_size - 32, .len = 64},                  /* leaves the memory */
        {.addr = opt.chunk * 2 - 32, .len = 64},                /* leaves its chunk */
        {.addr = opt.chunk, .len = 0},
        {.addr = opt.chunk, .len = 13},
        {.addr = opt.chunk, .len = opt.chunk + 1},
        {.addr = opt.chunk, .len = UINT32_MAX},
    };
    struct rb_xdp_stats s;
    uint64_t back[8];
    uint32_t n = 0;
    double until = now() + DEADLINE_S;

    for (unsigned i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct rb_xdp_frame f[3] = {{.addr = opt.chunk * 3, .len = 64}, bad[i], {.addr = opt.chunk * 4, .len = 64}};

        write_frame(memory + f[0].addr, i, 64);
        if (ops->send(dev, &bad[i], 1) != -EINVAL)
            die("bad frame %u was taken", i);
        if (ops->send(dev, f, 3) != 1)
            die("a burst with bad frame %u did not end there", i);
        for (n = 0; !n && now() < until; n = ops->complete(dev, back, 8))
            ops->wake(dev, RB_XDP_TX);
        if (n != 1 || back[0] != f[0].addr)
            die("the good frame before bad frame %u was not completed as sent", i);
    }
    if (ops->stats(dev, &s) || s.tx_invalid_descs || ops->tx_pending(dev))
        die("the kernel saw invalid descriptors");
    must_close(dev);
    printf("{\"refused\": %zu}\n", sizeof bad / sizeof bad[0]);
    return 0;
}

static int run_simple(const char *command)
{
    struct rb_xdp_error err;
    int r;

    if (!strcmp(command, "attached")) {
        printf("{\"attached\": %s}\n", ops->attached(opt.ifname) ? "true" : "false");
        return 0;
    }
    if (!strcmp(command, "cleanup"))
        r = ops->cleanup(opt.ifname, &err);
    else
        r = ops->probe(opt.ifname, opt.queue == RB_XDP_ALL_QUEUES ? 0 : opt.queue, 500, &err);
    print_error(r, &err);
    return 0;
}

/* ---- bench ---- */

static _Atomic bool stop;
static _Atomic uint64_t generated, forwarded;

static void *generate(void *arg)
{
    struct rb_xdp *dev = arg;
    struct stack *s = stack_of(1, 2000);
    uint32_t seq = 0;

    while (!atomic_load(&stop)) {
        if (!send_some(dev, s, &seq, UINT32_MAX, opt.length))
            ops->wake(dev, RB_XDP_TX);
        take_completions(dev, s);
        atomic_store(&generated, seq);
    }
    free(s);
    return NULL;
}

static void *forward(void *arg)
{
    struct rb_xdp **dev = arg;
    struct stack *s = stack_of(2001, 4096);
    uint64_t count = 0;

    fill_from(dev[0], s);
    while (!atomic_load(&stop)) {
        struct rb_xdp_frame f[BURST];
        uint32_t room = ops->tx_space(dev[1]), n = ops->recv(dev[0], f, room < BURST ? room : BURST);

        if (n && ops->send(dev[1], f, n) != (int)n)
            die("a received frame could not be sent on");
        count += n;
        atomic_store(&forwarded, count);
        ops->wake(dev[1], RB_XDP_TX);
        take_completions(dev[1], s);
        fill_from(dev[0], s);
    }
    free(s);
    return NULL;
}

static int run_bench(void)
{
    make_memory(8192);
    struct rb_xdp *gen = must_open(opt.ifname, RB_XDP_TX);
    struct rb_xdp *dev[2] = {must_open(opt.peer, RB_XDP_RX), must_open(opt.out, RB_XDP_TX)};
    struct timespec t = {.tv_sec = (time_t)opt.seconds, .tv_nsec = (long)((opt.seconds - (double)(time_t)opt.seconds) * 1e9)};
    pthread_t a, b;
    double start = now();

    pthread_create(&b, NULL, forward, dev);
    pthread_create(&a, NULL, generate, gen);
    nanosleep(&t, NULL);
    atomic_store(&stop, true);
    pthread_join(a, NULL);
    pthread_join(b, NULL);
    double s = now() - start;
    printf("{\"seconds\": %.3f, \"generated_mpps\": %.3f, \"forwarded_mpps\": %.3f, ", s,
           (double)atomic_load(&generated) / s / 1e6, (double)atomic_load(&forwarded) / s / 1e6);
    print_info("rx", dev[0]);
    printf(", ");
    print_info("tx", dev[1]);
    printf("}\n");
    must_close(gen);
    must_close(dev[0]);
    must_close(dev[1]);
    return 0;
}

int main(int argc, char **argv)
{
    static const struct option longs[] = {
        {"netns", 1, 0, 'n'}, {"if", 1, 0, 'i'}, {"peer", 1, 0, 'p'}, {"out", 1, 0, 'o'}, {"end", 1, 0, 'e'},
        {"mode", 1, 0, 'm'}, {"chunk", 1, 0, 'c'}, {"huge", 0, 0, 'h'}, {"flags", 1, 0, 'f'}, {"queue", 1, 0, 'q'},
        {"count", 1, 0, 'N'}, {"length", 1, 0, 'l'}, {"seconds", 1, 0, 's'}, {"broken", 1, 0, 'b'}, {0, 0, 0, 0},
    };
    static const char *modes[] = {"auto", "zero-copy", "driver", "generic"};
    int c;

    while ((c = getopt_long(argc, argv, "", longs, NULL)) != -1) {
        switch (c) {
        case 'n': opt.netns = optarg; break;
        case 'i': opt.ifname = optarg; break;
        case 'p': opt.peer = optarg; break;
        case 'o': opt.out = optarg; break;
        case 'e': opt.end = optarg; break;
        case 'm':
            for (opt.mode = 0; opt.mode < 4 && strcmp(optarg, modes[opt.mode]); opt.mode++)
                ;
            break;
        case 'c': opt.chunk = (uint32_t)atoi(optarg); break;
        case 'h': opt.huge = true; break;
        case 'f': opt.flags = !strcmp(optarg, "rx") ? RB_XDP_RX : !strcmp(optarg, "tx") ? RB_XDP_TX : RB_XDP_RX | RB_XDP_TX;
            break;
        case 'q': opt.queue = (uint32_t)atoi(optarg); break;
        case 'N': opt.count = (uint32_t)atoi(optarg); break;
        case 'l': opt.length = (uint32_t)atoi(optarg); break;
        case 's': opt.seconds = atof(optarg); break;
        case 'b': opt.broken = optarg; break;
        default: return 2;
        }
    }
    if (argc - optind != 2)
        die("usage: test_xdp PLUGIN COMMAND [options]");
    first_netns = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    if (opt.netns) {
        char path[256];

        snprintf(path, sizeof path, "/run/netns/%s", opt.netns);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || setns(fd, CLONE_NEWNET))
            die("network namespace %s: %s", opt.netns, strerror(errno));
        close(fd);
    }
    void *lib = dlopen(argv[optind], RTLD_NOW | RTLD_LOCAL);
    if (!lib)
        die("%s", dlerror());
    const struct rb_xdp_ops *(*get)(void) = (const struct rb_xdp_ops *(*)(void))dlsym(lib, RB_XDP_SYMBOL);
    if (!get)
        die("%s has no %s", argv[optind], RB_XDP_SYMBOL);
    ops = get();
    if (ops->abi != RB_XDP_ABI || ops->size != sizeof *ops)
        die("the plug-in has another ABI");

    const char *command = argv[optind + 1];
    if (!strcmp(command, "pair"))
        return run_pair(false);
    if (!strcmp(command, "forward"))
        return run_pair(true);
    if (!strcmp(command, "addrx"))
        return run_addrx();
    if (!strcmp(command, "hold"))
        return run_hold(false, false);
    if (!strcmp(command, "orphan"))
        return run_hold(true, false);
    if (!strcmp(command, "fill-first"))
        return run_hold(false, true);
    if (!strcmp(command, "try"))
        return run_try();
    if (!strcmp(command, "bad-tx"))
        return run_bad_tx();
    if (!strcmp(command, "bench"))
        return run_bench();
    if (!strcmp(command, "cleanup") || !strcmp(command, "attached") || !strcmp(command, "probe"))
        return run_simple(command);
    die("no command %s", command);
}
