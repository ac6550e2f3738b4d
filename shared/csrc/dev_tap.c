/* SPDX-License-Identifier: Apache-2.0
 *
 * tap:NAME[,mac=XX:XX:XX:XX:XX:XX][,netns=FILE], the device behind `ringbar tap`: an interface of the kernel's that is there as long as this end is open,
 * and gone with its process. What is sent here the interface receives; what the kernel sends out of it is received here. One copy and one system
 * call a packet: the kernel takes several at once only from its own threads.
 */
#include "rb_internal.h"

#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define ETHERNET 14u   /* bytes of the shortest frame */
#define VLAN 4u        /* bytes that a frame may have beside header and MTU */
#define USUAL_MTU 1500u
#define LEAST_MTU 68u
#define CHUNK 32       /* empties taken at once */

struct tap {
    int fd;
    uint32_t room, mtu;
    bool sends, has_mac;
    uint8_t mac[6];
    char name[16], netns[256];
    int failed;        /* of making it: errno */
    const char *step;  /* that failed */
    uint64_t dropped;  /* by the kernel: the interface was down */
};

/* ---- making the interface ---------------------------------------------------------------------------------------------- */

static int fails(struct tap *t, const char *step)
{
    t->failed = errno;
    t->step = step;
    return -1;
}

/* A tap that nobody sends from is there to be looked at: the kernel shall not answer what it sees there. */
static void be_quiet(struct tap *t)
{
    char path[96];
    snprintf(path, sizeof path, "/proc/sys/net/ipv6/conf/%s/disable_ipv6", t->name);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return; /* a kernel without IPv6 */
    if (write(fd, "1", 1) != 1)
        t->step = NULL;
    close(fd);
}

static int bring_up(struct tap *t, int s)
{
    struct ifreq r = {0};
    memcpy(r.ifr_name, t->name, sizeof r.ifr_name);
    if (t->has_mac) {
        r.ifr_hwaddr.sa_family = ARPHRD_ETHER;
        memcpy(r.ifr_hwaddr.sa_data, t->mac, sizeof t->mac);
        if (ioctl(s, SIOCSIFHWADDR, &r) < 0)
            return fails(t, "its MAC address cannot be set");
    }
    r.ifr_mtu = (int)t->mtu;
    if (t->mtu != USUAL_MTU && ioctl(s, SIOCSIFMTU, &r) < 0)
        return fails(t, "its MTU cannot be set");
    if (!t->sends)
        be_quiet(t);
    if (ioctl(s, SIOCGIFFLAGS, &r) < 0)
        return fails(t, "its flags cannot be read");
    r.ifr_flags |= (short)(IFF_UP | (t->sends ? 0 : IFF_NOARP));
    if (ioctl(s, SIOCSIFFLAGS, &r) < 0)
        return fails(t, "it cannot be set up");
    return 0;
}

static int make(struct tap *t)
{
    struct ifreq r = {.ifr_flags = (short)(IFF_TAP | IFF_NO_PI | IFF_TUN_EXCL)};
    t->fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (t->fd < 0)
        return fails(t, "/dev/net/tun cannot be opened");
    memcpy(r.ifr_name, t->name, sizeof r.ifr_name);
    if (ioctl(t->fd, TUNSETIFF, &r) < 0)
        return fails(t, "it cannot be made");
    int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (s < 0)
        return fails(t, "it cannot be set up");
    int rc = bring_up(t, s);
    close(s);
    return rc;
}

/* An interface is made in the network namespace of the thread that asks: this one goes there and ends. */
static void *make_there(void *arg)
{
    struct tap *t = arg;
    int ns = open(t->netns, O_RDONLY | O_CLOEXEC);
    if (ns < 0 || setns(ns, CLONE_NEWNET) < 0)
        fails(t, "its network namespace cannot be entered");
    else
        make(t);
    if (ns >= 0)
        close(ns);
    return NULL;
}

static int tell(const struct tap *t)
{
    int err = t->failed;
    const char *code = err == EPERM || err == EACCES ? "no-permission" : err == EBUSY || err == EEXIST ? "busy" : "device";
    if (err == EBUSY || err == EEXIST) {
        rb_fail(EBUSY, code, NULL, "there is an interface %s already", t->name);
        return rb_cure(EBUSY, "name another, or remove it: ip link del %s", t->name);
    }
    rb_fail(err, code, NULL, "interface %s: %s: %s", t->name, t->step, strerror(err));
    if (err == ENOENT && t->netns[0] && t->fd < 0 && access(t->netns, F_OK) != 0)
        return rb_cure(err, "ip netns list shows the namespaces");
    if (err == ENOENT || err == ENODEV || err == ENXIO)
        return rb_cure(err, "modprobe tun");
    return code[0] == 'n' ? rb_cure(err, "run it as root, or with CAP_NET_ADMIN: setcap cap_net_admin+ep PROGRAM") : -err;
}

/* ---- packets -------------------------------------------------------------------------------------------------------------- */

static int gone(const struct tap *t)
{
    rb_fail(ENODEV, "detached", NULL, "interface %s is gone", t->name);
    return -ENODEV;
}

static int tap_send(struct rb_end *end, rb_desc *desc, int n)
{
    struct tap *t = end->device;
    uint64_t bytes = 0;
    int i, rc = 0;
    for (i = 0; i < n; i++) {
        const uint8_t *data = rb_copying_data(end->c, &desc[i]);
        uint32_t length = rb_desc_length(&desc[i]);
        if (!data || length < ETHERNET) {
            rc = data ? rb_fail(EINVAL, "bad-descriptor", NULL, "%u bytes are no frame", length) : -EINVAL;
            break;
        }
        ssize_t k;
        while ((k = write(t->fd, data, length)) < 0 && errno == EINTR)
            ;
        if (k < 0 && errno == EIO) /* the interface is down: what it receives then is lost, as with any other */
            t->dropped++;
        else if (k < 0 && errno == EBADFD) {
            rc = gone(t);
            break;
        } else if (k < 0 && errno == EINVAL) {
            rc = rb_fail(EINVAL, "bad-descriptor", NULL, "the kernel refuses a packet of %u bytes", length);
            break;
        } else if (k < 0)
            break; /* no room now */
        bytes += length;
    }
    rb_return(end->c, desc, i);
    end->st.packets += (uint64_t)i;
    end->st.bytes += bytes;
    return i ? i : rc;
}

static int tap_recv(struct rb_end *end, rb_desc *desc, int n)
{
    struct tap *t = end->device;
    uint64_t now = 0;
    int i = 0, empties = 0, rc = 0;
    while (i < n) {
        if (i == empties) {
            rc = rb_empties(end->c, desc + i, RB_MIN(n - i, CHUNK));
            if (rc <= 0)
                break;
            empties += rc;
        }
        ssize_t k = read(t->fd, rb_data(end->c, &desc[i]), t->room);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0) {
            rc = k < 0 && errno == EBADFD ? gone(t) : 0;
            break;
        }
        rb_desc_set(&desc[i], (uint32_t)k, RB_BUFFER_HEADER, 0);
        desc[i++].ts = now ? now : (now = rb_now_ns());
        end->st.bytes += (uint64_t)k;
    }
    if (empties > i)
        rb_return(end->c, desc + i, empties - i);
    end->st.packets += (uint64_t)i;
    return i ? i : RB_MIN(rc, 0);
}

static int tap_ready(struct rb_end *end)
{
    struct pollfd q = {.fd = ((struct tap *)end->device)->fd, .events = POLLIN};
    return !(end->flags & RB_RX) || poll(&q, 1, 0) != 0;
}

static int tap_fd(struct rb_end *end) { return ((struct tap *)end->device)->fd; }

static void tap_stats(struct rb_end *end, rb_stats *st) { st->kernel_dropped = ((struct tap *)end->device)->dropped; }

static void tap_close(struct rb_end *end)
{
    struct tap *t = end->device;
    rb_copying_close(end);
    close(t->fd);
    free(t);
}

static const struct rb_end_ops tap_rx_ops = {.recv = tap_recv, .ready = tap_ready, .fd = tap_fd, .stats = tap_stats, .close = tap_close};
static const struct rb_end_ops tap_tx_ops = {
    .send = tap_send, .ready = tap_ready, .fd = tap_fd, .stats = tap_stats, .close = tap_close,
};
static const struct rb_end_ops tap_ops = {
    .recv = tap_recv, .send = tap_send, .alloc = rb_copying_alloc, .ready = tap_ready, .fd = tap_fd, .stats = tap_stats, .close = tap_close,
};

/* ---- opening ---------------------------------------------------------------------------------------------------------------- */

static int parse(struct tap *t, const char *address)
{
    const char *p = address + strlen("tap:"), *rest = p + strcspn(p, ",");
    size_t n = (size_t)(rest - p);
    if (n == 0 || n > 15 || strcspn(p, "/: \t@%") < n || strncmp(p, ".", n) == 0 || strncmp(p, "..", n) == 0)
        return rb_fail(EINVAL, "bad-address", "names of interfaces have 1 to 15 characters without / : @ % and blanks", "\"%.*s\" can be no interface's name", (int)n, p);
    memcpy(t->name, p, n);
    while (*rest == ',') {
        p = rest + 1;
        rest = p + strcspn(p, ",");
        n = (size_t)(rest - p);
        unsigned m[6];
        int end = 0;
        if (strncmp(p, "mac=", 4) == 0) {
            if (sscanf(p, "mac=%2x:%2x:%2x:%2x:%2x:%2x%n", &m[0], &m[1], &m[2], &m[3], &m[4], &m[5], &end) != 6 || (size_t)end != n || m[0] & 1)
                return rb_fail(EINVAL, "bad-address", "six bytes in hexadecimal, the first one even, as 02:00:00:00:00:01", "\"%.*s\" is no interface's MAC address",
                               (int)n - 4, p + 4);
            for (int i = 0; i < 6; i++)
                t->mac[i] = (uint8_t)m[i];
            t->has_mac = true;
        } else if (strncmp(p, "netns=", 6) == 0 && n - 6 < sizeof t->netns && n > 6)
            memcpy(t->netns, p + 6, n - 6);
        else
            return rb_fail(EINVAL, "bad-address", "tap:NAME[,mac=MAC][,netns=FILE]", "\"%s\" is no address of a tap", address);
    }
    return 0;
}

int rb_tap_open(struct rb_end *end, const char *address, const rb_open_options *options)
{
    pthread_t thread;
    struct tap *t = calloc(1, sizeof *t);
    (void)options;
    if (!t)
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    t->fd = -1;
    t->room = RB_MIN(end->c->buffer_size - RB_BUFFER_HEADER, RB_MAX_LENGTH);
    t->mtu = RB_MIN(t->room - ETHERNET - VLAN, USUAL_MTU);
    t->sends = (end->flags & RB_RX) != 0;
    int rc = parse(t, address);
    if (rc == 0 && t->mtu < LEAST_MTU)
        rc = rb_fail(EINVAL, "bad-size", "make the cluster with --size 2048", "buffers of %u bytes are too small for an interface", end->c->buffer_size);
    if (rc == 0 && !t->netns[0])
        make(t);
    else if (rc == 0) {
        if ((rc = pthread_create(&thread, NULL, make_there, t)) != 0)
            rc = rb_fail(rc, "failed", NULL, "no thread could be started: %s", strerror(rc));
        else
            pthread_join(thread, NULL);
    }
    if (rc == 0 && t->failed)
        rc = tell(t);
    snprintf(end->address, sizeof end->address, "tap:%s", t->name);
    if (rc == 0)
        rc = t->sends ? rb_copying_open(end, 2 * RB_BURST) : 0;
    if (rc < 0) {
        if (t->fd >= 0)
            close(t->fd);
        free(t);
        return rc;
    }
    end->device = t;
    end->ops = (end->flags & RB_RX) && (end->flags & RB_TX) ? &tap_ops : end->flags & RB_RX ? &tap_rx_ops : &tap_tx_ops;
    snprintf(end->st.mode, sizeof end->st.mode, "copy");
    snprintf(end->st.clock, sizeof end->st.clock, "software");
    return 0;
}
