/* SPDX-License-Identifier: Apache-2.0 */
/* Opening and closing an interface for AF_XDP, and the table that the core uses (xdp_abi.h says what each call does). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "xdp_internal.h"

#define CLOSE_MS 500u

#ifndef SOL_XDP
#define SOL_XDP 283
#endif

/* ---- open devices, for the child of a fork ---- */

static struct rb_xdp *open_devices;
static pthread_mutex_t open_lock = PTHREAD_MUTEX_INITIALIZER;

static void before_fork(void) { pthread_mutex_lock(&open_lock); }
static void after_fork(void) { pthread_mutex_unlock(&open_lock); }

/* A child that kept the sockets would keep the interface after its parent's death. Only system calls here: the parent
 * may have had many threads. */
static void in_child(void)
{
    for (struct rb_xdp *d = open_devices; d; d = d->next) {
        for (uint32_t i = 0; i < d->n; i++)
            rb_xdp_socket_close(&d->sock[i]);
        d->n = 0;
        d->prog.attached = false; /* the parent's */
        if (d->promiscuous >= 0)
            close(d->promiscuous);
        d->promiscuous = -1;
    }
    open_devices = NULL;
    pthread_mutex_init(&open_lock, NULL);
}

static void watch_forks(void) { pthread_atfork(before_fork, after_fork, in_child); }

static void remember(struct rb_xdp *dev)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, watch_forks);
    pthread_mutex_lock(&open_lock);
    dev->next = open_devices;
    open_devices = dev;
    pthread_mutex_unlock(&open_lock);
}

static void forget(struct rb_xdp *dev)
{
    pthread_mutex_lock(&open_lock);
    for (struct rb_xdp **p = &open_devices; *p; p = &(*p)->next)
        if (*p == dev) {
            *p = dev->next;
            break;
        }
    pthread_mutex_unlock(&open_lock);
}

/* ---- the network namespace: an interface index means nothing in another one ---- */

static int current_netns(void)
{
    return open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
}

/* Go to the device's namespace when this thread is in another; returns where to go back to, or -1. */
static int enter_netns(const struct rb_xdp *dev)
{
    struct stat mine, its;
    int here = current_netns();

    if (here >= 0 && dev->netns >= 0 && !fstat(here, &mine) && !fstat(dev->netns, &its) && mine.st_ino != its.st_ino &&
        !setns(dev->netns, CLONE_NEWNET))
        return here;
    if (here >= 0)
        close(here);
    return -1;
}

static void leave_netns(int back)
{
    if (back >= 0) {
        setns(back, CLONE_NEWNET);
        close(back);
    }
}

/* ---- sockets of a device ---- */

static void close_sockets(struct rb_xdp *dev)
{
    while (dev->n) /* the first one, which holds the UMEM, last */
        rb_xdp_socket_close(&dev->sock[--dev->n]);
}

/* Bind queue after queue until `wanted`: the first decides between zero copy and copy, the others share its memory. */
static int bind_queues(struct rb_xdp *dev, uint32_t first, uint32_t count, bool zero_copy, struct rb_xdp_error *err)
{
    for (uint32_t i = 0; i < count; i++) {
        struct rb_sock *s = &dev->sock[dev->n];
        bool base = dev->n == 0;
        int r;

        if (!base && first + i == dev->sock[0].queue)
            continue; /* adding receive to a device that sends on this queue already */
        memset(s, 0, sizeof *s);
        s->fd = -1;
        r = rb_xdp_socket_open(dev, s, base, err);
        if (r)
            return r;
        s->queue = first + i;
        if (base)
            r = rb_xdp_socket_bind(dev, s, (uint16_t)(XDP_USE_NEED_WAKEUP | (zero_copy ? XDP_ZEROCOPY : XDP_COPY) | (dev->fragments ? XDP_USE_SG : 0)), err);
        else
            r = rb_xdp_socket_bind(dev, s, XDP_SHARED_UMEM, err);
        if (r) {
            rb_xdp_socket_close(s);
            return r;
        }
        if (base)
            dev->zero_copy = zero_copy;
        dev->n++;
    }
    return 0;
}

/* Some drivers bind for zero copy without an XDP program and then refuse to send: ask them once. */
static bool sends(struct rb_xdp *dev)
{
    return dev->prog.attached || sendto(dev->sock[0].fd, NULL, 0, MSG_DONTWAIT, NULL, 0) >= 0 || errno == EAGAIN ||
           errno == EBUSY;
}

static int bind_all(struct rb_xdp *dev, uint32_t first, uint32_t count, struct rb_xdp_error *err)
{
    bool may_zero = dev->opt.mode == RB_XDP_ZEROCOPY || dev->opt.mode == RB_XDP_AUTO;
    bool may_copy = dev->opt.mode != RB_XDP_ZEROCOPY;
    int r = -EOPNOTSUPP;

    if (dev->prog.attached && !dev->prog.native)
        may_zero = false; /* a generic program never sees a zero-copy queue's packets */
    if (may_zero && dev->opt.flags & RB_XDP_RX && rb_xdp_zero_copy_cuts(dev)) {
        rb_xdp_note(dev, "no zero copy: igb would cut long frames; it takes them whole into buffers of 4096 bytes");
        may_zero = false;
    }
    if (may_zero) {
        r = bind_queues(dev, first, count, true, err);
        if (!r && !sends(dev))
            r = rb_xdp_fail(err, -EOPNOTSUPP, "%s binds for zero copy but does not send without an XDP program",
                            dev->ifname);
        if (!r)
            return 0;
        close_sockets(dev);
        if (r == -EBUSY || r == -ENODEV || r == -EPERM || r == -ENOBUFS || r == -ENOMEM || r == -EFAULT)
            return r;
        rb_xdp_note(dev, "no zero copy: %s", r == -EOPNOTSUPP ? "the driver has none" : strerror(-r));
    }
    if (may_copy) {
        r = bind_queues(dev, first, count, false, err);
        if (r)
            close_sockets(dev);
    }
    if (r && !may_copy && r == -EOPNOTSUPP) {
        rb_xdp_fail(err, r, "%s cannot receive and send without a copy: its driver has no AF_XDP zero copy", dev->ifname);
        rb_xdp_cure(err, "leave the mode open: driver mode with one copy in the kernel then serves");
    }
    return r;
}

/* ---- the calls ---- */

static int release(struct rb_xdp *dev, struct rb_xdp_error *err);

/* The program first, in the best mode there is, then the sockets, which depend on that mode. */
static int attach_and_bind(struct rb_xdp *dev, uint32_t first, uint32_t count, struct rb_xdp_error *err)
{
    int r;

    if (dev->opt.flags & RB_XDP_RX) {
        /* The program's record must name the queues: note them before they are bound. */
        for (uint32_t i = 0; i < count; i++)
            dev->sock[i].queue = first + i;
        dev->n = count;
        r = rb_prog_attach(dev, dev->opt.mode != RB_XDP_GENERIC,
                           dev->opt.mode == RB_XDP_AUTO || dev->opt.mode == RB_XDP_GENERIC, err);
        dev->n = 0;
        if (r)
            return r;
    }
    return bind_all(dev, first, count, err);
}

/* Which queues are meant; one that only sends takes one. */
static void span(const struct rb_xdp_options *o, uint32_t nic_queues, uint32_t *first, uint32_t *count)
{
    bool all = o->queue == RB_XDP_ALL_QUEUES;

    *first = all ? 0 : o->queue;
    *count = !(o->flags & RB_XDP_RX) ? 1 : all ? nic_queues : o->queues ? o->queues : 1;
}

/* What a device that receives was asked beyond receiving. */
static int receive_so(struct rb_xdp *dev, const struct rb_xdp_options *o, struct rb_xdp_error *err)
{
    int r = o->rule_count ? rb_prog_steer(dev, o->rules, o->rule_count, err) : 0;

    if (!r && o->flags & RB_XDP_PROMISCUOUS) {
        dev->promiscuous = rb_xdp_promiscuous_open(dev->ifindex);
        if (dev->promiscuous < 0) {
            r = dev->promiscuous;
            if (r == -EPERM || r == -EACCES)
                return rb_xdp_fail_permission(err, "set an interface to promiscuous mode");
            rb_xdp_fail(err, r, "%s cannot be set to promiscuous mode: %s", dev->ifname, strerror(-r));
        }
    }
    return r;
}

static int xdp_open(const struct rb_xdp_options *given, struct rb_xdp **out, struct rb_xdp_error *err)
{
    struct rb_xdp_options opt;
    struct rb_xdp *dev;
    struct nic nic;
    struct counters counters;
    uint32_t first, count;
    int r;

    *out = NULL;
    rb_xdp_fail(err, 0, "%s", "");
    memset(&opt, 0, sizeof opt);
    if (given->size < offsetof(struct rb_xdp_options, rx_size))
        return rb_xdp_fail(err, -EINVAL, "rb_xdp_options.size is %u, smaller than the structure", given->size);
    memcpy(&opt, given, given->size < sizeof opt ? given->size : sizeof opt);
    if ((r = rb_xdp_look_at_nic(opt.ifname, &nic, err)) || (r = rb_xdp_check_options(&opt, err)) ||
        (r = rb_xdp_check_nic(&opt, &nic, err)))
        return r;

    dev = calloc(1, sizeof *dev);
    if (!dev)
        return rb_xdp_fail(err, -ENOMEM, "no memory to open %s", opt.ifname);
    strcpy(dev->ifname, opt.ifname); /* its length was checked */
    dev->opt = opt;
    dev->opt.ifname = dev->ifname;
    dev->ifindex = nic.ifindex;
    dev->mtu = nic.mtu;
    dev->fragments = rb_xdp_needs_fragments(&opt, &nic);
    dev->nic_queues = nic.queues;
    dev->chunk_size = opt.chunk_size;
    dev->headroom = opt.headroom;
    dev->umem_base = opt.umem_base;
    dev->umem_size = opt.umem_size;
    dev->prog.fd = dev->prog.map_fd = -1;
    dev->netns = current_netns();
    dev->netlink = rb_xdp_netlink_open();
    dev->promiscuous = -1;
    if (!rb_xdp_counters(dev->netlink, dev->ifindex, &counters)) {
        dev->nic_rx_dropped = counters.rx_dropped;
        dev->nic_tx_dropped = counters.tx_dropped;
    }
    span(&opt, nic.queues, &first, &count);
    r = attach_and_bind(dev, first, count, err);
    if (!r && opt.flags & RB_XDP_RX)
        r = receive_so(dev, &opt, err);
    dev->opt.rules = NULL; /* the caller's */
    if (r) {
        release(dev, NULL);
        return r;
    }
    remember(dev);
    *out = dev;
    return 0;
}

static int xdp_add_rx(struct rb_xdp *dev, const struct rb_xdp_options *opt, struct rb_xdp_error *err)
{
    uint32_t first, count, had = dev->n;
    struct rb_xdp_options want = dev->opt;
    struct nic nic;
    int back, r;

    rb_xdp_fail(err, 0, "%s", "");
    if (!dev->n)
        return rb_xdp_fail(err, -ENODEV, "%s was opened before a fork; open it again in the child", dev->ifname);
    if (dev->prog.attached)
        return 0;
    want.flags |= RB_XDP_RX;
    want.queue = opt->queue;
    want.queues = opt->queues;
    span(&want, dev->nic_queues, &first, &count);
    back = enter_netns(dev);
    if (!(r = rb_xdp_look_at_nic(dev->ifname, &nic, err)) && !(r = rb_xdp_check_nic(&want, &nic, err)))
        r = bind_queues(dev, first, count, dev->zero_copy, err);
    if (!r)
        r = rb_prog_attach(dev, want.mode != RB_XDP_GENERIC,
                           !dev->zero_copy && (want.mode == RB_XDP_AUTO || want.mode == RB_XDP_GENERIC), err);
    if (!r && (r = receive_so(dev, opt, err)))
        rb_prog_detach(dev);
    if (r)
        while (dev->n > had)
            rb_xdp_socket_close(&dev->sock[--dev->n]);
    else
        dev->opt.flags = want.flags;
    leave_netns(back);
    return r;
}

/* Undo all of open, in its order; -EBUSY when the kernel may still use the memory. */
static int release(struct rb_xdp *dev, struct rb_xdp_error *err)
{
    uint32_t queues[RB_XDP_MAX_QUEUES], n = dev->n;
    uint64_t until = rb_xdp_now_ms() + CLOSE_MS, done[64];
    bool doubt = false;
    int back = enter_netns(dev), r = 0;

    for (uint32_t i = 0; i < n; i++)
        if (dev->sock[i].taking)
            rb_prog_give_up(dev, dev->sock[i].queue);
    rb_prog_detach(dev);
    while (n && rb_xdp_tx_pending(dev) && rb_xdp_now_ms() < until) {
        int w = rb_xdp_wake(dev, RB_XDP_TX);

        if (rb_xdp_complete(dev, done, 64))
            continue;
        if (w && w != -EAGAIN)
            break;
        rb_xdp_pause(1);
    }
    /* In copy mode the kernel touches the memory only while it receives, which close() ends before it returns, and for
     * frames that it took and did not complete. With zero copy the card may, until the queue can be bound anew. */
    if (n)
        doubt = dev->zero_copy || rb_xdp_tx_in_kernel(dev);
    for (uint32_t i = 0; i < n; i++)
        queues[i] = dev->sock[i].queue;
    close_sockets(dev);
    for (uint32_t i = 0; doubt && i < n && !r; i++) {
        uint64_t now = rb_xdp_now_ms();

        r = rb_xdp_probe(dev->ifname, dev->ifindex, queues[i], now < until ? (uint32_t)(until - now) : 50, err);
        if (r != -EBUSY)
            r = 0;
    }
    leave_netns(back);
    for (unsigned i = 0; i < 3; i++) {
        int fd = (int[]){dev->netns, dev->netlink, dev->promiscuous}[i];

        if (fd >= 0)
            close(fd);
    }
    free(dev);
    return r;
}

static int xdp_close(struct rb_xdp *dev, struct rb_xdp_error *err)
{
    rb_xdp_fail(err, 0, "%s", "");
    forget(dev);
    return release(dev, err);
}

static uint32_t xdp_fds(struct rb_xdp *dev, int *fds, uint32_t max)
{
    for (uint32_t i = 0; i < dev->n && i < max; i++)
        fds[i] = dev->sock[i].fd;
    return dev->n;
}

static int xdp_link(struct rb_xdp *dev)
{
    struct counters now;
    int r = rb_xdp_counters(dev->netlink, dev->ifindex, &now);

    return r == -ENODEV ? r : !r && !(now.flags & IFF_RUNNING) ? -ENETDOWN : 0;
}

static int xdp_stats(struct rb_xdp *dev, struct rb_xdp_stats *out)
{
    struct counters now;

    memset(out, 0, sizeof *out);
    if (!rb_xdp_counters(dev->netlink, dev->ifindex, &now)) {
        out->nic_rx_dropped = now.rx_dropped - dev->nic_rx_dropped;
        out->nic_tx_dropped = now.tx_dropped - dev->nic_tx_dropped;
    }
    out->passed = rb_prog_passed(dev);
    for (uint32_t i = 0; i < dev->n; i++) {
        struct xdp_statistics s = {0};
        socklen_t len = sizeof s;

        if (getsockopt(dev->sock[i].fd, SOL_XDP, XDP_STATISTICS, &s, &len))
            return -errno;
        out->rx_dropped += s.rx_dropped;
        out->rx_invalid_descs += s.rx_invalid_descs;
        out->rx_ring_full += s.rx_ring_full;
        out->rx_fill_ring_empty_descs += s.rx_fill_ring_empty_descs;
        out->tx_invalid_descs += s.tx_invalid_descs;
        out->tx_ring_empty_descs += s.tx_ring_empty_descs;
    }
    out->kicks = dev->rx_kicks + dev->tx_kicks;
    out->tx_refused = dev->tx_refused;
    return 0;
}

static const char *xdp_mode(struct rb_xdp *dev)
{
    if (dev->zero_copy)
        return "zero-copy";
    return dev->prog.attached && dev->prog.native ? "driver" : "generic"; /* sending with a copy needs no driver */
}

static void xdp_info(struct rb_xdp *dev, struct rb_xdp_info *out)
{
    *out = (struct rb_xdp_info){
        .queues = dev->n,
        .first_queue = dev->n ? dev->sock[0].queue : 0,
        .max_frame = dev->chunk_size - dev->headroom - RB_XDP_KERNEL_HEADROOM,
        .mtu = dev->mtu,
        .fragments = dev->fragments,
        .metadata = dev->prog.bound,
        .fill_size = dev->opt.fill_size,
        .tx_size = dev->opt.tx_size,
        .receives = dev->prog.attached,
        .needs_fill = dev->prog.attached || dev->zero_copy,
        .dispatcher = dev->prog.dispatched,
    };
    memcpy(out->ifname, dev->ifname, sizeof out->ifname);
    snprintf(out->mode, sizeof out->mode, "%s", xdp_mode(dev));
    memcpy(out->note, dev->note, sizeof out->note);
}

static bool xdp_attached(const char *ifname)
{
    int ifindex = ifname ? (int)if_nametoindex(ifname) : 0;

    return ifindex && rb_prog_attached(ifindex);
}

static int xdp_cleanup(const char *ifname, struct rb_xdp_error *err)
{
    struct nic nic;
    int r;

    rb_xdp_fail(err, 0, "%s", "");
    r = rb_xdp_look_at_nic(ifname, &nic, err);
    return r ? r : rb_prog_cleanup(ifname, nic.ifindex, err);
}

static int xdp_probe(const char *ifname, uint32_t queue, uint32_t timeout_ms, struct rb_xdp_error *err)
{
    struct nic nic;
    int r;

    rb_xdp_fail(err, 0, "%s", "");
    r = rb_xdp_look_at_nic(ifname, &nic, err);
    return r ? r : rb_xdp_probe(ifname, nic.ifindex, queue, timeout_ms, err);
}

__attribute__((visibility("default"))) const struct rb_xdp_ops *rb_xdp_ops(void)
{
    static const struct rb_xdp_ops ops = {
        .abi = RB_XDP_ABI,
        .size = sizeof(struct rb_xdp_ops),
        .open = xdp_open,
        .add_rx = xdp_add_rx,
        .steer = rb_prog_steer,
        .close = xdp_close,
        .fill = rb_xdp_fill,
        .fill_space = rb_xdp_fill_space,
        .recv = rb_xdp_recv,
        .waiting = rb_xdp_waiting,
        .send = rb_xdp_send,
        .tx_space = rb_xdp_tx_space,
        .complete = rb_xdp_complete,
        .tx_pending = rb_xdp_tx_pending,
        .wake = rb_xdp_wake,
        .fds = xdp_fds,
        .link = xdp_link,
        .stats = xdp_stats,
        .mode = xdp_mode,
        .info = xdp_info,
        .attached = xdp_attached,
        .cleanup = xdp_cleanup,
        .probe = xdp_probe,
    };

    return &ops;
}
