# SPDX-License-Identifier: Apache-2.0
"""Workers as Python objects: kinds, groups, functions of the user, changes while they run, names."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

QUEUES = 6


class World:
    """A producer on queue 0 (and 5), an attachment for the worker, consumers on 1 to 4."""

    def __init__(self, ringbar: Any, buffers: int = 8192) -> None:
        self.cluster = ringbar.Cluster.create(1, buffers=buffers)
        for number in range(QUEUES):
            self.cluster.create_queue(number, slots=256)
        self.own = ringbar.Cluster.attach(1)
        self.readers = ringbar.Cluster.attach(1)
        self.queues = self.own.queues
        self.tx = self.cluster.open_queue(0, "tx")
        self.rx = {n: self.readers.open_queue(n, "rx") for n in range(1, 5)}
        self.sent = 0
        self.got: dict[int, list[int]] = {n: [] for n in self.rx}

    def send(self, n: int) -> None:
        packets = []
        for i in range(self.sent, self.sent + n):
            head = bytes(12) + b"\x08\0\x45" + bytes(8) + b"\x11" + bytes(2) + i.to_bytes(4, "big") + bytes(4)
            packets.append(head + i.to_bytes(8, "big") + bytes(18))
        self.sent += n
        assert self.tx.write(packets, timeout=10) == n

    def drain(self) -> int:
        """Everything that has arrived so far: how many."""
        self.cluster.service()
        for number, rx in self.rx.items():
            burst = rx.recv(256, timeout=0)
            self.got[number] += [int.from_bytes(burst.copy(i)[34:42], "big") for i in range(len(burst))]
            burst.release()
        return sum(map(len, self.got.values()))

    def until(self, n: int) -> None:
        """n packets have arrived."""
        self.holds(lambda: self.drain() >= n)
        assert self.drain() == n

    def holds(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, self.got
            self.cluster.service()  # it answers consumers that have just come
            time.sleep(0.0005)

    def close(self) -> None:
        for cluster in (self.own, self.readers, self.cluster):
            cluster.close()


@pytest.fixture
def world(core: Any) -> Iterator[World]:
    import ringbar

    made = World(ringbar)
    yield made
    made.close()


def test_a_balancer_keeps_flows_together_and_tells_what_each_output_got(world: World) -> None:
    import ringbar

    with ringbar.Balancer(world.queues[0], world.queues[1:4]) as worker:
        for _ in range(3):
            world.send(50)
            world.sent -= 50  # the same flows again
        world.until(150)
        first = {i: n for n in world.got for i in world.got[n]}
        assert all(first[i] == n for n in world.got for i in world.got[n])
        stats = worker.stats()
        assert [output["packets"] for output in stats["outputs"]] == [len(world.got[n]) for n in (1, 2, 3)]
        assert stats["inputs"][0]["packets"] == stats["packets"] == 150
        assert 0 < stats["busy"] <= 1 and stats["packets_per_burst"] >= 1
    assert worker.stats()["packets"] == 150


def test_applications_each_get_everything(world: World) -> None:
    import ringbar

    q = world.queues
    for kind, outputs in ((ringbar.Balancer, [[q[1], q[2]], [q[3]]]), (ringbar.Fanout, [[q[1], q[2]], q[3]])):
        before = {n: len(found) for n, found in world.got.items()}
        with kind(q[0], outputs) as worker:
            world.send(100)
            world.until(sum(before.values()) + 200)
            shared, alone = world.got[1][before[1] :] + world.got[2][before[2] :], world.got[3][before[3] :]
            assert sorted(shared) == alone == list(range(world.sent - 100, world.sent))
            assert [o["group"] for o in worker.stats()["outputs"]] == [0, 0, 1]


def test_replicate_sends_one_input_out_of_several(world: World) -> None:
    import ringbar

    with ringbar.Replicate(world.queues[0], world.queues[1:5]):
        world.send(64)
        world.until(4 * 64)
    assert all(found == list(range(64)) for found in world.got.values())


def test_a_delay_and_a_pipeline(world: World) -> None:
    import ringbar

    q = world.cluster.queues
    with ringbar.Pipeline([(q[0], q[5]), ringbar.Delay(world.queues[5], world.queues[1], by=0.05)]) as pipeline:
        began = time.monotonic()
        world.send(20)
        world.until(20)
        assert time.monotonic() - began >= 0.05
        assert [stats["packets"] for stats in pipeline.stats()] == [20, 20]
        pipeline.pause()
        pipeline.resume()
        assert pipeline.running and not pipeline.wait(0)
        pipeline.workers[1].set(by=0)
        world.send(20)
        world.until(40)
    assert world.got[1] == list(range(40))
    assert not pipeline.running


def test_a_merge_waits_for_older_packets_only_so_long(world: World) -> None:
    import ringbar

    with ringbar.Merge([world.queues[0], world.queues[5]], world.queues[1], wait=0.01) as worker:
        world.send(30)
        world.until(30)
        worker.set(wait=3600)
        world.send(30)
        world.holds(lambda: bool(worker.stats()["held"] == 30))
        assert world.drain() == 30
        worker.set(inputs=[world.queues[0]])  # what waits goes on, and nothing has to any more
        world.until(60)
    assert world.got[1] == list(range(60))


# ---- functions of the user -----------------------------------------------------------------------------------


def test_a_function_in_python_chooses_for_whole_bursts(world: World) -> None:
    import ringbar

    seen: list[int] = []

    def even_odd_or_away(packets: Any) -> Any:
        last = packets.headers(42)[:, 41]
        assert len(packets) == len(packets.lengths) == len(packets.timestamps)
        assert bytes(packets[0])[41] == last[0]
        seen.append(len(packets))
        choice = (last & 1).astype(int)
        choice[last % 4 == 3] = -1
        return choice

    with ringbar.Balancer(world.queues[0], world.queues[1:3], policy=even_odd_or_away) as worker:
        world.send(100)
        world.until(75)
        assert sum(seen) == 100 > len(seen)
        assert worker.stats()["drops"]["filter"] == 25
    assert all(i % 2 == 0 for i in world.got[1]) and all(i % 4 == 1 for i in world.got[2])


def test_masks_of_a_function_in_python(world: World) -> None:
    import ringbar

    def masks(packets: Any) -> list[int]:
        return [packets[i][41] % 4 for i in range(len(packets))]

    with ringbar.Fanout(world.queues[0], world.queues[1:3], policy=masks):
        world.send(100)
        world.until(100)
    assert all(i % 4 in (1, 3) for i in world.got[1]) and all(i % 4 in (2, 3) for i in world.got[2])


@pytest.mark.parametrize("wrong", ["raises", "too few", "text"])
def test_a_function_that_fails_ends_the_worker_and_is_reported(world: World, wrong: str) -> None:
    import ringbar

    def choose(packets: Any) -> Any:
        if wrong == "raises":
            raise LookupError("no such flow")
        return [0] if wrong == "too few" else ["a"] * len(packets)

    worker = ringbar.Balancer(world.queues[0], world.queues[1:3], policy=choose).start()
    world.send(10)
    world.holds(lambda: not worker.running)
    with pytest.raises(ringbar.Error) as caught:
        worker.stop()
    assert caught.value.code == "worker-failed"
    assert caught.value.__cause__ is worker.failure is not None


def test_functions_in_c_by_pointer_and_by_name(world: World, tmp_path: Path, core: Any) -> None:
    import ringbar

    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    source = tmp_path / "mine.c"
    source.write_text(
        "#include <stdint.h>\n"
        "int choose(void *user, const void *desc, void *const *data, int n, uint64_t *choice)\n"
        "{\n"
        "    (void)user, (void)desc;\n"
        "    for (int i = 0; i < n; i++)\n"
        "        choice[i] = ((const uint8_t *)data[i])[41] & 1;\n"
        "    return 0;\n"
        "}\n"
    )
    library = tmp_path / "mine.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True, timeout=60)
    address = ctypes.cast(ctypes.CDLL(str(library)).choose, ctypes.c_void_p).value
    ways = [f"{library}:choose", address, core.ffi.cast("rb_choose", address), ctypes.CDLL(str(library)).choose]
    for turn, way in enumerate(ways, 1):
        with ringbar.Balancer(world.queues[0], world.queues[1:3], policy=way):
            world.send(40)
            world.until(40 * turn)
    assert all(i % 2 == 0 for i in world.got[1]) and len(world.got[2]) == 80
    with pytest.raises(ringbar.Error, match="no function nonsense"):
        ringbar.Balancer(world.queues[0], world.queues[1:3], policy=f"{library}:nonsense").start()


def test_numba_makes_a_policy_and_an_idle_function(world: World) -> None:
    import ringbar

    numba = pytest.importorskip("numba")
    idle = []

    @numba.cfunc("int32(voidptr, voidptr, CPointer(voidptr), int32, CPointer(uint64))")  # type: ignore[untyped-decorator]
    def odd_ones_apart(user: Any, desc: Any, data: Any, n: int, choice: Any) -> int:
        for i in range(n):
            choice[i] = numba.carray(data[i], (42,), numba.uint8)[41] & 1
        return 0

    with ringbar.Balancer(
        world.queues[0], world.queues[1:3], policy=odd_ones_apart, on_idle=lambda: idle.append(1)
    ) as worker:
        world.send(40)
        world.until(40)
        world.holds(lambda: bool(idle))
        assert worker.stats()["packets"] == 40
    # The last byte of a packet's number is its 42nd.
    assert [n % 2 for n in world.got[1]] == [0] * 20 and [n % 2 for n in world.got[2]] == [1] * 20


def test_two_dozen_workers_at_once_lose_nothing(core: Any) -> None:
    """A chain of 24 threads, each with a name; the last is a balancer."""
    import ringbar

    hops = 24
    world = World(ringbar, 16384)
    first = world.cluster.create_queue(10, slots=64, credit=128)
    for number in range(1, hops):
        world.cluster.create_queue(10 + number, slots=64, credit=128)
    with contextlib.closing(world), contextlib.ExitStack() as running:
        for hop in range(hops):
            handle = running.enter_context(ringbar.Cluster.attach(1))
            queues = {queue.id: queue for queue in handle.queues}
            source = queues[10 + hop]
            if hop < hops - 1:
                worker = ringbar.Bridge(source, queues[11 + hop], name=f"hop{hop:02}")
            else:
                worker = ringbar.Balancer(source, [queues[n] for n in (1, 2, 3, 4)], policy="rr", name=f"hop{hop:02}")
            running.enter_context(worker)
        assert sum(found["alive"] for found in ringbar.workers.list()) == hops
        tx = running.enter_context(world.cluster.open_queue(first, "tx"))
        world.tx, before = tx, world.tx
        for turn in range(1, 21):
            world.send(50)  # no more at once than a queue has room for
            world.until(50 * turn)
        world.tx = before
    assert sorted(n for found in world.got.values() for n in found) == list(range(1000))
    assert all(found == sorted(found) for found in world.got.values())


def test_the_idle_function_is_called(world: World) -> None:
    import ringbar

    calls: list[int] = []
    with ringbar.Bridge(world.queues[0], world.queues[1], on_idle=lambda: calls.append(1), idle="event"):
        world.holds(lambda: len(calls) > 3)
        world.send(5)
        world.until(5)


# ---- changed while they run ----------------------------------------------------------------------------------


def test_outputs_policy_weights_and_filter_change_while_it_runs(world: World) -> None:
    import ringbar

    q = world.queues
    with ringbar.Balancer(q[0], q[1], policy="rr") as worker:
        world.send(30)
        world.until(30)
        worker.set(outputs=["1@2", q[3]], weights=[2, 1])  # by address, too
        world.send(30)
        world.until(60)
        assert [len(world.got[n]) for n in (1, 2, 3)] == [30, 20, 10]
        assert q[1].id not in {o["address"] for o in worker.stats()["outputs"]}
        with ringbar.Cluster.attach(1) as other:  # an output that is no longer one is free for others
            other.open_queue(1, "tx").close()
        worker.set(filter="tcp")
        world.send(10)
        world.holds(lambda: bool(worker.stats()["drops"]["filter"] == 10))
        worker.set(filter=None)
        for wrong in ({"policy": "nonsense"}, {"outputs": ["1@77"]}, {"weights": [1]}, {"filter": "no such word"}):
            with pytest.raises(ringbar.Error):
                worker.set(**wrong)
        world.send(30)
        world.until(90)
        assert [len(world.got[n]) for n in (1, 2, 3)] == [30, 40, 20]


def test_a_filter_of_one_output_leaves_the_others_alone(world: World) -> None:
    import ringbar

    tx = world.own.open_queue(1, "tx")
    tx.filter = "ip[29] & 1 = 1"
    with ringbar.Fanout(world.own.open_queue(0, "rx"), [tx, world.queues[2]]) as worker:
        world.send(40)
        world.holds(lambda: world.drain() >= 40 and worker.stats()["packets"] == 40)
        outputs = worker.stats()["outputs"]
        assert [o["packets"] + o["drops"]["filter"] for o in outputs] == [40, 40]
        assert len(world.got[2]) == 40
        with worker.held():
            tx.filter = None
        with pytest.raises(ringbar.Error, match="worker"):
            tx.filter = "udp"
        before = len(world.got[1])
        world.send(40)
        world.holds(lambda: world.drain() > 0 and len(world.got[1]) - before == 40)


# ---- names ---------------------------------------------------------------------------------------------------


def test_a_named_worker_is_listed_and_its_name_is_its_own(world: World) -> None:
    import ringbar

    assert ringbar.workers.list() == []
    with ringbar.Balancer(world.queues[0], world.queues[1:3], "ip", name="edge") as worker:
        (found,) = ringbar.workers.list()
        assert (found["name"], found["kind"], found["policy"], found["alive"]) == ("edge", "balancer", "ip", True)
        world.send(20)
        world.until(20)
        world.holds(lambda: bool(ringbar.workers.read("edge")["stats"]["packets"] == 20))
        assert [p["address"] for p in ringbar.workers.read("edge")["outputs"]] == ["1@1", "1@2"]
        with ringbar.Cluster.attach(1) as other:
            queues = other.queues
            with pytest.raises(ringbar.Busy, match="edge"):
                ringbar.Bridge(queues[5], queues[4], name="edge").start()
        with pytest.raises(ringbar.Busy):
            ringbar.workers.forget("edge")
        with pytest.raises(ringbar.Error, match="cannot be the name"):
            ringbar.workers.read("../edge")
        worker.pause()
        world.holds(lambda: bool(ringbar.workers.read("edge")["stats"]["paused"]))
    with pytest.raises(ringbar.NotFound):
        ringbar.workers.read("edge")


def test_a_program_ends_well_with_a_worker_that_calls_python(world: World) -> None:
    """Nothing calls into an interpreter that is going away."""
    program = (
        "import ringbar\n"
        "zc = ringbar.Cluster.attach(1)\n"
        "worker = ringbar.Bridge(zc.queues[5], zc.queues[4], on_idle=lambda: None, name='last').start()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "wrong",
    [
        {"weights": [1]}, {"weights": [0, 1]}, {"policy": 1.5}, {"name": "x" * 40}, {"on_idle": "x"}, {"outputs": []},
        {"outputs": [7]},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(world: World, wrong: dict[str, Any]) -> None:
    import ringbar

    settings = {"inputs": world.queues[0], "outputs": world.queues[1:3], **wrong}
    with pytest.raises(ringbar.Error):
        ringbar.Balancer(**settings)


def test_a_pulse_is_a_clock(core: Any) -> None:
    import ringbar

    with ringbar.Pulse(1e-3) as pulse:
        first = pulse.now()
        deadline = time.monotonic() + 10
        while pulse.now() == first:
            assert time.monotonic() < deadline
    assert abs(ringbar.Pulse.now() - time.time_ns()) < 60e9
    for wrong in (0, 2, "x"):
        with pytest.raises(ringbar.Error):
            ringbar.Pulse(wrong)  # type: ignore[arg-type]
