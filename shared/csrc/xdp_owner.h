/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* The record inside our XDP program that says which process loaded it and for which queues. */
#ifndef RINGBAR_XDP_OWNER_H
#define RINGBAR_XDP_OWNER_H

#include <linux/types.h>

#define RB_XDP_OWNER_MAGIC 0x3130504458425264ull /* "dRBXDP01" */
#define RB_XDP_OWNER_QUEUE_WORDS 4               /* RB_XDP_MAX_QUEUES bits */

struct rb_xdp_owner {
    __u64 magic;
    __u64 start_time;   /* of the process, field 22 of /proc/PID/stat: tells a reused pid */
    __u64 pid_ns;       /* inode of its pid namespace: elsewhere the pid says nothing */
    __u32 pid;
    __u32 ifindex;
    __u64 queues[RB_XDP_OWNER_QUEUE_WORDS]; /* bit q: it has a socket on queue q */
};

#endif
