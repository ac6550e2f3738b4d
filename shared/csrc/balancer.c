/* SPDX-License-Identifier: Apache-2.0
 *
 * Balancer: every packet to one output, which the policy chooses. Packets are gathered for each output and sent on together: with many outputs
 * over several bursts, so that the cost of a packet does not grow with their number, but never while nothing comes in.
 */
#include "rb_worker.h"

#include <stdlib.h>

enum { SLOTS_MOST = 65536, GATHER = 16 /* packets that an output should have before it is worth a call */ };

int rb_share_make(const struct rb_worker *w, uint32_t group, struct rb_share **out)
{
    uint32_t slots = 0, outs = 0, first = 0;
    for (uint32_t i = w->outs; i-- > 0;)
        if (w->out[i].group == group) {
            slots += w->out[i].weight;
            outs++;
            first = i;
        }
    if (slots > SLOTS_MOST)
        return rb_fail(EINVAL, "bad-option", NULL, "the weights of a group's outputs together are at most %d, not %u", SLOTS_MOST, slots);
    struct rb_share *s = calloc(1, sizeof *s + slots * sizeof *s->output);
    if (!s)
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    s->slots = slots;
    s->first = first;
    s->plain = slots == outs; /* outputs of a group lie side by side */
    for (uint32_t i = 0, at = 0; i < w->outs; i++)
        for (uint32_t k = 0; w->out[i].group == group && k < w->out[i].weight; k++)
            s->output[at++] = (uint16_t)i;
    *out = s;
    return 0;
}

int rb_choose_by_user(struct rb_worker *w, const rb_desc *desc, int n, uint64_t *choice)
{
    void *packet[RB_MAX_BURST];
    for (int i = 0; i < n; i++) {
        packet[i] = rb_packet(w->c[0], &desc[i]);
        __builtin_prefetch(packet[i]);
        choice[i] = w->ops == &rb_kind_balancer ? RB_NOWHERE : 0;
    }
    int rc = w->policy.choose(w->policy.user, desc, packet, n, choice);
    if (rc >= 0)
        return 0;
    rb_discard(w, NULL, desc, n, RB_DROP_FILTER);
    return rb_fail(-rc, "failed", NULL, "the function that chooses outputs returned %d", rc);
}

struct balancer {
    struct rb_share *share;
    uint32_t gathered, turns; /* since the last flush of all; most of them */
};

static int balancer_changed(struct rb_worker *w, const rb_plan *plan)
{
    struct balancer *b = w->kind;
    struct rb_share *share;
    (void)plan;
    for (uint32_t i = 0; i < w->outs; i++)
        if (w->out[i].group)
            return rb_fail(EINVAL, "bad-option", "start a fanout for several groups", "a balancer has one group of outputs");
    int rc = rb_share_make(w, 0, &share);
    if (rc < 0)
        return rc;
    if (!b && !(b = w->kind = calloc(1, sizeof *b))) {
        free(share);
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    }
    free(b->share);
    b->share = share;
    b->turns = RB_MAX(1u, w->outs * GATHER / RB_BURST);
    return 0;
}

static int balance(struct rb_worker *w, const struct rb_share *share, uint32_t input, const rb_desc *desc, int n)
{
    uint32_t number[RB_MAX_BURST];
    uint64_t choice[RB_MAX_BURST];
    if (w->policy.kind == RB_BY_FUNCTION) {
        int rc = rb_choose_by_user(w, desc, n, choice);
        for (int i = 0; rc == 0 && i < n; i++)
            if (choice[i] < w->outs)
                rb_gather(w, &w->out[choice[i]], &desc[i]);
            else
                rb_discard(w, NULL, &desc[i], 1, RB_DROP_FILTER);
        return rc;
    }
    bool hashed = rb_policy_numbers(&w->policy, w->c[0], input, desc, n, number);
    for (int i = 0; i < n; i++)
        rb_gather(w, &w->out[rb_share_of(share, number[i], hashed)], &desc[i]);
    return 0;
}

static int balancer_turn(struct rb_worker *w)
{
    struct balancer *b = w->kind;
    rb_desc desc[RB_MAX_BURST];
    int moved = 0, sent = 0, full = 0, rc;
    for (uint32_t i = 0; i < w->ins; i++) {
        int n = rb_take(w, &w->in[i], desc, (int)w->options.burst);
        if (n < 0)
            return n;
        if (n && (rc = balance(w, b->share, i, desc, n)) < 0)
            return rc;
        full |= n == (int)w->options.burst; /* there is more where that came from */
        moved += n;
    }
    if (!full || ++b->gathered >= b->turns) {
        b->gathered = 0;
        sent = rb_flush_all(w);
        if ((rc = rb_outputs_left(w)) < 0)
            return rc;
    }
    return moved || sent || !rb_all_over(w) ? moved + sent : -ENODATA;
}

static void balancer_free(struct rb_worker *w)
{
    struct balancer *b = w->kind;
    if (b)
        free(b->share);
    free(b);
}

const struct rb_worker_kind rb_kind_balancer = {
    .name = "balancer", .outs = RB_WORKER_OUTS, .changed = balancer_changed, .turn = balancer_turn, .free = balancer_free,
};
