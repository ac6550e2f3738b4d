/* SPDX-License-Identifier: Apache-2.0
 *
 * A network interface by its name, with one copy a packet: any that the kernel has, on a host and in a VM. Receiving is packet_rx.c. Sending goes past
 * the queueing discipline straight to the driver, so that nothing that is hooked in there (stack: capture, other programs' sockets) meets it again; of the
 * ways to send, sendmmsg was as fast as a transmit ring and faster for small packets (docs/performance.md).
 */
#include "packet.h"

#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define EMPTIES 1024u /* that a handle has for each such end */
#define SHORTEST 14u  /* bytes of a frame: its header */

struct eth {
    struct rb_packet_rx rx; /* fd -1: does not receive */
    int tx;                 /* -1: does not send */
    char ifname[16];
};

static int eth_recv(struct rb_end *end, rb_desc *desc, int n) { return rb_packet_rx_recv(&((struct eth *)end->device)->rx, end, desc, n); }

/* What the kernel said to the first packet of a burst. 1: it will never go, drop it; 0: not now; or the error. */
static int refused(struct rb_end *end, int err)
{
    struct eth *e = end->device;
    if (err == EMSGSIZE || err == EINVAL)
        return 1;
    if (err == EAGAIN || err == EINTR || err == ENOBUFS || err == ENETDOWN || err == ENOMEM)
        return 0;
    int rc = rb_packet_gone(e->tx, e->ifname);
    return rc < 0 ? rc : rb_fail(err, "device", NULL, "interface %s cannot be sent on: %s", e->ifname, strerror(err));
}

static int eth_send(struct rb_end *end, rb_desc *desc, int n)
{
    struct eth *e = end->device;
    struct mmsghdr message[RB_BURST];
    struct iovec part[RB_BURST];
    int done = 0, bad = 0, rc = 0;
    uint64_t bytes = 0;
    memset(message, 0, sizeof message);
    while (done < n && rc == 0) {
        int k = RB_MIN(n - done, (int)RB_BURST), i;
        for (i = 0; i < k; i++) {
            const uint8_t *data = rb_copying_data(end->c, &desc[done + i]);
            if (!data) {
                rc = -EINVAL;
                break;
            }
            if (rb_desc_length(&desc[done + i]) < SHORTEST)
                break;
            part[i] = (struct iovec){.iov_base = (void *)data, .iov_len = rb_desc_length(&desc[done + i])};
            message[i].msg_hdr.msg_iov = &part[i];
            message[i].msg_hdr.msg_iovlen = 1;
        }
        int sent = i ? sendmmsg(e->tx, message, (unsigned)i, MSG_DONTWAIT) : 0, drop = 0;
        if (i && sent < 0) {
            rc = refused(end, errno);
            drop = rc == 1;
            sent = 0;
            if (rc == 0)
                break;
            rc = RB_MIN(rc, 0);
        } else if (!i && rc == 0)
            drop = 1; /* no frame */
        for (int j = 0; j < sent; j++)
            bytes += part[j].iov_len;
        rb_return(end->c, desc + done, sent + drop);
        done += sent + drop;
        bad += drop; /* of which the rest is, the next call says */
    }
    rb_drop(end, bad, RB_DROP_BAD);
    end->st.packets += (uint64_t)(done - bad);
    end->st.bytes += bytes;
    return done ? done : rc;
}

static int eth_ready(struct rb_end *end)
{
    struct eth *e = end->device;
    struct pollfd p = {.fd = e->tx, .events = POLLOUT};
    return ((end->flags & RB_RX) && rb_packet_rx_ready(&e->rx)) || ((end->flags & RB_TX) && poll(&p, 1, 0) == 1 && (p.revents & POLLOUT));
}

static int eth_fd(struct rb_end *end)
{
    struct eth *e = end->device;
    return e->rx.fd >= 0 ? e->rx.fd : e->tx;
}

static int eth_filter(struct rb_end *end, const struct rb_filter *f)
{
    struct eth *e = end->device;
    return e->rx.fd >= 0 ? rb_packet_rx_filter(&e->rx, f) : 0;
}

static void eth_stats(struct rb_end *end, rb_stats *st)
{
    struct eth *e = end->device;
    if (e->rx.fd >= 0)
        rb_packet_rx_stats(&e->rx, st);
}

static void eth_close(struct rb_end *end)
{
    struct eth *e = end->device;
    rb_packet_rx_close(&e->rx);
    if (e->tx >= 0)
        close(e->tx);
    rb_copying_close(end);
    free(e);
}

#define COMMON .ready = eth_ready, .fd = eth_fd, .filter = eth_filter, .stats = eth_stats, .close = eth_close
static const struct rb_end_ops both_ops = {.recv = eth_recv, .send = eth_send, .alloc = rb_copying_alloc, COMMON};
static const struct rb_end_ops rx_ops = {.recv = eth_recv, COMMON};
static const struct rb_end_ops tx_ops = {.send = eth_send, .alloc = rb_copying_alloc, COMMON};

bool rb_eth_receives(struct rb_cluster *c, const char *ifname)
{
    for (uint32_t i = 0; i < RB_MAX_ENDS; i++)
        if (c->end[i] && c->end[i]->device && c->end[i]->ops->close == eth_close && (c->end[i]->flags & RB_RX) &&
            strcmp(((struct eth *)c->end[i]->device)->ifname, ifname) == 0)
            return true;
    return false;
}

int rb_eth_open(struct rb_end *end, const char *address, const rb_open_options *o)
{
    const int one = 1;
    int rc = rb_ifname_check(address, address);
    if (rc == 0 && (end->flags & RB_RX) && rb_stack_injects(end->c, address)) {
        rb_fail(EINVAL, "loop", NULL, "what is sent on stack:%s would be received from %s again", address, address);
        rc = rb_cure(EINVAL, "take packets from the card instead of copies of them: zc:%s", address);
    }
    if (rc < 0)
        return rc;
    struct eth *e = calloc(1, sizeof *e);
    if (!e)
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    e->rx.fd = e->tx = -1;
    snprintf(e->ifname, sizeof e->ifname, "%.15s", address);
    snprintf(end->address, sizeof end->address, "%s", e->ifname);
    snprintf(end->st.mode, sizeof end->st.mode, "copy");
    end->device = e;
    if (end->flags & RB_TX) {
        rc = e->tx = rb_packet_socket(e->ifname, 0);
        if (rc >= 0)
            setsockopt(e->tx, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof one);
    }
    if (rc >= 0)
        rc = rb_copying_open(end, EMPTIES);
    if (rc >= 0 && (end->flags & RB_RX))
        rc = rb_packet_rx_open(&e->rx, e->ifname, o);
    if (rc < 0) {
        eth_close(end);
        end->device = NULL;
        return rc;
    }
    end->ops = (end->flags & RB_RX) && (end->flags & RB_TX) ? &both_ops : end->flags & RB_RX ? &rx_ops : &tx_ops;
    return 0;
}
