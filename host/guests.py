# SPDX-License-Identifier: Apache-2.0
"""This very package inside VMs that ringbar itself boots: for the demo, the benchmarks and the tests."""

from __future__ import annotations

import contextlib
import pathlib
import subprocess
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import ringbar
from ringbar.errors import Error

if TYPE_CHECKING:
    from ringbar.qemu.launch import Guest

PACKAGE = "/usr/lib/python3/dist-packages/ringbar"
"""Where the guest's Python finds it."""

BRIDGE = "ringbar bridge"


def package() -> dict[str, pathlib.Path]:
    """What a guest needs of this installation, for ``Guest.start(share=...)``."""
    return {PACKAGE: pathlib.Path(ringbar.__file__).absolute().parent}


def command(*words: str) -> list[str]:
    """``ringbar`` with these words, as a guest started with :func:`package` runs it."""
    return ["python3", "-m", "ringbar", *words]


@contextlib.contextmanager
def running(
    guest: Guest, *words: str, ready: str | None = None, timeout: float = 30.0
) -> Iterator[subprocess.Popen[str]]:
    """A ``ringbar`` command that runs in the guest while the block does.

    :param ready: wait until it has printed this.
    :raises Error: it ended, or did not get there in time; with what it printed.
    """
    process = guest.popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, tty=True)
    try:
        if ready is not None:
            _wait_for(process, ready, words, timeout)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


def _wait_for(process: subprocess.Popen[str], text: str, words: tuple[str, ...], timeout: float) -> None:
    import selectors

    assert process.stdout is not None
    seen = ""
    deadline = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while text not in seen:
            if not selector.select(max(deadline - time.monotonic(), 0)):
                raise Error(
                    f"`ringbar {' '.join(words)}` in the guest is not ready after {timeout:g} s: {seen.strip()}"
                )
            line = process.stdout.readline()
            if not line:
                raise Error(f"`ringbar {' '.join(words)}` in the guest ended: {seen.strip()}")
            seen += line


@contextlib.contextmanager
def bridging(guest: Guest, receives: str, sends: str) -> Iterator[subprocess.Popen[str]]:
    """``ringbar bridge`` from one queue to another inside the guest."""
    with running(guest, "bridge", "-i", receives, "-o", sends, ready="\u2192") as process:
        yield process
