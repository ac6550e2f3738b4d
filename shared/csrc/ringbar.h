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
} rb_segment;
/* Attach through given segments: one or more lanes and the pools, in any order; their headers say what they are. This is how a guest
 * attaches (ringbar.guest finds the devices). -ENODEV: no lane of this cluster among them. */
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

/* Why packets were not passed on. */
enum { RB_DROP_FULL, RB_DROP_FILTER, RB_DROP_BAD, RB_DROP_NO_BUFFER, RB_DROP_CREDIT, RB_DROP_REASONS };

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
    char producer_vm[128], consumer_vm[128]; /* "" = none */
    char producer_name[32], consumer_name[32]; /* program names */
} rb_queue_info;
/* -ENOENT: no such queue. Host: any queue. Guest: the queues of its lanes, as far as it can see. */
RB_API int rb_queue_get_info(rb_cluster *cluster, uint32_t queue, rb_queue_info *info);
/* Copy every packet of `queue` to queue `observer` as well (one copy each), or no longer (observer < 0). Nothing is taken away: what the observer has
 * no room for is dropped there and counted. The process that serves `queue` makes the copies. -EBUSY: it is observed already. */
RB_API int rb_queue_observe(rb_cluster *cluster, uint32_t queue, int observer);
/* Numbers of all queues: how many there are; at most n are written. */
RB_API int rb_queue_list(rb_cluster *cluster, uint32_t *ids, int n);

/* One participant with a ledger. */
typedef struct rb_book_info {
    uint32_t id, home, free, lent, devices, quiescing, shared, quarantined; /* buffers */
    int32_t pid; /* 0: dead or none */
    char name[32];
} rb_book_info;
RB_API int rb_book_list(rb_cluster *cluster, rb_book_info *out, int n);

/* ---- ends: moving packets ------------------------------------------------------------------------------------ */

enum { RB_RX = 1, RB_TX = 2, RB_WRITABLE = 4, RB_GENERIC = 8, RB_DRIVER = 16 };

/* Open one end of a queue ("99@0", "zc:99@0") or a device ("zc:eth1", "zc:eth1@2"). RB_RX receives, RB_TX sends, always as seen by the caller;
 * RB_RX|RB_TX for a device that does both (then one end does both). RB_WRITABLE: packets received will be changed in place.
 * RB_GENERIC, RB_DRIVER: insist on that XDP mode.
 * -EBUSY: another holds it (names it), -ENOENT, -EINVAL (address), -EACCES, -ENOSPC (pool too small: says the number that would do). */
RB_API int rb_open(rb_end **out, rb_cluster *cluster, const char *address, uint32_t flags);
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
 * thread than the rest of the handle. Spins shortly, then sleeps in growing steps of at most 1 ms. */
RB_API int rb_wait(rb_end *end, int timeout_ms);
/* Nothing moves on a borrowed end before the process that lends there has seen that it was opened. 1: it has, and always so on served ends,
 * direct queues and devices; -ETIMEDOUT: not yet, and the error names the process that is waited for. */
RB_API int rb_answered(rb_end *end);
/* Make a waiting rb_recv, rb_send or rb_wait return -EINTR, now or next time. Any thread, also a signal handler. */
RB_API void rb_break(rb_end *end);
/* A descriptor for poll: readable when it is time to look (a timer for queues, the sockets for devices). Owned by the end. */
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
    char mode[16];   /* devices: "zero-copy", "driver", "generic"; queues: "loan" */
    uint64_t kernel_dropped, kernel_ring_full, kernel_fill_empty, kernel_invalid; /* devices: XDP_STATISTICS */
} rb_stats;
RB_API int rb_stats_get(rb_end *end, rb_stats *stats);
/* Count n packets of `bytes` bytes as dropped for that reason at a sending end (they were refused and will be returned). */
RB_API void rb_drop(rb_end *end, int n, int reason);
/* The address it was opened by, canonical ("99@0", "zc:eth1@0"). */
RB_API const char *rb_address(rb_end *end);

/* First `width` bytes of each packet into out (n rows of width bytes), zero-padded: one pass, a copy. */
RB_API void rb_headers(rb_cluster *cluster, const rb_desc *desc, int n, uint32_t width, uint8_t *out);

/* ---- VMs ---------------------------------------------------------------------------------------------------- */

enum { RB_VM_RX = 1, RB_VM_TX = 2 }; /* as the VM sees it */

/* Make (or find) the lane of VM `vm` (its name for people, unique). `identity` names this life of it ("QEMUPID:STARTTIME"). Returns the
 * lane's segment id. Nothing is plugged here: the caller hands rb_cluster_segments' paths to QEMU. */
RB_API int rb_lane_create(rb_cluster *cluster, const char *vm, const char *identity);
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
/* What is bound to a lane, as pairs queue, RB_VM_RX or RB_VM_TX; and how many guest programs have opened one. */
typedef struct rb_binding { uint32_t queue, direction, open; } rb_binding;
RB_API int rb_lane_bindings(rb_cluster *cluster, uint32_t lane, rb_binding *out, int n);

/* ---- workers ------------------------------------------------------------------------------------------------ */

typedef struct rb_pair { rb_end *in, *out; } rb_pair;

typedef struct rb_worker_options {
    uint32_t struct_size;
    int32_t core;     /* processor + 1; 0 = any */
    uint32_t idle;    /* 0 adaptive, 1 busy, 2 event */
    uint32_t burst;   /* 0 = 64 */
    uint64_t packets; /* stop after so many; 0 = without end */
} rb_worker_options;

typedef struct rb_worker_stats {
    uint64_t packets, bytes, dropped, bursts, loops, idle_loops, cycles_busy, cycles_total;
    uint32_t running;
    int32_t error; /* -errno that ended it, or 0 */
    char message[256];
} rb_worker_stats;

/* A C thread that moves packets along each pair, run to completion, dropping and counting what an output refuses. All ends from one
 * cluster handle, which belongs to the worker until rb_worker_stop. */
RB_API int rb_bridge_start(rb_worker **out, rb_cluster *cluster, const rb_pair *pairs, int n, const rb_worker_options *options);
RB_API int rb_worker_stats_get(rb_worker *worker, rb_worker_stats *stats);
/* Pause (1) or go on (0). Returns when the thread has seen it. */
RB_API int rb_worker_pause(rb_worker *worker, int pause);
/* Stop, wait for the thread, free. */
RB_API void rb_worker_stop(rb_worker *worker);

/* ---- traffic with sequence numbers ---------------------------------------------------------------------------- */

/* Generated packets are Ethernet, IPv4, UDP; the payload begins with a 32-byte trailer of ours: magic, stream, 64-bit sequence number,
 * nanosecond time, and a checksum of every byte of the packet. */
typedef struct rb_flow_options {
    uint32_t struct_size;
    uint32_t size;     /* bytes on the wire without FCS, 74..; 0 = 74 */
    uint32_t flows;    /* distinct UDP source ports; 0 = 1 */
    uint32_t stream;   /* tells one generator from another */
    uint64_t packets;  /* 0 = without end */
    double pps;        /* 0 = as fast as it goes */
    uint32_t window;   /* with a receiving end: most packets on their way; 0 = no limit */
    uint16_t port;     /* UDP destination; 0 = 5000 */
    uint8_t src_mac[6], dst_mac[6]; /* zero = locally administered ones */
    uint32_t src_ip, dst_ip; /* host order; 0 = 192.0.2.1, 192.0.2.2 */
} rb_flow_options;

typedef struct rb_flow_stats {
    uint64_t sent, sent_bytes, refused, received, received_bytes;
    uint64_t lost, reordered, duplicated, corrupted, foreign; /* foreign: not packets of this stream */
    uint64_t next_sequence;
    uint64_t latency_count, latency_ns[5]; /* min, median, 99 %, 99.9 %, max */
    double seconds;
    uint32_t running;
    int32_t error;
    char message[256];
} rb_flow_stats;

/* A worker thread that generates on `out` (or NULL), and verifies what arrives on `in` (or NULL). The two ends may come from two cluster
 * handles; both belong to the worker until it stops. Use rb_flow_stats_get, rb_worker_pause and rb_worker_stop. */
RB_API int rb_flow_start(rb_worker **worker, rb_end *out, rb_end *in, const rb_flow_options *options, const rb_worker_options *worker_options);
RB_API int rb_flow_stats_get(rb_worker *worker, rb_flow_stats *stats);

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
