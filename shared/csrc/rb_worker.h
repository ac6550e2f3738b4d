/* SPDX-License-Identifier: Apache-2.0
 *
 * What all worker kinds have in common. worker.c is the thread and how it is stopped and held; plan.c what it shall do, and how that
 * changes; port.c the ends it moves packets between; worker_record.c what others see of it; policy.c which output a packet goes to. A kind is one file with a `struct rb_worker_kind`: bridge.c,
 * balancer.c, fanout.c, merge.c, delay.c. flow.c is a worker with a loop of its own.
 */
#ifndef RB_WORKER_H
#define RB_WORKER_H
#include "rb_internal.h"

#include <poll.h>

#define RB_WORKER_INS 64u
#define RB_WORKER_OUTS 256u

/* ---- policy.c ---------------------------------------------------------------------------------------------------------- */

enum rb_policy_kind {
    RB_BY_RR, RB_BY_RR_BURST, RB_BY_IP, RB_BY_5TUPLE, RB_BY_GTP, RB_BY_GTP_SESSION, RB_BY_GRE, RB_BY_VXLAN, RB_BY_VLAN, RB_BY_INPUT, RB_BY_FUNCTION,
};
struct rb_policy {
    enum rb_policy_kind kind;
    bool addresses; /* only addresses count, not ports */
    rb_choose choose;
    void *user, *library; /* library: opened for it */
    uint32_t next;        /* round robin */
    struct rb_gtpc *sessions; /* gtp-session: what it remembers */
    char text[128];
};
/* `text` NULL or "" with a function: that function; else by name, or "lib.so:symbol". */
int rb_policy_parse(const char *text, rb_choose choose, void *user, struct rb_policy *out);
void rb_policy_close(struct rb_policy *policy);
uint32_t rb_policy_hash(const struct rb_policy *policy, const uint8_t *packet, uint32_t length);
/* The same for a burst, without a call per packet where it is simple. */
void rb_policy_hashes(const struct rb_policy *policy, const uint8_t *const *packet, const rb_desc *desc, int n, uint32_t *hash);

/* ---- gtpc.c: what policy gtp-session remembers ---- */

#define RB_SEED 0x9e3779b97f4a7c15ull
static inline uint64_t rb_mix(uint64_t h, uint64_t word)
{
    h = (h ^ word) * RB_SEED;
    return h ^ h >> 32;
}
struct rb_gtpc *rb_gtpc_make(void); /* for one thread; free() frees it; NULL: no memory */
/* What names the session of a GTP-C message between two addresses; 0: it belongs to none. `p` is a private copy. */
uint64_t rb_gtpc_session(struct rb_gtpc *g, const uint64_t from[2], const uint64_t to[2], bool v6, const uint8_t *p, uint32_t length);

/* A number of each packet of a burst, in shared memory of a VM or not: of its hash (true: spread evenly over 32 bits) or counted from 0 (false). */
bool rb_policy_numbers(struct rb_policy *policy, struct rb_cluster *c, uint32_t input, const rb_desc *desc, int n, uint32_t *number);

/* ---- port.c ------------------------------------------------------------------------------------------------------------- */

struct rb_port { /* written by the worker's thread, read by others */
    rb_a64 packets, bytes, drops[RB_DROP_REASONS];
    rb_a32 state; /* as in rb_worker_port */
};
struct rb_in {
    rb_end *end;
    bool over; /* a finite source has ended */
    struct rb_port count;
};
struct rb_out {
    rb_end *end;
    bool gone; /* it failed: nothing is sent there any more */
    bool patient; /* what goes there can wait for room: it comes from a file, or this is a pipe to a program */
    uint32_t group, weight;
    uint32_t held;
    struct rb_port count;
    rb_desc desc[RB_MAX_BURST]; /* gathered for it */
};

struct rb_worker;
/* Up to a burst from an input. 0 also when it has ended: rb_all_over tells. -errno ends the worker. */
int rb_take(struct rb_worker *w, struct rb_in *in, rb_desc *desc, int n);
bool rb_all_over(const struct rb_worker *w); /* every input has ended, or as many packets as wanted have come */
/* Send what was gathered for an output; what it refuses is dropped and counted there. */
void rb_flush(struct rb_worker *w, struct rb_out *out);
int rb_flush_all(struct rb_worker *w); /* how many that were */
/* Send these: the same without gathering. Returns how many went. */
int rb_pass(struct rb_worker *w, struct rb_out *out, rb_desc *desc, int n);
/* Drop these, counted at `out` (NULL: at nobody's) for `reason`. */
void rb_discard(struct rb_worker *w, struct rb_out *out, const rb_desc *desc, int n, int reason);
int rb_outputs_left(struct rb_worker *w); /* 0, or the error with which the last output was lost */
static inline void rb_gather(struct rb_worker *w, struct rb_out *out, const rb_desc *desc)
{
    out->desc[out->held++] = *desc;
    if (__builtin_expect(out->held == RB_MAX_BURST, 0))
        rb_flush(w, out);
}
static inline uint8_t *rb_packet(struct rb_cluster *c, const rb_desc *d)
{
    return c->pool[d->handle >> 24] + (uint64_t)(d->handle & RB_INDEX_MASK) * c->buffer_size + rb_desc_offset(d);
}
static inline uint64_t rb_bytes(const rb_desc *d, int n)
{
    uint64_t sum = 0;
    for (int i = 0; i < n; i++)
        sum += rb_desc_length(&d[i]);
    return sum;
}

/* ---- balancer.c: how the outputs of a group share -------------------------------------------------------------------------- */

struct rb_share {
    uint32_t slots;    /* the sum of their weights */
    uint32_t first;    /* plain: the first output */
    bool plain;        /* all weigh the same */
    uint16_t output[]; /* of each slot */
};
int rb_share_make(const struct rb_worker *w, uint32_t group, struct rb_share **out);
static inline uint32_t rb_share_of(const struct rb_share *s, uint32_t number, bool hashed)
{
    uint32_t slot = hashed ? (uint32_t)((uint64_t)number * s->slots >> 32) : number % s->slots;
    return s->plain ? s->first + slot : s->output[slot];
}
/* What the user's function says of a burst: 0, or its error, and then the packets are dropped. */
int rb_choose_by_user(struct rb_worker *w, const rb_desc *desc, int n, uint64_t *choice);

/* ---- worker.c ------------------------------------------------------------------------------------------------------------- */

struct rb_worker_kind {
    const char *name;
    uint32_t outs; /* how many it can have; 0: as many as inputs */
    /* w->in, w->out and w->policy are those of this plan from now on. Between two turns. On an error its own state is as before. */
    int (*changed)(struct rb_worker *w, const rb_plan *plan);
    int (*turn)(struct rb_worker *w);
    void (*leave)(struct rb_worker *w);  /* the plan is about to change: hand on what cannot wait for the next one */
    void (*finish)(struct rb_worker *w); /* the thread ends: hand on everything */
    void (*free)(struct rb_worker *w);
};
extern const struct rb_worker_kind rb_kind_bridge, rb_kind_balancer, rb_kind_fanout, rb_kind_merge, rb_kind_delay;

struct rb_worker {
    pthread_t thread;
    rb_cluster *c[2]; /* handles that belong to the thread while it runs */
    rb_worker_options options;
    rb_a32 stop, pause, paused, hold, held, running;
    pthread_mutex_t control; /* of who holds it; recursive */
    uint32_t holds;
    bool ended; /* the thread is joined */
    int wake; /* eventfd: cuts an event-driven sleep short */
    _Atomic int32_t error;
    int last_loss; /* how the last output failed */
    char message[256];
    rb_a64 packets, bytes, dropped, bursts, loops, idle_loops, cycles_busy, cycles_total, drops[RB_DROP_REASONS];
    rb_a64 holding; /* packets that the kind keeps for later */

    const struct rb_worker_kind *ops; /* NULL: a flow */
    struct rb_in *in;
    struct rb_out *out;
    uint32_t ins, outs;
    struct pollfd *poll; /* event-driven: the devices among the inputs, and `wake` */
    uint32_t polls;
    int poll_ms;
    struct rb_policy policy;
    rb_idle idle;
    void *idle_user;
    struct rb_worker_file *file; /* what others see of it; NULL: it has no name */
    uint64_t published;          /* cycles: when that was last written */

    /* One turn: what moved, 0 = nothing to do, -errno = the end (-ENODATA: a good end). */
    int (*turn)(struct rb_worker *w);
    int (*stats)(struct rb_worker *w, void *out);
    void (*finish)(struct rb_worker *w); /* in the thread, when it ends */
    void (*free)(struct rb_worker *w);
    void *kind;
};

static inline void rb_count_up(rb_a64 *counter, uint64_t n) { rb_set(counter, rb_get(counter) + n); }
void rb_worker_free(struct rb_worker *w); /* it has no thread, or not any more */
int rb_worker_launch(struct rb_worker *w, const rb_worker_options *options);
void rb_ports_describe(const struct rb_worker *w, uint32_t from, uint32_t n, rb_worker_port *out);
uint64_t rb_worker_now(struct rb_worker *w); /* ns since the epoch; of the pulse when the worker was told to use it */
static inline uint64_t rb_cycles(void)
{
#if defined(__x86_64__)
    return __builtin_ia32_rdtsc();
#else
    return rb_mono_ns();
#endif
}

/* ---- worker_record.c -------------------------------------------------------------------------------------------------------- */

int rb_record_open(struct rb_worker *w, const char *name); /* -EBUSY: a living worker has that name */
void rb_record_write(struct rb_worker *w);                 /* the counters */
void rb_record_describe(struct rb_worker *w);              /* ends and policy too */
void rb_record_close(struct rb_worker *w);
#endif
