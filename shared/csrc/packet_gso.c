/* SPDX-License-Identifier: Apache-2.0
 *
 * Frames that the kernel has put together (GRO), or that a neighbour on this machine has not taken apart yet (TSO), as the frames of a wire: TCP and UDP
 * right behind IPv4 or IPv6, with one VLAN tag at most. Anything else is left to whoever counts it.
 */
#include "packet.h"

#include <linux/if_ether.h>
#include <linux/virtio_net.h>
#include <netinet/in.h>

#define HEADERS 256u /* bytes, at most */
#define GSO_UDP_L4 5 /* VIRTIO_NET_HDR_GSO_UDP_L4, which older headers have not */

static uint32_t be16(const uint8_t *p) { return (uint32_t)(p[0] << 8 | p[1]); }
static void set16(uint8_t *p, uint32_t v)
{
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}

uint32_t rb_packet_sum(const uint8_t *p, uint32_t n, uint32_t sum)
{
    uint64_t wide = sum;
    for (; n >= 2; n -= 2, p += 2)
        wide += be16(p);
    if (n)
        wide += (uint32_t)p[0] << 8;
    while (wide >> 16)
        wide = (wide & 0xffff) + (wide >> 16);
    return (uint32_t)wide;
}

/* Checksum over a transport header and its payload, whose own place is at `at` from there. */
static void transport_checksum(uint8_t *ip, bool v6, uint8_t protocol, uint8_t *transport, uint32_t length, uint32_t at)
{
    set16(transport + at, 0);
    uint32_t sum = v6 ? rb_packet_sum(ip + 8, 32, 0) : rb_packet_sum(ip + 12, 8, 0);
    sum = ~rb_packet_sum(transport, length, sum + protocol + length) & 0xffff;
    set16(transport + at, sum || protocol == IPPROTO_TCP ? sum : 0xffff);
}

/* Segment number `index` of a frame into `to`: its length, or 0 when there is no such segment or it cannot be made. *last: it is the last one. */
uint32_t rb_packet_segment(const uint8_t *from, uint32_t have, const struct virtio_net_hdr *v, uint32_t tag, uint32_t index, uint8_t *to, uint32_t room, bool *last)
{
    const uint8_t kind = v->gso_type & (uint8_t)~VIRTIO_NET_HDR_GSO_ECN;
    const bool tcp = kind == VIRTIO_NET_HDR_GSO_TCPV4 || kind == VIRTIO_NET_HDR_GSO_TCPV6;
    const uint8_t protocol = tcp ? IPPROTO_TCP : IPPROTO_UDP;
    const uint32_t extra = tag ? 4 : 0, piece = v->gso_size;
    uint32_t l3 = 14;
    *last = true;
    if ((!tcp && kind != GSO_UDP_L4) || !piece || have < 54)
        return 0;
    if (be16(from + 12) == ETH_P_8021Q || be16(from + 12) == ETH_P_8021AD)
        l3 += 4;
    const bool v6 = be16(from + l3 - 2) == ETH_P_IPV6;
    const uint32_t l4 = l3 + (v6 ? 40u : (from[l3] & 15u) * 4);
    if ((!v6 && be16(from + l3 - 2) != ETH_P_IP) || from[l3 + (v6 ? 6 : 9)] != protocol || l4 + 20 > have ||
        ((v->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) && v->csum_start != l4))
        return 0; /* more headers between */
    const uint32_t headers = l4 + (tcp ? (from[l4 + 12] >> 4) * 4u : 8u);
    if (headers > have || headers + extra > HEADERS)
        return 0;
    const uint64_t start = (uint64_t)index * piece, payload = have - headers;
    if (start >= payload)
        return 0;
    const uint32_t mine = (uint32_t)RB_MIN((uint64_t)piece, payload - start), length = headers + extra + mine;
    *last = start + mine == payload;
    if (length > room)
        return 0;
    memcpy(to, from, 12);
    if (tag) {
        set16(to + 12, tag >> 16);
        set16(to + 14, tag);
    }
    memcpy(to + 12 + extra, from + 12, headers - 12);
    memcpy(to + headers + extra, from + headers + start, mine);
    uint8_t *ip = to + l3 + extra, *transport = to + l4 + extra;
    if (v6)
        set16(ip + 4, headers - l4 + mine + (l4 - l3 - 40));
    else {
        set16(ip + 2, headers - l3 + mine);
        set16(ip + 4, be16(ip + 4) + index);
        set16(ip + 10, 0);
        set16(ip + 10, ~rb_packet_sum(ip, l4 - l3, 0) & 0xffff);
    }
    if (tcp) {
        uint32_t sequence = (be16(transport + 4) << 16 | be16(transport + 6)) + (uint32_t)start;
        set16(transport + 4, sequence >> 16);
        set16(transport + 6, sequence);
        if (!*last)
            transport[13] &= (uint8_t)~0x09; /* FIN and PSH are the last one's */
        if (index)
            transport[13] &= (uint8_t)~0x80; /* CWR the first one's */
    } else
        set16(transport + 4, 8 + mine);
    transport_checksum(ip, v6, protocol, transport, headers - l4 + mine, tcp ? 16 : 6);
    return length;
}
