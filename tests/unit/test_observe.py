# SPDX-License-Identifier: Apache-2.0
"""Observing a queue: copies for a capture, nothing taken away from the consumer."""

from __future__ import annotations

import pytest

from ringbar import Cluster
from ringbar.errors import Busy, Error

pytestmark = pytest.mark.usefixtures("core")


def settle(zc: Cluster, *others: Cluster) -> None:
    for cluster in (zc, *others):
        cluster.service()


def test_the_observer_gets_copies_and_the_consumer_gets_everything() -> None:
    with Cluster.create(31, buffers=4096, queues=0) as zc, Cluster.attach(31) as watch:
        zc.create_queue(slots=64)
        with zc.open_queue(0, "tx") as tx, zc.open_queue(0, "rx") as rx:
            with watch.observe(0, slots=64) as copies:
                settle(zc, watch)
                sent = [bytes([i]) * 60 for i in range(40)]
                assert tx.write(sent) == 40
                got = rx.recv(64, 1.0)
                assert [bytes(packet) for packet in got] == sent
                seen = copies.recv(64, 1.0)
                assert [bytes(packet) for packet in seen] == sent
                assert not set(got.handles.tolist()) & set(seen.handles.tolist())
                got.release()
                seen.release()
                settle(zc, watch)
            tx.write([b"x" * 60])
            assert len(rx.recv(64, 1.0)) == 1
        assert [q.id for q in zc.queues] == [0]


def test_a_slow_observer_costs_only_itself() -> None:
    with Cluster.create(32, buffers=4096, queues=0) as zc, Cluster.attach(32) as watch:
        zc.create_queue(slots=64)
        with zc.open_queue(0, "tx") as tx, zc.open_queue(0, "rx") as rx, watch.observe(0, slots=8) as copies:
            settle(zc, watch)
            for _ in range(20):
                assert tx.write([b"y" * 60] * 32) == 32
                assert len(rx.recv(64, 1.0)) == 32
            assert len(copies.recv(64, 1.0)) == 8
            info = next(q for q in zc.status()["queues"] if q["id"] != 0)
            assert info["drops"]["full"] == 20 * 32 - 8


def test_a_queue_is_observed_once_and_exists() -> None:
    with Cluster.create(33, buffers=4096, queues=0) as zc, Cluster.attach(33) as watch:
        zc.create_queue(slots=64)
        with watch.observe(0, slots=8), pytest.raises(Busy, match="observed already"), watch.observe(0, slots=8):
            pass
        with pytest.raises(Error, match="no queue 33@7"), watch.observe(7, slots=8):
            pass
        assert [q.id for q in zc.queues] == [0]
