/* SPDX-License-Identifier: Apache-2.0
 *
 * Fan-out: each packet to one output of every group, without a copy; a group of one output gets everything. Which output of a group, its policy
 * says; or a function of the user says for each packet to which outputs, as a mask. The buffer is lent to all of them and comes home when the last
 * has given it back (fan.c).
 */
#include "rb_worker.h"

#include <stdlib.h>

struct fanout {
    struct rb_fan *fan;
    uint32_t groups, sharing;   /* how many of them have several outputs */
    uint8_t bit[64], output[64]; /* of an output in the fan's masks, and back */
    bool same;                  /* output k has bit k */
    uint64_t all, always;       /* every output's bit; those of groups of one */
    uint64_t seen[64][RB_DROP_REASONS]; /* the ends' own counters of drops, when looked at last */
    struct rb_share *share[64]; /* of each group with several outputs */
};

static void release(struct fanout *f)
{
    if (!f)
        return;
    if (f->fan)
        rb_fan_close(f->fan);
    for (uint32_t g = 0; g < f->groups; g++)
        free(f->share[g]);
    free(f);
}

static void look_at_drops(const struct rb_worker *w, struct fanout *f, uint32_t i)
{
    memcpy(f->seen[i], w->out[i].end->st.drops, sizeof f->seen[i]);
}

static int fanout_changed(struct rb_worker *w, const rb_plan *plan)
{
    struct fanout *f = calloc(1, sizeof *f);
    uint32_t members[64] = {0};
    int rc = f ? rb_fan_open(&f->fan, w->c[0]) : rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    (void)plan;
    for (uint32_t i = 0; i < w->outs && rc >= 0; i++) {
        rc = rb_fan_add(f->fan, w->out[i].end);
        if (rc < 0)
            break;
        f->bit[i] = (uint8_t)rc;
        f->output[rc] = (uint8_t)i;
        f->all |= 1ull << rc;
        members[w->out[i].group]++;
        f->groups = RB_MAX(f->groups, w->out[i].group + 1);
        look_at_drops(w, f, i);
    }
    f->same = true;
    for (uint32_t i = 0; rc >= 0 && i < w->outs; i++) {
        f->same &= f->bit[i] == i;
        if (members[w->out[i].group] == 1)
            f->always |= 1ull << f->bit[i];
    }
    for (uint32_t g = 0; rc >= 0 && g < f->groups; g++)
        if (members[g] > 1) {
            rc = rb_share_make(w, g, &f->share[g]);
            f->sharing++;
        }
    if (rc < 0) {
        release(f);
        return rc;
    }
    release(w->kind);
    w->kind = f;
    return 0;
}

/* The user's masks name outputs by number. */
static void to_bits(const struct rb_worker *w, const struct fanout *f, uint64_t *mask, int n)
{
    const uint64_t outputs = w->outs == 64 ? ~0ull : (1ull << w->outs) - 1;
    for (int i = 0; i < n; i++) {
        uint64_t m = mask[i] == RB_NOWHERE ? 0 : mask[i] & outputs, bits = 0;
        for (; !f->same && m; m &= m - 1)
            bits |= 1ull << f->bit[__builtin_ctzll(m)];
        mask[i] = f->same ? m : bits;
    }
}

/* What the outputs got, and what they missed and why. */
static void account(struct rb_worker *w, struct fanout *f, const uint64_t *mask, const uint64_t *missed, const uint32_t *length, int n)
{
    uint64_t packets[64] = {0}, bytes[64] = {0}, lost = 0, got = 0;
    const uint64_t first = mask[0] & ~missed[0]; /* most often all packets went where the first one did */
    int alike = 0;
    uint64_t sum = 0;
    for (; alike < n && (mask[alike] & ~missed[alike]) == first && !missed[alike]; alike++)
        sum += length[alike];
    for (uint64_t m = alike ? got = first : 0; m; m &= m - 1) {
        packets[__builtin_ctzll(m)] = (uint64_t)alike;
        bytes[__builtin_ctzll(m)] = sum;
    }
    for (int i = alike; i < n; i++) {
        uint64_t m = mask[i] & ~missed[i];
        got |= m;
        lost |= missed[i];
        for (; m; m &= m - 1) {
            uint32_t b = (uint32_t)__builtin_ctzll(m);
            packets[b]++;
            bytes[b] += length[i];
        }
    }
    for (; got; got &= got - 1) {
        uint32_t b = (uint32_t)__builtin_ctzll(got);
        rb_count_up(&w->out[f->output[b]].count.packets, packets[b]);
        rb_count_up(&w->out[f->output[b]].count.bytes, bytes[b]);
    }
    for (; lost; lost &= lost - 1) {
        uint32_t i = f->output[__builtin_ctzll(lost)];
        struct rb_out *o = &w->out[i];
        for (int reason = 0; reason < RB_DROP_REASONS; reason++) {
            uint64_t more = o->end->st.drops[reason] - f->seen[i][reason];
            rb_count_up(&o->count.drops[reason], more);
            rb_count_up(&w->drops[reason], more);
            rb_count_up(&w->dropped, more);
        }
        look_at_drops(w, f, i);
    }
}

/* Filters of outputs, here and not in the fan, so that what passes can be counted. Returns which outputs have one. */
static uint64_t filter(struct rb_worker *w, struct fanout *f, const rb_desc *desc, uint64_t *mask, int n, struct rb_filter **kept)
{
    uint64_t filtering = 0;
    for (uint32_t o = 0; o < w->outs; o++) {
        struct rb_filter *expression = w->out[o].end->filter;
        const uint64_t bit = 1ull << f->bit[o];
        int away = 0;
        if (__builtin_expect(expression == NULL, 1))
            continue;
        for (int i = 0; i < n; i++)
            if (mask[i] & bit && !rb_filter_match(expression, w->c[0], &desc[i])) {
                mask[i] &= ~bit;
                away++;
            }
        rb_drop(w->out[o].end, away, RB_DROP_FILTER);
        rb_count_up(&w->out[o].count.drops[RB_DROP_FILTER], (uint64_t)away);
        rb_count_up(&w->drops[RB_DROP_FILTER], (uint64_t)away);
        rb_count_up(&w->dropped, (uint64_t)away);
        f->seen[o][RB_DROP_FILTER] += (uint64_t)away;
        filtering |= 1ull << o;
        kept[o] = expression;
        w->out[o].end->filter = NULL;
    }
    return filtering;
}

static int fan_out(struct rb_worker *w, struct fanout *f, uint32_t input, rb_desc *desc, int n)
{
    uint64_t mask[RB_MAX_BURST], missed[RB_MAX_BURST];
    uint32_t number[RB_MAX_BURST], length[RB_MAX_BURST];
    int rc = 0, nowhere = 0;
    for (int i = 0; i < n; i++) {
        mask[i] = f->always;
        length[i] = rb_desc_length(&desc[i]);
    }
    if (w->policy.kind == RB_BY_FUNCTION) {
        if ((rc = rb_choose_by_user(w, desc, n, mask)) < 0)
            return rc;
        to_bits(w, f, mask, n);
        for (int i = 0; i < n; i++)
            nowhere += mask[i] == 0;
        rb_count_up(&w->drops[RB_DROP_FILTER], (uint64_t)nowhere);
        rb_count_up(&w->dropped, (uint64_t)nowhere);
    } else if (f->sharing) {
        bool hashed = rb_policy_numbers(&w->policy, w->c[0], input, desc, n, number);
        for (uint32_t g = 0; g < f->groups; g++)
            for (int i = 0; f->share[g] && i < n; i++)
                mask[i] |= 1ull << f->bit[rb_share_of(f->share[g], number[i], hashed)];
    }
    struct rb_filter *kept[64];
    uint64_t filtering = filter(w, f, desc, mask, n, kept);
    rc = rb_fan_send(f->fan, desc, mask, n, missed);
    for (; filtering; filtering &= filtering - 1)
        w->out[__builtin_ctzll(filtering)].end->filter = kept[__builtin_ctzll(filtering)];
    if (rc < 0) {
        rb_discard(w, NULL, desc, n, RB_DROP_GONE);
        return rc;
    }
    account(w, f, mask, missed, length, n);
    return 0;
}

static int fanout_turn(struct rb_worker *w)
{
    struct fanout *f = w->kind;
    rb_desc desc[RB_MAX_BURST];
    int moved = 0, rc;
    for (uint32_t i = 0; i < w->ins; i++) {
        int n = rb_take(w, &w->in[i], desc, (int)w->options.burst);
        if (n < 0)
            return n;
        if (n && (rc = fan_out(w, f, i, desc, n)) < 0)
            return rc;
        moved += n;
    }
    return moved || !rb_all_over(w) ? moved : -ENODATA;
}

static void fanout_free(struct rb_worker *w) { release(w->kind); }

const struct rb_worker_kind rb_kind_fanout = {
    .name = "fanout", .outs = 64, .changed = fanout_changed, .turn = fanout_turn, .free = fanout_free,
};
