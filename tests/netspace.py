# SPDX-License-Identifier: Apache-2.0
"""A network name space of a test's own, with veth pairs in it, and code that runs inside."""

from __future__ import annotations

import array
import ctypes
import fcntl
import json
import os
import secrets
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000


class Space:
    """Made by ``with``, removed at its end. Everything in it is gone then, whatever a test left."""

    def __init__(self, task: str) -> None:
        self.name = f"{task}{secrets.token_hex(3)}"

    def __enter__(self) -> Space:
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        self.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
        self.ip("link set lo up")
        return self

    def __exit__(self, *exc: object) -> None:
        subprocess.run(["ip", "netns", "del", self.name], check=True)

    def run(self, *command: str) -> str:
        """Run a program inside; what it printed."""
        done = subprocess.run(["ip", "netns", "exec", self.name, *command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ip(self, words: str) -> str:
        """``ip`` inside."""
        done = subprocess.run(["ip", "-n", self.name, *words.split()], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def pair(self, one: str, other: str) -> None:
        """A veth pair, up."""
        self.ip(f"link add {one} type veth peer name {other}")
        for end in (one, other):
            self.ip(f"link set {end} up")

    def without_offload(self, interface: str) -> None:
        """Checksums and segments are made before packets reach the interface, as a real wire carries them."""

        def turn_off() -> None:
            value = array.array("I", [0x17, 0])  # ETHTOOL_STXCSUM
            request = struct.pack("16sP", interface.encode(), value.buffer_info()[0])
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
                fcntl.ioctl(s, 0x8946, request)  # SIOCETHTOOL

        self.inside(turn_off)

    def mac(self, interface: str) -> bytes:
        """Its address."""
        return bytes.fromhex(json.loads(self.ip(f"-j link show {interface}"))[0]["address"].replace(":", ""))

    def inside(self, what: Callable[[], T]) -> T:
        """Call something in a thread that is inside; sockets and devices that it opens stay there."""
        result: list[T] = []
        failed: list[BaseException] = []

        def body() -> None:
            try:
                with open(f"/run/netns/{self.name}", "rb") as space:
                    if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), _CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                result.append(what())
            except BaseException as problem:  # raised below
                failed.append(problem)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return result[0]

    def wire(self, interface: str) -> socket.socket:
        """A raw socket on an interface: the other side of a test's device."""

        def make() -> socket.socket:
            made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            made.bind((interface, 0x0003))
            made.settimeout(5)
            return made

        return self.inside(make)


def udp_frame(
    dst: bytes,
    src: bytes,
    payload: bytes,
    *,
    port: int = 5000,
    source: str = "198.51.100.2",
    target: str = "198.51.100.1",
) -> bytes:
    """Ethernet, IPv4, UDP without a checksum."""
    ip = bytearray(
        b"\x45\x00" + (28 + len(payload)).to_bytes(2, "big") + bytes(4) + b"\x40\x11\x00\x00"
        + socket.inet_aton(source) + socket.inet_aton(target)
    )  # fmt: skip
    ip[10:12] = checksum(bytes(ip)).to_bytes(2, "big")
    udp = b"".join(n.to_bytes(2, "big") for n in (4444, port, 8 + len(payload), 0))
    return dst + src + b"\x08\x00" + bytes(ip) + udp + payload


def checksum(octets: bytes) -> int:
    """The Internet checksum; 0 of bytes that hold theirs."""
    octets += bytes(len(octets) % 2)
    total = sum(int.from_bytes(octets[i : i + 2], "big") for i in range(0, len(octets), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def use_directories(root: Any, monkeypatch: Any) -> None:
    """This process and its children use the clusters below root alone."""
    monkeypatch.setenv("RINGBAR_RUN", os.fspath(root / "run"))
    monkeypatch.setenv("RINGBAR_SHM", os.fspath(root / "shm"))
