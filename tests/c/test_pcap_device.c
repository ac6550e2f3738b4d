/* SPDX-License-Identifier: Apache-2.0
 * pcap: devices from C, in worker threads: written from a queue, played to one, in loops, from memory, and cut. */
#include "world.h"

#include <fcntl.h>

#define PACKETS 3000

static char file[128];

static rb_end *open_file(rb_cluster *c, uint32_t flags, rb_open_options o)
{
    char address[160];
    rb_end *end;
    snprintf(address, sizeof address, "pcap:%s", file);
    o.struct_size = sizeof o;
    o.flags = flags;
    OK(rb_open_with(&end, c, address, &o));
    return end;
}

static rb_worker *bridge(rb_cluster *c, rb_end *in, rb_end *out, uint64_t packets)
{
    rb_worker *w;
    rb_pair pair = {in, out};
    rb_worker_options o = {.struct_size = sizeof o, .packets = packets};
    OK(rb_bridge_start(&w, c, &pair, 1, &o));
    return w;
}

static rb_worker_stats ended(rb_worker *w)
{
    rb_worker_stats st;
    do
        OK(rb_worker_stats_get(w, &st));
    while (st.running);
    rb_worker_stop(w);
    return st;
}

/* PACKETS packets that prove themselves, from a queue into the file. */
static void a_worker_writes_what_a_queue_brings(void)
{
    rb_cluster *c = make_cluster(70, 4096, 1, 1024), *other;
    uint64_t sequence = 0;
    OK(rb_cluster_attach(70, &other));
    rb_end *tx = open_end(c, 0, RB_TX), *rx = open_end(other, 0, RB_RX);
    rb_end *out = open_file(other, RB_TX, (rb_open_options){.name = "70@0"});
    rb_worker *w = bridge(other, rx, out, PACKETS);
    while (sequence < PACKETS)
        if (!send_packets(tx, RB_MIN(64, (int)(PACKETS - sequence)), &sequence))
            rb_service(c);
    rb_worker_stats st = ended(w);
    CHECK(st.packets == PACKETS && st.dropped == 0 && st.error == 0);
    OK(rb_sync(out));
    rb_cluster_close(other);
    rb_cluster_close(c);
    OK(rb_cluster_destroy(70, 1));
}

static void play(rb_open_options o, uint64_t rounds, int error)
{
    rb_cluster *c = make_cluster(71, 4096, 1, 256), *other;
    rb_desc d[64];
    OK(rb_cluster_attach(71, &other));
    rb_end *tx = open_end(c, 0, RB_TX), *rx = open_end(other, 0, RB_RX);
    o.speed = -1; /* as fast as the queue takes it: nothing is lost */
    rb_worker *w = bridge(c, open_file(c, RB_RX, o), tx, 0);
    uint64_t wanted = rounds * PACKETS - (error ? 1 : 0), got = 0;
    while (got < wanted) {
        int n = rb_recv(rx, d, 64, 1000);
        OK(n);
        for (int i = 0; i < n; i++) {
            CHECK(packet_read(other, &d[i]) == got++ % PACKETS);
            CHECK(d[i].ts > 1600000000000000000u);
        }
        CHECK(rb_return(other, d, n) == n);
    }
    rb_worker_stats st = ended(w);
    CHECK(st.packets == wanted && st.dropped == 0 && st.error == error);
    CHECK(!error || strstr(st.message, "is cut off"));
    rb_cluster_close(other);
    rb_cluster_close(c);
    OK(rb_cluster_destroy(71, 1));
}

static void a_worker_plays_it_and_loses_nothing(void) { play((rb_open_options){0}, 1, 0); }
static void in_loops(void) { play((rb_open_options){.loops = 5}, 5, 0); }
static void from_memory(void) { play((rb_open_options){.loops = 5, .preload = 1}, 5, 0); }

static void as_far_as_it_is_whole(void)
{
    int fd = open(file, O_RDWR);
    CHECK(fd >= 0 && ftruncate(fd, lseek(fd, 0, SEEK_END) - 3) == 0 && close(fd) == 0);
    play((rb_open_options){0}, 1, -EBADMSG);
    play((rb_open_options){.preload = 1}, 1, -EBADMSG);
}

static void a_device_refuses_options_of_others(void)
{
    rb_cluster *c = make_cluster(72, 4096, 1, 256);
    rb_open_options o = {.struct_size = sizeof o, .flags = RB_RX, .steer = "udp"};
    rb_end *end;
    char address[160];
    snprintf(address, sizeof address, "pcap:%s", file);
    CHECK(rb_open_with(&end, c, address, &o) == -EINVAL);
    o = (rb_open_options){.struct_size = sizeof o, .flags = RB_RX | RB_TX};
    CHECK(rb_open_with(&end, c, address, &o) == -EINVAL);
    o = (rb_open_options){.struct_size = sizeof o, .flags = RB_RX, .pps = 1, .speed = 2};
    CHECK(rb_open_with(&end, c, address, &o) == -EINVAL);
    o = (rb_open_options){.struct_size = sizeof o, .flags = RB_TX, .rotate_bytes = 100};
    CHECK(rb_open_with(&end, c, address, &o) == -EINVAL);
    rb_cluster_close(c);
    OK(rb_cluster_destroy(72, 1));
}

int main(void)
{
    private_directories();
    snprintf(file, sizeof file, "%s/a.pcapng", test_dir);
    RUN(a_worker_writes_what_a_queue_brings);
    RUN(a_worker_plays_it_and_loses_nothing);
    RUN(in_loops);
    RUN(from_memory);
    RUN(as_far_as_it_is_whole);
    RUN(a_device_refuses_options_of_others);
    return 0;
}
