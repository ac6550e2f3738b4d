# SPDX-License-Identifier: Apache-2.0
"""What happened: every change with who asked for it (the audit), and what befell VMs. Kept, followed, logged."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

KEPT = 10_000
"""Events that are kept in memory, and after a restart read again."""
FILE_BYTES = 4 << 20
"""The file is begun anew, and the one before kept, when it is larger."""

log = logging.getLogger("ringbar.agent")


@dataclass
class Event:
    """Something that happened.

    :ivar sequence: counts up, also over restarts.
    :ivar kind: a stable word: ``cluster-created``, ``attached``, ``vm-ended``, ...
    :ivar subject: the cluster, queue, VM or file it is about.
    :ivar text: one sentence for people.
    :ivar by: who asked for it, ``uid 0 pid 812``; "" where nobody did.
    """

    sequence: int
    time_ns: int
    kind: str
    subject: str
    text: str
    by: str = ""
    details: dict[str, Any] = field(default_factory=dict)


class Journal:
    """Events, newest last. May be written from any thread; followed from the event loop it was given."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._events: deque[Event] = deque(self._read(), maxlen=KEPT)
        self._sequence = self._events[-1].sequence if self._events else 0
        self._file = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: set[asyncio.Event] = set()

    def _read(self) -> list[Event]:
        found = []
        for path in (self._path.with_suffix(".old"), self._path):
            with contextlib.suppress(OSError):
                for line in path.read_text(errors="replace").splitlines():
                    with contextlib.suppress(ValueError, TypeError):  # the last line of one that was killed
                        found.append(Event(**json.loads(line)))
        return found[-KEPT:]

    def follow_in(self, loop: asyncio.AbstractEventLoop) -> None:
        """Followers wait in this loop."""
        self._loop = loop

    def add(self, kind: str, subject: str, text: str, by: str = "", **details: Any) -> Event:
        """Write down an event: in memory, in the file, in the log."""
        with self._lock:
            self._sequence += 1
            event = Event(self._sequence, time.time_ns(), kind, subject, text, by, details)
            self._events.append(event)
            self._append(event)
        log.info(text, extra={"event": kind, "subject": subject, "by": by, "audit": bool(by)})
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)
        return event

    def _append(self, event: Event) -> None:
        try:
            with contextlib.suppress(FileNotFoundError):
                if self._path.stat().st_size > FILE_BYTES:
                    os.replace(self._path, self._path.with_suffix(".old"))
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
            try:
                os.write(fd, json.dumps(asdict(event)).encode() + b"\n")
            finally:
                os.close(fd)
        except OSError as e:  # a full disk stops no attach
            log.warning("the journal %s cannot be written: %s", self._path, e.strerror)

    def _wake(self) -> None:
        for waiting in self._waiting:
            waiting.set()

    def since(self, sequence: int) -> list[Event]:
        """Events after ``sequence``."""
        with self._lock:
            return [e for e in self._events if e.sequence > sequence]

    @property
    def last(self) -> int:
        """Sequence number of the newest event."""
        with self._lock:
            return self._sequence

    async def follow(self, sequence: int) -> AsyncIterator[Event]:
        """Events after ``sequence``, and then each as it comes."""
        news = asyncio.Event()
        self._waiting.add(news)
        try:
            while True:
                news.clear()
                for event in self.since(sequence):
                    sequence = event.sequence
                    yield event
                await news.wait()
        finally:
            self._waiting.discard(news)
