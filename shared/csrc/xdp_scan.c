/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Finding XDP programs on an interface, and removing those of ours whose process is dead.
 *
 * What is attached is read from the kernel, not from files: the interface's program, and when that is libxdp's
 * dispatcher the links that point at it. So a dispatcher whose bpffs is not visible here (it was mounted in another
 * mount namespace, or is gone with it) is still understood. Each of our programs carries the record of xdp_owner.h;
 * one whose process is dead is *stale* and is removed by the next open or cleanup.
 */
#define _GNU_SOURCE
#include <bpf/bpf.h>
#include <dirent.h>
#include <errno.h>
#include <linux/if_link.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "xdp_prog.h"

#define DISPATCHER "xdp_dispatcher"

/* ---- what libbpf and libxdp have to say ---- */

static _Thread_local char complaint[256];

static void keep(const char *fmt, va_list ap)
{
    if (complaint[0])
        return; /* what follows are consequences */
    vsnprintf(complaint, sizeof complaint, fmt, ap);
    complaint[strcspn(complaint, "\n")] = 0;
}

static int quiet_libbpf(enum libbpf_print_level level, const char *fmt, va_list ap)
{
    if (level == LIBBPF_WARN)
        keep(fmt, ap);
    return 0;
}

static int quiet_libxdp(enum libxdp_print_level level, const char *fmt, va_list ap)
{
    if (level == LIBXDP_WARN)
        keep(fmt, ap);
    return 0;
}

struct quiet rb_xdp_hush(void)
{
    complaint[0] = 0;
    return (struct quiet){libbpf_set_print(quiet_libbpf), libxdp_set_print(quiet_libxdp)};
}

void rb_xdp_unhush(struct quiet q)
{
    libbpf_set_print(q.libbpf);
    libxdp_set_print(q.libxdp);
}

const char *rb_xdp_complaint(void)
{
    return complaint[0] ? complaint : NULL;
}

void rb_xdp_forget(void)
{
    complaint[0] = 0;
}

/* ---- who owns a program ---- */

uint64_t rb_xdp_pid_namespace(void)
{
    struct stat st;

    return stat("/proc/self/ns/pid", &st) ? 0 : st.st_ino;
}

/* Start time of a process in clock ticks since boot, 0 when it does not exist; *zombie: dead but not yet waited for. */
static uint64_t start_time(uint32_t pid, bool *zombie)
{
    char path[32], text[1024];
    unsigned long long start = 0;
    char state = 0;
    FILE *f;

    *zombie = false;
    snprintf(path, sizeof path, "/proc/%u/stat", pid);
    f = fopen(path, "re");
    if (!f)
        return 0;
    size_t n = fread(text, 1, sizeof text - 1, f);
    fclose(f);
    text[n] = 0;
    char *after = strrchr(text, ')'); /* the name in front may hold anything */
    if (!after || sscanf(after + 1, " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu",
                         &state, &start) != 2)
        return 0;
    *zombie = state == 'Z' || state == 'X';
    return start;
}

void rb_xdp_record(struct rb_xdp_owner *o, int ifindex)
{
    bool zombie;

    *o = (struct rb_xdp_owner){
        .magic = RB_XDP_OWNER_MAGIC,
        .pid = (uint32_t)getpid(),
        .pid_ns = rb_xdp_pid_namespace(),
        .ifindex = (uint32_t)ifindex,
    };
    o->start_time = start_time(o->pid, &zombie);
}

bool rb_xdp_owns_queue(const struct rb_xdp_owner *o, uint32_t queue)
{
    return queue < RB_XDP_MAX_QUEUES && (o->queues[queue / 64] >> (queue % 64) & 1);
}

/* A dead owner's pid does not exist or started later. In another pid namespace, or for a zombie, the pid says nothing:
 * then the program lives as long as one of its queues has a socket. */
static bool is_stale(const struct rb_xdp_owner *o, int ifindex)
{
    bool zombie = false;

    if (o->pid_ns == rb_xdp_pid_namespace()) {
        if (start_time(o->pid, &zombie) != o->start_time)
            return true;
        if (!zombie)
            return false;
    }
    for (uint32_t q = 0; q < RB_XDP_MAX_QUEUES; q++)
        if (rb_xdp_owns_queue(o, q) && rb_xdp_probe("", ifindex, q, zombie ? 500 : 0, NULL) == -EBUSY)
            return false;
    return true;
}

static bool read_owner(const struct bpf_prog_info *info, const uint32_t *maps, struct rb_xdp_owner *out)
{
    for (uint32_t i = 0; i < info->nr_map_ids; i++) {
        struct bpf_map_info map = {0};
        uint32_t len = sizeof map, key = 0;
        int fd = bpf_map_get_fd_by_id(maps[i]);
        bool good = false;

        if (fd < 0)
            continue;
        if (!bpf_obj_get_info_by_fd(fd, &map, &len) && map.type == BPF_MAP_TYPE_ARRAY &&
            map.value_size >= sizeof *out) {
            uint8_t *value = calloc(1, map.value_size);

            if (value && !bpf_map_lookup_elem(fd, &key, value)) {
                memcpy(out, value, sizeof *out);
                good = out->magic == RB_XDP_OWNER_MAGIC;
            }
            free(value);
        }
        close(fd);
        if (good)
            return true;
    }
    return false;
}

/* ---- what is attached ---- */

static int look_at(int fd, int ifindex, struct found *f)
{
    uint32_t maps[8] = {0};
    struct bpf_prog_info info = {.nr_map_ids = 8, .map_ids = (uintptr_t)maps};
    uint32_t len = sizeof info;

    memset(f, 0, sizeof *f);
    if (bpf_obj_get_info_by_fd(fd, &info, &len))
        return -errno;
    if (info.nr_map_ids > 8)
        info.nr_map_ids = 8;
    f->id = info.id;
    memcpy(f->name, info.name, sizeof f->name - 1);
    f->ours = !strncmp(f->name, RB_XDP_PROGRAM, BPF_OBJ_NAME_LEN - 1) && read_owner(&info, maps, &f->owner);
    f->stale = f->ours && is_stale(&f->owner, ifindex);
    return 0;
}

/* Fill *s; 0 or -errno. -EPERM: something is attached and we may not look at it. */
static int look(int ifindex, struct scan *s)
{
    LIBBPF_OPTS(bpf_xdp_query_opts, q);
    int r, fd;

    memset(s, 0, sizeof *s);
    r = bpf_xdp_query(ifindex, 0, &q);
    if (r)
        return r;
    switch (q.attach_mode) {
    case XDP_ATTACHED_NONE:
        return 0;
    case XDP_ATTACHED_SKB:
        s->id = q.skb_prog_id;
        s->xdp_flags = XDP_FLAGS_SKB_MODE;
        break;
    case XDP_ATTACHED_HW:
        s->id = q.hw_prog_id;
        s->xdp_flags = XDP_FLAGS_HW_MODE;
        break;
    default: /* driver mode; with "multi" (driver and hardware) the driver's is the one we could sit beside */
        s->id = q.drv_prog_id ? q.drv_prog_id : q.prog_id;
        s->xdp_flags = XDP_FLAGS_DRV_MODE;
    }
    fd = bpf_prog_get_fd_by_id(s->id);
    if (fd < 0)
        return errno == ENOENT ? -EAGAIN : -errno;
    r = look_at(fd, ifindex, &s->found[0]);
    close(fd);
    if (r)
        return r;
    memcpy(s->name, s->found[0].name, sizeof s->name);
    s->dispatcher = !strcmp(s->name, DISPATCHER);
    s->n = !s->dispatcher;
    for (uint32_t id = 0; s->dispatcher && s->n < RB_XDP_MAX_FOUND && !bpf_link_get_next_id(id, &id);) {
        struct bpf_link_info info = {0};
        uint32_t len = sizeof info;

        fd = bpf_link_get_fd_by_id(id);
        if (fd < 0)
            continue;
        r = bpf_obj_get_info_by_fd(fd, &info, &len);
        close(fd);
        if (r || info.type != BPF_LINK_TYPE_TRACING || info.tracing.target_obj_id != s->id)
            continue;
        fd = bpf_prog_get_fd_by_id(info.prog_id);
        if (fd < 0)
            continue;
        if (!look_at(fd, ifindex, &s->found[s->n]))
            s->n++;
        close(fd);
    }
    return 0;
}

/* A program that appears and disappears while we look: look again. */
int rb_xdp_scan(int ifindex, struct scan *s)
{
    int r = 0;

    for (int i = 0; i < 10 && (r = look(ifindex, s)) == -EAGAIN; i++)
        rb_xdp_pause(1);
    return r;
}

bool rb_prog_attached(int ifindex)
{
    struct quiet q = rb_xdp_hush();
    struct scan s;
    bool any = false;

    if (!rb_xdp_scan(ifindex, &s))
        for (uint32_t i = 0; i < s.n; i++)
            any |= s.found[i].ours;
    rb_xdp_unhush(q);
    return any;
}

int rb_prog_holder(int ifindex, uint32_t queue, uint32_t but_not)
{
    struct quiet q = rb_xdp_hush();
    struct scan s;
    int pid = 0;

    if (!rb_xdp_scan(ifindex, &s))
        for (uint32_t i = 0; i < s.n; i++)
            if (s.found[i].ours && !s.found[i].stale && s.found[i].id != but_not && rb_xdp_owns_queue(&s.found[i].owner, queue) &&
                s.found[i].owner.pid_ns == rb_xdp_pid_namespace())
                pid = (int)s.found[i].owner.pid;
    rb_xdp_unhush(q);
    return pid;
}

/* ---- bpffs, where libxdp keeps the dispatcher's parts ---- */

static bool is_bpffs(const char *dir)
{
    struct statfs fs;

    return !statfs(dir, &fs) && fs.f_type == BPF_FS_MAGIC;
}

/* The bpffs that libxdp will use, mounted when that is permitted; NULL when there is none. */
const char *rb_xdp_bpffs(void)
{
    const char *dir = getenv("LIBXDP_BPFFS");

    if (dir)
        return is_bpffs(dir) ? dir : NULL;
    dir = "/sys/fs/bpf";
    if (!is_bpffs(dir) && mount("bpf", dir, "bpf", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0700"))
        return NULL;
    return is_bpffs(dir) ? dir : NULL;
}

static void remove_pins(const char *dir)
{
    DIR *d = opendir(dir);
    struct dirent *e;
    char path[512];

    if (!d)
        return;
    while ((e = readdir(d)))
        if (e->d_name[0] != '.' && snprintf(path, sizeof path, "%s/%s", dir, e->d_name) < (int)sizeof path)
            unlink(path);
    closedir(d);
    rmdir(dir);
}

/* Every program pinned in this directory is ours and stale (and there is at least one). */
static bool all_pins_stale(const char *dir, int ifindex)
{
    DIR *d = opendir(dir);
    struct dirent *e;
    char path[512];
    unsigned stale = 0, other = 0;

    if (!d)
        return false;
    while ((e = readdir(d))) {
        const char *end = strrchr(e->d_name, '-');
        struct found f;
        int fd;

        if (!end || strcmp(end, "-prog") || strncmp(e->d_name, "prog", 4) ||
            snprintf(path, sizeof path, "%s/%s", dir, e->d_name) >= (int)sizeof path)
            continue;
        fd = bpf_obj_get(path);
        if (fd < 0 || look_at(fd, ifindex, &f) || !f.stale)
            other++;
        else
            stale++;
        if (fd >= 0)
            close(fd);
    }
    closedir(d);
    return stale && !other;
}

/* Directories of dispatchers whose every part is a stale program of ours: the interface may be long gone, or in another
 * network namespace, where the dispatcher without parts then just passes. */
void rb_xdp_sweep_pins(void)
{
    const char *fs = rb_xdp_bpffs();
    char base[256], dir[512];
    struct dirent *e;
    int ifindex;
    unsigned id;
    DIR *d;

    if (!fs)
        return;
    snprintf(base, sizeof base, "%s/xdp", fs);
    d = opendir(base);
    if (!d)
        return;
    while ((e = readdir(d)))
        if (sscanf(e->d_name, "dispatch-%d-%u", &ifindex, &id) == 2 &&
            snprintf(dir, sizeof dir, "%s/%s", base, e->d_name) < (int)sizeof dir && all_pins_stale(dir, ifindex))
            remove_pins(dir);
    closedir(d);
}

/* ---- taking away ---- */

/* Take the interface's own program off, if it is still the one with this id, and forget a dispatcher's pins. */
int rb_xdp_detach_main(int ifindex, const struct scan *s)
{
    LIBBPF_OPTS(bpf_xdp_attach_opts, opts);
    const char *fs = rb_xdp_bpffs();
    char dir[300];
    int r;

    opts.old_prog_fd = bpf_prog_get_fd_by_id(s->id);
    if (opts.old_prog_fd < 0)
        return errno == ENOENT ? 0 : -errno;
    r = bpf_xdp_detach(ifindex, s->xdp_flags | XDP_FLAGS_REPLACE, &opts);
    close(opts.old_prog_fd);
    if (!r && s->dispatcher && fs) {
        snprintf(dir, sizeof dir, "%s/xdp/dispatch-%d-%u", fs, ifindex, s->id);
        remove_pins(dir);
    }
    return r;
}

/* Take one program out of a dispatcher that others use: libxdp builds a new dispatcher without it. */
int rb_xdp_detach_part(int ifindex, uint32_t id)
{
    struct xdp_multiprog *mp = xdp_multiprog__get_from_ifindex(ifindex);
    struct xdp_program *p = NULL;
    int r = (int)libxdp_get_error(mp);

    if (r)
        return r;
    r = -ENOENT;
    while ((p = xdp_multiprog__next_prog(p, mp)))
        if (xdp_program__id(p) == id) {
            r = xdp_program__detach(p, ifindex, xdp_multiprog__attach_mode(mp), 0);
            break;
        }
    xdp_multiprog__close(mp);
    return r;
}

/* Remove what dead processes left; how many programs. *s is fresh afterwards. */
int rb_xdp_remove_stale(int ifindex, struct scan *s)
{
    int removed = 0;

    for (int round = 0; round < RB_XDP_MAX_FOUND; round++) {
        uint32_t stale = 0, first = 0;
        int r = rb_xdp_scan(ifindex, s);

        if (r || !s->id)
            return r ? r : removed;
        for (uint32_t i = 0; i < s->n; i++)
            if (s->found[i].stale && !stale++)
                first = s->found[i].id;
        if (stale == s->n) { /* all of it; or a dispatcher with nothing behind it any more */
            r = rb_xdp_detach_main(ifindex, s);
            removed += (int)stale;
        } else if (stale) {
            r = rb_xdp_detach_part(ifindex, first);
            removed++;
        } else {
            return removed;
        }
        if (r)
            return r;
    }
    return removed;
}

int rb_prog_cleanup(const char *ifname, int ifindex, struct rb_xdp_error *err)
{
    struct quiet q = rb_xdp_hush();
    struct scan s;
    int r = rb_xdp_remove_stale(ifindex, &s);

    rb_xdp_sweep_pins();
    rb_xdp_unhush(q);
    if (r == -EPERM || r == -EACCES)
        return rb_xdp_fail_permission(err, "look at the XDP program of an interface");
    if (r < 0)
        return rb_xdp_fail(err, r, "a left-over XDP program could not be taken off %s: %s", ifname,
                           complaint[0] ? complaint : strerror(-r));
    return r;
}
