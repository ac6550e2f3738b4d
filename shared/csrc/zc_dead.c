/* SPDX-License-Identifier: Apache-2.0
 * What zc: devices held when they were closed, or when their process died: the kernel lets go of it a little later, and then it is home. */
#include "rb_zc.h"

#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#define plugin rb_zc_plugin

struct of_device {
    uint32_t number;
    int found;
    uint64_t bit;
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
    } else if (rb_shared_word(w) && rb_unshare(s, at, rb_handle_of(s->c, at), d->bit)) {
        s->in_devices -= s->in_devices > 0;
        s->quiescing -= s->quiescing > 0;
    }
}

static void count_device(struct rb_server *s, uint32_t at, uint64_t w, void *arg)
{
    struct of_device *d = arg;
    d->found += (rb_shared_word(w) && rb_get(&s->masks[at]) & d->bit) || (RB_WORD_KIND(w) == RB_W_DEVICE && RB_WORD_LEG(w) == d->number) ||
                (RB_WORD_SUBKIND(w) == RB_W_DEVICE && RB_WORD_SUBLEG(w) == d->number);
}

void rb_zc_home(struct rb_server *s, uint32_t number)
{
    struct of_device d = {.number = number, .bit = rb_device_bit(s, number, false)};
    rb_each_written(s, home_word, &d);
    rb_device_unbit(s, number);
}

uint32_t rb_zc_held(struct rb_server *s, uint32_t number)
{
    struct of_device d = {.number = number, .bit = rb_device_bit(s, number, false)};
    rb_each_written(s, count_device, &d);
    return (uint32_t)d.found;
}

/* ---- where its interface is -------------------------------------------------------------------------------------------- */

static int is_netns(int dir, const char *path, uint64_t wanted)
{
    struct stat st;
    return fstatat(dir, path, &st, 0) == 0 && st.st_ino == wanted;
}

/* A descriptor of the network namespace with this inode, by the names that `ip netns` gives or by a process in it; -1: there is none any more. */
static int find_netns(uint64_t wanted)
{
    static const char *const places[] = {"/run/netns", "/proc"};
    int fd = -1;
    for (unsigned p = 0; p < 2 && fd < 0; p++) {
        DIR *d = opendir(places[p]);
        struct dirent *e;
        while (d && fd < 0 && (e = readdir(d))) {
            char path[300];
            if (e->d_name[0] == '.' || (p == 1 && (e->d_name[0] < '0' || e->d_name[0] > '9')))
                continue;
            snprintf(path, sizeof path, p ? "%.255s/ns/net" : "%.255s", e->d_name);
            if (is_netns(dirfd(d), path, wanted))
                fd = openat(dirfd(d), path, O_RDONLY | O_CLOEXEC);
        }
        if (d)
            closedir(d);
    }
    return fd;
}

/* Call `what` for each NIC queue of a device, in the device's network namespace. What it says of the last, or -ENODEV: the namespace is gone. */
static int in_its_netns(const struct rb_device_record *r, const char *ifname, int (*what)(const char *ifname, uint32_t queue))
{
    int here = -1, there = -1, rc = 0;
    if (r->netns && !is_netns(AT_FDCWD, "/proc/thread-self/ns/net", r->netns)) {
        here = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
        there = find_netns(r->netns);
        if (there < 0)
            rc = -ENODEV;
        else if (here < 0 || setns(there, CLONE_NEWNET) < 0)
            rc = -EBUSY; /* may not look: they rest */
    }
    for (uint32_t q = 0; q < r->nic_queues && rc == 0; q++)
        rc = what(ifname, r->nic_queue + q);
    if (there >= 0) {
        setns(here, CLONE_NEWNET);
        close(there);
    }
    if (here >= 0)
        close(here);
    return rc;
}

static int release_queue(const char *ifname, uint32_t queue)
{
    struct rb_xdp_error err;
    plugin->cleanup(ifname, &err);
    return plugin->probe(ifname, queue, 200, &err);
}

static int clean_queue(const char *ifname, uint32_t queue)
{
    struct rb_xdp_error err;
    (void)queue;
    plugin->cleanup(ifname, &err);
    return -EALREADY; /* once is enough */
}

static void interface_of(const struct rb_device_record *r, char *ifname)
{
    snprintf(ifname, 16, "%.*s", (int)RB_MIN(strcspn(r->name, "@"), sizeof r->name - 1), r->name);
}

/* Buffers of devices that are closed, or whose process is dead: home when the kernel has let go of them. Recovery lock held. */
void rb_zc_release(struct rb_server *s)
{
    if (!s->quiescing || rb_zc_load() < 0)
        return;
    for (uint32_t i = 0; i < RB_MAX_DEVICES; i++) {
        struct rb_device_record *r = rb_zc_record(s->c, i);
        char ifname[16];
        bool open = false;
        if (!r->used || r->book != s->book + 1)
            continue;
        for (uint32_t e = 0; e < RB_MAX_ENDS && !s->acting && !open; e++) {
            const struct rb_zc *z = s->c->end[e] ? rb_zc_of(s->c->end[e]) : NULL;
            open = z && z->number == i;
        }
        interface_of(r, ifname);
        int rc = open ? -EBUSY : in_its_netns(r, ifname, release_queue);
        if (rc != 0 && rc != -ENODEV)
            continue;
        rb_zc_home(s, i);
        r->used = 0;
    }
}

/* Programs that dead processes left on interfaces, when their cluster goes. */
void rb_zc_clean_up(struct rb_state *state)
{
    for (uint32_t i = 0; i < RB_MAX_DEVICES; i++) {
        char ifname[16];
        if (!state->device[i].used || rb_zc_load() < 0)
            continue;
        interface_of(&state->device[i], ifname);
        in_its_netns(&state->device[i], ifname, clean_queue);
    }
}
