/* SPDX-License-Identifier: Apache-2.0
 *
 * Packets with sequence numbers: what arrives is checked off. Each is lost, once there, there twice, or there too late to say; the last
 * 1,048,576 sequence numbers are remembered. Every byte read belongs to a buffer that a VM may be changing: the worst are wrong
 * counters.
 */
#include "rb_flow.h"

#include <stdlib.h>

int rb_flow_checker_init(struct rb_flow_checker *k, const rb_flow_options *o)
{
    k->stream = o->stream;
    k->plain = o->plain;
    k->seen = calloc(RB_FLOW_WINDOW / 64, sizeof *k->seen);
    k->latency = calloc(RB_FLOW_BUCKETS, sizeof *k->latency);
    return k->seen && k->latency ? 0 : rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
}

void rb_flow_checker_free(struct rb_flow_checker *k)
{
    free(k->seen);
    free(k->latency);
}

/* ---- latency ---------------------------------------------------------------------------------------------------------- */

static uint32_t bucket_of(uint64_t ns)
{
    if (ns < 64)
        return (uint32_t)ns;
    uint32_t up = 63u - (uint32_t)__builtin_clzll(ns) - 6;
    return RB_MIN((up + 1) * 64 + (uint32_t)(ns >> up & 63), RB_FLOW_BUCKETS - 1);
}

/* The middle of a bucket. */
static uint64_t latency_of(uint32_t bucket)
{
    if (bucket < 64)
        return bucket;
    uint32_t up = bucket / 64 - 1;
    return ((uint64_t)(64 + bucket % 64) << up) + ((1ull << up) - 1) / 2;
}

static void latency_add(struct rb_flow_checker *k, uint64_t ns)
{
    uint64_t least = rb_get(&k->latency_min);
    rb_count_up(&k->latency[bucket_of(ns)], 1);
    if (!least || ns < least)
        rb_set(&k->latency_min, ns);
    if (ns > rb_get(&k->latency_max))
        rb_set(&k->latency_max, ns);
}

static void percentiles(const struct rb_flow_checker *k, rb_flow_stats *st)
{
    static const double part[] = {0, 0.5, 0.99, 0.999};
    uint64_t least = rb_get(&k->latency_min), most = rb_get(&k->latency_max);
    for (uint32_t i = 0; i < RB_FLOW_BUCKETS; i++)
        st->latency_count += rb_get(&k->latency[i]);
    for (int n = 1; n < 4 && st->latency_count; n++) {
        double exact = part[n] * (double)st->latency_count;
        uint64_t rank = (uint64_t)exact, sum = 0, found = most;
        rank += (double)rank < exact;
        for (uint32_t i = 0; i < RB_FLOW_BUCKETS; i++)
            if ((sum += rb_get(&k->latency[i])) >= rank) {
                found = latency_of(i);
                break;
            }
        st->latency_ns[n] = RB_MIN(RB_MAX(found, least), most); /* a bucket is wider than what is in it */
    }
    st->latency_ns[0] = least;
    st->latency_ns[4] = most;
}

/* ---- sequence --------------------------------------------------------------------------------------------------------- */

/* Where the payload of UDP begins; 0 = this is none. */
static uint32_t payload(const uint8_t *p, uint32_t length)
{
    uint32_t at = 14, type, next;
    if (length < 42 + sizeof(struct rb_mark))
        return 0;
    for (type = (uint32_t)p[12] << 8 | p[13]; (type == 0x8100 || type == 0x88a8) && at < 22; at += 4)
        type = (uint32_t)p[at + 2] << 8 | p[at + 3];
    if (type == 0x0800) {
        uint32_t words = p[at] & 15u;
        next = p[at + 9];
        at += 4 * words + 8;
    } else if (type == 0x86dd) {
        next = p[at + 6];
        at += 48;
    } else
        return 0;
    return next == 17 && at + sizeof(struct rb_mark) <= length ? at : 0;
}

void rb_flow_check(struct rb_flow_checker *k, const uint8_t *p, uint32_t length, bool more, uint64_t now)
{
    struct rb_mark mark;
    uint32_t at;
    if (k->plain) {
        rb_count_up(&k->received, !more);
        rb_count_up(&k->bytes, length);
        return;
    }
    if (!(at = payload(p, length)) || (memcpy(&mark, p + at, sizeof mark), mark.magic != RB_FLOW_MAGIC) || mark.stream != k->stream) {
        rb_count_up(&k->foreign, 1);
        return;
    }
    rb_count_up(&k->received, 1);
    rb_count_up(&k->bytes, length);
    if (mark.sum != rb_flow_sum(p, length, at)) {
        rb_count_up(&k->corrupted, 1);
        return;
    }
    if (now > mark.sent_ns)
        latency_add(k, now - mark.sent_ns);
    uint64_t *word = &k->seen[mark.sequence % RB_FLOW_WINDOW / 64], bit = 1ull << mark.sequence % 64;
    if (!rb_get(&k->highest))
        rb_set(&k->first, mark.sequence);
    if (mark.sequence >= k->expected) {
        uint64_t gap = mark.sequence - k->expected;
        if (gap >= RB_FLOW_WINDOW)
            memset(k->seen, 0, RB_FLOW_WINDOW / 8);
        else
            for (uint64_t s = k->expected; s <= mark.sequence; s++)
                k->seen[s % RB_FLOW_WINDOW / 64] &= ~(1ull << s % 64);
        *word |= bit;
        k->expected = mark.sequence + 1;
        rb_count_up(&k->distinct, 1);
    } else if (k->expected - mark.sequence > RB_FLOW_WINDOW) /* its bit is another's by now */
        rb_count_up(&k->late, 1);
    else if (!(*word & bit)) {
        *word |= bit;
        rb_count_up(&k->reordered, 1);
        rb_count_up(&k->distinct, 1);
        if (mark.sequence < rb_get(&k->first))
            rb_set(&k->first, mark.sequence);
    } else
        rb_count_up(&k->duplicated, 1);
    rb_set(&k->highest, k->expected);
}

void rb_flow_checker_stats(const struct rb_flow_checker *k, rb_flow_stats *st)
{
    st->received = rb_get(&k->received);
    st->received_bytes = rb_get(&k->bytes);
    st->reordered = rb_get(&k->reordered);
    st->duplicated = rb_get(&k->duplicated);
    st->corrupted = rb_get(&k->corrupted);
    st->foreign = rb_get(&k->foreign);
    st->late = rb_get(&k->late);
    st->distinct = rb_get(&k->distinct);
    st->first_sequence = rb_get(&k->first);
    if (!k->plain)
        percentiles(k, st);
}
