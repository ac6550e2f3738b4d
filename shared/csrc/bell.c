/* SPDX-License-Identifier: Apache-2.0
 *
 * Bells: an end that finds nothing for a while sleeps until its peer rings. On both sides a bell is two event descriptors, one to sleep on and
 * one to ring; what carries it to the other side (a doorbell device with interrupts) was set up by others. Only lanes of VMs have bells.
 *
 * About to sleep, the consumer arms: it writes into the lane until where it has read. Then it looks once more, and sleeps. The producer, having
 * published, looks whether somebody sleeps, and rings once for each arming (rb_bell_look in rb_bell.h). Both have a full fence between the two.
 *
 * A bell is a hint in both directions: one that rings without a cause makes its owner look, and no sleep is longer than RB_BELL_MS, since a peer
 * may be killed between publishing and ringing.
 */
#include "rb_bell.h"

#include <dirent.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum { SAW_BELL, SAW_LEASE }; /* what an end's set of descriptors says */

void rb_bell_ring(const struct rb_bell *b)
{
    uint64_t one = 1;
    if (b->ring >= 0 && write(b->ring, &one, sizeof one) < 0)
        return; /* full: it has been rung */
}

void rb_bell_answer(struct rb_bell *b, uint32_t arming)
{
    struct pollfd lease = {.fd = b->lease, .events = POLLIN};
    b->rung = arming;
    b->lost = b->lease >= 0 && poll(&lease, 1, 0) != 0; /* nobody carries it any more */
    rb_bell_ring(b);
}

void rb_bell_free(struct rb_cluster *c, struct rb_bell *b)
{
    if (!b)
        return;
    /* Out of the sets first: others have these descriptors open, so closing them here does not do it. */
    for (uint32_t i = 0; i < RB_MAX_ENDS; i++)
        if (c->end[i] && c->end[i]->sleep >= 0 && b->serial <= c->end[i]->watched) {
            epoll_ctl(c->end[i]->sleep, EPOLL_CTL_DEL, b->wait, NULL);
            if (b->lease >= 0)
                epoll_ctl(c->end[i]->sleep, EPOLL_CTL_DEL, b->lease, NULL);
        }
    for (int i = 0; i < 3; i++) {
        int fd = i == 0 ? b->wait : i == 1 ? b->ring : b->lease;
        if (fd >= 0)
            close(fd);
    }
    free(b);
}

static struct rb_bell *bell_of(struct rb_cluster *c, int wait, int ring, int lease)
{
    struct rb_bell *b = calloc(1, sizeof *b);
    if (b)
        *b = (struct rb_bell){.wait = wait, .ring = ring, .lease = lease, .serial = ++c->bells};
    return b;
}

/* ---- the host: event descriptors that QEMU keeps ---------------------------------------------------------------------- */

/* The kernel's number of an event descriptor, from a file like /proc/PID/fdinfo/FD; 0 for any other. */
static uint32_t eventfd_id(const char *path)
{
    char line[128];
    uint32_t id = 0, found = 0;
    FILE *f = fopen(path, "re");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "eventfd-id: %u", &id) == 1)
            found = id + 1; /* they begin at 0 */
    if (f)
        fclose(f);
    return found;
}

static uint32_t own_id(int fd)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
    return eventfd_id(path);
}

int rb_lane_bells(rb_cluster *c, uint32_t lane, int32_t pid, const int *fds, int n)
{
    struct rb_bell_record made = {.start = pid ? rb_process_start(pid) : 0};
    int rc = rb_alive(c);
    if (rc == 0 && (!c->reg || lane >= RB_MAX_LANES || (pid && (n < 2 || n > 1 + (int)RB_LANE_QUEUES))))
        rc = rb_fail(EINVAL, "bad-option", NULL, "bells are for the lane of a VM, on its host");
    if (rc == 0 && pid && !made.start)
        rc = rb_fail(ESRCH, "vm-off", "start the VM", "there is no process %d", pid);
    for (int i = 0; rc == 0 && pid && i < n; i++) {
        uint32_t id = own_id(fds[i]);
        if (!id)
            rc = rb_fail(ENOTSUP, "not-supported", "Linux 5.6 or later", "this kernel does not number event descriptors");
        else if (i == 0)
            made.wait = id;
        else
            made.ring[i - 1] = id;
    }
    if (rc < 0 || (rc = rb_enter(c->reg)) < 0)
        return rc;
    struct rb_bell_record *b = &c->reg->state->bell[lane];
    rb_set(&b->pid, 0);
    rb_order();
    b->wait = made.wait;
    b->start = made.start;
    memcpy(b->ring, made.ring, sizeof b->ring);
    rb_order();
    rb_set(&b->pid, (uint32_t)pid);
    rb_book_bump(c, rb_get(&c->reg->state->lane[lane].book)); /* its server looks */
    rb_leave(c->reg);
    return 0;
}

/* QEMU's number of the descriptor with this id, looked up once for all of a lane. -1: it has none. */
static int theirs(struct rb_cluster *c, const struct rb_bell_record *b, int32_t pid, uint32_t id)
{
    char path[320];
    if (c->bell_pid != pid || c->bell_start != b->start || !c->bell_fds) {
        free(c->bell_fds);
        c->bell_fds = NULL;
        c->bell_count = 0;
        c->bell_pid = pid;
        c->bell_start = b->start;
    }
    for (int again = 0; again < 2; again++) {
        for (uint32_t i = 0; i < c->bell_count; i++)
            if (c->bell_fds[i].id == id)
                return c->bell_fds[i].fd;
        if (again || (c->bell_fds && rb_mono_ns() - c->bell_looked < 100000000u))
            return -1;
        c->bell_count = 0;
        c->bell_looked = rb_mono_ns();
        snprintf(path, sizeof path, "/proc/%d/fdinfo", pid);
        DIR *all = opendir(path);
        for (struct dirent *e; all && (e = readdir(all));) {
            snprintf(path, sizeof path, "/proc/%d/fdinfo/%s", pid, e->d_name);
            uint32_t found = eventfd_id(path);
            struct rb_their_fd *more = found ? realloc(c->bell_fds, (c->bell_count + 1) * sizeof *more) : NULL;
            if (!more)
                continue;
            more[c->bell_count++] = (struct rb_their_fd){found, atoi(e->d_name)};
            c->bell_fds = more;
        }
        if (all)
            closedir(all);
    }
    return -1;
}

static int fetch(struct rb_cluster *c, const struct rb_bell_record *b, int32_t pid, int process, uint32_t id)
{
    int there = theirs(c, b, pid, id), fd = there < 0 ? -1 : (int)syscall(SYS_pidfd_getfd, process, there, 0);
    if (fd >= 0 && own_id(fd) != id) { /* given to something else meanwhile */
        close(fd);
        fd = -1;
    }
    return fd;
}

/* A VM's program sleeps only if whoever lends to it rings. */
void rb_bell_promise(struct rb_leg_ctx *l)
{
    if (l->vm && l->kind == RB_LEG_LEND)
        rb_set(&l->ring.ctl->server_bell, l->bell ? rb_get(&l->rec->echoed) : 0);
}

static void join(struct rb_server *s, struct rb_leg_ctx *l)
{
    uint32_t lane = (uint32_t)(l->place >> 32), entry = (uint32_t)l->place - 1;
    const struct rb_bell_record *b = &s->c->reg->state->bell[lane];
    int32_t pid = (int32_t)rb_get(&b->pid);
    if (!l->vm || l->kind == RB_LEG_DIRECT || !pid || rb_process_start(pid) != b->start)
        return;
    int process = (int)syscall(SYS_pidfd_open, pid, 0);
    if (process < 0)
        return; /* not visible from here: it polls */
    int wait = fetch(s->c, b, pid, process, b->wait), ring = fetch(s->c, b, pid, process, b->ring[entry]);
    close(process);
    if (wait >= 0 && ring >= 0 && (l->bell = bell_of(s->c, wait, ring, -1))) {
        l->arming = l->kind == RB_LEG_GRANT ? RB_ARMING(rb_get(&l->ring.ctl->server_bell)) : 0;
        rb_bell_ring(l->bell); /* whoever sleeps there may have armed before anybody could ring */
        return;
    }
    if (wait >= 0)
        close(wait);
    if (ring >= 0)
        close(ring);
}

void rb_bell_join(struct rb_server *s, struct rb_leg_ctx *l)
{
    if (s->acting || l->bell)
        return;
    join(s, l);
    rb_bell_promise(l);
}

void rb_bell_ring_lane(struct rb_cluster *c, uint32_t lane)
{
    const struct rb_bell_record *b = &c->reg->state->bell[lane];
    int32_t pid = (int32_t)rb_get(&b->pid);
    int process = pid && rb_process_start(pid) == b->start ? (int)syscall(SYS_pidfd_open, pid, 0) : -1;
    for (uint32_t i = 0; process >= 0 && i < RB_LANE_QUEUES; i++) {
        struct rb_bell one = {.ring = b->ring[i] && c->reg->state->place[lane][i].used ? fetch(c, b, pid, process, b->ring[i]) : -1};
        rb_bell_ring(&one);
        if (one.ring >= 0)
            close(one.ring);
    }
    if (process >= 0)
        close(process);
}

int rb_bell_memory(rb_cluster *c, uint32_t lane, int fd)
{
    int rc = rb_alive(c);
    if (rc < 0)
        return rc;
    if (!c->reg || lane >= RB_MAX_LANES)
        return rb_fail(EINVAL, "bad-option", NULL, "bells are for the lane of a VM, on its host");
    struct rb_bell_memory m = {
        .header = {.magic = RB_MAGIC, .abi = RB_ABI_VERSION, .kind = RB_KIND_BELL, .cluster = c->id, .segment = lane, .size = sizeof m,
                   .created_ns = rb_now_ns()},
        .vectors = RB_LANE_QUEUES,
    };
    rb_set(&m.header.generation, c->generation);
    rb_set(&m.header.state, RB_SEG_OPEN);
    if (pwrite(fd, &m, sizeof m, 0) != (ssize_t)sizeof m)
        return rb_fail(errno, "failed", NULL, "the memory of a doorbell cannot be written: %s", strerror(errno));
    return 0;
}

/* ---- the VM: event descriptors that its doorbell service hands out ------------------------------------------------------- */

int rb_bell_place(rb_end *end, uint32_t *lane, uint32_t *entry)
{
    if (!end->lane || end->c->reg || end->kind == RB_LEG_DIRECT)
        return rb_fail(ENOTSUP, "not-supported", NULL, "%s has no bell", end->address);
    *lane = end->lane->header.segment;
    *entry = (uint32_t)(end->entry - end->lane->entry);
    return 0;
}

int rb_bell_give(rb_end *end, int wait, int ring, int lease)
{
    struct rb_bell *b = end->bell ? NULL : bell_of(end->c, wait, ring, lease);
    if (!b)
        return rb_fail(end->bell ? EEXIST : ENOMEM, "failed", NULL, end->bell ? "%s has a bell" : "%s: out of memory", end->address);
    end->bell = b;
    if (end->flags & RB_TX)
        rb_set(&end->ring.ctl->client_bell, end->session);
    else
        end->arming = RB_ARMING(rb_get(&end->ring.ctl->client_bell));
    rb_bell_ring(b); /* this end was opened, and its server may sleep */
    return 0;
}

/* ---- sleeping ------------------------------------------------------------------------------------------------------------ */

static int watch(struct rb_end *end, int fd, uint32_t what)
{
    /* By edges: a descriptor that was written to is never read, so nobody takes a wake-up from another. */
    struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP | EPOLLET, .data.u32 = what};
    return fd < 0 || epoll_ctl(end->sleep, EPOLL_CTL_ADD, fd, &e) == 0 ? 0 : -1;
}

/* The set of descriptors that wake this end. */
static int gather(struct rb_end *end)
{
    struct rb_server *s = end->c->server;
    if (end->sleep < 0) {
        end->sleep = epoll_create1(EPOLL_CLOEXEC);
        end->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        end->watched = 0;
        if (end->sleep < 0 || end->wake < 0 || watch(end, end->wake, SAW_BELL) < 0)
            return -1;
    }
    if (end->bell && end->bell->serial > end->watched) {
        if (watch(end, end->bell->wait, SAW_BELL) < 0 || watch(end, end->bell->lease, SAW_LEASE) < 0)
            return -1;
        end->watched = end->bell->serial;
    }
    uint32_t newest = end->watched;
    for (uint32_t i = 0; end->ctx && s && i < s->actives; i++) {
        struct rb_bell *b = s->active[i]->bell;
        if (!b || b->serial <= end->watched)
            continue;
        if (watch(end, b->wait, SAW_BELL) < 0)
            return -1;
        newest = RB_MAX(newest, b->serial);
    }
    end->watched = newest;
    return 0;
}

/* Wait for a bell; 1 when one rang. */
static int listen_for(struct rb_end *end, int timeout_ms)
{
    struct epoll_event seen[8];
    int n = epoll_wait(end->sleep, seen, 8, timeout_ms);
    for (int i = 0; i < n; i++)
        if (seen[i].data.u32 == SAW_LEASE)
            rb_store_release(&end->bell_lost, 1); /* the service is gone, and interrupts with it */
    return n != 0;
}

int rb_bell_listen(struct rb_end *end, int timeout_ms) { return listen_for(end, RB_MIN(timeout_ms, RB_BELL_MS)); }

/* The client that sends here rings: its word, which costs nobody else anything. */
static int rings(const struct rb_leg_ctx *l)
{
    return l->bell && rb_get(&l->ring.ctl->client_bell) == rb_load_acquire(&l->ring.ctl->session);
}

/* What a long sleep of the server would hold up: a client that does not ring. */
static int owes(const struct rb_leg_ctx *l)
{
    if (l->kind == RB_LEG_DIRECT || (l->kind == RB_LEG_LEND && l->bell))
        return 0;
    return l->kind == RB_LEG_GRANT ? rb_get(&l->ring.ctl->open) && !rings(l) : l->lent || rb_get(&l->ring.ctl->open);
}

void rb_bell_drop(struct rb_end *end)
{
    end->armed = false;
    rb_set(&end->bell_lost, 0);
    if (end->flags & RB_TX)
        rb_set(&end->ring.ctl->client_bell, 0);
    rb_bell_free(end->c, end->bell);
    end->bell = NULL;
}

int rb_bell_has(const struct rb_end *end)
{
    return (end->bell && !rb_get(&end->bell_lost)) || (end->ctx && end->ctx->bell);
}

int rb_bell_arm(rb_end *end)
{
    struct rb_cluster *c = end->c;
    int most = RB_BELL_MS, armed = 0;
    end->armed = false;
    if (end->bell && (end->bell->lost || rb_get(&end->bell_lost)))
        rb_bell_drop(end);
    if (!end->ops->recv || !rb_bell_has(end) || (end->ctx && owes(end->ctx)) || gather(end) < 0)
        return RB_POLL_MS;
    if (c->deputy || (c->server && c->server->feeds))
        return RB_POLL_MS; /* other programs send through this one, and they do not ring */
    if (end->bell && end->echoed && rb_get(&end->ring.ctl->server_bell) != end->session)
        return RB_POLL_MS;
    listen_for(end, 0); /* what rang before is answered by the look below */
    if (end->bell) {
        uint32_t from = end->echoed ? end->ring.c : rb_get(&end->ring.ctl->p);
        end->arming = end->arming + 1 ? end->arming + 1 : 1;
        rb_set(&end->ring.ctl->client_bell, RB_ARMED(end->arming, from));
        if (c->direct_rx)
            most = RB_POLL_MS;
        armed = 1;
    }
    for (uint32_t i = 0; end->ctx && i < c->server->actives; i++) {
        struct rb_leg_ctx *l = c->server->active[i];
        if (owes(l))
            most = RB_POLL_MS;
        if (l->kind != RB_LEG_GRANT || !l->bell)
            continue;
        l->arming = l->arming + 1 ? l->arming + 1 : 1;
        rb_set(&l->ring.ctl->server_bell, RB_ARMED(l->arming, l->ring.c));
        armed = 1;
    }
    if (!armed)
        return RB_POLL_MS;
    rb_fence();
    for (uint32_t i = 0; end->ctx && i < c->server->actives; i++) {
        struct rb_leg_ctx *l = c->server->active[i];
        if (l != end->ctx && l->kind == RB_LEG_GRANT && l->bell && rb_load_acquire(&l->ring.ctl->p) != l->ring.c)
            most = 1; /* to be relayed, perhaps when there is room */
    }
    end->armed = true;
    return most;
}

int rb_bell_fd(struct rb_end *end)
{
    if (gather(end) < 0)
        return rb_fail(errno, "failed", NULL, "no event descriptor: %s", strerror(errno));
    if (end->tick < 0) {
        end->tick = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
        if (end->tick < 0 || watch(end, end->tick, SAW_BELL) < 0)
            return rb_fail(errno, "failed", NULL, "no timer could be made: %s", strerror(errno));
    }
    end->polled = true;
    rb_bell_again(end);
    return end->sleep;
}

void rb_bell_again(struct rb_end *end)
{
    int most = rb_bell_arm(end);
    struct itimerspec then = {.it_value.tv_nsec = end->armed && most > RB_POLL_MS ? most * 1000000l : 1000000l};
    timerfd_settime(end->tick, 0, &then, NULL);
}

void rb_bell_close(struct rb_end *end)
{
    if (end->sleep >= 0)
        close(end->sleep);
    if (end->wake >= 0)
        close(end->wake);
    if (end->tick >= 0)
        close(end->tick);
    end->sleep = end->tick = -1;
    end->wake = -1;
    rb_bell_free(end->c, end->bell);
    end->bell = NULL;
}

void rb_bell_wake(struct rb_end *end)
{
    uint64_t one = 1;
    if (end->wake >= 0 && write(end->wake, &one, sizeof one) < 0)
        return; /* full: it is awake */
}
