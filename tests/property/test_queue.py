# SPDX-License-Identifier: Apache-2.0
"""A queue against its model.

Whatever its two ends do, packets arrive once, in order and unchanged, and every buffer comes home.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
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

IDS = itertools.count(1000)
SLOTS = 16


class QueueMachine(RuleBasedStateMachine):
    """The model: a list of what is unread, and a list of bursts in the consumer's hand."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="ringbar-property-", dir="/dev/shm"))
        self.patch = pytest.MonkeyPatch()
        for variable in ("RINGBAR_RUN", "RINGBAR_SHM"):
            self.patch.setenv(variable, str(self.root))
        self.cluster = ringbar.Cluster.create(next(IDS), buffers=1024)
        self.cluster.create_queue(0, slots=SLOTS, credit=SLOTS + 8)
        self.other = ringbar.Cluster.attach(self.cluster.id)
        self.tx: Any = self.cluster.open_queue(0, "tx")
        self.rx: Any = None
        self.unread: list[bytes] = []
        self.held: list[tuple[Any, list[bytes]]] = []
        self.next = 0

    def out(self) -> int:
        """Buffers that the consumer has or will have."""
        return len(self.unread) + sum(len(b) for b, _ in self.held)

    @rule(sizes=st.lists(st.integers(1, 1900), min_size=1, max_size=2 * SLOTS))
    def send(self, sizes: list[int]) -> None:
        packets = []
        for size in sizes:
            self.next += 1
            packets.append((self.next.to_bytes(8, "little") * 240)[:size])
        self.cluster.service()
        room = min(SLOTS - len(self.unread), SLOTS + 8 - self.out())
        assert self.tx.write(packets) == min(len(packets), room)
        self.unread += packets[:room]

    @precondition(lambda self: self.rx is None)
    @rule()
    def open_consumer(self) -> None:
        self.rx = self.other.open_queue(0, "rx")
        self.cluster.service()  # the lender answers the new session

    @precondition(lambda self: self.rx is not None)
    @rule(n=st.integers(1, 2 * SLOTS))
    def receive(self, n: int) -> None:
        burst = self.rx.recv(n, timeout=0)
        # At most what was asked for, and something where there is something.
        assert min(len(self.unread), 1) <= len(burst) <= n
        expected, self.unread = self.unread[: len(burst)], self.unread[len(burst) :]
        assert [burst.copy(i) for i in range(len(burst))] == expected
        if expected:
            self.held.append((burst, expected))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: Any) -> None:
        burst, expected = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        assert [burst.copy(i) for i in range(len(burst))] == expected  # nobody wrote over what was in hand
        burst.release()

    @precondition(lambda self: self.rx is not None)
    @rule()
    def close_consumer(self) -> None:
        self.held.clear()
        self.rx.close()
        self.rx = None

    @rule()
    def producer_comes_anew(self) -> None:
        self.tx.close()
        self.tx = self.cluster.open_queue(0, "tx")

    @invariant()
    def counts_agree(self) -> None:
        if self.rx is not None:
            assert self.rx.count == len(self.unread)

    def teardown(self) -> None:
        self.held.clear()
        if self.rx is not None:
            self.rx.close()
        self.cluster.service()
        lent = self.cluster.queues[0].info()["lent"]
        unread = len(self.unread)
        self.other.close()
        self.cluster.close()
        self.patch.undo()
        shutil.rmtree(self.root, ignore_errors=True)
        assert lent == unread


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
