/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Drives the AF_XDP plug-in without the core, inside a network namespace made by tests/integration/test_xdp_plugin.py.
 *
 *   test_xdp PLUGIN COMMAND [--netns NAME] [--if A] [--peer B] [--out C] [--end D] [--mode M] [--chunk N] [--huge]
 *            [--flags rx|tx|rxtx] [--queue N] [--count N] [--length N] [--seconds S] [--broken HOW]
 *
 *   pair     send COUNT frames from A, receive them on B, check every byte and both buffer headers, give all back
 *   forward  the same through a bridge: A -> B, the *same buffer* out of C -> D; two UMEMs on one memory
 *   addrx    open A to send only, send, then let it receive too
 *   hold     open A, say so, receive until standard input ends, close, report
 *   orphan   as hold, but a forked child outlives this process
 *   try      open A and close it at once; --broken memory|ro|size|ring|memlock|capabilities|bpf|netns spoils something first
 *   fill-first   open A, look that packets still reach the stack before the first fill (the caller looks), then fill
 *   bad-tx   frames that may not be sent are refused, none is lost
 *   cleanup | attached | probe
 *
 * Prints one JSON document a line; the exit status is 0 when all was as it should be, 1 otherwise.
 */
#include "xdp/drive.h"

static int run_pair(bool through)
{
    make_memory(8192);
    struct stack *a = stack_of(1, 2000), *b = stack_of(2001, 4000);
    struct rb_xdp *ta = must_open(opt.ifname, RB_XDP_TX), *rb = must_open(opt.peer, RB_XDP_RX);
    struct rb_xdp *tc = through ? must_open(opt.out, RB_XDP_TX) : NULL;
    struct rb_xdp *rd = through ? must_open(opt.end, RB_XDP_RX) : NULL;
    struct stack *d = through ? stack_of(6001, 2000) : NULL;
    uint32_t seq = 0, received = 0, expected = 0, bad = 0, reordered = 0, headers = 0, noise = 0, seen = 0;
    double start = now(), until = start + DEADLINE_S, took = 0;

    fill_from(rb, b);
    if (through)
        fill_from(rd, d);
    while (received < opt.count && now() < until) {
        struct rb_xdp *rx = through ? rd : rb;
        struct stack *home = through ? d : b;
        struct rb_xdp_frame f[BURST];
        uint32_t n;

        if (seq - received < 1024) /* never more on the way than the rings hold: nothing may be lost */
            send_some(ta, a, &seq, opt.count, opt.length);
        take_completions(ta, a);
        if (through) {
            uint32_t room = ops->tx_space(tc, BURST);

            n = ops->recv(rb, f, room < BURST ? room : BURST);
            for (uint32_t i = 0; i < n; i++)
                if (is_test_frame(memory + f[i].addr, f[i].len)) {
                    if (ops->send(tc, &f[i], 1) != 1)
                        die("a received frame could not be sent on");
                } else {
                    put_back(b, f[i].addr);
                }
            int r = ops->wake(tc, RB_XDP_TX);
            if (r && r != -EAGAIN)
                die("wake for send: %s", strerror(-r));
            take_completions(tc, b);
            fill_from(rb, b);
        }
        n = ops->recv(rx, f, BURST);
        for (uint32_t i = 0; i < n; i++) {
            if (!is_test_frame(memory + f[i].addr, f[i].len)) {
                noise++; /* the kernel's own, such as router solicitations */
            } else {
                bad += !check_frame(memory + f[i].addr, f[i].len, opt.length, &seen);
                reordered += seen != expected;
                expected = seen + 1;
                received++;
            }
            headers += !header_intact(f[i].addr);
            put_back(home, f[i].addr);
        }
        fill_from(rx, home);
        if (!n)
            wait_for(rx);
    }
    took = now() - start;
    while (ops->tx_pending(ta) && now() < until)
        ops->wake(ta, RB_XDP_TX), take_completions(ta, a);
    printf("{\"sent\": %u, \"received\": %u, \"bad\": %u, \"reordered\": %u, \"headers_touched\": %u, \"noise\": %u, "
           "\"senders_buffers_back\": %u, \"mpps\": %.3f, ", seq, received, bad, reordered, headers, noise, a->n,
           (double)received / took / 1e6);
    print_info("tx", ta);
    printf(", ");
    print_info("rx", through ? rd : rb);
    printf("}\n");
    bool good = seq == opt.count && received == seq && !bad && !reordered && !headers && a->n == 2000;
    must_close(ta);
    must_close(rb);
    if (through) {
        must_close(tc);
        must_close(rd);
    }
    free(a);
    free(b);
    free(d);
    return !good;
}

static int run_addrx(void)
{
    struct rb_xdp_error err;

    make_memory(4096);
    struct stack *a = stack_of(1, 1000), *b = stack_of(1001, 1000);
    struct rb_xdp *dev = must_open(opt.ifname, RB_XDP_TX);
    uint32_t seq = 0, received = 0;
    double until = now() + DEADLINE_S;

    if (ops->attached(opt.ifname))
        die("a device that only sends has attached a program");
    send_some(dev, a, &seq, 10, 64);
    int r = ops->add_rx(dev, &(struct rb_xdp_options){.queue = RB_XDP_ALL_QUEUES}, &err);
    if (r)
        die("add_rx: %s", err.text);
    if (ops->add_rx(dev, &(struct rb_xdp_options){.queue = RB_XDP_ALL_QUEUES}, &err) || !ops->attached(opt.ifname))
        die("add_rx again changed something");
    fill_from(dev, b);
    printf("{\"ready\": true}\n"); /* the caller now sends to us until we have seen COUNT packets */
    fflush(stdout);
    while (received < opt.count && now() < until) {
        struct rb_xdp_frame f[BURST];
        uint32_t n = ops->recv(dev, f, BURST);

        for (uint32_t i = 0; i < n; i++)
            put_back(b, f[i].addr);
        received += n;
        fill_from(dev, b);
        if (!n)
            wait_for(dev);
    }
    printf("{\"received\": %u, ", received);
    print_info("dev", dev);
    printf("}\n");
    must_close(dev);
    free(a);
    free(b);
    return received < opt.count;
}

static int run_hold(bool orphan, bool wait_to_fill)
{
    make_memory(4096);
    struct stack *s = stack_of(1, 4000);
    struct rb_xdp *dev = must_open(opt.ifname, opt.flags);
    uint64_t received = 0;
    char c;
    pid_t child = 0;

    if (!wait_to_fill && opt.flags & RB_XDP_RX)
        fill_from(dev, s);
    if (orphan) {
        int ready[2];

        if (pipe2(ready, O_CLOEXEC))
            die("pipe: %s", strerror(errno));
        child = fork();
        if (!child) { /* dead in the child: every verb must be harmless */
            struct rb_xdp_frame f[4];
            uint64_t addr = 0;
            int fds[4];
            bool quiet = !ops->recv(dev, f, 4) && !ops->fill(dev, &addr, 1) && ops->send(dev, f, 1) == -ENODEV &&
                         !ops->complete(dev, &addr, 1) && ops->wake(dev, RB_XDP_RX | RB_XDP_TX) == -ENODEV &&
                         !ops->tx_space(dev, 1) && !ops->fill_space(dev) && !ops->fds(dev, fds, 4);

            if (write(ready[1], quiet ? "y" : "n", 1) != 1)
                _exit(1);
            close(STDOUT_FILENO);
            pause(); /* outlives its parent, until the caller kills it */
            _exit(0);
        }
        if (read(ready[0], &c, 1) != 1 || c != 'y')
            die("the device is not dead in the forked child");
    }
    printf("{\"ready\": true, \"child\": %d, ", child);
    print_info("dev", dev);
    printf("}\n");
    fflush(stdout);
    for (;;) {
        struct rb_xdp_frame f[BURST];
        struct pollfd p[2] = {{.fd = STDIN_FILENO, .events = POLLIN}, {.fd = -1, .events = POLLIN}};
        uint32_t n;

        ops->fds(dev, &p[1].fd, 1);
        poll(p, 2, 1000);
        if (p[0].revents) {
            if (read(STDIN_FILENO, &c, 1) <= 0)
                break;
            if (c == 'f') { /* fill now, and say so */
                fill_from(dev, s);
                printf("{\"filled\": true}\n");
            } else {
                printf("{\"received\": %llu}\n", (unsigned long long)received);
            }
            fflush(stdout);
        }
        n = ops->recv(dev, f, BURST);
        for (uint32_t i = 0; i < n; i++)
            put_back(s, f[i].addr);
        received += n;
        if (n)
            fill_from(dev, s);
    }
    printf("{\"received\": %llu, ", (unsigned long long)received);
    print_info("dev", dev);
    printf("}\n");
    must_close(dev);
    free(s);
    return 0;
}

static void drop_capabilities(uint64_t drop)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];

    if (syscall(SYS_capget, &header, data))
        die("capget: %s", strerror(errno));
    for (unsigned i = 0; i < 2; i++) {
        data[i].effective &= ~(uint32_t)(drop >> (32 * i));
        data[i].permitted = data[i].effective;
    }
    if (syscall(SYS_capset, &header, data))
        die("capset: %s", strerror(errno));
}

static int run_try(void)
{
    struct rb_xdp_error err;
    struct rb_xdp *dev;
    int r;

    make_memory(256);
    if (opt.broken && !strcmp(opt.broken, "memlock")) {
        struct rlimit little = {65536, 65536};

        setrlimit(RLIMIT_MEMLOCK, &little);
        drop_capabilities(1ull << 14); /* CAP_IPC_LOCK lifts the limit */
    }
    if (opt.broken && !strcmp(opt.broken, "capabilities"))
        drop_capabilities(UINT64_MAX);
    if (opt.broken && !strcmp(opt.broken, "bpf"))
        drop_capabilities(~(1ull << 13)); /* CAP_NET_RAW stays: sockets, but no programs */
    r = try_open(opt.ifname, opt.flags, &dev, &err);
    if (r) {
        if (dev)
            die("a failed open returned a device");
        print_error(r, &err);
        return 0;
    }
    printf("{\"result\": 0, ");
    print_info("dev", dev);
    printf("}\n");
    if (opt.broken && !strcmp(opt.broken, "netns") && setns(first_netns, CLONE_NEWNET)) /* close from elsewhere */
        die("setns: %s", strerror(errno));
    must_close(dev);
    return 0;
}

static int run_bad_tx(void)
{
    make_memory(64);
    struct rb_xdp *dev = must_open(opt.ifname, RB_XDP_TX);
    const struct rb_xdp_frame bad[] = {
        {.addr = memory_size, .len = 64},                       /* outside */
        {.addr = UINT64_MAX - 10, .len = 64},
        {.addr = memory_size - 32, .len = 64},                  /* leaves the memory */
        {.addr = opt.chunk * 2 - 32, .len = 64},                /* leaves its chunk */
        {.addr = opt.chunk, .len = 0},
        {.addr = opt.chunk, .len = 13},
        {.addr = opt.chunk, .len = opt.chunk + 1},
        {.addr = opt.chunk, .len = UINT32_MAX},
    };
    struct rb_xdp_stats s;
    uint64_t back[8];
    uint32_t n = 0;
    double until = now() + DEADLINE_S;

    for (unsigned i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct rb_xdp_frame f[3] = {{.addr = opt.chunk * 3, .len = 64}, bad[i], {.addr = opt.chunk * 4, .len = 64}};

        write_frame(memory + f[0].addr, i, 64);
        if (ops->send(dev, &bad[i], 1) != -EINVAL)
            die("bad frame %u was taken", i);
        if (ops->send(dev, f, 3) != 1)
            die("a burst with bad frame %u did not end there", i);
        for (n = 0; !n && now() < until; n = ops->complete(dev, back, 8))
            ops->wake(dev, RB_XDP_TX);
        if (n != 1 || back[0] != f[0].addr)
            die("the good frame before bad frame %u was not completed as sent", i);
    }
    if (ops->stats(dev, &s) || s.tx_invalid_descs || ops->tx_pending(dev))
        die("the kernel saw invalid descriptors");
    must_close(dev);
    printf("{\"refused\": %zu}\n", sizeof bad / sizeof bad[0]);
    return 0;
}

static int run_simple(const char *command)
{
    struct rb_xdp_error err;
    int r;

    if (!strcmp(command, "attached")) {
        printf("{\"attached\": %s}\n", ops->attached(opt.ifname) ? "true" : "false");
        return 0;
    }
    if (!strcmp(command, "cleanup"))
        r = ops->cleanup(opt.ifname, &err);
    else
        r = ops->probe(opt.ifname, opt.queue == RB_XDP_ALL_QUEUES ? 0 : opt.queue, 500, &err);
    print_error(r, &err);
    return 0;
}

int main(int argc, char **argv)
{
    static const struct option longs[] = {
        {"netns", 1, 0, 'n'}, {"if", 1, 0, 'i'}, {"peer", 1, 0, 'p'}, {"out", 1, 0, 'o'}, {"end", 1, 0, 'e'},
        {"mode", 1, 0, 'm'}, {"chunk", 1, 0, 'c'}, {"huge", 0, 0, 'h'}, {"flags", 1, 0, 'f'}, {"queue", 1, 0, 'q'},
        {"count", 1, 0, 'N'}, {"length", 1, 0, 'l'}, {"seconds", 1, 0, 's'}, {"broken", 1, 0, 'b'}, {0, 0, 0, 0},
    };
    static const char *modes[] = {"auto", "zero-copy", "driver", "generic"};
    int c;

    while ((c = getopt_long(argc, argv, "", longs, NULL)) != -1) {
        switch (c) {
        case 'n': opt.netns = optarg; break;
        case 'i': opt.ifname = optarg; break;
        case 'p': opt.peer = optarg; break;
        case 'o': opt.out = optarg; break;
        case 'e': opt.end = optarg; break;
        case 'm':
            for (opt.mode = 0; opt.mode < 4 && strcmp(optarg, modes[opt.mode]); opt.mode++)
                ;
            break;
        case 'c': opt.chunk = (uint32_t)atoi(optarg); break;
        case 'h': opt.huge = true; break;
        case 'f': opt.flags = !strcmp(optarg, "rx") ? RB_XDP_RX : !strcmp(optarg, "tx") ? RB_XDP_TX : RB_XDP_RX | RB_XDP_TX;
            break;
        case 'q': opt.queue = (uint32_t)atoi(optarg); break;
        case 'N': opt.count = (uint32_t)atoi(optarg); break;
        case 'l': opt.length = (uint32_t)atoi(optarg); break;
        case 's': opt.seconds = atof(optarg); break;
        case 'b': opt.broken = optarg; break;
        default: return 2;
        }
    }
    if (argc - optind != 2)
        die("usage: test_xdp PLUGIN COMMAND [options]");
    first_netns = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    if (opt.netns) {
        char path[256];

        snprintf(path, sizeof path, "/run/netns/%s", opt.netns);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || setns(fd, CLONE_NEWNET))
            die("network namespace %s: %s", opt.netns, strerror(errno));
        close(fd);
    }
    void *lib = dlopen(argv[optind], RTLD_NOW | RTLD_LOCAL);
    if (!lib)
        die("%s", dlerror());
    const struct rb_xdp_ops *(*get)(void) = (const struct rb_xdp_ops *(*)(void))dlsym(lib, RB_XDP_SYMBOL);
    if (!get)
        die("%s has no %s", argv[optind], RB_XDP_SYMBOL);
    ops = get();
    if (ops->abi != RB_XDP_ABI || ops->size != sizeof *ops)
        die("the plug-in has another ABI");

    const char *command = argv[optind + 1];
    if (!strcmp(command, "pair"))
        return run_pair(false);
    if (!strcmp(command, "forward"))
        return run_pair(true);
    if (!strcmp(command, "addrx"))
        return run_addrx();
    if (!strcmp(command, "hold"))
        return run_hold(false, false);
    if (!strcmp(command, "orphan"))
        return run_hold(true, false);
    if (!strcmp(command, "fill-first"))
        return run_hold(false, true);
    if (!strcmp(command, "try"))
        return run_try();
    if (!strcmp(command, "bad-tx"))
        return run_bad_tx();
    if (!strcmp(command, "cleanup") || !strcmp(command, "attached") || !strcmp(command, "probe"))
        return run_simple(command);
    die("no command %s", command);
}
