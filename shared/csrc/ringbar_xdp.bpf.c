// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/*
 * Hands each received packet to the AF_XDP socket of the queue it arrived on. Where there is none (not opened, not
 * yet filled, or its process was killed: the kernel then removes the socket from the map), the packet goes on to the
 * next program and to the stack, as if this one were not there.
 *
 * With a steering rule only what it names is taken. The rule is a program of its own, made by xdp_rule.c, in the one place of
 * ringbar_rules: replacing it there is one step, and no packet sees anything in between. A killed owner's rules are removed by the
 * kernel; then nothing is taken, rather than all.
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

struct {
    __uint(type, BPF_MAP_TYPE_PROG_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, __u32);
} ringbar_rules SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, __u64);
} ringbar_passed SEC(".maps");

/* 1: there is a steering rule. */
volatile __u32 ringbar_selective = 0;

/* Who loaded this program, readable by the next process that finds it attached. */
const volatile struct rb_xdp_owner ringbar_owner = {};

static __always_inline int pass(void)
{
    __u32 key = 0;
    __u64 *passed = bpf_map_lookup_elem(&ringbar_passed, &key);

    if (passed)
        ++*passed;
    return XDP_PASS;
}

SEC("xdp")
int ringbar_redirect(struct xdp_md *ctx)
{
    /* Constant when the verifier runs: the test costs nothing and ties the record to the program. */
    if (ringbar_owner.magic != RB_XDP_OWNER_MAGIC)
        return XDP_PASS;
    if (ringbar_selective) {
        bpf_tail_call(ctx, &ringbar_rules, 0);
        return pass();
    }
    int to = (int)bpf_redirect_map(&ringbar_xsks, ctx->rx_queue_index, XDP_PASS);
    return to == XDP_REDIRECT ? to : pass();
}

char ringbar_license[] SEC("license") = "Dual BSD/GPL";
