# SPDX-License-Identifier: Apache-2.0
"""Workers: C threads that move packets between ends. What all kinds have in common; the kinds are in kinds.py.

:func:`list` and :func:`read` look at the named workers of this host, also those of other processes.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar, Union

from . import _c, address
from ._c import NULL, Handle, ffi, lib
from .cluster import Cluster, Queue
from .ends import End, Rx, Tx
from .errors import Error

if TYPE_CHECKING:
    from types import TracebackType

    Self = TypeVar("Self", bound="Worker")

Input = Union[Rx, Queue, str]
Output = Union[Tx, Queue, str]

_IDLE = {"adaptive": 0, "busy": 1, "event": 2}
_POLL_MOST = 0.02  # seconds, between looks whether a worker has ended


class Worker:
    """A C thread that moves packets: the base of all kinds.

    From :meth:`start` to :meth:`stop` the attachment (the Cluster object) of its ends belongs to the worker;
    other calls on it raise Error. Use a second ``Cluster.attach`` for them. Its own methods may be called
    from any thread. ``with worker:`` starts and stops it.
    """

    #: What kind it is: ``"balancer"``, ...
    kind = "worker"

    def __init__(
        self,
        *,
        core: int | None = None,
        idle: str = "adaptive",
        burst: int = 64,
        packets: int | None = None,
        name: str | None = None,
        pulse: bool = False,
    ) -> None:
        """Settings that all kinds have.

        :param core: the processor it is pinned to; None = any.
        :param idle: while nothing comes: ``"adaptive"`` (spins, then sleeps up to 0.2 ms), ``"busy"``, ``"event"``
            (sleeps until a NIC has packets; queues are looked at every millisecond).
        :param burst: packets moved at once, 1 to 256.
        :param packets: stop by itself after so many; None = without end.
        :param name: others see it by that name (:func:`list`, ``ringbar worker``); None = nobody does.
        :param pulse: take the time from the process's coarse clock (:class:`Pulse`), not by a clock call a burst.
        """
        if idle not in _IDLE:
            raise Error(f"idle is {', '.join(_IDLE)}, not {idle!r}", code="bad-value")
        options = _c.options("rb_worker_options")
        options.core = 0 if core is None else _c.number(core, 0, 65535, "a processor") + 1
        options.idle = _IDLE[idle]
        options.burst = _c.number(burst, 1, int(lib.RB_MAX_BURST), "the burst of a worker")
        options.packets = 0 if packets is None else _c.number(packets, 1, 2**63, "the number of packets")
        options.pulse = bool(pulse)
        self.name = name
        self._name = None if name is None else ffi.new("char[]", _c.label(name, 31, "the name of a worker"))
        options.name = NULL if self._name is None else self._name
        self._options = options
        self._lock = threading.RLock()  # of _ptr
        self._over = threading.Event()
        self._ptr: Any = NULL
        self._last: dict[str, Any] = {}
        self._handles: builtins.list[Handle] = []
        self._opened: builtins.list[End] = []  # by the worker itself

    # ---- what a kind defines ----

    def _ends(self) -> builtins.list[End]:
        """All ends it moves packets between."""
        raise NotImplementedError

    def _launch(self, out: Any) -> int:
        """Start the C thread; all locks are held."""
        raise NotImplementedError

    def _read(self, ptr: Any) -> dict[str, Any]:
        """Counters of the C thread."""
        stats = ffi.new("rb_worker_stats *")
        _c.check(lib.rb_worker_stats_get(ptr, stats))
        return _shares(_c.as_dict(stats[0]))

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
        busy = [worker for worker in builtins.list(_RUNNING) if worker._options.idle == _IDLE["busy"]]
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
                lib.rb_worker_end(ptr)  # what it held has gone on, and the counters stand still
                self._last = {**self._read(ptr), "running": False}
                self._ptr = NULL
                lib.rb_worker_stop(ptr)
                _RUNNING.discard(self)
                self._over.set()
                for handle in self._handles:
                    _c.given_back(handle)
                self._close_opened()
                self._raise(self._last)
            return dict(self._last)

    def _close_opened(self) -> None:
        """Close the ends that the worker opened itself."""
        for end in self._opened:
            end.close()
        self._opened.clear()

    def _raise(self, stats: dict[str, Any]) -> None:
        if stats.get("error"):
            message = stats.get("message") or os.strerror(-stats["error"])
            raise Error(f"the worker ended: {message}", code="worker-failed")

    def stats(self) -> dict[str, Any]:
        """Counters since the start; after :meth:`stop` the last ones.

        :returns: ``packets``, ``bytes``, ``dropped``, ``bursts``, ``loops``, ``idle_loops``, ``cycles_busy``,
            ``cycles_total``, ``running``, ``error`` (0, or what ended it) and ``message``; ``drops`` by reason (of
            ``dropped``), ``held`` (packets it keeps for later), ``paused``, ``busy`` (share of its time in turns
            that moved something, 0 to 1), ``packets_per_burst``. Kinds may have others.
        """
        with self._lock:
            if self._ptr != NULL:
                self._last = self._read(self._ptr)
                self._last["running"] = bool(self._last["running"])  # of a flow
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
            self._check_running()
            _c.check(lib.rb_worker_pause(self._ptr, pause))

    def _check_running(self) -> None:
        if self._ptr == NULL:
            raise Error("the worker does not run", code="not-running", cure="start() it first")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """``with worker.held():`` has the thread stand still between two turns; inside, its ends and its Cluster
        object can be used, to set the filter of an end for example. It goes on afterwards.

        :raises Error: it does not run.
        """
        with self._lock:
            self._check_running()
            ptr = self._ptr
            lib.rb_worker_hold(ptr)
            for handle in self._handles:
                _c.given_back(handle)
            try:
                yield
            finally:
                for handle in self._handles:
                    with handle.lock:
                        if handle.refuse is None:
                            handle.drain()
                            _c.owned_by_worker(handle, self)
                lib.rb_worker_release(ptr)

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

    def _open(self, end: Any, kind: type[End], cluster: Cluster | None = None) -> End:
        """The end itself; of a queue, or the address of a queue or device, an end opened for this worker.

        :param cluster: what it is opened with; None = the queue's own.
        """
        if isinstance(end, kind):
            return end
        if isinstance(end, Queue):
            cluster, end = cluster or end.cluster, end.address
        elif not isinstance(end, str) or cluster is None:
            raise Error(f"a worker wants {kind.__name__} or Queue here, not {end!r}", code="bad-value")
        is_queue = isinstance(address.parse_device(end), address.QueueAddress)
        opened: End
        if kind is Rx:
            opened = cluster.open_queue(end, "rx") if is_queue else cluster.open_device(end, "rx")
        else:
            opened = cluster.open_queue(end, "tx") if is_queue else cluster.open_device(end, "tx")
        self._opened.append(opened)
        return opened


_RUNNING: set[Worker] = set()


def _stop_all() -> None:
    """At the program's end: no thread calls into an interpreter that is going away."""
    for worker in builtins.list(_RUNNING):
        with contextlib.suppress(Exception):
            worker.stop()


atexit.register(_stop_all)


def _shares(found: dict[str, Any]) -> dict[str, Any]:
    """With what follows from the counters."""
    found["running"] = bool(found["running"])
    found["paused"] = bool(found["paused"])
    found["busy"] = found["cycles_busy"] / found["cycles_total"] if found["cycles_total"] else 0.0
    found["packets_per_burst"] = found["packets"] / found["bursts"] if found["bursts"] else 0.0
    return found


_STATES = {0: "unused", 1: "open", 2: "ended", 3: "failed"}


def ports(read: Any) -> dict[str, builtins.list[dict[str, Any]]]:
    """Inputs and outputs of a worker, of what ``read(array, room)`` writes."""
    found: dict[str, builtins.list[dict[str, Any]]] = {"inputs": [], "outputs": []}
    for port in _c.structures("rb_worker_port", read):
        output = port.pop("output")
        port["state"] = _STATES.get(port["state"], "unknown")
        if not output:
            del port["group"], port["weight"]
        found["outputs" if output else "inputs"].append(port)
    return found


def _info(found: dict[str, Any]) -> dict[str, Any]:
    found["stats"] = _shares(_c.as_dict(found["stats"]))
    found["alive"] = bool(found["pid"])
    found["pid"] = found["pid"] or found["last_pid"]
    del found["last_pid"]
    found["core"] = found["core"] - 1 if found["core"] else None
    found["idle"] = next((name for name, value in _IDLE.items() if value == found["idle"]), "adaptive")
    found["policy"] = found["policy"] or None
    return found


def list() -> builtins.list[dict[str, Any]]:  # noqa: A001
    """The named workers of this host (in a VM: of this VM), also of other processes, by name.

    :returns: for each ``name``, ``kind``, ``policy`` (None: it has none), ``program``, ``pid``, ``alive``,
        ``since_ns``, ``seen_ns`` (its counters are of then), ``idle``, ``core``, ``stats`` as :meth:`Worker.stats`.
        Those whose process died stay until the name is used again, or :func:`forget`.
    """
    return sorted((_info(found) for found in _c.structures("rb_worker_info", lib.rb_worker_list)), key=_by_name)


def _by_name(found: dict[str, Any]) -> str:
    return str(found["name"])


def read(name: str) -> dict[str, Any]:
    """One named worker: as :func:`list`, and ``inputs`` and ``outputs``: ``address``, ``state`` (``"open"``,
    ``"ended"``, ``"failed"``), ``packets``, ``bytes``, ``drops`` by reason; of an output also ``group`` and ``weight``.

    :raises NotFound: there is none.
    """
    text = _c.label(name, 255, "the name of a worker")
    info = ffi.new("rb_worker_info *")
    found = ports(lambda out, n: lib.rb_worker_read(text, info, out, n))
    return {**_info(_c.as_dict(info[0])), **found}


def forget(name: str) -> None:
    """Remove what a dead worker left.

    :raises NotFound: there is none.
    :raises Busy: it lives.
    """
    _c.check(lib.rb_worker_forget(_c.label(name, 255, "the name of a worker")))


class Pulse:
    """A coarse clock of this process for workers made with ``pulse=True``: ``with Pulse():``.

    One thread reads the time every ``period`` seconds; workers then read it from memory, which costs next to nothing.
    """

    def __init__(self, period: float = 10e-6, *, core: int | None = None) -> None:
        """
        :param period: seconds, from 1e-6 to 1.
        :param core: processor of its thread; None = any.
        """
        if not isinstance(period, (int, float)) or not 1e-6 <= period <= 1:
            raise Error(f"a pulse's period goes from 1e-6 to 1 second, not {period!r}", code="bad-value")
        self._period = round(period * 1e6)
        self._core = 0 if core is None else _c.number(core, 0, 1023, "a processor") + 1

    def start(self) -> Pulse:
        """Start it, or take part in the one that runs."""
        _c.check(lib.rb_pulse_start(self._period, self._core))
        return self

    def stop(self) -> None:
        """The last to stop it ends the thread."""
        lib.rb_pulse_stop()

    @staticmethod
    def now() -> int:
        """Its time, ns since the epoch; the system's where none runs."""
        return int(lib.rb_pulse_ns())

    def __enter__(self) -> Pulse:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
