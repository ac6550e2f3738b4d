/* SPDX-License-Identifier: Apache-2.0
 * Plans: between which ends a worker moves packets, and how; checked, taken up as a whole, and exchanged between two turns. */
#include "rb_bell.h"
#include "rb_worker.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

static const struct rb_worker_kind *const kinds[] = {&rb_kind_bridge, &rb_kind_balancer, &rb_kind_fanout, &rb_kind_merge, &rb_kind_delay};

static int bad_plan(const char *what) { return rb_fail(EINVAL, "bad-option", NULL, "%s", what); }

static int check(const struct rb_worker_kind *kind, struct rb_cluster *c, const rb_plan *p)
{
    uint32_t groups = 0;
    if (p->ins < 1 || p->outs < 1 || !p->in || !p->out)
        return rb_fail(EINVAL, "bad-option", NULL, "a %s needs an input and an output", kind->name);
    if (p->ins > RB_WORKER_INS || p->outs > (kind->outs ? kind->outs : RB_WORKER_INS))
        return rb_fail(EINVAL, "bad-option", NULL, "a %s has at most %u inputs and %u outputs", kind->name, RB_WORKER_INS, kind->outs ? kind->outs : RB_WORKER_INS);
    if (!kind->outs && p->ins != p->outs)
        return rb_fail(EINVAL, "bad-option", NULL, "%u inputs, %u outputs: a %s has one for each", p->ins, p->outs, kind->name);
    for (uint32_t i = 0; i < p->ins; i++) {
        if (!p->in[i] || p->in[i]->c != c)
            return rb_fail(EINVAL, "bad-option", "open all of them with one handle", "the ends of a worker belong to one handle");
        if (!p->in[i]->ops->recv)
            return rb_fail(EINVAL, "bad-option", "open it with RB_RX", "%s was opened for sending", p->in[i]->address);
        for (uint32_t k = 0; k < i; k++)
            if (p->in[k] == p->in[i])
                return rb_fail(EINVAL, "bad-option", NULL, "%s is an input twice", p->in[i]->address);
    }
    for (uint32_t i = 0; i < p->outs; i++) {
        const rb_output *o = &p->out[i];
        if (!o->end || o->end->c != c)
            return rb_fail(EINVAL, "bad-option", "open all of them with one handle", "the ends of a worker belong to one handle");
        if (!o->end->ops->send)
            return rb_fail(EINVAL, "bad-option", "open it with RB_TX", "%s was opened for receiving", o->end->address);
        if (o->group > groups || o->weight > 1024)
            return bad_plan(o->weight > 1024 ? "weights go from 1 to 1024" : "the groups of outputs are numbered from 0, without gaps, in order");
        groups = RB_MAX(groups, o->group + 1);
        for (uint32_t k = 0; k < i && kind->outs; k++)
            if (p->out[k].end == o->end)
                return rb_fail(EINVAL, "bad-option", NULL, "%s is an output twice", o->end->address);
    }
    return 0;
}

/* What an event-driven worker sleeps on: `wake`, and a place for each input. A queue's is filled in before each sleep: its bell may come and go. */
static int make_poll(struct rb_worker *w, struct pollfd **made, int *most_ms)
{
    struct pollfd *p = calloc(w->ins + 1, sizeof *p);
    uint32_t n = 1;
    int ms = RB_BELL_MS;
    if (!p)
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    if (w->wake <= 0 && (w->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) < 0) {
        free(p);
        return rb_fail(errno, "failed", NULL, "no event descriptor: %s", strerror(errno));
    }
    p[0] = (struct pollfd){.fd = w->wake, .events = POLLIN};
    for (uint32_t i = 0; i < w->ins; i++) {
        struct rb_end *end = w->in[i].end;
        p[n++] = (struct pollfd){.fd = end->ops->fd && !w->in[i].over ? end->ops->fd(end) : -1, .events = POLLIN};
        if (!w->in[i].over && end->device)
            ms = RB_MIN(ms, p[n - 1].fd < 0 ? 1 : 20);
    }
    *made = p;
    *most_ms = ms;
    return 0;
}

/* The counters of an end that was there before go on. */
static void keep(struct rb_port *to, const struct rb_port *from)
{
    rb_set(&to->packets, rb_get(&from->packets));
    rb_set(&to->bytes, rb_get(&from->bytes));
    for (int i = 0; i < RB_DROP_REASONS; i++)
        rb_set(&to->drops[i], rb_get(&from->drops[i]));
}

static int adopt(struct rb_worker *w, const rb_plan *given)
{
    rb_plan plan = {0};
    struct rb_policy policy;
    memcpy(&plan, given, RB_MIN(given->struct_size, sizeof plan));
    int rc = check(w->ops, w->c[0], &plan);
    if (rc < 0 || (rc = rb_policy_parse(plan.policy, plan.choose, plan.user, &policy)) < 0)
        return rc;
    struct rb_in *in = calloc(plan.ins, sizeof *in), *old_in = w->in;
    struct rb_out *out = calloc(plan.outs, sizeof *out), *old_out = w->out;
    uint32_t old_ins = w->ins, old_outs = w->outs;
    struct rb_policy old_policy = w->policy;
    if (!in || !out) {
        rc = rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
        goto out;
    }
    if (old_out && w->ops->leave)
        w->ops->leave(w);
    rb_flush_all(w);
    for (uint32_t i = 0; i < plan.ins; i++) {
        in[i].end = plan.in[i];
        rb_set(&in[i].count.state, 1);
        for (uint32_t k = 0; k < old_ins; k++)
            if (old_in[k].end == in[i].end)
                keep(&in[i].count, &old_in[k].count);
    }
    for (uint32_t i = 0; i < plan.outs; i++) {
        out[i].end = plan.out[i].end;
        out[i].group = plan.out[i].group;
        out[i].weight = plan.out[i].weight ? plan.out[i].weight : 1;
        rb_set(&out[i].count.state, 1);
        for (uint32_t k = 0; k < old_outs; k++)
            if (old_out[k].end == out[i].end)
                keep(&out[i].count, &old_out[k].count);
    }
    w->in = in, w->ins = plan.ins;
    w->out = out, w->outs = plan.outs;
    w->policy = policy;
    struct pollfd *polled = NULL;
    int poll_ms = 0;
    if ((rc = make_poll(w, &polled, &poll_ms)) < 0 || (rc = w->ops->changed(w, &plan)) < 0) {
        free(polled);
        w->in = old_in, w->ins = old_ins;
        w->out = old_out, w->outs = old_outs;
        w->policy = old_policy;
        goto out;
    }
    free(w->poll);
    w->poll = polled;
    w->polls = w->ins + 1;
    w->poll_ms = poll_ms;
    w->idle = plan.idle;
    w->idle_user = plan.idle_user;
    if (policy.sessions && old_policy.sessions) { /* what it has learnt it still knows */
        w->policy.sessions = old_policy.sessions;
        old_policy.sessions = policy.sessions;
    }
    rb_policy_close(&old_policy);
    free(old_in);
    free(old_out);
    return 0;
out:
    rb_policy_close(&policy);
    free(in);
    free(out);
    return rc;
}

int rb_worker_change(rb_worker *w, const rb_plan *plan)
{
    if (!w->ops)
        return bad_plan("this worker has no plan to change");
    rb_worker_hold(w);
    int rc = adopt(w, plan);
    if (rc == 0)
        rb_record_describe(w);
    rb_worker_release(w);
    return rc;
}

int rb_worker_start(rb_worker **out, rb_cluster *c, const char *kind, const rb_plan *plan, const rb_worker_options *options)
{
    const struct rb_worker_kind *ops = NULL;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (strcmp(kinds[i]->name, kind) == 0)
            ops = kinds[i];
    if (!ops)
        return rb_fail(EINVAL, "bad-option", "use bridge, balancer, fanout, merge or delay", "there is no worker of kind \"%s\"", kind);
    struct rb_worker *w = calloc(1, sizeof *w);
    if (!w)
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    w->c[0] = c;
    w->ops = ops;
    w->turn = ops->turn;
    w->finish = ops->finish;
    int rc = adopt(w, plan);
    if (rc == 0)
        rc = rb_worker_launch(w, options);
    if (rc < 0) {
        rb_worker_free(w);
        return rc;
    }
    *out = w;
    return 0;
}

int rb_bridge_start(rb_worker **out, rb_cluster *c, const rb_pair *pairs, int n, const rb_worker_options *options)
{
    rb_end *in[RB_WORKER_INS];
    rb_output to[RB_WORKER_INS];
    if (n < 1 || n > (int)RB_WORKER_INS)
        return rb_fail(EINVAL, "bad-option", NULL, "a bridge has 1 to %u pairs", RB_WORKER_INS);
    for (int i = 0; i < n; i++) {
        in[i] = pairs[i].in;
        to[i] = (rb_output){.end = pairs[i].out};
    }
    rb_plan plan = {.struct_size = sizeof plan, .ins = (uint32_t)n, .outs = (uint32_t)n, .in = in, .out = to};
    return rb_worker_start(out, c, "bridge", &plan, options);
}
