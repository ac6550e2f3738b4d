/* SPDX-License-Identifier: Apache-2.0 */
/* Which packets our program takes: its steering rules, set and replaced while packets flow, and what it leaves to the stack. */
#define _GNU_SOURCE
#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <errno.h>
#include <linux/if_link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "xdp_prog.h"
#include "xdp_rule.h"

#define LOG_BYTES 65536u
#define XDP_DEV_BOUND_ONLY (1u << 6) /* kernel 6.3: BPF_F_XDP_DEV_BOUND_ONLY */

static int load(const struct code *code, bool frags, int attach_type, char *log)
{
    LIBBPF_OPTS(bpf_prog_load_opts, opts, .expected_attach_type = attach_type, .prog_flags = frags ? BPF_F_XDP_HAS_FRAGS : 0, .log_buf = log,
                .log_size = log ? LOG_BYTES : 0, .log_level = log ? 1 : 0);
    int fd = bpf_prog_load(BPF_PROG_TYPE_XDP, "ringbar_rule", "Dual BSD/GPL", code->insn, code->n, &opts);

    return fd < 0 ? -errno : fd;
}

static int throw_switch(struct rb_prog *p, uint32_t on)
{
    uint32_t key = 0;

    return bpf_map_update_elem(p->switch_fd, &key, &on, BPF_ANY) ? -errno : 0;
}

/* The program is loaded as the one that it belongs to was: of the attach type, kernels differ in whether they compare it. */
static int put_in_place(struct rb_prog *p, const struct code *code, struct rb_xdp_error *err)
{
    static const int types[] = {BPF_XDP, 0};
    uint32_t key = 0;
    int r = -EINVAL;

    for (unsigned i = 0; i < 2 && r == -EINVAL; i++) {
        int fd = load(code, p->frags, types[i], NULL);

        if (fd < 0) {
            r = fd;
            continue;
        }
        r = bpf_map_update_elem(p->rules_fd, &key, &fd, BPF_ANY) ? -errno : 0;
        close(fd); /* the map holds it */
    }
    if (r == -EPERM || r == -EACCES) {
        char *log = calloc(1, LOG_BYTES); /* the verifier says EACCES too */
        int fd = log ? load(code, p->frags, BPF_XDP, log) : -1;
        char *last = log && log[0] ? log : NULL;

        if (fd >= 0)
            close(fd);
        if (!last) {
            free(log);
            return rb_xdp_fail_permission(err, "load a steering rule");
        }
        rb_xdp_fail(err, -EINVAL, "the kernel refuses the steering rule: %.300s", last);
        free(log);
        return -EINVAL;
    }
    if (r) {
        rb_xdp_fail(err, r, "the kernel refuses the steering rule: %s", strerror(-r));
        rb_xdp_cure(err, "write it simpler, or take all and filter it (--filter)");
    }
    return r;
}

/* ---- a program for one interface alone, with what its driver knows of each packet ---- */

static int load_bound(struct rb_xdp *dev, const struct code *code)
{
    LIBBPF_OPTS(bpf_prog_load_opts, opts, .expected_attach_type = BPF_XDP, .prog_ifindex = (uint32_t)dev->ifindex,
                .prog_flags = XDP_DEV_BOUND_ONLY | (dev->prog.frags ? BPF_F_XDP_HAS_FRAGS : 0));
    int fd = bpf_prog_load(BPF_PROG_TYPE_XDP, RB_XDP_PROGRAM, "Dual BSD/GPL", code->insn, code->n, &opts);

    return fd < 0 ? -errno : fd;
}

/* The new program in the old one's place: one step for the interface. */
static int steer_bound(struct rb_xdp *dev, const struct rb_xdp_rule *rules, uint32_t n, struct rb_xdp_error *err)
{
    struct rb_prog *p = &dev->prog;
    struct rule_maps maps = {.xsks = p->map_fd, .passed = p->passed_fd, .frags = p->frags, .owner = p->owner_fd, .rx_time = p->rx_time, .rx_hash = p->rx_hash};
    LIBBPF_OPTS(bpf_xdp_attach_opts, opts, .old_prog_fd = p->fd);
    struct bpf_prog_info info = {0};
    uint32_t len = sizeof info;
    struct code code;
    int fd, r = rb_rule_translate(&code, rules, n, &maps, err);

    if (r)
        return r;
    struct quiet q = rb_xdp_hush();
    fd = load_bound(dev, &code);
    rb_code_free(&code);
    if (fd < 0 || bpf_obj_get_info_by_fd(fd, &info, &len))
        r = fd < 0 ? fd : -errno;
    else if (!p->attached)
        r = bpf_xdp_attach(dev->ifindex, fd, XDP_FLAGS_DRV_MODE | XDP_FLAGS_UPDATE_IF_NOEXIST, NULL);
    else
        r = bpf_xdp_attach(dev->ifindex, fd, XDP_FLAGS_DRV_MODE | XDP_FLAGS_REPLACE, &opts);
    rb_xdp_unhush(q);
    if (r) {
        if (fd >= 0)
            close(fd);
        rb_xdp_fail(err, r, "the kernel refuses the steering rule: %s", strerror(-r));
        rb_xdp_cure(err, "write it simpler, or take all and filter it (--filter)");
        return r;
    }
    if (p->fd >= 0)
        close(p->fd);
    p->fd = fd;
    p->id = info.id;
    p->attached = p->native = true;
    return 0;
}

void rb_prog_close_bound(struct rb_prog *p)
{
    int *fds[] = {&p->fd, &p->map_fd, &p->passed_fd, &p->owner_fd};

    for (unsigned i = 0; i < 4; i++)
        if (*fds[i] >= 0)
            close(*fds[i]);
    p->bound = false;
}

int rb_prog_attach_bound(struct rb_xdp *dev)
{
    struct rb_prog *p = &dev->prog, before = *p;
    struct rb_xdp_owner owner;
    struct btf *btf = btf__load_vmlinux_btf();
    uint32_t key = 0;
    int r = -EOPNOTSUPP, time = btf ? btf__find_by_name_kind(btf, "bpf_xdp_metadata_rx_timestamp", BTF_KIND_FUNC) : -1,
        hash = btf ? btf__find_by_name_kind(btf, "bpf_xdp_metadata_rx_hash", BTF_KIND_FUNC) : -1;

    btf__free(btf);
    if (time <= 0 || hash <= 0)
        return r; /* they came with kernel 6.3 */
    *p = (struct rb_prog){.fd = -1, .rules_fd = -1, .switch_fd = -1, .bound = true, .frags = dev->fragments, .rx_time = time, .rx_hash = hash};
    p->map_fd = bpf_map_create(BPF_MAP_TYPE_XSKMAP, "ringbar_xsks", 4, 4, dev->nic_queues, NULL);
    p->passed_fd = bpf_map_create(BPF_MAP_TYPE_PERCPU_ARRAY, "ringbar_passed", 4, 8, 1, NULL);
    p->owner_fd = bpf_map_create(BPF_MAP_TYPE_ARRAY, "ringbar_owner", 4, sizeof owner, 1, NULL);
    rb_prog_record(dev, &owner);
    if (p->map_fd < 0 || p->passed_fd < 0 || p->owner_fd < 0 || bpf_map_update_elem(p->owner_fd, &key, &owner, BPF_ANY))
        r = -errno;
    else
        r = steer_bound(dev, NULL, 0, NULL);
    if (r) {
        rb_prog_close_bound(p);
        *p = before;
    }
    return r;
}

/* ---- rules ---- */

int rb_prog_steer(struct rb_xdp *dev, const struct rb_xdp_rule *rules, uint32_t n, struct rb_xdp_error *err)
{
    struct rb_prog *p = &dev->prog;
    struct rule_maps maps = {.xsks = p->map_fd, .passed = p->passed_fd, .frags = p->frags};
    struct quiet q;
    struct code code;
    int r;

    if (!p->attached)
        return rb_xdp_fail(err, -EINVAL, "%s was opened for sending, and a steering rule is for receiving", dev->ifname);
    if (p->bound)
        return steer_bound(dev, rules, n, err);
    if (!n) { /* the old rules stay where they are, for packets that have passed the switch */
        r = throw_switch(p, 0);
        return r ? rb_xdp_fail(err, r, "the steering rule of %s cannot be taken away: %s", dev->ifname, strerror(-r)) : 0;
    }
    r = rb_rule_translate(&code, rules, n, &maps, err);
    if (r)
        return r;
    q = rb_xdp_hush();
    r = put_in_place(p, &code, err);
    rb_xdp_unhush(q);
    rb_code_free(&code);
    if (!r && (r = throw_switch(p, 1)))
        rb_xdp_fail(err, r, "the steering rule of %s cannot be set: %s", dev->ifname, strerror(-r));
    return r;
}

/* Every processor counts for itself. */
uint64_t rb_prog_passed(struct rb_xdp *dev)
{
    int n = dev->prog.attached ? libbpf_num_possible_cpus() : 0;
    uint64_t *each = n > 0 ? calloc((size_t)n, sizeof *each) : NULL, sum = 0;
    uint32_t key = 0;

    if (each && !bpf_map_lookup_elem(dev->prog.passed_fd, &key, each))
        for (int i = 0; i < n; i++)
            sum += each[i];
    free(each);
    return sum;
}
