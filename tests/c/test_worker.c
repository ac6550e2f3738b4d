/* SPDX-License-Identifier: Apache-2.0
 *
 * Workers of every kind: what arrives where, what is dropped and why, what happens when they are changed, stopped or killed; and that every
 * buffer is at home afterwards.
 */
#include "world.h"

#include "rb_worker.h"

static uint32_t cluster_id = 500;
static uint64_t seed = 88172645463325252ull;

#define MOST 10

/* A producer on queue 0 (and 1, where there are two inputs), a worker between, consumers on the other queues. */
struct world {
    rb_cluster *source, *middle, *sink;
    uint32_t ins, outs;
    rb_end *tx[MOST], *in[MOST], *rx[MOST];
    rb_output out[MOST];
    rb_worker *worker;
    uint64_t sent, got[MOST];
};

static struct world make_world(uint32_t ins, uint32_t outs, uint32_t slots)
{
    struct world w = {.ins = ins, .outs = outs};
    rb_cluster_options o = {.struct_size = sizeof o, .buffers = 8192, .buffer_size = 256, .queues = ins + outs, .slots = slots, .pages = RB_PAGES_4K, .persistent = 1};
    OK(rb_cluster_create(++cluster_id, &o, &w.source));
    OK(rb_cluster_attach(cluster_id, &w.middle));
    OK(rb_cluster_attach(cluster_id, &w.sink));
    for (uint32_t i = 0; i < ins; i++) {
        w.tx[i] = open_end(w.source, i, RB_TX);
        w.in[i] = open_end(w.middle, i, RB_RX);
    }
    for (uint32_t i = 0; i < outs; i++) {
        w.out[i].end = open_end(w.middle, ins + i, RB_TX);
        w.rx[i] = open_end(w.sink, ins + i, RB_RX);
    }
    OK(rb_service(w.source));
    OK(rb_service(w.middle));
    return w;
}

static rb_plan plan_of(struct world *w, const char *policy)
{
    return (rb_plan){.struct_size = sizeof(rb_plan), .ins = w->ins, .outs = w->outs, .in = w->in, .out = w->out, .policy = policy};
}

static void start(struct world *w, const char *kind, const rb_plan *plan)
{
    OK(rb_worker_start(&w->worker, w->middle, kind, plan, NULL));
}

static void end_world(struct world *w)
{
    rb_desc d[256];
    if (w->worker)
        rb_worker_stop(w->worker);
    for (uint32_t i = 0; i < w->outs; i++)
        for (int n; (n = rb_recv(w->rx[i], d, 256, 0)) > 0;)
            rb_return(w->sink, d, n);
    for (uint32_t i = 0; i < w->ins; i++) /* what the worker has not taken */
        for (int n; (n = rb_recv(w->in[i], d, 256, 0)) > 0;)
            rb_return(w->middle, d, n);
    rb_cluster_close(w->sink);
    OK(rb_service(w->middle));
    rb_cluster_close(w->middle);
    OK(rb_service(w->source));
    check_all_home(w->source);
    rb_cluster_close(w->source);
    OK(rb_cluster_destroy(cluster_id, 1));
}

#define UNTIL(w, condition)                                                                                                                \
    for (uint64_t until_ = rb_mono_ns() + 20000000000ull; !(condition);) {                                                                 \
        CHECK(rb_mono_ns() < until_);                                                                                                      \
        rb_service((w)->source);                                                                                                           \
        nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);                                                                             \
    }

static rb_worker_stats stats(struct world *w)
{
    rb_worker_stats s;
    OK(rb_worker_stats_get(w->worker, &s));
    return s;
}

static rb_worker_port port(struct world *w, uint32_t i)
{
    rb_worker_port p[2 * MOST];
    CHECK(rb_worker_ports(w->worker, p, 2 * MOST) == (int)(stats(w).ins + stats(w).outs));
    return p[i];
}

/* A packet that the policies look at and that proves itself: an IPv4/UDP header of flow `flow`, then its number. */
static void frame_write(rb_cluster *c, rb_desc *d, uint64_t sequence, uint32_t flow, uint64_t ts)
{
    uint8_t *p = rb_data(c, d);
    memset(p, 0, 60);
    p[12] = 8;
    p[14] = 0x45;
    p[23] = 17;
    memcpy(p + 26, &flow, 4);
    memcpy(p + 34, &flow, 4);
    memcpy(p + 42, &sequence, 8);
    rb_desc_set(d, 60, rb_desc_offset(d), 0);
    d->ts = ts;
}

static uint64_t frame_number(rb_cluster *c, const rb_desc *d)
{
    uint64_t sequence;
    memcpy(&sequence, (uint8_t *)rb_data(c, d) + 42, 8);
    return sequence;
}

/* n packets into input i, all taken by its queue. */
static void feed(struct world *w, uint32_t i, int n)
{
    rb_desc d[256];
    CHECK(n <= 256 && rb_alloc(w->tx[i], d, n) == n);
    for (int k = 0; k < n; k++) {
        frame_write(w->source, &d[k], w->sent, (uint32_t)test_random(&seed), w->sent + 1);
        w->sent++;
    }
    int sent = 0;
    for (uint64_t until = rb_mono_ns() + 20000000000ull; sent < n; rb_service(w->source)) { /* what went before may still be on its way back */
        int k = rb_send(w->tx[i], d + sent, n - sent, 0);
        OK(k);
        sent += k;
        CHECK(rb_mono_ns() < until);
    }
}

/* What waits at output i: its packets are checked to be in order, counted and given back. */
static int drain(struct world *w, uint32_t i)
{
    rb_desc d[256];
    int n = rb_recv(w->rx[i], d, 256, 0);
    OK(n);
    for (int k = 1; k < n; k++)
        CHECK(frame_number(w->sink, &d[k]) > frame_number(w->sink, &d[k - 1]));
    rb_return(w->sink, d, n);
    w->got[i] += (uint64_t)n;
    return n;
}

static uint64_t drain_all(struct world *w)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < w->outs; i++) {
        while (drain(w, i))
            ;
        sum += w->got[i];
    }
    return sum;
}

/* ---- bridge, balancer ------------------------------------------------------------------------------------------------ */

static void a_bridge_joins_each_input_to_its_output(void)
{
    struct world w = make_world(2, 2, 256);
    rb_plan plan = plan_of(&w, NULL);
    start(&w, "bridge", &plan);
    feed(&w, 0, 30);
    feed(&w, 1, 50);
    UNTIL(&w, drain_all(&w) == 80);
    CHECK(w.got[0] == 30 && w.got[1] == 50);
    UNTIL(&w, stats(&w).packets == 80 && stats(&w).bytes == 80 * 60 && stats(&w).dropped == 0);
    UNTIL(&w, port(&w, 1).packets == 50 && port(&w, 2).packets == 30 && port(&w, 3).packets == 50 && port(&w, 3).output == 1);
    end_world(&w);
}

static void a_balancer_sends_each_packet_where_its_hash_says(void)
{
    static const char *const policies[] = {"ip", "5tuple", "gtp", "gre-ip", "vxlan", "vlan"};
    for (size_t p = 0; p < sizeof policies / sizeof *policies; p++) {
        struct world w = make_world(1, 3, 1024);
        rb_plan plan = plan_of(&w, policies[p]);
        rb_desc d[256];
        start(&w, "balancer", &plan);
        feed(&w, 0, 200);
        UNTIL(&w, stats(&w).packets == 200 && rb_count(w.rx[0]) + rb_count(w.rx[1]) + rb_count(w.rx[2]) == 200);
        for (uint32_t i = 0; i < 3; i++) {
            int n = rb_recv(w.rx[i], d, 256, 0);
            OK(n);
            for (int k = 0; k < n; k++) {
                uint32_t hash;
                OK(rb_policy_hash_of(policies[p], rb_data(w.sink, &d[k]), 60, &hash));
                CHECK((uint64_t)hash * 3 >> 32 == i);
            }
            rb_return(w.sink, d, n);
        }
        end_world(&w);
    }
}

static void round_robin_deals_packets_or_bursts_and_input_keeps_inputs_apart(void)
{
    struct world w = make_world(2, 4, 256);
    rb_plan plan = plan_of(&w, "rr");
    start(&w, "balancer", &plan);
    feed(&w, 0, 100);
    UNTIL(&w, drain_all(&w) == 100);
    for (int i = 0; i < 4; i++)
        CHECK(w.got[i] == 25);
    plan.policy = "input";
    OK(rb_worker_change(w.worker, &plan));
    feed(&w, 1, 40);
    UNTIL(&w, drain_all(&w) == 140);
    CHECK(w.got[1] == 65);
    plan.policy = "rr-burst";
    OK(rb_worker_change(w.worker, &plan));
    for (int i = 1; i <= 8; i++) {
        feed(&w, 0, 10);
        UNTIL(&w, drain_all(&w) == (uint64_t)(140 + 10 * i));
    }
    uint64_t sum = 0;
    for (int i = 0; i < 4; i++) {
        CHECK((w.got[i] - 25) % 5 == 0); /* bursts of 10, or cut once by a look in between; none was dealt out */
        sum += w.got[i];
    }
    CHECK(sum == 220);
    end_world(&w);
}

static void weights_share_the_traffic_out(void)
{
    struct world w = make_world(1, 2, 1024);
    w.out[0].weight = 3;
    rb_plan plan = plan_of(&w, "rr");
    start(&w, "balancer", &plan);
    feed(&w, 0, 200);
    UNTIL(&w, drain_all(&w) == 200);
    CHECK(w.got[0] == 150 && w.got[1] == 50);
    w.out[0].weight = 1025;
    CHECK(rb_worker_change(w.worker, &plan) == -EINVAL);
    end_world(&w);
}

static void an_output_that_is_full_costs_the_others_nothing(void)
{
    struct world w = make_world(1, 3, 64);
    rb_plan plan = plan_of(&w, "rr");
    start(&w, "balancer", &plan);
    for (int i = 0; i < 30; i++) {
        feed(&w, 0, 60);
        /* output 0 has nobody who reads */
        UNTIL(&w, (drain(&w, 1), drain(&w, 2), w.got[1] == (uint64_t)(i + 1) * 20 && w.got[2] == (uint64_t)(i + 1) * 20 && stats(&w).packets == w.sent));
    }
    UNTIL(&w, stats(&w).packets == 1800);
    rb_worker_pause(w.worker, 1);
    rb_worker_port full = port(&w, 1);
    CHECK(full.packets == 64 && full.drops[RB_DROP_FULL] == 600 - 64 && stats(&w).drops[RB_DROP_FULL] == 600 - 64);
    UNTIL(&w, port(&w, 2).packets == 600 && port(&w, 2).drops[RB_DROP_FULL] == 0);
    end_world(&w);
}

static int refuse(struct rb_end *end, rb_desc *desc, int n)
{
    (void)desc;
    (void)n;
    return rb_fail(ENODEV, "detached", NULL, "%s is gone", end->address);
}

static void an_output_that_fails_is_left_behind_and_the_last_ends_the_worker(void)
{
    struct world w = make_world(1, 2, 256);
    rb_plan plan = plan_of(&w, "rr");
    struct rb_end_ops broken = *w.out[0].end->ops;
    const struct rb_end_ops *good = w.out[0].end->ops;
    broken.send = refuse;
    w.out[0].end->ops = &broken;
    start(&w, "balancer", &plan);
    feed(&w, 0, 100);
    UNTIL(&w, drain_all(&w) == 50 && stats(&w).dropped == 50);
    UNTIL(&w, stats(&w).running && port(&w, 1).state == 3 && port(&w, 1).drops[RB_DROP_GONE] == 50 && port(&w, 2).state == 1);
    rb_worker_hold(w.worker);
    w.out[1].end->ops = &broken;
    rb_worker_release(w.worker);
    feed(&w, 0, 10);
    UNTIL(&w, !stats(&w).running);
    CHECK(stats(&w).error == -ENODEV && strstr(stats(&w).message, "is gone"));
    w.out[0].end->ops = w.out[1].end->ops = good;
    end_world(&w);
}

static int only_even(void *user, const rb_desc *desc, void *const *data, int n, uint64_t *choice)
{
    (void)desc;
    if (*(int *)user < 0)
        return *(int *)user;
    for (int i = 0; i < n; i++) {
        uint64_t sequence;
        memcpy(&sequence, (uint8_t *)data[i] + 42, 8);
        choice[i] = sequence % 2 ? RB_NOWHERE : (uint64_t)*(int *)user;
    }
    return 0;
}

static void the_users_function_chooses_and_can_end_the_worker(void)
{
    struct world w = make_world(1, 2, 256);
    int to = 1;
    rb_plan plan = plan_of(&w, NULL);
    plan.choose = only_even;
    plan.user = &to;
    start(&w, "balancer", &plan);
    feed(&w, 0, 100);
    UNTIL(&w, drain_all(&w) == 50 && stats(&w).dropped == 50);
    UNTIL(&w, w.got[1] == 50 && stats(&w).drops[RB_DROP_FILTER] == 50);
    rb_worker_hold(w.worker);
    to = 17; /* no such output */
    rb_worker_release(w.worker);
    feed(&w, 0, 10);
    UNTIL(&w, stats(&w).dropped == 60);
    rb_worker_hold(w.worker);
    to = -EIO;
    rb_worker_release(w.worker);
    feed(&w, 0, 10);
    UNTIL(&w, !stats(&w).running);
    CHECK(stats(&w).error == -EIO);
    end_world(&w);
}

static int tick(void *user)
{
    rb_count_up(user, 1);
    return 0;
}

static void the_idle_function_is_called_and_event_workers_wake(void)
{
    struct world w = make_world(1, 1, 256);
    rb_a64 ticks = 0;
    rb_plan plan = plan_of(&w, NULL);
    rb_worker_options o = {.struct_size = sizeof o, .idle = 2};
    plan.idle = tick;
    plan.idle_user = &ticks;
    OK(rb_worker_start(&w.worker, w.middle, "bridge", &plan, &o));
    UNTIL(&w, rb_get(&ticks) > 600); /* it sleeps by now */
    feed(&w, 0, 100);
    UNTIL(&w, drain_all(&w) == 100);
    end_world(&w);
}

/* ---- fan-out ------------------------------------------------------------------------------------------------------------ */

static void every_group_gets_everything_once(void)
{
    struct world w = make_world(1, 4, 1024);
    uint32_t group[] = {0, 0, 1, 2};
    for (int i = 0; i < 4; i++)
        w.out[i].group = group[i];
    rb_plan plan = plan_of(&w, "5tuple");
    start(&w, "fanout", &plan);
    feed(&w, 0, 250);
    UNTIL(&w, drain_all(&w) == 750);
    CHECK(w.got[0] + w.got[1] == 250 && w.got[0] > 60 && w.got[1] > 60 && w.got[2] == 250 && w.got[3] == 250);
    UNTIL(&w, port(&w, 3).packets == 250 && port(&w, 3).bytes == 250 * 60);
    end_world(&w);
}

static void a_consumer_that_does_not_read_costs_only_itself(void)
{
    struct world w = make_world(1, 3, 64);
    for (uint32_t i = 0; i < 3; i++)
        w.out[i].group = i;
    rb_plan plan = plan_of(&w, NULL);
    start(&w, "fanout", &plan);
    for (uint64_t i = 1; i <= 20; i++) {
        feed(&w, 0, 50);
        UNTIL(&w, (drain(&w, 1), drain(&w, 2), w.got[1] == 50 * i && w.got[2] == 50 * i));
    }
    rb_worker_pause(w.worker, 1);
    UNTIL(&w, port(&w, 1).packets == 64 && port(&w, 1).drops[RB_DROP_FULL] == 1000 - 64 && port(&w, 2).drops[RB_DROP_FULL] == 0);
    end_world(&w);
}

static int by_number(void *user, const rb_desc *desc, void *const *data, int n, uint64_t *choice)
{
    (void)user;
    (void)desc;
    for (int i = 0; i < n; i++) {
        uint64_t sequence;
        memcpy(&sequence, (uint8_t *)data[i] + 42, 8);
        choice[i] = sequence % 4; /* none, the first, the second, both */
    }
    return 0;
}

static void masks_of_the_user_say_who_gets_a_packet(void)
{
    struct world w = make_world(1, 2, 1024);
    w.out[1].group = 1;
    rb_plan plan = plan_of(&w, NULL);
    plan.choose = by_number;
    start(&w, "fanout", &plan);
    feed(&w, 0, 200);
    UNTIL(&w, drain_all(&w) == 200 && stats(&w).dropped == 50);
    UNTIL(&w, w.got[0] == 100 && w.got[1] == 100 && stats(&w).drops[RB_DROP_FILTER] == 50);
    end_world(&w);
}

/* ---- merge, delay ---------------------------------------------------------------------------------------------------------- */

static void a_merge_is_in_order_of_time(void)
{
    struct world w = make_world(3, 1, 1024);
    rb_plan plan = plan_of(&w, NULL);
    plan.wait_ns = 3600ull * 1000000000u; /* only what is known to be the oldest */
    start(&w, "merge", &plan);
    /* Packet k of all goes to a random input, with time k + 1: each input by itself is in order. */
    for (int i = 0; i < 50; i++)
        feed(&w, (uint32_t)(test_random(&seed) % 3), 10);
    UNTIL(&w, stats(&w).packets == 500);
    uint64_t next = 0;
    rb_worker_pause(w.worker, 1);
    CHECK(stats(&w).held > 0); /* the last of two inputs have nothing to be compared with */
    rb_worker_pause(w.worker, 0);
    rb_worker_end(w.worker); /* hands on the rest */
    for (rb_desc d[256];;) {
        int n = rb_recv(w.rx[0], d, 256, 0);
        if (!n)
            break;
        for (int k = 0; k < n; k++)
            CHECK(frame_number(w.sink, &d[k]) == next++);
        rb_return(w.sink, d, n);
    }
    CHECK(next == 500);
    end_world(&w);
}

static void a_silent_input_holds_a_merge_up_only_so_long(void)
{
    struct world w = make_world(2, 1, 256);
    rb_plan plan = plan_of(&w, NULL);
    plan.wait_ns = 2000000;
    start(&w, "merge", &plan);
    uint64_t before = rb_mono_ns();
    feed(&w, 0, 100);
    UNTIL(&w, drain_all(&w) == 100);
    CHECK(rb_mono_ns() - before >= 2000000);
    end_world(&w);
}

static void a_delay_keeps_packets_so_long_and_hands_on_at_its_end(void)
{
    struct world w = make_world(1, 1, 256);
    rb_plan plan = plan_of(&w, NULL);
    plan.wait_ns = 30000000;
    start(&w, "delay", &plan);
    uint64_t before = rb_now_ns();
    feed(&w, 0, 100);
    UNTIL(&w, stats(&w).packets == 100);
    UNTIL(&w, drain_all(&w) == 100);
    CHECK(rb_now_ns() - before >= 30000000);
    plan.wait_ns = 3600ull * 1000000000u;
    OK(rb_worker_change(w.worker, &plan));
    feed(&w, 0, 100);
    UNTIL(&w, stats(&w).held == 100);
    CHECK(drain_all(&w) == 100);
    rb_worker_end(w.worker);
    CHECK(stats(&w).held == 0 && drain_all(&w) == 200);
    end_world(&w);
}

/* ---- changed while they run ------------------------------------------------------------------------------------------------- */

static void outputs_come_and_go_and_every_packet_is_somewhere(void)
{
    struct world w = make_world(1, 6, 256);
    rb_plan plan = plan_of(&w, "rr");
    static const char *const policies[] = {"rr", "5tuple", "ip", "rr-burst", "input"};
    rb_output some[6];
    uint64_t all = 0;
    start(&w, "balancer", &plan);
    for (int round = 0; round < 300; round++) {
        uint32_t first = (uint32_t)(test_random(&seed) % 6);
        plan.outs = 1 + (uint32_t)(test_random(&seed) % (6 - first));
        memcpy(some, w.out + first, plan.outs * sizeof *some);
        plan.out = some;
        plan.policy = policies[test_random(&seed) % 5];
        feed(&w, 0, 40);
        OK(rb_worker_change(w.worker, &plan));
        UNTIL(&w, (all = drain_all(&w), stats(&w).packets == w.sent && all + stats(&w).dropped == w.sent));
    }
    CHECK(stats(&w).dropped == 0);
    plan.policy = "nonsense";
    CHECK(rb_worker_change(w.worker, &plan) == -EINVAL && strstr(rb_error(), "nonsense"));
    feed(&w, 0, 40);
    UNTIL(&w, drain_all(&w) == w.sent);
    end_world(&w);
}

struct wanted {
    struct world *w;
    rb_end *opened;
};

static int open_another(rb_worker *worker, void *arg)
{
    struct wanted *want = arg;
    char address[32];
    (void)worker;
    snprintf(address, sizeof address, "%u@%u", want->w->middle->id, want->w->ins + want->w->outs);
    return rb_open(&want->opened, want->w->middle, address, RB_TX);
}

static void ends_are_opened_and_closed_between_two_turns(void)
{
    struct world w = make_world(1, 1, 256);
    rb_plan plan = plan_of(&w, NULL);
    struct wanted want = {.w = &w};
    rb_queue_options o = {.struct_size = sizeof o, .slots = 256};
    OK(rb_queue_create(w.source, 2, &o));
    start(&w, "bridge", &plan);
    feed(&w, 0, 10);
    OK(rb_worker_call(w.worker, open_another, &want));
    w.outs = 2;
    w.out[1].end = want.opened;
    w.rx[1] = open_end(w.sink, 2, RB_RX);
    plan.out = &w.out[1];
    OK(rb_worker_change(w.worker, &plan));
    rb_worker_hold(w.worker);
    rb_worker_hold(w.worker); /* it nests */
    rb_close(w.out[0].end);
    rb_worker_release(w.worker);
    rb_worker_release(w.worker);
    feed(&w, 0, 10);
    UNTIL(&w, drain_all(&w) == 20);
    CHECK(w.got[1] >= 10);
    end_world(&w);
}

static void a_paused_worker_takes_nothing(void)
{
    struct world w = make_world(1, 1, 256);
    rb_plan plan = plan_of(&w, NULL);
    start(&w, "bridge", &plan);
    OK(rb_worker_pause(w.worker, 1));
    feed(&w, 0, 100);
    for (int i = 0; i < 20; i++)
        nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    CHECK(stats(&w).packets == 0 && stats(&w).paused);
    rb_worker_hold(w.worker);
    CHECK(rb_count(w.in[0]) == 100);
    rb_worker_release(w.worker);
    OK(rb_worker_pause(w.worker, 0));
    UNTIL(&w, drain_all(&w) == 100);
    end_world(&w);
}

static void it_ends_after_as_many_packets_as_wanted(void)
{
    struct world w = make_world(1, 2, 256);
    rb_plan plan = plan_of(&w, "rr");
    rb_worker_options o = {.struct_size = sizeof o, .packets = 77};
    OK(rb_worker_start(&w.worker, w.middle, "balancer", &plan, &o));
    feed(&w, 0, 200);
    UNTIL(&w, !stats(&w).running);
    CHECK(stats(&w).error == 0 && stats(&w).packets == 77 && drain_all(&w) == 77);
    end_world(&w);
}

static void wrong_plans_are_refused(void)
{
    struct world w = make_world(2, 2, 64);
    rb_worker *worker;
    rb_plan plan = plan_of(&w, NULL);
    w.out[1].group = 2; /* a gap */
    CHECK(rb_worker_start(&worker, w.middle, "fanout", &plan, NULL) == -EINVAL);
    w.out[1].group = 1;
    CHECK(rb_worker_start(&worker, w.middle, "balancer", &plan, NULL) == -EINVAL);
    w.out[1].group = 0;
    CHECK(rb_worker_start(&worker, w.middle, "juggler", &plan, NULL) == -EINVAL && strstr(rb_error_cure(), "merge"));
    CHECK(rb_worker_start(&worker, w.source, "balancer", &plan, NULL) == -EINVAL); /* another handle's ends */
    CHECK(rb_worker_start(&worker, w.middle, "merge", &plan, NULL) == -EINVAL);    /* two outputs */
    plan.policy = "./no-such-library.so:choose";
    CHECK(rb_worker_start(&worker, w.middle, "balancer", &plan, NULL) == -EINVAL && strstr(rb_error(), "no-such-library"));
    plan.policy = NULL;
    start(&w, "bridge", &plan);
    CHECK(rb_worker_start(&worker, w.middle, "bridge", &plan, NULL) == -EBUSY);
    end_world(&w);
}

/* ---- names --------------------------------------------------------------------------------------------------------------------- */

static void a_named_worker_is_seen_by_others_alive_and_dead(void)
{
    struct world w = make_world(1, 2, 256);
    rb_plan plan = plan_of(&w, "rr");
    rb_worker_options o = {.struct_size = sizeof o, .name = "lb-1"};
    rb_worker_info info, all[8];
    rb_worker_port ports[8];
    rb_worker *other;
    int pipes[2], go[2];
    char x;
    CHECK(pipe(pipes) == 0 && pipe(go) == 0);
    /* Another process, made before there are threads here: later it sees the worker, cannot have its name, starts one of its own and is killed. */
    fflush(stdout);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        rb_cluster *c;
        CHECK(read(go[0], &x, 1) == 1);
        rb_worker_options mine = {.struct_size = sizeof mine, .name = "lb-1"};
        OK(rb_worker_read("lb-1", &info, NULL, 0));
        CHECK(info.pid == getppid());
        OK(rb_cluster_attach(cluster_id, &c));
        rb_end *end[2];
        rb_queue_options q = {.struct_size = sizeof q, .slots = 64};
        OK(rb_queue_create(c, 10, &q));
        OK(rb_queue_create(c, 11, &q));
        end[0] = open_end(c, 10, RB_RX);
        end[1] = open_end(c, 11, RB_TX);
        rb_pair pair = {end[0], end[1]};
        CHECK(rb_bridge_start(&other, c, &pair, 1, &mine) == -EBUSY);
        mine.name = "lb-3";
        OK(rb_bridge_start(&other, c, &pair, 1, &mine));
        CHECK(write(pipes[1], "x", 1) == 1);
        pause();
        _exit(1);
    }
    OK(rb_worker_start(&w.worker, w.middle, "balancer", &plan, &o));
    feed(&w, 0, 100);
    UNTIL(&w, drain_all(&w) == 100);
    UNTIL(&w, (rb_worker_read("lb-1", &info, ports, 8) == 3 && info.stats.packets == 100 && ports[2].packets == 50));
    CHECK(info.pid == getpid() && strcmp(info.kind, "balancer") == 0 && strcmp(info.policy, "rr") == 0 && info.stats.running);
    CHECK(ports[1].output == 1 && strcmp(ports[1].address, rb_address(w.out[0].end)) == 0);
    CHECK(rb_worker_list(all, 8) == 1 && strcmp(all[0].name, "lb-1") == 0);
    CHECK(rb_worker_forget("lb-1") == -EBUSY);
    CHECK(rb_worker_read("../lb-1", &info, NULL, 0) == -EINVAL);
    CHECK(rb_worker_read("lb-2", &info, NULL, 0) == -ENOENT);

    struct world v = make_world(1, 1, 64);
    rb_plan second = plan_of(&v, NULL);
    CHECK(rb_worker_start(&other, v.middle, "bridge", &second, &o) == -EBUSY && strstr(rb_error(), "lb-1"));
    v.worker = NULL;

    CHECK(write(go[1], "x", 1) == 1);
    CHECK(read(pipes[0], &x, 1) == 1);
    OK(rb_worker_read("lb-3", &info, ports, 8));
    CHECK(info.pid == pid && info.stats.running && rb_worker_list(all, 8) == 2);
    CHECK(rb_worker_forget("lb-3") == -EBUSY);
    CHECK(kill(pid, SIGKILL) == 0 && waitpid(pid, NULL, 0) == pid);
    OK(rb_worker_read("lb-3", &info, ports, 8));
    CHECK(info.pid == 0 && info.last_pid == pid && !info.stats.running && info.stats.error == -EOWNERDEAD);
    OK(rb_worker_forget("lb-3"));
    CHECK(rb_worker_read("lb-3", &info, NULL, 0) == -ENOENT);
    OK(rb_worker_read("lb-1", &info, NULL, 0)); /* our lock on it is still held */
    CHECK(info.pid == getpid());
    rb_cluster_close(v.sink);
    rb_cluster_close(v.middle);
    OK(rb_reap_all(v.source));
    check_all_home(v.source);
    rb_cluster_close(v.source);
    OK(rb_cluster_destroy(cluster_id--, 1));
    end_world(&w);
    CHECK(rb_worker_read("lb-1", &info, NULL, 0) == -ENOENT);
}

static void a_rubbish_record_leads_nobody_astray(void)
{
    char path[256], bytes[4096];
    rb_worker_info info;
    snprintf(path, sizeof path, "%s/workers", getenv("RINGBAR_RUN"));
    mkdir(path, 0700);
    snprintf(path, sizeof path, "%s/workers/rubbish", getenv("RINGBAR_RUN"));
    for (int i = 0; i < 20; i++) {
        int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
        CHECK(fd >= 0);
        for (int k = 0; k < i * 5; k++) {
            for (size_t b = 0; b < sizeof bytes; b++)
                bytes[b] = (char)test_random(&seed);
            CHECK(write(fd, bytes, sizeof bytes) == sizeof bytes);
        }
        close(fd);
        CHECK(rb_worker_read("rubbish", &info, NULL, 0) == -ENOENT);
        CHECK(rb_worker_list(&info, 1) == 0);
    }
    OK(rb_worker_forget("rubbish"));
}

/* ---- many, and killed ------------------------------------------------------------------------------------------------------------ */

static void twenty_four_workers_in_a_row(void)
{
    enum { STAGES = 24 };
    rb_cluster_options o = {.struct_size = sizeof o, .buffers = 65536, .buffer_size = 256, .queues = STAGES + 1, .slots = 256, .pages = RB_PAGES_4K, .persistent = 1};
    rb_cluster *c, *stage[STAGES], *last;
    rb_worker *worker[STAGES];
    rb_desc d[256];
    OK(rb_cluster_create(++cluster_id, &o, &c));
    rb_end *tx = open_end(c, 0, RB_TX);
    for (int i = 0; i < STAGES; i++) {
        OK(rb_cluster_attach(cluster_id, &stage[i]));
        rb_pair pair = {open_end(stage[i], (uint32_t)i, RB_RX), open_end(stage[i], (uint32_t)i + 1, RB_TX)};
        rb_worker_options w = {.struct_size = sizeof w};
        OK(rb_bridge_start(&worker[i], stage[i], &pair, 1, &w));
    }
    OK(rb_cluster_attach(cluster_id, &last));
    rb_end *rx = open_end(last, STAGES, RB_RX);
    uint64_t sent = 0, got = 0, until = rb_mono_ns() + 30000000000ull;
    while (got < 5000) {
        CHECK(rb_mono_ns() < until);
        if (sent < 5000 && sent - got < 128)
            send_packets(tx, 64, &sent);
        rb_service(c);
        int n = rb_recv(rx, d, 256, 1);
        OK(n);
        for (int k = 0; k < n; k++)
            CHECK(packet_read(last, &d[k]) == got++);
        rb_return(last, d, n);
    }
    rb_cluster_close(last);
    for (int i = STAGES; i-- > 0;) {
        rb_worker_stats s;
        OK(rb_worker_stats_get(worker[i], &s));
        CHECK(s.dropped == 0 && s.error == 0);
        rb_worker_stop(worker[i]);
        rb_cluster_close(stage[i]);
    }
    OK(rb_service(c));
    check_all_home(c);
    rb_cluster_close(c);
    OK(rb_cluster_destroy(cluster_id, 1));
}

/* A process that balances or fans out until it is killed. */
static void victim(uint32_t id, int fan)
{
    rb_cluster *c;
    rb_worker *worker;
    char address[32];
    rb_end *in;
    int rc;
    OK(rb_cluster_attach(id, &c));
    snprintf(address, sizeof address, "%u@0", id);
    /* Busy while its predecessor has lent on what the consumers have not yet given back. */
    for (uint64_t until = rb_mono_ns() + 20000000000ull; (rc = rb_open(&in, c, address, RB_RX)) == -EBUSY && rb_mono_ns() < until;)
        nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
    OK(rc);
    rb_output out[3];
    for (uint32_t i = 0; i < 3; i++)
        out[i] = (rb_output){.end = open_end(c, i + 1, RB_TX), .group = fan ? i : 0};
    rb_plan plan = {.struct_size = sizeof plan, .ins = 1, .outs = 3, .in = &in, .out = out, .policy = "rr"};
    rb_worker_options o = {.struct_size = sizeof o, .name = "victim"};
    OK(rb_worker_start(&worker, c, fan ? "fanout" : "balancer", &plan, &o));
    pause();
    _exit(1);
}

static void killed_and_replaced_again_and_again_it_loses_no_buffer(void)
{
    rb_cluster_options o = {.struct_size = sizeof o, .buffers = 16384, .buffer_size = 256, .queues = 4, .slots = 256, .pages = RB_PAGES_4K, .persistent = 1};
    rb_cluster *c, *sink;
    rb_desc d[256];
    OK(rb_cluster_create(++cluster_id, &o, &c));
    OK(rb_cluster_attach(cluster_id, &sink));
    rb_end *tx = open_end(c, 0, RB_TX), *rx[3];
    for (uint32_t i = 0; i < 3; i++)
        rx[i] = open_end(sink, i + 1, RB_RX);
    uint64_t sent = 0, got = 0;
    for (int round = 0; round < 16; round++) {
        fflush(stdout);
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0)
            victim(cluster_id, round & 1);
        uint64_t before = got, until = rb_mono_ns() + 20000000000ull, enough = 50 + test_random(&seed) % 2000;
        rb_worker_info info;
        while (got - before < enough || rb_worker_read("victim", &info, NULL, 0) < 0 || info.last_pid != pid) {
            CHECK(rb_mono_ns() < until);
            send_packets(tx, 64, &sent);
            rb_service(c);
            for (int i = 0; i < 3; i++) {
                int n = rb_recv(rx[i], d, 256, 0);
                OK(n);
                for (int k = 0; k < n; k++)
                    packet_read(sink, &d[k]);
                rb_return(sink, d, n);
                got += (uint64_t)n;
            }
            rb_service(sink);
        }
        CHECK(kill(pid, SIGKILL) == 0 && waitpid(pid, NULL, 0) == pid);
        do { /* the kernel may let go of its locks a moment after it is waited for */
            CHECK(rb_mono_ns() < until);
            OK(rb_worker_read("victim", &info, NULL, 0));
        } while (info.pid == pid);
        CHECK(info.pid == 0 && info.last_pid == pid);
        OK(rb_reap_all(c));
        check_conservation(c);
    }
    for (int i = 0; i < 3; i++)
        for (int n; (n = rb_recv(rx[i], d, 256, 0)) > 0;)
            rb_return(sink, d, n);
    rb_cluster_close(sink);
    rb_end *rest;
    OK(rb_cluster_attach(cluster_id, &sink)); /* takes what is still unread in the first queue */
    rest = open_end(sink, 0, RB_RX);
    OK(rb_service(c));
    for (int n; (n = rb_recv(rest, d, 256, 0)) > 0;)
        rb_return(sink, d, n);
    rb_cluster_close(sink);
    OK(rb_reap_all(c));
    OK(rb_service(c));
    check_all_home(c);
    rb_cluster_close(c);
    OK(rb_cluster_destroy(cluster_id, 1));
    OK(rb_worker_forget("victim"));
}

/* ---- hostile packets, the clock ----------------------------------------------------------------------------------------------------- */

static void random_packets_of_any_length_are_hashed(void)
{
    static const char *const policies[] = {"ip", "5tuple", "gtp", "gtp-ip", "gre", "vxlan", "vlan"};
    static const uint8_t starts[][24] = {
        /* after the addresses: EtherTypes and first bytes that lead on */
        {0x08, 0x00, 0x45}, {0x08, 0x00, 0x4f}, {0x86, 0xdd, 0x60}, {0x81, 0x00, 0, 1, 0x88, 0xa8, 0, 2, 0x08, 0x00, 0x45}, {0x81, 0x00, 0, 1, 0x86, 0xdd, 0x60},
    };
    static const uint8_t protocols[] = {17, 47, 6, 0, 43, 44, 51, 60, 41, 4};
    static const uint16_t to_ports[] = {2152, 2123, 4789};
    for (int round = 0; round < 200000; round++) {
        uint32_t length = (uint32_t)(test_random(&seed) % 300), hash = 0, again = 0;
        uint8_t *p = malloc(length ? length : 1); /* exactly as long: a checker of memory sees a byte too far */
        CHECK(p);
        for (uint32_t i = 0; i < length; i += 8) {
            uint64_t r = test_random(&seed) & test_random(&seed);
            memcpy(p + i, &r, RB_MIN(8u, length - i));
        }
        const uint8_t *begin = starts[test_random(&seed) % 5];
        for (uint32_t i = 12; i < length && i < 24 && (begin[i - 12] || i < 14); i++)
            p[i] = begin[i - 12];
        if (length > 40 && begin[0] == 8) {
            p[20] = p[21] = 0;
            p[23] = protocols[test_random(&seed) % sizeof protocols];
            uint16_t port = to_ports[test_random(&seed) % 3];
            p[36] = (uint8_t)(port >> 8);
            p[37] = (uint8_t)port;
        } else if (length > 60 && begin[0] == 0x86) {
            p[20] = protocols[test_random(&seed) % sizeof protocols];
            p[54] = protocols[test_random(&seed) % sizeof protocols];
        }
        const char *policy = policies[test_random(&seed) % 7];
        OK(rb_policy_hash_of(policy, p, length, &hash));
        OK(rb_policy_hash_of(policy, p, length, &again));
        CHECK(hash == again);
        free(p);
    }
}

static void the_pulse_moves_on_and_workers_can_live_by_it(void)
{
    OK(rb_pulse_start(0, 0));
    OK(rb_pulse_start(100, 0)); /* takes part in the one that runs */
    uint64_t first = rb_pulse_ns(), until = rb_mono_ns() + 10000000000ull;
    while (rb_pulse_ns() == first)
        CHECK(rb_mono_ns() < until);
    rb_pulse_stop();
    struct world w = make_world(1, 1, 256);
    rb_plan plan = plan_of(&w, NULL);
    rb_worker_options o = {.struct_size = sizeof o, .pulse = 1};
    plan.wait_ns = 5000000;
    OK(rb_worker_start(&w.worker, w.middle, "delay", &plan, &o));
    feed(&w, 0, 10);
    UNTIL(&w, drain_all(&w) == 10);
    end_world(&w);
    rb_pulse_stop();
}

int main(void)
{
    private_directories();
    RUN(a_bridge_joins_each_input_to_its_output);
    RUN(a_balancer_sends_each_packet_where_its_hash_says);
    RUN(round_robin_deals_packets_or_bursts_and_input_keeps_inputs_apart);
    RUN(weights_share_the_traffic_out);
    RUN(an_output_that_is_full_costs_the_others_nothing);
    RUN(an_output_that_fails_is_left_behind_and_the_last_ends_the_worker);
    RUN(the_users_function_chooses_and_can_end_the_worker);
    RUN(the_idle_function_is_called_and_event_workers_wake);
    RUN(every_group_gets_everything_once);
    RUN(a_consumer_that_does_not_read_costs_only_itself);
    RUN(masks_of_the_user_say_who_gets_a_packet);
    RUN(a_merge_is_in_order_of_time);
    RUN(a_silent_input_holds_a_merge_up_only_so_long);
    RUN(a_delay_keeps_packets_so_long_and_hands_on_at_its_end);
    RUN(outputs_come_and_go_and_every_packet_is_somewhere);
    RUN(ends_are_opened_and_closed_between_two_turns);
    RUN(a_paused_worker_takes_nothing);
    RUN(it_ends_after_as_many_packets_as_wanted);
    RUN(wrong_plans_are_refused);
    RUN(a_named_worker_is_seen_by_others_alive_and_dead);
    RUN(a_rubbish_record_leads_nobody_astray);
    RUN(twenty_four_workers_in_a_row);
    RUN(killed_and_replaced_again_and_again_it_loses_no_buffer);
    RUN(random_packets_of_any_length_are_hashed);
    RUN(the_pulse_moves_on_and_workers_can_live_by_it);
    return 0;
}
