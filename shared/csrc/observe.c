/* SPDX-License-Identifier: Apache-2.0
 *
 * Observing: every packet of a queue is copied to a second queue, for a capture that takes nothing away. The copies are made by whoever serves the
 * observed queue, into buffers of its own, and lent like any other packet; an observer that is slow or dead costs its credit and no more.
 */
#include "rb_internal.h"

static inline void drop(struct rb_leg_ctx *l, int reason, uint64_t n)
{
    rb_a64 *counter = &l->rec->drops[reason];
    rb_set(counter, rb_get(counter) + n);
}

void rb_observe(struct rb_server *s, struct rb_leg_ctx *observer, const rb_desc *desc, uint32_t n)
{
    struct rb_cluster *c = s->c;
    rb_desc copy[RB_MAX_BURST];
    uint32_t k = 0, room = rb_ring_space(&observer->ring, n);
    if (observer->lent + n > observer->credit)
        rb_server_take(s, observer);
    room = room == RB_RING_FAULT ? 0 : RB_MIN(RB_MIN(n, room), observer->credit > observer->lent ? observer->credit - observer->lent : 0);
    for (; k < room && s->free; k++) {
        copy[k] = desc[k];
        copy[k].handle = s->stack[--s->free];
        memcpy(rb_data(c, &copy[k]), rb_data(c, &desc[k]), rb_desc_length(&desc[k]));
        c->where[rb_number(c, copy[k].handle)] = RB_HAND_HOME;
    }
    int lent = k ? rb_server_lend(s, observer, copy, (int)k) : 0;
    lent = RB_MAX(lent, 0);
    if ((uint32_t)lent < k)
        rb_return(c, copy + lent, (int)k - lent);
    if (k < room)
        drop(observer, RB_DROP_NO_BUFFER, room - k);
    if (room < n)
        drop(observer, RB_DROP_FULL, n - room);
}

void rb_observe_link(struct rb_server *s)
{
    struct rb_state *state = s->c->reg->state;
    for (uint32_t i = 0; i < s->actives; i++) {
        struct rb_leg_ctx *l = s->active[i], *o;
        struct rb_queue *q = &state->queue[l->number / 2];
        l->observer = NULL;
        /* Where both legs are served here, packets are copied as they come from the VM. */
        if (!q->observer || s->acting || (l->number % 2 == RB_LEG_R && s->leg[l->number - RB_LEG_R + RB_LEG_T]))
            continue;
        uint32_t leg = 2 * (q->observer - 1) + RB_LEG_R, book = rb_get(&rb_leg_of(s->c, leg)->book);
        if ((book && book != s->book + 1) || rb_server_leg(s, leg, &o) < 0)
            continue;
        if (!o->claimed && rb_server_claim(s, o->credit, "an observed queue") == 0)
            o->claimed = true;
        rb_set(&o->rec->book, s->book + 1);
        l = s->active[i];
        l->observer = o->claimed ? o : NULL;
    }
}

static void touch_books(struct rb_cluster *c, uint32_t queue)
{
    for (uint32_t n = 2 * queue; n < 2 * queue + 2; n++) {
        uint32_t book = rb_get(&rb_leg_of(c, n)->book);
        if (book)
            rb_settle(c, book, 0);
    }
}

int rb_queue_observe(rb_cluster *c, uint32_t queue, int observer)
{
    int rc = rb_alive(c);
    if (rc < 0)
        return rc;
    if (!c->reg)
        return rb_fail(ENOTSUP, "guest", "on the host: ringbar capture --observe", "queues are observed on the host");
    if ((rc = rb_enter(c->reg)) < 0)
        return rc;
    struct rb_queue *q = &c->reg->state->queue[queue];
    if ((rc = rb_queue_check(c, queue)) == 0 && observer >= 0)
        rc = rb_queue_check(c, (uint32_t)observer);
    if (rc == 0 && observer >= 0 && q->direct)
        rc = rb_fail(EINVAL, "direct", "capture in one of the VMs", "%u@%u goes from VM to VM without the host, which cannot observe it", c->id, queue);
    else if (rc == 0 && observer >= 0 && ((uint32_t)observer == queue || q->observes))
        rc = rb_fail(EINVAL, "bad-option", NULL, "queue %u@%u cannot observe itself or an observer", c->id, queue);
    else if (rc == 0 && observer >= 0 && q->observer) {
        rb_fail(EBUSY, "busy", NULL, "queue %u@%u is observed already, by queue %u@%u", c->id, queue, c->id, q->observer - 1);
        int32_t pid = rb_byte_holder(c->reg, RB_LOCK_END + 2 * (q->observer - 1) + 1);
        rc = pid ? rb_cure(EBUSY, "end that capture: kill %d", pid) : rb_cure(EBUSY, "ringbar status; then try again");
    }
    if (rc == 0) {
        if (q->observer)
            c->reg->state->queue[q->observer - 1].observes = 0;
        q->observer = observer < 0 ? 0 : (uint32_t)observer + 1;
        if (observer >= 0)
            c->reg->state->queue[observer].observes = queue + 1;
        touch_books(c, queue);
    }
    rb_leave(c->reg);
    return rc;
}

void rb_observe_reap(struct rb_cluster *c)
{
    for (uint32_t i = 0; i < RB_MAX_QUEUES; i++) {
        struct rb_queue *q = &c->reg->state->queue[i];
        if (!q->used || !q->observes || !q->end[1].pid || rb_byte_holder(c->reg, RB_LOCK_END + 2 * i + 1))
            continue;
        c->reg->state->queue[q->observes - 1].observer = 0;
        touch_books(c, q->observes - 1);
        rb_queue_remove(c, i);
    }
}
