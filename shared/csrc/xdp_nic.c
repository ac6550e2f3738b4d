/* SPDX-License-Identifier: Apache-2.0 */
/* What an interface is like, whether what is asked of it can be, and the words when it cannot. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/capability.h>
#include <linux/ethtool.h>
#include <linux/if_link.h>
#include <linux/if_packet.h>
#include <linux/rtnetlink.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <stddef.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "xdp_internal.h"

#define DEFAULT_RING 2048u
#define DEFAULT_RETRY_MS 500u

/* ---- words and time ---- */

int rb_xdp_fail(struct rb_xdp_error *err, int code, const char *fmt, ...)
{
    if (err) {
        va_list ap;

        va_start(ap, fmt);
        vsnprintf(err->text, sizeof err->text, fmt, ap);
        va_end(ap);
        err->cure[0] = 0;
        err->holder = 0;
    }
    return code;
}

void rb_xdp_cure(struct rb_xdp_error *err, const char *fmt, ...)
{
    if (err) {
        va_list ap;

        va_start(ap, fmt);
        vsnprintf(err->cure, sizeof err->cure, fmt, ap);
        va_end(ap);
    }
}

/* Add to the words that say why it is not better. */
void rb_xdp_note(struct rb_xdp *dev, const char *fmt, ...)
{
    size_t at = strlen(dev->note);
    va_list ap;

    if (at && at + 2 < sizeof dev->note)
        at = (size_t)(stpcpy(dev->note + at, "; ") - dev->note);
    va_start(ap, fmt);
    vsnprintf(dev->note + at, sizeof dev->note - at, fmt, ap);
    va_end(ap);
}

int rb_xdp_fail_permission(struct rb_xdp_error *err, const char *doing)
{
    static const struct { unsigned bit; const char *name; } needed[] = {
        {12, "cap_net_admin"}, {13, "cap_net_raw"}, {39, "cap_bpf"}, {38, "cap_perfmon"}, {21, "cap_sys_admin"},
    };
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {{0, 0, 0}, {0, 0, 0}};
    char missing[128] = "";

    syscall(SYS_capget, &header, data);
    for (unsigned i = 0; i < sizeof needed / sizeof needed[0]; i++)
        if (!(data[needed[i].bit / 32].effective >> (needed[i].bit % 32) & 1)) {
            if (missing[0])
                strcat(missing, ", ");
            strcat(missing, needed[i].name);
        }
    if (!missing[0]) {
        rb_xdp_fail(err, -EPERM, "the kernel does not permit this process to %s, though it has the capabilities", doing);
        rb_xdp_cure(err, "look for a seccomp filter, kernel lockdown, or a user namespace (containers: --privileged)");
        return -EPERM;
    }
    rb_xdp_fail(err, -EPERM, "no permission to %s: this process lacks %s", doing, missing);
    rb_xdp_cure(err, "run it as root, or: setcap cap_net_admin,cap_net_raw,cap_bpf,cap_perfmon,cap_sys_admin,"
                     "cap_ipc_lock+ep PROGRAM (systemd: AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW CAP_BPF CAP_PERFMON CAP_SYS_ADMIN CAP_IPC_LOCK)");
    return -EPERM;
}

int rb_xdp_fail_held(struct rb_xdp_error *err, const char *ifname, uint32_t queue, int pid)
{
    if (pid == getpid()) {
        rb_xdp_fail(err, -EBUSY, "queue %u of %s is already open in this process", queue, ifname);
        rb_xdp_cure(err, "use the device that is open, or close it first");
    } else if (pid) {
        rb_xdp_fail(err, -EBUSY, "queue %u of %s is held by process %d", queue, ifname, pid);
        rb_xdp_cure(err, "stop process %d, or take another queue with zc:%s@N", pid, ifname);
    } else {
        rb_xdp_fail(err, -EBUSY, "queue %u of %s is held by another AF_XDP socket", queue, ifname);
        rb_xdp_cure(err, "stop the program that uses it, or take another queue with zc:%s@N", ifname);
    }
    if (err)
        err->holder = pid;
    return -EBUSY;
}

void rb_xdp_pause(unsigned ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};

    nanosleep(&t, NULL);
}

uint64_t rb_xdp_now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* ---- what the interface is ---- */

int rb_xdp_look_at_nic(const char *name, struct nic *nic, struct rb_xdp_error *err)
{
    struct ethtool_channels ch = {.cmd = ETHTOOL_GCHANNELS};
    struct ifreq ifr;
    size_t len = name ? strlen(name) : 0;
    int fd;

    memset(&ifr, 0, sizeof ifr);
    nic->ifindex = len && len < IFNAMSIZ ? (int)if_nametoindex(name) : 0;
    if (!nic->ifindex) {
        rb_xdp_fail(err, -ENODEV, "there is no interface \"%.64s\" in this network namespace", name ? name : "");
        rb_xdp_cure(err, "ip -brief link lists the interfaces");
        return -ENODEV;
    }
    memcpy(ifr.ifr_name, name, len);
    fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0); /* interface requests work on any socket */
    if (fd < 0 || ioctl(fd, SIOCGIFFLAGS, &ifr)) {
        int r = -errno;

        if (fd >= 0)
            close(fd);
        return rb_xdp_fail(err, r, "interface %s cannot be asked for its state: %s", name, strerror(-r));
    }
    nic->up = ifr.ifr_flags & IFF_UP;
    nic->mtu = ioctl(fd, SIOCGIFMTU, &ifr) ? 1500 : (uint32_t)ifr.ifr_mtu;
    ifr.ifr_data = (void *)&ch;
    nic->queues = 1;
    if (!ioctl(fd, SIOCETHTOOL, &ifr) && ch.combined_count + ch.rx_count > 0)
        nic->queues = ch.combined_count + ch.rx_count;
    close(fd);
    return 0;
}

/* ---- what it counts, and its modes ---- */

int rb_xdp_netlink_open(void)
{
    return socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
}

/* /sys/class/net would show the network namespace that it was mounted in. */
int rb_xdp_counters(int netlink, int ifindex, struct counters *out)
{
    struct {
        struct nlmsghdr head;
        struct ifinfomsg info;
    } ask = {{.nlmsg_len = sizeof ask, .nlmsg_type = RTM_GETLINK, .nlmsg_flags = NLM_F_REQUEST}, {.ifi_index = ifindex}};
    union {
        struct nlmsghdr head;
        char bytes[16384];
    } answer;
    ssize_t n;

    memset(out, 0, sizeof *out);
    if (send(netlink, &ask, sizeof ask, 0) < 0)
        return -errno;
    n = recv(netlink, &answer, sizeof answer, 0);
    if (n < 0)
        return -errno;
    if (answer.head.nlmsg_type == NLMSG_ERROR)
        return ((struct nlmsgerr *)NLMSG_DATA(&answer.head))->error ? ((struct nlmsgerr *)NLMSG_DATA(&answer.head))->error : -EIO;
    if (answer.head.nlmsg_type != RTM_NEWLINK || !NLMSG_OK(&answer.head, (size_t)n))
        return -EIO;

    struct ifinfomsg *info = NLMSG_DATA(&answer.head);
    int left = (int)IFLA_PAYLOAD(&answer.head);

    out->flags = info->ifi_flags;
    for (struct rtattr *a = IFLA_RTA(info); RTA_OK(a, left); a = RTA_NEXT(a, left))
        if (a->rta_type == IFLA_STATS64 && RTA_PAYLOAD(a) >= offsetof(struct rtnl_link_stats64, rx_nohandler)) {
            struct rtnl_link_stats64 s;

            memset(&s, 0, sizeof s);
            memcpy(&s, RTA_DATA(a), RTA_PAYLOAD(a) < sizeof s ? RTA_PAYLOAD(a) : sizeof s);
            out->rx_dropped = s.rx_dropped + s.rx_missed_errors + s.rx_fifo_errors;
            out->tx_dropped = s.tx_dropped;
        }
    return 0;
}

/* The kernel counts who wants it, and takes the wish back when the socket goes, however its process ends. */
int rb_xdp_promiscuous_open(int ifindex)
{
    struct packet_mreq wish = {.mr_ifindex = ifindex, .mr_type = PACKET_MR_PROMISC};
    int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0); /* of no protocol: it receives nothing */

    if (fd >= 0 && !setsockopt(fd, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &wish, sizeof wish))
        return fd;

    int r = -errno;

    if (fd >= 0)
        close(fd);
    return r;
}

/* ---- checks before anything is touched ---- */

static bool bad_ring(uint32_t size)
{
    return size & (size - 1) || size > 1u << 20;
}

int rb_xdp_check_options(struct rb_xdp_options *o, struct rb_xdp_error *err)
{
    long page = sysconf(_SC_PAGESIZE);

    o->rx_size = o->rx_size ? o->rx_size : DEFAULT_RING;
    o->tx_size = o->tx_size ? o->tx_size : DEFAULT_RING;
    o->fill_size = o->fill_size ? o->fill_size : DEFAULT_RING;
    o->comp_size = o->comp_size ? o->comp_size : o->tx_size;
    o->retry_ms = o->retry_ms ? o->retry_ms : DEFAULT_RETRY_MS;
    if (!(o->flags & (RB_XDP_RX | RB_XDP_TX)) || o->flags & ~(RB_XDP_RX | RB_XDP_TX | RB_XDP_PROMISCUOUS | RB_XDP_METADATA) || o->mode > RB_XDP_GENERIC)
        return rb_xdp_fail(err, -EINVAL, "an AF_XDP device must receive or send, in one of the modes 0 to 3");
    if (bad_ring(o->rx_size) || bad_ring(o->tx_size) || bad_ring(o->fill_size) || bad_ring(o->comp_size))
        return rb_xdp_fail(err, -EINVAL, "AF_XDP ring sizes must be powers of two up to 1048576");
    if (o->comp_size < o->tx_size)
        return rb_xdp_fail(err, -EINVAL, "the completion ring (%u) must be as large as the transmit ring (%u)",
                           o->comp_size, o->tx_size);
    if (o->chunk_size != 2048 && o->chunk_size != 4096) {
        rb_xdp_fail(err, -EINVAL, "buffers of %u bytes cannot be used with a NIC: AF_XDP takes 2048 or 4096", o->chunk_size);
        rb_xdp_cure(err, "create the cluster with --size %u", o->chunk_size <= 2048 ? 2048u : 4096u);
        return -EINVAL;
    }
    if (o->headroom % 8 || o->headroom + RB_XDP_KERNEL_HEADROOM + 64 > o->chunk_size)
        return rb_xdp_fail(err, -EINVAL, "a headroom of %u bytes leaves no room in buffers of %u", o->headroom,
                           o->chunk_size);
    if ((uintptr_t)o->umem_base % (uintptr_t)page) {
        rb_xdp_fail(err, -EINVAL, "the pool's memory does not begin on a page (%ld bytes)", page);
        return -EINVAL;
    }
    if (!o->umem_base || !o->umem_size || o->umem_size % o->chunk_size)
        return rb_xdp_fail(err, -EINVAL, "the pool's size, %llu bytes, is not a multiple of its buffers' %u",
                           (unsigned long long)o->umem_size, o->chunk_size);
    return 0;
}

static uint32_t largest_mtu(uint32_t chunk, uint32_t headroom)
{
    return chunk - headroom - RB_XDP_KERNEL_HEADROOM - RB_XDP_LINK_BYTES;
}

/* A packet may have so many buffers: the kernel's own limit is one more than its MAX_SKB_FRAGS. */
#define MOST_BUFFERS 17u

bool rb_xdp_needs_fragments(const struct rb_xdp_options *o, const struct nic *nic)
{
    return nic->mtu > largest_mtu(o->chunk_size, o->headroom);
}

static bool kernel_at_least(unsigned major, unsigned minor)
{
    struct utsname u;
    unsigned a = 0, b = 0;

    return uname(&u) == 0 && sscanf(u.release, "%u.%u", &a, &b) == 2 && (a > major || (a == major && b >= minor));
}

int rb_xdp_check_nic(const struct rb_xdp_options *o, const struct nic *nic, struct rb_xdp_error *err)
{
    uint32_t mtu = largest_mtu(o->chunk_size, o->headroom);

    if (!nic->up) {
        rb_xdp_fail(err, -ENETDOWN, "interface %s is down", o->ifname);
        rb_xdp_cure(err, "ip link set dev %s up", o->ifname);
        return -ENETDOWN;
    }
    if (o->queue != RB_XDP_ALL_QUEUES && o->queue >= nic->queues) {
        rb_xdp_fail(err, -ERANGE, "%s has no queue %u: it has %u, numbered from 0", o->ifname, o->queue, nic->queues);
        rb_xdp_cure(err, "use zc:%s@0%s, or add queues with ethtool -L %s combined N", o->ifname,
                    nic->queues > 1 ? " and so on" : "", o->ifname);
        return -ERANGE;
    }
    if (o->queue != RB_XDP_ALL_QUEUES && o->queues > nic->queues - o->queue) {
        rb_xdp_fail(err, -ERANGE, "%s has no queues %u to %u: it has %u, numbered from 0", o->ifname, o->queue, o->queue + o->queues - 1, nic->queues);
        rb_xdp_cure(err, "use zc:%s@%u-%u, or add queues with ethtool -L %s combined N", o->ifname, o->queue, nic->queues - 1, o->ifname);
        return -ERANGE;
    }
    if (nic->queues > RB_XDP_MAX_QUEUES && o->queue == RB_XDP_ALL_QUEUES) {
        rb_xdp_fail(err, -ERANGE, "%s has %u queues, and one device takes at most %u", o->ifname, nic->queues,
                    RB_XDP_MAX_QUEUES);
        rb_xdp_cure(err, "ethtool -L %s combined %u", o->ifname, RB_XDP_MAX_QUEUES);
        return -ERANGE;
    }
    if (o->queue != RB_XDP_ALL_QUEUES && o->queue >= RB_XDP_MAX_QUEUES)
        return rb_xdp_fail(err, -ERANGE, "queue numbers from %u on are not supported", RB_XDP_MAX_QUEUES);
    bool fragments = kernel_at_least(6, 6);

    if (fragments)
        mtu = MOST_BUFFERS * (o->chunk_size - o->headroom - RB_XDP_KERNEL_HEADROOM) - RB_XDP_LINK_BYTES;
    if (o->flags & RB_XDP_RX && nic->mtu > mtu) {
        uint32_t large = largest_mtu(4096, o->headroom);

        rb_xdp_fail(err, -EMSGSIZE, "packets of %s (MTU %u) do not fit into buffers of %u bytes: the largest MTU is %u%s",
                    o->ifname, nic->mtu, o->chunk_size, mtu, fragments ? "" : ", as packets in several buffers came with kernel 6.6");
        if (o->chunk_size < 4096 && nic->mtu <= large)
            rb_xdp_cure(err, "ip link set dev %s mtu %u, or create the cluster with --size 4096 (MTU up to %u)", o->ifname,
                        mtu, large);
        else
            rb_xdp_cure(err, "ip link set dev %s mtu %u", o->ifname, mtu);
        return -EMSGSIZE;
    }
    return 0;
}

/* igb tells its card how much room a buffer has in whole KiB, and hands on what a frame has beyond that as a frame of its
 * own (Linux 7.3): 1024 bytes where buffers have 2048. In copy mode it does not. */
bool rb_xdp_zero_copy_cuts(const struct rb_xdp *dev)
{
    struct ethtool_drvinfo info = {.cmd = ETHTOOL_GDRVINFO};
    struct ifreq ifr = {.ifr_data = (void *)&info};
    uint32_t room = (dev->chunk_size - dev->headroom - RB_XDP_KERNEL_HEADROOM) / 1024 * 1024;
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    memcpy(ifr.ifr_name, dev->ifname, sizeof ifr.ifr_name);
    bool igb = fd >= 0 && !ioctl(fd, SIOCETHTOOL, &ifr) && !strcmp(info.driver, "igb");
    if (fd >= 0)
        close(fd);
    return igb && dev->mtu + RB_XDP_LINK_BYTES > room;
}
