/* SPDX-License-Identifier: Apache-2.0
 *
 * pcap:FILE as a receiving device: packets of a capture file, each at its time. A file can wait: while there is no empty buffer nothing is read, and
 * nothing is lost. Each packet is copied once, into a buffer that is empty then; so with preload, too, where it comes from this process's own
 * memory: a buffer that was lent may come back changed, and what is played a second time must be what the file says.
 */
#include "dev_pcap.h"
#include "pcapfile.h"

#include <fcntl.h>
#include <math.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define LAG 1000000000u /* ns: who is later than that goes on from now instead of catching up */
#define WIRE 24u        /* bytes on an Ethernet wire beside the packet: preamble 8, FCS 4, gap 12 */
#define CHUNK 32        /* empties taken at once */

struct kept { /* a preloaded packet */
    uint64_t at, ts;
    uint32_t length;
};

struct player {
    struct pcap_reader *reader;
    int fd;
    bool regular, fast, preloaded;
    uint8_t *memory;
    uint64_t memory_used, memory_size, kept_count, kept_size, kept_next;
    struct kept *kept;
    double speed, pps, gbps;
    uint64_t rounds;       /* still to be played after this one */
    struct pcap_packet next;
    bool have;             /* next is to be played at `due` */
    bool begun;
    uint64_t began, base;  /* monotonic time at which this round's first packet, of time base, is due; 0 = no time met yet */
    uint64_t last;         /* largest time of this round */
    uint64_t round;        /* packets of this round */
    uint64_t played, bits; /* since `began`, for a rate */
    uint64_t others;       /* packets that are no Ethernet */
    uint32_t other_link;
    int over;              /* -errno: the end */
    rb_a64 due;            /* read by ready() beside other calls */
    rb_a32 stalled, starved;
    uint32_t room;         /* bytes of a buffer */
    char path[];
};

static ssize_t read_file(void *arg, void *buffer, size_t n)
{
    struct player *p = arg;
    struct pollfd q = {.fd = p->fd, .events = POLLIN};
    if (!p->regular && poll(&q, 1, 0) == 0) {
        errno = EAGAIN;
        return -1;
    }
    return read(p->fd, buffer, n);
}

/* ---- how it ends ------------------------------------------------------------------------------------------------------- */

static int say(struct player *p)
{
    const char *remedy = p->reader ? pcap_remedy(p->reader) : "", *file = strstr(remedy, "FILE");
    if (p->over == -ENODATA)
        return rb_fail(ENODATA, "end", NULL, "the end of %s", p->path);
    if (p->others && !*pcap_why(p->reader)) {
        rb_fail(EBADMSG, "no-ethernet", NULL, "%s has no Ethernet packets, but %llu of link type %u", p->path, (unsigned long long)p->others, p->other_link);
        return rb_cure(EBADMSG, "see what it has: capinfos %s", p->path);
    }
    rb_fail(-p->over, p->over == -EBADMSG ? "bad-capture" : "cannot-read", NULL, "%s: %s", p->path, pcap_why(p->reader));
    if (file)
        rb_cure(-p->over, "%.*s%s%s", (int)(file - remedy), remedy, p->path, file + 4);
    return p->over;
}

/* ---- the next packet, and when ------------------------------------------------------------------------------------------ */

static int read_next(struct player *p, struct pcap_packet *packet)
{
    if (!p->preloaded)
        return pcap_next(p->reader, packet);
    if (p->kept_next == p->kept_count)
        return p->over; /* as the file ended: PCAP_END, or with an error */
    const struct kept *k = &p->kept[p->kept_next++];
    *packet = (struct pcap_packet){.data = p->memory + k->at, .length = k->length, .ts = k->ts, .link = PCAP_ETHERNET};
    return PCAP_PACKET;
}

/* One that can be played: 1; 0 = none now; -errno. Those that cannot are counted. */
static int playable(struct rb_end *end, struct player *p, struct pcap_packet *packet)
{
    for (int tries = 0; tries < 1024; tries++) { /* a worker has other inputs, too */
        int rc = read_next(p, packet);
        if (rc != PCAP_PACKET)
            return rc == PCAP_END ? -ENODATA : rc == PCAP_NOW ? 0 : rc;
        if (packet->link == PCAP_ETHERNET && packet->length && packet->length <= p->room)
            return 1;
        end->st.drops[RB_DROP_BAD]++;
        if (packet->link != PCAP_ETHERNET) {
            p->others++;
            p->other_link = packet->link;
        }
    }
    return 0;
}

static uint64_t after(uint64_t start, double ns) { return ns < 9e18 ? start + (uint64_t)ns : UINT64_MAX / 2; }

/* When the next packet is due; not before the one before it. */
static uint64_t when(struct player *p)
{
    uint64_t due = p->began;
    if (p->pps > 0)
        due = after(p->began, (double)p->played * 1e9 / p->pps);
    else if (p->gbps > 0)
        due = after(p->began, (double)p->bits / p->gbps);
    else if (p->next.ts) {
        if (!p->base)
            p->base = p->next.ts;
        due = after(p->began, p->next.ts > p->base ? (double)(p->next.ts - p->base) / p->speed : 0);
        p->last = RB_MAX(p->last, p->next.ts);
    }
    return RB_MAX(due, rb_get(&p->due));
}

/* From the beginning again, one packet's distance later. */
static int again(struct player *p)
{
    if (p->preloaded)
        p->kept_next = 0;
    else if (lseek(p->fd, 0, SEEK_SET) < 0)
        return rb_fail(errno, "cannot-read", NULL, "%s: %s", p->path, strerror(errno));
    else
        pcap_reader_rewind(p->reader);
    if (p->rounds != UINT64_MAX)
        p->rounds--;
    if (p->base && !(p->pps > 0 || p->gbps > 0)) {
        double took = (double)(p->last - p->base) / p->speed;
        p->began = after(p->began, took + (p->round > 1 ? took / (double)(p->round - 1) : 0));
    }
    p->base = p->last = p->round = 0;
    return 0;
}

/* The next packet lies in p->next: 1; 0 = none now; -errno: the end. */
static int look(struct rb_end *end, struct player *p)
{
    int rc = p->over && !p->preloaded ? p->over : playable(end, p, &p->next);
    if (rc == -ENODATA && p->round && p->rounds) {
        if ((rc = again(p)) < 0)
            return rc;
        rc = playable(end, p, &p->next);
    }
    rb_set(&p->stalled, rc == 0);
    if (rc < 0) {
        p->preloaded = false; /* nothing more is taken from there */
        p->over = rc == -ENODATA && p->others && !end->st.packets && !p->round ? -EBADMSG : rc;
        return say(p);
    }
    if (rc == 0)
        return 0;
    if (!p->begun) {
        p->began = rb_mono_ns();
        p->begun = true;
    }
    p->round++;
    if (!p->fast)
        rb_set(&p->due, when(p));
    return 1;
}

static int player_recv(struct rb_end *end, rb_desc *desc, int n)
{
    struct player *p = end->device;
    struct rb_cluster *c = end->c;
    uint64_t now = 0;
    int i = 0, empties = 0, rc = 0;
    rb_set(&p->starved, 0);
    while (i < n) {
        if (!p->have && (rc = look(end, p)) <= 0)
            break;
        p->have = true;
        if (!p->fast) {
            uint64_t due = rb_get(&p->due);
            if (due > now && due > (now = rb_mono_ns()))
                break;
            if (now > due + LAG) {
                p->began += now - due;
                rb_set(&p->due, now);
            }
        }
        if (i == empties) {
            rc = rb_empties(c, desc + i, RB_MIN(n - i, CHUNK));
            if (rc <= 0) {
                rb_set(&p->starved, 1);
                break;
            }
            empties += rc;
        }
        memcpy(rb_data(c, &desc[i]), p->next.data, p->next.length);
        rb_desc_set(&desc[i], p->next.length, RB_BUFFER_HEADER, 0);
        desc[i++].ts = p->next.ts;
        end->st.bytes += p->next.length;
        p->bits += 8 * (uint64_t)(p->next.length + WIRE);
        p->played++;
        p->have = false;
    }
    if (empties > i)
        rb_return(c, desc + i, empties - i);
    end->st.packets += (uint64_t)i;
    return i ? i : RB_MIN(rc, 0);
}

static int player_ready(struct rb_end *end)
{
    struct player *p = end->device;
    struct pollfd q = {.fd = p->fd, .events = POLLIN};
    if (rb_get(&p->starved))
        return 0; /* rb_recv tries again between short waits */
    if (rb_get(&p->stalled) && !p->regular)
        return poll(&q, 1, 0) != 0;
    return rb_get(&p->due) <= rb_mono_ns();
}

static int player_count(struct rb_end *end) { return ((struct player *)end->device)->have; }

static void player_free(struct player *p)
{
    if (p->fd >= 0)
        close(p->fd);
    pcap_reader_free(p->reader);
    free(p->memory);
    free(p->kept);
    free(p);
}

static void player_close(struct rb_end *end)
{
    rb_copying_close(end);
    player_free(end->device);
}

static const struct rb_end_ops player_ops = {.recv = player_recv, .ready = player_ready, .count = player_count, .close = player_close};

/* ---- opening ------------------------------------------------------------------------------------------------------------------- */

int rb_pcap_same(int a, int b)
{
    struct stat one, two;
    return fstat(a, &one) == 0 && fstat(b, &two) == 0 && S_ISREG(one.st_mode) && one.st_dev == two.st_dev && one.st_ino == two.st_ino;
}

int rb_pcap_plays(const struct rb_end *end, int fd) { return end->ops == &player_ops && rb_pcap_same(((struct player *)end->device)->fd, fd); }

static void *grown(void *old, uint64_t *size, uint64_t wanted, uint64_t each)
{
    uint64_t room = RB_MAX(*size, 1024u);
    while (room < wanted)
        room *= 2;
    void *more = room <= SIZE_MAX / each ? realloc(old, room * each) : NULL;
    if (more)
        *size = room;
    return more;
}

static int keep(struct player *p, const struct pcap_packet *packet)
{
    void *m = p->memory, *k = p->kept;
    if (p->memory_used + packet->length > p->memory_size && (m = grown(p->memory, &p->memory_size, p->memory_used + packet->length, 1)))
        p->memory = m;
    if (p->kept_count == p->kept_size && (k = grown(p->kept, &p->kept_size, p->kept_count + 1, sizeof *p->kept)))
        p->kept = k;
    if (!m || !k)
        return rb_fail(ENOMEM, "no-memory", "play it without preload", "%s does not fit into memory: %llu packets did", p->path,
                       (unsigned long long)p->kept_count);
    p->kept[p->kept_count++] = (struct kept){p->memory_used, packet->ts, packet->length};
    memcpy(p->memory + p->memory_used, packet->data, packet->length);
    p->memory_used += packet->length;
    return 0;
}

static int preload(struct rb_end *end, struct player *p)
{
    struct pcap_packet packet;
    struct pollfd q = {.fd = p->fd, .events = POLLIN};
    int rc;
    while ((rc = playable(end, p, &packet)) >= 0) {
        if (rc == 0 && !p->regular && poll(&q, 1, -1) < 0)
            return rb_fail(errno, "stopped", NULL, "stopped while %s was read", p->path);
        if (rc == 1 && (rc = keep(p, &packet)) < 0)
            return rc;
    }
    p->over = rc == -ENODATA ? PCAP_END : rc; /* an error comes after what is whole */
    p->preloaded = true;
    return 0;
}

static int set_pace(struct player *p, const rb_open_options *o)
{
    if ((o->speed != 0) + (o->pps != 0) + (o->gbps != 0) > 1)
        return rb_fail(EINVAL, "bad-option", "name one of them", "a speed, packets per second and Gbit/s cannot all be kept");
    if (!isfinite(o->speed) || !isfinite(o->pps) || !isfinite(o->gbps) || o->pps < 0 || o->gbps < 0)
        return rb_fail(EINVAL, "bad-option", NULL, "a rate is a positive number");
    p->fast = o->speed < 0;
    p->speed = o->speed > 0 ? o->speed : 1;
    p->pps = o->pps;
    p->gbps = o->gbps;
    p->rounds = o->loops == UINT64_MAX ? UINT64_MAX : o->loops ? o->loops - 1 : 0;
    return 0;
}

static int open_file(struct player *p)
{
    struct stat st;
    p->fd = strcmp(p->path, "-") == 0 ? fcntl(0, F_DUPFD_CLOEXEC, 3) : open(p->path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    int err = p->fd < 0 ? errno : fstat(p->fd, &st) < 0 ? errno : S_ISDIR(st.st_mode) ? EISDIR : 0;
    if (err) {
        rb_fail(err, err == ENOENT ? "no-such-file" : err == EACCES ? "no-permission" : "cannot-read", NULL, "%s cannot be read: %s", p->path, strerror(err));
        return err == ENOENT ? rb_cure(err, "name a capture file: pcap:PATH") : -err;
    }
    p->regular = S_ISREG(st.st_mode);
    return 0;
}

static int open_player(struct rb_end *end, const char *path, const rb_open_options *o)
{
    struct player *p = calloc(1, sizeof *p + strlen(path) + 1);
    if (!p)
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    strcpy(p->path, path);
    p->fd = -1;
    p->room = RB_MIN(end->c->buffer_size - RB_BUFFER_HEADER, RB_MAX_LENGTH);
    int rc = set_pace(p, o);
    if (rc == 0)
        rc = open_file(p);
    if (rc == 0 && !(p->reader = pcap_reader_new(read_file, p)))
        rc = rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    if (rc == 0 && p->rounds && !p->regular && !o->preload)
        rc = rb_fail(EINVAL, "bad-option", "preload it", "%s is no file that can be read again", path);
    for (uint32_t i = 0; rc == 0 && i < RB_MAX_ENDS; i++)
        if (end->c->end[i] && rb_pcap_writes(end->c->end[i], p->fd))
            rc = rb_fail(EINVAL, "bad-option", "name another file", "%s is being written by this program", path);
    if (rc == 0 && (p->over = pcap_begin(p->reader)) < 0)
        rc = say(p);
    if (rc == 0 && pcap_link(p->reader) != UINT32_MAX && pcap_link(p->reader) != PCAP_ETHERNET && p->over == PCAP_PACKET) {
        rb_fail(EBADMSG, "no-ethernet", NULL, "%s has packets of link type %u, and only Ethernet can be played", path, pcap_link(p->reader));
        rc = rb_cure(EBADMSG, "see what it has: capinfos %s", path);
    }
    p->over = 0;
    if (rc == 0 && o->preload)
        rc = preload(end, p);
    if (rc == 0)
        rc = rb_copying_open(end, 2 * RB_BURST);
    if (rc < 0) {
        player_free(p);
        return rc;
    }
    end->device = p;
    end->ops = &player_ops;
    end->patient = p->fast;
    return 0;
}

int rb_pcap_open(struct rb_end *end, const char *address, const rb_open_options *o)
{
    const char *path = address + strlen("pcap:");
    if (!*path)
        return rb_fail(EINVAL, "bad-address", "write it like pcap:/tmp/a.pcap", "\"%s\": the file's path is missing", address);
    if (strlen(address) >= sizeof end->address)
        return rb_fail(EINVAL, "bad-address", "name it from a directory nearer to it", "a capture file's path has at most %zu bytes", sizeof end->address - 6);
    if ((end->flags & RB_RX) && (end->flags & RB_TX))
        return rb_fail(EINVAL, "bad-option", "open two files", "a capture file is played or written, not both");
    snprintf(end->address, sizeof end->address, "%s", address);
    snprintf(end->st.mode, sizeof end->st.mode, "copy");
    snprintf(end->st.clock, sizeof end->st.clock, "file");
    return end->flags & RB_RX ? open_player(end, path, o) : rb_pcap_write_open(end, path, o);
}
