/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of the AF_XDP plug-in share: the open device, its rings and its program. Nothing here is exported. */
#ifndef RINGBAR_XDP_INTERNAL_H
#define RINGBAR_XDP_INTERNAL_H

#include <linux/if_xdp.h>
#include <stdatomic.h>
#include <stddef.h>

#include "xdp_abi.h"
#include "xdp_owner.h"

#ifndef XDP_USE_SG /* kernel 6.6 */
#define XDP_USE_SG (1 << 4)
#define XDP_PKT_CONTD (1 << 0)
#endif

/* One ring shared with the kernel. The user end keeps its own index in `local` and the last seen other one in `seen`;
 * for a ring that we produce `seen` is consumer + size, so that free space is one subtraction. */
struct rb_ring {
    uint32_t local, seen, mask, size;
    _Atomic uint32_t *producer, *consumer;
    const _Atomic uint32_t *flags;
    void *entries;
    void *map;
    size_t map_bytes;
};

struct rb_sock {
    int fd;
    uint32_t queue;
    bool taking;                /* in the XSKMAP: packets of this queue come here */
    uint32_t unfinished;        /* sent, not completed; never above the completion ring's size */
    struct rb_ring fill, comp, rx, tx;
};

struct rb_prog {                /* our program on the interface; all zero when not attached */
    struct bpf_object *object;
    struct xdp_program *libxdp; /* NULL: attached alone, without the dispatcher */
    uint32_t id;
    int fd, map_fd;
    int rules_fd, passed_fd, switch_fd; /* maps: the place of the rule, the counter, the switch (ringbar_selective) */
    int owner_fd, rx_time, rx_hash; /* with metadata: the map of our record, and the driver's functions */
    bool attached, native, dispatched, frags;
    bool bound;                 /* one program for this interface alone, with metadata: its rules are in it */
};

struct rb_xdp {
    struct rb_xdp *next;        /* of all open devices of this process, for the fork handler */
    char ifname[16];
    int ifindex, netns;         /* netns: a descriptor of the namespace it was opened in */
    int netlink, promiscuous;   /* sockets of that namespace; the second, while it lives, keeps promiscuous mode on; or -1 */
    uint64_t nic_rx_dropped, nic_tx_dropped; /* the interface's counters when it was opened */
    uint32_t chunk_size, headroom, mtu, nic_queues;
    uint64_t umem_size;
    void *umem_base;
    struct rb_xdp_options opt;
    uint32_t n;                 /* sockets */
    uint32_t recv_next;         /* where recv begins, for fairness */
    uint64_t rx_kicks, tx_kicks, tx_refused;
    int map_error;              /* the XSKMAP refused a socket: told by wake */
    bool zero_copy;
    bool fragments;             /* packets may be larger than a buffer */
    struct rb_prog prog;
    char note[256];
    struct rb_sock sock[RB_XDP_MAX_QUEUES];
};

/* xdp_nic.c */
struct nic {
    int ifindex;
    uint32_t mtu, queues;
    bool up;
};

struct counters {               /* of an interface */
    uint32_t flags;             /* IFF_... */
    uint64_t rx_dropped, tx_dropped;
};

__attribute__((format(printf, 3, 4))) int rb_xdp_fail(struct rb_xdp_error *err, int code, const char *fmt, ...);
__attribute__((format(printf, 2, 3))) void rb_xdp_cure(struct rb_xdp_error *err, const char *fmt, ...);
__attribute__((format(printf, 2, 3))) void rb_xdp_note(struct rb_xdp *dev, const char *fmt, ...);
int rb_xdp_fail_permission(struct rb_xdp_error *err, const char *doing);
int rb_xdp_fail_held(struct rb_xdp_error *err, const char *ifname, uint32_t queue, int pid); /* pid 0: unknown */
void rb_xdp_pause(unsigned ms);
uint64_t rb_xdp_now_ms(void);
int rb_xdp_look_at_nic(const char *name, struct nic *nic, struct rb_xdp_error *err);
int rb_xdp_check_options(struct rb_xdp_options *o, struct rb_xdp_error *err);   /* also fills in the defaults */
bool rb_xdp_zero_copy_cuts(const struct rb_xdp *dev);   /* would it deliver long frames in pieces? */
int rb_xdp_check_nic(const struct rb_xdp_options *o, const struct nic *nic, struct rb_xdp_error *err);
bool rb_xdp_needs_fragments(const struct rb_xdp_options *o, const struct nic *nic);
int rb_xdp_netlink_open(void);          /* a socket of the current network namespace, or -1 */
int rb_xdp_counters(int netlink, int ifindex, struct counters *out);    /* 0, -ENODEV, or another -errno */
int rb_xdp_promiscuous_open(int ifindex);   /* a socket that keeps the mode on while it is open, or -errno */

/* xdp_socket.c */
int rb_xdp_socket_open(struct rb_xdp *dev, struct rb_sock *s, bool first, struct rb_xdp_error *err);
int rb_xdp_socket_bind(struct rb_xdp *dev, struct rb_sock *s, uint16_t flags, struct rb_xdp_error *err);
void rb_xdp_socket_close(struct rb_sock *s);
int rb_xdp_probe(const char *ifname, int ifindex, uint32_t queue, uint32_t timeout_ms, struct rb_xdp_error *err);
uint32_t rb_xdp_fill(struct rb_xdp *dev, const uint64_t *addrs, uint32_t n);
uint32_t rb_xdp_fill_space(struct rb_xdp *dev);
uint32_t rb_xdp_recv(struct rb_xdp *dev, struct rb_xdp_frame *frames, uint32_t n);
int rb_xdp_send(struct rb_xdp *dev, const struct rb_xdp_frame *frames, uint32_t n);
uint32_t rb_xdp_tx_space(struct rb_xdp *dev, uint32_t want);
uint32_t rb_xdp_waiting(struct rb_xdp *dev);
uint32_t rb_xdp_complete(struct rb_xdp *dev, uint64_t *addrs, uint32_t n);
uint32_t rb_xdp_tx_pending(struct rb_xdp *dev);
int rb_xdp_wake(struct rb_xdp *dev, uint32_t directions);
bool rb_xdp_tx_in_kernel(struct rb_xdp *dev);

/* xdp_attach.c and xdp_scan.c */
int rb_prog_attach(struct rb_xdp *dev, bool may_native, bool may_generic, struct rb_xdp_error *err);
void rb_prog_detach(struct rb_xdp *dev);
int rb_prog_take(struct rb_xdp *dev, uint32_t queue, int fd);   /* put a socket in the XSKMAP */
void rb_prog_give_up(struct rb_xdp *dev, uint32_t queue);       /* and out again */
int rb_prog_steer(struct rb_xdp *dev, const struct rb_xdp_rule *rules, uint32_t n, struct rb_xdp_error *err);
uint64_t rb_prog_passed(struct rb_xdp *dev);
/* The living process whose program receives on this queue (not the program with id `but_not`); 0 when unknown. */
int rb_prog_holder(int ifindex, uint32_t queue, uint32_t but_not);
bool rb_prog_attached(int ifindex);
int rb_prog_cleanup(const char *ifname, int ifindex, struct rb_xdp_error *err);

#endif
