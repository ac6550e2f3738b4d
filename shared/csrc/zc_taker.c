/* SPDX-License-Identifier: Apache-2.0
 *
 * Several takers on one NIC. The kernel gives each NIC queue to one process, the device's owner. Another process of the cluster that opens the same NIC
 * with a steering rule of its own is fed by the owner: a queue is made for it, its rule goes into a record of `state`, the owner has the kernel take
 * what any of the rules names, and lends every packet to the first taker whose rule matches; what none wants is the owner's own.
 */
#include "rb_zc.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define SLOTS 1024u /* of a queue that feeds a taker */

static struct rb_taker_record *record(struct rb_cluster *c, uint32_t number) { return &c->reg->state->taker[number]; }
static int32_t holder(struct rb_cluster *c, const struct rb_taker_record *t) { return rb_byte_holder(c->reg, RB_LOCK_END + 2 * t->queue + 1); }

static void wake_owner(struct rb_cluster *c, const struct rb_taker_record *t)
{
    struct rb_book_record *b = &c->reg->state->book[t->book - 1];
    rb_store_release(&b->epoch, rb_get(&b->epoch) + 1);
}

/* The queue goes, and with it the record, unless what came by it is still lent on somewhere. Recovery lock held. */
static void forget(struct rb_cluster *c, struct rb_taker_record *t)
{
    if (c->reg->state->queue[t->queue].used && (rb_borrower_done(c, 2 * t->queue + RB_LEG_R) < 0 || rb_queue_remove(c, t->queue) < 0))
        rb_set(&t->state, RB_TAKER_LEFT); /* another time */
    else
        rb_set(&t->state, RB_TAKER_FREE);
}

static bool owner_lives(struct rb_cluster *c, const struct rb_taker_record *t)
{
    const struct rb_device_record *r = rb_zc_record(c, t->device);
    return rb_get(&t->state) != RB_TAKER_ENDED && r->used && r->book == t->book && !rb_book_dead(c->reg, t->book - 1);
}

void rb_taker_reap(struct rb_cluster *c)
{
    for (uint32_t i = 0; i < RB_MAX_TAKERS; i++) {
        struct rb_taker_record *t = record(c, i);
        if (rb_get(&t->state) == RB_TAKER_FREE || holder(c, t))
            continue;
        if (!owner_lives(c, t))
            forget(c, t);
        else
            wake_owner(c, t);
    }
}

/* ---- who is fed ------------------------------------------------------------------------------------------------------------ */

static int no_owner(struct rb_end *end, struct rb_taker_record *t)
{
    uint32_t state = rb_get(&t->state);
    if (state == RB_TAKER_REFUSED)
        return rb_fail(EINVAL, "bad-filter", "write it simpler, or be the first to open the NIC", "the owner of %s could not take the rule \"%.200s\" into its program",
                       end->address, t->rule);
    rb_fail(ENODEV, "owner-ended", NULL, "the process that received from %s, and shared it, has closed it", end->address);
    return rb_cure(ENODEV, "open %s again: who is first owns it", end->address);
}

static int taker_recv(struct rb_end *end, rb_desc *desc, int n)
{
    struct rb_taker_record *t = record(end->c, end->taker - 1);
    int rc = rb_client_rx_ops.recv(end, desc, n);
    if (rc != 0)
        return rc;
    if (rb_get(&t->state) != RB_TAKER_WANTS)
        return no_owner(end, t);
    uint64_t now = rb_mono_ns();
    if (now - end->looked > 20000000u) { /* whether it lives the kernel tells, which takes its time */
        end->looked = now;
        if (rb_book_dead(end->c->reg, t->book - 1))
            return no_owner(end, t);
    }
    return 0;
}

static int taker_ready(struct rb_end *end)
{
    return rb_client_rx_ops.ready(end) || rb_get(&record(end->c, end->taker - 1)->state) != RB_TAKER_WANTS;
}

static int taker_count(struct rb_end *end) { return rb_client_rx_ops.count(end); }
static void taker_close(struct rb_end *end) { rb_client_rx_ops.close(end); }

static const struct rb_end_ops taker_ops = {.recv = taker_recv, .ready = taker_ready, .count = taker_count, .close = taker_close};

/* The owner looks when it next receives or is served; a rule that it cannot take it says at once. */
static int wait_for_owner(struct rb_end *end, struct rb_taker_record *t)
{
    uint64_t until = rb_mono_ns() + 1000000000u;
    while (rb_get(&t->seen) != rb_get(&t->version) && rb_get(&t->state) == RB_TAKER_WANTS && rb_mono_ns() < until)
        nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
    return rb_get(&t->state) == RB_TAKER_REFUSED ? no_owner(end, t) : 0;
}

int rb_taker_open(struct rb_end *end, uint32_t device, const char *rule)
{
    struct rb_cluster *c = end->c;
    struct rb_taker_record *t = NULL;
    int rc, queue = -1;
    if (end->flags & RB_TX)
        return rb_fail(EBUSY, "busy", "open it for receiving alone", "%s is held by another process, which can share what it receives, but not its sending", end->address);
    if (strlen(rule) >= RB_RULE_TEXT)
        return rb_fail(EINVAL, "bad-filter", "write it shorter, or be the first to open the NIC", "the steering rule is longer than %u bytes", RB_RULE_TEXT - 1);
    if ((rc = rb_enter(c->reg)) < 0)
        return rc;
    for (uint32_t i = 0; i < RB_MAX_TAKERS && !t; i++)
        if (rb_get(&record(c, i)->state) == RB_TAKER_FREE) {
            t = record(c, i);
            end->taker = i + 1;
        }
    if (!t)
        rc = rb_fail(ENOSPC, "too-many-takers", "close some", "%u programs share NICs in cluster %u, which is the most", RB_MAX_TAKERS, c->id);
    if (rc == 0)
        rc = queue = rb_queue_create(c, -1, &(rb_queue_options){.struct_size = sizeof(rb_queue_options), .slots = SLOTS});
    if (queue >= 0) {
        end->queue = (uint32_t)queue;
        rc = rb_open_queue(end, end->queue);
        if (rc < 0)
            rb_queue_remove(c, end->queue);
    }
    if (rc < 0) {
        end->taker = 0;
        rb_leave(c->reg);
        return rc;
    }
    memset(t, 0, sizeof *t);
    t->device = device;
    t->book = rb_zc_record(c, device)->book;
    t->queue = end->queue;
    rb_holder_me(&t->holder);
    memcpy(t->rule, rule, strlen(rule) + 1);
    rb_set(&t->version, 1);
    rb_order();
    rb_set(&t->state, RB_TAKER_WANTS);
    wake_owner(c, t);
    rb_leave(c->reg);
    end->ops = &taker_ops;
    snprintf(end->st.mode, sizeof end->st.mode, "fed");
    snprintf(end->st.clock, sizeof end->st.clock, "%s", rb_zc_record(c, device)->clock);
    if ((rc = wait_for_owner(end, t)) < 0) {
        rb_client_rx_ops.close(end);
        rb_enter(c->reg);
        memset(&c->reg->state->queue[end->queue].end[1], 0, sizeof(struct rb_holder));
        rb_byte_unlock(c->locks, RB_LOCK_END + 2 * end->queue + 1);
        forget(c, t);
        rb_leave(c->reg);
        end->taker = 0;
    }
    return rc;
}

void rb_taker_leave(struct rb_cluster *c, uint32_t taker)
{
    struct rb_taker_record *t = record(c, taker);
    if (rb_enter(c->reg) < 0)
        return; /* the next reap finds it */
    if (owner_lives(c, t)) {
        rb_set(&t->state, RB_TAKER_LEFT);
        wake_owner(c, t);
    } else
        forget(c, t);
    rb_leave(c->reg);
}

/* ---- who feeds ---------------------------------------------------------------------------------------------------------------- */

static void drop(struct rb_zc *z, uint32_t i)
{
    struct rb_zc_taker gone = z->taker[i];
    memmove(&z->taker[i], &z->taker[i + 1], (--z->takers - i) * sizeof z->taker[0]); /* the others keep their order */
    rb_close(gone.end);
    free(gone.rule);
}

static void refuse(struct rb_cluster *c, struct rb_zc *z, uint32_t i)
{
    struct rb_taker_record *t = record(c, z->taker[i].record);
    drop(z, i);
    rb_set(&t->state, RB_TAKER_REFUSED);
}

static bool knows(const struct rb_zc *z, uint32_t number)
{
    for (uint32_t i = 0; i < z->takers; i++)
        if (z->taker[i].record == number)
            return true;
    return false;
}

/* Start to feed a newcomer. */
static bool welcome(struct rb_cluster *c, struct rb_zc *z, uint32_t number)
{
    struct rb_taker_record *t = record(c, number);
    struct rb_zc_taker *n = &z->taker[z->takers];
    char address[32];
    *n = (struct rb_zc_taker){.record = number, .version = rb_get(&t->version)};
    snprintf(address, sizeof address, "%u@%u", c->id, t->queue);
    if (z->takers == RB_ZC_TAKERS || rb_filter_compile(t->rule, &n->rule) < 0 || !n->rule || rb_open(&n->end, c, address, RB_TX) < 0) {
        free(n->rule);
        rb_set(&t->state, RB_TAKER_REFUSED);
        return false;
    }
    z->takers++;
    return true;
}

/* Its rule is another now. */
static bool replace_rule(struct rb_cluster *c, struct rb_zc_taker *n)
{
    struct rb_taker_record *t = record(c, n->record);
    struct rb_filter *f;
    if (n->version == rb_get(&t->version))
        return false;
    n->version = rb_get(&t->version);
    if (rb_filter_compile(t->rule, &f) < 0 || !f)
        return false; /* it compiled it itself before it wrote it */
    free(n->rule);
    n->rule = f;
    return true;
}

/* Is there anything to do? Asked often: without the lock. */
static bool all_as_before(struct rb_server *s, struct rb_zc *z)
{
    uint64_t now;
    if (s->epoch != z->epoch)
        return false;
    if ((now = rb_mono_ns()) - z->looked < 100000000u)
        return true;
    z->looked = now;
    for (uint32_t i = 0; i < z->takers; i++)
        if (!holder(s->c, record(s->c, z->taker[i].record)))
            return false;
    return true;
}

void rb_taker_look(struct rb_server *s, struct rb_zc *z)
{
    struct rb_cluster *c = s->c;
    bool changed = false;
    if (all_as_before(s, z) || rb_enter(c->reg) < 0)
        return;
    z->epoch = s->epoch;
    for (uint32_t i = 0; i < z->takers;) {
        struct rb_taker_record *t = record(c, z->taker[i].record);
        if (rb_get(&t->state) == RB_TAKER_WANTS && holder(c, t)) {
            changed |= replace_rule(c, &z->taker[i++]);
            continue;
        }
        rb_set(&t->state, RB_TAKER_LEFT);
        drop(z, i);
        changed = true;
    }
    for (uint32_t i = 0; i < RB_MAX_TAKERS; i++) {
        struct rb_taker_record *t = record(c, i);
        if (t->device != z->number || t->book != s->book + 1)
            continue;
        if (rb_get(&t->state) == RB_TAKER_LEFT)
            forget(c, t);
        else if (rb_get(&t->state) == RB_TAKER_WANTS && !knows(z, i))
            changed |= welcome(c, z, i);
    }
    if (changed)
        while (rb_zc_rules(z) < 0 && z->takers) /* the last to come is one too many */
            refuse(c, z, z->takers - 1);
    for (uint32_t i = 0; i < z->takers; i++)
        rb_set(&record(c, z->taker[i].record)->seen, z->taker[i].version);
    rb_leave(c->reg);
}

void rb_taker_end(struct rb_server *s, struct rb_zc *z)
{
    struct rb_cluster *c = s->c;
    if (rb_enter(c->reg) < 0)
        return; /* its takers see that the book is dead, or the device another's */
    while (z->takers)
        drop(z, z->takers - 1);
    for (uint32_t i = 0; i < RB_MAX_TAKERS; i++) {
        struct rb_taker_record *t = record(c, i);
        if (rb_get(&t->state) == RB_TAKER_FREE || t->device != z->number || t->book != s->book + 1)
            continue;
        if (rb_get(&t->state) == RB_TAKER_LEFT)
            forget(c, t);
        else
            rb_set(&t->state, RB_TAKER_ENDED);
    }
    rb_leave(c->reg);
}

/* Lend k packets to a taker: what it has no room for is dropped and counted on its queue. */
static void lend(struct rb_cluster *c, struct rb_zc_taker *t, rb_desc *desc, int k)
{
    int sent = rb_send(t->end, desc, k, 0);
    sent = RB_MAX(sent, 0);
    if (sent < k) {
        rb_drop(t->end, k - sent, RB_DROP_FULL);
        rb_return(c, desc + sent, k - sent);
    }
}

uint32_t rb_taker_give(struct rb_server *s, struct rb_zc *z, rb_desc *desc, uint32_t n)
{
    struct rb_cluster *c = s->c;
    rb_desc mine[RB_MAX_BURST];
    uint64_t bytes = 0, packets = 0;
    for (uint32_t t = 0; t <= z->takers && n; t++) { /* after the takers: whom nobody wants */
        struct rb_filter *rule = t < z->takers ? z->taker[t].rule : z->rule;
        uint32_t k = 0, left = 0;
        for (uint32_t i = 0; i < n; i++) {
            bool match = !rule || rb_filter_match(rule, c, &desc[i]);
            if (match == (t < z->takers)) {
                mine[k++] = desc[i];
                bytes += rb_desc_length(&desc[i]);
                packets += !(rb_desc_flags(&desc[i]) & RB_MORE);
            } else
                desc[left++] = desc[i];
        }
        n = left;
        if (k && t < z->takers)
            lend(c, &z->taker[t], mine, (int)k);
        else if (k) {
            z->filtered += k;
            rb_return(c, mine, (int)k);
        }
    }
    z->rx->st.packets -= packets;
    z->rx->st.bytes -= bytes;
    return n;
}
