# SPDX-License-Identifier: Apache-2.0
"""The doorbell of a VM: an ivshmem-doorbell device, by which the VM's programs wake the host and the host wakes them.

QEMU learns the event descriptors over a socket, by the protocol of ivshmem's server: version 0, the VM's own number,
the memory, then the host's descriptor under the host's number and the VM's own, one for each of its interrupts. It is
a socket pair whose other end we write and close: there is no server. QEMU keeps the descriptors, and any process
that may look into QEMU's gets them there again.

A doorbell is never unplugged: QEMU (tried: 7.2 without KVM) keeps its handlers on descriptors that it has closed, and
crashes when their numbers are used again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import re
import socket
import struct
import termios
import time

from ringbar.errors import Error
from ringbar.qemu.monitor import CommandError, Monitor

VERSION = 0
VECTORS = 64
"""Interrupts of a doorbell in the VM: one for each queue that a lane has room for."""
HOST, VM = 0, 1
"""Numbers of the two sides in ivshmem's protocol."""
READ_TIMEOUT = 5.0
"""Seconds that QEMU may take to read what it was sent."""


@dataclasses.dataclass(frozen=True)
class Bell:
    """Event descriptors of one doorbell."""

    host: int                   #: the VM's programs ring it
    vm: tuple[int, ...]         #: each is one interrupt in the VM


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a VM gets no doorbell."""

    why: str
    cure: str | None = None


async def refusal(monitor: Monitor) -> Refusal | None:
    """Whether a VM can have a doorbell that its guest can use. None: it can."""
    if not await monitor.execute("qom-list-types", implements="ivshmem-doorbell"):
        return Refusal("its QEMU has no ivshmem-doorbell", "a QEMU with ivshmem, such as Debian's qemu-system-x86")
    remaps = None
    for parent in ("/machine/peripheral", "/machine/peripheral-anon"):
        for name, kind in (await monitor.qom_list(parent)).items():
            found = re.fullmatch(r"child<((?:intel|amd|virtio)-iommu.*)>", kind)
            if found is not None and not remaps:
                remaps = await monitor.qom_get(f"{parent}/{name}", "intremap", "off") in ("on", "auto", True)
    if remaps is None:
        return Refusal("it has no virtual IOMMU", "start it with one: docs/guest.md, Interrupts")
    if not remaps:
        return Refusal("its virtual IOMMU does not remap interrupts", "start it with intel-iommu,intremap=on")
    return None


async def offer(monitor: Monitor, chardev: str, bell: Bell, memory: int) -> socket.socket:
    """Make the character device over which QEMU reads all that a doorbell is, and write that.

    :return: our end; for :func:`taken` after the device was added. Close it then.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with theirs:
            for number, fd in ((VERSION, None), (VM, None), (-1, memory), (HOST, bell.host),
                               *((VM, each) for each in bell.vm)):
                _send(ours, number, fd)
            await monitor.get_fd(theirs.fileno(), chardev)
            address = {"type": "fd", "data": {"str": chardev}}
            await monitor.execute(
                "chardev-add", id=chardev, backend={"type": "socket", "data": {"addr": address, "server": False}})
    except BaseException:
        ours.close()
        raise
    return ours


def _send(ours: socket.socket, number: int, fd: int | None) -> None:
    ours.setblocking(False)     # its buffer has room for all of it; a kernel where it has not must not hang us
    message = struct.pack("<q", number)
    try:
        if fd is None:
            ours.send(message)
        else:
            socket.send_fds(ours, [message], [fd])
    except OSError as err:
        raise Error(f"the doorbell's descriptors cannot be passed on: {(err.strerror or str(err)).lower()}",
                    code="failed", cure="attach it with --no-interrupts") from None


async def taken(ours: socket.socket) -> None:
    """Wait until QEMU has read all: what is still under way would be lost with our end."""
    deadline = time.monotonic() + READ_TIMEOUT
    while True:
        (left,) = struct.unpack("i", fcntl.ioctl(ours, termios.TIOCOUTQ, bytes(4)))
        if not left:
            return
        if time.monotonic() > deadline:
            raise Error("QEMU does not read its doorbell's descriptors", code="plug-failed",
                        cure="attach it with --no-interrupts")
        await asyncio.sleep(0.01)


async def chardevs(monitor: Monitor, prefix: str) -> list[str]:
    """Character devices whose ids begin so."""
    return [str(c["label"]) for c in await monitor.execute("query-chardev") if str(c["label"]).startswith(prefix)]


async def remove(monitor: Monitor, names: list[str]) -> list[str]:
    """Take character devices away. A device that has just gone may hold its own for a moment more.

    :return: those that would not go.
    """
    deadline = time.monotonic() + READ_TIMEOUT
    left = list(names)
    while left and time.monotonic() < deadline:
        for name in list(left):
            try:
                await monitor.execute("chardev-remove", id=name)
                left.remove(name)
            except CommandError:
                if name not in await chardevs(monitor, name):
                    left.remove(name)
        if left:
            await asyncio.sleep(0.05)
    return left
