# SPDX-License-Identifier: Apache-2.0
"""Waiting, without asking again and again, for a VM to start: a monitor's socket to appear, or libvirt's word."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from typing import Any

from ringbar.qemu import libvirt

_IN_CREATE, _IN_MOVED_TO, _IN_ATTRIB = 0x100, 0x80, 0x4
_IN_NONBLOCK, _IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


async def socket_appears(path: str) -> None:
    """Returns when something is made at ``path``, or in the nearest directory above it that exists."""
    directory = os.path.dirname(path)
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    notify = _libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
    if notify < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    loop = asyncio.get_running_loop()
    moved = asyncio.Event()

    def look() -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(notify, 65536)
        moved.set()

    try:
        if _libc.inotify_add_watch(notify, os.fsencode(directory), _IN_CREATE | _IN_MOVED_TO | _IN_ATTRIB) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        loop.add_reader(notify, look)
        try:
            await moved.wait()
        finally:
            loop.remove_reader(notify)
    finally:
        os.close(notify)


async def process_ends(pid: int, start_time: int) -> None:
    """Returns when that process has ended, or is another by now."""
    from ringbar.qemu.monitor import process_start

    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if process_start(pid) != start_time:
            return
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(handle, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(handle)
    finally:
        os.close(handle)


async def domain_starts(uuid: str, uri: str) -> None:
    """Returns when libvirt says that the domain was started (or runs already).

    :raises Error: libvirt cannot be asked.
    """
    loop = asyncio.get_running_loop()
    started = asyncio.Event()

    def told(*_: Any) -> None:
        loop.call_soon_threadsafe(started.set)

    async with libvirt.lifecycle(uuid, uri, told) as running:
        if not running:
            await started.wait()
