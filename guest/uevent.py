# SPDX-License-Identifier: Apache-2.0
"""Waits for devices with the kernel's own announcements (uevents), so nothing polls."""

from __future__ import annotations

import pathlib
import select
import socket
import time
from collections.abc import Collection

from ringbar.guest.pci import SYSFS, Device, find

_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1


def _pci_event(message: bytes) -> tuple[str, str] | None:
    """Action and device name of a PCI announcement: ``action@path``, then ``KEY=value``, NUL-separated; else None."""
    head, *fields = message.split(b"\0")
    if b"SUBSYSTEM=pci" not in fields or b"@" not in head:
        return None
    action, _, path = head.decode(errors="replace").partition("@")
    return action, path.rpartition("/")[2]


def listen() -> socket.socket:
    """A socket that becomes readable whenever the kernel announces something; its messages say what."""
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_KOBJECT_UEVENT)
    events.bind((0, _KERNEL_GROUP))
    return events


def wait_for_device(
    timeout: float | None = None, *, known: Collection[str] = (), sysfs: pathlib.Path = SYSFS
) -> list[Device]:
    """Wait until there is an ivshmem device whose name is not in ``known``.

    :param timeout: seconds; None waits for ever; 0 only looks.
    :param known: names of devices that don't count, for example those of other clusters. One that goes meanwhile is
        forgotten, so that it counts when it comes again.
    :return: all devices that are there then, by slot and function. Functions of one slot may follow a moment later.
    :raises TimeoutError: no such device came in time.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    ignored = set(known)
    with listen() as events:  # before looking, so that nothing falls between
        while True:
            devices = find(sysfs)
            if any(device.name not in ignored for device in devices):
                return devices
            ignored &= {device.name for device in devices}
            while True:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError("no shared-memory device came; attach this VM on the host")
                if not select.select([events], [], [], left)[0]:
                    continue
                try:
                    event = _pci_event(events.recv(65536))
                except OSError:  # announcements were lost: look again
                    break
                if event is None:
                    continue
                action, name = event
                if action == "remove":
                    ignored.discard(name)
                else:
                    break
