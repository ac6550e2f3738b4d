# SPDX-License-Identifier: Apache-2.0
"""Bursts: packets as views that pin their buffers, arrays, select, send, release, and that no buffer is ever lost."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("_cffi_backend", reason="cffi is not installed")


def packet(i: int, size: int = 60) -> bytes:
    """A packet that says its number in every byte."""
    return bytes([i % 251]) * size


def lent(cluster: Any) -> int:
    """Buffers that the ledgers say are lent, after the lender has looked."""
    cluster.service()
    return sum(book["lent"] for book in cluster.status()["books"])


@pytest.fixture
def received(pair: Any) -> Iterator[Any]:
    """A burst of ten packets, numbered from 0."""
    tx, rx = pair
    assert tx.write(packet(i) for i in range(10)) == 10
    burst = rx.recv(timeout=5)
    assert len(burst) == 10
    yield burst
    burst.release()


@pytest.fixture(params=["numpy", "plain"])
def arrays(request: pytest.FixtureRequest, core: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """With numpy, and as where it is not installed."""
    import ringbar.burst

    if request.param == "numpy":
        pytest.importorskip("numpy")
    else:
        monkeypatch.setattr(ringbar.burst, "_numpy", None)
    return str(request.param)


# ---- views -----------------------------------------------------------------------------------------------------------


def test_a_view_is_the_packet_itself(pair: Any) -> None:
    tx, rx = pair
    out = tx.alloc(1)
    out[0][:5] = b"first"
    address = _address(out[0])
    out.lengths[0] = 5
    assert tx.send(out) == 1
    burst = rx.recv(timeout=5)
    assert bytes(burst[0]) == b"first"
    assert _address(burst[0]) % 4096 == address % 4096  # another mapping of the same place
    burst.release()


def _address(view: memoryview) -> int:
    from ringbar._c import ffi

    return int(ffi.cast("uintptr_t", ffi.from_buffer(view.obj)))


def test_views_are_read_only_unless_opened_writable(cluster: Any) -> None:
    with cluster.open_queue(0, "tx") as tx:
        with cluster.open_queue(0, "rx") as rx:
            tx.write([b"abc"])
            burst = rx.recv(timeout=5)
            with pytest.raises(TypeError):
                burst[0][0] = 1
            burst.release()
        with cluster.open_queue(0, "rx", writable=True) as rx:
            tx.write([b"abc"])
            burst = rx.recv(timeout=5)
            burst[0][0] = ord("x")
            assert burst.copy(0) == b"xbc"
            assert len(burst[0]) == 3
            burst.lengths[0] = 5
            assert len(burst[0]) == 5
            burst.release()
    assert lent(cluster) == 0


def test_indices_are_those_of_a_sequence(received: Any) -> None:
    assert bytes(received[-1]) == packet(9)
    assert [view[0] for view in received] == list(range(10))
    for index in (10, -11):
        with pytest.raises(IndexError):
            received[index]
    with pytest.raises(TypeError, match="select"):
        received[1:3]
    with pytest.raises(TypeError):
        received["0"]


@pytest.mark.parametrize("derive", ["view", "slice", "cast", "numpy"])
def test_a_view_pins_its_buffer_until_the_last_of_it_dies(cluster: Any, pair: Any, derive: str) -> None:
    tx, rx = pair
    tx.write(packet(i) for i in range(10))
    burst = rx.recv(timeout=5)
    view = burst[3]
    kept: Any = view
    if derive == "slice":
        kept = view[10:20]
    elif derive == "cast":
        kept = view.cast("I")
    elif derive == "numpy":
        kept = pytest.importorskip("numpy").frombuffer(view, "u1")[5:50:3]
    del view
    before = bytes(kept)
    burst.release()
    assert len(burst) == 0
    assert lent(cluster) == 1
    for round_ in range(100):  # every other buffer is used again and again
        assert tx.write([packet(100 + round_)] * 64, timeout=5) == 64
        while rx.count:
            rx.recv(timeout=5).release()
    assert bytes(kept) == before
    del kept
    assert lent(cluster) == 0


def test_a_view_that_died_before_the_burst_pins_nothing(cluster: Any, received: Any) -> None:
    received[3]
    view = received[4]
    view.release()
    received.release()
    assert lent(cluster) == 0


def test_two_views_of_one_packet_are_one_pin(cluster: Any, received: Any) -> None:
    first, second = received[2], received[2]
    received.release()
    assert lent(cluster) == 1
    del first
    assert lent(cluster) == 1
    del second
    assert lent(cluster) == 0


def test_views_are_capped(cluster: Any, monkeypatch: pytest.MonkeyPatch, received: Any) -> None:
    import ringbar.burst

    monkeypatch.setattr(ringbar.burst, "MAX_PINNED", 4)
    views = [received[i] for i in range(4)]
    with pytest.raises(BufferError, match="4 packets of 1@0"):
        received[5]
    assert bytes(received[0]) == packet(0)  # has a pin already
    del views[1]
    assert bytes(received[5]) == packet(5)
    views.clear()
    received.release()
    assert lent(cluster) == 0


def test_a_view_outlives_its_end_and_its_cluster(core: Any) -> None:
    import ringbar

    zc = ringbar.Cluster.create(5, buffers=8192, queues=1)
    with zc.open_queue(0, "tx") as tx, zc.open_queue(0, "rx") as rx:
        tx.write([packet(7)])
        burst = rx.recv(timeout=5)
        view = burst[0]
    assert rx.closed
    zc.close()
    assert zc.closed
    assert bytes(view) == packet(7)
    assert ringbar.clusters() == [5]  # it waits for the view
    del view, burst
    assert ringbar.clusters() == []


def test_views_may_die_in_any_thread(cluster: Any, pair: Any) -> None:
    tx, rx = pair
    views: list[Any] = []
    stop = threading.Event()

    def reap() -> None:
        while not stop.is_set() or views:
            if views:
                views.pop()

    thread = threading.Thread(target=reap)
    thread.start()
    try:
        for round_ in range(300):
            tx.write([packet(round_)] * 16, timeout=5)
            burst = rx.recv(timeout=5)
            views.extend(burst[i] for i in range(len(burst)))
            burst.release()
    finally:
        stop.set()
        thread.join()
    while rx.count:
        rx.recv().release()
    del burst
    gc.collect()
    assert not rx.pins
    assert lent(cluster) == 0


# ---- arrays ----------------------------------------------------------------------------------------------------------


def test_lengths_timestamps_handles_and_hashes(pair: Any, arrays: str) -> None:
    tx, rx = pair
    tx.write(packet(i, 60 + i) for i in range(10))
    burst = rx.recv(timeout=5)
    assert list(burst.lengths) == [60 + i for i in range(10)]
    assert len(burst.timestamps) == len(burst.hashes) == 10
    assert len(set(burst.handles)) == 10
    assert all(handle & 0xFFFFFF for handle in burst.handles)
    assert list(burst.hashes) == [0] * 10
    for array in (burst.lengths, burst.timestamps, burst.handles, burst.hashes):
        with pytest.raises((ValueError, TypeError)):
            array[0] = 1
    lengths = burst.lengths
    burst.release()
    assert list(lengths) == [60 + i for i in range(10)]  # an old array is never used again
    for array in (burst.lengths, burst.timestamps, burst.handles, burst.hashes):
        assert list(array) == []


def test_headers_are_zero_padded_copies(pair: Any, arrays: str) -> None:
    tx, rx = pair
    tx.write([b"abc", b"x" * 100])
    burst = rx.recv(timeout=5)
    headers = burst.headers(64)
    assert headers.shape == (2, 64)
    assert bytes(headers.tobytes()) == b"abc".ljust(64, b"\0") + b"x" * 64
    burst.release()
    assert headers[0, 1] == ord("b")
    assert len(burst.headers(64)) == 0


def test_lengths_of_allocated_packets_are_live(pair: Any, arrays: str) -> None:
    tx, rx = pair
    out = tx.alloc(8)
    assert list(out.lengths) == [0] * 8
    for i in range(len(out)):
        assert len(out[i]) > 1500
        out[i][:10] = packet(5 + i, 10)
        out.lengths[i] = i + 1
    assert out.copy(7) == packet(12, 8)
    assert out.headers(2).tobytes()[:4] == b"\5\0\6\6"  # as far as its length goes
    assert tx.send(out) == 8
    burst = rx.recv(timeout=5)
    assert list(burst.lengths) == list(range(1, 9))
    assert bytes(burst[7]) == packet(12, 8)
    burst.release()


def test_a_length_that_does_not_fit_is_refused_before_anything_moves(cluster: Any, pair: Any) -> None:
    import ringbar

    tx, _ = pair
    out = tx.alloc(4)
    room = len(out[2])
    for i in range(4):
        out.lengths[i] = 60
    for bad in (room + 1, 32768, 4_000_000_000):
        out.lengths[2] = bad
        with pytest.raises(ringbar.Error, match="packet 2") as refused:
            tx.send(out)
        assert refused.value.code == "too-long"
        assert str(room) in str(refused.value)
    out.lengths[2] = 0
    with pytest.raises(ringbar.Error, match="packet 2 is empty"):
        tx.send(out)
    out.lengths[2] = room
    assert len(out) == 4
    assert tx.send(out) == 4


# ---- select, send, release -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bool array", "list", "ints"])
def test_select_takes_packets_over(cluster: Any, received: Any, arrays: str, form: str) -> None:
    truth = [i % 3 == 0 for i in range(10)]
    mask: Any = truth
    if form == "bool array":
        mask = pytest.importorskip("numpy").array(truth)
    elif form == "ints":
        mask = [int(t) for t in truth]
    taken = received.select(mask)
    assert [taken.copy(i)[0] for i in range(len(taken))] == [0, 3, 6, 9]
    assert [received.copy(i)[0] for i in range(len(received))] == [1, 2, 4, 5, 7, 8]
    assert list(received.lengths) == [60] * 6
    received.release()
    assert lent(cluster) == 4
    assert taken.copy(1) == packet(3)
    del taken
    assert lent(cluster) == 0


def test_select_refuses_what_is_pinned_and_masks_that_do_not_fit(received: Any) -> None:
    view = received[3]
    with pytest.raises(BufferError, match="packet 3"):
        received.select([True] * 10)
    rest = received.select([i != 3 for i in range(10)])
    assert len(rest) == 9
    assert bytes(received[0]) == bytes(view)
    for mask in ([], [True] * 2, [True] * 11):
        with pytest.raises(ValueError, match="mask"):
            received.select(mask)


def test_a_pin_stays_with_its_packet_through_a_select(cluster: Any, received: Any) -> None:
    view = received[7]
    taken = received.select([i < 5 for i in range(10)])
    taken.release()
    received.release()
    assert lent(cluster) == 1
    assert bytes(view) == packet(7)
    del view
    assert lent(cluster) == 0


def test_send_refuses_what_is_pinned_and_loses_nothing(cluster: Any) -> None:
    with cluster.open_queue(0, "tx") as tx, cluster.open_queue(0, "rx") as rx, cluster.open_queue(1, "tx") as on:
        tx.write(packet(i) for i in range(5))
        burst = rx.recv(timeout=5)
        view = burst[4]
        with pytest.raises(BufferError, match="packet 4"):
            on.send(burst)
        assert len(burst) == 5
        view.release()
        assert on.send(burst) == 5
        assert len(burst) == 0
        with cluster.open_queue(1, "rx") as last:
            moved = last.recv(timeout=5)
            assert [moved.copy(i) for i in range(5)] == [packet(i) for i in range(5)]
            moved.release()
    assert lent(cluster) == 0


def test_what_is_refused_stays_in_order(cluster: Any, pair: Any) -> None:
    tx, rx = pair
    out = tx.alloc(300)
    assert len(out) == 300
    for i in range(300):
        out[i][:60] = packet(i)
        out.lengths[i] = 60
    assert tx.send(out) == 256
    assert len(out) == 44
    assert tx.full
    assert [out.copy(i)[0] for i in range(44)] == [(256 + i) % 251 for i in range(44)]
    assert list(out.lengths) == [60] * 44
    for _ in range(4):
        rx.recv(64).release()
    assert tx.send(out) == 44
    got = rx.recv(64)
    assert got.copy(0) == packet(256)
    got.release()
    assert lent(cluster) == 0


def test_refused_packets_released_unsent_are_counted_as_dropped(cluster: Any, pair: Any) -> None:
    tx, _ = pair
    out = tx.alloc(300)
    for i in range(300):
        out.lengths[i] = 60
    tx.send(out)
    assert tx.stats()["refused"] == 44
    assert cluster.queues[0].info()["drops"]["full"] == 0
    out.release()
    assert cluster.queues[0].info()["drops"]["full"] == 44


def test_packets_of_another_attachment_are_refused(pair: Any, cluster: Any) -> None:
    import ringbar

    tx, rx = pair
    tx.write([b"abc"])
    burst = rx.recv(timeout=5)
    with cluster.open_queue(1, "tx") as on:
        with pytest.raises(ringbar.Error, match="another attachment") as refused:
            on.send(burst)
        assert refused.value.cure
        assert on.write([burst.copy(0)]) == 1
    assert len(burst) == 1
    burst.release()


def test_the_loop_releases_all_but_what_was_taken(cluster: Any, pair: Any) -> None:
    tx, rx = pair
    tx.write(packet(i) for i in range(200))
    kept, seen = [], 0
    for burst in rx.bursts(timeout=0.01):
        if not burst:
            break
        seen += len(burst)
        kept.append(burst.select([i == 0 for i in range(len(burst))]))
    assert seen == 200
    assert lent(cluster) == len(kept) == 4
    assert [part.copy(0) for part in kept] == [packet(i) for i in (0, 64, 128, 192)]
    kept.clear()
    assert lent(cluster) == 0


def test_garbage_collection_releases(cluster: Any, pair: Any) -> None:
    tx, rx = pair
    tx.write(packet(i) for i in range(64))
    burst: Any = rx.recv(timeout=5)
    assert lent(cluster) == 64
    del burst
    assert lent(cluster) == 0
    for _ in range(1000):  # many times more than there are
        assert len(tx.alloc(100)) == 100


def test_a_released_burst_is_empty_and_again_is_nothing(cluster: Any, received: Any) -> None:
    with received as same:
        assert same is received
    assert not received
    received.release()
    with pytest.raises(IndexError):
        received[0]
    with pytest.raises(IndexError):
        received.copy(0)
    assert len(received.select([])) == 0
    assert lent(cluster) == 0


def test_closing_an_end_takes_its_packets_home(cluster: Any) -> None:
    import ringbar

    with cluster.open_queue(0, "tx") as tx, cluster.open_queue(0, "rx") as rx:
        tx.write(packet(i) for i in range(5))
        burst = rx.recv(timeout=5)
        out = tx.alloc(5)
    assert lent(cluster) == 0
    for dead in (burst, out):
        if len(dead):
            with pytest.raises(ringbar.Error, match="closed"):
                dead[0]
        dead.release()
    with cluster.open_queue(0, "tx") as tx, cluster.open_queue(0, "rx") as rx:
        assert tx.write([b"x"] * 64) == 64
        again = rx.recv(timeout=5)
        del burst, out  # must not give back what others hold now
        assert lent(cluster) == 64
        again.release()
    assert lent(cluster) == 0
