/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The AF_XDP plug-in (libringbar-xdp.so) as the core sees it.
 *
 * The core opens the plug-in with dlopen, asks rb_xdp_ops() for the table below and checks `abi`. Neither side
 * uses a symbol of the other beyond that, so a guest needs neither the plug-in nor libxdp and libbpf.
 *
 * Where a frame lies. The UMEM is the mapping of the pool; chunk i is buffer i, bytes [i * chunk, (i + 1) * chunk):
 *
 *     0          headroom        headroom + 256                                    chunk
 *     | ours     | kernel's own  | received frame, at most chunk - headroom - 256  |
 *
 * `headroom` bytes (64: the buffer header) are never written by the kernel; the next 256 (RB_XDP_KERNEL_HEADROOM)
 * belong to XDP programs and drivers. An *addr* is always an offset in the UMEM, aligned-chunk mode:
 *     fill:      the start of the chunk (anything inside is accepted; the kernel rounds down)
 *     recv:      the first byte of the frame: chunk start + headroom + 256 unless another XDP program moved it
 *     send:      the first byte to send, anywhere in a chunk; addr + len may not leave the chunk
 *     complete:  exactly the addr that was sent
 * so `addr / chunk` is the buffer's index and `addr % chunk` the offset of its data.
 *
 * Who owns a buffer: the device, from the moment `fill` or `send` has accepted it until `recv` or `complete` hands
 * it back. `close` returning 0 hands back everything else; -EBUSY means the kernel still holds the memory and the
 * buffers must rest until `probe` returns 0 (or -ENODEV: the interface is gone).
 *
 * Threads: fill and recv may run in one thread while send and complete run in another; `wake` may run in both when
 * each passes only its own direction. Everything else: one thread at a time. After fork the child's copy is dead:
 * its descriptors are closed (so that the parent's death still frees the interface) and every call fails or
 * moves nothing.
 *
 * Every int is 0 or a count when good, else -errno with the words in `struct rb_xdp_error`.
 */
#ifndef RINGBAR_XDP_ABI_H
#define RINGBAR_XDP_ABI_H

#include <stdbool.h>
#include <stdint.h>

#define RB_XDP_ABI 2u                   /* changes whenever anything below does */
#define RB_XDP_KERNEL_HEADROOM 256u     /* XDP_PACKET_HEADROOM, in front of every received frame */
#define RB_XDP_LINK_BYTES 18u           /* Ethernet header and one VLAN tag: what a frame has beyond the MTU */
#define RB_XDP_MIN_FRAME 14u            /* shortest frame that `send` takes: an Ethernet header */
#define RB_XDP_ALL_QUEUES UINT32_MAX
#define RB_XDP_MAX_QUEUES 256u

enum {
    RB_XDP_RX = 1u, RB_XDP_TX = 2u,     /* rb_xdp_options.flags and wake() */
    RB_XDP_PROMISCUOUS = 4u,            /* flags: until close, or the process's death */
    RB_XDP_METADATA = 8u,               /* flags: receive time and hash from the driver, where it gives them */
};

enum rb_xdp_mode {
    RB_XDP_AUTO,        /* zero copy, else driver mode with a copy, else generic */
    RB_XDP_ZEROCOPY,    /* that or an error */
    RB_XDP_DRIVER,      /* driver mode with a copy, or an error */
    RB_XDP_GENERIC,     /* generic mode, any interface */
};

struct rb_xdp;          /* one open interface: all its queues, or some */

struct rb_xdp_insn {    /* one instruction of classic BPF; same layout as struct bpf_insn of libpcap */
    uint16_t code;
    uint8_t jt, jf;
    uint32_t k;
};

struct rb_xdp_rule {    /* what libpcap compiles for Ethernet: not 0 = taken */
    const struct rb_xdp_insn *insns;
    uint32_t count;
};

struct rb_xdp_error {
    char text[384];     /* one sentence, no full stop */
    char cure[384];     /* the command or change that mends it; empty where there is none */
    int32_t holder;     /* with -EBUSY: process that holds the queue, 0 when unknown */
};

struct rb_xdp_options {
    uint32_t size;              /* sizeof this structure */
    uint32_t flags;             /* RB_XDP_RX | RB_XDP_TX */
    const char *ifname;
    void *umem_base;            /* page-aligned, mapped shared and writable; must outlive close() == 0 */
    uint64_t umem_size;         /* bytes, a multiple of chunk_size */
    uint32_t chunk_size;        /* 2048 or 4096 */
    uint32_t headroom;          /* bytes of each buffer that the kernel leaves alone: 64 */
    uint32_t queue;             /* NIC queue, the first of them, or RB_XDP_ALL_QUEUES; a device that only sends takes one: 0 for all */
    uint32_t queues;            /* how many from `queue` on, 0 = 1 */
    uint32_t mode;              /* enum rb_xdp_mode */
    uint32_t rx_size;           /* entries of each ring: powers of two, 0 = 2048 */
    uint32_t tx_size;
    uint32_t fill_size;
    uint32_t comp_size;         /* at least tx_size */
    uint32_t retry_ms;          /* how long a busy queue is tried again, 0 = 500: a killed owner's goes after ~20 */
    uint32_t busy_poll_us;      /* the kernel polls the driver for so long in our system calls, and not in interrupts; 0 = not */
    const struct rb_xdp_rule *rules;    /* what is taken: a packet that one of them matches; the rest is the stack's */
    uint32_t rule_count;        /* 0 = all is taken */
};

struct rb_xdp_frame {           /* same layout as the kernel's struct xdp_desc */
    uint64_t addr;              /* offset in the UMEM, see above */
    uint32_t len;               /* bytes */
    uint32_t flags;             /* recv: the NIC queue it came from; both: RB_XDP_MORE */
};
#define RB_XDP_MORE (1u << 31)  /* the packet goes on in the next frame */
#define RB_XDP_META (1u << 30)  /* recv: a struct rb_xdp_meta lies right before the frame */

struct rb_xdp_meta {            /* what the driver knows of a packet */
    uint32_t magic;             /* RB_XDP_META_MAGIC */
    uint32_t valid;             /* RB_XDP_META_TIME | RB_XDP_META_HASH */
    uint64_t time;              /* ns, the card's clock */
    uint32_t hash, hash_type;
};
#define RB_XDP_META_MAGIC 0x4d425224u
enum { RB_XDP_META_TIME = 1u, RB_XDP_META_HASH = 2u };

struct rb_xdp_stats {           /* sums over the queues since open */
    uint64_t rx_dropped;                /* e.g. longer than the chunk allows */
    uint64_t rx_invalid_descs;          /* bad addresses in the fill ring */
    uint64_t rx_ring_full;              /* we were slow to receive */
    uint64_t rx_fill_ring_empty_descs;  /* we were slow to fill */
    uint64_t tx_invalid_descs;
    uint64_t tx_ring_empty_descs;
    uint64_t kicks;                     /* system calls made by wake */
    uint64_t tx_refused;                /* frames the driver would not take (it gave the buffer back) */
    uint64_t passed;                    /* left to the stack by our program */
    uint64_t nic_rx_dropped;            /* the interface's own counters (all its queues) */
    uint64_t nic_tx_dropped;
};

struct rb_xdp_info {
    uint32_t queues;            /* sockets */
    uint32_t first_queue;       /* NIC queue of the first of them: the one that sends */
    uint32_t max_frame;         /* longest frame received: chunk_size - headroom - 256 */
    uint32_t mtu;               /* the interface's, when opened */
    bool metadata;              /* frames may have RB_XDP_META; no other XDP program can be on the interface */
    bool fragments;             /* packets larger than a buffer come in several (kernel 6.6), and may be sent so */
    uint32_t fill_size;         /* per queue */
    uint32_t tx_size;
    bool receives;              /* program attached */
    bool needs_fill;            /* buffers must be given by fill: it receives, or it is zero copy, where the stack's
                                   own packets arrive in our buffers too */
    bool dispatcher;            /* loaded beside others through libxdp's dispatcher */
    char ifname[16];
    char mode[12];              /* "zero-copy" | "driver" | "generic" */
    char note[256];             /* why not better, in words; may be empty */
};

struct rb_xdp_ops {
    uint32_t abi;
    uint32_t size;              /* sizeof this structure */

    /* Bind the socket(s), and with RB_XDP_RX attach the program. On failure nothing is left behind. Packets go on to
     * the stack until the first fill() of a queue: only then does it take them. Stale programs of ours are removed. */
    int (*open)(const struct rb_xdp_options *opt, struct rb_xdp **out, struct rb_xdp_error *err);
    /* A device opened with RB_XDP_TX alone begins to receive too; of the options count queue, queues, rules and
     * RB_XDP_PROMISCUOUS. 0 when it does already. */
    int (*add_rx)(struct rb_xdp *dev, const struct rb_xdp_options *opt, struct rb_xdp_error *err);
    /* From now on these rules hold (none: all is taken), for every packet either the old ones or the new. On failure the
     * old ones stay. */
    int (*steer)(struct rb_xdp *dev, const struct rb_xdp_rule *rules, uint32_t n, struct rb_xdp_error *err);
    /* Detach the program, drain transmission for at most 500 ms, close the sockets; dev is gone in every case.
     * 0: every buffer is yours again. -EBUSY: see "who owns a buffer". Completions still due are dropped. */
    int (*close)(struct rb_xdp *dev, struct rb_xdp_error *err);

    /* Give empty buffers: the first k of addrs were taken; spread over the queues, the emptiest first. */
    uint32_t (*fill)(struct rb_xdp *dev, const uint64_t *addrs, uint32_t n);
    uint32_t (*fill_space)(struct rb_xdp *dev);
    /* Packets in several frames come whole where n allows, else go on with the next call. */
    uint32_t (*recv)(struct rb_xdp *dev, struct rb_xdp_frame *frames, uint32_t n);
    uint32_t (*waiting)(struct rb_xdp *dev);        /* frames that recv would find; any thread */

    /* Queue frames for sending: the first k were taken, the rest stay yours; of a packet in several frames all or none. A
     * frame that may not be sent (leaves its chunk or the UMEM, shorter than 14 bytes, one of several on a device without
     * fragments) ends the burst; -EINVAL when it is the first. Nothing is sent before wake(). */
    int (*send)(struct rb_xdp *dev, const struct rb_xdp_frame *frames, uint32_t n);
    /* How many frames `send` would take now, at most `want`. */
    uint32_t (*tx_space)(struct rb_xdp *dev, uint32_t want);
    uint32_t (*complete)(struct rb_xdp *dev, uint64_t *addrs, uint32_t n);
    uint32_t (*tx_pending)(struct rb_xdp *dev);     /* sent and not yet completed */

    /* Enter the kernel where a ring asks for it; cheap when none does. Call after each burst of fill or send.
     * `directions`: RB_XDP_RX, RB_XDP_TX or both. -EAGAIN: the driver is full, frames stay queued, call again later;
     * -ENETDOWN: the interface is down; -ENODEV: it is gone. */
    int (*wake)(struct rb_xdp *dev, uint32_t directions);
    /* Descriptors to poll: POLLIN when frames arrived, POLLOUT when transmission can go on. Returns how many there are
     * (writes at most max). */
    uint32_t (*fds)(struct rb_xdp *dev, int *fds, uint32_t max);

    /* 0; -ENETDOWN: no carrier or set down, it may come back; -ENODEV: the interface is gone. A system call. */
    int (*link)(struct rb_xdp *dev);
    int (*stats)(struct rb_xdp *dev, struct rb_xdp_stats *out);
    const char *(*mode)(struct rb_xdp *dev);
    void (*info)(struct rb_xdp *dev, struct rb_xdp_info *out);

    /* The following need no open device. */
    /* Is a program of ours attached, alive or left over? */
    bool (*attached)(const char *ifname);
    /* Remove programs of ours whose process is dead; how many. One whose owner lives stays. */
    int (*cleanup)(const char *ifname, struct rb_xdp_error *err);
    /* Could a socket be bound to this queue now? 0 yes (so nothing of a dead owner's buffers is held any more),
     * -EBUSY no, -ENODEV the interface is gone. Waits at most `timeout_ms`. */
    int (*probe)(const char *ifname, uint32_t queue, uint32_t timeout_ms, struct rb_xdp_error *err);
};

#define RB_XDP_SYMBOL "rb_xdp_ops"
const struct rb_xdp_ops *rb_xdp_ops(void);

#endif
