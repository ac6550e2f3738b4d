/* SPDX-License-Identifier: Apache-2.0
 *
 * Pools that one VM transmits from: its empties come from there and from nowhere else, it alone maps it writable, and others read what it sent. Pool 0 is
 * everybody's. Such a pool is made for a VM's lane, is at home in the book that serves that lane, as a whole, and goes when the VM has let go and every
 * buffer is back. Numbers in the ledgers lie behind the common pool's; room for them was made with the cluster.
 */
#include "rb_internal.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define MOST (RB_MAX_POOLS - 2) /* with a lane and the common pool they fill the 8 functions of a PCI slot */

static uint32_t extents_of(uint32_t buffers) { return (buffers + RB_EXTENT - 1) / RB_EXTENT; }

static int mapped_life(const struct rb_segment_record *r)
{
    uint32_t state = rb_get(&r->state);
    return state == RB_SEG_OPEN || state == RB_SEG_CLOSING;
}

int rb_pools_sync(struct rb_cluster *c)
{
    struct rb_state *s = c->reg->state;
    uint32_t epoch = rb_load_acquire(&s->pools_epoch), end = 0;
    int failed = 0;
    for (uint32_t p = 0; p < RB_MAX_POOLS; p++) {
        struct rb_segment_record *r = &s->pool[p];
        struct rb_mapping m = {0};
        uint32_t life = rb_get(&r->life);
        if (c->pool[p] && (!mapped_life(r) || c->pool_life[p] != life)) { /* all its buffers are home, so nobody here has one */
            munmap(c->pool[p], c->pool_size[p]);
            c->pool[p] = NULL;
            c->pool_count[p] = 0;
        }
        if (!c->pool[p] && mapped_life(r)) {
            int rc = rb_segment_map(r, &m); /* sizes from `state`: a VM that sends can write into the pool's header */
            if (rc < 0) {
                failed = rc;
                continue;
            }
            c->pool[p] = m.base;
            c->pool_size[p] = m.size;
            c->pool_base[p] = r->first;
            c->pool_count[p] = r->buffers;
            c->pool_life[p] = life;
        }
        if (c->pool_count[p])
            end = RB_MAX(end, c->pool_base[p] + extents_of(c->pool_count[p]) * RB_EXTENT);
    }
    c->buffers = end;
    if (!failed)
        c->pools_epoch = epoch;
    return c->pool[0] ? 0 : failed;
}

uint32_t rb_pools_open(struct rb_cluster *c)
{
    uint32_t open = 0;
    for (uint32_t p = 0; p < RB_MAX_POOLS; p++)
        open |= rb_get(&c->reg->state->pool[p].state) == RB_SEG_OPEN ? 1u << p : 0;
    return open;
}

uint32_t rb_pool_own(struct rb_cluster *c, uint32_t lane)
{
    for (uint32_t p = 1; p < RB_MAX_POOLS; p++)
        if (c->reg->state->pool[p].own == lane + 1 && mapped_life(&c->reg->state->pool[p]))
            return p;
    return 0;
}

/* Numbers for so many buffers, that no pool has; 0 when there are none. */
static uint32_t find_numbers(const struct rb_state *s, uint32_t buffers)
{
    uint32_t at = extents_of(s->buffers) * RB_EXTENT, size = extents_of(buffers) * RB_EXTENT;
    for (int moved = 1; moved;) {
        moved = 0;
        for (uint32_t p = 1; p < RB_MAX_POOLS; p++) {
            const struct rb_segment_record *r = &s->pool[p];
            uint32_t end = r->first + extents_of(r->buffers) * RB_EXTENT;
            if (mapped_life(r) && r->first < at + size && at < end) {
                at = end;
                moved = 1;
            }
        }
    }
    return (uint64_t)at + size <= s->capacity ? at : 0;
}

static int pool_new(struct rb_cluster *c, uint32_t lane, uint32_t buffers)
{
    struct rb_state *s = c->reg->state;
    struct rb_mapping m = {0};
    uint32_t p = 1, first = find_numbers(s, buffers), pages = s->pages == RB_PAGES_4K ? RB_PAGES_4K : RB_PAGES_AUTO, life;
    while (p <= MOST && rb_get(&s->pool[p].state) != RB_SEG_FREE)
        p++;
    if (p > MOST) {
        rb_fail(ENOSPC, "too-many-pools", NULL, "%u VMs transmit from pools of their own in cluster %u, which is the most", MOST, c->id);
        return rb_cure(ENOSPC, "ringbar attach --pool rw, with which the VM can change all packets of the cluster");
    }
    if (!first) {
        rb_fail(ENOSPC, "pool-too-small", NULL, "cluster %u has no room for %u more buffers of a VM's own", c->id, buffers);
        return rb_cure(ENOSPC, "queues with fewer slots, a cluster made with more --buffers, or --pool rw");
    }
    struct rb_segment_record *r = &s->pool[p];
    life = rb_get(&r->life);
    memset(r, 0, sizeof *r);
    rb_set(&r->life, life + 1);
    /* Never sealed: that would need a process that keeps it. */
    int rc = rb_segment_create(c->id, RB_KIND_POOL, p, rb_pow2((uint64_t)buffers * c->buffer_size), &pages, -1, 0, c->generation, r->path, NULL, &m);
    if (rc < 0)
        return rc;
    struct rb_header *h = m.base;
    h->buffer_size = c->buffer_size;
    h->buffers = buffers;
    r->pages = pages;
    r->size = m.size;
    r->buffers = buffers;
    r->first = first;
    r->own = lane + 1;
    memcpy(r->vm, s->lane[lane].vm, sizeof r->vm);
    for (uint32_t i = 0; i < RB_MAX_LANES; i++) /* whoever mapped the pool that had this number does not map this one */
        rb_set(&s->lane[i].pools, rb_get(&s->lane[i].pools) & ~(1u << p));
    rb_set(&s->lane[lane].pools, rb_get(&s->lane[lane].pools) | 1u << p);
    rb_store_release(&r->state, RB_SEG_OPEN);
    rb_store_release(&s->pools_epoch, rb_get(&s->pools_epoch) + 1);
    rb_unmap(&m);
    return (int)p;
}

int rb_lane_pool(rb_cluster *c, uint32_t lane, uint32_t buffers)
{
    int rc = rb_alive(c);
    if (rc < 0)
        return rc;
    if (!c->reg)
        return rb_fail(ENOTSUP, "guest", "do it on the host", "VMs are attached on the host");
    if (buffers < 2 * RB_EXTENT || buffers > RB_MAX_BUFFERS)
        return rb_fail(EINVAL, "bad-size", NULL, "a pool of %u buffers cannot be had: %u to %u can", buffers, 2 * RB_EXTENT, RB_MAX_BUFFERS);
    if ((rc = rb_enter(c->reg)) < 0)
        return rc;
    const struct rb_segment_record *r = lane < RB_MAX_LANES ? &c->reg->state->lane[lane] : NULL;
    if (!r || rb_get(&r->state) != RB_SEG_OPEN || !r->vm[0] || strncmp(r->vm, "direct:", 7) == 0)
        rc = rb_fail(ENOENT, "no-such-lane", NULL, "cluster %u has no lane %u of a VM", c->id, lane);
    else if ((rc = (int)rb_pool_own(c, lane)) == 0) {
        for (uint32_t n = 0; n < RB_MAX_QUEUES && rc == 0; n++)
            if (c->reg->state->queue[n].used && c->reg->state->queue[n].end[0].lane == lane + 1)
                rc = rb_fail(EBUSY, "busy", "detach the VM and attach it again", "VM %s sends on %u@%u already, from the common pool", r->vm, c->id, n);
        if (rc == 0 && (rc = pool_new(c, lane, buffers)) > 0)
            rb_pools_look(c);
    }
    rb_leave(c->reg);
    return rc;
}

/* ---- in a book ---------------------------------------------------------------------------------------------------- */

static int make_stack(struct rb_server *s, uint32_t pool)
{
    struct rb_own *own = &s->own[pool];
    if (own->stack)
        return 0;
    own->free = 0;
    own->stack = malloc(s->c->pool_count[pool] * sizeof *own->stack);
    return own->stack ? 0 : rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
}

int rb_pool_stacks(struct rb_server *s)
{
    struct rb_cluster *c = s->c;
    for (uint32_t p = 1; p < RB_MAX_POOLS; p++) {
        int rc = c->pool_count[p] && c->reg->extent[c->pool_base[p] / RB_EXTENT] == s->book + 1 ? make_stack(s, p) : 0;
        if (rc < 0)
            return rc;
        s->own[p].free = 0;
    }
    return 0;
}

int rb_pool_claim(struct rb_server *s, uint32_t pool)
{
    struct rb_cluster *c = s->c;
    int rc = rb_enter(c->reg);
    if (rc < 0)
        return rc;
    rb_pools_look(c);
    uint32_t base = c->pool_base[pool] / RB_EXTENT, end = base + extents_of(c->pool_count[pool]);
    if (rb_get(&c->reg->state->pool[pool].state) != RB_SEG_OPEN)
        end = base;
    for (uint32_t e = base; e < end && rc == 0; e++)
        if (c->reg->extent[e] && c->reg->extent[e] != s->book + 1)
            rc = rb_fail(EBUSY, "busy", "ringbar status takes home what dead programs held", "buffers of the VM's own pool are still in another program's book");
    if (rc == 0 && base < end)
        rc = make_stack(s, pool);
    for (uint32_t e = base; rc == 0 && e < end; e++) {
        if (c->reg->extent[e]) /* this book's from before it was taken over */
            continue;
        for (uint32_t i = RB_EXTENT; i-- > 0;) {
            uint32_t number = e * RB_EXTENT + i, handle = rb_handle_of(c, number);
            if (rb_number(c, handle) == number)
                rb_server_home(s, number, handle);
        }
        rb_order();
        c->reg->extent[e] = (uint8_t)(s->book + 1);
    }
    rb_leave(c->reg);
    return rc;
}

void rb_pool_release(struct rb_server *s)
{
    struct rb_cluster *c = s->c;
    uint32_t home = 0;
    for (uint32_t p = 1; p < RB_MAX_POOLS; p++)
        home |= s->closing >> p & 1 && s->own[p].free == c->pool_count[p] - 1 ? 1u << p : 0;
    if (!home || rb_enter(c->reg) < 0)
        return;
    for (uint32_t p = 1; p < RB_MAX_POOLS; p++) {
        if (!(home >> p & 1))
            continue;
        for (uint32_t e = c->pool_base[p] / RB_EXTENT, n = extents_of(c->pool_count[p]); n; e++, n--) {
            c->reg->extent[e] = 0;
            rb_order();
            for (uint32_t i = 0; i < RB_EXTENT; i++)
                rb_set(&s->ledger[e * RB_EXTENT + i], 0);
        }
        free(s->own[p].stack);
        s->own[p] = (struct rb_own){0};
    }
    s->closing &= ~home;
    rb_pool_sweep(c);
    rb_leave(c->reg);
}

void rb_pool_close(struct rb_cluster *c, uint32_t lane)
{
    uint32_t p = rb_pool_own(c, lane), book;
    if (!p)
        return;
    struct rb_segment_record *r = &c->reg->state->pool[p];
    rb_set(&r->state, RB_SEG_CLOSING);
    r->own = UINT32_MAX; /* the lane's number may be another VM's soon */
    if ((book = c->reg->extent[r->first / RB_EXTENT]) != 0)
        rb_settle(c, book, 2000);
    rb_pool_sweep(c);
}

void rb_pool_sweep(struct rb_cluster *c)
{
    struct rb_state *s = c->reg->state;
    for (uint32_t p = 1; p < RB_MAX_POOLS; p++) {
        struct rb_segment_record *r = &s->pool[p];
        uint32_t used = 0;
        if (rb_get(&r->state) != RB_SEG_CLOSING)
            continue;
        for (uint32_t e = r->first / RB_EXTENT, n = extents_of(r->buffers); n; e++, n--)
            used |= c->reg->extent[e];
        if (used)
            continue;
        unlink(r->path);
        for (uint32_t i = 0; i < RB_MAX_LANES; i++)
            rb_set(&s->lane[i].pools, rb_get(&s->lane[i].pools) & ~(1u << p));
        rb_set(&r->state, RB_SEG_FREE);
        rb_store_release(&s->pools_epoch, rb_get(&s->pools_epoch) + 1);
    }
}
