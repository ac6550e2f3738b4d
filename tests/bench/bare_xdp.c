/* SPDX-License-Identifier: Apache-2.0
 *
 * A bare AF_XDP loop, the yardstick of `ringbar bench nic`: raw sockets and rings, one program of five instructions, and nothing else: no
 * book of who has which buffer, no checks, no other programs beside it. Same ring sizes, mode (driver, with a copy) and burst as
 * ringbar's. Arguments: nic_bench.h.
 */
#include "nic_bench.h"

#include <linux/bpf.h>
#include <linux/if_link.h>
#include <linux/if_xdp.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#ifndef SOL_XDP
#define SOL_XDP 283
#endif
#define CHUNK 2048u
#define CHUNKS 16384u

struct ring {
    _Atomic uint32_t *producer, *consumer, *flags;
    void *entries;
    uint32_t mask, local, seen;
};
struct sock {
    int fd;
    struct ring fill, comp, rx, tx;
};

static uint8_t *memory;
static uint64_t stack[CHUNKS]; /* free chunks, last in first out */
static uint32_t n_free;

static long bpf(int cmd, union bpf_attr *attr) { return syscall(SYS_bpf, cmd, attr, sizeof *attr); }

static void map_ring(struct ring *r, int fd, off_t at, const struct xdp_ring_offset *off, uint32_t size, size_t entry)
{
    uint8_t *map = mmap(NULL, off->desc + size * entry, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, at);
    if (map == MAP_FAILED)
        die("mmap of a ring: %s", strerror(errno));
    *r = (struct ring){(_Atomic uint32_t *)(void *)(map + off->producer), (_Atomic uint32_t *)(void *)(map + off->consumer),
                       (_Atomic uint32_t *)(void *)(map + off->flags), map + off->desc, size - 1, 0, 0};
}

static void open_socket(struct sock *s, const char *ifname)
{
    struct xdp_umem_reg reg = {.addr = (uintptr_t)memory, .len = (uint64_t)CHUNK * CHUNKS, .chunk_size = CHUNK, .headroom = 64};
    struct xdp_mmap_offsets off;
    socklen_t len = sizeof off;
    uint32_t size = opt.ring;
    int bytes = (int)size * 8192;
    s->fd = socket(AF_XDP, SOCK_RAW, 0);
    if (s->fd < 0 || setsockopt(s->fd, SOL_XDP, XDP_UMEM_REG, &reg, sizeof reg) ||
        setsockopt(s->fd, SOL_XDP, XDP_UMEM_FILL_RING, &size, sizeof size) || setsockopt(s->fd, SOL_XDP, XDP_UMEM_COMPLETION_RING, &size, sizeof size) ||
        setsockopt(s->fd, SOL_XDP, XDP_RX_RING, &size, sizeof size) || setsockopt(s->fd, SOL_XDP, XDP_TX_RING, &size, sizeof size) ||
        setsockopt(s->fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes) || getsockopt(s->fd, SOL_XDP, XDP_MMAP_OFFSETS, &off, &len))
        die("AF_XDP socket: %s", strerror(errno));
    map_ring(&s->fill, s->fd, XDP_UMEM_PGOFF_FILL_RING, &off.fr, size, 8);
    map_ring(&s->comp, s->fd, (off_t)XDP_UMEM_PGOFF_COMPLETION_RING, &off.cr, size, 8);
    map_ring(&s->rx, s->fd, XDP_PGOFF_RX_RING, &off.rx, size, sizeof(struct xdp_desc));
    map_ring(&s->tx, s->fd, XDP_PGOFF_TX_RING, &off.tx, size, sizeof(struct xdp_desc));
    struct sockaddr_xdp where = {.sxdp_family = AF_XDP, .sxdp_flags = XDP_COPY | XDP_USE_NEED_WAKEUP, .sxdp_ifindex = if_nametoindex(ifname)};
    int tries = 200; /* the previous run's socket goes some milliseconds after its process */
    while (bind(s->fd, (struct sockaddr *)&where, sizeof where))
        if (errno != EBUSY || !tries--)
            die("bind to %s: %s", ifname, strerror(errno));
        else
            usleep(5000);
}

/* r0 = redirect_map(xsks, queue, XDP_PASS), or XDP_PASS alone */
static void attach(const char *ifname, int xsk, bool passes)
{
    union bpf_attr map = {.map_type = BPF_MAP_TYPE_XSKMAP, .key_size = 4, .value_size = 4, .max_entries = 64};
    int map_fd = (int)bpf(BPF_MAP_CREATE, &map);
    uint32_t queue = 0;
    union bpf_attr put = {.map_fd = (uint32_t)map_fd, .key = (uintptr_t)&queue, .value = (uintptr_t)&xsk};
    if (map_fd < 0 || bpf(BPF_MAP_UPDATE_ELEM, &put))
        die("XSKMAP: %s", strerror(errno));
    struct bpf_insn program[] = {
        {.code = BPF_LDX | BPF_MEM | BPF_W, .dst_reg = BPF_REG_2, .src_reg = BPF_REG_1, .off = offsetof(struct xdp_md, rx_queue_index)},
        {.code = BPF_LD | BPF_IMM | BPF_DW, .dst_reg = BPF_REG_1, .src_reg = BPF_PSEUDO_MAP_FD, .imm = map_fd},
        {0},
        {.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_3, .imm = XDP_PASS},
        passes ? (struct bpf_insn){.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = XDP_PASS}
               : (struct bpf_insn){.code = BPF_JMP | BPF_CALL, .imm = BPF_FUNC_redirect_map},
        {.code = BPF_JMP | BPF_EXIT},
    };
    union bpf_attr load = {.prog_type = BPF_PROG_TYPE_XDP, .insns = (uintptr_t)program, .insn_cnt = 6, .license = (uintptr_t) "Apache-2.0"};
    int prog = (int)bpf(BPF_PROG_LOAD, &load);
    union bpf_attr link = {.link_create = {.prog_fd = (uint32_t)prog, .target_ifindex = if_nametoindex(ifname), .attach_type = BPF_XDP,
                                           .flags = XDP_FLAGS_DRV_MODE}};
    if (prog < 0 || bpf(BPF_LINK_CREATE, &link) < 0) /* the link goes with this process */
        die("the XDP program of %s: %s", ifname, strerror(errno));
}

static inline uint32_t filled(struct ring *r, uint32_t most)
{
    if (r->seen == r->local)
        r->seen = atomic_load_explicit(r->producer, memory_order_acquire);
    uint32_t n = r->seen - r->local;
    return n < most ? n : most;
}

static inline uint32_t room(struct ring *r, uint32_t most)
{
    if (r->seen - r->local < most)
        r->seen = atomic_load_explicit(r->consumer, memory_order_acquire) + r->mask + 1;
    uint32_t n = r->seen - r->local;
    return n < most ? n : most;
}

static inline bool wants_call(const struct ring *r) { return atomic_load_explicit(r->flags, memory_order_relaxed) & XDP_RING_NEED_WAKEUP; }

static inline void refill(struct sock *s)
{
    struct ring *r = &s->fill;
    uint64_t *entries = r->entries;
    uint32_t k = room(r, opt.burst);
    k = k < n_free ? k : n_free;
    if (k < opt.burst)
        return;
    for (uint32_t i = 0; i < k; i++)
        entries[(r->local + i) & r->mask] = stack[--n_free];
    r->local += k;
    atomic_store_explicit(r->producer, r->local, memory_order_release);
}

static inline uint32_t receive(struct sock *s, struct xdp_desc *out)
{
    struct ring *r = &s->rx;
    const struct xdp_desc *entries = r->entries;
    uint32_t n = filled(r, opt.burst);
    for (uint32_t i = 0; i < n; i++)
        out[i] = entries[(r->local + i) & r->mask];
    r->local += n;
    if (n)
        atomic_store_explicit(r->consumer, r->local, memory_order_release);
    refill(s);
    if (wants_call(&s->fill))
        recvfrom(s->fd, NULL, 0, MSG_DONTWAIT, NULL, NULL);
    return n;
}

static inline void complete(struct sock *s)
{
    struct ring *r = &s->comp;
    const uint64_t *entries = r->entries;
    for (uint32_t n; (n = filled(r, 256)) > 0;) {
        for (uint32_t i = 0; i < n; i++)
            stack[n_free++] = entries[(r->local + i) & r->mask] / CHUNK * CHUNK;
        r->local += n;
        atomic_store_explicit(r->consumer, r->local, memory_order_release);
    }
}

/* Copy mode sends in the system call, 32 frames or so at a time, and says EAGAIN when there are more. */
static inline uint32_t transmit(struct sock *s, const struct xdp_desc *in, uint32_t n)
{
    struct ring *r = &s->tx;
    struct xdp_desc *entries = r->entries;
    complete(s);
    n = room(r, n);
    for (uint32_t i = 0; i < n; i++)
        entries[(r->local + i) & r->mask] = (struct xdp_desc){.addr = in[i].addr, .len = in[i].len};
    r->local += n;
    atomic_store_explicit(r->producer, r->local, memory_order_release);
    while (wants_call(r) && atomic_load_explicit(r->consumer, memory_order_acquire) != r->local)
        if (sendto(s->fd, NULL, 0, MSG_DONTWAIT, NULL, 0) < 0 && errno != EAGAIN)
            break;
    return n;
}

int main(int argc, char **argv)
{
    struct sock in = {.fd = -1}, out = {.fd = -1};
    struct xdp_desc desc[256];
    uint64_t packets = 0;
    arguments(argc, argv);
    memory = mmap(NULL, (size_t)CHUNK * CHUNKS, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        die("no memory");
    for (uint32_t i = 0; i < CHUNKS; i++)
        stack[n_free++] = (uint64_t)i * CHUNK;
    if (opt.out)
        open_socket(&out, opt.out);
    if (opt.in) {
        open_socket(&in, opt.in);
        for (uint32_t i = 0; i < opt.ring / opt.burst; i++)
            refill(&in);
        attach(opt.in, in.fd, !strcmp(opt.mode, "hold"));
    }
    if (!strcmp(opt.mode, "hold")) {
        hold();
        return 0;
    }
    if (!opt.in)
        for (uint32_t i = 0; i < CHUNKS; i++)
            make_frame(memory + (size_t)i * CHUNK);
    for (uint32_t turn = 0; (turn & 15) || go_on(packets); turn++) {
        uint32_t n, k = 0;
        if (opt.in) {
            n = receive(&in, desc);
            run.progress->received += n;
        } else {
            complete(&out);
            n = opt.burst < n_free ? opt.burst : n_free;
            for (uint32_t i = 0; i < n; i++)
                desc[i] = (struct xdp_desc){.addr = stack[--n_free], .len = FRAME_BYTES};
        }
        if (opt.out)
            packets += k = transmit(&out, desc, n);
        else
            packets += n;
        for (uint32_t i = k; i < n; i++) /* not sent: dropped */
            stack[n_free++] = desc[i].addr / CHUNK * CHUNK;
    }
    puts(", \"mode\": \"driver\"}");
    return 0;
}
