// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/*
 * Hands each received packet to the AF_XDP socket of the queue it arrived on. Where there is none (not opened, not
 * yet filled, or its process was killed: the kernel then removes the socket from the map), the packet goes on to the
 * next program and to the stack, as if this one were not there.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "xdp_owner.h"

struct {
    __uint(type, BPF_MAP_TYPE_XSKMAP);
    __uint(max_entries, 1); /* set to the number of NIC queues before loading */
    __type(key, __u32);
    __type(value, __u32);
} ringbar_xsks SEC(".maps");

/* Who loaded this program, readable by the next process that finds it attached. */
const volatile struct rb_xdp_owner ringbar_owner = {};

SEC("xdp")
int ringbar_redirect(struct xdp_md *ctx)
{
    /* Constant when the verifier runs: the test costs nothing and ties the record to the program. */
    if (ringbar_owner.magic != RB_XDP_OWNER_MAGIC)
        return XDP_PASS;
    return bpf_redirect_map(&ringbar_xsks, ctx->rx_queue_index, XDP_PASS);
}

char ringbar_license[] SEC("license") = "Dual BSD/GPL";
