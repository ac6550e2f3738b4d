# SPDX-License-Identifier: Apache-2.0
"""C programs of a measurement, compiled where they run: against this very library, or beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ringbar.errors import Error
from ringbar.host.bench.dpdk import NotAvailable

HERE = Path(__file__).resolve().parent


def library() -> Path:
    """The shared library that this package runs with."""
    from ringbar import _c

    found = Path(os.path.realpath(str(_c._core.__file__))).with_name("libringbar.so.0")
    if not found.is_file():
        raise NotAvailable(f"{found} is not there", cure="make setup")
    return found


def source(name: str) -> Path:
    """A source file: installed beside this one, or where it is in a checkout."""
    for folder in (HERE, HERE.parents[1] / "tests" / "bench", HERE.parents[1] / "shared" / "csrc"):
        if (folder / name).is_file():
            return folder / name
    raise NotAvailable(f"{name} is not installed with this package", cure="run it in a checkout of ringbar")


def build(directory: Path, name: str, *more: str, linked: bool) -> Path:
    """Compile ``name`` into a directory.

    :param more: further arguments of the compiler.
    :param linked: with this libringbar; else the program knows nothing of it.
    :raises NotAvailable: no compiler, or the source is not installed.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise NotAvailable(f"no C compiler, and {name} is in C", cure="apt-get install gcc")
    program = directory / Path(name).stem
    folders: Sequence[Path] = [source("ringbar.h").parent] if linked else []
    if name != "pump.c":
        folders = [*folders, source("nic_bench.h").parent]
    libraries = [str(library()), f"-Wl,-rpath,{library().parent}"] if linked else []
    done = subprocess.run(
        [compiler, "-O2", "-std=gnu11", "-pthread", *(f"-I{folder}" for folder in folders), str(source(name)),
         *libraries, *more, "-o", str(program)],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Error(f"{name} does not compile: {last}", code="bench-failed", cure="make setup")
    return program
