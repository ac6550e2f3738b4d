# SPDX-License-Identifier: Apache-2.0
"""Capture files with times in nanoseconds: pcapng and pcap."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

from ringbar.errors import Error

ETHERNET = 1
SNAP = 262144


def _block(kind: int, body: bytes) -> bytes:
    """A pcapng block; its length is written at both ends."""
    length = 12 + len(body)
    return struct.pack("<II", kind, length) + body + struct.pack("<I", length)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


class Writer:
    """Writes packets of bursts to ``file``.

    :ivar packets: how many so far.
    """

    def __init__(self, file: BinaryIO, kind: str, device: str, snap: int | None) -> None:
        self.packets = 0
        self._file = file
        self._snap = SNAP if snap is None else snap
        self._record = self._ng if kind == "pcapng" else self._classic
        if kind == "pcapng":
            section = struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1) + _option(4, b"ringbar") + _option(0, b"")
            interface = struct.pack("<HHI", ETHERNET, 0, self._snap) + _option(2, device.encode())
            interface += _option(9, b"\x09") + _option(0, b"")  # times are in units of 10^-9 seconds
            file.write(_block(0x0A0D0D0A, section) + _block(1, interface))
        else:
            file.write(struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, self._snap, ETHERNET))
        file.flush()

    @staticmethod
    def _ng(stamp: int, length: int, data: bytes) -> bytes:
        body = struct.pack("<IIIII", 0, stamp >> 32, stamp & 0xFFFFFFFF, len(data), length)
        return _block(6, body + data + bytes(-len(data) % 4))

    @staticmethod
    def _classic(stamp: int, length: int, data: bytes) -> bytes:
        return struct.pack("<IIII", stamp // 10**9 & 0xFFFFFFFF, stamp % 10**9, len(data), length) + data

    def write(self, burst: Any) -> None:
        """Write every packet of ``burst``; one without a time gets the present."""
        snap, record = self._snap, self._record
        out = []
        now = time.time_ns() if len(burst) else 0
        for i, (length, stamp) in enumerate(zip(burst.lengths, burst.timestamps)):
            out.append(record(int(stamp) or now, int(length), burst.copy(i)[:snap]))
        self._file.write(b"".join(out))
        self.packets += len(out)

    def flush(self) -> None:
        """Let a reader of a pipe see what there is."""
        self._file.flush()

    def forget(self) -> None:
        """The reader is gone: what is not written yet never will be."""
        self._file = io.BytesIO()


@contextlib.contextmanager
def create(path: str, kind: str, device: str, snap: int | None) -> Iterator[Writer]:
    """A capture file, closed in the end.

    :param path: ``-`` is standard output.
    :param kind: ``pcapng`` or ``pcap``.
    :param device: where the packets come from, for readers of pcapng.
    :param snap: bytes kept of each packet; None: all.
    """
    if path == "-":
        writer = Writer(sys.stdout.buffer, kind, device, snap)
        try:
            yield writer
        finally:
            try:
                sys.stdout.buffer.flush()
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    try:
        file = open(path, "wb")
    except OSError as e:
        raise Error(
            f"{path} cannot be written: {(e.strerror or str(e)).lower()}",
            code="cannot-write",
            cure="another -w FILE",
        ) from None
    with file:
        yield Writer(file, kind, device, snap)
