/* SPDX-License-Identifier: Apache-2.0
 *
 * stack:eth1, the kernel's side of an interface. What is sent here the kernel takes as if eth1 had received it; what the kernel sends out of eth1 is
 * received here, and goes nowhere else unless a program says so (or, with `observe`, goes its way as well).
 *
 * Both go through a TAP interface of our own, which is there as long as the end is open and vanishes with its process: what we write into it comes out of
 * its receiving side, from where the kernel leads it to eth1's (hook.c). That is as fast as a veth pair, which would stay behind after a kill, and far
 * faster than test runs of an XDP program (docs/devices.md has the figures); and the kernel marks such packets as redirected, so that a generic XDP program
 * on eth1 does not take them a second time. The TAP has eth1's MAC address, or its packets would count as another machine's.
 */
#include "hook.h"
#include "packet.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define EMPTIES 512u
#define TAKER "rbout%d" /* name of the interface that takes what the kernel sends out of interface number %d */
#define QUEUE 4096     /* packets that the kernel keeps for us */
#define SHORTEST 14u   /* bytes of a frame: its header */
#define LOOK_NS 10000000u

struct stack {
    int tap, link, control, netlink; /* descriptors; link: of the program that takes what the kernel sends; the last two: for questions */
    int index, tap_index;
    char ifname[16];
    bool old; /* a filter instead of a link */
    uint64_t looked;
};

/* ---- the interface beside it --------------------------------------------------------------------------------------------- */

static struct ifreq named(const char *name)
{
    struct ifreq r;
    memset(&r, 0, sizeof r);
    snprintf(r.ifr_name, sizeof r.ifr_name, "%.15s", name);
    return r;
}

/* Give the TAP the MAC address that the interface has now. */
static int same_address(struct stack *t, const char *tap)
{
    struct ifreq theirs = named(t->ifname), ours = named(tap);
    if (ioctl(t->control, SIOCGIFHWADDR, &theirs) < 0 || ioctl(t->control, SIOCGIFHWADDR, &ours) < 0)
        return -errno;
    if (memcmp(theirs.ifr_hwaddr.sa_data, ours.ifr_hwaddr.sa_data, 6) == 0)
        return 0;
    memcpy(&ours.ifr_hwaddr, &theirs.ifr_hwaddr, sizeof ours.ifr_hwaddr);
    return ioctl(t->control, SIOCSIFHWADDR, &ours) < 0 ? -errno : 0;
}

static void without_ipv6(const char *tap)
{
    char path[80];
    snprintf(path, sizeof path, "/proc/sys/net/ipv6/conf/%s/disable_ipv6", tap);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd >= 0 && write(fd, "1\n", 2) < 0)
        errno = 0; /* a kernel without IPv6 */
    if (fd >= 0)
        close(fd);
}

/* *step: what failed. */
static int make_tap(struct stack *t, char name[IFNAMSIZ], const char **step)
{
    struct ifreq r = named(name), theirs = named(t->ifname);
    *step = "/dev/net/tun cannot be opened";
    t->tap = open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (t->tap < 0)
        return -errno;
    *step = "no interface beside it can be made";
    r.ifr_flags = IFF_TAP | IFF_NO_PI;
    if (ioctl(t->tap, TUNSETIFF, &r) < 0)
        return -errno;
    memcpy(name, r.ifr_name, IFNAMSIZ);
    t->tap_index = (int)if_nametoindex(name);
    *step = "the interface beside it cannot be set up";
    int rc = same_address(t, name);
    if (rc < 0)
        return rc;
    without_ipv6(name);
    if (ioctl(t->control, SIOCGIFMTU, &theirs) == 0) {
        struct ifreq mtu = named(name);
        mtu.ifr_mtu = RB_MIN(theirs.ifr_mtu, 65000);
        ioctl(t->control, SIOCSIFMTU, &mtu);
    }
    struct ifreq queue = named(name);
    queue.ifr_qlen = QUEUE;
    ioctl(t->control, SIOCSIFTXQLEN, &queue);
    if (ioctl(t->control, SIOCGIFFLAGS, &r) < 0)
        return -errno;
    r.ifr_flags |= IFF_UP | IFF_NOARP;
    return ioctl(t->control, SIOCSIFFLAGS, &r) < 0 ? -errno : 0;
}

/* The interface may have been given another address, or be gone: asked now and then. */
static int look(struct stack *t)
{
    uint64_t now = rb_mono_ns();
    struct ifreq r;
    if (now - t->looked < LOOK_NS)
        return 0;
    t->looked = now;
    memset(&r, 0, sizeof r);
    r.ifr_ifindex = t->index;
    if (ioctl(t->control, SIOCGIFNAME, &r) < 0)
        return rb_fail(ENODEV, "interface-gone", NULL, "interface %s is gone", t->ifname);
    memcpy(t->ifname, r.ifr_name, sizeof t->ifname); /* renamed */
    r.ifr_ifindex = t->tap_index;
    if (ioctl(t->control, SIOCGIFNAME, &r) < 0)
        return rb_fail(ENODEV, "interface-gone", "open it again", "somebody has removed the interface beside %s", t->ifname);
    same_address(t, r.ifr_name);
    return 0;
}

/* ---- packets -------------------------------------------------------------------------------------------------------------- */

static int stack_send(struct rb_end *end, rb_desc *desc, int n)
{
    struct stack *t = end->device;
    uint64_t bytes = 0;
    int i, bad = 0, rc = look(t);
    for (i = 0; i < n && rc == 0; i++) {
        const uint8_t *data = rb_copying_data(end->c, &desc[i]);
        uint32_t length = rb_desc_length(&desc[i]);
        ssize_t k = -1;
        if (!data) {
            rc = -EINVAL;
            break;
        }
        if (length < SHORTEST) {
            bad++;
            continue;
        }
        while ((k = write(t->tap, data, length)) < 0 && errno == EINTR)
            ;
        if (k < 0 && errno == EINVAL)
            bad++;
        else if (k < 0)
            break; /* no room, or down: not now */
        else
            bytes += length;
    }
    rb_return(end->c, desc, i);
    rb_drop(end, bad, RB_DROP_BAD);
    end->st.packets += (uint64_t)(i - bad);
    end->st.bytes += bytes;
    return i ? i : rc;
}

static int stack_recv(struct rb_end *end, rb_desc *desc, int n)
{
    struct stack *t = end->device;
    const uint32_t room = RB_MIN(end->c->buffer_size - RB_BUFFER_HEADER, RB_MAX_LENGTH);
    uint64_t now = 0;
    int out = 0, empties = 0, rc = 0;
    while (out < n) {
        if (!empties) {
            struct pollfd p = {.fd = t->tap, .events = POLLIN};
            if (!out && poll(&p, 1, 0) <= 0)
                break;
            empties = rb_empties(end->c, desc + out, RB_MIN(n - out, 32));
            if (empties <= 0) {
                rc = empties;
                empties = 0;
                break; /* the rest waits in the kernel */
            }
        }
        rb_desc_set(&desc[out], 0, RB_BUFFER_HEADER, 0);
        struct iovec part[2] = {{.iov_base = rb_data(end->c, &desc[out]), .iov_len = room}, {.iov_base = (char[1]){0}, .iov_len = 1}};
        ssize_t k = readv(t->tap, part, 2);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            break;
        if ((uint32_t)k > room) { /* longer than a buffer */
            rb_drop(end, 1, RB_DROP_BAD);
            continue;
        }
        rb_desc_set(&desc[out], (uint32_t)k, RB_BUFFER_HEADER, 0);
        desc[out++].ts = now ? now : (now = rb_now_ns());
        end->st.bytes += (uint64_t)k;
        empties--;
    }
    if (empties)
        rb_return(end->c, desc + out, empties);
    end->st.packets += (uint64_t)out;
    return out ? out : rc < 0 ? rc : look(t);
}

static int stack_ready(struct rb_end *end)
{
    struct pollfd p = {.fd = ((struct stack *)end->device)->tap, .events = POLLIN};
    return (end->flags & RB_TX) || poll(&p, 1, 0) > 0;
}

static int stack_fd(struct rb_end *end) { return ((struct stack *)end->device)->tap; }

static void stack_stats(struct rb_end *end, rb_stats *st)
{
    struct stack *t = end->device;
    if (end->flags & RB_RX)
        st->kernel_dropped = rb_hook_dropped(t->netlink, t->tap_index);
}

/* ---- life ------------------------------------------------------------------------------------------------------------------ */

static void let_go(struct stack *t)
{
    if (t->link >= 0)
        close(t->link);
    if (t->old)
        rb_hook_undo(t->netlink, t->index, t->tap_index);
    if (t->tap >= 0)
        close(t->tap);
    if (t->control >= 0)
        close(t->control);
    if (t->netlink >= 0)
        close(t->netlink);
    free(t);
}

static void stack_close(struct rb_end *end)
{
    rb_copying_close(end);
    let_go(end->device);
}

#define COMMON .ready = stack_ready, .fd = stack_fd, .stats = stack_stats, .close = stack_close
static const struct rb_end_ops both_ops = {.recv = stack_recv, .send = stack_send, .alloc = rb_copying_alloc, COMMON};
static const struct rb_end_ops rx_ops = {.recv = stack_recv, COMMON};
static const struct rb_end_ops tx_ops = {.send = stack_send, .alloc = rb_copying_alloc, COMMON};

/* Does this process have the TAP open? The kernel says so beside the descriptor. */
static bool holds(const char *pid, const char *tap)
{
    char path[300], line[128], want[40];
    bool found = false;
    snprintf(path, sizeof path, "/proc/%.20s/fdinfo", pid);
    snprintf(want, sizeof want, "iff:\t%s\n", tap);
    DIR *all = opendir(path);
    for (struct dirent *d; all && !found && (d = readdir(all)) != NULL;) {
        snprintf(path, sizeof path, "/proc/%.20s/fdinfo/%.20s", pid, d->d_name);
        FILE *f = d->d_name[0] == '.' ? NULL : fopen(path, "re");
        while (f && !found && fgets(line, sizeof line, f))
            found = strcmp(line, want) == 0;
        if (f)
            fclose(f);
    }
    if (all)
        closedir(all);
    return found;
}

/* The process that has it, and its name; 0 = not to be seen from here. */
static int holder_of(const char *tap, char *name, size_t size)
{
    char path[64];
    int pid = 0;
    DIR *all = opendir("/proc");
    for (struct dirent *d; all && !pid && (d = readdir(all)) != NULL;)
        if (d->d_name[0] >= '1' && d->d_name[0] <= '9' && holds(d->d_name, tap))
            pid = atoi(d->d_name);
    if (all)
        closedir(all);
    snprintf(path, sizeof path, "/proc/%d/comm", pid);
    FILE *f = pid ? fopen(path, "re") : NULL;
    snprintf(name, size, "?");
    if (f && fgets(name, (int)size, f))
        name[strcspn(name, "\n")] = 0;
    if (f)
        fclose(f);
    return pid;
}

static int tell(const struct stack *t, int err, const char *step)
{
    if (err == EPERM || err == EACCES)
        return rb_fail(EACCES, "no-permission",
                       "run it as root, or: setcap cap_net_admin,cap_bpf,cap_net_raw+ep \"$(readlink -f \"$(command -v python3)\")\"; for a systemd unit: "
                       "AmbientCapabilities=CAP_NET_ADMIN CAP_BPF CAP_NET_RAW",
                       "stack:%s cannot be opened without the capabilities CAP_NET_ADMIN and CAP_BPF: %s", t->ifname, step);
    if (err == EBUSY && strstr(step, "beside")) {
        char tap[IFNAMSIZ], name[32];
        snprintf(tap, sizeof tap, TAKER, t->index);
        int pid = holder_of(tap, name, sizeof name);
        if (!pid)
            return rb_fail(EBUSY, "busy", "close it there; with observe any number can look on", "what the kernel sends out of %s is taken by another program already",
                           t->ifname);
        rb_fail(EBUSY, "busy", NULL, "what the kernel sends out of %s is held by process %d (%s)", t->ifname, pid, name);
        return pid == (int)getpid() ? rb_cure(EBUSY, "close it first: this process has it open") : rb_cure(EBUSY, "kill %d; with observe any number can look on", pid);
    }
    const char *cure = err == ENOENT || err == ENODEV || err == EOPNOTSUPP || err == ENXIO ? "modprobe -a tun sch_ingress cls_u32 act_mirred cls_bpf" : NULL;
    return rb_fail(err, "device", cure, "stack:%s cannot be opened: %s: %s", t->ifname, step, strerror(err));
}

bool rb_stack_injects(struct rb_cluster *c, const char *ifname)
{
    for (uint32_t i = 0; i < RB_MAX_ENDS; i++)
        if (c->end[i] && c->end[i]->device && c->end[i]->ops->close == stack_close && (c->end[i]->flags & RB_TX) &&
            strcmp(((struct stack *)c->end[i]->device)->ifname, ifname) == 0)
            return true;
    return false;
}

static int hook_up(struct stack *t, uint32_t flags, bool observe)
{
    char name[IFNAMSIZ] = "rbin%d";
    const char *step;
    if ((flags & RB_RX) && !observe)
        snprintf(name, sizeof name, TAKER, t->index); /* one an interface */
    else if (flags & RB_RX)
        snprintf(name, sizeof name, "rbsee%%d");
    int rc = make_tap(t, name, &step);
    if (rc == 0 && (flags & RB_TX)) {
        step = "what is sent cannot be led to it";
        rc = rb_hook_receive(t->netlink, t->tap_index, t->index);
    }
    if (rc == 0 && (flags & RB_RX)) {
        step = "what the kernel sends cannot be led away";
        rc = t->link = rb_hook_send(t->index, t->tap_index, observe);
        if (rc == -EOPNOTSUPP) { /* before 6.6 */
            rb_hook_sweep();
            rc = rb_hook_send_old(t->netlink, t->index, t->tap_index, observe);
            t->old = rc == 0;
        }
    }
    return rc < 0 ? tell(t, -rc, step) : 0;
}

int rb_stack_open(struct rb_end *end, const char *address, const rb_open_options *o)
{
    const char *ifname = address + strlen("stack:");
    int rc = rb_ifname_check(ifname, address);
    if (rc == 0 && (end->flags & RB_TX) && rb_eth_receives(end->c, ifname)) {
        rb_fail(EINVAL, "loop", NULL, "what is sent on %s would be received from %s again", address, ifname);
        return rb_cure(EINVAL, "take packets from the card instead of copies of them: zc:%s", ifname);
    }
    if (rc == 0 && (end->flags & RB_RX) && !o->observe && !(end->flags & RB_TAKE_ALL) && rb_ifname_needed(ifname) < 0)
        rc = rb_cure(EBUSY, "look on with observe, take another interface, or all the same: --take-all");
    struct stack *t = rc == 0 ? calloc(1, sizeof *t) : NULL;
    if (!t)
        return rc < 0 ? rc : rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    snprintf(t->ifname, sizeof t->ifname, "%s", ifname);
    snprintf(end->address, sizeof end->address, "stack:%s", ifname);
    snprintf(end->st.mode, sizeof end->st.mode, o->observe ? "observe" : "copy");
    snprintf(end->st.clock, sizeof end->st.clock, "software");
    t->tap = t->link = -1;
    t->index = (int)if_nametoindex(ifname);
    t->control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    t->netlink = t->control < 0 ? -errno : rb_hook_open();
    rc = t->netlink < 0 ? tell(t, -t->netlink, "no socket") : hook_up(t, end->flags, o->observe);
    if (rc == 0 && (rc = rb_copying_open(end, EMPTIES)) < 0)
        rb_copying_close(end);
    if (rc < 0) {
        let_go(t);
        return rc;
    }
    end->device = t;
    end->ops = (end->flags & RB_RX) && (end->flags & RB_TX) ? &both_ops : end->flags & RB_RX ? &rx_ops : &tx_ops;
    return 0;
}
