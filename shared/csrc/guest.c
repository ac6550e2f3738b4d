/* SPDX-License-Identifier: Apache-2.0
 * A guest's handle: lanes and pools given as descriptors (BARs of hot-plugged devices), no state. */
#include "rb_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

/* Another VM may be writing to its header: each field is read once. */
static int add_pool(struct rb_cluster *c, const rb_segment *s, void *base)
{
    const volatile struct rb_header *h = base;
    const uint64_t size = s->size;
    const uint32_t n = h->segment, bytes = h->buffer_size, count = h->buffers;
    if (n >= RB_MAX_POOLS || c->pool[n] || bytes < 256 || bytes > 16384 || (bytes & (bytes - 1)) || count < 2 || count > RB_MAX_BUFFERS ||
        (uint64_t)bytes * count > size || (c->buffer_size && c->buffer_size != bytes) || (s->slot && s->function != n + 1))
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
    c->sends = 0;
    uint32_t slot = 0; /* the one whose function 0 is this VM's lane of the cluster */
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
        if (ours && h->abi != RB_ABI_VERSION && s->function)
            ours = 0; /* function 0 says which version the host speaks */
        if (ours && h->abi != RB_ABI_VERSION)
            rc = rb_header_check(h, id, 0, "the host's lane");
        else if (ours && c->generation && generation != c->generation)
            ours = 0; /* left over from an earlier life of the cluster */
        const uint32_t kind = *(const volatile uint32_t *)&h->kind;
        if (s->slot && !s->function)
            slot = ours && kind == RB_KIND_LANE && s->writable ? s->slot : 0;
        ours = ours && s->slot == slot;
        if (rc == 0 && ours && kind == RB_KIND_POOL) {
            if (add_pool(c, s, base) < 0) { /* of a VM that wrote into the header of its own pool: what it sends is not read */
                munmap(base, s->size);
                continue;
            }
            c->writable &= s->writable != 0;
            c->sends |= s->writable != 0;
        } else if (rc == 0 && ours && kind == RB_KIND_LANE && s->writable && s->size > RB_LANE_RINGS_AT && c->lanes < RB_MAX_LANES) {
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
    c->room = c->buffers;
    if (rc == 0 && !c->lanes) {
        rb_fail(ENODEV, "not-attached", NULL, "cluster %u is not attached to this VM", id);
        rc = rb_cure(ENODEV, "on the host: ringbar attach VM %u@QUEUE", id);
    }
    if (rc == 0 && !c->pool_count[0])
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
