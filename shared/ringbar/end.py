# SPDX-License-Identifier: Apache-2.0
"""What every open end has in common, of a queue or a device: life, looking, waiting."""

from __future__ import annotations

import math
import threading
import time
import weakref
from errno import EINTR, ENODATA
from typing import TYPE_CHECKING, Any, TypeVar

from . import _c, bell
from ._c import NULL, ffi, lib
from .errors import Detached, Error

if TYPE_CHECKING:
    from types import TracebackType

    from .burst import Burst
    from .cluster import Cluster

    Self = TypeVar("Self", bound="End")

#: Longest wait in C at a time, ms. Between two, signals are handled, and others get what they are owed.
_SLICE_MS = 5
_LONGEST = 65535  # bytes of an expression or name

_new = ffi.new


class Ended(Exception):
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
        "__weakref__", "_bell_at", "_breaking", "_options", "_over", "_slice", "_stopped", "_waiting", "address",
        "allocated", "buffer_size",
        "closing", "cluster", "handle", "loose", "pins", "ptr", "writable",
    )  # fmt: skip

    def __init__(
        self, cluster: Cluster, handle: _c.Handle, address: str, flags: int, options: dict[str, Any] | None = None
    ) -> None:
        self.cluster = cluster
        self.address = address
        self.writable = bool(flags & lib.RB_WRITABLE)
        self.pins: dict[int, Any] = {}  # living views, by id of the _Pin
        self.loose: dict[int, Any] = {}  # of these, what a released burst left: a descriptor each
        self.allocated: weakref.WeakSet[Burst] = weakref.WeakSet()  # what alloc made
        self._options = {**(options or {}), "flags": flags}  # fields of rb_open_options
        self._waiting = threading.Lock()  # held while waiting in C without the handle's lock
        self._breaking = threading.RLock()  # keeps ptr alive while rb_break is called; re-entrant for signal handlers
        self.ptr: Any = NULL
        self._open(handle)

    def _open(self, handle: _c.Handle) -> None:
        out = _new("rb_end **")
        options, texts = _c.options("rb_open_options"), []
        for field, value in self._options.items():
            if isinstance(value, str):
                value = _new("char[]", _c.label(value, _LONGEST, field))
                texts.append(value)  # lives until C has read it
            setattr(options, field, value)
        info = _new("rb_cluster_info *")
        with handle.lock:
            if handle.refuse is not None:
                raise handle.refuse()
            handle.drain()
            _c.check(lib.rb_open_with(out, handle.ptr, self.address.encode("utf-8", "surrogateescape"), options))
            self.handle = handle
            self.ptr = out[0]
            handle.ends.add(self)
            self.closing = False
            self._stopped = False
            self._over: str | None = None
            lib.rb_cluster_get_info(handle.ptr, info)
            self.address = _c.text(lib.rb_address(self.ptr)) or self.address
            self.buffer_size = int(info.buffer_size)
        self._slice = _SLICE_MS
        self._bell_at = bell.join(self)

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

    # ---- filtering ----

    @property
    def filter(self) -> str | None:
        """Only packets that match this expression (libpcap's syntax: ``man pcap-filter``) pass; None = all.

        Settable at any time, by the thread that uses the end. Of a receiving end the others go back at once, of a
        sending end they are not sent though they count as accepted; ``stats()["drops"]["filter"]`` counts them,
        except what a device lets the kernel filter.

        :raises Error: it cannot be compiled (says where and why), or libpcap is not installed; the filter is then
            as it was.
        """
        return self._options.get("filter")

    @filter.setter  # noqa: A003
    def filter(self, expression: str | None) -> None:
        self._call(lib.rb_filter, NULL if expression is None else _c.label(expression, _LONGEST, "a filter"))
        self._options.pop("filter", None)
        if expression is not None:
            self._options["filter"] = expression

    # ---- looking ----

    def fileno(self) -> int:
        """A descriptor for poll: readable when it is time to look. It belongs to the end.

        Having asked, and each time it is readable, call ``recv(timeout=0)`` until nothing comes.
        """
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
        """Counters of this end since it was opened; also while a worker moves its packets.

        :returns: ``packets``, ``bytes``, ``refused``, ``copied``, ``drops`` by reason, ``mode`` (devices:
            ``"zero-copy"``, ``"driver"``, ``"generic"``, ``"copy"``; queues: ``"loan"``), ``clock`` (where timestamps
            come from: ``"hardware"``, ``"kernel"``, ``"software"``), ``waits`` (queues: ``"bell"``, asleep until the
            other side rings, or ``"polling"``, at most 1 ms apart), and what the kernel counted for a device.
        """
        stats = _new("rb_stats *")
        with self.handle.lock:
            if self.handle.refuse is not _c.working_error:  # a worker's thread counts on meanwhile
                self.check_open()
            _c.check(lib.rb_stats_get(self.ptr, stats))
        return _c.as_dict(stats[0])

    def __repr__(self) -> str:
        return f"<ringbar.{type(self).__name__} {self.address}{' closed' if self.closed else ''}>"

    # ---- waiting ----

    def _ended(self, status: int) -> Exception:
        """What a failed receive or send of this thread means."""
        if status in (-EINTR, -ENODATA):
            return Ended()
        problem = _c.error(status)
        if isinstance(problem, Detached) and problem.code == Detached.default_code and not self.cluster.is_guest:
            self._over = problem.message  # on the host nothing is unplugged: the cluster was destroyed
            return Ended()
        return problem

    def _look(self, waiting: bool = False) -> None:
        """With the handle's lock held: may this end be used?

        :raises Ended: stopped, or closed while it waited.
        """
        handle = self.handle
        if waiting and (self._stopped or handle.refuse is _c.closed_error):
            raise Ended
        self.check_open()
        handle.drain()
        if self._stopped:
            raise Ended

    def _wait(self, deadline: float | None) -> bool:
        """Without the lock, wait a little for packets or room. False: the time is over."""
        most, self._slice = self._slice, _SLICE_MS
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
        """Nothing came: do what this attachment owes others, and have the other side ring, where it can."""
        handle = self.handle
        with handle.lock:
            if handle.refuse is None and self.ptr != NULL:
                lib.rb_service(handle.ptr)
                self._slice = max(1, lib.rb_bell_arm(self.ptr))
        if self._bell_at < time.monotonic():
            self._bell_at = bell.join(self)
