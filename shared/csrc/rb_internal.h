/* SPDX-License-Identifier: Apache-2.0
 *
 * What a process keeps for itself, and how the files of the core call each other. From the bottom up:
 * error.c, segment.c (files and mappings), registry.c (finding clusters, locks, life and death), queue.c (queues and where their
 * rings are), book.c (a ledger and its legs), lend.c (lending and taking back),
 * server.c (what else a lender owes), recover.c (what the dead left), client.c (the borrower), lane.c (VMs), observe.c (copies for a capture),
 * open.c, end.c (the public calls), dev_zc.c (AF_XDP), worker.c, flow.c, bench.c.
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
    rb_a64 *ledgers;
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
int rb_owner_alive(struct rb_registry *reg);
const char *rb_run_dir(void);
int rb_registry_locks(uint32_t id, struct rb_registry **out); /* a guest's: who of its programs holds which end */
void rb_registry_put(struct rb_registry *reg);

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

/* ---- the handle */
struct rb_leg_ctx { /* a leg this process serves */
    uint32_t number;
    uint32_t kind;
    struct rb_leg *rec;
    struct rb_ring ring;
    uint32_t credit, lent, domain;
    uint64_t place;
    bool vm, paused, odd;
    bool claimed;   /* buffers were claimed for its credit */
    bool leaving;   /* its end was closed with buffers still out: let go of the queue when they are back */
    uint64_t renew_after; /* monotonic: sessions of a VM written before are looked at then */
    uint32_t index; /* in server->active */
    struct rb_leg_ctx *observer; /* gets a copy of every packet; served by the same book */
};

struct rb_server { /* a book, as the process that acts for it sees it */
    struct rb_cluster *c;
    uint32_t book;
    struct rb_book_record *rec;
    rb_a64 *ledger;
    uint32_t *stack, free, room, home; /* free handles; room of the stack; buffers at home in this book, lent or not */
    uint32_t need;                     /* buffers that its legs and devices were promised */
    uint32_t quiescing, quarantined, in_devices, lost; /* lost: lent on a leg whose memory is gone */
    uint32_t epoch;
    bool acting; /* for a dead owner, under the recovery lock */
    struct rb_leg_ctx *leg[RB_MAX_LEGS];
    struct rb_leg_ctx **active;
    uint32_t actives, next;
};

enum { RB_HAND_NONE = 0, RB_HAND_HOME = 1, RB_HAND_BORROWED = 2 /* + index of the end */ };

struct rb_end_ops {
    int (*recv)(struct rb_end *end, rb_desc *desc, int n);
    int (*send)(struct rb_end *end, rb_desc *desc, int n);
    int (*alloc)(struct rb_end *end, rb_desc *desc, int n);
    int (*ready)(struct rb_end *end); /* may run beside other calls: 1 when recv or send has a chance */
    int (*count)(struct rb_end *end);
    int (*fd)(struct rb_end *end);
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
    uint16_t *origin;         /* direct producers: where a buffer on its way came from */
    void *device;
    uint64_t looked;          /* monotonic: when it last asked whether its server lives */
    rb_a32 broken;
    int timer;
    rb_stats st;
    char address[64];
};

struct rb_lane_map {
    struct rb_lane *lane;
    uint64_t size, life;
};

#define RB_MAX_ENDS 512u
struct rb_cluster {
    struct rb_registry *reg;   /* NULL in a guest */
    struct rb_registry *locks; /* = reg; in a guest only its lock file */
    uint32_t id;
    uint64_t generation;
    unsigned fork_count;
    int writable;
    uint32_t buffer_size, buffers; /* buffers: over all pools */
    uint8_t *pool[256];
    uint32_t pool_count[256], pool_base[256]; /* buffers of a pool; number of its first in the ledgers */
    uint64_t pool_size[256];
    uint16_t *where; /* per buffer: RB_HAND_* */
    struct rb_lane_map lane[RB_MAX_LANES];
    uint32_t lanes;
    struct rb_end *end[RB_MAX_ENDS];
    uint32_t waiting; /* ends closed by their user that still wait for buffers lent on: lingering or leaving */
    uint32_t opening; /* leg + 1 whose packets an end that is just being opened will collect */
    uint32_t direct_rx; /* open receiving ends of direct queues */
    struct rb_server *server;
    struct rb_worker *worker; /* that owns this handle for now */
    int owner;                /* 1: this handle keeps the cluster alive */
    int sealed_fd[RB_MAX_POOLS];
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
static inline int rb_fits(const struct rb_cluster *c, uint32_t word)
{
    return (word & 0x7fff) + (word >> 15 & 0x3fff) <= c->buffer_size;
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
int rb_server_get(struct rb_cluster *c, struct rb_server **out);          /* this handle's own book */
int rb_server_act(struct rb_cluster *c, uint32_t book, struct rb_server *s); /* for a dead owner; recovery lock held */
void rb_server_done(struct rb_server *s);
int rb_server_claim(struct rb_server *s, uint32_t more, const char *for_what);
int rb_server_leg(struct rb_server *s, uint32_t leg, struct rb_leg_ctx **out);
int rb_server_rebuild(struct rb_server *s);
void rb_server_drop_leg(struct rb_server *s, struct rb_leg_ctx *l);
int rb_server_lend(struct rb_server *s, struct rb_leg_ctx *l, rb_desc *desc, int n);
int rb_server_take(struct rb_server *s, struct rb_leg_ctx *l);
int rb_server_collect(struct rb_server *s, struct rb_leg_ctx *l, rb_desc *desc, int n);
int rb_server_grant(struct rb_server *s, struct rb_leg_ctx *l);
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

/* ---- observe.c */
void rb_observe(struct rb_server *s, struct rb_leg_ctx *observer, const rb_desc *desc, uint32_t n);
void rb_observe_link(struct rb_server *s); /* which of the served legs are observed; recovery lock held */
void rb_observe_reap(struct rb_cluster *c); /* observers whose process died; recovery lock held */

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

/* ---- open.c */
int rb_serve(struct rb_cluster *c, uint32_t number, struct rb_leg_ctx **out); /* this handle's book serves the leg; recovery lock held */
void rb_answer_for(struct rb_cluster *c, struct rb_end *end); /* the session of a borrower whose server is dead or not there yet; likewise */

/* ---- end.c */
extern const struct rb_end_ops rb_lend_ops, rb_collect_ops;
int rb_let_go(struct rb_server *s, struct rb_leg_ctx *l); /* of a queue whose end is closed, when nothing is lent on it any more */
void rb_end_finish(struct rb_cluster *c); /* let go of closed ends whose buffers came back */
void rb_end_free(struct rb_end *end);
int rb_hand_back(struct rb_cluster *c, uint32_t handle); /* one buffer, wherever it came from */
int rb_give(struct rb_cluster *c, uint32_t origin_leg, uint32_t handle); /* a sub-loan came back: on to its lender */
struct rb_end *rb_client_end_of(struct rb_cluster *c, uint32_t leg);

/* ---- dev_zc.c */
int rb_zc_open(struct rb_end *end, const char *address);
void rb_zc_release_dead(struct rb_server *s); /* home what the kernel has let go of */
void rb_zc_clean_up(struct rb_state *state);  /* take dead processes' programs off the interfaces */

#endif
