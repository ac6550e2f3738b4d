# SPDX-License-Identifier: Apache-2.0
"""Clusters and their queues, the same on the host and in a VM."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Callable, Literal, overload

from . import _c, address
from ._c import NULL, Handle, ffi, lib
from .attach import attach, refuse_to_hide, retry
from .ends import Rx, RxTx, Tx
from .errors import BadAddress, Detached, Error, NotFound

if TYPE_CHECKING:
    from types import TracebackType

_RX, _TX = int(lib.RB_RX), int(lib.RB_TX)
_MODES: dict[str, tuple[int, type[Rx] | type[Tx]]] = {
    "rx": (_RX, Rx),
    "tx": (_TX, Tx),
    "rxtx": (_RX | _TX, RxTx),
}
_SEGMENTS = {1: "pool", 2: "lane"}
_STATES = ("free", "open", "closing", "gone")


def clusters() -> list[int]:
    """Numbers of the clusters of this host. Those whose owner is dead are cleaned up first."""
    return sorted(_c.numbers(lib.rb_cluster_list))


class Queue:
    """A queue of a cluster, by its number. Made by :meth:`Cluster.create_queue` and :attr:`Cluster.queues`.

    :ivar cluster: the Cluster object.
    :ivar id: its number.
    :ivar address: ``"99@0"``.
    """

    __slots__ = ("address", "cluster", "id")

    def __init__(self, cluster: Cluster, id: int) -> None:  # noqa: A002
        self.cluster = cluster
        self.id = id
        self.address = str(address.QueueAddress(cluster.id, id))

    def info(self) -> dict[str, Any]:
        """What it is and does now.

        :returns: ``slots``, ``credit``, ``producer`` and ``consumer`` (None, or ``pid``, ``name``, ``vm``,
            ``since_ns``), ``path`` (both as a person reads them; None in a VM, which sees of all this only
            its own lane), ``server_pid`` (who lends on it; 0: nobody alive), ``feeds`` (made for a program that
            sends to a VM which another one serves: the queue that is meant; else None), ``stalled`` (the consumer
            waits for that process to notice it), ``waiting`` (packets unread), ``lent``, ``held`` (of these in the
            consumer's hand), ``granted``, ``quarantined`` (buffers), ``drops`` by reason, and counters.
        :raises NotFound: it was destroyed.
        """
        raw = ffi.new("rb_queue_info *")
        self.cluster.call(lib.rb_queue_get_info, self.id, raw)
        found = _c.as_dict(raw[0])
        ends: dict[str, dict[str, Any] | None] = {}
        for end in ("producer", "consumer"):
            pid, name, vm = (found.pop(f"{end}_{what}") for what in ("pid", "name", "vm"))
            since = found.pop(f"{end}_since")
            ends[end] = {"pid": pid, "name": name, "vm": vm, "since_ns": since} if pid or vm else None
        return {
            "address": self.address,
            "id": found["id"],
            "path": None if self.cluster.is_guest else f"{_who(ends['producer'])} → {_who(ends['consumer'])}",
            **ends,
            "slots": found["slots"],
            "credit": found["credit"],
            "direct": bool(found["direct"]),
            "paused": bool(found["paused"]),
            "filter": found["filter"] or None,
            "stalled": bool(found["waiting"]),
            "server_pid": found["server_pid"],
            "feeds": str(address.QueueAddress(self.cluster.id, found["feeds"])) if found["feeds"] >= 0 else None,
            "waiting": found["count"],
            **{name: found[name] for name in ("lent", "held", "granted", "quarantined")},
            **{name: found[name] for name in ("packets", "bytes", "copied", "foreign", "drops")},
            "received_packets": found["rx_packets"],
            "received_bytes": found["rx_bytes"],
        }

    def pause(self) -> None:
        """Until :meth:`resume` nothing is delivered, and what is sent is refused, not dropped."""
        self.cluster.call(lib.rb_queue_pause, self.id, 1)

    def resume(self) -> None:
        """Deliver again."""
        self.cluster.call(lib.rb_queue_pause, self.id, 0)

    @property
    def filter(self) -> str | None:
        """Only packets that match this expression (libpcap's syntax) are passed on by the queue; None = all.

        Settable by any program of the host while packets flow. The others are taken from the sender as if they had
        been passed on, and counted in ``info()["drops"]["filter"]``. In a VM it is not to be seen: None.

        :raises Error: it cannot be compiled (says where and why), or is longer than 511 bytes; libpcap is not
            installed; a direct queue; in a VM.
        """
        found: str | None = self.info()["filter"]
        return found

    @filter.setter  # noqa: A003
    def filter(self, expression: str | None) -> None:
        text = NULL if expression is None else _c.label(expression, 65535, "a filter")
        self.cluster.call(lib.rb_queue_filter, self.id, text)

    def destroy(self) -> None:
        """Remove the queue.

        :raises Busy: an end is open, or attached to a VM.
        """
        self.cluster.call(lib.rb_queue_destroy, self.id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Queue) and (self.cluster, self.id) == (other.cluster, other.id)

    def __hash__(self) -> int:
        return hash((id(self.cluster), self.id))

    def __str__(self) -> str:
        return self.address

    def __repr__(self) -> str:
        return f"<ringbar.Queue {self.address}>"


def _who(end: dict[str, Any] | None) -> str:
    """Who holds an end, for people: ``lb0 (pid 812)``, ``vm:ids1 zeek[441]``."""
    if end is None:
        return "nobody"
    if not end["vm"]:
        return f"{end['name'] or 'a program'} (pid {end['pid']})"
    vm = end["vm"] if end["vm"].startswith("qmp:") else f"vm:{end['vm']}"
    if not end["name"]:
        return vm
    return f"{vm} {end['name']}[{end['pid']}]" if end["pid"] else f"{vm} {end['name']}"


class Cluster:
    """One attachment of this program to a cluster. Made by :meth:`create` and :meth:`attach`.

    Its calls, and those of its ends, may come from any thread and take turns. Threads that shall work side by
    side attach each for themselves. After a fork, attach again in the child.

    Leaving ``with`` closes it.

    :ivar id: the cluster's number.
    :ivar is_guest: this program runs in a VM, and the cluster is the host's.
    """

    def __init__(self, id: int, handle: Handle) -> None:  # noqa: A002
        """Use :meth:`create` or :meth:`attach`."""
        self.id = id
        self._adopt(handle)

    def _adopt(self, handle: Handle) -> None:
        self._handle = handle
        self.is_guest = bool(self._raw_info().guest)
        self._finalizer = weakref.finalize(self, Handle.close, handle)

    # ---- life ----

    @classmethod
    def create(
        cls,
        id: int,  # noqa: A002
        *,
        buffers: int | None = None,
        size: int = 2048,
        queues: int = 0,
        pages: str = "auto",
        numa: int | None = None,
        persistent: bool = False,
        label: str = "",
        sealed: bool = False,
    ) -> Cluster:
        """Make a cluster on this host. The place of one whose owner is dead is taken.

        :param id: its number, 0 to 65535.
        :param buffers: how many; None = computed.
        :param size: bytes of a buffer: a power of two from 256 to 16384; with ``zc:`` cards 2048 or 4096.
        :param queues: so many queues are made at once, numbered from 0.
        :param pages: ``"auto"``, ``"4k"``, ``"2M"`` or ``"1G"``.
        :param numa: the node its memory comes from; None = anywhere.
        :param persistent: it lives until destroyed or the host reboots; else until this object is closed or
            the process ends.
        :param label: for people, up to 31 bytes.
        :param sealed: the pool is memory without a path that nobody can shrink; never together with
            persistent.
        :raises Busy: the number is in use; says by whom.
        :raises Error: it would hide one of the host's that is attached to this VM, a size that cannot be had (with
            the nearest that can), too few huge pages (with how many), no permission.
        """
        options = _c.options("rb_cluster_options")
        number = _cluster_number(id)
        options.buffers = 0 if buffers is None else _c.number(buffers, 1, 2**24, "the number of buffers")
        options.buffer_size = _c.number(size, 1, 2**31, "the size of a buffer")
        options.queues = _c.number(queues, 0, 65536, "the number of queues")
        found = [i for i, name in enumerate(_c.PAGES) if name.lower() == str(pages).lower()]
        if not found:
            raise Error(f"pages are {', '.join(_c.PAGES)}, not {pages!r}", code="bad-value")
        options.pages = found[0]
        options.numa = 0 if numa is None else _c.number(numa, 0, 4095, "a NUMA node") + 1
        options.persistent = bool(persistent)
        options.sealed = bool(sealed)
        options.label = _c.label(label, 31, "a label")
        refuse_to_hide(number)
        out = ffi.new("rb_cluster **")
        _c.check(lib.rb_cluster_create(number, options, out))
        return cls(number, Handle(out[0]))

    @classmethod
    def attach(cls, id: int, *, timeout: float | None = 0) -> Cluster:  # noqa: A002
        """Attach to a cluster of this host, or in a VM to one that the host has attached to it.

        :param id: its number.
        :param timeout: seconds to wait until it exists, or in a VM until it has been attached; 0 = now, None
            = without end.
        :raises NotFound: not there in time.
        :raises Incompatible: another version of the memory's layout.
        :raises Error: no permission.
        """
        number = _cluster_number(id)
        return cls(number, retry(lambda: attach(number), timeout))

    def close(self) -> None:
        """Stop its worker, close all ends and leave. A cluster that is not persistent goes when its maker
        closes it.

        While views of packets live, leaving waits until the last of them dies.
        """
        self._handle.close()
        if self._handle.ptr == NULL:
            self._finalizer.detach()

    def destroy(self, *, force: bool = False) -> None:
        """Close, and remove the cluster from this host.

        :param force: also while other processes or VMs use it; their ends then tell them so.
        :raises Busy: in use; says by whom.
        """
        if self.is_guest:
            raise _host_only("clusters are destroyed on the host", f"ringbar cluster destroy {self.id}")
        self.close()
        try:
            _c.check(lib.rb_cluster_destroy(self.id, bool(force)))
        except NotFound:
            pass  # it went with its maker: this was it

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ringbar.Cluster {self.id}{' closed' if self.closed else ''}>"

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._handle.ptr == NULL or self._handle.closing

    @property
    def handle(self) -> Handle:
        """The attachment below; for workers."""
        return self._handle

    def call(self, function: Callable[..., int], *arguments: Any) -> int:
        """Call a function of ringbar.h with this cluster; for other modules of ringbar."""
        return self._handle.call(function, *arguments)

    def reopen(self, open_end: Callable[[Handle], None], timeout: float | None, what: str) -> None:
        """Open an end again, attaching anew where the memory went away; for :meth:`End.reopen`.

        :raises TimeoutError: not possible in time.
        """

        def attempt() -> None:
            try:
                if self._handle.refuse is None:
                    open_end(self._handle)
                    return
            except (Detached, NotFound):
                pass
            handle = attach(self.id)
            old, self._handle = self._handle, handle
            old.close()
            self._adopt(handle)
            open_end(handle)

        try:
            retry(attempt, timeout)
        except NotFound as problem:
            raise TimeoutError(f"{what} cannot be opened again yet: {problem}") from problem

    # ---- queues and devices ----

    def create_queue(
        self,
        id: int | None = None,  # noqa: A002
        *,
        slots: int = 4096,
        credit: int | None = None,
        direct: bool = False,
    ) -> Queue:
        """Make a queue.

        :param id: its number; None = the lowest free one.
        :param slots: packets it can hold, a power of two from 2 to 65536.
        :param credit: the most buffers lent on it at once; None = slots + 2 bursts.
        :param direct: between two VMs without the host: they trust each other.
        :raises Error: it exists; a size that cannot be had; the pool is too small (with the number that would
            do); in a VM: queues are made on the host.
        """
        if self.is_guest:
            raise _host_only("queues are made on the host", f"ringbar queue create {self.id}")
        options = _c.options("rb_queue_options")
        options.slots = _c.number(slots, 1, 2**31, "the number of slots")
        options.credit = 0 if credit is None else _c.number(credit, 1, 2**31, "the credit")
        options.direct = bool(direct)
        number = -1 if id is None else _c.number(id, 0, address.MAX_QUEUE, "a queue's number")
        return Queue(self, self.call(lib.rb_queue_create, number, options))

    @contextlib.contextmanager
    def observe(self, queue: int | str | Queue, *, slots: int = 4096) -> Iterator[Rx]:
        """A copy of every packet of a queue while the block runs; nothing is taken away from its consumer.

        The process that serves the queue makes the copies; what does not fit is dropped from the copies and counted
        in the stats of this end's queue.

        :param queue: which one.
        :param slots: of the queue of copies, which is made for this and destroyed in the end.
        :raises Error: it is observed already (Busy), direct between two VMs, or the pool is too small; in a VM.
        """
        number = self._queue_address(queue).queue
        copies = self.create_queue(slots=slots)
        try:
            with self.open_queue(copies, "rx") as rx:
                self.call(lib.rb_queue_observe, number, copies.id)
                try:
                    yield rx
                finally:
                    with contextlib.suppress(Error):  # destroyed meanwhile
                        self.call(lib.rb_queue_observe, number, -1)
        finally:
            with contextlib.suppress(Error):
                copies.destroy()

    @property
    def queues(self) -> list[Queue]:
        """All queues, by number. In a VM: those that are attached to it."""
        handle = self._handle

        def listed(out: Any, n: int) -> int:
            return handle.call(lib.rb_queue_list, out, n)

        return [Queue(self, n) for n in sorted(_c.numbers(listed))]

    @overload
    def open_queue(self, queue: int | str | Queue, mode: Literal["rx"], *, writable: bool = False) -> Rx: ...
    @overload
    def open_queue(self, queue: int | str | Queue, mode: Literal["tx"], *, writable: bool = False) -> Tx: ...

    def open_queue(self, queue: int | str | Queue, mode: str, *, writable: bool = False) -> Rx | Tx:
        """Open one end of a queue.

        :param queue: a number, an address ``"99@0"``, or a Queue.
        :param mode: ``"rx"`` to receive, ``"tx"`` to send, as this program sees it.
        :param writable: packets received will be changed in place.
        :returns: :class:`Rx` or :class:`Tx`.
        :raises Busy: somebody holds that end; says who, since when, and what frees it.
        :raises NotFound: no such queue.
        """
        if mode not in ("rx", "tx"):
            raise Error(f'the end of a queue is "rx" or "tx", not {mode!r}', code="bad-value")
        return self._open(str(self._queue_address(queue)), mode, int(lib.RB_WRITABLE) if writable else 0)

    @overload
    def open_device(self, name: str, mode: Literal["rx"], **options: Any) -> Rx: ...
    @overload
    def open_device(self, name: str, mode: Literal["tx"], **options: Any) -> Tx: ...
    @overload
    def open_device(self, name: str, mode: Literal["rxtx"], **options: Any) -> RxTx: ...

    def open_device(self, name: str, mode: str, **options: Any) -> Rx | Tx:
        """Open a device: ``"zc:eth1"``, ``"zc:eth1@2"``, ``"eth1"``, ``"stack:eth1"``, ``"pcap:/tmp/a.pcap"``; a
        queue's address does too. An option that the kind of device does not know is refused.

        :param name: one device, as in interface addresses.
        :param mode: ``"rx"``, ``"tx"``, or ``"rxtx"`` for an end that does both.
        :param xdp: ``zc:``: ``"driver"`` or ``"generic"`` insists on that mode; ``stats()["mode"]`` says which was
            got.
        :param writable: packets received will be changed in place.
        :param filter: as :attr:`End.filter`, from the first packet on.
        :param steer: ``zc:``, receiving: what is taken from the card; the rest stays with the kernel.
        :param take_all: ``zc:``: take all packets, even of a card that this host is reached by.
        :param metadata: ``zc:``, receiving: where the card's driver knows them, packets come with its own time and
            hash (:attr:`Burst.hashes`); no other XDP program can then be on the interface.
        :param busy_poll: ``zc:``: microseconds that the kernel polls the driver in this program's stead.
        :param promiscuous: ``zc:`` and interfaces, receiving: also packets for other machines, until it is closed.
        :param fanout: interfaces, receiving: all ends that name the same group (1 to 65535) share the packets, flow
            by flow.
        :param snaplen: interfaces, receiving, and ``pcap:``, sending: bytes kept of each packet.
        :param observe: ``stack:``, receiving: what the kernel sends goes its way as well; else it goes nowhere unless
            this program sends it.
        :param speed: ``pcap:``, receiving: times the recorded speed; below 0 = as fast as it goes.
        :param pps: ``pcap:``, receiving: packets per second instead.
        :param gbps: ``pcap:``, receiving: gigabits per second instead.
        :param loops: ``pcap:``, receiving: how often the file is played; None = without end.
        :param preload: ``pcap:``, receiving: read it into memory first, and play it from there.
        :param interface: ``pcap:``, sending: name of the interface that is written into the file.
        :param format: ``pcap:``, sending: ``"pcapng"`` or ``"pcap"``; else as the file's name ends.
        :param rotate_bytes: ``pcap:``, sending: the next file before one gets larger.
        :param rotate_seconds: ``pcap:``, sending: the next file with the first packet after so many seconds.
        :returns: :class:`Rx`, :class:`Tx` or :class:`RxTx`.
        :raises BadAddress: the name cannot be read.
        :raises NotFound: no such interface, file or queue.
        :raises Busy: somebody else has it.
        """
        device = address.parse_device(name)
        if mode not in _MODES:
            raise Error(f'the mode of a device is "rx", "tx" or "rxtx", not {mode!r}', code="bad-value")
        flags, fields = device_options(**options)
        if isinstance(device, address.QueueAddress):
            if mode == "rxtx":
                raise Error(f'the end of a queue is "rx" or "tx", not {mode!r}', code="bad-value")
            return self._open(str(self._queue_address(name)), mode, flags, fields)
        return self._open(str(device), mode, flags, fields)

    def open_tap(self, where: str, sends: bool) -> Tx:
        """A network interface of the kernel's, for :mod:`ringbar.cli.tap`: it is there as long as the end is open.

        :param where: ``tap:NAME[,mac=MAC][,netns=FILE]``.
        :param sends: what the kernel sends out of it is wanted, too.
        :returns: :class:`Tx`, or with ``sends`` :class:`RxTx`.
        """
        kind: type[Tx] = RxTx if sends else Tx
        return kind(self, self._handle, where, _MODES["rxtx" if sends else "tx"][0])

    def _open(self, where: str, mode: str, flags: int, options: dict[str, Any] | None = None) -> Rx | Tx:
        bits, kind = _MODES[mode]
        return kind(self, self._handle, where, bits | flags, options)

    def _queue_address(self, queue: int | str | Queue) -> address.QueueAddress:
        if isinstance(queue, Queue):
            found = address.QueueAddress(queue.cluster.id, queue.id)
        elif isinstance(queue, str):
            found = address.parse_queue(queue)
        else:
            found = address.QueueAddress(self.id, _c.number(queue, 0, address.MAX_QUEUE, "a queue's number"))
        if found.cluster != self.id:
            raise BadAddress(
                f"{found} is a queue of another cluster than {self.id}",
                cure=f"Cluster.attach({found.cluster})",
            )
        return found

    # ---- looking ----

    @property
    def writable(self) -> bool:
        """Whether this program may write packets; a VM's pool can be read-only."""
        return bool(self.call(lib.rb_writable))

    def service(self) -> None:
        """Take back what was returned, refill grants, answer borrowers; for lenders that compute for long."""
        self.call(lib.rb_service)

    def _raw_info(self) -> Any:
        info = ffi.new("rb_cluster_info *")
        self.call(lib.rb_cluster_get_info, info)
        return info

    def info(self) -> dict[str, Any]:
        """Its settings.

        :returns: ``id``, ``label``, ``lives`` (for people), ``persistent``, ``owner_pid``, ``buffer_size``
            (bytes), ``buffers``, ``free`` (those of no serving thread), ``pages``, ``pools``, ``lanes``,
            ``queues`` (counts), ``sealed``, ``guest``, ``generation``, ``created_ns``.
        """
        raw = _c.as_dict(self._raw_info()[0])
        if raw["guest"]:
            lives = "seen from this VM"
        elif raw["persistent"]:
            lives = "until destroyed"
        else:
            lives = f"with pid {raw['owner_pid']}" if raw["owner_pid"] else "its process died"
        return {
            "id": raw["id"],
            "label": raw["label"],
            "lives": lives,
            "persistent": bool(raw["persistent"]),
            "owner_pid": raw["owner_pid"],
            "buffer_size": raw["buffer_size"],
            "buffers": raw["buffers"],
            "free": raw["home_free"],
            "pages": None if raw["guest"] else _c.PAGES[raw["pages"]] if raw["pages"] < len(_c.PAGES) else "other",
            **{name: raw[name] for name in ("pools", "lanes")},
            "queues": len(self.queues) if raw["guest"] else raw["queues"],
            "sealed": bool(raw["sealed"]),
            "guest": bool(raw["guest"]),
            "generation": raw["generation"],
            "created_ns": raw["created_ns"],
        }

    def status(self) -> dict[str, Any]:
        """The cluster and everything in it, now: what ``ringbar status ID --json`` says of it.

        :returns: ``cluster`` (as :meth:`info`), ``queues`` (as :meth:`Queue.info`), ``books`` (per serving
            thread: buffers at home, free, lent, in devices, quiescing, shared, quarantined), ``devices``
            (``zc:`` devices and who is fed with part of what they receive) and ``segments`` (pools and lanes:
            where they are, which VM); the last three are empty in a VM. JSON can carry it.
        """
        queues = []
        for queue in self.queues:
            with contextlib.suppress(NotFound):  # destroyed meanwhile
                queues.append(queue.info())
        handle = self._handle

        def books(out: Any, n: int) -> int:
            return handle.call(lib.rb_book_list, out, n)

        def segments(out: Any, n: int) -> int:
            return handle.call(lib.rb_cluster_segments, out, n)

        def devices(out: Any, n: int) -> int:
            return handle.call(lib.rb_device_list, out, n)

        return {
            "cluster": self.info(),
            "queues": queues,
            "devices": [] if self.is_guest else [_device(d) for d in _c.structures("rb_device_info", devices)],
            "books": [] if self.is_guest else _c.structures("rb_book_info", books),
            "segments": [] if self.is_guest else [_segment(s) for s in _c.structures("rb_segment_info", segments)],
        }


def _segment(raw: dict[str, Any]) -> dict[str, Any]:
    state = raw["state"]
    return {
        **raw,
        "kind": _SEGMENTS.get(raw["kind"], "other"),
        "state": _STATES[state] if state < len(_STATES) else str(state),
    }


def _device(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        **raw,
        "receives": bool(raw["receives"]),
        "queue": raw["queue"] if raw["queue"] >= 0 else None,
        "rule": raw["rule"] or "all" if raw["receives"] else None,
    }


_FLAGS = {"writable": int(lib.RB_WRITABLE), "take_all": int(lib.RB_TAKE_ALL), "metadata": int(lib.RB_METADATA)}
_XDP = {"auto": 0, "driver": int(lib.RB_DRIVER), "generic": int(lib.RB_GENERIC)}
_TEXTS = {"steer": "steer", "filter": "filter", "interface": "name"}
_NUMBERS = {
    "busy_poll": ("busy_poll_us", 0, 10**6),
    "fanout": ("fanout_group", 1, 65535),
    "snaplen": ("snaplen", 1, 2**18),
    "rotate_bytes": ("rotate_bytes", 65536, 2**63),
}
_RATES = {"speed": (-1.0, 1e9), "pps": (0.0, 1e12), "gbps": (0.0, 1e6), "rotate_seconds": (0.0, 1e9)}
_FORMATS = {"pcapng": int(lib.RB_PCAPNG), "pcap": int(lib.RB_PCAP)}


def device_options(**options: Any) -> tuple[int, dict[str, Any]]:
    """Read the options of :meth:`Cluster.open_device`.

    :returns: flags, and fields of ``rb_open_options``.
    :raises Error: a value out of its bounds.
    :raises TypeError: an option that there is not.
    """
    flags = 0
    fields: dict[str, Any] = {}
    for name, value in options.items():
        if name in _FLAGS:
            flags |= _FLAGS[name] if value else 0
        elif name == "xdp":
            if value not in _XDP:
                raise Error(f'xdp is "auto", "driver" or "generic", not {value!r}', code="bad-value")
            flags |= _XDP[value]
        elif name in ("promiscuous", "preload", "observe"):
            fields[name] = int(bool(value))
        elif name == "loops":
            fields[name] = 2**64 - 1 if value is None else _c.number(value, 1, 2**63, "the number of loops")
        elif name not in {"format", *_TEXTS, *_NUMBERS, *_RATES}:
            raise TypeError(f"open_device() got an unexpected keyword argument {name!r}")
        elif value is None:
            pass
        elif name == "format":
            if value not in _FORMATS:
                raise Error(f'format is "pcapng" or "pcap", not {value!r}', code="bad-value")
            fields[name] = _FORMATS[value]
        elif name in _TEXTS:
            if not isinstance(value, str):
                raise Error(f"{name} is text, not {value!r}", code="bad-value")
            fields[_TEXTS[name]] = value
        elif name in _NUMBERS:
            field, least, most = _NUMBERS[name]
            fields[field] = _c.number(value, least, most, name)
        else:
            least_rate, most_rate = _RATES[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least_rate <= value <= most_rate:
                raise Error(f"{name} goes from {least_rate:g} to {most_rate:g}, not {value!r}", code="bad-value")
            fields[name] = float(value)
    return flags, fields


def _cluster_number(value: Any) -> int:
    return _c.number(value, 0, address.MAX_CLUSTER, "a cluster's number")


def _host_only(message: str, command: str) -> Error:
    return Error(message, code="host-only", cure=f"on the host: `{command}`")
