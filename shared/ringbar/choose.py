# SPDX-License-Identifier: Apache-2.0
"""User code in workers: which output a packet goes to, decided by a C function or by a Python function over bursts."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from . import _c
from ._c import NULL, ffi, lib
from .burst import numpy
from .errors import Error

if TYPE_CHECKING:
    from .kinds import Planned

_CTypesFunction: Any = ctypes.CFUNCTYPE(None).__mro__[1]
_FUNCTION = "int(void *, const rb_desc *, void *const *, int, uint64_t *)"


class Packets:
    """A burst as a choosing function sees it, during its call only: ``len(packets)``, ``packets[i]``.

    The packets may lie in memory that a VM can write: look at the copy that :meth:`headers` makes.
    """

    __slots__ = ("_data", "_desc", "_handle", "_n")

    def __init__(self, handle: Any, desc: Any, data: Any, n: int) -> None:
        self._handle, self._desc, self._data, self._n = handle, desc, data, n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> memoryview:
        """The bytes of packet i, read-only, no copy."""
        i = _c.number(i, 0, self._n - 1, "the number of a packet")
        return memoryview(ffi.buffer(self._data[i], self._desc[i].word & 0x7FFF)).toreadonly()

    def _column(self, kind: str, at: int, step: int) -> Any:
        memory = ffi.buffer(self._desc, self._n * 16)
        np = numpy()
        if np is not None:
            return np.frombuffer(memory, kind)[at::step]
        view: Any = memoryview(memory)
        return view.cast({"<u4": "I", "<u8": "Q"}[kind])[at::step]

    @property
    def lengths(self) -> Any:
        """Bytes of each."""
        words = self._column("<u4", 1, 4)
        return words & 0x7FFF if numpy() is not None else [word & 0x7FFF for word in words]

    @property
    def timestamps(self) -> Any:
        """Nanoseconds since the epoch of each; 0 = none."""
        return self._column("<u8", 1, 2)

    def headers(self, n: int = 64) -> Any:
        """The first n bytes of each, zero-padded: uint8 array of shape (len, n), a copy; without numpy a
        two-dimensional memoryview."""
        n = _c.number(n, 1, int(lib.RB_MAX_LENGTH), "the bytes of a header")
        out = ffi.new("uint8_t[]", self._n * n)
        lib.rb_headers(self._handle.ptr, self._desc, self._n, n, out)
        np = numpy()
        if np is not None:
            return np.frombuffer(ffi.buffer(out), np.uint8).reshape(self._n, n)
        return memoryview(ffi.buffer(out)).cast("B", (self._n, n))


def _write(result: Any, n: int, choice: Any) -> None:
    """What the function returned, into C's array."""
    np = numpy()
    if np is not None:
        array = np.asarray(result)
        if array.shape != (n,) or array.dtype.kind not in "iub":
            raise Error(
                f"a policy returns {n} whole numbers for {n} packets, not {array.dtype} of shape {array.shape}",
                code="bad-value",
            )
        np.frombuffer(ffi.buffer(choice, n * 8), np.uint64)[:] = array.astype(np.uint64)
        return
    if len(result) != n:
        raise Error(f"a policy returned {len(result)} numbers for {n} packets", code="bad-value")
    for i in range(n):
        choice[i] = int(result[i]) & 0xFFFFFFFFFFFFFFFF


class Chooser:
    """A policy as given by the user, for C."""

    def __init__(self, policy: Any, worker: Planned) -> None:
        self.text = b""
        self.function: Any = NULL
        if isinstance(policy, str):
            self.text = _c.label(policy, 127, "a policy")
        elif isinstance(policy, ffi.CData):
            self.function = ffi.cast("rb_choose", policy)
            self.text = b"function"
        elif isinstance(policy, int) and not isinstance(policy, bool) and policy > 0:
            self.function = ffi.cast("rb_choose", policy)
            self.text = b"function"
        elif isinstance(policy, _CTypesFunction):
            self.function = ffi.cast("rb_choose", ctypes.cast(policy, ctypes.c_void_p).value)
            self.text = b"function"
        elif isinstance(getattr(policy, "address", None), int):  # numba's cfunc
            self.function = ffi.cast("rb_choose", policy.address)
            self.text = b"function"
        elif callable(policy):
            self.function = ffi.callback(_FUNCTION, _over_bursts(policy, worker), error=-5, onerror=_noted(worker))
            self.text = f"python:{getattr(policy, '__name__', 'function')}".encode("utf-8", "replace")[:127]
        else:
            raise Error(f"{policy!r} is no policy", code="bad-value", cure="a name, a C function or a Python function")
        self.policy = policy  # lives as long

    def into(self, plan: Any) -> Any:
        """Write it into an ``rb_plan``; returns what must live while C looks at it."""
        text = ffi.new("char[]", self.text)
        plan.policy = text
        plan.choose = self.function
        return text


def _over_bursts(function: Any, worker: Planned) -> Any:
    def choose(_user: Any, desc: Any, data: Any, n: int, choice: Any) -> int:
        handle = worker._planned[0][0].handle
        _write(function(Packets(handle, desc, data, n)), n, choice)
        return 0

    return choose


def _noted(worker: Planned) -> Any:
    def note(_kind: Any, problem: BaseException, _trace: Any) -> None:
        worker.failure = problem

    return note


def idle_function(function: Any, worker: Planned) -> Any:
    """A function to call while nothing comes, for C; None where there is none."""
    if function is None:
        return None
    if isinstance(function, (ffi.CData, int)):
        return ffi.cast("rb_idle", function)
    if isinstance(function, _CTypesFunction):
        return ffi.cast("rb_idle", ctypes.cast(function, ctypes.c_void_p).value)
    if isinstance(getattr(function, "address", None), int):
        return ffi.cast("rb_idle", function.address)
    if not callable(function):
        raise Error(f"{function!r} cannot be called", code="bad-value")

    def idle(_user: Any) -> int:
        function()
        return 0

    return ffi.callback("int(void *)", idle, error=-5, onerror=_noted(worker))
