/* SPDX-License-Identifier: Apache-2.0
 *
 * ringbar.h: packets in shared buffers, passed on as 16-byte descriptors.
 *
 * WHAT IS WHERE
 *
 *   state  (host only)        lane  (one per pair of endpoints)      pool  (packets only)
 *   +--------------------+    +---------------------------------+    +----------------------+
 *   | clusters' settings |    | header, hello, closing          |    | header   (buffer 0)  |
 *   | queues, ends       |    | table of up to 64 queues        |    | buffer 1             |
 *   | books: ledger,     |    | per queue: indices, session,    |    |   64 bytes: its own  |
 *   |   intent record    |    |   forward ring of descriptors,  |    |   header, then packet|
 *   | committed indices  |    |   return ring of handles        |    | buffer 2 ...         |
 *   +--------------------+    +---------------------------------+    +----------------------+
 *
 * A cluster is everything that shares buffers. Its queues are addressed CLUSTER@QUEUE, as in "99@0".
 * A host process maps all three kinds of segment; a VM is given lanes and pools, never the state.
 *
 * THE LIFE OF A BUFFER
 *
 *   home --rb_alloc, or a NIC fills it--> in hand --rb_send--> lent on a queue --rb_recv--> in the consumer's hand
 *     ^                                                                                      |  |
 *     +------------------------- comes back by itself <------------- rb_return --------------+  +-- rb_send: on
 *
 * A buffer never changes its owner: every hop is a loan, and what is lent comes back along its path. The consumer
 * gives it back whenever it likes, in any order. A process that is killed loses nothing: whoever takes its place,
 * or any later command, finds in `state` what it held.
 *
 * CAVEATS, EACH WITH ITS CURE
 *
 * - A cluster handle and all ends opened from it belong to one thread at a time. Give every thread a handle of its
 *   own (rb_cluster_attach is cheap). Only rb_break, and rb_wait on different ends, may run beside other calls.
 * - A handle opened before fork() is dead in the child: calls fail with -EOWNERDEAD. Attach again in the child.
 * - A descriptor taken with rb_recv or rb_alloc is yours until rb_send took it or rb_return gave it back: exactly once.
 *   Giving it back twice is refused and counted, not obeyed.
 * - rb_send on a full queue never waits unless asked: the first k moved, the rest stay yours. Send them again or
 *   return them.
 * - Whoever lends must look in now and then, since what comes back is taken on the lender's next call. A program that
 *   lends and then computes for long calls rb_service.
 *
 * ERRORS. Every int is a count, or zero when good, or -errno. rb_error() then says what and the cure.
 */
#ifndef RINGBAR_H
#define RINGBAR_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RB_API __attribute__((visibility("default")))
#define RB_ABI_VERSION 1u  /* of the memory layout; negotiated in the lane's hello */

typedef struct rb_cluster rb_cluster; /* one attachment of this thread to a cluster */
typedef struct rb_end rb_end;         /* an open end of a queue or of a device */
typedef struct rb_worker rb_worker;   /* a C thread that moves packets */

/* ---- descriptors ------------------------------------------------------------------------------------------- */

/* Equal to a slot of a forward ring. Fields are read with the rb_desc_* functions below. */
typedef struct rb_desc {
    uint32_t handle; /* pool 8 bits, index 24 bits; 0 = none */
    uint32_t word;   /* length 15 bits, data offset 14 bits, flags 3 bits, from the low end */
    uint64_t ts;     /* nanoseconds since the epoch, host clock; 0 = none */
} rb_desc;

enum { RB_SHARED = 1, RB_META = 2, RB_MORE = 4 }; /* flags: fanned out; buffer header valid; more fragments follow */

#define RB_BUFFER_HEADER 64u /* bytes 0..63 of every buffer are its header */
#define RB_MAX_LENGTH 32767u
#define RB_MAX_OFFSET 16383u
#define RB_BURST 64u      /* the burst that sizes are computed with */
#define RB_MAX_BURST 256u /* larger calls are split */

/* Bytes of the packet. */
static inline uint32_t rb_desc_length(const rb_desc *d) { return d->word & 0x7fff; }
/* Where the packet begins in its buffer, bytes from the buffer's start. */
static inline uint32_t rb_desc_offset(const rb_desc *d) { return (d->word >> 15) & 0x3fff; }
/* RB_SHARED | RB_META | RB_MORE. */
static inline uint32_t rb_desc_flags(const rb_desc *d) { return d->word >> 29; }
/* Set all three; length and offset in bytes, not checked here but when the descriptor is sent. */
static inline void rb_desc_set(rb_desc *d, uint32_t length, uint32_t offset, uint32_t flags)
{
    d->word = (length & 0x7fff) | (offset & 0x3fff) << 15 | flags << 29;
}

/* ---- errors ------------------------------------------------------------------------------------------------- */

/* What the last failed call of this thread met, one sentence; never NULL, "" when nothing failed yet. */
RB_API const char *rb_error(void);
/* The command or change that mends it; "" where there is none. */
RB_API const char *rb_error_cure(void);
/* A short stable word for programs, as in the command line's JSON: "no-such-cluster", "busy", ... */
RB_API const char *rb_error_code(void);
/* The library's version, for example "0.1.0". */
RB_API const char *rb_version(void);

/* ---- clusters ----------------------------------------------------------------------------------------------- */

enum { RB_PAGES_AUTO = 0, RB_PAGES_4K = 1, RB_PAGES_2M = 2, RB_PAGES_1G = 3 };

/* Every option structure begins with its size, so that later versions can add fields; the rest may be zero. */
typedef struct rb_cluster_options {
    uint32_t struct_size;
    uint32_t buffer_size; /* bytes, 256..16384, power of two; 0 = 2048. zc: devices need 2048 or 4096 */
    uint32_t buffers;     /* 0 = computed: 65,536 or more where the queues named here need more */
    uint32_t queues;      /* queues 0..n-1 made at once */
    uint32_t slots;       /* of these queues; 0 = 4096 */
    uint32_t pages;       /* RB_PAGES_* */
    int32_t numa;         /* node + 1; 0 = wherever */
    uint32_t persistent;  /* 1: lives until destroyed, else with this process */
    uint32_t sealed;      /* 1: pools are sealed memfds (no path; never together with persistent) */
    char label[32];       /* for people's eyes */
} rb_cluster_options;

/* Make cluster `id` (0..65535) and attach to it. The place of a cluster whose owner died is taken.
 * Errors: -EEXIST (in use; says by whom), -EINVAL (a size; says the nearest legal one), -ENOMEM (pages missing; says how many),
 * -EACCES. */
RB_API int rb_cluster_create(uint32_t id, const rb_cluster_options *options, rb_cluster **out);
/* Attach to a cluster of this host. -ENOENT: no such cluster. -EPROTO: another ABI. */
RB_API int rb_cluster_attach(uint32_t id, rb_cluster **out);

/* One mappable segment as a guest finds it in a BAR: mmap(fd, offset, size) maps it. */
typedef struct rb_segment {
    uint32_t struct_size;
    int32_t fd; /* stays the caller's */
    uint64_t offset, size;
    uint32_t writable; /* 0: mapped read-only */
    uint32_t slot;     /* of a PCI device: the same number, not 0, for all functions of its slot; 0: it is none */
    uint32_t function; /* of a PCI device */
} rb_segment;
/* Attach through given segments: one or more lanes and the pools; their headers say what they are. This is how a guest attaches
 * (ringbar.guest finds the devices). A VM can overwrite the header of a pool that it transmits from, which other VMs have mapped, so of PCI
 * devices, given by slot and function, a header is not all that counts: function 0 is the VM's own lane and tells the slot's cluster, pool n is
 * function n + 1, and a lane is writable. -ENODEV: no lane of this cluster among them, or no pool 0. */
RB_API int rb_cluster_attach_segments(uint32_t id, const rb_segment *segments, uint32_t count, rb_cluster **out);
/* Close every end of this handle and leave. The cluster goes when its owner closes and it is not persistent. */
RB_API void rb_cluster_close(rb_cluster *cluster);
/* Remove cluster `id` from this host: its files go, ends still open anywhere get -ENODEV. Refused with -EBUSY while a process or VM
 * uses it, unless force. */
RB_API int rb_cluster_destroy(uint32_t id, int force);
/* Ids of the clusters of this host, dead ones reaped first: how many there are; at most n are written. */
RB_API int rb_cluster_list(uint32_t *ids, int n);
/* Take over what dead processes left in cluster `id`: complete their intents, take home what came back. Returns how many dead
 * parties were found, or -errno. */
RB_API int rb_cluster_reap(uint32_t id);

typedef struct rb_cluster_info {
    uint32_t id, buffer_size, buffers, pools, queues, lanes, persistent, pages; /* pages: RB_PAGES_4K.. as got */
    uint32_t guest;        /* 1: this handle is a guest's */
    uint32_t sealed;
    int32_t owner_pid;     /* 0: persistent, or the owner is dead */
    uint32_t home_free;    /* buffers that belong to no serving thread */
    uint64_t generation, created_ns;
    char label[32];
} rb_cluster_info;
/* The cluster's settings and what there is of it now. */
RB_API int rb_cluster_get_info(rb_cluster *cluster, rb_cluster_info *info);

/* A pool of this cluster, or a lane: where it is. `path` may be "/proc/PID/fd/N" for sealed memory. */
typedef struct rb_segment_info {
    uint32_t kind, id; /* kind: 1 pool, 2 lane */
    uint64_t size, generation;
    uint32_t state; /* 0 free, 1 open, 2 closing, 3 gone */
    int32_t server_pid;
    char path[128];
    char vm[128]; /* a lane's VM; "" for the host's own lanes */
} rb_segment_info;
/* The segments of the cluster: how many there are; at most n are written. */
RB_API int rb_cluster_segments(rb_cluster *cluster, rb_segment_info *out, int n);

/* ---- queues ------------------------------------------------------------------------------------------------- */

typedef struct rb_queue_options {
    uint32_t struct_size;
    uint32_t slots;  /* 2..65536, power of two; 0 = 4096 */
    uint32_t credit; /* most buffers lent at once; 0 = slots + 2 bursts */
    uint32_t direct; /* 1: between two VMs without the host */
} rb_queue_options;

/* Make queue `id` (or the lowest free number when id < 0). Returns its number. -EEXIST, -EINVAL, -ENOSPC (pool too small: says the
 * number that would do). */
RB_API int rb_queue_create(rb_cluster *cluster, int id, const rb_queue_options *options);
/* Remove a queue. -EBUSY: an end is open or attached. */
RB_API int rb_queue_destroy(rb_cluster *cluster, uint32_t queue);
/* Pause (1) or resume (0) a queue: while paused nothing is delivered and what is sent is refused, not dropped. */
RB_API int rb_queue_pause(rb_cluster *cluster, uint32_t queue, int pause);

/* Only packets that match this expression (libpcap's syntax) are passed on by the queue from now on, whoever serves it; NULL or "" = all. Set, replaced
 * and removed by any process of the host, while packets flow. Packets that do not match are taken from the sender as if they had been passed on, and
 * counted in the queue's drops[RB_DROP_FILTER]. Those that wait in the queue already stay there. -EINVAL: the expression cannot be compiled (says where
 * and why), or is too long. -ENOTSUP: libpcap is not installed; a direct queue; in a guest. */
RB_API int rb_queue_filter(rb_cluster *cluster, uint32_t queue, const char *expression);

/* Why packets were not passed on. */
enum { RB_DROP_FULL, RB_DROP_FILTER, RB_DROP_BAD, RB_DROP_NO_BUFFER, RB_DROP_CREDIT, RB_DROP_GONE, RB_DROP_REASONS }; /* gone: the output failed */

typedef struct rb_queue_info {
    uint32_t id, slots, credit, direct, paused;
    uint32_t count;    /* packets in the ring, unread */
    uint32_t lent;     /* buffers lent on it in all */
    uint32_t held;     /* of these, in the consumer's hand */
    uint32_t granted;  /* empties lent to a sending VM */
    uint32_t quarantined;
    uint64_t packets, bytes, copied, foreign, drops[RB_DROP_REASONS];
    uint64_t rx_packets, rx_bytes; /* what a sending VM handed in */
    int32_t producer_pid, consumer_pid; /* 0 = none */
    uint64_t producer_since, consumer_since; /* ns since the epoch */
    uint32_t waiting; /* 1: the consumer waits for the lender's echo */
    int32_t server_pid; /* the lender: the process that serves it; 0 = none, or it is dead */
    int32_t feeds; /* of a hop, made for a process that sends to a VM which another one serves: the queue that is meant; -1 = none */
    char producer_vm[128], consumer_vm[128]; /* "" = none */
    char producer_name[32], consumer_name[32]; /* program names */
    char filter[512]; /* "" = none; not known in a guest */
} rb_queue_info;
/* -ENOENT: no such queue. Host: any queue. Guest: the queues of its lanes, as far as it can see. */
RB_API int rb_queue_get_info(rb_cluster *cluster, uint32_t queue, rb_queue_info *info);
/* Copy every packet of `queue` to queue `observer` as well (one copy each), or no longer (observer < 0). Nothing is taken away: what the observer has
 * no room for is dropped there and counted. The process that serves `queue` makes the copies. -EBUSY: it is observed already. */
RB_API int rb_queue_observe(rb_cluster *cluster, uint32_t queue, int observer);
/* Numbers of all queues: how many there are; at most n are written. */
RB_API int rb_queue_list(rb_cluster *cluster, uint32_t *ids, int n);

/* An open device of a host's cluster, or somebody who is fed with part of what one receives. */
typedef struct rb_device_info {
    uint32_t receives;
    int32_t pid;    /* 0: its process is dead, and the kernel may still hold buffers of it */
    int32_t queue;  /* of who is fed: the queue that feeds it; -1 = the device itself */
    char name[64];  /* "zc:eth1", "zc:eth1@0-3" */
    char mode[16], clock[16]; /* as rb_stats; of who is fed: "fed", "waiting" (the owner has not looked), "refused" */
    char process[32];
    char rule[512]; /* its steering rule, cut after 511 bytes; "" = all */
} rb_device_info;
/* How many there are; at most n are written. Who is fed follows its device, in the order in which rules are tried. */
RB_API int rb_device_list(rb_cluster *cluster, rb_device_info *out, int n);

/* One participant with a ledger. */
typedef struct rb_book_info {
    uint32_t id, home, free, lent, devices, quiescing, shared, quarantined; /* buffers */
    int32_t pid; /* 0: dead or none */
    char name[32];
} rb_book_info;
/* The books of the cluster, one for each serving thread: how many there are; at most n are written. */
RB_API int rb_book_list(rb_cluster *cluster, rb_book_info *out, int n);

/* ---- ends: moving packets ------------------------------------------------------------------------------------ */

enum { RB_RX = 1, RB_TX = 2, RB_WRITABLE = 4, RB_GENERIC = 8, RB_DRIVER = 16, RB_TAKE_ALL = 32, RB_METADATA = 64 };

/* Open one end of a queue ("99@0", "zc:99@0") or a device:
 *   zc:eth1, zc:eth1@2   a NIC, or one of its queues, by AF_XDP; needs the host's side of the cluster
 *   eth1                 any network interface, one copy a packet (AF_PACKET)
 *   stack:eth1           the kernel's side of it: sending is as if eth1 had received, receiving takes what the kernel sends out of it
 *   pcap:FILE            a capture file: receiving replays it, sending writes it
 * RB_RX receives, RB_TX sends, always as seen by the caller;
 * RB_RX|RB_TX for a device that does both (then one end does both). RB_WRITABLE: packets received will be changed in place; of
 * those that others read too (RB_SHARED) the program gets copies of its own, on a host from buffers claimed with the first, in a VM from those of its
 * sending queues; where there is none the packet is dropped and counted.
 * RB_GENERIC, RB_DRIVER: insist on that XDP mode. RB_TAKE_ALL: take all packets of a NIC, even one that this host is reached by. RB_METADATA: where its driver
 * knows them (kernel 6.3), zc: receives with the card's own time and hash (RB_META); no other XDP program can then be on the NIC.
 * -EBUSY: another holds it (names it), -ENOENT, -EINVAL (address), -EACCES, -ENOSPC (pool too small: says the number that would do). */
RB_API int rb_open(rb_end **out, rb_cluster *cluster, const char *address, uint32_t flags);

/* More about a device. Zero or NULL = the default. An option that the address's kind does not know is refused with -EINVAL. */
typedef struct rb_open_options {
    uint32_t struct_size;
    uint32_t flags;         /* as rb_open */
    const char *steer;      /* zc: receiving: what is taken from the NIC; the rest stays with the kernel */
    const char *filter;     /* all: as rb_filter, from the first packet on */
    uint32_t busy_poll_us;  /* zc: microseconds that the kernel polls the driver in the caller's stead */
    uint32_t promiscuous;   /* zc:, eth1, receiving: 1 = also packets for other machines, until it is closed */
    uint32_t fanout_group;  /* eth1 receiving: 1..65535: all ends of this network namespace that name the same group share the packets, flow by flow */
    uint32_t snaplen;       /* eth1 receiving, pcap: sending: bytes kept of each packet */
    double speed;           /* pcap: receiving: times the recorded speed; 0 = as recorded, below 0 = as fast as it goes */
    double pps, gbps;       /* pcap: receiving: this rate instead */
    uint64_t loops;         /* pcap: receiving: how often the file is played; 0 = once, UINT64_MAX = without end */
    uint32_t preload;       /* pcap: receiving: 1 = read into this process's memory first, and played from there */
    uint32_t format;        /* pcap: sending: RB_PCAPNG, RB_PCAP; 0 = pcap where the file's name ends in .pcap, else pcapng; times in nanoseconds in both */
    const char *name;       /* pcap: sending: interface name that is written into the file */
    uint64_t rotate_bytes;  /* pcap: sending: before a file gets larger, the next one is begun: FILE_00001_DATE-TIME.pcapng and so on; 0 = never */
    double rotate_seconds;  /* pcap: sending: the same with the first packet after so many seconds */
    uint32_t observe;       /* stack: receiving: 1 = what the kernel sends goes its way as well; 0 = it goes nowhere unless the program sends it */
} rb_open_options;
enum { RB_PCAPNG = 1, RB_PCAP = 2 };
/* The same, with options. */
RB_API int rb_open_with(rb_end **out, rb_cluster *cluster, const char *address, const rb_open_options *options);
/* What a sending device still holds goes out now; a file's end is told of here, not by rb_close. 0: all is out, also where nothing is ever held.
 * -ENOSPC: the disk is full; the file has been cut back to whole packets, and the error says how many. -EPIPE: the reader of a pipe is gone. -EIO... */
RB_API int rb_sync(rb_end *end);
/* Close. What was received from it and is still in hand goes back; packets unread in a queue stay for the next consumer. What rb_alloc gave
 * for a queue that this handle serves stays in hand until it is returned, or the handle is closed. */
RB_API void rb_close(rb_end *end);

/* Up to n packets into desc. timeout_ms: 0 = do not wait, -1 = without end. Returns how many; 0 = none in time;
 * -EINTR: rb_break was called; -ENODEV: detached or destroyed; -ENODATA: the end of a finite source; -ETIMEDOUT: a timeout of 1 s or
 * more (in a guest 5 s) went by, and rb_answered still says no. */
RB_API int rb_recv(rb_end *end, rb_desc *desc, int n, int timeout_ms);
/* Pass on packets received from any end of this handle, or from rb_alloc. Returns how many moved: the first k; the rest stay the
 * caller's. timeout_ms as above: wait until all are moved. -EINVAL: desc[0] is not in this handle's hand, or its
 * offset and length do not fit its buffer. */
RB_API int rb_send(rb_end *end, rb_desc *desc, int n, int timeout_ms);
/* Give packets back unsent, from whichever end they came. Returns how many were really in hand. */
RB_API int rb_return(rb_cluster *cluster, const rb_desc *desc, int n);
/* Up to n empty buffers to fill and send on `end`; offset set, length 0. Fewer when there are no more. */
RB_API int rb_alloc(rb_end *end, rb_desc *desc, int n);
/* Where the packet's bytes are, in this process. Valid until sent or returned. NULL for a handle out of range. */
RB_API void *rb_data(rb_cluster *cluster, const rb_desc *desc);
/* The buffer's own 64-byte header: receive hash (first 4 bytes, little endian) and user metadata. */
RB_API void *rb_buffer_header(rb_cluster *cluster, const rb_desc *desc);
/* Write access to packet bytes? (A pool can be mapped read-only into a VM.) */
RB_API int rb_writable(rb_cluster *cluster);

/* Wait until `end` may have packets (or room, for a sending end). 1 yes, 0 timeout, -EINTR after rb_break, -ENODEV. May run in another
 * thread than the rest of the handle. Spins shortly, then sleeps in growing steps of at most 1 ms; after rb_bell_arm, until its bell rings: then 0
 * may also mean that it rang for something else. */
RB_API int rb_wait(rb_end *end, int timeout_ms);
/* Nothing has come for a while: have the other sides ring (a VM and its host, where the VM has a doorbell). Returns how many ms the next rb_wait
 * may last, until which others can go without rb_service. Then look once more (rb_recv with timeout 0) before rb_wait: it sleeps if nothing came. Like
 * rb_recv, which does it by itself, this is for the thread that uses the handle. */
RB_API int rb_bell_arm(rb_end *end);
/* Nothing moves on a borrowed end before the process that lends there has seen that it was opened. 1: it has, and always so on served ends,
 * direct queues and devices; -ETIMEDOUT: not yet, and the error names the process that is waited for. */
RB_API int rb_answered(rb_end *end);
/* Make a waiting rb_recv, rb_send or rb_wait return -EINTR, now or next time. Any thread, also a signal handler. */
RB_API void rb_break(rb_end *end);
/* A descriptor for poll: readable when it is time to look (a bell or a timer for queues, the sockets for devices). Owned by the end. Having asked,
 * and each time it is readable, call rb_recv with timeout 0 until nothing comes: that also sets the bell. */
RB_API int rb_fd(rb_end *end);
/* Do what a lender owes its borrowers: take back returns, refill grants, answer new sessions, relay. Cheap when there is nothing. */
RB_API int rb_service(rb_cluster *cluster);

/* Packets waiting (rx) or slots used (tx); whether it is empty or full. */
RB_API int rb_count(rb_end *end);
RB_API int rb_empty(rb_end *end);
RB_API int rb_full(rb_end *end);

typedef struct rb_stats {
    uint64_t packets, bytes, refused, drops[RB_DROP_REASONS]; /* of this end since it was opened */
    uint64_t copied; /* packets that had to be copied */
    char mode[16];   /* devices: "zero-copy", "driver", "generic", "copy", "observe"; queues: "loan" */
    char clock[16];  /* devices: where timestamps come from: "hardware", "kernel" (when the kernel got it), "software" (when the burst was taken) */
    uint64_t kernel_dropped, kernel_ring_full, kernel_fill_empty, kernel_invalid; /* zc: XDP_STATISTICS; eth1: PACKET_STATISTICS in the first */
    /* zc: what the steering rule left to the stack; what the driver would not send; and the interface's own counters since it was opened, of all its
     * queues. With a copy, what arrived = packets + drops + kernel_dropped + kernel_ring_full + kernel_passed (+ what waits). In zero-copy mode the driver
     * counts what it had no buffer for in nic_rx_dropped or only in `ethtool -S`, and kernel_fill_empty counts its tries. */
    uint64_t kernel_passed, kernel_refused, nic_rx_dropped, nic_tx_dropped;
    char waits[16]; /* queues: how a receiving end waits: "bell" (asleep until the other side rings) or "polling" */
} rb_stats;
/* May run beside other calls on the end, in one thread at a time: then counters may be a moment old. */
RB_API int rb_stats_get(rb_end *end, rb_stats *stats);
/* From now on a receiving zc: end takes from its NIC what this rule names, "all" or an expression in libpcap's syntax; the rest stays with the kernel. Every
 * packet is judged by the old rule or by the new one, none by neither. By the thread that uses the end. -EINVAL: the rule cannot be compiled (says where),
 * or does not run in XDP; -ENOTSUP: libpcap is not installed. When it fails the old rule holds. */
RB_API int rb_steer(rb_end *end, const char *rule);
/* Only packets that match this expression (libpcap's syntax, Ethernet) pass this end from now on; NULL or "" = all. For a receiving end the
 * others go back at once, for a sending end they are not sent though they count as moved; both are counted in drops[RB_DROP_FILTER], except
 * what a device filters in the kernel, which is not counted. Set, replaced and removed at any time between two bursts, by the thread that uses the end.
 * A packet in several fragments (RB_MORE) is judged by its first. -EINVAL: the expression cannot be compiled; says where and why. -ENOTSUP: libpcap is
 * not installed. When it fails the filter is as it was. */
RB_API int rb_filter(rb_end *end, const char *expression);
/* Count n packets of `bytes` bytes as dropped for that reason at a sending end (they were refused and will be returned). */
RB_API void rb_drop(rb_end *end, int n, int reason);
/* The address it was opened by, canonical ("99@0", "zc:eth1@0"). */
RB_API const char *rb_address(rb_end *end);

/* First `width` bytes of each packet into out (n rows of width bytes), zero-padded: one pass, a copy. */
RB_API void rb_headers(rb_cluster *cluster, const rb_desc *desc, int n, uint32_t width, uint8_t *out);

/* ---- one packet to many ------------------------------------------------------------------------------------------ */

/* Up to 64 sending ends of one handle that are sent the same buffers. Nothing is copied: a buffer is lent to all of them at once, is read-only while
 * it is (the receivers see RB_SHARED in its descriptor), and is home when the last has given it back. An output that is slow or dead holds back no
 * more than its credit. Receivers may send a shared buffer on like any other.
 * Copied instead, and counted in `copied`: what goes to a device that cannot lend; a second output of a VM, or of VMs joined by direct queues, that
 * can send (it would not be known which of its loans it sends on); a borrowed packet that this process has lent on already; and in a guest, which
 * keeps no book, all but one of the outputs of a packet, in empty buffers of theirs.
 * One thread at a time, the handle's. Closing an end takes it out of its fans; closing the handle closes them. */
typedef struct rb_fan rb_fan;
RB_API int rb_fan_open(rb_fan **out, rb_cluster *cluster);
/* Its bit, 0..63, with which masks name it. An end can be in several fans of its handle, under one bit. -ENOSPC: all 64 bits of this handle are in
 * use; -EINVAL: an end of another handle, or one that does not send; -EEXIST: it is in this fan. */
RB_API int rb_fan_add(rb_fan *fan, rb_end *end);
/* No more to it. What it still holds comes home by itself, and then the bit can be given out again. -ENOENT: no such output. */
RB_API int rb_fan_remove(rb_fan *fan, int bit);
/* Send packet i, from any end of this handle or from rb_alloc, to the outputs in mask[i]. All n are taken: an output that is full, out of credit,
 * paused or gone drops and counts there; an output's filter applies; what nobody took goes home, and so does a packet with an empty mask. A mask of one bit costs what rb_send
 * costs. missed[i], unless NULL: the bits of mask[i] that got nothing. Returns how many packets went to at least one output; or -errno, and none was
 * taken: -ENODEV, -EOWNERDEAD. A descriptor that is not in this handle's hand is passed over. */
RB_API int rb_fan_send(rb_fan *fan, const rb_desc *desc, const uint64_t *mask, int n, uint64_t *missed);
/* As rb_fan_remove for all of them. The ends stay open. */
RB_API void rb_fan_close(rb_fan *fan);

/* ---- VMs ---------------------------------------------------------------------------------------------------- */

enum { RB_VM_RX = 1, RB_VM_TX = 2 }; /* as the VM sees it */

/* Make (or find) the lane of VM `vm` (its name for people, unique). `identity` names this life of it ("QEMUPID:STARTTIME"). Returns the
 * lane's segment id. Nothing is plugged here: the caller hands rb_cluster_segments' paths to QEMU. */
RB_API int rb_lane_create(rb_cluster *cluster, const char *vm, const char *identity);
/* Give the lane's VM a pool of its own with so many buffers (its buffer 0 included): from then on what the VM sends is in buffers of it, and only this VM
 * is to map it writable; all others, and this VM the common pool, read-only. Before the VM's first RB_VM_TX. It ends with the lane, when every
 * buffer has come home. Returns its number; the same again when it is there. -ENOSPC: too many, or no room in the ledgers. Who mapped its memory
 * before (a lane that was made earlier) does not see it: what goes to such a VM is copied, and counted in `copied`. */
RB_API int rb_lane_pool(rb_cluster *cluster, uint32_t lane, uint32_t buffers);
/* Bind the VM's end of a queue to its lane: the VM receives (RB_VM_RX) or sends (RB_VM_TX). 0, or 1 = it was so already. -EBUSY: that end is
 * held (by whom). Packets waiting in the queue move along. */
RB_API int rb_lane_bind(rb_cluster *cluster, uint32_t lane, uint32_t queue, uint32_t direction);
/* The reverse of rb_lane_bind, for one queue (before or after the VM let go). */
RB_API int rb_lane_unbind(rb_cluster *cluster, uint32_t lane, uint32_t queue, uint32_t direction);
/* Announce in the lane that it is closing: guest programs unmap and acknowledge. Returns 1 when all have, 0 when not within timeout_ms. */
RB_API int rb_lane_announce(rb_cluster *cluster, uint32_t lane, int timeout_ms);
/* The VM has let go of the memory (unplugged, or its QEMU is gone): take home all it held and remove the lane. With still_mapped, the
 * guest may go on writing: what it held stays quarantined until rb_lane_remove is called again without. */
RB_API int rb_lane_remove(rb_cluster *cluster, uint32_t lane, int still_mapped);
/* The VM was reset: none of its programs lives any more. Their sessions end, so that what they held comes home as soon as the lane's server looks,
 * and not when the next program opens the queue. What is unread stays so. Only for a VM of which this is known. */
RB_API int rb_lane_reset(rb_cluster *cluster, uint32_t lane);
/* What is bound to a lane, as pairs queue, RB_VM_RX or RB_VM_TX; and how many guest programs have opened one. */
typedef struct rb_binding { uint32_t queue, direction, open; } rb_binding;
RB_API int rb_lane_bindings(rb_cluster *cluster, uint32_t lane, rb_binding *out, int n);

/* A lane's doorbell, on the host. QEMU (process pid) was given these event descriptors and keeps them; whoever serves the lane gets them there. fds[0]:
 * what the VM's programs ring; fds[1 + entry]: what wakes the program that has that entry of the lane open. All non-blocking. pid 0: there is none any more. */
RB_API int rb_lane_bells(rb_cluster *cluster, uint32_t lane, int32_t pid, const int *fds, int n);
/* Write into the doorbell device's memory, 4096 bytes, that it is for this lane. */
RB_API int rb_bell_memory(rb_cluster *cluster, uint32_t lane, int fd);
/* In a VM: which entry of which lane an end is, and its bell: event descriptors to sleep on and to ring, and one that becomes readable when the
 * bell is gone (-1: none). They belong to the end from then on, unless this fails. -ENOTSUP: such an end has none. */
RB_API int rb_bell_place(rb_end *end, uint32_t *lane, uint32_t *entry);
RB_API int rb_bell_give(rb_end *end, int wait, int ring, int lease);

/* ---- workers ------------------------------------------------------------------------------------------------
 *
 * A worker is a C thread that moves packets in bursts, without a lock, a copy or an allocation on the way. What an output does not take is
 * dropped and counted there by reason: it never waits, so an output that is full, slow or dead does not hold up the others. All ends of a
 * worker come from one cluster handle, which belongs to it until rb_worker_stop. Its functions may be called from any thread.
 *
 * Kinds: "bridge" (input i to output i), "balancer" (each packet to one output of every group), "fanout" (the same, or to those of a mask),
 * "merge" (all inputs to one output, by time), "delay" (input i to output i, later). */

typedef struct rb_pair { rb_end *in, *out; } rb_pair;

/* Outputs of one group share its traffic; every group gets all of it. So {a,0} {b,0} {c,1}: a and b share, c gets everything. */
typedef struct rb_output {
    rb_end *end;
    uint32_t group;  /* from 0, without gaps */
    uint32_t weight; /* its share within the group, 1..1024; 0 = 1 */
} rb_output;

#define RB_NOWHERE 0xffffffffffffffffull /* as the choice of a balancer: drop it, counted as filtered */

/* Where packets go, decided by the user's code in the worker's thread, a burst at a time: for packet i, of rb_desc_length(&desc[i]) bytes at data[i],
 * choice[i] is the number of an output or RB_NOWHERE (balancer with one group), or a mask with bit k for output k (balancer with more groups, fanout;
 * 0 = drop). Numbers too large count as RB_NOWHERE. Called with nothing locked; must not call into ringbar but for rb_data, rb_headers and the like on
 * its cluster. A return below 0, an -errno, ends the worker with an error. */
typedef int (*rb_choose)(void *user, const rb_desc *desc, void *const *data, int n, uint64_t *choice);
/* Called in the worker's thread whenever there was nothing to do, before it rests. A return below 0 ends the worker. */
typedef int (*rb_idle)(void *user);

/* Between which ends packets move, and how. */
typedef struct rb_plan {
    uint32_t struct_size;
    uint32_t ins, outs;    /* at most 64 and 256; fanout, and balancers with more groups than one: 64 outputs */
    rb_end *const *in;
    const rb_output *out;
    const char *policy;    /* balancer, fanout with groups: "rr", "rr-burst", "ip", "5tuple" (as NULL), "gtp", "gtp-ip", "gtp-session", "gre",
                            * "gre-ip", "vxlan", "vxlan-ip", "vlan", "input", or "LIBRARY.so:FUNCTION", an rb_choose. docs/workers.md has the formulas */
    rb_choose choose;      /* instead of a policy */
    void *user;            /* its first argument */
    rb_idle idle;
    void *idle_user;
    uint64_t wait_ns;      /* merge: a packet waits at most so long for older ones of other inputs; 0 = 1 ms. delay: the delay */
} rb_plan;

typedef struct rb_worker_options {
    uint32_t struct_size;
    int32_t core;     /* processor + 1; 0 = any */
    uint32_t idle;    /* while nothing comes: 0 adaptive (spin, then sleep up to 0.2 ms), 1 busy, 2 event (sleep until a NIC has packets, or the
                       * other side of a VM's queue rings; other queues are looked at every ms) */
    uint32_t burst;   /* 0 = 64 */
    uint64_t packets; /* stop after so many; 0 = without end */
    const char *name; /* others see it by that name: letters, digits, "-", "_", "." , at most 31; NULL = nobody does */
    uint32_t pulse;   /* 1: take the time from rb_pulse_ns, not from the clock */
} rb_worker_options;

typedef struct rb_worker_stats {
    uint64_t packets, bytes; /* taken from the inputs */
    uint64_t dropped, bursts, loops, idle_loops;
    uint64_t cycles_busy, cycles_total; /* of the processor's time stamp counter: in turns that moved something, and in all */
    uint32_t running;
    int32_t error; /* -errno that ended it, or 0 */
    char message[256];
    uint64_t drops[RB_DROP_REASONS]; /* of `dropped` */
    uint64_t held;    /* packets that it keeps for later now: delayed, or waiting for older ones */
    uint32_t paused, ins, outs;
} rb_worker_stats;

/* One input or output of a worker. */
typedef struct rb_worker_port {
    char address[64];
    uint32_t output; /* 0: an input */
    uint32_t state;  /* 1 in use, 2 the source has ended, 3 it failed */
    uint32_t group, weight;
    uint64_t packets, bytes, drops[RB_DROP_REASONS];
} rb_worker_port;

/* Start a worker of that kind. Errors: -EINVAL (a wrong plan; says what), -EBUSY (the handle has a worker, the name is taken). */
RB_API int rb_worker_start(rb_worker **out, rb_cluster *cluster, const char *kind, const rb_plan *plan, const rb_worker_options *options);
/* As rb_worker_start of a bridge. */
RB_API int rb_bridge_start(rb_worker **out, rb_cluster *cluster, const rb_pair *pairs, int n, const rb_worker_options *options);
/* Another plan for a running worker of the same kind, all of it, taken up between two turns. What it holds for an output that is no longer among
 * them is sent first. On an error everything is as before. */
RB_API int rb_worker_change(rb_worker *worker, const rb_plan *plan);
/* Have the thread stand still between two turns; the calling thread may then use its ends and cluster handle, open and close (ends that are in
 * the plan are closed only after a change). Nests; every hold needs its rb_worker_release, by the same thread. */
RB_API int rb_worker_hold(rb_worker *worker);
RB_API void rb_worker_release(rb_worker *worker);
/* Run `fn` between two turns and return what it returned: rb_worker_hold and rb_worker_release around it. */
RB_API int rb_worker_call(rb_worker *worker, int (*fn)(rb_worker *worker, void *arg), void *arg);
RB_API int rb_worker_stats_get(rb_worker *worker, rb_worker_stats *stats);
/* Its inputs, then its outputs: how many there are; at most n are written. */
RB_API int rb_worker_ports(rb_worker *worker, rb_worker_port *out, int n);
/* Pause (1) or go on (0). Returns when the thread has seen it. Paused it takes nothing from its inputs, and still serves its borrowers. */
RB_API int rb_worker_pause(rb_worker *worker, int pause);
/* End the thread and wait for it: what it holds is sent on, or dropped and counted. Its counters can still be read. */
RB_API void rb_worker_end(rb_worker *worker);
/* The same, and free it. The ends stay open. */
RB_API void rb_worker_stop(rb_worker *worker);
/* The hash that a policy computes of a packet ("5tuple", ...). -EINVAL for those that do not hash. */
RB_API int rb_policy_hash_of(const char *policy, const void *packet, uint32_t length, uint32_t *hash);

/* A named worker as others see it, in this process or another. */
typedef struct rb_worker_info {
    char name[32], kind[16], policy[128], program[32];
    int32_t pid;        /* 0: the process is dead */
    int32_t last_pid;   /* of the process that wrote it */
    uint64_t since_ns;  /* started; ns since the epoch */
    uint64_t seen_ns;   /* the counters are of then */
    uint32_t idle, core; /* core: processor + 1 */
    rb_worker_stats stats;
} rb_worker_info;
/* The named workers of this host (in a guest: of this guest): how many there are; at most n are written. Those whose process died stay until the
 * name is used again or rb_worker_forget. */
RB_API int rb_worker_list(rb_worker_info *out, int n);
/* One of them, and its inputs and outputs, as rb_worker_ports. Returns how many of those there are. -ENOENT. */
RB_API int rb_worker_read(const char *name, rb_worker_info *info, rb_worker_port *ports, int n);
/* Remove what a dead worker left. -EBUSY: it lives. */
RB_API int rb_worker_forget(const char *name);

/* A clock that a thread of this process moves on every period_us microseconds (0 = 10): reading it costs one load. Starts and stops nest. */
RB_API int rb_pulse_start(uint32_t period_us, int core);
RB_API void rb_pulse_stop(void);
/* Its time, ns since the epoch; the clock's own where no pulse runs. */
RB_API uint64_t rb_pulse_ns(void);

/* ---- traffic with sequence numbers ---------------------------------------------------------------------------- */

/* Generated packets are Ethernet, perhaps a VLAN tag, IPv4 or IPv6, UDP; the payload begins with a 32-byte mark of ours: magic, stream, a
 * checksum of every byte of the packet (UDP's own checksum apart), 64-bit sequence number, nanosecond time. Or they are frames that the
 * caller gives, sent in turn as they are, which nothing can verify.
 *
 * Flow number `sequence % flows` takes one source port, source address, destination address and destination port of the ranges, each
 * counted upwards from the first; the source port changes fastest. Rates are held over a second: after a pause of less than that, what
 * was missed is made good, in bursts no longer than the worker's. */
typedef struct rb_flow_options {
    uint32_t struct_size;
    uint32_t size;     /* bytes on the wire without FCS; 0 = the least: 74, 20 more with IPv6, 4 more with a VLAN */
    uint32_t flows;    /* distinct combinations of addresses and ports; 0 = all that the ranges make */
    uint32_t stream;   /* tells one generator from another */
    uint64_t packets;  /* 0 = without end */
    double pps;        /* packets a second; 0 = as fast as it goes */
    uint32_t window;   /* with a receiving end: most packets on their way; 0 = no limit */
    uint16_t port;     /* first UDP destination; 0 = 5000 */
    uint8_t src_mac[6], dst_mac[6]; /* zero = locally administered ones */
    uint32_t src_ip, dst_ip; /* first, host order; 0 = 192.0.2.1, 192.0.2.2 */
    double bps;        /* bits a second on the wire, with preamble, FCS and gap (24 bytes a packet); 0 = no limit */
    uint32_t plain;    /* 1: what arrives is counted and not verified */
    uint32_t ipv6;     /* 1: IPv6, with the addresses below; ranges count in their last 32 bits */
    uint32_t vlan;     /* VLAN + 1; 0 = no tag */
    uint32_t src_ips, dst_ips, src_ports, dst_ports; /* lengths of the ranges; 0 = 1, src_ports 0 = as many as `flows` needs */
    uint8_t src_ip6[16], dst_ip6[16];
    uint16_t src_port; /* first UDP source; 0 = 1024 */
    uint16_t reserved;
    uint32_t n_sizes, n_frames;
    const uint16_t *sizes;  /* taken in turn instead of `size`; copied */
    const uint8_t *frames;  /* one behind the other; copied */
    const uint32_t *frame_lengths; /* 14.. each; copied */
} rb_flow_options;

typedef struct rb_flow_stats {
    uint64_t sent, sent_bytes, refused, received, received_bytes;
    uint64_t lost, reordered, duplicated, corrupted, foreign; /* foreign: not packets of this stream */
    uint64_t late;          /* overtaken by more than 1,048,576: known to be neither duplicate nor not, and not in `distinct` */
    uint64_t distinct, first_sequence; /* different ones that came; the least of them */
    uint64_t next_sequence;
    uint64_t latency_count, latency_ns[5]; /* min, median, 99 %, 99.9 %, max; those between are right within 1.6 % */
    double seconds; /* from the start to the last packet */
    uint32_t running;
    int32_t error;
    char message[256];
} rb_flow_stats;

/* A worker thread that generates on `out` (or NULL), and verifies what arrives on `in` (or NULL). The two ends may come from two cluster
 * handles; both belong to the worker until it stops. Use rb_flow_stats_get, rb_worker_pause and rb_worker_stop. */
RB_API int rb_flow_start(rb_worker **worker, rb_end *out, rb_end *in, const rb_flow_options *options, const rb_worker_options *worker_options);
RB_API int rb_flow_stats_get(rb_worker *worker, rb_flow_stats *stats);
/* Send nothing more. The flow ends once what was sent is back, which lost packets never are: rb_worker_stop ends it before. */
RB_API int rb_flow_finish(rb_worker *worker);

/* ---- measuring ------------------------------------------------------------------------------------------------ */

typedef struct rb_bench_options {
    uint32_t struct_size;
    uint32_t processes; /* 1: the two ends are processes, 0: threads */
    uint32_t burst;     /* 1..256; 0 = 32 */
    uint32_t touch;     /* bytes of each packet written by the producer, one word of each line read by the consumer; 0, 64.. */
    uint32_t slots;     /* 0 = 1024 */
    uint32_t level;     /* 0 bare rings, 1 + ledger, 2 + intent records, 3 the library's whole path */
    uint32_t latency;   /* 1: round trips of single packets instead of throughput */
    double seconds;     /* per run; 0 = 0.5 */
    int32_t cores[2];   /* processor + 1 of producer and consumer; 0 = 0 and 1 */
} rb_bench_options;

typedef struct rb_bench_result {
    double mpps, ns_per_packet, seconds;
    uint64_t packets, checks_failed;
    double latency_ns[5]; /* round trip: min, median, 99 %, 99.9 %, max */
} rb_bench_result;
/* Measure the loan rings themselves, on memory of their own. */
RB_API int rb_bench_ring(const rb_bench_options *options, rb_bench_result *result);

#ifdef __cplusplus
}
#endif
#endif
