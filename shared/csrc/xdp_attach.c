/* SPDX-License-Identifier: Apache-2.0 */
/* Our XDP program on an interface: put there beside others through libxdp's dispatcher, or alone, and taken away. */
#define _GNU_SOURCE
#include <bpf/bpf.h>
#include <errno.h>
#include <linux/if_link.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "xdp_object.h" /* generated: xdp_object[], the compiled ringbar_xdp.bpf.c */
#include "xdp_prog.h"

static void drop_try(struct rb_prog *p)
{
    if (p->bound)
        rb_prog_close_bound(p);
    if (p->libxdp)
        xdp_program__close(p->libxdp);
    if (p->object)
        bpf_object__close(p->object);
    memset(p, 0, sizeof *p);
    p->fd = p->map_fd = p->rules_fd = p->passed_fd = p->switch_fd = -1;
}

/* The maps of the loaded object; false when one is missing. */
static bool find_maps(struct rb_prog *p)
{
    struct bpf_map *map;

    p->map_fd = bpf_object__find_map_fd_by_name(p->object, "ringbar_xsks");
    p->rules_fd = bpf_object__find_map_fd_by_name(p->object, "ringbar_rules");
    p->passed_fd = bpf_object__find_map_fd_by_name(p->object, "ringbar_passed");
    bpf_object__for_each_map(map, p->object) {
        if (bpf_map__is_internal(map) && strstr(bpf_map__name(map), ".bss") && bpf_map__value_size(map) == sizeof(uint32_t))
            p->switch_fd = bpf_map__fd(map);
    }
    return p->map_fd >= 0 && p->rules_fd >= 0 && p->passed_fd >= 0 && p->switch_fd >= 0;
}

void rb_prog_record(struct rb_xdp *dev, struct rb_xdp_owner *o)
{
    rb_xdp_record(o, dev->ifindex);
    for (uint32_t i = 0; i < dev->n; i++)
        o->queues[dev->sock[i].queue / 64] |= 1ull << (dev->sock[i].queue % 64);
}

/* Open the compiled program anew (an object can be loaded once) with our record and a map for all NIC queues. */
static int open_object(struct rb_xdp *dev, struct bpf_object **out)
{
    LIBBPF_OPTS(bpf_object_open_opts, opts, .object_name = "ringbar");
    struct bpf_object *obj = bpf_object__open_mem(xdp_object, sizeof xdp_object, &opts);
    struct bpf_map *map, *xsks;
    struct rb_xdp_owner owner;
    bool written = false;

    if (!obj)
        return -errno;
    rb_prog_record(dev, &owner);
    bpf_object__for_each_map(map, obj) {
        if (bpf_map__is_internal(map) && strstr(bpf_map__name(map), ".rodata"))
            written = !bpf_map__set_initial_value(map, &owner, sizeof owner); /* the record is all there is in it */
    }
    xsks = bpf_object__find_map_by_name(obj, "ringbar_xsks");
    if (!written || !xsks || bpf_map__set_max_entries(xsks, dev->nic_queues)) {
        bpf_object__close(obj);
        return -EINVAL;
    }
    if (dev->fragments)
        bpf_program__set_flags(bpf_object__find_program_by_name(obj, RB_XDP_PROGRAM), BPF_F_XDP_HAS_FRAGS);
    *out = obj;
    return 0;
}

static int attach_dispatched(struct rb_xdp *dev, bool native)
{
    DECLARE_LIBXDP_OPTS(xdp_program_opts, opts, .prog_name = RB_XDP_PROGRAM);
    struct rb_prog *p = &dev->prog;
    int r = open_object(dev, &p->object);

    if (r)
        return r;
    opts.obj = p->object;
    p->libxdp = xdp_program__create(&opts);
    r = (int)libxdp_get_error(p->libxdp);
    if (r) {
        p->libxdp = NULL;
        return r;
    }
    r = xdp_program__attach(p->libxdp, dev->ifindex, native ? XDP_MODE_NATIVE : XDP_MODE_SKB, 0);
    if (r)
        return r;
    p->fd = xdp_program__fd(p->libxdp);
    p->id = xdp_program__id(p->libxdp);
    return 0;
}

static int attach_alone(struct rb_xdp *dev, bool native)
{
    struct rb_prog *p = &dev->prog;
    struct bpf_prog_info info = {0};
    uint32_t len = sizeof info;
    int r = open_object(dev, &p->object);

    if (r)
        return r;
    r = bpf_object__load(p->object);
    if (r)
        return r;
    p->fd = bpf_program__fd(bpf_object__find_program_by_name(p->object, RB_XDP_PROGRAM));
    if (bpf_obj_get_info_by_fd(p->fd, &info, &len))
        return -errno;
    p->id = info.id;
    return bpf_xdp_attach(dev->ifindex, p->fd,
                          (native ? XDP_FLAGS_DRV_MODE : XDP_FLAGS_SKB_MODE) | XDP_FLAGS_UPDATE_IF_NOEXIST, NULL);
}

static int attach_mode(struct rb_xdp *dev, bool native, bool dispatch, bool alone)
{
    struct rb_prog *p = &dev->prog;
    int r = -ENOTSUP;

    rb_xdp_forget();
    if (dispatch && (r = attach_dispatched(dev, native)))
        drop_try(p);
    if (r && alone && (r = attach_alone(dev, native)))
        drop_try(p);
    if (r)
        return r;
    p->native = native;
    p->frags = dev->fragments;
    p->attached = true;
    find_maps(p);
    /* libxdp falls back to attaching a program alone without saying so: then ours is the interface's own. */
    uint32_t main_id = 0;
    p->dispatched = p->libxdp && !bpf_xdp_query_id(dev->ifindex, 0, &main_id) && main_id != p->id;
    return 0;
}

/* What libbpf or libxdp said, else the errno in words. */
static const char *reason(int code)
{
    return rb_xdp_complaint() ? rb_xdp_complaint() : strerror(code);
}

static const char *mode_option(uint32_t xdp_flags)
{
    return xdp_flags == XDP_FLAGS_SKB_MODE ? "xdpgeneric" : xdp_flags == XDP_FLAGS_HW_MODE ? "xdpoffload" : "xdpdrv";
}

static const char *mode_word(uint32_t xdp_flags)
{
    return xdp_flags == XDP_FLAGS_SKB_MODE ? "generic" : xdp_flags == XDP_FLAGS_HW_MODE ? "hardware" : "driver";
}

/* Another program has the interface and is not a dispatcher that makes room. */
static int fail_occupied(struct rb_xdp *dev, const struct scan *s, struct rb_xdp_error *err)
{
    const struct found *f = &s->found[0];

    if (f->ours) {
        rb_xdp_fail(err, -EBUSY, "process %u already receives from %s, and without libxdp's dispatcher only one can",
                    f->owner.pid, dev->ifname);
        rb_xdp_cure(err, "stop process %u, or let one process open all queues (zc:%s)", f->owner.pid, dev->ifname);
        if (err)
            err->holder = (int32_t)f->owner.pid;
    } else {
        rb_xdp_fail(err, -EBUSY, "%s already has the XDP program \"%s\" (id %u, %s mode), which leaves no room for others",
                    dev->ifname, s->name, s->id, mode_word(s->xdp_flags));
        rb_xdp_cure(err, "stop its owner, or take it off: ip link set dev %s %s off (bpftool net lists programs)",
                    dev->ifname, mode_option(s->xdp_flags));
    }
    return -EBUSY;
}

/* Attach in the best permitted mode. With a dispatcher there already, its mode is the only one possible. */
int rb_prog_attach(struct rb_xdp *dev, bool may_native, bool may_generic, struct rb_xdp_error *err)
{
    struct quiet q = rb_xdp_hush();
    struct scan s;
    bool native = false, have_bpffs;
    char why[320] = "";
    int r = rb_xdp_remove_stale(dev->ifindex, &s);

    if (r == -EPERM || r == -EACCES) {
        rb_xdp_fail_permission(err, "look at the XDP program of an interface");
        goto out;
    }
    if (r < 0) {
        rb_xdp_fail(err, r, "the XDP program left on %s by a dead process could not be taken off: %s", dev->ifname,
                    reason(-r));
        rb_xdp_cure(err, "ip link set dev %s %s off", dev->ifname, mode_option(s.xdp_flags));
        goto out;
    }
    rb_xdp_sweep_pins();
    for (uint32_t i = 0; i < s.n; i++)
        for (uint32_t k = 0; k < dev->n; k++)
            if (s.found[i].ours && rb_xdp_owns_queue(&s.found[i].owner, dev->sock[k].queue)) {
                const struct rb_xdp_owner *o = &s.found[i].owner;

                r = rb_xdp_fail_held(err, dev->ifname, dev->sock[k].queue,
                                     o->pid_ns == rb_xdp_pid_namespace() ? (int)o->pid : 0);
                goto out;
            }
    if (s.id && (!s.dispatcher || s.xdp_flags == XDP_FLAGS_HW_MODE)) {
        r = fail_occupied(dev, &s, err);
        goto out;
    }
    have_bpffs = rb_xdp_bpffs() != NULL;
    if (s.id) {
        const char *other = s.n ? s.found[0].name : s.name;
        bool is_native = s.xdp_flags == XDP_FLAGS_DRV_MODE;

        if (!(is_native ? may_native : may_generic)) {
            r = rb_xdp_fail(err, -EBUSY, "%s already runs the XDP program \"%s\" in %s mode, so ours can have no other",
                            dev->ifname, other, mode_word(s.xdp_flags));
            rb_xdp_cure(err, "leave the mode open, or stop the owner of \"%s\" first", other);
            goto out;
        }
        if (!have_bpffs) {
            r = rb_xdp_fail(err, -EBUSY, "%s runs the XDP program \"%s\", and without bpffs ours cannot go beside it",
                            dev->ifname, other);
            rb_xdp_cure(err, "mount -t bpf bpf /sys/fs/bpf");
            goto out;
        }
        may_native = is_native;
        may_generic = !is_native;
    }

    r = -EOPNOTSUPP;
    if (dev->opt.flags & RB_XDP_METADATA) {
        r = s.id ? -EBUSY : !may_native ? -EOPNOTSUPP : rb_prog_attach_bound(dev);
        if (!r)
            goto out;
        rb_xdp_note(dev, "no receive time and hash from the driver: %s", s.id ? "another program is on the interface" :
                    r == -EOPNOTSUPP || r == -EINVAL ? "the driver gives none" : reason(-r));
        rb_xdp_forget();
    }
    r = -EOPNOTSUPP;
    if (may_native) {
        r = attach_mode(dev, true, have_bpffs, !s.id);
        native = !r;
        if (r)
            snprintf(why, sizeof why, "no driver mode: %s", r == -ERANGE ? "the MTU is too large for it" :
                     r == -EOPNOTSUPP ? "the driver has none" : reason(-r));
    }
    if (r && r != -EPERM && r != -EACCES && may_generic)
        r = attach_mode(dev, false, have_bpffs, !s.id);
    if (!r) {
        if (!native && why[0])
            rb_xdp_note(dev, "%s", why);
        if (!dev->prog.dispatched)
            rb_xdp_note(dev, "alone on the interface: %s",
                        !have_bpffs ? "no bpffs for libxdp's dispatcher" :
                        rb_xdp_complaint() ? rb_xdp_complaint() : "libxdp's dispatcher could not be loaded");
    } else if (r == -EPERM || r == -EACCES) {
        rb_xdp_fail_permission(err, "load an XDP program");
    } else if (!s.id && !rb_xdp_scan(dev->ifindex, &s) && s.id) { /* somebody was faster */
        fail_occupied(dev, &s, err);
    } else if (s.id) {
        rb_xdp_fail(err, r, "ours cannot go beside the XDP program \"%s\" on %s: %s", s.n ? s.found[0].name : s.name,
                    dev->ifname, reason(-r));
        rb_xdp_cure(err, "use the mount namespace of its owner (ip netns exec makes a new one), where libxdp's files are, "
                         "or stop it");
    } else {
        rb_xdp_fail(err, r, "no XDP program can be attached to %s: %s", dev->ifname,
                    why[0] && !may_generic ? why : reason(-r));
        rb_xdp_cure(err, "%s", may_native && !may_generic ?
                    "allow generic mode, or another interface" : "ringbar doctor says what this kernel lacks");
    }
out:
    rb_xdp_unhush(q);
    return r;
}

void rb_prog_detach(struct rb_xdp *dev)
{
    struct rb_prog *p = &dev->prog;
    struct quiet q = rb_xdp_hush();
    int r = 0;

    if (p->attached && p->libxdp)
        r = xdp_program__detach(p->libxdp, dev->ifindex, p->native ? XDP_MODE_NATIVE : XDP_MODE_SKB, 0);
    if (p->attached && (!p->libxdp || r)) { /* alone, or libxdp lost its files: see what the kernel says */
        struct scan s;

        if (!rb_xdp_scan(dev->ifindex, &s)) {
            for (uint32_t i = 0; i < s.n; i++)
                if (s.found[i].id == p->id && s.n == 1)
                    rb_xdp_detach_main(dev->ifindex, &s);
                else if (s.found[i].id == p->id)
                    rb_xdp_detach_part(dev->ifindex, p->id);
        }
    }
    drop_try(p);
    rb_xdp_unhush(q);
}

int rb_prog_take(struct rb_xdp *dev, uint32_t queue, int fd)
{
    return bpf_map_update_elem(dev->prog.map_fd, &queue, &fd, BPF_ANY) ? -errno : 0;
}

void rb_prog_give_up(struct rb_xdp *dev, uint32_t queue)
{
    bpf_map_delete_elem(dev->prog.map_fd, &queue);
}
