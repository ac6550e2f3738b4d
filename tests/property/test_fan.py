# SPDX-License-Identifier: Apache-2.0
"""A fan-out against its model.

Whatever its outputs do, each gets exactly the packets that its bit was set for and that it had room for, in order and
unchanged, and every buffer comes home once, also by way of those that send it on.
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
    from ringbar._core import ffi, lib
except ImportError as problem:
    pytest.skip(f"the C core is not built: {problem}", allow_module_level=True)

IDS = itertools.count(1500)
SLOTS, CREDIT, OUTPUTS, ON = 8, 12, 3, 3  # queue ON is where the first output's consumer sends on


def good(value: int) -> int:
    """The value, unless it is an error."""
    assert value >= 0, ffi.string(lib.rb_error()).decode()
    return value


class FanMachine(RuleBasedStateMachine):
    """The model: for each queue what is unread and what is in its consumer's hand, as (number, descriptor)."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="ringbar-property-", dir="/dev/shm"))
        self.patch = pytest.MonkeyPatch()
        for variable in ("RINGBAR_RUN", "RINGBAR_SHM"):
            self.patch.setenv(variable, str(self.root))
        self.id = next(IDS)
        options = ffi.new("rb_cluster_options *", {"struct_size": ffi.sizeof("rb_cluster_options")})
        options.buffers, options.buffer_size, options.persistent = 1024, 256, 1
        self.owner = self.made("rb_cluster **", lambda out: lib.rb_cluster_create(self.id, options, out))
        queue = ffi.new("rb_queue_options *", {"struct_size": ffi.sizeof("rb_queue_options")})
        queue.slots, queue.credit = SLOTS, CREDIT
        for number in range(OUTPUTS + 1):
            good(lib.rb_queue_create(self.owner, number, queue))
        self.clusters = [self.attach() for _ in range(OUTPUTS + 1)]  # one for each consumer
        self.fan = self.made("rb_fan **", lambda out: lib.rb_fan_open(out, self.owner))
        self.tx = [self.open(self.owner, q, lib.RB_TX) for q in range(OUTPUTS)]
        self.on = self.open(self.clusters[0], ON, lib.RB_TX)
        self.rx: list[Any] = [self.open(self.clusters[q], q, lib.RB_RX) for q in range(OUTPUTS + 1)]
        self.bit: list[int | None] = [good(lib.rb_fan_add(self.fan, end)) for end in self.tx]
        self.paused = [False] * OUTPUTS
        self.unread: list[list[int]] = [[] for _ in range(OUTPUTS + 1)]
        self.hand: list[list[tuple[int, Any]]] = [[] for _ in range(OUTPUTS + 1)]
        self.sent_on = 0
        self.next = 0
        self.service()

    def made(self, kind: str, make: Any) -> Any:
        """What a function of the library writes through its first pointer."""
        out = ffi.new(kind)
        good(make(out))
        return out[0]

    def attach(self) -> Any:
        return self.made("rb_cluster **", lambda out: lib.rb_cluster_attach(self.id, out))

    def open(self, cluster: Any, queue: int, flags: int) -> Any:
        address = f"{self.id}@{queue}".encode()
        return self.made("rb_end **", lambda out: lib.rb_open(out, cluster, address, flags))

    def service(self) -> None:
        """Everything that was given back is home."""
        good(lib.rb_service(self.clusters[0]))
        good(lib.rb_service(self.owner))

    def lent(self, queue: int) -> int:
        """What the fan-out has lent to an output: unread, in hand, or sent on."""
        return len(self.unread[queue]) + len(self.hand[queue]) + (self.sent_on if queue == 0 else 0)

    def packet(self, number: int) -> bytes:
        return number.to_bytes(8, "little") * 8

    @rule(masks=st.lists(st.integers(0, 2**OUTPUTS - 1), min_size=1, max_size=20))
    def send(self, masks: list[int]) -> None:
        self.service()
        desc, n = ffi.new("rb_desc[]", len(masks)), len(masks)
        assert lib.rb_alloc(self.tx[0], desc, n) == n
        bits, missed = ffi.new("uint64_t[]", n), ffi.new("uint64_t[]", n)
        for i, mask in enumerate(masks):
            lib.rb_desc_set(desc + i, 64, 64, 0)
            ffi.buffer(lib.rb_data(self.owner, desc + i), 64)[:] = self.packet(self.next + i)
            for q in range(OUTPUTS):
                if mask >> q & 1 and self.bit[q] is not None:
                    bits[i] |= 1 << self.bit[q]
        room = [min(SLOTS - len(self.unread[q]), CREDIT - self.lent(q)) for q in range(OUTPUTS)]
        served = 0
        good_ones = good(lib.rb_fan_send(self.fan, desc, bits, n, missed))
        for i, mask in enumerate(masks):
            got = 0
            for q in range(OUTPUTS):
                bit = self.bit[q]
                if not mask >> q & 1 or bit is None:
                    continue
                takes = room[q] > 0 and not self.paused[q]
                assert bool(missed[i] >> bit & 1) == (not takes)
                if takes:
                    room[q] -= 1
                    self.unread[q].append(self.next + i)
                    got += 1
            served += got > 0
        assert good_ones == served
        self.next += n

    @rule(queue=st.integers(0, OUTPUTS), n=st.integers(1, SLOTS))
    def receive(self, queue: int, n: int) -> None:
        desc = ffi.new("rb_desc[]", n)
        got = good(lib.rb_recv(self.rx[queue], desc, n, 0))
        there = 0 if queue < OUTPUTS and self.paused[queue] else len(self.unread[queue])
        assert min(there, 1) <= got <= min(n, there)
        for i in range(got):
            number = self.unread[queue].pop(0)
            assert bytes(ffi.buffer(lib.rb_data(self.clusters[queue], desc + i), 64)) == self.packet(number)
            self.hand[queue].append((number, ffi.new("rb_desc *", desc[i])))

    @precondition(lambda self: any(self.hand))
    @rule(data=st.data())
    def give_back(self, data: Any) -> None:
        queue = data.draw(st.sampled_from([q for q in range(OUTPUTS + 1) if self.hand[q]]))
        number, desc = self.hand[queue].pop(data.draw(st.integers(0, len(self.hand[queue]) - 1)))
        cluster = self.clusters[queue]
        # Nobody wrote over what was in hand, whoever else gave it back meanwhile.
        assert bytes(ffi.buffer(lib.rb_data(cluster, desc), 64)) == self.packet(number)
        assert lib.rb_return(cluster, desc, 1) == 1
        assert lib.rb_return(cluster, desc, 1) == 0
        if queue == ON:
            self.sent_on -= 1

    @precondition(lambda self: self.hand[0])
    @rule()
    def send_on(self) -> None:
        self.service()
        number, desc = self.hand[0][0]
        moved = good(lib.rb_send(self.on, desc, 1, 0))
        assert moved == int(len(self.unread[ON]) < SLOTS and self.sent_on < CREDIT)
        if moved:
            self.hand[0].pop(0)
            self.unread[ON].append(number)
            self.sent_on += 1

    @rule(queue=st.integers(1, OUTPUTS - 1))
    def consumer_comes_anew(self, queue: int) -> None:
        self.hand[queue].clear()
        lib.rb_close(self.rx[queue])
        self.rx[queue] = self.open(self.clusters[queue], queue, lib.RB_RX)
        self.service()

    @rule(queue=st.integers(0, OUTPUTS - 1))
    def output_leaves_or_comes(self, queue: int) -> None:
        bit = self.bit[queue]
        if bit is None:
            self.bit[queue] = good(lib.rb_fan_add(self.fan, self.tx[queue]))
        else:
            good(lib.rb_fan_remove(self.fan, bit))
            self.bit[queue] = None

    @rule(queue=st.integers(0, OUTPUTS - 1))
    def pause_or_resume(self, queue: int) -> None:
        self.paused[queue] = not self.paused[queue]
        good(lib.rb_queue_pause(self.owner, queue, int(self.paused[queue])))
        self.service()

    @invariant()
    def ledger_agrees(self) -> None:
        self.service()
        info = ffi.new("rb_queue_info *")
        for queue in range(OUTPUTS):
            good(lib.rb_queue_get_info(self.owner, queue, info))
            assert info.lent == self.lent(queue)
            assert info.foreign == 0

    def teardown(self) -> None:
        for queue, held in enumerate(self.hand):
            for _, desc in held:
                lib.rb_return(self.clusters[queue], desc, 1)
        for queue in range(OUTPUTS):
            good(lib.rb_queue_pause(self.owner, queue, 0))
        self.service()
        desc = ffi.new("rb_desc[]", SLOTS)
        for queue in (ON, *range(OUTPUTS)):
            while got := good(lib.rb_recv(self.rx[queue], desc, SLOTS, 0)):
                lib.rb_return(self.clusters[queue], desc, got)
        self.service()
        books = ffi.new("rb_book_info[]", 8)
        count = lib.rb_book_list(self.owner, books, 8)
        out = sum(books[i].lent + books[i].shared for i in range(count))
        for cluster in (*self.clusters, self.owner):
            lib.rb_cluster_close(cluster)
        lib.rb_cluster_destroy(self.id, 1)
        self.patch.undo()
        shutil.rmtree(self.root, ignore_errors=True)
        assert out == 0


TestFan = FanMachine.TestCase
TestFan.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
