/* SPDX-License-Identifier: Apache-2.0 */
/* count: receive from a queue of a cluster on this host, and count. */
#include <ringbar.h>
#include <stdio.h>
#include <stdlib.h>

static int failed(const char *what)
{
    fprintf(stderr, "%s: %s; %s\n", what, rb_error(), rb_error_cure());
    return 1;
}

int main(int argc, char **argv)
{
    rb_cluster *cluster;
    rb_end *rx;
    rb_desc desc[RB_BURST];
    unsigned long packets = 0, bytes = 0;
    int n;

    if (argc != 3) {
        fprintf(stderr, "usage: count CLUSTER QUEUE-ADDRESS\n");
        return 2;
    }
    if (rb_cluster_attach((uint32_t)strtoul(argv[1], NULL, 10), &cluster) < 0)
        return failed("attach");
    if (rb_open(&rx, cluster, argv[2], RB_RX) < 0) {
        rb_cluster_close(cluster);
        return failed("open");
    }
    while ((n = rb_recv(rx, desc, RB_BURST, 1000)) > 0) { /* until none came for a second */
        for (int i = 0; i < n; i++)
            bytes += rb_desc_length(&desc[i]);
        packets += (unsigned long)n;
        rb_return(cluster, desc, n); /* exactly once, in any order */
    }
    if (n < 0)
        failed("receive");
    printf("%lu packets, %lu bytes\n", packets, bytes);
    rb_close(rx);
    rb_cluster_close(cluster);
    return n < 0;
}
