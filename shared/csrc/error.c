/* SPDX-License-Identifier: Apache-2.0
 * The last error of each thread: what, the cure, and a word for programs. */
#include "rb_internal.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char message[512], cure_text[512], code_text[48];

const char *rb_error(void) { return message; }
const char *rb_error_cure(void) { return cure_text; }
const char *rb_error_code(void) { return code_text; }
const char *rb_version(void) { return RB_VERSION; }

int rb_fail(int err, const char *code, const char *cure, const char *format, ...)
{
    char text[sizeof message]; /* arguments may point into the old message */
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    memcpy(message, text, sizeof message);
    snprintf(text, sizeof text, "%s", cure ? cure : "");
    memcpy(cure_text, text, sizeof cure_text);
    snprintf(code_text, sizeof code_text, "%s", code);
    return -err;
}

int rb_cure(int err, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(cure_text, sizeof cure_text, format, args);
    va_end(args);
    return -err;
}
