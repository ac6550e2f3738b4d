/* SPDX-License-Identifier: Apache-2.0
 *
 * What a process keeps for itself, and how the files of the core call each other. From the bottom up:
 * error.c, segment.c (files and mappings), registry.c (finding clusters, locks, who is alive), cluster.c (their life and death), queue.c (queues and
 * where their rings are), book.c (a ledger and its legs), lend.c, collect.c (lending and taking back),
 * fan.c, fan_lend.c (one packet to many), server.c (what else a lender owes), recover.c (what the dead left), client.c (the borrower), lane.c (VMs),
 * observe.c (copies for a capture), feed.c (sending to a VM that another process serves), filter.c (which packets pass), open.c, end.c (the public calls), device.c (what devices that copy have in
 * common), dev_*.c (one kind of device each), worker.c and what rb_worker.h names, bench.c.
 */
#ifndef RB_INTERNAL_H
#define RB_INTERNAL_H
#include "rb_layout.h"
#include "rb_ring.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <string.h>

/* Each argument once: some of them read shared memory. */
#define RB_MIN(a, b) ({ __auto_type a_ = (a); __auto_type b_ = (b); a_ < b_ ? a_ : b_; })
#define RB_MAX(a, b) ({ __auto_type a_ = (a); __auto_type b_ = (b); a_ > b_ ? a_ : b_; })

/* ---- error.c */
/* Sets this thread's error and returns -err. `cure` may be NULL. */
int rb_fail(int err, const char *code, const char *cure, const char *format, ...) __attribute__((format(printf, 4, 5)));
/* The cure of the error just set, with arguments. Returns the same -err for use in a return. */
int rb_cure(int err, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- registry.c */
struct rb_registry { /* one per process and life of a cluster, shared by its handles */
    struct rb_registry *next;
    uint32_t id;
    int refs;
    int lock_fd; /* one descriptor a process: closing any would drop all record locks */
    uint64_t generation;
    struct rb_state *state;
    uint64_t state_size;
    int state_fd;
    uint8_t *extent;
    rb_a64 *ledgers, *masks;
    pthread_mutex_t recovery; /* the recovery lock among this process's threads */
    int recovery_depth;
    uint8_t held[8192]; /* bytes of the lock file locked by this process */
};

enum { /* bytes of the lock file */
    RB_LOCK_RECOVERY = 0,
    RB_LOCK_OWNER = 1,
    RB_LOCK_BOOK = 64,
    RB_LOCK_END = 4096, /* + 2 * queue + (0 tx, 1 rx) */
};
extern unsigned rb_fork_count; /* moves in the child of every fork */

uint64_t rb_now_ns(void);
uint64_t rb_mono_ns(void);
int rb_enter(struct rb_registry *reg); /* take the recovery lock, bounded; nests in a thread */
void rb_leave(struct rb_registry *reg);
int rb_byte_lock(struct rb_registry *reg, unsigned byte);   /* 0, or -EBUSY */
void rb_byte_unlock(struct rb_registry *reg, unsigned byte);
int32_t rb_byte_holder(struct rb_registry *reg, unsigned byte); /* pid, 0 = nobody */
void rb_holder_me(struct rb_holder *holder);
uint64_t rb_process_start(int32_t pid); /* clock ticks since boot; 0 = it does not run */
int rb_owner_alive(struct rb_registry *reg);
const char *rb_run_dir(void);
int rb_registry_locks(uint32_t id, struct rb_registry **out); /* a guest's: who of its programs holds which end */
int rb_registry_get(uint32_t id, struct rb_registry **out); /* the present life of a cluster, mapped */
void rb_registry_put(struct rb_registry *reg);
int rb_registry_begin(uint32_t id, struct rb_registry **out);
void rb_registry_layout(struct rb_registry *reg); /* where the extents and ledgers are in `state` */
uint64_t rb_state_bytes(uint32_t capacity);
void rb_state_path(uint32_t id, char *path, size_t size);
int rb_run_dir_ready(void);

/* ---- segment.c */
struct rb_mapping {
    void *base;
    uint64_t size;
};
/* Make a segment: path is written (128 bytes); keep_fd is set for sealed ones (the caller keeps it open for the path's life). */
int rb_segment_create(uint32_t cluster, uint32_t kind, uint32_t number, uint64_t size, uint32_t *pages, int numa, int sealed,
                      uint64_t generation, char *path, int *keep_fd, struct rb_mapping *out);
int rb_segment_open(const char *path, uint32_t cluster, uint32_t kind, uint64_t generation, int writable, struct rb_mapping *out,
                    int *keep_fd);
/* Map a segment that a VM can write to: nothing inside is believed, size and path are the record's. */
int rb_segment_map(const struct rb_segment_record *record, struct rb_mapping *out);
int rb_header_check(const struct rb_header *header, uint32_t cluster, uint64_t generation, const char *what);
void rb_unmap(struct rb_mapping *mapping);
uint64_t rb_pow2(uint64_t v); /* next power of two, at least v */
uint64_t rb_page_bytes(uint32_t pages);
const char *rb_pages_name(uint32_t pages);
void rb_share_file(int fd, unsigned mode); /* mode and group `ringbar`, as far as allowed */
const char *rb_group_cure(void); /* for who may not open what that group may */

/* ---- the handle */
struct rb_leg_ctx { /* a leg this process serves */
    uint32_t number;
    uint32_t kind;
    struct rb_leg *rec;
    struct rb_ring ring;
    uint32_t credit, lent, domain;
    uint32_t pools; /* a bit for each pool that its client maps */
    uint32_t own;   /* of a sending VM with a pool of its own: that pool, which its empties come from; 0 = the common one */
    uint64_t place;
    bool vm, paused, odd;
    bool claimed;   /* buffers were claimed for its credit */
    bool leaving;   /* its end was closed with buffers still out: let go of the queue when they are back */
    uint64_t renew_after; /* monotonic: sessions of a VM written before are looked at then */
    uint32_t index; /* in server->active */
    uint64_t bit;   /* its bit in the masks of shared buffers; 0 = it has none */
    uint32_t shared; /* of what is lent on it: under its bit */
    struct rb_leg_ctx *observer; /* gets a copy of every packet; served by the same book */
    struct rb_filter *filter;    /* of its queue: only what matches is lent, or collected */
    uint32_t filter_version;
    struct rb_bell *bell; /* of a VM that has a doorbell; NULL = both sides poll */
    uint32_t arming;      /* how often it was armed; the lane's word is for the VM to read */
};

struct rb_server { /* a book, as the process that acts for it sees it */
    struct rb_cluster *c;
    uint32_t book;
    struct rb_book_record *rec;
    rb_a64 *ledger, *masks;
    uint32_t *stack, free, room, home; /* free handles; room of the stack; buffers at home in this book, lent or not */
    struct rb_own {                    /* of pools that one VM transmits from: free handles; stack NULL = not this book's */
        uint32_t *stack, free;
    } own[RB_MAX_POOLS];
    uint32_t closing;                  /* bits of those whose VM has let go: they end when all their buffers are home */
    uint32_t need;                     /* buffers that its legs and devices were promised */
    uint32_t quiescing, quarantined, in_devices, lost; /* lost: lent on a leg whose memory is gone */
    uint32_t epoch;
    bool acting; /* for a dead owner, under the recovery lock */
    struct rb_feed *feed;    /* hops of other processes that send to VMs served here */
    uint32_t feeds, feed_epoch; /* how many; the epoch that they were last looked at */
    uint64_t feed_looked;    /* monotonic */
    bool looking;
    struct rb_leg_ctx *leg[RB_MAX_LEGS];
    struct rb_leg_ctx **active;
    uint32_t actives, next;
};

/* Where a buffer is, as a handle sees it. Low ten bits, the hand: in nobody's, home, shared, or borrowed on an end. Above them, for a sender on a
 * direct queue: the hand it was in when it was sent, and by which end, until it comes back. */
enum {
    RB_HAND_NONE = 0,
    RB_HAND_HOME = 1,
    RB_HAND_SHARED = 2,   /* this book's own hold on a buffer that outputs of a fan still have: gone with the process, so it is in no ledger */
    RB_HAND_PEEK = 3,     /* while a device that copies looks at it: returning it only ends that */
    RB_HAND_BORROWED = 4, /* + index of the end */
    RB_HAND = 0x3ff
};
#define RB_OUT(hand, end) ((uint32_t)(hand) << 10 | ((end)->index + 1) << 20)
#define RB_OUT_FROM(where) ((where) >> 10 & RB_HAND)
#define RB_OUT_BY(where, end) ((where) >> 20 == (end)->index + 1)

struct rb_end_ops {
    bool copies; /* send has read the bytes when it returns, and gives the buffers back with rb_return */
    /* A device that keeps buffers until they are out: those whose words say already that it has them go to its ring. How many; -EINVAL: the first
     * cannot go out here. And the device's number. */
    int (*share)(struct rb_end *end, const rb_desc *desc, int n);
    uint32_t (*number)(struct rb_end *end);
    int (*recv)(struct rb_end *end, rb_desc *desc, int n);
    int (*send)(struct rb_end *end, rb_desc *desc, int n);
    int (*alloc)(struct rb_end *end, rb_desc *desc, int n);
    int (*ready)(struct rb_end *end); /* may run beside other calls: 1 when recv or send has a chance */
    int (*count)(struct rb_end *end);
    int (*fd)(struct rb_end *end);
    int (*filter)(struct rb_end *end, const struct rb_filter *f); /* devices: the kernel may filter too, f or NULL = no longer */
    int (*sync)(struct rb_end *end); /* what a sending device still holds goes out now */
    void (*service)(struct rb_end *end);
    void (*stats)(struct rb_end *end, rb_stats *stats);
    void (*close)(struct rb_end *end);
};

struct rb_end {
    struct rb_cluster *c;
    const struct rb_end_ops *ops;
    uint32_t index, flags, queue, leg;
    struct rb_leg_ctx *ctx; /* server ends */
    /* client ends */
    struct rb_ring ring;
    struct rb_lane *lane;
    struct rb_lane_entry *entry;
    uint32_t lane_epoch, kind, credit;
    uint64_t session;
    bool echoed, closing, lingering;
    bool again; /* something came back for this end before the echo: one more session brings it home */
    uint32_t *stock, stocked; /* empties of a sending client */
    uint32_t out;             /* direct producers: sent and not come back; at most what the return ring holds */
    uint8_t *also;            /* a bit per buffer that was received here while it was in hand from elsewhere: a shared one, come by two ways */
    void *device;
    bool patient;             /* receiving: loses nothing when it has to wait, so its packets wait for room, too; sending: to wait for */
    uint32_t taker;           /* number + 1 of its record: fed with part of what a device receives */
    uint32_t feeds;           /* number + 1 of the queue that was meant: a VM's that another process serves */
    uint32_t promised, wants; /* copying devices: buffers that were claimed for it; that will be, with the first empty */
    struct rb_filter *filter;
    uint64_t looked;          /* monotonic: when it last asked whether its server lives */
    rb_a32 broken;
    int timer;
    struct rb_bell *bell; /* of a client in a VM */
    uint32_t arming;
    rb_a32 bell_lost;     /* whoever gave it has gone */
    bool armed, polled;   /* rb_wait may sleep until a bell rings; rb_fd was asked for */
    int sleep, tick;      /* descriptors that wake it, as a set; of these, a timer for rb_fd. -1 = none */
    _Atomic int wake;     /* of these: rb_break */
    uint32_t watched;     /* bells up to this serial are in the set */
    rb_stats st;
    char address[512];        /* a file's path may be long */
};

struct rb_lane_map {
    struct rb_lane *lane;
    uint64_t size, life;
};

struct rb_their_fd { /* an event descriptor of another process: the kernel's number of it, the process's */
    uint32_t id;
    int fd;
};

#define RB_MAX_ENDS 512u
static_assert(RB_HAND_BORROWED + RB_MAX_ENDS <= RB_HAND, "a hand has ten bits");
struct rb_cluster {
    struct rb_registry *reg;   /* NULL in a guest */
    struct rb_registry *locks; /* = reg; in a guest only its lock file */
    uint32_t id;
    uint64_t generation;
    unsigned fork_count;
    int writable, sends; /* every pool is; some pool is, so that empties can be filled */
    uint32_t buffer_size, buffers; /* buffers: over all pools */
    uint8_t *pool[256];
    uint32_t pool_count[256], pool_base[256]; /* buffers of a pool; number of its first in the ledgers */
    uint64_t pool_size[256];
    uint32_t pool_life[RB_MAX_POOLS], pools_epoch;
    uint32_t room;   /* buffers that there is room for in arrays with one entry each */
    uint32_t *where; /* per buffer: RB_HAND_*, RB_OUT */
    struct rb_lane_map lane[RB_MAX_LANES];
    uint32_t lanes;
    struct rb_end *end[RB_MAX_ENDS];
    uint32_t waiting; /* ends closed by their user that still wait for buffers lent on: lingering or leaving */
    uint32_t opening; /* leg + 1 whose packets an end that is just being opened will collect */
    uint32_t direct_rx; /* open receiving ends of direct queues */
    uint32_t extras;    /* bits set in all `also` */
    struct rb_fan *fans;
    uint8_t bit_fans[RB_MAX_OUTPUTS]; /* for each bit of a mask: fans of this handle that use it */
    bool unclaimed; /* a copying device waits for a book */
    struct rb_server *server;
    struct rb_cluster *deputy; /* a second handle, with a second book: a dead process's, which this one serves now (feed.c) */
    struct rb_worker *worker; /* that owns this handle for now */
    int owner;                /* 1: this handle keeps the cluster alive */
    bool leaving;             /* it is being closed */
    int sealed_fd[RB_MAX_POOLS];
    uint32_t bells;           /* that it had so far */
    struct rb_their_fd *bell_fds; /* what the QEMU process `bell_pid` has, as last looked up */
    uint32_t bell_count;
    int32_t bell_pid;
    uint64_t bell_start, bell_looked;
    uint64_t errors; /* handles given back twice, or never had */
};

/* Number of a handle in ledgers and `where`; UINT32_MAX when out of range. */
static inline uint32_t rb_number(const struct rb_cluster *c, uint32_t handle)
{
    if (__builtin_expect((handle != 0) & (handle < c->pool_count[0]), 1)) /* the first pool, whose numbers are its handles */
        return handle;
    uint32_t pool = handle >> 24, index = handle & RB_INDEX_MASK;
    return index && index < c->pool_count[pool] ? c->pool_base[pool] + index : UINT32_MAX;
}
/* The same in a loop that stores to memory, after which the compiler would load the count anew each time: `first` is c->pool_count[0]. */
static inline uint32_t rb_number_in(const struct rb_cluster *c, uint32_t first, uint32_t handle)
{
    return __builtin_expect(handle - 1 < first - 1, 1) ? handle : rb_number(c, handle);
}
/* A pool was added or has ended: map what is there now. One look a burst. */
int rb_pools_sync(struct rb_cluster *c);
static inline void rb_pools_look(struct rb_cluster *c)
{
    if (c->reg && __builtin_expect(rb_get(&c->reg->state->pools_epoch) != c->pools_epoch, 0))
        rb_pools_sync(c);
}
static inline int rb_shared_word(uint64_t w) { return RB_WORD_KIND(w) == RB_W_SHARED || RB_WORD_SUBKIND(w) == RB_SUB_SHARED; }
static inline int rb_fits(const struct rb_cluster *c, uint32_t word)
{
    return (word & 0x7fff) + (word >> 15 & 0x3fff) <= c->buffer_size;
}
/* The buffer leaves the hand, or one of the two that it is in. */
void rb_unhand_extra(struct rb_cluster *c, uint32_t at);
static inline void rb_unhand(struct rb_cluster *c, uint32_t at)
{
    c->where[at] &= ~(uint32_t)RB_HAND;
    if (__builtin_expect(c->extras != 0, 0))
        rb_unhand_extra(c, at);
}
int rb_alive(struct rb_cluster *c); /* 0, or -EOWNERDEAD after a fork, -ENODEV when destroyed */

/* ---- queue.c */
struct rb_leg *rb_leg_of(struct rb_cluster *c, uint32_t leg);
int rb_queue_check(struct rb_cluster *c, uint32_t queue);
struct rb_lane *rb_lane_get(struct rb_cluster *c, uint32_t lane); /* mapped, or NULL with the error set */
int rb_lane_new(struct rb_cluster *c, uint64_t size, const char *vm, const char *identity); /* returns its number */
int rb_place_find(struct rb_cluster *c, uint32_t lane, uint32_t queue, uint32_t kind, uint32_t slots, uint32_t credit, uint64_t *place);
void rb_place_live(struct rb_cluster *c, uint64_t place); /* from now on the client sees it */
void rb_place_free(struct rb_cluster *c, uint64_t place);
int rb_host_place(struct rb_cluster *c, uint32_t queue, uint32_t slots, uint32_t credit, uint64_t *place);
int rb_place_ring(struct rb_cluster *c, uint64_t place, struct rb_ring *ring, struct rb_lane_entry **entry);
void rb_leg_init(struct rb_cluster *c, uint32_t leg, uint32_t kind, uint32_t slots, uint32_t credit, uint64_t place);
void rb_lane_touch(struct rb_lane *lane); /* its table changed */
/* Have the book act on what was changed: 1 when done, 0 when its living owner has not looked within timeout_ms (it will). Recovery lock held,
 * given up while waiting. */
int rb_settle(struct rb_cluster *c, uint32_t book, int timeout_ms);
int rb_queue_remove(struct rb_cluster *c, uint32_t queue); /* rb_queue_destroy, recovery lock held */
void rb_lane_unmap(struct rb_cluster *c, uint32_t lane);
void rb_book_bump(struct rb_cluster *c, uint32_t book); /* something of it changed: its owner looks. 0 = nobody's */
void rb_lane_sweep(struct rb_cluster *c, uint32_t lane); /* a removed lane's memory goes with its last leg */

/* ---- book.c, lend.c, server.c */
static inline void rb_add(rb_a64 *counter, uint64_t n) { rb_set(counter, rb_get(counter) + n); } /* one writer */
/* An index of the peer is outside its window: a VM that was reset, until its next program has looked, or a hostile one. Nothing to take, no
 * room; counted once a session. */
static inline uint32_t rb_odd(struct rb_leg_ctx *l)
{
    if (!l->odd)
        rb_add(&l->rec->foreign, 1);
    l->odd = true;
    return 0;
}
/* The intent of a book: between these two lies what a death may interrupt. */
static inline void rb_arm(struct rb_book_record *r, enum rb_op op, uint32_t leg, uint32_t count, uint32_t base)
{
    rb_order();
    rb_set(&r->intent, RB_INTENT(op, leg, count, base));
    rb_order();
}
static inline void rb_disarm(struct rb_book_record *r)
{
    rb_order();
    rb_set(&r->intent, 0);
}
int rb_server_get(struct rb_cluster *c, struct rb_server **out);          /* this handle's own book */
int rb_server_act(struct rb_cluster *c, uint32_t book, struct rb_server *s); /* for a dead owner; recovery lock held */
void rb_server_done(struct rb_server *s);
int rb_server_claim(struct rb_server *s, uint32_t more, const char *for_what);
/* A free buffer of this book, to the stack of its pool. */
static inline void rb_server_push(struct rb_server *s, uint32_t handle)
{
    struct rb_own *own = &s->own[handle >> 24 & (RB_MAX_POOLS - 1)];
    if (__builtin_expect(handle >> 24 == 0, 1))
        s->stack[s->free++] = handle;
    else if (own->stack)
        own->stack[own->free++] = handle;
}
int rb_server_copy(struct rb_server *s, rb_desc *desc); /* replace it by a copy in a buffer of this book; -1: there is none */
/* ---- pool.c */
int rb_pool_claim(struct rb_server *s, uint32_t pool); /* all buffers of a pool that one VM transmits from */
int rb_pool_stacks(struct rb_server *s);               /* room for the free buffers of such pools of this book */
void rb_pool_release(struct rb_server *s);             /* those of `closing` whose buffers are all home end */
void rb_pool_sweep(struct rb_cluster *c);              /* closing pools that are nobody's any more go. Recovery lock held */
void rb_pool_close(struct rb_cluster *c, uint32_t lane); /* the VM's own pool: its lane is being removed. Recovery lock held */
uint32_t rb_pool_own(struct rb_cluster *c, uint32_t lane); /* number of the lane's own pool; 0 = it has none */
uint32_t rb_pools_open(struct rb_cluster *c);          /* a bit for each open pool */
int rb_server_leg(struct rb_server *s, uint32_t leg, struct rb_leg_ctx **out);
void rb_leg_pools(struct rb_server *s, struct rb_leg_ctx *l); /* what its client maps, and where its empties come from */
int rb_server_rebuild(struct rb_server *s);
void rb_server_drop_leg(struct rb_server *s, struct rb_leg_ctx *l);
int rb_server_lend(struct rb_server *s, struct rb_leg_ctx *l, rb_desc *desc, int n);
int rb_server_take(struct rb_server *s, struct rb_leg_ctx *l);
uint32_t rb_server_take_some(struct rb_server *s, struct rb_leg_ctx *l, uint32_t most);
int rb_server_collect(struct rb_server *s, struct rb_leg_ctx *l, rb_desc *desc, int n);
int rb_server_grant(struct rb_server *s, struct rb_leg_ctx *l);
enum rb_by { RB_BY_WORD, RB_BY_SUB, RB_BY_BIT }; /* level 0, level 1, a bit of the mask */
/* The leg on which the sender of l holds the buffer whose word is w: l itself, or, where a VM sends, any of its domain. NULL: it does not. */
struct rb_leg_ctx *rb_holder_leg(struct rb_server *s, struct rb_leg_ctx *l, uint32_t number, uint64_t w, enum rb_by *by);
void rb_server_apply_take(struct rb_server *s, struct rb_leg_ctx *l, uint32_t handle);
int rb_server_service(struct rb_server *s);
int rb_server_sync(struct rb_server *s); /* act on what others changed in the book */
int rb_server_close(struct rb_cluster *c);
int rb_server_end(struct rb_server *s);
/* Calls `each` for every word of the book's ledger that is not 0. */
void rb_each_written(struct rb_server *s, void (*each)(struct rb_server *s, uint32_t number, uint64_t word, void *arg), void *arg);
void rb_server_home(struct rb_server *s, uint32_t number, uint32_t handle);
static inline uint32_t rb_handle_of(const struct rb_cluster *c, uint32_t number)
{
    for (uint32_t p = 0; p < RB_MAX_POOLS; p++)
        if (c->pool_count[p] && number >= c->pool_base[p] && number < c->pool_base[p] + c->pool_count[p])
            return p << 24 | (number - c->pool_base[p]);
    return 0;
}

/* ---- fan.c */
uint64_t rb_device_bit(struct rb_server *s, uint32_t device, bool make); /* likewise; 0 when it has none and none is to be made */
void rb_device_unbit(struct rb_server *s, uint32_t device); /* it is gone, and its bit is in no mask */
uint64_t rb_leg_bit(struct rb_server *s, struct rb_leg_ctx *l); /* its bit, given now if it has none; 0 when all are in use */
/* Does another output with a bit in `mask` go to the VM or trust group that l goes to, which can send? It would not be known whose loan it sends on. */
int rb_fan_conflict(struct rb_server *s, const struct rb_leg_ctx *l, uint64_t mask);
/* Clear a bit of a shared buffer: 1, and what nobody has any more is home, in hand, or on its way to its lender. 0: it is not set. */
int rb_unshare(struct rb_server *s, uint32_t number, uint32_t handle, uint64_t bit);
void rb_fan_forget(struct rb_end *end); /* it is being closed */
void rb_fans_free(struct rb_cluster *c);

/* ---- observe.c */
void rb_observe(struct rb_server *s, struct rb_leg_ctx *observer, const rb_desc *desc, uint32_t n);
void rb_observe_link(struct rb_server *s); /* which of the served legs are observed; recovery lock held */
void rb_observe_reap(struct rb_cluster *c); /* observers whose process died; recovery lock held */

/* ---- feed.c */
struct rb_server *rb_own_server(const struct rb_cluster *c, uint32_t book); /* of this handle, or of a second one of it; book: number + 1. Or NULL */
int rb_deputise(struct rb_cluster *c, uint32_t number); /* a dead book's leg is served by a second handle: 0, or -errno. Recovery lock held */
int rb_feed_open(struct rb_end *end); /* the sending end of a queue that another process serves: -EBUSY: it is not that. Recovery lock held */
int rb_feed_answered(struct rb_end *end); /* 1: the server knows of it, or -ETIMEDOUT with the error set: it has not looked */
int rb_feed_service(struct rb_server *s); /* who sends to VMs that are served here */
void rb_feed_forget(struct rb_end *end);  /* it is being closed */
void rb_feed_reap(struct rb_cluster *c);  /* hops that nobody uses; recovery lock held */

/* ---- recover.c */
void rb_recover_intent(struct rb_server *s);
void rb_renew(struct rb_server *s, struct rb_leg_ctx *l);
enum rb_reclaim { RB_RECLAIM_KEEP_UNREAD, RB_RECLAIM_ALL, RB_RECLAIM_QUARANTINE };
int rb_leg_reclaim(struct rb_server *s, struct rb_leg_ctx *l, enum rb_reclaim how); /* 0, or -ENOMEM: nothing was done */
int rb_leg_carry(struct rb_server *s, struct rb_leg_ctx *l, const struct rb_ring *to, uint32_t *from); /* what is unread goes to other rings */
void rb_leg_hand_over(struct rb_server *s, struct rb_leg_ctx *l); /* what a VM sent on and nobody has collected is lent on that leg now */
int rb_borrower_done(struct rb_cluster *c, uint32_t leg); /* 0: the leg's earlier borrower has nothing lent on; or -EBUSY */
int rb_adopt(struct rb_cluster *c, uint32_t book);
int rb_book_dead(struct rb_registry *reg, uint32_t book); /* used, but nobody holds it */
int rb_reap_all(struct rb_cluster *c);

/* ---- client.c */
int rb_client_open(struct rb_end *end);
extern const struct rb_end_ops rb_client_rx_ops, rb_client_tx_ops;
int rb_client_give(struct rb_end *end, uint32_t handle);
int rb_client_usable(struct rb_end *end);
int rb_client_check(struct rb_end *end);
int rb_also(struct rb_end *end, uint32_t at); /* received here too: 1, or 0 when it is the same end again */

/* ---- open.c */
int rb_open_queue(struct rb_end *end, uint32_t queue); /* one end of a queue, on the host */
int rb_serve(struct rb_cluster *c, uint32_t number, struct rb_leg_ctx **out); /* this handle's book serves the leg; recovery lock held */
void rb_answer_for(struct rb_cluster *c, struct rb_end *end); /* the session of a borrower whose server is dead or not there yet; likewise */

/* ---- end.c */
extern const struct rb_end_ops rb_lend_ops, rb_collect_ops;
int rb_let_go(struct rb_server *s, struct rb_leg_ctx *l); /* of a queue whose end is closed, when nothing is lent on it any more */
void rb_end_finish(struct rb_cluster *c); /* let go of closed ends whose buffers came back */
void rb_end_free(struct rb_end *end);
int rb_hand_back(struct rb_cluster *c, uint32_t handle); /* one buffer, wherever it came from */
void rb_give_back(struct rb_cluster *c, uint32_t hand, const rb_desc *desc, uint32_t n); /* all from that hand, which they have left */
int rb_give(struct rb_cluster *c, uint32_t origin_leg, uint32_t handle); /* a sub-loan came back: on to its lender */
struct rb_end *rb_client_end_of(struct rb_cluster *c, uint32_t leg);

/* ---- filter.c */
struct rb_filter {
    uint32_t count, reach; /* instructions; bytes from the packet's start that they can look at */
    int fate;              /* of the fragments that follow: -1 none, 0 dropped, 1 pass */
    struct rb_filter_insn insn[];
};
int rb_filter_compile(const char *expression, struct rb_filter **out);
bool rb_filter_match(struct rb_filter *f, struct rb_cluster *c, const rb_desc *desc);
/* Those that match move to the front of desc, the others go back. How many match. */
int rb_filter_keep(struct rb_filter *f, struct rb_cluster *c, rb_desc *desc, int n);
/* Those that match are sent by `send`, the others go back: how many of desc[0..n) are done with. *dropped: how many of these did not match. */
int rb_filter_send(struct rb_filter *f, struct rb_cluster *c, rb_desc *desc, int n, int (*send)(void *to, void *at, rb_desc *desc, int n), void *to, void *at,
                   uint64_t *dropped);
void rb_filter_sync(struct rb_server *s, struct rb_leg_ctx *l); /* the filter of l's queue, if it changed; recovery lock held */

/* ---- device.c: kinds of devices, found by the beginning of an address */
/* Opens it: sets end->device, ops, address and what st says of it. What it claimed or made goes when it fails. */
typedef int rb_device_open(struct rb_end *end, const char *address, const rb_open_options *options);
rb_device_open rb_zc_open, rb_eth_open, rb_stack_open, rb_pcap_open, rb_tap_open;
int rb_ifname_needed(const char *name); /* 0, or -EBUSY: the default route or this SSH session would be cut (zc_open.c) */
int rb_ifname_check(const char *name, const char *address); /* could an interface have this name, and be told from every other address? */
/* What a device that copies packets needs: `buffers` of the handle's book (on a host), claimed now, or where dead processes
 * left books with the first empty; the stock
 * of the handle's sending queues serves in a guest. */
int rb_copying_open(struct rb_end *end, uint32_t buffers);
void rb_copying_close(struct rb_end *end);
/* Up to n empty buffers into the hand, offset set, length 0. 0: none now. -ENOTSUP: a guest's handle without a sending queue. */
int rb_empties(struct rb_cluster *c, rb_desc *desc, int n);
int rb_copying_alloc(struct rb_end *end, rb_desc *desc, int n); /* the same, as an operation */
/* The bytes of a packet in this handle's hand, or NULL with the error set. A device that copies sends them and gives the buffer back: rb_return. */
const uint8_t *rb_copying_data(struct rb_cluster *c, const rb_desc *desc);

/* ---- dev_zc.c, zc_open.c, zc_taker.c, zc_dead.c */
void rb_zc_release(struct rb_server *s); /* home what the kernel has let go of */
void rb_taker_leave(struct rb_cluster *c, uint32_t taker); /* its end is closed */
void rb_taker_reap(struct rb_cluster *c); /* records of the dead; recovery lock held */
void rb_zc_clean_up(struct rb_state *state);  /* take dead processes' programs off the interfaces */

#endif
