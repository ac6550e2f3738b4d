/* SPDX-License-Identifier: Apache-2.0
 *
 * Frames into an interface: nic_source IF CORE WINDOW. Prints the number of its array (nic_bench.h); runs until it is killed.
 *
 * The kernel makes the frames: a test run of an XDP program on live frames, which redirects each to IF. No socket and no socket buffer is
 * in the way, so one core sends several times what AF_XDP sends on a veth. The program keeps WINDOW frames on their way and drops the
 * others; when nothing was received for 5 ms, what is missing counts as lost.
 */
#include "nic_bench.h"

#include <sys/prctl.h>

#define LOAD(dst, src, offset) {.code = BPF_LDX | BPF_MEM | BPF_DW, .dst_reg = dst, .src_reg = src, .off = offset}
#define STORE(dst, offset, src) {.code = BPF_STX | BPF_MEM | BPF_DW, .dst_reg = dst, .src_reg = src, .off = offset}
#define SET(dst, value) {.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = dst, .imm = value}
#define COPY(dst, src) {.code = BPF_ALU64 | BPF_MOV | BPF_X, .dst_reg = dst, .src_reg = src}
#define ADD(dst, value) {.code = BPF_ALU64 | BPF_ADD | BPF_K, .dst_reg = dst, .imm = value}
#define SUB(dst, src) {.code = BPF_ALU64 | BPF_SUB | BPF_X, .dst_reg = dst, .src_reg = src}
#define IF(op, dst, value, over) {.code = BPF_JMP | op | BPF_K, .dst_reg = dst, .off = over, .imm = value}
#define CALL(function) {.code = BPF_JMP | BPF_CALL, .imm = function}
#define EXIT {.code = BPF_JMP | BPF_EXIT}
#define AT(field) offsetof(struct progress, field)

static int bpf(int cmd, union bpf_attr *attr) { return (int)syscall(SYS_bpf, cmd, attr, sizeof *attr); }

int main(int argc, char **argv)
{
    int ifindex = argc == 4 ? (int)if_nametoindex(argv[1]) : 0;
    if (!ifindex)
        die("usage: nic_source IF CORE WINDOW");
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    pin(atoi(argv[2]));
    union bpf_attr make = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = sizeof(struct progress), .max_entries = 1, .map_flags = BPF_F_MMAPABLE};
    int map = bpf(BPF_MAP_CREATE, &make);
    struct bpf_map_info about = {0};
    union bpf_attr ask = {.info = {.bpf_fd = (uint32_t)map, .info_len = sizeof about, .info = (uintptr_t)&about}};
    if (map < 0 || bpf(BPF_OBJ_GET_INFO_BY_FD, &ask))
        die("no array: %s", strerror(errno));
    struct bpf_insn program[] = {
        {.code = BPF_LD | BPF_IMM | BPF_DW, .dst_reg = BPF_REG_6, .src_reg = BPF_PSEUDO_MAP_VALUE, .imm = map}, {0},
        LOAD(BPF_REG_7, BPF_REG_6, AT(received)), LOAD(BPF_REG_8, BPF_REG_6, AT(sent)),
        COPY(BPF_REG_1, BPF_REG_8), SUB(BPF_REG_1, BPF_REG_7), IF(BPF_JGE, BPF_REG_1, atoi(argv[3]), 6),
        ADD(BPF_REG_8, 1), STORE(BPF_REG_6, AT(sent), BPF_REG_8), /* one more on its way */
        SET(BPF_REG_1, ifindex), SET(BPF_REG_2, 0), CALL(BPF_FUNC_redirect), EXIT,
        CALL(BPF_FUNC_ktime_get_ns), LOAD(BPF_REG_1, BPF_REG_6, AT(seen)), LOAD(BPF_REG_2, BPF_REG_6, AT(since)),
        {.code = BPF_JMP | BPF_JNE | BPF_X, .dst_reg = BPF_REG_1, .src_reg = BPF_REG_7, .off = 4}, /* progress: look at the clock anew */
        COPY(BPF_REG_3, BPF_REG_0), SUB(BPF_REG_3, BPF_REG_2), IF(BPF_JLT, BPF_REG_3, 5000000, 3),
        STORE(BPF_REG_6, AT(sent), BPF_REG_7), /* stalled */
        STORE(BPF_REG_6, AT(seen), BPF_REG_7), STORE(BPF_REG_6, AT(since), BPF_REG_0),
        SET(BPF_REG_0, XDP_DROP), EXIT,
    };
    static char log[65536];
    union bpf_attr load = {.prog_type = BPF_PROG_TYPE_XDP, .insns = (uintptr_t)program, .insn_cnt = sizeof program / sizeof program[0],
                           .license = (uintptr_t) "Apache-2.0", .log_buf = (uintptr_t)log, .log_size = sizeof log, .log_level = 1};
    int fd = bpf(BPF_PROG_LOAD, &load);
    if (fd < 0)
        die("the program that sends cannot be loaded: %s\n%s", strerror(errno), log);
    uint8_t frame[FRAME_BYTES];
    make_frame(frame);
    printf("%u\n", about.id);
    fflush(stdout);
    for (;;) { /* a call takes some 20 ms before and after: let it go on for long */
        union bpf_attr run_it = {.test = {.prog_fd = (uint32_t)fd, .data_in = (uintptr_t)frame, .data_size_in = sizeof frame, .repeat = 1u << 30,
                                          .flags = BPF_F_TEST_XDP_LIVE_FRAMES, .batch_size = 64}};
        if (bpf(BPF_PROG_TEST_RUN, &run_it) && errno != EINTR && errno != EAGAIN)
            die("live frames: %s", strerror(errno));
    }
}
