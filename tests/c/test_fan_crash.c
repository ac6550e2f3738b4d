/* SPDX-License-Identifier: Apache-2.0
 *
 * kill -9 in the middle of a fan-out: of whoever fans out, of its consumers, of those that send on, and of whoever recovers. First stepped through
 * instruction by instruction, then by the clock. Afterwards every buffer is found exactly once and comes home, and no queue is stuck.
 *
 * RB_SEED chooses the random moments, RB_KILLS how many, RB_POINTS how many instructions of each operation, RB_SECONDS at most for each, RB_ONLY
 * random or step.
 */
#include "world.h"

#define BURST 8
#define SLOTS 16
enum { OUT = 3, IN = 3, ON = 4, QUEUES = 5 }; /* queues 0 to 2: the outputs; 3: what a borrowing fan-out receives; 4: where a consumer sends on */

static uint32_t cluster_id = 400;
static rb_cluster *book, *other, *reader[QUEUES];
static rb_end *tx[QUEUES], *rx[QUEUES];
static rb_fan *fan;
static uint64_t all;
static struct shared {
    uint64_t next, got[QUEUES], starts;
} *shared;

/* ---- stepped through: everybody is in the process that dies ---------------------------------------------------------- */

static void open_outputs(void)
{
    OK(rb_cluster_attach(cluster_id, &book));
    OK(rb_fan_open(&fan, book));
    all = 0;
    for (uint32_t i = 0; i < OUT; i++) {
        tx[i] = open_end(book, i, RB_TX);
        OK(rb_cluster_attach(cluster_id, &reader[i]));
        rx[i] = open_end(reader[i], i, RB_RX);
        int bit = rb_fan_add(fan, tx[i]);
        OK(bit);
        all |= 1ull << bit;
    }
    OK(rb_service(book));
}

static void fan_out(rb_desc *d, int n)
{
    uint64_t mask[BURST];
    for (int i = 0; i < n; i++) /* all, some, one, none */
        mask[i] = i % 4 == 3 ? 0 : i % 4 == 2 ? all & ~(all - 1) : i % 4 == 1 ? all & (all - 1) : all;
    OK(rb_fan_send(fan, d, mask, n, NULL));
}

static void make(rb_end *end, rb_desc *d, int n)
{
    CHECK(rb_alloc(end, d, n) == n);
    for (int i = 0; i < n; i++)
        packet_write(end->c, &d[i], shared->next++);
}

static void op_fan(void)
{
    rb_desc d[BURST];
    make(tx[0], d, BURST);
    fan_out(d, BURST);
}

static void prepare_take(void)
{
    rb_desc d[64];
    open_outputs();
    op_fan();
    op_fan();
    for (int i = 0; i < OUT; i++) {
        int n = rb_recv(rx[i], d, 64, 0);
        CHECK(n > 0);
        CHECK(rb_return(reader[i], d, n - i) == n - i);
    }
}
static void op_take(void) { OK(rb_service(book)); }

/* A new session of one of the consumers, which held some. */
static void prepare_renew(void)
{
    struct rb_ring r;
    prepare_take();
    op_take();
    OK(rb_place_ring(book, rb_get(&rb_leg_of(book, 2)->place), &r, NULL));
    rb_store_release(&r.ctl->session, 77);
}

/* What is fanned out was borrowed from another. */
static void prepare_borrowed(void)
{
    rb_desc d[BURST];
    OK(rb_cluster_attach(cluster_id, &other));
    tx[IN] = open_end(other, IN, RB_TX);
    open_outputs();
    rx[IN] = open_end(book, IN, RB_RX);
    OK(rb_service(other));
    make(tx[IN], d, BURST);
    CHECK(rb_send(tx[IN], d, BURST, 0) == BURST);
}
static void op_fan_borrowed(void)
{
    rb_desc d[BURST];
    CHECK(rb_recv(rx[IN], d, BURST, 0) == BURST);
    fan_out(d, BURST);
}
static void prepare_take_borrowed(void)
{
    rb_desc d[64];
    prepare_borrowed();
    op_fan_borrowed();
    for (int i = 0; i < OUT; i++) {
        int n = rb_recv(rx[i], d, 64, 0);
        CHECK(n > 0 && rb_return(reader[i], d, n) == n);
    }
}

/* A consumer of the fan-out that sends on; its own book dies. */
static void prepare_on(void)
{
    open_outputs();
    op_fan();
    tx[ON] = open_end(reader[0], ON, RB_TX);
    OK(rb_cluster_attach(cluster_id, &reader[ON]));
    rx[ON] = open_end(reader[ON], ON, RB_RX);
    OK(rb_service(reader[0]));
    OK(rb_service(book));
}
static void op_on(void)
{
    rb_desc d[64];
    int n = rb_recv(rx[0], d, 64, 0);
    CHECK(n > 0 && rb_send(tx[ON], d, n, 0) == n);
    n = rb_recv(rx[ON], d, 64, 0);
    CHECK(n > 0 && rb_return(reader[ON], d, n - 1) == n - 1);
    OK(rb_service(reader[0]));
    OK(rb_service(book));
}

/* A VM gets its share and sends it on: the bit moves. */
static rb_cluster *vm;
static void prepare_vm(void)
{
    rb_desc d[64];
    int lane, n;
    open_outputs();
    OK(lane = rb_lane_create(book, "vm", "1:1"));
    rb_close(rx[1]);
    OK(rb_lane_bind(book, (uint32_t)lane, 1, RB_VM_RX));
    OK(rb_lane_bind(book, (uint32_t)lane, IN, RB_VM_TX));
    rx[IN] = open_end(book, IN, RB_RX);
    tx[ON] = open_end(book, ON, RB_TX);
    OK(rb_service(book));
    vm = attach_guest(book, lane, 0);
    rb_end *from = open_end(vm, 1, RB_RX), *to = open_end(vm, IN, RB_TX);
    OK(rb_service(book));
    op_fan();
    n = rb_recv(from, d, 64, 0);
    CHECK(n > 2 && rb_send(to, d, n - 1, 0) == n - 1);
}
static void op_moved(void)
{
    rb_desc d[64];
    int n = rb_recv(rx[IN], d, 64, 0);
    CHECK(n > 0 && rb_send(tx[ON], d, n, 0) == n);
}
static void op_detach(void) { OK(rb_lane_remove(book, book->reg->state->queue[1].end[1].lane - 1, 0)); }

static void op_close(void) { rb_cluster_close(book); }

static void prepare_adopt(void) { OK(rb_cluster_attach(cluster_id, &book)); }
static void op_adopt(void)
{
    for (uint32_t i = 0; i < OUT; i++)
        tx[i] = open_end(book, i, RB_TX);
    OK(rb_service(book));
}
static void op_reap(void) { OK(rb_reap_all(book)); }

static void service_all(rb_cluster *c, rb_cluster **z)
{
    for (uint32_t k = 0; k < QUEUES; k++)
        OK(rb_service(z[k]));
    OK(rb_service(c));
}

/* New processes take every place, read what is unread, and all comes home. */
static void successors(int reap_first)
{
    rb_cluster *c, *z[QUEUES];
    rb_end *out[QUEUES], *in[QUEUES];
    rb_desc d[64];
    int last = 0;
    OK(rb_cluster_attach(cluster_id, &c));
    if (reap_first) {
        OK(rb_reap_all(c));
        check_conservation(c);
    }
    for (int i = 0; i < QUEUES; i++) /* a VM lets go: its QEMU died as well */
        for (int e = 0; e < 2; e++) {
            struct rb_holder *h = &c->reg->state->queue[i].end[e];
            if (h->lane)
                OK(rb_lane_remove(c, h->lane - 1, 0));
        }
    for (uint32_t i = 0; i < QUEUES; i++) { /* each by a handle of its own, so that none serves what another must take over */
        OK(rb_cluster_attach(cluster_id, &z[i]));
        in[i] = open_end(z[i], i, RB_RX);
        out[i] = NULL;
    }
    for (int round = 0; round < 200 && last < 8; round++) {
        int n = 0, all_open = 1;
        for (uint32_t i = 0; i < QUEUES; i++) {
            char address[32];
            snprintf(address, sizeof address, "%u@%u", cluster_id, i);
            /* The first handle that can serves it, by a second one of it too; what a dead one had lent may have to come back first. */
            for (uint32_t k = 0; !out[i] && k <= QUEUES; k++)
                if (rb_open(&out[i], k ? z[k - 1] : c, address, RB_TX) < 0)
                    out[i] = NULL;
            if (!out[i]) {
                all_open = 0;
                OK(rb_reap_all(c));
            }
            service_all(c, z);
            int k = rb_recv(in[i], d, 64, 0);
            OK(k);
            for (int j = 0; j < k; j++)
                CHECK(packet_read(z[i], &d[j]) < shared->next);
            CHECK(rb_return(z[i], d, k) == k);
            n += k;
        }
        service_all(c, z);
        check_conservation(c);
        last = n || !all_open ? 0 : last + 1;
    }
    for (uint32_t i = 0; i < QUEUES; i++) { /* the places work */
        uint64_t next = 1000000;
        CHECK(out[i] && send_packets(out[i], BURST, &next) == BURST);
        int k = 0;
        for (int turn = 0; turn < 4 && k < BURST; turn++) { /* at once, or by a hop that a handle passes on */
            service_all(c, z);
            OK(k += rb_recv(in[i], d + k, 64 - k, 0));
        }
        CHECK(k == BURST && rb_return(z[i], d, BURST) == BURST);
    }
    for (int turn = 0; turn < 4; turn++)
        service_all(c, z);
    check_all_home(c);
    for (uint32_t i = 0; i < QUEUES; i++)
        rb_cluster_close(z[i]);
    rb_cluster_close(c);
    OK(rb_cluster_attach(cluster_id, &c));
    check_all_home(c);
    CHECK(check_conservation(c).free == 0);
    rb_cluster_close(c);
}

static double spread(long k)
{
    double at = 0, step = 0.5;
    for (k++; k; k /= 2, step /= 2)
        at += (double)(k % 2) * step;
    return at;
}

#define MOST_STEPS 25000
static void stepped(const char *what, void (*begin)(void), void (*begin_op)(void), long begin_at, void (*prepare)(void), void (*op)(void))
{
    long count = 0, n = 1, tried = 0, points = getenv("RB_POINTS") ? atol(getenv("RB_POINTS")) : 25;
    int whole = 0, came_to_its_end = 0;
    uint64_t seed = rb_now_ns(), until = rb_mono_ns() + (getenv("RB_SECONDS") ? strtoull(getenv("RB_SECONDS"), NULL, 0) * 1000000000u : 800000000u);
    for (long k = -1; k < n && (k < 4 || rb_mono_ns() < until); k++, tried++) {
        rb_cluster *c = make_cluster(++cluster_id, 2048, QUEUES, SLOTS);
        memset(shared, 0, sizeof *shared);
        if (begin)
            killed_after(begin_at, begin, begin_op, &whole);
        long steps = k < 0 ? MOST_STEPS : !came_to_its_end && k % 2 ? -(long)(test_random(&seed) % 1000000) : (long)((double)count * spread(k));
        long did = killed_after(steps, prepare, op, &whole);
        if (k < 0) {
            count = did;
            came_to_its_end = whole;
            n = points;
        }
        successors(k & 1);
        rb_cluster_close(c);
        OK(rb_cluster_destroy(cluster_id, 1));
    }
    printf("   %s: %ld instructions%s, killed at %ld points\n", what, count, came_to_its_end ? "" : " and more (the rest by the clock)", tried);
    CHECK(count > 20);
}

static void killed_at_any_instruction(void)
{
    stepped("fan-out", NULL, NULL, 0, open_outputs, op_fan);
    stepped("take", NULL, NULL, 0, prepare_take, op_take);
    stepped("renew", NULL, NULL, 0, prepare_renew, op_take);
    stepped("fan-out of borrowed packets", NULL, NULL, 0, prepare_borrowed, op_fan_borrowed);
    stepped("take of borrowed packets", NULL, NULL, 0, prepare_take_borrowed, op_take);
    stepped("a consumer that sends on", NULL, NULL, 0, prepare_on, op_on);
    stepped("a bit that moves", NULL, NULL, 0, prepare_vm, op_moved);
    stepped("detach of a VM", NULL, NULL, 0, prepare_vm, op_detach);
    stepped("close", NULL, NULL, 0, prepare_take, op_close);
}

static void killed_while_it_recovers(void)
{
    static const long at[] = {900, 1500, 2600};
    for (unsigned i = 0; i < sizeof at / sizeof *at; i++) {
        stepped("adopt after a fan-out", open_outputs, op_fan, at[i], prepare_adopt, op_adopt);
        stepped("reap after a fan-out of borrowed packets", prepare_borrowed, op_fan_borrowed, at[i], prepare_adopt, op_reap);
    }
    stepped("reap after a bit moved", prepare_vm, op_moved, 2000, prepare_adopt, op_reap);
}

/* ---- by the clock ------------------------------------------------------------------------------------------------------- */

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

static void run_fan(void)
{
    rb_desc d[BURST];
    OK(rb_cluster_attach(cluster_id, &book));
    OK(rb_fan_open(&fan, book));
    all = 0;
    for (uint32_t i = 0; i < OUT; i++) {
        int bit = rb_fan_add(fan, tx[i] = open_soon(book, i, RB_TX));
        OK(bit);
        all |= 1ull << bit;
    }
    for (;;) {
        OK(rb_service(book));
        int n = rb_alloc(tx[0], d, BURST);
        OK(n);
        for (int i = 0; i < n; i++)
            packet_write(book, &d[i], __atomic_fetch_add(&shared->next, 1, __ATOMIC_RELAXED));
        fan_out(d, n);
        if (n == 0)
            nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
    }
}

static void consume(uint32_t queue)
{
    rb_cluster *c;
    rb_desc d[BURST * 2];
    uint64_t last = 0;
    OK(rb_cluster_attach(cluster_id, &c));
    rb_end *in = open_soon(c, queue, RB_RX);
    for (uint64_t round = 0;; round++) {
        int n = rb_recv(in, d, 1 + (int)(round % (BURST * 2)), 10);
        OK(n);
        for (int i = 0; i < n; i++) {
            uint64_t sequence = packet_read(c, &d[i]);
            CHECK(sequence >= last);
            last = sequence + 1;
        }
        __atomic_add_fetch(&shared->got[queue], (uint64_t)n, __ATOMIC_RELAXED);
        for (int i = n; i-- > 0;) /* in some order */
            CHECK(rb_return(c, &d[i], 1) == 1);
    }
}
static void run_first(void) { consume(0); }
static void run_second(void) { consume(1); }
static void run_last(void) { consume(ON); }

static void run_middle(void)
{
    rb_cluster *c;
    rb_desc d[BURST];
    OK(rb_cluster_attach(cluster_id, &c));
    rb_end *in = open_soon(c, 2, RB_RX), *on = open_soon(c, ON, RB_TX);
    for (;;) {
        int n = rb_recv(in, d, BURST, 10), sent = 0;
        OK(n);
        while (sent < n) {
            int k = rb_send(on, d + sent, n - sent, 10);
            OK(k);
            sent += k;
        }
        OK(rb_service(c));
    }
}

static void run_reaper(void)
{
    for (;;) {
        rb_cluster *c;
        OK(rb_cluster_attach(cluster_id, &c));
        int rc = rb_reap_all(c);
        CHECK(rc >= 0 || rc == -EBUSY);
        rb_cluster_close(c);
        nanosleep(&(struct timespec){.tv_nsec = 3000000}, NULL);
    }
}

enum { ROLES = 6 };
static void (*const roles[ROLES])(void) = {run_fan, run_first, run_second, run_middle, run_last, run_reaper};

static pid_t start(void (*role)(void))
{
    fflush(stdout);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        alarm(120);
        role();
        _exit(1);
    }
    return pid;
}

static void end_child(pid_t pid)
{
    int status;
    CHECK(waitpid(pid, &status, WNOHANG) == 0); /* alive until now: no failed check of its own */
    kill(pid, SIGKILL);
    CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

static uint64_t arrived(void)
{
    uint64_t n = 0;
    for (int i = 0; i < QUEUES; i++)
        n += __atomic_load_n(&shared->got[i], __ATOMIC_RELAXED);
    return n;
}

static void kill_at_random(unsigned victims, int kills, uint64_t seed)
{
    rb_cluster *c = make_cluster(++cluster_id, 2048, QUEUES, SLOTS);
    pid_t pid[ROLES];
    memset(shared, 0, sizeof *shared);
    for (int i = 0; i < ROLES; i++)
        pid[i] = start(roles[i]);
    uint64_t last = 0, since = rb_mono_ns();
    for (int k = 0; k < kills;) {
        nanosleep(&(struct timespec){.tv_nsec = (long)(test_random(&seed) % 6000000)}, NULL);
        unsigned who = (unsigned)test_random(&seed) & victims;
        if (test_random(&seed) % 3)
            who &= 1u << test_random(&seed) % ROLES;
        for (int i = 0; i < ROLES; i++)
            if (who & 1u << i) {
                end_child(pid[i]);
                k++;
            }
        for (int i = 0; i < ROLES; i++)
            if (who & 1u << i)
                pid[i] = start(roles[i]);
        if (arrived() != last)
            since = rb_mono_ns();
        last = arrived();
        CHECK(rb_mono_ns() - since < 10000000000ull); /* never wedged */
    }
    for (int q = 0; q < QUEUES; q++) { /* it flows on, to each */
        if (q == 2 || q == IN)
            continue;
        uint64_t before = __atomic_load_n(&shared->got[q], __ATOMIC_RELAXED), until = rb_mono_ns() + 10000000000ull;
        while (__atomic_load_n(&shared->got[q], __ATOMIC_RELAXED) < before + 100 && rb_mono_ns() < until)
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        CHECK(__atomic_load_n(&shared->got[q], __ATOMIC_RELAXED) >= before + 100);
    }
    for (int i = 0; i < ROLES; i++)
        end_child(pid[i]);
    uint64_t got = arrived(), tried = shared->next;
    OK(rb_reap_all(c));
    shared->next = UINT64_MAX;
    successors(0);
    rb_cluster_close(c);
    OK(rb_cluster_destroy(cluster_id, 1));
    printf("   %d kills: %llu packets tried, %llu received\n", kills, (unsigned long long)tried, (unsigned long long)got);
}

static void killed_at_random_moments(void)
{
    uint64_t seed = getenv("RB_SEED") ? strtoull(getenv("RB_SEED"), NULL, 0) : rb_now_ns();
    int kills = getenv("RB_KILLS") ? atoi(getenv("RB_KILLS")) : 60;
    printf("   RB_SEED=%llu\n", (unsigned long long)seed);
    kill_at_random(1 | 32, kills, seed + 1);      /* who fans out */
    kill_at_random(2 | 4 | 16 | 32, kills, seed + 2); /* consumers */
    kill_at_random(8 | 32, kills, seed + 3);      /* who sends on */
    kill_at_random(63, kills, seed + 4);
}

int main(void)
{
    private_directories();
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
