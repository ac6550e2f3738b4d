/* SPDX-License-Identifier: Apache-2.0
 * The life of buffers through the public interface: what is sent arrives, what is returned comes home, nothing is lost or lent twice. */
#include "check.h"

static rb_cluster *make(uint32_t id, uint32_t buffers, uint32_t queues, uint32_t slots)
{
    rb_cluster_options o = {.struct_size = sizeof o, .buffers = buffers, .queues = queues, .slots = slots, .pages = RB_PAGES_4K};
    rb_cluster *c;
    OK(rb_cluster_create(id, &o, &c));
    return c;
}

static void a_packet_arrives_and_its_buffer_comes_home(void)
{
    rb_cluster *c = make(1, 1024, 1, 16), *d;
    rb_end *tx, *rx;
    rb_desc t[4], r[4];
    OK(rb_cluster_attach(1, &d));
    OK(rb_open(&tx, c, "1@0", RB_TX));
    OK(rb_open(&rx, d, "zc:1@0", RB_RX));
    OK(rb_service(c));
    CHECK(rb_alloc(tx, t, 4) == 4);
    for (int i = 0; i < 4; i++) {
        memset(rb_data(c, &t[i]), 'a' + i, 60);
        rb_desc_set(&t[i], 60, rb_desc_offset(&t[i]), 0);
        t[i].ts = 7;
    }
    CHECK(rb_send(tx, t, 4, 0) == 4);
    CHECK(rb_count(rx) == 4);
    CHECK(rb_recv(rx, r, 4, 0) == 4);
    for (int i = 0; i < 4; i++) {
        CHECK(rb_desc_length(&r[i]) == 60 && r[i].ts == 7);
        CHECK(*(char *)rb_data(d, &r[i]) == 'a' + i);
    }
    rb_queue_info q;
    OK(rb_queue_get_info(c, 0, &q));
    CHECK(q.lent == 4 && q.held == 4 && q.packets == 4 && q.bytes == 240);
    CHECK(rb_return(d, r, 4) == 4);
    CHECK(rb_return(d, r, 4) == 0); /* twice: refused */
    OK(rb_service(c));
    OK(rb_queue_get_info(c, 0, &q));
    CHECK(q.lent == 0 && q.held == 0);
    rb_cluster_close(d);
    rb_cluster_close(c);
    CHECK(rb_cluster_attach(1, &d) == -ENOENT);
}

static void a_full_queue_leaves_the_rest_with_the_caller(void)
{
    rb_cluster *c = make(2, 1024, 1, 8);
    rb_end *tx, *rx;
    rb_desc t[20], r[20];
    OK(rb_open(&tx, c, "2@0", RB_TX));
    OK(rb_open(&rx, c, "2@0", RB_RX));
    CHECK(rb_alloc(tx, t, 20) == 20);
    for (int i = 0; i < 20; i++)
        rb_desc_set(&t[i], 60 + (uint32_t)i, 64, 0);
    CHECK(rb_send(tx, t, 20, 0) == 8);
    CHECK(rb_full(tx));
    CHECK(rb_recv(rx, r, 20, 0) == 8);
    CHECK(rb_send(tx, t + 8, 12, 0) == 8);
    CHECK(rb_return(c, t + 16, 4) == 4);
    CHECK(rb_recv(rx, r + 8, 12, 0) == 8);
    for (int i = 0; i < 16; i++)
        CHECK(rb_desc_length(&r[i]) == 60 + (uint32_t)i);
    CHECK(rb_return(c, r, 16) == 16);
    rb_cluster_close(c);
}

static void forwarding_goes_back_along_its_path(void)
{
    rb_cluster *a = make(3, 2048, 2, 16), *b, *c;
    rb_end *a_tx, *b_rx, *b_tx, *c_rx;
    rb_desc d[8];
    rb_queue_info q;
    OK(rb_cluster_attach(3, &b));
    OK(rb_cluster_attach(3, &c));
    OK(rb_open(&a_tx, a, "3@0", RB_TX));
    OK(rb_open(&b_rx, b, "3@0", RB_RX));
    OK(rb_open(&b_tx, b, "3@1", RB_TX));
    OK(rb_open(&c_rx, c, "3@1", RB_RX));
    OK(rb_service(a));
    OK(rb_service(b));
    for (int round = 0; round < 100; round++) {
        CHECK(rb_alloc(a_tx, d, 8) == 8);
        for (int i = 0; i < 8; i++)
            rb_desc_set(&d[i], 100, 64, 0);
        CHECK(rb_send(a_tx, d, 8, 0) == 8);
        CHECK(rb_recv(b_rx, d, 8, 0) == 8);
        CHECK(rb_send(b_tx, d, 8, 0) == 8);
        CHECK(rb_recv(c_rx, d, 8, 0) == 8);
        CHECK(rb_return(c, d, 8) == 8);
        OK(rb_service(b));
        OK(rb_service(a));
    }
    OK(rb_queue_get_info(a, 0, &q));
    CHECK(q.lent == 0 && q.packets == 800);
    OK(rb_queue_get_info(a, 1, &q));
    CHECK(q.lent == 0 && q.packets == 800 && q.copied == 0);
    rb_cluster_close(c);
    rb_cluster_close(b);
    rb_cluster_close(a);
}

static void a_successor_starts_where_a_consumer_left_off(void)
{
    rb_cluster *c = make(4, 1024, 1, 16), *d;
    rb_end *tx, *rx;
    rb_desc t[8], r[8];
    rb_queue_info q;
    OK(rb_cluster_attach(4, &d));
    OK(rb_open(&tx, c, "4@0", RB_TX));
    OK(rb_open(&rx, d, "4@0", RB_RX));
    OK(rb_service(c));
    CHECK(rb_alloc(tx, t, 8) == 8);
    for (int i = 0; i < 8; i++)
        rb_desc_set(&t[i], 60 + (uint32_t)i, 64, 0);
    CHECK(rb_send(tx, t, 8, 0) == 8);
    CHECK(rb_recv(rx, r, 3, 0) == 3);
    rb_cluster_close(d); /* three in hand go back, five stay unread */
    OK(rb_cluster_attach(4, &d));
    OK(rb_open(&rx, d, "4@0", RB_RX));
    CHECK(rb_recv(rx, r, 8, 0) == 0); /* not before the lender has seen it */
    OK(rb_service(c));
    CHECK(rb_recv(rx, r, 8, 0) == 5);
    CHECK(rb_desc_length(&r[0]) == 63);
    CHECK(rb_return(d, r, 5) == 5);
    OK(rb_service(c));
    OK(rb_queue_get_info(c, 0, &q));
    CHECK(q.lent == 0);
    rb_cluster_close(d);
    rb_cluster_close(c);
}

static void a_second_holder_is_refused_by_name(void)
{
    rb_cluster *c = make(5, 1024, 1, 16), *d;
    rb_end *tx, *again;
    OK(rb_cluster_attach(5, &d));
    OK(rb_open(&tx, c, "5@0", RB_TX));
    CHECK(rb_open(&again, d, "5@0", RB_TX) == -EBUSY);
    CHECK(strstr(rb_error(), "held by process") && rb_error_cure()[0]);
    CHECK(rb_open(&again, d, "5@9", RB_TX) == -ENOENT);
    CHECK(rb_open(&again, d, "6@0", RB_TX) == -EINVAL);
    CHECK(rb_open(&again, d, "no:sense", RB_TX) == -EINVAL);
    rb_close(tx);
    OK(rb_open(&again, d, "5@0", RB_TX));
    rb_cluster_close(d);
    rb_cluster_close(c);
}

static void sizes_are_checked_with_the_nearest_legal_value(void)
{
    rb_cluster *c;
    rb_cluster_options o = {.struct_size = sizeof o, .buffer_size = 1500};
    CHECK(rb_cluster_create(6, &o, &c) == -EINVAL && strstr(rb_error_cure(), "1024"));
    o = (rb_cluster_options){.struct_size = sizeof o, .buffers = 1024, .pages = RB_PAGES_4K};
    OK(rb_cluster_create(6, &o, &c));
    rb_queue_options q = {.struct_size = sizeof q, .slots = 100};
    CHECK(rb_queue_create(c, -1, &q) == -EINVAL && strstr(rb_error_cure(), "128"));
    q.slots = 4096;
    CHECK(rb_queue_create(c, -1, &q) == -ENOSPC && strstr(rb_error_cure(), "--buffers 8192"));
    q.slots = 2;
    CHECK(rb_queue_create(c, 7, &q) == 7);
    CHECK(rb_queue_create(c, 7, &q) == -EEXIST);
    OK(rb_queue_destroy(c, 7));
    rb_cluster_close(c);
}

int main(void)
{
    private_directories();
    RUN(a_packet_arrives_and_its_buffer_comes_home);
    RUN(a_full_queue_leaves_the_rest_with_the_caller);
    RUN(forwarding_goes_back_along_its_path);
    RUN(a_successor_starts_where_a_consumer_left_off);
    RUN(a_second_holder_is_refused_by_name);
    RUN(sizes_are_checked_with_the_nearest_legal_value);
    return 0;
}
