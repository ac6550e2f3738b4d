# SPDX-License-Identifier: Apache-2.0
"""Open ends of queues and devices: :class:`Rx` receives, :class:`Tx` sends, as seen by who opened it."""

from __future__ import annotations

import asyncio
import math
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator
from errno import EINTR, ENODATA
from typing import TYPE_CHECKING, Any, TypeVar

from . import _c
from ._c import NULL, ffi, lib
from .burst import Burst
from .errors import Detached, Error

if TYPE_CHECKING:
    from types import TracebackType

    from .cluster import Cluster

    Self = TypeVar("Self", bound="End")

BURST = 64  #: packets of a burst where nothing else is said
_MAX_BURST = 65536  # of one call

#: Longest wait in C at a time, ms. Between two, signals are handled, and others get what they are owed.
_SLICE_MS = 5
#: A server that is only busy answers a new session much sooner, seconds: on a host, in a VM.
_ANSWER = (1.0, 5.0)
_SLEEP_MOST = 0.001  # seconds, of asyncio's polling
_PAUSE = 0.0001  # seconds, between two looks for buffers or credit, which C cannot wait for

_new = ffi.new
_next = lib.rbpy_next
_DESCRIPTORS = _c.DESCRIPTORS


class _Ended(Exception):
    """The stream of packets is over: stopped, a finite source's end, or the cluster was destroyed."""


class End:
    """What Rx and Tx have in common. Made by :meth:`Cluster.open_queue` and :meth:`Cluster.open_device`.

    An end and its bursts belong to one thread at a time; only :meth:`stop` may be called from any thread,
    also from a signal handler. Calls of several threads on ends of one cluster are serialised, never wrong.
    An end opened before a fork is dead in the child: its calls raise Error.

    Leaving ``with`` closes it. While views of its packets live, closing waits for the last of them.

    :ivar address: canonical address, ``"99@0"`` or ``"zc:eth1@0"``.
    :ivar writable: whether packets received may be changed in place.
    """

    __slots__ = (
        "__weakref__", "_breaking", "_flags", "_over", "_stopped", "_waiting", "address", "allocated", "buffer_size",
        "closing", "cluster", "handle", "loose", "pins", "ptr", "writable",
    )  # fmt: skip

    def __init__(self, cluster: Cluster, handle: _c.Handle, address: str, flags: int) -> None:
        self.cluster = cluster
        self.address = address
        self.writable = bool(flags & lib.RB_WRITABLE)
        self.pins: dict[int, Any] = {}  # living views, by id of the _Pin
        self.loose: dict[int, Any] = {}  # of these, what a released burst left: a descriptor each
        self.allocated: weakref.WeakSet[Burst] = weakref.WeakSet()  # what alloc made
        self._flags = flags
        self._waiting = threading.Lock()  # held while waiting in C without the handle's lock
        self._breaking = threading.RLock()  # keeps ptr alive while rb_break is called; re-entrant for signal handlers
        self.ptr: Any = NULL
        self._open(handle)

    def _open(self, handle: _c.Handle) -> None:
        out = _new("rb_end **")
        info = _new("rb_cluster_info *")
        with handle.lock:
            if handle.refuse is not None:
                raise handle.refuse()
            handle.drain()
            _c.check(lib.rb_open(out, handle.ptr, self.address.encode(), self._flags))
            self.handle = handle
            self.ptr = out[0]
            handle.ends.add(self)
            self.closing = False
            self._stopped = False
            self._over: str | None = None
            lib.rb_cluster_get_info(handle.ptr, info)
            self.address = _c.text(lib.rb_address(self.ptr)) or self.address
            self.buffer_size = int(info.buffer_size)

    # ---- life ----

    def stop(self) -> None:
        """End the current loop or wait, and any later one until :meth:`reopen`. Any thread, any time."""
        self._stopped = True
        if self.handle.refuse is _c.forked_error:
            return
        with self._breaking:
            if self.ptr != NULL:
                lib.rb_break(self.ptr)

    def interrupt(self) -> None:
        """Stop, and wait until no thread waits in C any more."""
        self.stop()
        with self._waiting:
            pass

    def close(self) -> None:
        """Close the end. What it holds goes back; packets unread in a queue stay for the next consumer.
        Again: nothing.

        Bursts from it become useless, views of packets do not: closing waits until the last of them dies.
        """
        handle = self.handle
        if self.ptr == NULL or handle.refuse is _c.forked_error:
            return
        if handle.worker is not None:
            raise _c.working_error()
        self.interrupt()
        self._over = self._over or "closed"
        with handle.lock:
            self.closing = True
            handle.drain()
            if not self.pins:
                self.close_locked()

    def close_locked(self) -> None:
        """With the handle's lock held and no view alive."""
        with self._breaking:
            ptr, self.ptr = self.ptr, NULL
        self._stopped = True
        self.loose.clear()
        if ptr != NULL:
            for burst in list(self.allocated):  # what came by rb_recv, rb_close gives back
                burst.give_back_locked()
            lib.rb_close(ptr)

    def __del__(self) -> None:
        # Bursts and views keep their end alive: here none is left.
        handle = getattr(self, "handle", None)
        if handle is not None and self.ptr != NULL:
            handle.later.append((self, None, 0))
            handle.tidy()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def reopen(self, timeout: float | None = None) -> None:
        """Open the same address again, after :class:`Detached`, :meth:`stop` or a close.

        In a VM this waits for the cluster to be attached again, and joins it.

        :param timeout: seconds; None = without end, 0 = now.
        :raises TimeoutError: not there in time.
        :raises Busy: somebody else holds it now.
        """
        self.close()
        if self.pins:
            raise BufferError(f"views of packets of {self.address} are alive: release them before reopening it")
        self.cluster.reopen(self._open, timeout, self.address)

    @property
    def closed(self) -> bool:
        """Whether this end is closed."""
        return self.ptr == NULL or self.closing

    def check_open(self) -> None:
        """With the handle's lock held.

        :raises Error: closed, in the wrong process, or owned by a worker.
        """
        if self.handle.refuse is not None and not (self.handle.closing and self.ptr != NULL):
            raise self.handle.refuse()
        if self.ptr == NULL:
            raise Error(f"{self.address} is closed", code="closed", cure="open it again: open_queue(), or reopen()")

    def _call(self, function: Any, *arguments: Any) -> int:
        with self.handle.lock:
            self.check_open()
            return _c.check(function(self.ptr, *arguments))

    # ---- looking ----

    def fileno(self) -> int:
        """A descriptor for poll: readable when it is time to look. It belongs to the end."""
        return self._call(lib.rb_fd)

    @property
    def count(self) -> int:
        """Packets waiting (rx), or slots in use (tx)."""
        return self._call(lib.rb_count)

    @property
    def empty(self) -> bool:
        """Nothing is waiting, or every slot is free."""
        return bool(self._call(lib.rb_empty))

    @property
    def full(self) -> bool:
        """No slot is free."""
        return bool(self._call(lib.rb_full))

    def stats(self) -> dict[str, Any]:
        """Counters of this end since it was opened.

        :returns: ``packets``, ``bytes``, ``refused``, ``copied``, ``drops`` by reason, ``mode`` (devices:
            ``"zero-copy"``, ``"driver"``, ``"generic"``; queues: ``"loan"``), and what the kernel counted for
            a device.
        """
        stats = _new("rb_stats *")
        self._call(lib.rb_stats_get, stats)
        return _c.as_dict(stats[0])

    def __repr__(self) -> str:
        return f"<ringbar.{type(self).__name__} {self.address}{' closed' if self.closed else ''}>"

    # ---- waiting ----

    def _ended(self, status: int) -> Exception:
        """What a failed receive or send of this thread means."""
        if status in (-EINTR, -ENODATA):
            return _Ended()
        problem = _c.error(status)
        if isinstance(problem, Detached) and problem.code == Detached.default_code and not self.cluster.is_guest:
            self._over = problem.message  # on the host nothing is unplugged: the cluster was destroyed
            return _Ended()
        return problem

    def _look(self, waiting: bool = False) -> None:
        """With the handle's lock held: may this end be used?

        :raises _Ended: stopped, or closed while it waited.
        """
        handle = self.handle
        if waiting and (self._stopped or handle.refuse is _c.closed_error):
            raise _Ended
        self.check_open()
        handle.drain()
        if self._stopped:
            raise _Ended

    def _wait(self, deadline: float | None) -> bool:
        """Without the lock, wait a little for packets or room. False: the time is over."""
        most = _SLICE_MS
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            most = min(most, math.ceil(left * 1000))
        with self._waiting:
            if self._stopped:
                return True
            status = lib.rb_wait(self.ptr, most)
        if status < 0 and status != -EINTR:
            raise self._ended(status)
        if status == 0:
            self._serve()
        return True

    def _serve(self) -> None:
        """Nothing came: do what this attachment owes others."""
        handle = self.handle
        with handle.lock:
            if handle.refuse is None:
                lib.rb_service(handle.ptr)


_NOTHING = object()


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


class Rx(End):
    """An end that receives. Iterate over it: ``for burst in rx``, ``async for burst in rx``.

    Going on to the next burst releases the one before, except what was taken from it by select or send. The
    loop ends after :meth:`stop`, at the end of a finite source, and when the cluster is destroyed; it raises
    :class:`Detached` in a VM whose memory was unplugged.
    """

    __slots__ = ()

    def __iter__(self) -> Iterator[Burst]:
        return self._bursts(BURST, None)

    def bursts(self, n: int = BURST, timeout: float | None = None) -> Iterator[Burst]:
        """Iterate with bursts of at most n packets.

        :param timeout: seconds; when nothing came for so long, an empty burst is handed out. None = only
            bursts with packets.
        """
        _c.number(n, 1, _MAX_BURST, "the size of a burst")
        _c.milliseconds(timeout)
        return self._bursts(n, timeout)

    def _bursts(self, n: int, timeout: float | None) -> Iterator[Burst]:
        burst: Burst | None = None
        desc = None
        take = self._take
        try:
            while True:
                desc = _new(_DESCRIPTORS, n)
                burst = Burst(self, desc, take(desc, n, burst, timeout))
                desc = None
                yield burst
        except _Ended:
            return
        except BaseException:
            if desc is not None:  # else it stands at the yield, perhaps in a garbage collection
                self._give_up(desc, n)
            raise

    def recv(self, n: int = BURST, timeout: float | None = None) -> Burst:
        """Receive at most n packets.

        The burst is released when told to, or by garbage collection.

        :param timeout: seconds; 0 = what is there, None = wait without end.
        :returns: an empty burst when nothing came in time.
        :raises EOFError: stopped, a finite source's end, or the cluster was destroyed.
        :raises Detached: unplugged or detached.
        :raises TimeoutError: a second or more (in a VM 5 s) went by, and whoever serves this queue has not even
            noticed that it was opened; names the process.
        """
        _c.number(n, 1, _MAX_BURST, "the size of a burst")
        _c.milliseconds(timeout)
        desc = _new(_DESCRIPTORS, n)
        try:
            got = self._take(desc, n, None, timeout)
            if not got and timeout is not None and timeout >= _ANSWER[self.cluster.is_guest]:
                self._call(lib.rb_answered)
            return Burst(self, desc, got)
        except _Ended:
            raise EOFError(f"no more packets from {self.address}: {self._why()}") from None
        except BaseException:
            self._give_up(desc, n)
            raise

    def _why(self) -> str:
        return self._over or ("stopped" if self._stopped else "the end of the source")

    def _take(self, desc: Any, n: int, previous: Burst | None, timeout: float | None) -> int:
        """Release the previous burst and receive into desc. How many came; 0 = none in time."""
        handle = self.handle
        try:
            if previous is not None and (previous._pins or previous._refused is not None):
                previous.release()
                previous = None
            with handle.lock:
                if handle.refuse is not None or handle.later or self._stopped:
                    self._look()
                if previous is None:
                    got: int = _next(handle.ptr, self.ptr, NULL, 0, desc, n)
                else:
                    got = _next(handle.ptr, self.ptr, previous._desc, previous._n, desc, n)
                    previous._n = 0
            if got > 0:
                return got
            if got < 0:
                raise self._ended(got)
            if timeout == 0:
                return 0
            deadline = _deadline(timeout)
            while self._wait(deadline):
                with handle.lock:
                    self._look(waiting=True)
                    got = lib.rb_recv(self.ptr, desc, n, 0)
                if got > 0:
                    return got
                if got < 0:
                    raise self._ended(got)
            return 0
        except _Ended:
            if previous is not None:
                previous.release()
            raise

    def _give_up(self, desc: Any, n: int) -> None:
        """Receiving failed or was interrupted: what came goes back."""
        handle = self.handle
        with handle.lock:
            if handle.refuse is None and self.ptr != NULL:
                lib.rbpy_return(handle.ptr, desc, n)

    def __aiter__(self) -> AsyncIterator[Burst]:
        """The same for asyncio: polls, more and more slowly down to every millisecond while nothing comes.

        A cancelled loop loses nothing: no packet is taken before it can be handed out.
        """
        return _AsyncBursts(self)

    @property
    def clock(self) -> int:
        """Now, in nanoseconds since the epoch, by the clock of :attr:`Burst.timestamps`.

        Timestamps carry the host's clock. In a VM this is the VM's own clock, which is as near to the host's
        as the VM's time service keeps it (``chrony`` with ``ptp_kvm``: microseconds).
        """
        return time.time_ns()


class _AsyncBursts(AsyncIterator[Burst]):
    """``async for burst in rx``."""

    def __init__(self, rx: Rx) -> None:
        self._rx = rx
        self._burst: Burst | None = None

    async def __anext__(self) -> Burst:
        rx = self._rx
        if self._burst is not None:
            await asyncio.sleep(0)  # others' turn, however fast packets come
        previous, self._burst = self._burst, None
        desc = _new(_DESCRIPTORS, BURST)
        tries, delay = 0, 0.0
        while True:
            try:
                got = rx._take(desc, BURST, previous, 0)
                if got:
                    # Nothing is awaited between taking packets and handing them out: a cancelled loop loses none.
                    self._burst = Burst(rx, desc, got)
                    return self._burst
                rx._serve()
            except _Ended:
                raise StopAsyncIteration from None
            except BaseException:
                rx._give_up(desc, BURST)
                raise
            previous = None
            tries += 1
            if tries > 32:
                delay = min(max(2 * delay, 20e-6), _SLEEP_MOST)
            await asyncio.sleep(delay)


class Tx(End):
    """An end that sends."""

    __slots__ = ()

    def send(self, burst: Burst, timeout: float | None = 0) -> int:
        """Pass packets on, without a copy, from any end of the same Cluster object.

        :param burst: received, selected or allocated. What was refused stays in it, in order; released unsent
            it is counted as dropped.
        :param timeout: seconds to wait for room; 0 = do not wait, None = until all are accepted.
        :returns: how many were accepted.
        :raises BufferError: a view of one of them is alive.
        :raises Error: the packets came from another Cluster object, or a length does not fit its buffer.
        :raises Detached: unplugged, detached or destroyed; what was not accepted stays in the burst.
        """
        n = burst._n
        _c.milliseconds(timeout)
        if n == 0:
            return 0
        handle = self.handle
        if burst._end.handle is not handle:
            raise Error(
                f"packets of {burst._end.address} are in the hand of another attachment",
                code="other-attachment",
                cure="open both ends from one Cluster object, or copy: tx.write(burst.copy(i) for i in ...)",
            )
        if burst._pins:
            burst._check_pins("sent")
        if burst._live is not None:
            burst._pack()
        desc = burst._desc
        sent = 0
        deadline = _deadline(timeout) if timeout else None
        waited = False
        try:
            while True:
                with handle.lock:
                    if handle.refuse is not None or handle.later or self._stopped:
                        self._look(waited)
                    k: int = lib.rbpy_send(handle.ptr, self.ptr, desc + sent, n - sent)
                if k < 0:
                    raise self._ended(k)
                sent += k
                if sent == n or timeout == 0:
                    break
                if waited and k == 0:
                    time.sleep(_PAUSE)  # there is room, but no credit
                if not self._wait(deadline):
                    break
                waited = True
        except _Ended:
            if self._over and self._over != "closed":
                raise Detached(self._over) from None
        finally:
            sent = burst._moved()  # also when interrupted
            if sent < n:
                burst._refused = self
        return sent

    def alloc(self, n: int = BURST) -> Burst:
        """Take empty buffers to fill and send here: write into ``burst[i]``, set ``burst.lengths[i]``, then
        :meth:`send`.

        :returns: at most n packets of length 0; fewer when no more buffers are free.
        :raises Error: this program may not write packets (a VM whose pool is read-only), with the cure.
        """
        _c.number(n, 1, _MAX_BURST, "the size of a burst")
        desc = _new(_DESCRIPTORS, n)
        with self.handle.lock:
            self.check_open()
            self.handle.drain()
            try:
                got = _c.check(lib.rb_alloc(self.ptr, desc, n))
                return Burst(self, desc, got, _new(_c.WORDS, max(got, 1)), True)
            except BaseException:
                lib.rbpy_return(self.handle.ptr, desc, n)
                raise

    def write(self, packets: Iterable[Any], timeout: float | None = 0) -> int:
        """Send packets that are bytes: each is copied into a buffer once.

        :param packets: bytes-like objects; taken in bursts, so of an iterator up to 63 more than accepted may
            be used up.
        :param timeout: seconds to wait for buffers and room in all; 0 = do not wait, None = until all are
            accepted.
        :returns: how many were accepted: the first so many.
        :raises Error: a packet is longer than a buffer.
        """
        _c.milliseconds(timeout)
        deadline = _deadline(timeout)
        accepted = 0
        pending: list[Any] = []
        iterator = iter(packets)
        while True:
            while len(pending) < BURST:
                packet = next(iterator, _NOTHING)
                if packet is _NOTHING:
                    break
                pending.append(packet)
            if not pending:
                return accepted
            with self.alloc(len(pending)) as out:
                taken = len(out)
                for i in range(taken):
                    self._fill(out, i, pending[i])
                k = self.send(out, None if deadline is None else max(0.0, deadline - time.monotonic())) if taken else 0
            accepted += k
            del pending[:k]
            if k < taken:
                return accepted
            if not taken:
                if timeout == 0 or self._stopped or (deadline is not None and time.monotonic() >= deadline):
                    return accepted
                time.sleep(_PAUSE)

    @staticmethod
    def _fill(out: Burst, i: int, packet: Any) -> None:
        with memoryview(packet) as source, out[i] as room:
            octets = source.cast("B") if source.nbytes else b""
            if len(octets) > len(room):
                raise Error(
                    f"a packet of {len(octets)} bytes does not fit the {len(room)} of a buffer",
                    code="too-long",
                    cure="create the cluster with larger buffers (size=), or send shorter packets",
                )
            room[: len(octets)] = octets
            out._live[i] = len(octets)


class RxTx(Rx, Tx):
    """An end of a device that receives and sends."""

    __slots__ = ()
