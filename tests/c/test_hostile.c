/* SPDX-License-Identifier: Apache-2.0
 *
 * A VM that writes whatever it likes into its lane: the host does not crash, does not hang, accepts no buffer that the VM did not hold, and nobody else
 * loses anything. Forged descriptors one by one, then random bytes all over the lane while the host sends and receives.
 */
#include "world.h"

static uint32_t id = 500;
static rb_cluster *host, *guest;
static rb_end *to_vm, *from_vm, *grx, *gtx;
static int lane;

static void begin(void)
{
    host = make_cluster(++id, 4096, 4, 64);
    OK(lane = rb_lane_create(host, "vm", "1:1"));
    OK(rb_lane_bind(host, (uint32_t)lane, 0, RB_VM_RX));
    OK(rb_lane_bind(host, (uint32_t)lane, 1, RB_VM_TX));
    to_vm = open_end(host, 0, RB_TX);
    from_vm = open_end(host, 1, RB_RX);
    guest = attach_guest(host, lane, 0);
    grx = open_end(guest, 0, RB_RX);
    gtx = open_end(guest, 1, RB_TX);
    OK(rb_service(host));
    CHECK(rb_count(grx) == 0);
}

static void finish(void)
{
    rb_cluster_close(guest);
    rb_close(from_vm);
    OK(rb_lane_remove(host, (uint32_t)lane, 0));
    rb_cluster *left;
    rb_desc d[64];
    OK(rb_cluster_attach(id, &left)); /* what was unread is there for a receiver on the host, and lent to it alone */
    rb_end *rx = open_end(left, 0, RB_RX);
    OK(rb_service(host));
    check_conservation(host);
    for (int i = 0; i < 10; i++) {
        int k = rb_recv(rx, d, 64, 0);
        OK(k);
        CHECK(rb_return(left, d, k) == k);
    }
    rb_cluster_close(left);
    OK(rb_service(host));
    rb_cluster_close(host);
    OK(rb_cluster_attach(id, &host));
    check_all_home(host);
    CHECK(check_conservation(host).nobody == 4095);
    rb_cluster_close(host);
    OK(rb_cluster_destroy(id, 1));
}

static uint64_t foreign(uint32_t queue)
{
    rb_queue_info q;
    OK(rb_queue_get_info(host, queue, &q));
    return q.foreign;
}

/* What the VM puts into its forward ring by hand. */
static void forge(const rb_desc *d, uint32_t n)
{
    struct rb_ring *r = &gtx->ring;
    for (uint32_t i = 0; i < n; i++)
        r->forward[(r->p + i) & r->mask] = (struct rb_slot){d[i].handle, d[i].word, d[i].ts};
    r->p += n;
    rb_store_release(&r->ctl->p, r->p);
}

static void forged_descriptors_are_refused_and_counted(void)
{
    rb_desc d[8], got[64];
    begin();
    CHECK(rb_alloc(gtx, d, 4) == 4);
    for (int i = 0; i < 4; i++)
        packet_write(guest, &d[i], (uint64_t)i);
    uint64_t n = 0;
    rb_desc mine[2];
    CHECK(rb_alloc(to_vm, mine, 2) == 2); /* in the host's own hand */
    const uint32_t forged[] = {mine[0].handle, mine[1].handle, 1, 4095, 4096, 0xffffff, 0x01000001, 0xff000001, 0xffffffff, 0x01000000};
    for (size_t i = 0; i < sizeof forged / sizeof *forged; i++) {
        uint64_t before = foreign(1);
        rb_desc f = d[0];
        f.handle = forged[i];
        int held = forged[i] == d[0].handle;
        for (uint32_t at = 0; at < host->buffers; at++) /* some numbers may happen to be lent to the VM */
            held |= rb_handle_of(host, at) == f.handle && RB_WORD_KIND(rb_get(&host->server->ledger[at])) == RB_W_LENT;
        if (held)
            continue;
        forge(&f, 1);
        CHECK(rb_recv(from_vm, got, 64, 0) == 0);
        CHECK(foreign(1) == before + 1);
    }
    CHECK(rb_return(host, mine, 2) == 2);
    rb_desc twice[2] = {d[0], d[0]};
    uint64_t before = foreign(1);
    forge(twice, 2);
    CHECK(rb_recv(from_vm, got, 64, 0) == 1 && got[0].handle == d[0].handle);
    CHECK(foreign(1) == before + 1);
    CHECK(rb_return(host, got, 1) == 1);
    rb_desc big = d[1]; /* a length that does not fit: the buffer is home, the packet dropped */
    rb_desc_set(&big, 256, 64, 0);
    forge(&big, 1);
    CHECK(rb_recv(from_vm, got, 64, 0) == 0);
    rb_queue_info q;
    OK(rb_queue_get_info(host, 1, &q));
    CHECK(q.drops[RB_DROP_BAD] == 1);
    /* Indices out of bounds: nothing to take, no room, until a program comes anew. */
    rb_store_release(&gtx->ring.ctl->p, gtx->ring.p + 65);
    CHECK(rb_recv(from_vm, got, 64, 0) == 0);
    rb_store_release(&gtx->ring.ctl->p, gtx->ring.p);
    rb_store_release(&grx->ring.ctl->c, 77777);
    int sent = 0;
    for (int i = 0; i < 6; i++)
        sent += send_packets(to_vm, 16, &n);
    CHECK(sent == 64); /* what the host knew to be free */
    rb_store_release(&grx->ring.ctl->c, 0);
    rb_store_release(&grx->ring.ctl->rp, 1u << 31);
    OK(rb_service(host));
    rb_store_release(&grx->ring.ctl->rp, 0);
    /* Returned without having been held, and twice. */
    CHECK(rb_recv(grx, got, 8, 0) >= 1);
    before = foreign(0);
    const rb_desc back[5] = {{.handle = got[0].handle}, {.handle = got[0].handle}, {.handle = 0}, {.handle = 4000}, {.handle = 0xdeadbeef}};
    rb_ring_give(&grx->ring, back, 5);
    rb_ring_gave(&grx->ring);
    OK(rb_service(host));
    CHECK(foreign(0) >= before + 4);
    check_conservation(host);
    finish();
}

static int stop;
static void *scribble(void *arg)
{
    uint64_t seed = *(uint64_t *)arg;
    uint8_t *memory = (uint8_t *)guest->lane[0].lane;
    struct rb_lane *l = guest->lane[0].lane;
    uint64_t rings = RB_LANE_RINGS_AT + 2 * (64 * 16 + 256 * 4) + 256;
    while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
        uint64_t v = test_random(&seed), q = v >> 60 & 1;
        switch (v % 8) {
        case 0: /* anything, anywhere: header, table, indices, rings */
            __atomic_store_n((uint32_t *)(memory + (v >> 8) % rings / 4 * 4), (uint32_t)test_random(&seed), __ATOMIC_RELAXED);
            break;
        case 1:
            rb_store_release(&l->ctl[q].session, test_random(&seed));
            break;
        case 2: /* indices that are almost right */
            rb_store_release(&l->ctl[q].p, rb_get(&l->ctl[q].c) + (uint32_t)(v >> 8) % 70);
            break;
        case 3:
            rb_store_release(&l->ctl[q].c, rb_get(&l->ctl[q].p) - (uint32_t)(v >> 8) % 70);
            break;
        case 4:
            rb_store_release(&l->ctl[q].rp, rb_get(&l->ctl[q].rc) + (uint32_t)(v >> 8) % 260);
            break;
        default: { /* handles that exist, in any slot */
            uint8_t *slot = memory + RB_LANE_RINGS_AT + (v >> 8) % (rings - RB_LANE_RINGS_AT) / 4 * 4;
            __atomic_store_n((uint32_t *)slot, (uint32_t)(v >> 20) % 4200, __ATOMIC_RELAXED);
        }
        }
    }
    return NULL;
}

/* Meanwhile another queue, between two honest ends of the host, must not lose or corrupt a single packet. */
static void random_bytes_in_the_lane_harm_nobody_else(void)
{
    uint64_t seed = getenv("RB_SEED") ? strtoull(getenv("RB_SEED"), NULL, 0) : rb_now_ns(), seeds = seed, honest = 0, expect = 0, n = 0;
    printf("   RB_SEED=%llu\n", (unsigned long long)seed);
    begin();
    rb_end *tx = open_end(host, 2, RB_TX);
    rb_cluster *other;
    OK(rb_cluster_attach(id, &other));
    rb_end *rx = open_end(other, 2, RB_RX);
    OK(rb_service(host));
    pthread_t thread;
    uint64_t until = rb_mono_ns() + 4000000000ull, received = 0, pieces = 0;
    __atomic_store_n(&stop, 0, __ATOMIC_RELAXED);
    CHECK(pthread_create(&thread, NULL, scribble, &seeds) == 0);
    while (rb_mono_ns() < until) {
        rb_desc d[64];
        uint64_t begun = rb_mono_ns();
        send_packets(to_vm, 16, &n);
        int k = rb_recv(from_vm, d, 64, 0);
        OK(k);
        for (int i = 0; i < k; i++) { /* whatever it says, it is inside the pool, and of bytes that the VM may write */
            CHECK(rb_data(host, &d[i]) && rb_desc_offset(&d[i]) + rb_desc_length(&d[i]) <= 256);
            uint32_t at = rb_number(host, d[i].handle);
            CHECK(host->where[at] == RB_HAND_HOME && rb_get(&host->server->ledger[at]) == RB_WORD(RB_W_HOME, 0));
        }
        received += (uint64_t)k;
        CHECK(rb_return(host, d, k) == k);
        OK(rb_service(host));
        send_packets(tx, 16, &honest);
        k = rb_recv(rx, d, 64, 0);
        OK(k);
        for (int i = 0; i < k; i++)
            CHECK(packet_read(other, &d[i]) == expect++);
        CHECK(rb_return(other, d, k) == k);
        pieces++;
        CHECK(rb_mono_ns() - begun < 3000000000ull); /* never hangs */
        if (pieces % 256 == 0) { /* and never lends twice: free ones are on the stack once */
            uint8_t *on_stack = calloc(host->buffers, 1);
            for (uint32_t i = 0; i < host->server->free; i++) {
                uint32_t at = rb_number(host, host->server->stack[i]);
                CHECK(at != UINT32_MAX && !on_stack[at] && rb_get(&host->server->ledger[at]) == RB_WORD(RB_W_HOME, 0));
                on_stack[at] = 1;
            }
            free(on_stack);
        }
    }
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    pthread_join(thread, NULL);
    printf("   %llu packets to the VM, %llu from it, %llu refused, %llu honest ones beside it\n", (unsigned long long)n, (unsigned long long)received,
           (unsigned long long)(foreign(0) + foreign(1)), (unsigned long long)expect);
    CHECK(expect > 1000 && foreign(0) + foreign(1) > 100);
    rb_close(rx);
    rb_cluster_close(other);
    finish();
}

int main(void)
{
    private_directories();
    alarm(100);
    RUN(forged_descriptors_are_refused_and_counted);
    RUN(random_bytes_in_the_lane_harm_nobody_else);
    return 0;
}
