/* SPDX-License-Identifier: Apache-2.0
 *
 * Capture files. The formats: draft-ietf-opsawg-pcap and draft-ietf-opsawg-pcapng. A record is looked at when it lies whole in the window, so a
 * source that stalls in the middle of one is simply asked again later.
 */
#include "pcapfile.h"

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>

#define WINDOW (2 * PCAP_MAX_BLOCK)
#define MAX_INTERFACES 4096u /* of a section */
#define BLOCK_SECTION 0x0a0d0d0au

enum { BLOCK_INTERFACE = 1, BLOCK_OBSOLETE = 2, BLOCK_SIMPLE = 3, BLOCK_ENHANCED = 6 };
enum { OPTION_END = 0, OPTION_IF_NAME = 2, OPTION_IF_TSRESOL = 9, OPTION_IF_TSOFFSET = 14 };
enum { UNKNOWN, PCAP, PCAPNG };

struct interface {
    uint32_t link, snaplen;
    uint64_t per_second; /* units of its times */
    int64_t offset;      /* seconds to add */
};

struct pcap_reader {
    pcap_read_fn read;
    void *arg;
    int kind;
    bool swap;         /* the other byte order */
    uint32_t nano;     /* nanoseconds in the unit of a pcap file's fraction */
    uint32_t link;
    struct interface *interface;
    uint32_t interfaces, room;
    uint64_t passed, records, start; /* bytes before the window; records begun; where the last of them is */
    uint64_t skip;                   /* bytes of an unwanted block still to come */
    uint32_t skip_length;            /* its length, to be found again at its end */
    size_t at, have;                 /* in the window */
    bool ended;
    int error;
    char why[200], remedy[120];
    uint8_t window[WINDOW];
};

struct pcap_reader *pcap_reader_new(pcap_read_fn read, void *arg)
{
    struct pcap_reader *r = malloc(sizeof *r);
    if (!r)
        return NULL;
    memset(r, 0, offsetof(struct pcap_reader, window));
    r->read = read;
    r->arg = arg;
    return r;
}

void pcap_reader_free(struct pcap_reader *r)
{
    if (r)
        free(r->interface);
    free(r);
}

void pcap_reader_rewind(struct pcap_reader *r)
{
    r->kind = UNKNOWN;
    r->interfaces = 0;
    r->passed = r->records = r->start = r->skip = 0;
    r->at = r->have = 0;
    r->ended = false;
    r->error = 0;
    r->why[0] = r->remedy[0] = 0;
}

const char *pcap_why(const struct pcap_reader *r) { return r->why; }
const char *pcap_remedy(const struct pcap_reader *r) { return r->remedy; }
uint32_t pcap_link(const struct pcap_reader *r) { return r->kind == PCAP ? r->link : UINT32_MAX; }

/* ---- bytes ------------------------------------------------------------------------------------------------------------- */

static uint16_t u16(const struct pcap_reader *r, const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return r->swap ? __builtin_bswap16(v) : v;
}
static uint32_t u32(const struct pcap_reader *r, const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return r->swap ? __builtin_bswap32(v) : v;
}
static uint64_t u64(const struct pcap_reader *r, const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return r->swap ? __builtin_bswap64(v) : v;
}

__attribute__((format(printf, 2, 3))) static int bad(struct pcap_reader *r, const char *format, ...)
{
    size_t n = 0;
    va_list args;
    if (r->records)
        n = (size_t)snprintf(r->why, sizeof r->why, "record %llu, at byte %llu, ", (unsigned long long)r->records, (unsigned long long)r->start);
    va_start(args, format);
    vsnprintf(r->why + n, sizeof r->why - n, format, args);
    va_end(args);
    return r->error = -EBADMSG;
}

/* n bytes from r->at in the window: 1; PCAP_NOW; 0 = the source ends before (r->have - r->at are left). n is at most PCAP_MAX_BLOCK. */
static int need(struct pcap_reader *r, size_t n)
{
    while (r->have - r->at < n) {
        if (r->ended)
            return 0;
        if (r->at + n > WINDOW || r->at == r->have) {
            memmove(r->window, r->window + r->at, r->have - r->at);
            r->have -= r->at;
            r->passed += r->at;
            r->at = 0;
        }
        ssize_t got = r->read(r->arg, r->window + r->have, WINDOW - r->have);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return PCAP_NOW;
        if (got < 0) {
            int failed = errno;
            snprintf(r->why, sizeof r->why, "it cannot be read: %s", strerror(failed));
            return r->error = -failed;
        }
        if ((size_t)got > WINDOW - r->have)
            got = 0;
        r->ended = got == 0;
        r->have += (size_t)got;
    }
    return 1;
}

/* The whole record, or else what need() said, where an end inside a record is an error. */
static int need_whole(struct pcap_reader *r, size_t n)
{
    int rc = need(r, n);
    if (rc == 0)
        return bad(r, "is cut off: %zu of its %zu bytes are there", r->have - r->at, n);
    return rc;
}

static uint64_t saturated(__int128 ns) { return ns < 0 ? 0 : ns > UINT64_MAX ? UINT64_MAX : (uint64_t)ns; }

/* ---- pcap -------------------------------------------------------------------------------------------------------------------- */

static int begin_pcap(struct pcap_reader *r)
{
    int rc = need(r, 24);
    if (rc == 0)
        return bad(r, "it is cut off: %zu of the 24 bytes of its header are there", r->have - r->at);
    if (rc != 1)
        return rc;
    const uint8_t *p = r->window + r->at;
    uint16_t major = u16(r, p + 4), minor = u16(r, p + 6);
    if (major != 2 || minor != 4)
        return bad(r, "it is of pcap version %u.%u, and 2.4 is the one that can be read", major, minor);
    r->link = u32(r, p + 20) & 0xffff; /* above: length of the FCS */
    r->kind = PCAP;
    r->at += 24;
    return PCAP_PACKET;
}

static int next_pcap(struct pcap_reader *r, struct pcap_packet *packet)
{
    int rc = need(r, 1);
    if (rc != 1)
        return rc;
    r->records++;
    r->start = r->passed + r->at;
    if ((rc = need_whole(r, 16)) == 1) {
        uint32_t length = u32(r, r->window + r->at + 8);
        if (length > PCAP_MAX_PACKET)
            return bad(r, "is malformed: a packet of %u bytes, and none has more than %u", length, PCAP_MAX_PACKET);
        rc = need_whole(r, 16 + length);
    }
    if (rc != 1) {
        r->records -= rc == PCAP_NOW;
        return rc;
    }
    const uint8_t *p = r->window + r->at;
    packet->length = u32(r, p + 8);
    packet->original = u32(r, p + 12);
    packet->data = p + 16;
    packet->link = r->link;
    packet->ts = u32(r, p) * 1000000000ull + (uint64_t)u32(r, p + 4) * r->nano;
    r->at += 16 + packet->length;
    return PCAP_PACKET;
}

/* ---- pcapng ------------------------------------------------------------------------------------------------------------------ */

static int section(struct pcap_reader *r, const uint8_t *body, uint32_t n)
{
    if (n < 16)
        return bad(r, "is malformed: a section header of %u bytes", n + 12);
    uint16_t major = u16(r, body + 4);
    if (major != 1)
        return bad(r, "is of pcapng version %u, and 1 is the one that can be read", major);
    r->interfaces = 0;
    r->kind = PCAPNG;
    return 0;
}

static int resolution(struct pcap_reader *r, struct interface *i, uint8_t value)
{
    unsigned n = value & 0x7f;
    if (n > (value & 0x80 ? 63u : 19u)) {
        bad(r, "is malformed: times in units of %s^-%u seconds", value & 0x80 ? "2" : "10", n);
        return -EBADMSG;
    }
    i->per_second = 1;
    for (unsigned k = 0; k < n; k++)
        i->per_second *= value & 0x80 ? 2 : 10;
    return 0;
}

static int interface(struct pcap_reader *r, const uint8_t *body, uint32_t n)
{
    if (n < 8)
        return bad(r, "is malformed: an interface description of %u bytes", n + 12);
    if (r->interfaces == r->room) {
        if (r->room == MAX_INTERFACES)
            return bad(r, "describes interface %u, and a section may have %u", r->interfaces, MAX_INTERFACES);
        uint32_t room = r->room ? 2 * r->room : 16;
        struct interface *more = realloc(r->interface, room * sizeof *more);
        if (!more) {
            snprintf(r->why, sizeof r->why, "out of memory");
            return r->error = -ENOMEM;
        }
        r->interface = more;
        r->room = room;
    }
    struct interface *i = &r->interface[r->interfaces];
    *i = (struct interface){.link = u16(r, body), .snaplen = u32(r, body + 4), .per_second = 1000000};
    for (uint32_t at = 8; at + 4 <= n;) {
        uint32_t code = u16(r, body + at), length = u16(r, body + at + 2);
        const uint8_t *value = body + at + 4;
        if (code == OPTION_END)
            break;
        if (length > n - at - 4)
            return bad(r, "is malformed: an option of %u bytes where %u are left", length, n - at - 4);
        if (code == OPTION_IF_TSRESOL && length == 1 && resolution(r, i, *value) < 0)
            return r->error;
        if (code == OPTION_IF_TSOFFSET && length == 8)
            i->offset = (int64_t)u64(r, value);
        at += 4 + (length + 3) / 4 * 4;
    }
    r->interfaces++;
    return 0;
}

static uint64_t time_of(const struct interface *i, uint64_t units)
{
    __int128 ns = (__int128)(units / i->per_second) * 1000000000 + (__int128)(units % i->per_second) * 1000000000 / i->per_second;
    return saturated(ns + (__int128)i->offset * 1000000000);
}

/* A packet's block: 1, or -EBADMSG. */
static int block_packet(struct pcap_reader *r, uint32_t type, const uint8_t *body, uint32_t n, struct pcap_packet *packet)
{
    uint32_t head = type == BLOCK_SIMPLE ? 4 : 20;
    if (n < head)
        return bad(r, "is malformed: a packet's block of %u bytes", n + 12);
    packet->interface = type == BLOCK_SIMPLE ? 0 : type == BLOCK_OBSOLETE ? u16(r, body) : u32(r, body);
    if (packet->interface >= r->interfaces)
        return bad(r, "is malformed: a packet of interface %u, and %u are described", packet->interface, r->interfaces);
    const struct interface *i = &r->interface[packet->interface];
    if (type == BLOCK_SIMPLE) {
        packet->original = u32(r, body);
        packet->length = i->snaplen && i->snaplen < packet->original ? i->snaplen : packet->original;
        packet->ts = 0;
    } else {
        packet->ts = time_of(i, (uint64_t)u32(r, body + 4) << 32 | u32(r, body + 8));
        packet->length = u32(r, body + 12);
        packet->original = u32(r, body + 16);
    }
    if (packet->length > n - head)
        return bad(r, "is malformed: a packet of %u bytes in a block that has room for %u", packet->length, n - head);
    if (packet->length > PCAP_MAX_PACKET)
        return bad(r, "is malformed: a packet of %u bytes, and none has more than %u", packet->length, PCAP_MAX_PACKET);
    packet->data = body + head;
    packet->link = i->link;
    return PCAP_PACKET;
}

static int skipping(struct pcap_reader *r)
{
    while (r->skip > 4) {
        int rc = need(r, 1);
        if (rc == 0)
            return bad(r, "is cut off: %llu of its %u bytes are missing", (unsigned long long)r->skip, r->skip_length);
        if (rc != 1)
            return rc;
        uint64_t n = r->have - r->at < r->skip - 4 ? r->have - r->at : r->skip - 4;
        r->at += n;
        r->skip -= n;
    }
    int rc = need_whole(r, 4);
    if (rc != 1)
        return rc;
    if (u32(r, r->window + r->at) != r->skip_length)
        return bad(r, "is malformed: the lengths at a block's two ends differ");
    r->at += 4;
    r->skip = 0;
    return 1;
}

/* One block. PCAP_PACKET; 3 = it was none; PCAP_NOW; PCAP_END; -errno. */
static int block(struct pcap_reader *r, struct pcap_packet *packet)
{
    int rc = r->skip ? skipping(r) : 1;
    if (rc != 1 || (rc = need(r, 1)) != 1)
        return rc;
    r->records++;
    r->start = r->passed + r->at;
    if ((rc = need_whole(r, 12)) != 1) {
        r->records -= rc == PCAP_NOW;
        return rc;
    }
    const uint8_t *p = r->window + r->at;
    uint32_t type = u32(r, p);
    if (type == BLOCK_SECTION) { /* the same in both orders; what follows says which */
        uint32_t magic;
        memcpy(&magic, p + 8, sizeof magic);
        if (magic != 0x1a2b3c4d && magic != 0x4d3c2b1a)
            return bad(r, "is malformed: a section header without byte order");
        r->swap = magic != 0x1a2b3c4d;
    }
    uint32_t length = u32(r, p + 4);
    bool wanted = type == BLOCK_SECTION || type == BLOCK_INTERFACE || type == BLOCK_ENHANCED || type == BLOCK_SIMPLE || type == BLOCK_OBSOLETE;
    if (length < 12 || length % 4)
        return bad(r, "is malformed: a block of %u bytes", length);
    if (!wanted && length > PCAP_MAX_BLOCK) {
        r->at += 8;
        r->skip = length - 8;
        r->skip_length = length;
        return 3;
    }
    if (length > PCAP_MAX_BLOCK)
        return bad(r, "is malformed: a block of %u bytes, where %u are the most", length, PCAP_MAX_BLOCK);
    if ((rc = need_whole(r, length)) != 1) {
        r->records -= rc == PCAP_NOW;
        return rc;
    }
    p = r->window + r->at;
    if (u32(r, p + length - 4) != length)
        return bad(r, "is malformed: the lengths at a block's two ends differ");
    rc = 3;
    if (type == BLOCK_SECTION)
        rc = section(r, p + 8, length - 12);
    else if (type == BLOCK_INTERFACE)
        rc = interface(r, p + 8, length - 12);
    else if (wanted)
        rc = block_packet(r, type, p + 8, length - 12, packet);
    if (rc < 0)
        return rc;
    r->at += length;
    return rc == 0 ? 3 : rc;
}

/* ---- either --------------------------------------------------------------------------------------------------------------------- */

static int begin(struct pcap_reader *r)
{
    static const struct {
        uint32_t magic;
        const char *what, *remedy;
    } other[] = {
        {0x00088b1f, "it is compressed with gzip", "gunzip FILE"},
        {0xfd2fb528, "it is compressed with zstd", "zstd -d FILE"},
        {0x184d2204, "it is compressed with lz4", "lz4 -d FILE"},
        {0x587a37fd, "it is compressed with xz", "unxz FILE"},
        {0x6f6f6e73, "it is in snoop's format", "editcap FILE NEW.pcapng"},
        {0xa1b2cd34, "it is in a modified pcap format", "editcap FILE NEW.pcapng"},
        {0x34cdb2a1, "it is in a modified pcap format", "editcap FILE NEW.pcapng"},
    };
    int rc = need(r, 4);
    if (rc == 0)
        return bad(r, r->have == r->at ? "it is empty" : "it is no capture file: it has less than four bytes");
    if (rc != 1)
        return rc;
    uint32_t magic;
    memcpy(&magic, r->window + r->at, sizeof magic);
    for (size_t i = 0; i < sizeof other / sizeof *other; i++)
        if ((other[i].magic == 0x00088b1f ? magic & 0xffffff : magic) == other[i].magic) {
            snprintf(r->remedy, sizeof r->remedy, "%s", other[i].remedy);
            return bad(r, "%s", other[i].what);
        }
    if (magic == BLOCK_SECTION) {
        struct pcap_packet none;
        rc = block(r, &none);
        return rc == 3 ? PCAP_PACKET : rc;
    }
    r->swap = magic == 0xd4c3b2a1 || magic == 0x4d3cb2a1;
    r->nano = magic == 0xa1b23c4d || magic == 0x4d3cb2a1 ? 1 : 1000;
    if (!r->swap && magic != 0xa1b2c3d4 && magic != 0xa1b23c4d)
        return bad(r, "it is no capture file: pcap and pcapng begin otherwise");
    return begin_pcap(r);
}

int pcap_begin(struct pcap_reader *r)
{
    if (r->error || r->kind != UNKNOWN)
        return r->error ? r->error : PCAP_PACKET;
    return begin(r);
}

int pcap_next(struct pcap_reader *r, struct pcap_packet *packet)
{
    int rc = pcap_begin(r);
    if (rc != PCAP_PACKET)
        return rc;
    memset(packet, 0, sizeof *packet);
    if (r->kind == PCAP)
        return next_pcap(r, packet);
    while ((rc = block(r, packet)) == 3)
        ;
    return rc;
}

/* ---- writing ---------------------------------------------------------------------------------------------------------------------- */

static uint8_t *put32(uint8_t *out, uint32_t v) { return (uint8_t *)memcpy(out, &v, 4) + 4; }
static uint8_t *put16(uint8_t *out, uint16_t v) { return (uint8_t *)memcpy(out, &v, 2) + 2; }

static uint8_t *put_option(uint8_t *out, uint16_t code, const void *value, size_t n)
{
    out = put16(put16(out, code), (uint16_t)n);
    memcpy(out, value, n);
    memset(out + n, 0, 3);
    return out + (n + 3) / 4 * 4;
}

static uint8_t *put_text(uint8_t *out, uint16_t code, const char *text)
{
    size_t n = strlen(text);
    return put_option(out, code, text, n < 200 ? n : 200);
}

/* The block's length, at both its ends. */
static uint8_t *put_end(uint8_t *start, uint8_t *end)
{
    uint32_t length = (uint32_t)(end - start) + 4;
    put32(start + 4, length);
    return put32(end, length);
}

size_t pcap_put_header(uint8_t *out, int format, uint32_t snaplen, const char *interface, const char *application)
{
    uint8_t *p = out, *start = out;
    snaplen = snaplen && snaplen < PCAP_MAX_PACKET ? snaplen : PCAP_MAX_PACKET;
    if (format == PCAP_FORMAT_PCAP) {
        p = put16(put16(put32(p, 0xa1b23c4d), 2), 4);
        p = put32(put32(put32(put32(p, 0), 0), snaplen), PCAP_ETHERNET);
        return (size_t)(p - out);
    }
    struct utsname here;
    char os[200] = "";
    p = put32(put32(p, BLOCK_SECTION), 0);
    p = put16(put16(put32(p, 0x1a2b3c4d), 1), 0);
    p = put32(put32(p, UINT32_MAX), UINT32_MAX); /* length of the section: not known */
    if (uname(&here) == 0) {
        snprintf(os, sizeof os, "%.90s %.90s", here.sysname, here.release);
        p = put_text(put_text(p, 2, here.machine), 3, os);
    }
    p = put_text(p, 4, application);
    p = put_end(start, put_option(p, OPTION_END, "", 0));
    start = p;
    p = put32(put32(p, BLOCK_INTERFACE), 0);
    p = put32(put16(put16(p, PCAP_ETHERNET), 0), snaplen);
    p = put_text(p, OPTION_IF_NAME, interface);
    p = put_option(p, OPTION_IF_TSRESOL, "\x09", 1);
    p = put_end(start, put_option(p, OPTION_END, "", 0));
    return (size_t)(p - out);
}

size_t pcap_put_packet(uint8_t *out, int format, uint64_t ts, const void *data, uint32_t length, uint32_t original)
{
    uint8_t *p = out;
    if (format == PCAP_FORMAT_PCAP) {
        p = put32(put32(p, (uint32_t)(ts / 1000000000)), (uint32_t)(ts % 1000000000));
        p = put32(put32(p, length), original);
        memcpy(p, data, length);
        return 16 + (size_t)length;
    }
    p = put32(put32(put32(p, BLOCK_ENHANCED), 0), 0);
    p = put32(put32(p, (uint32_t)(ts >> 32)), (uint32_t)ts);
    p = put32(put32(p, length), original);
    memcpy(p, data, length);
    memset(p + length, 0, 3);
    return (size_t)(put_end(out, p + (length + 3) / 4 * 4) - out);
}

size_t pcap_whole(const uint8_t *put, int format, int with_header, size_t n, uint64_t *packets)
{
    size_t at = with_header && format == PCAP_FORMAT_PCAP ? 24 : 0, length;
    uint32_t v;
    *packets = 0;
    if (at > n)
        return 0;
    while (n - at >= 16) {
        memcpy(&v, put + at + (format == PCAP_FORMAT_PCAP ? 8 : 4), sizeof v);
        length = format == PCAP_FORMAT_PCAP ? 16 + (size_t)v : v;
        if (length > n - at || length < 12)
            break;
        memcpy(&v, put + at, sizeof v);
        *packets += format == PCAP_FORMAT_PCAP || v == BLOCK_ENHANCED;
        at += length;
    }
    return at;
}
