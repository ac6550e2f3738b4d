/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Classic BPF to BPF. libpcap compiles an expression to classic BPF, a machine with an accumulator A, an index X, sixteen words of memory and
 * loads that end the program when they leave the packet. The kernel runs other code: registers, and a verifier that must see every bound.
 *
 *   r6 context   r7 first byte   r8 behind the last byte   r9 the packet's length   r3 A   r4 X   r1 r2 r5 scratch   stack: memory
 *
 * Several rules follow one another: a match jumps to the end, where the packet is taken, no match falls into the next rule.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "xdp_internal.h"
#include "xdp_rule.h"

enum { A = BPF_REG_3, X = BPF_REG_4, T1 = BPF_REG_1, T2 = BPF_REG_2, T5 = BPF_REG_5, CTX = BPF_REG_6, DATA = BPF_REG_7, END = BPF_REG_8, LEN = BPF_REG_9 };

#define FARTHEST 0x7fffu    /* bytes from the packet's start: what an offset holds, and no packet is longer */
#define LONGEST 30000u      /* instructions: what a jump reaches */
#define MAX_CLASSIC 4096u   /* as the kernel's own limit */

/* ---- writing ---- */

static uint32_t put(struct code *c, struct bpf_insn insn)
{
    if (c->n == c->room) {
        uint32_t room = c->room ? 2 * c->room : 256;
        struct bpf_insn *more = room > LONGEST + 1024 && c->n >= LONGEST ? NULL : realloc(c->insn, room * sizeof *more);

        if (!more) {
            c->failed = true;
            return c->n ? c->n - 1 : 0;
        }
        c->insn = more;
        c->room = room;
    }
    c->insn[c->n] = insn;
    return c->n++;
}

void rb_code_free(struct code *c)
{
    free(c->insn);
    memset(c, 0, sizeof *c);
}

static void op(struct code *c, uint8_t code, uint8_t dst, uint8_t src, int16_t off, int32_t imm)
{
    put(c, (struct bpf_insn){.code = code, .dst_reg = dst & 15, .src_reg = src & 15, .off = off, .imm = imm});
}

static void move(struct code *c, uint8_t dst, uint8_t src) { op(c, BPF_ALU64 | BPF_MOV | BPF_X, dst, src, 0, 0); }
static void set(struct code *c, uint8_t dst, uint32_t value) { op(c, BPF_ALU | BPF_MOV | BPF_K, dst, 0, 0, (int32_t)value); }

static void map_address(struct code *c, uint8_t dst, int fd)
{
    op(c, BPF_LD | BPF_DW | BPF_IMM, dst, BPF_PSEUDO_MAP_FD, 0, fd);
    op(c, 0, 0, 0, 0, 0);
}

/* ---- jumps: to a classic instruction, or to one of two fates ---- */

enum { TO_MATCH = -1, TO_MISS = -2 };

struct jump {
    uint32_t at;
    int32_t to;
};

struct jumps {
    struct jump *jump;
    uint32_t n, room;
};

static void note(struct code *c, struct jumps *j, uint32_t at, int32_t to)
{
    if (j->n == j->room) {
        uint32_t room = j->room ? 2 * j->room : 256;
        struct jump *more = realloc(j->jump, room * sizeof *more);

        if (!more) {
            c->failed = true;
            return;
        }
        j->jump = more;
        j->room = room;
    }
    j->jump[j->n++] = (struct jump){.at = at, .to = to};
}

static void jump_to(struct code *c, struct jumps *j, struct bpf_insn insn, int32_t to)
{
    note(c, j, put(c, insn), to);
}

static void jump_always(struct code *c, struct jumps *j, int32_t to)
{
    jump_to(c, j, (struct bpf_insn){.code = BPF_JMP | BPF_JA}, to);
}

static void jump_if(struct code *c, struct jumps *j, uint8_t class, uint8_t how, uint8_t dst, uint8_t src, uint32_t k, int32_t to)
{
    jump_to(c, j, (struct bpf_insn){.code = class | how, .dst_reg = dst & 15, .src_reg = src & 15, .imm = (int32_t)k}, to);
}

/* ---- one classic instruction after the other ---- */

static uint8_t width(uint16_t code)
{
    return BPF_SIZE(code) == BPF_W ? 4 : BPF_SIZE(code) == BPF_H ? 2 : 1;
}

/* dst = bytes at DATA + T1 (known to be at most FARTHEST) + off, in host order; a miss when they are not all there. */
static void load(struct code *c, struct jumps *j, uint8_t dst, uint16_t size, bool indirect, uint32_t off)
{
    uint8_t bytes = width(size);

    move(c, T2, DATA);
    if (indirect)
        op(c, BPF_ALU64 | BPF_ADD | BPF_X, T2, T1, 0, 0);
    move(c, T5, T2);
    op(c, BPF_ALU64 | BPF_ADD | BPF_K, T5, 0, 0, (int32_t)(off + bytes));
    jump_if(c, j, BPF_JMP, BPF_JGT | BPF_X, T5, END, 0, TO_MISS);
    op(c, BPF_LDX | BPF_MEM | BPF_SIZE(size), dst, T2, (int16_t)off, 0);
    if (bytes > 1)
        op(c, BPF_ALU | BPF_END | BPF_TO_BE, dst, 0, 0, bytes * 8);
}

static void load_indirect(struct code *c, struct jumps *j, uint16_t size, uint32_t k)
{
    op(c, BPF_ALU | BPF_MOV | BPF_X, T1, X, 0, 0);
    if (k)
        op(c, BPF_ALU | BPF_ADD | BPF_K, T1, 0, 0, (int32_t)k); /* wraps as classic BPF does */
    jump_if(c, j, BPF_JMP, BPF_JGT | BPF_K, T1, 0, FARTHEST, TO_MISS);
    load(c, j, A, size, true, 0);
}

static int16_t memory_at(uint32_t k) { return (int16_t)(-4 * (int)(k + 1)); }

static bool arithmetic(struct code *c, struct jumps *j, const struct rb_xdp_insn *i)
{
    uint8_t what = BPF_OP(i->code), by_x = BPF_SRC(i->code) == BPF_X;
    uint8_t class = BPF_ALU;

    switch (what) {
    case BPF_DIV:
    case BPF_MOD:
        if (by_x)
            jump_if(c, j, BPF_JMP32, BPF_JEQ | BPF_K, X, 0, 0, TO_MISS);
        else if (!i->k)
            return false;
        break;
    case BPF_LSH:
    case BPF_RSH: /* beyond the width: nothing is left */
        if (by_x) {
            op(c, BPF_JMP32 | BPF_JLT | BPF_K, X, 0, 2, 32);
            set(c, A, 0);
            op(c, BPF_JMP | BPF_JA, 0, 0, 1, 0);
        } else if (i->k > 31) {
            set(c, A, 0);
            return true;
        }
        break;
    case BPF_ADD:
    case BPF_SUB:
    case BPF_MUL:
    case BPF_OR:
    case BPF_AND:
    case BPF_XOR:
        break;
    case BPF_NEG:
        op(c, class | BPF_NEG, A, 0, 0, 0);
        return true;
    default:
        return false;
    }
    if (by_x)
        op(c, class | what | BPF_X, A, X, 0, 0);
    else
        op(c, class | what | BPF_K, A, 0, 0, (int32_t)i->k);
    return true;
}

static bool branch(struct code *c, struct jumps *j, const struct rb_xdp_insn *i, uint32_t pc, uint32_t count)
{
    uint8_t what = BPF_OP(i->code);
    uint64_t yes = pc + 1ull + (what == BPF_JA ? i->k : i->jt), no = pc + 1ull + i->jf;

    if (yes >= count || (what != BPF_JA && no >= count))
        return false;
    if (what == BPF_JA) {
        jump_always(c, j, (int32_t)yes);
        return true;
    }
    if (what != BPF_JEQ && what != BPF_JGT && what != BPF_JGE && what != BPF_JSET)
        return false;
    if (yes != no)
        jump_if(c, j, BPF_JMP32, what | BPF_SRC(i->code), A, BPF_SRC(i->code) == BPF_X ? X : 0, BPF_SRC(i->code) == BPF_X ? 0 : i->k, (int32_t)yes);
    jump_always(c, j, (int32_t)no);
    return true;
}

/* false: an instruction that cannot be here */
static bool translate(struct code *c, struct jumps *j, const struct rb_xdp_insn *i, uint32_t pc, uint32_t count)
{
    bool in_memory = BPF_MODE(i->code) == BPF_MEM;

    switch (BPF_CLASS(i->code)) {
    case BPF_LD:
        switch (BPF_MODE(i->code)) {
        case BPF_ABS: /* far offsets are the kernel's own values (SKF_AD_...), which only sockets have */
            if (i->k + width(i->code) > FARTHEST || i->k > FARTHEST)
                return false;
            load(c, j, A, i->code, false, i->k);
            return true;
        case BPF_IND:
            load_indirect(c, j, i->code, i->k);
            return true;
        case BPF_IMM:
            set(c, A, i->k);
            return true;
        case BPF_LEN:
            op(c, BPF_ALU | BPF_MOV | BPF_X, A, LEN, 0, 0);
            return true;
        }
        /* fall through */
    case BPF_LDX:
        if (in_memory && i->k < BPF_MEMWORDS) {
            op(c, BPF_LDX | BPF_MEM | BPF_W, BPF_CLASS(i->code) == BPF_LD ? A : X, BPF_REG_10, memory_at(i->k), 0);
            return true;
        }
        if (BPF_CLASS(i->code) == BPF_LD)
            return false;
        switch (BPF_MODE(i->code)) {
        case BPF_IMM:
            set(c, X, i->k);
            return true;
        case BPF_LEN:
            op(c, BPF_ALU | BPF_MOV | BPF_X, X, LEN, 0, 0);
            return true;
        case BPF_MSH: /* four times the low half of a byte: the length of an IP header */
            if (i->k >= FARTHEST)
                return false;
            load(c, j, X, BPF_B, false, i->k);
            op(c, BPF_ALU | BPF_AND | BPF_K, X, 0, 0, 15);
            op(c, BPF_ALU | BPF_LSH | BPF_K, X, 0, 0, 2);
            return true;
        }
        return false;
    case BPF_ST:
    case BPF_STX:
        if (i->k >= BPF_MEMWORDS)
            return false;
        op(c, BPF_STX | BPF_MEM | BPF_W, BPF_REG_10, BPF_CLASS(i->code) == BPF_ST ? A : X, memory_at(i->k), 0);
        return true;
    case BPF_ALU:
        return arithmetic(c, j, i);
    case BPF_JMP:
        return branch(c, j, i, pc, count);
    case BPF_RET:
        if (BPF_RVAL(i->code) == BPF_A) {
            jump_if(c, j, BPF_JMP32, BPF_JEQ | BPF_K, A, 0, 0, TO_MISS);
            jump_always(c, j, TO_MATCH);
        } else {
            jump_always(c, j, i->k ? TO_MATCH : TO_MISS);
        }
        return true;
    case BPF_MISC:
        if (BPF_MISCOP(i->code) == BPF_TAX)
            op(c, BPF_ALU | BPF_MOV | BPF_X, X, A, 0, 0);
        else
            op(c, BPF_ALU | BPF_MOV | BPF_X, A, X, 0, 0);
        return true;
    }
    return false;
}

static int one_rule(struct code *c, const struct rb_xdp_rule *rule, struct jumps *matched, struct rb_xdp_error *err)
{
    struct jumps j = {0};
    uint32_t *start = calloc(rule->count + 1, sizeof *start);
    int r = start ? 0 : rb_xdp_fail(err, -ENOMEM, "no memory for the steering rule");

    if (!r && (!rule->count || rule->count > MAX_CLASSIC)) {
        r = rb_xdp_fail(err, -E2BIG, "the steering rule has %u instructions, and %u is the most", rule->count, MAX_CLASSIC);
        rb_xdp_cure(err, "write it shorter: a prefix for many addresses, portrange for many ports");
    }
    for (uint32_t i = 0; !r && i < BPF_MEMWORDS; i++) /* the verifier wants memory written before it is read */
        op(c, BPF_ST | BPF_MEM | BPF_W, BPF_REG_10, 0, memory_at(i), 0);
    if (!r) {
        /* Never so, but the verifier refuses what no jump leads to, and a rule may match everything or nothing. */
        jump_if(c, &j, BPF_JMP32, BPF_JEQ | BPF_K, LEN, 0, INT32_MAX, TO_MISS);
        set(c, A, 0);
        set(c, X, 0);
    }
    for (uint32_t pc = 0; !r && pc < rule->count; pc++) {
        start[pc] = c->n;
        if (!translate(c, &j, &rule->insns[pc], pc, rule->count)) {
            r = rb_xdp_fail(err, -EOPNOTSUPP, "the steering rule asks for what an XDP program cannot do (instruction %u: code %#x, %u)", pc,
                            rule->insns[pc].code, rule->insns[pc].k);
            rb_xdp_cure(err, "leave away what is not in the packet's bytes (inbound, ifname) and protochain; or take more, and filter it (--filter)");
        }
    }
    for (uint32_t i = 0; !r && !c->failed && i < j.n; i++) {
        if (j.jump[i].to == TO_MATCH) {
            note(c, matched, j.jump[i].at, TO_MATCH);
            continue;
        }
        uint32_t to = j.jump[i].to == TO_MISS ? c->n : start[j.jump[i].to];

        c->insn[j.jump[i].at].off = (int16_t)(to - j.jump[i].at - 1);
    }
    free(j.jump);
    free(start);
    return r;
}

/* ---- around the rules ---- */

static void prologue(struct code *c, const struct rule_maps *maps)
{
    move(c, CTX, BPF_REG_1);
    if (maps->frags) {
        op(c, BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_xdp_get_buff_len);
        move(c, LEN, BPF_REG_0);
    }
    op(c, BPF_LDX | BPF_MEM | BPF_W, DATA, CTX, offsetof(struct xdp_md, data), 0);
    op(c, BPF_LDX | BPF_MEM | BPF_W, END, CTX, offsetof(struct xdp_md, data_end), 0);
    if (!maps->frags) {
        move(c, LEN, END);
        op(c, BPF_ALU64 | BPF_SUB | BPF_X, LEN, DATA, 0, 0);
    }
}

/* Left to the stack: counted, and passed. */
static void epilogue_pass(struct code *c, const struct rule_maps *maps)
{
    op(c, BPF_ST | BPF_MEM | BPF_W, BPF_REG_10, 0, -4, 0);
    move(c, BPF_REG_2, BPF_REG_10);
    op(c, BPF_ALU64 | BPF_ADD | BPF_K, BPF_REG_2, 0, 0, -4);
    map_address(c, BPF_REG_1, maps->passed);
    op(c, BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_map_lookup_elem);
    op(c, BPF_JMP | BPF_JEQ | BPF_K, BPF_REG_0, 0, 3, 0);
    op(c, BPF_LDX | BPF_MEM | BPF_DW, BPF_REG_1, BPF_REG_0, 0, 0);
    op(c, BPF_ALU64 | BPF_ADD | BPF_K, BPF_REG_1, 0, 0, 1);
    op(c, BPF_STX | BPF_MEM | BPF_DW, BPF_REG_0, BPF_REG_1, 0, 0);
    op(c, BPF_ALU64 | BPF_MOV | BPF_K, BPF_REG_0, 0, 0, XDP_PASS);
    op(c, BPF_JMP | BPF_EXIT, 0, 0, 0, 0);
}

static void call_driver(struct code *c, int function)
{
    move(c, BPF_REG_1, CTX);
    op(c, BPF_JMP | BPF_CALL, 0, BPF_PSEUDO_KFUNC_CALL, 0, function);
}

static void stack_address(struct code *c, uint8_t dst, int32_t at)
{
    move(c, dst, BPF_REG_10);
    op(c, BPF_ALU64 | BPF_ADD | BPF_K, dst, 0, 0, at);
}

/* What the driver knows goes in front of the packet, as struct rb_xdp_meta, on the stack first. Where there is no room the packet goes without. */
static void metadata(struct code *c, const struct rule_maps *maps)
{
    enum { META = -(int)sizeof(struct rb_xdp_meta), VALID = END };
    const int16_t at_time = META + (int)offsetof(struct rb_xdp_meta, time), at_hash = META + (int)offsetof(struct rb_xdp_meta, hash);

    map_address(c, BPF_REG_1, maps->owner); /* for nothing but to be found */
    for (int16_t at = META; at < 0; at += 8)
        op(c, BPF_ST | BPF_MEM | BPF_DW, BPF_REG_10, 0, at, 0);
    set(c, VALID, 0);
    stack_address(c, BPF_REG_2, at_time);
    call_driver(c, maps->rx_time);
    op(c, BPF_JMP32 | BPF_JNE | BPF_K, BPF_REG_0, 0, 1, 0);
    op(c, BPF_ALU64 | BPF_OR | BPF_K, VALID, 0, 0, RB_XDP_META_TIME);
    stack_address(c, BPF_REG_2, at_hash);
    stack_address(c, BPF_REG_3, at_hash + 4);
    call_driver(c, maps->rx_hash);
    op(c, BPF_JMP32 | BPF_JNE | BPF_K, BPF_REG_0, 0, 1, 0);
    op(c, BPF_ALU64 | BPF_OR | BPF_K, VALID, 0, 0, RB_XDP_META_HASH);
    move(c, BPF_REG_1, CTX);
    op(c, BPF_ALU64 | BPF_MOV | BPF_K, BPF_REG_2, 0, 0, META);
    op(c, BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_xdp_adjust_meta);
    op(c, BPF_JMP32 | BPF_JNE | BPF_K, BPF_REG_0, 0, 12, 0);
    op(c, BPF_LDX | BPF_MEM | BPF_W, BPF_REG_1, CTX, offsetof(struct xdp_md, data_meta), 0);
    op(c, BPF_LDX | BPF_MEM | BPF_W, BPF_REG_2, CTX, offsetof(struct xdp_md, data), 0);
    move(c, BPF_REG_3, BPF_REG_1);
    op(c, BPF_ALU64 | BPF_ADD | BPF_K, BPF_REG_3, 0, 0, -META);
    op(c, BPF_JMP | BPF_JGT | BPF_X, BPF_REG_3, BPF_REG_2, 7, 0);
    op(c, BPF_ALU | BPF_MOV | BPF_K, BPF_REG_3, 0, 0, (int32_t)RB_XDP_META_MAGIC);
    op(c, BPF_STX | BPF_MEM | BPF_W, BPF_REG_1, BPF_REG_3, offsetof(struct rb_xdp_meta, magic), 0);
    op(c, BPF_STX | BPF_MEM | BPF_W, BPF_REG_1, VALID, offsetof(struct rb_xdp_meta, valid), 0);
    op(c, BPF_LDX | BPF_MEM | BPF_DW, BPF_REG_3, BPF_REG_10, at_time, 0);
    op(c, BPF_STX | BPF_MEM | BPF_DW, BPF_REG_1, BPF_REG_3, offsetof(struct rb_xdp_meta, time), 0);
    op(c, BPF_LDX | BPF_MEM | BPF_DW, BPF_REG_3, BPF_REG_10, at_hash, 0);
    op(c, BPF_STX | BPF_MEM | BPF_DW, BPF_REG_1, BPF_REG_3, offsetof(struct rb_xdp_meta, hash), 0);
}

/* To the socket of the queue that it came by, where there is one; returns where this begins. */
static uint32_t epilogue_take(struct code *c, const struct rule_maps *maps, uint32_t pass)
{
    uint32_t at = c->n;

    if (maps->rx_time)
        metadata(c, maps);
    op(c, BPF_LDX | BPF_MEM | BPF_W, BPF_REG_2, CTX, offsetof(struct xdp_md, rx_queue_index), 0);
    map_address(c, BPF_REG_1, maps->xsks);
    op(c, BPF_ALU64 | BPF_MOV | BPF_K, BPF_REG_3, 0, 0, XDP_PASS);
    op(c, BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_redirect_map);
    op(c, BPF_JMP | BPF_JNE | BPF_K, BPF_REG_0, 0, (int16_t)(pass - c->n - 1), XDP_REDIRECT);
    op(c, BPF_JMP | BPF_EXIT, 0, 0, 0, 0);
    return at;
}

int rb_rule_translate(struct code *c, const struct rb_xdp_rule *rules, uint32_t n, const struct rule_maps *maps, struct rb_xdp_error *err)
{
    struct jumps matched = {0};
    uint32_t pass, take;
    int r = 0;

    memset(c, 0, sizeof *c);
    prologue(c, maps);
    for (uint32_t i = 0; !r && i < n; i++)
        r = one_rule(c, &rules[i], &matched, err);
    if (!n) /* all; what passes is never reached, but the verifier refuses what no jump leads to */
        jump_if(c, &matched, BPF_JMP32, BPF_JNE | BPF_K, LEN, 0, INT32_MAX, TO_MATCH);
    pass = c->n;
    epilogue_pass(c, maps);
    take = matched.n ? epilogue_take(c, maps, pass) : 0;
    if (!r && (c->failed || c->n > LONGEST)) {
        r = rb_xdp_fail(err, -E2BIG, "the steering rules are too long for one XDP program");
        rb_xdp_cure(err, "write them shorter: a prefix for many addresses, portrange for many ports");
    }
    for (uint32_t i = 0; !r && i < matched.n; i++)
        c->insn[matched.jump[i].at].off = (int16_t)(take - matched.jump[i].at - 1);
    free(matched.jump);
    if (r)
        rb_code_free(c);
    return r;
}
