# SPDX-License-Identifier: Apache-2.0
"""VMs' lives: what one held is taken home when it ends, and it gets its queues back when it comes back. And the deaths
of workers.

Nothing is asked again and again: the kernel tells of the end of a process and of a socket that appears, QEMU and
libvirt of the rest. What is missed while the agent is not there is seen when it starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ringbar.errors import Error, NotFound
from ringbar.host import records, vms, working
from ringbar.host import wanted as shall
from ringbar.host.agent.journal import Journal
from ringbar.host.service import Host
from ringbar.qemu import libvirt, qmp, waiting
from ringbar.qemu.monitor import Events, Monitor

log = logging.getLogger("ringbar.agent")

EVENTS = ("RESET", "SHUTDOWN", "STOP", "RESUME")
BACK_TIMEOUT = 5.0
"""Seconds that a VM which boots is waited for. Then it is tried again, and others can have its monitor in between."""
AT_ONCE = 64
"""VMs that are attended to at the same time; each may wait for its guest."""
GLANCE = 0.1
"""Seconds from a worker's first sign to a look at it."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before trying again what failed."""


async def _end_all(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks, and again those that go on: before Python 3.12 ``asyncio.wait_for`` forgets a cancellation that
    comes together with its result, and whoever was connecting then listens for ever."""
    left: set[asyncio.Future[Any]] = set(tasks)
    while left:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=0.5)
        for task in done:
            if not task.cancelled():
                task.exception()  # looked at, or asyncio complains


class Watcher:
    """Follows every VM that has something, or shall have. Its own thread and event loop."""

    def __init__(self, host: Host, journal: Journal) -> None:
        self._host = host
        self._journal = journal
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._news: dict[str, asyncio.Event] = {}
        self._lent: dict[str, int] = {}
        self._listening: dict[str, Monitor] = {}
        self._opening: dict[str, asyncio.Lock] = {}
        self._said: dict[str, str] = {}
        self._working: dict[int, asyncio.Task[None]] = {}
        self._dead: set[tuple[str, int]] = set()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> None:
        """Begin with what is there."""
        vms.monitor_lent = self.lent
        self._thread.start()
        self.look()
        self._workers = asyncio.run_coroutine_threadsafe(self._follow_workers(), self._loop)

    def stop(self) -> None:
        """Follow nothing any more."""
        vms.monitor_lent = vms._nobody
        with contextlib.suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def look(self) -> None:
        """Something was attached or detached. May be called from any thread."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._look)

    @contextlib.contextmanager
    def lent(self, key: str) -> Iterator[None]:
        """Inside it, the VM's monitor is somebody else's in this process. From any thread but the watcher's own."""
        lending = asyncio.run_coroutine_threadsafe(self._lend(key), self._loop)
        try:
            lending.result(10)
            yield
        finally:
            self._loop.call_soon_threadsafe(self._give_back, key)

    # ---- in the loop

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_default_executor(ThreadPoolExecutor(AT_ONCE, "vm"))
        self._loop.run_forever()

    async def _end(self) -> None:
        self._workers.cancel()
        tasks = [*self._tasks.values(), *self._working.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _look(self) -> None:
        keys = {r.key for r in records.all_records()} | {w.key for w in shall.everything()}
        for key in self._tasks.keys() - keys:  # detached: nothing is waited for any more
            self._news[key].set()
        for key in keys:
            task = self._tasks.get(key)
            if task is None or task.done():
                self._news[key] = asyncio.Event()
                self._tasks[key] = self._loop.create_task(self._follow(key))
            else:
                self._news[key].set()

    async def _lend(self, key: str) -> None:
        self._lent[key] = self._lent.get(key, 0) + 1
        async with self._opening.setdefault(key, asyncio.Lock()):  # not while it is being connected to
            monitor = self._listening.pop(key, None)
            if monitor is not None:
                await monitor.close()

    def _give_back(self, key: str) -> None:
        self._lent[key] -= 1
        if not self._lent[key]:
            del self._lent[key]
            self._look()

    async def _follow(self, key: str) -> None:
        """One VM, as long as it has something or shall have."""
        pause = FIRST_PAUSE
        while True:
            self._news[key].clear()
            mine = [r for r in records.all_records() if r.key == key and r.state != "quarantined"]
            wanted = shall.find(key)
            missing = wanted is not None and set(wanted.shares) - {r.cluster for r in mine if r.state == "plugged"}
            try:
                if mine and not any(records.alive(r.identity) for r in mine):
                    await self._ended(mine[0].vm)
                elif wanted is not None and missing and not self._lent.get(key):
                    await self._give(wanted)
                    pause = FIRST_PAUSE
                elif mine:
                    await self._live(key, mine[0])
                else:
                    return
            except asyncio.CancelledError:
                raise
            except Exception as e:
                if not isinstance(e, Error):
                    log.exception("following %s", key)
                self._news[key].clear()  # our own having had its monitor is none
                await self._news_or(asyncio.sleep(pause), key)
                boots = isinstance(e, Error) and e.code == "guest-not-ready"
                pause = FIRST_PAUSE if boots else min(2 * pause, LONGEST_PAUSE)

    async def _news_or(self, other: Any, key: str) -> None:
        """Wait for either: something changed for this VM, or ``other``."""
        tasks = [asyncio.ensure_future(other), asyncio.ensure_future(self._news[key].wait())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await _end_all(*tasks)

    async def _ended(self, vm: str) -> None:
        for note in await asyncio.to_thread(self._host.reclaim):
            self._journal.add("vm-ended", vm, note)

    async def _give(self, wanted: shall.Wanted) -> None:
        """It shall have what it has not: when it runs."""
        try:
            done = await asyncio.to_thread(self._host.give_back, wanted, timeout=BACK_TIMEOUT)
        except NotFound as off:
            if off.code not in ("vm-off", "no-such-vm"):
                self._waits(wanted, f"{wanted.vm} does not get its queues back: {off}")
                raise
            self._said.pop(wanted.key, None)
            start = (
                waiting.domain_starts(wanted.uuid, wanted.uri)
                if wanted.uuid
                else waiting.socket_appears(wanted.vm.removeprefix("qmp:"))
            )
            await self._news_or(start, wanted.key)
            return
        except Error as e:
            self._waits(wanted, f"{wanted.vm} does not get its queues back yet: {e}")
            raise
        self._said.pop(wanted.key, None)
        for attachment in done.attachments:
            ends = ", ".join(b.queue for b in attachment.bindings)
            self._journal.add("vm-returned", wanted.vm, f"{wanted.vm} runs and has its queues: {ends}")

    def _waits(self, wanted: shall.Wanted, text: str) -> None:
        """One event for each reason, however often it is tried."""
        if self._said.get(wanted.key) != text:
            self._said[wanted.key] = text
            self._journal.add("vm-waits", wanted.vm, text)

    async def _live(self, key: str, record: records.Record) -> None:
        """Until it ends, or something changes; its events meanwhile."""
        pid, _, start = record.identity.partition(":")
        end = asyncio.ensure_future(waiting.process_ends(int(pid), int(start)))
        events = asyncio.ensure_future(self._events(key, record))
        try:
            await self._news_or(end, key)
        finally:
            await _end_all(end, events)

    async def _events(self, key: str, record: records.Record) -> None:
        """What QEMU says, again after libvirt was restarted. Without its monitor (somebody else has it) only the end
        of the process is seen."""
        pause = FIRST_PAUSE
        while not self._lent.get(key):
            if await self._listen(key, record):
                pause = FIRST_PAUSE
            elif not record.uuid:
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _listen(self, key: str, record: records.Record) -> bool:
        """As long as the session lasts; False: it could not be had."""
        async with self._opening.setdefault(key, asyncio.Lock()):
            if self._lent.get(key):
                return True
            try:
                monitor: Monitor
                if record.uuid:
                    monitor = await libvirt.Connection.open(record.uuid, record.uri)
                else:
                    monitor = await qmp.Connection.open(record.vm)
            except Error as e:
                log.info("no events of %s: %s", record.vm, e)
                return False
            self._listening[key] = monitor
        try:
            with monitor.events(*EVENTS) as events:
                hearing = asyncio.ensure_future(self._hear(key, record.vm, events))
                lapsing = asyncio.ensure_future(monitor.lapses())
                try:
                    done, _ = await asyncio.wait([hearing, lapsing], return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
                finally:
                    await _end_all(hearing, lapsing)
            log.info("libvirt was restarted: listening to %s anew", record.vm)
        except Error as e:
            log.info("no more events of %s: %s", record.vm, e)
        finally:
            if self._listening.get(key) is monitor:
                del self._listening[key]
            await monitor.close()
        return True

    async def _hear(self, key: str, vm: str, events: Events) -> None:
        while True:
            await self._event(key, vm, str((await events.get())["event"]))

    async def _event(self, key: str, vm: str, name: str) -> None:
        if name == "RESET":
            await asyncio.to_thread(self._host.vm_was_reset, key)
            self._journal.add("vm-reset", vm, f"{vm} was reset or rebooted: what its programs held was taken home")
        elif name == "SHUTDOWN":
            self._journal.add("vm-shutdown", vm, f"{vm} shuts down")
        elif name == "STOP":
            self._journal.add("vm-paused", vm, f"{vm} is paused: its queues fill, and nothing is lost that they hold")
        elif name == "RESUME":
            self._journal.add("vm-resumed", vm, f"{vm} goes on")

    # ---- workers

    async def _follow_workers(self) -> None:
        """Every worker that has a name, from its start to its end."""
        await self._look_at_workers(tell=False)  # those that died before
        while True:
            started = asyncio.ensure_future(waiting.socket_appears(str(records.run_directory() / "workers" / "*")))
            await asyncio.sleep(GLANCE)  # it watches by now, and a worker whose file is there has begun
            await self._look_at_workers()
            await started

    async def _look_at_workers(self, tell: bool = True) -> None:
        """Follow those that live; tell of those that are dead since the last look."""
        for worker in await asyncio.to_thread(working.workers):
            this = (worker.name, worker.pid)
            if worker.state != "dead":
                if worker.pid not in self._working:
                    self._working[worker.pid] = self._loop.create_task(self._worker_ends(worker.pid))
            elif this not in self._dead:
                self._dead.add(this)
                if tell:
                    text = f"worker {worker.name} (pid {worker.pid}) died after {worker.packets:,} packets"
                    self._journal.add("worker-died", worker.name, text)

    async def _worker_ends(self, pid: int) -> None:
        """One that was told to end leaves nothing behind, one that died its last counters."""
        start = records.start_time(pid)
        if start is not None:  # else it has ended already, or cannot be seen from here
            await waiting.process_ends(pid, start)
            del self._working[pid]
        await self._look_at_workers()
