# SPDX-License-Identifier: Apache-2.0
"""What the drivers of this thread's network interfaces can do with XDP, as the kernel tells since 6.3: generic
netlink, family ``netdev``, a dump of its devices."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

_REQUEST, _DUMP = 0x1, 0x300
_DONE, _ERROR = 0x3, 0x2
_CONTROL, _GET_FAMILY = 0x10, 3
_FAMILY_ID, _FAMILY_NAME = 1, 2
_DEV_GET = 1
_IFINDEX, _XDP_FEATURES, _ZC_MAX_SEGS = 1, 3, 4

BASIC, REDIRECT, TRANSMIT, ZERO_COPY = 0x1, 0x2, 0x4, 0x8
"""A program in the driver; packets to sockets; packets from other cards; sockets without a copy."""


def look() -> dict[str, int] | None:
    """What each interface's driver can do, as bits; None where this kernel does not tell."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 16) as netlink:  # NETLINK_GENERIC
        netlink.settimeout(5)
        try:
            netlink.bind((0, 0))
            name = _attribute(_FAMILY_NAME, b"netdev\0")
            family = [a for m in _ask(netlink, _CONTROL, _REQUEST, _GET_FAMILY, name) for a in _attributes(m)]
            number = next(struct.unpack("=H", value)[0] for kind, value in family if kind == _FAMILY_ID)
            found = {}
            for message in _ask(netlink, number, _REQUEST | _DUMP, _DEV_GET):
                told = dict(_attributes(message))
                if _IFINDEX in told and _XDP_FEATURES in told:
                    index = struct.unpack("=I", told[_IFINDEX])[0]
                    found[socket.if_indextoname(index)] = struct.unpack("=Q", told[_XDP_FEATURES])[0]
            return found
        except (OSError, StopIteration, struct.error):
            return None


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            return
        yield kind & 0x3FFF, data[4:length]
        data = data[(length + 3) & ~3 :]


def _ask(netlink: socket.socket, family: int, flags: int, command: int, attributes: bytes = b"") -> Iterator[bytes]:
    """The attributes of each message of the answer.

    :raises OSError: the kernel refuses.
    """
    body = struct.pack("=BBH", command, 1, 0) + attributes
    netlink.send(struct.pack("=IHHII", 16 + len(body), family, flags, 1, 0) + body)
    while True:
        data = netlink.recv(1 << 18)
        while len(data) >= 16:
            length, kind = struct.unpack_from("=IH", data)
            message, data = data[16:length], data[(length + 3) & ~3 :]
            if kind == _DONE:
                return
            if kind == _ERROR:
                code = struct.unpack_from("=i", message)[0]
                if code:
                    raise OSError(-code, os.strerror(-code))
                return
            yield message[4:]
        if not flags & _DUMP:
            return
