/* SPDX-License-Identifier: Apache-2.0 */
/*
 * AF_XDP sockets: the UMEM, four rings per NIC queue, and the verbs on bursts.
 *
 * Each ring has one writer of each index. We publish with a release store what the kernel reads with an acquire load
 * and the other way round; nothing else orders the entries. All sockets of a device share the first one's UMEM, so the
 * memory is pinned once and a buffer received on one queue may be given back on any other.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "xdp_internal.h"

#ifndef AF_XDP
#define AF_XDP 44
#endif
#ifndef SOL_XDP
#define SOL_XDP 283
#endif

#define PROBE_BYTES 8192u

/* ---- set-up ---- */

static int map_ring(struct rb_ring *r, int fd, uint64_t page_offset, const struct xdp_ring_offset *off, uint32_t size,
                    size_t entry)
{
    size_t bytes = off->desc + size * entry;
    uint8_t *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, (off_t)page_offset);

    if (map == MAP_FAILED)
        return -errno;
    *r = (struct rb_ring){
        .mask = size - 1,
        .size = size,
        .producer = (_Atomic uint32_t *)(void *)(map + off->producer),
        .consumer = (_Atomic uint32_t *)(void *)(map + off->consumer),
        .flags = (const _Atomic uint32_t *)(const void *)(map + off->flags),
        .entries = map + off->desc,
        .map = map,
        .map_bytes = bytes,
    };
    return 0;
}

static int make_rings(struct rb_sock *s, const struct rb_xdp_options *opt)
{
    struct xdp_mmap_offsets off;
    socklen_t len = sizeof off;
    int r;

    if (setsockopt(s->fd, SOL_XDP, XDP_UMEM_FILL_RING, &opt->fill_size, sizeof opt->fill_size) ||
        setsockopt(s->fd, SOL_XDP, XDP_UMEM_COMPLETION_RING, &opt->comp_size, sizeof opt->comp_size) ||
        setsockopt(s->fd, SOL_XDP, XDP_RX_RING, &opt->rx_size, sizeof opt->rx_size) ||
        setsockopt(s->fd, SOL_XDP, XDP_TX_RING, &opt->tx_size, sizeof opt->tx_size) ||
        getsockopt(s->fd, SOL_XDP, XDP_MMAP_OFFSETS, &off, &len))
        return -errno;
    if (len != sizeof off)
        return -EPROTONOSUPPORT; /* before Linux 5.4 */
    if ((r = map_ring(&s->fill, s->fd, XDP_UMEM_PGOFF_FILL_RING, &off.fr, opt->fill_size, sizeof(uint64_t))) ||
        (r = map_ring(&s->comp, s->fd, XDP_UMEM_PGOFF_COMPLETION_RING, &off.cr, opt->comp_size, sizeof(uint64_t))) ||
        (r = map_ring(&s->rx, s->fd, XDP_PGOFF_RX_RING, &off.rx, opt->rx_size, sizeof(struct xdp_desc))) ||
        (r = map_ring(&s->tx, s->fd, XDP_PGOFF_TX_RING, &off.tx, opt->tx_size, sizeof(struct xdp_desc))))
        return r;
    s->fill.seen = opt->fill_size; /* rings that we produce: consumer (0) + size */
    s->tx.seen = opt->tx_size;
    return 0;
}

void rb_xdp_socket_close(struct rb_sock *s)
{
    struct rb_ring *rings[] = {&s->fill, &s->comp, &s->rx, &s->tx};

    for (unsigned i = 0; i < 4; i++)
        if (rings[i]->map)
            munmap(rings[i]->map, rings[i]->map_bytes);
    if (s->fd >= 0)
        close(s->fd);
    memset(s, 0, sizeof *s);
    s->fd = -1;
}

static int fail_umem(struct rb_xdp *dev, int code, struct rb_xdp_error *err)
{
    struct rlimit lim = {0, 0};

    switch (code) {
    case EFAULT:
        rb_xdp_fail(err, -code, "the pool's memory is not mapped writable as a whole, or lies on a disk: %s cannot use it", dev->ifname);
        rb_xdp_cure(err, "open the cluster's pool read-write on the host; make clusters on tmpfs (RINGBAR_SHM, usually /dev/shm) or of huge pages");
        return -code;
    case ENOBUFS:
        getrlimit(RLIMIT_MEMLOCK, &lim);
        rb_xdp_fail(err, -code, "the pool has %llu KiB and this process may lock only %llu KiB of memory",
                    (unsigned long long)(dev->umem_size >> 10), (unsigned long long)(lim.rlim_cur >> 10));
        rb_xdp_cure(err, "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity), or give the program CAP_IPC_LOCK");
        return -code;
    case ENOMEM:
        rb_xdp_fail(err, -code, "the kernel has no memory to register a pool of %llu KiB with %s",
                    (unsigned long long)(dev->umem_size >> 10), dev->ifname);
        rb_xdp_cure(err, "make a smaller pool (--buffers), or free memory");
        return -code;
    default:
        return rb_xdp_fail(err, -code, "the kernel refused the pool as memory of %s: %s", dev->ifname, strerror(code));
    }
}

static int busy_poll(int fd, uint32_t us)
{
    int on = 1, time = us > 1000000 ? 1000000 : (int)us, budget = 64;

    return setsockopt(fd, SOL_SOCKET, SO_PREFER_BUSY_POLL, &on, sizeof on) || setsockopt(fd, SOL_SOCKET, SO_BUSY_POLL, &time, sizeof time) ||
                   setsockopt(fd, SOL_SOCKET, SO_BUSY_POLL_BUDGET, &budget, sizeof budget)
               ? -errno
               : 0;
}

/* Open a socket with its rings; the first one also registers the UMEM. Leaves *s closed on failure. */
int rb_xdp_socket_open(struct rb_xdp *dev, struct rb_sock *s, bool first, struct rb_xdp_error *err)
{
    int r;

    s->fd = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);
    if (s->fd < 0) {
        r = errno;
        memset(s, 0, sizeof *s);
        s->fd = -1;
        if (r == EPERM || r == EACCES)
            return rb_xdp_fail_permission(err, "open an AF_XDP socket");
        if (r == EAFNOSUPPORT) {
            rb_xdp_fail(err, -r, "this kernel has no AF_XDP sockets: they came with 4.18, and are built in with CONFIG_XDP_SOCKETS");
            rb_xdp_cure(err, "use the device as %s instead of zc:%s, which copies each packet once", dev->ifname,
                        dev->ifname);
            return -r;
        }
        return rb_xdp_fail(err, -r, "no AF_XDP socket for %s: %s", dev->ifname, strerror(r));
    }
    if (first) {
        struct xdp_umem_reg reg = {
            .addr = (uintptr_t)dev->umem_base,
            .len = dev->umem_size,
            .chunk_size = dev->chunk_size,
            .headroom = dev->headroom,
        };

        if (setsockopt(s->fd, SOL_XDP, XDP_UMEM_REG, &reg, sizeof reg)) {
            r = errno;
            rb_xdp_socket_close(s);
            return fail_umem(dev, r, err);
        }
    }
    r = make_rings(s, &dev->opt);
    if (r) {
        rb_xdp_socket_close(s);
        return rb_xdp_fail(err, r, "no AF_XDP rings for %s: %s", dev->ifname, strerror(-r));
    }
    /* In copy mode every frame on its way counts against the send buffer; the ring is the limit that we want. */
    int bytes = (int)(dev->opt.tx_size < 65536 ? dev->opt.tx_size * 8192 : 1 << 29);
    if (setsockopt(s->fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes))
        setsockopt(s->fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes); /* less is slower, not wrong */
    if (dev->opt.busy_poll_us && (r = busy_poll(s->fd, dev->opt.busy_poll_us))) {
        rb_xdp_socket_close(s);
        if (r == -EPERM)
            return rb_xdp_fail_permission(err, "poll a driver");
        rb_xdp_fail(err, r, "this kernel cannot poll %s in our system calls: %s", dev->ifname, r == -ENOPROTOOPT ? "that came with kernel 5.11" : strerror(-r));
        rb_xdp_cure(err, "leave busy polling away");
        return r;
    }
    return 0;
}

static int try_bind(int fd, int ifindex, uint32_t queue, uint16_t flags, int shared_fd)
{
    struct sockaddr_xdp sxdp = {
        .sxdp_family = AF_XDP,
        .sxdp_flags = flags,
        .sxdp_ifindex = (uint32_t)ifindex,
        .sxdp_queue_id = queue,
        .sxdp_shared_umem_fd = shared_fd < 0 ? 0 : (uint32_t)shared_fd,
    };

    return bind(fd, (struct sockaddr *)&sxdp, sizeof sxdp) ? -errno : 0;
}

/* Bind, trying again while the queue is busy: the kernel lets go of a dead process's socket some 20 ms after its
 * death and tells nobody when. With XDP_SHARED_UMEM the first socket's UMEM and mode are shared. */
int rb_xdp_socket_bind(struct rb_xdp *dev, struct rb_sock *s, uint16_t flags, struct rb_xdp_error *err)
{
    uint64_t until = rb_xdp_now_ms() + dev->opt.retry_ms;
    int shared = flags & XDP_SHARED_UMEM ? dev->sock[0].fd : -1;
    int r;

    while ((r = try_bind(s->fd, dev->ifindex, s->queue, flags, shared)) == -EBUSY && rb_xdp_now_ms() < until)
        rb_xdp_pause(5);
    switch (r) {
    case 0:
        return 0;
    case -EBUSY:
        return rb_xdp_fail_held(err, dev->ifname, s->queue, rb_prog_holder(dev->ifindex, s->queue, dev->prog.id));
    case -ENODEV:
        return rb_xdp_fail(err, r, "interface %s disappeared", dev->ifname);
    case -EPERM:
        return rb_xdp_fail_permission(err, "bind an AF_XDP socket");
    default:
        return rb_xdp_fail(err, r, "queue %u of %s cannot be bound in %s mode: %s", s->queue, dev->ifname,
                           flags & XDP_ZEROCOPY ? "zero-copy" : "copy", strerror(-r));
    }
}

/* A bind that nobody uses: succeeds exactly when no socket, nor a dying one with packets still on their way, has the
 * queue. */
int rb_xdp_probe(const char *ifname, int ifindex, uint32_t queue, uint32_t timeout_ms, struct rb_xdp_error *err)
{
    struct rb_xdp_options opt = {.fill_size = 1, .comp_size = 1, .rx_size = 1, .tx_size = 1};
    struct rb_sock s = {.fd = -1};
    uint64_t until = rb_xdp_now_ms() + timeout_ms;
    void *mem = mmap(NULL, PROBE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct xdp_umem_reg reg = {.addr = (uintptr_t)mem, .len = PROBE_BYTES, .chunk_size = 2048};
    int r;

    if (mem == MAP_FAILED)
        return rb_xdp_fail(err, -ENOMEM, "no memory to look whether queue %u of %s is free", queue, ifname);
    s.fd = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);
    if (s.fd < 0 || setsockopt(s.fd, SOL_XDP, XDP_UMEM_REG, &reg, sizeof reg)) {
        r = -errno;
    } else {
        r = make_rings(&s, &opt);
        while (!r && (r = try_bind(s.fd, ifindex, queue, XDP_COPY, -1)) == -EBUSY && rb_xdp_now_ms() < until) {
            rb_xdp_pause(5);
            r = 0;
        }
    }
    rb_xdp_socket_close(&s);
    munmap(mem, PROBE_BYTES);
    if (r == -EPERM)
        return rb_xdp_fail_permission(err, "open an AF_XDP socket");
    if (r == -EBUSY) /* looked for only when somebody reads it: is_stale() probes too, without err */
        return err ? rb_xdp_fail_held(err, ifname, queue, rb_prog_holder(ifindex, queue, 0)) : r;
    if (r)
        rb_xdp_fail(err, r, "queue %u of %s cannot be looked at: %s", queue, ifname, strerror(-r));
    return r;
}

/* ---- one ring ---- */

static inline uint32_t space(struct rb_ring *r, uint32_t want)
{
    if (r->seen - r->local < want)
        r->seen = atomic_load_explicit(r->consumer, memory_order_acquire) + r->size;
    return r->seen - r->local;
}

static inline uint32_t filled(struct rb_ring *r)
{
    if (r->seen == r->local)
        r->seen = atomic_load_explicit(r->producer, memory_order_acquire);
    return r->seen - r->local;
}

static inline bool wants_wakeup(const struct rb_ring *r)
{
    return atomic_load_explicit(r->flags, memory_order_relaxed) & XDP_RING_NEED_WAKEUP;
}

static inline uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* ---- verbs ---- */

static uint32_t fill_one(struct rb_xdp *dev, struct rb_sock *s, const uint64_t *addrs, uint32_t n)
{
    struct rb_ring *r = &s->fill;
    uint64_t *entries = r->entries;

    n = least(n, space(r, n));
    for (uint32_t i = 0; i < n; i++)
        entries[(r->local + i) & r->mask] = addrs[i];
    r->local += n;
    atomic_store_explicit(r->producer, r->local, memory_order_release);
    if (n && !s->taking && dev->prog.attached) {
        dev->map_error = rb_prog_take(dev, s->queue, s->fd);
        s->taking = !dev->map_error;
    }
    return n;
}

uint32_t rb_xdp_fill(struct rb_xdp *dev, const uint64_t *addrs, uint32_t n)
{
    uint32_t done = 0;

    if (dev->n == 1)
        return fill_one(dev, dev->sock, addrs, n);
    while (done < n) { /* several queues: bursts of 32 to whichever lacks most */
        struct rb_sock *hungriest = NULL;
        uint32_t most = 0;

        for (uint32_t i = 0; i < dev->n; i++) {
            uint32_t room = space(&dev->sock[i].fill, UINT32_MAX);

            if (room > most) {
                most = room;
                hungriest = &dev->sock[i];
            }
        }
        if (!hungriest)
            break;
        done += fill_one(dev, hungriest, addrs + done, least(n - done, 32));
    }
    return done;
}

uint32_t rb_xdp_fill_space(struct rb_xdp *dev)
{
    uint32_t room = 0;

    for (uint32_t i = 0; i < dev->n; i++)
        room += space(&dev->sock[i].fill, UINT32_MAX);
    return room;
}

/* The first so many of n frames are whole packets. */
static inline uint32_t whole(const struct rb_xdp_frame *frames, uint32_t n)
{
    while (n && frames[n - 1].flags & RB_XDP_MORE)
        n--;
    return n;
}

/* meta: the memory, when metadata may lie before a frame */
static uint32_t recv_one(struct rb_sock *s, struct rb_xdp_frame *frames, uint32_t n, const uint8_t *meta, uint32_t chunk)
{
    struct rb_ring *r = &s->rx;
    const struct xdp_desc *descs = r->entries;

    n = least(n, filled(r));
    if (!n)
        return 0;
    for (uint32_t i = 0; i < n; i++) {
        const struct xdp_desc *d = &descs[(r->local + i) & r->mask];

        frames[i] = (struct rb_xdp_frame){.addr = d->addr, .len = d->len, .flags = s->queue | (d->options & XDP_PKT_CONTD ? RB_XDP_MORE : 0)};
        if (meta && frames[i].addr % chunk >= sizeof(struct rb_xdp_meta)) {
            uint32_t magic;

            memcpy(&magic, meta + frames[i].addr - sizeof(struct rb_xdp_meta), sizeof magic);
            frames[i].flags |= magic == RB_XDP_META_MAGIC ? RB_XDP_META : 0;
        }
    }
    n = whole(frames, n) ? whole(frames, n) : n; /* one that is longer than the burst goes on with the next */
    r->local += n;
    atomic_store_explicit(r->consumer, r->local, memory_order_release);
    return n;
}

uint32_t rb_xdp_recv(struct rb_xdp *dev, struct rb_xdp_frame *frames, uint32_t n)
{
    const uint8_t *meta = dev->prog.bound ? dev->umem_base : NULL;
    uint32_t done = 0;

    if (dev->n == 1)
        return recv_one(dev->sock, frames, n, meta, dev->chunk_size);
    for (uint32_t i = 0; i < dev->n && done < n; i++) {
        done += recv_one(&dev->sock[dev->recv_next], frames + done, n - done, meta, dev->chunk_size);
        if (done && frames[done - 1].flags & RB_XDP_MORE)
            break; /* its rest comes from the same queue */
        dev->recv_next = dev->recv_next + 1 < dev->n ? dev->recv_next + 1 : 0;
    }
    return done;
}

uint32_t rb_xdp_waiting(struct rb_xdp *dev)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < dev->n; i++)
        n += atomic_load_explicit(dev->sock[i].rx.producer, memory_order_acquire) - dev->sock[i].rx.local;
    return n;
}

/* The kernel skips a descriptor that it finds invalid *without* completing it: such a buffer would be lost. */
static bool sendable(const struct rb_xdp *dev, const struct rb_xdp_frame *f, uint32_t least_len)
{
    return f->len >= least_len && f->len <= dev->chunk_size && f->addr < dev->umem_size &&
           f->addr % dev->chunk_size + f->len <= dev->chunk_size && (dev->fragments || !(f->flags & RB_XDP_MORE));
}

/* One queue sends: packets stay in order, and one thread does not fill more. The completion ring has room for all that
 * is unfinished, so the kernel never has to hold back for it. */
uint32_t rb_xdp_tx_space(struct rb_xdp *dev, uint32_t want)
{
    struct rb_sock *s = dev->sock;

    return dev->n ? least(want, least(space(&s->tx, want), s->comp.size - s->unfinished)) : 0;
}

int rb_xdp_send(struct rb_xdp *dev, const struct rb_xdp_frame *frames, uint32_t n)
{
    struct rb_sock *s = dev->sock;
    struct rb_ring *r = &s->tx;
    struct xdp_desc *descs = r->entries;
    uint32_t i, room;

    if (!dev->n)
        return -ENODEV;
    room = least(n, least(space(r, n), s->comp.size - s->unfinished));
    for (i = 0; i < room && sendable(dev, &frames[i], i && frames[i - 1].flags & RB_XDP_MORE ? 1 : RB_XDP_MIN_FRAME); i++)
        descs[(r->local + i) & r->mask] =
            (struct xdp_desc){.addr = frames[i].addr, .len = frames[i].len, .options = frames[i].flags & RB_XDP_MORE ? XDP_PKT_CONTD : 0};
    bool cut = i == room && room < n; /* more room, and it could have gone on */
    i = whole(frames, i);
    if (room && !i && !cut)
        return -EINVAL;
    r->local += i;
    s->unfinished += i;
    atomic_store_explicit(r->producer, r->local, memory_order_release);
    return (int)i;
}

uint32_t rb_xdp_complete(struct rb_xdp *dev, uint64_t *addrs, uint32_t n)
{
    struct rb_sock *s = dev->sock;
    struct rb_ring *r = &s->comp;
    const uint64_t *entries = r->entries;

    if (!dev->n)
        return 0;
    n = least(n, filled(r));
    if (!n)
        return 0;
    for (uint32_t i = 0; i < n; i++)
        addrs[i] = entries[(r->local + i) & r->mask];
    r->local += n;
    s->unfinished -= n;
    atomic_store_explicit(r->consumer, r->local, memory_order_release);
    return n;
}

uint32_t rb_xdp_tx_pending(struct rb_xdp *dev)
{
    return dev->n ? dev->sock[0].unfinished : 0;
}

/* Is there a frame that the kernel took from the ring and has not completed? (Completions not yet collected count
 * as completed.) */
bool rb_xdp_tx_in_kernel(struct rb_xdp *dev)
{
    struct rb_sock *s = dev->sock;

    if (!dev->n)
        return false;
    uint32_t completed = atomic_load_explicit(s->comp.producer, memory_order_acquire);
    uint32_t taken = atomic_load_explicit(s->tx.consumer, memory_order_acquire);

    return taken != completed;
}

/* Copy mode: one call sends a batch of 32 or so and says EAGAIN when more is queued, EBUSY when the driver dropped a
 * frame (it is completed all the same), ENOBUFS or ENOMEM under pressure. Go on while the ring moves, stop after two
 * calls that moved nothing: the frames stay queued and the next wake tries again. */
static int kick_tx(struct rb_xdp *dev, struct rb_sock *s)
{
    uint32_t at = atomic_load_explicit(s->tx.consumer, memory_order_acquire);
    unsigned still = 0;

    while (at != s->tx.local && wants_wakeup(&s->tx)) {
        dev->tx_kicks++;
        int r = sendto(s->fd, NULL, 0, MSG_DONTWAIT, NULL, 0) < 0 ? errno : 0;
        uint32_t now = atomic_load_explicit(s->tx.consumer, memory_order_acquire);

        switch (r) {
        case 0:
            if (dev->zero_copy)
                return 0; /* the driver goes on by itself */
            break;
        case EBUSY:
            dev->tx_refused += now != at;
            break;
        case EAGAIN:
        case ENOBUFS:
        case ENOMEM:
        case EINTR:
            break;
        case ENXIO:
        case ENODEV:
            return -ENODEV;
        default:
            return -r;
        }
        still = now == at ? still + 1 : 0;
        if (still == 2)
            return -EAGAIN;
        at = now;
    }
    return 0;
}

int rb_xdp_wake(struct rb_xdp *dev, uint32_t directions)
{
    int result = 0;

    if (!dev->n)
        return -ENODEV;
    if (directions & RB_XDP_RX) {
        for (uint32_t i = 0; i < dev->n; i++) {
            struct rb_sock *s = &dev->sock[i];

            if (!wants_wakeup(&s->fill) && !(dev->opt.busy_poll_us && !filled(&s->rx)))
                continue; /* polling: the driver works in our call, and only there */
            dev->rx_kicks++;
            if (recvfrom(s->fd, NULL, 0, MSG_DONTWAIT, NULL, NULL) < 0 && errno != EAGAIN && errno != EBUSY &&
                errno != EINTR && errno != ENOBUFS)
                result = errno == ENXIO ? -ENODEV : -errno;
        }
        if (dev->map_error)
            result = dev->map_error;
    }
    if (directions & RB_XDP_TX) {
        int r = kick_tx(dev, dev->sock);

        if (r)
            result = r;
    }
    return result;
}
