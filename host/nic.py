# SPDX-License-Identifier: Apache-2.0
"""What the kernel says of a network interface of this thread's network namespace, by ioctl: /sys/class/net shows the
namespace that it was mounted in."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import re
import socket
import struct
from dataclasses import dataclass

_SIOCGIFFLAGS, _SIOCGIFMTU, _SIOCETHTOOL = 0x8913, 0x8921, 0x8946
_GDRVINFO, _GCHANNELS = 0x3, 0x3C
_IFF_UP = 1


@dataclass
class Nic:
    """One interface."""

    name: str
    up: bool
    mtu: int
    driver: str
    """``virtual`` where it has none of its own."""
    queues: int
    """For receiving."""


def names() -> list[str]:
    """The interfaces there are, without ``lo``."""
    return sorted(name for _, name in socket.if_nameindex() if name != "lo")


def kernel() -> tuple[int, int]:
    """Its version."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def look(name: str) -> Nic | None:
    """One interface, or None when there is no such."""
    if name not in (name for _, name in socket.if_nameindex()):
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ask:

        def word(request: int, form: str) -> int:
            answer = fcntl.ioctl(ask, request, struct.pack("16s24x", name.encode()))
            return int(struct.unpack_from(form, answer, 16)[0])

        def ethtool(command: int, size: int) -> bytes | None:
            data = array.array("B", struct.pack("I", command).ljust(size, b"\0"))
            request = struct.pack("16sQ16x", name.encode(), data.buffer_info()[0])
            with contextlib.suppress(OSError):
                fcntl.ioctl(ask, _SIOCETHTOOL, request)
                return data.tobytes()
            return None

        drivers, channels = ethtool(_GDRVINFO, 196), ethtool(_GCHANNELS, 36)
        flags, mtu = word(_SIOCGIFFLAGS, "H"), word(_SIOCGIFMTU, "i")
    rx, combined = struct.unpack_from("I8xI", channels, 20) if channels else (0, 0)
    return Nic(
        name=name,
        up=bool(flags & _IFF_UP),
        mtu=mtu,
        driver=drivers[4:36].split(b"\0")[0].decode(errors="replace") if drivers else "virtual",
        queues=max(1, rx + combined),
    )
