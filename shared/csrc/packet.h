/* SPDX-License-Identifier: Apache-2.0
 * Receiving from an interface through AF_PACKET: a TPACKET_V3 ring that the kernel fills, copied into empties of the handle (packet_rx.c). */
#ifndef RB_PACKET_H
#define RB_PACKET_H
#include "rb_internal.h"

struct rb_packet_rx {
    int fd;
    int ifindex;
    char ifname[16];
    uint8_t *map;
    uint32_t block;         /* the one that is read */
    const uint8_t *packet;  /* the next in it; NULL = the block is not ours yet */
    uint32_t left;          /* packets in it, that one included */
    uint32_t snaplen;       /* bytes kept; 0 = all */
    uint32_t done;          /* segments of it that have been handed out */
    uint64_t dropped;       /* by the kernel */
    uint64_t looked;        /* monotonic: when it was last asked whether the interface is there */
    bool hardware;
};

/* What arrives at the interface, not what leaves it. Options: promiscuous, fanout_group, snaplen. On failure nothing is left. */
int rb_packet_rx_open(struct rb_packet_rx *p, const char *ifname, const rb_open_options *options);
void rb_packet_rx_close(struct rb_packet_rx *p);
int rb_packet_rx_recv(struct rb_packet_rx *p, struct rb_end *end, rb_desc *desc, int n);
int rb_packet_rx_ready(struct rb_packet_rx *p);
int rb_packet_rx_filter(struct rb_packet_rx *p, const struct rb_filter *f); /* in the kernel too */
void rb_packet_rx_stats(struct rb_packet_rx *p, rb_stats *st);

/* Does this handle receive from the interface that way? Does it inject there? Both at once would go in a circle. */
bool rb_eth_receives(struct rb_cluster *c, const char *ifname);
bool rb_stack_injects(struct rb_cluster *c, const char *ifname);

/* packet_gso.c. `tag`: a VLAN tag to be put in, 0 = none. */
struct virtio_net_hdr;
uint32_t rb_packet_sum(const uint8_t *p, uint32_t n, uint32_t sum); /* the Internet checksum, before it is inverted */
uint32_t rb_packet_segment(const uint8_t *from, uint32_t have, const struct virtio_net_hdr *v, uint32_t tag, uint32_t index, uint8_t *to, uint32_t room, bool *last);

/* A raw socket of an interface, or -errno with the error set, which names the capability. protocol 0: receives nothing. */
int rb_packet_socket(const char *ifname, uint16_t protocol);
/* -ENODEV with the error set when the interface that the socket was bound to is no more. */
int rb_packet_gone(int fd, const char *ifname);
#endif
