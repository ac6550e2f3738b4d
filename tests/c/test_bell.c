/* SPDX-License-Identifier: Apache-2.0
 *
 * Bells: who sleeps is woken, who is awake is not rung at. As in test_lane.c the VM's lane is mapped a second time; its doorbell is pairs of event
 * descriptors, which a process keeps that stands where QEMU would.
 */
#include "rb_bell.h"
#include "world.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>

static rb_cluster *host, *guest;
static uint32_t id = 700;
static int lane, fds[1 + RB_LANE_QUEUES];
static pid_t keeper;
static rb_end *tx, *rx, *grx, *gtx; /* the host's, the guest's */
static int lease[2];

static void give(rb_end *end)
{
    uint32_t of, entry;
    OK(rb_bell_place(end, &of, &entry));
    CHECK((int)of == lane && entry < RB_LANE_QUEUES);
    OK(rb_bell_give(end, dup(fds[1 + entry]), dup(fds[0]), end == grx ? dup(lease[0]) : -1));
}

static uint64_t rings(rb_end *end) /* how often the VM's end was rung at, since the last time */
{
    uint32_t of, entry;
    uint64_t n = 0;
    OK(rb_bell_place(end, &of, &entry));
    return read(fds[1 + entry], &n, sizeof n) == sizeof n ? n : 0;
}

static uint64_t host_rings(void)
{
    uint64_t n = 0;
    return read(fds[0], &n, sizeof n) == sizeof n ? n : 0;
}

static void serve(void)
{
    OK(rb_service(host));
    rb_desc d;
    CHECK(rb_recv(grx, &d, 1, 0) == 0 && rb_alloc(gtx, &d, 1) >= 0); /* both have their echo */
    CHECK(grx->echoed && gtx->echoed);
}

/* A VM that receives on queue 0 and sends on queue 1, with a doorbell; both ends of both queues open. */
static void begin(void)
{
    host = make_cluster(++id, 2048, 2, 256);
    OK(lane = rb_lane_create(host, "vm", "1:1"));
    OK(rb_lane_bind(host, (uint32_t)lane, 0, RB_VM_RX));
    OK(rb_lane_bind(host, (uint32_t)lane, 1, RB_VM_TX));
    for (uint32_t i = 0; i <= RB_LANE_QUEUES; i++)
        CHECK((fds[i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) >= 0);
    CHECK((keeper = fork()) >= 0);
    if (!keeper) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            pause();
    }
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, lease) == 0);
    tx = open_end(host, 0, RB_TX);
    rx = open_end(host, 1, RB_RX);
    OK(rb_lane_bells(host, (uint32_t)lane, keeper, fds, 1 + (int)RB_LANE_QUEUES));
    guest = attach_guest(host, lane, 0);
    grx = open_end(guest, 0, RB_RX);
    gtx = open_end(guest, 1, RB_TX);
    OK(rb_service(host));
    rb_desc d; /* which is when it looks at what others changed */
    CHECK(rb_recv(rx, &d, 1, 0) == 0);
    CHECK(tx->ctx->bell && rx->ctx->bell);
    give(grx);
    give(gtx);
    serve();
    rings(grx);
    rings(gtx);
    host_rings();
}

static void finish(void)
{
    rb_cluster_close(guest);
    OK(rb_service(host));
    OK(rb_lane_remove(host, (uint32_t)lane, 0));
    OK(rb_service(host));
    rb_cluster_close(host);
    kill(keeper, SIGKILL);
    CHECK(waitpid(keeper, NULL, 0) == keeper);
    for (uint32_t i = 0; i <= RB_LANE_QUEUES; i++)
        close(fds[i]);
    close(lease[0]);
    if (lease[1] >= 0)
        close(lease[1]);
    OK(rb_cluster_attach(id, &host));
    check_all_home(host);
    rb_cluster_close(host);
    OK(rb_cluster_destroy(id, 1));
}

static void return_all(rb_end *end, int n)
{
    rb_desc d[256];
    int got = 0;
    for (int tries = 0; got < n && tries < 1000; tries++) {
        int k = rb_recv(end, d + got, n - got, 0);
        OK(k);
        got += k;
    }
    CHECK(got == n && rb_return(end->c, d, n) == n);
}

static void a_bell_rings_once_for_each_arming(void)
{
    uint64_t n = 0;
    rb_desc d;
    begin();
    for (int i = 0; i < 20; i++)
        send_packets(tx, 4, &n);
    CHECK(rings(grx) == 0); /* nobody had armed */
    return_all(grx, 80);
    CHECK(rb_bell_arm(grx) == RB_BELL_MS);
    CHECK(rb_recv(grx, &d, 1, 0) == 0);
    CHECK(rings(grx) == 0);
    for (int i = 0; i < 20; i++)
        send_packets(tx, 4, &n);
    CHECK(rings(grx) == 1);
    CHECK(rb_wait(grx, 10000) == 1);
    return_all(grx, 80);
    send_packets(tx, 4, &n);
    CHECK(rings(grx) == 0); /* that one was answered */
    return_all(grx, 4);

    /* the same from the VM */
    CHECK(rb_bell_arm(rx) == RB_BELL_MS);
    CHECK(rb_recv(rx, &d, 1, 0) == 0 && host_rings() == 0);
    for (int i = 0; i < 20; i++)
        send_packets(gtx, 4, &n);
    CHECK(host_rings() == 1);
    CHECK(rb_wait(rx, 10000) == 1);
    return_all(rx, 80);
    finish();
}

static void a_fan_rings_too(void)
{
    uint64_t n = 0;
    rb_desc d, out[4];
    uint64_t mask[4] = {1, 1, 1, 1};
    rb_fan *fan;
    begin();
    CHECK(rb_bell_arm(grx) == RB_BELL_MS && rb_recv(grx, &d, 1, 0) == 0);
    OK(rb_fan_open(&fan, host));
    CHECK(rb_fan_add(fan, tx) == 0);
    CHECK(rb_alloc(tx, out, 4) == 4);
    for (int i = 0; i < 4; i++)
        packet_write(host, &out[i], n++);
    CHECK(rb_fan_send(fan, out, mask, 4, NULL) == 4);
    CHECK(rings(grx) == 1 && rb_wait(grx, 10000) == 1);
    return_all(grx, 4);
    rb_fan_close(fan);
    finish();
}

/* ---- two threads ------------------------------------------------------------------------------------------------ */

#define ROUNDS 3000
static rb_a32 taken;

/* Sleeps after every packet, on nothing but the bell: a sleep that ends by itself with a packet there was a bell that did not ring. */
static void *sleeper(void *arg)
{
    rb_end *end = arg;
    rb_desc d;
    for (uint32_t n = 0; n < ROUNDS;) {
        int k = rb_recv(end, &d, 1, 0);
        OK(k);
        if (k == 0) {
            CHECK(rb_bell_arm(end) > 0);
            k = rb_recv(end, &d, 1, 0);
            OK(k);
        }
        if (k == 0) {
            CHECK(end->armed);
            int rang = rb_bell_listen(end, RB_BELL_MS);
            if (!rang && end->ops->ready(end))
                for (int more = 0; more < 40 && !rang; more++)
                    rang = rb_bell_listen(end, RB_BELL_MS); /* sent in this very moment: then the bell is under way */
            CHECK(rang || !end->ops->ready(end));
            continue;
        }
        CHECK(packet_read(end->c, &d) == n);
        CHECK(rb_return(end->c, &d, 1) == 1);
        rb_set(&taken, ++n);
    }
    return NULL;
}

static void rounds(rb_end *sleeps, rb_end *sends)
{
    pthread_t thread;
    uint64_t n = 0;
    rb_set(&taken, 0);
    CHECK(pthread_create(&thread, NULL, sleeper, sleeps) == 0);
    for (uint32_t i = 0; i < ROUNDS; i++) {
        while (send_packets(sends, 1, &n) != 1)
            rb_service(sends->c);
        for (uint32_t spins = 0; rb_get(&taken) <= i; spins++) /* sometimes at once, sometimes when it sleeps already */
            if (spins > (i & 63) * 16)
                nanosleep(&(struct timespec){.tv_nsec = 1000}, NULL);
    }
    pthread_join(thread, NULL);
}

static void no_wake_up_is_lost_on_the_way_to_the_vm(void)
{
    begin();
    rounds(grx, tx);
    finish();
}

static void no_wake_up_is_lost_on_the_way_from_the_vm(void)
{
    begin();
    rounds(rx, gtx);
    finish();
}

static void *receive_one(void *arg)
{
    rb_desc d;
    intptr_t rc = rb_recv(arg, &d, 1, 60000);
    if (rc == 1)
        CHECK(rb_return(((rb_end *)arg)->c, &d, 1) == 1);
    return (void *)rc;
}

/* Wait until the VM's receiver has armed anew. */
static void until_armed(uint64_t *before)
{
    rb_a64 *word = &tx->ctx->ring.ctl->client_bell;
    while (RB_ARMING(rb_get(word)) == *before)
        nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    *before = RB_ARMING(rb_get(word));
}

static void a_blocking_receive_sleeps_and_is_woken(void)
{
    pthread_t thread;
    void *rc;
    uint64_t n = 0, armed = 0;
    begin();
    armed = RB_ARMING(rb_get(&tx->ctx->ring.ctl->client_bell));
    CHECK(pthread_create(&thread, NULL, receive_one, grx) == 0);
    until_armed(&armed);
    CHECK(send_packets(tx, 1, &n) == 1);
    CHECK(pthread_join(thread, &rc) == 0 && (intptr_t)rc == 1);
    CHECK(rings(grx) == 1);

    armed = RB_ARMING(rb_get(&tx->ctx->ring.ctl->client_bell));
    CHECK(pthread_create(&thread, NULL, receive_one, grx) == 0);
    until_armed(&armed);
    rb_break(grx);
    CHECK(pthread_join(thread, &rc) == 0 && (intptr_t)rc == -EINTR);
    finish();
}

static void a_detach_wakes_it(void)
{
    pthread_t thread;
    void *rc;
    uint64_t armed;
    begin();
    armed = RB_ARMING(rb_get(&tx->ctx->ring.ctl->client_bell));
    CHECK(pthread_create(&thread, NULL, receive_one, grx) == 0);
    until_armed(&armed);
    rings(grx);
    OK(rb_lane_announce(host, (uint32_t)lane, 0));
    CHECK(pthread_join(thread, &rc) == 0 && (intptr_t)rc == -ENODEV);
    CHECK(rings(grx) >= 1);
    finish();
}

/* ---- what can go wrong ---------------------------------------------------------------------------------------------- */

static void who_has_no_peer_that_rings_polls(void)
{
    rb_stats st;
    begin();
    OK(rb_stats_get(grx, &st));
    CHECK(strcmp(st.waits, "bell") == 0);
    rb_set(&tx->ctx->ring.ctl->server_bell, 0); /* a server that knows of no bells */
    CHECK(rb_bell_arm(grx) == RB_POLL_MS && !grx->armed);
    rb_bell_promise(tx->ctx);
    CHECK(rb_bell_arm(grx) == RB_BELL_MS);
    rb_set(&rx->ctx->ring.ctl->client_bell, 0); /* a program that knows of none */
    CHECK(rb_bell_arm(rx) == RB_POLL_MS && !rx->armed);
    finish();
}

static void when_the_service_in_the_vm_ends_its_programs_poll(void)
{
    rb_stats st;
    uint64_t n = 0;
    begin();
    CHECK(rb_bell_arm(grx) == RB_BELL_MS);
    close(lease[1]);
    lease[1] = -1;
    CHECK(rb_bell_listen(grx, 10000) == 1);
    CHECK(rb_bell_arm(grx) == RB_POLL_MS);
    OK(rb_stats_get(grx, &st));
    CHECK(strcmp(st.waits, "polling") == 0);
    CHECK(send_packets(tx, 1, &n) == 1);
    return_all(grx, 1);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, (close(lease[0]), lease)) == 0);
    give(grx); /* and it can have another */
    CHECK(rb_bell_arm(grx) == RB_BELL_MS);
    finish();
}

static void a_vm_that_arms_without_end_gets_one_ring_a_burst(void)
{
    uint64_t n = 0, heard = 0;
    begin();
    for (uint32_t i = 1; i <= 50; i++) {
        rb_set(&tx->ctx->ring.ctl->client_bell, RB_ARMED(i * 7919, i)); /* whatever it writes */
        send_packets(tx, 2, &n);
        heard += rings(grx);
    }
    CHECK(heard <= 50);
    return_all(grx, 100);
    finish();
}

static void a_new_program_and_a_new_server_go_on(void)
{
    uint64_t n = 0;
    rb_desc d;
    begin();
    for (int i = 0; i < 3; i++) { /* the number of the dead one's arming is not used again */
        CHECK(rb_bell_arm(grx) == RB_BELL_MS && rb_recv(grx, &d, 1, 0) == 0);
        CHECK(send_packets(tx, 1, &n) == 1 && rings(grx) == 1);
        return_all(grx, 1);
        rb_close(grx);
        grx = open_end(guest, 0, RB_RX);
        OK(rb_service(host));
        give(grx);
        for (int k = 0; k < 100 && rb_recv(grx, &d, 1, 0) == 0 && !grx->echoed; k++) {
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
            OK(rb_service(host));
        }
        CHECK(grx->echoed);
        rings(grx);
    }
    CHECK(rb_bell_arm(grx) == RB_BELL_MS && rb_recv(grx, &d, 1, 0) == 0);
    rb_cluster_close(host); /* another process serves the lane: it gets the bell from whoever keeps it, and rings once */
    OK(rb_cluster_attach(id, &host));
    tx = open_end(host, 0, RB_TX);
    rx = open_end(host, 1, RB_RX);
    CHECK(tx->ctx->bell && rings(grx) == 1);
    CHECK(send_packets(tx, 1, &n) == 1 && rings(grx) == 1);
    return_all(grx, 1);
    finish();
}

static void when_the_keeper_is_gone_both_sides_poll(void)
{
    uint64_t n = 0;
    begin();
    kill(keeper, SIGKILL);
    CHECK(waitpid(keeper, NULL, 0) == keeper);
    rb_cluster_close(host);
    OK(rb_cluster_attach(id, &host));
    tx = open_end(host, 0, RB_TX);
    rx = open_end(host, 1, RB_RX);
    CHECK(!tx->ctx->bell && rb_bell_arm(rx) == RB_POLL_MS);
    CHECK(rb_bell_arm(grx) == RB_POLL_MS); /* it sees that nobody will ring */
    CHECK(send_packets(tx, 1, &n) == 1);
    return_all(grx, 1);
    CHECK((keeper = fork()) >= 0);
    if (!keeper)
        for (;;)
            pause();
    finish();
}

/* QEMU's process is told from a later one with its number by that: it must not move while a process lives. */
static void a_process_keeps_its_start_time(void)
{
    uint64_t before = rb_process_start((int32_t)getpid());
    void *more = mmap(NULL, 64 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(before && more != MAP_FAILED && rb_process_start((int32_t)getpid()) == before);
    munmap(more, 64 << 20);
    pid_t child = fork();
    CHECK(child >= 0);
    if (!child)
        _exit(0);
    siginfo_t info;
    CHECK(waitid(P_PID, (id_t)child, &info, WEXITED | WNOWAIT) == 0);
    CHECK(rb_process_start(child) == 0); /* it only waits to be reaped */
    CHECK(waitpid(child, NULL, 0) == child);
}

static void a_descriptor_for_poll_says_when_to_look(void)
{
    uint64_t n = 0;
    rb_desc d;
    begin();
    for (int k = 0; k < 2; k++) {
        rb_end *reads = k ? rx : grx, *sends = k ? gtx : tx;
        struct pollfd p = {.fd = rb_fd(reads), .events = POLLIN};
        OK(p.fd);
        CHECK(rb_recv(reads, &d, 1, 0) == 0);
        CHECK(poll(&p, 1, 0) == 0);
        CHECK(send_packets(sends, 1, &n) == 1);
        CHECK(poll(&p, 1, 10000) == 1);
        return_all(reads, 1);
        CHECK(rb_recv(reads, &d, 1, 0) == 0 && poll(&p, 1, 0) == 0);
        CHECK(poll(&p, 1, 10000) == 1); /* others are owed a look now and then */
        CHECK(rb_recv(reads, &d, 1, 0) == 0 && rb_fd(reads) == p.fd);
    }
    finish();
}

int main(void)
{
    private_directories();
    alarm(100);
    RUN(a_bell_rings_once_for_each_arming);
    RUN(a_fan_rings_too);
    RUN(no_wake_up_is_lost_on_the_way_to_the_vm);
    RUN(no_wake_up_is_lost_on_the_way_from_the_vm);
    RUN(a_blocking_receive_sleeps_and_is_woken);
    RUN(a_detach_wakes_it);
    RUN(who_has_no_peer_that_rings_polls);
    RUN(when_the_service_in_the_vm_ends_its_programs_poll);
    RUN(a_vm_that_arms_without_end_gets_one_ring_a_burst);
    RUN(a_new_program_and_a_new_server_go_on);
    RUN(when_the_keeper_is_gone_both_sides_poll);
    RUN(a_process_keeps_its_start_time);
    RUN(a_descriptor_for_poll_says_when_to_look);
    return 0;
}
