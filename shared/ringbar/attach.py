# SPDX-License-Identifier: Apache-2.0
"""Finding a cluster's memory: by the host's registry, or in a VM through its hot-plugged devices."""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import random
import struct
import time
from typing import Any, Callable

from . import _c
from ._c import Handle, ffi, lib
from .errors import Detached, Error, NotFound


def guest_module() -> Any:
    """The module ringbar.guest when this is a VM with it; else None."""
    try:
        guest: Any = importlib.import_module(".guest", __package__)
    except ImportError:  # a host that was installed without it
        return None
    return guest if guest.is_guest() else None


def attach(number: int) -> Handle:
    """Attach now: by the host's registry, and where that knows nothing, in a VM, by its devices."""
    out = ffi.new("rb_cluster **")
    try:
        _c.check(lib.rb_cluster_attach(number, out))
    except NotFound as absent:
        guest = guest_module()
        if guest is None:
            raise
        if not guest.find():  # a VM without devices may be a host of VMs as well
            own = f"; for a cluster of this machine's own, {absent.cure}" if absent.cure else ""
            raise NotFound(
                f"{absent.message}, and nothing is attached to this VM",
                code=absent.code,
                cure=f"on the host of this VM: ringbar attach VM {number}@0{own}",
            ) from None
        return _attach_segments(guest, number)
    return Handle(out[0])


def _attach_segments(guest: Any, number: int) -> Handle:
    """Through the BARs of a VM's devices. The core finds what belongs together: by slot, function and the headers."""
    problem: Error | None = None
    for device in guest.find():
        if not device.high:  # making room for one moves all behind the same port: first all, then open any
            with contextlib.suppress(Error):
                os.close(guest.open_segment(device, writable=True).fd)
    with contextlib.ExitStack() as opened:
        found = []
        belled = False
        for device in guest.find():
            try:
                segment = guest.open_segment(device, writable=True)
            except NotFound:  # unplugged meanwhile
                continue
            except Error as refusal:  # perhaps another cluster's
                problem = refusal
                continue
            opened.callback(os.close, segment.fd)
            with mmap.mmap(segment.fd, mmap.PAGESIZE, offset=segment.offset) as page:
                if page[:8] == MAGIC and page[12:20] == struct.pack("<II", _BELL, number):
                    belled = True
                elif page[:8] == MAGIC:  # other software has ivshmem devices too
                    found.append((segment, device, _keeps_stores(page)))
        segments = ffi.new("rb_segment[]", max(len(found), 1))
        slots: dict[Any, int] = {}
        for i, (segment, device, writable) in enumerate(found):
            segments[i].struct_size = ffi.sizeof("rb_segment")
            segments[i].fd, segments[i].offset, segments[i].size = segment.fd, segment.offset, segment.size
            segments[i].writable = writable
            segments[i].slot, segments[i].function = slots.setdefault(device.slot, len(slots) + 1), device.function
        out = ffi.new("rb_cluster **")
        try:
            _c.check(lib.rb_cluster_attach_segments(number, segments, len(found), out))
        except Detached as absent:
            if problem is not None:
                raise problem from None
            raise NotFound(absent.message, code=absent.code, cure=absent.cure) from None
    return Handle(out[0], belled)


def plugged_clusters() -> list[int]:
    """Numbers of the clusters whose memory the host has plugged into this VM; none on a host."""
    guest = guest_module()
    found = set()
    for device in guest.find() if guest is not None else []:
        if device.function:  # function 0 is this VM's lane; what others can write to is not asked
            continue
        with contextlib.suppress(Error, OSError, ValueError):
            segment = guest.open_segment(device, writable=False)
            try:
                with mmap.mmap(
                    segment.fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ, offset=segment.offset
                ) as page:
                    magic, _, kind, cluster = struct.unpack("<8sIII", page[:20])
            finally:
                os.close(segment.fd)
            if magic == MAGIC and kind != _BELL:
                found.add(cluster)
    return sorted(found)


def refuse_to_hide(number: int) -> None:
    """A cluster of this VM's own would hide one of the host's that has the same number.

    :raises Error: it would.
    """
    if number in plugged_clusters():
        raise Error(
            f"cluster {number} of the host is attached to this VM, and one of this VM's own would hide it",
            code="would-hide",
            cure=f"another number; to use the host's: ringbar status {number}",
        )


MAGIC = b"RGBAR1\0\0"
"""A segment's first bytes."""
_BELL = 4
"""The kind of a segment that is a doorbell's memory."""


def _keeps_stores(page: mmap.mmap) -> bool:
    """Whether the host gave this memory for writing: stores into a read-only BAR vanish without a word.

    Tried on reserved words of the segment's header, each a random value at a random place, so that other programs which
    do the same do not disturb.
    """
    for _ in range(4):
        at = 64 + 8 * random.randrange(24)
        value = random.getrandbits(64).to_bytes(8, "little")
        page[at : at + 8] = value
        kept = page[at : at + 8] == value
        page[at : at + 8] = bytes(8)
        if kept:
            return True
    return False


def retry(attempt: Callable[[], Any], timeout: float | None) -> Any:
    """Try until it is found and free, or the time is over."""
    _c.milliseconds(timeout)
    deadline = None if timeout is None else time.monotonic() + timeout
    pause = 0.005
    while True:
        try:
            return attempt()
        except (NotFound, Detached):
            left = pause if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, 0.25)
