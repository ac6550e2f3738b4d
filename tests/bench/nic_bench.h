/* SPDX-License-Identifier: Apache-2.0
 *
 * What the programs of `ringbar bench nic` share: their arguments, the clock, and the one line of JSON they print.
 *
 *   PROGRAM receive|transmit|forward|hold --in IF --out IF --seconds S --burst N --ring N --core N --sink IF --progress MAP [--steer RULE]
 *
 * Packets are counted for S seconds after a tenth of a second of warming up. mpps is what nine of ten slices of half a
 * millisecond do not exceed, mean_mpps what all of them come to: other programs on the same cores take them away for several at a time. --sink names the interface at which what was sent arrives:
 * its own counter tells how many frames did. Through the map nic_source learns how many were received and keeps a window of
 * frames on their way: where the two cores have other work too, a source that just sends fills the ring in its turn, drops most, and leaves
 * nothing for the receiver's turn. hold: open the input, say so, and wait for SIGTERM.
 */
#ifndef NIC_BENCH_H
#define NIC_BENCH_H
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <linux/bpf.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define FRAME_BYTES 60u /* a 64-byte frame without its FCS */
#define WARM_NS 100000000ull

static struct {
    const char *mode, *in, *out, *sink, *progress, *steer;
    double seconds;
    unsigned burst, ring;
    int core;
} opt = {.mode = "", .seconds = 0.5, .burst = 64, .ring = 2048, .core = -1};

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fputc('\n', stderr);
    exit(1);
}

static inline uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* What nic_source and the receiver share: an array of the kernel's, which programs and processes map. */
struct progress {
    volatile uint64_t received; /* by the receiver */
    uint64_t pad[7], sent, seen, since; /* nic_source's program's own */
};

/* The source's array, by its number in the kernel; memory that nobody reads without one. */
static inline struct progress *progress_of(const char *id)
{
    union bpf_attr get = {.map_id = id ? (uint32_t)strtoul(id, NULL, 10) : 0};
    int fd = id ? (int)syscall(SYS_bpf, BPF_MAP_GET_FD_BY_ID, &get, sizeof get) : -1;
    if (id && fd < 0)
        die("the source's array %s: %s", id, strerror(errno));
    void *map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | (id ? 0 : MAP_ANONYMOUS), fd, 0);
    if (map == MAP_FAILED)
        die("the source's array: %s", strerror(errno));
    return map;
}

static inline void pin(int core)
{
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET((size_t)core, &one);
    sched_setaffinity(0, sizeof one, &one);
}

/* Say that all is open, and wait to be told to end. */
static inline void hold(void)
{
    sigset_t end;
    int got;
    sigemptyset(&end);
    sigaddset(&end, SIGTERM);
    sigprocmask(SIG_BLOCK, &end, NULL);
    puts("open");
    fflush(stdout);
    sigwait(&end, &got);
}

/* Ethernet, IPv4, UDP from 192.0.2.1 to 192.0.2.2, to nobody's MAC address. */
static inline void make_frame(uint8_t *frame)
{
    static const uint8_t head[42] = {
        2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0, 0, 46, 0, 0, 0x40, 0, 64, 17, 0xb6, 0xbb, 192, 0, 2, 1, 192, 0, 2, 2, 0x13, 0x88,
        0, 9, 0, 26, 0, 0};
    memset(frame, 0, FRAME_BYTES);
    memcpy(frame, head, sizeof head);
}

/* Frames that an interface has received, by its own counter. */
static inline uint64_t arrived(const char *ifname)
{
    char line[512];
    uint64_t packets = 0;
    FILE *f = fopen("/proc/thread-self/net/dev", "r");
    while (f && fgets(line, sizeof line, f)) {
        char *colon = strchr(line, ':'), *name = line;
        if (!colon)
            continue;
        *colon = 0;
        name += strspn(name, " ");
        if (!strcmp(name, ifname))
            sscanf(colon + 1, "%*u %lu", &packets);
    }
    if (f)
        fclose(f);
    return packets;
}

/* A run: what is counted from when, and the rate of each slice of it in which anything moved. */
#define SLICE_NS 500000u
#define SLICES 20000u
static struct {
    uint64_t begun, from, packets, sink, slice, at;
    uint32_t n;
    double rate[SLICES];
    struct progress *progress;
} run;

static inline int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The value that this share of them lies below; 0 of none. Sorts them. */
static inline double quantile(double *values, uint32_t n, double share)
{
    qsort(values, n, sizeof *values, by_size);
    return n ? values[(uint32_t)(share * (n - 1))] : 0;
}

static inline void arguments(int argc, char **argv)
{
    static const struct option longs[] = {{"in", 1, 0, 'i'},    {"out", 1, 0, 'o'},  {"seconds", 1, 0, 's'}, {"burst", 1, 0, 'b'},
                                          {"ring", 1, 0, 'r'},  {"core", 1, 0, 'c'}, {"sink", 1, 0, 'k'},
                                          {"progress", 1, 0, 'p'}, {"steer", 1, 0, 'S'},   {0, 0, 0, 0}};
    if (argc < 2)
        die("usage: %s receive|transmit|forward [--in IF] [--out IF] ...", argv[0]);
    opt.mode = argv[1];
    for (int c; (c = getopt_long(argc - 1, argv + 1, "", longs, NULL)) != -1;)
        switch (c) {
        case 'i': opt.in = optarg; break;
        case 'o': opt.out = optarg; break;
        case 's': opt.seconds = strtod(optarg, NULL); break;
        case 'b': opt.burst = (unsigned)strtoul(optarg, NULL, 10); break;
        case 'r': opt.ring = (unsigned)strtoul(optarg, NULL, 10); break;
        case 'c': opt.core = atoi(optarg); break;
        case 'k': opt.sink = optarg; break;
        case 'p': opt.progress = optarg; break;
        case 'S': opt.steer = optarg; break;
        default: exit(2);
        }
    bool receives = !strcmp(opt.mode, "receive") || !strcmp(opt.mode, "hold") || !strcmp(opt.mode, "forward");
    bool sends = !strcmp(opt.mode, "transmit") || !strcmp(opt.mode, "forward");
    if (!receives && !sends)
        die("%s: receive, transmit, forward or hold", opt.mode);
    if (receives != !!opt.in || sends != !!opt.out || sends != !!opt.sink || !opt.burst || opt.burst > 256)
        die("%s needs%s%s, and a burst of 1 to 256", opt.mode, receives ? " --in" : "", sends ? " --out --sink" : "");
    if (opt.core >= 0)
        pin(opt.core);
    run.progress = progress_of(opt.progress);
}

/* To be called now and then with the packets moved so far. False when the time is over: then half of the document is out. */
static inline bool go_on(uint64_t packets)
{
    uint64_t now = now_ns();
    if (!run.begun)
        run.begun = now;
    if (!run.from) {
        if (now - run.begun < WARM_NS)
            return true;
        run.sink = opt.sink ? arrived(opt.sink) : 0;
        run.from = run.slice = now_ns();
        run.packets = run.at = packets;
        return true;
    }
    if (now - run.slice >= SLICE_NS) {
        if (packets != run.at && run.n < SLICES)
            run.rate[run.n++] = (double)(packets - run.at) / (double)(now - run.slice) * 1e3;
        run.slice = now;
        run.at = packets;
    }
    if (now - run.from < (uint64_t)(opt.seconds * 1e9))
        return true;
    double seconds = (double)(now - run.from) / 1e9;
    uint64_t sink = opt.sink ? arrived(opt.sink) - run.sink : 0, moved = packets - run.packets;
    printf("{\"mpps\": %.6f, \"mean_mpps\": %.6f, \"packets\": %lu, \"arrived\": %lu, \"seconds\": %.6f", quantile(run.rate, run.n, 0.9),
           (double)moved / seconds / 1e6, moved, sink, seconds);
    return false;
}
#endif
