/* SPDX-License-Identifier: Apache-2.0
 *
 * Does nothing but count what arrives at --sink: for what the kernel does alone. Arguments: nic_bench.h.
 */
#include "nic_bench.h"

int main(int argc, char **argv)
{
    arguments(argc, argv);
    while (go_on(arrived(opt.sink)))
        usleep(SLICE_NS / 1000);
    puts(", \"mode\": \"counted\"}");
    return 0;
}
