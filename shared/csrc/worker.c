/* SPDX-License-Identifier: Apache-2.0
 * Worker threads, and the bridge: run to completion, in bursts, no lock and no allocation on the way. */
#include "rb_worker.h"

#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* ---- the thread ------------------------------------------------------------------------------------------------------ */

static void idle(struct rb_worker *w, uint32_t turns)
{
    if (w->options.idle == 1 || (w->options.idle == 0 && turns < 512)) {
        rb_pause();
        return;
    }
    long ns = w->options.idle == 2 ? 200000 : RB_MIN(10000l + (long)(turns - 512) * 500, 200000l);
    nanosleep(&(struct timespec){.tv_nsec = ns}, NULL);
}

static void *run(void *arg)
{
    struct rb_worker *w = arg;
    uint32_t still = 0;
    uint64_t start = rb_cycles();
    while (!rb_load_acquire(&w->stop)) {
        if (rb_get(&w->pause)) {
            rb_store_release(&w->paused, 1);
            for (int i = 0; i < 2; i++)
                if (w->c[i])
                    rb_service(w->c[i]);
            nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
            continue;
        }
        rb_set(&w->paused, 0);
        uint64_t before = rb_cycles();
        int did = w->turn(w);
        if (did < 0) {
            if (did != -ENODATA && did != -EINTR) {
                snprintf(w->message, sizeof w->message, "%s", rb_error());
                atomic_store(&w->error, did);
            }
            break;
        }
        uint64_t now = rb_cycles();
        rb_count_up(&w->loops, 1);
        rb_set(&w->cycles_total, now - start);
        if (did) {
            rb_count_up(&w->cycles_busy, now - before);
            still = 0;
        } else {
            rb_count_up(&w->idle_loops, 1);
            for (int i = 0; i < 2; i++)
                if (w->c[i] && rb_service(w->c[i]) > 0)
                    still = 0;
            idle(w, still++);
        }
    }
    if (w->finish)
        w->finish(w);
    rb_store_release(&w->running, 0);
    return NULL;
}

int rb_worker_launch(struct rb_worker *w, const rb_worker_options *options)
{
    pthread_attr_t attr;
    if (options)
        memcpy(&w->options, options, RB_MIN(options->struct_size, sizeof w->options));
    if (!w->options.burst)
        w->options.burst = RB_BURST;
    w->options.burst = RB_MIN(w->options.burst, RB_MAX_BURST);
    pthread_attr_init(&attr);
    if (w->options.core) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(w->options.core - 1, &set);
        if (w->options.core < 1 || w->options.core > CPU_SETSIZE || pthread_attr_setaffinity_np(&attr, sizeof set, &set) != 0) {
            pthread_attr_destroy(&attr);
            return rb_fail(EINVAL, "bad-core", "see: nproc", "there is no processor %d", w->options.core - 1);
        }
    }
    rb_set(&w->running, 1);
    /* Signals are the program's: one that ended this thread's process, or was handled here, would find ends open. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(&w->thread, &attr, run, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    if (rc == EINVAL && w->options.core)
        return rb_fail(EINVAL, "bad-core", "see: nproc", "there is no processor %d", w->options.core - 1);
    if (rc)
        return rb_fail(rc, "failed", NULL, "no thread could be started: %s", strerror(rc));
    for (int i = 0; i < 2; i++)
        if (w->c[i])
            w->c[i]->worker = w;
    return 0;
}

int rb_worker_stats_get(rb_worker *w, rb_worker_stats *st)
{
    memset(st, 0, sizeof *st);
    st->packets = rb_get(&w->packets);
    st->bytes = rb_get(&w->bytes);
    st->dropped = rb_get(&w->dropped);
    st->bursts = rb_get(&w->bursts);
    st->loops = rb_get(&w->loops);
    st->idle_loops = rb_get(&w->idle_loops);
    st->cycles_busy = rb_get(&w->cycles_busy);
    st->cycles_total = rb_get(&w->cycles_total);
    st->running = rb_load_acquire(&w->running);
    st->error = atomic_load(&w->error);
    if (st->error)
        memcpy(st->message, w->message, sizeof st->message);
    return 0;
}

int rb_worker_pause(rb_worker *w, int pause)
{
    rb_store_release(&w->pause, (uint32_t)pause);
    while (rb_load_acquire(&w->running) && rb_load_acquire(&w->paused) != (uint32_t)pause)
        nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    return 0;
}

void rb_worker_stop(rb_worker *w)
{
    if (!w)
        return;
    rb_store_release(&w->stop, 1);
    pthread_join(w->thread, NULL);
    for (int i = 0; i < 2; i++)
        if (w->c[i])
            w->c[i]->worker = NULL;
    w->free(w);
    free(w);
}

/* ---- bridge ------------------------------------------------------------------------------------------------------------ */

struct bridge {
    int pairs;
    rb_pair pair[];
};

static int bridge_turn(struct rb_worker *w)
{
    struct bridge *b = w->kind;
    rb_desc desc[RB_MAX_BURST];
    int moved = 0;
    for (int i = 0; i < b->pairs; i++) {
        struct rb_end *in = b->pair[i].in, *out = b->pair[i].out;
        int n = rb_recv(in, desc, (int)w->options.burst, 0);
        if (n < 0)
            return n;
        if (!n)
            continue;
        uint64_t bytes = 0;
        for (int k = 0; k < n; k++)
            bytes += rb_desc_length(&desc[k]);
        int sent = 0, rc = 0;
        while (sent < n && (rc = rb_send(out, desc + sent, n - sent, 0)) != 0) {
            if (rc == -EINVAL) { /* one that cannot go out here, such as a frame too short for a NIC: a VM sends what it likes */
                rb_drop(out, 1, RB_DROP_BAD);
                rb_return(w->c[0], desc + sent, 1);
                rb_count_up(&w->dropped, 1);
                rc = 1;
            } else if (rc < 0)
                break;
            sent += rc;
        }
        if (sent < n) {
            rb_drop(out, n - sent, RB_DROP_FULL);
            rb_return(w->c[0], desc + sent, n - sent);
            rb_count_up(&w->dropped, (uint64_t)(n - sent));
            if (rc < 0)
                return rc;
        }
        rb_count_up(&w->packets, (uint64_t)n);
        rb_count_up(&w->bytes, bytes);
        rb_count_up(&w->bursts, 1);
        moved += n;
    }
    /* Loans come back while packets flow, too: whoever serves a VM that is idle must not wait for it. */
    if (moved && (rb_get(&w->loops) & 15) == 0)
        rb_service(w->c[0]);
    if (w->options.packets && rb_get(&w->packets) >= w->options.packets)
        return -ENODATA;
    return moved;
}

static void bridge_free(struct rb_worker *w) { free(w->kind); }

int rb_bridge_start(rb_worker **out, rb_cluster *c, const rb_pair *pairs, int n, const rb_worker_options *options)
{
    if (c->worker)
        return rb_fail(EBUSY, "busy", "attach a handle of its own for another worker", "a worker runs on this handle already");
    if (n < 1)
        return rb_fail(EINVAL, "bad-option", NULL, "a bridge needs at least one pair");
    for (int i = 0; i < n; i++)
        if (pairs[i].in->c != c || pairs[i].out->c != c)
            return rb_fail(EINVAL, "bad-option", "open all of them with one handle", "the ends of a bridge belong to one handle");
    struct rb_worker *w = calloc(1, sizeof *w);
    struct bridge *b = calloc(1, sizeof *b + (size_t)n * sizeof *pairs);
    if (!w || !b) {
        free(w);
        free(b);
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    }
    b->pairs = n;
    memcpy(b->pair, pairs, (size_t)n * sizeof *pairs);
    w->c[0] = c;
    w->turn = bridge_turn;
    w->free = bridge_free;
    w->kind = b;
    int rc = rb_worker_launch(w, options);
    if (rc < 0) {
        free(b);
        free(w);
        return rc;
    }
    *out = w;
    return 0;
}
