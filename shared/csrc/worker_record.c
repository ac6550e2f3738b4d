/* SPDX-License-Identifier: Apache-2.0
 *
 * What others see of a named worker: RUN/workers/NAME, a small file that the worker's process maps and writes, and anybody who may read it reads.
 * Whether that process lives the kernel tells: it holds a classic POSIX record lock on the file (see registry.c), which closing any
 * descriptor of the file would drop; so this process looks at its own workers in memory, never by their files.
 *
 * Written by the worker's thread, or by who holds it: everything between two steps of `version` (odd: being written). A reader takes a copy,
 * checks that version did not move, and believes nothing in it that could lead it astray.
 */
#include "rb_worker.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define RECORD_MAGIC 0x314b524f57424752ull /* "RGBWORK1" */
#define RECORD_PORTS (RB_WORKER_INS + RB_WORKER_OUTS)

struct record {
    uint64_t magic;
    uint32_t size, abi;
    rb_a32 version, ports;
    int32_t pid;
    uint32_t idle, core;
    uint32_t reserved;
    uint64_t start, since_ns, seen_ns;
    char name[32], kind[16], policy[128], program[32];
    rb_worker_stats stats;
    rb_worker_port port[RECORD_PORTS];
};

struct rb_worker_file {
    struct rb_worker_file *next;
    int fd;
    struct record *map;
    char path[PATH_MAX];
};

static struct rb_worker_file *own; /* of this process */
static pthread_mutex_t own_mutex = PTHREAD_MUTEX_INITIALIZER;

static void in_child(void) /* the parent's workers, and its locks, are not ours */
{
    own = NULL;
    pthread_mutex_init(&own_mutex, NULL);
}
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, in_child); }

static void directory(char path[PATH_MAX]) { snprintf(path, PATH_MAX, "%s/workers", rb_run_dir()); }

static bool good_name(const char *name)
{
    size_t n = strlen(name);
    if (!n || n > 31 || name[0] == '.' || name[0] == '-' || (n > 5 && strcmp(name + n - 5, ".sock") == 0))
        return false;
    for (const char *p = name; *p; p++)
        if (!((*p >= 'a' && *p <= 'z') || (*p >= 'A' && *p <= 'Z') || (*p >= '0' && *p <= '9') || *p == '-' || *p == '_' || *p == '.'))
            return false;
    return true;
}

static int path_of(const char *name, char path[PATH_MAX])
{
    if (!good_name(name))
        return rb_fail(EINVAL, "bad-name", "use letters, digits, \"-\", \"_\" and \".\", at most 31", "\"%s\" cannot be the name of a worker", name);
    if (snprintf(path, PATH_MAX, "%s/workers/%s", rb_run_dir(), name) >= PATH_MAX)
        return rb_fail(ENAMETOOLONG, "failed", NULL, "%s is too long a path", rb_run_dir());
    return 0;
}

static int32_t locked_by(int fd)
{
    struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 1};
    if (fcntl(fd, F_GETLK, &l) != 0 || l.l_type == F_UNLCK)
        return 0;
    return (int32_t)l.l_pid;
}

/* ---- writing -------------------------------------------------------------------------------------------------------------------- */

static int make_directory(void)
{
    char path[PATH_MAX];
    directory(path);
    for (int i = 0; i < 2; i++) {
        const char *each = i ? path : rb_run_dir();
        if (mkdir(each, 0770) == 0) {
            int fd = open(each, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
            if (fd >= 0) {
                rb_share_file(fd, 02770);
                close(fd);
            }
        } else if (errno != EEXIST) {
            int err = errno;
            rb_fail(err, "no-permission", NULL, "%s could not be made: %s", each, strerror(err));
            return rb_cure(err, "as root: install -d -m 2770 -g ringbar %s", each);
        }
    }
    return 0;
}

static int taken(const char *name, int32_t pid)
{
    rb_fail(EBUSY, "name-taken", NULL, "a worker named %s runs in process %d", name, pid);
    return rb_cure(EBUSY, "give this one another name, or stop that: ringbar worker stop %s", name);
}

/* The file of that name, with our lock on it, and no other than the one under its path. own_mutex held. */
static int lock_file(const char *name, const char *path)
{
    for (int tries = 0; tries < 16; tries++) {
        struct stat st, now;
        int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0640);
        if (fd < 0) {
            int err = errno;
            rb_fail(err, "no-permission", NULL, "%s cannot be written: %s", path, strerror(err));
            return rb_cure(err, "%s", rb_group_cure());
        }
        struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 1};
        if (fcntl(fd, F_SETLK, &l) != 0) {
            int32_t pid = locked_by(fd);
            close(fd);
            return taken(name, pid);
        }
        if (fstat(fd, &st) == 0 && stat(path, &now) == 0 && st.st_ino == now.st_ino && st.st_dev == now.st_dev)
            return fd;
        close(fd); /* removed meanwhile */
    }
    return rb_fail(EBUSY, "busy", "try again", "%s comes and goes", path);
}

int rb_record_open(struct rb_worker *w, const char *name)
{
    struct rb_worker_file *f = calloc(1, sizeof *f);
    struct rb_holder me;
    int rc = f ? path_of(name, f->path) : rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    if (rc == 0)
        rc = make_directory();
    if (rc < 0) {
        free(f);
        return rc;
    }
    rb_holder_me(&me);
    pthread_mutex_lock(&own_mutex);
    for (struct rb_worker_file *o = own; o && rc == 0; o = o->next)
        if (strcmp(o->path, f->path) == 0)
            rc = taken(name, me.pid);
    if (rc == 0 && (f->fd = lock_file(name, f->path)) < 0)
        rc = f->fd;
    if (rc == 0) {
        rb_share_file(f->fd, 0640);
        f->map = MAP_FAILED;
        if (ftruncate(f->fd, 0) == 0 && ftruncate(f->fd, sizeof *f->map) == 0)
            f->map = mmap(NULL, sizeof *f->map, PROT_READ | PROT_WRITE, MAP_SHARED, f->fd, 0);
        if (f->map == MAP_FAILED) {
            rc = rb_fail(errno, "failed", NULL, "%s: %s", f->path, strerror(errno));
            unlink(f->path);
            close(f->fd);
        }
    }
    if (rc == 0) {
        struct record *r = f->map;
        r->size = sizeof *r;
        r->abi = RB_ABI_VERSION;
        r->pid = me.pid;
        r->start = me.start;
        r->since_ns = r->seen_ns = me.since_ns;
        r->idle = w->options.idle;
        r->core = (uint32_t)w->options.core;
        snprintf(r->name, sizeof r->name, "%s", name);
        snprintf(r->kind, sizeof r->kind, "%s", w->ops ? w->ops->name : "flow");
        memcpy(r->program, me.name, sizeof r->program);
        w->file = f;
        f->next = own;
        own = f;
        rb_order();
        r->magic = RECORD_MAGIC; /* last: now it is one */
    }
    pthread_mutex_unlock(&own_mutex);
    if (rc < 0)
        free(f);
    return rc;
}

/* Word by word: each is stored after `version` became odd, and loaded before it is looked at again. */
static void store(void *to, const void *from, size_t size)
{
    rb_a64 *t = to;
    for (size_t i = 0; i < size / 8; i++) {
        uint64_t word;
        memcpy(&word, (const uint8_t *)from + 8 * i, 8);
        rb_store_release(&t[i], word);
    }
}

static void load(void *to, const void *from, size_t size)
{
    const rb_a64 *f = from;
    for (size_t i = 0; i < size / 8; i++) {
        uint64_t word = rb_load_acquire(&f[i]);
        memcpy((uint8_t *)to + 8 * i, &word, 8);
    }
}
static_assert(sizeof(rb_worker_stats) % 8 == 0 && sizeof(rb_worker_port) % 8 == 0 && sizeof(struct record) % 8 == 0 && offsetof(struct record, stats) % 8 == 0 &&
                  offsetof(struct record, port) % 8 == 0 && offsetof(struct record, policy) % 8 == 0 && offsetof(struct record, seen_ns) % 8 == 0,
              "a record is copied in words");

static void write_record(struct rb_worker *w, bool everything)
{
    struct record *r = w->file->map;
    rb_worker_port port[8];
    rb_worker_stats stats;
    char policy[sizeof r->policy] = "";
    uint64_t now = rb_now_ns();
    w->published = rb_cycles();
    rb_set(&r->version, rb_get(&r->version) + 1);
    if (everything) {
        if (w->ops == &rb_kind_balancer || w->ops == &rb_kind_fanout)
            snprintf(policy, sizeof policy, "%s", w->policy.text);
        store(r->policy, policy, sizeof policy);
        rb_store_release(&r->ports, w->ins + w->outs);
    }
    store(&r->seen_ns, &now, sizeof now);
    rb_worker_stats_get(w, &stats);
    store(&r->stats, &stats, sizeof stats);
    for (uint32_t from = 0; from < w->ins + w->outs; from += 8) {
        uint32_t n = RB_MIN(w->ins + w->outs - from, 8u);
        rb_ports_describe(w, from, n, port);
        store(&r->port[from], port, n * sizeof *port);
    }
    rb_store_release(&r->version, rb_get(&r->version) + 1);
}

void rb_record_write(struct rb_worker *w)
{
    if (w->file)
        write_record(w, false);
}

void rb_record_describe(struct rb_worker *w)
{
    if (w->file)
        write_record(w, true);
}

void rb_record_close(struct rb_worker *w)
{
    struct rb_worker_file *f = w->file;
    if (!f)
        return;
    pthread_mutex_lock(&own_mutex);
    for (struct rb_worker_file **at = &own; *at; at = &(*at)->next)
        if (*at == f) {
            *at = f->next;
            break;
        }
    unlink(f->path); /* while it is locked: nobody else's by that name is removed */
    munmap(f->map, sizeof *f->map);
    close(f->fd);
    pthread_mutex_unlock(&own_mutex);
    free(f);
    w->file = NULL;
}

/* ---- reading --------------------------------------------------------------------------------------------------------------------- */

/* A copy, if it can be one that was not being written meanwhile. A process killed in the middle leaves old and new mixed, each value a value. */
static void copy(const struct record *r, struct record *out)
{
    for (int tries = 0; tries < 1000; tries++) {
        uint32_t before = rb_load_acquire(&r->version);
        load(out, r, sizeof *out);
        if (!(before & 1) && rb_get(&r->version) == before)
            return;
        rb_pause();
    }
}

static void terminate(char *text, size_t size) { text[size - 1] = 0; }

static int tell(struct record *r, int32_t pid, rb_worker_info *info, rb_worker_port *ports, int n)
{
    int count = (int)RB_MIN(rb_get(&r->ports), RECORD_PORTS);
    terminate(r->name, sizeof r->name);
    terminate(r->kind, sizeof r->kind);
    terminate(r->policy, sizeof r->policy);
    terminate(r->program, sizeof r->program);
    terminate(r->stats.message, sizeof r->stats.message);
    if (info) {
        memset(info, 0, sizeof *info);
        memcpy(info->name, r->name, sizeof info->name);
        memcpy(info->kind, r->kind, sizeof info->kind);
        memcpy(info->policy, r->policy, sizeof info->policy);
        memcpy(info->program, r->program, sizeof info->program);
        info->pid = pid;
        info->last_pid = r->pid;
        info->since_ns = r->since_ns;
        info->seen_ns = r->seen_ns;
        info->idle = r->idle;
        info->core = r->core;
        info->stats = r->stats;
        if (!pid && r->stats.running) { /* killed: it can't have said so itself */
            info->stats.running = 0;
            info->stats.error = -EOWNERDEAD;
            snprintf(info->stats.message, sizeof info->stats.message, "process %d (%s) died", r->pid, r->program);
        }
    }
    for (int i = 0; ports && i < n && i < count; i++) {
        ports[i] = r->port[i];
        terminate(ports[i].address, sizeof ports[i].address);
    }
    return count;
}

static int no_worker(const char *name)
{
    rb_fail(ENOENT, "no-such-worker", NULL, "there is no worker named %s", name);
    return rb_cure(ENOENT, "see: ringbar worker list");
}

/* The file of another process. */
static int read_file(const char *name, const char *path, struct record *out, int32_t *pid)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW), rc = 0;
    if (fd < 0 && errno == ENOENT)
        return no_worker(name);
    if (fd < 0)
        return rb_fail(errno, "no-permission", rb_group_cure(), "%s: %s", path, strerror(errno));
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode) || st.st_size != sizeof *out) {
        close(fd);
        return no_worker(name);
    }
    struct record *map = mmap(NULL, sizeof *map, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        rc = rb_fail(errno, "failed", NULL, "%s: %s", path, strerror(errno));
    else {
        *pid = locked_by(fd); /* first: a worker that ends after this look was alive at it */
        copy(map, out);
        munmap(map, sizeof *map);
        if (out->magic != RECORD_MAGIC || out->size != sizeof *out || out->abi != RB_ABI_VERSION)
            rc = no_worker(name);
    }
    close(fd);
    return rc;
}

int rb_worker_read(const char *name, rb_worker_info *info, rb_worker_port *ports, int n)
{
    char path[PATH_MAX];
    struct record *r = malloc(sizeof *r);
    int32_t pid = 0;
    int rc = r ? path_of(name, path) : rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    if (rc == 0) {
        bool ours = false;
        pthread_mutex_lock(&own_mutex); /* also: no file of ours comes to be between the look and the open */
        for (struct rb_worker_file *f = own; f && !ours; f = f->next)
            if (strcmp(f->path, path) == 0) {
                copy(f->map, r);
                pid = (int32_t)getpid();
                ours = true;
            }
        if (!ours)
            rc = read_file(name, path, r, &pid);
        pthread_mutex_unlock(&own_mutex);
    }
    if (rc == 0)
        rc = tell(r, pid, info, ports, n);
    free(r);
    return rc;
}

int rb_worker_list(rb_worker_info *out, int n)
{
    char path[PATH_MAX];
    int count = 0;
    directory(path);
    DIR *d = opendir(path);
    if (!d)
        return errno == ENOENT ? 0 : rb_fail(errno, "no-permission", rb_group_cure(), "%s: %s", path, strerror(errno));
    for (struct dirent *e; (e = readdir(d));) {
        rb_worker_info info;
        if (!good_name(e->d_name) || rb_worker_read(e->d_name, &info, NULL, 0) < 0)
            continue;
        if (count < n)
            out[count] = info;
        count++;
    }
    closedir(d);
    return count;
}

int rb_worker_forget(const char *name)
{
    char path[PATH_MAX];
    int rc = path_of(name, path), fd;
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&own_mutex);
    for (struct rb_worker_file *f = own; f && rc == 0; f = f->next)
        if (strcmp(f->path, path) == 0)
            rc = taken(name, (int32_t)getpid());
    if (rc == 0 && access(path, F_OK) != 0)
        rc = no_worker(name);
    if (rc == 0) {
        if ((fd = lock_file(name, path)) < 0)
            rc = fd;
        else {
            unlink(path);
            close(fd);
        }
    }
    pthread_mutex_unlock(&own_mutex);
    return rc;
}
