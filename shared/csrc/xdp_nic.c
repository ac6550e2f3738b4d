/* SPDX-License-Identifier: Apache-2.0 */
/* What an interface is like, whether what is asked of it can be, and the words when it cannot. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/capability.h>
#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
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
                     "cap_ipc_lock+ep PROGRAM");
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
    if (!(o->flags & (RB_XDP_RX | RB_XDP_TX)) || o->flags & ~(RB_XDP_RX | RB_XDP_TX) || o->mode > RB_XDP_GENERIC)
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
    if (nic->queues > RB_XDP_MAX_QUEUES && o->queue == RB_XDP_ALL_QUEUES) {
        rb_xdp_fail(err, -ERANGE, "%s has %u queues, and one device takes at most %u", o->ifname, nic->queues,
                    RB_XDP_MAX_QUEUES);
        rb_xdp_cure(err, "ethtool -L %s combined %u", o->ifname, RB_XDP_MAX_QUEUES);
        return -ERANGE;
    }
    if (o->queue != RB_XDP_ALL_QUEUES && o->queue >= RB_XDP_MAX_QUEUES)
        return rb_xdp_fail(err, -ERANGE, "queue numbers from %u on are not supported", RB_XDP_MAX_QUEUES);
    if (o->flags & RB_XDP_RX && nic->mtu > mtu) {
        uint32_t large = largest_mtu(4096, o->headroom);

        rb_xdp_fail(err, -EMSGSIZE, "packets of %s (MTU %u) do not fit into buffers of %u bytes: the largest MTU is %u",
                    o->ifname, nic->mtu, o->chunk_size, mtu);
        if (o->chunk_size < 4096 && nic->mtu <= large)
            rb_xdp_cure(err, "ip link set dev %s mtu %u, or create the cluster with --size 4096 (MTU up to %u)", o->ifname,
                        mtu, large);
        else
            rb_xdp_cure(err, "ip link set dev %s mtu %u", o->ifname, mtu);
        return -EMSGSIZE;
    }
    return 0;
}
