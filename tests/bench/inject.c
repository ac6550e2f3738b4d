/* SPDX-License-Identifier: Apache-2.0
 *
 * Frames put into the kernel's stack as if received on an interface, and counted at a UDP socket: inject ringbar|live|tap|veth --out IF --sink IF.
 *
 *   ringbar --out: the interface; this library's stack: device, a burst a call
 *   live    --out: the interface; BPF_PROG_TEST_RUN on one live frame a call
 *   tap     --out: a TAP interface whose frames a tc filter redirects to the interface
 *   veth    --out: a veth interface whose other end's frames a tc filter redirects; sent by AF_PACKET, 64 frames a call
 *
 * --sink is not used but required. Prints what arrived at the socket, million frames a second (nic_bench.h). The socket's thread runs on
 * the other core.
 */
#include "nic_bench.h"
#include "ringbar.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

static _Atomic uint64_t received;

/* A UDP socket on 192.0.2.2 port 9, read as fast as it goes. */
static void *sink(void *arg)
{
    int fd = *(int *)arg;
    static char bytes[64][64];
    struct mmsghdr m[64];
    struct iovec v[64];
    for (int i = 0; i < 64; i++) {
        v[i] = (struct iovec){bytes[i], sizeof bytes[i]};
        m[i] = (struct mmsghdr){.msg_hdr = {.msg_iov = &v[i], .msg_iovlen = 1}};
    }
    for (;;) {
        int n = recvmmsg(fd, m, 64, MSG_WAITFORONE, NULL);
        if (n > 0)
            atomic_fetch_add_explicit(&received, (uint64_t)n, memory_order_relaxed);
    }
    return NULL;
}

static int open_live(void)
{
    struct bpf_insn program[] = {{.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = XDP_PASS}, {.code = BPF_JMP | BPF_EXIT}};
    union bpf_attr load = {.prog_type = BPF_PROG_TYPE_XDP, .insns = (uintptr_t)program, .insn_cnt = 2, .license = (uintptr_t) "Apache-2.0"};
    return (int)syscall(SYS_bpf, BPF_PROG_LOAD, &load, sizeof load);
}

static int open_tap(const char *ifname)
{
    struct ifreq ifr = {.ifr_flags = IFF_TAP | IFF_NO_PI};
    int fd = open("/dev/net/tun", O_RDWR);
    snprintf(ifr.ifr_name, sizeof ifr.ifr_name, "%.15s", ifname);
    return fd < 0 || ioctl(fd, TUNSETIFF, &ifr) ? -1 : fd;
}

static int open_packet(const char *ifname)
{
    struct sockaddr_ll where = {.sll_family = AF_PACKET, .sll_ifindex = (int)if_nametoindex(ifname)};
    int fd = socket(AF_PACKET, SOCK_RAW, 0), one = 1;
    return fd < 0 || bind(fd, (struct sockaddr *)&where, sizeof where) || setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof one) ? -1 : fd;
}

static rb_cluster *cluster;

static rb_end *open_stack(const char *ifname)
{
    rb_cluster_options options = {.struct_size = sizeof options, .buffers = 16384, .sealed = 1};
    char address[32];
    rb_end *end;
    snprintf(address, sizeof address, "stack:%.15s", ifname);
    if (rb_cluster_create((uint32_t)getpid() & 0xffff, &options, &cluster) < 0 || rb_open(&end, cluster, address, RB_TX) < 0)
        die("%s: %s", address, rb_error());
    return end;
}

static void send_burst(rb_end *end, const uint8_t *frame)
{
    rb_desc desc[256];
    int n = rb_alloc(end, desc, (int)opt.burst);
    for (int i = 0; i < n; i++) {
        memcpy(rb_data(cluster, &desc[i]), frame, FRAME_BYTES);
        rb_desc_set(&desc[i], FRAME_BYTES, rb_desc_offset(&desc[i]), 0);
    }
    int k = n ? rb_send(end, desc, n, 0) : 0;
    if (k < 0)
        die("stack: %s", rb_error());
    if (k < n)
        rb_return(cluster, desc + k, n - k);
}

int main(int argc, char **argv)
{
    const char *method = argc > 1 ? argv[1] : "";
    uint8_t frame[FRAME_BYTES];
    char mode[] = "transmit";
    if (argc > 1)
        argv[1] = mode;
    arguments(argc, argv);
    make_frame(frame);
    rb_end *stack = strcmp(method, "ringbar") ? NULL : open_stack(opt.out);
    bool live = !strcmp(method, "live"), tap = !strcmp(method, "tap");
    int fd = stack ? 0 : live ? open_live() : tap ? open_tap(opt.out) : !strcmp(method, "veth") ? open_packet(opt.out) : (errno = EINVAL, -1);
    if (fd < 0)
        die("%s: %s", method, strerror(errno));

    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(9), .sin_addr.s_addr = htonl(0xc0000202)};
    int udp = socket(AF_INET, SOCK_DGRAM, 0), bytes = 1 << 24;
    pthread_t thread;
    setsockopt(udp, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes);
    if (udp < 0 || bind(udp, (struct sockaddr *)&here, sizeof here))
        die("UDP socket: %s", strerror(errno));
    if (pthread_create(&thread, NULL, sink, &udp))
        die("no thread");
    cpu_set_t other;
    CPU_ZERO(&other);
    for (size_t i = 0; i < CPU_SETSIZE; i++)
        if ((int)i != opt.core)
            CPU_SET(i, &other);
    pthread_setaffinity_np(thread, sizeof other, &other);

    struct xdp_md context = {.data_end = sizeof frame, .ingress_ifindex = if_nametoindex(opt.out)};
    struct iovec v = {frame, sizeof frame};
    struct mmsghdr m[64];
    for (int i = 0; i < 64; i++)
        m[i] = (struct mmsghdr){.msg_hdr = {.msg_iov = &v, .msg_iovlen = 1}};
    opt.sink = NULL; /* what counts is what the socket got */
    for (uint32_t turn = 0; (turn & 15) || go_on(atomic_load_explicit(&received, memory_order_relaxed)); turn++) {
        if (stack)
            send_burst(stack, frame);
        else if (live) {
            union bpf_attr one = {.test = {.prog_fd = (uint32_t)fd, .data_in = (uintptr_t)frame, .data_size_in = sizeof frame, .repeat = 1,
                                           .ctx_in = (uintptr_t)&context, .ctx_size_in = sizeof context, .flags = BPF_F_TEST_XDP_LIVE_FRAMES}};
            /* each call takes one of the kernel's 65,534 ids of memory models, which come back after a grace period: ENOSPC is "not yet" */
            if (syscall(SYS_bpf, BPF_PROG_TEST_RUN, &one, sizeof one) && errno != ENOSPC && errno != EINTR && errno != EAGAIN)
                die("live frame: %s", strerror(errno));
        } else if (tap) {
            if (write(fd, frame, sizeof frame) < 0 && errno != EAGAIN)
                die("TAP: %s", strerror(errno));
        } else if (sendmmsg(fd, m, 64, MSG_DONTWAIT) < 0 && errno != EAGAIN && errno != ENOBUFS)
            die("veth: %s", strerror(errno));
    }
    printf(", \"mode\": \"%s\"}\n", method);
    fflush(stdout);
    if (stack)
        rb_cluster_close(cluster);
    _exit(0); /* the socket's thread never ends */
}
