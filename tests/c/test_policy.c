/* SPDX-License-Identifier: Apache-2.0
 * The balancers' parsing on packets that are nearly right: tunnels in tunnels, tags, extension headers, with bits turned, pieces
 * moved and ends cut off. It stays inside the packet (each lies in memory of just its size, under the address sanitizer),
 * what lies behind the packet changes nothing, and the quick way for the usual packet says what the slow one says. */
#include "check.h"
#include "rb_internal.h"
#include "rb_worker.h"

#define MOST 400u

static uint64_t seed = 0x2545f4914f6cdd1dull;
static uint32_t any(uint32_t below)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (uint32_t)(seed >> 33) % below;
}

static uint8_t packet[MOST + 128];
static uint32_t length;

static void put(uint32_t value, uint32_t bytes)
{
    while (bytes-- && length < MOST)
        packet[length++] = (uint8_t)(value >> 8 * bytes);
}
static void noise(uint32_t bytes)
{
    while (bytes--)
        put(any(256), 1);
}

/* Information elements of GTP-C, of both versions. */
static void elements(void)
{
    static const uint32_t fixed[] = {1, 2, 3, 14, 15, 16, 17, 20, 127}, sizes[] = {1, 8, 6, 1, 1, 4, 4, 1, 4};
    for (uint32_t n = any(6); n; n--) {
        uint32_t i = any(9), bytes = any(3) ? 4 + any(30) : any(300);
        if (any(2)) {
            put(fixed[i], 1);
            noise(sizes[i]);
        } else {
            bool version_1 = any(2);
            put(version_1 ? (any(2) ? 133 : 128 + any(128)) : any(2) ? 87 : any(256), 1);
            put(bytes, 2);
            if (!version_1)
                put(any(3), 1);
            noise(any(8) ? bytes : any(bytes + 1));
        }
    }
}

static void network(uint32_t depth);

/* What is inside UDP, GRE or a tunnel; mostly what belongs there. */
static void udp(uint32_t depth)
{
    static const uint32_t known[] = {2152, 2123, 4789, 53};
    uint32_t port = any(8) ? known[any(4)] : any(65536);
    put(any(2) ? port : any(65536), 2);
    put(port, 2);
    put(any(1500), 2);
    put(0, 2);
    if (port == 2152) {
        uint32_t flags = any(8);
        put(0x30 | flags, 1); /* version 1, with extension, sequence or N-PDU number */
        put(any(5) ? 255 : any(256), 1);
        put(any(600), 2);
        put(any(UINT32_MAX), 4);
        if (flags) {
            put(any(65536), 2);
            put(any(256), 1);
            uint32_t more = any(5); /* extension headers; the last says that none follows */
            put(more ? 0x85 : 0, 1);
            for (; more; more--) {
                put(any(3) ? 1 : any(256), 1);
                put(any(65536), 2);
                put(more > 1 || !any(4) ? 0x85 : 0, 1);
            }
        }
        if (depth)
            network(depth - 1);
    } else if (port == 2123) {
        put(any(2) ? 0x32 : 0x48 | any(32), 1);
        put(any(256), 1);
        put(any(100), 2);
        noise(any(4) ? 8 : 12);
        elements();
    } else if (port == 4789) {
        put(any(4) ? 0x08000000 : any(UINT32_MAX), 4);
        put(any(UINT32_MAX), 4);
        noise(12);
        put(any(2) ? 0x0800 : 0x86dd, 2);
        if (depth)
            network(depth - 1);
    }
}

static void gre(uint32_t depth)
{
    static const uint32_t types[] = {0x0800, 0x86dd, 0x6558, 0x88be, 0x22eb};
    uint32_t flags = any(4) ? (any(2) << 15) | (any(2) << 13) | (any(2) << 12) : any(65536), type = types[any(5)];
    put(flags, 2);
    put(type, 2);
    for (uint32_t bit = 15; bit >= 12; bit--)
        if (flags >> bit & 1)
            noise(4);
    if (type == 0x88be)
        noise(8);
    if (type == 0x6558 || type == 0x88be) {
        noise(12);
        put(any(2) ? 0x0800 : 0x86dd, 2);
    }
    if (depth)
        network(depth - 1);
}

static void transport(uint32_t protocol, uint32_t depth)
{
    if (protocol == 17)
        udp(depth);
    else if (protocol == 47)
        gre(depth);
    else
        noise(any(40));
}

static void network(uint32_t depth)
{
    static const uint32_t protocols[] = {6, 17, 17, 17, 47, 47, 132, 1}, headers[] = {0, 43, 44, 60, 51, 135};
    uint32_t protocol = protocols[any(8)];
    if (any(2)) {
        uint32_t words = any(4) ? 5 : any(16);
        put(0x40 | words, 1);
        put(0, 1);
        put(any(2000), 2);
        put(any(65536), 2);
        put(any(4) ? 0 : any(65536), 2); /* whole, or a fragment */
        put(64, 1);
        put(protocol, 1);
        put(0, 2);
        noise(8);
        noise(words > 5 ? 4 * (words - 5) : 0);
    } else {
        uint32_t more = any(3) ? 0 : any(15), next = more ? headers[any(6)] : protocol;
        put(0x60000000 | any(1 << 20), 4);
        put(any(2000), 2);
        put(next, 1);
        put(64, 1);
        noise(32);
        for (; more; more--) {
            uint32_t here = next, size = any(4) ? 0 : any(256);
            next = more > 1 ? headers[any(6)] : protocol;
            put(next, 1);
            put(size, 1);
            noise(here == 51 ? 4 * (size + 2) - 2 : 8 * (size + 1) - 2);
        }
    }
    transport(protocol, depth);
}

static void make(void)
{
    length = 0;
    noise(12);
    for (uint32_t tags = any(3) ? 0 : any(6); tags; tags--) {
        put(any(2) ? 0x8100 : any(2) ? 0x88a8 : 0x9100, 2);
        put(any(65536), 2);
    }
    if (any(10)) {
        put(any(2) ? 0x0800 : 0x86dd, 2);
        network(3);
    } else {
        put(any(65536), 2);
        noise(any(60));
    }
    for (uint32_t turns = any(3) ? 0 : any(12); turns && length; turns--)
        packet[any(length)] ^= (uint8_t)(1u << any(8));
    if (length > 40 && !any(10))
        memmove(packet + any(20), packet + any(40), length - 40);
    if (length && !any(4))
        length = any(length + 1);
}

/* In memory of their own size: a packet lies before others in the pool, and its copy before zeros. */
static void gtpc_messages_are_read_within_their_bounds(void)
{
    struct rb_gtpc *sessions = rb_gtpc_make();
    uint64_t named = 0, rounds = getenv("RB_PACKETS") ? strtoull(getenv("RB_PACKETS"), NULL, 0) : 100000;
    CHECK(sessions);
    for (uint64_t round = 0; round < rounds; round++) {
        length = 0;
        put(any(2) ? 0x30 | any(8) : 0x48 | any(8), 1);
        put(any(4) ? 33 : any(256), 1);
        noise(any(2) ? 10 : 6);
        elements();
        length = any(4) ? length : any(length + 1);
        uint8_t *exact = malloc(length ? length : 1);
        CHECK(exact);
        memcpy(exact, packet, length);
        named += rb_gtpc_session(sessions, (uint64_t[]){0, any(4)}, (uint64_t[]){0, any(4)}, any(2), exact, length) != 0;
        free(exact);
    }
    CHECK(named > rounds / 2);
    free(sessions);
}

static void any_packet_is_read_within_its_bounds(void)
{
    static const char *const policies[] = {"ip", "5tuple", "gtp", "gtp-ip", "gre", "gre-ip", "vxlan", "vxlan-ip", "vlan", "gtp-session"};
    enum { POLICIES = sizeof policies / sizeof *policies };
    struct rb_policy parsed[POLICIES];
    uint64_t differs = 0, rounds = getenv("RB_PACKETS") ? strtoull(getenv("RB_PACKETS"), NULL, 0) : 100000;

    for (int p = 0; p < POLICIES; p++)
        OK(rb_policy_parse(policies[p], NULL, NULL, &parsed[p]));
    for (uint64_t round = 0; round < rounds; round++) {
        make();
        uint8_t *exact = malloc(length ? length : 1);
        CHECK(exact);
        memcpy(exact, packet, length);
        for (uint32_t i = length; i < length + 128; i++)
            packet[i] = (uint8_t)any(256);
        rb_desc d = {0};
        rb_desc_set(&d, length, 0, 0);
        uint32_t plain = 0;
        for (int p = 0; p < POLICIES; p++) {
            uint32_t quick, behind;
            const uint8_t *where = exact;
            rb_policy_hashes(&parsed[p], &where, &d, 1, &quick);
            where = packet;
            rb_policy_hashes(&parsed[p], &where, &d, 1, &behind);
            CHECK(quick == behind);
            CHECK(quick == rb_policy_hash(&parsed[p], exact, length));
            if (p == 1)
                plain = quick;
            differs += p > 1 && p % 2 == 0 && p < 8 && quick != plain;
        }
        free(exact);
    }
    CHECK(differs > rounds / 50); /* the packets get as far as the tunnels */
    for (int p = 0; p < POLICIES; p++)
        rb_policy_close(&parsed[p]);
}

int main(void)
{
    RUN(any_packet_is_read_within_its_bounds);
    RUN(gtpc_messages_are_read_within_their_bounds);
    return 0;
}
