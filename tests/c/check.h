/* SPDX-License-Identifier: Apache-2.0
 * What the C tests share: checks that say where, and directories of their own for registry and memory. */
#ifndef CHECK_H
#define CHECK_H
#include "ringbar.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CHECK(x)                                                                                                       \
    do {                                                                                                               \
        if (!(x)) {                                                                                                    \
            fprintf(stderr, "%s:%d: not so: %s (last error: %s)\n", __FILE__, __LINE__, #x, rb_error());               \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)
#define OK(x) CHECK((x) >= 0)
#define RUN(test)                                                                                                      \
    do {                                                                                                               \
        test();                                                                                                        \
        printf("ok %s\n", #test);                                                                                      \
        fflush(stdout);                                                                                                \
    } while (0)

static char test_dir[64];

static void remove_directories(void)
{
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", test_dir);
    if (getpid() == (pid_t)atol(getenv("RINGBAR_TEST_PID") ? getenv("RINGBAR_TEST_PID") : "0") && system(command) != 0)
        perror(test_dir);
}

static inline void private_directories(void)
{
    char pid[32];
    snprintf(test_dir, sizeof test_dir, "/dev/shm/rbtest.XXXXXX");
    if (!mkdtemp(test_dir)) {
        perror(test_dir);
        exit(1);
    }
    snprintf(pid, sizeof pid, "%d", (int)getpid());
    setenv("RINGBAR_RUN", test_dir, 1);
    setenv("RINGBAR_SHM", test_dir, 1);
    setenv("RINGBAR_TEST_PID", pid, 1);
    atexit(remove_directories);
}
#endif
