/* SPDX-License-Identifier: Apache-2.0
 * Traffic that proves itself: what its thread (flow.c), the making of packets (flow_make.c) and the checking of those that
 * arrive (flow_check.c) share. Counters are written by the thread alone and read by anybody. */
#ifndef RB_FLOW_H
#define RB_FLOW_H
#include "rb_worker.h"

#define RB_FLOW_MAGIC 0x31574f4c46424752ull /* "RGBFLOW1" */
#define RB_FLOW_HEADERS 66u                 /* the longest: Ethernet, VLAN, IPv6, UDP */
#define RB_FLOW_WIRE 24u                    /* bytes of a frame on a wire that are not in the buffer: preamble 8, FCS 4, gap 12 */

/* Begins the payload of every packet. */
struct rb_mark {
    uint64_t magic;
    uint32_t stream, sum;
    uint64_t sequence, sent_ns;
} __attribute__((packed));
static_assert(sizeof(struct rb_mark) == 32, "mark");

/* How packets are made; constant while the thread runs. */
struct rb_flow_maker {
    rb_flow_options o;
    uint8_t head[RB_FLOW_HEADERS];
    uint32_t headers, ip, udp;     /* bytes of all headers; where these two begin */
    uint32_t longest;
    uint16_t *sizes;               /* taken in turn; one at least */
    uint8_t *frames;               /* sent as they are, in turn, instead of packets of ours; NULL = none */
    uint32_t *frame_at;            /* frame i: from frame_at[i] to frame_at[i + 1] */
};

#define RB_FLOW_BUCKETS 4096u          /* latency: 64 per power of two of nanoseconds, so within 1.6 % */
#define RB_FLOW_WINDOW (1u << 20)      /* sequence numbers remembered to tell late from twice */

struct rb_flow_checker {
    uint32_t stream, plain;
    uint64_t expected;                 /* the next sequence number */
    uint64_t *seen;                    /* bits of the last RB_FLOW_WINDOW sequence numbers */
    rb_a64 *latency;                   /* RB_FLOW_BUCKETS */
    rb_a64 latency_min, latency_max;   /* 0 = none yet */
    rb_a64 received, bytes, reordered, duplicated, corrupted, foreign, late, distinct, highest, first;
};

/* Check and copy `o`; `room`: bytes of a packet that fit a buffer. */
int rb_flow_maker_init(struct rb_flow_maker *m, const rb_flow_options *o, uint32_t room);
void rb_flow_maker_free(struct rb_flow_maker *m);
/* Bytes of packet number `sequence`. */
uint32_t rb_flow_length(const struct rb_flow_maker *m, uint64_t sequence);
/* Write it to `p`. */
void rb_flow_make(const struct rb_flow_maker *m, uint8_t *p, uint64_t sequence, uint64_t now);
/* Sum over every byte but the sum itself (and UDP's own, which covers this one). `mark`: where the mark begins. */
uint32_t rb_flow_sum(const uint8_t *p, uint32_t length, uint32_t mark);

int rb_flow_checker_init(struct rb_flow_checker *k, const rb_flow_options *o);
void rb_flow_checker_free(struct rb_flow_checker *k);
/* `more`: the packet goes on in the next buffer. */
void rb_flow_check(struct rb_flow_checker *k, const uint8_t *p, uint32_t length, bool more, uint64_t now);
/* The checker's part of the counters. `upto`: so many were sent for certain. */
void rb_flow_checker_stats(const struct rb_flow_checker *k, rb_flow_stats *st);
#endif
