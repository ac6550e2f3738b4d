/* SPDX-License-Identifier: Apache-2.0
 * Capture files: both formats, both byte orders, whatever a file may contain, and files that were cut or tampered with. Needs no ringbar. Further
 * files may be named as arguments: they are read and tampered with as well; --list FILE prints what is in one. */
#include "pcapfile.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(x)                                                                                                                                       \
    do {                                                                                                                                               \
        if (!(x)) {                                                                                                                                    \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #x);                                                                            \
            exit(1);                                                                                                                                   \
        }                                                                                                                                              \
    } while (0)
#define RUN(test)                                                                                                                                      \
    do {                                                                                                                                               \
        test();                                                                                                                                        \
        printf("ok %s\n", #test);                                                                                                                      \
        fflush(stdout);                                                                                                                                \
    } while (0)

/* ---- a file in memory, written in either byte order ----------------------------------------------------------------------- */

struct file {
    uint8_t *bytes;
    size_t n, room, at;
    bool swap;
    unsigned stall; /* not 0: at most so many bytes at a time, and nothing every other time */
    bool stalled;
};

static void put(struct file *f, const void *data, size_t n)
{
    while (f->n + n > f->room) {
        f->room = f->room ? 2 * f->room : 4096;
        CHECK((f->bytes = realloc(f->bytes, f->room)));
    }
    if (n)
        memcpy(f->bytes + f->n, data, n);
    f->n += n;
}
static void u16(struct file *f, uint16_t v)
{
    v = f->swap ? __builtin_bswap16(v) : v;
    put(f, &v, 2);
}
static void u32(struct file *f, uint32_t v)
{
    v = f->swap ? __builtin_bswap32(v) : v;
    put(f, &v, 4);
}
static void u64(struct file *f, uint64_t v)
{
    v = f->swap ? __builtin_bswap64(v) : v;
    put(f, &v, 8);
}
static void fill(struct file *f, uint8_t seed, size_t n)
{
    for (size_t i = 0; i < n; i++)
        put(f, &(uint8_t){(uint8_t)(seed + i)}, 1);
}
static void pad(struct file *f) { put(f, "\0\0\0", (4 - f->n % 4) % 4); }

/* A block: what lies between begin and end is its body. */
static size_t begin(struct file *f, uint32_t type)
{
    size_t at = f->n;
    u32(f, type);
    u32(f, 0);
    return at;
}
static void end(struct file *f, size_t at)
{
    pad(f);
    uint32_t length = (uint32_t)(f->n - at) + 4, v = f->swap ? __builtin_bswap32(length) : length;
    memcpy(f->bytes + at + 4, &v, 4);
    u32(f, length);
}
static void section(struct file *f)
{
    size_t at = begin(f, 0x0a0d0d0a);
    u32(f, 0x1a2b3c4d);
    u16(f, 1);
    u16(f, 0);
    u64(f, UINT64_MAX);
    end(f, at);
}
static void interface(struct file *f, uint16_t link, uint32_t snaplen, int resolution, int64_t offset)
{
    size_t at = begin(f, 1);
    u16(f, link);
    u16(f, 0);
    u32(f, snaplen);
    u16(f, 2); /* its name */
    u16(f, 5);
    put(f, "eth0\0\0\0\0", 8);
    if (resolution >= 0) {
        u16(f, 9);
        u16(f, 1);
        put(f, &(uint8_t){(uint8_t)resolution}, 1);
        pad(f);
    }
    if (offset) {
        u16(f, 14);
        u16(f, 8);
        u64(f, (uint64_t)offset);
    }
    u32(f, 0);
    end(f, at);
}
static void enhanced(struct file *f, uint32_t iface, uint64_t units, uint8_t seed, uint32_t length)
{
    size_t at = begin(f, 6);
    u32(f, iface);
    u32(f, (uint32_t)(units >> 32));
    u32(f, (uint32_t)units);
    u32(f, length);
    u32(f, length + 100);
    fill(f, seed, length);
    pad(f);
    u16(f, 1); /* a comment */
    u16(f, 2);
    put(f, "hi\0\0", 4);
    u32(f, 0);
    end(f, at);
}
static void pcap_header(struct file *f, uint32_t magic, uint32_t link)
{
    u32(f, magic);
    u16(f, 2);
    u16(f, 4);
    u64(f, 0);
    u32(f, 65535);
    u32(f, link);
}
static void pcap_record(struct file *f, uint32_t sec, uint32_t fraction, uint8_t seed, uint32_t length)
{
    u32(f, sec);
    u32(f, fraction);
    u32(f, length);
    u32(f, length);
    fill(f, seed, length);
}

static ssize_t from_memory(void *arg, void *buffer, size_t n)
{
    struct file *f = arg;
    if (f->stall) {
        f->stalled = !f->stalled;
        if (f->stalled) {
            errno = EAGAIN;
            return -1;
        }
        n = n < f->stall ? n : f->stall;
    }
    n = n < f->n - f->at ? n : f->n - f->at;
    if (n)
        memcpy(buffer, f->bytes + f->at, n);
    f->at += n;
    return (ssize_t)n;
}

static void drop(struct file *f)
{
    free(f->bytes);
    *f = (struct file){0};
}

/* ---- reading all of it ----------------------------------------------------------------------------------------------------------- */

struct seen {
    int packets, last; /* last: what pcap_next ended with */
    uint64_t bytes, sum, ts[64];
    uint32_t length[64], interface[64], link[64];
    char why[256];
};

static struct seen read_with(struct pcap_reader *r, struct file *f)
{
    struct seen s = {0};
    struct pcap_packet p;
    f->at = 0;
    for (uint64_t turns = 0; (s.last = pcap_next(r, &p)) == PCAP_PACKET || s.last == PCAP_NOW; turns++) {
        CHECK(turns < 4 * (f->n + 16)); /* each turn takes bytes, or waits for some */
        if (s.last == PCAP_NOW) {
            CHECK(f->stall);
            continue;
        }
        CHECK(p.length <= PCAP_MAX_PACKET);
        if (s.packets < 64) {
            s.ts[s.packets] = p.ts;
            s.length[s.packets] = p.length;
            s.interface[s.packets] = p.interface;
            s.link[s.packets] = p.link;
        }
        for (uint32_t i = 0; i < p.length; i++)
            s.sum = s.sum * 31 + p.data[i];
        s.packets++;
        s.bytes += p.length;
        CHECK(s.bytes <= f->n);
    }
    CHECK((s.last < 0) == (*pcap_why(r) != 0));
    snprintf(s.why, sizeof s.why, "%s", pcap_why(r));
    CHECK(pcap_next(r, &p) == s.last); /* an end stays one */
    return s;
}

static struct file *source;
static ssize_t from_source(void *arg, void *buffer, size_t n)
{
    (void)arg;
    return from_memory(source, buffer, n);
}

/* By a reader that has read others before: what they left in its memory must not be seen. */
static struct seen read_all(struct file *f)
{
    static struct pcap_reader *r;
    if (!r)
        CHECK((r = pcap_reader_new(from_source, NULL)));
    source = f;
    pcap_reader_rewind(r);
    return read_with(r, f);
}

static struct seen read_anew(struct file *f)
{
    struct pcap_reader *r = pcap_reader_new(from_memory, f);
    CHECK(r);
    struct seen s = read_with(r, f);
    pcap_reader_free(r);
    return s;
}

#define HAS(s, text) (strstr((s).why, text) != NULL)

/* ---- seeds ------------------------------------------------------------------------------------------------------------------------- */

static void make_pcap(struct file *f, bool swap, bool nano)
{
    f->swap = swap;
    pcap_header(f, nano ? 0xa1b23c4d : 0xa1b2c3d4, 1);
    for (unsigned i = 0; i < 5; i++)
        pcap_record(f, 1700000000 + i, 123456, (uint8_t)(7 * i), 60 + 13 * i);
}

static void make_pcapng(struct file *f, bool swap)
{
    size_t at;
    f->swap = swap;
    section(f);
    interface(f, 1, 0, -1, 0);     /* microseconds */
    interface(f, 1, 50, 9, 0);     /* nanoseconds */
    interface(f, 113, 0, 0x94, 5); /* units of 2^-20 s, five seconds later */
    at = begin(f, 0x0bad);         /* unknown: skipped */
    fill(f, 1, 333);
    end(f, at);
    enhanced(f, 0, 1700000000000001ull, 3, 61);
    enhanced(f, 1, 1700000000000000001ull, 4, 62);
    enhanced(f, 2, (1700000000ull << 20) + (1u << 19), 5, 63);
    at = begin(f, 2); /* the obsolete packet block */
    u16(f, 1);
    u16(f, 0xffff);
    u32(f, (uint32_t)(1700000000000000002ull >> 32));
    u32(f, (uint32_t)1700000000000000002ull);
    u32(f, 30);
    u32(f, 99);
    fill(f, 6, 30);
    end(f, at);
    at = begin(f, 3); /* a simple packet: cut by interface 0's snaplen, which is none */
    u32(f, 45);
    fill(f, 7, 45);
    end(f, at);
    f->swap = !swap; /* a second section, the other way round */
    section(f);
    interface(f, 1, 20, 6, 0);
    at = begin(f, 3);
    u32(f, 1000);
    fill(f, 8, 20);
    end(f, at);
    enhanced(f, 0, 1700000001000000ull, 9, 64);
}

/* ---- tests --------------------------------------------------------------------------------------------------------------------------- */

static void pcap_in_both_orders_and_both_units(void)
{
    for (int i = 0; i < 4; i++) {
        struct file f = {0};
        make_pcap(&f, i & 1, i & 2);
        struct seen s = read_all(&f);
        CHECK(s.last == PCAP_END && s.packets == 5);
        for (unsigned k = 0; k < 5; k++)
            CHECK(s.length[k] == 60 + 13 * k && s.link[k] == 1 && s.ts[k] == (1700000000ull + k) * 1000000000 + (i & 2 ? 123456 : 123456000));
        drop(&f);
    }
}

static void pcapng_with_sections_interfaces_and_every_packet_block(void)
{
    uint64_t sums[2];
    for (int i = 0; i < 2; i++) {
        struct file f = {0};
        make_pcapng(&f, i);
        struct seen s = read_all(&f);
        static const uint64_t ts[] = {1700000000000001000u, 1700000000000000001u, 1700000005500000000u, 1700000000000000002u, 0, 0, 1700000001000000000u};
        static const uint32_t length[] = {61, 62, 63, 30, 45, 20, 64}, interface[] = {0, 1, 2, 1, 0, 0, 0}, link[] = {1, 1, 113, 1, 1, 1, 1};
        CHECK(s.last == PCAP_END && s.packets == 7);
        for (int k = 0; k < 7; k++)
            CHECK(s.ts[k] == ts[k] && s.length[k] == length[k] && s.interface[k] == interface[k] && s.link[k] == link[k]);
        sums[i] = s.sum;
        drop(&f);
    }
    CHECK(sums[0] == sums[1]);
}

static void a_source_that_stalls_gives_the_same_packets(void)
{
    for (int i = 0; i < 3; i++) {
        struct file f = {0};
        if (i)
            make_pcapng(&f, i & 1);
        else
            make_pcap(&f, false, false);
        struct seen all = read_all(&f);
        for (f.stall = 1; f.stall < 40; f.stall += 3) {
            struct seen s = read_all(&f);
            CHECK(s.last == PCAP_END && s.packets == all.packets && s.sum == all.sum);
        }
        drop(&f);
    }
}

static void unwanted_blocks_of_any_size_are_skipped(void)
{
    struct file f = {0};
    section(&f);
    interface(&f, 1, 0, -1, 0);
    size_t at = begin(&f, 10); /* decryption secrets: more than the window holds */
    fill(&f, 0, 3 * PCAP_MAX_BLOCK);
    end(&f, at);
    enhanced(&f, 0, 1, 1, 60);
    struct seen s = read_all(&f);
    CHECK(s.last == PCAP_END && s.packets == 1 && s.length[0] == 60);
    f.n = at + 3000000 / 2;
    s = read_all(&f);
    CHECK(s.last == -EBADMSG && HAS(s, "record 3, at byte 64, is cut off"));
    drop(&f);
}

/* What is whole is used, then one error that says which record and where; none at the end of a record. */
static void a_file_cut_anywhere_gives_what_is_whole(void)
{
    for (int i = 0; i < 3; i++) {
        struct file f = {0};
        if (i)
            make_pcapng(&f, i & 1);
        else
            make_pcap(&f, false, true);
        int before = 0, clean = 0;
        for (size_t whole = f.n, n = 0; n <= whole; n++) {
            f.n = n;
            struct seen s = read_all(&f);
            CHECK(s.packets >= before && s.packets <= before + 1);
            CHECK(s.last == -EBADMSG || s.last == PCAP_END);
            CHECK(s.last == PCAP_END || HAS(s, "cut off") || HAS(s, "empty") || HAS(s, "less than four"));
            clean += s.last == PCAP_END;
            before = s.packets;
        }
        CHECK(clean == (i ? 14 : 6)); /* after each record, and after the header */
        drop(&f);
    }
    struct file f = {0};
    make_pcap(&f, false, false);
    f.n = 24 + 16 + 60 + 16 + 10;
    struct seen s = read_all(&f);
    CHECK(s.packets == 1 && HAS(s, "record 2, at byte 100, is cut off: 26 of its 89 bytes are there"));
    drop(&f);
}

static void other_files_are_told_by_name(void)
{
    static const struct {
        const char *bytes, *says;
    } other[] = {
        {"\x1f\x8b\x08\0....", "gzip"},      {"\x28\xb5\x2f\xfd....", "zstd"}, {"snoop\0\0\0", "snoop"},
        {"#!/bin/sh\n", "no capture file"}, {"\xfd\x37zXZ....", "xz"},        {"\x34\xcd\xb2\xa1....", "modified pcap"},
    };
    for (size_t i = 0; i < sizeof other / sizeof *other; i++) {
        struct file f = {0};
        put(&f, other[i].bytes, 8);
        struct seen s = read_all(&f);
        CHECK(s.last == -EBADMSG && HAS(s, other[i].says));
        drop(&f);
    }
}

static void malformed_records_are_refused(void)
{
    struct file f = {0};
    pcap_header(&f, 0xa1b2c3d4, 1);
    pcap_record(&f, 1, 1, 0, 60);
    u64(&f, 0);
    u32(&f, 0x7fffffff);
    u32(&f, 60);
    struct seen s = read_all(&f);
    CHECK(s.packets == 1 && s.last == -EBADMSG && HAS(s, "record 2, at byte 100, is malformed: a packet of 2147483647 bytes"));
    drop(&f);

    static const uint32_t lengths[] = {0, 4, 8, 11, 13, 33, 0xfffffffc, PCAP_MAX_BLOCK + 4};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        section(&f);
        interface(&f, 1, 0, -1, 0);
        u32(&f, 6);
        u32(&f, lengths[i]);
        fill(&f, 0, 40);
        s = read_all(&f);
        CHECK(s.packets == 0 && s.last == -EBADMSG && HAS(s, "record 3, at byte 64, is malformed: a block of "));
        drop(&f);
    }
    section(&f);
    enhanced(&f, 0, 0, 0, 60);
    s = read_all(&f);
    CHECK(s.last == -EBADMSG && HAS(s, "a packet of interface 0, and 0 are described"));
    drop(&f);

    section(&f);
    interface(&f, 1, 0, 0x80 | 64, 0);
    s = read_all(&f);
    CHECK(s.last == -EBADMSG && HAS(s, "units of 2^-64"));
    drop(&f);

    section(&f);
    for (int i = 0; i < 4097; i++)
        interface(&f, 1, 0, -1, 0);
    s = read_all(&f);
    CHECK(s.last == -EBADMSG && HAS(s, "a section may have 4096"));
    drop(&f);

    section(&f); /* lengths at the two ends that differ */
    interface(&f, 1, 0, -1, 0);
    f.bytes[f.n - 4] ^= 4;
    s = read_all(&f);
    CHECK(s.last == -EBADMSG && HAS(s, "two ends differ"));
    drop(&f);
}

static void times_far_off_are_bounded(void)
{
    struct file f = {0};
    section(&f);
    interface(&f, 1, 0, 0, INT64_MAX);
    interface(&f, 1, 0, 19, INT64_MIN);
    enhanced(&f, 0, UINT64_MAX, 0, 60);
    enhanced(&f, 1, UINT64_MAX, 0, 60);
    struct seen s = read_all(&f);
    CHECK(s.packets == 2 && s.ts[0] == UINT64_MAX && s.ts[1] == 0);
    drop(&f);
}

static void what_is_written_is_read_again(void)
{
    for (int format = 0; format < 2; format++) {
        struct file f = {0};
        uint8_t out[PCAP_HEADER_ROOM + 2000], data[1500];
        size_t n = pcap_put_header(out, format, 0, "99@0", "ringbar test"), header = n;
        CHECK(n <= PCAP_HEADER_ROOM);
        put(&f, out, n);
        for (uint32_t i = 0; i < sizeof data; i++)
            data[i] = (uint8_t)(i * 17);
        for (uint32_t i = 1; i < 50; i++) {
            CHECK((n = pcap_put_packet(out, format, 1700000000000000000ull + i, data, i * 30, i * 31)) <= PCAP_RECORD_ROOM + i * 30);
            put(&f, out, n);
        }
        struct seen s = read_all(&f);
        CHECK(s.last == PCAP_END && s.packets == 49);
        for (uint32_t i = 0; i < 49; i++)
            CHECK(s.length[i] == 30 * (i + 1) && s.ts[i] == 1700000000000000001ull + i && s.link[i] == PCAP_ETHERNET);
        /* A file that was cut, as by a full disk, and cut back to its whole records. */
        for (size_t whole = f.n, k = header; k <= whole; k += 7) {
            uint64_t packets;
            f.n = pcap_whole(f.bytes, format, 1, k, &packets);
            CHECK(f.n <= k && f.n >= header);
            s = read_all(&f);
            CHECK(s.last == PCAP_END && s.packets == (int)packets);
        }
        drop(&f);
    }
}

/* ---- files that were tampered with --------------------------------------------------------------------------------------------------- */

static uint64_t state;
static uint32_t any(uint32_t below)
{
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)((state >> 33) % below);
}

static void tamper(const struct file *whole, unsigned times)
{
    static const uint32_t odd[] = {0, 1, 4, 12, 0x7fffffff, 0x80000000, 0xffffffff, 0xfffffffc, 0x0a0d0d0a, 6, 2, PCAP_MAX_PACKET, PCAP_MAX_BLOCK};
    uint64_t sum = 0;
    for (unsigned i = 0; i < times; i++) {
        struct file f = {.stall = any(8) == 0 ? 1 + any(5) * 100 : 0};
        put(&f, whole->bytes, any(16) ? whole->n : any((uint32_t)whole->n + 1));
        for (uint32_t k = any(6); f.n && k; k--) {
            uint32_t at = any((uint32_t)f.n), n = any(64);
            switch (any(5)) {
            case 0:
                f.bytes[at] ^= (uint8_t)(1u << any(8));
                break;
            case 1:
                f.bytes[at] = (uint8_t)any(256);
                break;
            case 2: /* a field, in either order */
                if (at / 4 * 4 + 4 <= f.n) {
                    uint32_t v = odd[any(sizeof odd / sizeof *odd)];
                    v = any(2) ? v : __builtin_bswap32(v);
                    memcpy(f.bytes + at / 4 * 4, &v, 4);
                }
                break;
            case 3: /* a piece is missing */
                n = n < f.n - at ? n : (uint32_t)(f.n - at);
                memmove(f.bytes + at, f.bytes + at + n, f.n - at - n);
                f.n -= n;
                break;
            default: /* a piece comes twice */
                n = n < f.n - at ? n : (uint32_t)(f.n - at);
                uint8_t piece[64];
                memcpy(piece, f.bytes + at, n);
                put(&f, piece, n);
            }
        }
        struct seen s = read_all(&f);
        sum += (uint64_t)s.packets;
        if (i % 32 == 0) {
            struct seen other = read_anew(&f);
            CHECK(other.packets == s.packets && other.sum == s.sum && other.last == s.last && strcmp(other.why, s.why) == 0);
        }
        CHECK(s.last == PCAP_END || s.last == -EBADMSG);
        drop(&f);
    }
    struct file all = *whole;
    CHECK(sum > 0 || read_all(&all).packets == 0); /* some packets are read even so */
}

static void tampered_files_are_read_without_harm(void)
{
    unsigned times = 4000;
    for (int i = 0; i < 4; i++) {
        struct file f = {0};
        state = 17 + (uint64_t)i;
        if (i < 2)
            make_pcap(&f, i, i);
        else
            make_pcapng(&f, i & 1);
        tamper(&f, times);
        drop(&f);
    }
}

static void a_file(const char *path)
{
    struct file f = {0};
    uint8_t piece[65536];
    FILE *in = fopen(path, "rb");
    CHECK(in);
    for (size_t n; f.n < 200000 && (n = fread(piece, 1, sizeof piece, in)) > 0;)
        put(&f, piece, n);
    fclose(in);
    state = f.n;
    if (f.n)
        tamper(&f, (unsigned)(20000000 / (f.n + 20000)));
    drop(&f);
}

/* One line a packet: interface, link type, nanoseconds, bytes that are there, bytes that it had. */
static int list(const char *path)
{
    struct pcap_packet p;
    FILE *in = fopen(path, "rb");
    struct file f = {0};
    uint8_t piece[65536];
    CHECK(in);
    for (size_t n; (n = fread(piece, 1, sizeof piece, in)) > 0;)
        put(&f, piece, n);
    fclose(in);
    struct pcap_reader *r = pcap_reader_new(from_memory, &f);
    int rc;
    while ((rc = pcap_next(r, &p)) == PCAP_PACKET)
        printf("%u %u %llu %u %u\n", p.interface, p.link, (unsigned long long)p.ts, p.length, p.original);
    if (rc < 0)
        printf("%s\n", pcap_why(r));
    pcap_reader_free(r);
    drop(&f);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "--list") == 0)
        return list(argv[2]);
    RUN(pcap_in_both_orders_and_both_units);
    RUN(pcapng_with_sections_interfaces_and_every_packet_block);
    RUN(a_source_that_stalls_gives_the_same_packets);
    RUN(unwanted_blocks_of_any_size_are_skipped);
    RUN(a_file_cut_anywhere_gives_what_is_whole);
    RUN(other_files_are_told_by_name);
    RUN(malformed_records_are_refused);
    RUN(times_far_off_are_bounded);
    RUN(what_is_written_is_read_again);
    RUN(tampered_files_are_read_without_harm);
    for (int i = 1; i < argc; i++)
        a_file(argv[i]);
    return 0;
}
