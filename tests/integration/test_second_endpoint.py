# SPDX-License-Identifier: Apache-2.0
"""docs/examples/guest_client.py, written from docs/protocol.md alone, against the library as its lender.

The lane is a VM's as the host makes it, mapped as a file instead of through a BAR.
"""

from __future__ import annotations

import platform
import random
import select
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="pure Python has no barriers for this processor")

CLIENT = Path(__file__).resolve().parents[2] / "docs" / "examples" / "guest_client.py"
RX = 1  # direction of rb_lane_bind


def packets(n: int, seed: int) -> list[bytes]:
    """n packets of all lengths, the same for the same seed."""
    numbers = random.Random(seed)
    return [numbers.randbytes(numbers.randrange(1, 1900)) for _ in range(n)]


def shown(data: bytes) -> str:
    """How the client prints a packet."""
    return f"{len(data)} {zlib.crc32(data):08x}"


class Host:
    """Cluster 1 with the queue 1@0 of 8 slots, its receiving end in the lane of a VM, its sending end here."""

    def __init__(self, root: Path) -> None:
        import ringbar
        from ringbar._c import lib

        self.root, self.lib = root, lib
        self.cluster = ringbar.Cluster.create(1, buffers=4096)
        self.queue = self.cluster.create_queue(0, slots=8)
        self.tx = self.cluster.open_queue(0, "tx")
        self.lane = self.cluster.call(lib.rb_lane_create, b"second", b"1:1")
        assert self.cluster.call(lib.rb_lane_bind, self.lane, 0, RX) == 0
        self.clients: list[subprocess.Popen[bytes]] = []

    def path(self, kind: str, number: int) -> Path:
        return self.root / "shm" / f"ringbar.1.{kind}{number}"

    def command(self, *words: str) -> list[str]:
        lane, pool = str(self.path("lane", self.lane)), str(self.path("pool", 0))
        return [sys.executable, "-I", str(CLIENT), lane, pool, "--cluster", "1", "--queue", "0", *words]

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """A client; it has written its session when this returns, and nobody has answered."""
        client = subprocess.Popen(self.command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        self.clients.append(client)
        assert client.stdout is not None
        assert client.stdout.readline() == b"open\n"
        return client

    def line(self, client: subprocess.Popen[bytes]) -> str:
        """Its next line; the lender goes on doing its duties meanwhile."""
        assert client.stdout is not None
        deadline = time.monotonic() + 60
        while not select.select([client.stdout], [], [], 0.001)[0]:
            assert time.monotonic() < deadline, "the client said nothing for 60 s"
            self.cluster.service()
        text = client.stdout.readline().decode()
        assert text, f"the client ended: {client.communicate(timeout=30)[1].decode()}"
        return text.rstrip("\n")

    def send(self, data: list[bytes]) -> None:
        """All of it."""
        deadline = time.monotonic() + 60
        while data:
            assert time.monotonic() < deadline, "the queue stays full"
            data = data[self.tx.write(data, timeout=0.1) :]

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        """Serve until the queue's information satisfies the condition."""
        deadline = time.monotonic() + 60
        while not condition(self.queue.info()):
            assert time.monotonic() < deadline, self.queue.info()
            self.cluster.service()

    def control(self) -> int:
        """Offset of the control block of 1@0 in the lane [protocol.md, 3]."""
        lane = self.path("lane", self.lane).read_bytes()
        for number in range(64):
            ready, queue = struct.unpack_from("<II", lane, 4096 + 64 * number)
            if (ready, queue) == (1, 0):
                return 16384 + 1024 * number
        raise AssertionError("the queue is not in the lane")

    def write(self, kind: str, at: int, data: bytes) -> None:
        """Scribble into a segment."""
        with self.path(kind, self.lane if kind == "lane" else 0).open("r+b") as file:
            file.seek(at)
            file.write(data)

    def close(self) -> None:
        """The sending end, and with its maker the cluster; the VM is still attached."""
        self.tx.close()
        self.cluster.close()

    def end(self) -> None:
        for client in self.clients:
            if client.poll() is None:
                client.kill()
            client.communicate(timeout=30)
        if not self.cluster.closed:
            self.cluster.call(self.lib.rb_lane_remove, self.lane, 0)
            self.close()


@pytest.fixture
def host(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    pytest.importorskip("ringbar._c", exc_type=ImportError)
    monkeypatch.setenv("RINGBAR_RUN", str(private_directories / "run"))
    monkeypatch.setenv("RINGBAR_SHM", str(private_directories / "shm"))
    made = Host(private_directories)
    yield made
    made.end()


def test_it_receives_and_returns(host: Host) -> None:
    """600 packets through 8 slots: the rings of 8 and 256 entries wrap."""
    sent = packets(600, 1)
    client = host.start("--packets", str(len(sent)))
    for i in range(0, len(sent), 50):
        host.send(sent[i : i + 50])
        assert [host.line(client) for _ in sent[i : i + 50]] == [shown(data) for data in sent[i : i + 50]]
    assert client.wait(30) == 0
    host.until(lambda info: info["lent"] == 0)
    info = host.queue.info()
    assert (info["packets"], info["foreign"], info["waiting"], info["held"]) == (600, 0, 0, 0)
    assert not any(info["drops"].values())


def test_nothing_is_consumed_before_the_echo(host: Host) -> None:
    """Packets wait in the queue; the client shows none until the lender has answered its session."""
    sent = packets(5, 2)
    assert host.tx.write(sent, timeout=0) == 5
    client = host.start("--packets", "5")
    assert client.stdout is not None
    assert select.select([client.stdout], [], [], 0.3)[0] == [], "it consumed without an echo"
    assert host.queue.info()["waiting"] == 5
    host.cluster.service()
    assert [host.line(client) for _ in sent] == [shown(data) for data in sent]
    assert client.wait(30) == 0


def test_a_killed_one_loses_nothing(host: Host) -> None:
    """What it held comes home with its successor's session; what it had not read is its successor's."""
    sent = packets(12, 3)
    client = host.start("--keep")
    host.send(sent[:6])
    assert [host.line(client) for _ in range(6)] == [shown(data) for data in sent[:6]]
    host.until(lambda info: info["held"] == 6)
    client.send_signal(signal.SIGKILL)
    client.wait(30)
    assert host.tx.write(sent[6:], timeout=0) == 6
    assert host.queue.info()["lent"] == 12
    successor = host.start("--packets", "6")
    assert [host.line(successor) for _ in range(6)] == [shown(data) for data in sent[6:]]
    assert successor.wait(30) == 0
    host.until(lambda info: info["lent"] == 0)
    assert host.queue.info()["foreign"] == 0


def test_it_mends_its_indices_after_a_crash_of_the_vm(host: Host) -> None:
    """The client's indices are garbage: what was unread is lost with the VM, everything comes home, and it goes on."""
    host.send(packets(5, 4))
    at = host.control()
    host.write("lane", at + 128, struct.pack("<I", 0x9E3779B9))  # c
    host.write("lane", at + 256, struct.pack("<I", 0x7F4A7C15))  # rp
    client = host.start("--packets", "100")
    host.until(lambda info: not info["stalled"])
    sent = packets(100, 5)
    for i in range(0, 100, 5):
        host.send(sent[i : i + 5])
        assert [host.line(client) for _ in range(5)] == [shown(data) for data in sent[i : i + 5]]
    assert client.wait(30) == 0
    host.until(lambda info: info["lent"] == 0)


def test_it_leaves_a_closing_lane(host: Host) -> None:
    client = host.start("--keep")
    host.send(packets(4, 6))
    for _ in range(4):
        host.line(client)
    assert host.cluster.call(host.lib.rb_lane_announce, host.lane, 20000) == 1
    assert client.wait(30) == 3
    host.until(lambda info: info["lent"] == 0)  # it gave back what it held
    assert host.queue.info()["foreign"] == 0


def test_it_sees_the_end_of_the_cluster(host: Host) -> None:
    client = host.start()
    host.until(lambda info: not info["stalled"])
    host.close()
    assert client.wait(30) == 3
    assert b"destroyed" in client.communicate(timeout=30)[1]


def test_it_sees_that_its_lane_is_removed(host: Host) -> None:
    client = host.start()
    host.until(lambda info: not info["stalled"])
    host.cluster.call(host.lib.rb_lane_remove, host.lane, 0)
    assert client.wait(30) == 3
    host.lane = host.cluster.call(host.lib.rb_lane_create, b"second", b"1:1")


@pytest.mark.parametrize(
    ("kind", "at", "data", "says"),
    [
        ("lane", 0, b"x", "no segment of ringbar"),
        ("lane", 8, struct.pack("<I", 7), "ABI version 7"),
        ("lane", 16, struct.pack("<I", 2), "cluster 1"),
        ("lane", 32, bytes(8), "cluster 1"),
        ("lane", 44, struct.pack("<I", 2), "cluster 1"),
        ("pool", 56, struct.pack("<I", 1000), "impossible header"),
        ("pool", 60, struct.pack("<I", 0xFFFFFF), "impossible header"),
        ("pool", 32, struct.pack("<Q", 5), "no pool of the lane's cluster"),
    ],
)
def test_it_refuses_other_memory(host: Host, kind: str, at: int, data: bytes, says: str) -> None:
    kept = host.path(kind, host.lane if kind == "lane" else 0).read_bytes()[at : at + len(data)]
    host.write(kind, at, data)
    done = subprocess.run(host.command(), capture_output=True, text=True, timeout=30)
    host.write(kind, at, kept)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
