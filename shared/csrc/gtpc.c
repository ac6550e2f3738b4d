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
#include <string.h>

#define SETS 16384u
#define WAYS 4u

struct rb_gtpc {
    struct {
        uint64_t name, session; /* name 0: free */
    } entry[SETS][WAYS]; /* of a set the oldest first */
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
    memmove(&g->entry[name % SETS][0], &g->entry[name % SETS][1], sizeof g->entry[0] - sizeof g->entry[0][0]);
    g->entry[name % SETS][WAYS - 1].name = name;
    g->entry[name % SETS][WAYS - 1].session = session;
}

static uint32_t get16(const uint8_t *p) { return (uint32_t)p[0] << 8 | p[1]; }
static uint32_t get32(const uint8_t *p) { return get16(p) << 16 | get16(p + 2); }

/* A node as a message names it: its TEID, and its address if the message has one of the packet's family. */
struct sender {
    uint32_t teid; /* 0 = the message names none */
    uint64_t node[2];
};

static void address(struct sender *s, const uint8_t *p, uint32_t bytes, bool v6)
{
    if (bytes == 4 && !v6)
        s->node[0] = 0, s->node[1] = get32(p);
    else if (bytes == 16 && v6)
        s->node[0] = (uint64_t)get32(p) << 32 | get32(p + 4), s->node[1] = (uint64_t)get32(p + 8) << 32 | get32(p + 12);
}

/* Version 1: "TEID control plane", and the first "GSN address", the sender's for control. Elements come in ascending order; those below 128 have fixed
 * lengths. */
static void sender_v1(struct sender *s, const uint8_t *p, uint32_t length, bool v6)
{
    static const uint8_t size[128] = {[1] = 1, [2] = 8, [3] = 6, [4] = 4, [5] = 4, [8] = 1, [9] = 28, [11] = 1, [12] = 3, [13] = 1, [14] = 1, [15] = 1,
                                      [16] = 4, [17] = 4, [18] = 5, [19] = 1, [20] = 1, [21] = 1, [22] = 9, [23] = 1, [24] = 1, [25] = 2, [26] = 2, [27] = 2,
                                      [28] = 2, [29] = 1, [127] = 4};
    uint32_t at = 8, n;
    if (p[0] & 7) { /* sequence number, N-PDU number, extension headers */
        uint32_t kind = p[0] & 4 ? p[11] : 0;
        for (at = 12; kind; at += 4u * p[at]) {
            if (at >= length || !p[at] || at + 4u * p[at] > length)
                return;
            kind = p[at + 4u * p[at] - 1];
        }
    }
    for (; at + 3 <= length; at += n) {
        n = p[at] < 128 ? 1u + size[p[at]] : 3 + get16(p + at + 1);
        if (n == 1 || at + n > length) /* not known, or cut off */
            return;
        if (p[at] == 17)
            s->teid = get32(p + at + 1);
        if (p[at] == 133) {
            address(s, p + at + 3, n - 3, v6);
            return;
        }
    }
}

/* Version 2: "F-TEID" of instance 0, of an interface for control. The answer to Create Session of a PGW has its own as instance 1 instead. */
static void sender_v2(struct sender *s, const uint8_t *p, uint32_t length, bool v6)
{
    static const uint64_t control = 1ull << 6 | 1ull << 7 | 31ull << 10 | 3ull << 17 | 15ull << 24 | 1ull << 30 | 1ull << 32 | 3ull << 35;
    static const uint64_t pgw = 1ull << 7 | 1ull << 32 | 1ull << 36;
    const uint64_t node[2] = {s->node[0], s->node[1]};
    uint32_t n;
    for (uint32_t at = 12; at + 9 <= length; at += n) {
        const uint32_t instance = p[at + 3] & 15, flags = p[at + 4], interface = flags & 63, v4 = flags & 0x80 ? 4 : 0;
        n = 4 + get16(p + at + 1);
        if (p[at] != 87 || n < 9 || at + n > length || instance > 1 || !(control >> interface & 1))
            continue;
        if (instance && (s->teid || p[1] != 33 || !(pgw >> interface & 1)))
            continue;
        s->teid = get32(p + at + 5);
        memcpy(s->node, node, sizeof node);
        if (v6 && flags & 0x40 && n >= 9 + v4 + 16)
            address(s, p + at + 9 + v4, 16, v6);
        else if (!v6 && v4 && n >= 13)
            address(s, p + at + 9, 4, v6);
        if (!instance)
            return;
    }
}

static uint64_t name_of(const uint64_t node[2], uint32_t teid) { return rb_mix(rb_mix(rb_mix(RB_SEED, node[0]), node[1]), teid); }

uint64_t rb_gtpc_session(struct rb_gtpc *g, const uint64_t from[2], const uint64_t to[2], bool v6, const uint8_t *p, uint32_t length)
{
    if (length < 12 || !(p[0] >> 5 == 1 ? p[0] & 16 : p[0] >> 5 == 2 && p[0] & 8)) /* GTP, with a TEID */
        return 0;
    const uint32_t teid = get32(p + 4);
    struct sender sender = {0, {from[0], from[1]}};
    if (p[0] >> 5 == 1)
        sender_v1(&sender, p, length, v6);
    else
        sender_v2(&sender, p, length, v6);
    if (!teid && !sender.teid)
        return 0;
    const uint64_t its = name_of(sender.node, sender.teid);
    uint64_t session = teid ? name_of(to, teid) : its;
    const uint64_t *known = teid ? remembered(g, session) : NULL;
    session = known ? *known : session;
    if (sender.teid)
        remember(g, its, session);
    return session;
}
