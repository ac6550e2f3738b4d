/* SPDX-License-Identifier: Apache-2.0
 *
 * The same work through this library: its devices and the calls that any program makes. Arguments: nic_bench.h, with addresses
 * (zc:eth1, eth1, stack:eth1) in place of interfaces.
 */
#include "nic_bench.h"
#include "ringbar.h"

static void ok(int rc, const char *what)
{
    if (rc < 0)
        die("%s: %s", what, rb_error());
}

static rb_end *open_device(rb_cluster *cluster, const char *address, uint32_t flags)
{
    rb_open_options options = {.struct_size = sizeof options, .flags = flags, .steer = flags & RB_RX ? opt.steer : NULL};
    rb_end *end;
    if (!strncmp(address, "zc:", 3))
        options.flags |= RB_DRIVER;
    ok(rb_open_with(&end, cluster, address, &options), address);
    return end;
}

int main(int argc, char **argv)
{
    rb_cluster_options options = {.struct_size = sizeof options, .buffers = 16384, .sealed = 1};
    rb_stats stats;
    rb_cluster *cluster;
    rb_end *in = NULL, *out = NULL;
    rb_desc desc[256];
    uint8_t frame[FRAME_BYTES];
    uint64_t packets = 0;
    arguments(argc, argv);
    make_frame(frame);
    ok(rb_cluster_create((uint32_t)getpid() & 0xffff, &options, &cluster), "cluster");
    if (opt.out)
        out = open_device(cluster, opt.out, RB_TX);
    if (opt.in)
        in = open_device(cluster, opt.in, RB_RX);
    if (!strcmp(opt.mode, "hold")) {
        hold();
        rb_cluster_close(cluster);
        return 0;
    }
    for (uint32_t turn = 0; (turn & 15) || go_on(packets); turn++) {
        int n, k = 0;
        if (in) {
            ok(n = rb_recv(in, desc, (int)opt.burst, 0), "receive");
            run.progress->received += (uint64_t)n;
        } else {
            ok(n = rb_alloc(out, desc, (int)opt.burst), "alloc");
            for (int i = 0; i < n; i++) {
                if (packets < 32768) /* every buffer once, as the others do: the same bytes go out again and again */
                    memcpy(rb_data(cluster, &desc[i]), frame, sizeof frame);
                rb_desc_set(&desc[i], FRAME_BYTES, rb_desc_offset(&desc[i]), 0);
            }
        }
        if (out && n) {
            ok(k = rb_send(out, desc, n, 0), "send");
            packets += (uint64_t)k;
        } else
            packets += (uint64_t)n;
        if (k < n)
            rb_return(cluster, desc + k, n - k);
    }
    ok(rb_stats_get(in ? in : out, &stats), "stats");
    printf(", \"mode\": \"%s\"}\n", stats.mode);
    rb_cluster_close(cluster);
    return 0;
}
