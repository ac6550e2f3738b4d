/* SPDX-License-Identifier: Apache-2.0
 *
 * One packet to many. A buffer that goes to several outputs is SHARED in the ledger, with a bit for each of them in its mask; a bit goes when the
 * output gives it back, and with the last the buffer is home. Here are the bits and the outputs; lending is in fan_lend.c.
 */
#include "rb_fan.h"

#include <stdlib.h>

/* ---- bits ------------------------------------------------------------------------------------------------------------- */

static void free_bit(struct rb_server *s, uint32_t i)
{
    uint32_t to = rb_get(&s->rec->output[i]);
    struct rb_leg_ctx *l = to && !(to & RB_OUTPUT_DEVICE) ? s->leg[to - 1] : NULL;
    if (!l || l->shared || (!s->acting && s->c->bit_fans[i]))
        return;
    rb_set(&s->rec->output[i], 0);
    l->bit = 0;
}

/* A bit that stands for nothing: its number, or RB_MAX_OUTPUTS. */
static uint32_t some_bit(struct rb_cluster *c, struct rb_server *s)
{
    static const uint8_t none[RB_MAX_OUTPUTS];
    const uint8_t *fans = s && s->acting ? none : c->bit_fans; /* a dead book has no fans */
    for (int tries = 0; tries < 2; tries++) {
        for (uint32_t i = 0; i < RB_MAX_OUTPUTS; i++)
            if (!fans[i] && !(s && rb_get(&s->rec->output[i])))
                return i;
        for (uint32_t i = 0; s && i < RB_MAX_OUTPUTS; i++) /* of legs that were sent on to once */
            free_bit(s, i);
    }
    return RB_MAX_OUTPUTS;
}

uint64_t rb_leg_bit(struct rb_server *s, struct rb_leg_ctx *l)
{
    if (l->bit)
        return l->bit;
    uint32_t i = some_bit(s->c, s);
    if (i == RB_MAX_OUTPUTS)
        return 0;
    rb_set(&s->rec->output[i], l->number + 1);
    rb_order();
    return l->bit = 1ull << i;
}

uint64_t rb_device_bit(struct rb_server *s, uint32_t device, bool make)
{
    uint32_t i;
    for (i = 0; i < RB_MAX_OUTPUTS; i++)
        if (rb_get(&s->rec->output[i]) == (RB_OUTPUT_DEVICE | device))
            return 1ull << i;
    if (!make || (i = some_bit(s->c, s)) == RB_MAX_OUTPUTS)
        return 0;
    rb_set(&s->rec->output[i], RB_OUTPUT_DEVICE | device);
    rb_order();
    return 1ull << i;
}

void rb_device_unbit(struct rb_server *s, uint32_t device)
{
    uint64_t bit = rb_device_bit(s, device, false);
    if (bit)
        rb_set(&s->rec->output[__builtin_ctzll(bit)], 0);
}

/* Can the VM, or group of VMs, of this domain send on what it received? */
static int sends(struct rb_server *s, uint32_t domain)
{
    for (uint32_t i = 0; domain && i < s->actives; i++)
        if (s->active[i]->domain == domain && s->active[i]->kind != RB_LEG_LEND)
            return 1;
    return 0;
}

int rb_fan_conflict(struct rb_server *s, const struct rb_leg_ctx *l, uint64_t mask)
{
    uint32_t i;
    if (!l->domain || !sends(s, l->domain))
        return 0;
    EACH_BIT(mask, i)
    {
        uint32_t to = rb_get(&s->rec->output[i]);
        const struct rb_leg_ctx *o = to && !(to & RB_OUTPUT_DEVICE) ? s->leg[to - 1] : NULL;
        if (o && o != l && o->domain == l->domain)
            return 1;
    }
    return 0;
}

int rb_unshare(struct rb_server *s, uint32_t number, uint32_t handle, uint64_t bit)
{
    struct rb_cluster *c = s->c;
    uint64_t w = rb_get(&s->ledger[number]), mask = rb_get(&s->masks[number]);
    int held = !s->acting && (c->where[number] & RB_HAND) == RB_HAND_SHARED;
    if (!(mask & bit))
        return 0;
    if (mask != bit) {
        rb_set(&s->masks[number], mask & ~bit);
    } else if (RB_WORD_SUBKIND(w) == RB_SUB_SHARED) {
        struct rb_end *origin = held ? rb_client_end_of(c, RB_WORD_ORIGIN(w)) : NULL;
        rb_set(&s->ledger[number], RB_WORD_LEVEL0(w));
        if (held) /* nobody else has it any more */
            c->where[number] = (c->where[number] & ~(uint32_t)RB_HAND) | (origin ? RB_HAND_BORROWED + origin->index : RB_HAND_NONE);
        else if (!s->acting)
            rb_give(c, RB_WORD_ORIGIN(w), handle);
    } else if (RB_WORD_SUBKIND(w)) {
        return 0; /* what it is a loan of has not come back */
    } else if (held) {
        rb_set(&s->ledger[number], RB_WORD(RB_W_HOME, 0));
        c->where[number] += RB_HAND_HOME - RB_HAND_SHARED;
    } else
        rb_server_home(s, number, handle);
    return 1;
}

/* ---- outputs ---------------------------------------------------------------------------------------------------------- */

/* What changed since the last burst: ends that are gone, VMs that can send by now. */
static void look_again(struct rb_fan *f)
{
    struct rb_server *s = f->c->server;
    uint32_t i, k;
    f->lending = f->devices = f->copied = f->conflicting = 0;
    EACH_BIT(f->used, i)
    {
        struct output *o = &f->out[i];
        o->l = o->end->ctx;
        if (o->l)
            f->lending |= 1ull << i;
        else if (o->end->ops->share)
            f->devices |= 1ull << i;
        else if (o->end->device || o->end->lane) /* else its queue is gone */
            f->copied |= 1ull << i;
    }
    EACH_BIT(f->lending, i)
    {
        struct output *o = &f->out[i];
        o->conflicts = 0;
        if (o->l->domain && sends(s, o->l->domain))
            EACH_BIT(f->lending & ~(1ull << i), k)
                if (f->out[k].l->domain == o->l->domain)
                    o->conflicts |= 1ull << k;
        if (o->conflicts)
            f->conflicting |= 1ull << i;
    }
    f->epoch = s ? s->epoch : 0;
}

int rb_fan_open(rb_fan **out, rb_cluster *c)
{
    int rc = rb_alive(c);
    if (rc < 0)
        return rc;
    struct rb_fan *f = calloc(1, sizeof *f);
    if (!f)
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    f->c = c;
    f->next = c->fans;
    c->fans = f;
    *out = f;
    return 0;
}

int rb_fan_add(rb_fan *f, rb_end *end)
{
    struct rb_cluster *c = f->c;
    uint32_t i;
    int rc = rb_alive(c);
    if (rc < 0)
        return rc;
    if (end->c != c)
        return rb_fail(EINVAL, "bad-option", "open it with the fan's handle", "%s was opened with another handle", end->address);
    if (!(end->flags & RB_TX) || !end->ops->send)
        return rb_fail(EINVAL, "bad-option", "open it with RB_TX", "%s was opened for receiving", end->address);
    EACH_BIT(f->used, i)
        if (f->out[i].end == end)
            return rb_fail(EEXIST, "bad-option", NULL, "%s is an output of this fan already", end->address);
    i = RB_MAX_OUTPUTS;
    for (struct rb_fan *o = c->fans; o && i == RB_MAX_OUTPUTS; o = o->next)
        for (uint32_t k = 0; k < RB_MAX_OUTPUTS && i == RB_MAX_OUTPUTS; k++)
            if (o->out[k].end == end)
                i = k;
    if (i == RB_MAX_OUTPUTS && end->ctx) {
        uint64_t bit = rb_leg_bit(c->server, end->ctx);
        i = bit ? (uint32_t)__builtin_ctzll(bit) : RB_MAX_OUTPUTS;
    } else if (i == RB_MAX_OUTPUTS && end->ops->share) {
        uint64_t bit = rb_device_bit(c->server, end->ops->number(end), true);
        i = bit ? (uint32_t)__builtin_ctzll(bit) : RB_MAX_OUTPUTS;
    } else if (i == RB_MAX_OUTPUTS)
        i = some_bit(c, c->server);
    if (i == RB_MAX_OUTPUTS)
        return rb_fail(ENOSPC, "too-many-outputs", "let one output be a queue that another fan-out reads", "a fan-out has at most %u outputs", RB_MAX_OUTPUTS);
    c->bit_fans[i]++;
    f->out[i] = (struct output){.end = end};
    f->used |= 1ull << i;
    look_again(f);
    return (int)i;
}

static void take_out(struct rb_fan *f, uint32_t i)
{
    f->used &= ~(1ull << i);
    f->out[i] = (struct output){0};
    f->c->bit_fans[i]--;
    look_again(f);
}

int rb_fan_remove(rb_fan *f, int bit)
{
    if (bit < 0 || bit >= (int)RB_MAX_OUTPUTS || !(f->used >> bit & 1))
        return rb_fail(ENOENT, "bad-number", NULL, "the fan has no output %d", bit);
    take_out(f, (uint32_t)bit);
    return 0;
}

void rb_fan_forget(struct rb_end *end)
{
    for (struct rb_fan *f = end->c->fans; f; f = f->next)
        for (uint32_t i = 0; i < RB_MAX_OUTPUTS; i++)
            if (f->out[i].end == end)
                take_out(f, i);
}

void rb_fan_close(rb_fan *f)
{
    uint32_t i;
    if (!f)
        return;
    EACH_BIT(f->used, i)
        f->c->bit_fans[i]--;
    for (struct rb_fan **p = &f->c->fans; *p; p = &(*p)->next)
        if (*p == f) {
            *p = f->next;
            break;
        }
    free(f);
}

void rb_fans_free(struct rb_cluster *c)
{
    while (c->fans)
        rb_fan_close(c->fans);
}

/* ---- outputs that are copied to -------------------------------------------------------------------------------------------- */

/* To one output that is not lent to: it reads the bytes at once, or gets copies. In a guest the last output of a packet gets the buffer itself, `gone`
 * then, after the copies for the others were made. */
static void copy_to(struct rb_fan *f, uint32_t b, const rb_desc *d, const uint64_t *mask, uint32_t n, uint64_t *missed, uint64_t *served, bool *gone)
{
    struct rb_cluster *c = f->c;
    struct rb_end *end = f->out[b].end;
    const uint64_t bit = 1ull << b;
    rb_desc out[RB_MAX_BURST];
    uint32_t which[RB_MAX_BURST], hand[RB_MAX_BURST], k = 0, done = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t at = rb_number(c, d[i].handle);
        if (!(mask[i] & bit))
            continue;
        missed[i] |= bit; /* until it is */
        if (at == UINT32_MAX || !(c->where[at] & RB_HAND) || !rb_fits(c, d[i].word) || (c->where[at] & RB_HAND) == RB_HAND_PEEK)
            continue;
        which[k] = i;
        hand[k] = c->where[at] & RB_HAND;
        out[k] = d[i];
        if (end->ops->copies) {
            c->where[at] += RB_HAND_PEEK - hand[k];
        } else if (gone && (mask[i] & f->used) >> b == 1) {
            gone[i] = true;
        } else {
            int rc = end->ops->alloc ? end->ops->alloc(end, &out[k], 1) : 0;
            if (rc <= 0) {
                rb_drop(end, 1, RB_DROP_NO_BUFFER);
                continue;
            }
            rb_desc_set(&out[k], rb_desc_length(&d[i]), rb_desc_offset(&d[i]), rb_desc_flags(&d[i]) & ~(uint32_t)RB_SHARED);
            out[k].ts = d[i].ts;
            memcpy(rb_data(c, &out[k]), rb_data(c, &d[i]), rb_desc_length(&d[i]));
            end->st.copied++;
        }
        k++;
    }
    while (done < k) {
        int rc = end->ops->send(end, out + done, (int)(k - done));
        if (rc == -EINVAL) { /* one that cannot go out here: the others can */
            rb_drop(end, 1, RB_DROP_BAD);
            if (!end->ops->copies)
                rb_return(c, out + done, 1);
            done++;
            continue;
        }
        if (rc <= 0)
            break;
        for (int j = 0; j < rc; j++, done++) {
            missed[which[done]] &= ~bit;
            served[which[done]] |= bit;
        }
    }
    rb_drop(end, (int)(k - done), RB_DROP_FULL);
    if (!end->ops->copies && done < k)
        rb_return(c, out + done, (int)(k - done));
    for (uint32_t j = 0; end->ops->copies && j < k; j++) {
        uint32_t at = rb_number(c, out[j].handle);
        c->where[at] = (c->where[at] & ~(uint32_t)RB_HAND) | hand[j];
    }
}

static int send_in_guest(struct rb_fan *f, const rb_desc *d, const uint64_t *mask, uint32_t n, uint64_t *missed, uint64_t *served)
{
    bool gone[RB_MAX_BURST] = {false};
    uint64_t any = 0;
    uint32_t b, sent = 0;
    for (uint32_t i = 0; i < n; i++)
        any |= mask[i] & f->used;
    EACH_BIT(any, b)
        copy_to(f, b, d, mask, n, missed, served, gone);
    for (uint32_t i = 0; i < n; i++) {
        if (!gone[i])
            rb_return(f->c, &d[i], 1);
        sent += served[i] != 0;
    }
    return (int)sent;
}

/* The masks without the outputs whose filter, of the end or of its queue, a packet does not pass. */
static void filter_some(struct rb_fan *f, uint64_t filters, const rb_desc *d, const uint64_t *mask, uint32_t n, uint64_t *out)
{
    uint32_t b;
    memcpy(out, mask, n * sizeof *out);
    EACH_BIT(filters, b)
    {
        struct output *o = &f->out[b];
        uint32_t dropped = 0;
        for (uint32_t i = 0; i < n; i++)
            if (mask[i] >> b & 1 && ((o->end->filter && !rb_filter_match(o->end->filter, f->c, &d[i])) ||
                                     (o->l && o->l->filter && !rb_filter_match(o->l->filter, f->c, &d[i])))) {
                out[i] &= ~(1ull << b);
                dropped++;
            }
        rb_drop(o->end, (int)dropped, RB_DROP_FILTER);
    }
}

int rb_fan_send(rb_fan *f, const rb_desc *desc, const uint64_t *mask, int n, uint64_t *missed)
{
    struct rb_cluster *c = f->c;
    struct rb_server *s = c->server;
    int rc = rb_alive(c), sent = 0;
    if (rc < 0)
        return rc;
    if (s && rb_load_acquire(&s->rec->epoch) != s->epoch && (rc = rb_server_sync(s)) < 0)
        return rc;
    if (s && s->epoch != f->epoch)
        look_again(f);
    for (int from = 0; from < n; from += (int)RB_MAX_BURST) {
        uint32_t k = (uint32_t)RB_MIN(n - from, (int)RB_MAX_BURST), b;
        uint64_t lost[RB_MAX_BURST], served[RB_MAX_BURST], kept[RB_MAX_BURST], any = 0, filters = 0;
        const uint64_t *to = mask + from;
        for (uint32_t i = 0; i < k; i++) {
            lost[i] = to[i] & ~f->used;
            served[i] = 0;
            any |= to[i];
        }
        EACH_BIT(any & f->used, b)
            filters |= (uint64_t)(f->out[b].end->filter || (f->out[b].l && f->out[b].l->filter)) << b;
        if (__builtin_expect(filters != 0, 0)) {
            filter_some(f, filters, desc + from, to, k, kept);
            to = kept;
        }
        if (c->reg) {
            EACH_BIT(any & f->copied, b)
                copy_to(f, b, desc + from, to, k, lost, served, NULL);
            EACH_BIT(any & f->used & ~(f->lending | f->devices | f->copied), b)
                for (uint32_t i = 0; i < k; i++)
                    if (to[i] >> b & 1) {
                        lost[i] |= 1ull << b;
                        rb_drop(f->out[b].end, 1, RB_DROP_GONE);
                    }
            sent += rb_fan_lend(f, desc + from, to, k, lost, served);
        } else
            sent += send_in_guest(f, desc + from, to, k, lost, served);
        if (missed)
            memcpy(missed + from, lost, k * sizeof *missed);
    }
    return sent;
}
