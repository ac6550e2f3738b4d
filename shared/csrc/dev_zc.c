/* SPDX-License-Identifier: Apache-2.0
 *
 * zc: devices: a NIC queue through AF_XDP, with the pool as UMEM. The kernel's side is in the plug-in libringbar-xdp.so (xdp_abi.h),
 * loaded when the first such device is opened, so that guests need neither it nor libxdp. Here is the book's side: a buffer is "in device d" from
 * before the ring is written until it has been taken from the receive or completion ring.
 */
#include "rb_internal.h"
#include "xdp_abi.h"

#include <dlfcn.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define RING 2048u /* entries of each of a device's rings, at most */

struct zc { /* shared by the ends of one handle that were opened on the same NIC queue */
    struct rb_xdp *dev;
    uint32_t number, refs, flags, queue, in_fill, promised, idle;
    char ifname[16];
    struct rb_end *rx;
};

static const struct rb_xdp_ops *plugin;

static int load_plugin(void)
{
    static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
    Dl_info me;
    char path[512];
    void *so = NULL;
    pthread_mutex_lock(&once);
    if (!plugin) {
        if (dladdr((void *)load_plugin, &me) && me.dli_fname && strchr(me.dli_fname, '/')) {
            snprintf(path, sizeof path, "%.*s/libringbar-xdp.so", (int)(strrchr(me.dli_fname, '/') - me.dli_fname), me.dli_fname);
            so = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        }
        if (!so)
            so = dlopen("libringbar-xdp.so", RTLD_NOW | RTLD_LOCAL);
        const struct rb_xdp_ops *(*get)(void) = so ? (const struct rb_xdp_ops *(*)(void))dlsym(so, RB_XDP_SYMBOL) : NULL;
        if (get && get()->abi == RB_XDP_ABI)
            plugin = get();
    }
    pthread_mutex_unlock(&once);
    if (plugin)
        return 0;
    const char *why = dlerror();
    return rb_fail(ENOTSUP, "no-xdp", "apt-get install libxdp1 libbpf1, and install ringbar with -Dxdp=enabled", "AF_XDP support cannot be loaded: %s",
                   why ? why : "the plug-in has another version");
}

static struct rb_device_record *record(struct rb_cluster *c, uint32_t number) { return &c->reg->state->device[number]; }

static void set_device(struct rb_server *s, uint32_t at, uint32_t number)
{
    rb_set(&s->ledger[at], RB_WORD(RB_W_DEVICE, number));
    s->in_devices++;
}

/* The kernel gave a buffer back. Where it goes: home, or to the lender it was borrowed from. */
static void from_device(struct rb_server *s, uint32_t at, uint32_t handle)
{
    uint64_t w = rb_get(&s->ledger[at]);
    s->in_devices--;
    if (RB_WORD_SUBKIND(w) == RB_W_DEVICE) {
        rb_set(&s->ledger[at], RB_WORD_LEVEL0(w));
        rb_give(s->c, RB_WORD_ORIGIN(w), handle);
    } else
        rb_server_home(s, at, handle);
}

static void refill(struct rb_server *s, struct zc *z)
{
    uint64_t addr[RB_BURST];
    struct rb_cluster *c = s->c;
    for (uint32_t room = plugin->fill_space(z->dev); room >= RB_BURST && s->free >= RB_BURST && z->in_fill + RB_BURST <= z->promised; room -= RB_BURST) {
        for (uint32_t i = 0; i < RB_BURST; i++) {
            uint32_t handle = s->stack[--s->free];
            set_device(s, rb_number(c, handle), z->number);
            addr[i] = (uint64_t)(handle & RB_INDEX_MASK) * c->buffer_size;
        }
        uint32_t k = plugin->fill(z->dev, addr, RB_BURST);
        z->in_fill += k;
        for (uint32_t i = k; i < RB_BURST; i++) {
            uint32_t handle = (uint32_t)(addr[i] / c->buffer_size);
            s->in_devices--;
            rb_server_home(s, handle, handle);
        }
        if (k < RB_BURST)
            break;
    }
}

static void complete(struct rb_server *s, struct zc *z)
{
    uint64_t addr[RB_MAX_BURST];
    for (uint32_t n; (n = plugin->complete(z->dev, addr, RB_MAX_BURST)) > 0;) {
        for (uint32_t i = 0; i < n; i++) {
            uint32_t handle = (uint32_t)(addr[i] / s->c->buffer_size);
            from_device(s, rb_number(s->c, handle), handle);
        }
        if (n < RB_MAX_BURST)
            break;
    }
}

static int gone(struct rb_end *end, int rc)
{
    const struct zc *z = end->device;
    if (rc == -ENODEV || if_nametoindex(z->ifname) == 0)
        return rb_fail(ENODEV, "detached", NULL, "interface %s is gone", z->ifname);
    return 0; /* down, or busy: it may come back */
}

static int zc_recv(struct rb_end *end, rb_desc *desc, int max)
{
    struct rb_cluster *c = end->c;
    struct rb_server *s = c->server;
    struct zc *z = end->device;
    struct rb_xdp_frame frame[RB_MAX_BURST];
    uint32_t n = plugin->recv(z->dev, frame, RB_MIN((uint32_t)max, RB_MAX_BURST));
    if (n) {
        uint64_t now = rb_now_ns();
        for (uint32_t i = 0; i < n; i++) {
            uint32_t handle = (uint32_t)(frame[i].addr / c->buffer_size);
            rb_set(&s->ledger[handle], RB_WORD(RB_W_HOME, 0));
            c->where[handle] = RB_HAND_HOME;
            desc[i].handle = handle;
            desc[i].ts = now;
            rb_desc_set(&desc[i], frame[i].len, (uint32_t)(frame[i].addr % c->buffer_size), 0);
            end->st.bytes += frame[i].len;
        }
        s->in_devices -= n;
        z->in_fill -= n;
        end->st.packets += n;
    } else if ((++z->idle & 1023) == 0) { /* an interface that vanished must end in an error, not a spin */
        int rc = gone(end, 0);
        if (rc < 0)
            return rc;
    }
    refill(s, z);
    plugin->wake(z->dev, RB_XDP_RX);
    return (int)n;
}

/* What a descriptor's ledger word becomes in the device; 0 when it cannot go there. */
static uint64_t device_word(struct rb_server *s, struct zc *z, uint32_t at, uint32_t hand, struct rb_leg_ctx **back)
{
    *back = NULL;
    if (hand == RB_HAND_HOME)
        return RB_WORD(RB_W_DEVICE, z->number);
    uint64_t w = rb_get(&s->ledger[at]);
    uint32_t leg = s->c->end[hand - RB_HAND_BORROWED]->leg;
    struct rb_leg_ctx *own = s->leg[leg];
    if (own && rb_get(&own->rec->book) == s->book + 1 && !RB_WORD_SUBKIND(w)) {
        *back = own;
        return RB_WORD(RB_W_DEVICE, z->number);
    }
    return RB_WORD_SUBKIND(w) ? 0 : w | RB_WORD_SUB(RB_W_DEVICE, z->number, leg);
}

static int zc_send(struct rb_end *end, rb_desc *desc, int n)
{
    struct rb_cluster *c = end->c;
    struct rb_server *s = c->server;
    struct zc *z = end->device;
    struct rb_xdp_frame frame[RB_MAX_BURST];
    uint64_t old[RB_MAX_BURST], bytes = 0;
    uint16_t hand[RB_MAX_BURST];
    uint32_t k, i;
    complete(s, z);
    k = RB_MIN(RB_MIN((uint32_t)n, RB_MAX_BURST), plugin->tx_space(z->dev));
    for (i = 0; i < k; i++) {
        uint32_t at = rb_number(c, desc[i].handle);
        struct rb_leg_ctx *back;
        if (at == UINT32_MAX || !(hand[i] = c->where[at]) || !rb_fits(c, desc[i].word) || desc[i].handle >> 24 || rb_desc_length(&desc[i]) < RB_XDP_MIN_FRAME)
            break;
        uint64_t word = device_word(s, z, at, hand[i], &back);
        if (!word)
            break;
        if (back)
            back->lent--;
        old[i] = back ? RB_WORD(RB_W_HOME, 0) : rb_get(&s->ledger[at]);
        if (back)
            hand[i] = RB_HAND_HOME; /* from now on it is simply ours */
        rb_set(&s->ledger[at], word);
        c->where[at] = RB_HAND_NONE;
        frame[i].addr = (uint64_t)desc[i].handle * c->buffer_size + rb_desc_offset(&desc[i]);
        frame[i].len = rb_desc_length(&desc[i]);
        frame[i].flags = 0;
    }
    if (!i && k)
        return rb_fail(EINVAL, "bad-descriptor", NULL, "descriptor %u is not in this handle's hand, or is no frame", desc[0].handle);
    s->in_devices += i;
    int sent = i ? plugin->send(z->dev, frame, i) : 0;
    sent = RB_MAX(sent, 0);
    for (uint32_t j = (uint32_t)sent; j < i; j++) { /* not taken: still the caller's */
        uint32_t at = rb_number(c, desc[j].handle);
        rb_set(&s->ledger[at], old[j]);
        c->where[at] = hand[j];
        s->in_devices--;
    }
    for (int j = 0; j < sent; j++)
        bytes += frame[j].len;
    end->st.packets += (uint64_t)sent;
    end->st.bytes += bytes;
    int rc = plugin->wake(z->dev, RB_XDP_TX);
    if (rc < 0 && (rc = gone(end, rc)) < 0 && !sent)
        return rc;
    return sent;
}

static int zc_alloc(struct rb_end *end, rb_desc *desc, int n)
{
    struct rb_server *s = end->c->server;
    int i;
    complete(s, end->device);
    for (i = 0; i < n && s->free; i++) {
        desc[i].handle = s->stack[--s->free];
        desc[i].ts = 0;
        rb_desc_set(&desc[i], 0, RB_BUFFER_HEADER, 0);
        end->c->where[rb_number(end->c, desc[i].handle)] = RB_HAND_HOME;
    }
    return i;
}

static int zc_ready(struct rb_end *end)
{
    (void)end;
    return 0; /* asking the kernel's ring is as cheap as receiving: rb_recv tries between short waits */
}

static int zc_count(struct rb_end *end) { return end->flags & RB_TX ? (int)plugin->tx_pending(((struct zc *)end->device)->dev) : 0; }

static int zc_fd(struct rb_end *end)
{
    int fd = -1;
    plugin->fds(((struct zc *)end->device)->dev, &fd, 1);
    return fd;
}

static void zc_service(struct rb_end *end)
{
    struct zc *z = end->device;
    complete(end->c->server, z);
    if (plugin->tx_pending(z->dev))
        plugin->wake(z->dev, RB_XDP_TX);
}

static void zc_stats(struct rb_end *end, rb_stats *st)
{
    struct rb_xdp_stats k;
    struct zc *z = end->device;
    if (plugin->stats(z->dev, &k) < 0)
        return;
    st->kernel_dropped = k.rx_dropped;
    st->kernel_ring_full = k.rx_ring_full;
    st->kernel_fill_empty = k.rx_fill_ring_empty_descs;
    st->kernel_invalid = k.rx_invalid_descs + k.tx_invalid_descs;
}

struct of_device {
    uint32_t number;
    int found;
};
static void home_word(struct rb_server *s, uint32_t at, uint64_t w, void *arg)
{
    struct of_device *d = arg;
    if (RB_WORD_KIND(w) == RB_W_DEVICE && RB_WORD_LEG(w) == d->number) {
        s->in_devices -= s->in_devices > 0;
        s->quiescing -= s->quiescing > 0;
        rb_server_home(s, at, rb_handle_of(s->c, at));
    } else if (RB_WORD_SUBKIND(w) == RB_W_DEVICE && RB_WORD_SUBLEG(w) == d->number) {
        rb_set(&s->ledger[at], RB_WORD_LEVEL0(w));
        s->in_devices -= s->in_devices > 0;
        if (!s->acting)
            rb_give(s->c, RB_WORD_ORIGIN(w), rb_handle_of(s->c, at));
    }
}

static void zc_close(struct rb_end *end)
{
    struct zc *z = end->device;
    struct rb_server *s = end->c->server;
    struct rb_xdp_error err;
    if (z->rx == end)
        z->rx = NULL;
    if (--z->refs)
        return;
    uint64_t until = rb_mono_ns() + 500000000u;
    while (plugin->tx_pending(z->dev) && rb_mono_ns() < until) {
        plugin->wake(z->dev, RB_XDP_TX);
        complete(s, z);
    }
    int rc = plugin->close(z->dev, &err);
    struct of_device d = {.number = z->number};
    if (rc == 0 || if_nametoindex(z->ifname) == 0) {
        rb_each_written(s, home_word, &d);
        s->need -= RB_MIN(s->need, z->promised);
        if (rb_enter(end->c->reg) == 0) {
            record(end->c, z->number)->used = 0;
            rb_leave(end->c->reg);
        }
    } else { /* the kernel has not let go yet: they rest until it has */
        s->quiescing = s->in_devices;
        s->in_devices = 0;
    }
    free(z);
}

/* Buffers of a dead process that the kernel has let go of. Recovery lock held. */
void rb_zc_release_dead(struct rb_server *s)
{
    struct rb_xdp_error err;
    if (!s->quiescing || load_plugin() < 0)
        return;
    for (uint32_t i = 0; i < RB_MAX_DEVICES; i++) {
        struct rb_device_record *r = record(s->c, i);
        struct of_device d = {.number = i};
        char ifname[32];
        if (!r->used || r->book != s->book + 1)
            continue;
        snprintf(ifname, sizeof ifname, "%s", r->name);
        char *at = strchr(ifname, '@');
        uint32_t queue = at ? (uint32_t)strtoul(at + 1, NULL, 10) : 0;
        if (at)
            *at = 0;
        plugin->cleanup(ifname, &err);
        int rc = plugin->probe(ifname, queue, 200, &err);
        if (rc == -EBUSY)
            continue;
        rb_each_written(s, home_word, &d);
        r->used = 0;
    }
}

/* Programs that dead processes left on interfaces, when their cluster goes. */
void rb_zc_clean_up(struct rb_state *state)
{
    struct rb_xdp_error err;
    for (uint32_t i = 0; i < RB_MAX_DEVICES; i++) {
        char ifname[32];
        if (!state->device[i].used || load_plugin() < 0)
            continue;
        snprintf(ifname, sizeof ifname, "%.*s", (int)strcspn(state->device[i].name, "@"), state->device[i].name);
        plugin->cleanup(ifname, &err);
    }
}

static const struct rb_end_ops zc_ops = {
    .recv = zc_recv, .send = zc_send, .alloc = zc_alloc, .ready = zc_ready, .count = zc_count,
    .fd = zc_fd, .service = zc_service, .stats = zc_stats, .close = zc_close,
};
static const struct rb_end_ops zc_rx_ops = {
    .recv = zc_recv, .ready = zc_ready, .count = zc_count, .fd = zc_fd, .service = zc_service, .stats = zc_stats, .close = zc_close,
};
static const struct rb_end_ops zc_tx_ops = {
    .send = zc_send, .alloc = zc_alloc, .ready = zc_ready, .count = zc_count, .fd = zc_fd, .service = zc_service, .stats = zc_stats, .close = zc_close,
};

static int take_error(int rc, const struct rb_xdp_error *err)
{
    const char *code = rc == -EBUSY ? "busy" : rc == -ENODEV || rc == -ENOENT ? "no-such-interface" : rc == -EPERM || rc == -EACCES ? "no-permission" : "device";
    return rb_fail(-rc, code, err->cure, "%s", err->text);
}

int rb_zc_open(struct rb_end *end, const char *address)
{
    struct rb_cluster *c = end->c;
    struct rb_server *s;
    struct rb_xdp_error err = {0};
    struct rb_xdp_info info;
    struct zc *z = NULL;
    char ifname[32];
    uint32_t queue = RB_XDP_ALL_QUEUES;
    snprintf(ifname, sizeof ifname, "%.31s", address + 3);
    char *at = strchr(ifname, '@');
    if (at) {
        char *rest;
        *at = 0;
        queue = (uint32_t)strtoul(at + 1, &rest, 10);
        if (!at[1] || *rest || queue >= RB_XDP_MAX_QUEUES) {
            rb_fail(EINVAL, "bad-address", NULL, "\"%s\" names no queue of a NIC", address);
            return rb_cure(EINVAL, "write zc:%s@0, or zc:%s for all its queues", ifname, ifname);
        }
    }
    if (strlen(ifname) > 15 || !*ifname)
        return rb_fail(EINVAL, "bad-address", "interface names have 1 to 15 characters", "\"%s\" names no interface", address);
    if (c->buffer_size != 2048 && c->buffer_size != 4096) {
        rb_fail(EINVAL, "bad-size", NULL, "AF_XDP takes buffers of 2048 or 4096 bytes, and cluster %u has buffers of %u", c->id, c->buffer_size);
        return rb_cure(EINVAL, "make the cluster with --size %u", c->buffer_size < 2048 ? 2048 : 4096);
    }
    int rc = load_plugin();
    if (rc < 0 || (rc = rb_server_get(c, &s)) < 0)
        return rc;
    for (uint32_t i = 0; i < RB_MAX_ENDS && !z; i++)
        if (c->end[i] && c->end[i]->device && strcmp(((struct zc *)c->end[i]->device)->ifname, ifname) == 0 && ((struct zc *)c->end[i]->device)->queue == queue)
            z = c->end[i]->device;
    uint32_t flags = (end->flags & RB_RX ? RB_XDP_RX : 0) | RB_XDP_TX;
    if (z) { /* this handle has it open already, for the other direction */
        if ((end->flags & RB_RX) && z->rx) {
            rb_fail(EBUSY, "busy", NULL, "this handle receives from %s already", address);
            return -EBUSY;
        }
        if ((flags & RB_XDP_RX) && !(z->flags & RB_XDP_RX)) {
            if ((rc = rb_server_claim(s, 2 * RING, address)) < 0)
                return rc;
            if ((rc = plugin->add_rx(z->dev, queue, &err)) < 0) {
                s->need -= 2 * RING;
                return take_error(rc, &err);
            }
            z->promised += 2 * RING;
            z->flags |= RB_XDP_RX;
        }
        z->refs++;
    } else {
        z = calloc(1, sizeof *z);
        if (!z)
            return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
        snprintf(z->ifname, sizeof z->ifname, "%.15s", ifname);
        z->queue = queue;
        z->flags = flags;
        z->refs = 1;
        if ((rc = rb_enter(c->reg)) < 0) {
            free(z);
            return rc;
        }
        while (z->number < RB_MAX_DEVICES && record(c, z->number)->used)
            z->number++;
        if (z->number == RB_MAX_DEVICES)
            rc = rb_fail(ENOSPC, "too-many-devices", NULL, "cluster %u has %u devices, which is the most", c->id, RB_MAX_DEVICES);
        else {
            struct rb_device_record *r = record(c, z->number);
            memset(r, 0, sizeof *r);
            r->book = s->book + 1;
            snprintf(r->name, sizeof r->name, "%.15s@%u", ifname, queue == RB_XDP_ALL_QUEUES ? 0 : queue);
            r->used = 1;
        }
        rb_leave(c->reg);
        struct rb_xdp_options o = {
            .size = sizeof o, .flags = flags, .ifname = z->ifname, .umem_base = c->pool[0],
            .umem_size = (uint64_t)c->pool_count[0] * c->buffer_size, .chunk_size = c->buffer_size, .headroom = RB_BUFFER_HEADER, .queue = queue,
            .mode = end->flags & RB_GENERIC ? RB_XDP_GENERIC : end->flags & RB_DRIVER ? RB_XDP_DRIVER : RB_XDP_AUTO,
            .rx_size = RING, .tx_size = RING, .fill_size = RING, .comp_size = RING,
        };
        if (rc == 0 && (rc = plugin->open(&o, &z->dev, &err)) < 0)
            rc = take_error(rc, &err);
        if (rc == 0) {
            plugin->info(z->dev, &info);
            z->promised = (info.needs_fill ? 2 * RING * info.queues : 0) + RING;
            if ((rc = rb_server_claim(s, z->promised, address)) < 0)
                plugin->close(z->dev, &err);
        }
        if (rc < 0) {
            if (z->number < RB_MAX_DEVICES)
                record(c, z->number)->used = 0;
            free(z);
            return rc;
        }
    }
    end->device = z;
    end->ops = (end->flags & RB_RX) && (end->flags & RB_TX) ? &zc_ops : end->flags & RB_RX ? &zc_rx_ops : &zc_tx_ops;
    if (end->flags & RB_RX)
        z->rx = end;
    snprintf(end->st.mode, sizeof end->st.mode, "%s", plugin->mode(z->dev));
    snprintf(record(c, z->number)->mode, sizeof record(c, z->number)->mode, "%s", end->st.mode);
    if (queue == RB_XDP_ALL_QUEUES)
        snprintf(end->address, sizeof end->address, "zc:%s", z->ifname);
    else
        snprintf(end->address, sizeof end->address, "zc:%s@%u", z->ifname, queue);
    if (z->flags & RB_XDP_RX) {
        refill(s, z);
        plugin->wake(z->dev, RB_XDP_RX);
    }
    return 0;
}
