/* SPDX-License-Identifier: Apache-2.0
 *
 * A cluster's life: made, attached to, left, destroyed; and what can be asked about it.
 */
#include "hook.h"

#include <dirent.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- life and death */

static void remove_files(struct rb_state *state, uint32_t id)
{
    char path[PATH_MAX], target[PATH_MAX];
    for (uint32_t i = 0; i < RB_MAX_POOLS; i++)
        if (rb_get(&state->pool[i].state) && strncmp(state->pool[i].path, "/proc/", 6) != 0)
            unlink(state->pool[i].path);
    for (uint32_t i = 0; i < RB_MAX_LANES; i++)
        if (rb_get(&state->lane[i].state) != RB_SEG_FREE && strncmp(state->lane[i].path, "/proc/", 6) != 0)
            unlink(state->lane[i].path);
    rb_state_path(id, path, sizeof path);
    ssize_t n = readlink(path, target, sizeof target - 1);
    if (n > 0) {
        target[n] = 0;
        unlink(target);
    }
    unlink(path);
}

/* Say in every segment that it is over, then remove the files. Recovery lock held. */
static void destroy_locked(struct rb_registry *reg)
{
    struct rb_state *s = reg->state;
    for (uint32_t i = 0; i < RB_MAX_POOLS + RB_MAX_LANES; i++) {
        struct rb_segment_record *r = i < RB_MAX_POOLS ? &s->pool[i] : &s->lane[i - RB_MAX_POOLS];
        struct rb_mapping m = {0};
        if (rb_get(&r->state) == RB_SEG_FREE)
            continue;
        if (strncmp(r->path, "/proc/", 6) == 0) { /* sealed: it went with its last holder, and that path may be another file's by now */
            if (rb_segment_open(r->path, reg->id, i < RB_MAX_POOLS ? RB_KIND_POOL : RB_KIND_LANE, reg->generation, 1, &m, NULL) < 0)
                continue;
        } else if (rb_segment_map(r, &m) < 0) /* whatever its header says: a VM may have written there */
            continue;
        struct rb_header *h = m.base;
        rb_set(&h->state, RB_SEG_GONE);
        rb_store_release(&h->generation, 0);
        rb_unmap(&m);
    }
    rb_zc_clean_up(s);
    rb_hook_sweep();
    rb_set(&s->header.state, RB_SEG_GONE);
    remove_files(s, reg->id);
    rb_store_release(&s->header.generation, 0);
}

/* Is somebody using it, other than this process? Writes who. */
static int in_use(struct rb_registry *reg, int mine_too, char *who, size_t size)
{
    struct rb_state *s = reg->state;
    for (uint32_t q = 0; q < RB_MAX_QUEUES; q++)
        for (unsigned e = 0; e < 2 && s->queue[q].used; e++) {
            int32_t pid = rb_byte_holder(reg, RB_LOCK_END + 2 * q + e);
            if (pid && (mine_too || pid != (int32_t)getpid())) {
                snprintf(who, size, "process %d (%s) has queue %u@%u open", pid, s->queue[q].end[e].name, reg->id, q);
                return 1;
            }
        }
    for (uint32_t l = 0; l < RB_MAX_LANES; l++)
        if (rb_get(&s->lane[l].state) != RB_SEG_FREE && s->lane[l].vm[0]) {
            snprintf(who, size, "VM %s is attached", s->lane[l].vm);
            return 1;
        }
    return 0;
}

static uint64_t random_generation(void)
{
    uint64_t g = 0;
    while (!g)
        if (getrandom(&g, sizeof g, 0) != sizeof g)
            g = rb_now_ns();
    return g;
}

static int check_options(uint32_t id, struct rb_cluster_options *o)
{
    if (id > 65535)
        return rb_fail(EINVAL, "bad-number", "use 0 to 65535", "%u is no cluster number", id);
    if (!o->buffer_size)
        o->buffer_size = 2048;
    uint32_t size = o->buffer_size;
    if (size < 256 || size > 16384 || (size & (size - 1))) {
        uint32_t near = size <= 256 ? 256 : size >= 16384 ? 16384 : (uint32_t)rb_pow2(size);
        if (near > 256 && near - size > size - near / 2)
            near /= 2;
        rb_fail(EINVAL, "bad-size", NULL, "buffers of %u bytes cannot be had: powers of two from 256 to 16384 can", size);
        return rb_cure(EINVAL, "--size %u is the nearest", near);
    }
    if (!o->slots)
        o->slots = 4096;
    uint64_t sum = (uint64_t)o->queues * (o->slots + 2 * RB_BURST);
    if (o->queues > RB_MAX_QUEUES)
        return rb_fail(EINVAL, "too-many-queues", NULL, "%u queues are too many: a cluster has at most %u", o->queues, RB_MAX_QUEUES);
    if (!o->buffers) {
        uint64_t want = rb_pow2(RB_MAX(65536u, sum + 16384));
        o->buffers = (uint32_t)RB_MIN(want, RB_MAX_BUFFERS);
    }
    if (o->buffers < 2 * RB_EXTENT || o->buffers > RB_MAX_BUFFERS) {
        rb_fail(EINVAL, "bad-size", NULL, "%u buffers cannot be had: %u to %u can", o->buffers, 2 * RB_EXTENT, RB_MAX_BUFFERS);
        return rb_cure(EINVAL, "--buffers %u is the nearest", o->buffers < 2 * RB_EXTENT ? 2 * RB_EXTENT : RB_MAX_BUFFERS);
    }
    if (o->persistent && o->sealed)
        return rb_fail(EINVAL, "bad-option", "leave out one of the two", "sealed memory lives with its process and cannot be persistent");
    return 0;
}

static int pool_create(struct rb_registry *reg, const struct rb_cluster_options *o, int *keep_fd)
{
    struct rb_state *s = reg->state;
    struct rb_segment_record *r = &s->pool[0];
    struct rb_mapping m = {0};
    uint64_t size = rb_pow2((uint64_t)o->buffers * o->buffer_size);
    uint32_t pages = o->pages;
    int rc = rb_segment_create(reg->id, RB_KIND_POOL, 0, size, &pages, o->numa - 1, (int)o->sealed, reg->generation, r->path, keep_fd, &m);
    if (rc < 0)
        return rc;
    struct rb_header *h = m.base;
    h->buffer_size = o->buffer_size;
    h->buffers = o->buffers;
    r->pages = pages;
    r->size = m.size;
    r->buffers = o->buffers;
    s->pages = pages;
    s->buffers = o->buffers;
    rb_set(&r->state, RB_SEG_OPEN);
    rb_unmap(&m);
    return 0;
}

static int handle_new(struct rb_registry *reg, struct rb_cluster **out)
{
    struct rb_cluster *c = calloc(1, sizeof *c);
    if (!c)
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    c->reg = c->locks = reg;
    c->id = reg->id;
    c->generation = reg->generation;
    c->fork_count = rb_fork_count;
    c->buffer_size = reg->state->buffer_size;
    c->writable = c->sends = 1;
    for (int i = 0; i < (int)RB_MAX_POOLS; i++)
        c->sealed_fd[i] = -1;
    int rc = rb_pools_sync(c);
    if (rc < 0) {
        free(c);
        return rc;
    }
    c->room = reg->state->capacity;
    c->where = calloc(c->room, sizeof *c->where);
    if (!c->where) {
        free(c);
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    }
    *out = c;
    return 0;
}

int rb_cluster_create(uint32_t id, const rb_cluster_options *options, rb_cluster **out)
{
    rb_cluster_options o = {0};
    if (options)
        memcpy(&o, options, RB_MIN(options->struct_size, sizeof o));
    o.struct_size = sizeof o;
    char who[256], link[PATH_MAX], path[128];
    struct rb_registry *reg = NULL, *old = NULL;
    struct rb_mapping m = {0};
    int keep_fd = -1, rc = check_options(id, &o);
    if (rc < 0 || (rc = rb_run_dir_ready()) < 0)
        return rc;
    rc = rb_registry_get(id, &old);
    if (rc == -ENOENT) {
        if ((rc = rb_registry_begin(id, &reg)) < 0)
            return rc;
    } else if (rc < 0) {
        return rc;
    } else { /* there is one: in use, or left by a dead process? */
        if ((rc = rb_enter(old)) < 0) {
            rb_registry_put(old);
            return rc;
        }
        struct rb_state *s = old->state;
        if (rb_load_acquire(&s->header.generation) == old->generation) {
            if (rb_owner_alive(old)) {
                rb_fail(EEXIST, "cluster-exists", NULL, "cluster %u is in use: %s", id,
                        s->persistent ? "it is persistent" : "a living process owns it");
                if (!s->persistent)
                    rb_fail(EEXIST, "cluster-exists", NULL, "cluster %u is in use: process %d (%s) owns it", id, s->owner.pid, s->owner.name);
                rc = rb_cure(EEXIST, "use another number, or: ringbar cluster destroy %u", id);
            } else if (in_use(old, 1, who, sizeof who)) {
                rb_fail(EEXIST, "cluster-exists", NULL, "the owner of cluster %u is dead, but %s", id, who);
                rc = rb_cure(EEXIST, "ringbar cluster destroy %u --force", id);
            } else
                destroy_locked(old);
        }
        rb_leave(old);
        if (rc == 0)
            rc = rb_registry_begin(id, &reg); /* before the old one goes, so that it keeps the locks of this life */
        rb_registry_put(old);
        if (rc < 0)
            return rc;
    }
    if ((rc = rb_enter(reg)) < 0) {
        rb_registry_put(reg);
        return rc;
    }
    rb_state_path(id, link, sizeof link);
    struct stat st;
    if (lstat(link, &st) == 0 && stat(link, &st) == 0) { /* somebody was faster */
        rb_fail(EEXIST, "cluster-exists", NULL, "cluster %u is in use: it was created just now", id);
        rc = rb_cure(EEXIST, "use another number, or: ringbar cluster destroy %u", id);
        goto out;
    }
    uint32_t capacity = (uint32_t)RB_MAX(65536u, RB_MIN(rb_pow2(o.buffers) * 2, 2ull * RB_MAX_BUFFERS)), pages = RB_PAGES_4K;
    reg->generation = random_generation();
    rc = rb_segment_create(id, RB_KIND_STATE, 0, rb_state_bytes(capacity), &pages, -1, 0, reg->generation, path, &reg->state_fd, &m);
    if (rc < 0)
        goto out;
    reg->state = m.base;
    reg->state_size = m.size;
    struct rb_state *s = reg->state;
    s->capacity = capacity;
    s->buffer_size = o.buffer_size;
    s->persistent = o.persistent;
    s->sealed = o.sealed;
    snprintf(s->label, sizeof s->label, "%.31s", o.label);
    rb_holder_me(&s->owner);
    rb_registry_layout(reg);
    rc = pool_create(reg, &o, o.sealed ? &keep_fd : NULL);
    if (rc == 0 && !o.persistent)
        rc = rb_byte_lock(reg, RB_LOCK_OWNER);
    if (rc == 0) {
        unlink(link);
        if (symlink(path, link) != 0)
            rc = rb_fail(errno, "failed", NULL, "%s could not be made: %s", link, strerror(errno));
    }
    if (rc < 0) {
        remove_files(s, id);
        unlink(path);
        goto out;
    }
    rc = handle_new(reg, out);
    if (rc == 0) {
        rb_cluster *c = *out;
        c->owner = !o.persistent;
        c->sealed_fd[0] = keep_fd;
        rb_queue_options q = {.struct_size = sizeof q, .slots = o.slots};
        for (uint32_t i = 0; i < o.queues && rc >= 0; i++)
            rc = rb_queue_create(c, (int)i, &q);
        if (rc < 0) {
            destroy_locked(reg);
            rb_leave(reg);
            c->owner = 0;
            char keep[3][512];
            snprintf(keep[0], 512, "%s", rb_error());
            snprintf(keep[1], 512, "%s", rb_error_cure());
            snprintf(keep[2], 512, "%s", rb_error_code());
            rb_cluster_close(c);
            return rb_fail(-rc, keep[2], keep[1], "%s", keep[0]);
        }
        rb_leave(reg);
        return 0;
    }
    destroy_locked(reg);
out:
    rb_leave(reg);
    rb_registry_put(reg);
    return rc;
}

int rb_cluster_attach(uint32_t id, rb_cluster **out)
{
    struct rb_registry *reg;
    int rc = rb_registry_get(id, &reg);
    if (rc < 0)
        return rc;
    if (!rb_owner_alive(reg)) {
        char who[256];
        int32_t pid = reg->state->owner.pid;
        if (rb_enter(reg) == 0) {
            if (!rb_owner_alive(reg) && !in_use(reg, 1, who, sizeof who))
                destroy_locked(reg);
            rb_leave(reg);
        }
        rb_registry_put(reg);
        rb_fail(ENOENT, "no-such-cluster", NULL, "cluster %u went with its owner, process %d", id, pid);
        return rb_cure(ENOENT, "ringbar cluster create %u", id);
    }
    rc = handle_new(reg, out);
    if (rc < 0)
        rb_registry_put(reg);
    return rc;
}

void rb_cluster_close(rb_cluster *c)
{
    if (!c)
        return;
    int here = c->fork_count == rb_fork_count;
    c->leaving = true;
    for (uint32_t i = 0; i < RB_MAX_ENDS; i++)
        if (c->end[i]) {
            if (here)
                rb_close(c->end[i]);
            if (here && c->end[i])
                rb_close(c->end[i]); /* lingering: with the handle it goes, and a successor may open it */
            if (c->end[i]) { /* after a fork */
                rb_end_free(c->end[i]);
                c->end[i] = NULL;
            }
        }
    rb_fans_free(c);
    rb_cluster_close(c->deputy);
    c->deputy = NULL;
    if (c->reg && here) {
        rb_server_close(c);
        if (c->owner && rb_enter(c->reg) == 0) {
            if (rb_load_acquire(&c->reg->state->header.generation) == c->generation)
                destroy_locked(c->reg);
            rb_byte_unlock(c->reg, RB_LOCK_OWNER);
            rb_leave(c->reg);
        }
    }
    for (uint32_t i = 0; i < 256; i++)
        if (c->pool[i])
            munmap(c->pool[i], c->pool_size[i]);
    for (uint32_t i = 0; i < RB_MAX_LANES; i++)
        if (c->lane[i].lane)
            munmap(c->lane[i].lane, c->lane[i].size);
    for (uint32_t i = 0; i < RB_MAX_POOLS; i++)
        if (c->reg && c->sealed_fd[i] >= 0)
            close(c->sealed_fd[i]);
    if (c->locks && here)
        rb_registry_put(c->locks);
    free(c->where);
    free(c->bell_fds);
    free(c);
}

int rb_cluster_destroy(uint32_t id, int force)
{
    struct rb_registry *reg;
    char who[256];
    int rc = rb_registry_get(id, &reg);
    if (rc < 0)
        return rc;
    if ((rc = rb_enter(reg)) == 0) {
        int32_t owner = reg->state->persistent ? 0 : rb_byte_holder(reg, RB_LOCK_OWNER);
        if (!force && owner && owner != (int32_t)getpid()) {
            rb_fail(EBUSY, "busy", NULL, "cluster %u lives with process %d (%s)", id, owner, reg->state->owner.name);
            rc = rb_cure(EBUSY, "end that process, or: ringbar cluster destroy %u --force", id);
        } else if (!force && in_use(reg, 0, who, sizeof who)) {
            rb_fail(EBUSY, "busy", NULL, "cluster %u is in use: %s", id, who);
            rc = rb_cure(EBUSY, "end its users, or: ringbar cluster destroy %u --force", id);
        } else if (rb_load_acquire(&reg->state->header.generation) == reg->generation)
            destroy_locked(reg);
        rb_leave(reg);
    }
    rb_registry_put(reg);
    return rc;
}

int rb_cluster_list(uint32_t *ids, int n)
{
    DIR *dir = opendir(rb_run_dir());
    int count = 0, refused = 0;
    if (!dir && errno == EACCES)
        return rb_fail(EACCES, "no-permission", rb_group_cure(), "no permission to look into %s", rb_run_dir());
    if (!dir)
        return errno == ENOENT ? 0 : rb_fail(errno, "failed", NULL, "%s: %s", rb_run_dir(), strerror(errno));
    for (struct dirent *e; (e = readdir(dir));) {
        unsigned id;
        char tail[16];
        rb_cluster *c;
        if (sscanf(e->d_name, "%u.%15s", &id, tail) != 2 || strcmp(tail, "state") != 0)
            continue;
        int rc = rb_cluster_attach(id, &c);
        if (rc < 0) {
            refused = rc == -EACCES ? rc : refused;
            continue;
        }
        rb_cluster_close(c);
        if (count < n)
            ids[count] = id;
        count++;
    }
    closedir(dir);
    return count || !refused ? count : refused; /* rather than "none", where there are some that are not for this user */
}

int rb_cluster_reap(uint32_t id)
{
    rb_cluster *c;
    int rc = rb_cluster_attach(id, &c);
    if (rc < 0)
        return rc;
    rc = rb_reap_all(c);
    rb_cluster_close(c);
    return rc;
}

int rb_alive(struct rb_cluster *c)
{
    if (c->fork_count != rb_fork_count)
        return rb_fail(EOWNERDEAD, "forked", "attach again in the child", "this handle was opened before a fork and belongs to the parent");
    if (c->reg && rb_load_acquire(&c->reg->state->header.generation) != c->generation)
        return rb_fail(ENODEV, "detached", NULL, "cluster %u was destroyed", c->id);
    return 0;
}

int rb_cluster_get_info(rb_cluster *c, rb_cluster_info *info)
{
    memset(info, 0, sizeof *info);
    info->id = c->id;
    info->buffer_size = c->buffer_size;
    info->buffers = c->reg ? (c->pool_count[0] + RB_EXTENT - 1) & ~(RB_EXTENT - 1) : c->buffers;
    info->generation = c->generation;
    for (uint32_t i = 0; i < RB_MAX_POOLS; i++)
        info->pools += c->pool_count[i] != 0;
    if (!c->reg) {
        info->guest = 1;
        info->lanes = c->lanes;
        return 0;
    }
    struct rb_state *s = c->reg->state;
    for (uint32_t i = 0; i < RB_MAX_QUEUES; i++)
        info->queues += s->queue[i].used != 0;
    for (uint32_t i = 0; i < RB_MAX_LANES; i++)
        info->lanes += rb_get(&s->lane[i].state) != RB_SEG_FREE && s->lane[i].vm[0];
    for (uint32_t i = 0; i < s->buffers / RB_EXTENT; i++)
        info->home_free += c->reg->extent[i] ? 0 : RB_EXTENT;
    info->persistent = s->persistent;
    info->pages = s->pages;
    info->sealed = s->sealed;
    info->owner_pid = rb_byte_holder(c->reg, RB_LOCK_OWNER);
    info->created_ns = s->header.created_ns;
    memcpy(info->label, s->label, sizeof info->label);
    return 0;
}

int rb_cluster_segments(rb_cluster *c, rb_segment_info *out, int n)
{
    int count = 0;
    if (!c->reg)
        return rb_fail(ENOTSUP, "guest", "ask on the host: ringbar status", "a guest does not see the segments' files");
    struct rb_state *s = c->reg->state;
    for (uint32_t i = 0; i < RB_MAX_POOLS + RB_MAX_LANES; i++) {
        struct rb_segment_record *r = i < RB_MAX_POOLS ? &s->pool[i] : &s->lane[i - RB_MAX_POOLS];
        uint32_t state = rb_get(&r->state), book = rb_get(&r->book);
        if (state == RB_SEG_FREE)
            continue;
        if (count < n) {
            rb_segment_info *o = &out[count];
            memset(o, 0, sizeof *o);
            o->kind = i < RB_MAX_POOLS ? RB_KIND_POOL : RB_KIND_LANE;
            o->id = i < RB_MAX_POOLS ? i : i - RB_MAX_POOLS;
            o->size = r->size;
            o->state = state;
            o->generation = c->generation;
            o->server_pid = book ? rb_byte_holder(c->reg, RB_LOCK_BOOK + book - 1) : 0;
            memcpy(o->path, r->path, sizeof o->path);
            memcpy(o->vm, r->vm, sizeof o->vm);
        }
        count++;
    }
    return count;
}
