/* SPDX-License-Identifier: Apache-2.0
 *
 * One end of `ringbar bench vm`: sends or receives on a queue for some seconds and says how many packets went.
 *
 *   pump tx|rx CLUSTER@QUEUE BURST TOUCH SECONDS RUNS SEGMENT...
 *
 * A SEGMENT is FILE:OFFSET:SIZE, the memory of a plugged device as ringbar.guest opened it (an inherited descriptor's /proc/self/fd
 * name does); without any the cluster is this host's own. The sender writes TOUCH bytes of each packet, the receiver reads one word of each
 * line of them and checks it. The receiver says how many came in each of RUNS windows of SECONDS, after one that only warms up.
 */
#include <ringbar.h>

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int failed(const char *what)
{
    fprintf(stderr, "%s: %s; %s\n", what, rb_error(), rb_error_cure());
    return 1;
}

static int attach(uint32_t id, int n, char **names, rb_cluster **c)
{
    rb_segment segments[8];
    memset(segments, 0, sizeof segments);
    if (n == 0)
        return rb_cluster_attach(id, c);
    for (int i = 0; i < n && i < 8; i++) {
        char path[256];
        unsigned long long offset, size;
        if (sscanf(names[i], "%255[^:]:%llu:%llu", path, &offset, &size) != 3)
            return -1;
        segments[i].struct_size = sizeof segments[i];
        segments[i].fd = open(path, O_RDWR | O_CLOEXEC);
        segments[i].offset = offset;
        segments[i].size = size;
        segments[i].writable = 1;
        if (segments[i].fd < 0) {
            perror(path);
            return -1;
        }
    }
    return rb_cluster_attach_segments(id, segments, (uint32_t)n, c);
}

/* The first word of every line is the packet's number: alike in all lines, and never one that was before. */
static inline uint64_t check(const uint8_t *p, uint32_t touch, uint64_t *number)
{
    uint64_t v, wrong = 0, first;
    memcpy(&first, p, 8);
    for (uint32_t at = 64; at < touch; at += 64) {
        memcpy(&v, p + at, 8);
        wrong += v != first;
    }
    wrong += first < *number;
    *number = first + 1;
    return wrong;
}

static int receive(rb_cluster *c, rb_end *end, int burst, uint32_t touch, uint64_t ns, int runs)
{
    uint64_t wrong = 0, number = 0, until = now() + 30000000000u; /* for the first packet */
    int warm = 0;
    uint8_t *base = NULL;
    rb_cluster_info info;
    rb_cluster_get_info(c, &info);
    rb_desc desc[RB_MAX_BURST];
    for (int run = -1; run < runs; run++) { /* the first window only warms up */
        uint64_t packets = 0, begin = now();
        if (run >= 0)
            until = begin + ns;
        while (now() < until) {
            int n = 0;
            for (int turn = 0; turn < 64; turn++) {
                n = rb_recv(end, desc, burst, 0);
                if (n < 0)
                    return failed("receive");
                if (n && !base)
                    base = (uint8_t *)rb_buffer_header(c, &desc[0]) - (uint64_t)desc[0].handle * info.buffer_size; /* one pool */
                for (int i = 0; i < n && touch; i++)
                    wrong += check(base + (uint64_t)desc[i].handle * info.buffer_size + rb_desc_offset(&desc[i]), touch, &number);
                if (n && rb_return(c, desc, n) != n)
                    return failed("return");
                packets += (uint64_t)n;
            }
            if (run < 0 && packets && !warm) {
                warm = 1;
                until = now() + ns;
            }
        }
        if (run >= 0)
            printf("{\"packets\": %llu, \"seconds\": %.6f, \"wrong\": %llu}\n", (unsigned long long)packets, (double)(now() - begin) / 1e9,
                   (unsigned long long)wrong);
    }
    return wrong != 0;
}

/* All 64 bytes of a line, without a loop: an emulated processor pays for each instruction. */
static inline void fill_line(uint8_t *p, uint64_t v)
{
    uint64_t *q = (uint64_t *)(void *)p; /* packets begin at a multiple of 64 */
    q[0] = v, q[1] = v, q[2] = v, q[3] = v;
    q[4] = v, q[5] = v, q[6] = v, q[7] = v;
}

static int transmit(rb_cluster *c, rb_end *end, int burst, uint32_t touch, uint64_t ns)
{
    uint64_t number = 0, until = now() + ns, idle = 0;
    rb_desc desc[RB_MAX_BURST];
    uint8_t *base = NULL;
    rb_cluster_info info;
    rb_cluster_get_info(c, &info);
    const uint32_t size = info.buffer_size, length = touch ? touch : 64;
    while (now() < until)
        for (int turn = 0; turn < 64; turn++) {
            int n = rb_alloc(end, desc, burst), sent = 0;
            if (n < 0)
                return failed("alloc");
            if (n && !base)
                base = (uint8_t *)rb_buffer_header(c, &desc[0]) - (uint64_t)desc[0].handle * info.buffer_size; /* one pool */
            for (int i = 0; i < n; i++) {
                uint8_t *p = base + (uint64_t)desc[i].handle * size + RB_BUFFER_HEADER;
                rb_desc_set(&desc[i], length, RB_BUFFER_HEADER, 0);
                for (uint32_t at = 0; at < touch; at += 64)
                    fill_line(p + at, number);
                number++;
            }
            while (sent < n) {
                int k = rb_send(end, desc + sent, n - sent, 0); /* no sleeping: what is measured is the lane */
                if (k < 0)
                    return failed("send");
                sent += k;
                if (k == 0 && ++idle % 65536 == 0 && now() > until) {
                    rb_return(c, desc + sent, n - sent);
                    break;
                }
            }
        }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc < 7) {
        fprintf(stderr, "usage: pump tx|rx CLUSTER@QUEUE BURST TOUCH SECONDS RUNS [SEGMENT...]\n");
        return 2;
    }
    int tx = strcmp(argv[1], "tx") == 0, burst = atoi(argv[3]);
    uint32_t touch = (uint32_t)atoi(argv[4]);
    uint64_t ns = (uint64_t)(atof(argv[5]) * 1e9);
    rb_cluster *c;
    rb_end *end;
    if (burst < 1 || burst > (int)RB_MAX_BURST || (touch && touch % 64))
        return 2;
    if (attach((uint32_t)atoi(argv[2]), argc - 7, argv + 7, &c) < 0)
        return failed("attach");
    if (rb_open(&end, c, argv[2], tx ? RB_TX : RB_RX) < 0)
        return failed("open");
    printf("ready\n");
    fflush(stdout);
    int rc = tx ? transmit(c, end, burst, touch, ns) : receive(c, end, burst, touch, ns, atoi(argv[6]));
    rb_cluster_close(c);
    return rc;
}
