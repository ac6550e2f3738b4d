/* SPDX-License-Identifier: Apache-2.0
 *
 * Packets with sequence numbers: how one is made. Ethernet, perhaps a VLAN tag, IPv4 or IPv6, UDP, and a mark of 32 bytes: magic,
 * stream, a sum over all bytes of the packet but the sum itself, sequence, send time. Or frames that were given, as they are.
 */
#include "rb_flow.h"

#include <stdlib.h>

static void put16(uint8_t *p, uint32_t v) { p[0] = (uint8_t)(v >> 8), p[1] = (uint8_t)v; }
static void put32(uint8_t *p, uint32_t v) { put16(p, v >> 16), put16(p + 2, v); }
static uint32_t get16(const uint8_t *p) { return (uint32_t)p[0] << 8 | p[1]; }
static uint32_t get32(const uint8_t *p) { return get16(p) << 16 | get16(p + 2); }

static uint64_t words(const uint8_t *p, uint32_t n)
{
    uint64_t sum = 0;
    for (; n > 1; n -= 2, p += 2)
        sum += get16(p);
    return n ? sum + ((uint32_t)*p << 8) : sum;
}

static uint16_t fold(uint64_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~sum;
}

static uint64_t mix(uint64_t a, uint64_t v)
{
    a = (a ^ v) * 0xff51afd7ed558ccdull;
    return a ^ a >> 32;
}

uint32_t rb_flow_sum(const uint8_t *p, uint32_t length, uint32_t mark)
{
    uint8_t head[128]; /* a copy without the sums; longer than headers and mark, and whole words */
    uint64_t a = 0x9e3779b97f4a7c15ull ^ length, v;
    uint32_t n = RB_MIN(length, (uint32_t)sizeof head), i = 0;
    memcpy(head, p, n);
    memset(head + mark + offsetof(struct rb_mark, sum), 0, 4);
    memset(head + mark - 2, 0, 2);
    for (; i + 8 <= n; i += 8) {
        memcpy(&v, head + i, 8);
        a = mix(a, v);
    }
    for (; i + 8 <= length; i += 8) {
        memcpy(&v, p + i, 8);
        a = mix(a, v);
    }
    const uint8_t *rest = length > n ? p : head;
    for (v = 0; i < length; i++)
        v = v << 8 | rest[i];
    a = (a ^ v) * 0xff51afd7ed558ccdull;
    return (uint32_t)(a >> 32);
}

static void make_head(struct rb_flow_maker *m)
{
    static const uint8_t none[6], src[6] = {2, 0, 0, 0, 0, 1}, dst[6] = {2, 0, 0, 0, 0, 2};
    const rb_flow_options *o = &m->o;
    uint8_t *p = m->head, *ip;
    memcpy(p, memcmp(o->dst_mac, none, 6) ? o->dst_mac : dst, 6);
    memcpy(p + 6, memcmp(o->src_mac, none, 6) ? o->src_mac : src, 6);
    m->ip = 14;
    if (o->vlan) {
        put16(p + 12, 0x8100);
        put16(p + 14, o->vlan - 1);
        m->ip = 18;
    }
    put16(p + m->ip - 2, o->ipv6 ? 0x86dd : 0x0800);
    ip = p + m->ip;
    if (o->ipv6) {
        ip[0] = 0x60;
        ip[6] = 17;
        ip[7] = 64;
        memcpy(ip + 8, o->src_ip6, 16);
        memcpy(ip + 24, o->dst_ip6, 16);
    } else {
        ip[0] = 0x45;
        ip[8] = 64;
        ip[9] = 17;
        put32(ip + 12, o->src_ip);
        put32(ip + 16, o->dst_ip);
    }
    m->udp = m->ip + (o->ipv6 ? 40 : 20);
    m->headers = m->udp + 8;
}

/* Distinct flows: every source port with every source address, and so on, the port changing fastest. */
static int spread(rb_flow_options *o)
{
    o->src_ips = RB_MAX(o->src_ips, 1u);
    o->dst_ips = RB_MAX(o->dst_ips, 1u);
    o->dst_ports = RB_MAX(o->dst_ports, 1u);
    o->src_port = o->src_port ? o->src_port : 1024;
    o->port = o->port ? o->port : 5000;
    uint64_t others = (uint64_t)o->src_ips * o->dst_ips, most = 65536u - o->src_port;
    if (o->src_ips > 1u << 24 || o->dst_ips > 1u << 24 || o->port + o->dst_ports > 65536 || others > UINT32_MAX || others * o->dst_ports > UINT32_MAX)
        return rb_fail(EINVAL, "bad-option", "use smaller ranges", "so many flows cannot be told apart");
    others *= o->dst_ports;
    if (!o->src_ports)
        o->src_ports = (uint32_t)RB_MIN((RB_MAX(o->flows, 1u) + others - 1) / others, most);
    if (o->src_ports > most || others * o->src_ports > UINT32_MAX)
        return rb_fail(EINVAL, "bad-option", "use smaller ranges", "so many flows cannot be told apart");
    others *= o->src_ports;
    if (o->flows > others) {
        rb_fail(EINVAL, "bad-option", NULL, "these ranges of addresses and ports make %llu flows, and not %u", (unsigned long long)others, o->flows);
        return rb_cure(EINVAL, "use wider ranges, or %llu flows or fewer", (unsigned long long)others);
    }
    o->flows = o->flows ? o->flows : (uint32_t)others;
    return 0;
}

static int bad_size(uint32_t size, uint32_t least, uint32_t room)
{
    rb_fail(EINVAL, "bad-size", NULL, "packets of %u bytes cannot be sent here", size);
    return rb_cure(EINVAL, "use %u to %u bytes", least, room);
}

static int take_frames(struct rb_flow_maker *m, uint32_t room)
{
    uint64_t total = 0;
    for (uint32_t i = 0; i < m->o.n_frames; i++) {
        uint32_t n = m->o.frame_lengths[i];
        if (n < 14 || n > room)
            return bad_size(n, 14, room);
        total += n;
        m->longest = RB_MAX(m->longest, n);
    }
    if (total > UINT32_MAX)
        return rb_fail(E2BIG, "too-many", "bridge -i pcap:FILE -o DEVICE sends files of any length", "more than 4 GiB of frames");
    m->frames = malloc(total);
    m->frame_at = malloc(((size_t)m->o.n_frames + 1) * sizeof *m->frame_at);
    if (!m->frames || !m->frame_at)
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    memcpy(m->frames, m->o.frames, total);
    m->frame_at[0] = 0;
    for (uint32_t i = 0; i < m->o.n_frames; i++)
        m->frame_at[i + 1] = m->frame_at[i] + m->o.frame_lengths[i];
    return 0;
}

int rb_flow_maker_init(struct rb_flow_maker *m, const rb_flow_options *given, uint32_t room)
{
    rb_flow_options *o = &m->o;
    int rc;
    *o = *given;
    if (o->n_frames)
        return take_frames(m, room);
    o->src_ip = o->src_ip ? o->src_ip : 0xc0000201;
    o->dst_ip = o->dst_ip ? o->dst_ip : 0xc0000202;
    if (o->vlan > 4095)
        return rb_fail(EINVAL, "bad-option", "0 to 4094", "there is no VLAN %u", o->vlan - 1);
    if ((rc = spread(o)) < 0)
        return rc;
    make_head(m);
    uint32_t least = m->headers + (uint32_t)sizeof(struct rb_mark), n = o->n_sizes ? o->n_sizes : 1;
    if (!(m->sizes = malloc(n * sizeof *m->sizes)))
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    for (uint32_t i = 0; i < n; i++) {
        uint32_t size = o->n_sizes ? o->sizes[i] : o->size ? o->size : least;
        if (size < least || size > room)
            return bad_size(size, least, room);
        m->sizes[i] = (uint16_t)size;
        m->longest = RB_MAX(m->longest, size);
    }
    o->n_sizes = n;
    return 0;
}

void rb_flow_maker_free(struct rb_flow_maker *m)
{
    free(m->sizes);
    free(m->frames);
    free(m->frame_at);
}

uint32_t rb_flow_length(const struct rb_flow_maker *m, uint64_t sequence)
{
    if (!m->frames)
        return m->sizes[m->o.n_sizes == 1 ? 0 : sequence % m->o.n_sizes];
    const uint32_t *at = &m->frame_at[sequence % m->o.n_frames];
    return at[1] - at[0];
}

void rb_flow_make(const struct rb_flow_maker *m, uint8_t *p, uint64_t sequence, uint64_t now)
{
    uint32_t length = rb_flow_length(m, sequence);
    if (m->frames) {
        memcpy(p, m->frames + m->frame_at[sequence % m->o.n_frames], length);
        return;
    }
    const rb_flow_options *o = &m->o;
    uint32_t flow = (uint32_t)(sequence % o->flows), i = flow / o->src_ports;
    uint8_t *ip = p + m->ip, *udp = p + m->udp;
    memcpy(p, m->head, m->headers);
    uint32_t source = i % o->src_ips, target = i / o->src_ips % o->dst_ips;
    put16(udp, o->src_port + flow % o->src_ports);
    put16(udp + 2, o->port + i / o->src_ips / o->dst_ips);
    put16(udp + 4, length - m->udp);
    if (o->ipv6) { /* ranges stay within the last 32 bits: checked by whoever made them */
        put16(ip + 4, length - m->udp);
        put32(ip + 20, get32(ip + 20) + source);
        put32(ip + 36, get32(ip + 36) + target);
    } else {
        put16(ip + 2, length - m->ip);
        put32(ip + 12, o->src_ip + source);
        put32(ip + 16, o->dst_ip + target);
        put16(ip + 10, fold(words(ip, 20)));
    }
    struct rb_mark mark = {.magic = RB_FLOW_MAGIC, .stream = o->stream, .sequence = sequence, .sent_ns = now};
    memcpy(p + m->headers, &mark, sizeof mark);
    for (uint32_t k = m->headers + (uint32_t)sizeof mark; k < length; k++)
        p[k] = (uint8_t)(sequence + k);
    mark.sum = rb_flow_sum(p, length, m->headers);
    memcpy(p + m->headers + offsetof(struct rb_mark, sum), &mark.sum, 4);
    if (o->ipv6) { /* over IPv4 it may be left out */
        uint16_t sum = fold(words(ip + 8, 32) + words(udp, length - m->udp) + (length - m->udp) + 17);
        put16(udp + 6, sum ? sum : 0xffff);
    }
}
