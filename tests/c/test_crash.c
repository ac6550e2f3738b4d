/* SPDX-License-Identifier: Apache-2.0
 *
 * kill -9 at any instruction. First one by one: an operation is stepped through with ptrace and its process killed after n instructions, for n all along
 * it, and so is whoever recovers. Then by the clock: a producer, a middle man and a consumer in full flight, killed at random moments, alone and
 * together, with somebody who reaps and is killed too. Afterwards every buffer is found exactly once, and every packet that was unread arrives.
 *
 * RB_SEED chooses the random moments, RB_KILLS how many, RB_POINTS how many instructions of each operation.
 */
#include "world.h"

#define BURST 8
#define SLOTS 16

static uint32_t cluster_id = 100;
static rb_cluster *child_cluster;
static rb_end *child_tx, *child_rx;
static struct shared {
    uint64_t sent;     /* packets of which rb_send has said so */
    uint64_t tried;    /* packets that may have been sent */
    uint64_t received; /* the next one the receiver expects */
    uint64_t got, starts, forwarded;
    uint8_t seen[1 << 22];
} *shared;

/* ---- one operation, stepped through -------------------------------------------------------------------------- */

static void attach_tx(void)
{
    OK(rb_cluster_attach(cluster_id, &child_cluster));
    child_tx = open_end(child_cluster, 0, RB_TX);
    OK(rb_service(child_cluster));
}

static void prepare_lend(void)
{
    attach_tx();
    uint64_t n = 1;
    CHECK(send_packets(child_tx, 3, &n) == 3);
    shared->sent = shared->tried = 3;
}

static void op_lend(void)
{
    uint64_t n = 4;
    shared->tried = 3 + BURST;
    CHECK(send_packets(child_tx, BURST, &n) == BURST);
    shared->sent = 3 + BURST;
}

/* The consumer, in this process, has given some back. */
static rb_cluster *consumer;
static rb_end *consumer_rx;
static void consume_in_parent(int recv, int give)
{
    rb_desc d[64];
    OK(rb_service(consumer));
    int n = rb_recv(consumer_rx, d, recv, 0);
    for (int i = 0; i < n; i++)
        CHECK(packet_read(consumer, &d[i]) == ++shared->received);
    if (n > 0 && give)
        rb_return(consumer, d, RB_MIN(n, give));
}

static void prepare_take(void)
{
    rb_cluster *reader;
    rb_desc d[BURST];
    prepare_lend();
    op_lend();
    OK(rb_cluster_attach(cluster_id, &reader));
    rb_end *rx = open_end(reader, 0, RB_RX);
    OK(rb_service(child_cluster));
    CHECK(rb_recv(rx, d, BURST, 0) == BURST);
    for (int i = 0; i < BURST; i++)
        CHECK(packet_read(reader, &d[i]) == ++shared->received);
    CHECK(rb_return(reader, d, BURST - 2) == BURST - 2);
}
static void op_take(void) { OK(rb_service(child_cluster)); }

/* A new session of a receiver whose predecessor held some: the lender answers it. */
static void prepare_renew(void)
{
    prepare_take();
    op_take();
    struct rb_ring r;
    OK(rb_place_ring(child_cluster, rb_get(&rb_leg_of(child_cluster, 0)->place), &r, NULL));
    rb_store_release(&r.ctl->session, 77);
}

static void op_close(void) { rb_cluster_close(child_cluster); }

/* A middle man between queue 0 and queue 1, all in one process but for the death. */
static rb_cluster *first, *last;
static rb_end *first_tx, *last_rx;
static void prepare_middle(void)
{
    uint64_t n = 1;
    OK(rb_cluster_attach(cluster_id, &first));
    OK(rb_cluster_attach(cluster_id, &last));
    OK(rb_cluster_attach(cluster_id, &child_cluster));
    first_tx = open_end(first, 0, RB_TX);
    child_rx = open_end(child_cluster, 0, RB_RX);
    child_tx = open_end(child_cluster, 1, RB_TX);
    last_rx = open_end(last, 1, RB_RX);
    OK(rb_service(first));
    OK(rb_service(child_cluster));
    CHECK(send_packets(first_tx, BURST, &n) == BURST);
    shared->sent = shared->tried = BURST;
}
static void op_forward(void)
{
    rb_desc d[BURST];
    int n = rb_recv(child_rx, d, BURST, 0);
    CHECK(n == BURST);
    shared->forwarded = BURST;
    CHECK(rb_send(child_tx, d, n, 0) == n);
}
static void prepare_forward_back(void)
{
    rb_desc d[BURST];
    prepare_middle();
    op_forward();
    CHECK(rb_recv(last_rx, d, BURST, 0) == BURST);
    for (int i = 0; i < BURST; i++)
        CHECK(packet_read(last, &d[i]) == ++shared->received);
    CHECK(rb_return(last, d, BURST / 2) == BURST / 2);
}

/* Opening in the place of a dead server: adoption. */
static void prepare_adopt(void) { OK(rb_cluster_attach(cluster_id, &child_cluster)); }
static void op_adopt(void)
{
    child_tx = open_end(child_cluster, 0, RB_TX);
    OK(rb_service(child_cluster));
}
static void op_reap(void) { OK(rb_reap_all(child_cluster)); }

/* A VM that sends on queue 1: grants, collects, and its lane's going. The VM's program is this process too. */
static rb_cluster *vm;
static rb_end *vm_tx, *vm_rx;
static int lane;
static void prepare_vm(void)
{
    uint64_t n = 1;
    rb_desc d[SLOTS];
    OK(rb_cluster_attach(cluster_id, &child_cluster));
    OK(lane = rb_lane_create(child_cluster, "vm", "1:1"));
    OK(rb_lane_bind(child_cluster, (uint32_t)lane, 0, RB_VM_RX));
    OK(rb_lane_bind(child_cluster, (uint32_t)lane, 1, RB_VM_TX));
    child_tx = open_end(child_cluster, 0, RB_TX);
    child_rx = open_end(child_cluster, 1, RB_RX);
    OK(rb_service(child_cluster));
    vm = attach_guest(child_cluster, lane, 0);
    vm_rx = open_end(vm, 0, RB_RX);
    vm_tx = open_end(vm, 1, RB_TX);
    OK(rb_service(child_cluster));
    CHECK(send_packets(child_tx, BURST, &n) == BURST);
    CHECK(rb_recv(vm_rx, d, BURST / 2, 0) == BURST / 2);
    CHECK(rb_send(vm_tx, d, BURST / 4, 0) == BURST / 4); /* half of them on, the rest stays in its hand */
    CHECK(rb_alloc(vm_tx, d, 3) == 3);
    for (int i = 0; i < 3; i++)
        packet_write(vm, &d[i], 1000 + (uint64_t)i);
    CHECK(rb_send(vm_tx, d, 2, 0) == 2);
}
static void op_collect(void)
{
    rb_desc d[BURST];
    int n = rb_recv(child_rx, d, BURST, 0);
    CHECK(n == BURST / 4 + 2);
    CHECK(rb_return(child_cluster, d, n) == n);
    OK(rb_service(child_cluster));
}
static void op_detach(void) { OK(rb_lane_remove(child_cluster, (uint32_t)lane, 0)); }
static void op_unbind(void) { OK(rb_lane_unbind(child_cluster, (uint32_t)lane, 0, RB_VM_RX)); }

/* ---- afterwards ------------------------------------------------------------------------------------------------- */

/* New processes take every place at once, read what is unread, and everything comes home. */
static void successors(int reap_first)
{
    rb_cluster *c, *m, *z; /* each in the place of one of the dead */
    rb_desc d[64];
    uint64_t expect = shared->received;
    OK(rb_cluster_attach(cluster_id, &c));
    OK(rb_cluster_attach(cluster_id, &m));
    OK(rb_cluster_attach(cluster_id, &z));
    if (reap_first) { /* else opening recovers */
        OK(rb_reap_all(c));
        check_conservation(c);
    }
    for (int i = 0; i < 2; i++) { /* a VM that is still attached lets go: its QEMU died as well */
        struct rb_holder *h = &c->reg->state->queue[i].end[0];
        for (int e = 0; e < 2; e++)
            if (h[e].lane)
                OK(rb_lane_remove(c, h[e].lane - 1, 0));
    }
    rb_end *rx0 = open_end(m, 0, RB_RX), *tx0 = open_end(c, 0, RB_TX), *rx1 = open_end(z, 1, RB_RX), *tx1 = open_end(m, 1, RB_TX);
    uint32_t idle = 0;
    OK(rb_service(c));
    OK(rb_service(m));
    check_conservation(c);
    while (idle < 4) {
        OK(rb_service(m));
        OK(rb_service(c));
        int n = 0;
        rb_end *rx[2] = {rx0, rx1};
        for (int q = 1; q >= 0; q--) {
            int k = rb_recv(rx[q], d, 64, 0);
            OK(k);
            for (int i = 0; i < k; i++) {
                uint64_t sequence = packet_read(rx[q]->c, &d[i]);
                if (sequence < 1000) {
                    CHECK(sequence > expect); /* in order, and what a dead receiver had in hand is not seen again */
                    expect = sequence;
                    shared->got++;
                }
            }
            CHECK(rb_return(rx[q]->c, d, k) == k);
            n += k;
        }
        idle = n ? 0 : idle + 1;
    }
    /* The places work: packets go through. */
    uint64_t one = 5000;
    rb_end *tx[2] = {tx0, tx1}, *rx[2] = {rx0, rx1};
    for (int q = 0; q < 2; q++) {
        uint64_t next = one;
        CHECK(send_packets(tx[q], BURST, &next) == BURST);
        CHECK(rb_recv(rx[q], d, 64, 0) == BURST);
        for (int i = 0; i < BURST; i++)
            CHECK(packet_read(rx[q]->c, &d[i]) == one + (uint64_t)i);
        CHECK(rb_return(rx[q]->c, d, BURST) == BURST);
    }
    OK(rb_service(m));
    OK(rb_service(c));
    check_all_home(c);
    rb_cluster_close(z);
    rb_cluster_close(m);
    rb_cluster_close(c);
    OK(rb_cluster_attach(cluster_id, &c));
    check_all_home(c);
    CHECK(check_conservation(c).free == 0); /* nobody's again */
    rb_cluster_close(c);
}

static long points(void) { return getenv("RB_POINTS") ? atol(getenv("RB_POINTS")) : 25; }

#define MOST_STEPS 25000
/* 1/2, 1/4, 3/4, 1/8, 5/8, ...: wherever it is broken off, the points are all along the way. */
static double spread(long k)
{
    double at = 0, step = 0.5;
    for (k++; k; k /= 2, step /= 2)
        at += (double)(k % 2) * step;
    return at;
}

/* `op` killed at points all along it; before that, `begin` is killed at its end so that op has something to recover from. */
static void stepped(const char *what, void (*begin)(void), void (*begin_op)(void), long begin_at, void (*prepare)(void), void (*op)(void), int unread_arrive)
{
    int whole = 0;
    long all = 0, n = 1, tried = 0;
    int came_to_its_end = 0;
    uint64_t seed = rb_now_ns();
    uint64_t until = rb_mono_ns() + 1500000000ull; /* a step takes some 30 us, and more on a busy machine */
    for (long k = -1; k < n && (k < 4 || rb_mono_ns() < until); k++, tried++) { /* -1: how many instructions are there? */
        rb_cluster *c = make_cluster(++cluster_id, 1024, 2, SLOTS);
        memset(shared, 0, offsetof(struct shared, seen));
        if (begin)
            killed_after(begin_at, begin, begin_op, &whole);
        long did = killed_after(k < 0 ? MOST_STEPS : !came_to_its_end && k % 2 ? -(long)(test_random(&seed) % 1000000) : (long)((double)all * spread(k)), prepare, op, &whole);
        if (k < 0) {
            all = did;
            came_to_its_end = whole;
            n = points();
        }
        successors(k & 1);
        if (unread_arrive) { /* what rb_send had taken and nobody had received is there; what it was about to take, wholly or in part */
            CHECK(shared->got + shared->received >= shared->sent && shared->got + shared->received <= shared->tried);
        }
        rb_cluster_close(c);
        OK(rb_cluster_destroy(cluster_id, 1));
    }
    printf("   %s: %ld instructions%s, killed at %ld points\n", what, all, came_to_its_end ? "" : " and more (the rest by the clock)", tried);
    CHECK(all > 20);
}

static void nothing(void) {}

static void killed_at_any_instruction(void)
{
    stepped("lend", NULL, NULL, 0, prepare_lend, op_lend, 1);
    stepped("take", NULL, NULL, 0, prepare_take, op_take, 1);
    stepped("renew", NULL, NULL, 0, prepare_renew, op_take, 1);
    stepped("close", NULL, NULL, 0, prepare_take, op_close, 1);
    stepped("forward", NULL, NULL, 0, prepare_middle, op_forward, 0);
    stepped("take what was lent on", NULL, NULL, 0, prepare_forward_back, op_take, 0);
    stepped("close of a middle man", NULL, NULL, 0, prepare_forward_back, op_close, 0);
    stepped("grant and collect", NULL, NULL, 0, prepare_vm, op_collect, 0);
    stepped("detach of a VM", NULL, NULL, 0, prepare_vm, op_detach, 0);
    stepped("one queue taken from a VM", NULL, NULL, 0, prepare_vm, op_unbind, 0);
}

static void killed_while_it_recovers(void)
{
    /* The first is killed in the middle of its operation, at some points; the one that recovers is killed all along. */
    static const long at[] = {600, 2400};
    for (unsigned i = 0; i < sizeof at / sizeof *at; i++) {
        stepped("adopt after lend", prepare_lend, op_lend, at[i], prepare_adopt, op_adopt, 1);
        stepped("reap after take", prepare_take, op_take, at[i], prepare_adopt, op_reap, 1);
        stepped("reap after collect", prepare_vm, op_collect, at[i], prepare_adopt, op_reap, 0);
    }
    stepped("reap after detach", prepare_vm, op_detach, 3000, prepare_adopt, op_reap, 0);
    stepped("reap of a middle man", prepare_forward_back, nothing, 0, prepare_adopt, op_reap, 0);
}

/* ---- by the clock ---------------------------------------------------------------------------------------------------- */

/* An end as soon as it can be had. Only what is being cleaned up just now may be in the way, and not for long. */
static rb_end *open_soon(rb_cluster *c, uint32_t queue, uint32_t flags)
{
    char address[32];
    rb_end *end;
    uint64_t until = rb_mono_ns() + 5000000000ull;
    snprintf(address, sizeof address, "%u@%u", c->id, queue);
    for (;;) {
        int rc = rb_open(&end, c, address, flags);
        if (rc == 0)
            return end;
        CHECK(rc == -EBUSY && rb_mono_ns() < until);
        nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    }
}

static void run_producer(void)
{
    rb_cluster *c;
    rb_desc d[BURST];
    OK(rb_cluster_attach(cluster_id, &c));
    rb_end *tx = open_soon(c, 0, RB_TX);
    for (;;) {
        OK(rb_service(c));
        int n = rb_alloc(tx, d, BURST);
        OK(n);
        uint64_t next = shared->tried;
        for (int i = 0; i < n; i++)
            packet_write(c, &d[i], next + (uint64_t)i);
        *(volatile uint64_t *)&shared->tried = next + (uint64_t)n;
        int sent = rb_send(tx, d, n, 50);
        OK(sent);
        for (int i = 0; i < sent; i++)
            __atomic_or_fetch(&shared->seen[(next + (uint64_t)i) % sizeof shared->seen], 1, __ATOMIC_RELAXED);
        if (sent < n)
            CHECK(rb_return(c, d + sent, n - sent) == n - sent);
    }
}

static void run_middle(void)
{
    rb_cluster *c;
    rb_desc d[BURST];
    OK(rb_cluster_attach(cluster_id, &c));
    rb_end *rx = open_soon(c, 0, RB_RX), *tx = open_soon(c, 1, RB_TX);
    for (uint64_t round = 0;; round++) {
        int n = rb_recv(rx, d, BURST, 10), sent = 0;
        OK(n);
        for (int i = 0; i < n; i++)
            packet_read(c, &d[i]);
        while (sent < n) {
            int k = rb_send(tx, d + sent, n - sent, 10);
            OK(k);
            sent += k;
        }
        OK(rb_service(c));
    }
}

static void run_consumer(void)
{
    rb_cluster *c;
    rb_desc d[BURST * 2];
    uint64_t last = 0;
    OK(rb_cluster_attach(cluster_id, &c));
    rb_end *rx = open_soon(c, 1, RB_RX);
    for (uint64_t round = 0;; round++) {
        int n = rb_recv(rx, d, 1 + (int)(round % (BURST * 2)), 10);
        OK(n);
        for (int i = 0; i < n; i++) {
            uint64_t sequence = packet_read(c, &d[i]);
            CHECK(sequence >= last); /* never backwards, within one life */
            last = sequence + 1;
            uint8_t was = __atomic_fetch_or(&shared->seen[sequence % sizeof shared->seen], 2, __ATOMIC_RELAXED);
            CHECK(!(was & 2)); /* and never twice, over all lives */
            __atomic_add_fetch(&shared->got, 1, __ATOMIC_RELAXED);
        }
        CHECK(rb_return(c, d, n) == n);
    }
}

static void run_reaper(void)
{
    for (;;) {
        OK(rb_cluster_reap(cluster_id));
        nanosleep(&(struct timespec){.tv_nsec = 300000}, NULL);
    }
}

static pid_t start(void (*run)(void))
{
    fflush(stdout);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        alarm(120);
        run();
        _exit(0);
    }
    return pid;
}

static void (*const roles[])(void) = {run_producer, run_middle, run_consumer, run_reaper};
enum { PRODUCER = 1, MIDDLE = 2, CONSUMER = 4, REAPER = 8 };

static void end_child(pid_t pid, int expected)
{
    int status;
    CHECK(waitpid(pid, &status, WNOHANG) == 0 || !expected); /* it was alive until we killed it: no failed check of its own */
    kill(pid, SIGKILL);
    CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

/* Kill some of `victims` at random moments, `kills` times; all four run meanwhile. Returns the packets that were sent and never arrived. */
static uint64_t kill_at_random(unsigned victims, int kills, uint64_t seed)
{
    rb_cluster *c = make_cluster(++cluster_id, 1024, 2, SLOTS);
    pid_t pid[4];
    uint64_t lost = 0, last_got = 0, stuck_since = rb_mono_ns();
    memset(shared, 0, sizeof *shared);
    for (int i = 0; i < 4; i++)
        pid[i] = start(roles[i]);
    for (int k = 0; k < kills;) {
        nanosleep(&(struct timespec){.tv_nsec = (long)(test_random(&seed) % 6000000)}, NULL);
        unsigned who = (unsigned)test_random(&seed) & victims;
        if (test_random(&seed) % 3) /* mostly one at a time */
            who &= 1u << test_random(&seed) % 4;
        for (int i = 0; i < 4; i++)
            if (who & 1u << i) {
                end_child(pid[i], 1);
                k++;
            }
        for (int i = 0; i < 4; i++)
            if (who & 1u << i)
                pid[i] = start(roles[i]);
        uint64_t got = __atomic_load_n(&shared->got, __ATOMIC_RELAXED);
        if (got != last_got)
            stuck_since = rb_mono_ns();
        last_got = got;
        CHECK(rb_mono_ns() - stuck_since < 10000000000ull); /* never wedged */
    }
    uint64_t before = __atomic_load_n(&shared->got, __ATOMIC_RELAXED), until = rb_mono_ns() + 10000000000ull;
    while (__atomic_load_n(&shared->got, __ATOMIC_RELAXED) < before + 1000 && rb_mono_ns() < until)
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    CHECK(__atomic_load_n(&shared->got, __ATOMIC_RELAXED) >= before + 1000); /* it flows on */
    end_child(pid[0], 1);
    until = rb_mono_ns() + 2000000000ull;
    for (uint64_t n = 0; rb_mono_ns() < until;) { /* let what is under way arrive */
        uint64_t got = __atomic_load_n(&shared->got, __ATOMIC_RELAXED);
        nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
        n = got == __atomic_load_n(&shared->got, __ATOMIC_RELAXED) ? n + 1 : 0;
        if (n >= 3)
            break;
    }
    for (int i = 1; i < 4; i++)
        end_child(pid[i], 1);
    for (uint64_t i = 0; i < sizeof shared->seen && i < shared->tried; i++)
        lost += shared->seen[i] == 1;
    uint64_t tried = shared->tried, got = shared->got;
    shared->received = 0; /* whatever is still unread may have any number */
    OK(rb_reap_all(c));
    successors(0);
    rb_cluster_close(c);
    OK(rb_cluster_destroy(cluster_id, 1));
    printf("   %d kills of %s%s%s%s: %llu packets tried, %llu arrived, %llu lost with who held them\n", kills, victims & PRODUCER ? "p" : "",
           victims & MIDDLE ? "m" : "", victims & CONSUMER ? "c" : "", victims & REAPER ? "r" : "", (unsigned long long)tried, (unsigned long long)got,
           (unsigned long long)lost);
    return lost;
}

static void killed_at_random_moments(void)
{
    uint64_t seed = getenv("RB_SEED") ? strtoull(getenv("RB_SEED"), NULL, 0) : rb_now_ns();
    int kills = getenv("RB_KILLS") ? atoi(getenv("RB_KILLS")) : 50;
    printf("   RB_SEED=%llu\n", (unsigned long long)seed);
    CHECK(kill_at_random(PRODUCER | REAPER, kills, seed + 1) == 0); /* nobody who held a packet died: none is lost */
    CHECK(kill_at_random(CONSUMER | REAPER, kills, seed + 2) <= 2 * BURST * (uint64_t)kills);
    CHECK(kill_at_random(MIDDLE | REAPER, kills, seed + 3) <= 2 * BURST * (uint64_t)kills);
    CHECK(kill_at_random(PRODUCER | MIDDLE | CONSUMER | REAPER, kills, seed + 4) <= 4 * BURST * (uint64_t)kills);
}

int main(void)
{
    private_directories();
    (void)consume_in_parent;
    shared = shared_memory(sizeof *shared);
    const char *only = getenv("RB_ONLY");
    if (!only || strstr(only, "random"))
        RUN(killed_at_random_moments);
    if (!only || strstr(only, "step")) {
        RUN(killed_at_any_instruction);
        RUN(killed_while_it_recovers);
    }
    return 0;
}
