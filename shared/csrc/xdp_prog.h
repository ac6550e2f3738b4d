/* SPDX-License-Identifier: Apache-2.0 */
/* What the two files about XDP programs share: xdp_scan.c finds and removes them, xdp_attach.c puts ours there. */
#ifndef RINGBAR_XDP_PROG_H
#define RINGBAR_XDP_PROG_H

#include <bpf/libbpf.h>
#include <linux/bpf.h>
#include <xdp/libxdp.h>

#include "xdp_internal.h"

#define RB_XDP_PROGRAM "ringbar_redirect"
#define RB_XDP_MAX_FOUND 16 /* libxdp's dispatcher has 10 places */

struct found {                  /* one XDP program */
    uint32_t id;
    bool ours, stale;           /* stale: ours, and its process is dead */
    char name[BPF_OBJ_NAME_LEN];
    struct rb_xdp_owner owner;
};

struct scan {                   /* what is on an interface */
    uint32_t id;                /* of the program on the interface itself; 0: none */
    uint32_t xdp_flags;         /* the mode it is attached in: XDP_FLAGS_DRV_MODE, _SKB_MODE or _HW_MODE */
    bool dispatcher;
    char name[BPF_OBJ_NAME_LEN];
    uint32_t n;                 /* that program, or those behind the dispatcher */
    struct found found[RB_XDP_MAX_FOUND];
};

/* libbpf and libxdp talk to standard error. Between hush and unhush they do not: their first complaint is kept for our
 * own message (NULL when there was none); rb_xdp_forget drops it before the next try. */
struct quiet {
    libbpf_print_fn_t libbpf;
    libxdp_print_fn_t libxdp;
};

struct quiet rb_xdp_hush(void);
void rb_xdp_unhush(struct quiet q);
const char *rb_xdp_complaint(void);
void rb_xdp_forget(void);

int rb_xdp_scan(int ifindex, struct scan *s);           /* 0 or -errno; -EPERM: something is there, and we may not look */
int rb_xdp_remove_stale(int ifindex, struct scan *s);   /* how many were removed, or -errno; *s: what remains */
int rb_xdp_detach_main(int ifindex, const struct scan *s);
int rb_xdp_detach_part(int ifindex, uint32_t id);
void rb_xdp_sweep_pins(void);
const char *rb_xdp_bpffs(void);         /* where libxdp keeps its files, mounted when that is permitted; or NULL */
int rb_prog_attach_bound(struct rb_xdp *dev);   /* with metadata, alone; *prog is as before when it fails */
void rb_prog_close_bound(struct rb_prog *p);
void rb_prog_record(struct rb_xdp *dev, struct rb_xdp_owner *o);  /* this process, the device's queues */
void rb_xdp_record(struct rb_xdp_owner *o, int ifindex);    /* this process, no queues */
bool rb_xdp_owns_queue(const struct rb_xdp_owner *o, uint32_t queue);
uint64_t rb_xdp_pid_namespace(void);

#endif
