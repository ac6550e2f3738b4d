/* SPDX-License-Identifier: Apache-2.0
 *
 * Which output a packet goes to: policies by name, what they look at in a packet, and the hash of it. docs/workers.md tells the same in words
 * that others can compute it from.
 *
 * A VM may be writing to the packet while it is looked at: every byte is read once. The usual packet (Ethernet, IPv4 without options, TCP or UDP,
 * in one piece) is read as four words; of any other the first WINDOW bytes are copied, and the copy is parsed.
 */
#include "rb_worker.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- the hash ---------------------------------------------------------------------------------------------------------- */

#define LAST 0xd6e8feb86659fd93ull

static inline uint32_t finish(uint64_t h) { return (uint32_t)(h * LAST >> 32); }

/* Without a jump, which half of all packets would take. */
static inline uint64_t smaller(uint64_t a, uint64_t b) { return b ^ ((a ^ b) & -(uint64_t)(a < b)); }
static inline uint64_t larger(uint64_t a, uint64_t b) { return a ^ ((a ^ b) & -(uint64_t)(a < b)); }

/* IPv4: each end is address << 16 | port; the smaller end first, the protocol above it. */
static inline uint32_t hash_v4(uint64_t a, uint64_t b, uint64_t protocol)
{
    return finish(rb_mix(rb_mix(RB_SEED, smaller(a, b) | protocol << 48), larger(a, b)));
}

/* ---- parsing ------------------------------------------------------------------------------------------------------------- */

#define WINDOW 256u /* bytes of a packet that are looked at */
#define TAGS 4      /* VLAN tags passed over */
#define EXTENSIONS 12 /* IPv6 and GTP extension headers passed over */

struct view { /* a private copy of a packet's beginning */
    uint32_t length;
    uint8_t byte[WINDOW + 8]; /* zero beyond length */
};

struct key { /* what was found; a, b: the two ends */
    enum { NOTHING, LINK, IPV4, IPV6 } kind;
    uint64_t a[2], b[2]; /* address; IPv4 and MAC in [1] */
    uint32_t a_port, b_port, protocol; /* LINK: protocol is the EtherType */
    uint32_t payload;    /* where that of UDP, or of the protocol, begins; 0 = there is none, or it is a fragment */
    uint32_t vlan[2];
    uint64_t session;    /* GTP-C: what names its transaction; 0 = none */
    bool whole;          /* and it names a session, by itself */
};

static inline uint32_t get16(const struct view *v, uint32_t at) { return (uint32_t)v->byte[at] << 8 | v->byte[at + 1]; }
static inline uint32_t get32(const struct view *v, uint32_t at) { return get16(v, at) << 16 | get16(v, at + 2); }
static inline uint64_t get64(const struct view *v, uint32_t at) { return (uint64_t)get32(v, at) << 32 | get32(v, at + 4); }
static inline bool has(const struct view *v, uint32_t at, uint32_t n) { return at + n <= v->length; } /* at is small: never wraps */

/* Ports, where the protocol has some and they are there. */
static void ports(const struct view *v, uint32_t at, struct key *k)
{
    const uint32_t p = k->protocol;
    k->payload = at;
    if ((p == 6 || p == 17 || p == 132 || p == 33 || p == 136) && has(v, at, 4)) {
        k->a_port = get16(v, at);
        k->b_port = get16(v, at + 2);
    }
}

static bool ipv4(const struct view *v, uint32_t at, struct key *k)
{
    if (!has(v, at, 20) || v->byte[at] >> 4 != 4 || (v->byte[at] & 15) < 5)
        return false;
    const uint32_t words = v->byte[at] & 15;
    k->kind = IPV4;
    k->a[0] = k->b[0] = 0;
    k->a[1] = get32(v, at + 12);
    k->b[1] = get32(v, at + 16);
    k->a_port = k->b_port = k->protocol = k->payload = 0;
    if (get16(v, at + 6) & 0x3fff) /* a fragment: only the first has ports, so none counts, and all meet */
        return true;
    k->protocol = v->byte[at + 9];
    ports(v, at + 4 * words, k);
    return true;
}

static bool ipv6(const struct view *v, uint32_t at, struct key *k)
{
    if (!has(v, at, 40) || v->byte[at] >> 4 != 6)
        return false;
    k->kind = IPV6;
    for (uint32_t i = 0; i < 2; i++) {
        k->a[i] = get64(v, at + 8 + 8 * i);
        k->b[i] = get64(v, at + 24 + 8 * i);
    }
    k->a_port = k->b_port = k->protocol = k->payload = 0;
    uint32_t next = v->byte[at + 6];
    at += 40;
    for (int i = 0; i < EXTENSIONS; i++) {
        bool options = next == 0 || next == 43 || next == 60 || next == 135 || next == 139 || next == 140, fragment = next == 44;
        if (!options && !fragment && next != 51)
            break;
        if (!has(v, at, 8))
            break;
        if (fragment && get16(v, at + 2) & 0xfff9)
            return true; /* as with IPv4 */
        uint32_t bytes = fragment ? 8 : options ? 8 * (v->byte[at + 1] + 1u) : 4 * (v->byte[at + 1] + 2u);
        next = v->byte[at];
        at += bytes;
        if (at > WINDOW) /* what follows is not looked at */
            at = WINDOW;
    }
    k->protocol = next;
    ports(v, at, k);
    return true;
}

static bool ip(const struct view *v, uint32_t at, struct key *k)
{
    return has(v, at, 1) && (v->byte[at] >> 4 == 4 ? ipv4(v, at, k) : v->byte[at] >> 4 == 6 && ipv6(v, at, k));
}

static bool ethernet(const struct view *v, uint32_t at, struct key *k)
{
    if (!has(v, at, 14))
        return false;
    uint32_t type = get16(v, at + 12), tags = 0, next = at + 14;
    k->kind = LINK;
    k->a[0] = k->b[0] = 0;
    k->b[1] = get64(v, at) >> 16;
    k->a[1] = get64(v, at + 6) >> 16;
    k->a_port = k->b_port = k->payload = 0;
    k->vlan[0] = k->vlan[1] = 0;
    while ((type == 0x8100 || type == 0x88a8 || type == 0x9100) && tags < TAGS && has(v, next, 4)) {
        if (tags < 2)
            k->vlan[tags] = get16(v, next) & 0xfff;
        tags++;
        type = get16(v, next + 2);
        next += 4;
    }
    k->protocol = type;
    if ((type == 0x0800 && ipv4(v, next, k)) || (type == 0x86dd && ipv6(v, next, k)))
        return true;
    return true;
}

/* ---- tunnels --------------------------------------------------------------------------------------------------------------- */

static bool udp_to(const struct view *v, const struct key *k, uint32_t port)
{
    return k->kind >= IPV4 && k->protocol == 17 && k->payload && (k->a_port == port || k->b_port == port) && has(v, k->payload, 8);
}

static void gtp(const struct view *v, struct key *k, struct rb_gtpc *sessions)
{
    const uint32_t at = k->payload + 8;
    struct key inner = *k;
    if (udp_to(v, k, 2152) && has(v, at, 8)) { /* GTP-U */
        uint32_t flags = v->byte[at], next = at + 8;
        if (flags >> 4 != 3 || v->byte[at + 1] != 255) /* version 1, not GTP'; a packet of a user */
            return;
        if (flags & 7) {
            uint32_t kind = flags & 4 ? v->byte[at + 11] : 0;
            if (!has(v, at, 12))
                return;
            next = at + 12;
            for (int i = 0; kind && i < EXTENSIONS && has(v, next, 4); i++) {
                uint32_t bytes = 4u * v->byte[next];
                if (!bytes || !has(v, next, bytes))
                    return;
                kind = v->byte[next + bytes - 1];
                next += bytes;
            }
            if (kind)
                return;
        }
        if (ip(v, next, &inner))
            *k = inner;
    } else if (udp_to(v, k, 2123) && has(v, at, 8)) { /* GTP-C: a request and its answer have the same sequence number */
        if (sessions && (k->session = rb_gtpc_session(sessions, k->a, k->b, k->kind == IPV6, v->byte + at, v->length - at)) != 0) {
            k->whole = true;
            return;
        }
        uint32_t flags = v->byte[at], version = flags >> 5;
        if (version == 1 && flags & 2 && has(v, at, 10))
            k->session = 1ull << 32 | get16(v, at + 8);
        else if (version == 1)
            k->session = 2ull << 32 | get32(v, at + 4);
        else if (version == 2 && flags & 8 && has(v, at, 12))
            k->session = 3ull << 32 | get32(v, at + 8) >> 8;
        else if (version == 2 && !(flags & 8))
            k->session = 3ull << 32 | get32(v, at + 4) >> 8;
        if (k->session)
            k->a_port = k->b_port = 0;
    }
}

static void gre(const struct view *v, struct key *k)
{
    const uint32_t at = k->payload;
    struct key inner = *k;
    if (k->kind < IPV4 || k->protocol != 47 || !at || !has(v, at, 4))
        return;
    uint32_t flags = get16(v, at), type = get16(v, at + 2), next = at + 4;
    if ((flags & 7) > 1 || flags & 0x4000) /* version 0, or 1 (PPTP), without source routes */
        return;
    next += (flags & 0x8000 ? 4u : 0) + (flags & 0x2000 ? 4u : 0) + (flags & 0x1000 ? 4u : 0) + ((flags & 7) == 1 && flags & 0x80 ? 4u : 0);
    if (type == 0x88be && flags & 0x1000) /* ERSPAN type II */
        next += 8;
    bool found = type == 0x0800 ? ipv4(v, next, &inner)
               : type == 0x86dd ? ipv6(v, next, &inner)
               : (type == 0x6558 || type == 0x88be) && ethernet(v, next, &inner);
    if (found)
        *k = inner;
}

static void vxlan(const struct view *v, struct key *k)
{
    const uint32_t at = k->payload + 8;
    struct key inner = *k;
    if (udp_to(v, k, 4789) && k->b_port == 4789 && has(v, at, 8) && v->byte[at] & 8 && ethernet(v, at + 8, &inner))
        *k = inner;
}

/* ---- hashing a packet -------------------------------------------------------------------------------------------------------- */

static uint32_t hash_key(const struct key *k, bool addresses)
{
    uint64_t h = RB_SEED, ap = addresses ? 0 : k->a_port, bp = addresses ? 0 : k->b_port, protocol = addresses ? 0 : k->protocol;
    if (k->kind == NOTHING)
        return 0;
    if (k->whole)
        return finish(k->session);
    if (k->kind == LINK) {
        h = rb_mix(rb_mix(h, smaller(k->a[1], k->b[1])), larger(k->a[1], k->b[1]) | (uint64_t)k->protocol << 48);
    } else if (k->kind == IPV4) {
        uint64_t a = k->a[1] << 16 | ap, b = k->b[1] << 16 | bp;
        h = rb_mix(rb_mix(h, smaller(a, b) | protocol << 48), larger(a, b));
    } else {
        bool swap = k->a[0] != k->b[0] ? k->a[0] > k->b[0] : k->a[1] != k->b[1] ? k->a[1] > k->b[1] : ap > bp;
        const uint64_t *x = swap ? k->b : k->a, *y = swap ? k->a : k->b;
        h = rb_mix(rb_mix(rb_mix(rb_mix(h, x[0]), x[1]), y[0]), y[1]);
        h = rb_mix(h, (swap ? bp : ap) << 16 | (swap ? ap : bp) | protocol << 32);
    }
    if (k->session && !addresses)
        h = rb_mix(h, k->session);
    return finish(h);
}

static __attribute__((noinline)) uint32_t hash_any(enum rb_policy_kind kind, bool addresses, struct rb_gtpc *sessions, const uint8_t *packet, uint32_t length)
{
    struct view v;
    struct key k = {.kind = NOTHING};
    v.length = RB_MIN(length, WINDOW);
    memcpy(v.byte, packet, v.length); /* the one look at it */
    memset(v.byte + v.length, 0, sizeof v.byte - v.length);
    __asm__ volatile("" ::: "memory"); /* and no second one by the compiler */
    if (!ethernet(&v, 0, &k))
        return 0;
    if (kind == RB_BY_VLAN)
        return finish(rb_mix(RB_SEED, k.vlan[0] | (uint64_t)k.vlan[1] << 16));
    if (kind == RB_BY_GTP || kind == RB_BY_GTP_SESSION)
        gtp(&v, &k, sessions);
    else if (kind == RB_BY_GRE)
        gre(&v, &k);
    else if (kind == RB_BY_VXLAN)
        vxlan(&v, &k);
    return hash_key(&k, addresses);
}

typedef uint64_t __attribute__((may_alias, aligned(1))) word64;
typedef uint32_t __attribute__((may_alias, aligned(1))) word32;
static inline uint64_t load64(const uint8_t *p) { return *(const volatile word64 *)p; }
static inline uint32_t load32(const uint8_t *p) { return *(const volatile word32 *)p; }

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the usual packet is read as little-endian words");

/* The usual packet. false: look at it more closely. */
static inline bool usual(const uint8_t *p, uint32_t length, uint64_t *a, uint64_t *b, uint64_t *protocol)
{
    if (length < 38)
        return false;
    uint32_t w = load32(p + 12), x = load32(p + 20); /* EtherType, version, length of the header; fragment's offset, protocol */
    uint64_t addresses = __builtin_bswap64(load64(p + 26)), proto = x >> 24;
    uint32_t ports = __builtin_bswap32(load32(p + 34));
    if (((w & 0xffffff) ^ 0x450008) | (x & 0xff3f) | ((proto != 6) & (proto != 17)))
        return false;
    *a = addresses >> 32 << 16 | ports >> 16;
    *b = (addresses & 0xffffffff) << 16 | (ports & 0xffff);
    *protocol = proto;
    return true;
}

uint32_t rb_policy_hash(const struct rb_policy *policy, const uint8_t *packet, uint32_t length)
{
    return hash_any(policy->kind, policy->addresses, policy->sessions, packet, length);
}

void rb_policy_hashes(const struct rb_policy *policy, const uint8_t *const *packet, const rb_desc *desc, int n, uint32_t *hash)
{
    uint64_t a, b, protocol;
    const bool addresses = policy->addresses;
    const enum rb_policy_kind kind = policy->kind;
    if (kind == RB_BY_5TUPLE) {
        for (int i = 0; i < n; i++)
            hash[i] = usual(packet[i], rb_desc_length(&desc[i]), &a, &b, &protocol) ? hash_v4(a, b, protocol)
                                                                                    : hash_any(kind, false, NULL, packet[i], rb_desc_length(&desc[i]));
    } else if (kind == RB_BY_IP) {
        for (int i = 0; i < n; i++)
            hash[i] = usual(packet[i], rb_desc_length(&desc[i]), &a, &b, &protocol) ? hash_v4(a >> 16 << 16, b >> 16 << 16, 0)
                                                                                    : hash_any(kind, true, NULL, packet[i], rb_desc_length(&desc[i]));
    } else {
        for (int i = 0; i < n; i++)
            hash[i] = hash_any(kind, addresses, policy->sessions, packet[i], rb_desc_length(&desc[i]));
    }
}

bool rb_policy_numbers(struct rb_policy *policy, struct rb_cluster *c, uint32_t input, const rb_desc *desc, int n, uint32_t *number)
{
    const uint8_t *packet[RB_MAX_BURST];
    uint32_t same;
    switch (policy->kind) {
    case RB_BY_RR:
        for (int i = 0; i < n; i++)
            number[i] = policy->next + (uint32_t)i;
        policy->next += (uint32_t)n;
        return false;
    case RB_BY_RR_BURST:
    case RB_BY_INPUT:
        same = policy->kind == RB_BY_INPUT ? input : policy->next++;
        for (int i = 0; i < n; i++)
            number[i] = same;
        return false;
    default:
        for (int i = 0; i < n; i++) { /* all on their way into the cache before the first is looked at */
            packet[i] = rb_packet(c, &desc[i]);
            __builtin_prefetch(packet[i] + 12);
        }
        rb_policy_hashes(policy, packet, desc, n, number);
        return true;
    }
}

/* ---- by name ------------------------------------------------------------------------------------------------------------------ */

static const struct {
    const char *name;
    enum rb_policy_kind kind;
    bool addresses;
} names[] = {
    {"rr", RB_BY_RR, false},      {"rr-burst", RB_BY_RR_BURST, false}, {"ip", RB_BY_IP, true},          {"5tuple", RB_BY_5TUPLE, false},
    {"gtp", RB_BY_GTP, false},    {"gtp-ip", RB_BY_GTP, true},         {"gre", RB_BY_GRE, false},       {"gre-ip", RB_BY_GRE, true},
    {"gtp-session", RB_BY_GTP_SESSION, false},
    {"vxlan", RB_BY_VXLAN, false}, {"vxlan-ip", RB_BY_VXLAN, true},    {"vlan", RB_BY_VLAN, false},     {"input", RB_BY_INPUT, false},
};

static int from_library(const char *text, struct rb_policy *out)
{
    char path[sizeof out->text];
    const char *colon = strrchr(text, ':');
    snprintf(path, sizeof path, "%.*s", (int)(colon - text), text);
    out->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!out->library)
        return rb_fail(EINVAL, "bad-policy", NULL, "the library of policy %s cannot be loaded: %s", text, dlerror());
    *(void **)&out->choose = dlsym(out->library, colon + 1);
    if (!out->choose) {
        dlclose(out->library);
        rb_fail(EINVAL, "bad-policy", NULL, "%s has no function %s", path, colon + 1);
        return rb_cure(EINVAL, "see: nm -D %s", path);
    }
    out->kind = RB_BY_FUNCTION;
    return 0;
}

int rb_policy_parse(const char *text, rb_choose choose, void *user, struct rb_policy *out)
{
    memset(out, 0, sizeof *out);
    out->user = user;
    if (choose) {
        out->kind = RB_BY_FUNCTION;
        out->choose = choose;
        snprintf(out->text, sizeof out->text, "%s", text && *text ? text : "function");
        return 0;
    }
    text = text && *text ? text : "5tuple";
    if (strlen(text) >= sizeof out->text)
        return rb_fail(EINVAL, "bad-policy", NULL, "a policy has at most %zu letters", sizeof out->text - 1);
    snprintf(out->text, sizeof out->text, "%s", text);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(names[i].name, text) == 0) {
            out->kind = names[i].kind;
            out->addresses = names[i].addresses;
            if (out->kind == RB_BY_GTP_SESSION && !(out->sessions = rb_gtpc_make()))
                return rb_fail(ENOMEM, "no-memory", NULL, "no memory for the sessions of policy %s", text);
            return 0;
        }
    if (strstr(text, ".so") && strchr(text, ':'))
        return from_library(text, out);
    return rb_fail(EINVAL, "bad-policy", "use rr, rr-burst, ip, 5tuple, gtp, gre, vxlan (these three also with -ip), gtp-session, vlan, input, or LIBRARY.so:FUNCTION",
                   "there is no policy \"%s\"", text);
}

void rb_policy_close(struct rb_policy *policy)
{
    if (policy->library)
        dlclose(policy->library);
    policy->library = NULL;
    free(policy->sessions);
    policy->sessions = NULL;
}

int rb_policy_hash_of(const char *policy, const void *packet, uint32_t length, uint32_t *hash)
{
    struct rb_policy p;
    const uint8_t *data = packet;
    rb_desc d = {0};
    int rc = rb_policy_parse(policy, NULL, NULL, &p);
    if (rc < 0)
        return rc;
    if (p.kind == RB_BY_FUNCTION || p.kind == RB_BY_RR || p.kind == RB_BY_RR_BURST || p.kind == RB_BY_INPUT || p.kind == RB_BY_GTP_SESSION) {
        rb_policy_close(&p);
        return rb_fail(EINVAL, "bad-policy", "use one of ip, 5tuple, gtp, gre, vxlan, vlan", "policy %s does not hash packets one by one", policy);
    }
    rb_desc_set(&d, RB_MIN(length, RB_MAX_LENGTH), 0, 0);
    rb_policy_hashes(&p, &data, &d, 1, hash); /* as a worker does it */
    return 0;
}
