# SPDX-License-Identifier: Apache-2.0
"""A worker against its model, whatever is done to it while packets flow.

It is started, stopped, paused, given other outputs and policies, and killed; every packet that it took is at an output
or counted as dropped, in order, and every buffer comes home.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

try:
    import ringbar
    import ringbar._c
except ImportError as problem:
    pytest.skip(f"the C core is not built: {problem}", allow_module_level=True)

IDS = itertools.count(2000)
SLOTS = 64
OUTPUTS = 4
POLICIES = st.sampled_from(["rr", "rr-burst", "5tuple", "ip", "input"])
CHOICES = st.lists(st.integers(1, OUTPUTS), min_size=1, max_size=OUTPUTS, unique=True)

#: Another process that balances until it is killed.
OTHER = """
import sys, ringbar
number, fan = int(sys.argv[1]), sys.argv[2] == "fan"
zc = ringbar.Cluster.attach(number)
kind = ringbar.Fanout if fan else ringbar.Balancer
queues = zc.queues
kind(queues[0], queues[1:], policy="rr", name=f"other{number}").start()
print("started", flush=True)
sys.stdin.read()
"""


def until(done: Any, what: str) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.0002)


class WorkerMachine(RuleBasedStateMachine):
    """The model: how many packets were sent, and which outputs there are."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="ringbar-property-", dir="/dev/shm"))
        self.patch = pytest.MonkeyPatch()
        for variable in ("RINGBAR_RUN", "RINGBAR_SHM"):
            self.patch.setenv(variable, str(self.root))
        self.cluster = ringbar.Cluster.create(next(IDS), buffers=4096)
        for number in range(OUTPUTS + 1):
            self.cluster.create_queue(number, slots=SLOTS)
        self.queues = self.cluster.queues
        self.tx: Any = self.cluster.open_queue(0, "tx")
        self.readers = ringbar.Cluster.attach(self.cluster.id)
        self.rx: list[Any] = [self.readers.open_queue(n, "rx") for n in range(1, OUTPUTS + 1)]
        self.own: Any = None  # the worker's attachment
        self.worker: Any = None
        self.other: Any = None  # another process with a worker
        self.paused = False
        self.sent = self.arrived = self.before = 0
        self.fans = 1  # how often each packet arrives
        self.last = [0] * OUTPUTS

    def waiting(self) -> int:
        """Packets in the input's queue."""
        return int(self.queues[0].info()["waiting"])

    def drain(self) -> None:
        """Take what is at the outputs: in order."""
        for number, rx in enumerate(self.rx):
            burst = rx.recv(SLOTS, timeout=0)  # all there can be
            for i in range(len(burst)):
                sequence = int.from_bytes(burst.copy(i)[34:42], "big")
                assert sequence > self.last[number], "a packet came twice, or out of order"
                self.last[number] = sequence
                self.arrived += 1
            burst.release()
        self.cluster.service()
        self.readers.service()

    def settle(self) -> None:
        """All that was sent has gone through the worker."""

        def done() -> bool:
            self.drain()
            return self.waiting() == 0

        until(done, "packets wait in front of a running worker")

    def stopped(self) -> None:
        """The worker is gone: what it took has arrived, or it counted it as dropped."""
        stats = self.worker.stop()
        self.worker = None
        self.drain()
        assert self.arrived - self.before + stats["dropped"] == stats["packets"] * self.fans
        assert stats["error"] == 0
        self.own.close()

    @precondition(lambda self: self.worker is None and self.other is None)
    @rule(outputs=CHOICES, policy=POLICIES, fan=st.booleans())
    def start(self, outputs: list[int], policy: str, fan: bool) -> None:
        self.drain()
        self.before = self.arrived
        self.own = ringbar.Cluster.attach(self.cluster.id)
        mine = [ringbar.Queue(self.own, n) for n in range(OUTPUTS + 1)]
        kind = ringbar.Fanout if fan else ringbar.Balancer
        self.worker = kind(mine[0], [mine[n] for n in outputs], policy, name="mine").start()
        self.fans = len(outputs) if fan else 1
        self.fan, self.paused = fan, False

    @precondition(lambda self: self.worker is not None)
    @rule()
    def stop(self) -> None:
        self.stopped()

    @precondition(lambda self: self.worker is not None)
    @rule(outputs=CHOICES, policy=POLICIES)
    def change(self, outputs: list[int], policy: str) -> None:
        if self.fan:  # a number that the packets of all its life have in common
            outputs = list(range(1, 1 + min(len(outputs), self.fans))) if self.fans < len(outputs) else outputs
            if len(outputs) != self.fans:
                return
        self.worker.set(outputs=[self.queues[n] for n in outputs], policy=policy)

    @precondition(lambda self: self.worker is not None)
    @rule()
    def a_wrong_change_changes_nothing(self) -> None:
        before = [output["address"] for output in self.worker.stats()["outputs"]]
        with pytest.raises(ringbar.Error):
            self.worker.set(policy="nonsense", outputs=[self.queues[1]])
        with pytest.raises(ringbar.Error):
            self.worker.set(outputs=[f"{self.cluster.id}@77"])
        assert [output["address"] for output in self.worker.stats()["outputs"]] == before

    @precondition(lambda self: self.worker is not None)
    @rule(pause=st.booleans())
    def pause(self, pause: bool) -> None:
        (self.worker.pause if pause else self.worker.resume)()
        self.paused = pause

    @rule(n=st.integers(1, SLOTS))
    def send(self, n: int) -> None:
        packets = []
        for i in range(n):
            sequence = self.sent + i + 1
            head = bytes(12) + b"\x08\0\x45" + bytes(8) + b"\x11" + bytes(2) + sequence.to_bytes(4, "big") + bytes(4)
            packets.append(head + sequence.to_bytes(8, "big") + bytes(18))
        self.cluster.service()
        self.sent += self.tx.write(packets)
        if self.worker is not None and not self.paused:
            self.settle()

    @rule()
    def read(self) -> None:
        self.drain()

    @precondition(lambda self: self.worker is None and self.other is None)
    @rule(fan=st.booleans())
    def another_process_comes(self, fan: bool) -> None:
        self.other = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(self.cluster.id), "fan" if fan else "one"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ),
        )  # fmt: skip
        assert self.other.stdout.readline() == b"started\n"
        assert ringbar.workers.read(f"other{self.cluster.id}")["pid"] == self.other.pid

    @precondition(lambda self: self.other is not None)
    @rule()
    def it_is_killed(self) -> None:
        self.other.send_signal(signal.SIGKILL)
        self.other.wait()
        self.other.stdin.close()
        self.other.stdout.close()
        self.other = None
        found = ringbar.workers.read(f"other{self.cluster.id}")
        assert not found["alive"] and not found["stats"]["running"] and found["stats"]["error"]
        ringbar.workers.forget(f"other{self.cluster.id}")

    @invariant()
    def nothing_comes_from_nowhere(self) -> None:
        assert max(self.last) <= self.sent
        if self.worker is not None:
            assert self.worker.running

    def teardown(self) -> None:
        try:
            if self.worker is not None:
                if self.paused:
                    self.worker.resume()
                self.stopped()
            if self.other is not None:
                self.it_is_killed()
            self.drain()
            self.readers.close()
            last = ringbar.Cluster.attach(self.cluster.id)
            with last.open_queue(0, "rx") as rest:  # what nobody has taken
                self.cluster.service()
                rest.recv(SLOTS, timeout=0).release()
            last.close()
            with ringbar.Cluster.attach(self.cluster.id) as readers:
                for number in range(1, OUTPUTS + 1):
                    with readers.open_queue(number, "rx") as rx:
                        readers.service()
                        rx.recv(SLOTS, timeout=0).release()
            ringbar._c.check(ringbar._c.lib.rb_cluster_reap(self.cluster.id))
            self.cluster.service()
            self.tx.close()
            for book in self.cluster.status()["books"]:
                assert book["lent"] == book["shared"] == book["quarantined"] == 0, "a buffer is not home"
        finally:
            self.cluster.close()
            self.patch.undo()
            shutil.rmtree(self.root, ignore_errors=True)


WorkerMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestWorker = WorkerMachine.TestCase
