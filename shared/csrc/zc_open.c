/* SPDX-License-Identifier: Apache-2.0
 * Opening zc: devices: which NIC and queues, whether they may be taken, by what rule; and the rules while they are open. */
#include "rb_zc.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#define plugin rb_zc_plugin
#define RB_RULE_LONGEST 8192u /* bytes: some 400 prefixes, for which libpcap needs seconds */

int rb_zc_error(int rc, const struct rb_xdp_error *err)
{
    const char *code = rc == -EBUSY                       ? "busy"
                       : rc == -ENODEV || rc == -ENOENT   ? "no-such-interface"
                       : rc == -EPERM || rc == -EACCES    ? "no-permission"
                       : rc == -ERANGE                    ? "no-such-queue"
                       : rc == -EMSGSIZE                  ? "mtu"
                       : rc == -ENETDOWN                  ? "down"
                                                          : "device";
    return rb_fail(-rc, code, err->cure, "%s", err->text);
}

uint64_t rb_zc_netns(void)
{
    struct stat st;
    return stat("/proc/thread-self/ns/net", &st) == 0 ? st.st_ino : 0;
}

/* ---- may it be taken? ---------------------------------------------------------------------------------------------------- */

static bool line_of(const char *path, bool (*tells)(const char *line, const char *ifname), const char *ifname)
{
    char line[512];
    bool found = false;
    FILE *f = fopen(path, "re");
    while (f && !found && fgets(line, sizeof line, f))
        found = tells(line, ifname);
    if (f)
        fclose(f);
    return found;
}

static bool default_route(const char *line, const char *ifname)
{
    char name[32], to[16], mask[16];
    return sscanf(line, "%31s %15s %*s %*s %*s %*s %*s %15s", name, to, mask) == 3 && !strcmp(name, ifname) && !strcmp(to, "00000000") && !strcmp(mask, to);
}

static bool default_route6(const char *line, const char *ifname)
{
    char name[32], to[40], bits[8];
    if (!strcmp(ifname, "lo")) /* the kernel keeps a rejecting default there */
        return false;
    return sscanf(line, "%39s %7s %*s %*s %*s %*s %*s %*s %*s %31s", to, bits, name) == 3 && !strcmp(name, ifname) && !strcmp(bits, "00") &&
           !to[strspn(to, "0")];
}

/* Does this process's SSH session come in by an address of this interface? */
static bool carries_session(const char *ifname)
{
    char mine[64] = "";
    const char *ssh = getenv("SSH_CONNECTION");
    struct in6_addr v4, v6;
    struct ifaddrs *all, *a;
    bool found = false;
    if (!ssh || sscanf(ssh, "%*s %*s %63s", mine) != 1 || getifaddrs(&all) < 0)
        return false;
    int is4 = inet_pton(AF_INET, mine, &v4) == 1, is6 = inet_pton(AF_INET6, mine, &v6) == 1;
    for (a = all; a; a = a->ifa_next) {
        if (!a->ifa_addr || strcmp(a->ifa_name, ifname))
            continue;
        if (is4 && a->ifa_addr->sa_family == AF_INET)
            found |= !memcmp(&((struct sockaddr_in *)a->ifa_addr)->sin_addr, &v4, 4);
        if (is6 && a->ifa_addr->sa_family == AF_INET6)
            found |= !memcmp(&((struct sockaddr_in6 *)a->ifa_addr)->sin6_addr, &v6, 16);
    }
    freeifaddrs(all);
    return found;
}

int rb_ifname_needed(const char *ifname)
{
    const char *why = line_of("/proc/thread-self/net/route", default_route, ifname) || line_of("/proc/thread-self/net/ipv6_route", default_route6, ifname)
                          ? "carries the default route"
                      : carries_session(ifname) ? "carries this SSH session"
                                                : NULL;
    if (!why)
        return 0;
    rb_fail(EBUSY, "nic-in-use", NULL, "%s %s, which would be cut", ifname, why);
    return rb_cure(EBUSY, "take only what you want (--steer \"udp port 5000\"), another NIC, or all the same: --take-all");
}

/* ---- rules ----------------------------------------------------------------------------------------------------------------- */

static bool is_all(const char *rule) { return rule && strcmp(rule, "all") == 0; }

/* NULL for "all", and for no rule. */
static int compile(const char *rule, struct rb_filter **out)
{
    *out = NULL;
    if (!rule || is_all(rule))
        return 0;
    if (!rule[strspn(rule, " \t\n")])
        return rb_fail(EINVAL, "bad-filter", "write an expression, such as udp port 5000, or all", "the steering rule is empty");
    if (strlen(rule) > RB_RULE_LONGEST) {
        rb_fail(EINVAL, "bad-filter", NULL, "the steering rule has %zu bytes, and %u is the most: libpcap's time for it grows with the third power", strlen(rule),
                RB_RULE_LONGEST);
        return rb_cure(EINVAL, "name a prefix for many addresses, portrange for many ports; or take more, and filter it (--filter)");
    }
    return rb_filter_compile(rule, out);
}

int rb_zc_rules(struct rb_zc *z)
{
    struct rb_xdp_rule rules[RB_ZC_TAKERS + 1];
    struct rb_xdp_error err;
    uint32_t n = 0;
    static_assert(sizeof(struct rb_xdp_insn) == sizeof(struct rb_filter_insn), "one instruction");
    for (uint32_t i = 0; i < z->takers && z->rule; i++)
        rules[n++] = (struct rb_xdp_rule){(const struct rb_xdp_insn *)z->taker[i].rule->insn, z->taker[i].rule->count};
    if (z->rule)
        rules[n++] = (struct rb_xdp_rule){(const struct rb_xdp_insn *)z->rule->insn, z->rule->count};
    int rc = plugin->steer(z->dev, rules, n, &err);
    return rc < 0 ? rb_fail(-rc, "bad-filter", err.cure, "%s", err.text) : 0;
}

static void tell_rule(struct rb_cluster *c, uint32_t device, const char *rule)
{
    if (rb_enter(c->reg) < 0)
        return;
    snprintf(c->reg->state->steer[device], sizeof c->reg->state->steer[device], "%s", rule && !is_all(rule) ? rule : "");
    rb_leave(c->reg);
}

static int steer_taker(struct rb_end *end, const char *rule)
{
    struct rb_taker_record *t = &end->c->reg->state->taker[end->taker - 1];
    struct rb_filter *f;
    int rc = compile(rule, &f);
    if (rc == 0 && !f)
        rc = rb_fail(EINVAL, "bad-filter", "write an expression, such as udp port 5000", "who shares a NIC with others cannot take all of it");
    if (rc == 0 && strlen(rule) >= sizeof t->rule)
        rc = rb_fail(EINVAL, "bad-filter", "write it shorter, or be the first to open the NIC", "the steering rule is longer than %zu bytes", sizeof t->rule - 1);
    free(f);
    if (rc < 0 || (rc = rb_enter(end->c->reg)) < 0)
        return rc;
    memcpy(t->rule, rule, strlen(rule) + 1);
    rb_set(&t->version, rb_get(&t->version) + 1);
    rb_settle(end->c, t->book, 1000);
    rb_leave(end->c->reg);
    return 0;
}

int rb_steer(rb_end *end, const char *rule)
{
    struct rb_zc *z = rb_zc_of(end);
    struct rb_filter *f, *before;
    int rc = rb_alive(end->c);
    if (rc < 0)
        return rc;
    if (end->taker)
        return steer_taker(end, rule);
    if (!z || !(end->flags & RB_RX))
        return rb_fail(EINVAL, "bad-option", "open zc:IFACE with RB_RX", "%s does not receive from a NIC by a steering rule", end->address);
    if (!rule)
        rule = "";
    if ((rc = compile(rule, &f)) < 0)
        return rc;
    before = z->rule;
    z->rule = f;
    if ((rc = rb_zc_rules(z)) < 0) {
        z->rule = before;
        free(f);
        return rc;
    }
    free(before);
    tell_rule(end->c, z->number, rule);
    return 0;
}

/* ---- opening ------------------------------------------------------------------------------------------------------------------ */

/* "zc:eth1", "zc:eth1@2", "zc:eth1@0-3" */
static int parse(const char *address, char *ifname, uint32_t *queue, uint32_t *queues)
{
    const char *at = strchr(address, '@');
    size_t n = at ? (size_t)(at - address) - 3 : strlen(address + 3);
    char name[32];
    *queue = RB_XDP_ALL_QUEUES;
    *queues = 1;
    snprintf(name, sizeof name, "%.*s", (int)RB_MIN(n, sizeof name - 1), address + 3);
    if (at) {
        unsigned long first = 0, last = 0;
        char *rest = (char *)at;
        if (at[1] >= '0' && at[1] <= '9')
            first = last = strtoul(at + 1, &rest, 10);
        if (rest != at && *rest == '-' && rest[1] >= '0' && rest[1] <= '9')
            last = strtoul(rest + 1, &rest, 10);
        if (rest == at || *rest || first >= RB_XDP_MAX_QUEUES || last >= RB_XDP_MAX_QUEUES || last < first) {
            rb_fail(EINVAL, "bad-address", NULL, "\"%s\" names no queues of a NIC", address);
            return rb_cure(EINVAL, "write zc:%s@0 for one, zc:%s@0-3 for some, or zc:%s for all its queues", name, name, name);
        }
        *queue = (uint32_t)first;
        *queues = (uint32_t)(last - first + 1);
    }
    int rc = rb_ifname_check(name, address);
    if (rc == 0)
        snprintf(ifname, 16, "%.15s", name);
    return rc;
}

static void name_of(const struct rb_zc *z, char *out, size_t size)
{
    if (z->queue == RB_XDP_ALL_QUEUES)
        snprintf(out, size, "zc:%s", z->ifname);
    else if (z->queues == 1)
        snprintf(out, size, "zc:%s@%u", z->ifname, z->queue);
    else
        snprintf(out, size, "zc:%s@%u-%u", z->ifname, z->queue, z->queue + z->queues - 1);
}

/* A living device of this cluster, of another handle, that receives from these queues: its number, or -1. Recovery lock held. */
static int owner_of(struct rb_cluster *c, const struct rb_zc *z)
{
    char name[64];
    uint64_t netns = rb_zc_netns();
    name_of(z, name, sizeof name);
    for (uint32_t i = 0; i < RB_MAX_DEVICES; i++) {
        const struct rb_device_record *r = rb_zc_record(c, i);
        if (r->used && r->receives && r->netns == netns && !strcmp(r->name, name + 3) && (!c->server || c->server->book + 1 != r->book) &&
            !rb_book_dead(c->reg, r->book - 1))
            return (int)i;
    }
    return -1;
}

/* Take a number for the device. Recovery lock held. */
static int new_record(struct rb_server *s, struct rb_zc *z)
{
    struct rb_cluster *c = s->c;
    struct rb_device_record *r;
    char name[64];
    uint32_t n = 0;
    while (n < RB_MAX_DEVICES && rb_zc_record(c, n)->used)
        n++;
    if (n == RB_MAX_DEVICES)
        return rb_fail(ENOSPC, "too-many-devices", "close some", "cluster %u has %u devices, which is the most", c->id, RB_MAX_DEVICES);
    r = rb_zc_record(c, n);
    memset(r, 0, sizeof *r);
    name_of(z, name, sizeof name);
    snprintf(r->name, sizeof r->name, "%.31s", name + 3);
    r->book = s->book + 1;
    r->netns = rb_zc_netns();
    r->nic_queue = z->queue == RB_XDP_ALL_QUEUES ? 0 : z->queue;
    r->nic_queues = 1;
    c->reg->state->steer[n][0] = 0;
    z->number = n;
    rb_order();
    r->used = 1;
    return 0;
}

/* What the device is, for everybody to see and for whoever cleans up after us. */
static void tell(struct rb_cluster *c, struct rb_zc *z, const char *rule)
{
    struct rb_device_record *r = rb_zc_record(c, z->number);
    struct rb_xdp_info info;
    plugin->info(z->dev, &info);
    snprintf(r->mode, sizeof r->mode, "%s", info.mode);
    snprintf(r->clock, sizeof r->clock, "software");
    r->nic_queue = z->queue == RB_XDP_ALL_QUEUES ? 0 : z->queue;
    r->nic_queues = info.queues;
    r->receives = (z->flags & RB_XDP_RX) != 0;
    tell_rule(c, z->number, rule);
}

static struct rb_xdp_options options_of(const struct rb_end *end, const struct rb_zc *z, const rb_open_options *o, struct rb_xdp_rule *rule)
{
    struct rb_cluster *c = end->c;
    if (z->rule)
        *rule = (struct rb_xdp_rule){(const struct rb_xdp_insn *)z->rule->insn, z->rule->count};
    return (struct rb_xdp_options){
        .size = sizeof(struct rb_xdp_options), .flags = z->flags | (o->promiscuous && z->flags & RB_XDP_RX ? RB_XDP_PROMISCUOUS : 0) |
                                                             (end->flags & RB_METADATA && z->flags & RB_XDP_RX ? RB_XDP_METADATA : 0),
        .ifname = z->ifname, .umem_base = c->pool[0],
        .umem_size = (uint64_t)c->pool_count[0] * c->buffer_size, .chunk_size = c->buffer_size, .headroom = RB_BUFFER_HEADER,
        .queue = z->queue, .queues = z->queues,
        .mode = end->flags & RB_GENERIC ? RB_XDP_GENERIC : end->flags & RB_DRIVER ? RB_XDP_DRIVER : RB_XDP_AUTO,
        .rx_size = RB_ZC_RING, .tx_size = RB_ZC_RING, .fill_size = RB_ZC_RING, .comp_size = RB_ZC_RING,
        .busy_poll_us = o->busy_poll_us, .rules = rule, .rule_count = z->rule != NULL,
    };
}

/* The handle has it open already, for the other direction. */
static int join(struct rb_end *end, struct rb_zc *z, const rb_open_options *o, struct rb_filter *rule)
{
    struct rb_server *s = end->c->server;
    struct rb_xdp_error err;
    struct rb_xdp_rule kernel_rule;
    struct rb_xdp_info before, after;
    int rc;
    if (!(end->flags & RB_RX)) {
        z->refs++;
        return 0;
    }
    if (z->rx) {
        free(rule);
        return rb_fail(EBUSY, "busy", "use the end that is open, or close it", "this handle receives from zc:%s already", z->ifname);
    }
    free(z->rule);
    z->rule = rule;
    if (z->flags & RB_XDP_RX) { /* it did before, and its end was closed */
        if ((rc = rb_zc_rules(z)) == 0)
            z->refs++;
        return rc;
    }
    plugin->info(z->dev, &before);
    z->flags |= RB_XDP_RX;
    struct rb_xdp_options options = options_of(end, z, o, &kernel_rule);
    if ((rc = plugin->add_rx(z->dev, &options, &err)) < 0) {
        z->flags &= ~(uint32_t)RB_XDP_RX;
        return rb_zc_error(rc, &err);
    }
    plugin->info(z->dev, &after);
    uint32_t more = 2 * RB_ZC_RING * (after.queues - (before.needs_fill ? before.queues : 0));
    if ((rc = rb_server_claim(s, more, "a NIC that receives too")) < 0)
        return rc; /* it goes on sending; without buffers nothing is taken */
    z->promised += more;
    z->refs++;
    return 0;
}

static int open_new(struct rb_end *end, struct rb_zc *z, const rb_open_options *o)
{
    struct rb_cluster *c = end->c;
    struct rb_server *s;
    struct rb_xdp_error err = {0};
    struct rb_xdp_rule kernel_rule;
    struct rb_xdp_info info;
    int rc = rb_server_get(c, &s);
    if (rc < 0 || (rc = rb_enter(c->reg)) < 0)
        return rc;
    rb_zc_release(s);
    rc = new_record(s, z);
    rb_leave(c->reg);
    if (rc < 0)
        return rc;
    struct rb_xdp_options options = options_of(end, z, o, &kernel_rule);
    if ((rc = plugin->open(&options, &z->dev, &err)) < 0)
        rc = rb_zc_error(rc, &err);
    else {
        char what[64];
        plugin->info(z->dev, &info);
        z->fragments = info.fragments;
        z->metadata = info.metadata;
        name_of(z, what, sizeof what);
        z->promised = (info.needs_fill ? 2 * RB_ZC_RING * info.queues : 0) + RB_ZC_RING;
        if ((rc = rb_server_claim(s, z->promised, what)) < 0)
            plugin->close(z->dev, &err);
    }
    if (rc < 0)
        rb_zc_record(c, z->number)->used = 0;
    z->epoch = s->epoch;
    z->refs = 1;
    return rc;
}

static int buffers_fit(struct rb_cluster *c)
{
    if (c->buffer_size == 2048 || c->buffer_size == 4096)
        return 0;
    rb_fail(EINVAL, "bad-size", NULL, "AF_XDP takes buffers of 2048 or 4096 bytes, and cluster %u has buffers of %u", c->id, c->buffer_size);
    return rb_cure(EINVAL, "make the cluster with --size %u", c->buffer_size < 2048 ? 2048 : 4096);
}

int rb_zc_open(struct rb_end *end, const char *address, const rb_open_options *o)
{
    struct rb_cluster *c = end->c;
    struct rb_zc want = {.flags = (end->flags & RB_RX ? RB_XDP_RX : 0) | RB_XDP_TX}, *z = NULL;
    struct rb_filter *rule = NULL;
    int rc, owner = -1;
    if (!c->reg)
        return rb_fail(ENOTSUP, "guest", "open it on the host", "NICs cannot be opened through a cluster that lives on the host");
    if ((rc = parse(address, want.ifname, &want.queue, &want.queues)) < 0 || (rc = buffers_fit(c)) < 0)
        return rc;
    if (!(end->flags & RB_RX) && (o->steer || o->promiscuous))
        return rb_fail(EINVAL, "bad-option", "open it with RB_RX too, or leave that away", "a steering rule and promiscuous mode are for receiving");
    if ((end->flags & RB_RX) && !o->steer && !(end->flags & RB_TAKE_ALL) && (rc = rb_ifname_needed(want.ifname)) < 0)
        return rc;
    if ((rc = compile(o->steer, &rule)) < 0 || (rc = rb_zc_load()) < 0) {
        free(rule);
        return rc;
    }
    for (uint32_t i = 0; i < RB_MAX_ENDS && !z; i++) {
        z = c->end[i] ? rb_zc_of(c->end[i]) : NULL;
        if (z && (strcmp(z->ifname, want.ifname) || z->queue != want.queue || z->queues != want.queues))
            z = NULL;
    }
    if (!z && (end->flags & RB_RX) && rule && rb_enter(c->reg) == 0) {
        owner = owner_of(c, &want);
        rb_leave(c->reg);
    }
    if (owner >= 0) {
        free(rule);
        name_of(&want, end->address, sizeof end->address);
        return rb_taker_open(end, (uint32_t)owner, o->steer);
    }
    if (z) {
        if ((rc = join(end, z, o, rule)) < 0)
            return rc;
    } else {
        if (!(z = calloc(1, sizeof *z))) {
            free(rule);
            return rb_fail(ENOMEM, "no-memory", NULL, "out of memory");
        }
        *z = want;
        z->rule = rule;
        if ((rc = open_new(end, z, o)) < 0) {
            free(rule);
            free(z);
            return rc;
        }
    }
    end->device = z;
    end->ops = (end->flags & RB_RX) && (end->flags & RB_TX) ? &rb_zc_ops : end->flags & RB_RX ? &rb_zc_rx_ops : &rb_zc_tx_ops;
    tell(c, z, end->flags & RB_RX ? o->steer : c->reg->state->steer[z->number]);
    snprintf(end->st.mode, sizeof end->st.mode, "%s", rb_zc_record(c, z->number)->mode);
    snprintf(end->st.clock, sizeof end->st.clock, "%s", rb_zc_record(c, z->number)->clock);
    name_of(z, end->address, sizeof end->address);
    if (end->flags & RB_RX)
        z->rx = end;
    if (z->flags & RB_XDP_RX) {
        rb_zc_refill(c->server, z);
        plugin->wake(z->dev, RB_XDP_RX);
    }
    return 0;
}

/* ---- who has what -------------------------------------------------------------------------------------------------------------- */

static void fill_info(struct rb_cluster *c, rb_device_info *o, uint32_t device, const struct rb_taker_record *t)
{
    const struct rb_device_record *r = rb_zc_record(c, device);
    const struct rb_holder *h = t ? &t->holder : &c->reg->state->book[r->book - 1].owner;
    memset(o, 0, sizeof *o);
    snprintf(o->name, sizeof o->name, "zc:%.31s", r->name);
    snprintf(o->process, sizeof o->process, "%.31s", h->name);
    memcpy(o->clock, r->clock, sizeof o->clock);
    if (t) {
        o->queue = (int32_t)t->queue;
        o->receives = 1;
        o->pid = rb_byte_holder(c->reg, RB_LOCK_END + 2 * t->queue + 1);
        snprintf(o->mode, sizeof o->mode, "%s", rb_get(&t->state) == RB_TAKER_REFUSED ? "refused" : rb_get(&t->seen) == rb_get(&t->version) ? "fed" : "waiting");
        snprintf(o->rule, sizeof o->rule, "%.511s", t->rule);
    } else {
        o->queue = -1;
        o->receives = r->receives;
        o->pid = rb_byte_holder(c->reg, RB_LOCK_BOOK + r->book - 1);
        memcpy(o->mode, r->mode, sizeof o->mode);
        snprintf(o->rule, sizeof o->rule, "%.511s", c->reg->state->steer[device]);
    }
}

int rb_device_list(rb_cluster *c, rb_device_info *out, int n)
{
    int count = 0, rc = rb_alive(c);
    if (rc < 0 || !c->reg)
        return rc;
    if ((rc = rb_enter(c->reg)) < 0)
        return rc;
    for (uint32_t i = 0; i < RB_MAX_DEVICES; i++) {
        if (!rb_zc_record(c, i)->used)
            continue;
        if (count < n)
            fill_info(c, &out[count], i, NULL);
        count++;
        for (uint32_t t = 0; t < RB_MAX_TAKERS; t++) {
            const struct rb_taker_record *r = &c->reg->state->taker[t];
            uint32_t state = rb_get(&r->state);
            if ((state != RB_TAKER_WANTS && state != RB_TAKER_REFUSED) || r->device != i)
                continue;
            if (count < n)
                fill_info(c, &out[count], i, r);
            count++;
        }
    }
    rb_leave(c->reg);
    return count;
}
