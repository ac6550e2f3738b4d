/* SPDX-License-Identifier: Apache-2.0
 * Worker threads: run to completion, in bursts, no lock and no allocation on the way; stopped, held and paused between two turns. */
#include "rb_bell.h"
#include "rb_worker.h"

#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

/* ---- the thread ------------------------------------------------------------------------------------------------------ */

static void nap(long ns) { nanosleep(&(struct timespec){.tv_nsec = ns}, NULL); }

/* Have those ring who can. How long the worker may sleep; 0: not at all, something has come. */
static int arm(struct rb_worker *w)
{
    int ms = w->poll_ms;
    for (uint32_t i = 0; i < w->ins; i++) {
        struct rb_end *end = w->in[i].end;
        if (end->device || w->in[i].over)
            continue;
        int most = rb_bell_arm(end);
        w->poll[1 + i].fd = end->armed ? end->sleep : -1;
        ms = RB_MIN(ms, end->armed ? most : 1); /* a queue without a bell is looked at */
    }
    for (uint32_t i = 0; i < w->outs; i++) {
        struct rb_end *end = w->out[i].end;
        if (!end->device && !(end->ctx ? end->ctx->bell != NULL : !end->c->reg))
            ms = 1; /* its consumer may come anew, and waits for our answer */
    }
    for (uint32_t i = 0; i < w->ins; i++)
        if (w->in[i].end->armed && !w->in[i].over && w->in[i].end->ops->ready(w->in[i].end))
            return 0;
    return ms;
}

static void rest(struct rb_worker *w, uint32_t turns)
{
    uint64_t woken;
    int ms;
    if (w->options.idle == 1 || turns < 512)
        rb_pause();
    else if (w->options.idle == 2 && w->polls) {
        if ((ms = arm(w)) > RB_POLL_MS && w->file)
            rb_record_write(w); /* others see it as it is now */
        if (ms && poll(w->poll, w->polls, ms) > 0 && w->poll[0].revents && read(w->wake, &woken, sizeof woken) < 0)
            return;
    } else
        nap(RB_MIN(10000l + (long)(turns - 512) * 500, 200000l));
}

static void service(struct rb_worker *w, uint32_t *still)
{
    for (int i = 0; i < 2; i++)
        if (w->c[i] && rb_service(w->c[i]) > 0)
            *still = 0;
}

/* Asked to stand still: somebody else uses the handle meanwhile. */
static void stand_still(struct rb_worker *w)
{
    rb_store_release(&w->held, 1);
    for (uint32_t i = 0; rb_load_acquire(&w->hold); i++)
        if (i < 2000)
            rb_pause();
        else
            nap(50000);
    rb_store_release(&w->held, 0);
}

static void end_with(struct rb_worker *w, int rc)
{
    if (rc == -ENODATA || rc == -EINTR)
        return;
    if (rc != w->last_loss)
        snprintf(w->message, sizeof w->message, "%s", rb_error());
    atomic_store(&w->error, rc);
}

static void *run(void *arg)
{
    struct rb_worker *w = arg;
    uint32_t still = 0;
    uint64_t start = rb_cycles();
    while (!rb_load_acquire(&w->stop)) {
        if (rb_get(&w->hold)) {
            stand_still(w);
            still = 0;
            continue;
        }
        if (rb_get(&w->pause)) {
            if (!rb_get(&w->paused)) {
                rb_flush_all(w);
                rb_store_release(&w->paused, 1);
            }
            service(w, &still);
            rb_record_write(w);
            nap(500000);
            continue;
        }
        rb_set(&w->paused, 0);
        uint64_t before = rb_cycles();
        int did = w->turn(w);
        if (did < 0) {
            end_with(w, did);
            break;
        }
        uint64_t now = rb_cycles();
        rb_count_up(&w->loops, 1);
        rb_set(&w->cycles_total, now - start);
        if (__builtin_expect(w->file && now - w->published > 2000000u, 0))
            rb_record_write(w);
        if (did) {
            rb_count_up(&w->cycles_busy, now - before);
            still = 0;
            /* Loans come back while packets flow, too: whoever serves a VM that is idle must not wait for it. */
            if (w->ops && (rb_get(&w->loops) & 15) == 0)
                service(w, &still);
        } else {
            rb_count_up(&w->idle_loops, 1);
            service(w, &still);
            if (w->idle && (did = w->idle(w->idle_user)) < 0) {
                rb_fail(-did, "failed", NULL, "the idle function returned %d", did);
                end_with(w, did);
                break;
            }
            rest(w, still++);
        }
    }
    if (w->finish)
        w->finish(w);
    rb_flush_all(w);
    rb_store_release(&w->running, 0);
    rb_record_write(w);
    rb_store_release(&w->held, 1); /* whoever wants to hold it may */
    return NULL;
}

uint64_t rb_worker_now(struct rb_worker *w) { return w->options.pulse ? rb_pulse_ns() : rb_now_ns(); }

static int pin(struct rb_worker *w, pthread_attr_t *attr)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    if (w->options.core >= 1 && w->options.core <= CPU_SETSIZE) {
        CPU_SET(w->options.core - 1, &set);
        if (pthread_attr_setaffinity_np(attr, sizeof set, &set) == 0)
            return 0;
    }
    return rb_fail(EINVAL, "bad-core", "see: nproc", "there is no processor %d", w->options.core - 1);
}

int rb_worker_launch(struct rb_worker *w, const rb_worker_options *options)
{
    pthread_attr_t attr;
    pthread_mutexattr_t recursive;
    int rc = 0;
    if (options)
        memcpy(&w->options, options, RB_MIN(options->struct_size, sizeof w->options));
    if (!w->options.burst)
        w->options.burst = RB_BURST;
    w->options.burst = RB_MIN(w->options.burst, RB_MAX_BURST);
    for (int i = 0; i < 2; i++)
        if (w->c[i] && w->c[i]->worker)
            return rb_fail(EBUSY, "busy", "attach a handle of its own for another worker", "a worker runs on this handle already");
    if (w->options.name && (rc = rb_record_open(w, w->options.name)) < 0)
        return rc;
    w->options.name = NULL; /* the caller's */
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&w->control, &recursive);
    pthread_mutexattr_destroy(&recursive);
    pthread_attr_init(&attr);
    rb_set(&w->running, 1);
    rb_record_describe(w);
    if (w->options.core)
        rc = pin(w, &attr);
    if (rc == 0) {
        /* Signals are the program's: one that ended this thread's process, or was handled here, would find ends open. */
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        rc = pthread_create(&w->thread, &attr, run, w);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (rc == EINVAL && w->options.core)
            rc = rb_fail(EINVAL, "bad-core", "see: nproc", "there is no processor %d", w->options.core - 1);
        else if (rc)
            rc = rb_fail(rc, "failed", NULL, "no thread could be started: %s", strerror(rc));
    }
    pthread_attr_destroy(&attr);
    if (rc < 0) {
        rb_record_close(w);
        pthread_mutex_destroy(&w->control);
        return rc;
    }
    for (int i = 0; i < 2; i++)
        if (w->c[i])
            w->c[i]->worker = w;
    return 0;
}

/* ---- held, paused, stopped ----------------------------------------------------------------------------------------------- */

static void wake(struct rb_worker *w)
{
    uint64_t one = 1;
    if (w->wake > 0 && write(w->wake, &one, sizeof one) < 0)
        return; /* full: it wakes anyhow */
}

static void wait_for(struct rb_worker *w, rb_a32 *flag, uint32_t value)
{
    for (uint32_t i = 0; rb_load_acquire(&w->running) && rb_load_acquire(flag) != value; i++)
        if (i < 1000)
            rb_pause();
        else
            nap(20000);
}

int rb_worker_hold(rb_worker *w)
{
    pthread_mutex_lock(&w->control);
    if (w->holds++ == 0) {
        rb_store_release(&w->hold, 1);
        wake(w);
        wait_for(w, &w->held, 1);
    }
    return 0;
}

void rb_worker_release(rb_worker *w)
{
    if (--w->holds == 0) {
        rb_store_release(&w->hold, 0);
        wait_for(w, &w->held, 0); /* or the next one would believe that it still stands */
    }
    pthread_mutex_unlock(&w->control);
}

int rb_worker_call(rb_worker *w, int (*fn)(rb_worker *worker, void *arg), void *arg)
{
    int rc = rb_worker_hold(w);
    if (rc == 0) {
        rc = fn(w, arg);
        rb_worker_release(w);
    }
    return rc;
}

int rb_worker_pause(rb_worker *w, int pause)
{
    pthread_mutex_lock(&w->control);
    rb_store_release(&w->pause, (uint32_t)(pause != 0));
    wake(w);
    if (!w->holds) /* else it stands still anyway, and sees it after the release */
        wait_for(w, &w->paused, pause != 0);
    pthread_mutex_unlock(&w->control);
    return 0;
}

void rb_worker_free(struct rb_worker *w)
{
    if (w->ops && w->ops->free)
        w->ops->free(w);
    else if (w->free)
        w->free(w);
    rb_policy_close(&w->policy);
    if (w->wake > 0)
        close(w->wake);
    free(w->poll);
    free(w->in);
    free(w->out);
    free(w);
}

void rb_worker_end(rb_worker *w)
{
    if (w->ended)
        return;
    rb_store_release(&w->stop, 1);
    wake(w);
    pthread_join(w->thread, NULL);
    w->ended = true;
    for (int i = 0; i < 2; i++)
        if (w->c[i])
            w->c[i]->worker = NULL;
}

void rb_worker_stop(rb_worker *w)
{
    if (!w)
        return;
    rb_worker_end(w);
    rb_record_close(w);
    pthread_mutex_destroy(&w->control);
    rb_worker_free(w);
}

/* ---- what it has done ------------------------------------------------------------------------------------------------------ */

int rb_worker_stats_get(rb_worker *w, rb_worker_stats *st)
{
    memset(st, 0, sizeof *st);
    st->running = rb_load_acquire(&w->running); /* first: the counters of one that has ended are its last */
    st->packets = rb_get(&w->packets);
    st->bytes = rb_get(&w->bytes);
    st->dropped = rb_get(&w->dropped);
    st->bursts = rb_get(&w->bursts);
    st->loops = rb_get(&w->loops);
    st->idle_loops = rb_get(&w->idle_loops);
    st->cycles_busy = rb_get(&w->cycles_busy);
    st->cycles_total = rb_get(&w->cycles_total);
    for (int i = 0; i < RB_DROP_REASONS; i++)
        st->drops[i] = rb_get(&w->drops[i]);
    st->held = rb_get(&w->holding);
    st->paused = rb_get(&w->pause);
    st->ins = w->ins;
    st->outs = w->outs;
    st->error = atomic_load(&w->error);
    if (st->error)
        memcpy(st->message, w->message, sizeof st->message);
    return 0;
}

static void describe(const struct rb_port *from, const char *address, rb_worker_port *to)
{
    snprintf(to->address, sizeof to->address, "%s", address);
    to->state = rb_get(&from->state);
    to->packets = rb_get(&from->packets);
    to->bytes = rb_get(&from->bytes);
    for (int i = 0; i < RB_DROP_REASONS; i++)
        to->drops[i] = rb_get(&from->drops[i]);
}

void rb_ports_describe(const struct rb_worker *w, uint32_t from, uint32_t n, rb_worker_port *out)
{
    memset(out, 0, n * sizeof *out);
    for (uint32_t i = 0; i < n; i++)
        if (from + i < w->ins)
            describe(&w->in[from + i].count, rb_address(w->in[from + i].end), &out[i]);
        else {
            const struct rb_out *o = &w->out[from + i - w->ins];
            describe(&o->count, rb_address(o->end), &out[i]);
            out[i].output = 1;
            out[i].group = o->group;
            out[i].weight = o->weight;
        }
}

int rb_worker_ports(rb_worker *w, rb_worker_port *out, int n)
{
    pthread_mutex_lock(&w->control);
    int all = (int)(w->ins + w->outs);
    if (n > 0)
        rb_ports_describe(w, 0, (uint32_t)RB_MIN(n, all), out);
    pthread_mutex_unlock(&w->control);
    return all;
}
