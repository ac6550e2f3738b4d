/* SPDX-License-Identifier: Apache-2.0
 *
 * The same work with AF_PACKET and TPACKET_V3: a ring of blocks that the kernel copies received frames into, and a ring of frames to
 * send from, past the queueing discipline. What a minimal program with it reaches. Arguments: nic_bench.h.
 */
#include "nic_bench.h"

#include <arpa/inet.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <poll.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/socket.h>

#define BLOCK (1u << 15) /* some 250 small frames */
#define BLOCKS 256u
#define SLOT 2048u

struct side {
    int fd;
    uint8_t *ring;
    uint32_t at, slots;
};

static void open_side(struct side *s, const char *ifname, bool sends)
{
    int version = TPACKET_V3, one = 1;
    struct sockaddr_ll where = {.sll_family = AF_PACKET, .sll_protocol = sends ? 0 : htons(ETH_P_ALL), .sll_ifindex = (int)if_nametoindex(ifname)};
    struct tpacket_req3 req = {.tp_block_size = BLOCK, .tp_block_nr = BLOCKS, .tp_frame_size = SLOT, .tp_frame_nr = BLOCK / SLOT * BLOCKS};
    if (!sends)
        req.tp_retire_blk_tov = 1;
    s->slots = req.tp_frame_nr;
    s->fd = socket(AF_PACKET, SOCK_RAW, 0);
    if (s->fd < 0 || setsockopt(s->fd, SOL_PACKET, PACKET_VERSION, &version, sizeof version) ||
        setsockopt(s->fd, SOL_PACKET, sends ? PACKET_TX_RING : PACKET_RX_RING, &req, sizeof req) ||
        (sends && setsockopt(s->fd, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof one)))
        die("AF_PACKET ring: %s", strerror(errno));
    int bytes = 1 << 26;
    setsockopt(s->fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes);
    s->ring = mmap(NULL, (size_t)BLOCK * BLOCKS, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, s->fd, 0);
    if (s->ring == MAP_FAILED || bind(s->fd, (struct sockaddr *)&where, sizeof where))
        die("AF_PACKET on %s: %s", ifname, strerror(errno));
}

/* Copy a frame into the next slot to send; false when there is none. */
static inline bool put(struct side *s, const uint8_t *data, uint32_t length)
{
    struct tpacket3_hdr *h = (struct tpacket3_hdr *)(void *)(s->ring + (size_t)s->at * SLOT);
    if (__atomic_load_n(&h->tp_status, __ATOMIC_ACQUIRE) & (TP_STATUS_SEND_REQUEST | TP_STATUS_SENDING))
        return false;
    memcpy((uint8_t *)h + TPACKET3_HDRLEN - sizeof(struct sockaddr_ll), data, length);
    h->tp_len = length;
    h->tp_snaplen = length;
    h->tp_next_offset = 0;
    __atomic_store_n(&h->tp_status, TP_STATUS_SEND_REQUEST, __ATOMIC_RELEASE);
    s->at = s->at + 1 == s->slots ? 0 : s->at + 1;
    return true;
}

static inline void flush(struct side *s) { send(s->fd, NULL, 0, MSG_DONTWAIT); }

int main(int argc, char **argv)
{
    struct side in = {0}, out = {0};
    uint8_t frame[FRAME_BYTES];
    uint64_t packets = 0;
    arguments(argc, argv);
    make_frame(frame);
    if (opt.out)
        open_side(&out, opt.out, true);
    if (opt.in)
        open_side(&in, opt.in, false);
    for (uint32_t block = 0; go_on(packets);) {
        uint32_t n = 0;
        if (!opt.in) {
            while (n < opt.burst && put(&out, frame, sizeof frame))
                n++;
            flush(&out);
            packets += n;
            continue;
        }
        struct tpacket_block_desc *b = (struct tpacket_block_desc *)(void *)(in.ring + (size_t)block * BLOCK);
        if (!(__atomic_load_n(&b->hdr.bh1.block_status, __ATOMIC_ACQUIRE) & TP_STATUS_USER)) {
            struct pollfd p = {.fd = in.fd, .events = POLLIN};
            poll(&p, 1, 10);
            continue;
        }
        struct tpacket3_hdr *h = (struct tpacket3_hdr *)(void *)((uint8_t *)b + b->hdr.bh1.offset_to_first_pkt);
        for (uint32_t i = 0; i < b->hdr.bh1.num_pkts; i++) {
            if (!opt.out)
                packets++;
            else if (put(&out, (uint8_t *)h + h->tp_mac, h->tp_snaplen)) {
                packets++;
                if (++n % opt.burst == 0)
                    flush(&out);
            }
            h = (struct tpacket3_hdr *)(void *)((uint8_t *)h + h->tp_next_offset);
        }
        if (opt.out && n % opt.burst)
            flush(&out);
        run.progress->received += b->hdr.bh1.num_pkts;
        __atomic_store_n(&b->hdr.bh1.block_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE);
        block = block + 1 == BLOCKS ? 0 : block + 1;
    }
    puts(", \"mode\": \"TPACKET_V3\"}");
    return 0;
}
