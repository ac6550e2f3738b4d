/* SPDX-License-Identifier: Apache-2.0
 *
 * Which packets pass: libpcap's expressions, compiled by libpcap, which is loaded when the first is compiled so that nothing else needs it,
 * and run here. A compiled filter is classic BPF: it only jumps forward, so it ends; what it loads is checked against the packet's length.
 * The bytes it may look at are copied first: a guest that can write to the pool may change them at any moment.
 */
#include "rb_internal.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- running ---------------------------------------------------------------------------------------------------------- */

enum { LD = 0, LDX = 1, ST = 2, STX = 3, ALU = 4, JMP = 5, RET = 6, MISC = 7 };                       /* code & 7 */
enum { W = 0x00, H = 0x08, B = 0x10 };                                                                /* code & 0x18 */
enum { IMM = 0x00, ABS = 0x20, IND = 0x40, MEM = 0x60, LEN = 0x80, MSH = 0xa0 };                      /* code & 0xe0 */
enum { ADD = 0x00, SUB = 0x10, MUL = 0x20, DIV = 0x30, OR = 0x40, AND = 0x50, LSH = 0x60, RSH = 0x70, NEG = 0x80, MOD = 0x90, XOR = 0xa0 };
enum { JA = 0x00, JEQ = 0x10, JGT = 0x20, JGE = 0x30, JSET = 0x40 };
enum { WITH_X = 0x08, RET_A = 0x10, TXA = 0x80, CELLS = 16 };

/* Big-endian number at `at`; 0 and *ok = 0 when it is not inside. */
static inline uint32_t load(const uint8_t *p, uint32_t have, uint64_t at, uint32_t size, int *ok)
{
    if (at + size > have) {
        *ok = 0;
        return 0;
    }
    p += at;
    return size == 1 ? p[0] : size == 2 ? (uint32_t)(p[0] << 8 | p[1]) : (uint32_t)p[0] << 24 | (uint32_t)(p[1] << 16 | p[2] << 8 | p[3]);
}

static inline uint32_t size_of(uint16_t code) { return (code & 0x18) == W ? 4 : (code & 0x18) == H ? 2 : 1; }

/* The value that the filter returns: 0 = does not match. p: the first `have` bytes of a packet of `length`. The program was checked. */
static uint32_t run(const struct rb_filter_insn *pc, const uint8_t *p, uint32_t have, uint32_t length)
{
    uint32_t a = 0, x = 0, m[CELLS] = {0};
    for (int ok = 1; ok; pc++) {
        const uint16_t code = pc->code;
        const uint32_t k = pc->k;
        switch (code & 7) {
        case LD:
            switch (code & 0xe0) {
            case IMM: a = k; break;
            case ABS: a = load(p, have, k, size_of(code), &ok); break;
            case IND: a = load(p, have, (uint64_t)x + k, size_of(code), &ok); break;
            case MEM: a = m[k]; break;
            default: a = length;
            }
            break;
        case LDX:
            switch (code & 0xe0) {
            case IMM: x = k; break;
            case MEM: x = m[k]; break;
            case MSH: x = (load(p, have, k, 1, &ok) & 15) * 4; break;
            default: x = length;
            }
            break;
        case ST: m[k] = a; break;
        case STX: m[k] = x; break;
        case ALU: {
            const uint32_t v = code & WITH_X ? x : k;
            switch (code & 0xf0) {
            case ADD: a += v; break;
            case SUB: a -= v; break;
            case MUL: a *= v; break;
            case DIV:
            case MOD:
                if (!v)
                    return 0;
                a = (code & 0xf0) == DIV ? a / v : a % v;
                break;
            case OR: a |= v; break;
            case AND: a &= v; break;
            case LSH: a = v < 32 ? a << v : 0; break;
            case RSH: a = v < 32 ? a >> v : 0; break;
            case XOR: a ^= v; break;
            default: a = 0u - a;
            }
            break;
        }
        case JMP: {
            const uint32_t v = code & WITH_X ? x : k;
            int yes;
            switch (code & 0xf0) {
            case JA: pc += k; continue;
            case JEQ: yes = a == v; break;
            case JGT: yes = a > v; break;
            case JGE: yes = a >= v; break;
            default: yes = (a & v) != 0;
            }
            pc += yes ? pc->jt : pc->jf;
            break;
        }
        case RET: return (code & 0x18) == RET_A ? a : k;
        default:
            if (code & TXA)
                a = x;
            else
                x = a;
        }
    }
    return 0; /* it looked behind the packet's end */
}

/* Is it a program that ends and keeps within its memory? And how far into a packet can it look? */
static int check(struct rb_filter *f)
{
    uint64_t reach = 0;
    uint32_t x_most = 0; /* X is at most so much, wherever it comes from */
    int x_any = 0;
    for (uint32_t i = 0; i < f->count; i++) {
        const struct rb_filter_insn *in = &f->insn[i];
        const uint16_t code = in->code, mode = code & 0xe0;
        const uint32_t left = f->count - i - 1;
        int good = code < 0x100 && (code & 0x18) != 0x18;
        switch (code & 7) {
        case LD:
            good = good && (mode <= LEN) && (mode == ABS || mode == IND || (code & 0x18) == W) && (mode != MEM || in->k < CELLS);
            break;
        case LDX:
            good = good && (mode == MSH ? (code & 0x18) == B : (mode == IMM || mode == MEM || mode == LEN) && (code & 0x18) == W) &&
                   (mode != MEM || in->k < CELLS);
            x_most = RB_MAX(x_most, mode == MSH ? 60u : mode == IMM ? in->k : 0u);
            x_any |= mode == MEM || mode == LEN;
            break;
        case ST:
        case STX: good = good && in->k < CELLS; break;
        case ALU: good = (code & 0xf0) <= XOR && !(((code & 0xf0) == DIV || (code & 0xf0) == MOD) && !(code & WITH_X) && !in->k); break;
        case JMP: good = (code & 0xf0) == JA ? in->k < left : (code & 0xf0) <= JSET && (uint32_t)RB_MAX(in->jt, in->jf) < left; break;
        case MISC: x_any |= !(code & TXA); break;
        default: good = good && ((code & 0x18) == 0 || (code & 0x18) == RET_A);
        }
        if (!good || (!left && (code & 7) != RET))
            return -1;
    }
    for (uint32_t i = 0; i < f->count; i++) {
        const struct rb_filter_insn *in = &f->insn[i];
        if ((in->code & 7) == LD && (in->code & 0xe0) == ABS)
            reach = RB_MAX(reach, (uint64_t)in->k + 4);
        else if ((in->code & 7) == LD && (in->code & 0xe0) == IND)
            reach = x_any ? UINT32_MAX : RB_MAX(reach, (uint64_t)in->k + x_most + 4);
        else if ((in->code & 7) == LDX && (in->code & 0xe0) == MSH)
            reach = RB_MAX(reach, (uint64_t)in->k + 1);
    }
    f->reach = (uint32_t)RB_MIN(reach, (uint64_t)RB_MAX_LENGTH);
    return f->count ? 0 : -1;
}

bool rb_filter_match(struct rb_filter *f, struct rb_cluster *c, const rb_desc *desc)
{
    const uint32_t length = rb_desc_length(desc), have = RB_MIN(length, f->reach);
    const uint8_t *data = rb_data(c, desc);
    uint8_t copy[512], *mine = copy;
    int pass;
    if (f->fate >= 0) /* it goes with the fragments before it */
        pass = f->fate;
    else if (!data)
        pass = 0;
    else if (have <= sizeof copy) {
        memcpy(mine, data, have);
        pass = run(f->insn, mine, have, length) != 0;
    } else { /* rare: an expression that looks deep into long packets */
        uint8_t whole[RB_MAX_LENGTH];
        memcpy(whole, data, have);
        pass = run(f->insn, whole, have, length) != 0;
    }
    f->fate = rb_desc_flags(desc) & RB_MORE ? pass : -1;
    return pass;
}

int rb_filter_keep(struct rb_filter *f, struct rb_cluster *c, rb_desc *desc, int n)
{
    rb_desc away[RB_MAX_BURST];
    int kept = 0, gone = 0;
    for (int i = 0; i < n; i++) {
        if (rb_filter_match(f, c, &desc[i]))
            desc[kept++] = desc[i];
        else
            away[gone++] = desc[i];
        if (gone == (int)RB_MAX_BURST) {
            rb_return(c, away, gone);
            gone = 0;
        }
    }
    if (gone)
        rb_return(c, away, gone);
    return kept;
}

int rb_filter_send(struct rb_filter *f, struct rb_cluster *c, rb_desc *desc, int n, int (*send)(void *to, void *at, rb_desc *desc, int n), void *to, void *at,
                   uint64_t *dropped)
{
    rb_desc pass[RB_MAX_BURST], away[RB_MAX_BURST];
    uint16_t from[RB_MAX_BURST];
    int done = 0;
    *dropped = 0;
    while (done < n) {
        int k = RB_MIN(n - done, (int)RB_MAX_BURST), match = 0, gone = 0, sent = 0, fate = f->fate;
        for (int i = 0; i < k; i++)
            if (rb_filter_match(f, c, &desc[done + i])) {
                from[match] = (uint16_t)i;
                pass[match++] = desc[done + i];
            }
        if (match && (sent = send(to, at, pass, match)) < 0) {
            f->fate = fate;
            return done ? done : sent;
        }
        int moved = sent < match ? from[sent] : k; /* up to the first that matched and did not go */
        for (int i = 0, m = 0; i < moved; i++)
            if (m < sent && from[m] == i)
                m++;
            else
                away[gone++] = desc[done + i];
        rb_return(c, away, gone);
        *dropped += (uint64_t)gone;
        done += moved;
        if (moved < k) { /* the rest is judged when it comes again */
            f->fate = moved && (rb_desc_flags(&desc[done - 1]) & RB_MORE) ? (sent && from[sent - 1] == moved - 1) : moved ? -1 : fate;
            break;
        }
    }
    return done;
}

/* ---- compiling -------------------------------------------------------------------------------------------------------- */

struct program { /* libpcap's struct bpf_program */
    unsigned count;
    struct rb_filter_insn *insn;
};

static struct {
    void *(*open_dead)(int link, int snaplen);
    int (*compile)(void *pcap, struct program *program, const char *expression, int optimize, uint32_t netmask);
    void (*freecode)(struct program *program);
    char *(*geterr)(void *pcap);
    void (*close)(void *pcap);
} libpcap;
static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;

static int load_libpcap(void)
{
    static void *so;
    if (libpcap.close)
        return 0;
    if (!so && !(so = dlopen("libpcap.so.0.8", RTLD_NOW | RTLD_LOCAL)) && !(so = dlopen("libpcap.so.1", RTLD_NOW | RTLD_LOCAL)))
        return rb_fail(ENOTSUP, "no-libpcap", "apt-get install libpcap0.8", "filters need libpcap, which is not installed here");
    libpcap.open_dead = (void *(*)(int, int))dlsym(so, "pcap_open_dead");
    libpcap.compile = (int (*)(void *, struct program *, const char *, int, uint32_t))dlsym(so, "pcap_compile");
    libpcap.freecode = (void (*)(struct program *))dlsym(so, "pcap_freecode");
    libpcap.geterr = (char *(*)(void *))dlsym(so, "pcap_geterr");
    void (*close)(void *) = (void (*)(void *))dlsym(so, "pcap_close");
    if (!libpcap.open_dead || !libpcap.compile || !libpcap.freecode || !libpcap.geterr || !close)
        return rb_fail(ENOTSUP, "no-libpcap", "apt-get install --reinstall libpcap0.8", "the libpcap installed here cannot compile filters");
    libpcap.close = close;
    return 0;
}

static int compiles(const char *expression)
{
    struct program program = {0};
    void *pcap = libpcap.open_dead(1, 262144);
    int good = pcap && libpcap.compile(pcap, &program, expression, 0, 0xffffffff) == 0;
    if (good)
        libpcap.freecode(&program);
    if (pcap)
        libpcap.close(pcap);
    return good;
}

#define SEARCH_NS 1000000000u
#define LONGEST 8192u /* bytes: libpcap's time grows with the third power, and is some seconds then */

/* Could an expression that compiles begin with the first n bytes? libpcap does not say where it stumbled, so the least that could follow is tried. */
static int begins_well(const char *expression, int n)
{
    static const char *const rest[] = {"", " 1", " tcp", " 1 = 1", " = 1", " 1.2.3.4", " 1:2:3:4:5:6", "0] = 1", "] = 1", " proto 6", " net 1.2.3.0/24", "/24"};
    char text[RB_FILTER_TEXT + 64];
    int open = 0;
    for (int i = 0; i < n; i++)
        open += (expression[i] == '(') - (expression[i] == ')');
    for (unsigned r = 0; r < sizeof rest / sizeof *rest && open >= 0; r++) {
        int at = snprintf(text, sizeof text, "%.*s%s", n, expression, rest[r]);
        for (int i = 0; i < open && at < (int)sizeof text - 1; i++)
            text[at++] = ')';
        text[at] = 0;
        if (compiles(text))
            return 1;
    }
    return 0;
}

static int part_of_word(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || strchr("._-:", c); }

/* Which word of it is the first that cannot be there: from, to. Both the length when it ends too early. -1: not found in time (names of hosts in it
 * may have to be asked for, each time). */
static void find_fault(const char *expression, int *from, int *to)
{
    const uint64_t until = rb_mono_ns() + SEARCH_NS;
    int length = (int)strlen(expression);
    *from = *to = length;
    for (int i = 0; i < length;) {
        if (rb_mono_ns() > until) {
            *from = -1;
            return;
        }
        while (expression[i] == ' ' || expression[i] == '\t' || expression[i] == '\n')
            i++;
        int start = i;
        if (!expression[i])
            return;
        if (part_of_word(expression[i]))
            while (expression[i] && part_of_word(expression[i]))
                i++;
        else
            i++;
        while (i > start && strchr("=<>&|", expression[i - 1]) && expression[i] && strchr("=<>&|", expression[i]))
            i++; /* signs of two characters */
        if (!begins_well(expression, i)) {
            *from = start;
            *to = i;
            return;
        }
    }
}

static int says_where(const char *expression, const char *why)
{
    int from, to;
    const char *colon = strstr(why, "syntax error");
    if (!colon || strlen(expression) >= RB_FILTER_TEXT) {
        rb_fail(EINVAL, "bad-filter", NULL, "the filter \"%.400s\" cannot be compiled: %.300s", expression, why);
    } else {
        find_fault(expression, &from, &to);
        if (from < 0)
            rb_fail(EINVAL, "bad-filter", NULL, "the filter \"%s\" cannot be compiled: %.200s", expression, why);
        else if (from == (int)strlen(expression))
            rb_fail(EINVAL, "bad-filter", NULL, "the filter \"%s\" cannot be compiled: syntax error at its end, where more is expected", expression);
        else
            rb_fail(EINVAL, "bad-filter", NULL, "the filter \"%s\" cannot be compiled: syntax error at \"%.*s\" (character %d)", expression, to - from,
                    expression + from, from + 1);
    }
    return rb_cure(EINVAL, "man pcap-filter tells the syntax, for example: udp port 53 and not host 192.0.2.1");
}

int rb_filter_compile(const char *expression, struct rb_filter **out)
{
    struct program program = {0};
    *out = NULL;
    if (!expression || !expression[strspn(expression, " \t\n")])
        return 0;
    if (strlen(expression) > LONGEST) {
        rb_fail(EINVAL, "bad-filter", NULL, "the filter has %zu bytes, and %u is the most: libpcap's time for it grows with the third power",
                strlen(expression), LONGEST);
        return rb_cure(EINVAL, "name a prefix for many addresses, portrange for many ports");
    }
    pthread_mutex_lock(&one);
    int rc = load_libpcap();
    void *pcap = rc == 0 ? libpcap.open_dead(1, 262144) : NULL;
    if (rc == 0 && !pcap)
        rc = rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
    if (rc == 0 && libpcap.compile(pcap, &program, expression, 1, 0xffffffff) < 0) {
        char why[512];
        snprintf(why, sizeof why, "%s", libpcap.geterr(pcap));
        rc = says_where(expression, why);
    } else if (rc == 0) {
        struct rb_filter *f = malloc(sizeof *f + program.count * sizeof *f->insn);
        if (!f)
            rc = rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
        else {
            f->count = program.count;
            f->fate = -1;
            memcpy(f->insn, program.insn, program.count * sizeof *f->insn);
            if (check(f) < 0) {
                free(f);
                rc = rb_fail(ENOTSUP, "bad-filter", NULL, "the filter \"%.400s\" needs instructions that only the kernel knows", expression);
            } else
                *out = f;
        }
        libpcap.freecode(&program);
    }
    if (pcap)
        libpcap.close(pcap);
    pthread_mutex_unlock(&one);
    return rc;
}

/* ---- filters of ends and queues --------------------------------------------------------------------------------------- */

int rb_filter(rb_end *end, const char *expression)
{
    struct rb_filter *f;
    int rc = rb_alive(end->c);
    if (rc < 0 || (rc = rb_filter_compile(expression, &f)) < 0)
        return rc;
    if (end->ops->filter && (rc = end->ops->filter(end, f)) < 0) {
        free(f);
        return rc;
    }
    free(end->filter);
    end->filter = f;
    return 0;
}

int rb_queue_filter(rb_cluster *c, uint32_t queue, const char *expression)
{
    struct rb_filter *f;
    int rc = rb_alive(c);
    if (rc < 0)
        return rc;
    if (!c->reg)
        return rb_fail(ENOTSUP, "guest", "ringbar queue set, on the host; in a VM a program filters its own end", "queues are changed on the host");
    if (expression && strlen(expression) >= RB_FILTER_TEXT)
        return rb_fail(EINVAL, "bad-filter", "shorten it", "the filter of a queue has at most %u characters, and this has %zu", RB_FILTER_TEXT - 1,
                       strlen(expression));
    if ((rc = rb_filter_compile(expression, &f)) < 0) /* before the lock: names in it are looked up */
        return rc;
    if (f && f->count > RB_FILTER_MAX) {
        rc = rb_fail(EINVAL, "bad-filter", "shorten it", "the filter of a queue has at most %u instructions, and this makes %u", RB_FILTER_MAX, f->count);
        free(f);
        return rc;
    }
    if ((rc = rb_enter(c->reg)) == 0) {
        if ((rc = rb_queue_check(c, queue)) == 0 && c->reg->state->queue[queue].direct && f)
            rc = rb_fail(ENOTSUP, "direct", "filter the end that a program opened", "%u@%u is a direct queue: nothing of the host sees its packets", c->id, queue);
        if (rc == 0) {
            struct rb_filter_record *r = &c->reg->state->filter[queue];
            r->count = f ? f->count : 0;
            snprintf(r->text, sizeof r->text, "%s", f ? expression : "");
            if (f)
                memcpy(r->insn, f->insn, f->count * sizeof *f->insn);
            r->version++;
            for (uint32_t leg = 0; leg < 2; leg++)
                if (rb_leg_of(c, 2 * queue + leg)->kind)
                    rb_settle(c, rb_get(&rb_leg_of(c, 2 * queue + leg)->book), 200);
        }
        rb_leave(c->reg);
    }
    free(f);
    return rc;
}

void rb_filter_sync(struct rb_server *s, struct rb_leg_ctx *l)
{
    const struct rb_filter_record *r = &s->c->reg->state->filter[l->number / 2];
    if (l->filter_version == r->version)
        return;
    uint32_t count = RB_MIN(r->count, RB_FILTER_MAX);
    struct rb_filter *f = count ? malloc(sizeof *f + count * sizeof *f->insn) : NULL;
    if (count && !f)
        return; /* out of memory: the one before stays, and is replaced at the next look */
    if (f) {
        f->count = count;
        f->fate = -1;
        memcpy(f->insn, r->insn, count * sizeof *f->insn);
        if (check(f) < 0) { /* never, unless state was scribbled over: then nothing passes */
            f->count = 1;
            f->reach = 0;
            f->insn[0] = (struct rb_filter_insn){.code = RET, .k = 0};
        }
    }
    free(l->filter);
    l->filter = f;
    l->filter_version = r->version;
}
