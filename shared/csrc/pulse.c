/* SPDX-License-Identifier: Apache-2.0
 * A coarse clock: one thread reads the time for all others of the process. */
#include "rb_worker.h"

#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <time.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_t thread;
static unsigned users;
static uint32_t period;
static rb_a32 stop;
static struct {
    _Alignas(128) rb_a64 now; /* alone in its lines: everybody reads it */
    uint8_t pad[120];
} pulse;

static void *beat(void *arg)
{
    (void)arg;
    prctl(PR_SET_TIMERSLACK, 1000ul);
    while (!rb_load_acquire(&stop)) {
        rb_set(&pulse.now, rb_now_ns());
        nanosleep(&(struct timespec){.tv_sec = period / 1000000, .tv_nsec = (long)(period % 1000000) * 1000}, NULL);
    }
    return NULL;
}

static void in_child(void) /* the thread is not there */
{
    users = 0;
    rb_set(&pulse.now, 0);
    pthread_mutex_init(&mutex, NULL);
}
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, in_child); }

int rb_pulse_start(uint32_t period_us, int core)
{
    int rc = 0;
    pthread_mutex_lock(&mutex);
    if (users == 0) {
        sigset_t all, before;
        cpu_set_t set;
        period = period_us ? period_us : 10;
        rb_set(&stop, 0);
        rb_set(&pulse.now, rb_now_ns());
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        rc = pthread_create(&thread, NULL, beat, NULL);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (rc)
            rc = rb_fail(rc, "failed", NULL, "no thread could be started: %s", strerror(rc));
        else if (core) {
            CPU_ZERO(&set);
            CPU_SET(core - 1, &set);
            pthread_setaffinity_np(thread, sizeof set, &set);
        }
    }
    if (rc == 0)
        users++;
    else
        rb_set(&pulse.now, 0);
    pthread_mutex_unlock(&mutex);
    return rc;
}

void rb_pulse_stop(void)
{
    pthread_mutex_lock(&mutex);
    if (users && --users == 0) {
        rb_store_release(&stop, 1);
        pthread_join(thread, NULL);
        rb_set(&pulse.now, 0);
    }
    pthread_mutex_unlock(&mutex);
}

uint64_t rb_pulse_ns(void)
{
    uint64_t now = rb_get(&pulse.now);
    return now ? now : rb_now_ns();
}
