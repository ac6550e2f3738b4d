# SPDX-License-Identifier: Apache-2.0
"""Chains of workers in several processes, each started, killed and started again while packets flow."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest

CLUSTER = 97
SLOTS = 256

#: A stage of the chain in a process of its own: what it is, and its queues.
STAGE = """
import sys
import ringbar

zc = ringbar.Cluster.attach(int(sys.argv[1]))
q = [ringbar.Queue(zc, n) for n in range(6)]
{
    "balance": lambda: ringbar.Balancer(q[0], [q[1], q[2]], "rr", name="balance"),
    "fan": lambda: ringbar.Fanout(q[1], [q[3], q[4]], name="fan"),
    "merge": lambda: ringbar.Merge([q[2], q[3]], q[5], wait=0.002, name="merge"),
}[sys.argv[2]]().start()
print("started", flush=True)
sys.stdin.read()
"""


class Chain:
    """0 is balanced over 1 and 2; 1 goes to 3 and 4; 2 and 3 are merged into 5. So 5 gets all, and 4 half of it."""

    def __init__(self, ringbar: Any) -> None:
        self.cluster = ringbar.Cluster.create(CLUSTER, buffers=8192)
        for number in range(6):
            self.cluster.create_queue(number, slots=SLOTS)
        self.tx = self.cluster.open_queue(0, "tx")
        self.readers = ringbar.Cluster.attach(CLUSTER)
        self.rx = {n: self.readers.open_queue(n, "rx") for n in (4, 5)}
        self.stages: dict[str, subprocess.Popen[bytes]] = {}
        self.sent = 0
        self.seen: dict[int, set[int]] = {4: set(), 5: set()}

    def start(self, name: str) -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", STAGE, str(CLUSTER), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None and process.stdout.readline() == b"started\n"
        self.stages[name] = process

    def end(self, name: str, kill: bool) -> None:
        process = self.stages.pop(name)
        if kill:
            process.kill()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        assert process.wait(30) == (-9 if kill else 0)
        process.stdout.close()

    def turn(self, n: int) -> None:
        """Send up to n packets, take what has arrived; never one twice, never one that was not sent."""
        self.cluster.service()
        packets = [bytes(14) + i.to_bytes(8, "big") + bytes(38) for i in range(self.sent, self.sent + n)]
        self.sent += self.tx.write(packets) if packets else 0
        for number, rx in self.rx.items():
            burst = rx.recv(SLOTS, timeout=0.001)
            for i in range(len(burst)):
                sequence = int.from_bytes(burst.copy(i)[14:22], "big")
                assert sequence < self.sent and sequence not in self.seen[number]
                self.seen[number].add(sequence)
            burst.release()
        self.readers.service()

    def flows(self, more: int) -> None:
        """That many more packets get through both ways."""
        wanted = {number: len(seen) + more for number, seen in self.seen.items()}
        deadline = time.monotonic() + 30
        while any(len(self.seen[number]) < wanted[number] for number in wanted):
            assert time.monotonic() < deadline, f"{ {n: len(s) for n, s in self.seen.items()} }, not {wanted}"
            self.turn(16)

    def settled(self, what: str) -> None:
        deadline = time.monotonic() + 30
        while any(book["lent"] or book["shared"] for book in self.cluster.status()["books"]):
            assert time.monotonic() < deadline, f"{what}: {self.cluster.status()['books']}"
            self.turn(0)

    def close(self) -> None:
        for name in list(self.stages):
            self.end(name, kill=True)
        self.readers.close()
        self.cluster.close()


@pytest.fixture
def chain(private_directories: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    import ringbar

    monkeypatch.setenv("RINGBAR_RUN", str(private_directories / "run"))
    monkeypatch.setenv("RINGBAR_SHM", str(private_directories / "shm"))
    made = Chain(ringbar)
    yield made
    made.close()


def test_every_packet_passes_a_chain_of_processes_and_every_buffer_comes_home(chain: Chain) -> None:
    import ringbar

    for name in ("merge", "fan", "balance"):
        chain.start(name)
    chain.flows(500)
    deadline = time.monotonic() + 30
    half = chain.sent // 2 + chain.sent % 2
    while len(chain.seen[5]) < chain.sent or len(chain.seen[4]) < half:
        dropped = {name: ringbar.workers.read(name)["stats"]["drops"] for name in chain.stages}
        arrived = f"{len(chain.seen[5])} of {chain.sent}, {len(chain.seen[4])} of {half}"
        assert time.monotonic() < deadline, f"{arrived}: {dropped}"
        chain.turn(0)
    assert len(chain.seen[4]) == half
    chain.settled("nothing is on its way")
    for name in ("balance", "fan", "merge"):
        chain.end(name, kill=False)
    chain.settled("after the end")


def test_any_stage_is_killed_and_replaced_while_packets_flow(chain: Chain) -> None:
    for name in ("merge", "fan", "balance"):
        chain.start(name)
    chain.flows(100)
    for name in ("fan", "balance", "merge", "fan", "merge", "balance"):
        chain.end(name, kill=True)
        for _ in range(5):
            chain.turn(8)
        chain.start(name)
        chain.flows(100)
    chain.settled("after six deaths")
