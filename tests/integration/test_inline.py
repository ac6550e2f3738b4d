# SPDX-License-Identifier: Apache-2.0
"""A program between a card and the kernel decides which packets the host may see, and which of its own may leave."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from netspace import Space, use_directories
from talk import answers, fetch, host_and_peer, ping, resolve

pytest.importorskip("_cffi_backend", reason="cffi is not installed")
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making network interfaces needs root")


@pytest.fixture
def two(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Space, Space]]:
    """A host with nic0 and another machine at the end of the wire."""
    use_directories(private_directories, monkeypatch)
    with host_and_peer() as made:
        yield made


class Guard:
    """Moves packets both ways; ``may_pass`` decides about each, and is told its direction."""

    def __init__(self, cluster: Any, host: Space, xdp: str, may_pass: Callable[[bytes, str], bool]) -> None:
        self.card = host.inside(lambda: cluster.open_device("zc:nic0", "rxtx", xdp=xdp))
        self.stack = host.inside(lambda: cluster.open_device("stack:nic0", "rxtx"))
        self.may_pass = may_pass
        self.seen = {"in": 0, "out": 0}
        self.stop = threading.Event()
        self.failed: list[BaseException] = []
        self.thread = threading.Thread(target=lambda: host.inside(self._run))

    def _run(self) -> None:
        try:
            while not self.stop.is_set():
                for source, sink, way in ((self.card, self.stack, "in"), (self.stack, self.card, "out")):
                    with source.recv(64, 0.001) as burst:
                        self.seen[way] += len(burst)
                        keep = [self.may_pass(bytes(burst[i]), way) for i in range(len(burst))]
                        with burst.select(keep) as passed:
                            sink.send(passed, 1)
        except BaseException as problem:  # the test says it
            self.failed.append(problem)

    def __enter__(self) -> Guard:
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        self.thread.join()
        self.card.close()
        self.stack.close()
        if self.failed:
            raise self.failed[0]


def not_8080(packet: bytes, way: str) -> bool:
    """Everything but TCP to port 8080 of the host."""
    port = packet[36:38] if way == "in" else packet[34:36]
    return not (packet[12:14] == b"\x08\x00" and packet[23] == 6 and port == (8080).to_bytes(2, "big"))


@pytest.mark.parametrize("xdp", ["driver", "generic"])
def test_ping_dns_and_tcp_work_and_what_the_program_forbids_does_not(two: tuple[Space, Space], xdp: str) -> None:
    import ringbar

    host, peer = two
    with ringbar.Cluster.create(1, buffers=16384) as cluster, answers(host):
        assert peer.inside(lambda: fetch(8080, 10)) == 10, "without the program everything is reached"
        with Guard(cluster, host, xdp, not_8080) as guard:
            assert all(peer.inside(lambda n=n: ping(n)) for n in range(3))  # type: ignore[misc]
            assert peer.inside(resolve)
            assert peer.inside(lambda: fetch(80, 300_000)) == 300_000
            assert peer.inside(lambda: fetch(8080, 10, 0.5)) == 0
            guard.may_pass = lambda packet, way: packet[12:14] == b"\x08\x06" or way == "in"
            assert not peer.inside(lambda: ping(9, 0.3)), "what the host sends is the program's to forbid, too"
            guard.may_pass = lambda packet, way: True
            assert peer.inside(lambda: fetch(8080, 10)) == 10
            before = dict(guard.seen)
            assert peer.inside(lambda: ping(10))
            assert guard.seen["in"] - before["in"] < 5 and guard.seen["out"] - before["out"] < 5, (
                "nothing goes in circles"
            )
        assert peer.inside(lambda: fetch(8080, 10)) == 10, "and without the program again"
        assert (
            "clsact"
            not in subprocess.run(
                ["ip", "netns", "exec", host.name, "tc", "qdisc"], capture_output=True, text=True, check=True
            ).stdout
        )
