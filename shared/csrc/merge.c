/* SPDX-License-Identifier: Apache-2.0
 *
 * Merge: N inputs to one output, in order of their timestamps. Each input is in order by itself; its first WAITING packets wait here. The oldest
 * of all goes on when every input has one to compare with, or when it has waited long enough for those that have none. Packets without a
 * timestamp count as of their arrival here. What comes too late, older than what has gone on already, goes on at once.
 */
#include "rb_worker.h"

#include <stdlib.h>

enum { WAITING = 512 };

struct line { /* of one input */
    uint32_t first, count;
    struct {
        rb_desc desc;
        uint64_t time, came;
    } ring[WAITING];
};
struct merge {
    uint64_t wait;
    uint32_t lines;
    struct line line[];
};

static int merge_changed(struct rb_worker *w, const rb_plan *plan)
{
    struct merge *m = calloc(1, sizeof *m + w->ins * sizeof *m->line);
    if (!m)
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    m->wait = plan->wait_ns ? plan->wait_ns : 1000000u;
    m->lines = w->ins;
    free(w->kind); /* empty: merge_hand_on went before */
    w->kind = m;
    return 0;
}

/* The oldest goes on, as long as it is known to be that, or has waited since before `since`. */
static int pass_on(struct rb_worker *w, struct merge *m, uint64_t since)
{
    int moved = 0;
    for (;;) {
        struct line *oldest = NULL;
        bool complete = true;
        for (uint32_t i = 0; i < m->lines; i++) {
            struct line *l = &m->line[i];
            if (!l->count)
                complete &= w->in[i].over;
            else if (!oldest || l->ring[l->first].time < oldest->ring[oldest->first].time)
                oldest = l;
        }
        if (!oldest || (!complete && oldest->ring[oldest->first].came > since))
            break;
        rb_gather(w, &w->out[0], &oldest->ring[oldest->first].desc);
        oldest->first = (oldest->first + 1) % WAITING;
        oldest->count--;
        moved++;
    }
    rb_flush(w, &w->out[0]);
    return moved;
}

static int merge_turn(struct rb_worker *w)
{
    struct merge *m = w->kind;
    rb_desc desc[RB_MAX_BURST];
    uint64_t now = rb_worker_now(w), waiting = 0;
    int moved = 0;
    for (uint32_t i = 0; i < m->lines; i++) {
        struct line *l = &m->line[i];
        int n = rb_take(w, &w->in[i], desc, (int)RB_MIN(w->options.burst, WAITING - l->count));
        if (n < 0)
            return n;
        for (int k = 0; k < n; k++) {
            uint32_t at = (l->first + l->count++) % WAITING;
            l->ring[at].desc = desc[k];
            l->ring[at].time = desc[k].ts ? desc[k].ts : now;
            l->ring[at].came = now;
        }
        moved += n;
    }
    moved += pass_on(w, m, now > m->wait ? now - m->wait : 0);
    for (uint32_t i = 0; i < m->lines; i++)
        waiting += m->line[i].count;
    rb_set(&w->holding, waiting);
    int rc = rb_outputs_left(w);
    if (rc < 0)
        return rc;
    return moved || waiting || !rb_all_over(w) ? moved : -ENODATA;
}

static void merge_hand_on(struct rb_worker *w)
{
    if (w->kind)
        pass_on(w, w->kind, UINT64_MAX);
    rb_set(&w->holding, 0);
}

static void merge_free(struct rb_worker *w) { free(w->kind); }

const struct rb_worker_kind rb_kind_merge = {
    .name = "merge", .outs = 1, .changed = merge_changed, .turn = merge_turn, .leave = merge_hand_on, .finish = merge_hand_on, .free = merge_free,
};
