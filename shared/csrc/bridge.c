/* SPDX-License-Identifier: Apache-2.0
 * Bridge: what comes from input i goes to output i. */
#include "rb_worker.h"

static int bridge_changed(struct rb_worker *w, const rb_plan *plan)
{
    (void)w;
    (void)plan;
    return 0;
}

static int bridge_turn(struct rb_worker *w)
{
    rb_desc desc[RB_MAX_BURST];
    int moved = 0;
    for (uint32_t i = 0; i < w->ins; i++) {
        int n = rb_take(w, &w->in[i], desc, (int)w->options.burst);
        if (n < 0)
            return n;
        /* Where several pairs share this thread, a reader that has stopped reading must not hold up the others. */
        w->out[i].patient = w->in[i].end->patient || (w->ins == 1 && w->out[i].end->patient);
        if (n && rb_pass(w, &w->out[i], desc, n) < n && w->out[i].gone) {
            int rc = rb_outputs_left(w);
            if (rc < 0)
                return rc;
        }
        moved += n;
    }
    return moved || !rb_all_over(w) ? moved : -ENODATA;
}

const struct rb_worker_kind rb_kind_bridge = {.name = "bridge", .outs = 0, .changed = bridge_changed, .turn = bridge_turn};
