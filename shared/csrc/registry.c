/* SPDX-License-Identifier: Apache-2.0
 *
 * Where clusters are found, and who is alive.
 *
 * For cluster 99 there are RUN/99.lock, which is never removed, and RUN/99.state, a link to its state segment. Who holds what
 * is a classic POSIX record lock on a byte of the lock file: the kernel drops it on death, a forked child does not inherit it, and
 * F_GETLK names the holder. Since closing any descriptor of a file drops all such locks of a process, a descriptor of a lock file is
 * closed only when no life of that cluster is mapped any more. Each life has bytes of its own, far apart (a lock needs no byte to be there), so that
 * a process that still holds ends of a destroyed cluster is not in the way of the next one, nor takes its locks along when it closes. Only the
 * recovery lock is common to all lives.
 */
#include "rb_internal.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

unsigned rb_fork_count;
static struct rb_registry *registries;
static pthread_mutex_t registries_mutex = PTHREAD_MUTEX_INITIALIZER;

static void in_child(void)
{
    /* The parent's handles are dead here; its record locks were not inherited, so a fresh table is right. */
    rb_fork_count++;
    registries = NULL;
    pthread_mutex_init(&registries_mutex, NULL);
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, in_child); }

uint64_t rb_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t rb_mono_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

const char *rb_run_dir(void)
{
    const char *dir = getenv("RINGBAR_RUN");
    return dir && *dir ? dir : "/run/ringbar";
}

void rb_holder_me(struct rb_holder *h)
{
    char path[64], text[512];
    struct stat st;
    memset(h, 0, sizeof *h);
    h->pid = (int32_t)getpid();
    h->since_ns = rb_now_ns();
    if (stat("/proc/self/ns/pid", &st) == 0)
        h->pid_ns = st.st_ino;
    snprintf(path, sizeof path, "/proc/%d/stat", (int)getpid());
    FILE *f = fopen(path, "re");
    if (f) {
        size_t n = fread(text, 1, sizeof text - 1, f);
        fclose(f);
        text[n] = 0;
        char *open = strchr(text, '('), *close = strrchr(text, ')');
        if (open && close && close > open) {
            snprintf(h->name, RB_MIN(sizeof h->name, (size_t)(close - open)), "%s", open + 1);
            char *p = close + 1; /* field 22 counts from 1, field 3 follows the name */
            for (int field = 2; field < 22 && p; field++)
                p = strchr(p + 1, ' ');
            if (p)
                h->start = strtoull(p, NULL, 10);
        }
    }
}

/* ---- locks */

static struct flock lock_of(const struct rb_registry *reg, unsigned byte, short type)
{
    off_t life = byte == RB_LOCK_RECOVERY ? 0 : (off_t)(reg->generation & 0xffffffffff) * (off_t)sizeof reg->held;
    return (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = life + byte, .l_len = 1};
}

static int set_lock(struct rb_registry *reg, unsigned byte, short type)
{
    struct flock l = lock_of(reg, byte, type);
    return fcntl(reg->lock_fd, F_SETLK, &l);
}

static int32_t lock_holder(struct rb_registry *reg, unsigned byte)
{
    struct flock l = lock_of(reg, byte, F_WRLCK);
    if (fcntl(reg->lock_fd, F_GETLK, &l) != 0 || l.l_type == F_UNLCK)
        return 0;
    return (int32_t)l.l_pid;
}

int rb_byte_lock(struct rb_registry *reg, unsigned byte)
{
    int rc = -EBUSY;
    pthread_mutex_lock(&registries_mutex);
    if (!reg->held[byte] && set_lock(reg, byte, F_WRLCK) == 0) {
        reg->held[byte] = 1;
        rc = 0;
    }
    pthread_mutex_unlock(&registries_mutex);
    return rc;
}

void rb_byte_unlock(struct rb_registry *reg, unsigned byte)
{
    pthread_mutex_lock(&registries_mutex);
    if (reg->held[byte]) {
        reg->held[byte] = 0;
        set_lock(reg, byte, F_UNLCK);
    }
    pthread_mutex_unlock(&registries_mutex);
}

int32_t rb_byte_holder(struct rb_registry *reg, unsigned byte)
{
    pthread_mutex_lock(&registries_mutex);
    int mine = reg->held[byte];
    pthread_mutex_unlock(&registries_mutex);
    return mine ? (int32_t)getpid() : lock_holder(reg, byte);
}

/* Other lives of the cluster, mapped in this process, have the same byte. */
static int recovering_elsewhere(const struct rb_registry *reg)
{
    for (struct rb_registry *r = registries; r; r = r->next)
        if (r != reg && r->id == reg->id && r->held[RB_LOCK_RECOVERY])
            return 1;
    return 0;
}

static int try_recovery(struct rb_registry *reg)
{
    pthread_mutex_lock(&registries_mutex);
    int got = !recovering_elsewhere(reg) && set_lock(reg, RB_LOCK_RECOVERY, F_WRLCK) == 0;
    reg->held[RB_LOCK_RECOVERY] = (uint8_t)got;
    pthread_mutex_unlock(&registries_mutex);
    return got;
}

int rb_enter(struct rb_registry *reg)
{
    pthread_mutex_lock(&reg->recovery);
    if (reg->recovery_depth++)
        return 0;
    uint64_t end = rb_mono_ns() + 10000000000ull;
    while (!try_recovery(reg)) {
        if (rb_mono_ns() > end) {
            int32_t pid = lock_holder(reg, RB_LOCK_RECOVERY);
            reg->recovery_depth--;
            pthread_mutex_unlock(&reg->recovery);
            rb_fail(EBUSY, "busy", NULL, "process %d has held the recovery lock of cluster %u for over 10 s", pid, reg->id);
            return rb_cure(EBUSY, "look at it, or end it: kill %d", pid);
        }
        nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
    }
    return 0;
}

void rb_leave(struct rb_registry *reg)
{
    if (--reg->recovery_depth == 0) {
        pthread_mutex_lock(&registries_mutex);
        reg->held[RB_LOCK_RECOVERY] = 0;
        set_lock(reg, RB_LOCK_RECOVERY, F_UNLCK);
        pthread_mutex_unlock(&registries_mutex);
    }
    pthread_mutex_unlock(&reg->recovery);
}

int rb_owner_alive(struct rb_registry *reg) { return reg->state->persistent || rb_byte_holder(reg, RB_LOCK_OWNER) != 0; }

/* ---- finding and mapping */

static int run_dir_ready(void)
{
    const char *dir = rb_run_dir();
    struct stat st;
    if (stat(dir, &st) == 0)
        return 0;
    if (mkdir(dir, 0770) != 0 && errno != EEXIST) {
        int err = errno;
        rb_fail(err, "no-permission", NULL, "%s could not be made: %s", dir, strerror(err));
        return rb_cure(err, "as root: install -d -m 2770 -g ringbar %s", dir);
    }
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        rb_share_file(fd, 02770);
        close(fd);
    }
    return 0;
}

static int open_lock(uint32_t id, int make)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%u.lock", rb_run_dir(), id);
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | (make ? O_CREAT : 0), 0660);
    if (fd >= 0) {
        struct stat st;
        if (make && fstat(fd, &st) == 0 && st.st_uid == geteuid())
            rb_share_file(fd, 0660);
        return fd;
    }
    if (errno == ENOENT) {
        rb_fail(ENOENT, "no-such-cluster", NULL, "there is no cluster %u on this host", id);
        return rb_cure(ENOENT, "ringbar cluster create %u", id);
    }
    int err = errno;
    if (err == EACCES || err == EPERM)
        return rb_fail(EACCES, "no-permission", "join group ringbar: usermod -aG ringbar USER, and log in again", "no permission to open %s", path);
    return rb_fail(err, "failed", NULL, "%s could not be opened: %s", path, strerror(err));
}

static void state_path(uint32_t id, char *path, size_t size) { snprintf(path, size, "%s/%u.state", rb_run_dir(), id); }

static void layout(struct rb_registry *reg)
{
    struct rb_state *s = reg->state;
    uint64_t at = (sizeof *s + 4095) & ~4095ull;
    reg->extent = (uint8_t *)s + at;
    at = (at + s->capacity / RB_EXTENT + 4095) & ~4095ull;
    reg->ledgers = (rb_a64 *)((uint8_t *)s + at);
}

static uint64_t state_bytes(uint32_t capacity)
{
    uint64_t at = (sizeof(struct rb_state) + 4095) & ~4095ull;
    at = (at + capacity / RB_EXTENT + 4095) & ~4095ull;
    return rb_pow2(at + (uint64_t)RB_MAX_BOOKS * capacity * sizeof(uint64_t));
}

static struct rb_registry *registry_new(uint32_t id, int lock_fd)
{
    struct rb_registry *reg = calloc(1, sizeof *reg);
    if (!reg)
        return NULL;
    pthread_mutexattr_t attr;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&reg->recovery, &attr);
    pthread_mutexattr_destroy(&attr);
    reg->id = id;
    reg->lock_fd = lock_fd;
    reg->state_fd = -1;
    reg->refs = 1;
    return reg;
}

/* Map RUN/ID.state into reg. */
static int registry_map(struct rb_registry *reg)
{
    char path[PATH_MAX];
    struct rb_mapping m = {0};
    state_path(reg->id, path, sizeof path);
    int rc = rb_segment_open(path, reg->id, RB_KIND_STATE, 0, 1, &m, &reg->state_fd);
    if (rc == -ENOENT || rc == -ENODEV) {
        rb_fail(ENOENT, "no-such-cluster", NULL, "there is no cluster %u on this host", reg->id);
        return rb_cure(ENOENT, "ringbar cluster create %u", reg->id);
    }
    if (rc < 0)
        return rc;
    reg->state = m.base;
    reg->state_size = m.size;
    if (state_bytes(reg->state->capacity) != m.size) {
        rb_unmap(&m);
        close(reg->state_fd);
        return rb_fail(EPROTO, "not-a-segment", NULL, "%s has the wrong size for its contents", path);
    }
    reg->generation = rb_load_acquire(&reg->state->header.generation);
    layout(reg);
    return 0;
}

static void registry_free(struct rb_registry *reg)
{
    if (reg->state)
        munmap(reg->state, reg->state_size);
    if (reg->state_fd >= 0)
        close(reg->state_fd);
    if (reg->lock_fd >= 0)
        close(reg->lock_fd);
    pthread_mutex_destroy(&reg->recovery);
    free(reg);
}

/* The table's lock file descriptor for `id`, shared by all lives of that cluster in this process (lives differ by generation). */
static struct rb_registry *table_find(uint32_t id)
{
    for (struct rb_registry *r = registries; r; r = r->next)
        if (r->id == id && r->state && rb_load_acquire(&r->state->header.generation) == r->generation)
            return r;
    return NULL;
}

static int table_busy(uint32_t id) /* a life of it that ended is still mapped here */
{
    for (struct rb_registry *r = registries; r; r = r->next)
        if (r->id == id)
            return 1;
    return 0;
}

static int registry_get(uint32_t id, struct rb_registry **out)
{
    pthread_mutex_lock(&registries_mutex);
    struct rb_registry *reg = table_find(id);
    if (reg) {
        reg->refs++;
        pthread_mutex_unlock(&registries_mutex);
        *out = reg;
        return 0;
    }
    int shared = table_busy(id), fd = open_lock(id, 0), rc = fd;
    if (fd >= 0) {
        reg = registry_new(id, fd);
        rc = reg ? registry_map(reg) : -ENOMEM;
        if (rc == 0) {
            reg->next = registries;
            registries = reg;
            *out = reg;
        } else if (reg) {
            if (shared)
                reg->lock_fd = -1; /* leaked on purpose: closing it would drop the locks of the older life */
            registry_free(reg);
        }
    }
    pthread_mutex_unlock(&registries_mutex);
    return rc;
}

void rb_registry_put(struct rb_registry *reg)
{
    pthread_mutex_lock(&registries_mutex);
    if (--reg->refs == 0) {
        for (struct rb_registry **p = &registries; *p; p = &(*p)->next)
            if (*p == reg) {
                *p = reg->next;
                break;
            }
        if (table_busy(reg->id))
            reg->lock_fd = -1;
        registry_free(reg);
    }
    pthread_mutex_unlock(&registries_mutex);
}

int rb_registry_locks(uint32_t id, struct rb_registry **out)
{
    int rc = run_dir_ready(), fd;
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&registries_mutex);
    for (struct rb_registry *r = registries; r; r = r->next)
        if (r->id == id && !r->state) {
            r->refs++;
            pthread_mutex_unlock(&registries_mutex);
            *out = r;
            return 0;
        }
    fd = open_lock(id, 1);
    if (fd >= 0 && (*out = registry_new(id, fd))) {
        (*out)->next = registries;
        registries = *out;
    }
    pthread_mutex_unlock(&registries_mutex);
    return fd < 0 ? fd : *out ? 0 : rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
}

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
    state_path(id, path, sizeof path);
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
    c->writable = 1;
    for (int i = 0; i < (int)RB_MAX_POOLS; i++)
        c->sealed_fd[i] = -1;
    for (uint32_t i = 0; i < RB_MAX_POOLS; i++) {
        struct rb_segment_record *r = &reg->state->pool[i];
        struct rb_mapping m = {0};
        if (rb_get(&r->state) != RB_SEG_OPEN)
            continue;
        int rc = rb_segment_map(r, &m); /* sizes from `state`: a VM that sends can write into the pool's header */
        if (rc < 0) {
            free(c);
            return rc;
        }
        c->pool[i] = m.base;
        c->pool_size[i] = m.size;
        c->pool_base[i] = c->buffers;
        c->pool_count[i] = r->buffers;
        c->buffers += (r->buffers + RB_EXTENT - 1) & ~(RB_EXTENT - 1);
    }
    c->where = calloc(c->buffers, sizeof *c->where);
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
    if (rc < 0 || (rc = run_dir_ready()) < 0)
        return rc;
    rc = registry_get(id, &old);
    if (rc == -ENOENT) {
        pthread_mutex_lock(&registries_mutex);
        int fd = open_lock(id, 1);
        reg = fd >= 0 ? registry_new(id, fd) : NULL;
        pthread_mutex_unlock(&registries_mutex);
        if (!reg)
            return fd < 0 ? fd : rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
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
        int fd = rc < 0 ? -1 : open_lock(id, 1);
        if (rc == 0 && fd < 0)
            rc = fd;
        if (rc == 0 && !(reg = registry_new(id, fd)))
            rc = -ENOMEM;
        if (rc == 0) {
            pthread_mutex_lock(&registries_mutex);
            reg->next = registries; /* before the old one goes, so that it keeps the locks of this life */
            registries = reg;
            pthread_mutex_unlock(&registries_mutex);
        }
        rb_registry_put(old);
        if (rc < 0)
            return rc;
    }
    if (reg->next == NULL) {
        pthread_mutex_lock(&registries_mutex);
        int known = 0;
        for (struct rb_registry *r = registries; r; r = r->next)
            known |= r == reg;
        if (!known) {
            reg->next = registries;
            registries = reg;
        }
        pthread_mutex_unlock(&registries_mutex);
    }
    if ((rc = rb_enter(reg)) < 0) {
        rb_registry_put(reg);
        return rc;
    }
    state_path(id, link, sizeof link);
    struct stat st;
    if (lstat(link, &st) == 0 && stat(link, &st) == 0) { /* somebody was faster */
        rb_fail(EEXIST, "cluster-exists", NULL, "cluster %u is in use: it was created just now", id);
        rc = rb_cure(EEXIST, "use another number, or: ringbar cluster destroy %u", id);
        goto out;
    }
    uint32_t capacity = (uint32_t)RB_MAX(65536u, RB_MIN(rb_pow2(o.buffers) * 2, 2ull * RB_MAX_BUFFERS)), pages = RB_PAGES_4K;
    reg->generation = random_generation();
    rc = rb_segment_create(id, RB_KIND_STATE, 0, state_bytes(capacity), &pages, -1, 0, reg->generation, path, &reg->state_fd, &m);
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
    layout(reg);
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
    int rc = registry_get(id, &reg);
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
    free(c);
}

int rb_cluster_destroy(uint32_t id, int force)
{
    struct rb_registry *reg;
    char who[256];
    int rc = registry_get(id, &reg);
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
    int count = 0;
    if (!dir)
        return errno == ENOENT ? 0 : rb_fail(errno, "no-permission", NULL, "%s: %s", rb_run_dir(), strerror(errno));
    for (struct dirent *e; (e = readdir(dir));) {
        unsigned id;
        char tail[16];
        rb_cluster *c;
        if (sscanf(e->d_name, "%u.%15s", &id, tail) != 2 || strcmp(tail, "state") != 0)
            continue;
        if (rb_cluster_attach(id, &c) < 0)
            continue;
        rb_cluster_close(c);
        if (count < n)
            ids[count] = id;
        count++;
    }
    closedir(dir);
    return count;
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
    info->buffers = c->buffers;
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
