/* SPDX-License-Identifier: Apache-2.0
 *
 * Everything that lies in shared memory, and nothing else: the one file that a change of ABI version touches.
 *
 * Tags: [const] written once before others see it; [lock] written under the recovery lock; [server], [client] written by that
 * side of the lane only; [book] written by the book's owner or by whoever recovers it under the lock.
 * Indices only, never pointers. All integers little endian. docs/protocol.md tells how these are used.
 */
#ifndef RB_LAYOUT_H
#define RB_LAYOUT_H
#include "rb_atomic.h"
#include "ringbar.h"

#include <assert.h>

#define RB_MAGIC 0x315241424752ull /* "RGBAR1" as bytes, little endian */

enum rb_kind { RB_KIND_POOL = 1, RB_KIND_LANE = 2, RB_KIND_STATE = 3, RB_KIND_BELL = 4 };
enum rb_segment_state { RB_SEG_FREE = 0, RB_SEG_OPEN = 1, RB_SEG_CLOSING = 2, RB_SEG_GONE = 3 };

#define RB_HEADER_SIZE 256u /* of every segment; buffer 0 of a pool is at least as large */
#define RB_LANE_QUEUES 64u
#define RB_MAX_QUEUES 2048u /* of a cluster */
#define RB_MAX_LANES 256u
#define RB_MAX_POOLS 8u
#define RB_MAX_BOOKS 64u
#define RB_MAX_DEVICES 64u
#define RB_EXTENT 64u /* buffers that change their home together */
#define RB_MAX_SLOTS 65536u
#define RB_MAX_BUFFERS (1u << 24)
#define RB_INDEX_MASK 0xffffffu

/* First bytes of every segment. The first 64 never change between ABI versions. */
struct rb_header {
    uint64_t magic;      /* [const] RB_MAGIC */
    uint32_t abi;        /* [const] */
    uint32_t kind;       /* [const] enum rb_kind */
    uint32_t cluster;    /* [const] */
    uint32_t segment;    /* [const] number among its kind */
    uint64_t size;       /* [const] bytes, power of two */
    rb_a64 generation;   /* [lock] of the cluster's life, never 0; 0 = gone */
    rb_a32 epoch;        /* [lock] changes with the table of a lane */
    rb_a32 state;        /* [lock] enum rb_segment_state */
    uint64_t created_ns; /* [const] */
    uint32_t buffer_size, buffers; /* [const] pool: bytes of a buffer; how many, buffer 0 included */
    uint8_t reserved[RB_HEADER_SIZE - 64];
};
static_assert(sizeof(struct rb_header) == RB_HEADER_SIZE, "header");

/* ---- lane --------------------------------------------------------------------------------------------------- */

enum rb_leg_kind {
    RB_LEG_NONE = 0,
    RB_LEG_LEND = 1,   /* the server produces, the client consumes and returns */
    RB_LEG_GRANT = 2,  /* the client produces, the server consumes and grants empties */
    RB_LEG_DIRECT = 3, /* both ends are clients, in two VMs; the producer takes back what it lent */
};

/* One queue of a lane. */
struct rb_lane_entry {
    rb_a32 ready;      /* [lock] 1 once the rest is valid, 0 = free */
    uint32_t queue;    /* [lock] number in the cluster */
    uint32_t kind;     /* [lock] enum rb_leg_kind */
    uint32_t slots;    /* [lock] of the forward ring, power of two */
    uint32_t returns;  /* [lock] of the return ring, power of two, >= credit */
    uint32_t credit;   /* [lock] */
    uint64_t forward_at, return_at; /* [lock] offsets in the lane */
    rb_a32 paused;     /* [lock] */
    uint32_t reserved[5];
};
static_assert(sizeof(struct rb_lane_entry) == 64, "lane entry");

/* In the return ring of a DIRECT queue, with a handle: its consumer sent it on to the host, from where it will not come back this way. */
#define RB_WENT_ON 0x80000000u

struct rb_slot {
    uint32_t handle, word;
    uint64_t ts;
};
static_assert(sizeof(struct rb_slot) == 16 && sizeof(rb_desc) == 16, "a descriptor is a slot");

/* Indices are free-running; 128 bytes apart, since processors fetch lines in pairs. */
struct rb_ctl {
    rb_a32 p;          /* [producer] forward ring written up to here */
    uint8_t pad0[124];
    rb_a32 c;          /* [consumer] forward ring read up to here */
    uint8_t pad1[124];
    rb_a32 rp;         /* return ring written up to here: [client] LEND, [server] GRANT, [consumer] DIRECT */
    uint8_t pad2[124];
    rb_a32 rc;         /* return ring read up to here: [server] LEND, [client] GRANT, [producer] DIRECT */
    uint8_t pad3[124];
    rb_a64 session;    /* [client] one opening of the client's end; never repeats; 0 = never opened */
    rb_a32 open;       /* [client] process id while a program has it open */
    uint32_t abi;      /* [client] */
    uint8_t boot_id[16]; /* [client] of a guest */
    char name[32];     /* [client] program */
    rb_a64 client_bell; /* [client] LEND: RB_ARMED, as it is about to sleep. GRANT: the session for which it rings; 0 = it does not */
    uint8_t pad4[56];
    rb_a64 echo;       /* [server] the session it deals with */
    uint8_t pad5[56];
    rb_a64 server_bell; /* [server] GRANT: RB_ARMED. LEND: the session for which it rings */
    uint8_t pad6[56];
    rb_a64 packets, bytes, dropped; /* [client] */
    uint8_t pad7[232];
};
static_assert(sizeof(struct rb_ctl) == 1024, "ctl");

/* A consumer that is about to sleep says until where it has read: its producer rings once, when it has gone past that. In the high half a number that
 * moves with each arming, so that the producer knows which it has answered; 0 = never armed. It sleeps only if the producer has said that it rings. */
#define RB_ARMED(n, index) ((uint64_t)(n) << 32 | (uint32_t)(index))
#define RB_ARMING(word) ((uint32_t)((word) >> 32))

struct rb_lane {
    struct rb_header header;
    uint32_t abi_min, abi_max;   /* [const] what the host speaks */
    char vm[128];                /* [const] "" = the host's own */
    uint8_t pad0[4096 - 256 - 136];
    struct rb_lane_entry entry[RB_LANE_QUEUES]; /* at 4096 */
    uint8_t pad1[8192];
    struct rb_ctl ctl[RB_LANE_QUEUES];          /* at 16384 */
    /* rings follow at 81920 */
};
#define RB_LANE_RINGS_AT 81920u
static_assert(offsetof(struct rb_lane, entry) == 4096 && offsetof(struct rb_lane, ctl) == 16384, "lane");
static_assert(sizeof(struct rb_lane) == RB_LANE_RINGS_AT, "lane");

/* What a VM's doorbell device has as its memory: which lane it rings for: generation 0, none now. */
struct rb_bell_memory {
    struct rb_header header; /* `segment` is the lane's number */
    uint32_t vectors;        /* [const] of the VM: one for each entry of the lane */
    uint32_t peer, vector;   /* [const] the host's, which the VM's programs ring */
    uint8_t pad[4096 - RB_HEADER_SIZE - 12];
};
static_assert(sizeof(struct rb_bell_memory) == 4096, "bell memory");

/* ---- state -------------------------------------------------------------------------------------------------- */

/* Who holds something: written after the record lock was taken. */
struct rb_holder {
    int32_t pid; /* 0 = nobody; a VM's end: 0 with a lane */
    uint32_t lane; /* number + 1 of the VM's lane; 0 = a process */
    uint64_t start;    /* start time of the process, clock ticks since boot */
    uint64_t pid_ns;   /* inode of its pid namespace */
    uint64_t since_ns;
    char name[32];
};
static_assert(sizeof(struct rb_holder) == 64, "holder");

/* A queue is one leg, or two when a VM sends on it and somebody else than its server receives. */
enum { RB_LEG_R = 0, RB_LEG_T = 1 }; /* leg number = 2 * queue + this; R: towards the consumer, T: from a sending VM */
#define RB_MAX_LEGS (2 * RB_MAX_QUEUES)

enum { RB_IX_P, RB_IX_C, RB_IX_RP, RB_IX_RC };

struct rb_leg {
    /* [lock] */
    uint32_t kind;      /* enum rb_leg_kind; NONE = this leg does not exist */
    uint32_t slots, returns, credit;
    rb_a64 place;       /* lane << 32 | entry + 1, where its rings are; one store moves it */
    rb_a64 wanted;      /* where they shall be, set by whoever attaches; the book moves them */
    rb_a32 book;        /* number + 1 of the book that serves it; 0 = none yet */
    rb_a32 client_book; /* number + 1 of the host client's book; 0 = a plain client */
    rb_a32 release;     /* 1: the book takes home all that is lent on it (its VM let go); 2: and quarantines it */
    rb_a32 paused;
    uint8_t pad0[80];
    /* [book] */
    rb_a32 committed[4]; /* RB_IX_*: those of the server's two indices; the others unused */
    rb_a64 echoed;
    uint8_t boot_id[16];
    rb_a32 lent;         /* for people; the truth is the ledger */
    uint8_t pad1[84];
    rb_a64 packets, bytes, copied, foreign, drops[RB_DROP_REASONS];
    uint8_t pad2[128 - 8 * (4 + RB_DROP_REASONS)];
};
static_assert(sizeof(struct rb_leg) == 384, "leg");

struct rb_queue {
    uint32_t used, slots, credit, direct; /* [lock] */
    struct rb_holder end[2];              /* [lock] 0 = tx (producer), 1 = rx (consumer) */
    uint32_t observer;                    /* [lock] number + 1 of the queue that gets a copy of every packet; 0 = none */
    uint32_t observes;                    /* [lock] of that queue: number + 1 of the one it looks at */
    uint32_t feeds;                       /* [lock] of a hop: number + 1 of the queue that the VM's server empties it into; UINT32_MAX = that is gone */
    uint8_t pad[36];
};
static_assert(sizeof(struct rb_queue) == 192, "queue");

/* The filter of a queue: compiled by whoever set it, so that the serving process needs nothing for it. */
#define RB_FILTER_TEXT 512u
#define RB_FILTER_MAX 447u
struct rb_filter_insn { /* classic BPF */
    uint16_t code;
    uint8_t jt, jf;
    uint32_t k;
};
struct rb_filter_record { /* [lock] */
    uint32_t version; /* moves with every change; 0 = never set */
    uint32_t count;   /* of instructions; 0 = no filter */
    char text[RB_FILTER_TEXT];
    struct rb_filter_insn insn[RB_FILTER_MAX];
};
static_assert(sizeof(struct rb_filter_record) == 4096, "filter record");

struct rb_segment_record { /* [lock] */
    rb_a32 state;          /* enum rb_segment_state */
    uint32_t pages;
    uint64_t size;
    char path[128];
    char vm[128];
    char identity[64];
    rb_a32 book;           /* a VM's lane: number + 1 of its serving book */
    uint32_t domain;
    uint32_t buffers;      /* of a pool, buffer 0 included */
    uint32_t first;        /* of a pool: number of its buffer 0 in the ledgers */
    uint32_t own;          /* of a pool that one VM transmits from: number + 1 of its lane, UINT32_MAX = that is gone; 0 = the common pool */
    rb_a32 life;           /* of a pool: moves when its number is given to other memory */
    rb_a32 pools;          /* of a VM's lane: a bit for each pool that the VM maps */
    uint8_t pad[20];
};
static_assert(sizeof(struct rb_segment_record) == 384, "segment record");

struct rb_device_record { /* [lock], mode by its owner */
    uint32_t used, book;  /* number + 1 */
    char name[32];
    char mode[16];
    rb_a64 packets_in, packets_out, dropped;
    uint64_t netns;       /* inode of the network namespace that it is in */
    uint32_t nic_queue, nic_queues; /* the first, and how many */
    uint32_t receives;
    char clock[16];
    uint8_t pad[12];
};
static_assert(sizeof(struct rb_device_record) == 128, "device record");

/* Who else gets part of what a device receives: a process that feeds on a queue which the device's owner fills by this rule. */
#define RB_MAX_TAKERS 64u
#define RB_RULE_TEXT 1920u
enum rb_taker_state { RB_TAKER_FREE = 0, RB_TAKER_WANTS = 1, RB_TAKER_LEFT = 2, RB_TAKER_ENDED = 3, RB_TAKER_REFUSED = 4 };
struct rb_taker_record {  /* [lock] */
    rb_a32 state;         /* enum rb_taker_state: WANTS and LEFT by the taker, ENDED and REFUSED by the device's owner */
    uint32_t device, book, queue; /* book: number + 1 of the device's owner */
    rb_a32 version;       /* of the rule */
    rb_a32 seen;          /* the version that the owner acts upon */
    uint8_t pad[40];
    struct rb_holder holder;
    char rule[RB_RULE_TEXT];
};
static_assert(sizeof(struct rb_taker_record) == 2048, "taker record");

/* Operations of an intent record. The word: operation 4 bits, count 12, leg 16, base 32, from the high end; 0 = none. A FAN lends on several legs at
 * once: which, and their indices before it, are in `outputs` and `bases`. */
enum rb_op { RB_OP_NONE = 0, RB_OP_LEND = 1, RB_OP_TAKE = 2, RB_OP_GRANT = 3, RB_OP_COLLECT = 4, RB_OP_FAN = 5 };
#define RB_MAX_OUTPUTS 64u /* bits of a mask */

struct rb_book_record {
    uint32_t used;          /* [lock] */
    rb_a32 epoch;           /* [lock] moves when something in the book changed: its owner then looks */
    struct rb_holder owner; /* [lock] */
    uint8_t pad0[56];
    rb_a32 seen;            /* [book] the epoch it acted upon */
    uint8_t pad1[60];
    rb_a32 free;            /* [book] for people */
    uint8_t pad2[60];
    rb_a64 intent;          /* [book] */
    uint8_t pad3[56];
    uint32_t handles[RB_MAX_BURST]; /* [book] of the intent; valid while it is armed */
    rb_a64 outputs;                 /* [book] of a FAN intent: one bit for each output it lends on */
    rb_a32 bases[RB_MAX_OUTPUTS];   /* [book] of these: P before it */
    rb_a32 output[RB_MAX_OUTPUTS];  /* [book] what each bit of this book's masks stands for: leg + 1, or RB_OUTPUT_DEVICE | device; 0 = nothing */
    uint8_t pad4[56];
};
static_assert(sizeof(struct rb_book_record) == 1920, "book record");
#define RB_OUTPUT_DEVICE 0x10000u

/* Where the rings of a lane's entry are: the host's own record, since a VM can overwrite the table in its lane. */
struct rb_place_record { /* [lock] */
    uint32_t used; /* as `ready` of the entry: 0 free, 1 live, 2 reserved */
    uint32_t queue, slots, returns;
    uint64_t forward_at, return_at;
};
static_assert(sizeof(struct rb_place_record) == 32, "place record");

/* The doorbell of a VM's lane: QEMU has these event descriptors open, and there whoever serves the lane gets them. The numbers are the kernel's
 * (`eventfd-id` in /proc/PID/fdinfo). */
struct rb_bell_record { /* [lock] */
    rb_a32 pid;                    /* QEMU's; 0 = no doorbell */
    uint32_t wait;                 /* the VM's programs ring it */
    uint64_t start;                /* of that process, clock ticks since boot */
    uint32_t ring[RB_LANE_QUEUES]; /* wakes the VM's program on that entry */
};
static_assert(sizeof(struct rb_bell_record) == 272, "bell record");

struct rb_state {
    struct rb_header header;
    /* [lock] */
    uint32_t buffer_size, pages, persistent, sealed;
    uint32_t capacity; /* buffers that the ledgers have room for */
    uint32_t buffers;  /* that exist, over all pools */
    uint32_t domains;
    rb_a32 pools_epoch; /* moves when a pool has come or gone */
    char label[32];
    struct rb_holder owner;
    uint8_t pad0[4096 - RB_HEADER_SIZE - 128];
    struct rb_segment_record pool[RB_MAX_POOLS];
    struct rb_segment_record lane[RB_MAX_LANES];
    struct rb_device_record device[RB_MAX_DEVICES];
    struct rb_book_record book[RB_MAX_BOOKS];
    struct rb_queue queue[RB_MAX_QUEUES];
    struct rb_leg leg[RB_MAX_LEGS];
    struct rb_place_record place[RB_MAX_LANES][RB_LANE_QUEUES];
    struct rb_filter_record filter[RB_MAX_QUEUES];
    struct rb_taker_record taker[RB_MAX_TAKERS];
    char steer[RB_MAX_DEVICES][512]; /* [lock] the devices' own rules, for people; "" = all */
    uint64_t lane_life[RB_MAX_LANES]; /* [lock] moves when the lane's number is given to other memory: others then map it anew */
    struct rb_bell_record bell[RB_MAX_LANES];
    /* then uint8_t extent[capacity / RB_EXTENT] (book + 1, 0 = nobody's) and, at the next page, the ledgers: capacity words a book; then the masks
     * of shared buffers: as many again */
};

/* ---- ledger words ---------------------------------------------------------------------------------------------
 * Level 0 is used where the buffer is at home in this book, level 1 where the book lends on what it borrowed.
 *   bits 0..2 kind 0, 3..18 leg or device 0, 19..20 kind 1, 21..36 leg or device 1, 37..52 leg of origin, 53 it came SHARED
 * SHARED at either level, never at both: lent to all outputs whose bits are set in the mask of the same number. The mask is written before the word
 * says SHARED, and is not 0 while it does. */
enum rb_word { RB_W_NONE = 0, RB_W_HOME = 1, RB_W_LENT = 2, RB_W_DEVICE = 3, RB_W_SHARED = 4, RB_W_QUARANTINED = 5 };
enum { RB_SUB_SHARED = 1 }; /* as kind 1; the others are as at level 0 */
#define RB_SUB_FIXED (1ull << 53)

#define RB_WORD(kind, leg) ((uint64_t)(kind) | (uint64_t)(leg) << 3)
#define RB_WORD_SUB(kind, leg, origin) ((uint64_t)(kind) << 19 | (uint64_t)(leg) << 21 | (uint64_t)(origin) << 37)
#define RB_WORD_KIND(w) ((uint32_t)((w) & 7))
#define RB_WORD_LEG(w) ((uint32_t)((w) >> 3 & 0xffff))
#define RB_WORD_SUBKIND(w) ((uint32_t)((w) >> 19 & 3))
#define RB_WORD_SUBLEG(w) ((uint32_t)((w) >> 21 & 0xffff))
#define RB_WORD_ORIGIN(w) ((uint32_t)((w) >> 37 & 0xffff))
#define RB_WORD_LEVEL0(w) ((w) & 0x7ffff)

#define RB_INTENT(op, leg, count, base) \
    ((uint64_t)(op) << 60 | (uint64_t)(count) << 48 | (uint64_t)(leg) << 32 | (uint32_t)(base))
#define RB_INTENT_OP(i) ((uint32_t)((i) >> 60))
#define RB_INTENT_COUNT(i) ((uint32_t)((i) >> 48 & 0xfff))
#define RB_INTENT_LEG(i) ((uint32_t)((i) >> 32 & 0xffff))
#define RB_INTENT_BASE(i) ((uint32_t)(i))

#endif
