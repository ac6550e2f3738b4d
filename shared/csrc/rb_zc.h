/* SPDX-License-Identifier: Apache-2.0
 * What the files of zc: devices share: dev_zc.c moves packets, zc_open.c opens and steers, zc_taker.c feeds others
 * with parts of a NIC's traffic, zc_dead.c brings home what a device held. */
#ifndef RB_ZC_H
#define RB_ZC_H
#include "rb_internal.h"
#include "xdp_abi.h"

#define RB_ZC_RING 2048u /* entries of each of a device's rings, at most */
#define RB_ZC_TAKERS 16u /* of one device */

struct rb_zc_taker { /* who gets part of what a device receives, as the device's owner sees it */
    uint32_t record, version;
    struct rb_end *end; /* our end of the queue that feeds it */
    struct rb_filter *rule;
};

struct rb_zc { /* shared by the ends of one handle that were opened on the same NIC queues */
    struct rb_xdp *dev;
    uint32_t number, refs, flags;
    uint32_t queue, queues;        /* asked for: the first, or RB_XDP_ALL_QUEUES; how many */
    uint32_t in_fill, promised, empty, idle; /* empty: received since the last refill */
    uint64_t asked;  /* monotonic ns: when the kernel last said that the interface is there */
    uint32_t cut;                  /* the last refused was not the end of its packet */
    bool metadata;                 /* frames may come with what the driver knows */
    bool fragments;                /* packets in several buffers can be sent */
    uint32_t epoch;                /* the book's, when takers were last looked at */
    uint64_t looked;               /* whether takers live, monotonic */
    char ifname[16];
    struct rb_end *rx;
    struct rb_filter *rule;        /* of its own; NULL = all */
    struct rb_zc_taker taker[RB_ZC_TAKERS];
    uint32_t takers;
    uint64_t filtered;             /* taken by a rule that held a moment ago: nobody's */
};

/* dev_zc.c */
extern const struct rb_xdp_ops *rb_zc_plugin;
extern const struct rb_end_ops rb_zc_ops, rb_zc_rx_ops, rb_zc_tx_ops;
int rb_zc_load(void);
struct rb_zc *rb_zc_of(struct rb_end *end); /* NULL: it is no zc: device */
void rb_zc_refill(struct rb_server *s, struct rb_zc *z);
static inline struct rb_device_record *rb_zc_record(struct rb_cluster *c, uint32_t number) { return &c->reg->state->device[number]; }

/* zc_dead.c */
void rb_zc_home(struct rb_server *s, uint32_t number);     /* the kernel has let go of all that the device held */
uint32_t rb_zc_held(struct rb_server *s, uint32_t number); /* how many that are */

/* zc_open.c */
int rb_zc_error(int rc, const struct rb_xdp_error *err);
uint64_t rb_zc_netns(void); /* this thread's network namespace */
int rb_zc_rules(struct rb_zc *z); /* what the takers and the owner want goes to the kernel */

/* zc_taker.c */
int rb_taker_open(struct rb_end *end, uint32_t device, const char *rule);
uint32_t rb_taker_give(struct rb_server *s, struct rb_zc *z, rb_desc *desc, uint32_t n); /* how many are left for the owner */
void rb_taker_look(struct rb_server *s, struct rb_zc *z); /* who came, changed its rule, or went */
void rb_taker_end(struct rb_server *s, struct rb_zc *z);  /* the device closes */

#endif
