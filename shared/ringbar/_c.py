# SPDX-License-Identifier: Apache-2.0
"""The one module that knows about C: the extension module, errors from errno, and handles made safe for
threads.

In C, a cluster handle and its ends belong to one thread at a time. Here each :class:`Handle` has a lock that
is held around every C call that touches it; waiting is done without it (and without the GIL). The lock is
never taken from ``__del__`` or a weak reference's callback, since those may run anywhere: what they have to
do is left in
:attr:`Handle.later` and done by whoever holds the lock next, at once if nobody does.
"""

from __future__ import annotations

import importlib
import math
import operator
import os
import re
import threading
import weakref
from collections import deque
from errno import EBUSY, EEXIST, EINVAL, ENODEV, ENOENT, EPROTO, ETIMEDOUT
from typing import TYPE_CHECKING, Any, Callable

from .errors import BadAddress, Busy, Detached, Error, Incompatible, NotFound

if TYPE_CHECKING:
    from .ends import End

try:
    _core: Any = importlib.import_module("._core", __package__)
except ImportError as _problem:  # pragma: no cover - a broken installation
    raise ImportError(
        f"ringbar's C part cannot be loaded ({_problem}); install the built package: `pip install ringbar`, "
        "or in a checkout `make setup`"
    ) from _problem

ffi: Any = _core.ffi
lib: Any = _core.lib
NULL: Any = ffi.NULL

DESCRIPTORS: Any = ffi.typeof("rb_desc[]")
WORDS: Any = ffi.typeof("uint32_t[]")


def _names(prefix: str) -> list[str]:
    """Names of an enumeration of ringbar.h by value, without their prefix."""
    values = {getattr(lib, name): name[len(prefix) :] for name in dir(lib) if name.startswith(prefix)}
    return [values[i] for i in sorted(values)]


#: Why packets were not passed on, by number: ``["full", "filter", "bad", "no_buffer", "credit", "gone"]``.
DROP_REASONS: list[str] = [name.lower() for name in _names("RB_DROP_") if name != "REASONS"]
#: Sizes of pages by number: ``["auto", "4k", "2M", "1G"]``.
PAGES: list[str] = [{"AUTO": "auto", "4K": "4k"}.get(name, name) for name in _names("RB_PAGES_")]


# ---- errors ------------------------------------------------------------------------------------------------

_BY_ERRNO: dict[int, type[Error]] = {
    ENOENT: NotFound,
    EBUSY: Busy,
    ENODEV: Detached,
    EPROTO: Incompatible,
}


def error(status: int) -> Exception:
    """The exception for a failed C call of this thread, to be raised at once.

    :param status: what the call returned, -errno.
    """
    number = -status
    message = text(lib.rb_error()) or os.strerror(number)
    cure = text(lib.rb_error_cure()) or None
    code = text(lib.rb_error_code()) or None
    if number == ETIMEDOUT:
        return TimeoutError(f"{message}; {cure}" if cure else message)
    if number == EINVAL and code == BadAddress.default_code:
        return BadAddress(message, code=code, cure=cure)
    if number == EBUSY or (number == EEXIST and code == "cluster-exists"):
        return Busy(message, holder=_holder(message), code=code, cure=cure)
    return _BY_ERRNO.get(number, Error)(message, code=code, cure=cure)


_HOLDER = re.compile(
    r"\b(?:open in|attached to|held by|served by|owned by|lives with|is in use:) (?P<who>.+)", re.DOTALL
)


def _holder(message: str) -> str | None:
    """Who holds it, out of the core's sentence: "queue 99@0 is open in process 812 (zeek)"."""
    match = _HOLDER.search(message) or re.match(r"(?P<who>process \d+( \(.*?\))?)", message)
    return match["who"].rstrip(".") if match else None


def check(status: int) -> int:
    """Pass a C result on, or raise what it means."""
    if status < 0:
        raise error(status)
    return status


# ---- values ------------------------------------------------------------------------------------------------


def text(chars: Any) -> str:
    """A C string, or a char array, as str."""
    return "" if chars == NULL else str(ffi.string(chars).decode("utf-8", "replace"))


def number(value: Any, least: int, most: int, what: str) -> int:
    """A whole number within bounds, for a C integer.

    :raises Error: code ``"bad-value"``, naming ``what`` and the bounds.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        whole = operator.index(value)
    except TypeError:
        raise Error(f"{what} is a whole number, not {value!r}", code="bad-value") from None
    if not least <= whole <= most:
        raise Error(f"{what} goes from {least} to {most}, not {whole}", code="bad-value")
    return whole


def label(value: str, most: int, what: str) -> bytes:
    """Text for a char array.

    :param most: bytes, its terminating zero not counted.
    """
    encoded = value.encode("utf-8", "replace") if isinstance(value, str) else None
    if encoded is None or len(encoded) > most or b"\0" in encoded:
        raise Error(f"{what} is text of at most {most} bytes, not {value!r}", code="bad-value")
    return encoded


def milliseconds(seconds: float | None, what: str = "timeout") -> int:
    """A time for C: None is -1, without end; what is not 0 is at least one millisecond."""
    if seconds is None:
        return -1
    try:
        good = not math.isnan(seconds) and seconds >= 0
    except TypeError:
        good = False
    if not good:
        raise Error(f"{what} is None or a number of seconds from 0, not {seconds!r}", code="bad-value")
    return math.ceil(min(seconds, 2_000_000.0) * 1000)


def options(kind: str) -> Any:
    """A zeroed option structure that knows its size."""
    made = ffi.new(f"{kind} *")
    made.struct_size = ffi.sizeof(kind)
    return made


_CHAR: Any = ffi.typeof("char")


def as_dict(struct: Any) -> dict[str, Any]:
    """A C structure as a dictionary that JSON can carry; ``drops`` by reason."""
    fields: dict[str, Any] = {}
    for name, field in ffi.typeof(struct).fields:
        value = getattr(struct, name)
        if name == "struct_size":
            continue
        if field.type.kind == "array":
            if field.type.item is _CHAR:
                value = text(value)
            elif name == "drops":
                value = dict(zip(DROP_REASONS, value))
            else:
                value = list(value)
        fields[name] = value
    return fields


def numbers(call: Callable[[Any, int], int]) -> list[int]:
    """All of a list that C writes as uint32_t: asked again where it grew meanwhile."""
    room = 64
    while True:
        found = ffi.new(WORDS, room)
        count = check(call(found, room))
        if count <= room:
            return list(found[0:count])
        room = count


def structures(kind: str, call: Callable[[Any, int], int]) -> list[dict[str, Any]]:
    """The same for structures, each as a dictionary."""
    room = 16
    while True:
        found = ffi.new(f"{kind}[]", room)
        count = check(call(found, room))
        if count <= room:
            return [as_dict(found[i]) for i in range(count)]
        room = count


# ---- handles -----------------------------------------------------------------------------------------------


def closed_error() -> Error:
    return Error("the cluster is closed in this program", code="closed", cure="attach again: Cluster.attach(ID)")


def forked_error() -> Error:
    return Error(
        "the cluster was opened before a fork, and belongs to the parent process",
        code="forked",
        cure="attach again in the child: Cluster.attach(ID)",
    )


def working_error() -> Error:
    return Error(
        "a running worker owns this attachment",
        code="worker-owns",
        cure="stop the worker first, or attach a second time: Cluster.attach(ID)",
    )


class Handle:
    """One attachment of this process to a cluster, safe to use from any thread.

    :ivar ptr: the ``rb_cluster *``; NULL once closed.
    :ivar lock: held around every C call on ``ptr`` or its ends; never taken twice by one thread.
    :ivar refuse: makes the error that every call gets now (closed, forked, owned by a worker); None = go on.
    :ivar belled: this is a VM, and a doorbell is plugged in with the cluster.
    :ivar later: what could not be done for want of the lock: (end, descriptors, count) goes back, (end, None,
        0) is closed.
    """

    __slots__ = ("__weakref__", "belled", "closing", "ends", "later", "lock", "ptr", "refuse", "worker")

    def __init__(self, ptr: Any, belled: bool = False) -> None:
        self.ptr = ptr
        self.belled = belled
        self.lock = threading.Lock()
        self.refuse: Callable[[], Error] | None = None
        self.later: deque[tuple[End, Any, int]] = deque()
        self.ends: weakref.WeakSet[End] = weakref.WeakSet()
        self.worker: Any = None
        self.closing = False
        _HANDLES.add(self)

    def call(self, function: Callable[..., int], *arguments: Any) -> int:
        """Call ``function(handle, *arguments)`` under the lock.

        :returns: what it returned, which is not negative.
        :raises Error: what its -errno means, or that the handle is closed, forked or owned by a worker.
        """
        with self.lock:
            if self.refuse is not None:
                raise self.refuse()
            if self.later:
                self.drain()
            status = function(self.ptr, *arguments)
        return check(status)

    def drain(self) -> None:
        """With the lock held: do what was left for later."""
        while self.later:
            end, descriptors, count = self.later.popleft()
            if end.ptr == NULL or self.ptr == NULL:
                continue
            if descriptors is None:
                end.closing = True
            else:
                lib.rbpy_return(self.ptr, descriptors, count)
            if end.closing and not end.pins:
                end.close_locked()

    def tidy(self) -> None:
        """Do now what was left for later, if nobody holds the lock; safe anywhere."""
        while self.refuse is None or self.refuse is closed_error:
            if not self.lock.acquire(blocking=False):
                return  # whoever holds it, or comes next, does it
            try:
                self.drain()
                if self.closing:
                    self._close_locked()
            finally:
                self.lock.release()
            if not self.later:
                return

    def close(self) -> None:
        """Stop its worker, close every end and leave the cluster.

        Where views of packets still live, that waits until the last of them dies: they keep showing what they
        showed.
        """
        if self.refuse is forked_error:
            return
        worker = self.worker
        if worker is not None:
            worker.stop()
        for end in list(self.ends):
            end.interrupt()
        with self.lock:
            if self.ptr == NULL:
                return
            self.drain()
            self.closing = True
            self.refuse = closed_error
            self._close_locked()

    def _close_locked(self) -> None:
        if self.ptr == NULL or any(end.pins for end in self.ends):
            return
        for end in list(self.ends):
            end.close_locked()
        ptr, self.ptr, self.closing = self.ptr, NULL, False
        lib.rb_cluster_close(ptr)


_HANDLES: weakref.WeakSet[Handle] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for handle in list(_HANDLES):
        handle.refuse = forked_error
        handle.lock = threading.Lock()  # another thread of the parent may have held it
        handle.later.clear()
        handle.worker = None


os.register_at_fork(after_in_child=_after_fork_in_child)


def owned_by_worker(handle: Handle, worker: Any) -> None:
    """With the lock held: every other call is refused from now on."""
    handle.refuse, handle.worker = working_error, worker


def given_back(handle: Handle) -> None:
    """The worker has ended: the handle is usable again."""
    with handle.lock:
        if handle.refuse is working_error:
            handle.refuse = None
        handle.worker = None
        handle.drain()
