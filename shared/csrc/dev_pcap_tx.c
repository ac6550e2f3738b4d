/* SPDX-License-Identifier: Apache-2.0
 *
 * pcap:FILE as a sending device: packets are copied once, into a large buffer that is written out when it is full, when a reader would wait for it, and
 * in the end. A pipe whose reader is slow takes no more for now: sends move fewer packets, and nobody waits in the kernel.
 */
#include "dev_pcap.h"
#include "pcapfile.h"

#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PIPE_PACE 10000000u   /* ns until what waits is written: a reader of a pipe is waiting */
#define FILE_PACE 1000000000u /* of a file that somebody may look into */
#define PATIENCE 5000         /* ms without progress after which a closing end gives a pipe's reader up */

struct writer {
    int fd, format;
    bool regular;
    uint32_t snaplen, number; /* files begun */
    uint64_t rotate_bytes, rotate_ns;
    uint64_t in_file, began;  /* bytes put into this file; when it was begun */
    uint64_t looked;          /* when it was last written out */
    uint64_t packets, waiting; /* written whole; in the buffer */
    bool any;                 /* in this file */
    int error;                /* -errno: no more goes there */
    char why[200];
    char name[64];            /* of the interface */
    size_t have, sent;
    uint8_t *buffer;
    char file[PATH_MAX];      /* being written now */
    char path[];
};

static int say(struct writer *w)
{
    int full = w->error == -ENOSPC || w->error == -EDQUOT || w->error == -EFBIG;
    if (w->error == -EPIPE)
        return rb_fail(EPIPE, "reader-gone", NULL, "whoever read the packets is gone");
    rb_fail(-w->error, full ? "disk-full" : "cannot-write", NULL, "%s", w->why);
    return full ? rb_cure(-w->error, "make room, or keep less of each packet: a snapshot length") : w->error;
}

/* What is in a file after a failure: whole records only. */
static int failed(struct writer *w, int err)
{
    uint64_t whole = 0;
    w->error = -err;
    if (w->regular) {
        off_t end = lseek(w->fd, 0, SEEK_CUR), begin = end - (off_t)w->sent; /* where the buffer's first byte lies */
        size_t n = pcap_whole(w->buffer, w->format, w->in_file == w->have, w->sent, &whole);
        if (end >= 0 && begin >= 0 && ftruncate(w->fd, begin + (off_t)n) < 0)
            whole = 0;
    }
    w->packets += whole;
    w->waiting = w->have = w->sent = 0;
    snprintf(w->why, sizeof w->why, "%.100s cannot be written on: %s; it ends after %llu packets", w->file, strerror(err), (unsigned long long)w->packets);
    return w->error;
}

static int write_out(struct writer *w, int wait_ms)
{
    struct pollfd q = {.fd = w->fd, .events = POLLOUT};
    while (w->sent < w->have) {
        size_t n = w->have - w->sent;
        if (!w->regular) { /* so much goes in at once, or nothing */
            if (poll(&q, 1, wait_ms) == 0)
                return 0;
            n = RB_MIN(n, (size_t)PIPE_BUF);
        }
        ssize_t k = write(w->fd, w->buffer + w->sent, n);
        if (k < 0 && errno == EINTR)
            continue;
        if (k < 0 && errno == EAGAIN)
            return 0;
        if (k <= 0)
            return failed(w, k < 0 ? errno : ENOSPC);
        w->sent += (size_t)k;
    }
    w->packets += w->waiting;
    w->waiting = w->have = w->sent = 0;
    return 0;
}

/* As much as the file or pipe takes now. 0, or -errno. A reader that is gone is an error, never a signal. */
static int drain(struct writer *w, int wait_ms)
{
    sigset_t pipe, before, pending;
    int rc;
    w->looked = rb_mono_ns();
    if (w->error || w->sent == w->have)
        return w->error;
    if (w->regular)
        return write_out(w, 0);
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    sigpending(&pending);
    pthread_sigmask(SIG_BLOCK, &pipe, &before);
    rc = write_out(w, wait_ms);
    if (rc == -EPIPE && !sigismember(&pending, SIGPIPE))
        sigtimedwait(&pipe, NULL, &(struct timespec){0});
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return rc;
}

/* ---- files ----------------------------------------------------------------------------------------------------------------- */

static void name_file(struct writer *w)
{
    if (!w->rotate_bytes && !w->rotate_ns) {
        snprintf(w->file, sizeof w->file, "%s", w->path);
        return;
    }
    const char *slash = strrchr(w->path, '/'), *dot = strrchr(w->path, '.');
    size_t stem = dot && dot > (slash ? slash + 1 : w->path) ? (size_t)(dot - w->path) : strlen(w->path);
    time_t now = time(NULL);
    struct tm tm;
    char when[32];
    strftime(when, sizeof when, "%Y%m%d-%H%M%S", localtime_r(&now, &tm));
    snprintf(w->file, sizeof w->file, "%.*s_%05u_%s%s", (int)stem, w->path, w->number, when, w->path + stem);
}

static int cannot(const char *file, int err)
{
    char why[64];
    snprintf(why, sizeof why, "%s", strerror(err));
    if (why[0] >= 'A' && why[0] <= 'Z')
        why[0] += 'a' - 'A';
    rb_fail(err, err == EACCES ? "no-permission" : "cannot-write", NULL, "%s cannot be written: %s", file, why);
    return rb_cure(err, "another -w FILE");
}

static int begin_file(struct writer *w, struct rb_cluster *c)
{
    struct stat st;
    char application[64];
    int out = strcmp(w->path, "-") == 0;
    w->number++;
    name_file(w);
    int fd = out ? fcntl(1, F_DUPFD_CLOEXEC, 3) : open(w->file, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOCTTY, 0666);
    int err = fd < 0 || fstat(fd, &st) < 0 ? errno : isatty(fd) ? ENOTTY : 0, rc = 0;
    if (err == ENOTTY)
        rc = rb_fail(ENOTTY, "cannot-write", "name a file, or pipe it: ... -w - | tcpdump -nr -", "packets are not for a terminal");
    else if (err)
        rc = cannot(out ? "standard output" : w->file, err);
    for (uint32_t i = 0; c && rc == 0 && i < RB_MAX_ENDS; i++)
        if (c->end[i] && (rb_pcap_plays(c->end[i], fd) || rb_pcap_writes(c->end[i], fd)))
            rc = rb_fail(EINVAL, "bad-option", "name another file", "%s is already open in this program", w->file);
    if (rc == 0 && S_ISREG(st.st_mode) && !out && ftruncate(fd, 0) < 0)
        rc = cannot(w->file, errno);
    if (rc < 0) {
        if (fd >= 0)
            close(fd);
        return rc;
    }
    w->fd = fd;
    w->regular = S_ISREG(st.st_mode);
    w->any = false;
    w->began = w->looked = rb_mono_ns();
    snprintf(application, sizeof application, "ringbar %s", rb_version());
    w->in_file = w->have = pcap_put_header(w->buffer, w->format, w->snaplen, w->name, application);
    if (!w->regular)
        drain(w, 0); /* its reader may want to know what is coming */
    return 0;
}

static int next_file(struct writer *w)
{
    int rc = drain(w, 0);
    if (rc < 0)
        return rc;
    if (close(w->fd) < 0) {
        w->fd = -1;
        return failed(w, errno);
    }
    w->fd = -1;
    if ((rc = begin_file(w, NULL)) < 0) {
        w->error = rc;
        snprintf(w->why, sizeof w->why, "%.190s", rb_error());
    }
    return rc;
}

/* ---- the end ----------------------------------------------------------------------------------------------------------------- */

static int writer_send(struct rb_end *end, rb_desc *desc, int n)
{
    struct writer *w = end->device;
    struct rb_cluster *c = end->c;
    uint64_t mono = rb_mono_ns(), now = 0, bytes = 0;
    int i, rc = 0;
    for (i = 0; i < n && !w->error; i++) {
        uint32_t length = rb_desc_length(&desc[i]);
        const uint8_t *data = rb_copying_data(c, &desc[i]);
        if (!data) {
            rc = -EINVAL;
            break;
        }
        uint32_t kept = w->snaplen ? RB_MIN(length, w->snaplen) : length;
        uint64_t record = kept + PCAP_RECORD_ROOM;
        int over = (w->rotate_bytes && w->in_file + record > w->rotate_bytes) || (w->rotate_ns && mono - w->began >= w->rotate_ns);
        if (over && w->any && (rc = next_file(w)) < 0)
            break;
        if (w->have + record > RB_PCAP_ROOM) {
            if ((rc = drain(w, 0)) < 0)
                break;
            if (w->sent) {
                memmove(w->buffer, w->buffer + w->sent, w->have - w->sent);
                w->have -= w->sent;
                w->sent = 0;
            }
            if (w->have + record > RB_PCAP_ROOM)
                break; /* the reader is slow */
        }
        uint64_t ts = desc[i].ts ? desc[i].ts : now ? now : (now = rb_now_ns());
        size_t put = pcap_put_packet(w->buffer + w->have, w->format, ts, data, kept, length);
        w->have += put;
        w->in_file += put;
        w->waiting++;
        w->any = true;
        bytes += length;
    }
    rb_return(c, desc, i);
    end->st.packets += (uint64_t)i;
    end->st.bytes += bytes;
    if (!w->error && mono - w->looked >= (w->regular ? FILE_PACE : PIPE_PACE))
        drain(w, 0);
    if (i || rc == -EINVAL)
        return i ? i : rc;
    return w->error ? say(w) : 0;
}

static int writer_alloc(struct rb_end *end, rb_desc *desc, int n)
{
    int rc = end->promised || end->wants ? 0 : rb_copying_open(end, 2 * RB_BURST); /* a capture needs none: only who sends here what it made itself */
    return rc < 0 ? rc : rb_empties(end->c, desc, n);
}

static int writer_ready(struct rb_end *end)
{
    const struct writer *w = end->device;
    struct pollfd q = {.fd = w->fd, .events = POLLOUT};
    return w->regular || w->error || w->fd < 0 || poll(&q, 1, 0) != 0;
}

static int writer_sync(struct rb_end *end)
{
    struct writer *w = end->device;
    uint64_t until = rb_mono_ns() + PATIENCE * 1000000ull;
    while (!w->error && w->sent < w->have && rb_mono_ns() < until) {
        size_t before = w->have - w->sent;
        if (drain(w, 100) < 0)
            break;
        if (w->have - w->sent < before)
            until = rb_mono_ns() + PATIENCE * 1000000ull;
    }
    if (!w->error && w->sent < w->have) {
        w->error = -ETIMEDOUT;
        snprintf(w->why, sizeof w->why, "whoever reads the packets has taken none for %d s: the last are lost", PATIENCE / 1000);
    }
    return w->error ? say(w) : 0;
}

static void writer_service(struct rb_end *end)
{
    struct writer *w = end->device;
    if (w->sent < w->have && rb_mono_ns() - w->looked >= (w->regular ? FILE_PACE : PIPE_PACE))
        drain(w, 0);
}

static void writer_free(struct writer *w)
{
    if (w->fd >= 0)
        close(w->fd);
    free(w->buffer);
    free(w);
}

static void writer_close(struct rb_end *end)
{
    writer_sync(end);
    rb_copying_close(end);
    writer_free(end->device);
}

static const struct rb_end_ops writer_ops = {
    .send = writer_send, .alloc = writer_alloc, .ready = writer_ready, .sync = writer_sync, .service = writer_service, .close = writer_close,
};

int rb_pcap_writes(const struct rb_end *end, int fd) { return end->ops == &writer_ops && rb_pcap_same(((struct writer *)end->device)->fd, fd); }

int rb_pcap_write_open(struct rb_end *end, const char *path, const rb_open_options *o)
{
    const char *dot = strrchr(path, '.');
    int rotating = o->rotate_bytes || o->rotate_seconds > 0;
    if (rotating && strcmp(path, "-") == 0)
        return rb_fail(EINVAL, "bad-option", "name a file", "standard output cannot be followed by another file");
    if (o->rotate_bytes && o->rotate_bytes < 65536)
        return rb_fail(EINVAL, "bad-option", "65536 or more", "a file of %llu bytes is too small", (unsigned long long)o->rotate_bytes);
    struct writer *w = calloc(1, sizeof *w + strlen(path) + 1);
    if (!w || !(w->buffer = malloc(RB_PCAP_ROOM + PCAP_HEADER_ROOM))) {
        free(w);
        return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    }
    strcpy(w->path, path);
    snprintf(w->name, sizeof w->name, "%s", o->name ? o->name : "ringbar");
    w->fd = -1;
    w->snaplen = o->snaplen;
    w->rotate_bytes = o->rotate_bytes;
    w->rotate_ns = o->rotate_seconds > 0 ? (uint64_t)(RB_MIN(o->rotate_seconds, 1e9) * 1e9) : 0;
    w->format = o->format == RB_PCAP || (o->format == 0 && dot && strcmp(dot, ".pcap") == 0) ? PCAP_FORMAT_PCAP : PCAP_FORMAT_PCAPNG;
    int rc = begin_file(w, end->c);
    if (rc == 0 && rotating && !w->regular)
        rc = rb_fail(EINVAL, "bad-option", "name a file", "%s is none that another can follow", path);
    if (rc < 0) {
        writer_free(w);
        return rc;
    }
    end->device = w;
    end->ops = &writer_ops;
    end->patient = !w->regular; /* a program that reads more slowly than packets come is to see them all, as far as the queue before has room */
    return 0;
}
