/* SPDX-License-Identifier: Apache-2.0
 * A guest's handle: lanes and pools given as descriptors (BARs of hot-plugged devices), no state. */
#include "rb_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

static int add_pool(struct rb_cluster *c, void *base, uint64_t size)
{
    const struct rb_header *h = base;
    uint32_t n = h->segment, bytes = h->buffer_size, count = h->buffers;
    if (n >= RB_MAX_POOLS || c->pool[n] || bytes < 256 || bytes > 16384 || (bytes & (bytes - 1)) || count > RB_MAX_BUFFERS ||
        (uint64_t)bytes * count > size || (c->buffer_size && c->buffer_size != bytes))
        return rb_fail(EPROTO, "not-a-segment", NULL, "a pool of cluster %u has an impossible header", c->id);
    c->buffer_size = bytes;
    c->pool[n] = base;
    c->pool_size[n] = size;
    c->pool_count[n] = count;
    return 0;
}

int rb_cluster_attach_segments(uint32_t id, const rb_segment *segments, uint32_t count, rb_cluster **out)
{
    struct rb_cluster *c = calloc(1, sizeof *c);
    int rc = c ? 0 : rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    if (rc < 0)
        return rc;
    c->id = id;
    c->fork_count = rb_fork_count;
    c->writable = 1;
    for (uint32_t i = 0; i < count && rc == 0; i++) {
        const rb_segment *s = &segments[i];
        void *base = mmap(NULL, s->size, PROT_READ | (s->writable ? PROT_WRITE : 0), MAP_SHARED, s->fd, (off_t)s->offset);
        if (base == MAP_FAILED) {
            rc = rb_fail(errno, errno == EPERM ? "no-permission" : "failed", errno == EPERM ? "run as root (CAP_SYS_RAWIO), without kernel lockdown" : NULL,
                         "device memory could not be mapped: %s", strerror(errno));
            break;
        }
        const struct rb_header *h = base;
        uint64_t generation = rb_load_acquire((rb_a64 *)&h->generation);
        int ours = s->size >= 4096 && h->magic == RB_MAGIC && h->cluster == id && generation && h->size <= s->size &&
                   rb_get((rb_a32 *)&h->state) == RB_SEG_OPEN;
        if (ours && h->abi != RB_ABI_VERSION)
            rc = rb_header_check(h, id, 0, "the host's lane");
        else if (ours && c->generation && generation != c->generation)
            ours = 0; /* left over from an earlier life of the cluster */
        if (rc == 0 && ours && h->kind == RB_KIND_POOL) {
            rc = add_pool(c, base, s->size);
            c->writable &= s->writable != 0;
        } else if (rc == 0 && ours && h->kind == RB_KIND_LANE && s->size > RB_LANE_RINGS_AT && c->lanes < RB_MAX_LANES) {
            c->lane[c->lanes++] = (struct rb_lane_map){base, s->size, 0};
        } else {
            munmap(base, s->size);
            continue;
        }
        c->generation = generation;
        if (rc < 0)
            munmap(base, s->size);
    }
    for (uint32_t i = 0; i < RB_MAX_POOLS; i++)
        if (c->pool_count[i]) {
            c->pool_base[i] = c->buffers;
            c->buffers += (c->pool_count[i] + RB_EXTENT - 1) & ~(RB_EXTENT - 1);
        }
    if (rc == 0 && !c->lanes) {
        rb_fail(ENODEV, "not-attached", NULL, "cluster %u is not attached to this VM", id);
        rc = rb_cure(ENODEV, "on the host: ringbar attach VM %u@QUEUE", id);
    }
    if (rc == 0 && !c->buffers)
        rc = rb_fail(ENODEV, "not-attached", "detach the VM and attach it again", "cluster %u came without a pool", id);
    if (rc == 0 && !(c->where = calloc(c->buffers, sizeof *c->where)))
        rc = rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    if (rc == 0)
        rc = rb_registry_locks(id, &c->locks);
    if (rc < 0) {
        c->locks = NULL;
        rb_cluster_close(c);
        return rc;
    }
    *out = c;
    return 0;
}
