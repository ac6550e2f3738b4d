/* SPDX-License-Identifier: Apache-2.0
 *
 * A VM that transmits from a pool of its own: its empties and nothing else come from there, others read them or get copies, and the pool goes when
 * the VM has let go and every buffer is back, whoever was killed meanwhile.
 */
#include "world.h"

static rb_cluster *host;
static uint32_t id = 500;
#define OWN 256u

static int add_vm(const char *name, int rx, int tx, int own)
{
    int lane = rb_lane_create(host, name, "1:1");
    OK(lane);
    if (own)
        OK(rb_lane_pool(host, (uint32_t)lane, OWN));
    if (rx >= 0)
        OK(rb_lane_bind(host, (uint32_t)lane, (uint32_t)rx, RB_VM_RX));
    if (tx >= 0)
        OK(rb_lane_bind(host, (uint32_t)lane, (uint32_t)tx, RB_VM_TX));
    return lane;
}

/* n packets numbered from `from` arrive on rx, all of them from a pool that `pool` says (-1: whichever). */
static void expect_kept(rb_end *rx, uint64_t from, int n, int pool, rb_desc *d)
{
    int got = 0;
    for (int tries = 0; got < n && tries < 100; tries++) {
        int k = rb_recv(rx, d + got, n - got, 0);
        OK(k);
        got += k;
        OK(rb_service(host));
    }
    CHECK(got == n);
    for (int i = 0; i < n; i++) {
        CHECK(packet_read(rx->c, &d[i]) == from + (uint64_t)i);
        CHECK(pool < 0 || (int)(d[i].handle >> 24) == pool);
    }
}

static void expect(rb_end *rx, uint64_t from, int n, int pool)
{
    rb_desc d[256];
    expect_kept(rx, from, n, pool, d);
    CHECK(rb_return(rx->c, d, n) == n);
}

static uint64_t copied(uint32_t queue)
{
    rb_queue_info q;
    OK(rb_queue_get_info(host, queue, &q));
    return q.copied;
}

static int pools(void)
{
    rb_segment_info s[64];
    int n = rb_cluster_segments(host, s, 64), found = 0;
    for (int i = 0; i < n; i++)
        found += s[i].kind == RB_KIND_POOL;
    return found;
}

static void begin(uint32_t queues) { host = make_cluster(++id, 2048, queues, 64); }

static void finish(void)
{
    OK(rb_service(host));
    OK(rb_service(host));
    rb_cluster_close(host);
    OK(rb_cluster_attach(id, &host));
    check_all_home(host);
    CHECK(pools() == 1);
    CHECK(check_conservation(host).nobody == 2047);
    rb_cluster_close(host);
    OK(rb_cluster_destroy(id, 1));
}

static void what_a_vm_sends_lies_in_its_own_pool(void)
{
    rb_desc d[64];
    uint64_t n = 0, m = 1000;
    begin(2);
    for (int turn = 0; turn < 3; turn++) { /* the pool's number is used again, with other memory */
        int lane = add_vm("a", 0, 1, 1);
        CHECK(rb_lane_pool(host, (uint32_t)lane, OWN) == 1 && pools() == 2);
        rb_end *tx = open_end(host, 0, RB_TX), *rx = open_end(host, 1, RB_RX);
        rb_cluster *g = attach_guest(host, lane, 0);
        CHECK(!rb_writable(g)); /* what others wrote it only reads */
        rb_end *grx = open_end(g, 0, RB_RX), *gtx = open_end(g, 1, RB_TX);
        OK(rb_service(host));
        for (int round = 0; round < 100; round++) {
            uint64_t before = n;
            CHECK(send_packets(gtx, 16, &n) == 16);
            expect(rx, before, 16, 1);
            before = m;
            CHECK(send_packets(tx, 16, &m) == 16);
            CHECK(rb_recv(grx, d, 16, 0) == 16);
            for (int i = 0; i < 16; i++)
                CHECK(packet_read(g, &d[i]) == before + (uint64_t)i && !(d[i].handle >> 24));
            CHECK(rb_send(gtx, d, 10, 0) == 10); /* what was received may be sent on: nothing is written */
            CHECK(rb_return(g, d + 10, 6) == 6);
            expect(rx, before, 10, 0);
            OK(rb_service(host));
            check_conservation(host);
        }
        CHECK(copied(0) == 0 && copied(1) == 0);
        rb_cluster_close(g);
        rb_close(tx);
        rb_close(rx);
        OK(rb_lane_remove(host, (uint32_t)lane, 0));
        OK(rb_service(host));
        OK(rb_service(host));
        CHECK(pools() == 1);
        check_conservation(host);
    }
    finish();
}

static void the_common_pool_is_never_granted_to_it(void)
{
    uint32_t met = 0;
    rb_desc d[OWN];
    begin(1);
    int lane = add_vm("a", -1, 0, 1);
    rb_end *rx = open_end(host, 0, RB_RX);
    rb_cluster *g = attach_guest(host, lane, 0);
    rb_end *tx = open_end(g, 0, RB_TX);
    for (int i = 0; i < 20; i++) {
        OK(rb_service(host));
        int k = rb_alloc(tx, d + met, (int)(OWN - met));
        OK(k);
        met += (uint32_t)k;
    }
    CHECK(met > 0 && met < OWN);
    for (uint32_t i = 0; i < met; i++)
        CHECK(d[i].handle >> 24 == 1);
    CHECK(check_conservation(host).lent >= met);
    rb_return(g, d, (int)met);
    rb_cluster_close(g);
    rb_close(rx);
    OK(rb_lane_remove(host, (uint32_t)lane, 0));
    finish();
}

static void who_sees_the_pool_reads_it_and_others_get_copies(void)
{
    uint64_t n = 0;
    begin(3);
    int old = add_vm("old", 1, -1, 0), a = add_vm("a", -1, 0, 1), new = add_vm("new", 2, -1, 0);
    rb_end *rx = open_end(host, 0, RB_RX), *to_old = open_end(host, 1, RB_TX), *to_new = open_end(host, 2, RB_TX);
    rb_cluster *ga = attach_guest(host, a, 0), *gold, *gnew = attach_guest(host, new, 0);
    struct rb_segment_record *pool = &host->reg->state->pool[1]; /* "old" was plugged before there was one */
    rb_set(&pool->state, RB_SEG_GONE);
    gold = attach_guest(host, old, 0);
    rb_set(&pool->state, RB_SEG_OPEN);
    rb_end *tx = open_end(ga, 0, RB_TX), *rx_old = open_end(gold, 1, RB_RX), *rx_new = open_end(gnew, 2, RB_RX);
    rb_fan *fan;
    int bit_old, bit_new;
    OK(rb_fan_open(&fan, host));
    OK(bit_old = rb_fan_add(fan, to_old));
    OK(bit_new = rb_fan_add(fan, to_new));
    OK(rb_service(host));
    for (int round = 0; round < 30; round++) {
        rb_desc d[16];
        uint64_t from = n, mask[16], missed[16];
        CHECK(send_packets(tx, 16, &n) == 16);
        expect_kept(rx, from, 16, 1, d);
        CHECK(rb_send(to_new, d, 8, 0) == 8);
        CHECK(rb_send(to_old, d + 8, 8, 0) == 8);
        expect(rx_new, from, 8, 1);
        expect(rx_old, from + 8, 8, 0);
        from = n;
        CHECK(send_packets(tx, 16, &n) == 16);
        expect_kept(rx, from, 16, 1, d);
        for (int i = 0; i < 16; i++)
            mask[i] = 1ull << bit_old | 1ull << bit_new;
        CHECK(rb_fan_send(fan, d, mask, 16, missed) == 16);
        expect(rx_new, from, 16, 1);
        expect(rx_old, from, 16, 0);
        OK(rb_service(host));
        check_conservation(host);
    }
    CHECK(copied(1) == 30 * 24 && copied(2) == 0);
    rb_fan_close(fan);
    rb_cluster_close(ga);
    rb_cluster_close(gold);
    rb_cluster_close(gnew);
    rb_close(rx);
    rb_close(to_old);
    rb_close(to_new);
    OK(rb_lane_remove(host, (uint32_t)a, 0));
    OK(rb_lane_remove(host, (uint32_t)old, 0));
    OK(rb_lane_remove(host, (uint32_t)new, 0));
    finish();
}

static void programs_that_were_there_before_read_each_pool_that_comes(void)
{
    uint64_t n = 0;
    rb_cluster *cli;
    begin(2);
    OK(rb_cluster_attach(id, &cli)); /* knows only the common pool */
    rb_end *rx = open_end(cli, 1, RB_RX);
    for (int turn = 0; turn < 3; turn++) {
        int a = add_vm("a", -1, 0, 1);
        rb_end *from_vm = open_end(host, 0, RB_RX), *on = open_end(host, 1, RB_TX);
        rb_cluster *g = attach_guest(host, a, 0);
        rb_end *tx = open_end(g, 0, RB_TX);
        OK(rb_service(host));
        for (int round = 0; round < 20; round++) {
            rb_desc d[16];
            uint64_t from = n;
            CHECK(send_packets(tx, 16, &n) == 16);
            expect_kept(from_vm, from, 16, 1, d);
            CHECK(rb_send(on, d, 16, 0) == 16);
            expect(rx, from, 16, 1);
            OK(rb_service(cli));
            OK(rb_service(host));
            check_conservation(host);
        }
        rb_cluster_close(g);
        rb_close(from_vm);
        rb_close(on);
        OK(rb_service(host));
        OK(rb_lane_remove(host, (uint32_t)a, 0));
        OK(rb_service(host));
        CHECK(pools() == 1);
    }
    CHECK(copied(1) == 0);
    rb_cluster_close(cli);
    finish();
}

static void it_stays_until_the_last_packet_has_been_read(void)
{
    uint64_t n = 0;
    begin(2);
    int a = add_vm("a", -1, 0, 1);
    rb_end *rx = open_end(host, 0, RB_RX);
    rb_cluster *g = attach_guest(host, a, 0);
    rb_end *tx = open_end(g, 0, RB_TX);
    rb_desc d[16], empty[16];
    OK(rb_service(host));
    CHECK(send_packets(tx, 32, &n) == 32);
    expect_kept(rx, 0, 16, 1, d); /* 16 in hand, 16 unread */
    rb_cluster_close(g);
    OK(rb_lane_remove(host, (uint32_t)a, 0));
    OK(rb_service(host));
    CHECK(pools() == 2);
    check_conservation(host);
    int b = add_vm("b", -1, 1, 1); /* another gets another number, though the lane's may be the same */
    CHECK(rb_lane_pool(host, (uint32_t)b, OWN) == 2 && pools() == 3);
    for (int i = 0; i < 16; i++)
        CHECK(packet_read(host, &d[i]) == (uint64_t)i);
    expect(rx, 16, 16, 1);
    CHECK(rb_recv(rx, empty, 16, 0) == 0); /* behind them are the empties that the VM gave back */
    OK(rb_service(host));
    CHECK(pools() == 3);
    CHECK(rb_return(host, d, 16) == 16);
    OK(rb_service(host));
    CHECK(pools() == 2);
    rb_close(rx);
    OK(rb_lane_remove(host, (uint32_t)b, 0));
    CHECK(pools() == 1);
    finish();
}

static void handles_of_pools_that_are_not_lent_to_it_are_foreign(void)
{
    begin(2);
    int a = add_vm("a", -1, 0, 1), b = add_vm("b", -1, 1, 1);
    rb_end *rx = open_end(host, 0, RB_RX), *rx2 = open_end(host, 1, RB_RX);
    rb_cluster *ga = attach_guest(host, a, 0), *gb = attach_guest(host, b, 0);
    rb_end *ta = open_end(ga, 0, RB_TX), *tb = open_end(gb, 1, RB_TX);
    OK(rb_service(host));
    rb_desc mine[4], other[4], d[16];
    CHECK(rb_alloc(ta, mine, 4) == 4 && rb_alloc(tb, other, 4) == 4);
    CHECK(other[0].handle >> 24 == 2);
    uint64_t n = 7;
    for (int i = 0; i < 4; i++)
        packet_write(ga, &mine[i], n + (uint64_t)i);
    uint32_t bad[] = {other[0].handle, mine[0].handle, 1, 7u << 24 | 1, 1u << 24, 1u << 24 | 0xffffff, 2u << 24 | OWN, 0xffffffff, 200u << 24 | 5};
    struct rb_ring *r = &ta->ring; /* straight into the ring, as a hostile guest would */
    for (uint32_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct rb_slot *slot = &r->forward[(r->p + i) & r->mask];
        *slot = (struct rb_slot){bad[i], mine[0].word, 0};
    }
    rb_store_release(&r->ctl->p, r->p + (uint32_t)(sizeof bad / sizeof *bad));
    CHECK(rb_recv(rx, d, 16, 0) == 1 && packet_read(host, &d[0]) == 7); /* the one that was lent there */
    CHECK(rb_return(host, d, 1) == 1);
    rb_queue_info q;
    OK(rb_queue_get_info(host, 0, &q));
    CHECK(q.foreign == sizeof bad / sizeof *bad - 1);
    check_conservation(host);
    ga->fork_count++; /* its own books are upset now: no clean end */
    rb_cluster_close(ga);
    rb_cluster_close(gb);
    rb_close(rx);
    rb_close(rx2);
    OK(rb_lane_remove(host, (uint32_t)a, 0));
    OK(rb_lane_remove(host, (uint32_t)b, 0));
    finish();
}

static void what_cannot_be_is_refused(void)
{
    begin(1);
    int a = add_vm("a", -1, 0, 0);
    CHECK(rb_lane_pool(host, (uint32_t)a, OWN) == -EBUSY); /* it sends from the common pool already */
    CHECK(rb_lane_pool(host, (uint32_t)a, 1) == -EINVAL);
    CHECK(rb_lane_pool(host, 200, OWN) == -ENOENT && rb_lane_pool(host, 0xffffffff, OWN) == -ENOENT);
    int lane[6];
    for (int i = 0; i < 6; i++) {
        char name[8];
        snprintf(name, sizeof name, "v%d", i);
        OK(lane[i] = rb_lane_create(host, name, "1:1"));
        CHECK(rb_lane_pool(host, (uint32_t)lane[i], OWN) == i + 1);
    }
    int more = rb_lane_create(host, "v7", "1:1");
    OK(more);
    CHECK(rb_lane_pool(host, (uint32_t)more, OWN) == -ENOSPC && strstr(rb_error_cure(), "--pool rw"));
    OK(rb_lane_remove(host, (uint32_t)lane[3], 0));
    CHECK(rb_lane_pool(host, (uint32_t)more, 1u << 23) == -ENOSPC); /* the ledgers have no room */
    CHECK(rb_lane_pool(host, (uint32_t)more, OWN) == 4);
    rb_queue_options o = {.struct_size = sizeof o, .slots = 64, .direct = 1};
    int q = rb_queue_create(host, -1, &o);
    OK(q);
    CHECK(rb_lane_bind(host, (uint32_t)more, (uint32_t)q, RB_VM_TX) == -ENOTSUP);
    OK(rb_queue_destroy(host, (uint32_t)q));
    OK(rb_lane_remove(host, (uint32_t)more, 0));
    OK(rb_lane_remove(host, (uint32_t)a, 0));
    for (int i = 0; i < 6; i++)
        if (i != 3)
            OK(rb_lane_remove(host, (uint32_t)lane[i], 0));
    finish();
}

/* ---- killed anywhere ------------------------------------------------------------------------------------------------ */

static rb_cluster *child;
static rb_end *child_rx, *child_on;

static void serve_prepare(void)
{
    OK(rb_cluster_attach(id, &child));
    child_rx = open_end(child, 0, RB_RX);
    child_on = open_end(child, 1, RB_TX);
    OK(rb_service(child));
}

static void serve(void)
{
    rb_desc d[16];
    for (int i = 0; i < 3; i++) {
        int n = rb_recv(child_rx, d, 16, 0), sent = n > 0 ? rb_send(child_on, d, n, 0) : 0;
        rb_return(child, d + RB_MAX(sent, 0), n - RB_MAX(sent, 0));
        rb_service(child);
    }
}

/* The server of a VM with its own pool is killed after so many instructions; its successor goes on, and all comes home. */
static void killed_server(long steps, int *whole)
{
    uint64_t n = 0;
    rb_desc d[64];
    begin(2);
    int a = add_vm("a", -1, 0, 1);
    rb_cluster *g = attach_guest(host, a, 0);
    rb_end *rx = open_end(host, 1, RB_RX);
    pid_t pid = fork(); /* a first server grants empties, and is killed */
    if (pid == 0) {
        serve_prepare();
        raise(SIGKILL);
    }
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
    rb_end *tx = open_end(g, 0, RB_TX);
    int sent = send_packets(tx, 16, &n);
    killed_after(steps, serve_prepare, serve, whole);
    check_conservation(host);
    OK(rb_reap_all(host));
    check_conservation(host);
    rb_cluster *next;
    OK(rb_cluster_attach(id, &next));
    rb_end *more = open_end(next, 0, RB_RX), *on = open_end(next, 1, RB_TX);
    uint64_t want = 0;
    for (int i = 0; i < 20; i++) {
        OK(rb_service(next));
        int k = rb_recv(more, d, 64, 0);
        OK(k);
        CHECK(rb_send(on, d, k, 0) == k);
        if (sent < 48 && i > 5) /* the successor grants */
            sent += send_packets(tx, 8, &n);
        int got = rb_recv(rx, d, 64, 0);
        OK(got);
        for (int j = 0; j < got; j++) {
            uint64_t seen = packet_read(host, &d[j]);
            CHECK(seen >= want); /* one burst that was in the dead server's hand is lost */
            want = seen + 1;
        }
        CHECK(rb_return(host, d, got) == got);
        check_conservation(host);
    }
    CHECK(sent >= 48 && want == n);
    rb_cluster_close(g);
    rb_close(more);
    rb_close(on);
    OK(rb_lane_remove(next, (uint32_t)a, 0)); /* its own: another handle would wait for it */
    OK(rb_service(next));
    rb_close(rx);
    OK(rb_service(next));
    rb_cluster_close(next);
    finish();
}

static void a_killed_server_loses_nothing_of_it(void)
{
    int whole = 0;
    uint64_t seed = 20261122;
    for (long steps = 1; steps < 4000; steps += 61)
        killed_server(steps, &whole);
    for (int i = 0; i < 60; i++) /* and up to a fifth of a millisecond later */
        killed_server(-(long)(test_random(&seed) % 200000) - 1, &whole);
}

int main(void)
{
    private_directories();
    alarm(200);
    RUN(what_a_vm_sends_lies_in_its_own_pool);
    RUN(the_common_pool_is_never_granted_to_it);
    RUN(who_sees_the_pool_reads_it_and_others_get_copies);
    RUN(programs_that_were_there_before_read_each_pool_that_comes);
    RUN(it_stays_until_the_last_packet_has_been_read);
    RUN(handles_of_pools_that_are_not_lent_to_it_are_foreign);
    RUN(what_cannot_be_is_refused);
    RUN(a_killed_server_loses_nothing_of_it);
    return 0;
}
