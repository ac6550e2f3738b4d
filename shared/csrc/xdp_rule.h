/* SPDX-License-Identifier: Apache-2.0 */
/* Steering rules as XDP programs: classic BPF, as libpcap compiles it, becomes BPF that the kernel can verify. */
#ifndef RINGBAR_XDP_RULE_H
#define RINGBAR_XDP_RULE_H

#include <linux/bpf.h>

#include "xdp_abi.h"

struct code {                   /* a program being written */
    struct bpf_insn *insn;
    uint32_t n, room;
    bool failed;                /* out of memory, or too long to jump in */
};

/* What the program works with. */
struct rule_maps {
    int xsks, passed;           /* the XSKMAP, and the counter of what is left to the stack */
    bool frags;                 /* packets may come in several buffers: the first holds what rules look at */
    int owner;                  /* with metadata: the map of our record, named in the program so that it is found by it; */
    int rx_time, rx_hash;       /* and the BTF numbers of the driver's kfuncs; 0: without metadata */
};

/* Write a program that takes a packet when one of the rules matches it (none: every packet), and passes it on else. 0, or -errno with the words. */
int rb_rule_translate(struct code *c, const struct rb_xdp_rule *rules, uint32_t n, const struct rule_maps *maps,
                      struct rb_xdp_error *err);
void rb_code_free(struct code *c);

#endif
