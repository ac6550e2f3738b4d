/* SPDX-License-Identifier: Apache-2.0
 *
 * GTP-C by session, for the policy gtp-session. Each of the two nodes of a session chooses its own tunnel endpoint identifier (TEID), and a message
 * carries that of whom it is for; so both directions meet only if somebody remembers who answered whom. A session is named by the node that opened it
 * and the TEID that this node chose. The first request has it inside, as its sender's; the answer is addressed to it, and has the other node's TEID
 * inside, which from then on is remembered to mean the same session. So is that of a node which takes a session over.
 *
 * Message formats: 3GPP TS 29.060 (version 1) and TS 29.274 (version 2).
 */
#include "rb_worker.h"

#include <stdlib.h>

#define SETS 16384u
#define WAYS 4u

struct rb_gtpc {
    uint32_t next; /* of its set, replaced when the set is full */
    struct {
        uint64_t name, session; /* name 0: free */
    } entry[SETS][WAYS];
};

struct rb_gtpc *rb_gtpc_make(void) { return calloc(1, sizeof(struct rb_gtpc)); }

/* The session that a node's TEID was remembered for; NULL: none. */
static uint64_t *remembered(struct rb_gtpc *g, uint64_t name)
{
    for (uint32_t i = 0; i < WAYS; i++)
        if (g->entry[name % SETS][i].name == name)
            return &g->entry[name % SETS][i].session;
    return NULL;
}

static void remember(struct rb_gtpc *g, uint64_t name, uint64_t session)
{
    uint64_t *there = remembered(g, name);
    if (there) {
        *there = session;
        return;
    }
    if (name == session) /* what is not remembered means itself */
        return;
    uint32_t i = 0;
    while (i < WAYS && g->entry[name % SETS][i].name)
        i++;
    i = i < WAYS ? i : g->next++ % WAYS;
    g->entry[name % SETS][i].name = name;
    g->entry[name % SETS][i].session = session;
}

static uint32_t get16(const uint8_t *p) { return (uint32_t)p[0] << 8 | p[1]; }
static uint32_t get32(const uint8_t *p) { return get16(p) << 16 | get16(p + 2); }

/* Version 1: the information element "TEID control plane", behind others of fixed lengths in ascending order. 0 = there is none. */
static uint32_t sender_v1(const uint8_t *p, uint32_t length)
{
    static const uint8_t size[] = {[1] = 1, [2] = 8, [3] = 6, [4] = 4, [5] = 4, [8] = 1, [9] = 28, [11] = 1, [12] = 3, [13] = 1, [14] = 1, [15] = 1, [16] = 4};
    uint32_t at = 8;
    if (p[0] & 7) { /* sequence number, N-PDU number, extension headers */
        uint32_t kind = p[0] & 4 && length >= 12 ? p[11] : 0;
        for (at = 12; kind; at += 4u * p[at]) {
            if (at >= length || !p[at] || at + 4u * p[at] > length)
                return 0;
            kind = p[at + 4u * p[at] - 1];
        }
    }
    while (at + 5 <= length && p[at] != 17) {
        if (p[at] >= sizeof size || !size[p[at]])
            return 0;
        at += 1u + size[p[at]];
    }
    return at + 5 <= length ? get32(p + at + 1) : 0;
}

/* Version 2: the information element "F-TEID", instance 0: the sender's. 0 = there is none. */
static uint32_t sender_v2(const uint8_t *p, uint32_t length)
{
    for (uint32_t at = 12; at + 9 <= length; at += 4 + get16(p + at + 1))
        if (p[at] == 87 && !(p[at + 3] & 15))
            return get16(p + at + 1) >= 5 ? get32(p + at + 5) : 0;
    return 0;
}

static uint64_t name_of(const uint64_t node[2], uint32_t teid) { return rb_mix(rb_mix(rb_mix(RB_SEED, node[0]), node[1]), teid); }

uint64_t rb_gtpc_session(struct rb_gtpc *g, const uint64_t from[2], const uint64_t to[2], const uint8_t *p, uint32_t length)
{
    if (length < 12 || !(p[0] >> 5 == 1 ? p[0] & 16 : p[0] >> 5 == 2 && p[0] & 8)) /* GTP, with a TEID */
        return 0;
    const uint32_t teid = get32(p + 4), sender = p[0] >> 5 == 1 ? sender_v1(p, length) : sender_v2(p, length);
    if (!teid && !sender)
        return 0;
    uint64_t session = teid ? name_of(to, teid) : name_of(from, sender);
    const uint64_t *known = teid ? remembered(g, session) : NULL;
    session = known ? *known : session;
    if (sender)
        remember(g, name_of(from, sender), session);
    return session;
}
