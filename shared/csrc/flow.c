/* SPDX-License-Identifier: Apache-2.0
 *
 * Packets with sequence numbers: the thread that generates and verifies. What a packet is: flow_make.c; what becomes of it: flow_check.c.
 */
#include "rb_flow.h"

#include <stdio.h>
#include <stdlib.h>

struct flow {
    rb_end *out, *in;
    struct rb_flow_maker make;
    struct rb_flow_checker check;
    rb_flow_options o;
    uint64_t started, last, token_at; /* monotonic */
    uint64_t wire;                    /* bytes on a wire of what was made since token_at */
    uint64_t due_from;                /* packets made before token_at */
    rb_a64 next, sent, sent_bytes, refused;
    rb_a64 finish; /* 1: nothing new is made */
    rb_desc held[RB_MAX_BURST];
    int holding;
};

/* Most time that is made good after a pause of this thread or of the receiver; more is given up. */
#define CATCH_UP_NS 1000000000ull

/* How many may go now: by number, by window, by rate. */
static uint32_t allowed(struct flow *f, uint32_t most)
{
    uint64_t next = rb_get(&f->next), n = most;
    if (f->o.packets)
        n = RB_MIN(n, f->o.packets - next);
    if (f->o.window) {
        /* Packets that an earlier sender left on the way can be more than were sent so far. */
        uint64_t back = rb_get(&f->check.distinct) + rb_get(&f->check.late), out = next > back ? next - back : 0;
        n = RB_MIN(n, out < f->o.window ? f->o.window - out : 0);
    }
    if (f->o.pps > 0 || f->o.bps > 0) {
        uint64_t now = rb_mono_ns(), took = now - f->token_at, made = next - f->due_from;
        double part = (double)took / 1e9;
        double behind = f->o.pps > 0 ? part - (double)made / f->o.pps : part - (double)f->wire * 8 / f->o.bps;
        if (behind * 1e9 > (double)CATCH_UP_NS) {
            f->token_at = now - CATCH_UP_NS;
            f->due_from = next;
            f->wire = 0;
            part = (double)CATCH_UP_NS / 1e9;
            made = 0;
        }
        if (f->o.pps > 0) {
            uint64_t due = (uint64_t)(part * f->o.pps);
            n = RB_MIN(n, due > made ? due - made : 0);
        }
        if (f->o.bps > 0) {
            double due = part * f->o.bps / 8, wire = (double)f->wire;
            uint64_t k = 0;
            while (k < n && (wire += rb_flow_length(&f->make, next + k) + RB_FLOW_WIRE) <= due)
                k++;
            n = k;
        }
    }
    return (uint32_t)n;
}

static int generate(struct rb_worker *w, struct flow *f)
{
    int n = f->holding, sent;
    if (!n) {
        n = (int)allowed(f, w->options.burst);
        if (n && (n = rb_alloc(f->out, f->held, n)) < 0)
            return n;
        uint64_t now = rb_now_ns(), next = rb_get(&f->next);
        for (int i = 0; i < n; i++, next++) {
            uint32_t length = rb_flow_length(&f->make, next);
            rb_desc_set(&f->held[i], length, rb_desc_offset(&f->held[i]), 0);
            rb_flow_make(&f->make, rb_data(f->out->c, &f->held[i]), next, now);
            f->held[i].ts = now + (uint64_t)i; /* no two the same, so that they can be put in order again */
            f->wire += length + RB_FLOW_WIRE;
        }
        rb_set(&f->next, next);
        f->holding = n;
    }
    if (!n)
        return 0;
    sent = rb_send(f->out, f->held, n, 0);
    if (sent < 0)
        return sent;
    uint64_t bytes = 0, first = rb_get(&f->sent);
    for (int i = 0; i < sent; i++)
        bytes += rb_flow_length(&f->make, first + (uint64_t)i);
    rb_count_up(&f->sent, (uint64_t)sent);
    rb_count_up(&f->sent_bytes, bytes);
    rb_count_up(&w->out->count.packets, (uint64_t)sent);
    rb_count_up(&w->out->count.bytes, bytes);
    if (sent < n) {
        rb_count_up(&f->refused, 1);
        memmove(f->held, f->held + sent, (size_t)(n - sent) * sizeof *f->held);
    }
    f->holding = n - sent;
    return sent;
}

static int verify(struct rb_worker *w, struct flow *f)
{
    rb_desc desc[RB_MAX_BURST];
    uint64_t most = w->options.burst, got = rb_get(&f->check.received);
    if (f->o.plain && f->o.packets) /* what is not counted stays for the next */
        most = RB_MIN(most, f->o.packets - RB_MIN(f->o.packets, got));
    int n = most ? rb_recv(f->in, desc, (int)most, 0) : 0;
    if (n <= 0)
        return n;
    rb_count_up(&w->in->count.packets, (uint64_t)n);
    rb_count_up(&w->in->count.bytes, rb_bytes(desc, n));
    uint64_t now = rb_now_ns();
    for (int i = 0; i < n; i++) {
        const uint8_t *p = rb_data(f->in->c, &desc[i]);
        if (p)
            rb_flow_check(&f->check, p, rb_desc_length(&desc[i]), rb_desc_flags(&desc[i]) & RB_MORE, now);
    }
    rb_return(f->in->c, desc, n);
    return n;
}

static int flow_turn(struct rb_worker *w)
{
    struct flow *f = w->kind;
    int did = 0, rc;
    if (f->in) {
        if ((rc = verify(w, f)) < 0)
            return rc;
        did += rc;
        if (!f->out && f->o.packets && rb_get(&f->check.received) >= f->o.packets)
            return -ENODATA;
    }
    if (f->out) {
        if (rb_get(&f->finish) && !rb_get(&f->next))
            return -ENODATA;
        if (rb_get(&f->finish))
            f->o.packets = rb_get(&f->next); /* it ends as if so many had been asked for */
        if ((rc = generate(w, f)) < 0)
            return rc;
        did += rc;
        if (f->o.packets && rb_get(&f->next) >= f->o.packets && !f->holding && (!f->in || rb_get(&f->check.distinct) >= f->o.packets)) {
            rb_service(f->out->c);
            return -ENODATA;
        }
    }
    if (did) {
        f->last = rb_mono_ns();
        rb_count_up(&w->bursts, 1);
        if ((rb_get(&w->loops) & 15) == 0)
            for (int i = 0; i < 2; i++)
                if (w->c[i])
                    rb_service(w->c[i]);
    }
    rb_set(&w->packets, rb_get(&f->sent) + rb_get(&f->check.received));
    rb_set(&w->bytes, rb_get(&f->sent_bytes) + rb_get(&f->check.bytes));
    return did;
}

static void flow_finish(struct rb_worker *w)
{
    struct flow *f = w->kind;
    if (f->holding)
        rb_return(f->out->c, f->held, f->holding);
    f->holding = 0;
}

static void free_flow(struct flow *f)
{
    if (!f)
        return;
    rb_flow_maker_free(&f->make);
    rb_flow_checker_free(&f->check);
    free(f);
}

static void flow_free(struct rb_worker *w) { free_flow(w->kind); }

int rb_flow_finish(rb_worker *w)
{
    struct flow *f = w->kind;
    if (w->turn != flow_turn)
        return rb_fail(EINVAL, "bad-option", NULL, "this worker is no flow");
    rb_set(&f->finish, 1);
    return 0;
}

int rb_flow_stats_get(rb_worker *w, rb_flow_stats *st)
{
    struct flow *f = w->kind;
    memset(st, 0, sizeof *st);
    if (w->turn != flow_turn)
        return rb_fail(EINVAL, "bad-option", NULL, "this worker is no flow");
    st->sent = rb_get(&f->sent);
    st->sent_bytes = rb_get(&f->sent_bytes);
    st->refused = rb_get(&f->refused);
    st->next_sequence = rb_get(&f->next);
    rb_flow_checker_stats(&f->check, st);
    st->running = rb_load_acquire(&w->running);
    st->error = atomic_load(&w->error);
    if (st->error)
        memcpy(st->message, w->message, sizeof st->message);
    /* Lost for certain only what was overtaken, or, once it is over, what never came. */
    uint64_t upto = f->out && !st->running ? st->sent : rb_get(&f->check.highest);
    if (f->in && !f->o.plain)
        st->lost = upto > st->distinct + st->corrupted ? upto - st->distinct - st->corrupted : 0;
    st->seconds = f->last > f->started ? (double)(f->last - f->started) / 1e9 : 0;
    return 0;
}

static int prepare(struct flow *f, rb_end *out, rb_end *in, const rb_flow_options *options)
{
    int rc;
    if (options)
        memcpy(&f->o, options, RB_MIN(options->struct_size, sizeof f->o));
    if (!out && !in)
        return rb_fail(EINVAL, "bad-option", NULL, "a flow needs an end to send on or to receive from");
    if ((out && out->c->worker) || (in && in->c->worker))
        return rb_fail(EBUSY, "busy", "attach a handle of its own for another worker", "a worker runs on this handle already");
    if (f->o.window && (!out || !in))
        return rb_fail(EINVAL, "bad-option", NULL, "a window counts packets until they come back, so it needs both ends");
    if (out && (rc = rb_flow_maker_init(&f->make, &f->o, out->c->buffer_size - RB_BUFFER_HEADER)) < 0)
        return rc;
    return rb_flow_checker_init(&f->check, &f->o);
}

int rb_flow_start(rb_worker **worker, rb_end *out, rb_end *in, const rb_flow_options *options, const rb_worker_options *worker_options)
{
    struct rb_worker *w = calloc(1, sizeof *w);
    struct flow *f = calloc(1, sizeof *f);
    int rc = w && f && (!in || (w->in = calloc(1, sizeof *w->in))) && (!out || (w->out = calloc(1, sizeof *w->out)))
                 ? prepare(f, out, in, options)
                 : rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    if (rc == 0) {
        f->out = out;
        f->in = in;
        f->started = f->last = f->token_at = rb_mono_ns();
        w->c[0] = out ? out->c : in->c;
        w->c[1] = out && in && in->c != out->c ? in->c : NULL;
        if (in) {
            *w->in = (struct rb_in){.end = in, .count.state = 1};
            w->ins = 1;
        }
        if (out) {
            w->out->end = out;
            w->out->count.state = 1;
            w->outs = 1;
        }
        w->turn = flow_turn;
        w->finish = flow_finish;
        w->free = flow_free;
        w->kind = f;
        rc = rb_worker_launch(w, worker_options);
    }
    if (rc < 0) {
        free_flow(f);
        if (w) {
            free(w->in);
            free(w->out);
        }
        free(w);
        return rc;
    }
    *worker = w;
    return 0;
}
