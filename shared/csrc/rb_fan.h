/* SPDX-License-Identifier: Apache-2.0
 * A fan-out and its outputs, as fan.c and fan_lend.c share them. */
#ifndef RB_FAN_H
#define RB_FAN_H
#include "rb_internal.h"

struct output {
    struct rb_end *end;
    struct rb_leg_ctx *l; /* lent on; NULL: a device, or copied to */
    uint64_t conflicts;   /* outputs that cannot have the same buffer at the same time */
    uint64_t bytes;
    uint32_t room, put, shares; /* of this burst; shares: those that others have too */
};

struct rb_fan {
    struct rb_cluster *c;
    struct rb_fan *next;
    uint64_t used, lending, devices, copied, conflicting; /* outputs; queues and devices that are lent to now; copied to; those with conflicts */
    uint32_t epoch;
    struct output out[RB_MAX_OUTPUTS];
};

#define EACH_BIT(m, i) for (uint64_t left_ = (m); left_ && ((i) = (uint32_t)__builtin_ctzll(left_), true); left_ &= left_ - 1)
#define SHARED_FLAG ((uint32_t)RB_SHARED << 29)

static inline void count_missed(struct rb_fan *f, uint64_t bits, int reason)
{
    uint32_t b;
    EACH_BIT(bits, b)
        rb_drop(f->out[b].end, 1, reason);
}

/* At most RB_MAX_BURST packets to the outputs that are lent to. Returns how many went to one, of these or, as `served` says, of others; missed[i] |= what
 * was not served. */
int rb_fan_lend(struct rb_fan *f, const rb_desc *d, const uint64_t *mask, uint32_t n, uint64_t *missed, const uint64_t *served);
#endif
