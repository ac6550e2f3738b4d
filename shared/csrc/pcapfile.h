/* SPDX-License-Identifier: Apache-2.0
 *
 * Capture files, pcap and pcapng: bytes to packets, and packets to bytes. Nothing of ringbar's is needed here, and no file is opened: the reader
 * is given a function that reads, the writer fills a buffer. The files are anybody's: every length is checked before it is used.
 */
#ifndef PCAPFILE_H
#define PCAPFILE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PCAP_MAX_PACKET 262144u /* bytes of a packet; the same as libpcap's largest snapshot length */
#define PCAP_MAX_BLOCK 524288u  /* bytes of a block that is looked into; others, such as names and secrets, may have any size */
#define PCAP_ETHERNET 1u

struct pcap_packet {
    const uint8_t *data; /* valid until the next call */
    uint32_t length;     /* bytes that are there */
    uint32_t original;   /* bytes that it had */
    uint32_t interface;  /* within its section; 0 in a pcap file */
    uint32_t link;       /* what its first bytes are: PCAP_ETHERNET, ... (LINKTYPE_* of the tcpdump group) */
    uint64_t ts;         /* nanoseconds since the epoch; 0 = the file has none */
};

struct pcap_reader;
/* Up to n bytes: how many, 0 = the end, -1 with errno (EAGAIN: nothing now). */
typedef ssize_t (*pcap_read_fn)(void *arg, void *buffer, size_t n);

/* NULL: out of memory. */
struct pcap_reader *pcap_reader_new(pcap_read_fn read, void *arg);
void pcap_reader_free(struct pcap_reader *r);
/* The source stands at its beginning again. */
void pcap_reader_rewind(struct pcap_reader *r);

/* PCAP_NOW: the source has nothing now. -EBADMSG: cut off or malformed, -EIO..: the source failed; pcap_why says what and where, and every later
 * call answers the same. */
enum { PCAP_END = 0, PCAP_PACKET = 1, PCAP_NOW = 2 };
int pcap_next(struct pcap_reader *r, struct pcap_packet *packet);
/* Only the file's own header. PCAP_PACKET: it is a capture file. PCAP_NOW and errors as above. */
int pcap_begin(struct pcap_reader *r);
/* One sentence without the file's name, "" before any error; and what mends it, or "". */
const char *pcap_why(const struct pcap_reader *r);
const char *pcap_remedy(const struct pcap_reader *r);
/* The link type of a pcap file, the same for all its packets; UINT32_MAX for pcapng, where each interface has its own. */
uint32_t pcap_link(const struct pcap_reader *r);

/* ---- writing: times in nanoseconds, in this processor's byte order ------------------------------------------------------- */

enum { PCAP_FORMAT_PCAPNG, PCAP_FORMAT_PCAP };
#define PCAP_HEADER_ROOM 1024u /* bytes that pcap_put_header may take */
#define PCAP_RECORD_ROOM 40u   /* and pcap_put_packet, beside the packet */
/* The file's header, and in pcapng one Ethernet interface of that name; snaplen 0 = whole packets. Returns its bytes. Texts are cut at 200 bytes. */
size_t pcap_put_header(uint8_t *out, int format, uint32_t snaplen, const char *interface, const char *application);
/* One packet. Returns its bytes. */
size_t pcap_put_packet(uint8_t *out, int format, uint64_t ts, const void *data, uint32_t length, uint32_t original);
/* How many of the first n bytes that were put are whole records, and how many of these are packets. */
size_t pcap_whole(const uint8_t *put, int format, int with_header, size_t n, uint64_t *packets);

#endif
