/* SPDX-License-Identifier: Apache-2.0
 * Packets led from one interface to another inside the kernel: what stack: devices are made of (hook.c). Functions return -errno without setting the
 * error, unless they say otherwise: a caller knows better what failed. */
#ifndef RB_HOOK_H
#define RB_HOOK_H
#include "rb_internal.h"

/* A descriptor for most of these; of the network namespace that this thread is in now, wherever it is later. */
int rb_hook_open(void);
/* What `from` receives is received by `to` instead, as if it had come in there. Goes with `from`. */
int rb_hook_receive(int netlink, int from, int to);
/* What the kernel sends out of `from` goes out of `to`: instead, or with `copy` as well. Returns a descriptor: when it is closed, or its process dies, all
 * is as before. -EOPNOTSUPP: kernels before 6.6. */
int rb_hook_send(int from, int to, bool copy);
/* The same for older kernels; undone with rb_hook_undo. A process that dies leaves it there: it leads nowhere then, and packets go as before. */
int rb_hook_send_old(int netlink, int from, int to, bool copy);
void rb_hook_undo(int netlink, int from, int to);
/* Take away what dead processes left on the interfaces of this network namespace. */
void rb_hook_sweep(void);
/* Packets that interface `index` was given to send and dropped. */
uint64_t rb_hook_dropped(int netlink, int index);
#endif
