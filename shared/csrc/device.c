/* SPDX-License-Identifier: Apache-2.0
 *
 * What kinds of devices have in common: names of interfaces, and the buffers of those that copy. Such a device needs no ledger word of its own: what
 * it receives into is an empty in this handle's hand, and what it sends goes back at once.
 */
#include "rb_internal.h"

#include <net/if.h>

int rb_ifname_check(const char *name, const char *address)
{
    const char *rename = "rename it: ip link set dev IFACE name NEWNAME";
    if (!*name)
        return rb_fail(EINVAL, "bad-address", "ip link lists the interfaces", "\"%s\": the name of an interface is missing", address);
    if (strlen(name) > 15)
        return rb_fail(EINVAL, "bad-address", "ip link lists the interfaces", "\"%s\": names of interfaces have at most 15 bytes", address);
    if (!name[strspn(name, "0123456789")])
        return rb_fail(EINVAL, "bad-address", rename, "\"%s\": an interface whose name is a number looks like a cluster", address);
    if (strpbrk(name, "@,"))
        return rb_fail(EINVAL, "bad-address", rename, "\"%s\": a name with @ or , looks like another address", address);
    if (strchr(name, ':'))
        return rb_fail(EINVAL, "bad-address", "the kinds are zc:, stack: and pcap:; an alias like eth0:1 is named by its interface, eth0",
                       "\"%s\": no kind of device begins like this", address);
    if (strpbrk(name, "/ \t\n\v\f\r") || strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
        return rb_fail(EINVAL, "bad-address", "a capture file is pcap:PATH; ip link lists interfaces", "\"%s\": no interface can have this name", address);
    if (if_nametoindex(name) == 0)
        return rb_fail(ENOENT, "no-such-interface", "ip link lists the interfaces", "there is no interface %s", name);
    return 0;
}

static int claim(struct rb_end *end, struct rb_server *s)
{
    int rc = rb_server_claim(s, end->wants, end->address);
    if (rc == 0) {
        end->promised = end->wants;
        end->wants = 0;
    }
    return rc;
}

/* Could a queue that is opened later have a dead process's book? Only a handle without a book of its own can take it over. */
static int may_take_over(struct rb_cluster *c)
{
    int found = 0;
    for (uint32_t b = 0; b < RB_MAX_BOOKS && !c->server && !found; b++)
        found = rb_book_dead(c->reg, b);
    return found;
}

int rb_copying_open(struct rb_end *end, uint32_t buffers)
{
    struct rb_cluster *c = end->c;
    struct rb_server *s;
    int rc;
    end->wants = c->reg ? buffers : 0;
    if (!end->wants)
        return 0;
    if (may_take_over(c)) {
        c->unclaimed = true;
        return 0;
    }
    return (rc = rb_server_get(c, &s)) < 0 ? rc : claim(end, s);
}

static int claim_all(struct rb_cluster *c)
{
    struct rb_server *s;
    int rc = rb_server_get(c, &s);
    for (uint32_t i = 0; i < RB_MAX_ENDS && rc == 0; i++)
        if (c->end[i] && c->end[i]->wants)
            rc = claim(c->end[i], s);
    c->unclaimed = rc < 0;
    return rc;
}

void rb_copying_close(struct rb_end *end)
{
    struct rb_server *s = end->c->server;
    if (s)
        s->need -= RB_MIN(s->need, end->promised);
    end->promised = 0;
}

static int from_home(struct rb_cluster *c, rb_desc *desc, int n)
{
    struct rb_server *s = c->server;
    int i;
    if (s->free < (uint32_t)n)
        rb_server_service(s);
    for (i = 0; i < n && s->free; i++) {
        uint32_t handle = s->stack[--s->free];
        rb_prefetch_write(c->pool[handle >> 24] + (uint64_t)(handle & RB_INDEX_MASK) * c->buffer_size + RB_BUFFER_HEADER);
        desc[i].handle = handle;
        desc[i].ts = 0;
        rb_desc_set(&desc[i], 0, RB_BUFFER_HEADER, 0);
        c->where[rb_number(c, handle)] = RB_HAND_HOME;
    }
    return i;
}

int rb_empties(struct rb_cluster *c, rb_desc *desc, int n)
{
    int sending = 0, got = 0;
    if (__builtin_expect(c->unclaimed, 0)) {
        int rc = claim_all(c);
        if (rc < 0)
            return rc;
    }
    if (c->server)
        return from_home(c, desc, n);
    if (!c->sends) {
        rb_fail(EACCES, "read-only", NULL, "this VM may only read the packets of cluster %u", c->id);
        return rb_cure(EACCES, "on the host: ringbar attach VM --pool rw --replug");
    }
    for (uint32_t i = 0; i < RB_MAX_ENDS && got < n; i++)
        if (c->end[i] && c->end[i]->ops == &rb_client_tx_ops) {
            int rc = rb_client_tx_ops.alloc(c->end[i], desc + got, n - got);
            if (rc < 0)
                return got ? got : rc;
            got += rc;
            sending = 1;
        }
    if (sending)
        return got;
    rb_fail(ENOTSUP, "no-buffers", NULL, "a program in a VM has buffers of cluster %u only where it sends on one of its queues", c->id);
    return rb_cure(ENOTSUP, "open that queue too; on the host: ringbar attach VM --tx %u@QUEUE", c->id);
}

int rb_copying_alloc(struct rb_end *end, rb_desc *desc, int n) { return rb_empties(end->c, desc, n); }

const uint8_t *rb_copying_data(struct rb_cluster *c, const rb_desc *desc)
{
    uint32_t at = rb_number(c, desc->handle);
    if (at != UINT32_MAX && (c->where[at] & RB_HAND) != RB_HAND_NONE && rb_fits(c, desc->word))
        return rb_data(c, desc);
    rb_fail(EINVAL, "bad-descriptor", NULL, "descriptor %u is not in this handle's hand, or does not fit its buffer", desc->handle);
    return NULL;
}
