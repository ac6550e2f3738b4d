# SPDX-License-Identifier: Apache-2.0
"""Workers: C threads that move packets between ends. No Python runs while they do."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar, Union

from . import _c
from ._c import NULL, Handle, ffi, lib
from .cluster import Queue
from .ends import End, Rx, Tx
from .errors import Error

if TYPE_CHECKING:
    from types import TracebackType

    Self = TypeVar("Self", bound="Worker")

Input = Union[Rx, Queue]
Output = Union[Tx, Queue]

_IDLE = {"adaptive": 0, "busy": 1, "event": 2}
_POLL_MOST = 0.02  # seconds, between looks whether a worker has ended


class Worker:
    """A C thread that moves packets: the base of all kinds.

    From :meth:`start` to :meth:`stop` the attachment (the Cluster object) of its ends belongs to the worker;
    other calls on it raise Error. Use a second ``Cluster.attach`` for them. Its own methods may be called
    from any thread. ``with worker:`` starts and stops it.
    """

    def __init__(
        self, *, core: int | None = None, idle: str = "adaptive", burst: int = 64, packets: int | None = None
    ) -> None:
        """Settings that all kinds have.

        :param core: the processor it is pinned to; None = any.
        :param idle: ``"adaptive"`` (spins, then sleeps), ``"busy"``, ``"event"``.
        :param burst: packets moved at once, 1 to 256.
        :param packets: stop by itself after so many; None = without end.
        """
        if idle not in _IDLE:
            raise Error(f"idle is {', '.join(_IDLE)}, not {idle!r}", code="bad-value")
        options = _c.options("rb_worker_options")
        options.core = 0 if core is None else _c.number(core, 0, 65535, "a processor") + 1
        options.idle = _IDLE[idle]
        options.burst = _c.number(burst, 1, int(lib.RB_MAX_BURST), "the burst of a worker")
        options.packets = 0 if packets is None else _c.number(packets, 1, 2**63, "the number of packets")
        self._options = options
        self._lock = threading.RLock()  # of _ptr
        self._over = threading.Event()
        self._ptr: Any = NULL
        self._last: dict[str, Any] = {}
        self._handles: list[Handle] = []
        self._opened: list[End] = []  # by the worker itself

    # ---- what a kind defines ----

    def _ends(self) -> list[End]:
        """All ends it moves packets between."""
        raise NotImplementedError

    def _launch(self, out: Any) -> int:
        """Start the C thread; all locks are held."""
        raise NotImplementedError

    def _read(self, ptr: Any) -> dict[str, Any]:
        """Counters of the C thread."""
        stats = ffi.new("rb_worker_stats *")
        _c.check(lib.rb_worker_stats_get(ptr, stats))
        return _c.as_dict(stats[0])

    # ---- running ----

    def start(self: Self) -> Self:
        """Start the thread.

        :raises Error: it runs already, an end is closed, or another worker owns the attachment.
        """
        with self._lock:
            if self._ptr != NULL:
                raise Error("the worker runs already", code="running", cure="stop() it first")
            self._check_idle()
            ends = self._ends()
            handles = sorted({id(end.handle): end.handle for end in ends}.values(), key=id)
            out = ffi.new("rb_worker **")
            with contextlib.ExitStack() as locked:
                for handle in handles:
                    locked.enter_context(handle.lock)
                    if handle.refuse is not None:
                        raise handle.refuse()
                    handle.drain()
                for end in ends:
                    end.check_open()
                _c.check(self._launch(out))
                self._ptr, self._handles = out[0], handles
                self._over.clear()
                for handle in handles:
                    _c.owned_by_worker(handle, self)
            _RUNNING.add(self)
        return self

    def _check_idle(self) -> None:
        busy = [worker for worker in list(_RUNNING) if worker._options.idle == _IDLE["busy"]]
        cores = len(os.sched_getaffinity(0))
        if self._options.idle == _IDLE["busy"] and len(busy) + 1 > cores:
            raise Error(
                f"{len(busy) + 1} busy threads on {cores} processors would starve each other",
                code="too-few-cores",
                cure='use idle="adaptive"',
            )

    def stop(self) -> dict[str, Any]:
        """Stop the thread and give its attachment back. Stopped already: nothing.

        :returns: the last counters, as :meth:`stats`.
        :raises Error: the thread had ended with an error.
        """
        with self._lock:
            if self._ptr != NULL:
                ptr = self._ptr
                lib.rb_worker_pause(ptr, 1)  # so that the counters stand still
                self._last = {**self._read(ptr), "running": False}
                self._ptr = NULL
                lib.rb_worker_stop(ptr)
                _RUNNING.discard(self)
                self._over.set()
                for handle in self._handles:
                    _c.given_back(handle)
                for end in self._opened:
                    end.close()
                self._opened.clear()
                self._raise(self._last)
            return dict(self._last)

    @staticmethod
    def _raise(stats: dict[str, Any]) -> None:
        if stats.get("error"):
            message = stats.get("message") or os.strerror(-stats["error"])
            raise Error(f"the worker ended: {message}", code="worker-failed")

    def stats(self) -> dict[str, Any]:
        """Counters since the start; after :meth:`stop` the last ones.

        :returns: ``packets``, ``bytes``, ``dropped``, ``bursts``, ``loops``, ``idle_loops``, ``cycles_busy``,
            ``cycles_total``, ``running``, ``error`` (0, or what ended it) and ``message``. Kinds may have
            others.
        """
        with self._lock:
            if self._ptr != NULL:
                self._last = self._read(self._ptr)
                self._last["running"] = bool(self._last["running"])
            return dict(self._last)

    @property
    def running(self) -> bool:
        """Whether the thread is moving packets, or paused; not before the start and after its end."""
        return bool(self.stats().get("running"))

    def pause(self) -> None:
        """Stand still until :meth:`resume`; returns when the thread does."""
        self._pause(1)

    def resume(self) -> None:
        """Go on."""
        self._pause(0)

    def _pause(self, pause: int) -> None:
        with self._lock:
            if self._ptr == NULL:
                raise Error("the worker does not run", code="not-running", cure="start() it first")
            _c.check(lib.rb_worker_pause(self._ptr, pause))

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the thread has ended by itself, or somebody called :meth:`stop`.

        :param timeout: seconds; None = without end.
        :returns: whether it has.
        """
        _c.milliseconds(timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = 0.0005
        while self.running:
            left = pause if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return False
            self._over.wait(min(pause, left))
            pause = min(2 * pause, _POLL_MOST)
        return True

    def run(self, seconds: float | None = None) -> dict[str, Any]:
        """Start, wait until it has ended, and stop it. Ctrl-C stops it too, and is passed on.

        :param seconds: stop after this time; None = only when it ends by itself or :meth:`stop` is called.
        :returns: the last counters.
        :raises Error: the thread ended with an error.
        """
        self.start()
        try:
            self.wait(seconds)
        finally:
            stats = self.stop()
        return stats

    def __enter__(self: Self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except Error:
            if value is None:
                raise

    def _open(self, end: Any, kind: type[End]) -> End:
        """The end itself; of a queue, its end opened for this worker."""
        if isinstance(end, Queue):
            opened = end.cluster.open_queue(end, "rx") if kind is Rx else end.cluster.open_queue(end, "tx")
            self._opened.append(opened)
            return opened
        if not isinstance(end, kind):
            raise Error(f"a worker wants {kind.__name__} or Queue here, not {end!r}", code="bad-value")
        return end


_RUNNING: set[Worker] = set()


class Bridge(Worker):
    """Moves packets from each input to its output. What an output refuses is dropped and counted there.

    ``Bridge(rx, tx)``, or several pairs: ``Bridge([rx1, rx2], [tx2, tx1])``. All of one Cluster object.
    """

    def __init__(
        self,
        inputs: Input | Iterable[Input],
        outputs: Output | Iterable[Output],
        *,
        core: int | None = None,
        idle: str = "adaptive",
        burst: int = 64,
        packets: int | None = None,
    ) -> None:
        """The other settings: see :class:`Worker`.

        :param inputs: where packets come from: Rx, or a Queue, which is then opened while the bridge runs.
        :param outputs: as many Tx or Queues.
        """
        super().__init__(core=core, idle=idle, burst=burst, packets=packets)
        self._inputs = [inputs] if isinstance(inputs, (Rx, Queue)) else list(inputs)
        self._outputs = [outputs] if isinstance(outputs, (Tx, Queue)) else list(outputs)
        if not self._inputs or len(self._inputs) != len(self._outputs):
            raise Error(
                f"{len(self._inputs)} inputs, {len(self._outputs)} outputs: a bridge has one for each",
                code="bad-value",
            )
        self._pairs: list[tuple[End, End]] = []

    def _ends(self) -> list[End]:
        try:
            self._pairs = [(self._open(i, Rx), self._open(o, Tx)) for i, o in zip(self._inputs, self._outputs)]
            ends = [end for pair in self._pairs for end in pair]
            if len({id(end.handle) for end in ends}) != 1:
                raise Error(
                    "a bridge's ends come from one Cluster object",
                    code="other-attachment",
                    cure="open them all from one",
                )
        except BaseException:
            for end in self._opened:
                end.close()
            self._opened.clear()
            raise
        return ends

    def _launch(self, out: Any) -> int:
        pairs = ffi.new("rb_pair[]", [[i.ptr, o.ptr] for i, o in self._pairs])
        return int(lib.rb_bridge_start(out, self._pairs[0][0].handle.ptr, pairs, len(self._pairs), self._options))
