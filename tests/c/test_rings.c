/* SPDX-License-Identifier: Apache-2.0
 *
 * The rings themselves: 32-bit indices that wrap around, the smallest and the largest sizes, two threads at once (run under ThreadSanitizer as well), every
 * queue of a lane, and a credit smaller than the slots.
 */
#include "world.h"

static uint32_t id = 700;

static void through(rb_end *tx, rb_end *rx, int n, uint64_t *sequence)
{
    rb_desc d[256];
    uint64_t from = *sequence;
    CHECK(send_packets(tx, n, sequence) == n);
    CHECK(rb_recv(rx, d, n, 0) == n);
    for (int i = 0; i < n; i++)
        CHECK(packet_read(rx->c, &d[i]) == from + (uint64_t)i);
    CHECK(rb_return(rx->c, d, n) == n);
    OK(rb_service(tx->c));
}

/* All four indices of the queue begin shortly before they wrap. */
static void indices_wrap_around(void)
{
    static const uint32_t slots[] = {2, 64, 65536};
    for (unsigned k = 0; k < 3; k++) {
        rb_cluster *c = make_cluster(++id, slots[k] > 64 ? 1u << 18 : 2048, 1, slots[k]), *d;
        struct rb_leg *leg = rb_leg_of(c, 0);
        struct rb_ring r;
        uint32_t start = 0u - 100;
        OK(rb_place_ring(c, rb_get(&leg->place), &r, NULL));
        rb_set(&r.ctl->p, start);
        rb_set(&r.ctl->c, start);
        rb_set(&r.ctl->rp, start);
        rb_set(&r.ctl->rc, start);
        rb_set(&leg->committed[RB_IX_P], start);
        rb_set(&leg->committed[RB_IX_RC], start);
        OK(rb_cluster_attach(id, &d));
        rb_end *tx = open_end(c, 0, RB_TX), *rx = open_end(d, 0, RB_RX);
        OK(rb_service(c));
        uint64_t n = 0;
        int burst = (int)RB_MIN(slots[k], 13u);
        for (int i = 0; i < 300; i++)
            through(tx, rx, burst, &n);
        CHECK(rb_get(&leg->committed[RB_IX_P]) == start + (uint32_t)n && rb_get(&leg->committed[RB_IX_P]) < start);
        check_conservation(c);
        CHECK(rb_count(rx) == 0);
        rb_cluster_close(d);
        rb_close(tx);
        check_all_home(c);
        rb_cluster_close(c);
        OK(rb_cluster_destroy(id, 1));
    }
}

/* A recovery right at the wrap: the server dies with the index just behind it. */
static void a_server_is_recovered_across_the_wrap(void)
{
    rb_cluster *c = make_cluster(++id, 1024, 1, 16), *d;
    struct rb_leg *leg = rb_leg_of(c, 0);
    struct rb_ring r;
    int status;
    OK(rb_place_ring(c, rb_get(&leg->place), &r, NULL));
    rb_set(&r.ctl->p, 0u - 3);
    rb_set(&r.ctl->c, 0u - 3);
    rb_set(&leg->committed[RB_IX_P], 0u - 3);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        rb_cluster *mine;
        uint64_t n = 0;
        OK(rb_cluster_attach(id, &mine));
        rb_end *tx = open_end(mine, 0, RB_TX);
        CHECK(send_packets(tx, 8, &n) == 8);
        raise(SIGKILL);
    }
    CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
    OK(rb_cluster_attach(id, &d));
    rb_end *rx = open_end(d, 0, RB_RX), *tx = open_end(c, 0, RB_TX);
    OK(rb_service(c));
    check_conservation(c);
    rb_desc got[16];
    CHECK(rb_recv(rx, got, 16, 0) == 8);
    for (int i = 0; i < 8; i++)
        CHECK(packet_read(d, &got[i]) == (uint64_t)i);
    CHECK(rb_return(d, got, 8) == 8);
    uint64_t n = 8;
    through(tx, rx, 16, &n);
    rb_cluster_close(d);
    rb_cluster_close(c);
    OK(rb_cluster_destroy(id, 1));
}

static void a_credit_smaller_than_the_slots_bounds_what_is_out(void)
{
    rb_cluster *c = make_cluster(++id, 1024, 0, 0), *d;
    rb_queue_options o = {.struct_size = sizeof o, .slots = 64, .credit = 5};
    rb_desc got[64];
    uint64_t n = 0;
    CHECK(rb_queue_create(c, 3, &o) == 3);
    OK(rb_cluster_attach(id, &d));
    rb_end *tx = open_end(c, 3, RB_TX), *rx = open_end(d, 3, RB_RX);
    OK(rb_service(c));
    CHECK(send_packets(tx, 32, &n) == 5);
    CHECK(rb_recv(rx, got, 64, 0) == 5);
    CHECK(send_packets(tx, 32, &n) == 0); /* room in the ring, but no credit */
    CHECK(rb_return(d, got, 2) == 2);
    CHECK(send_packets(tx, 32, &n) == 2);
    CHECK(rb_return(d, got + 2, 3) == 3);
    check_conservation(c);
    rb_cluster_close(d);
    rb_cluster_close(c);
    OK(rb_cluster_destroy(id, 1));
}

static void a_lane_has_64_queues(void)
{
    rb_cluster *c = make_cluster(++id, 16384, 65, 16);
    int lane = rb_lane_create(c, "vm", "1:1");
    OK(lane);
    for (uint32_t q = 0; q < 64; q++)
        OK(rb_lane_bind(c, (uint32_t)lane, q, RB_VM_RX));
    CHECK(rb_lane_bind(c, (uint32_t)lane, 64, RB_VM_RX) == -ENOSPC && rb_error_cure()[0]);
    rb_cluster *g = attach_guest(c, lane, 0);
    rb_end *tx[64], *rx[64];
    for (uint32_t q = 0; q < 64; q++) {
        tx[q] = open_end(c, q, RB_TX);
        rx[q] = open_end(g, q, RB_RX);
    }
    OK(rb_service(c));
    for (uint32_t q = 0; q < 64; q++) {
        uint64_t n = q * 100;
        through(tx[q], rx[q], 9, &n);
    }
    check_conservation(c);
    rb_cluster_close(g);
    OK(rb_lane_remove(c, (uint32_t)lane, 0));
    check_conservation(c);
    rb_cluster_close(c);
    OK(rb_cluster_destroy(id, 1));
}

static void the_smallest_and_the_largest_pools(void)
{
    uint64_t free_bytes = 0;
    FILE *f = fopen("/proc/meminfo", "r");
    char line[128];
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, "MemAvailable:", 13) == 0)
            free_bytes = strtoull(line + 13, NULL, 10) * 1024;
    if (f)
        fclose(f);
    static const uint32_t sizes[] = {256, 2048, 16384};
    for (unsigned k = 0; k < 3; k++) {
        rb_cluster_options o = {.struct_size = sizeof o, .buffers = 512, .buffer_size = sizes[k], .queues = 1, .slots = 2, .pages = RB_PAGES_4K};
        rb_cluster *c;
        OK(rb_cluster_create(++id, &o, &c));
        rb_end *tx = open_end(c, 0, RB_TX), *rx = open_end(c, 0, RB_RX);
        rb_desc d[2];
        CHECK(rb_alloc(tx, d, 2) == 2);
        for (int i = 0; i < 2; i++) {
            rb_desc_set(&d[i], RB_MIN(sizes[k] - 64, RB_MAX_LENGTH), 64, 0);
            memset(rb_data(c, &d[i]), 0x55 + i, rb_desc_length(&d[i]));
        }
        CHECK(rb_send(tx, d, 2, 0) == 2);
        rb_desc_set(&d[0], sizes[k] - 63, 64, 0);
        CHECK(!rb_data(c, &d[0])); /* one byte too many */
        CHECK(rb_recv(rx, d, 2, 0) == 2);
        CHECK(((uint8_t *)rb_data(c, &d[1]))[sizes[k] - 65] == 0x56);
        CHECK(rb_return(c, d, 2) == 2);
        rb_cluster_close(c);
    }
    rb_cluster_options o = {.struct_size = sizeof o, .buffers = 127, .buffer_size = 256};
    rb_cluster *c;
    CHECK(rb_cluster_create(++id, &o, &c) == -EINVAL && strstr(rb_error_cure(), "128"));
    o.buffers = RB_MAX_BUFFERS + 1;
    CHECK(rb_cluster_create(id, &o, &c) == -EINVAL);
    /* 16 M buffers of 256 bytes are 4 GiB; as many as leave this machine room enough. */
    uint32_t buffers = RB_MAX_BUFFERS;
    while (buffers > 65536 && (uint64_t)buffers * 256 * 3 > free_bytes)
        buffers /= 2;
    if (getenv("RB_SMALL"))
        buffers = RB_MIN(buffers, 1u << 18);
    o = (rb_cluster_options){.struct_size = sizeof o, .buffers = buffers, .buffer_size = 256, .queues = 1, .slots = 64, .pages = RB_PAGES_4K};
    int rc = rb_cluster_create(++id, &o, &c);
    if (rc == -ENOSPC || rc == -ENOMEM) {
        printf("   no room for a pool of %u buffers here: %s\n", buffers, rb_error());
        return;
    }
    OK(rc);
    rb_end *tx = open_end(c, 0, RB_TX), *rx = open_end(c, 0, RB_RX);
    uint64_t n = 0;
    for (int i = 0; i < 100; i++)
        through(tx, rx, 32, &n);
    struct stat st;
    CHECK(fstat(c->reg->state_fd, &st) == 0);
    printf("   %u buffers: the state is %llu MiB, of which %llu KiB exist\n", buffers, (unsigned long long)st.st_size >> 20, (unsigned long long)st.st_blocks / 2);
    CHECK(st.st_blocks * 512 < 64 << 20);
    rb_cluster_close(c);
}

/* Two threads with a handle each. */
static int done;
static void *consume(void *arg)
{
    uint32_t cluster = *(uint32_t *)arg;
    rb_cluster *c;
    uint64_t expect = 0, *got = malloc(sizeof *got);
    rb_desc d[64];
    OK(rb_cluster_attach(cluster, &c));
    rb_end *rx = open_end(c, 0, RB_RX);
    for (int n;;) {
        OK(n = rb_recv(rx, d, 64, 5));
        for (int i = 0; i < n; i++)
            CHECK(packet_read(c, &d[i]) == expect++);
        CHECK(rb_return(c, d, n) == n);
        if (!n && __atomic_load_n(&done, __ATOMIC_ACQUIRE))
            break;
    }
    rb_cluster_close(c);
    *got = expect;
    return got;
}

static void two_threads_with_a_handle_each(void)
{
    rb_cluster *c = make_cluster(++id, 1024, 1, 64);
    pthread_t thread;
    rb_end *tx = open_end(c, 0, RB_TX);
    uint64_t n = 0, *got, until = rb_mono_ns() + 1000000000ull;
    __atomic_store_n(&done, 0, __ATOMIC_RELEASE);
    CHECK(pthread_create(&thread, NULL, consume, &id) == 0);
    while (rb_mono_ns() < until) {
        send_packets(tx, 32, &n);
        OK(rb_service(c));
    }
    while (!rb_empty(tx))
        OK(rb_service(c));
    __atomic_store_n(&done, 1, __ATOMIC_RELEASE);
    CHECK(pthread_join(thread, (void **)&got) == 0);
    printf("   %llu packets\n", (unsigned long long)n);
    CHECK(*got == n && n > 1000);
    free(got);
    OK(rb_service(c));
    rb_close(tx);
    check_all_home(c);
    rb_cluster_close(c);
    OK(rb_cluster_destroy(id, 1));
}

/* A process that keeps ends of a destroyed cluster open does not disturb the next one of that number, and loses no lock to its own old ends. */
static void lives_of_a_cluster_do_not_share_locks(void)
{
    rb_cluster *old = make_cluster(++id, 1024, 1, 16), *now;
    rb_end *tx = open_end(old, 0, RB_TX);
    int status;
    OK(rb_cluster_destroy(id, 1));
    rb_cluster_options o = {.struct_size = sizeof o, .buffers = 1024, .queues = 1, .slots = 16};
    OK(rb_cluster_create(id, &o, &now));
    rb_end *mine = open_end(now, 0, RB_TX);
    rb_desc d;
    CHECK(rb_alloc(tx, &d, 1) == -ENODEV);
    rb_close(tx);
    rb_cluster_close(old);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) { /* another process sees all locks of the new life still held */
        rb_cluster *c;
        rb_end *end;
        OK(rb_cluster_attach(id, &c));
        char address[32];
        snprintf(address, sizeof address, "%u@0", id);
        CHECK(rb_open(&end, c, address, RB_TX) == -EBUSY);
        CHECK(rb_alloc(mine, &d, 1) == -EOWNERDEAD && strstr(rb_error_cure(), "attach again")); /* the parent's handle */
        CHECK(rb_cluster_create(id, &o, &c) == -EEXIST);
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(rb_alloc(mine, &d, 1) == 1);
    CHECK(rb_return(now, &d, 1) == 1);
    rb_cluster_close(now);
}

int main(void)
{
    private_directories();
    alarm(110);
    RUN(indices_wrap_around);
    RUN(a_server_is_recovered_across_the_wrap);
    RUN(a_credit_smaller_than_the_slots_bounds_what_is_out);
    RUN(a_lane_has_64_queues);
    RUN(two_threads_with_a_handle_each);
    RUN(lives_of_a_cluster_do_not_share_locks);
    RUN(the_smallest_and_the_largest_pools);
    return 0;
}
