/* SPDX-License-Identifier: Apache-2.0
 * Segments: files on tmpfs or hugetlbfs, or sealed memfds, with a header that says what they are. */
#include "rb_internal.h"

#include <dirent.h>
#include <fcntl.h>
#include <grp.h>
#include <mntent.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

uint64_t rb_pow2(uint64_t v)
{
    uint64_t p = 1;
    while (p < v)
        p <<= 1;
    return p;
}

uint64_t rb_page_bytes(uint32_t pages) { return pages == RB_PAGES_2M ? 2ull << 20 : pages == RB_PAGES_1G ? 1ull << 30 : 4096; }
const char *rb_pages_name(uint32_t pages) { return pages == RB_PAGES_2M ? "2M" : pages == RB_PAGES_1G ? "1G" : "4k"; }

void rb_share_file(int fd, unsigned mode)
{
    struct group *group = getgrnam("ringbar");
    if (group && fchown(fd, (uid_t)-1, group->gr_gid) != 0)
        errno = 0; /* not ours to give away: the mode alone decides then */
    if (fchmod(fd, mode) != 0)
        errno = 0;
}

const char *rb_group_cure(void)
{
    return getgrnam("ringbar") ? "join group ringbar: usermod -aG ringbar USER, and log in again"
                               : "run it as root (sudo); or make the group first (groupadd --system ringbar; usermod -aG ringbar USER), then the clusters anew";
}

static const char *shm_dir(void)
{
    const char *dir = getenv("RINGBAR_SHM");
    return dir && *dir ? dir : "/dev/shm";
}

static long read_number(const char *path)
{
    FILE *f = fopen(path, "re");
    long v = -1;
    if (f) {
        if (fscanf(f, "%ld", &v) != 1)
            v = -1;
        fclose(f);
    }
    return v;
}

static long huge(uint32_t pages, const char *what)
{
    char path[128];
    snprintf(path, sizeof path, "/sys/kernel/mm/hugepages/hugepages-%lukB/%s", (unsigned long)(rb_page_bytes(pages) >> 10), what);
    return read_number(path);
}

/* Where hugetlbfs with this page size is mounted; 0 when nowhere. */
static int huge_mount(uint32_t pages, char *dir, size_t size)
{
    FILE *f = setmntent("/proc/self/mounts", "r");
    struct mntent *m;
    int found = 0;
    while (f && !found && (m = getmntent(f))) {
        if (strcmp(m->mnt_type, "hugetlbfs") != 0)
            continue;
        char *opt = hasmntopt(m, "pagesize");
        uint64_t bytes = 2ull << 20;
        if (opt && (opt = strchr(opt, '='))) {
            char unit = 0;
            unsigned long v = 0;
            if (sscanf(opt + 1, "%lu%c", &v, &unit) >= 1)
                bytes = unit == 'G' ? (uint64_t)v << 30 : unit == 'M' ? (uint64_t)v << 20 : unit == 'K' ? (uint64_t)v << 10 : v;
        }
        if (bytes == rb_page_bytes(pages)) {
            snprintf(dir, size, "%s", m->mnt_dir);
            found = 1;
        }
    }
    if (f)
        endmntent(f);
    return found;
}

static int huge_check(uint32_t pages, uint64_t size)
{
    long total = huge(pages, "nr_hugepages"), free_now = huge(pages, "free_hugepages"), reserved = huge(pages, "resv_hugepages");
    uint64_t wanted = (size + rb_page_bytes(pages) - 1) / rb_page_bytes(pages);
    if (total < 0)
        return rb_fail(ENOMEM, "no-huge-pages", "use --pages 4k", "this kernel has no huge pages of %s", rb_pages_name(pages));
    long have = free_now - (reserved > 0 ? reserved : 0);
    if ((uint64_t)RB_MAX(have, 0) < wanted) {
        long missing = (long)wanted - RB_MAX(have, 0);
        rb_fail(ENOMEM, "no-huge-pages", NULL, "%ld huge pages of %s are missing: %lu needed, %ld free", missing, rb_pages_name(pages),
                (unsigned long)wanted, RB_MAX(have, 0));
        return rb_cure(ENOMEM, "echo %ld > /sys/kernel/mm/hugepages/hugepages-%lukB/nr_hugepages, or use --pages 4k", total + missing,
                       (unsigned long)(rb_page_bytes(pages) >> 10));
    }
    return 0;
}

static int bind_to_node(void *base, uint64_t size, int node)
{
    char path[64];
    struct stat st;
    snprintf(path, sizeof path, "/sys/devices/system/node/node%d", node);
    if (node > 1023 || stat(path, &st) != 0)
        return rb_fail(EINVAL, "no-such-node", "see: ls -d /sys/devices/system/node/node*", "this machine has no NUMA node %d", node);
    unsigned long mask[16] = {0};
    mask[node / 64] = 1ul << node % 64;
    if (syscall(SYS_mbind, base, size, 2 /* MPOL_BIND */, mask, 1024ul, 0u) != 0)
        return rb_fail(errno, "no-memory", NULL, "memory could not be bound to NUMA node %d: %s", node, strerror(errno));
    return 0;
}

int rb_segment_create(uint32_t cluster, uint32_t kind, uint32_t number, uint64_t size, uint32_t *pages, int numa, int sealed,
                      uint64_t generation, char *path, int *keep_fd, struct rb_mapping *out)
{
    static const char *names[] = {"", "pool", "lane", "state"};
    char dir[96];
    int fd, rc;

    if (*pages == RB_PAGES_AUTO) /* huge where they are to be had for nothing */
        *pages = kind == RB_KIND_POOL && !sealed && huge_mount(RB_PAGES_2M, dir, sizeof dir) && size >= 2ull << 20 &&
                         huge(RB_PAGES_2M, "free_hugepages") - huge(RB_PAGES_2M, "resv_hugepages") >= (long)(size >> 21)
                     ? RB_PAGES_2M
                     : RB_PAGES_4K;
    int is_huge = *pages != RB_PAGES_4K;
    if (is_huge && size < rb_page_bytes(*pages))
        size = rb_page_bytes(*pages);
    if (is_huge && (rc = huge_check(*pages, size)) < 0)
        return rc;
    if (sealed) {
        snprintf(dir, sizeof dir, "ringbar.%u.%s%u", cluster, names[kind], number);
        unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
        if (is_huge)
            flags |= MFD_HUGETLB | (*pages == RB_PAGES_2M ? 21u : 30u) << 26;
        fd = memfd_create(dir, flags);
        if (fd < 0)
            return rb_fail(errno, "no-memory", NULL, "no memfd could be made: %s", strerror(errno));
        snprintf(path, 128, "/proc/%d/fd/%d", (int)getpid(), fd);
    } else {
        snprintf(dir, sizeof dir, "%s", shm_dir());
        if (is_huge && !huge_mount(*pages, dir, sizeof dir)) {
            rb_fail(ENOMEM, "no-hugetlbfs", NULL, "hugetlbfs with pages of %s is mounted nowhere", rb_pages_name(*pages));
            return rb_cure(ENOMEM, "mkdir -p /dev/hugepages%s && mount -t hugetlbfs -o pagesize=%s none /dev/hugepages%s", rb_pages_name(*pages),
                           rb_pages_name(*pages), rb_pages_name(*pages));
        }
        snprintf(path, 128, "%s/ringbar.%u.%s%u", dir, cluster, names[kind], number);
        unlink(path); /* of a dead cluster: whoever maps it still keeps it */
        fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0660);
        if (fd < 0) {
            rb_fail(errno, errno == EACCES || errno == EPERM ? "no-permission" : "no-memory", NULL, "%s could not be made: %s", path, strerror(errno));
            return errno == EACCES ? rb_cure(errno, "run as root, or as a member of group ringbar with write access to %s", dir) : -errno;
        }
        rb_share_file(fd, 0660);
    }
    if (!is_huge && !sealed && kind != RB_KIND_STATE) {
        struct statvfs fs;
        if (fstatvfs(fd, &fs) == 0 && (uint64_t)fs.f_bavail * fs.f_frsize < size) {
            rb_fail(ENOSPC, "no-memory", NULL, "%s has %llu MiB free, %llu MiB are needed", dir,
                    (unsigned long long)((uint64_t)fs.f_bavail * fs.f_frsize >> 20), (unsigned long long)(size >> 20));
            rc = rb_cure(ENOSPC, "make it larger (mount -o remount,size=... %s) or ask for fewer buffers", dir);
            goto fail;
        }
    }
    if (ftruncate(fd, (off_t)size) != 0) {
        rc = rb_fail(errno, "no-memory", NULL, "%s could not be made %llu bytes long: %s", path, (unsigned long long)size, strerror(errno));
        goto fail;
    }
    out->size = size;
    out->base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (out->base == MAP_FAILED) {
        rc = rb_fail(errno, "no-memory", NULL, "%s could not be mapped: %s", path, strerror(errno));
        goto fail;
    }
    if (numa >= 0 && (rc = bind_to_node(out->base, size, numa)) < 0) {
        munmap(out->base, size);
        goto fail;
    }
    /* Allocate now what a packet may need later: a hole in a full tmpfs would be a SIGBUS in the data path. `state` stays sparse, its ledgers
     * have room for far more than exists. */
    if (kind != RB_KIND_STATE && (rc = posix_fallocate(fd, 0, (off_t)size)) != 0) {
        munmap(out->base, size);
        rc = rb_fail(rc, "no-memory", "ask for fewer buffers, or free memory", "%llu MiB of memory for %s are not to be had: %s",
                     (unsigned long long)(size >> 20), path, strerror(rc));
        goto fail;
    }
    if (sealed && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
        rc = rb_fail(errno, "no-memory", NULL, "%s could not be sealed: %s", path, strerror(errno));
        munmap(out->base, size);
        goto fail;
    }
    struct rb_header *h = out->base;
    h->abi = RB_ABI_VERSION;
    h->kind = kind;
    h->cluster = cluster;
    h->segment = number;
    h->size = size;
    h->created_ns = rb_now_ns();
    rb_set(&h->state, RB_SEG_OPEN);
    rb_set(&h->epoch, 1);
    rb_store_release(&h->generation, generation);
    h->magic = RB_MAGIC;
    if (keep_fd)
        *keep_fd = fd;
    else
        close(fd);
    return 0;
fail:
    if (!sealed)
        unlink(path);
    close(fd);
    return rc;
}

int rb_header_check(const struct rb_header *h, uint32_t cluster, uint64_t generation, const char *what)
{
    if (h->magic != RB_MAGIC)
        return rb_fail(EPROTO, "not-a-segment", NULL, "%s is no segment of ringbar", what);
    if (h->abi != RB_ABI_VERSION)
        return rb_fail(EPROTO, "abi-mismatch", "use the same version of ringbar on host and guest", "%s speaks ABI version %u, this library speaks %u",
                       what, h->abi, RB_ABI_VERSION);
    if (h->cluster != cluster)
        return rb_fail(ENOENT, "no-such-cluster", NULL, "%s belongs to cluster %u, not to %u", what, h->cluster, cluster);
    uint64_t g = rb_load_acquire((rb_a64 *)&h->generation);
    if (!g || (generation && g != generation))
        return rb_fail(ENODEV, "detached", NULL, "%s belongs to a cluster that is gone", what);
    return 0;
}

int rb_segment_open(const char *path, uint32_t cluster, uint32_t kind, uint64_t generation, int writable, struct rb_mapping *out, int *keep_fd)
{
    struct stat st;
    int fd = open(path, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    if (fd < 0) {
        int err = errno;
        if (err == EACCES || err == EPERM)
            return rb_fail(EACCES, "no-permission", rb_group_cure(), "no permission to open %s", path);
        return rb_fail(err, err == ENOENT ? "no-such-cluster" : "failed", NULL, "%s could not be opened: %s", path, strerror(err));
    }
    if (fstat(fd, &st) != 0 || st.st_size < 4096 || (st.st_size & (st.st_size - 1))) {
        close(fd);
        return rb_fail(EPROTO, "not-a-segment", NULL, "%s has a size that no segment has", path);
    }
    out->size = (uint64_t)st.st_size;
    out->base = mmap(NULL, out->size, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED, fd, 0);
    if (out->base == MAP_FAILED) {
        int err = errno;
        close(fd);
        return rb_fail(err, "no-memory", NULL, "%s could not be mapped: %s", path, strerror(err));
    }
    if (keep_fd)
        *keep_fd = fd;
    else
        close(fd);
    const struct rb_header *h = out->base;
    int rc = rb_header_check(h, cluster, generation, path);
    if (rc == 0 && (h->kind != kind || h->size != out->size))
        rc = rb_fail(EPROTO, "not-a-segment", NULL, "%s is a segment of another kind or size", path);
    if (rc < 0) {
        rb_unmap(out);
        if (keep_fd)
            close(*keep_fd);
    }
    return rc;
}

int rb_segment_map(const struct rb_segment_record *r, struct rb_mapping *out)
{
    struct stat st;
    int fd = open(r->path, O_RDWR | O_CLOEXEC), err;
    out->base = MAP_FAILED;
    if (fd >= 0 && fstat(fd, &st) == 0 && (uint64_t)st.st_size == r->size)
        out->base = mmap(NULL, r->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    err = errno;
    if (fd >= 0)
        close(fd);
    out->size = r->size;
    if (out->base != MAP_FAILED)
        return 0;
    out->base = NULL;
    if (err == EACCES || err == EPERM)
        return rb_fail(EACCES, "no-permission", rb_group_cure(), "no permission to open %s", r->path);
    return rb_fail(ENODEV, "detached", NULL, "%s%s%s could not be mapped: %s", r->vm[0] ? "the lane of VM " : "", r->vm[0] ? r->vm : "", r->vm[0] ? "" : r->path,
                   strerror(err));
}

void rb_unmap(struct rb_mapping *m)
{
    if (m->base)
        munmap(m->base, m->size);
    m->base = NULL;
}
