# SPDX-License-Identifier: Apache-2.0
"""A host with services, another machine, and what that machine asks for: ping, a name, a page."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

from netspace import Space, checksum


@contextlib.contextmanager
def host_and_peer() -> Iterator[tuple[Space, Space]]:
    """Two name spaces: a host with nic0 (198.51.100.1), and at the end of the wire 198.51.100.2."""
    with Space("rbinh") as host, Space("rbinp") as peer:
        host.pair("nic0", "far0")
        host.ip(f"link set far0 netns {peer.name}")
        host.ip("addr add 198.51.100.1/24 dev nic0")
        peer.ip("addr add 198.51.100.2/24 dev far0")
        peer.ip("link set far0 up")
        peer.without_offload("far0")
        yield host, peer


def answers(host: Space) -> contextlib.ExitStack:
    """Services of the host: names on UDP 53, a line on TCP 80 and 8080. Closed with what is returned."""
    stack = contextlib.ExitStack()

    def serve(kind: int, port: int, work: Callable[[socket.socket], None]) -> None:
        def make() -> socket.socket:
            made = socket.socket(socket.AF_INET, kind)
            made.bind(("198.51.100.1", port))
            if kind == socket.SOCK_STREAM:
                made.listen()
            return made

        listener = host.inside(make)

        def run() -> None:
            with contextlib.suppress(OSError):  # closed: the test is over
                while True:
                    work(listener)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()

        def end() -> None:
            if kind == socket.SOCK_STREAM:
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

        stack.callback(end)

    def name(listener: socket.socket) -> None:
        query, peer = listener.recvfrom(512)
        listener.sendto(query[:2] + b"\x81\x80" + query[4:], peer)

    def line(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            size = int(connection.makefile("rb").readline())
            connection.sendall(bytes(size))

    serve(socket.SOCK_DGRAM, 53, name)
    serve(socket.SOCK_STREAM, 80, line)
    serve(socket.SOCK_STREAM, 8080, line)
    return stack


def ping(sequence: int, timeout: float = 5) -> bool:
    """One echo request to the host."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as s:
        s.settimeout(timeout)
        body = b"\x08\0\0\0\x12\x34" + sequence.to_bytes(2, "big") + bytes(24)
        s.sendto(body[:2] + checksum(body).to_bytes(2, "big") + body[4:], ("198.51.100.1", 0))
        try:
            while True:
                answer = s.recv(2048)[20:]
                if answer[0] == 0 and answer[4:8] == body[4:8]:
                    return True
        except TimeoutError:
            return False


def resolve(timeout: float = 5) -> bool:
    """A DNS question to the host, and its answer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(timeout)
        question = b"\x42\x42\x01\x00\x00\x01" + bytes(6) + b"\x04ring\x03bar\x00\x00\x01\x00\x01"
        s.sendto(question, ("198.51.100.1", 53))
        try:
            return s.recv(512) == question[:2] + b"\x81\x80" + question[4:]
        except TimeoutError:
            return False


def fetch(port: int, size: int, timeout: float = 10) -> int:
    """Bytes that came over TCP; 0 when no connection could be made."""
    try:
        with socket.create_connection(("198.51.100.1", port), timeout) as s:
            s.sendall(b"%d\n" % size)
            got = 0
            while chunk := s.recv(65536):
                got += len(chunk)
            return got
    except TimeoutError:
        return 0
