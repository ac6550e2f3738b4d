/* SPDX-License-Identifier: Apache-2.0
 *
 * zc: devices: a NIC queue through AF_XDP, with the pool as UMEM. The kernel's side is in the plug-in libringbar-xdp.so (xdp_abi.h),
 * loaded when the first such device is opened, so that guests need neither it nor libxdp. Here is the book's side: a buffer is "in device d" from
 * before the ring is written until it has been taken from the receive or completion ring.
 */
#include "rb_zc.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

const struct rb_xdp_ops *rb_zc_plugin;
#define plugin rb_zc_plugin

int rb_zc_load(void)
{
    static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
    Dl_info me;
    char path[512];
    void *so = NULL;
    pthread_mutex_lock(&once);
    if (!plugin) {
        if (dladdr((void *)rb_zc_load, &me) && me.dli_fname && strchr(me.dli_fname, '/')) {
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

static void set_device(struct rb_server *s, uint32_t at, uint32_t number)
{
    rb_set(&s->ledger[at], RB_WORD(RB_W_DEVICE, number));
    s->in_devices++;
}

/* The kernel gave a buffer back. Where it goes: home, or to the lender it was borrowed from; of a shared one, only the device's bit. */
static void from_device(struct rb_server *s, struct rb_zc *z, uint32_t at, uint32_t handle)
{
    uint64_t w = rb_get(&s->ledger[at]);
    s->in_devices--;
    if (rb_shared_word(w) && rb_unshare(s, at, handle, rb_device_bit(s, z->number, false)))
        return;
    if (RB_WORD_SUBKIND(w) == RB_W_DEVICE) {
        rb_set(&s->ledger[at], RB_WORD_LEVEL0(w));
        rb_give(s->c, RB_WORD_ORIGIN(w), handle);
    } else
        rb_server_home(s, at, handle);
}

/* Fresh buffers for the kernel, a burst at a time. The fill ring is asked only by giving: most calls find nothing to do. */
void rb_zc_refill(struct rb_server *s, struct rb_zc *z)
{
    uint64_t addr[RB_BURST];
    struct rb_cluster *c = s->c;
    while (s->free >= RB_BURST && z->in_fill + RB_BURST <= z->promised) {
        for (uint32_t i = 0; i < RB_BURST; i++) {
            uint32_t handle = s->stack[--s->free];
            set_device(s, handle, z->number);
            addr[i] = (uint64_t)handle * c->buffer_size;
        }
        uint32_t k = plugin->fill(z->dev, addr, RB_BURST);
        z->in_fill += k;
        for (uint32_t i = RB_BURST; i-- > k;) {
            uint32_t handle = (uint32_t)(addr[i] / c->buffer_size);
            s->in_devices--;
            rb_server_home(s, handle, handle);
        }
        z->empty -= RB_MIN(z->empty, k);
        if (k < RB_BURST) { /* full: only what is received from now on makes room */
            z->empty = 0;
            break;
        }
    }
}

static void complete(struct rb_server *s, struct rb_zc *z)
{
    uint64_t addr[RB_MAX_BURST];
    for (uint32_t n; (n = plugin->complete(z->dev, addr, RB_MAX_BURST)) > 0;) {
        for (uint32_t i = 0; i < n; i++) {
            uint32_t handle = (uint32_t)(addr[i] / s->c->buffer_size);
            from_device(s, z, rb_number(s->c, handle), handle);
        }
        if (n < RB_MAX_BURST)
            break;
    }
}

static int gone(struct rb_end *end, int rc)
{
    const struct rb_zc *z = end->device;
    if (rc == -ENODEV || plugin->link(z->dev) == -ENODEV)
        return rb_fail(ENODEV, "interface-gone", NULL, "interface %s is gone", z->ifname);
    return 0; /* down, or busy: it may come back */
}

/* What the driver knows of a packet: its time, unless it keeps none, and its hash, for the buffer's header. */
static void metadata(struct rb_end *end, struct rb_zc *z, rb_desc *desc)
{
    uint8_t *buffer = end->c->pool[0] + (uint64_t)desc->handle * end->c->buffer_size;
    struct rb_xdp_meta meta;
    memcpy(&meta, buffer + rb_desc_offset(desc) - sizeof meta, sizeof meta);
    memset(buffer + rb_desc_offset(desc) - sizeof meta, 0, sizeof meta.magic); /* a later packet without must not find it */
    if (meta.valid & RB_XDP_META_TIME && meta.time) {
        desc->ts = meta.time;
        if (end->st.clock[0] != 'h') {
            snprintf(end->st.clock, sizeof end->st.clock, "hardware");
            snprintf(rb_zc_record(end->c, z->number)->clock, sizeof end->st.clock, "hardware");
        }
    }
    if (meta.valid & RB_XDP_META_HASH) {
        memcpy(buffer, &meta.hash, sizeof meta.hash);
        rb_desc_set(desc, rb_desc_length(desc), rb_desc_offset(desc), rb_desc_flags(desc) | RB_META);
    }
}

/* One burst from the kernel into the hand. */
static uint32_t receive(struct rb_end *end, struct rb_server *s, struct rb_zc *z, rb_desc *desc, uint32_t max)
{
    struct rb_cluster *c = end->c;
    struct rb_xdp_frame frame[RB_MAX_BURST];
    uint32_t n = plugin->recv(z->dev, frame, RB_MIN(max, RB_MAX_BURST));
    uint64_t now = n ? rb_now_ns() : 0, bytes = 0, packets = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t handle = (uint32_t)(frame[i].addr / c->buffer_size);
        rb_set(&s->ledger[handle], RB_WORD(RB_W_HOME, 0));
        c->where[handle] = RB_HAND_HOME;
        desc[i].handle = handle;
        desc[i].ts = now;
        rb_desc_set(&desc[i], frame[i].len, (uint32_t)(frame[i].addr % c->buffer_size), frame[i].flags & RB_XDP_MORE ? RB_MORE : 0);
        if (__builtin_expect(frame[i].flags & RB_XDP_META, 0))
            metadata(end, z, &desc[i]);
        bytes += frame[i].len;
        packets += !(frame[i].flags & RB_XDP_MORE);
    }
    s->in_devices -= n;
    z->in_fill -= n;
    z->empty += n;
    end->st.bytes += bytes;
    end->st.packets += packets;
    return n;
}

static int zc_recv(struct rb_end *end, rb_desc *desc, int max)
{
    struct rb_server *s = end->c->server;
    struct rb_zc *z = end->device;
    uint32_t n = 0, got;
    if (rb_load_acquire(&s->rec->epoch) != s->epoch)
        rb_server_sync(s);
    if (s->epoch != z->epoch || z->takers)
        rb_taker_look(s, z);
    for (int rounds = 0; rounds < 8 && !n && (got = receive(end, s, z, desc, (uint32_t)max)) > 0; rounds++) {
        z->idle = 0;
        n = __builtin_expect(z->takers == 0, 1) ? got : rb_taker_give(s, z, desc, got);
        if (z->empty >= RB_BURST)
            rb_zc_refill(s, z);
    }
    uint64_t now;
    if (!n && (++z->idle & 1023) == 0 && (now = rb_mono_ns()) - z->asked > 10000000u) { /* an interface that vanished must end in an error, not a spin */
        z->asked = now; /* which takes two system calls */
        int rc = gone(end, 0);
        if (rc < 0)
            return rc;
    }
    if (z->empty >= RB_BURST)
        rb_zc_refill(s, z);
    plugin->wake(z->dev, RB_XDP_RX);
    return (int)n;
}

/* What a buffer was before it went to the device. */
struct was {
    uint64_t word, mask;
    uint32_t number;
    uint16_t hand;
    bool shared;
};

/* Replaces a descriptor whose buffer the device cannot have by a copy. */
static int copy_out(struct rb_end *end, rb_desc *d, struct was *was)
{
    struct rb_cluster *c = end->c;
    struct rb_server *s = c->server;
    if (!s->free)
        return 0;
    rb_desc to = {.handle = s->stack[--s->free], .word = d->word & ~((uint32_t)RB_SHARED << 29), .ts = d->ts};
    memcpy(rb_data(c, &to), rb_data(c, d), rb_desc_length(d));
    rb_return(c, d, 1);
    *d = to;
    end->st.copied++;
    *was = (struct was){.word = RB_WORD(RB_W_HOME, 0), .number = rb_number(c, to.handle), .hand = RB_HAND_HOME};
    return 1;
}

/* One buffer leaves the hand; its word says that the device has it. 1, or 0 when it cannot go: not ours, no frame, or to be copied without a
 * buffer for that. */
static int into_device(struct rb_end *end, rb_desc *d, struct was *was)
{
    struct rb_cluster *c = end->c;
    struct rb_server *s = c->server;
    const struct rb_zc *z = end->device;
    const uint32_t at = rb_number(c, d->handle), hand = at == UINT32_MAX ? RB_HAND_NONE : c->where[at] & RB_HAND;
    if (!hand || hand == RB_HAND_PEEK || !rb_fits(c, d->word))
        return 0;
    const uint64_t w = rb_get(&s->ledger[at]);
    uint64_t mask = rb_shared_word(w) ? rb_get(&s->masks[at]) : 0, word = RB_WORD(RB_W_DEVICE, z->number);
    struct rb_end *from = hand >= RB_HAND_BORROWED ? c->end[hand - RB_HAND_BORROWED] : NULL;
    struct rb_leg_ctx *own = from ? s->leg[from->leg] : NULL;
    bool copy = d->handle >> 24 != 0; /* of a VM's own pool, which is not in the UMEM */
    own = own && rb_get(&own->rec->book) == s->book + 1 ? own : NULL; /* this book is also the lender it came from */
    *was = (struct was){.word = w, .number = at, .hand = (uint16_t)hand};
    if (own && mask & own->bit && mask != own->bit) { /* others have it as well: our share becomes the device's */
        mask &= ~own->bit;
        was->shared = true;
    } else if (own && !RB_WORD_SUBKIND(w)) {
        was->word = RB_WORD(RB_W_HOME, 0); /* from now on it is simply ours */
        was->hand = RB_HAND_HOME;
    } else if (hand == RB_HAND_SHARED) {
        was->shared = true;
    } else if (from) {
        copy |= own || RB_WORD_SUBKIND(w) || mask;
        word = w | RB_WORD_SUB(RB_W_DEVICE, z->number, from->leg);
    }
    const uint64_t bit = was->shared ? rb_device_bit(s, z->number, true) : 0;
    if (copy || (was->shared && (!bit || mask & bit))) {
        if (!copy_out(end, d, was))
            return 0;
        rb_set(&s->ledger[was->number], RB_WORD(RB_W_DEVICE, z->number));
        return 1;
    }
    if (own) {
        own->shared -= (rb_get(&s->masks[at]) & own->bit) != 0 && rb_shared_word(w);
        rb_set(&own->rec->lent, --own->lent);
    }
    if (was->shared) {
        was->mask = mask;
        was->hand = RB_HAND_SHARED;
        rb_set(&s->masks[at], mask | bit);
    } else
        rb_set(&s->ledger[at], word);
    rb_unhand(c, at);
    return 1;
}

/* Can it go out here, after the one before it? A packet in several buffers goes whole or not at all. */
static int frame_of(struct rb_end *end, const rb_desc *d, const struct rb_xdp_frame *before, bool first, struct rb_xdp_frame *frame)
{
    struct rb_zc *z = end->device;
    const uint32_t more = rb_desc_flags(d) & RB_MORE, least = before && before->flags ? 1 : RB_XDP_MIN_FRAME;
    frame->addr = (uint64_t)d->handle * end->c->buffer_size + rb_desc_offset(d);
    frame->len = rb_desc_length(d);
    frame->flags = more ? RB_XDP_MORE : 0;
    if (frame->len < least || !rb_fits(end->c, d->word))
        return 0;
    if (__builtin_expect((more | z->cut) && !z->fragments, 0)) { /* it cannot go out here, nor can its end alone */
        if (first)
            z->cut = more;
        return 0;
    }
    return 1;
}

/* n frames to the kernel: how many it took. */
static int to_kernel(struct rb_end *end, struct rb_zc *z, const struct rb_xdp_frame *frame, uint32_t n)
{
    uint64_t bytes = 0;
    int sent = n ? plugin->send(z->dev, frame, n) : 0;
    sent = RB_MAX(sent, 0);
    for (int i = 0; i < sent; i++) {
        bytes += frame[i].len;
        end->st.packets += !frame[i].flags;
    }
    end->st.bytes += bytes;
    end->c->server->in_devices += (uint32_t)sent;
    return sent;
}

static int zc_send(struct rb_end *end, rb_desc *desc, int n)
{
    struct rb_cluster *c = end->c;
    struct rb_server *s = c->server;
    struct rb_zc *z = end->device;
    struct rb_xdp_frame frame[RB_MAX_BURST];
    struct was was[RB_MAX_BURST];
    uint32_t k, i;
    complete(s, z);
    k = plugin->tx_space(z->dev, RB_MIN((uint32_t)n, RB_MAX_BURST));
    for (i = 0; i < k && frame_of(end, &desc[i], i ? &frame[i - 1] : NULL, i == 0, &frame[i]) && into_device(end, &desc[i], &was[i]); i++)
        frame[i].addr = (uint64_t)desc[i].handle * c->buffer_size + rb_desc_offset(&desc[i]); /* of the copy, if it was one */
    if (!i && k && s->free)
        return rb_fail(EINVAL, "bad-descriptor", NULL, "descriptor %u is not in this handle's hand, or is no frame", desc[0].handle);
    int sent = to_kernel(end, z, frame, i);
    for (uint32_t j = (uint32_t)sent; j < i; j++) { /* not taken: still the caller's */
        if (was[j].shared)
            rb_set(&s->masks[was[j].number], was[j].mask);
        else
            rb_set(&s->ledger[was[j].number], was[j].word);
        c->where[was[j].number] = (c->where[was[j].number] & ~(uint32_t)RB_HAND) | was[j].hand;
    }
    int rc = plugin->wake(z->dev, RB_XDP_TX);
    if (rc < 0 && (rc = gone(end, rc)) < 0 && !sent)
        return rc;
    return sent;
}

/* As an output of a fan-out: the words say already that they are here. */
static int zc_share(struct rb_end *end, const rb_desc *desc, int n)
{
    struct rb_zc *z = end->device;
    struct rb_xdp_frame frame[RB_MAX_BURST];
    uint32_t i, k;
    complete(end->c->server, z);
    k = plugin->tx_space(z->dev, RB_MIN((uint32_t)n, RB_MAX_BURST));
    for (i = 0; i < k && !(desc[i].handle >> 24) && frame_of(end, &desc[i], i ? &frame[i - 1] : NULL, i == 0, &frame[i]); i++)
        ;
    if (!i && k)
        return -EINVAL;
    int sent = to_kernel(end, z, frame, i);
    int rc = plugin->wake(z->dev, RB_XDP_TX);
    return sent || rc >= 0 ? sent : RB_MIN(gone(end, rc), 0);
}

static uint32_t zc_number(struct rb_end *end) { return ((struct rb_zc *)end->device)->number; }

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

static int zc_count(struct rb_end *end)
{
    struct rb_xdp *dev = ((struct rb_zc *)end->device)->dev;
    return (int)(end->flags & RB_RX ? plugin->waiting(dev) : plugin->tx_pending(dev));
}

static int zc_ready(struct rb_end *end) { return end->flags & RB_RX ? zc_count(end) > 0 : 0; }

static int zc_fd(struct rb_end *end)
{
    int fd = -1;
    plugin->fds(((struct rb_zc *)end->device)->dev, &fd, 1);
    return fd;
}

static void zc_service(struct rb_end *end)
{
    struct rb_zc *z = end->device;
    struct rb_server *s = end->c->server;
    complete(s, z);
    if (plugin->tx_pending(z->dev))
        plugin->wake(z->dev, RB_XDP_TX);
    if (z->rx == end) {
        if (s->epoch != z->epoch || z->takers)
            rb_taker_look(s, z);
        if (z->empty >= RB_BURST)
            rb_zc_refill(s, z);
    }
}

static void zc_stats(struct rb_end *end, rb_stats *st)
{
    struct rb_xdp_stats k;
    struct rb_zc *z = end->device;
    if (plugin->stats(z->dev, &k) < 0)
        return;
    st->kernel_dropped = k.rx_dropped;
    st->kernel_ring_full = k.rx_ring_full;
    st->kernel_fill_empty = k.rx_fill_ring_empty_descs;
    st->kernel_invalid = k.rx_invalid_descs + k.tx_invalid_descs;
    st->kernel_passed = k.passed;
    st->kernel_refused = k.tx_refused;
    st->nic_rx_dropped = k.nic_rx_dropped;
    st->nic_tx_dropped = k.nic_tx_dropped;
    st->drops[RB_DROP_FILTER] += z->filtered;
}

static void zc_close(struct rb_end *end)
{
    struct rb_zc *z = end->device;
    struct rb_server *s = end->c->server;
    struct rb_xdp_error err;
    if (z->rx == end) {
        rb_taker_end(s, z);
        z->rx = NULL;
    }
    if (--z->refs)
        return;
    uint64_t until = rb_mono_ns() + 500000000u;
    while (plugin->tx_pending(z->dev) && rb_mono_ns() < until && plugin->link(z->dev) != -ENODEV) {
        plugin->wake(z->dev, RB_XDP_TX);
        complete(s, z);
    }
    int vanished = plugin->link(z->dev) == -ENODEV, rc = plugin->close(z->dev, &err);
    if (rc == 0 || vanished) {
        rb_zc_home(s, z->number);
        if (rb_enter(end->c->reg) == 0) {
            rb_zc_record(end->c, z->number)->used = 0;
            rb_leave(end->c->reg);
        }
    } else { /* the kernel has not let go yet: they rest until it has */
        uint32_t resting = rb_zc_held(s, z->number);
        s->quiescing += resting;
        s->in_devices -= RB_MIN(s->in_devices, resting);
    }
    s->need -= RB_MIN(s->need, z->promised);
    free(z->rule);
    free(z);
}

/* ---- the operations ---------------------------------------------------------------------------------------------------- */

const struct rb_end_ops rb_zc_ops = {
    .recv = zc_recv, .send = zc_send, .share = zc_share, .number = zc_number, .alloc = zc_alloc, .ready = zc_ready, .count = zc_count,
    .fd = zc_fd, .service = zc_service, .stats = zc_stats, .close = zc_close,
};
const struct rb_end_ops rb_zc_rx_ops = {
    .recv = zc_recv, .ready = zc_ready, .count = zc_count, .fd = zc_fd, .service = zc_service, .stats = zc_stats, .close = zc_close,
};
const struct rb_end_ops rb_zc_tx_ops = {
    .send = zc_send, .share = zc_share, .number = zc_number, .alloc = zc_alloc, .ready = zc_ready, .count = zc_count, .fd = zc_fd,
    .service = zc_service, .stats = zc_stats, .close = zc_close,
};

struct rb_zc *rb_zc_of(struct rb_end *end)
{
    return end->ops == &rb_zc_ops || end->ops == &rb_zc_rx_ops || end->ops == &rb_zc_tx_ops ? end->device : NULL;
}
