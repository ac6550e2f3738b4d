/* SPDX-License-Identifier: Apache-2.0
 * Filters run here decide as libpcap's own do, on any bytes; frames that the kernel put together come apart as a wire would carry them. */
#include "packet.h"
#include "world.h"

#include <dlfcn.h>
#include <linux/virtio_net.h>

struct program {
    unsigned count;
    void *insn;
};

static uint64_t seed = 88172645463325252ull;
static uint32_t any(uint32_t below)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (uint32_t)(seed >> 33) % below;
}

/* A packet with headers that expressions ask for, and then some bytes changed. */
static uint32_t make_packet(uint8_t *p)
{
    static const uint16_t types[] = {0x0800, 0x0800, 0x86dd, 0x8100, 0x88a8, 0x0806, 0x8847};
    uint32_t length = 14 + any(200), at = 12;
    for (uint32_t i = 0; i < length; i++)
        p[i] = (uint8_t)any(256);
    uint16_t type = types[any(7)];
    for (int tags = 0; tags < 2 && (type == 0x8100 || type == 0x88a8) && at + 6 < length; tags++) {
        p[at] = (uint8_t)(type >> 8);
        p[at + 1] = (uint8_t)type;
        p[at + 2] = 0;
        p[at + 3] = (uint8_t)any(8);
        at += 4;
        type = types[any(3)];
    }
    p[at] = (uint8_t)(type >> 8);
    p[at + 1] = (uint8_t)type;
    uint8_t *ip = p + at + 2;
    if (at + 2 + 28 < length && type == 0x0800) {
        ip[0] = (uint8_t)(0x45 + (any(4) == 0));
        ip[6] = any(4) ? 0 : ip[6];
        ip[9] = any(2) ? 17 : 6;
        ip[12] = 192, ip[13] = 0, ip[14] = 2, ip[15] = (uint8_t)any(4);
        ip[20] = 0, ip[21] = (uint8_t)any(90);
    } else if (at + 2 + 48 < length && type == 0x86dd) {
        ip[0] = 0x60;
        ip[6] = any(2) ? 17 : 6;
        ip[42] = 0, ip[43] = (uint8_t)any(90);
    }
    return length;
}

static void filters_decide_as_libpcap_does(void)
{
    static const char *const expressions[] = {
        "udp", "tcp port 53", "udp port 53 or tcp port 80", "vlan", "vlan 5", "vlan and udp port 53", "vlan 3 and vlan 5", "ip6", "ip6 and tcp",
        "arp or mpls", "host 192.0.2.1", "net 192.0.2.0/30 and not tcp", "portrange 20-60", "len > 100", "less 80", "greater 90 and udp",
        "ip[8] < 10 or ip[2:2] > 500", "tcp[tcpflags] & tcp-syn != 0", "ether[200:4] = 0x01020304", "ether[0] & 1 = 0 and ip[20] ^ 3 = 2",
        "udp[8:4] % 7 = 3", "ip[0] & 0xf > 5", "ip6[40:2] * 3 > 60", "ether host 02:00:00:00:00:01", "ip proto 17 and (dst port 53 or src port 80)",
        "ip[len - 20] = 3", "ether[ether[14] & 0xf] > 9", "broadcast or multicast",
    };
    void *so = dlopen("libpcap.so.0.8", RTLD_NOW);
    if (!so)
        so = dlopen("libpcap.so.1", RTLD_NOW);
    if (!so) {
        printf("    skipped: libpcap is not installed\n");
        return;
    }
    void *(*open_dead)(int, int) = (void *(*)(int, int))dlsym(so, "pcap_open_dead");
    int (*compile)(void *, struct program *, const char *, int, uint32_t) = (int (*)(void *, struct program *, const char *, int, uint32_t))dlsym(so, "pcap_compile");
    unsigned (*theirs)(const void *, const uint8_t *, unsigned, unsigned) =
        (unsigned (*)(const void *, const uint8_t *, unsigned, unsigned))dlsym(so, "bpf_filter");
    void (*freecode)(struct program *) = (void (*)(struct program *))dlsym(so, "pcap_freecode");
    void (*finish)(void *) = (void (*)(void *))dlsym(so, "pcap_close");
    CHECK(open_dead && compile && theirs && freecode && finish);
    rb_cluster *c = make_cluster(9, 1024, 1, 16);
    rb_end *tx = open_end(c, 0, RB_TX);
    uint32_t passed = 0, tried = 0;
    rb_desc d;
    CHECK(rb_alloc(tx, &d, 1) == 1);
    for (uint32_t e = 0; e < sizeof expressions / sizeof *expressions; e++) {
        struct rb_filter *f;
        struct program program;
        void *pcap = open_dead(1, 262144);
        OK(rb_filter_compile(expressions[e], &f));
        CHECK(f && compile(pcap, &program, expressions[e], 1, 0xffffffff) == 0);
        for (int i = 0; i < 4000; i++) {
            uint8_t packet[256];
            uint32_t length = RB_MIN(make_packet(packet), 256u - RB_BUFFER_HEADER);
            rb_desc_set(&d, length, RB_BUFFER_HEADER, 0);
            memcpy(rb_data(c, &d), packet, length);
            bool want = theirs(program.insn, packet, length, length) != 0, got = rb_filter_match(f, c, &d);
            if (want != got)
                fprintf(stderr, "\"%s\" at packet %d of %u bytes: libpcap says %d\n", expressions[e], i, length, want);
            CHECK(want == got);
            passed += got;
            tried++;
        }
        freecode(&program);
        finish(pcap);
        free(f);
    }
    CHECK(passed > tried / 100 && passed < tried);
    rb_return(c, &d, 1);
    rb_cluster_close(c);
    OK(rb_cluster_destroy(9, 1));
}

/* The fragments of a packet go with the first of them. */
static void fragments_share_their_fate(void)
{
    struct rb_filter *f;
    rb_cluster *c = make_cluster(9, 1024, 1, 16);
    rb_end *tx = open_end(c, 0, RB_TX);
    rb_desc d[4];
    CHECK(rb_alloc(tx, d, 4) == 4);
    if (rb_filter_compile("ether[0] = 7", &f) == 0) {
        static const uint8_t first[] = {7, 9, 7, 9};
        for (int i = 0; i < 4; i++) {
            rb_desc_set(&d[i], 60, RB_BUFFER_HEADER, i == 0 || i == 3 ? RB_MORE : 0);
            memset(rb_data(c, &d[i]), first[i], 60);
        }
        CHECK(rb_filter_match(f, c, &d[0]) && rb_filter_match(f, c, &d[1])); /* 7, its fragment */
        CHECK(rb_filter_match(f, c, &d[2]) && !rb_filter_match(f, c, &d[3])); /* another; 9 with a fragment to come */
        rb_desc_set(&d[0], 60, RB_BUFFER_HEADER, 0);
        CHECK(!rb_filter_match(f, c, &d[0]) && rb_filter_match(f, c, &d[0])); /* that one; then one of its own */
        free(f);
    }
    rb_return(c, d, 4);
    rb_cluster_close(c);
    OK(rb_cluster_destroy(9, 1));
}

static uint32_t be16(const uint8_t *p) { return (uint32_t)(p[0] << 8 | p[1]); }

static void segments_are_whole_frames(void)
{
    uint8_t frame[4000], out[2048];
    for (int v6 = 0; v6 < 2; v6++)
        for (int tcp = 0; tcp < 2; tcp++)
            for (uint32_t tag = 0; tag < 2; tag++) {
                const uint32_t l4 = v6 ? 54 : 34, headers = l4 + (tcp ? 32u : 8u), payload = 2500, extra = tag ? 4 : 0;
                struct virtio_net_hdr v = {.gso_type = tcp ? (v6 ? VIRTIO_NET_HDR_GSO_TCPV6 : VIRTIO_NET_HDR_GSO_TCPV4) : 5, .gso_size = 1000};
                memset(frame, 0, sizeof frame);
                frame[12] = v6 ? 0x86 : 8, frame[13] = v6 ? 0xdd : 0;
                frame[14] = v6 ? 0x60 : 0x45;
                frame[v6 ? 20 : 23] = tcp ? 6 : 17;
                frame[18] = 1; /* of IPv4: the packet's number */
                for (uint32_t i = 26; i < l4; i++)
                    frame[i] = (uint8_t)i;
                if (tcp) {
                    memset(frame + l4 + 4, 0xff, 4); /* the sequence goes round */
                    frame[l4 + 12] = 0x80, frame[l4 + 13] = 0x99; /* CWR, ACK, PSH, FIN */
                }
                for (uint32_t i = 0; i < payload; i++)
                    frame[headers + i] = (uint8_t)(i * 7 + i / 251);
                uint32_t got = 0, index = 0;
                for (bool last = false; !last; index++) {
                    memset(out, 0xee, sizeof out);
                    uint32_t n = rb_packet_segment(frame, headers + payload, &v, tag ? 0x81000005u : 0, index, out, sizeof out, &last);
                    CHECK(n == headers + extra + (last ? 500u : 1000u));
                    CHECK(!tag || (be16(out + 12) == 0x8100 && be16(out + 14) == 5));
                    const uint8_t *ip = out + 14 + extra, *l = out + l4 + extra;
                    uint32_t length = n - l4 - extra, sum = rb_packet_sum(v6 ? ip + 8 : ip + 12, v6 ? 32 : 8, (tcp ? 6u : 17u) + length);
                    CHECK(rb_packet_sum(l, length, sum) == 0xffff);
                    if (v6)
                        CHECK(be16(ip + 4) == length);
                    else
                        CHECK(be16(ip + 2) == n - 14 - extra && rb_packet_sum(ip, 20, 0) == 0xffff && be16(ip + 4) == 0x0100u + index);
                    if (tcp) {
                        CHECK((uint32_t)(be16(l + 4) << 16 | be16(l + 6)) == 0xffffffffu + got);
                        CHECK(l[13] == (index == 0 ? 0x90 : last ? 0x19 : 0x10));
                    } else
                        CHECK(be16(l + 4) == length);
                    CHECK(memcmp(out + headers + extra, frame + headers + got, length - (headers - l4)) == 0);
                    got += length - (headers - l4);
                }
                CHECK(index == 3 && got == payload);
                bool last;
                CHECK(rb_packet_segment(frame, headers + payload, &v, 0, 3, out, sizeof out, &last) == 0 && last);
                CHECK(rb_packet_segment(frame, headers + payload, &v, 0, 0, out, 900, &last) == 0);
            }
    /* Anything at all: within bounds, which the sanitizers see. */
    for (int i = 0; i < 200000; i++) {
        struct virtio_net_hdr v = {.gso_type = (uint8_t)any(256), .gso_size = (uint16_t)any(3000), .flags = (uint8_t)any(4), .csum_start = (uint16_t)any(100)};
        uint8_t bytes[300];
        uint32_t n = RB_MIN(make_packet(bytes), 300u);
        bool last;
        CHECK(rb_packet_segment(bytes, n, &v, any(2) * 0x81000001u, any(3), out, any(2048), &last) <= 2048);
    }
}

int main(void)
{
    private_directories();
    RUN(filters_decide_as_libpcap_does);
    RUN(fragments_share_their_fate);
    RUN(segments_are_whole_frames);
    return 0;
}
