/* SPDX-License-Identifier: Apache-2.0
 *
 * One packet to many: who gets it, what it costs whom, how it is sent on, and that it comes home exactly once.
 */
#include "world.h"

#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <sched.h>
#include <sys/socket.h>

static uint32_t cluster_id = 300;

#define OUTS 4
struct world {
    rb_cluster *a, *reader[OUTS];
    rb_end *tx[OUTS], *rx[OUTS];
    rb_fan *fan;
    int bit[OUTS];
    uint64_t all;
};

/* Queue i from the fan's handle to reader i, each reader with a handle of its own. */
static struct world make_world(uint32_t outs, uint32_t slots)
{
    struct world w = {0};
    w.a = make_cluster(++cluster_id, 4096, outs, slots);
    OK(rb_fan_open(&w.fan, w.a));
    for (uint32_t i = 0; i < outs; i++) {
        w.tx[i] = open_end(w.a, i, RB_TX);
        OK(rb_cluster_attach(cluster_id, &w.reader[i]));
        w.rx[i] = open_end(w.reader[i], i, RB_RX);
        OK(w.bit[i] = rb_fan_add(w.fan, w.tx[i]));
        w.all |= 1ull << w.bit[i];
    }
    OK(rb_service(w.a));
    return w;
}

static void end_world(struct world *w)
{
    rb_desc d[256];
    for (int i = 0; i < OUTS; i++)
        if (w->reader[i]) {
            OK(rb_recv(w->rx[i], d, 256, 0)); /* it gives back what it has when it closes */
            rb_cluster_close(w->reader[i]);
        }
    OK(rb_service(w->a));
    check_all_home(w->a);
    rb_fan_close(w->fan);
    rb_cluster_close(w->a);
    OK(rb_cluster_destroy(cluster_id, 1));
}

/* n numbered packets through the fan. Returns what rb_fan_send does. */
static int fan_packets(struct world *w, int n, uint64_t mask, uint64_t *sequence, uint64_t *missed)
{
    rb_desc d[256];
    uint64_t m[256];
    CHECK(rb_alloc(w->tx[0], d, n) == n);
    for (int i = 0; i < n; i++) {
        packet_write(w->a, &d[i], (*sequence)++);
        m[i] = mask;
    }
    return rb_fan_send(w->fan, d, m, n, missed);
}

/* Receives exactly n packets numbered from `first`, in order. */
static void expect(rb_end *rx, rb_desc *d, int n, uint64_t first)
{
    CHECK(rb_recv(rx, d, 256, 0) == n);
    for (int i = 0; i < n; i++)
        CHECK(packet_read(rx->c, &d[i]) == first + (uint64_t)i);
}

static uint32_t shared_now(rb_cluster *c)
{
    rb_book_info b[RB_MAX_BOOKS];
    uint32_t n = 0;
    int books = rb_book_list(c, b, RB_MAX_BOOKS);
    for (int i = 0; i < books; i++)
        n += b[i].shared;
    return n;
}

static void everyone_gets_the_same_buffer(void)
{
    struct world w = make_world(OUTS, 64);
    rb_desc d[OUTS][256];
    uint64_t sequence = 0, missed[32];
    CHECK(fan_packets(&w, 32, w.all, &sequence, missed) == 32);
    CHECK(shared_now(w.a) == 32 && check_conservation(w.a).shared == 32);
    for (int i = 0; i < OUTS; i++) {
        expect(w.rx[i], d[i], 32, 0);
        for (int k = 0; k < 32; k++) {
            CHECK(d[i][k].handle == d[0][k].handle && !missed[k]);
            CHECK(rb_desc_flags(&d[i][k]) & RB_SHARED);
        }
    }
    for (int i = 0; i < OUTS; i++) {
        CHECK(shared_now(w.a) == 32); /* until the last has given it back */
        CHECK(rb_return(w.reader[i], d[i], 32) == 32);
        OK(rb_service(w.a));
        check_conservation(w.a);
    }
    CHECK(shared_now(w.a) == 0);
    end_world(&w);
}

static void masks_choose_the_outputs(void)
{
    struct world w = make_world(OUTS, 64);
    rb_desc d[256], got[256];
    uint64_t mask[16], missed[16];
    CHECK(rb_alloc(w.tx[0], d, 16) == 16);
    for (uint64_t i = 0; i < 16; i++) { /* every subset, the empty one too */
        packet_write(w.a, &d[i], i);
        mask[i] = 0;
        for (int k = 0; k < OUTS; k++)
            mask[i] |= i >> k & 1 ? 1ull << w.bit[k] : 0;
    }
    CHECK(rb_fan_send(w.fan, d, mask, 16, missed) == 15);
    check_conservation(w.a);
    for (int k = 0; k < OUTS; k++) {
        int n = rb_recv(w.rx[k], got, 256, 0), at = 0;
        CHECK(n == 8);
        for (uint64_t i = 0; i < 16; i++)
            if (i >> k & 1) {
                CHECK(packet_read(w.reader[k], &got[at]) == i);
                /* for one alone it is lent plainly */
                CHECK(((rb_desc_flags(&got[at++]) & RB_SHARED) != 0) == ((i & (i - 1)) != 0));
            }
        CHECK(rb_return(w.reader[k], got, n) == n);
    }
    for (int i = 0; i < 16; i++)
        CHECK(!missed[i]);
    end_world(&w);
}

/* A reader that does nothing holds what its credit allows, and no more; the others go on, and what it missed is counted there. */
static void slow_output_costs_only_itself(void)
{
    struct world w = make_world(3, 16);
    rb_desc d[256];
    uint64_t sequence = 0, missed[8], lost = 0;
    for (int round = 0; round < 40; round++) {
        uint64_t first = sequence;
        CHECK(fan_packets(&w, 8, w.all, &sequence, missed) == 8);
        for (int i = 0; i < 8; i++) {
            CHECK((missed[i] & ~(1ull << w.bit[1])) == 0);
            lost += missed[i] != 0;
        }
        for (int i = 0; i < 3; i += 2) {
            expect(w.rx[i], d, 8, first);
            CHECK(rb_return(w.reader[i], d, 8) == 8);
        }
    }
    OK(rb_service(w.a));
    CHECK(lost == 320 - 16 && shared_now(w.a) == 0 + 16);
    rb_queue_info info;
    OK(rb_queue_get_info(w.a, 1, &info));
    CHECK(info.drops[RB_DROP_FULL] == lost && info.lent == 16);
    check_conservation(w.a);
    expect(w.rx[1], d, 16, 0); /* what it has is what came first */
    CHECK(rb_return(w.reader[1], d, 16) == 16);
    end_world(&w);
}

static void paused_or_closed_outputs_are_passed_over(void)
{
    struct world w = make_world(3, 64);
    rb_desc d[256];
    uint64_t sequence = 0, missed[4];
    OK(rb_queue_pause(w.a, 1, 1));
    CHECK(fan_packets(&w, 4, w.all, &sequence, missed) == 4);
    CHECK(missed[0] == 1ull << w.bit[1] && missed[3] == missed[0]);
    OK(rb_queue_pause(w.a, 1, 0));
    CHECK(fan_packets(&w, 4, w.all, &sequence, missed) == 4 && !missed[0]);
    rb_close(w.tx[1]); /* what is on its way there arrives all the same */
    CHECK(fan_packets(&w, 4, w.all, &sequence, missed) == 4 && missed[0] == 1ull << w.bit[1]);
    expect(w.rx[1], d, 4, 4);
    CHECK(rb_return(w.reader[1], d, 4) == 4);
    expect(w.rx[0], d, 12, 0);
    CHECK(rb_return(w.reader[0], d, 12) == 12);
    expect(w.rx[2], d, 12, 0);
    CHECK(rb_return(w.reader[2], d, 12) == 12);
    CHECK(fan_packets(&w, 4, 1ull << w.bit[1], &sequence, missed) == 0); /* to nobody: home */
    end_world(&w);
}

static void removed_output_frees_its_bit_when_all_is_home(void)
{
    struct world w = make_world(2, 64);
    rb_desc d[256];
    uint64_t sequence = 0;
    CHECK(fan_packets(&w, 8, w.all, &sequence, NULL) == 8);
    OK(rb_fan_remove(w.fan, w.bit[1]));
    CHECK(rb_fan_remove(w.fan, w.bit[1]) == -ENOENT);
    CHECK(fan_packets(&w, 8, w.all, &sequence, NULL) == 8); /* now only to the first: lent plainly */
    expect(w.rx[1], d, 8, 0);
    CHECK(rb_return(w.reader[1], d, 8) == 8);
    expect(w.rx[0], d, 16, 0);
    CHECK(rb_return(w.reader[0], d, 16) == 16);
    OK(rb_service(w.a));
    CHECK(w.tx[1]->ctx->shared == 0);
    int bit = rb_fan_add(w.fan, w.tx[1]);
    OK(bit);
    w.all = 1ull << w.bit[0] | 1ull << bit;
    CHECK(fan_packets(&w, 8, w.all, &sequence, NULL) == 8);
    expect(w.rx[1], d, 8, 16);
    end_world(&w);
}

static void wrong_outputs_are_refused(void)
{
    struct world w = make_world(2, 64);
    rb_cluster *other;
    OK(rb_cluster_attach(cluster_id, &other));
    rb_queue_options small = {.struct_size = sizeof small, .slots = 16};
    OK(rb_queue_create(w.a, 7, &small));
    rb_end *foreign = open_end(other, 7, RB_TX);
    CHECK(rb_fan_add(w.fan, foreign) == -EINVAL);
    CHECK(rb_fan_add(w.fan, w.rx[0]) == -EINVAL);
    CHECK(rb_fan_add(w.fan, w.tx[0]) == -EEXIST);
    rb_cluster_close(other);
    rb_fan *second; /* in another fan of the handle it keeps its bit */
    OK(rb_fan_open(&second, w.a));
    CHECK(rb_fan_add(second, w.tx[1]) == w.bit[1]);
    rb_fan_close(second);
    rb_desc d[4];
    uint64_t mask[4] = {w.all, w.all, w.all, w.all}, missed[4];
    CHECK(rb_alloc(w.tx[0], d, 2) == 2);
    packet_write(w.a, &d[0], 1);
    packet_write(w.a, &d[1], 2);
    d[2] = d[0]; /* twice, and one that nobody has */
    d[3] = (rb_desc){.handle = 1000, .word = d[0].word};
    CHECK(rb_fan_send(w.fan, d, mask, 4, missed) == 2);
    CHECK(!missed[0] && !missed[1] && missed[2] == w.all && missed[3] == w.all);
    check_conservation(w.a);
    end_world(&w);
}

static void sixty_four_outputs_and_no_more(void)
{
    rb_cluster *a = make_cluster(++cluster_id, 16384, 65, 16), *b;
    rb_fan *fan;
    rb_end *tx[65], *rx[65];
    rb_desc d[65][8];
    uint64_t mask[8];
    OK(rb_fan_open(&fan, a));
    OK(rb_cluster_attach(cluster_id, &b));
    for (uint32_t i = 0; i < 65; i++) {
        tx[i] = open_end(a, i, RB_TX);
        rx[i] = open_end(b, i, RB_RX); /* one handle gets it 65 ways */
        CHECK(rb_fan_add(fan, tx[i]) == (i < 64 ? (int)i : -ENOSPC));
    }
    OK(rb_service(a));
    CHECK(rb_alloc(tx[0], d[0], 8) == 8);
    for (uint64_t i = 0; i < 8; i++) {
        packet_write(a, &d[0][i], i);
        mask[i] = UINT64_MAX;
    }
    CHECK(rb_fan_send(fan, d[0], mask, 8, NULL) == 8);
    check_conservation(a);
    for (uint32_t i = 0; i < 64; i++)
        expect(rx[i], d[i], 8, 0);
    CHECK(rb_recv(rx[64], d[64], 8, 0) == 0);
    for (uint32_t i = 0; i < 32; i++) /* each is in hand 64 times, and is given back to whom it came from */
        CHECK(rb_return(b, d[i], 8) == 8);
    OK(rb_service(a));
    CHECK(check_conservation(a).lent == 8);
    for (uint32_t i = 32; i < 64; i++)
        CHECK(rb_return(b, d[i], 8) == 8);
    CHECK(rb_return(b, d[0], 8) == 0);
    OK(rb_service(a));
    check_all_home(a);
    rb_cluster_close(b);
    rb_cluster_close(a);
    OK(rb_cluster_destroy(cluster_id, 1));
}

/* B receives from the fan-out and sends on in its own name: two loans deep, and home through both. */
static void consumers_send_it_on(void)
{
    struct world w = make_world(2, 64);
    rb_cluster *d;
    rb_desc b[64], c[64], got[64];
    uint64_t sequence = 0;
    rb_queue_options small = {.struct_size = sizeof small, .slots = 64};
    OK(rb_queue_create(w.a, 2, &small));
    OK(rb_cluster_attach(cluster_id, &d));
    rb_end *on = open_end(w.reader[0], 2, RB_TX), *rx = open_end(d, 2, RB_RX);
    OK(rb_service(w.reader[0]));
    CHECK(fan_packets(&w, 8, w.all, &sequence, NULL) == 8);
    expect(w.rx[0], b, 8, 0);
    uint32_t handle = b[0].handle;
    CHECK(rb_send(on, b, 8, 0) == 8);
    expect(rx, got, 8, 0);
    CHECK(got[0].handle == handle && rb_desc_flags(&got[0]) & RB_SHARED);
    check_conservation(w.a);
    expect(w.rx[1], c, 8, 0);
    CHECK(rb_return(w.reader[1], c, 8) == 8);
    OK(rb_service(w.a));
    CHECK(check_conservation(w.a).shared == 8);
    CHECK(rb_return(d, got, 8) == 8);
    OK(rb_service(w.reader[0]));
    OK(rb_service(w.a));
    CHECK(check_conservation(w.a).lent == 0);
    rb_cluster_close(d);
    end_world(&w);
}

/* A client gets the same buffer from the fan-out and from another process: it has it twice, and gives it back twice, each time to the right one. */
static void same_buffer_by_two_ways(void)
{
    for (int turn = 0; turn < 3; turn++) {
        struct world w = make_world(2, 64);
        rb_desc b[64], first[64], second[64];
        uint64_t sequence = 0;
        rb_queue_options small = {.struct_size = sizeof small, .slots = 64};
        OK(rb_queue_create(w.a, 2, &small));
        rb_end *on = open_end(w.reader[0], 2, RB_TX), *rx = open_end(w.reader[1], 2, RB_RX);
        OK(rb_service(w.reader[0]));
        CHECK(fan_packets(&w, 8, w.all, &sequence, NULL) == 8);
        expect(w.rx[0], b, 8, 0);
        CHECK(rb_send(on, b, 8, 0) == 8);
        expect(w.rx[1], first, 8, 0);
        expect(rx, second, 8, 0);
        for (int i = 0; i < 8; i++)
            CHECK(first[i].handle == second[i].handle);
        CHECK(rb_return(w.reader[1], first, 8) == 8);
        if (turn == 0)
            CHECK(rb_return(w.reader[1], second, 8) == 8 && rb_return(w.reader[1], second, 8) == 0);
        else
            rb_close(turn == 1 ? rx : w.rx[1]); /* what it still holds goes back, from whichever it came */
        if (turn == 2)
            rb_close(rx);
        OK(rb_service(w.reader[0]));
        OK(rb_service(w.a));
        CHECK(check_conservation(w.a).lent == 0);
        rb_queue_info info;
        OK(rb_queue_get_info(w.a, 1, &info));
        CHECK(info.foreign == 0);
        OK(rb_queue_get_info(w.a, 2, &info));
        CHECK(info.foreign == 0);
        for (int i = 0; turn && i < OUTS; i++) {
            if (w.reader[i])
                rb_cluster_close(w.reader[i]);
            w.reader[i] = NULL;
        }
        end_world(&w);
    }
}

/* What the fan-out sends was received from another process, whose it stays. */
static void borrowed_packets_are_fanned_out(void)
{
    struct world w = make_world(3, 64);
    rb_cluster *o;
    rb_desc d[64], got[64];
    uint64_t sequence = 0, mask[16];
    rb_queue_options small = {.struct_size = sizeof small, .slots = 64};
    OK(rb_queue_create(w.a, 5, &small));
    OK(rb_cluster_attach(cluster_id, &o));
    rb_end *tx = open_end(o, 5, RB_TX), *rx = open_end(w.a, 5, RB_RX);
    OK(rb_service(o));
    for (int round = 0; round < 20; round++) {
        uint64_t from = sequence;
        CHECK(send_packets(tx, 16, &sequence) == 16);
        expect(rx, d, 16, from);
        for (int i = 0; i < 16; i++)
            mask[i] = i < 8 ? w.all : i < 12 ? 1ull << w.bit[i % 3] : i < 15 ? w.all & ~(1ull << w.bit[i % 3]) : 0;
        CHECK(rb_fan_send(w.fan, d, mask, 16, NULL) == 15);
        check_conservation(w.a);
        for (int i = 0; i < 3; i++) {
            int n = rb_recv(w.rx[i], got, 64, 0);
            CHECK(n >= 8);
            for (int k = 0; k < n; k++)
                packet_read(w.reader[i], &got[k]);
            CHECK(rb_return(w.reader[i], got, n) == n);
        }
        OK(rb_service(w.a));
        OK(rb_service(o));
        CHECK(check_conservation(w.a).lent == 0);
    }
    rb_close(rx);
    rb_cluster_close(o);
    end_world(&w);
}

/* A loan of a loan that comes round: the fan-out's own buffer, back from a consumer that sends on to it, is copied where the word has no room. */
static void a_loop_comes_home(void)
{
    struct world w = make_world(3, 64);
    rb_desc b[64], again[64], got[64];
    uint64_t sequence = 0, mask[8];
    rb_queue_options small = {.struct_size = sizeof small, .slots = 64};
    OK(rb_queue_create(w.a, 5, &small));
    rb_end *on = open_end(w.reader[0], 5, RB_TX), *back = open_end(w.a, 5, RB_RX);
    OK(rb_service(w.reader[0]));
    CHECK(fan_packets(&w, 8, w.all, &sequence, NULL) == 8);
    expect(w.rx[0], b, 8, 0);
    CHECK(rb_send(on, b, 8, 0) == 8);
    expect(back, again, 8, 0); /* our own, which all three still have */
    CHECK(again[0].handle == b[0].handle);
    for (int i = 0; i < 8; i++)
        mask[i] = w.all & ~(1ull << w.bit[0]);
    CHECK(rb_fan_send(w.fan, again, mask, 8, NULL) == 8);
    check_conservation(w.a);
    rb_queue_info info;
    OK(rb_queue_get_info(w.a, 1, &info));
    CHECK(info.copied == 8);
    for (int i = 1; i < 3; i++) {
        CHECK(rb_recv(w.rx[i], got, 64, 0) == 16);
        for (int k = 0; k < 16; k++)
            CHECK(packet_read(w.reader[i], &got[k]) == (uint64_t)k % 8);
        CHECK(rb_return(w.reader[i], got, 16) == 16);
    }
    OK(rb_service(w.a));
    OK(rb_service(w.reader[0]));
    OK(rb_service(w.a));
    CHECK(check_conservation(w.a).lent == 0);
    end_world(&w);
}

/* The fan-out's own handle receives from one of its outputs, and sends on. */
static void its_own_consumer(void)
{
    struct world w = make_world(3, 64);
    rb_desc d[64], got[64];
    uint64_t sequence = 0, mask[8], second = 1ull << w.bit[1];
    rb_cluster_close(w.reader[0]);
    w.reader[0] = NULL;
    rb_end *own = open_end(w.a, 0, RB_RX);
    OK(rb_service(w.a));
    CHECK(fan_packets(&w, 8, w.all & ~second, &sequence, NULL) == 8);
    expect(own, d, 8, 0);
    for (int i = 0; i < 8; i++)
        mask[i] = i < 4 ? second : second | 1ull << w.bit[2]; /* the second half to one that has it already */
    CHECK(rb_fan_send(w.fan, d, mask, 8, NULL) == 8);
    check_conservation(w.a);
    expect(w.rx[1], got, 8, 0);
    CHECK(got[0].handle == d[0].handle);
    CHECK(rb_return(w.reader[1], got, 8) == 8);
    CHECK(rb_recv(w.rx[2], got, 64, 0) == 12);
    CHECK(rb_return(w.reader[2], got, 12) == 12);
    OK(rb_service(w.a));
    CHECK(check_conservation(w.a).lent == 0);
    rb_close(own);
    end_world(&w);
}

/* Others read it: who writes gets a copy. */
static void writers_get_copies(void)
{
    struct world w = make_world(2, 64);
    rb_desc d[64], got[64];
    uint64_t sequence = 0;
    rb_close(w.rx[0]);
    w.rx[0] = open_end(w.reader[0], 0, RB_RX | RB_WRITABLE);
    OK(rb_service(w.a));
    CHECK(fan_packets(&w, 8, w.all, &sequence, NULL) == 8);
    CHECK(fan_packets(&w, 8, 1ull << w.bit[0], &sequence, NULL) == 8);
    expect(w.rx[0], got, 16, 0);
    for (int i = 0; i < 16; i++) {
        CHECK(!(rb_desc_flags(&got[i]) & RB_SHARED));
        memset(rb_data(w.reader[0], &got[i]), 0x5a, rb_desc_length(&got[i]));
    }
    expect(w.rx[1], d, 8, 0); /* unharmed */
    rb_stats st;
    OK(rb_stats_get(w.rx[0], &st));
    CHECK(st.copied == 8);
    CHECK(rb_return(w.reader[0], got, 16) == 16 && rb_return(w.reader[1], d, 8) == 8);
    rb_close(w.rx[0]);
    rb_cluster_close(w.reader[0]);
    w.reader[0] = NULL;
    end_world(&w);
}

/* A packet in three buffers: an output without room for all of them gets none. */
static void fragments_stay_together(void)
{
    struct world w = make_world(2, 8);
    rb_desc d[16], got[256];
    uint64_t mask[16], missed[16];
    CHECK(rb_alloc(w.tx[0], d, 10) == 10);
    for (int i = 0; i < 10; i++) {
        packet_write(w.a, &d[i], (uint64_t)i);
        if (i % 5 == 2 || i % 5 == 3)
            rb_desc_set(&d[i], rb_desc_length(&d[i]), rb_desc_offset(&d[i]), RB_MORE);
        mask[i] = i < 5 ? w.all : 1ull << w.bit[1];
    }
    CHECK(rb_fan_send(w.fan, d, mask, 10, missed) == 7); /* the second has room for eight */
    for (int i = 0; i < 10; i++)
        CHECK(missed[i] == (i < 7 ? 0 : 1ull << w.bit[1]));
    CHECK(rb_recv(w.rx[0], got, 256, 0) == 5 && rb_return(w.reader[0], got, 5) == 5);
    CHECK(rb_recv(w.rx[1], got, 256, 0) == 7 && rb_return(w.reader[1], got, 7) == 7);
    end_world(&w);
}

/* ---- VMs ---------------------------------------------------------------------------------------------------------------- */

struct vm {
    rb_cluster *c;
    rb_end *rx, *tx;
    int lane;
};

/* A VM that receives from output `out` and sends on queue 10, read by the fan's handle. */
static struct vm make_vm(struct world *w, uint32_t out, rb_end **collect)
{
    struct vm v;
    rb_queue_options small = {.struct_size = sizeof small, .slots = 64};
    rb_cluster_close(w->reader[out]);
    w->reader[out] = NULL;
    OK(rb_queue_create(w->a, 10, &small));
    OK(v.lane = rb_lane_create(w->a, "vm", "1:1"));
    OK(rb_lane_bind(w->a, (uint32_t)v.lane, out, RB_VM_RX));
    OK(rb_lane_bind(w->a, (uint32_t)v.lane, 10, RB_VM_TX));
    *collect = open_end(w->a, 10, RB_RX);
    OK(rb_service(w->a));
    v.c = attach_guest(w->a, v.lane, 0);
    v.rx = open_end(v.c, out, RB_RX);
    v.tx = open_end(v.c, 10, RB_TX);
    OK(rb_service(w->a));
    return v;
}

static void end_vm(struct world *w, struct vm *v)
{
    rb_cluster_close(v->c);
    OK(rb_lane_remove(w->a, (uint32_t)v->lane, 0));
}

static void vm_sends_a_shared_buffer_on(void)
{
    struct world w = make_world(3, 64);
    rb_end *from;
    rb_desc d[64], mine[64], got[64];
    uint64_t sequence = 0, mask[16], third = 1ull << w.bit[2];
    struct vm v = make_vm(&w, 0, &from);
    CHECK(fan_packets(&w, 16, w.all & ~third, &sequence, NULL) == 16);
    expect(v.rx, d, 16, 0);
    CHECK(rb_send(v.tx, d, 16, 0) == 16);
    expect(w.rx[1], got, 16, 0);
    CHECK(rb_return(w.reader[1], got, 4) == 4); /* of four the VM's was the last share */
    OK(rb_service(w.a));
    expect(from, mine, 16, 0); /* the very same buffers */
    CHECK(mine[15].handle == d[15].handle);
    for (int i = 0; i < 16; i++)
        CHECK(((rb_desc_flags(&mine[i]) & RB_SHARED) != 0) == (i >= 4));
    check_conservation(w.a);
    /* To one that has not got it: the bit moves. To one that has: a copy. To nobody: the hold goes. */
    for (int i = 0; i < 16; i++)
        mask[i] = i < 8 ? third : i < 12 ? third | 1ull << w.bit[1] : 0;
    CHECK(rb_fan_send(w.fan, mine, mask, 12, NULL) == 12);
    CHECK(rb_return(w.a, mine + 12, 4) == 4 && rb_return(w.a, mine + 12, 4) == 0);
    check_conservation(w.a);
    rb_queue_info info;
    OK(rb_queue_get_info(w.a, 1, &info));
    CHECK(info.copied == 4 && info.foreign == 0);
    expect(w.rx[2], d, 12, 0);
    CHECK(d[4].handle == mine[4].handle);
    CHECK(rb_return(w.reader[2], d, 12) == 12);
    CHECK(rb_return(w.reader[1], got + 4, 12) == 12);
    expect(w.rx[1], got, 4, 8);
    CHECK(rb_return(w.reader[1], got, 4) == 4);
    OK(rb_service(w.a));
    CHECK(check_conservation(w.a).shared == 0);
    rb_close(from);
    end_vm(&w, &v);
    end_world(&w);
}

/* Plain rb_send of what a VM sent on: the same, without a fan. */
static void moved_bits_need_no_fan(void)
{
    struct world w = make_world(3, 64);
    rb_end *from;
    rb_desc d[64], mine[64], got[64];
    uint64_t sequence = 0;
    struct vm v = make_vm(&w, 0, &from);
    rb_queue_options small = {.struct_size = sizeof small, .slots = 64};
    rb_cluster *z;
    OK(rb_queue_create(w.a, 11, &small));
    OK(rb_cluster_attach(cluster_id, &z));
    rb_end *on = open_end(w.a, 11, RB_TX), *rx = open_end(z, 11, RB_RX);
    OK(rb_service(w.a));
    CHECK(fan_packets(&w, 8, w.all, &sequence, NULL) == 8);
    expect(v.rx, d, 8, 0);
    CHECK(rb_send(v.tx, d, 8, 0) == 8);
    expect(from, mine, 8, 0);
    CHECK(rb_send(on, mine, 4, 0) == 4);        /* a queue that was in no mask */
    CHECK(rb_send(w.tx[1], mine + 4, 4, 0) == 4); /* one that has it: copied */
    check_conservation(w.a);
    expect(rx, got, 4, 0);
    CHECK(got[0].handle == d[0].handle && rb_desc_flags(&got[0]) & RB_SHARED);
    CHECK(rb_return(z, got, 4) == 4);
    for (int i = 1; i < 3; i++) {
        int n = rb_recv(w.rx[i], got, 64, 0);
        CHECK(n == (i == 1 ? 12 : 8));
        CHECK(rb_return(w.reader[i], got, n) == n);
    }
    OK(rb_service(w.a));
    CHECK(check_conservation(w.a).lent == 64 + 2 * RB_BURST || check_conservation(w.a).shared == 0);
    rb_close(from);
    rb_cluster_close(z);
    end_vm(&w, &v);
    end_world(&w);
}

/* Of two queues of one VM that sends, one gets a copy: else nobody could tell whose loan it sends on. */
static void two_queues_of_one_vm(void)
{
    struct world w = make_world(3, 64);
    rb_end *from;
    rb_desc d[64], e[64], mine[64];
    uint64_t sequence = 0;
    struct vm v = make_vm(&w, 0, &from);
    rb_cluster_close(w.reader[1]);
    w.reader[1] = NULL;
    OK(rb_lane_bind(w.a, (uint32_t)v.lane, 1, RB_VM_RX));
    OK(rb_service(w.a));
    rb_end *second = open_end(v.c, 1, RB_RX);
    OK(rb_service(w.a));
    CHECK(fan_packets(&w, 8, w.all, &sequence, NULL) == 8);
    expect(v.rx, d, 8, 0);
    expect(second, e, 8, 0);
    for (int i = 0; i < 8; i++)
        CHECK(d[i].handle != e[i].handle);
    rb_queue_info info;
    OK(rb_queue_get_info(w.a, 1, &info));
    CHECK(info.copied == 8);
    CHECK(rb_send(v.tx, e, 8, 0) == 8 && rb_send(v.tx, d, 8, 0) == 8);
    CHECK(rb_recv(from, mine, 64, 0) == 16);
    CHECK(rb_return(w.a, mine, 16) == 16);
    check_conservation(w.a);
    rb_close(from);
    end_vm(&w, &v);
    end_world(&w);
}

/* A VM that was forced off may still write to what it shares: its share stays, the others' do not wait for it. */
static void share_of_a_vm_forced_off(void)
{
    struct world w = make_world(2, 64);
    rb_end *from;
    rb_desc d[64], got[64];
    uint64_t sequence = 0, missed[8];
    struct vm v = make_vm(&w, 0, &from);
    CHECK(fan_packets(&w, 8, w.all, &sequence, NULL) == 8);
    CHECK(rb_recv(v.rx, d, 4, 0) == 4); /* four in its hand, four unread */
    OK(rb_lane_remove(w.a, (uint32_t)v.lane, 1));
    expect(w.rx[1], got, 8, 0);
    CHECK(rb_return(w.reader[1], got, 8) == 8);
    OK(rb_service(w.a));
    CHECK(shared_now(w.a) == 8);
    CHECK(fan_packets(&w, 8, w.all, &sequence, missed) == 8 && missed[0] == 1ull << w.bit[0]); /* nothing more to it */
    rb_cluster_close(v.c);
    OK(rb_lane_remove(w.a, (uint32_t)v.lane, 0)); /* now its memory is gone */
    OK(rb_cluster_attach(cluster_id, &w.reader[0]));
    w.rx[0] = open_end(w.reader[0], 0, RB_RX);
    OK(rb_service(w.a));
    check_conservation(w.a);
    CHECK(shared_now(w.a) <= 4); /* what it had in hand is home; what it had not read is the next one's */
    rb_close(from);
    end_world(&w);
}

/* From one VM to another through this host, what the first got from the fan-out. */
static void relayed_to_another_vm(void)
{
    struct world w = make_world(2, 64);
    rb_end *from;
    rb_desc d[64], got[64];
    uint64_t sequence = 0;
    struct vm v = make_vm(&w, 0, &from);
    int lane;
    rb_close(from);
    OK(lane = rb_lane_create(w.a, "other", "2:2"));
    OK(rb_lane_bind(w.a, (uint32_t)lane, 10, RB_VM_RX));
    OK(rb_service(w.a));
    rb_cluster *other = attach_guest(w.a, lane, 0);
    rb_end *rx = open_end(other, 10, RB_RX);
    OK(rb_service(w.a));
    CHECK(fan_packets(&w, 8, w.all, &sequence, NULL) == 8);
    expect(v.rx, d, 8, 0);
    CHECK(rb_send(v.tx, d, 8, 0) == 8);
    OK(rb_service(w.a));
    expect(rx, got, 8, 0);
    CHECK(got[0].handle == d[0].handle && rb_desc_flags(&got[0]) & RB_SHARED);
    check_conservation(w.a);
    expect(w.rx[1], d, 8, 0);
    CHECK(rb_return(w.reader[1], d, 8) == 8 && rb_return(other, got, 8) == 8);
    OK(rb_service(w.a));
    CHECK(shared_now(w.a) == 0);
    rb_cluster_close(other);
    OK(rb_lane_remove(w.a, (uint32_t)lane, 0));
    end_vm(&w, &v);
    end_world(&w);
}

/* In a guest there is no ledger: one output gets the buffer, the others copies. */
static void fan_out_in_a_guest(void)
{
    struct world w = make_world(3, 64);
    rb_end *from[2];
    rb_desc d[64], got[64];
    uint64_t sequence = 0, mask[16], missed[16];
    rb_fan *fan;
    rb_stats st;
    int bit[2];
    struct vm v = make_vm(&w, 0, &from[0]);
    rb_queue_options small = {.struct_size = sizeof small, .slots = 64};
    OK(rb_queue_create(w.a, 11, &small));
    OK(rb_lane_bind(w.a, (uint32_t)v.lane, 11, RB_VM_TX));
    from[1] = open_end(w.a, 11, RB_RX);
    rb_end *tx = open_end(v.c, 11, RB_TX);
    OK(rb_service(w.a));
    OK(rb_fan_open(&fan, v.c));
    OK(bit[0] = rb_fan_add(fan, v.tx));
    OK(bit[1] = rb_fan_add(fan, tx));
    CHECK(rb_fan_add(fan, v.rx) == -EINVAL);
    CHECK(fan_packets(&w, 16, w.all, &sequence, NULL) == 16);
    expect(v.rx, d, 16, 0);
    for (int i = 0; i < 16; i++)
        mask[i] = i % 4 == 3 ? 0 : i % 4 == 2 ? 1ull << bit[1] : i % 4 == 1 ? 1ull << bit[0] : 1ull << bit[0] | 1ull << bit[1];
    CHECK(rb_fan_send(fan, d, mask, 16, missed) == 12);
    for (int q = 0; q < 2; q++) {
        CHECK(rb_recv(from[q], got, 64, 0) == 8);
        for (int i = 0; i < 8; i++)
            CHECK(packet_read(w.a, &got[i]) == (uint64_t)(i / 2 * 4 + (i % 2 ? 1 + q : 0)));
        CHECK(rb_return(w.a, got, 8) == 8);
    }
    OK(rb_stats_get(v.tx, &st));
    CHECK(st.copied == 4);
    for (int i = 0; i < 16; i++)
        CHECK(!missed[i]);
    OK(rb_service(w.a));
    check_conservation(w.a);
    rb_fan_close(fan);
    rb_close(from[0]);
    rb_close(from[1]);
    end_vm(&w, &v);
    end_world(&w);
}

/* ---- what must not harm ---------------------------------------------------------------------------------------------------- */

static void give(rb_end *end, uint32_t handle)
{
    rb_desc d = {.handle = handle};
    rb_ring_give(&end->ring, &d, 1);
    rb_ring_gave(&end->ring);
}

/* A consumer gives back what it does not hold: refused and counted, and nobody else's loan ends. */
static void hostile_consumers_harm_only_themselves(void)
{
    struct world w = make_world(3, 64);
    rb_desc d[64], e[64];
    uint64_t sequence = 0, foreign = 0, seed = 77;
    CHECK(fan_packets(&w, 8, w.all & ~(1ull << w.bit[2]), &sequence, NULL) == 8); /* none of these for the third */
    expect(w.rx[0], d, 8, 0);
    CHECK(fan_packets(&w, 1, 1ull << w.bit[2], &sequence, NULL) == 1);
    for (int i = 0; i < 8; i++)
        give(w.rx[2], d[i].handle); /* of a bit that is not its own */
    for (int i = 0; i < 500; i++) {
        give(w.rx[2], (uint32_t)test_random(&seed) % (i % 2 ? 2000 : UINT32_MAX) | 1);
        if (i % 100 == 99)
            OK(rb_service(w.a));
    }
    OK(rb_service(w.a));
    CHECK(check_conservation(w.a).shared == 8);
    for (int i = 0; i < 8; i++)
        give(w.rx[0], d[i].handle);
    for (int i = 0; i < 8; i++)
        give(w.rx[0], d[i].handle); /* twice, while the second output still has it */
    OK(rb_service(w.a));
    CHECK(shared_now(w.a) == 8);
    rb_queue_info info;
    OK(rb_queue_get_info(w.a, 0, &info));
    CHECK(info.foreign == 8);
    OK(rb_queue_get_info(w.a, 2, &info));
    foreign = info.foreign;
    CHECK(foreign >= 500);
    expect(w.rx[1], e, 8, 0); /* whole */
    CHECK(rb_return(w.reader[1], e, 8) == 8);
    OK(rb_service(w.a));
    CHECK(shared_now(w.a) == 0);
    memset(w.reader[0]->where, 0, w.reader[0]->buffers * sizeof *w.reader[0]->where); /* it has given them back behind the library's back */
    end_world(&w);
}

static void observers_and_filters_of_outputs(void)
{
    struct world w = make_world(3, 64);
    rb_cluster *z;
    rb_desc got[64];
    uint64_t sequence = 0, missed[16];
    rb_queue_options small = {.struct_size = sizeof small, .slots = 64};
    OK(rb_queue_create(w.a, 5, &small));
    OK(rb_queue_observe(w.a, 1, 5));
    OK(rb_cluster_attach(cluster_id, &z));
    rb_end *watch = open_end(z, 5, RB_RX);
    OK(rb_service(w.a));
    CHECK(fan_packets(&w, 8, w.all, &sequence, NULL) == 8);
    expect(watch, got, 8, 0);
    CHECK(!(rb_desc_flags(&got[0]) & RB_SHARED));
    CHECK(rb_return(z, got, 8) == 8);
    if (rb_filter(w.tx[2], "greater 10000") == 0) { /* needs libpcap */
        CHECK(fan_packets(&w, 8, w.all, &sequence, missed) == 8 && !missed[0]);
        rb_stats st;
        OK(rb_stats_get(w.tx[2], &st));
        CHECK(st.drops[RB_DROP_FILTER] == 8);
        CHECK(rb_recv(w.rx[2], got, 64, 0) == 8);
        CHECK(rb_return(w.reader[2], got, 8) == 8);
        expect(watch, got, 8, 8);
        CHECK(rb_return(z, got, 8) == 8);
    }
    rb_cluster_close(z);
    OK(rb_queue_observe(w.a, 1, -1));
    end_world(&w);
}

/* ---- a NIC among the outputs ------------------------------------------------------------------------------------------------ */

/* Frames of ours that arrive at the other end of the wire: how many, and whether they are whole. */
static int frames_arrived(int fd, int expected)
{
    int n = 0;
    for (uint64_t until = rb_mono_ns() + 5000000000ull; n < expected && rb_mono_ns() < until;) {
        struct packet p;
        ssize_t got = recv(fd, &p, sizeof p, MSG_DONTWAIT);
        if (got == (ssize_t)sizeof p && p.check == packet_sum(&p))
            n++;
        else if (got < 0)
            nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
    }
    return n;
}

static void nic_among_the_outputs(void)
{
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid) {
        int status;
        CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status));
        if (WEXITSTATUS(status) == 77)
            printf("   skipped: no network namespace, veth or AF_XDP here\n");
        else
            CHECK(WEXITSTATUS(status) == 0);
        return;
    }
    if (unshare(CLONE_NEWNET) != 0 || system("ip link add rbf0 type veth peer name rbf1 && ip link set rbf0 up && ip link set rbf1 up") != 0)
        _exit(77);
    rb_cluster_options o = {.struct_size = sizeof o, .buffers = 16384, .buffer_size = 2048, .queues = 3, .slots = 64, .pages = RB_PAGES_4K};
    rb_cluster *a, *b;
    rb_fan *fan;
    rb_end *tx[2], *rx[2], *nic;
    rb_desc d[64], got[64];
    uint64_t mask[64], missed[64], legs, wire;
    int bit[3], fd = socket(AF_PACKET, SOCK_RAW, htons(3 /* all */));
    struct sockaddr_ll on = {.sll_family = AF_PACKET, .sll_protocol = htons(3), .sll_ifindex = (int)if_nametoindex("rbf1")};
    OK(rb_cluster_create(++cluster_id, &o, &a));
    if (rb_open(&nic, a, "zc:rbf0", RB_TX) < 0) {
        printf("   %s\n", rb_error());
        _exit(77);
    }
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&on, sizeof on) == 0);
    OK(rb_cluster_attach(cluster_id, &b));
    OK(rb_fan_open(&fan, a));
    for (uint32_t i = 0; i < 2; i++) {
        tx[i] = open_end(a, i, RB_TX);
        rx[i] = open_end(b, i, RB_RX);
        OK(bit[i] = rb_fan_add(fan, tx[i]));
    }
    OK(bit[2] = rb_fan_add(fan, nic));
    OK(rb_service(a));
    legs = 1ull << bit[0] | 1ull << bit[1];
    wire = 1ull << bit[2];
    CHECK(rb_alloc(tx[0], d, 64) == 64);
    for (int i = 0; i < 64; i++) { /* all three, one and the wire, the wire alone, no wire */
        packet_write(a, &d[i], (uint64_t)i);
        mask[i] = i % 4 == 0 ? legs | wire : i % 4 == 1 ? wire | 1ull << bit[0] : i % 4 == 2 ? wire : legs;
    }
    rb_desc_set(&d[0], 4, RB_BUFFER_HEADER, 0); /* no frame: the others get it all the same */
    CHECK(rb_fan_send(fan, d, mask, 64, missed) == 64);
    for (int i = 0; i < 64; i++)
        CHECK(missed[i] == (i ? 0 : wire));
    CHECK(frames_arrived(fd, 47) == 47);
    for (int i = 0; i < 2; i++) {
        int n = rb_recv(rx[i], got, 64, 0);
        CHECK(n == (i ? 32 : 48));
        CHECK(rb_return(b, got, n) == n);
    }
    OK(rb_service(a));
    OK(rb_service(a));
    struct census n = check_conservation(a);
    CHECK(n.lent == 0 && n.shared == 0 && n.devices == 0);
    /* A shared buffer in the hand of the fan's own handle, sent on to the NIC: the bit becomes the device's. */
    rb_close(rx[0]);
    rb_end *own = open_end(a, 0, RB_RX);
    OK(rb_service(a));
    CHECK(rb_alloc(tx[0], d, 8) == 8);
    for (int i = 0; i < 8; i++) {
        packet_write(a, &d[i], (uint64_t)i);
        mask[i] = i < 4 ? legs : legs | wire; /* of the second half the wire has a share already: a copy */
    }
    CHECK(rb_fan_send(fan, d, mask, 8, NULL) == 8);
    CHECK(rb_recv(own, got, 64, 0) == 8);
    CHECK(rb_send(nic, got, 8, 0) == 8);
    CHECK(frames_arrived(fd, 12) == 12);
    CHECK(rb_recv(rx[1], got, 64, 0) == 8 && rb_return(b, got, 8) == 8);
    OK(rb_service(a));
    OK(rb_service(a));
    n = check_conservation(a);
    CHECK(n.lent == 0 && n.shared == 0 && n.devices == 0);
    rb_close(nic);
    rb_cluster_close(b);
    rb_cluster_close(a);
    close(fd);
    _exit(0);
}

int main(void)
{
    private_directories();
    RUN(everyone_gets_the_same_buffer);
    RUN(masks_choose_the_outputs);
    RUN(slow_output_costs_only_itself);
    RUN(paused_or_closed_outputs_are_passed_over);
    RUN(removed_output_frees_its_bit_when_all_is_home);
    RUN(wrong_outputs_are_refused);
    RUN(sixty_four_outputs_and_no_more);
    RUN(consumers_send_it_on);
    RUN(same_buffer_by_two_ways);
    RUN(borrowed_packets_are_fanned_out);
    RUN(a_loop_comes_home);
    RUN(its_own_consumer);
    RUN(writers_get_copies);
    RUN(fragments_stay_together);
    RUN(vm_sends_a_shared_buffer_on);
    RUN(moved_bits_need_no_fan);
    RUN(two_queues_of_one_vm);
    RUN(share_of_a_vm_forced_off);
    RUN(relayed_to_another_vm);
    RUN(fan_out_in_a_guest);
    RUN(hostile_consumers_harm_only_themselves);
    RUN(observers_and_filters_of_outputs);
    RUN(nic_among_the_outputs);
    return 0;
}
