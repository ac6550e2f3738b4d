/* SPDX-License-Identifier: Apache-2.0
 *
 * Leading packets from one interface to another: by the traffic control of the kernel (clsact, u32, mirred), asked over netlink, and for what the
 * kernel sends by a program of a few instructions on a link, which the kernel takes away with the process that made it.
 */
#include "hook.h"

#include <arpa/inet.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_link.h>
#include <linux/pkt_cls.h>
#include <linux/pkt_sched.h>
#include <linux/rtnetlink.h>
#include <linux/tc_act/tc_mirred.h>
#include <net/if.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PREFERENCE 0x5242u /* of our filters, by which they are found again */
#define TCX_EGRESS 47      /* BPF_TCX_EGRESS, which older headers have not */

/* ---- netlink ------------------------------------------------------------------------------------------------------------ */

struct request {
    struct nlmsghdr head;
    union {
        struct tcmsg tc;
        struct ifinfomsg link;
    };
    uint8_t more[512];
};

static struct rtattr *put(struct request *r, uint16_t type, const void *data, size_t size)
{
    struct rtattr *a = (struct rtattr *)((uint8_t *)r + NLMSG_ALIGN(r->head.nlmsg_len));
    a->rta_type = type;
    a->rta_len = (uint16_t)RTA_LENGTH(size);
    if (size)
        memcpy(RTA_DATA(a), data, size);
    r->head.nlmsg_len = NLMSG_ALIGN(r->head.nlmsg_len) + RTA_ALIGN(a->rta_len);
    return a;
}

static void end_nest(struct request *r, struct rtattr *a) { a->rta_len = (uint16_t)((uint8_t *)r + r->head.nlmsg_len - (uint8_t *)a); }

static struct request tc_request(uint16_t type, uint16_t flags, int index, uint32_t parent)
{
    struct request r;
    memset(&r, 0, sizeof r);
    r.head = (struct nlmsghdr){.nlmsg_len = NLMSG_LENGTH(sizeof r.tc), .nlmsg_type = type, .nlmsg_flags = (uint16_t)(NLM_F_REQUEST | flags)};
    r.tc = (struct tcmsg){.tcm_family = AF_UNSPEC, .tcm_ifindex = index, .tcm_parent = parent};
    return r;
}

/* Ask, and pass each answer to `each`. 0, or what the kernel says. */
static int ask(int netlink, struct request *r, void (*each)(const struct nlmsghdr *h, void *arg), void *arg)
{
    uint8_t buffer[16384] __attribute__((aligned(8)));
    int rc = 1;
    if (send(netlink, r, r->head.nlmsg_len, 0) < 0)
        rc = -errno;
    while (rc > 0) {
        ssize_t n = recv(netlink, buffer, sizeof buffer, 0);
        if (n <= 0)
            rc = n < 0 ? -errno : -EIO;
        for (struct nlmsghdr *h = (void *)buffer; rc > 0 && NLMSG_OK(h, (size_t)n); h = NLMSG_NEXT(h, n)) {
            if (h->nlmsg_type == NLMSG_ERROR)
                rc = ((const struct nlmsgerr *)NLMSG_DATA(h))->error;
            else if (h->nlmsg_type == NLMSG_DONE)
                rc = 0;
            else if (each) {
                each(h, arg);
                if (!(h->nlmsg_flags & NLM_F_MULTI))
                    rc = 0;
            }
        }
    }
    return rc;
}

int rb_hook_open(void)
{
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    return fd < 0 ? -errno : fd;
}

/* ---- filters -------------------------------------------------------------------------------------------------------------- */

/* The place on an interface where filters hang. 1: made, 0: it was there. */
static int make_place(int netlink, int index)
{
    struct request r = tc_request(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK, index, TC_H_CLSACT);
    r.tc.tcm_handle = TC_H_MAKE(TC_H_CLSACT, 0);
    put(&r, TCA_KIND, "clsact", 7);
    int rc = ask(netlink, &r, NULL, NULL);
    return rc == -EEXIST ? 0 : rc < 0 ? rc : 1;
}

/* Everything that passes `parent` of interface `from` goes to `to`. */
static int lead(int netlink, int from, uint32_t parent, int to, int how, int then)
{
    uint8_t all[sizeof(struct tc_u32_sel) + sizeof(struct tc_u32_key)] = {0}; /* one key, with a mask of 0 */
    const struct tc_u32_sel selector = {.flags = TC_U32_TERMINAL, .nkeys = 1};
    struct tc_mirred mirred = {.action = then, .eaction = how, .ifindex = (uint32_t)to};
    struct request r = tc_request(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK, from, parent);
    r.tc.tcm_info = TC_H_MAKE(PREFERENCE << 16, htons(ETH_P_ALL));
    put(&r, TCA_KIND, "u32", 4);
    struct rtattr *options = put(&r, TCA_OPTIONS, NULL, 0);
    memcpy(all, &selector, sizeof selector);
    put(&r, TCA_U32_SEL, all, sizeof all);
    struct rtattr *actions = put(&r, TCA_U32_ACT, NULL, 0), *first = put(&r, 1, NULL, 0);
    put(&r, TCA_ACT_KIND, "mirred", 7);
    struct rtattr *settings = put(&r, TCA_ACT_OPTIONS, NULL, 0);
    put(&r, TCA_MIRRED_PARMS, &mirred, sizeof mirred);
    end_nest(&r, settings);
    end_nest(&r, first);
    end_nest(&r, actions);
    end_nest(&r, options);
    return ask(netlink, &r, NULL, NULL);
}

int rb_hook_receive(int netlink, int from, int to)
{
    int rc = make_place(netlink, from);
    return rc < 0 ? rc : lead(netlink, from, TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS), to, TCA_INGRESS_REDIR, TC_ACT_STOLEN);
}

/* ---- what the kernel sends: a program, on a link where the kernel has them (6.6) -------------------------------------------------- */

static int bpf(int command, union bpf_attr *attr) { return (int)syscall(SYS_bpf, command, attr, sizeof *attr); }

#define LOAD(register_, value) {.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = register_, .imm = value}
#define CALL(function) {.code = BPF_JMP | BPF_CALL, .imm = function}
#define END {.code = BPF_JMP | BPF_EXIT}

/* `filter`: for a filter that stays behind when its process dies. It passes on a copy and then drops the packet; where there is nobody to pass it to, it
 * lets the packet go. */
static int load_program(int to, bool copy, bool filter)
{
    const struct bpf_insn instead[] = {LOAD(1, to), LOAD(2, 0), CALL(BPF_FUNC_redirect), END};
    const struct bpf_insn as_well[] = {LOAD(2, to), LOAD(3, 0), CALL(BPF_FUNC_clone_redirect), LOAD(0, -1), END};
    const struct bpf_insn if_taken[] = {
        LOAD(2, to), LOAD(3, 0), CALL(BPF_FUNC_clone_redirect),
        {.code = BPF_ALU | BPF_MOV | BPF_X, .dst_reg = 1, .src_reg = 0}, /* an int: the sign is in the lower half */
        LOAD(0, TC_ACT_STOLEN), /* not SHOT, which TCP would take for a full queue */
        {.code = BPF_ALU64 | BPF_LSH | BPF_K, .dst_reg = 1, .imm = 32},
        {.code = BPF_ALU64 | BPF_ARSH | BPF_K, .dst_reg = 1, .imm = 32},
        {.code = BPF_JMP | BPF_JSGE | BPF_K, .dst_reg = 1, .imm = 0, .off = 1},
        LOAD(0, -1), /* whatever else is there goes on with it */
        END,
    };
    union bpf_attr a;
    memset(&a, 0, sizeof a);
    a.prog_type = BPF_PROG_TYPE_SCHED_CLS;
    a.expected_attach_type = filter ? 0 : TCX_EGRESS;
    a.insns = (uintptr_t)(copy ? as_well : filter ? if_taken : instead);
    a.insn_cnt = copy ? sizeof as_well / sizeof *as_well : filter ? sizeof if_taken / sizeof *if_taken : sizeof instead / sizeof *instead;
    a.license = (uintptr_t) "Apache-2.0";
    memcpy(a.prog_name, "ringbar_stack", 14);
    int program = bpf(BPF_PROG_LOAD, &a);
    return program < 0 ? -errno : program;
}

int rb_hook_send(int from, int to, bool copy)
{
    int program = load_program(to, copy, false);
    union bpf_attr a;
    if (program < 0)
        return program == -EINVAL ? -EOPNOTSUPP : program;
    memset(&a, 0, sizeof a);
    a.link_create.prog_fd = (uint32_t)program;
    a.link_create.target_ifindex = (uint32_t)from;
    a.link_create.attach_type = TCX_EGRESS;
    int link = bpf(BPF_LINK_CREATE, &a), err = errno;
    close(program);
    return link >= 0 ? link : err == EINVAL || err == EOPNOTSUPP ? -EOPNOTSUPP : -err;
}

/* ---- the same as a filter, for older kernels ------------------------------------------------------------------------------------ */

#define EGRESS TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS)
#define NAME "ringbar_stack:%d:%d" /* the interface that packets go to; 1: the place for filters was made for this */

struct ours { /* filters of ours on an interface */
    int to[64], made;
    uint32_t info[64];
    uint32_t n, others;
};

static void find_ours(const struct nlmsghdr *h, void *arg)
{
    struct ours *o = arg;
    const struct tcmsg *tc = NLMSG_DATA(h);
    int left = (int)h->nlmsg_len - (int)NLMSG_LENGTH(sizeof *tc), to = 0, made = 0;
    const struct rtattr *options = NULL;
    if (h->nlmsg_type != RTM_NEWTFILTER || !tc->tcm_handle)
        return;
    for (const struct rtattr *a = TCA_RTA(tc); RTA_OK(a, left); a = RTA_NEXT(a, left))
        if (a->rta_type == TCA_OPTIONS)
            options = a;
    left = options ? (int)RTA_PAYLOAD(options) : 0;
    for (const struct rtattr *a = options ? RTA_DATA(options) : NULL; options && RTA_OK(a, left); a = RTA_NEXT(a, left))
        if (a->rta_type == TCA_BPF_NAME && memchr(RTA_DATA(a), 0, RTA_PAYLOAD(a)) && sscanf(RTA_DATA(a), NAME, &to, &made) != 2)
            to = 0;
    if (to && o->n < 64) {
        o->to[o->n] = to;
        o->info[o->n++] = tc->tcm_info;
        o->made |= made;
    } else
        o->others++;
}

static struct ours ours_on(int netlink, int from)
{
    struct ours o = {0}, ingress = {0};
    struct request r = tc_request(RTM_GETTFILTER, NLM_F_DUMP, from, EGRESS);
    ask(netlink, &r, find_ours, &o);
    r = tc_request(RTM_GETTFILTER, NLM_F_DUMP, from, TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS));
    ask(netlink, &r, find_ours, &ingress);
    o.others += ingress.others;
    return o;
}

int rb_hook_send_old(int netlink, int from, int to, bool copy)
{
    char name[48];
    uint32_t flags = TCA_BPF_FLAG_ACT_DIRECT;
    int program = load_program(to, copy, true), made = program < 0 ? program : make_place(netlink, from);
    if (made >= 0) {
        made |= ours_on(netlink, from).made; /* the last of us removes the place */
        /* An observer looks first, or it would see nothing of what another takes; each has a preference of its own. */
        uint32_t preference = copy ? PREFERENCE + 1 + (uint32_t)to % 4096 : PREFERENCE + 8192;
        struct request r = tc_request(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK, from, EGRESS);
        r.tc.tcm_info = TC_H_MAKE(preference << 16, htons(ETH_P_ALL));
        put(&r, TCA_KIND, "bpf", 4);
        struct rtattr *options = put(&r, TCA_OPTIONS, NULL, 0);
        snprintf(name, sizeof name, NAME, to, made);
        put(&r, TCA_BPF_FD, &program, sizeof program);
        put(&r, TCA_BPF_NAME, name, strlen(name) + 1);
        put(&r, TCA_BPF_FLAGS, &flags, sizeof flags);
        end_nest(&r, options);
        int rc = ask(netlink, &r, NULL, NULL);
        if (rc < 0) {
            if (made)
                rb_hook_undo(netlink, from, to);
            made = rc;
        }
    }
    if (program >= 0)
        close(program);
    return RB_MIN(made, 0);
}

/* Those that lead to `to`, or with 0 to an interface that is no more. */
static void undo(int netlink, int from, int to)
{
    struct ours o = ours_on(netlink, from);
    uint32_t left = o.n;
    char name[IFNAMSIZ];
    for (uint32_t i = 0; i < o.n; i++) {
        if (to ? o.to[i] != to : if_indextoname((unsigned)o.to[i], name) != NULL)
            continue;
        struct request r = tc_request(RTM_DELTFILTER, NLM_F_ACK, from, EGRESS);
        r.tc.tcm_info = o.info[i];
        put(&r, TCA_KIND, "bpf", 4);
        ask(netlink, &r, NULL, NULL);
        left--;
    }
    if (!o.n || left || !o.made || o.others) /* somebody else's filters keep the place */
        return;
    struct request r = tc_request(RTM_DELQDISC, NLM_F_ACK, from, TC_H_CLSACT);
    r.tc.tcm_handle = TC_H_MAKE(TC_H_CLSACT, 0);
    ask(netlink, &r, NULL, NULL);
}

void rb_hook_undo(int netlink, int from, int to) { undo(netlink, from, to); }

void rb_hook_sweep(void)
{
    int netlink = rb_hook_open();
    struct if_nameindex *all = netlink >= 0 ? if_nameindex() : NULL;
    for (struct if_nameindex *i = all; i && i->if_index; i++)
        undo(netlink, (int)i->if_index, 0);
    if (netlink >= 0)
        close(netlink);
    if (all)
        if_freenameindex(all);
}

/* ---- counters ---------------------------------------------------------------------------------------------------------------- */

static void read_dropped(const struct nlmsghdr *h, void *arg)
{
    const struct ifinfomsg *link = NLMSG_DATA(h);
    int left = (int)h->nlmsg_len - (int)NLMSG_LENGTH(sizeof *link);
    for (const struct rtattr *a = IFLA_RTA(link); h->nlmsg_type == RTM_NEWLINK && RTA_OK(a, left); a = RTA_NEXT(a, left))
        if (a->rta_type == IFLA_STATS64 && RTA_PAYLOAD(a) >= sizeof(struct rtnl_link_stats64)) {
            struct rtnl_link_stats64 s;
            memcpy(&s, RTA_DATA(a), sizeof s);
            *(uint64_t *)arg = s.tx_dropped;
        }
}

uint64_t rb_hook_dropped(int netlink, int index)
{
    uint64_t dropped = 0;
    struct request r;
    memset(&r, 0, sizeof r);
    r.head = (struct nlmsghdr){.nlmsg_len = NLMSG_LENGTH(sizeof r.link), .nlmsg_type = RTM_GETLINK, .nlmsg_flags = NLM_F_REQUEST};
    r.link.ifi_index = index;
    ask(netlink, &r, read_dropped, &dropped);
    return dropped;
}
