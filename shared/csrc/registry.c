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

#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
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

/* When a process was started, clock ticks since boot, and its name; 0 when there is none, or only a zombie. */
static uint64_t process(int32_t pid, char *name, size_t size)
{
    char path[64], text[512];
    uint64_t start = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    FILE *f = fopen(path, "re");
    if (!f)
        return 0;
    size_t n = fread(text, 1, sizeof text - 1, f);
    fclose(f);
    text[n] = 0;
    char *open = strchr(text, '('), *close = strrchr(text, ')');
    if (open && close && close > open) {
        snprintf(name, RB_MIN(size, (size_t)(close - open)), "%s", open + 1);
        char *p = close + 1; /* the space before field 3, counted from 1; the 22nd is wanted */
        if (p[1] == 'Z' || p[1] == 'X')
            return 0;
        for (int field = 3; field < 22 && p; field++)
            p = strchr(p + 1, ' ');
        if (p)
            start = strtoull(p, NULL, 10);
    }
    return start;
}

uint64_t rb_process_start(int32_t pid)
{
    char name[32];
    return process(pid, name, sizeof name);
}

void rb_holder_me(struct rb_holder *h)
{
    struct stat st;
    memset(h, 0, sizeof *h);
    h->pid = (int32_t)getpid();
    h->since_ns = rb_now_ns();
    if (stat("/proc/self/ns/pid", &st) == 0)
        h->pid_ns = st.st_ino;
    h->start = process(h->pid, h->name, sizeof h->name);
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

int rb_run_dir_ready(void)
{
    const char *dir = rb_run_dir();
    struct stat st;
    int there = stat(dir, &st) == 0;
    /* Its group may have been made since; a directory that somebody else made as he wants it stays. */
    if (there && (st.st_uid != geteuid() || (st.st_mode & 07777) != 02770 || st.st_gid != getegid()))
        return 0;
    if (!there && mkdir(dir, 0770) != 0 && errno != EEXIST) {
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
        return rb_fail(EACCES, "no-permission", rb_group_cure(), "no permission to open %s", path);
    return rb_fail(err, "failed", NULL, "%s could not be opened: %s", path, strerror(err));
}

void rb_state_path(uint32_t id, char *path, size_t size) { snprintf(path, size, "%s/%u.state", rb_run_dir(), id); }

void rb_registry_layout(struct rb_registry *reg)
{
    struct rb_state *s = reg->state;
    uint64_t at = (sizeof *s + 4095) & ~4095ull;
    reg->extent = (uint8_t *)s + at;
    at = (at + s->capacity / RB_EXTENT + 4095) & ~4095ull;
    reg->ledgers = (rb_a64 *)((uint8_t *)s + at);
    reg->masks = reg->ledgers + (uint64_t)RB_MAX_BOOKS * s->capacity;
}

uint64_t rb_state_bytes(uint32_t capacity)
{
    uint64_t at = (sizeof(struct rb_state) + 4095) & ~4095ull;
    at = (at + capacity / RB_EXTENT + 4095) & ~4095ull;
    return rb_pow2(at + 2ull * RB_MAX_BOOKS * capacity * sizeof(uint64_t));
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
    rb_state_path(reg->id, path, sizeof path);
    int rc = rb_segment_open(path, reg->id, RB_KIND_STATE, 0, 1, &m, &reg->state_fd);
    if (rc == -ENOENT || rc == -ENODEV) {
        rb_fail(ENOENT, "no-such-cluster", NULL, "there is no cluster %u on this host", reg->id);
        return rb_cure(ENOENT, "ringbar cluster create %u", reg->id);
    }
    if (rc < 0)
        return rc;
    reg->state = m.base;
    reg->state_size = m.size;
    if (rb_state_bytes(reg->state->capacity) != m.size) {
        rb_unmap(&m);
        close(reg->state_fd);
        return rb_fail(EPROTO, "not-a-segment", NULL, "%s has the wrong size for its contents", path);
    }
    reg->generation = rb_load_acquire(&reg->state->header.generation);
    rb_registry_layout(reg);
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

int rb_registry_get(uint32_t id, struct rb_registry **out)
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
    int rc = rb_run_dir_ready(), fd;
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

/* An entry of the table for a life that is about to be made. */
int rb_registry_begin(uint32_t id, struct rb_registry **out)
{
    pthread_mutex_lock(&registries_mutex);
    int fd = open_lock(id, 1);
    struct rb_registry *reg = fd >= 0 ? registry_new(id, fd) : NULL;
    if (reg) {
        reg->next = registries;
        registries = reg;
    }
    pthread_mutex_unlock(&registries_mutex);
    *out = reg;
    return fd < 0 ? fd : reg ? 0 : rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
}
