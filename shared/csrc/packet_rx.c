/* SPDX-License-Identifier: Apache-2.0
 *
 * Receiving through AF_PACKET. The kernel fills blocks of a ring; each packet is copied once, into an empty of the handle, with what the kernel
 * keeps beside the bytes put back into them: the VLAN tag, and a checksum that the sender left to a card that is not there.
 * While there are no empties packets wait in the ring, and what no longer fits there the kernel counts.
 */
#include "packet.h"

#include <arpa/inet.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/net_tstamp.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define BLOCK (256u << 10) /* bytes; holds the largest packet that the kernel hands over */
#define BLOCKS 32u
#define RETIRE_MS 1u /* after which a block that is not full is handed over */

int rb_packet_socket(const char *ifname, uint16_t protocol)
{
    int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 && (errno == EPERM || errno == EACCES))
        return rb_fail(EACCES, "no-permission",
                       "run it as root, or: setcap cap_net_raw+ep \"$(readlink -f \"$(command -v python3)\")\"; for a systemd unit: AmbientCapabilities=CAP_NET_RAW",
                       "interface %s cannot be opened without the capability CAP_NET_RAW", ifname);
    if (fd < 0)
        return rb_fail(errno, "device", NULL, "interface %s cannot be opened: %s", ifname, strerror(errno));
    struct sockaddr_ll at = {.sll_family = AF_PACKET, .sll_protocol = htons(protocol), .sll_ifindex = (int)if_nametoindex(ifname)};
    if (protocol == 0 && bind(fd, (struct sockaddr *)&at, sizeof at) < 0) {
        int err = errno;
        close(fd);
        return rb_fail(err, "device", NULL, "interface %s cannot be opened: %s", ifname, strerror(err));
    }
    return fd;
}

int rb_packet_gone(int fd, const char *ifname)
{
    struct sockaddr_ll at = {0};
    socklen_t size = sizeof at;
    if (getsockname(fd, (struct sockaddr *)&at, &size) == 0 && at.sll_ifindex <= 0)
        return rb_fail(ENODEV, "interface-gone", NULL, "interface %s is gone", ifname);
    return 0; /* down: it may come back */
}

/* ---- opening ---------------------------------------------------------------------------------------------------------- */

/* What the socket passes to the ring. Packets that arrive; a filter is asked only of packets without a VLAN tag beside them, since it was
 * compiled for packets that have it inside. */
static int set_program(struct rb_packet_rx *p, const struct rb_filter *f)
{
    struct sock_filter in[BPF_MAXINSNS];
    unsigned n = 0;
    in[n++] = (struct sock_filter){BPF_LD | BPF_W | BPF_ABS, 0, 0, (uint32_t)(SKF_AD_OFF + SKF_AD_PKTTYPE)};
    in[n++] = (struct sock_filter){BPF_JMP | BPF_JEQ | BPF_K, 0, 1, PACKET_OUTGOING};
    in[n++] = (struct sock_filter){BPF_RET | BPF_K, 0, 0, 0};
    if (f && f->count + n + 4 <= BPF_MAXINSNS) {
        in[n++] = (struct sock_filter){BPF_LD | BPF_W | BPF_ABS, 0, 0, (uint32_t)(SKF_AD_OFF + SKF_AD_VLAN_TAG_PRESENT)};
        in[n++] = (struct sock_filter){BPF_JMP | BPF_JEQ | BPF_K, 1, 0, 0};
        in[n++] = (struct sock_filter){BPF_RET | BPF_K, 0, 0, UINT32_MAX};
        for (uint32_t i = 0; i < f->count; i++)
            in[n++] = (struct sock_filter){f->insn[i].code, f->insn[i].jt, f->insn[i].jf, f->insn[i].k};
    } else
        in[n++] = (struct sock_filter){BPF_RET | BPF_K, 0, 0, UINT32_MAX};
    struct sock_fprog program = {.len = (unsigned short)n, .filter = in};
    return setsockopt(p->fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) < 0 ? -errno : 0;
}

/* Does it ask how long the packet is? The kernel does not know: several may still be one there. */
static bool asks_for_length(const struct rb_filter *f)
{
    for (uint32_t i = 0; f && i < f->count; i++)
        if ((f->insn[i].code & 0xe0) == BPF_LEN && (BPF_CLASS(f->insn[i].code) == BPF_LD || BPF_CLASS(f->insn[i].code) == BPF_LDX))
            return true;
    return false;
}

int rb_packet_rx_filter(struct rb_packet_rx *p, const struct rb_filter *f)
{
    if (asks_for_length(f))
        f = NULL;
    if (set_program(p, f) < 0) /* too long for the kernel: then it is done here alone */
        set_program(p, NULL);
    return 0;
}

static int set_up(struct rb_packet_rx *p, const rb_open_options *o)
{
    const int version = TPACKET_V3, one = 1, stamps = SOF_TIMESTAMPING_RAW_HARDWARE;
    struct tpacket_req3 ring = {
        .tp_block_size = BLOCK, .tp_block_nr = BLOCKS, .tp_frame_size = TPACKET_ALIGNMENT << 7, .tp_frame_nr = BLOCK / (TPACKET_ALIGNMENT << 7) * BLOCKS,
        .tp_retire_blk_tov = RETIRE_MS,
    };
    struct sockaddr_ll at = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL), .sll_ifindex = p->ifindex};
    struct packet_mreq promiscuous = {.mr_ifindex = p->ifindex, .mr_type = PACKET_MR_PROMISC};
    if (setsockopt(p->fd, SOL_PACKET, PACKET_VERSION, &version, sizeof version) < 0 ||
        setsockopt(p->fd, SOL_PACKET, PACKET_VNET_HDR, &one, sizeof one) < 0 || set_program(p, NULL) < 0 ||
        setsockopt(p->fd, SOL_PACKET, PACKET_RX_RING, &ring, sizeof ring) < 0)
        return -errno;
    setsockopt(p->fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, &one, sizeof one); /* before 4.20 the program above does it alone */
    setsockopt(p->fd, SOL_PACKET, PACKET_TIMESTAMP, &stamps, sizeof stamps);
    p->map = mmap(NULL, (size_t)BLOCK * BLOCKS, PROT_READ | PROT_WRITE, MAP_SHARED, p->fd, 0);
    if (p->map == MAP_FAILED) {
        p->map = NULL;
        return -errno;
    }
    if (bind(p->fd, (struct sockaddr *)&at, sizeof at) < 0)
        return -errno;
    if (o->promiscuous && setsockopt(p->fd, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &promiscuous, sizeof promiscuous) < 0)
        return -errno;
    return 0;
}

int rb_packet_rx_open(struct rb_packet_rx *p, const char *ifname, const rb_open_options *o)
{
    memset(p, 0, sizeof *p);
    snprintf(p->ifname, sizeof p->ifname, "%.15s", ifname);
    p->ifindex = (int)if_nametoindex(ifname);
    p->snaplen = o->snaplen;
    if (o->fanout_group > 65535)
        return rb_fail(EINVAL, "bad-option", NULL, "fan-out groups go from 1 to 65535, not %u", o->fanout_group);
    if ((p->fd = rb_packet_socket(ifname, ETH_P_ALL)) < 0)
        return p->fd;
    int rc = set_up(p, o);
    if (rc < 0)
        rb_fail(-rc, "device", rc == -ENODEV || rc == -ENXIO ? "ip link lists the interfaces" : NULL, "interface %s cannot be received from: %s", ifname,
                strerror(-rc));
    else if (o->fanout_group) {
        uint32_t group = o->fanout_group | PACKET_FANOUT_HASH << 16;
        if (setsockopt(p->fd, SOL_PACKET, PACKET_FANOUT, &group, sizeof group) < 0)
            rc = rb_fail(errno, "bad-option", "take another group: this one is used for another interface or in another way",
                         "interface %s cannot join fan-out group %u: %s", ifname, o->fanout_group, strerror(errno));
    }
    if (rc < 0)
        rb_packet_rx_close(p);
    return rc;
}

void rb_packet_rx_close(struct rb_packet_rx *p)
{
    if (p->map)
        munmap(p->map, (size_t)BLOCK * BLOCKS);
    if (p->fd >= 0)
        close(p->fd);
    p->map = NULL;
    p->fd = -1;
}

/* ---- receiving ---------------------------------------------------------------------------------------------------------- */

/* The sender left the checksum to the card: from `start` to the end, its place already holds the sum of the pseudo header. */
static void finish_checksum(uint8_t *packet, uint32_t length, uint32_t start, uint32_t offset)
{
    if (start + offset + 2 > length)
        return;
    uint32_t sum = ~rb_packet_sum(packet + start, length - start, 0) & 0xffff;
    if (!sum)
        sum = 0xffff; /* the same sum; 0 would say "none" in UDP */
    packet[start + offset] = (uint8_t)(sum >> 8);
    packet[start + offset + 1] = (uint8_t)sum;
}

static struct tpacket_block_desc *block_of(const struct rb_packet_rx *p, uint32_t block) { return (void *)(p->map + (size_t)block * BLOCK); }

static int next_block(struct rb_packet_rx *p)
{
    struct tpacket_block_desc *b = block_of(p, p->block);
    if (!(__atomic_load_n(&b->hdr.bh1.block_status, __ATOMIC_ACQUIRE) & TP_STATUS_USER))
        return 0;
    p->left = b->hdr.bh1.num_pkts;
    p->packet = (const uint8_t *)b + b->hdr.bh1.offset_to_first_pkt;
    return 1;
}

static void done_with_packet(struct rb_packet_rx *p)
{
    const struct tpacket3_hdr *h = (const void *)p->packet;
    p->done = 0;
    if (--p->left) {
        p->packet += h->tp_next_offset;
        return;
    }
    __atomic_store_n(&block_of(p, p->block)->hdr.bh1.block_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE);
    p->block = (p->block + 1) % BLOCKS;
    p->packet = NULL;
}

/* The present packet, or its next segment, into an empty: 1, 2 = there are more segments, or 0 when it does not fit (or is not whole). */
static int take(struct rb_packet_rx *p, struct rb_end *end, rb_desc *d)
{
    const struct tpacket3_hdr *h = (const void *)p->packet;
    const struct virtio_net_hdr *v = (const void *)(p->packet + h->tp_mac - sizeof *v);
    const uint8_t *from = p->packet + h->tp_mac;
    uint32_t have = h->tp_snaplen, length = have, tag = 0, room = end->c->buffer_size - RB_BUFFER_HEADER;
    if ((h->tp_status & TP_STATUS_VLAN_VALID) && have >= 12) {
        tag = (uint32_t)(h->tp_status & TP_STATUS_VLAN_TPID_VALID ? h->hv1.tp_vlan_tpid : ETH_P_8021Q) << 16 | (h->hv1.tp_vlan_tci & 0xffff);
        length += 4;
    }
    d->ts = (uint64_t)h->tp_sec * 1000000000u + h->tp_nsec;
    p->hardware = (h->tp_status & TP_STATUS_TS_RAW_HARDWARE) != 0;
    if (v->gso_type != VIRTIO_NET_HDR_GSO_NONE && h->tp_snaplen == h->tp_len) {
        bool last;
        rb_desc_set(d, 0, RB_BUFFER_HEADER, 0);
        length = rb_packet_segment(from, have, v, tag, p->done++, rb_data(end->c, d), room, &last);
        rb_desc_set(d, p->snaplen ? RB_MIN(p->snaplen, length) : length, RB_BUFFER_HEADER, 0);
        return length ? (last ? 1 : 2) : 0;
    }
    if ((h->tp_snaplen < h->tp_len && !p->snaplen) || (length > room && !p->snaplen) || have < 12)
        return 0;
    uint32_t keep = RB_MIN(RB_MIN(length, room), p->snaplen ? p->snaplen : RB_MAX_LENGTH);
    rb_desc_set(d, keep, RB_BUFFER_HEADER, 0);
    uint8_t *to = rb_data(end->c, d);
    if (tag) {
        uint8_t both[16];
        memcpy(both, from, 12);
        both[12] = (uint8_t)(tag >> 24);
        both[13] = (uint8_t)(tag >> 16);
        both[14] = (uint8_t)(tag >> 8);
        both[15] = (uint8_t)tag;
        memcpy(to, both, RB_MIN(keep, 16u));
        if (keep > 16)
            memcpy(to + 16, from + 12, keep - 16);
    } else
        memcpy(to, from, keep);
    if ((v->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) && keep == length)
        finish_checksum(to, keep, v->csum_start + (tag ? 4u : 0u), v->csum_offset);
    return 1;
}

int rb_packet_rx_recv(struct rb_packet_rx *p, struct rb_end *end, rb_desc *desc, int n)
{
    int out = 0, empties = 0;
    uint64_t bytes = 0;
    while (out < n && (p->packet || next_block(p))) {
        if (!p->left) { /* a block without packets, handed over by the clock */
            p->left = 1;
            done_with_packet(p);
            continue;
        }
        if (!empties) {
            empties = rb_empties(end->c, desc + out, RB_MIN(RB_MIN(n - out, (int)p->left), (int)RB_MAX_BURST));
            if (empties <= 0) {
                if (empties < 0 && !out)
                    return empties;
                empties = 0;
                break; /* the rest waits in the ring */
            }
        }
        int took = take(p, end, &desc[out]);
        if (took) {
            bytes += rb_desc_length(&desc[out++]);
            empties--;
        } else
            rb_drop(end, 1, RB_DROP_BAD);
        if (took != 2)
            done_with_packet(p);
    }
    if (empties)
        rb_return(end->c, desc + out, empties);
    end->st.packets += (uint64_t)out;
    end->st.bytes += bytes;
    if (!out) {
        uint64_t now = rb_mono_ns();
        if (now - p->looked > 10000000u) {
            p->looked = now;
            return rb_packet_gone(p->fd, p->ifname);
        }
    }
    return out;
}

int rb_packet_rx_ready(struct rb_packet_rx *p)
{
    return p->packet || (__atomic_load_n(&block_of(p, p->block)->hdr.bh1.block_status, __ATOMIC_ACQUIRE) & TP_STATUS_USER);
}

void rb_packet_rx_stats(struct rb_packet_rx *p, rb_stats *st)
{
    struct tpacket_stats_v3 now = {0};
    socklen_t size = sizeof now;
    if (getsockopt(p->fd, SOL_PACKET, PACKET_STATISTICS, &now, &size) == 0)
        p->dropped += now.tp_drops; /* the kernel begins anew with each look */
    st->kernel_dropped = p->dropped;
    snprintf(st->clock, sizeof st->clock, "%s", p->hardware ? "hardware" : "kernel");
}
