/* SPDX-License-Identifier: Apache-2.0
 *
 * A VM that writes whatever it likes into its lane: the host does not crash, does not hang, accepts no buffer that the VM did not hold, and nobody else
 * loses anything. Forged descriptors one by one, then random bytes all over the lane while the host sends and receives. Nor do other VMs believe what
 * it writes over the header of its pool.
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

/* A packet that two VMs share, sent on by one of them and in a program's hand, and then "given back empty", or too long for its buffer, by the other:
 * it is that program's alone now, and not free. */
static void a_shared_buffer_in_hand_is_not_freed_by_another_vm(void)
{
    for (int odd = 0; odd < 2; odd++) {
        rb_desc d, got[64], mine, fresh[64];
        uint64_t missed, mask = 0;
        rb_fan *fan;
        rb_end *tx[2], *rx[2], *vm_rx[2], *vm_tx[2];
        rb_cluster *vm[2];
        int lanes[2];
        host = make_cluster(++id, 4096, 4, 64);
        OK(rb_fan_open(&fan, host));
        for (uint32_t i = 0; i < 2; i++) {
            char name[8];
            snprintf(name, sizeof name, "vm%u", i);
            OK(lanes[i] = rb_lane_create(host, name, name));
            OK(rb_lane_bind(host, (uint32_t)lanes[i], 2 * i, RB_VM_RX));
            OK(rb_lane_bind(host, (uint32_t)lanes[i], 2 * i + 1, RB_VM_TX));
            tx[i] = open_end(host, 2 * i, RB_TX);
            rx[i] = open_end(host, 2 * i + 1, RB_RX);
            vm[i] = attach_guest(host, lanes[i], 0);
            vm_rx[i] = open_end(vm[i], 2 * i, RB_RX);
            vm_tx[i] = open_end(vm[i], 2 * i + 1, RB_TX);
            int bit = rb_fan_add(fan, tx[i]);
            OK(bit);
            mask |= 1ull << bit;
        }
        OK(rb_service(host));
        CHECK(rb_alloc(tx[0], &d, 1) == 1);
        packet_write(host, &d, 7);
        CHECK(rb_fan_send(fan, &d, &mask, 1, &missed) == 1 && !missed);
        CHECK(check_conservation(host).shared == 1);
        for (int i = 0; i < 2; i++)
            CHECK(rb_recv(vm_rx[i], got, 64, 0) == 1 && got[0].handle == d.handle);
        gtx = vm_tx[0];
        forge(&d, 1);
        CHECK(rb_recv(rx[0], &mine, 1, 0) == 1 && mine.handle == d.handle);
        rb_desc back = {.handle = d.handle};
        rb_desc_set(&back, odd ? 0x7fff : 0, odd ? 0x3fff : 64, 0);
        gtx = vm_tx[1];
        forge(&back, 1);
        CHECK(rb_recv(rx[1], got, 64, 0) == 0);
        for (uint32_t i = 0; i < host->server->free; i++)
            CHECK(host->server->stack[i] != mine.handle);
        int k = rb_alloc(tx[0], fresh, 64);
        OK(k);
        for (int i = 0; i < k; i++)
            CHECK(fresh[i].handle != mine.handle);
        CHECK(packet_read(host, &mine) == 7);
        CHECK(rb_return(host, fresh, k) == k && rb_return(host, &mine, 1) == 1);
        CHECK(host->errors == 0);
        check_conservation(host);
        rb_fan_close(fan);
        for (int i = 0; i < 2; i++) {
            rb_cluster_close(vm[i]);
            rb_close(rx[i]);
            OK(rb_lane_remove(host, (uint32_t)lanes[i], 0));
        }
        OK(rb_service(host));
        check_all_home(host);
        rb_cluster_close(host);
        OK(rb_cluster_destroy(id, 1));
    }
}

/* The header of a pool lies in it, and a VM that transmits from a pool of its own can make it say anything: that it is the common pool, another VM's,
 * the lane, or of another version. VMs that are attached later still see what the host gave them. */
static void a_pools_header_makes_it_no_other_segment(void)
{
    static const struct lie {
        uint32_t kind, segment, abi, buffers, buffer_size, cluster;
    } lies[] = {
        {RB_KIND_POOL, 0, RB_ABI_VERSION, 4096, 256, 0}, {RB_KIND_POOL, 2, RB_ABI_VERSION, 512, 256, 0},     {RB_KIND_LANE, 0, RB_ABI_VERSION, 512, 256, 0},
        {RB_KIND_POOL, 1, RB_ABI_VERSION + 1, 512, 256, 0}, {RB_KIND_POOL, 1, RB_ABI_VERSION, 1u << 30, 256, 0}, {RB_KIND_POOL, 1, RB_ABI_VERSION, 0, 256, 0},
        {RB_KIND_POOL, 1, RB_ABI_VERSION, 512, 4096, 0}, {RB_KIND_POOL, 1, RB_ABI_VERSION, 512, 256, 1},
    };
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        const struct lie *lie = &lies[i];
        int lanes[3];
        host = make_cluster(++id, 4096, 3, 64);
        for (int v = 0; v < 3; v++) {
            char name[8];
            snprintf(name, sizeof name, "vm%d", v);
            OK(lanes[v] = rb_lane_create(host, name, name));
            if (v < 2)
                CHECK(rb_lane_pool(host, (uint32_t)lanes[v], 512) == v + 1);
        }
        for (uint32_t p = 0; p < 3; p++) {
            rb_desc d = {.handle = p << 24 | 5};
            rb_desc_set(&d, sizeof(struct packet), 64, 0);
            packet_write(host, &d, p);
        }
        struct rb_header *h = (struct rb_header *)host->pool[1];
        const uint64_t size = host->pool_size[1];
        h->kind = lie->kind;
        h->segment = lie->segment;
        h->abi = lie->abi;
        h->buffers = lie->buffers;
        h->buffer_size = lie->buffer_size;
        h->cluster = id + lie->cluster;
        OK(rb_lane_bind(host, (uint32_t)lanes[2], 0, RB_VM_RX));
        rb_cluster *victim = attach_guest(host, lanes[2], 0);
        CHECK(victim->lanes == 1);
        for (uint32_t p = 0; p < 3; p++) {
            rb_desc d = {.handle = p << 24 | 5};
            rb_desc_set(&d, sizeof(struct packet), 64, 0);
            if (p != 1)
                CHECK(packet_read(victim, &d) == p);
        }
        CHECK(victim->pool_count[0] == 4096 && (uint64_t)victim->pool_count[1] * 256 <= size && victim->pool_count[2] == 512);
        CHECK(rb_number(victim, 0x01000000 | 512) == UINT32_MAX || (uint64_t)512 * 256 < size);
        rb_cluster_close(victim);
        for (int v = 0; v < 3; v++)
            OK(rb_lane_remove(host, (uint32_t)lanes[v], 0));
        rb_cluster_close(host);
        OK(rb_cluster_destroy(id, 1));
    }
}

/* Nor does a guest without the common pool begin: every handle would be out of range. */
static void no_common_pool_is_no_attachment(void)
{
    rb_segment_info info[8];
    rb_segment seg[2] = {0};
    rb_cluster *victim;
    host = make_cluster(++id, 4096, 1, 64);
    OK(lane = rb_lane_create(host, "vm", "1:1"));
    CHECK(rb_lane_pool(host, (uint32_t)lane, 512) == 1);
    int n = rb_cluster_segments(host, info, 8), k = 0;
    for (int i = 0; i < n; i++)
        if (info[i].kind == 1 ? info[i].id == 1 : (int)info[i].id == lane)
            seg[k++] = (rb_segment){.struct_size = sizeof *seg, .fd = open(info[i].path, O_RDWR | O_CLOEXEC), .size = info[i].size, .writable = 1};
    CHECK(k == 2);
    CHECK(rb_cluster_attach_segments(id, seg, 2, &victim) == -ENODEV && strstr(rb_error(), "without a pool"));
    close(seg[0].fd);
    close(seg[1].fd);
    OK(rb_lane_remove(host, (uint32_t)lane, 0));
    rb_cluster_close(host);
    OK(rb_cluster_destroy(id, 1));
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
    RUN(a_shared_buffer_in_hand_is_not_freed_by_another_vm);
    RUN(a_pools_header_makes_it_no_other_segment);
    RUN(no_common_pool_is_no_attachment);
    RUN(random_bytes_in_the_lane_harm_nobody_else);
    return 0;
}
