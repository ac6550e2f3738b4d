/* SPDX-License-Identifier: Apache-2.0
 *
 * Two processes and one VM: one of them receives from the VM, and so serves it, the other sends to it. What the second sends comes by a hop that the first
 * empties. Nothing is lost when the sender goes, and when the server goes the sender takes its place.
 */
#include "world.h"

#include <sys/prctl.h>

static uint32_t id = 700;
static rb_cluster *host, *guest;
static rb_end *grx;
static int lane;
static struct shared {
    _Atomic uint32_t ready, hold, stop, sent, forked;
} *shared;

/* Queue 0 goes to the VM, the VM sends on queue 1. */
static void begin(void)
{
    memset(shared, 0, sizeof *shared);
    host = make_cluster(++id, 8192, 2, 256);
    OK(lane = rb_lane_create(host, "vm", "1:1"));
    OK(rb_lane_bind(host, (uint32_t)lane, 0, RB_VM_RX));
    OK(rb_lane_bind(host, (uint32_t)lane, 1, RB_VM_TX));
    guest = attach_guest(host, lane, 0);
    grx = open_end(guest, 0, RB_RX);
}

static void wait_for(_Atomic uint32_t *flag)
{
    for (int i = 0; i < 20000 && !atomic_load(flag); i++)
        nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
    CHECK(atomic_load(flag));
}

/* A child, which does not outlive a test that fails. */
static pid_t child(void)
{
    fflush(stdout);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (!pid)
        CHECK(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
    return pid;
}

/* A forked copy of a process may use nothing of its parent's, and must not move anything either while it is told so. */
static void refused_in_a_fork(rb_cluster *c, rb_end *rx)
{
    pid_t pid = child();
    if (!pid) {
        rb_desc d[64];
        for (int i = 0; i < 3; i++)
            CHECK(rb_recv(rx, d, 64, 0) < 0 && rb_service(c) < 0);
        _exit(0);
    }
    must_exit_well(pid);
    atomic_store(&shared->forked, 3);
}

/* A process that receives on queue 1 until it is told to stop, and stands still while `hold` is set. */
static pid_t start_server(void)
{
    pid_t pid = child();
    if (pid)
        return wait_for(&shared->ready), pid;
    rb_cluster *c;
    rb_desc d[64];
    OK(rb_cluster_attach(id, &c));
    rb_end *rx = open_end(c, 1, RB_RX);
    OK(rb_service(c));
    atomic_store(&shared->ready, 1);
    while (!atomic_load(&shared->stop)) {
        uint32_t asked = 1;
        if (atomic_compare_exchange_strong(&shared->hold, &asked, 2) || asked == 2) {
            uint32_t now = 1;
            if (atomic_compare_exchange_strong(&shared->forked, &now, 2))
                refused_in_a_fork(c, rx);
            continue;
        }
        int n = rb_recv(rx, d, 64, 1);
        if (n == -ENODEV) { /* the VM has gone: it stays, and has nothing to do */
            OK(rb_service(c));
            continue;
        }
        OK(n);
        CHECK(rb_return(c, d, n) == n);
    }
    rb_close(rx);
    rb_cluster_close(c);
    _exit(0);
}

static void hold(int on)
{
    atomic_store(&shared->hold, (uint32_t)on);
    for (int i = 0; on && i < 20000 && atomic_load(&shared->hold) != 2; i++)
        nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
    CHECK(!on || atomic_load(&shared->hold) == 2);
}

/* What has come to the VM: its packets' numbers go up, without a gap where `whole`. How many came. */
static int vm_takes(uint64_t *next, int whole)
{
    rb_desc d[64];
    int n = rb_recv(grx, d, 64, 0);
    OK(n);
    for (int i = 0; i < n; i++) {
        uint64_t sequence = packet_read(guest, &d[i]);
        CHECK(whole ? sequence == *next : sequence >= *next);
        *next = sequence + 1;
    }
    CHECK(rb_return(guest, d, n) == n);
    return n;
}

static void vm_takes_until(uint64_t *next, uint64_t last, rb_cluster *c)
{
    uint64_t until = rb_mono_ns() + 20000000000ull;
    while (*next < last && rb_mono_ns() < until)
        if (!vm_takes(next, 1)) {
            if (c)
                OK(rb_service(c));
            nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
        }
    if (*next != last)
        fprintf(stderr, "%llu of %llu packets\n", (unsigned long long)*next, (unsigned long long)last);
    CHECK(*next == last);
}

static int queues_are_now(int n)
{
    uint32_t ids[8];
    return rb_queue_list(host, ids, 8) == n;
}

static int queues_are(int n)
{
    uint64_t until = rb_mono_ns() + 20000000000ull;
    while (!queues_are_now(n) && rb_mono_ns() < until) {
        OK(rb_service(host));
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    return queues_are_now(n);
}

static void finish(void)
{
    rb_cluster_close(guest);
    OK(rb_lane_remove(host, (uint32_t)lane, 0));
    rb_cluster_close(host);
    OK(rb_cluster_attach(id, &host));
    for (int i = 0; i < 3; i++)
        OK(rb_reap_all(host));
    check_all_home(host);
    CHECK(queues_are(2) && check_conservation(host).nobody == 8191);
    rb_cluster_close(host);
    OK(rb_cluster_destroy(id, 1));
}

static void stop_server(pid_t pid)
{
    atomic_store(&shared->stop, 1);
    must_exit_well(pid);
}

static void packets_reach_a_vm_that_another_process_serves(void)
{
    uint64_t n = 0, next = 0;
    rb_queue_info info;
    begin();
    pid_t pid = start_server();
    rb_end *tx = open_end(host, 0, RB_TX);
    CHECK(queues_are(3));
    while (n < 20000) {
        send_packets(tx, 32, &n);
        vm_takes(&next, 1);
    }
    vm_takes_until(&next, n, host);
    OK(rb_queue_get_info(host, 0, &info));
    CHECK(info.producer_pid == (int32_t)getpid() && info.server_pid == (int32_t)pid && info.packets == n && info.copied == 0);
    OK(rb_queue_get_info(host, RB_MAX_QUEUES - 1, &info));
    CHECK(info.feeds == 0 && info.producer_pid == (int32_t)getpid() && info.consumer_pid == (int32_t)pid && info.packets == n && info.copied == 0);
    rb_cluster *other;
    rb_end *second;
    OK(rb_cluster_attach(id, &other)); /* one sender, here too */
    CHECK(rb_open(&second, other, rb_address(tx), RB_TX) == -EBUSY);
    rb_cluster_close(other);
    rb_close(tx);
    CHECK(queues_are(2));
    tx = open_end(host, 0, RB_TX); /* and again */
    uint64_t before = n;
    send_packets(tx, 32, &n);
    CHECK(n == before + 32);
    vm_takes_until(&next, n, host);
    rb_close(tx);
    stop_server(pid);
    finish();
}

static void a_slow_vm_slows_its_sender_and_loses_nothing(void)
{
    uint64_t n = 0, next = 0;
    begin();
    pid_t pid = start_server();
    rb_end *tx = open_end(host, 0, RB_TX);
    for (int i = 0; i < 3000; i++) /* more than the hop and the queue hold */
        if (!send_packets(tx, 32, &n))
            nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    rb_queue_info info;
    OK(rb_queue_get_info(host, 0, &info));
    CHECK(n >= 256 && n < 3000 && info.drops[RB_DROP_FULL] == 0);
    vm_takes_until(&next, n, host);
    rb_close(tx);
    stop_server(pid);
    finish();
}

static void a_forked_copy_of_the_server_moves_nothing(void)
{
    uint64_t n = 0, next = 0;
    begin();
    pid_t pid = start_server();
    rb_end *tx = open_end(host, 0, RB_TX);
    CHECK(send_packets(tx, 32, &n) == 32);
    vm_takes_until(&next, 32, host); /* the server knows of the hop by now */
    hold(1);
    CHECK(send_packets(tx, 200, &n) == 200);
    vm_takes(&next, 1); /* what it had begun */
    uint64_t had = next;
    atomic_store(&shared->forked, 1);
    for (int i = 0; i < 20000 && atomic_load(&shared->forked) != 3; i++)
        nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
    CHECK(atomic_load(&shared->forked) == 3);
    vm_takes(&next, 1);
    CHECK(next == had);
    hold(0);
    vm_takes_until(&next, n, host);
    rb_close(tx);
    stop_server(pid);
    finish();
}

static void what_was_sent_before_the_sender_closed_arrives(void)
{
    uint64_t n = 0, next = 0;
    begin();
    pid_t pid = start_server();
    hold(1);
    rb_end *tx = open_end(host, 0, RB_TX);
    CHECK(send_packets(tx, 200, &n) == 200);
    rb_close(tx);
    hold(0);
    vm_takes_until(&next, 200, host);
    CHECK(queues_are(2));
    stop_server(pid);
    finish();
}

static void send_on(void)
{
    rb_cluster *c;
    uint64_t n = 0;
    OK(rb_cluster_attach(id, &c));
    rb_end *tx = open_end(c, 0, RB_TX);
    for (;;) {
        send_packets(tx, 32, &n);
        atomic_store(&shared->sent, (uint32_t)n);
        OK(rb_service(c));
    }
}

static void a_killed_sender_loses_nothing_that_it_sent(void)
{
    for (int round = 0; round < 8; round++) {
        uint64_t next = 0, n = 0;
        begin();
        pid_t pid = start_server();
        pid_t sender = child();
        if (!sender)
            send_on();
        wait_for(&shared->sent);
        for (int i = 0; i < 200000 && !next; i++) { /* killed before the server has opened the hop, its packets go home with it */
            vm_takes(&next, 1);
            nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
        }
        CHECK(next);
        for (int i = 0; i < 500 * round; i++)
            vm_takes(&next, 1);
        CHECK(kill(sender, SIGKILL) == 0 && waitpid(sender, NULL, 0) == sender);
        const uint64_t told = atomic_load(&shared->sent);
        uint64_t until = rb_mono_ns() + 20000000000ull;
        while ((next < told || !queues_are_now(2)) && rb_mono_ns() < until) {
            vm_takes(&next, 1);
            OK(rb_reap_all(host));
        }
        CHECK(next >= told);
        CHECK(next <= told + 32);
        CHECK(queues_are_now(2));
        rb_end *tx = open_end(host, 0, RB_TX); /* its place can be taken at once */
        n = next;
        for (uint64_t last = n + 1000; n < last && rb_mono_ns() < until;) {
            send_packets(tx, 32, &n);
            vm_takes(&next, 1);
        }
        vm_takes_until(&next, n, host);
        rb_close(tx);
        stop_server(pid);
        finish();
    }
}

/* Whether it closes or is killed: the sender serves the VM then. */
static void the_sender_takes_the_place_of_a_server_that_goes(void)
{
    for (int killed = 0; killed < 2; killed++) {
        uint64_t n = 0, next = 0;
        begin();
        pid_t pid = start_server();
        rb_end *tx = open_end(host, 0, RB_TX);
        while (n < 5000) {
            send_packets(tx, 32, &n);
            vm_takes(&next, 1);
        }
        if (killed)
            CHECK(kill(pid, SIGKILL) == 0 && waitpid(pid, NULL, 0) == pid);
        else
            stop_server(pid);
        rb_queue_info info = {0};
        uint64_t until = rb_mono_ns() + 20000000000ull;
        while (info.server_pid != (int32_t)getpid() && rb_mono_ns() < until) {
            send_packets(tx, 8, &n);
            vm_takes(&next, !killed); /* what a killed server had in hand is lost */
            OK(rb_service(host));
            OK(rb_queue_get_info(host, 0, &info));
        }
        CHECK(info.server_pid == (int32_t)getpid());
        for (uint64_t last = n + 5000; n < last;) {
            send_packets(tx, 32, &n);
            vm_takes(&next, !killed);
            OK(rb_service(host));
        }
        vm_takes_until(&next, n, host);
        rb_end *rx = open_end(host, 1, RB_RX); /* and receives from it, too */
        rb_end *gtx = open_end(guest, 1, RB_TX);
        uint64_t m = 0;
        for (int i = 0; i < 100 && !m; i++) {
            OK(rb_service(host));
            send_packets(gtx, 8, &m);
        }
        rb_desc d[8];
        CHECK(m && rb_recv(rx, d, 8, 1000) == (int)m && rb_return(host, d, (int)m) == (int)m);
        rb_close(rx);
        rb_close(tx);
        finish();
    }
}

/* The VM sends n packets on queue 1, and they come to rx. */
static void vm_sends(rb_end *gtx, rb_end *rx, uint64_t *m, uint64_t n)
{
    uint64_t until = rb_mono_ns() + 20000000000ull, next = *m;
    rb_desc d[64];
    for (uint64_t last = *m + n; next < last && rb_mono_ns() < until;) {
        if (*m < last)
            send_packets(gtx, (int)RB_MIN(last - *m, 32u), m);
        int got = rb_recv(rx, d, 64, 1);
        OK(got);
        for (int i = 0; i < got; i++)
            CHECK(packet_read(host, &d[i]) == next++);
        CHECK(rb_return(host, d, got) == got);
    }
    CHECK(next == *m);
}

/* A handle has one book, and the dead one's cannot end: the VM has its empties. It opens both ends after the death, or has opened them before. */
static void a_handle_that_serves_others_takes_the_place_of_a_killed_server(void)
{
    for (int before = 0; before < 2; before++) {
        uint64_t n = 0, next = 0, m = 0;
        struct rb_server *s;
        rb_end *tx = NULL, *rx;
        begin();
        pid_t pid = start_server();
        OK(rb_server_get(host, &s));
        if (before)
            tx = open_end(host, 0, RB_TX);
        CHECK(kill(pid, SIGKILL) == 0 && waitpid(pid, NULL, 0) == pid);
        rx = open_end(host, 1, RB_RX);
        if (!before)
            tx = open_end(host, 0, RB_TX);
        while (n < 5000) {
            send_packets(tx, 32, &n);
            vm_takes(&next, 1);
        }
        vm_takes_until(&next, n, host);
        rb_end *gtx = open_end(guest, 1, RB_TX);
        vm_sends(gtx, rx, &m, 5000);
        rb_queue_info info;
        OK(rb_queue_get_info(host, 0, &info));
        CHECK(info.server_pid == (int32_t)getpid() && info.copied == 0);
        rb_close(gtx);
        rb_close(rx);
        rb_close(tx);
        finish();
    }
}

/* Two VMs, each served by a process that was killed: one handle serves both, and others too. */
static void a_handle_takes_the_place_of_two_killed_servers(void)
{
    uint64_t n = 0, next = 0;
    struct rb_server *s;
    begin();
    int second = rb_lane_create(host, "second", "1:1");
    OK(second);
    rb_queue_options o = {.struct_size = sizeof o, .slots = 256};
    OK(rb_queue_create(host, 2, &o));
    OK(rb_lane_bind(host, (uint32_t)second, 2, RB_VM_TX));
    pid_t pids[2] = {start_server(), 0};
    if (!(pids[1] = child())) {
        rb_cluster *c;
        OK(rb_cluster_attach(id, &c));
        open_end(c, 2, RB_RX);
        OK(rb_service(c));
        atomic_store(&shared->sent, 1);
        for (;;)
            pause();
    }
    wait_for(&shared->sent);
    for (int i = 0; i < 2; i++)
        CHECK(kill(pids[i], SIGKILL) == 0 && waitpid(pids[i], NULL, 0) == pids[i]);
    OK(rb_server_get(host, &s));
    rb_end *rx = open_end(host, 2, RB_RX), *tx = open_end(host, 0, RB_TX);
    while (n < 1000) {
        send_packets(tx, 32, &n);
        vm_takes(&next, 1);
    }
    vm_takes_until(&next, n, host);
    rb_close(rx);
    rb_close(tx);
    OK(rb_lane_remove(host, (uint32_t)second, 0));
    OK(rb_service(host));
    OK(rb_queue_destroy(host, 2));
    finish();
}

/* It serves a queue that nobody there sends on, as long as the VM is there and no longer. */
static void a_queue_that_came_with_a_vm_is_free_when_the_vm_has_gone(void)
{
    uint64_t n = 0, next = 0;
    rb_queue_info info;
    begin();
    pid_t pid = start_server();
    rb_end *tx = open_end(host, 0, RB_TX);
    CHECK(send_packets(tx, 32, &n) == 32);
    vm_takes_until(&next, n, host);
    rb_close(tx);
    CHECK(queues_are(2));
    rb_cluster_close(guest);
    OK(rb_lane_remove(host, (uint32_t)lane, 0));
    uint64_t until = rb_mono_ns() + 20000000000ull;
    do {
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        OK(rb_queue_get_info(host, 0, &info));
    } while (info.server_pid && rb_mono_ns() < until);
    CHECK(!info.server_pid);
    tx = open_end(host, 0, RB_TX);
    CHECK(queues_are(2)); /* no hop */
    rb_close(tx);
    OK(lane = rb_lane_create(host, "vm", "1:1")); /* for finish */
    guest = attach_guest(host, lane, 0);
    stop_server(pid);
    finish();
}

static void a_server_that_does_not_look_is_named(void)
{
    uint64_t n = 0, next = 0;
    rb_desc d[1];
    begin();
    pid_t pid = start_server();
    hold(1);
    rb_end *tx = open_end(host, 0, RB_TX);
    while (send_packets(tx, 32, &n) > 0)
        ;
    CHECK(rb_alloc(tx, d, 1) == 1);
    packet_write(host, d, n);
    CHECK(rb_send(tx, d, 1, 1000) == -ETIMEDOUT && strstr(rb_error(), "does not pass on"));
    hold(0);
    CHECK(rb_send(tx, d, 1, 10000) == 1);
    vm_takes_until(&next, n + 1, host);
    rb_close(tx);
    stop_server(pid);
    finish();
}

int main(void)
{
    private_directories();
    alarm(100);
    shared = shared_memory(sizeof *shared);
    RUN(packets_reach_a_vm_that_another_process_serves);
    RUN(a_slow_vm_slows_its_sender_and_loses_nothing);
    RUN(a_forked_copy_of_the_server_moves_nothing);
    RUN(what_was_sent_before_the_sender_closed_arrives);
    RUN(a_killed_sender_loses_nothing_that_it_sent);
    RUN(the_sender_takes_the_place_of_a_server_that_goes);
    RUN(a_handle_that_serves_others_takes_the_place_of_a_killed_server);
    RUN(a_handle_takes_the_place_of_two_killed_servers);
    RUN(a_queue_that_came_with_a_vm_is_free_when_the_vm_has_gone);
    RUN(a_server_that_does_not_look_is_named);
    return 0;
}
