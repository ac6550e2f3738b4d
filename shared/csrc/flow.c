/* SPDX-License-Identifier: Apache-2.0
 *
 * Packets with sequence numbers: one thread generates and verifies. Every packet is Ethernet, IPv4, UDP and carries, after the UDP
 * header, a mark of 32 bytes: magic, stream, sequence, send time, and a sum over all bytes of the packet but the sum itself.
 */
#include "rb_worker.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>

#define HEADERS 42u
#define MAGIC 0x31574f4c46424752ull /* "RGBFLOW1" */

struct mark {
    uint64_t magic;
    uint32_t stream, sum;
    uint64_t sequence, sent_ns;
} __attribute__((packed));
static_assert(sizeof(struct mark) == 32, "mark");

#define BUCKETS 1024u /* latency: 16 per power of two of nanoseconds */
#define WINDOW 65536 /* sequence numbers remembered to tell late from twice */

struct flow {
    rb_flow_options o;
    rb_end *out, *in;
    uint8_t head[HEADERS];
    uint64_t next, started, last, token_at;
    uint64_t expected; /* next sequence at the receiving end */
    uint64_t *seen;    /* bits of the last WINDOW sequence numbers */
    uint64_t latency[BUCKETS], latency_min, latency_max;
    rb_a64 sent, sent_bytes, refused, received, received_bytes, reordered, duplicated, corrupted, foreign, distinct, highest;
    rb_desc held[RB_MAX_BURST];
    int holding;
};

/* Sum of 32-bit words with the mark's own field taken as zero, so every byte of the packet counts once, by its place. */
static uint32_t packet_sum(const uint8_t *p, uint32_t length)
{
    uint64_t a = 0x9e3779b97f4a7c15ull ^ length, v;
    const uint32_t hole = HEADERS + 12;
    uint32_t i = 0;
    for (; i + 8 <= length; i += 8) {
        memcpy(&v, p + i, 8);
        for (uint32_t k = 0; i <= hole + 3 && i + 8 > hole && k < 8; k++)
            if (i + k >= hole && i + k < hole + 4)
                v &= ~(0xffull << 8 * k);
        a = (a ^ v) * 0xff51afd7ed558ccdull;
        a ^= a >> 32;
    }
    for (v = 0; i < length; i++)
        v = v << 8 | p[i];
    a = (a ^ v) * 0xff51afd7ed558ccdull;
    return (uint32_t)(a >> 32);
}

static uint16_t ip_sum(const uint8_t *p)
{
    uint32_t sum = 0;
    for (int i = 0; i < 20; i += 2)
        sum += (uint32_t)p[i] << 8 | p[i + 1];
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~sum;
}

static void put16(uint8_t *p, uint16_t v) { p[0] = (uint8_t)(v >> 8), p[1] = (uint8_t)v; }
static void put32(uint8_t *p, uint32_t v) { put16(p, (uint16_t)(v >> 16)), put16(p + 2, (uint16_t)v); }

static void make_head(struct flow *f)
{
    static const uint8_t none[6], src[6] = {2, 0, 0, 0, 0, 1}, dst[6] = {2, 0, 0, 0, 0, 2};
    uint8_t *p = f->head;
    memcpy(p, memcmp(f->o.dst_mac, none, 6) ? f->o.dst_mac : dst, 6);
    memcpy(p + 6, memcmp(f->o.src_mac, none, 6) ? f->o.src_mac : src, 6);
    put16(p + 12, 0x0800);
    p[14] = 0x45;
    put16(p + 16, (uint16_t)(f->o.size - 14));
    p[22] = 64;
    p[23] = 17;
    put32(p + 26, f->o.src_ip ? f->o.src_ip : 0xc0000201);
    put32(p + 30, f->o.dst_ip ? f->o.dst_ip : 0xc0000202);
    put16(p + 24, ip_sum(p + 14));
    put16(p + 34, 1024);
    put16(p + 36, f->o.port ? f->o.port : 5000);
    put16(p + 38, (uint16_t)(f->o.size - 34));
}

static void make_packet(struct flow *f, uint8_t *p, uint64_t sequence, uint64_t now)
{
    memcpy(p, f->head, HEADERS);
    put16(p + 34, (uint16_t)(1024 + sequence % f->o.flows));
    struct mark m = {.magic = MAGIC, .stream = f->o.stream, .sequence = sequence, .sent_ns = now};
    memcpy(p + HEADERS, &m, sizeof m);
    for (uint32_t i = HEADERS + sizeof m; i < f->o.size; i++)
        p[i] = (uint8_t)(sequence + i);
    m.sum = packet_sum(p, f->o.size);
    memcpy(p + HEADERS + 12, &m.sum, 4);
}

/* How many may go now: by rate, by window, by number. */
static uint32_t allowed(struct flow *f, uint32_t most, uint64_t now)
{
    uint64_t n = most;
    if (f->o.packets)
        n = RB_MIN(n, f->o.packets - f->next);
    if (f->o.window) {
        /* Packets that an earlier sender left on the way can be more than were sent so far. */
        uint64_t back = rb_get(&f->distinct), out = f->next > back ? f->next - back : 0;
        n = RB_MIN(n, out < f->o.window ? f->o.window - out : 0);
    }
    if (f->o.pps > 0) {
        uint64_t due = (uint64_t)((double)(now - f->token_at) * f->o.pps / 1e9);
        n = RB_MIN(n, due > f->next ? due - f->next : 0);
    }
    return (uint32_t)n;
}

static int generate(struct rb_worker *w, struct flow *f)
{
    uint64_t now = rb_now_ns();
    int n = f->holding, sent;
    if (!n) {
        n = (int)allowed(f, w->options.burst, now);
        if (n && (n = rb_alloc(f->out, f->held, n)) < 0)
            return n;
        for (int i = 0; i < n; i++) {
            rb_desc_set(&f->held[i], f->o.size, rb_desc_offset(&f->held[i]), 0);
            make_packet(f, rb_data(f->out->c, &f->held[i]), f->next++, now);
            f->held[i].ts = now;
        }
        f->holding = n;
    }
    if (!n)
        return 0;
    sent = rb_send(f->out, f->held, n, 0);
    if (sent < 0)
        return sent;
    rb_count_up(&f->sent, (uint64_t)sent);
    rb_count_up(&f->sent_bytes, (uint64_t)sent * f->o.size);
    if (sent < n) {
        rb_count_up(&f->refused, 1);
        memmove(f->held, f->held + sent, (size_t)(n - sent) * sizeof *f->held);
    }
    f->holding = n - sent;
    return sent;
}

static void latency_add(struct flow *f, uint64_t ns)
{
    uint32_t log = ns < 16 ? 0 : 63u - (uint32_t)__builtin_clzll(ns) - 3;
    f->latency[RB_MIN(ns < 16 ? (uint32_t)ns : log * 16 + (uint32_t)(ns >> (log - 1) & 15), BUCKETS - 1)]++;
    f->latency_min = f->latency_min ? RB_MIN(f->latency_min, ns) : ns;
    f->latency_max = RB_MAX(f->latency_max, ns);
}

static uint64_t latency_of(uint32_t bucket)
{
    uint32_t log = bucket / 16;
    return log ? (uint64_t)(16 + bucket % 16) << (log - 1) : bucket;
}

static void arrived(struct flow *f, const uint8_t *p, uint32_t length, uint64_t now)
{
    struct mark m;
    if (length < HEADERS + sizeof m || (memcpy(&m, p + HEADERS, sizeof m), m.magic != MAGIC) || m.stream != f->o.stream) {
        rb_count_up(&f->foreign, 1);
        return;
    }
    rb_count_up(&f->received, 1);
    rb_count_up(&f->received_bytes, length);
    if (m.sum != packet_sum(p, length)) {
        rb_count_up(&f->corrupted, 1);
        return;
    }
    if (now > m.sent_ns)
        latency_add(f, now - m.sent_ns);
    uint64_t *word = &f->seen[m.sequence % WINDOW / 64], mask = 1ull << m.sequence % 64;
    if (m.sequence >= f->expected) {
        uint64_t gap = m.sequence - f->expected;
        for (uint64_t s = gap >= WINDOW ? m.sequence - WINDOW + 1 : f->expected; s <= m.sequence; s++)
            f->seen[s % WINDOW / 64] &= ~(1ull << s % 64);
        *word |= mask;
        f->expected = m.sequence + 1;
        rb_count_up(&f->distinct, 1);
    } else if (f->expected - m.sequence > WINDOW || !(*word & mask)) {
        *word |= mask;
        rb_count_up(&f->reordered, 1);
        rb_count_up(&f->distinct, 1);
    } else
        rb_count_up(&f->duplicated, 1);
    rb_set(&f->highest, f->expected);
}

static int verify(struct rb_worker *w, struct flow *f)
{
    rb_desc desc[RB_MAX_BURST];
    int n = rb_recv(f->in, desc, (int)w->options.burst, 0);
    if (n <= 0)
        return n;
    uint64_t now = rb_now_ns();
    for (int i = 0; i < n; i++) {
        const uint8_t *p = rb_data(f->in->c, &desc[i]);
        if (p)
            arrived(f, p, rb_desc_length(&desc[i]), now);
    }
    rb_return(f->in->c, desc, n);
    return n;
}

static int flow_turn(struct rb_worker *w)
{
    struct flow *f = w->kind;
    int did = 0, rc;
    if (f->in) {
        if ((rc = verify(w, f)) < 0)
            return rc;
        did += rc;
        if (!f->out && f->o.packets && rb_get(&f->received) >= f->o.packets)
            return -ENODATA;
    }
    if (f->out) {
        if ((rc = generate(w, f)) < 0)
            return rc;
        did += rc;
        if (f->o.packets && f->next >= f->o.packets && !f->holding && (!f->in || rb_get(&f->distinct) >= f->o.packets)) {
            rb_service(f->out->c);
            return -ENODATA;
        }
    }
    if (did) {
        f->last = rb_mono_ns();
        rb_count_up(&w->bursts, 1);
        if ((rb_get(&w->loops) & 15) == 0)
            for (int i = 0; i < 2; i++)
                if (w->c[i])
                    rb_service(w->c[i]);
    }
    rb_set(&w->packets, rb_get(&f->sent) + rb_get(&f->received));
    return did;
}

static void flow_finish(struct rb_worker *w)
{
    struct flow *f = w->kind;
    if (f->holding)
        rb_return(f->out->c, f->held, f->holding);
    f->holding = 0;
}

static void flow_free(struct rb_worker *w)
{
    struct flow *f = w->kind;
    free(f->seen);
    free(f);
}

int rb_flow_stats_get(rb_worker *w, rb_flow_stats *st)
{
    struct flow *f = w->kind;
    memset(st, 0, sizeof *st);
    if (w->turn != flow_turn)
        return rb_fail(EINVAL, "bad-option", NULL, "this worker is no flow");
    st->sent = rb_get(&f->sent);
    st->sent_bytes = rb_get(&f->sent_bytes);
    st->refused = rb_get(&f->refused);
    st->received = rb_get(&f->received);
    st->received_bytes = rb_get(&f->received_bytes);
    st->reordered = rb_get(&f->reordered);
    st->duplicated = rb_get(&f->duplicated);
    st->corrupted = rb_get(&f->corrupted);
    st->foreign = rb_get(&f->foreign);
    st->next_sequence = f->next;
    st->running = rb_load_acquire(&w->running);
    st->error = atomic_load(&w->error);
    if (st->error)
        memcpy(st->message, w->message, sizeof st->message);
    /* Lost for certain only what was overtaken, or, once it is over, what never came. */
    uint64_t upto = f->out && !st->running ? st->sent : rb_get(&f->highest), distinct = rb_get(&f->distinct);
    if (f->in)
        st->lost = upto > distinct + st->corrupted ? upto - distinct - st->corrupted : 0;
    st->seconds = f->last > f->started ? (double)(f->last - f->started) / 1e9 : 0;
    for (uint32_t i = 0; i < BUCKETS; i++)
        st->latency_count += f->latency[i];
    static const double part[] = {0, 0.5, 0.99, 0.999, 1};
    for (int k = 1; k < 4; k++) {
        uint64_t upto_count = (uint64_t)((double)st->latency_count * part[k]), sum = 0;
        for (uint32_t i = 0; i < BUCKETS && st->latency_count; i++)
            if ((sum += f->latency[i]) > upto_count) {
                st->latency_ns[k] = latency_of(i);
                break;
            }
    }
    st->latency_ns[0] = f->latency_min;
    st->latency_ns[4] = f->latency_max;
    return 0;
}

int rb_flow_start(rb_worker **worker, rb_end *out, rb_end *in, const rb_flow_options *options, const rb_worker_options *worker_options)
{
    struct rb_worker *w = calloc(1, sizeof *w);
    struct flow *f = calloc(1, sizeof *f);
    int rc = 0;
    if (!w || !f || !(f->seen = calloc(WINDOW / 64, 8)))
        rc = rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    else {
        if (options)
            memcpy(&f->o, options, RB_MIN(options->struct_size, sizeof f->o));
        f->o.size = f->o.size ? f->o.size : HEADERS + sizeof(struct mark);
        f->o.flows = f->o.flows ? f->o.flows : 1;
        uint32_t room = out ? out->c->buffer_size - RB_BUFFER_HEADER : 0;
        if (!out && !in)
            rc = rb_fail(EINVAL, "bad-option", NULL, "a flow needs an end to send on or to receive from");
        else if (out && (f->o.size < HEADERS + sizeof(struct mark) || f->o.size > room)) {
            rb_fail(EINVAL, "bad-size", NULL, "packets of %u bytes cannot be sent here", f->o.size);
            rc = rb_cure(EINVAL, "use %u to %u bytes", (uint32_t)(HEADERS + sizeof(struct mark)), room);
        } else if ((out && out->c->worker) || (in && in->c->worker))
            rc = rb_fail(EBUSY, "busy", "attach a handle of its own for another worker", "a worker runs on this handle already");
    }
    if (rc == 0) {
        f->out = out;
        f->in = in;
        f->started = f->last = rb_mono_ns();
        f->token_at = rb_now_ns();
        make_head(f);
        w->c[0] = out ? out->c : in->c;
        w->c[1] = out && in && in->c != out->c ? in->c : NULL;
        w->turn = flow_turn;
        w->finish = flow_finish;
        w->free = flow_free;
        w->kind = f;
        rc = rb_worker_launch(w, worker_options);
    }
    if (rc < 0) {
        if (f)
            free(f->seen);
        free(f);
        free(w);
        return rc;
    }
    *worker = w;
    return 0;
}
