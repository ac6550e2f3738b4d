/* SPDX-License-Identifier: Apache-2.0
 *
 * DPDK's distributor in burst mode, one distributing core and one worker core: distributor_bench EAL... -- SECONDS. What dpdk-test's
 * distributor_perf_autotest measures, but in slices of half a millisecond, so that it also measures where the two cores have other work:
 * there the test's two threads, which spin for each other, need minutes. Packets are handed out in bursts of 64; nobody reads them.
 *
 * Prints one line of JSON: cycles a packet, which one of ten slices undercuts, and the median.
 */
#include <rte_cycles.h>
#include <rte_distributor.h>
#include <rte_eal.h>
#include <rte_lcore.h>
#include <rte_mbuf.h>
#include <rte_version.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define BURST 64u
#define SLICES 20000u

static int work(void *arg)
{
    struct rte_distributor *d = arg;
    struct rte_mbuf *got[8];
    for (int n = 0;;)
        n = rte_distributor_get_pkt(d, 0, got, got, (unsigned int)n);
    return 0;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    static double cost[SLICES];
    struct rte_mbuf *burst[BURST];
    int used = rte_eal_init(argc, argv);
    if (used < 0 || used + 1 >= argc || rte_lcore_count() != 2) {
        fprintf(stderr, "usage: distributor_bench EAL... -- SECONDS, with two cores\n");
        return 1;
    }
    double seconds = strtod(argv[used + 1], NULL);
    struct rte_distributor *d = rte_distributor_create("bench", rte_socket_id(), 1, RTE_DIST_ALG_BURST);
    struct rte_mempool *pool = rte_pktmbuf_pool_create("bench", 511, 0, 0, RTE_MBUF_DEFAULT_BUF_SIZE, (int)rte_socket_id());
    if (!d || !pool || rte_pktmbuf_alloc_bulk(pool, burst, BURST)) {
        fprintf(stderr, "no distributor, or no memory\n");
        return 1;
    }
    for (uint32_t i = 0; i < BURST; i++)
        burst[i]->hash.usr = i;
    rte_eal_remote_launch(work, d, rte_get_next_lcore(-1, 1, 0));
    uint64_t hz = rte_get_tsc_hz(), begun = rte_rdtsc(), slice = begun, packets = 0;
    uint32_t n = 0;
    for (uint32_t turn = 1; n < SLICES; turn++) {
        packets += (uint64_t)rte_distributor_process(d, burst, BURST);
        uint64_t now = rte_rdtsc();
        if (turn % 4 || now - slice < hz / 2000)
            continue;
        if (now - begun > hz / 10) /* warm */
            cost[n++] = (double)(now - slice) / (double)packets;
        if (now - begun > hz / 10 + (uint64_t)(seconds * (double)hz))
            break;
        slice = now;
        packets = 0;
    }
    qsort(cost, n, sizeof *cost, by_size);
    printf("{\"cycles\": %.2f, \"median_cycles\": %.2f, \"slices\": %u, \"dpdk\": \"%s\"}\n", cost[n / 10], cost[n / 2], n, rte_version());
    fflush(stdout);
    _exit(0); /* the worker never ends */
}
