# SPDX-License-Identifier: Apache-2.0
"""Compiles ``pump.c``, one end of a measurement, against the library that is measured."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from ringbar.errors import Error
from ringbar.host.bench.dpdk import NotAvailable


def library() -> Path:
    """The shared library that this package runs with."""
    from ringbar import _c

    found = Path(os.path.realpath(str(_c._core.__file__))).with_name("libringbar.so.0")
    if not found.is_file():
        raise NotAvailable(f"{found} is not there", cure="make setup")
    return found


def build(directory: Path) -> Path:
    """Compile pump.c against this libringbar."""
    here = Path(__file__).resolve()
    header = here.parent  # installed beside it; in a checkout where it is made
    if not (header / "ringbar.h").is_file():
        header = here.parents[2] / "shared" / "csrc"
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise NotAvailable("no C compiler, and the guests' program is in C", cure="apt-get install gcc")
    if not (header / "ringbar.h").is_file():
        raise NotAvailable("ringbar.h is not installed with this package", cure="run it in a checkout of ringbar")
    program = directory / "pump"
    done = subprocess.run(
        [
            compiler,
            "-O2",
            "-std=gnu11",
            "-I",
            str(header),
            str(here.with_name("pump.c")),
            str(library()),
            "-o",
            str(program),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Error(f"pump.c does not compile: {last}", code="bench-failed", cure="make setup")
    return program
