# SPDX-License-Identifier: Apache-2.0
"""``async for burst in rx``: packets come, others get their turn, and cancelling loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any


def lent(cluster: Any) -> int:
    cluster.service()
    return sum(book["lent"] for book in cluster.status()["books"])


def numbered(first: int, count: int) -> list[bytes]:
    return [i.to_bytes(4, "big").ljust(60, b"\0") for i in range(first, first + count)]


def test_packets_come_in_order_and_stop_ends_the_loop(cluster: Any, pair: Any) -> None:
    tx, rx = pair
    seen: list[int] = []

    async def consume() -> None:
        async for burst in rx:
            seen.extend(int.from_bytes(burst.copy(i)[:4], "big") for i in range(len(burst)))

    async def produce() -> None:
        for start in range(0, 5000, 50):
            left = numbered(start, 50)
            while left:
                del left[: tx.write(left)]
                await asyncio.sleep(0)
        while len(seen) < 5000:
            await asyncio.sleep(0)
            cluster.service()
        rx.stop()

    async def both() -> None:
        await asyncio.wait_for(asyncio.gather(consume(), produce()), 60)

    asyncio.run(both())
    assert seen == list(range(5000))
    assert lent(cluster) == 0


def test_cancelling_loses_no_packet(cluster: Any, pair: Any) -> None:
    tx, rx = pair
    seen: list[int] = []
    cancelled = 0

    async def consume() -> None:
        async for burst in rx:
            seen.extend(int.from_bytes(burst.copy(i)[:4], "big") for i in range(len(burst)))

    async def main() -> None:
        nonlocal cancelled
        sent = 0
        while sent < 3000:
            task = asyncio.ensure_future(consume())
            for turn in range(sent % 7 + 1):  # cancelled at another point each time
                sent += tx.write(numbered(sent, 10))
                await asyncio.sleep(0 if turn % 2 else 0.0002)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            cancelled += 1
        task = asyncio.ensure_future(consume())
        while len(seen) < sent:
            cluster.service()
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert seen == list(range(sent))

    asyncio.run(asyncio.wait_for(main(), 60))
    assert cancelled > 50
    rx.close()
    assert lent(cluster) == 0


def test_a_cancelled_step_loses_no_packet(cluster: Any, pair: Any) -> None:
    tx, rx = pair

    async def main() -> list[int]:
        seen: list[int] = []
        steps = rx.__aiter__()
        sent = turn = 0
        while len(seen) < 2000:
            turn += 1
            if sent < 2000:
                sent += tx.write(numbered(sent, min(20, 2000 - sent)))
            cluster.service()
            step = asyncio.ensure_future(steps.__anext__())
            await asyncio.sleep(0)
            if turn % 3:
                step.cancel()
            try:
                burst = await step
            except asyncio.CancelledError:
                continue
            seen.extend(int.from_bytes(burst.copy(i)[:4], "big") for i in range(len(burst)))
        return seen

    assert asyncio.run(asyncio.wait_for(main(), 60)) == list(range(2000))


def test_a_busy_queue_does_not_starve_other_tasks(cluster: Any) -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main() -> None:
        task = asyncio.ensure_future(others())
        bursts = 0
        with cluster.open_queue(0, "tx") as tx, cluster.open_queue(0, "rx") as rx:
            tx.write([b"x" * 60] * 256)
            async for burst in rx:
                tx.write([b"x" * 60] * len(burst))
                bursts += 1
                if bursts == 200:
                    break
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(main(), 60))
    assert turns >= 199


def test_an_idle_queue_costs_little_and_wakes_up(cluster: Any, pair: Any) -> None:
    import time

    tx, rx = pair

    async def main() -> float:
        waiting = asyncio.ensure_future(rx.__aiter__().__anext__())
        await asyncio.sleep(0.5)
        before = time.process_time()
        await asyncio.sleep(0.5)
        cost = time.process_time() - before
        assert not waiting.done()
        tx.write([b"late"])
        burst = await waiting
        assert burst.copy(0) == b"late"
        return cost

    assert asyncio.run(asyncio.wait_for(main(), 60)) < 0.4
