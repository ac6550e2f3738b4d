/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Steering rules in the kernel say what libpcap's own interpreter says: every expression below, on packets of many kinds, whole, cut short and
 * scrambled, is translated, loaded and run by BPF_PROG_TEST_RUN. Skipped (77) where BPF programs cannot be loaded.
 */
#define _GNU_SOURCE
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <errno.h>
#include <linux/filter.h>
#define bpf_insn classic_insn /* libpcap has another structure of this name */
#include <pcap/pcap.h>
#undef bpf_insn
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "xdp_internal.h"
#include "xdp_rule.h"

static const char *const expressions[] = {
    "udp port 5000", "tcp", "udp", "port 5000 or port 6000", "portrange 4000-5000", "not port 22", "ip", "ip6", "arp", "icmp", "icmp6",
    "host 10.0.0.1", "net 10.0.0.0/8", "src net 192.168.0.0/16 or dst net 10.1.0.0/16", "ip6 net 2001:db8::/32", "ether src 02:00:00:00:00:01",
    "ether multicast", "broadcast", "vlan", "vlan 10", "vlan 10 and udp port 5000", "vlan and (ether[14:2] & 0xfff = 10 or ether[14:2] & 0xfff = 20)",
    "less 64", "greater 100", "len = 60", "ip[0] & 0xf != 5", "tcp[tcpflags] & (tcp-syn|tcp-ack) = tcp-syn", "ip[2:2] - ((ip[0]&0xf)<<2) > 20",
    "udp[8:4] = 0x72696e67", "ether[ether[14] + 2] = 5", "ether[0x7000] = 1", "ip[6:2] & 0x1fff = 0", "ether proto 0x88cc", "mpls", "pppoes",
    "ip[8] / (ip[9] - 17) = 3", "ip[8] % ip[1] = 0", "(ip[8] << ip[1]) = 64", "(ip[8] >> (ip[1] + 40)) = 0", "ether[4] * ether[5] = 6",
    "ip proto 47", "sctp", "gateway 10.0.0.1 or udp", "tcp portrange 1-1023 and src host 10.0.0.1", "not (tcp or udp)", "-1 = 0xffffffff", "1 = 2", "1 = 1",
    "ip[2:2] = -(0 - ip[2:2])", "icmp[icmptype] = icmp-echo", "ip6 and udp port 5000", "tcp[((tcp[12] & 0xf0) >> 2):4] = 0x47455420",
    "ip6 protochain 17", "inbound",
};

/* Of these: loops, and what is not in the packet. */
static const char refused[] = "ip6 protochain 17, inbound";

static uint64_t state = 88172645463325252ull;
static uint32_t random_number(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 16);
}

/* A packet that most of the expressions have something to say about. */
static uint32_t make(uint8_t *p)
{
    static const uint16_t ports[] = {22, 80, 4500, 5000, 6000, 443};
    uint32_t at = 12, kind = random_number() % 8;

    memset(p, 0, 256);
    memcpy(p, (uint8_t[]){2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, (uint8_t)(random_number() % 2)}, 12);
    if (random_number() % 8 == 0)
        memset(p, 0xff, 6);
    if (random_number() % 3 == 0) {
        p[at] = 0x81;
        p[at + 3] = (uint8_t)(10 * (random_number() % 3));
        at += 4;
    }
    if (kind < 5) { /* IPv4 */
        uint8_t *ip = p + at + 2, words = random_number() % 4 ? 5 : 7;

        p[at] = 8;
        ip[0] = 0x40 | words;
        ip[1] = (uint8_t)(random_number() % 3);
        ip[3] = (uint8_t)(40 + random_number() % 100);
        ip[6] = random_number() % 6 ? 0 : 1;
        ip[8] = 64;
        ip[9] = (uint8_t[]){17, 6, 17, 1, 47}[kind];
        memcpy(ip + 12, (uint8_t[]){10, (uint8_t)(random_number() % 2), 0, 1}, 4);
        memcpy(ip + 16, (uint8_t[]){192, 168, 0, 2}, 4);
        at += 2 + 4u * words;
    } else if (kind < 7) {
        p[at] = 0x86;
        p[at + 1] = 0xdd;
        p[at + 2] = 0x60;
        p[at + 8] = kind == 5 ? 17 : 58;
        memcpy(p + at + 10, (uint8_t[]){0x20, 1, 0x0d, 0xb8}, 4);
        at += 42;
    } else {
        p[at] = 8;
        p[at + 1] = 6;
        at += 2;
    }
    for (int i = 0; i < 2; i++) {
        uint16_t port = ports[random_number() % 6];

        p[at + 2 * i] = (uint8_t)(port >> 8);
        p[at + 2 * i + 1] = (uint8_t)port;
    }
    memcpy(p + at + 8, "ring", 4);
    p[at + 12] = 0x50;
    p[at + 13] = (uint8_t)(random_number() % 32);
    for (int i = 0; random_number() % 4 == 0 && i < 3; i++)
        p[random_number() % 100] = (uint8_t)random_number();
    return random_number() % 3 ? 60 + random_number() % 100 : 14 + random_number() % 60;
}

static int run(int fd, uint8_t *packet, uint32_t length)
{
    LIBBPF_OPTS(bpf_test_run_opts, opts, .data_in = packet, .data_size_in = length, .repeat = 1);

    if (bpf_prog_test_run_opts(fd, &opts)) {
        printf("BPF_PROG_TEST_RUN: %s\n", strerror(errno));
        exit(1);
    }
    return (int)opts.retval;
}

static int load(const struct code *code, bool frags, int attach)
{
    static char log[1 << 20];
    LIBBPF_OPTS(bpf_prog_load_opts, opts, .expected_attach_type = (enum bpf_attach_type)attach, .prog_flags = frags ? BPF_F_XDP_HAS_FRAGS : 0);
    int fd = bpf_prog_load(BPF_PROG_TYPE_XDP, "rule", "Dual BSD/GPL", code->insn, code->n, &opts);

    if (fd < 0 && errno != EPERM) {
        int why = errno;

        opts.log_buf = log;
        opts.log_size = sizeof log;
        opts.log_level = 1;
        bpf_prog_load(BPF_PROG_TYPE_XDP, "rule", "Dual BSD/GPL", code->insn, code->n, &opts);
        size_t n = strlen(log);
        printf("the verifier: %s\n%s\n", strerror(why), n > 2000 ? log + n - 2000 : log);
    }
    return fd;
}

int main(void)
{
    /* A device map has somewhere to redirect to in a test run, an XSKMAP without sockets has not. */
    int redirect[2], passed = bpf_map_create(BPF_MAP_TYPE_PERCPU_ARRAY, "passed", 4, 8, 1, NULL);
    uint32_t key = 0, lo = 1, differ = 0, compared = 0, took = 0, refusals = 0;

    for (int i = 0; i < 2; i++) /* one for programs that know fragments, one for those that do not */
        redirect[i] = bpf_map_create(BPF_MAP_TYPE_DEVMAP, "rule_test", 4, 4, 1, NULL);
    if (redirect[0] < 0 || redirect[1] < 0 || passed < 0) {
        printf("skipped: BPF maps cannot be made here: %s\n", strerror(errno));
        return 77;
    }
    if (bpf_map_update_elem(redirect[0], &key, &lo, BPF_ANY) || bpf_map_update_elem(redirect[1], &key, &lo, BPF_ANY))
        return 1;
    for (unsigned e = 0; e < sizeof expressions / sizeof *expressions; e++)
        for (int frags = 0; frags < 2; frags++) {
            pcap_t *dead = pcap_open_dead(DLT_EN10MB, 65535);
            struct bpf_program classic;
            struct code code;
            struct rb_xdp_error err;

            if (pcap_compile(dead, &classic, expressions[e], 1, PCAP_NETMASK_UNKNOWN)) {
                pcap_close(dead); /* always true or false, says libpcap itself */
                continue;
            }
            struct rb_xdp_rule rule = {.insns = (const struct rb_xdp_insn *)classic.bf_insns, .count = classic.bf_len};
            struct rule_maps maps = {.xsks = redirect[frags], .passed = passed, .frags = frags};
            int r = rb_rule_translate(&code, &rule, 1, &maps, &err), fd;

            if (r && strstr(refused, expressions[e]) && err.cure[0]) {
                refusals++;
                pcap_freecode(&classic);
                pcap_close(dead);
                continue;
            }
            if (r) {
                printf("%s: not translated: %s\n", expressions[e], err.text);
                return 1;
            }
            if ((fd = load(&code, frags, BPF_XDP)) < 0) {
                if (errno == EPERM)
                    return 77;
                printf("%s: not loaded\n", expressions[e]);
                return 1;
            }
            for (int i = 0; i < 400; i++) {
                uint8_t packet[512];
                uint32_t length = make(packet);
                struct pcap_pkthdr head = {.caplen = length, .len = length};
                int want = pcap_offline_filter(&classic, &head, packet) ? XDP_REDIRECT : XDP_PASS, got = run(fd, packet, length);

                compared++;
                took += got == XDP_REDIRECT;
                if (want != got) {
                    printf("%s: packet %d of %u bytes: %d, and libpcap says %d\n", expressions[e], i, length, got, want);
                    differ++;
                    break;
                }
            }
            close(fd);
            rb_code_free(&code);
            pcap_freecode(&classic);
            pcap_close(dead);
        }
    printf("%u compared, %u taken, %u expressions differ\n", compared, took, differ);
    return differ || !took || took == compared || refusals != 4;
}
