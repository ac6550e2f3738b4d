/* SPDX-License-Identifier: Apache-2.0
 * The ends that a worker moves packets between, and what becomes of packets that an output does not take. */
#include "rb_worker.h"

#include <stdio.h>

static void filtered(struct rb_worker *w, struct rb_port *port, uint64_t n)
{
    rb_count_up(&port->drops[RB_DROP_FILTER], n);
    rb_count_up(&w->drops[RB_DROP_FILTER], n);
    rb_count_up(&w->dropped, n);
}

int rb_take(struct rb_worker *w, struct rb_in *in, rb_desc *desc, int n)
{
    if (in->over)
        return 0;
    if (w->options.packets)
        n = (int)RB_MIN((uint64_t)n, w->options.packets - RB_MIN(w->options.packets, rb_get(&w->packets)));
    if (n <= 0)
        return 0;
    uint64_t before = in->end->st.drops[RB_DROP_FILTER];
    int got = rb_recv(in->end, desc, n, 0);
    if (__builtin_expect(in->end->filter != NULL, 0))
        filtered(w, &in->count, in->end->st.drops[RB_DROP_FILTER] - before);
    if (got > 0) {
        uint64_t bytes = rb_bytes(desc, got);
        rb_count_up(&in->count.packets, (uint64_t)got);
        rb_count_up(&in->count.bytes, bytes);
        rb_count_up(&w->packets, (uint64_t)got);
        rb_count_up(&w->bytes, bytes);
        rb_count_up(&w->bursts, 1);
        return got;
    }
    if (got == -ENODATA) {
        in->over = true;
        rb_set(&in->count.state, 2);
        return 0;
    }
    if (got < 0 && got != -EINTR)
        rb_set(&in->count.state, 3);
    return got;
}

bool rb_all_over(const struct rb_worker *w)
{
    if (w->options.packets && rb_get(&w->packets) >= w->options.packets)
        return true;
    for (uint32_t i = 0; i < w->ins; i++)
        if (!w->in[i].over)
            return false;
    return true;
}

void rb_discard(struct rb_worker *w, struct rb_out *out, const rb_desc *desc, int n, int reason)
{
    if (n <= 0)
        return;
    if (out) {
        rb_drop(out->end, n, reason);
        rb_count_up(&out->count.drops[reason], (uint64_t)n);
    }
    rb_count_up(&w->drops[reason], (uint64_t)n);
    rb_count_up(&w->dropped, (uint64_t)n);
    rb_return(w->c[0], desc, n);
}

/* It is lost for good: the others go on. The worker ends when none is left. */
static void lose(struct rb_worker *w, struct rb_out *out, int rc)
{
    out->gone = true;
    rb_set(&out->count.state, 3);
    snprintf(w->message, sizeof w->message, "%s", rb_error());
    w->last_loss = rc;
}

int rb_outputs_left(struct rb_worker *w)
{
    for (uint32_t i = 0; i < w->outs; i++)
        if (!w->out[i].gone)
            return 0;
    return w->last_loss ? w->last_loss : -ENODEV;
}

/* May a turn last until there is room? Not when somebody wants the worker to stand still or end. */
static int can_wait(struct rb_worker *w, const struct rb_out *out)
{
    return out->patient && !rb_load_acquire(&w->stop) && !rb_get(&w->hold) && !rb_get(&w->pause);
}

static int pass(struct rb_worker *w, struct rb_out *out, rb_desc *desc, int n)
{
    int sent = 0, good = 0;
    uint64_t bytes = rb_bytes(desc, n);
    while (sent < n) {
        int rc = rb_send(out->end, desc + sent, n - sent, 0);
        if (rc == 0 && can_wait(w, out)) {
            rc = rb_send(out->end, desc + sent, n - sent, 5);
            if (rc == 0 || rc == -ETIMEDOUT)
                continue;
        }
        if (rc > 0) {
            sent += rc;
            good += rc;
        } else if (rc == -EINVAL) { /* one that cannot go out here, such as a frame too short for a NIC: a VM sends what it likes */
            bytes -= rb_desc_length(&desc[sent]);
            rb_discard(w, out, desc + sent, 1, RB_DROP_BAD);
            sent++;
        } else if (rc == -EINTR) { /* rb_break at an output means nothing here */
            continue;
        } else {
            if (rc < 0)
                lose(w, out, rc);
            bytes -= rb_bytes(desc + sent, n - sent);
            rb_discard(w, out, desc + sent, n - sent, rc < 0 ? RB_DROP_GONE : RB_DROP_FULL);
            break;
        }
    }
    rb_count_up(&out->count.packets, (uint64_t)good);
    rb_count_up(&out->count.bytes, bytes);
    return good;
}

int rb_pass(struct rb_worker *w, struct rb_out *out, rb_desc *desc, int n)
{
    if (__builtin_expect(out->gone, 0)) {
        rb_discard(w, out, desc, n, RB_DROP_GONE);
        return 0;
    }
    struct rb_filter *filter = out->end->filter;
    if (__builtin_expect(filter == NULL, 1))
        return pass(w, out, desc, n);
    int kept = rb_filter_keep(filter, w->c[0], desc, n); /* here and not in rb_send, so that what passes can be counted */
    rb_drop(out->end, n - kept, RB_DROP_FILTER);
    filtered(w, &out->count, (uint64_t)(n - kept));
    out->end->filter = NULL;
    int good = pass(w, out, desc, kept);
    out->end->filter = filter;
    return good;
}

void rb_flush(struct rb_worker *w, struct rb_out *out)
{
    int n = (int)out->held;
    out->held = 0;
    if (n)
        rb_pass(w, out, out->desc, n);
}

/* What sending on an output will touch: with many outputs it is no longer in the cache when their turn comes. Where it is, first; then it. */
static void ahead(const struct rb_worker *w, uint32_t at)
{
    if (at + 6 < w->outs)
        __builtin_prefetch(&w->out[at + 6].end->ctx);
    if (at + 4 < w->outs) {
        const uint8_t *l = (const uint8_t *)w->out[at + 4].end->ctx;
        __builtin_prefetch(l); /* of nowhere does no harm */
        __builtin_prefetch(l + 64);
        __builtin_prefetch(l + 128);
    }
    if (at + 2 >= w->outs || !w->out[at + 2].held || !w->out[at + 2].end->ctx)
        return;
    const struct rb_leg_ctx *l = w->out[at + 2].end->ctx;
    rb_prefetch_write(&l->ring.ctl->p);
    rb_prefetch_write(&l->rec->committed[0]);
    rb_prefetch_write(&l->rec->packets);
    __builtin_prefetch(&l->rec->client_book);
    __builtin_prefetch(&l->ring.ctl->c);
    for (uint32_t i = 0; i < w->out[at + 2].held; i += 4)
        rb_prefetch_write(&l->ring.forward[(l->ring.p + i) & l->ring.mask]);
}

int rb_flush_all(struct rb_worker *w)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < w->outs; i++) {
        ahead(w, i);
        n += w->out[i].held;
        rb_flush(w, &w->out[i]);
    }
    return (int)n;
}
