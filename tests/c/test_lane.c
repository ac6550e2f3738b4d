/* SPDX-License-Identifier: Apache-2.0
 *
 * VMs without a VM: a lane is mapped a second time, as a guest maps it. Traffic both ways, relays, guest programs that die or are reset, detach with
 * packets under way in both directions, and attach again.
 */
#include "world.h"

static rb_cluster *host;
static uint32_t id = 300;

static int add_vm(const char *name, int rx, int tx)
{
    int lane = rb_lane_create(host, name, "1:1");
    OK(lane);
    if (rx >= 0)
        OK(rb_lane_bind(host, (uint32_t)lane, (uint32_t)rx, RB_VM_RX));
    if (tx >= 0)
        OK(rb_lane_bind(host, (uint32_t)lane, (uint32_t)tx, RB_VM_TX));
    return lane;
}

static void expect(rb_end *rx, uint64_t from, int n)
{
    rb_desc d[64];
    int got = 0;
    for (int tries = 0; got < n && tries < 100; tries++) {
        int k = rb_recv(rx, d + got, n - got, 0);
        OK(k);
        got += k;
        OK(rb_service(host));
    }
    CHECK(got == n);
    for (int i = 0; i < n; i++)
        CHECK(packet_read(rx->c, &d[i]) == from + (uint64_t)i);
    CHECK(rb_return(rx->c, d, n) == n);
}

static void begin(uint32_t queues) { host = make_cluster(++id, 2048, queues, 64); }

static void finish(void)
{
    OK(rb_service(host));
    OK(rb_service(host));
    rb_cluster_close(host);
    OK(rb_cluster_attach(id, &host));
    check_all_home(host);
    CHECK(check_conservation(host).nobody == 2047);
    rb_cluster_close(host);
    OK(rb_cluster_destroy(id, 1));
}

static void traffic_goes_both_ways_and_comes_home(void)
{
    uint64_t n = 0, m = 100;
    begin(2);
    int lane = add_vm("a", 0, 1);
    rb_end *tx = open_end(host, 0, RB_TX), *rx = open_end(host, 1, RB_RX);
    rb_cluster *g = attach_guest(host, lane, 0);
    rb_end *grx = open_end(g, 0, RB_RX), *gtx = open_end(g, 1, RB_TX);
    OK(rb_service(host));
    for (int round = 0; round < 200; round++) {
        rb_desc d[16];
        uint64_t before = n;
        CHECK(send_packets(tx, 16, &n) == 16);
        CHECK(rb_recv(grx, d, 16, 0) == 16);
        CHECK(rb_send(gtx, d, 10, 0) == 10); /* on, and the rest back */
        CHECK(rb_return(g, d + 10, 6) == 6);
        expect(rx, before, 10);
        before = m;
        CHECK(send_packets(gtx, 8, &m) == 8);
        expect(rx, before, 8);
        OK(rb_service(host));
        check_conservation(host);
    }
    rb_queue_info q;
    OK(rb_queue_get_info(host, 1, &q));
    CHECK(q.rx_packets == 200 * 18 && q.foreign == 0);
    rb_cluster_close(g);
    OK(rb_lane_remove(host, (uint32_t)lane, 0));
    finish();
}

static void empties_given_back_are_no_packets_that_wait(void)
{
    uint64_t n = 0;
    rb_queue_info q;
    begin(1);
    int lane = add_vm("a", -1, 0);
    rb_end *rx = open_end(host, 0, RB_RX);
    rb_cluster *g = attach_guest(host, lane, 0);
    rb_end *gtx = open_end(g, 0, RB_TX);
    OK(rb_service(host));
    CHECK(send_packets(gtx, 5, &n) == 5);
    rb_close(gtx); /* what it was granted and did not use goes into the same ring */
    OK(rb_queue_get_info(host, 0, &q));
    CHECK(q.count == 5);
    OK(rb_queue_get_info(g, 0, &q));
    CHECK(q.count == 5);
    rb_cluster_close(g);
    expect(rx, 0, 5);
    OK(rb_queue_get_info(host, 0, &q));
    CHECK(q.count == 0);
    OK(rb_lane_remove(host, (uint32_t)lane, 0));
    finish();
}

static void what_is_unread_in_both_directions_survives_a_detach(void)
{
    uint64_t n = 0;
    rb_desc d[32];
    begin(2);
    int lane = add_vm("a", 0, 1);
    rb_end *tx = open_end(host, 0, RB_TX), *rx = open_end(host, 1, RB_RX);
    rb_cluster *g = attach_guest(host, lane, 0);
    rb_end *grx = open_end(g, 0, RB_RX), *gtx = open_end(g, 1, RB_TX);
    OK(rb_service(host));
    CHECK(send_packets(tx, 24, &n) == 24);
    CHECK(rb_recv(grx, d, 12, 0) == 12);
    CHECK(rb_send(gtx, d, 8, 0) == 8); /* 8 sent on and unread, 4 in hand, 12 unread by the VM */
    OK(rb_lane_remove(host, (uint32_t)lane, 0)); /* pulled out */
    CHECK(rb_recv(grx, d, 1, 0) == -ENODEV);
    CHECK(rb_recv(grx, d, 1, 0) == -ENODEV); /* and again: it stays so */
    rb_cluster *reader;
    OK(rb_cluster_attach(id, &reader));
    rb_end *left = open_end(reader, 0, RB_RX);
    OK(rb_service(host));
    expect(rx, 0, 8);
    expect(left, 12, 12);
    OK(rb_service(host));
    check_conservation(host);
    rb_close(left);
    rb_cluster_close(reader);
    rb_cluster_close(g);
    rb_close(rx);
    finish();
}

static void a_vm_can_be_attached_again_and_again(void)
{
    begin(2);
    rb_end *tx = open_end(host, 0, RB_TX), *rx = NULL;
    rb_cluster *cli;
    OK(rb_cluster_attach(id, &cli));
    for (int life = 0; life < 5; life++) {
        uint64_t n = 0;
        int lane = add_vm("a", 0, 1);
        rx = open_end(host, 1, RB_RX);
        rb_cluster *g = attach_guest(cli, lane, 0);
        rb_end *grx = open_end(g, 0, RB_RX), *gtx = open_end(g, 1, RB_TX);
        OK(rb_service(host));
        CHECK(send_packets(tx, 8, &n) == 8);
        expect(grx, 0, 8);
        n = 50;
        CHECK(send_packets(gtx, 8, &n) == 8);
        expect(rx, 50, 8);
        rb_cluster_close(g);
        rb_close(rx);
        OK(rb_lane_remove(host, (uint32_t)lane, 0));
        rb_segment_info info[16];
        for (int i = rb_cluster_segments(cli, info, 16) - 1; i >= 0; i--)
            CHECK(!info[i].vm[0]); /* nothing of it is left */
    }
    rb_cluster_close(cli);
    finish();
}

/* The host looks at the sessions of one VM now and then only. */
static void until_echoed(rb_end *end)
{
    uint64_t until = rb_mono_ns() + 5000000000ull;
    while (rb_load_acquire(&end->ring.ctl->echo) != end->session) {
        CHECK(rb_mono_ns() < until);
        OK(rb_service(host));
    }
}

static void a_guest_that_is_reset_holds_nothing(void)
{
    uint64_t n = 0, seed = 42;
    rb_desc d[32];
    begin(2);
    int lane = add_vm("a", 0, 1);
    rb_end *tx = open_end(host, 0, RB_TX), *rx = open_end(host, 1, RB_RX);
    for (int life = 0; life < 20; life++) {
        rb_cluster *g = attach_guest(host, lane, 0);
        rb_end *grx = open_end(g, 0, RB_RX), *gtx = open_end(g, 1, RB_TX);
        until_echoed(grx);
        until_echoed(gtx);
        uint64_t first = n;
        CHECK(send_packets(tx, 24, &n) == 24);
        expect(grx, first, 4);
        CHECK(rb_recv(grx, d, 8, 0) == 8);
        int empties = rb_alloc(gtx, d + 8, 4); /* the first look mends what the reset left, then the host grants */
        OK(empties);
        OK(rb_service(host));
        CHECK(empties + rb_alloc(gtx, d + 8 + empties, 4 - empties) == 4);
        /* Whatever the firmware of the next life leaves in the memory that was its own. */
        struct rb_lane *memory = g->lane[0].lane;
        for (int i = 0; i < 2; i++) {
            uint8_t *ctl = (uint8_t *)&memory->ctl[i];
            for (size_t at = 0; at < 1024; at++)
                if (life % 3 || at / 128 != (size_t)i)
                    ctl[at] = (uint8_t)test_random(&seed);
        }
        rb_cluster_close(g);
        OK(rb_service(host));
        OK(rb_recv(rx, d, 1, 0));
        g = attach_guest(host, lane, 0);
        grx = open_end(g, 0, RB_RX);
        gtx = open_end(g, 1, RB_TX);
        until_echoed(grx);
        until_echoed(gtx);
        for (int i = 0; i < 3; i++) {
            int k = rb_recv(grx, d, 32, 0);
            OK(k);
            rb_return(g, d, k);
            OK(rb_alloc(gtx, d, 1));
        }
        OK(rb_service(host));
        rb_queue_info q;
        OK(rb_queue_get_info(host, 0, &q));
        CHECK(q.lent == 0); /* it gave back what it read, and what it held before is home */
        rb_cluster_close(g);
    }
    OK(rb_lane_remove(host, (uint32_t)lane, 0));
    rb_close(rx);
    finish();
}

static void from_vm_to_vm_through_the_host(void)
{
    begin(2);
    int a = add_vm("a", -1, 0), b = add_vm("b", 0, -1);
    rb_end *other = NULL;
    OK(rb_lane_bind(host, (uint32_t)a, 1, RB_VM_RX));
    other = open_end(host, 1, RB_TX); /* whoever serves one of a VM's queues serves them all */
    rb_cluster *ga = attach_guest(host, a, 0), *gb = attach_guest(host, b, 0);
    rb_end *tx = open_end(ga, 0, RB_TX), *rx = open_end(gb, 0, RB_RX);
    OK(rb_service(host));
    OK(rb_service(host));
    uint64_t n = 0;
    for (int round = 0; round < 100; round++) {
        uint64_t from = n;
        CHECK(send_packets(tx, 16, &n) == 16);
        expect(rx, from, 16);
        OK(rb_service(host));
        check_conservation(host);
    }
    rb_cluster_close(ga);
    rb_cluster_close(gb);
    rb_close(other);
    OK(rb_lane_remove(host, (uint32_t)b, 0));
    OK(rb_lane_remove(host, (uint32_t)a, 0));
    finish();
}

static void a_receiver_that_was_there_before_the_vm_is_fed(void)
{
    uint64_t n = 0;
    begin(1);
    rb_end *rx = open_end(host, 0, RB_RX);
    rb_cluster *cli;
    OK(rb_cluster_attach(id, &cli));
    int lane = rb_lane_create(cli, "a", "1:1");
    OK(lane);
    OK(rb_lane_bind(cli, (uint32_t)lane, 0, RB_VM_TX));
    rb_desc d[1];
    CHECK(rb_recv(rx, d, 1, 0) == 0);
    rb_cluster *g = attach_guest(cli, lane, 0);
    rb_end *tx = open_end(g, 0, RB_TX);
    OK(rb_service(host));
    CHECK(send_packets(tx, 16, &n) == 16);
    expect(rx, 0, 16);
    rb_cluster_close(g);
    rb_close(rx);
    OK(rb_lane_remove(host, (uint32_t)lane, 0));
    rb_cluster_close(cli);
    finish();
}

static void another_program_reads_what_the_server_collects(void)
{
    uint64_t n = 0;
    begin(2);
    int lane = add_vm("a", 0, 1);
    rb_end *serves = open_end(host, 0, RB_TX);
    rb_cluster *g = attach_guest(host, lane, 0), *reader;
    OK(rb_cluster_attach(id, &reader));
    rb_end *rx = open_end(reader, 1, RB_RX), *tx = open_end(g, 1, RB_TX);
    OK(rb_service(host));
    OK(rb_service(host));
    for (int i = 0; i < 50; i++) {
        uint64_t from = n;
        CHECK(send_packets(tx, 8, &n) == 8);
        OK(rb_service(host));
        expect(rx, from, 8);
        OK(rb_service(host));
    }
    rb_close(rx);
    rb_cluster_close(reader);
    rb_cluster_close(g);
    rb_close(serves);
    OK(rb_lane_remove(host, (uint32_t)lane, 0));
    finish();
}

static void forced_off_it_keeps_what_it_held_in_quarantine(void)
{
    uint64_t n = 0;
    rb_desc d[16];
    begin(2);
    int lane = add_vm("a", 0, 1);
    rb_end *tx = open_end(host, 0, RB_TX);
    rb_cluster *g = attach_guest(host, lane, 0);
    rb_end *grx = open_end(g, 0, RB_RX);
    OK(rb_service(host));
    CHECK(send_packets(tx, 16, &n) == 16);
    CHECK(rb_recv(grx, d, 8, 0) == 8);
    OK(rb_lane_remove(host, (uint32_t)lane, 1));
    OK(rb_service(host));
    struct census c = check_conservation(host);
    CHECK(c.quarantined >= 16);
    rb_queue_info q; /* and `status` shows it, and the VM, which is still at its ends */
    OK(rb_queue_get_info(host, 0, &q));
    CHECK(q.quarantined == 16 && strcmp(q.consumer_vm, "a") == 0);
    uint64_t before = n;
    CHECK(send_packets(tx, 8, &n) == 0 && n == before); /* refused, not lost */
    rb_cluster_close(g);
    OK(rb_lane_remove(host, (uint32_t)lane, 0));
    OK(rb_service(host));
    CHECK(check_conservation(host).quarantined == 0);
    finish();
}

static void a_killed_server_has_a_successor(void)
{
    uint64_t n = 500;
    rb_desc d[64];
    begin(2);
    int lane = add_vm("a", 0, 1), status;
    pid_t pid = fork();
    if (pid == 0) {
        rb_cluster *c;
        uint64_t k = 0;
        OK(rb_cluster_attach(id, &c));
        rb_end *tx = open_end(c, 0, RB_TX);
        open_end(c, 1, RB_RX);
        OK(rb_service(c));
        CHECK(send_packets(tx, 10, &k) == 10);
        raise(SIGKILL);
    }
    CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
    rb_cluster *g = attach_guest(host, lane, 0);
    rb_end *grx = open_end(g, 0, RB_RX), *gtx = open_end(g, 1, RB_TX);
    struct rb_lane *memory = g->lane[0].lane;
    memset(memory->entry, 0xa5, sizeof memory->entry[0] * 2); /* a VM that has overwritten its table, and its header, */
    memory->header.magic = 0;                                 /* harms nobody but itself */
    rb_end *tx = open_end(host, 0, RB_TX), *rx = open_end(host, 1, RB_RX);
    OK(rb_service(host));
    OK(rb_service(host));
    CHECK(rb_recv(grx, d, 64, 0) == -ENODEV);
    memory->header.magic = RB_MAGIC;
    rb_store_release(&memory->entry[0].ready, 1);
    rb_store_release(&memory->entry[1].ready, 1);
    memory->entry[0].queue = 0;
    memory->entry[1].queue = 1;
    rb_set(&memory->entry[0].paused, 0);
    rb_set(&memory->entry[1].paused, 0);
    expect(grx, 0, 10);
    uint64_t from = n;
    CHECK(send_packets(gtx, 8, &n) == 8);
    expect(rx, from, 8);
    from = n;
    CHECK(send_packets(tx, 8, &n) == 8);
    expect(grx, from, 8);
    rb_cluster_close(g);
    rb_close(rx);
    OK(rb_lane_remove(host, (uint32_t)lane, 0));
    finish();
}

static void two_vms_on_a_direct_queue(void)
{
    begin(0);
    rb_queue_options o = {.struct_size = sizeof o, .slots = 64, .direct = 1};
    CHECK(rb_queue_create(host, 0, &o) == 0);
    int a = add_vm("a", -1, 0), b = add_vm("b", 0, -1);
    rb_cluster *ga = attach_guest(host, a, 1), *gb = attach_guest(host, b, 1);
    rb_end *rx = open_end(gb, 0, RB_RX), *tx = open_end(ga, 0, RB_TX);
    uint64_t n = 0;
    for (int round = 0; round < 200; round++) {
        uint64_t from = n;
        OK(rb_service(ga));
        CHECK(send_packets(tx, 16, &n) == 16);
        expect(rx, from, 16); /* the host looks in meanwhile and touches nothing */
    }
    rb_desc d[4];
    CHECK(send_packets(tx, 4, &n) == 4);
    CHECK(rb_recv(rx, d, 4, 0) == 4); /* in hand when its program dies */
    rb_cluster_close(gb);
    rb_cluster_close(ga);
    OK(rb_lane_remove(host, (uint32_t)a, 0));
    OK(rb_lane_remove(host, (uint32_t)b, 0));
    finish();
}

/* host -> a -> direct -> b -> host: none of the buffers comes back over the direct lane, and still it goes on for ever. */
static void a_chain_through_a_direct_lane_goes_on(void)
{
    begin(3);
    rb_queue_options o = {.struct_size = sizeof o, .slots = 64, .direct = 1};
    CHECK(rb_queue_create(host, 3, &o) == 3);
    rb_end *tx = open_end(host, 0, RB_TX), *rx;
    int a = add_vm("a", 0, 3), b = add_vm("b", 3, 1);
    rx = open_end(host, 1, RB_RX);
    rb_cluster *ga = attach_guest(host, a, 1), *gb = attach_guest(host, b, 1);
    rb_end *a_in = open_end(ga, 0, RB_RX), *b_in = open_end(gb, 3, RB_RX);
    rb_end *a_out = open_end(ga, 3, RB_TX), *b_out = open_end(gb, 1, RB_TX);
    uint64_t n = 0;
    rb_desc d[16];
    OK(rb_service(host));
    OK(rb_service(ga));
    for (int round = 0; round < 500; round++) {
        uint64_t from = n;
        CHECK(send_packets(tx, 16, &n) == 16);
        CHECK(rb_recv(a_in, d, 16, 0) == 16);
        CHECK(rb_send(a_out, d, 16, 0) == 16);
        CHECK(rb_recv(b_in, d, 16, 0) == 16);
        CHECK(rb_send(b_out, d, 16, 0) == 16);
        expect(rx, from, 16);
    }
    rb_cluster_close(gb);
    rb_cluster_close(ga);
    OK(rb_lane_remove(host, (uint32_t)a, 0));
    OK(rb_lane_remove(host, (uint32_t)b, 0));
    rb_close(rx);
    rb_close(tx);
    finish();
}

int main(void)
{
    private_directories();
    alarm(100);
    RUN(traffic_goes_both_ways_and_comes_home);
    RUN(empties_given_back_are_no_packets_that_wait);
    RUN(what_is_unread_in_both_directions_survives_a_detach);
    RUN(a_vm_can_be_attached_again_and_again);
    RUN(a_guest_that_is_reset_holds_nothing);
    RUN(from_vm_to_vm_through_the_host);
    RUN(a_receiver_that_was_there_before_the_vm_is_fed);
    RUN(another_program_reads_what_the_server_collects);
    RUN(forced_off_it_keeps_what_it_held_in_quarantine);
    RUN(a_killed_server_has_a_successor);
    RUN(two_vms_on_a_direct_queue);
    RUN(a_chain_through_a_direct_lane_goes_on);
    return 0;
}
