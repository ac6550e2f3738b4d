/* SPDX-License-Identifier: Apache-2.0
 *
 * Delay: what comes from input i goes to output i, a time later. The packets stay where they are; their descriptors wait. How many can wait
 * is bounded by the credit of the inputs, and by HELD_MOST; what comes when that is full is dropped and counted ("credit").
 */
#include "rb_worker.h"

#include <stdlib.h>

enum { HELD_MOST = 1 << 20 };

struct waiting {
    rb_desc desc;
    uint64_t due;
    uint32_t output;
};
struct delay {
    uint64_t by;
    struct waiting *ring;
    uint32_t size, first, count; /* size: power of two; in order of due, since all wait equally long */
};

static int delay_changed(struct rb_worker *w, const rb_plan *plan)
{
    struct delay *d = w->kind;
    if (!d && !(d = calloc(1, sizeof *d)))
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    if (!d->ring) {
        d->size = (uint32_t)RB_MIN(rb_pow2(w->c[0]->buffers), (uint64_t)HELD_MOST);
        d->ring = malloc(d->size * sizeof *d->ring);
    }
    if (!d->ring) {
        free(d);
        w->kind = NULL;
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    }
    d->by = plan->wait_ns;
    w->kind = d;
    return 0;
}

/* All that is due by then, in runs of one output. */
static int let_go(struct rb_worker *w, struct delay *d, uint64_t then)
{
    rb_desc desc[RB_MAX_BURST];
    int moved = 0;
    while (d->count && d->ring[d->first].due <= then) {
        uint32_t output = d->ring[d->first].output;
        int n = 0;
        while (n < (int)RB_MAX_BURST && d->count && d->ring[d->first].output == output && d->ring[d->first].due <= then) {
            desc[n++] = d->ring[d->first].desc;
            d->first = (d->first + 1) & (d->size - 1);
            d->count--;
        }
        rb_pass(w, &w->out[RB_MIN(output, w->outs - 1)], desc, n);
        moved += n;
    }
    rb_set(&w->holding, d->count);
    return moved;
}

static int delay_turn(struct rb_worker *w)
{
    struct delay *d = w->kind;
    rb_desc desc[RB_MAX_BURST];
    uint64_t now = rb_worker_now(w);
    int moved = let_go(w, d, now);
    for (uint32_t i = 0; i < w->ins; i++) {
        int n = rb_take(w, &w->in[i], desc, (int)w->options.burst);
        if (n < 0)
            return n;
        int room = (int)RB_MIN(d->size - d->count, (uint32_t)n);
        /* After a shorter delay was set, nothing overtakes what came before. */
        uint64_t due = now + d->by;
        if (d->count)
            due = RB_MAX(due, d->ring[(d->first + d->count - 1) & (d->size - 1)].due);
        for (int k = 0; k < room; k++)
            d->ring[(d->first + d->count++) & (d->size - 1)] = (struct waiting){.desc = desc[k], .due = due, .output = i};
        rb_discard(w, &w->out[i], desc + room, n - room, RB_DROP_CREDIT);
        moved += n;
    }
    rb_set(&w->holding, d->count);
    int rc = rb_outputs_left(w);
    if (rc < 0)
        return rc;
    return moved || d->count || !rb_all_over(w) ? moved : -ENODATA;
}

static void delay_finish(struct rb_worker *w)
{
    if (w->kind)
        let_go(w, w->kind, UINT64_MAX);
}

static void delay_free(struct rb_worker *w)
{
    struct delay *d = w->kind;
    if (d)
        free(d->ring);
    free(d);
}

const struct rb_worker_kind rb_kind_delay = {
    .name = "delay", .outs = 0, .changed = delay_changed, .turn = delay_turn, .finish = delay_finish, .free = delay_free,
};
