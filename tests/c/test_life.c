/* SPDX-License-Identifier: Apache-2.0
 * Who is alive: forks that outlive their parent, owners and servers that die, and what the next process finds. */
#include "world.h"

static uint32_t id = 100;

static rb_cluster *make_owned(uint32_t queues)
{
    rb_cluster_options o = {.struct_size = sizeof o, .buffers = 2048, .buffer_size = 256, .queues = queues, .slots = 64, .pages = RB_PAGES_4K};
    rb_cluster *c;
    OK(rb_cluster_create(id, &o, &c));
    return c;
}

/* One process tells another that it is so far: a byte in a pipe. */
static void tell(const int *pipe_of) { CHECK(write(pipe_of[1], "x", 1) == 1); }
static void await(const int *pipe_of)
{
    char byte;
    CHECK(read(pipe_of[0], &byte, 1) == 1);
}

/* Until all other processes that have the writing end are gone, orphans too, which nobody here can wait for. */
static void await_exit(const int *pipe_of)
{
    char byte;
    close(pipe_of[1]);
    CHECK(read(pipe_of[0], &byte, 1) == 0);
}

static void kill_and_reap(pid_t pid)
{
    int status;
    CHECK(kill(pid, SIGKILL) == 0 && waitpid(pid, &status, 0) == pid);
    CHECK(WIFSIGNALED(status));
}

/* n packets, in order; nobody else has to do anything for them. */
static void expect(rb_end *rx, uint64_t first, int n)
{
    rb_desc d[64];
    for (int got = 0; got < n;) {
        int k = rb_recv(rx, d, RB_MIN(n - got, 64), 5000);
        CHECK(k > 0);
        for (int i = 0; i < k; i++)
            CHECK(packet_read(rx->c, &d[i]) == first + (uint64_t)(got + i));
        CHECK(rb_return(rx->c, d, k) == k);
        got += k;
    }
}

static int listed(uint32_t cluster)
{
    uint32_t ids[64];
    int n = rb_cluster_list(ids, 64), found = 0;
    CHECK(n >= 0 && n <= 64);
    while (n)
        found |= ids[--n] == cluster;
    return found;
}

static void a_fork_outlives_its_parent(void)
{
    int ready[2], go[2], closed[2], end[2], gone[2];
    id++;
    CHECK(pipe(ready) == 0 && pipe(go) == 0 && pipe(closed) == 0 && pipe(end) == 0 && pipe(gone) == 0);
    pid_t parent = fork();
    if (parent == 0) {
        rb_cluster *c = make_owned(1);
        rb_end *tx = open_end(c, 0, RB_TX), *rx = open_end(c, 0, RB_RX);
        uint64_t n = 0;
        CHECK(send_packets(tx, 16, &n) == 16);
        if (fork() == 0) { /* the child: its handles are dead, and say so */
            rb_desc d[1];
            rb_end *again;
            CHECK(rb_recv(rx, d, 1, 0) == -EOWNERDEAD && strstr(rb_error(), "fork") && rb_error_cure()[0]);
            CHECK(rb_alloc(tx, d, 1) == -EOWNERDEAD && rb_send(tx, d, 1, 0) == -EOWNERDEAD && rb_return(c, d, 1) == -EOWNERDEAD);
            CHECK(rb_open(&again, c, "1@0", RB_RX) == -EOWNERDEAD && rb_service(c) == -EOWNERDEAD);
            tell(ready);
            await(go);
            rb_close(rx);
            rb_cluster_close(c);
            tell(closed);
            await(end);
            _exit(0);
        }
        pause();
    }
    await(ready);
    kill_and_reap(parent);
    rb_cluster *c = make_owned(1), *other; /* the child has the same files open, and no lock */
    rb_end *tx = open_end(c, 0, RB_TX), *rx = open_end(c, 0, RB_RX), *second;
    uint64_t n = 0;
    CHECK(send_packets(tx, 8, &n) == 8);
    tell(go);
    await(closed); /* it has closed what it inherited */
    expect(rx, 0, 8);
    CHECK(send_packets(tx, 8, &n) == 8);
    expect(rx, 8, 8);
    OK(rb_cluster_attach(id, &other));
    char address[32];
    snprintf(address, sizeof address, "%u@0", id);
    CHECK(rb_open(&second, other, address, RB_RX) == -EBUSY);
    tell(end);
    await_exit(gone);
    CHECK(send_packets(tx, 8, &n) == 8);
    expect(rx, 16, 8);
    CHECK(rb_open(&second, other, address, RB_RX) == -EBUSY && listed(id));
    rb_cluster_close(other);
    check_conservation(c);
    rb_cluster_close(c);
}

/* The parent holds ends of a persistent cluster of somebody else; its fork lives on. */
static void a_killed_parents_place_is_free_at_once(void)
{
    int ready[2], end[2], gone[2];
    uint64_t n = 0;
    rb_cluster *c = make_cluster(++id, 2048, 2, 64);
    rb_end *tx = open_end(c, 0, RB_TX);
    CHECK(pipe(ready) == 0 && pipe(end) == 0 && pipe(gone) == 0);
    pid_t parent = fork();
    if (parent == 0) {
        rb_cluster *mine;
        rb_desc d[8];
        OK(rb_cluster_attach(id, &mine));
        rb_end *rx = open_end(mine, 0, RB_RX), *out = open_end(mine, 1, RB_TX);
        uint64_t k = 0;
        CHECK(send_packets(out, 8, &k) == 8);
        tell(ready);
        CHECK(rb_recv(rx, d, 8, 5000) == 8); /* in hand when it dies */
        if (fork() == 0) {
            tell(ready);
            await(end);
            rb_cluster_close(mine);
            _exit(0);
        }
        pause();
    }
    await(ready);
    OK(rb_service(c));
    CHECK(send_packets(tx, 24, &n) == 24);
    await(ready);
    kill_and_reap(parent);
    rb_cluster *next;
    OK(rb_cluster_attach(id, &next));
    rb_end *rx = open_end(next, 0, RB_RX), *in = open_end(next, 1, RB_RX), *out = open_end(next, 1, RB_TX);
    OK(rb_service(c));
    expect(rx, 8, 16); /* what was unread; what the dead had in hand is home */
    expect(in, 0, 8);
    tell(end);
    await_exit(gone); /* the fork has closed its handles, and exited */
    CHECK(send_packets(tx, 8, &n) == 8);
    expect(rx, 24, 8);
    n = 50;
    CHECK(send_packets(out, 8, &n) == 8);
    expect(in, 50, 8);
    OK(rb_service(c));
    check_conservation(c);
    rb_cluster_close(next);
    rb_close(tx);
    rb_cluster_close(c);
    OK(rb_cluster_attach(id, &c));
    check_all_home(c);
    OK(rb_cluster_destroy(id, 0));
    rb_cluster_close(c);
}

static void a_cluster_goes_with_its_owner(void)
{
    int ready[2], go[2];
    rb_desc d[64];
    id++;
    CHECK(pipe(ready) == 0 && pipe(go) == 0);
    pid_t owner = fork();
    if (owner == 0) {
        rb_cluster *c = make_owned(1);
        rb_end *tx = open_end(c, 0, RB_TX);
        uint64_t n = 0;
        tell(ready);
        await(go);
        OK(rb_service(c));
        CHECK(send_packets(tx, 16, &n) == 16);
        tell(ready);
        pause();
    }
    await(ready);
    rb_cluster *c, *other;
    rb_cluster_options o = {.struct_size = sizeof o, .buffers = 2048, .queues = 1, .slots = 64, .pages = RB_PAGES_4K};
    char word[32], pid[32];
    OK(rb_cluster_attach(id, &c));
    rb_end *rx = open_end(c, 0, RB_RX);
    snprintf(pid, sizeof pid, "process %d", (int)owner);
    CHECK(rb_cluster_create(id, &o, &other) == -EEXIST && strstr(rb_error(), pid) && strstr(rb_error_cure(), "destroy"));
    CHECK(rb_cluster_destroy(id, 0) == -EBUSY && strstr(rb_error(), pid));
    tell(go);
    await(ready);
    CHECK(listed(id));
    kill_and_reap(owner);
    /* It is over, and whoever still reads it gets what is unread, and then the end. */
    CHECK(!listed(id));
    CHECK(rb_cluster_attach(id, &other) == -ENOENT && strstr(rb_error(), pid));
    snprintf(word, sizeof word, "create %u", id);
    CHECK(strstr(rb_error_cure(), word));
    CHECK(rb_cluster_create(id, &o, &other) == -EEXIST && strstr(rb_error(), "dead") && strstr(rb_error_cure(), "--force"));
    expect(rx, 0, 16);
    CHECK(rb_recv(rx, d, 64, 5000) == -ENODEV && strstr(rb_error(), "owned"));
    rb_close(rx);
    OK(rb_cluster_create(id, &o, &other)); /* its place is free */
    CHECK(rb_recv(open_end(other, 0, RB_RX), d, 1, 0) == 0);
    rb_cluster_close(c); /* the old life's handle is in nobody's way */
    CHECK(listed(id));
    rb_cluster_close(other);
    CHECK(!listed(id));
}

static void a_persistent_cluster_survives_its_maker(void)
{
    id++;
    uint64_t n = 8;
    pid_t maker = fork();
    if (maker == 0) {
        rb_cluster *c = make_cluster(id, 2048, 1, 64);
        uint64_t k = 0;
        CHECK(send_packets(open_end(c, 0, RB_TX), 8, &k) == 8);
        raise(SIGKILL);
    }
    int status;
    CHECK(waitpid(maker, &status, 0) == maker && WIFSIGNALED(status));
    CHECK(listed(id));
    rb_cluster *c;
    OK(rb_cluster_attach(id, &c));
    rb_end *rx = open_end(c, 0, RB_RX), *tx = open_end(c, 0, RB_TX);
    CHECK(send_packets(tx, 8, &n) == 8);
    expect(rx, 0, 16);
    rb_close(rx);
    rb_close(tx);
    check_all_home(c);
    rb_cluster_close(c);
    OK(rb_cluster_destroy(id, 0));
    CHECK(!listed(id));
}

/* A handle is one server. What a dead one has lent out is taken over by a second handle of it where it serves others already. */
static void who_serves_others_takes_over_what_a_dead_process_has_lent(void)
{
    rb_cluster *c = make_cluster(++id, 4096, 2, 64), *reader;
    rb_desc d[8];
    rb_end *tx, *rx;
    uint64_t n = 0;
    pid_t pid = fork();
    if (pid == 0) {
        rb_cluster *mine;
        OK(rb_cluster_attach(id, &mine));
        CHECK(send_packets(open_end(mine, 0, RB_TX), 8, &n) == 8);
        raise(SIGKILL);
    }
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
    rb_end *other = open_end(c, 1, RB_TX);
    OK(rb_cluster_attach(id, &reader));
    rx = open_end(reader, 0, RB_RX);
    CHECK(rb_recv(rx, d, 8, 5000) == 8); /* in a living hand */
    tx = open_end(c, 0, RB_TX);
    CHECK(rb_return(reader, d, 8) == 8);
    n = 8;
    CHECK(send_packets(tx, 8, &n) == 8);
    OK(rb_service(c));
    expect(rx, 8, 8);
    n = 30;
    CHECK(send_packets(other, 8, &n) == 8);
    OK(rb_service(c));
    check_conservation(c);
    rb_cluster_close(reader);
    rb_cluster_close(c);
    OK(rb_cluster_destroy(id, 0));
}

static void other_abi_versions_are_told_apart(void)
{
    rb_cluster *c = make_cluster(++id, 512, 1, 64), *other;
    struct rb_header *h = &c->reg->state->header;
    /* Another process: in this one the segment is mapped already. */
    h->abi = 7;
    pid_t pid = fork();
    if (pid == 0) {
        CHECK(rb_cluster_attach(id, &other) == -EPROTO);
        CHECK(strcmp(rb_error_code(), "abi-mismatch") == 0 && strstr(rb_error(), "version 7") && strstr(rb_error_cure(), "same version"));
        rb_cluster_options o = {.struct_size = sizeof o, .buffers = 512};
        CHECK(rb_cluster_create(id, &o, &other) == -EPROTO && rb_cluster_destroy(id, 1) == -EPROTO);
        _exit(0);
    }
    must_exit_well(pid);
    h->abi = RB_ABI_VERSION;
    int lane = rb_lane_create(c, "a", "1:1"); /* and a guest of another version */
    OK(lane);
    rb_segment_info info[8];
    rb_segment seg = {.struct_size = sizeof seg, .writable = 1};
    for (int i = rb_cluster_segments(c, info, 8) - 1; i >= 0; i--)
        if (info[i].vm[0]) {
            seg.fd = open(info[i].path, O_RDWR | O_CLOEXEC);
            seg.size = info[i].size;
        }
    rb_lane_get(c, (uint32_t)lane)->header.abi = 2;
    CHECK(rb_cluster_attach_segments(id, &seg, 1, &other) == -EPROTO && strcmp(rb_error_code(), "abi-mismatch") == 0);
    close(seg.fd);
    OK(rb_lane_remove(c, (uint32_t)lane, 0));
    rb_cluster_close(c);
    OK(rb_cluster_destroy(id, 0));
}

/* A stopped server: the wait has an end and names it. When it dies, others answer for it. */
static void who_does_not_answer_is_named(void)
{
    rb_cluster *c = make_cluster(++id, 2048, 1, 64);
    rb_desc d[8];
    int ready[2], status;
    char name[64];
    CHECK(pipe(ready) == 0);
    pid_t server = fork();
    if (server == 0) {
        rb_cluster *mine;
        uint64_t n = 0;
        OK(rb_cluster_attach(id, &mine));
        CHECK(send_packets(open_end(mine, 0, RB_TX), 8, &n) == 8);
        tell(ready);
        pause();
    }
    await(ready);
    CHECK(kill(server, SIGSTOP) == 0 && waitpid(server, &status, WUNTRACED) == server && WIFSTOPPED(status));
    rb_end *rx = open_end(c, 0, RB_RX);
    CHECK(rb_recv(rx, d, 8, 10) == 0); /* a short wait says nothing yet */
    CHECK(rb_recv(rx, d, 8, 1000) == -ETIMEDOUT && strcmp(rb_error_code(), "no-answer") == 0);
    snprintf(name, sizeof name, "process %d", (int)server);
    CHECK(strstr(rb_error(), name));
    snprintf(name, sizeof name, "kill %d", (int)server);
    CHECK(strstr(rb_error_cure(), name));
    rb_queue_info q;
    OK(rb_queue_get_info(c, 0, &q));
    CHECK(q.waiting && q.server_pid == (int)server);
    kill_and_reap(server);
    expect(rx, 0, 8);
    CHECK(rb_answered(rx) == 1);
    rb_close(rx);
    OK(rb_reap_all(c));
    check_all_home(c);
    rb_cluster_close(c);
    OK(rb_cluster_destroy(id, 0));
}

/* The process that served a VM and fed us is killed: the next look takes its place. */
static void a_consumer_fed_by_a_killed_server_is_fed_on(void)
{
    rb_cluster *c = make_cluster(++id, 4096, 2, 64), *reader;
    int ready[2];
    uint64_t n = 0;
    CHECK(pipe(ready) == 0);
    int lane = rb_lane_create(c, "a", "1:1");
    OK(lane);
    OK(rb_lane_bind(c, (uint32_t)lane, 1, RB_VM_TX));
    OK(rb_lane_bind(c, (uint32_t)lane, 0, RB_VM_RX));
    pid_t server = fork();
    if (server == 0) {
        rb_cluster *mine;
        OK(rb_cluster_attach(id, &mine));
        open_end(mine, 0, RB_TX);
        tell(ready);
        for (;;)
            OK(rb_service(mine));
    }
    await(ready);
    OK(rb_cluster_attach(id, &reader));
    rb_end *rx = open_end(reader, 1, RB_RX);
    rb_cluster *g = attach_guest(c, lane, 0);
    rb_end *tx = open_end(g, 1, RB_TX);
    while (n < 16) /* its grant comes when the server has seen it */
        send_packets(tx, (int)(16 - n), &n);
    expect(rx, 0, 16);
    kill_and_reap(server);
    while (n < 32)
        send_packets(tx, (int)(32 - n), &n); /* from the empties that it has */
    expect(rx, 16, 16);
    for (int round = 0; round < 50; round++) {
        uint64_t from = n;
        while (n < from + 16) {
            send_packets(tx, (int)(from + 16 - n), &n);
            OK(rb_service(reader));
        }
        expect(rx, from, 16);
    }
    check_conservation(c);
    rb_cluster_close(g);
    rb_close(rx);
    rb_cluster_close(reader);
    OK(rb_lane_remove(c, (uint32_t)lane, 0));
    check_all_home(c);
    rb_cluster_close(c);
    OK(rb_cluster_destroy(id, 0));
}

/* What lies in a lane is its VM's to overwrite; that a cluster is over reaches it all the same. */
static void a_scribbled_lane_is_marked_gone_too(void)
{
    rb_cluster *c = make_cluster(++id, 512, 1, 64);
    int lane = rb_lane_create(c, "a", "1:1");
    OK(lane);
    OK(rb_lane_bind(c, (uint32_t)lane, 0, RB_VM_RX));
    rb_cluster *g = attach_guest(c, lane, 0);
    rb_end *rx = open_end(g, 0, RB_RX);
    CHECK(rb_answered(rx) == -ETIMEDOUT && strstr(rb_error_cure(), "on the host")); /* nobody serves it yet */
    struct rb_header *h = &g->lane[0].lane->header;
    h->magic = h->size = h->cluster = h->kind = 0;
    OK(rb_cluster_destroy(id, 1));
    CHECK(rb_load_acquire(&h->generation) == 0 && rb_get(&h->state) == RB_SEG_GONE);
    h->magic = RB_MAGIC;
    rb_desc d[1];
    CHECK(rb_recv(rx, d, 1, 0) == -ENODEV);
    rb_cluster_close(g);
    rb_cluster_close(c);
}

static void a_pool_too_small_for_any_queue_says_what_would_do(void)
{
    rb_cluster_options o = {.struct_size = sizeof o, .buffers = 128, .buffer_size = 256, .queues = 1, .slots = 2, .pages = RB_PAGES_4K};
    rb_cluster *c;
    CHECK(rb_cluster_create(++id, &o, &c) == -ENOSPC && strcmp(rb_error_code(), "pool-too-small") == 0);
    CHECK(strcmp(rb_error_cure(), "make the cluster with --buffers 512") == 0 && !listed(id));
    o.buffers = 512;
    OK(rb_cluster_create(id, &o, &c));
    uint64_t n = 0;
    CHECK(send_packets(open_end(c, 0, RB_TX), 2, &n) == 2);
    rb_cluster_close(c);
}

int main(void)
{
    private_directories();
    alarm(100);
    RUN(a_fork_outlives_its_parent);
    RUN(a_killed_parents_place_is_free_at_once);
    RUN(a_cluster_goes_with_its_owner);
    RUN(a_persistent_cluster_survives_its_maker);
    RUN(who_serves_others_takes_over_what_a_dead_process_has_lent);
    RUN(other_abi_versions_are_told_apart);
    RUN(who_does_not_answer_is_named);
    RUN(a_consumer_fed_by_a_killed_server_is_fed_on);
    RUN(a_scribbled_lane_is_marked_gone_too);
    RUN(a_pool_too_small_for_any_queue_says_what_would_do);
    return 0;
}
