/* SPDX-License-Identifier: Apache-2.0
 * pcap: devices: playing a capture file (dev_pcap.c) and writing one (dev_pcap_tx.c). */
#ifndef DEV_PCAP_H
#define DEV_PCAP_H
#include "rb_internal.h"

#define RB_PCAP_ROOM (4u << 20) /* bytes that wait to be written, at most */

int rb_pcap_write_open(struct rb_end *end, const char *path, const rb_open_options *options);
int rb_pcap_writes(const struct rb_end *end, int fd);  /* does this end write the file that fd reads? */
int rb_pcap_plays(const struct rb_end *end, int fd);   /* does this end play the file that fd writes? */
int rb_pcap_same(int a, int b);                        /* two descriptors of one regular file */
#endif
