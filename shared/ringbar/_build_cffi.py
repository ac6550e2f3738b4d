# SPDX-License-Identifier: Apache-2.0
"""Writes the C source of the extension module ``ringbar._core`` from ``ringbar.h``: nothing is written twice.

Run by the build: ``python3 _build_cffi.py RINGBAR_H OUTPUT_C``. Compile the output as ``_core`` against
libringbar and the limited API of Python 3.9; one module then serves every later Python.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

import cffi

LIMITED_API = "0x03090000"

#: Helpers for whole bursts, so that no Python loop runs over packets. Read for cffi just as ringbar.h is.
GLUE = """
/* Give back those that are still somebody's: the others have a handle of 0, and afterwards all have. */
static inline void rbpy_return(rb_cluster *cluster, rb_desc *desc, int n)
{
    int kept = 0;
    for (int i = 0; i < n; i++)
        if (desc[i].handle)
            desc[kept++] = desc[i];
    if (kept > 0)
        rb_return(cluster, desc, kept);
    for (int i = 0; i < n; i++)
        desc[i].handle = 0;
}

/* A step of a receiving loop: give back what is done with, then take what has come. */
static inline int rbpy_next(rb_cluster *cluster, rb_end *end, rb_desc *done, int n_done, rb_desc *desc, int n)
{
    if (n_done > 0)
        rbpy_return(cluster, done, n_done);
    return rb_recv(end, desc, n, 0);
}

/* Send without waiting. What moved gets a handle of 0, nobody's, so that an interrupted caller can tell.
 * A lender whose queue is full looks at its borrowers: one that has just come takes nothing before it is answered. */
static inline int rbpy_send(rb_cluster *cluster, rb_end *end, rb_desc *desc, int n)
{
    int moved = rb_send(end, desc, n, 0);
    for (int i = 0; i < moved; i++)
        desc[i].handle = 0;
    if (moved >= 0 && moved < n)
        rb_service(cluster);
    return moved;
}

/* The first that have a handle of 0 have moved: the others move up. How many have moved. */
static inline int rbpy_moved(rb_desc *desc, int n)
{
    int moved = 0, i;
    while (moved < n && !desc[moved].handle)
        moved++;
    for (i = 0; moved && i < n; i++)
        if (i + moved < n)
            desc[i] = desc[i + moved];
        else
            desc[i].handle = 0;
    return moved;
}

/* Bytes of each packet. */
static inline void rbpy_lengths(const rb_desc *desc, int n, uint32_t *out)
{
    for (int i = 0; i < n; i++)
        out[i] = rb_desc_length(&desc[i]);
}

/* Lengths into descriptors. n when all fit buffers of buffer_size bytes; else the first that does not. */
static inline int rbpy_pack(rb_desc *desc, int n, const uint32_t *lengths, uint32_t buffer_size)
{
    for (int i = 0; i < n; i++)
        if (!lengths[i] || lengths[i] > RB_MAX_LENGTH || lengths[i] + rb_desc_offset(&desc[i]) > buffer_size)
            return i;
    for (int i = 0; i < n; i++)
        rb_desc_set(&desc[i], lengths[i], rb_desc_offset(&desc[i]), rb_desc_flags(&desc[i]));
    return n;
}

/* Those whose byte in mask is not 0 go into taken, the others move up. How many were taken. */
static inline int rbpy_split(rb_desc *desc, int n, const uint8_t *mask, rb_desc *taken)
{
    int t = 0, r = 0;
    for (int i = 0; i < n; i++)
        if (mask[i])
            taken[t++] = desc[i];
        else
            desc[r++] = desc[i];
    while (r < n)
        desc[r++].handle = 0;
    return t;
}

/* The same division of the lengths. */
static inline void rbpy_split_lengths(const uint32_t *lengths, int n, const uint8_t *mask, uint32_t *taken,
    uint32_t *rest)
{
    for (int i = 0; i < n; i++)
        if (mask[i])
            *taken++ = lengths[i];
        else
            *rest++ = lengths[i];
}

/* Receive hashes; 0 where the buffer's header holds none. */
static inline void rbpy_hashes(rb_cluster *cluster, const rb_desc *desc, int n, uint32_t *out)
{
    for (int i = 0; i < n; i++) {
        const uint8_t *h = rb_desc_flags(&desc[i]) & RB_META ? rb_buffer_header(cluster, &desc[i]) : NULL;
        out[i] = h ? h[0] | h[1] << 8 | h[2] << 16 | (uint32_t)h[3] << 24 : 0;
    }
}
"""


class HeaderError(Exception):
    """The header has something that this reading does not understand."""


def _without_bodies(text: str) -> str:
    """``static inline T f(...) { ... }`` becomes ``T f(...);``."""
    out: list[str] = []
    at = 0
    for match in re.finditer(r"\bstatic inline\b([^;{]*)\{", text):
        if match.start() < at:
            raise HeaderError("an inline function inside another")
        out += [text[at : match.start()], match[1].strip(), ";\n"]
        depth, at = 1, match.end()
        while depth:
            brace = re.compile(r"[{}]").search(text, at)
            if brace is None:
                raise HeaderError(f"no end of the function that begins with {match[1].strip()!r}")
            depth += 1 if brace[0] == "{" else -1
            at = brace.end()
    return "".join(out) + text[at:]


def declarations(header: str) -> str:
    """What cffi is told: the header without comments, directives, bodies and attributes.

    Strict on purpose: a directive of an unknown kind stops the build, and is then taught here.

    :param header: C text.
    :returns: declarations for ``FFI.cdef``.
    :raises HeaderError: for what is not understood.
    """
    text = re.sub(r"/\*.*?\*/", " ", header, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text).replace("\\\n", " ")
    lines: list[str] = []
    nesting: list[bool] = []  # of #if: is the text inside wanted?
    for line in text.splitlines():
        words = line.split()
        if not line.lstrip().startswith("#"):
            if all(nesting):
                lines.append(line)
        elif words[0] == "#ifndef":
            nesting.append(True)  # the header's own guard
        elif words[:2] == ["#ifdef", "__cplusplus"]:
            nesting.append(False)
        elif words[0] == "#endif":
            if not nesting:
                raise HeaderError("#endif without #if")
            nesting.pop()
        elif words[0] == "#include" or not all(nesting):
            pass
        elif words[0] == "#define" and (len(words) == 2 or words[1] == "RB_API"):
            pass
        elif words[0] == "#define" and len(words) == 3 and re.fullmatch(r"(0[xX][0-9a-fA-F]+|[0-9]+)[uUlL]*", words[2]):
            lines.append(f"#define {words[1]} {words[2].rstrip('uUlL')}")
        else:
            raise HeaderError(f"a directive that is not understood: {line.strip()!r}")
    if nesting:
        raise HeaderError("#if without #endif")
    found = _without_bodies("\n".join(lines)).replace("RB_API ", "")
    stray = re.search(r"__\w+|\bextern\b|\bRB_API\b", found)
    if stray:
        raise HeaderError(f"not understood: {stray[0]!r}")
    return found


def source(header: str) -> str:
    """The C source of the extension module.

    :param header: text of ringbar.h.
    """
    builder = cffi.FFI()
    builder.cdef(declarations(header))
    builder.cdef(declarations(GLUE))
    builder.set_source("ringbar._core", '#include "ringbar.h"\n' + GLUE, py_limited_api=True)

    text = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.emit_c_code(text)  # type: ignore[arg-type]  # a file will do
    limited = f"#ifndef Py_LIMITED_API\n#define Py_LIMITED_API {LIMITED_API}\n#endif\n"
    return limited + text.getvalue()


def main(arguments: list[str]) -> int:
    """``_build_cffi.py RINGBAR_H OUTPUT_C``. 0 when written."""
    if len(arguments) != 2:
        print("usage: _build_cffi.py RINGBAR_H OUTPUT_C", file=sys.stderr)
        return 2
    header, output = Path(arguments[0]), Path(arguments[1])
    try:
        output.write_text(source(header.read_text(encoding="utf-8")), encoding="utf-8")
    except (HeaderError, cffi.CDefError, OSError) as problem:
        print(f"{header}: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
