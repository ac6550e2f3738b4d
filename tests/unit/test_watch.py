# SPDX-License-Identifier: Apache-2.0
"""How the agent's watcher ends what it has begun."""

from __future__ import annotations

import asyncio

import pytest

watch = pytest.importorskip("ringbar.host.agent.watch", reason="the agent's packages are not installed")


def test_a_task_that_forgets_its_cancellation_is_ended_all_the_same() -> None:
    async def forgets() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(60)

    async def fails() -> None:
        raise ValueError

    async def ended() -> bool:
        tasks = [asyncio.ensure_future(forgets()), asyncio.ensure_future(fails())]
        await asyncio.sleep(0)
        await asyncio.wait_for(watch._end_all(*tasks), 20)
        return all(task.done() for task in tasks)

    assert asyncio.run(ended())
