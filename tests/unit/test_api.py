# SPDX-License-Identifier: Apache-2.0
"""The objects of ``import ringbar``: clusters, queues, ends, workers; what is refused, and how waiting ends."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("_cffi_backend", reason="cffi is not installed")


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked child; its exit status, 0 when nothing was raised."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll until it holds; fails after ten seconds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 10 s"
        time.sleep(0.001)


# ---- clusters and queues ---------------------------------------------------------------------------------------------


def test_version_is_that_of_the_core(core: Any) -> None:
    import ringbar

    assert ringbar.__version__ == core.text(core.lib.rb_version())
    assert ringbar.__version__.count(".") == 2
    assert set(ringbar.__all__) <= set(dir(ringbar))
    for name in ringbar.__all__:
        assert getattr(ringbar, name) is not None
    with pytest.raises(AttributeError):
        _ = ringbar.nonsense


def test_a_cluster_lives_with_its_maker(core: Any) -> None:
    import ringbar

    assert ringbar.clusters() == []
    with ringbar.Cluster.create(7, buffers=16384, queues=2, label="for eyes") as made:
        assert ringbar.clusters() == [7]
        info = made.info()
        assert (info["id"], info["label"], info["queues"], info["persistent"]) == (7, "for eyes", 2, False)
        assert info["owner_pid"] == os.getpid()
        assert str(os.getpid()) in info["lives"]
        with ringbar.Cluster.attach(7) as other:
            assert other.info()["generation"] == info["generation"]
            assert not other.is_guest
    assert made.closed
    assert ringbar.clusters() == []
    made.close()


def test_a_persistent_cluster_outlives_its_maker(core: Any) -> None:
    import ringbar

    ringbar.Cluster.create(7, buffers=8192, persistent=True).close()
    assert ringbar.clusters() == [7]
    with ringbar.Cluster.attach(7) as again:
        assert again.info()["lives"] == "until destroyed"
        again.destroy()
    assert ringbar.clusters() == []


def test_a_cluster_in_use_names_its_holder(cluster: Any) -> None:
    import ringbar

    with pytest.raises(ringbar.Busy) as busy:
        ringbar.Cluster.create(1)
    assert str(os.getpid()) in (busy.value.holder or "")
    assert busy.value.as_json()["code"]


def test_an_unknown_cluster_is_not_found_now_or_in_time(core: Any) -> None:
    import ringbar

    with pytest.raises(ringbar.NotFound) as absent:
        ringbar.Cluster.attach(42)
    assert "42" in absent.value.message
    start = time.monotonic()
    with pytest.raises(ringbar.NotFound):
        ringbar.Cluster.attach(42, timeout=0.2)
    assert 0.2 <= time.monotonic() - start < 5


@pytest.mark.parametrize("timeout", [30, None])
def test_attach_waits_until_the_cluster_exists(core: Any, timeout: float | None) -> None:
    import ringbar

    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(ringbar.Cluster.attach(8, timeout=timeout)))
    thread.start()
    with ringbar.Cluster.create(8, buffers=8192, queues=1):
        thread.join(30)
        assert found
        assert found[0].queues[0].address == "8@0"
        found[0].close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": -1}, {"id": 65536}, {"id": "99"}, {"id": None}, {"id": True}, {"id": 1.0}, {"size": 0}, {"size": 3000},
        {"size": 2**40}, {"size": "2048"}, {"buffers": -1}, {"buffers": 2**40}, {"queues": -1}, {"queues": 10**9},
        {"pages": "3M"}, {"pages": None}, {"numa": -2}, {"numa": 4000}, {"label": "x" * 32}, {"label": "a\0b"},
        {"label": 7}, {"persistent": True, "sealed": True},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_an_error_with_a_code(core: Any, wrong: dict[str, Any]) -> None:
    import ringbar

    with pytest.raises(ringbar.Error) as refused:
        ringbar.Cluster.create(**{"id": 9, "buffers": 8192, **wrong})
    assert refused.value.code
    assert refused.value.message
    assert ringbar.clusters() == []


def test_queues_are_made_found_paused_and_destroyed(cluster: Any) -> None:
    import ringbar

    made = cluster.create_queue(slots=16)
    assert (made.id, made.address, str(made)) == (2, "1@2", "1@2")
    assert cluster.create_queue(40, slots=64, credit=100).info()["credit"] == 100
    assert [queue.id for queue in cluster.queues] == [0, 1, 2, 40]
    assert made == cluster.queues[2]
    assert len({made, cluster.queues[2]}) == 1
    info = made.info()
    assert info["slots"] == 16
    assert info["producer"] is info["consumer"] is None
    assert info["path"] == "nobody → nobody"
    made.destroy()
    with pytest.raises(ringbar.NotFound):
        made.info()
    with pytest.raises(ringbar.Error, match="exists"):
        cluster.create_queue(0)
    with pytest.raises(ringbar.Error):
        cluster.create_queue(slots=100)
    for wrong in ({"slots": 0}, {"slots": "x"}, {"credit": 0}, {"credit": -1}, {"id": -1}, {"id": 2048}):
        with pytest.raises(ringbar.Error):
            cluster.create_queue(**wrong)
    assert [queue.id for queue in cluster.queues] == [0, 1, 40]


def test_a_paused_queue_delivers_nothing_and_drops_nothing(cluster: Any, pair: Any) -> None:
    tx, rx = pair
    queue = cluster.queues[0]
    queue.pause()
    assert queue.info()["paused"]
    cluster.service()
    assert tx.write([b"x"]) == 0
    assert len(rx.recv(timeout=0)) == 0
    queue.resume()
    cluster.service()
    assert tx.write([b"x"]) == 1
    rx.recv(timeout=5).release()


def test_status_is_json_and_names_who(cluster: Any, pair: Any) -> None:
    tx, rx = pair
    tx.write([b"x"] * 3)
    burst = rx.recv(2, timeout=5)
    status = json.loads(json.dumps(cluster.status()))
    queue = status["queues"][0]
    assert (queue["lent"], queue["held"], queue["waiting"]) == (3, 2, 1)
    assert queue["producer"]["pid"] == queue["consumer"]["pid"] == os.getpid()
    assert queue["path"].count(f"(pid {os.getpid()})") == 2
    assert queue["path"].count(" → ") == 1
    assert set(queue["drops"]) == {"full", "filter", "bad", "no_buffer", "credit", "gone"}
    assert {"granted", "credit", "quarantined", "foreign", "copied"} <= set(queue)
    assert status["cluster"]["id"] == 1
    assert status["books"][0]["lent"] == 3
    assert "quiescing" in status["books"][0]
    assert {"pool"} <= {segment["kind"] for segment in status["segments"]}
    burst.release()


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_an_end_has_one_holder_and_is_free_again_when_closed(cluster: Any) -> None:
    import ringbar

    with ringbar.Cluster.attach(1) as other:
        for mode in ("rx", "tx"):
            with cluster.open_queue(0, mode) as end:
                with pytest.raises(ringbar.Busy) as busy:
                    other.open_queue(0, mode)
                assert str(os.getpid()) in (busy.value.holder or "")
                assert busy.value.cure
                assert not end.closed
            assert end.closed
            other.open_queue(0, mode).close()


def test_queues_are_opened_by_number_address_and_object(cluster: Any) -> None:
    import ringbar

    for queue in (0, "1@0", "zc:1@0", cluster.queues[0]):
        with cluster.open_queue(queue, "rx") as rx:
            assert rx.address == "1@0"
    with cluster.open_device("zc:1@0", "rx") as rx:
        assert rx.address == "1@0"
    with pytest.raises(ringbar.NotFound):
        cluster.open_queue(5, "rx")
    with pytest.raises(ringbar.BadAddress, match="another cluster"):
        cluster.open_queue("2@0", "rx")
    for bad in ("x", "1@0-1", "eth1", "", "1@"):
        with pytest.raises(ringbar.BadAddress):
            cluster.open_queue(bad, "rx")
    for wrong in (-1, 2048, None, 1.5):
        with pytest.raises(ringbar.Error):
            cluster.open_queue(wrong, "rx")
    for mode in ("", "both", None):
        with pytest.raises(ringbar.Error, match="rx"):
            cluster.open_queue(0, mode)
    with pytest.raises(ringbar.BadAddress):
        cluster.open_device("1", "rx")
    with pytest.raises(ringbar.Error, match="xdp"):
        cluster.open_device("zc:lo", "rx", xdp="native")


def test_a_closed_end_says_so(cluster: Any) -> None:
    import ringbar

    rx, tx = cluster.open_queue(0, "rx"), cluster.open_queue(0, "tx")
    rx.close()
    tx.close()
    rx.close()
    calls: list[Callable[[], Any]] = [
        lambda: rx.recv(timeout=0), lambda: list(rx), rx.fileno, rx.stats, lambda: rx.count, lambda: tx.alloc(1),
        lambda: tx.write([b"x"]),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ringbar.Error, match="closed"):
            call()
    cluster.close()
    for call in [*calls, cluster.status, cluster.service, lambda: cluster.open_queue(0, "rx"), lambda: cluster.queues]:
        with pytest.raises(ringbar.Error, match="closed"):
            call()


def test_timeouts_are_kept(cluster: Any, pair: Any) -> None:
    import ringbar

    tx, rx = pair
    for timeout in (0, 0.15):
        start = time.monotonic()
        assert len(rx.recv(timeout=timeout)) == 0
        assert timeout <= time.monotonic() - start < timeout + 5
    empty = next(iter(rx.bursts(timeout=0.01)))
    assert len(empty) == 0
    assert list(empty.lengths) == []
    assert tx.write([b"x"] * 400, timeout=0.1) == 256
    out = tx.alloc(1)
    out.lengths[0] = 60
    assert tx.send(out, timeout=0.05) == 0
    for wrong in (-1, float("nan"), "1"):
        for call in (rx.recv, rx.bursts):
            with pytest.raises(ringbar.Error, match="timeout"):
                call(timeout=wrong)
    for wrong_size in (0, -1, 10**6, "x"):
        with pytest.raises(ringbar.Error):
            rx.recv(wrong_size)


def test_a_blocked_sender_goes_on_when_there_is_room(cluster: Any, pair: Any) -> None:
    tx, rx = pair
    total = 3000
    seen: list[int] = []

    def consume() -> None:
        for burst in rx:
            seen.extend(int.from_bytes(burst.copy(i), "big") for i in range(len(burst)))
            if len(seen) == total:
                return

    thread = threading.Thread(target=consume)
    thread.start()
    assert tx.write((i.to_bytes(4, "big") for i in range(total)), timeout=None) == total
    thread.join(30)
    assert seen == list(range(total))


@pytest.mark.parametrize("how", ["stop", "close"])
@pytest.mark.parametrize("waiting", ["loop", "recv"])
def test_another_thread_ends_a_wait(cluster: Any, pair: Any, how: str, waiting: str) -> None:
    _, rx = pair
    ended: list[str] = []

    def wait() -> None:
        if waiting == "loop":
            for _burst in rx:
                raise AssertionError("nothing was sent")
            ended.append("loop")
        else:
            try:
                rx.recv()
            except EOFError:
                ended.append("recv")

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: rx._waiting.locked())
    getattr(rx, how)()
    thread.join(10)
    assert ended == [waiting]


def test_stop_lasts_until_reopened(cluster: Any, pair: Any) -> None:
    tx, rx = pair
    tx.write([b"x"])
    rx.stop()
    assert list(rx) == []
    with pytest.raises(EOFError, match="stopped"):
        rx.recv()
    rx.reopen(timeout=5)
    cluster.service()
    burst = rx.recv(timeout=5)
    assert burst.copy(0) == b"x"  # what was unread stayed
    burst.release()


def test_stop_may_be_called_by_a_signal_handler(cluster: Any, pair: Any) -> None:
    _, rx = pair
    previous = signal.signal(signal.SIGALRM, lambda *_: rx.stop())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assert list(rx) == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_an_interrupt_at_any_point_loses_nothing(cluster: Any, pair: Any) -> None:
    tx, rx = pair
    armed = False

    def interrupt(*_: object) -> None:
        nonlocal armed
        if armed:  # only where a program would meet it, and once
            armed = False
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    received = interrupts = 0
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.000_731)
        while interrupts < 100:
            out = tx.alloc(2)
            for i in range(len(out)):
                out.lengths[i] = 60
            burst = None
            try:
                armed = True
                tx.send(out)
                burst = rx.recv(timeout=0.002)
                armed = False
            except KeyboardInterrupt:
                interrupts += 1
            out.release()
            if burst is not None:
                received += len(burst)
                burst.release()
            cluster.service()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert received > 0
    while rx.recv(timeout=0):
        pass
    cluster.service()
    assert sum(book["lent"] for book in cluster.status()["books"]) == 0
    assert len(tx.alloc(300)) == 300


def test_waiting_lets_other_threads_run(cluster: Any, pair: Any) -> None:
    _, rx = pair
    thread = threading.Thread(target=lambda: list(rx))
    thread.start()
    wait_until(lambda: rx._waiting.locked())
    turns, start = 0, time.process_time()
    while time.process_time() - start < 0.2:
        turns += 1
    assert thread.is_alive()
    assert turns > 1000
    rx.stop()
    thread.join(10)


def test_many_threads_take_turns_on_one_cluster(cluster: Any) -> None:
    errors: list[BaseException] = []

    def move(queue: int) -> None:
        try:
            with cluster.open_queue(queue, "tx") as tx, cluster.open_queue(queue, "rx") as rx:
                for round_ in range(200):
                    assert tx.write([bytes([round_])] * 16, timeout=10) == 16
                    got = 0
                    while got < 16:
                        burst = rx.recv(timeout=10)
                        assert {burst.copy(i) for i in range(len(burst))} <= {bytes([round_])}
                        got += len(burst)
                        burst.release()
        except BaseException as problem:
            errors.append(problem)

    threads = [threading.Thread(target=move, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert sum(book["lent"] for book in cluster.status()["books"]) == 0


def test_destroying_the_cluster_ends_loops(core: Any) -> None:
    import ringbar

    made = ringbar.Cluster.create(3, buffers=8192, queues=1)
    other = ringbar.Cluster.attach(3)
    rx = other.open_queue(0, "rx")
    ended = threading.Event()

    def consume() -> None:
        for _burst in rx:
            pass
        ended.set()

    thread = threading.Thread(target=consume)
    thread.start()
    wait_until(lambda: rx._waiting.locked())
    made.destroy(force=True)
    thread.join(10)
    assert ended.is_set()
    with pytest.raises(EOFError, match="destroyed"):
        rx.recv(timeout=0)
    other.close()
    assert ringbar.clusters() == []


def test_sending_into_a_destroyed_cluster_is_detached(core: Any) -> None:
    import ringbar

    with ringbar.Cluster.create(3, buffers=8192, queues=1) as made, ringbar.Cluster.attach(3) as other:
        tx = other.open_queue(0, "tx")
        out = tx.alloc(4)
        made.destroy(force=True)
        for i in range(4):
            out.lengths[i] = 60
        with pytest.raises(ringbar.Detached):
            tx.send(out)
        assert len(out) == 4


def test_after_a_fork_everything_says_so_and_the_parent_goes_on(cluster: Any, pair: Any) -> None:
    import ringbar

    tx, rx = pair
    tx.write([b"x"] * 2)
    burst = rx.recv(1, timeout=5)
    view = burst[0]

    def child() -> None:
        for call in (
            cluster.status,
            lambda: rx.recv(timeout=0),
            lambda: tx.alloc(1),
            lambda: list(rx),
            lambda: burst.copy(0),
        ):
            with pytest.raises(ringbar.Error, match="fork") as dead:
                call()
            assert dead.value.code == "forked"
            assert "attach" in (dead.value.cure or "")
        rx.close()
        burst.release()
        cluster.close()
        with ringbar.Cluster.attach(1) as own:
            assert own.queues[0].info()["consumer"]["pid"] == os.getppid()

    assert in_child(child) == 0
    assert bytes(view) == b"x"
    del view
    burst.release()
    assert len(rx.recv(timeout=5)) == 1
    assert tx.write([b"x"]) == 1


def test_a_program_that_just_ends_leaves_nothing(core: Any, private_directories: Path) -> None:
    import ringbar

    program = (
        "import ringbar\n"
        "zc = ringbar.Cluster.create(4, buffers=8192, queues=1)\n"
        "tx, rx = zc.open_queue(0, 'tx'), zc.open_queue(0, 'rx')\n"
        "tx.write([b'x'] * 10)\n"
        "burst = rx.recv(timeout=5)\n"
        "print(len(burst))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "10\n", "")
    assert list((private_directories / "shm").iterdir()) == []
    assert ringbar.clusters() == []


def test_counters_and_looking(cluster: Any, pair: Any) -> None:
    import select

    tx, rx = pair
    assert rx.empty
    assert tx.write([b"x" * 60] * 256) == 256
    assert tx.full
    assert (tx.count, rx.count) == (256, 256)
    readable, _, _ = select.select([rx], [], [], 5)
    assert readable == [rx]
    rx.recv(64, timeout=5).release()
    stats = rx.stats()
    assert (stats["packets"], stats["bytes"], stats["mode"]) == (64, 64 * 60, "loan")
    assert stats["drops"] == dict.fromkeys(("full", "filter", "bad", "no_buffer", "credit", "gone"), 0)
    assert abs(rx.clock - time.time_ns()) < 10**10
    assert "1@0" in repr(rx)


def test_packets_longer_than_a_buffer_are_refused(pair: Any) -> None:
    import ringbar

    tx, rx = pair
    with pytest.raises(ringbar.Error, match="does not fit") as refused:
        tx.write([b"fine", b"x" * 2049])
    assert refused.value.cure
    with pytest.raises(TypeError):
        tx.write(["text"])
    assert tx.write([bytearray(b"a"), memoryview(b"bc"), b""[:0] or b"d"]) == 3
    burst = rx.recv(timeout=5)
    assert [burst.copy(i) for i in range(len(burst))] == [b"a", b"bc", b"d"]
    burst.release()


# ---- workers ---------------------------------------------------------------------------------------------------------


def test_a_bridge_moves_packets_and_owns_its_attachment(cluster: Any) -> None:
    import ringbar

    with ringbar.Cluster.attach(1) as middle, ringbar.Cluster.attach(1) as last:
        with cluster.open_queue(0, "tx") as tx, last.open_queue(1, "rx") as rx:
            bridge = ringbar.Bridge(middle.queues[0], middle.queues[1], packets=1000)
            assert not bridge.running
            with bridge:
                with pytest.raises(ringbar.Error) as owned:
                    middle.status()
                assert owned.value.code == "worker-owns"
                assert owned.value.cure
                with pytest.raises(ringbar.Error, match="runs already"):
                    bridge.start()
                seen: list[int] = []

                def consume() -> None:
                    while len(seen) < 1000:
                        burst = rx.recv(timeout=10)
                        if not burst:
                            return
                        seen.extend(int.from_bytes(burst.copy(i), "big") for i in range(len(burst)))
                        burst.release()

                thread = threading.Thread(target=consume)
                thread.start()
                for start in range(0, 1000, 100):  # never more than fit: a worker drops
                    assert tx.write((i.to_bytes(4, "big") for i in range(start, start + 100)), timeout=20) == 100
                    while len(seen) < start + 100:
                        cluster.service()
                        thread.join(0.001)
                        assert thread.is_alive() or len(seen) == 1000
                thread.join(10)
                assert seen == list(range(1000))
                assert bridge.wait(10)
            assert bridge.stats()["packets"] == 1000
            assert bridge.stats()["dropped"] == 0
            assert not bridge.running
            assert middle.queues[0].info()["consumer"] is None  # opened by the bridge, closed by it


def test_a_bridge_pauses(cluster: Any) -> None:
    import ringbar

    with ringbar.Cluster.attach(1) as middle, cluster.open_queue(0, "tx") as tx:
        bridge = ringbar.Bridge(middle.open_queue(0, "rx"), middle.open_queue(1, "tx"))
        with pytest.raises(ringbar.Error, match="does not run"):
            bridge.pause()
        with bridge:
            bridge.pause()
            tx.write([b"x"] * 10)
            cluster.service()
            assert bridge.stats()["packets"] == 0
            bridge.resume()

            def moved() -> bool:
                cluster.service()
                return bool(bridge.stats()["packets"] == 10)

            wait_until(moved)
        assert bridge.stop()["packets"] == 10


@pytest.mark.parametrize(
    "wrong",
    [{"idle": "lazy"}, {"burst": 0}, {"burst": 257}, {"core": -1}, {"packets": 0}, {"core": "x"}],
)
def test_settings_of_workers_are_checked(cluster: Any, wrong: dict[str, Any]) -> None:
    import ringbar

    with pytest.raises(ringbar.Error):
        ringbar.Bridge(cluster.queues[0], cluster.queues[1], **wrong)


def test_a_bridge_checks_its_ends(cluster: Any) -> None:
    import ringbar

    with pytest.raises(ringbar.Error, match="one for each"):
        ringbar.Bridge(cluster.queues, cluster.queues[0])
    with ringbar.Cluster.attach(1) as other:
        with pytest.raises(ringbar.Error, match="one Cluster"):
            ringbar.Bridge(cluster.queues[0], other.queues[1]).start()
        assert cluster.queues[0].info()["consumer"] is None
        with pytest.raises(ringbar.Error, match="Rx or Queue"):
            ringbar.Bridge([cluster.open_queue(0, "tx")], [other.queues[1]]).start()


def test_closing_the_cluster_stops_its_worker(core: Any) -> None:
    import ringbar

    zc = ringbar.Cluster.create(6, buffers=16384, queues=2)
    bridge = ringbar.Bridge(zc.queues[0], zc.queues[1]).start()
    assert bridge.running
    zc.close()
    assert not bridge.running
    assert ringbar.clusters() == []


def test_a_flow_proves_what_arrives(cluster: Any) -> None:
    import ringbar

    with ringbar.Cluster.attach(1) as other:
        flow = ringbar.Flow(cluster.queues[0], other.queues[0], packets=20_000, size=100, flows=3, window=200)
        stats = flow.run(30)
    assert (stats["sent"], stats["received"]) == (20_000, 20_000)
    assert [stats[fault] for fault in ("lost", "reordered", "duplicated", "corrupted", "foreign")] == [0] * 5
    assert stats["latency_ns"]["min"] <= stats["latency_ns"]["median"] <= stats["latency_ns"]["max"]
    json.dumps(stats)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 73},
        {"size": 40_000},
        {"pps": 0},
        {"pps": "x"},
        {"src_ip": "x"},
        {"dst_mac": "02:00"},
        {"port": 0},
        {"window": 0},
    ],
)
def test_settings_of_flows_are_checked(cluster: Any, wrong: dict[str, Any]) -> None:
    import ringbar

    with pytest.raises(ringbar.Error):
        ringbar.Flow(cluster.queues[0], **wrong)
    with pytest.raises(ringbar.Error, match="needs an end"):
        ringbar.Flow()


def test_a_cluster_of_a_vms_own_cannot_hide_one_of_its_host(
    core: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ringbar
    from ringbar import attach

    monkeypatch.setattr(attach, "plugged_clusters", lambda: [1])
    with pytest.raises(ringbar.Error, match="cluster 1 of the host is attached to this VM") as caught:
        ringbar.Cluster.create(1, buffers=8192)
    assert caught.value.code == "would-hide"
    ringbar.Cluster.create(2, buffers=8192).close()


# ---- what cffi is told -----------------------------------------------------------------------------------------------


def test_the_header_is_read_strictly() -> None:
    pytest.importorskip("cffi", reason="cffi is not installed")
    build = runpy.run_path(str(Path(__file__).parents[2] / "shared" / "ringbar" / "_build_cffi.py"))
    text = """
    #ifndef X_H
    #define X_H
    #include <stdint.h>
    #ifdef __cplusplus
    extern "C" {
    #endif
    #define X_SIZE 64u  /* bytes */
    // a line
    RB_API int f(int n); /* a { brace */
    static inline int g(int n) { if (n) { return 1; } return 0; }
    #ifdef __cplusplus
    }
    #endif
    #endif
    """
    found = " ".join(build["declarations"](text).split())
    assert found == "#define X_SIZE 64 int f(int n); int g(int n);"
    for bad in (
        "#if 1\nint a;\n#endif", "#define F(x) x", "#pragma once", "#ifndef A", "#endif", "extern int a;",
        "static inline int g(void) {", "int a __attribute__((aligned(8)));", "#define A B",
    ):  # fmt: skip
        with pytest.raises(build["HeaderError"]):
            build["declarations"](bad)
