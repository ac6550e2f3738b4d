# SPDX-License-Identifier: Apache-2.0
"""Open ends of queues and devices: :class:`Rx` receives, :class:`Tx` sends, as seen by who opened it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

from . import _c
from ._c import NULL, ffi, lib
from .burst import Burst
from .end import End, Ended
from .errors import Detached, Error

__all__ = ["End", "Rx", "RxTx", "Tx"]

BURST = 64  #: packets of a burst where nothing else is said
_MAX_BURST = 65536  # of one call

#: A server that is only busy answers a new session much sooner, seconds: on a host, in a VM.
_ANSWER = (1.0, 5.0)
_PAUSE = 0.0001  # seconds, between two looks for buffers or credit, which C cannot wait for

_new = ffi.new
_next = lib.rbpy_next
_DESCRIPTORS = _c.DESCRIPTORS

_NOTHING = object()


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


#: Bytes of a steering rule that are passed on; the core says how many it takes.
_LONGEST_RULE = 131072


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
        except Ended:
            return
        except BaseException:
            if desc is not None:  # else it stands at the yield, perhaps in a garbage collection
                self._give_up(desc, n)
            raise

    def steer(self, rule: str) -> None:
        """From now on take from the card what this rule names; the rest stays with the kernel.

        For ends of ``zc:`` devices, by the thread that uses the end. Every packet is judged by the old rule or by
        the new one, none by neither.

        :param rule: ``"all"``, or an expression in libpcap's syntax (``man pcap-filter``).
        :raises Error: it cannot be compiled (says where and why), or does not run in XDP; the old rule then holds.
        """
        self._call(lib.rb_steer, _c.label(rule, _LONGEST_RULE, "a steering rule"))

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
        except Ended:
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
        except Ended:
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
        """The same for asyncio: sleeps until the other side rings, where it can (a VM with interrupts, and its host);
        else polls, more and more slowly down to every millisecond while nothing comes.

        A cancelled loop loses nothing: no packet is taken before it can be handed out.
        """
        from .async_bursts import AsyncBursts  # here: asyncio costs every command that only looks 20 ms

        return AsyncBursts(self)

    @property
    def clock(self) -> int:
        """Now, in nanoseconds since the epoch, by the clock of :attr:`Burst.timestamps`.

        Timestamps carry the host's clock. In a VM this is the VM's own clock, which is as near to the host's
        as the VM's time service keeps it (``chrony`` with ``ptp_kvm``: microseconds).
        """
        return time.time_ns()


class Tx(End):
    """An end that sends."""

    __slots__ = ()

    def flush(self) -> None:
        """What a device still holds back goes out now: a capture file's last packets. Elsewhere nothing.

        :raises Error: it cannot be written: the disk is full, the reader of a pipe is gone. Closing tells nobody.
        """
        self._call(lib.rb_sync)

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
        except Ended:
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
