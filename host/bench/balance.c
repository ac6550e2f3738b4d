/* SPDX-License-Identifier: Apache-2.0
 *
 * One worker between a queue and N queues, in one process: balance KIND OUTPUTS BUFFERS SECONDS BURST CORE_A CORE_B
 *
 *   balancer  symmetric 5-tuple to one of OUTPUTS
 *   fanout    each packet to all OUTPUTS
 *
 * The worker's thread runs on core A. The thread on core B is the source and all the consumers, and takes turns with the worker: it fills the
 * queue with 4096 packets of 64 bytes of 4096 flows, lets the worker move them, then takes them from the outputs and gives them back. So the worker finds full bursts and
 * outputs with room, as where sources and consumers have cores of their own. Every packet is in the pool from the start, as if a card had
 * written it; the worker reads its header. Prints one line of JSON: mpps and cycles of the worker's core, medians of the turns.
 */
#include "nic_bench.h"
#include "ringbar.h"

#define MOST 64
#define BATCH_MOST 4096u

static void ok(int rc, const char *what)
{
    if (rc < 0)
        die("%s: %s", what, rb_error());
}

static rb_end *end_of(rb_cluster *cluster, uint32_t queue, uint32_t flags)
{
    rb_cluster_info info;
    char address[32];
    rb_end *end;
    ok(rb_cluster_get_info(cluster, &info), "cluster");
    snprintf(address, sizeof address, "%u@%u", info.id, queue);
    ok(rb_open(&end, cluster, address, flags), address);
    return end;
}

#ifdef __x86_64__
#include <x86intrin.h>
#define pause_cpu _mm_pause
#else
static inline void pause_cpu(void) { __asm__ volatile("isb"); }
static inline uint64_t __rdtsc(void)
{
    uint64_t t;
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(t));
    return t;
}
#endif

/* Of the counter that the library counts cycles with. */
static double tsc_hz(void)
{
    uint64_t ns = now_ns(), from = __rdtsc();
    while (now_ns() - ns < 50000000u)
        ;
    return (double)(__rdtsc() - from) / (double)(now_ns() - ns) * 1e9;
}

int main(int argc, char **argv)
{
    if (argc != 8)
        die("usage: balance KIND OUTPUTS BUFFERS SECONDS BURST CORE_A CORE_B");
    const char *kind = argv[1];
    uint32_t outputs = (uint32_t)atoi(argv[2]), burst = (uint32_t)atoi(argv[5]), id = (uint32_t)getpid() & 0xffff;
    double seconds = strtod(argv[4], NULL);
    const uint64_t copies = strcmp(kind, "fanout") ? 1 : outputs;
    const uint32_t batch = (uint32_t)atoi(argv[3]) < 8 * BATCH_MOST ? (uint32_t)atoi(argv[3]) / 8 : BATCH_MOST;
    rb_cluster_options options = {.struct_size = sizeof options, .buffers = (uint32_t)atoi(argv[3]), .buffer_size = 256, .sealed = 1};
    rb_cluster *source, *worker_side, *sink;
    rb_end *from, *out[MOST];
    rb_output to[MOST];
    rb_desc desc[256];
    uint8_t frame[FRAME_BYTES];
    if (outputs < 1 || outputs > MOST || (outputs & (outputs - 1)) || burst < 1 || burst > 256)
        die("1, 2, 4 to %u outputs, bursts of 1 to 256", MOST);
    make_frame(frame);
    ok(rb_cluster_create(id, &options, &source), "cluster");
    ok(rb_cluster_attach(id, &worker_side), "attach");
    ok(rb_cluster_attach(id, &sink), "attach");
    rb_queue_options to_each = {.struct_size = sizeof to_each, .slots = copies > 1 || outputs < 4 ? batch : 4 * batch / outputs};
    uint32_t left = options.buffers - outputs * (to_each.slots + 2 * RB_BURST);
    rb_queue_options into = {.struct_size = sizeof into, .slots = batch, .credit = left / 4 * 3 < 16384 ? left / 4 * 3 : 16384};
    for (uint32_t i = 0; i <= outputs; i++)
        ok(rb_queue_create(source, (int)i, i ? &to_each : &into), "queue");
    from = end_of(source, 0, RB_TX);
    rb_end *in = end_of(worker_side, 0, RB_RX);
    for (uint32_t i = 0; i < outputs; i++) {
        to[i] = (rb_output){.end = end_of(worker_side, i + 1, RB_TX)};
        out[i] = end_of(sink, i + 1, RB_RX);
    }
    rb_worker_options how = {.struct_size = sizeof how, .core = atoi(argv[6]) + 1, .idle = 1, .burst = burst};
    rb_plan plan = {.struct_size = sizeof plan, .ins = 1, .outs = outputs, .in = &in, .out = to, .policy = "5tuple"};
    if (!strcmp(kind, "fanout"))
        for (uint32_t i = 0; i < outputs; i++)
            to[i].group = i;
    rb_worker *worker;
    ok(rb_worker_start(&worker, worker_side, kind, &plan, &how), kind);
    pin(atoi(argv[7]));

    static double rate[SLICES], cost[SLICES];
    double hz = tsc_hz();
    uint64_t received = 0, begun = now_ns();
    uint32_t turns = 0;
    rb_worker_stats before, after;
    ok(rb_worker_pause(worker, 1), "pause");
    /* At least one turn, however long others keep the cores; a worker that stands still ends it. */
    while ((!turns || now_ns() - begun < WARM_NS + (uint64_t)(seconds * 1e9)) && turns < SLICES) {
        uint32_t sent = 0;
        for (int n, k = 1; sent < batch && k > 0 && (n = rb_alloc(from, desc, (int)burst)) > 0; sent += (uint32_t)k) {
            for (int i = 0; i < n; i++) {
                uint8_t *p = rb_data(source, &desc[i]);
                rb_desc_set(&desc[i], FRAME_BYTES, rb_desc_offset(&desc[i]), 0);
                if (p[12] != 8) { /* a buffer's first time */
                    uint32_t flow = desc[i].handle & 4095;
                    memcpy(p, frame, sizeof frame);
                    p[34] = (uint8_t)(32 + (flow >> 8));
                    p[35] = (uint8_t)flow;
                }
            }
            ok(k = rb_send(from, desc, n, 0), "send"); /* fewer while some are on their way back */
            if (k < n)
                rb_return(source, desc + k, n - k);
        }
        ok(rb_worker_stats_get(worker, &before), "counters");
        uint64_t from_ns = now_ns();
        ok(rb_worker_pause(worker, 0), "go on");
        do {
            for (int i = 0; i < 64; i++) /* each look takes lines away from the worker */
                pause_cpu();
            rb_service(source);
            ok(rb_worker_stats_get(worker, &after), "counters");
            if (now_ns() - from_ns > 10000000000u)
                die("the worker moved %lu of %u packets in 10 s", after.packets - before.packets, sent);
        } while (after.running && after.packets - before.packets < sent);
        uint64_t took = now_ns() - from_ns;
        ok(rb_worker_pause(worker, 1), "pause"); /* what it took last has gone to the outputs, and its cycles are counted */
        ok(rb_worker_stats_get(worker, &after), "counters");
        uint64_t due = received + (after.packets - before.packets) * copies - (after.dropped - before.dropped);
        for (uint32_t i = 0; received < due; i = (i + 1) % outputs) { /* in turn, or the next batch would be made of one output's flows */
            int n = rb_recv(out[i], desc, (int)burst, 0);
            ok(n, "receive");
            rb_return(sink, desc, n);
            received += (uint64_t)n;
            if (now_ns() - from_ns > 20000000000u)
                die("%lu packets did not arrive", due - received);
        }
        if (!after.running)
            die("the worker ended: %s", after.message);
        if (now_ns() - begun > WARM_NS && sent) {
            cost[turns] = (double)(after.cycles_busy - before.cycles_busy) / sent;
            rate[turns++] = (double)sent / (double)took * 1e3;
        }
    }
    double cycles = quantile(cost, turns, 0.5);
    printf("{\"mpps\": %.6f, \"cycles\": %.3f, \"wall_mpps\": %.6f, \"batches\": %u, \"delivered\": %lu, \"dropped\": %lu}\n", hz / cycles / 1e6, cycles,
           quantile(rate, turns, 0.5), turns, received, after.dropped);
    rb_worker_stop(worker);
    rb_cluster_close(sink);
    rb_cluster_close(worker_side);
    rb_cluster_close(source);
    return 0;
}
