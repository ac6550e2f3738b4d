/* SPDX-License-Identifier: Apache-2.0
 *
 * The public calls on open ends: moving packets, giving back, waiting. What an end does is in its operations: served queues below,
 * borrowed ones in client.c, devices in their own files.
 */
#include "rb_bell.h"

#include <stdio.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

/* ---- ends that this process serves ------------------------------------------------------------------------------ */

static int detached(struct rb_end *end)
{
    return rb_fail(ENODEV, "detached", NULL, "queue %s was detached, or its cluster destroyed", end->address);
}

static inline int in_step(struct rb_server *s)
{
    return rb_load_acquire(&s->rec->epoch) == s->epoch ? 0 : rb_server_sync(s);
}

static int lend_send(struct rb_end *end, rb_desc *desc, int n)
{
    struct rb_server *s = end->c->server;
    int rc = in_step(s);
    if (rc < 0 || !end->ctx)
        return rc < 0 ? rc : detached(end);
    return rb_server_lend(s, end->ctx, desc, n);
}

static int lend_count(struct rb_end *end)
{
    uint32_t n = end->ctx ? end->ctx->ring.p - rb_load_acquire(&end->ctx->ring.ctl->c) : 0;
    return end->ctx && n <= end->ctx->ring.slots ? (int)n : 0;
}

static int lend_ready(struct rb_end *end)
{
    struct rb_leg_ctx *l = end->ctx;
    if (!l || rb_load_acquire(&end->c->server->rec->epoch) != end->c->server->epoch)
        return 1;
    return !l->paused && lend_count(end) < (int)l->ring.slots && (l->lent < l->credit || rb_load_acquire(&l->ring.ctl->rp) != l->ring.rc);
}

static int collect_recv(struct rb_end *end, rb_desc *desc, int n)
{
    struct rb_server *s = end->c->server;
    int rc = in_step(s);
    if (rc < 0 || !end->ctx)
        return rc < 0 ? rc : detached(end);
    n = rb_server_collect(s, end->ctx, desc, n);
    if (__builtin_expect(end->ctx->filter == NULL, 1) || n <= 0)
        return n;
    int kept = rb_filter_keep(end->ctx->filter, end->c, desc, n);
    rb_add(&end->ctx->rec->drops[RB_DROP_FILTER], (uint64_t)(n - kept));
    return kept;
}

static int collect_count(struct rb_end *end)
{
    uint32_t n = end->ctx ? rb_load_acquire(&end->ctx->ring.ctl->p) - end->ctx->ring.c : 0;
    return end->ctx && n <= end->ctx->ring.slots ? (int)n : 0;
}

static int collect_ready(struct rb_end *end)
{
    if (!end->ctx || rb_load_acquire(&end->c->server->rec->epoch) != end->c->server->epoch)
        return 1;
    return !end->ctx->paused && collect_count(end) > 0;
}

/* Nothing keeps this book bound to the queue any more? Then another may serve it. */
int rb_let_go(struct rb_server *s, struct rb_leg_ctx *l)
{
    if (l->lent || rb_enter(s->c->reg) < 0)
        return 0;
    if (rb_get(&l->rec->book) == s->book + 1 && rb_leg_of(s->c, l->number | RB_LEG_T)->kind == RB_LEG_NONE && rb_get(&l->rec->wanted) == l->place) {
        rb_set(&l->rec->book, 0);
        rb_server_drop_leg(s, l);
    } else
        l->leaving = false; /* a VM's by now */
    rb_leave(s->c->reg);
    return 1;
}

static void served_close(struct rb_end *end)
{
    struct rb_server *s = end->c->server;
    struct rb_leg_ctx *l = end->ctx;
    end->ctx = NULL;
    if (!l || !s || l->kind != RB_LEG_LEND || l->vm)
        return;
    rb_server_take(s, l);
    if (!rb_let_go(s, l)) {
        l->leaving = true; /* when the last of them is back */
        end->c->waiting++;
    }
}

const struct rb_end_ops rb_lend_ops = {
    .send = lend_send, .alloc = rb_copying_alloc, .ready = lend_ready, .count = lend_count, .close = served_close,
};
const struct rb_end_ops rb_collect_ops = {
    .recv = collect_recv, .ready = collect_ready, .count = collect_count, .close = served_close,
};

/* ---- giving back ------------------------------------------------------------------------------------------------------ */

struct rb_end *rb_client_end_of(struct rb_cluster *c, uint32_t leg)
{
    for (uint32_t i = 0; i < RB_MAX_ENDS; i++)
        if (c->end[i] && c->end[i]->lane && c->end[i]->leg == leg)
            return c->end[i];
    return NULL;
}

int rb_give(struct rb_cluster *c, uint32_t origin_leg, uint32_t handle)
{
    struct rb_end *end = rb_client_end_of(c, origin_leg);
    if (end && !end->echoed)
        end->again = true; /* dropped here: the lender finds it with the next session */
    return end && end->echoed ? rb_client_give(end, handle) : 0;
}

int rb_hand_back(struct rb_cluster *c, uint32_t handle)
{
    rb_desc d = {.handle = handle};
    return rb_return(c, &d, 1);
}

void rb_give_back(struct rb_cluster *c, uint32_t hand, const rb_desc *desc, uint32_t n)
{
    struct rb_end *end = hand >= RB_HAND_BORROWED ? c->end[hand - RB_HAND_BORROWED] : NULL;
    if (hand == RB_HAND_HOME) {
        for (uint32_t i = 0; i < n; i++)
            rb_server_push(c->server, desc[i].handle);
    } else if (end && end->stock) { /* unsent empties of a sending client; never more than it has room for, whatever a direct peer returned */
        for (uint32_t i = 0; i < n && end->stocked < end->ring.returns + RB_MAX_BURST; i++)
            end->stock[end->stocked++] = desc[i].handle;
    } else if (end && rb_client_usable(end)) {
        rb_ring_give(&end->ring, desc, n);
        rb_ring_gave(&end->ring);
    }
}

void rb_unhand_extra(struct rb_cluster *c, uint32_t at)
{
    for (uint32_t i = 0; i < RB_MAX_ENDS; i++) {
        struct rb_end *end = c->end[i];
        if (!end || !end->also || !(end->also[at / 8] >> at % 8 & 1))
            continue;
        end->also[at / 8] &= (uint8_t)~(1u << at % 8);
        c->where[at] |= RB_HAND_BORROWED + i;
        c->extras--;
        return;
    }
}

int rb_return(rb_cluster *c, const rb_desc *desc, int n)
{
    const uint32_t first = c->pool_count[0];
    uint32_t *where = c->where;
    int done = 0, from = 0;
    if (c->fork_count != rb_fork_count)
        return rb_alive(c);
    while (from < n) { /* in runs of the same origin, which is usually all of them */
        uint32_t at = rb_number_in(c, first, desc[from].handle), hand = at == UINT32_MAX ? RB_HAND_NONE : where[at] & RB_HAND;
        int to = from;
        for (; to < n; to++) {
            at = rb_number_in(c, first, desc[to].handle);
            if (at == UINT32_MAX || (where[at] & RB_HAND) != hand)
                break;
            where[at] &= ~(uint32_t)RB_HAND;
            if (__builtin_expect(c->extras != 0, 0) && hand != RB_HAND_NONE && hand != RB_HAND_PEEK)
                rb_unhand_extra(c, at);
        }
        if (hand == RB_HAND_NONE) {
            c->errors++;
            from++;
            continue;
        }
        rb_give_back(c, hand, desc + from, (uint32_t)(to - from));
        done += to - from;
        from = to;
    }
    return done;
}

/* ---- moving packets ------------------------------------------------------------------------------------------------------- */

static inline int may_go_on(struct rb_end *end)
{
    struct rb_cluster *c = end->c;
    if (c->fork_count != rb_fork_count || (c->reg && rb_get(&c->reg->state->header.generation) != c->generation))
        return rb_alive(c);
    if (rb_get(&end->broken)) {
        rb_set(&end->broken, 0);
        return rb_fail(EINTR, "stopped", NULL, "stopped by rb_break");
    }
    return 0;
}

static int own_book(struct rb_cluster *c, uint32_t book) { return rb_own_server(c, book) != NULL; }

static int unserved(struct rb_cluster *c, const struct rb_leg *leg)
{
    uint32_t book = rb_get(&leg->book);
    return !book || (!own_book(c, book) && rb_book_dead(c->reg, book - 1));
}

/* Whether a server lives the kernel tells, which takes its time: not at every look. */
static int time_to_look(struct rb_end *end)
{
    uint64_t now = rb_mono_ns();
    if (now - end->looked < 10000000u)
        return 0;
    end->looked = now;
    return 1;
}

/* Our session was not answered, and whoever should have is dead: another answers for it. */
static void answer_for_the_dead(struct rb_end *end)
{
    struct rb_cluster *c = end->c;
    if (!unserved(c, rb_leg_of(c, end->leg)) || rb_enter(c->reg) < 0)
        return;
    rb_answer_for(c, end);
    rb_leave(c->reg);
}

/* A VM was bound to the sending end after this receiving end had been opened, or whoever served it died, and nobody serves that VM: this
 * handle does, and passes on what comes from it to its own end. */
static void feed_myself(struct rb_end *end)
{
    struct rb_cluster *c = end->c;
    struct rb_leg *t = rb_leg_of(c, 2 * end->queue + RB_LEG_T), *r = rb_leg_of(c, 2 * end->queue + RB_LEG_R);
    struct rb_leg_ctx *l;
    if (t->kind != RB_LEG_GRANT || own_book(c, rb_get(&t->book)))
        return;
    if (rb_get(&t->book) && !time_to_look(end))
        return;
    if (!unserved(c, t) || !(own_book(c, rb_get(&r->book)) || unserved(c, r)))
        return;
    if (rb_enter(c->reg) < 0)
        return;
    if (t->kind == RB_LEG_GRANT && unserved(c, t) && rb_get(&t->place)) {
        if (rb_serve(c, 2 * end->queue + RB_LEG_T, &l) == 0) {
            rb_server_sync(c->server);
            if (rb_get(&r->book) == c->server->book + 1)
                rb_set(&r->client_book, c->server->book + 1);
        } else
            rb_deputise(c, 2 * end->queue + RB_LEG_T);
    }
    rb_leave(c->reg);
}

int rb_answered(rb_end *end)
{
    struct rb_cluster *c = end->c;
    int rc = rb_alive(c);
    if (rc == 0 && end->feeds)
        return rb_feed_answered(end);
    if (rc < 0 || !end->lane || end->kind == RB_LEG_DIRECT || end->echoed || rb_load_acquire(&end->ring.ctl->echo) == end->session)
        return rc < 0 ? rc : 1;
    if (!c->reg) {
        rb_fail(ETIMEDOUT, "no-answer", NULL, "no process on the host that serves queue %s has answered", end->address);
        return rb_cure(ETIMEDOUT, "on the host, see whether there is one, or open the other end: ringbar status %u", c->id);
    }
    struct rb_leg *leg = rb_leg_of(c, end->leg);
    answer_for_the_dead(end);
    if (rb_load_acquire(&end->ring.ctl->echo) == end->session)
        return 1;
    uint32_t book = rb_get(&leg->book);
    int32_t pid = book ? rb_byte_holder(c->reg, RB_LOCK_BOOK + book - 1) : 0;
    rb_fail(ETIMEDOUT, "no-answer", NULL, "process %d (%s), which serves queue %s, has not answered", pid, book ? c->reg->state->book[book - 1].owner.name : "",
            end->address);
    if (pid == (int32_t)getpid())
        return rb_cure(ETIMEDOUT, "it is this one: receive, send or rb_service with the handle that serves it");
    return rb_cure(ETIMEDOUT, "wait until it does, or end it: kill %d", pid);
}

/* A whole timeout went by. A server that is only busy answers much sooner. */
static int nothing_came(struct rb_end *end, int timeout_ms)
{
    int rc = timeout_ms < (end->c->reg ? 1000 : 5000) ? 0 : rb_answered(end);
    return RB_MIN(rc, 0);
}

/* Others read a shared packet, and this end's program will write: it gets copies. How many packets are left, without those that no buffer was
 * found for. */
static int own_shared(struct rb_end *end, rb_desc *desc, int n)
{
    int kept = 0;
    for (int i = 0; i < n; i++) {
        rb_desc to, *d = &desc[i];
        if (rb_desc_flags(d) & RB_SHARED) {
            if (end->c->reg && !end->promised && !end->wants)
                rb_copying_open(end, 4 * RB_BURST);
            if ((end->c->reg && !end->promised && !end->wants) || rb_empties(end->c, &to, 1) != 1) {
                rb_drop(end, 1, RB_DROP_NO_BUFFER);
                rb_return(end->c, d, 1);
                continue;
            }
            to.ts = d->ts;
            rb_desc_set(&to, rb_desc_length(d), rb_desc_offset(d), rb_desc_flags(d) & ~(uint32_t)RB_SHARED);
            memcpy(rb_buffer_header(end->c, &to), rb_buffer_header(end->c, d), RB_BUFFER_HEADER);
            memcpy(rb_data(end->c, &to), rb_data(end->c, d), rb_desc_length(d));
            rb_return(end->c, d, 1);
            *d = to;
            end->st.copied++;
        }
        desc[kept++] = *d;
    }
    return kept;
}

static inline int receive_any(struct rb_end *end, rb_desc *desc, int n)
{
    int rc = end->ops->recv(end, desc, n);
    return __builtin_expect(end->flags & RB_WRITABLE, 0) && rc > 0 ? own_shared(end, desc, rc) : rc;
}

/* What passes the end's filter, if it has one. */
static int receive(struct rb_end *end, rb_desc *desc, int n)
{
    int rc = receive_any(end, desc, n);
    for (int tries = 0; __builtin_expect(end->filter != NULL, 0) && rc > 0; tries++) {
        int kept = rb_filter_keep(end->filter, end->c, desc, rc);
        rb_drop(end, rc - kept, RB_DROP_FILTER);
        if (kept || tries == 16) /* then the caller has a look at other things */
            return kept;
        rc = receive_any(end, desc, n);
    }
    return rc;
}

static int send_on(void *end, void *unused, rb_desc *desc, int n)
{
    (void)unused;
    return ((struct rb_end *)end)->ops->send(end, desc, n);
}

static int send_matching(struct rb_end *end, rb_desc *desc, int n)
{
    uint64_t dropped;
    int rc = rb_filter_send(end->filter, end->c, desc, n, send_on, end, NULL, &dropped);
    rb_drop(end, (int)dropped, RB_DROP_FILTER);
    return rc;
}

/* Whoever is fed by this handle must not wait until its program is idle. */
static inline void feed_others(struct rb_cluster *c)
{
    struct rb_server *s = c->server;
    if (__builtin_expect(s && (s->feeds || s->feed_epoch != s->epoch), 0))
        rb_feed_service(s);
    if (__builtin_expect(c->deputy != NULL, 0))
        rb_service(c->deputy);
}

int rb_recv(rb_end *end, rb_desc *desc, int n, int timeout_ms)
{
    uint64_t until = 0;
    int most = RB_POLL_MS;
    if (!end->ops->recv)
        return rb_fail(EINVAL, "bad-option", "open it with RB_RX", "%s was opened for sending", end->address);
    for (;;) {
        int rc = may_go_on(end);
        if (rc == 0)
            feed_others(end->c); /* not in a forked child, whose parent has the book */
        if (rc < 0 || n <= 0 || (rc = receive(end, desc, n)) != 0) {
            end->armed = false;
            return rc;
        }
        if (end->lane && end->c->reg) {
            if (!end->echoed && time_to_look(end))
                answer_for_the_dead(end);
            feed_myself(end);
        }
        if (end->c->server)
            rb_server_service(end->c->server);
        if (!timeout_ms && end->polled) { /* rb_fd is to say when there is more */
            rb_bell_again(end);
            rc = may_go_on(end);
            return rc < 0 ? rc : receive(end, desc, n);
        }
        if (!timeout_ms)
            return 0;
        if (timeout_ms > 0 && !until)
            until = rb_mono_ns() + (uint64_t)timeout_ms * 1000000u;
        uint64_t now = until ? rb_mono_ns() : 0;
        if (until && now >= until)
            return nothing_came(end, timeout_ms);
        rc = rb_wait(end, until ? RB_MIN((int)((until - now) / 1000000u) + 1, most) : most);
        if (rc < 0)
            return rc;
        most = rc ? RB_POLL_MS : rb_bell_arm(end); /* nothing for a while: sleep until somebody rings */
    }
}

int rb_send(rb_end *end, rb_desc *desc, int n, int timeout_ms)
{
    uint64_t until = 0;
    int done = 0;
    if (!end->ops->send)
        return rb_fail(EINVAL, "bad-option", "open it with RB_TX", "%s was opened for receiving", end->address);
    for (;;) {
        int rc = n < 0 ? 0 : may_go_on(end);
        if (n <= 0)
            return rc;
        if (rc == 0)
            feed_others(end->c);
        if (rc == 0 && done < n) {
            rc = __builtin_expect(end->filter == NULL, 1) ? end->ops->send(end, desc + done, n - done) : send_matching(end, desc + done, n - done);
            done += RB_MAX(rc, 0);
        }
        if (rc < 0)
            return done ? done : rc;
        if (done == n || !timeout_ms) {
            end->st.refused += (uint64_t)(n - done);
            return done;
        }
        if (timeout_ms > 0 && !until)
            until = rb_mono_ns() + (uint64_t)timeout_ms * 1000000u;
        if (until && rb_mono_ns() >= until)
            return done ? done : nothing_came(end, timeout_ms);
        if (end->c->server)
            rb_server_service(end->c->server);
        rc = rb_wait(end, 1);
        if (rc < 0)
            return done ? done : rc;
    }
}

int rb_alloc(rb_end *end, rb_desc *desc, int n)
{
    int rc = may_go_on(end);
    if (rc < 0 || n <= 0)
        return rc;
    if (!end->ops->alloc)
        return rb_fail(EINVAL, "bad-option", "open it with RB_TX", "%s was opened for receiving", end->address);
    if (!end->c->sends) {
        rb_fail(EACCES, "read-only", NULL, "this VM may only read the packets of cluster %u", end->c->id);
        return rb_cure(EACCES, "on the host: ringbar attach VM --pool rw --replug");
    }
    return end->ops->alloc(end, desc, n);
}

void *rb_data(rb_cluster *c, const rb_desc *d)
{
    return rb_number(c, d->handle) == UINT32_MAX || !rb_fits(c, d->word)
               ? NULL
               : c->pool[d->handle >> 24] + (uint64_t)(d->handle & RB_INDEX_MASK) * c->buffer_size + rb_desc_offset(d);
}

void *rb_buffer_header(rb_cluster *c, const rb_desc *d)
{
    return rb_number(c, d->handle) == UINT32_MAX ? NULL : c->pool[d->handle >> 24] + (uint64_t)(d->handle & RB_INDEX_MASK) * c->buffer_size;
}

int rb_writable(rb_cluster *c) { return c->writable; }

void rb_headers(rb_cluster *c, const rb_desc *d, int n, uint32_t width, uint8_t *out)
{
    for (int i = 0; i < n; i++, out += width) {
        const uint8_t *data = rb_data(c, &d[i]);
        uint32_t have = data ? RB_MIN(rb_desc_length(&d[i]), width) : 0;
        if (have)
            memcpy(out, data, have);
        memset(out + have, 0, width - have);
    }
}

int rb_sync(rb_end *end)
{
    int rc = rb_alive(end->c);
    return rc < 0 || !end->ops->sync ? rc : end->ops->sync(end);
}

int rb_service(rb_cluster *c)
{
    int rc = rb_alive(c), did = 0;
    if (rc < 0)
        return rc;
    if (c->server)
        did = rb_server_service(c->server);
    if (c->deputy)
        did += RB_MAX(rb_service(c->deputy), 0);
    for (uint32_t i = 0; i < RB_MAX_ENDS; i++)
        if (c->end[i] && c->end[i]->ops->service)
            c->end[i]->ops->service(c->end[i]);
    return did;
}

/* ---- waiting ---------------------------------------------------------------------------------------------------------------- */

int rb_wait(rb_end *end, int timeout_ms)
{
    uint64_t start = rb_mono_ns();
    long step = 20000;
    for (uint32_t i = 0;; i++) {
        int rc = may_go_on(end);
        if (rc < 0)
            return rc;
        if (end->ops->ready(end))
            return 1;
        if (i < 256) {
            rb_pause();
            continue;
        }
        uint64_t gone = rb_mono_ns() - start;
        if (timeout_ms >= 0 && gone >= (uint64_t)timeout_ms * 1000000u)
            return 0;
        /* The owner of a cluster that lives with its process is dead, and nothing is left to read: the end. */
        if (end->c->reg && (end->armed || i % 64 == 0) && !rb_owner_alive(end->c->reg))
            return rb_fail(ENODEV, "detached", NULL, "the process that owned cluster %u is gone", end->c->id);
        if (end->armed) {
            if (rb_bell_listen(end, timeout_ms < 0 ? RB_BELL_MS : timeout_ms - (int)(gone / 1000000u)))
                end->armed = false; /* rung for this or for something else: one more look */
            else
                continue;
            rc = may_go_on(end);
            return rc < 0 ? rc : end->ops->ready(end) != 0;
        }
        nanosleep(&(struct timespec){.tv_nsec = step}, NULL);
        step = RB_MIN(step * 3 / 2, 1000000);
    }
}

void rb_break(rb_end *end)
{
    rb_store_release(&end->broken, 1);
    rb_bell_wake(end);
}

int rb_fd(rb_end *end)
{
    if (end->ops->fd)
        return end->ops->fd(end);
    if (end->polled || rb_bell_has(end))
        return rb_bell_fd(end);
    if (end->timer < 0) {
        end->timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
        if (end->timer < 0)
            return rb_fail(errno, "failed", NULL, "no timer could be made: %s", strerror(errno));
        struct itimerspec each = {.it_interval.tv_nsec = 1000000, .it_value.tv_nsec = 1000000};
        timerfd_settime(end->timer, 0, &each, NULL);
    }
    return end->timer;
}

int rb_count(rb_end *end) { return end->ops->count ? end->ops->count(end) : 0; }
int rb_empty(rb_end *end) { return rb_count(end) == 0; }

int rb_full(rb_end *end)
{
    uint32_t slots = end->ctx ? end->ctx->ring.slots : end->ring.slots;
    return slots && rb_count(end) >= (int)slots;
}

int rb_stats_get(rb_end *end, rb_stats *st)
{
    *st = end->st;
    if (!end->device)
        snprintf(st->waits, sizeof st->waits, "%s", rb_bell_has(end) ? "bell" : "polling");
    if (end->ops->stats)
        end->ops->stats(end, st);
    else if (end->ctx) {
        st->packets = rb_get(&end->ctx->rec->packets);
        st->bytes = rb_get(&end->ctx->rec->bytes);
        st->copied = rb_get(&end->ctx->rec->copied);
        for (int i = 0; i < RB_DROP_REASONS; i++)
            st->drops[i] = rb_get(&end->ctx->rec->drops[i]);
    }
    return 0;
}

void rb_drop(rb_end *end, int n, int reason)
{
    if (n <= 0 || reason < 0 || reason >= RB_DROP_REASONS)
        return;
    end->st.drops[reason] += (uint64_t)n;
    if (end->ctx)
        rb_set(&end->ctx->rec->drops[reason], rb_get(&end->ctx->rec->drops[reason]) + (uint64_t)n);
    else if (end->lane && end->ring.ctl && (end->flags & RB_TX))
        rb_set(&end->ring.ctl->dropped, rb_get(&end->ring.ctl->dropped) + (uint64_t)n);
}

const char *rb_address(rb_end *end) { return end->address; }
