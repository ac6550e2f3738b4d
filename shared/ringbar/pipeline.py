# SPDX-License-Identifier: Apache-2.0
"""Chains of workers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .cluster import Cluster, Queue
from .errors import Error
from .kinds import Bridge
from .workers import Worker

if TYPE_CHECKING:
    from types import TracebackType

    Self = TypeVar("Self", bound="Pipeline")


class Pipeline:
    """A chain of workers, each a thread, started and stopped together: ``Pipeline([(q0, q1), (q1, q2)])``.

    A stage is a worker, or a pair of queues for a bridge between them with an attachment of its own.
    """

    def __init__(self, stages: Iterable[Worker | tuple[Queue, Queue]], **options: Any) -> None:
        """
        :param stages: in the order in which packets pass them.
        :param options: of the bridges that pairs become: see :class:`Bridge`.
        """
        self.workers: list[Worker] = []
        self._attached: list[Cluster] = []
        try:
            for stage in stages:
                self.workers.append(stage if isinstance(stage, Worker) else self._bridge(stage, options))
        except BaseException:
            self._detach()
            raise
        if not self.workers:
            raise Error("a pipeline needs a stage", code="bad-value")

    def _bridge(self, stage: Any, options: dict[str, Any]) -> Bridge:
        if not (isinstance(stage, Sequence) and len(stage) == 2 and all(isinstance(q, Queue) for q in stage)):
            raise Error(f"a stage is a worker or a pair of queues, not {stage!r}", code="bad-value")
        own = Cluster.attach(stage[0].cluster.id)
        self._attached.append(own)
        return Bridge(Queue(own, stage[0].id), Queue(own, stage[1].id), **options)

    def _detach(self) -> None:
        for cluster in self._attached:
            cluster.close()
        self._attached.clear()

    def start(self: Self) -> Self:
        """Start the last stage first: nothing that one sends on finds the next not there."""
        started: list[Worker] = []
        try:
            for worker in reversed(self.workers):
                started.append(worker.start())
        except BaseException:
            for worker in started:
                with contextlib.suppress(Error):
                    worker.stop()
            raise
        return self

    def stop(self) -> list[dict[str, Any]]:
        """Stop the first stage first. The last counters of each.

        :raises Error: a stage had ended with an error; the others are stopped all the same.
        """
        problem: Error | None = None
        for worker in self.workers:
            try:
                worker.stop()
            except Error as found:
                problem = problem or found
        if problem is not None:
            raise problem
        return self.stats()

    def pause(self) -> None:
        """Have all stand still until :meth:`resume`."""
        for worker in self.workers:
            worker.pause()

    def resume(self) -> None:
        """Go on."""
        for worker in reversed(self.workers):
            worker.resume()

    def stats(self) -> list[dict[str, Any]]:
        """Counters of each stage."""
        return [worker.stats() for worker in self.workers]

    @property
    def running(self) -> bool:
        """Whether all stages are."""
        return all(worker.running for worker in self.workers)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until a stage has ended.

        :param timeout: seconds; None = without end.
        :returns: whether one has.
        """
        return bool(next(self._until_one_ends(timeout)))

    def _until_one_ends(self, timeout: float | None) -> Iterator[bool]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            for worker in self.workers:
                if worker.wait(0.02 / len(self.workers)):
                    yield True
            if deadline is not None and time.monotonic() >= deadline:
                yield False

    def run(self, seconds: float | None = None) -> list[dict[str, Any]]:
        """Start, wait until a stage has ended or the time is over, and stop.

        :raises Error: a stage ended with an error.
        """
        self.start()
        try:
            self.wait(seconds)
        finally:
            stats = self.stop()
        return stats

    def close(self) -> None:
        """Stop, and give back the attachments of its bridges."""
        try:
            self.stop()
        finally:
            self._detach()

    def __enter__(self: Self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Error:
            if value is None:
                raise
