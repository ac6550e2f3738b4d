# SPDX-License-Identifier: Apache-2.0
"""A burst: packets in hand, with their descriptors in arrays of its own."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from . import _c
from ._c import ffi, lib
from .errors import Error

if TYPE_CHECKING:
    from types import TracebackType

    from .ends import End

#: Views of packets of one end that may live at the same time; each keeps a buffer in the hand.
MAX_PINNED = 1024

_new = ffi.new
_buffer = ffi.buffer
_WORDS = _c.WORDS
_lengths = lib.rbpy_lengths

_numpy: Any = False  # not looked for yet; None where it is not installed
_dtypes: dict[str, Any] = {}  # numpy's, made once


def numpy() -> Any:
    """The module numpy, or None where it is not installed."""
    global _numpy
    if _numpy is False:
        try:
            import numpy as found
        except ImportError:
            _numpy = None
        else:
            _numpy = found
            _dtypes.update((kind, found.dtype(kind)) for kind in "IQ")
    return _numpy


def _array(memory: Any, kind: Literal["I", "Q"], writable: bool) -> Any:
    """Memory of C as an array of ``"I"`` or ``"Q"``: numpy's, else a memoryview."""
    np = _numpy if _numpy is not False else numpy()
    if np is None:
        view = memoryview(memory).cast("B").cast(kind)
        return view if writable else view.toreadonly()
    array = np.frombuffer(memory, _dtypes[kind])
    if not writable:
        array.setflags(write=False)
    return array


class _Pin(weakref.ref):  # type: ignore[type-arg]
    """Knows when the last view of a packet dies.

    Views are made from one ``ffi.buffer`` per packet, which every view, slice or array keeps alive; this is a
    weak reference to it.
    """

    __slots__ = ("end",)
    end: End

    def __new__(cls, exporter: Any, end: End) -> _Pin:
        self = super().__new__(cls, exporter, _unpin)
        self.end = end
        end.pins[id(self)] = self
        return self

    def __init__(self, exporter: Any, end: End) -> None:
        super().__init__(exporter, _unpin)  # type: ignore[call-arg]


def _unpin(pin: Any) -> None:
    """The last view died: if the burst is gone, the buffer goes back now. Runs anywhere, even twice."""
    end = pin.end
    end.pins.pop(id(pin), None)
    descriptor = end.loose.pop(id(pin), None)
    if descriptor is not None:
        end.handle.later.append((end, descriptor, 1))
    if descriptor is not None or end.closing or end.handle.closing:
        if end.closing:
            end.handle.later.append((end, None, 0))
        end.handle.tidy()


class Burst(Sequence[memoryview]):
    """Packets in hand, received or allocated together.

    ``len(burst)`` packets; ``burst[i]`` is a memoryview on packet i itself, no copy. It is read-only unless
    the end was opened writable, or the packet was allocated. A view, or a slice or array made from it, pins
    its buffer: while it lives, the buffer stays in the hand, so it never shows another packet's bytes.
    Packets without views go back when the burst is released: by :meth:`release`, by the loop that made it
    going on, or by garbage collection. After that the burst is empty.

    Of an allocated packet, ``burst[i]`` is all the room there is; its length is what ``burst.lengths[i]`` is
    set to.

    Like its end, a burst belongs to one thread at a time. Arrays are numpy's where numpy is installed, else
    memoryviews.
    """

    __slots__ = ("__weakref__", "_allocated", "_array", "_desc", "_end", "_live", "_n", "_pins", "_refused")

    def __init__(self, end: End, desc: Any, n: int, live: Any = None, allocated: bool = False) -> None:
        self._end = end
        self._desc = desc  # rb_desc[]; a handle of 0 is nobody's, so giving back twice is harmless
        self._live = live  # uint32_t[] of lengths that may be set, packed into the descriptors when sent
        self._allocated = allocated  # views show all the room
        self._array: Any = None  # what .lengths gave
        self._pins: dict[int, _Pin] | None = None
        self._refused: End | None = None  # the end that refused what is left
        self._n = n  # the last: __del__ may meet one that an interrupt left half made
        if allocated:
            end.allocated.add(self)

    def __del__(self) -> None:
        try:
            n = self._n
        except AttributeError:
            return
        if n:
            self._n = 0
            if self._pins:
                self._loosen(n)
            self._end.handle.later.append((self._end, self._desc, n))
            self._end.handle.tidy()

    # ---- packets ----

    def __len__(self) -> int:
        """Packets still in hand."""
        return self._n

    def __bool__(self) -> bool:
        return self._n > 0

    def _index(self, i: Any) -> int:
        index, n = operator.index(i), self._n
        if index < 0:
            index += n
        if not 0 <= index < n:
            raise IndexError(f"packet {i} of a burst of {n}")
        return index

    def __getitem__(self, i: Any) -> Any:
        """Packet i itself.

        :returns: memoryview; it pins its buffer while it or anything made from it lives.
        :raises IndexError: no such packet, or the burst was released.
        :raises BufferError: as many views as one end allows are alive (:data:`MAX_PINNED`).
        """
        if isinstance(i, slice):
            raise TypeError("a burst is not sliced; burst.select(mask) takes packets out of it")
        index = self._index(i)
        end = self._end
        if self._pins is None:
            self._pins = {}
        pin = self._pins.get(index)
        exporter = None if pin is None else pin()
        if exporter is None:
            if len(end.pins) >= MAX_PINNED:
                raise BufferError(
                    f"{len(end.pins)} packets of {end.address} are kept by views; "
                    "release some (view.release(), or del), or keep copies: burst.copy(i)"
                )
            exporter = self._export(index)
            self._pins[index] = _Pin(exporter, end)
        view = memoryview(exporter)
        if self._allocated:
            return view
        return view[: self._length(index)] if end.writable else view.toreadonly()

    def _length(self, index: int) -> int:
        return int(self._live[index]) if self._live is not None else int(lib.rb_desc_length(self._desc + index))

    def _export(self, index: int) -> Any:
        end, desc = self._end, self._desc + index
        handle = end.handle
        with handle.lock:
            end.check_open()
            data = lib.rb_data(handle.ptr, desc)
        if data == _c.NULL:
            raise Error(f"packet {index} has no valid buffer", code="bad-descriptor")
        room = end.buffer_size - lib.rb_desc_offset(desc)
        return _buffer(data, room if self._allocated or end.writable else min(room, lib.rb_desc_length(desc)))

    def __iter__(self) -> Iterator[memoryview]:
        for i in range(self._n):
            yield self[i]

    def copy(self, i: int) -> bytes:
        """Packet i as bytes: a copy, which pins nothing.

        :raises IndexError: no such packet, or the burst was released.
        """
        index = self._index(i)
        end, desc = self._end, self._desc + index
        length = self._length(index)
        with end.handle.lock:
            end.check_open()
            data = lib.rb_data(end.handle.ptr, desc)
            if data == _c.NULL or length + lib.rb_desc_offset(desc) > end.buffer_size:
                raise Error(f"packet {index} has no valid buffer", code="bad-descriptor")
            return bytes(_buffer(data, length))

    def headers(self, n: int = 64) -> Any:
        """The first n bytes of every packet, zero-padded, gathered in one pass: a copy.

        :param n: bytes of each, 1 to 16384.
        :returns: uint8 array of shape (len(self), n); without numpy a two-dimensional memoryview.
        """
        width = _c.number(n, 1, 16384, "the width of headers")
        rows = self._n
        if self._live is not None and rows:
            self._pack()
        memory = _new("uint8_t[]", max(rows, 1) * width)
        end = self._end
        if rows:
            with end.handle.lock:
                end.check_open()
                lib.rb_headers(end.handle.ptr, self._desc, rows, width, memory)
        np = numpy()
        if np is not None:
            return np.frombuffer(_buffer(memory, rows * width), np.uint8).reshape(rows, width)
        view = memoryview(_buffer(memory, max(rows, 1) * width)).cast("B")
        return view.cast("B", (rows, width)) if rows else view[:0]

    # ---- arrays ----

    @property
    def lengths(self) -> Any:
        """Bytes of each packet, uint32.

        Of allocated packets, and of those from an end opened writable, a live array: set ``lengths[i]`` and
        the packet is sent with that length. Take it anew after a send or select, which leave fewer packets.
        Else read-only.
        """
        array = self._array
        if array is None:
            n = self._n
            if self._live is None:
                memory = _new(_WORDS, n or 1)
                _lengths(self._desc, n, memory)
                if self._end.writable:
                    self._live = memory
            else:
                memory = self._live
            array = self._array = _array(_buffer(memory, 4 * n), "I", self._live is not None)
        return array

    @property
    def timestamps(self) -> Any:
        """When each packet came, uint64 ns since the epoch by the host's clock; 0 = unknown. Read-only."""
        return self._column("Q", 8)

    @property
    def handles(self) -> Any:
        """The handle of each packet's buffer, uint32: pool 8 bits, index 24 bits. Read-only."""
        return self._column("I", 0)

    def _column(self, kind: Literal["I", "Q"], offset: int) -> Any:
        snapshot = bytes(_buffer(self._desc, 16 * self._n)) if self._n else b""
        size = 8 if kind == "Q" else 4
        np = numpy()
        words = memoryview(snapshot).cast(kind) if np is None else np.frombuffer(snapshot, kind)
        return words[offset // size :: 16 // size]

    @property
    def hashes(self) -> Any:
        """The receive hash of each packet, uint32; 0 = none. Read-only."""
        n, end = self._n, self._end
        memory = _new(_WORDS, n or 1)
        if n:
            with end.handle.lock:
                end.check_open()
                lib.rbpy_hashes(end.handle.ptr, self._desc, n, memory)
        return _array(_buffer(memory, 4 * n), "I", False)

    # ---- moving ----

    def select(self, mask: Any) -> Burst:
        """Take some packets out into a burst of their own; the others stay here.

        :param mask: true for each packet to take: a bool array, or a sequence of as many truth values as
            packets.
        :returns: those taken, in order. It is not released by the loop that made this burst.
        :raises BufferError: a view of one of them is alive.
        :raises ValueError: the mask has another length.
        """
        n = self._n
        chosen = _mask(mask)
        if len(chosen) != n:
            raise ValueError(f"a mask of {len(chosen)} for a burst of {n}")
        self._check_pins("selected", chosen)
        octets = ffi.from_buffer("uint8_t[]", chosen)
        live = live_rest = None
        if self._live is not None:
            live, live_rest = _new(_WORDS, n or 1), _new(_WORDS, n or 1)
            lib.rbpy_split_lengths(self._live, n, octets, live, live_rest)
        pins = None
        if self._pins:
            left = [i for i in range(n) if not chosen[i]]
            pins = {new: self._pins[old] for new, old in enumerate(left) if old in self._pins}
        # Made before it has packets, so that an interrupt finds each of them in one burst.
        taken = Burst(self._end, _new(_c.DESCRIPTORS, n), n, live, self._allocated)
        count = lib.rbpy_split(self._desc, n, octets, taken._desc)
        taken._n = count
        self._n, self._array, self._live, self._pins = n - count, None, live_rest, pins
        return taken

    def release(self) -> None:
        """Give the packets back; the burst is then empty. Those with living views go back when these die."""
        n = self._n
        if not n:
            return
        end = self._end
        handle = end.handle
        if self._pins:
            self._loosen(n)
        with handle.lock:
            if handle.refuse is not None and not handle.closing:
                return  # a worker has the handle: the burst goes back later; or all is gone
            if end.ptr != _c.NULL:
                lib.rbpy_return(handle.ptr, self._desc, n)
                refuser = self._refused
                if refuser is not None and refuser.ptr != _c.NULL and refuser.handle is handle:
                    lib.rb_drop(refuser.ptr, n, lib.RB_DROP_FULL)
            self._n = 0
            handle.drain()
        self._pins, self._array, self._live, self._refused = None, None, None, None

    def __enter__(self) -> Burst:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<ringbar.Burst of {self._n} from {self._end.address}>"

    # ---- for ends ----

    def _loosen(self, n: int) -> None:
        """What living views pin no longer belongs to the burst: it goes back with the last view."""
        pins, self._pins = self._pins, None
        for index, pin in (pins or {}).items():
            if index < n and pin() is not None:
                single = _new(_c.DESCRIPTORS, 1)
                single[0] = self._desc[index]
                self._desc[index].handle = 0
                pin.end.loose[id(pin)] = single
                if pin() is None:  # it died meanwhile, perhaps before it was loose
                    _unpin(pin)

    def give_back_locked(self) -> None:
        """With the handle's lock held, the end about to close and no view alive: all goes back."""
        n, self._n = self._n, 0
        if n:
            lib.rbpy_return(self._end.handle.ptr, self._desc, n)

    def _check_pins(self, what: str, chosen: Any = None) -> None:
        """:raises BufferError: naming the first packet that is to move and has a living view."""
        for index in sorted(self._pins or ()):
            if (chosen is None or chosen[index]) and self._pins and self._pins[index]() is not None:
                raise BufferError(
                    f"packet {index} has a living view and cannot be {what}: release it first (view.release(), or del)"
                )

    def _pack(self) -> None:
        """Set lengths into the descriptors.

        :raises Error: one is 0, or does not fit its buffer.
        """
        n = self._n
        fits = lib.rbpy_pack(self._desc, n, self._live, self._end.buffer_size)
        if fits == n:
            return
        length = self._live[fits]
        room = self._end.buffer_size - lib.rb_desc_offset(self._desc + fits)
        if not length:
            raise Error(f"packet {fits} is empty", code="empty", cure=f"set lengths[{fits}], or leave it out: select()")
        raise Error(
            f"packet {fits}: a length of {length} bytes does not fit the {room} of its buffer",
            code="too-long",
            cure=f"set lengths[{fits}] to at most {room}, or make the cluster with size= larger",
        )

    def _moved(self) -> int:
        """Those first ones whose handles are 0 now are gone, and the rest moves up. How many are gone."""
        k = int(lib.rbpy_moved(self._desc, self._n))
        if k:
            self._n -= k
            self._array = self._pins = None
            if self._live is not None and self._n:
                live = _new(_WORDS, self._n)  # the old one may be looked at still
                ffi.memmove(live, self._live + k, 4 * self._n)
                self._live = live
        return k


def _mask(mask: Any) -> Any:
    """A mask as bytes, one per packet: 0 or not."""
    np = numpy()
    if np is not None:
        array = np.asarray(mask)
        if array.dtype != np.bool_:
            array = array.astype(bool)
        if array.ndim != 1:
            raise ValueError(f"a mask has one dimension, not {array.ndim}")
        return np.ascontiguousarray(array).view(np.uint8)
    return bytes(bool(x) for x in mask)
