# SPDX-License-Identifier: Apache-2.0
"""``async for burst in rx``: receiving in an asyncio program."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from ._c import DESCRIPTORS, ffi
from .burst import Burst
from .end import _SLICE_MS, Ended
from .ends import BURST, Rx

_SLEEP_MOST = 0.001  # seconds, of asyncio's polling


async def _readable(fd: int) -> None:
    """Wait until a descriptor is readable."""
    loop = asyncio.get_running_loop()
    readable = loop.create_future()

    def ready() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(fd, ready)
    try:
        await readable
    finally:
        loop.remove_reader(fd)


class AsyncBursts(AsyncIterator[Burst]):
    """The iterator: no packet is taken before it can be handed out."""

    def __init__(self, rx: Rx) -> None:
        self._rx = rx
        self._burst: Burst | None = None

    async def __anext__(self) -> Burst:
        rx = self._rx
        if self._burst is not None:
            await asyncio.sleep(0)  # others' turn, however fast packets come
        previous, self._burst = self._burst, None
        desc = ffi.new(DESCRIPTORS, BURST)
        tries, delay, fd = 0, 0.0, -1
        while True:
            try:
                got = rx._take(desc, BURST, previous, 0)
                if got:
                    # Nothing is awaited between taking packets and handing them out: a cancelled loop loses none.
                    self._burst = Burst(rx, desc, got)
                    return self._burst
                if fd < 0:
                    rx._serve()
            except Ended:
                raise StopAsyncIteration from None
            except BaseException:
                rx._give_up(desc, BURST)
                raise
            previous = None
            if fd >= 0:
                await _readable(fd)  # taking nothing has set the bell
                continue
            tries += 1
            if tries > 32:
                if rx._slice > _SLICE_MS:  # the other side rings
                    fd = rx.fileno()
                    continue
                delay = min(max(2 * delay, 20e-6), _SLEEP_MOST)
            await asyncio.sleep(delay)
