# SPDX-License-Identifier: Apache-2.0
"""The calls of the C core that only the host's service makes: lanes, books, bindings, lists of clusters.

Programs use :class:`ringbar.Cluster`; this is for what administers them. One handle, one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ringbar._c import DROP_REASONS, check, ffi, lib, numbers, structures, text
from ringbar._c import options as make_options
from ringbar.errors import NotFound
from ringbar.host import model

_SEGMENT_KINDS = {1: "pool", 2: "lane"}
_SEGMENT_STATES = ("free", "open", "closing", "gone")
_PAGES = {1: "4k", 2: "2M", 3: "1G"}
_PAGE_CODES = {"auto": 0, "4k": 1, "2M": 2, "1G": 3}
BURST = 64
"""RB_BURST."""
RX, TX = 1, 2
"""Directions of a VM's end, as the VM sees them."""


def clusters() -> list[int]:
    """Numbers of all clusters of this host; those whose owner died are removed first."""
    return sorted(numbers(lib.rb_cluster_list))


def _in_guest() -> bool:
    from ringbar import guest

    return bool(guest.find())


def destroy(cluster: int, force: bool) -> None:
    """Remove a cluster. Busy while it is used, unless ``force``."""
    check(lib.rb_cluster_destroy(cluster, int(force)))


def reap(cluster: int) -> int:
    """Take over what dead processes left; how many there were."""
    return check(lib.rb_cluster_reap(cluster))


class Handle:
    """One attachment of this process to a cluster. Use it in a ``with``."""

    def __init__(self, cluster: int, pointer: Any) -> None:
        self.id = cluster
        self._c = pointer

    @classmethod
    def attach(cls, cluster: int) -> Handle:
        """Attach to cluster ``cluster``.

        :raises NotFound: when there is none; says which ones there are.
        """
        out = ffi.new("rb_cluster **")
        try:
            check(lib.rb_cluster_attach(cluster, out))
        except NotFound:
            known = [c for c in clusters() if c != cluster]
            listed = f"; there are: {', '.join(map(str, known))}" if known else ""
            cure = f"ringbar cluster create {cluster}{listed}"
            if not known and _in_guest():
                cure = "clusters and queues that come from the host are changed on the host"
            raise NotFound(f"there is no cluster {cluster}", code="no-such-cluster", cure=cure) from None
        return cls(cluster, out[0])

    @classmethod
    def create(
        cls,
        cluster: int,
        *,
        buffers: int = 0,
        size: int = 0,
        queues: int = 0,
        slots: int = 0,
        pages: str = "auto",
        numa: int | None = None,
        persistent: bool = True,
        sealed: bool = False,
        label: str = "",
    ) -> Handle:
        """Make a cluster; zeros are computed by the core."""
        options = make_options("rb_cluster_options")
        options.buffer_size = size
        options.buffers = buffers
        options.queues = queues
        options.slots = slots
        options.pages = _PAGE_CODES[pages]
        options.numa = 0 if numa is None else numa + 1
        options.persistent = int(persistent)
        options.sealed = int(sealed)
        options.label = label.encode()[:31]
        out = ffi.new("rb_cluster **")
        check(lib.rb_cluster_create(cluster, options, out))
        return cls(cluster, out[0])

    def close(self) -> None:
        """Leave the cluster."""
        if self._c is not None:
            lib.rb_cluster_close(self._c)
            self._c = None

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def info(self) -> model.Cluster:
        """Its settings."""
        i = ffi.new("rb_cluster_info *")
        check(lib.rb_cluster_get_info(self._c, i))
        if i.guest:
            lives = "seen from this VM"
        elif i.persistent:
            lives = "until destroyed"
        else:
            lives = f"with pid {i.owner_pid}" if i.owner_pid else "its process died"
        return model.Cluster(
            id=int(i.id),
            label=text(i.label),
            lives=lives,
            persistent=bool(i.persistent),
            owner_pid=int(i.owner_pid),
            buffer_size=int(i.buffer_size),
            buffers=int(i.buffers),
            free=int(i.home_free),
            pages=_PAGES.get(int(i.pages), str(int(i.pages))),
            pools=int(i.pools),
            lanes=int(i.lanes),
            queues=int(i.queues),
            sealed=bool(i.sealed),
            guest=bool(i.guest),
            generation=int(i.generation),
            created_ns=int(i.created_ns),
        )

    def segments(self) -> list[model.Segment]:
        """Pools and lanes, and where they are."""
        found = structures("rb_segment_info", lambda out, n: lib.rb_cluster_segments(self._c, out, n))
        return [
            model.Segment(
                kind=_SEGMENT_KINDS.get(s["kind"], "other"),
                id=s["id"],
                size=s["size"],
                path=s["path"],
                state=_SEGMENT_STATES[s["state"]] if s["state"] < len(_SEGMENT_STATES) else str(s["state"]),
                vm=s["vm"],
                server_pid=s["server_pid"],
            )
            for s in found
        ]

    def queue_ids(self) -> list[int]:
        """Numbers of all queues."""
        return sorted(numbers(lambda out, n: lib.rb_queue_list(self._c, out, n)))

    def queue(self, number: int) -> model.Queue:
        """One queue. NotFound when there is none."""
        q = ffi.new("rb_queue_info *")
        check(lib.rb_queue_get_info(self._c, number, q))

        def end(pid: int, name: Any, vm: Any, since: int) -> model.End | None:
            shown = model.End(pid=int(pid), name=text(name), vm=text(vm), since_ns=int(since))
            return shown if shown.pid or shown.vm else None

        return model.Queue(
            address=f"{self.id}@{number}",
            id=number,
            slots=int(q.slots),
            credit=int(q.credit),
            direct=bool(q.direct),
            paused=bool(q.paused),
            filter=text(q.filter) or None,
            producer=end(q.producer_pid, q.producer_name, q.producer_vm, q.producer_since),
            consumer=end(q.consumer_pid, q.consumer_name, q.consumer_vm, q.consumer_since),
            waiting=int(q.count),
            lent=int(q.lent),
            held=int(q.held),
            granted=int(q.granted),
            quarantined=int(q.quarantined),
            packets=int(q.packets),
            bytes=int(q.bytes),
            copied=int(q.copied),
            foreign=int(q.foreign),
            drops={name: int(q.drops[i]) for i, name in enumerate(DROP_REASONS)},
            received_packets=int(q.rx_packets),
            received_bytes=int(q.rx_bytes),
            stalled=bool(q.waiting),
            server_pid=int(q.server_pid),
            feeds=f"{self.id}@{q.feeds}" if q.feeds >= 0 else None,
        )

    def create_queue(self, number: int | None, slots: int, credit: int, direct: bool) -> int:
        """Make a queue, the lowest free number when None. Its number."""
        options = make_options("rb_queue_options")
        options.slots = slots
        options.credit = credit
        options.direct = int(direct)
        return check(lib.rb_queue_create(self._c, -1 if number is None else number, options))

    def destroy_queue(self, number: int) -> None:
        """Remove a queue. Busy while an end is held."""
        check(lib.rb_queue_destroy(self._c, number))

    def pause_queue(self, number: int, pause: bool) -> None:
        """Pause or resume."""
        check(lib.rb_queue_pause(self._c, number, int(pause)))

    def filter_queue(self, number: int, expression: str | None) -> None:
        """Set, replace or (None) remove its filter."""
        check(lib.rb_queue_filter(self._c, number, ffi.NULL if expression is None else expression.encode()))

    def books(self) -> list[model.Book]:
        """Who serves buffers, and how many are where."""
        found = structures("rb_book_info", lambda out, n: lib.rb_book_list(self._c, out, n))
        return [model.Book(**book) for book in found]

    def devices(self) -> list[model.Device]:
        """Open zc: devices, each followed by who is fed with part of what it receives."""
        found = structures("rb_device_info", lambda out, n: lib.rb_device_list(self._c, out, n))
        return [
            model.Device(
                name=d["name"],
                pid=d["pid"],
                process=d["process"],
                mode=d["mode"],
                clock=d["clock"],
                receives=bool(d["receives"]),
                rule=(d["rule"] or "all") if d["receives"] else None,
                fed_by=f"{self.id}@{d['queue']}" if d["queue"] >= 0 else None,
            )
            for d in found
        ]

    # ---- lanes of VMs

    def lane_create(self, vm: str, identity: str) -> int:
        """Make or find the lane of a VM; its segment number."""
        return check(lib.rb_lane_create(self._c, vm.encode(), identity.encode()))

    def lane_pool(self, lane: int, buffers: int) -> int:
        """Give the VM a pool of its own to transmit from; its number. Before it is bound to send."""
        return check(lib.rb_lane_pool(self._c, lane, buffers))

    def lane_bind(self, lane: int, queue: int, direction: int) -> bool:
        """Give the VM an end of a queue. False: it had it already. Busy: somebody else has."""
        return check(lib.rb_lane_bind(self._c, lane, queue, direction)) == 0

    def lane_unbind(self, lane: int, queue: int, direction: int) -> None:
        """The reverse."""
        check(lib.rb_lane_unbind(self._c, lane, queue, direction))

    def lane_announce(self, lane: int, timeout: float) -> bool:
        """Tell the guest's programs to let go; True when all have within ``timeout`` seconds."""
        return check(lib.rb_lane_announce(self._c, lane, int(timeout * 1000))) == 1

    def lane_remove(self, lane: int, still_mapped: bool = False) -> None:
        """Take home what the VM held, and remove the lane; quarantine it while the guest can still write."""
        check(lib.rb_lane_remove(self._c, lane, int(still_mapped)))

    def lane_reset(self, lane: int) -> None:
        """The VM was reset: what its programs held comes home."""
        check(lib.rb_lane_reset(self._c, lane))

    def bell_memory(self, lane: int, fd: int) -> None:
        """Write into the memory of a doorbell that it is this lane's."""
        check(lib.rb_bell_memory(self._c, lane, fd))

    def lane_bells(self, lane: int, pid: int, fds: Sequence[int]) -> None:
        """QEMU has these event descriptors: the host's, then one for each entry of the lane."""
        check(lib.rb_lane_bells(self._c, lane, pid, list(fds), len(fds)))

    def lane_bindings(self, lane: int) -> list[model.Binding]:
        """Which ends the VM holds."""
        found = structures("rb_binding", lambda out, n: lib.rb_lane_bindings(self._c, lane, out, n))
        return [
            model.Binding(
                queue=f"{self.id}@{b['queue']}",
                direction="rx" if b["direction"] == RX else "tx",
                open=bool(b["open"]),
            )
            for b in found
        ]


def bench_ring(
    *,
    processes: bool,
    burst: int,
    touch: int,
    slots: int = 0,
    level: int = 0,
    latency: bool = False,
    seconds: float = 0.0,
    cores: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """One run of the loan rings on memory of their own.

    :param touch: bytes of each packet that are written and read.
    :param level: 0 bare rings, 1 with ledger, 2 with intent records too.
    :returns: mpps, ns_per_packet, seconds, packets, checks_failed, latency_ns (five values).
    """
    options = make_options("rb_bench_options")
    options.processes = int(processes)
    options.burst = burst
    options.touch = touch
    options.slots = slots
    options.level = level
    options.latency = int(latency)
    options.seconds = seconds
    if cores is not None:
        options.cores = [cores[0] + 1, cores[1] + 1]
    result = ffi.new("rb_bench_result *")
    check(lib.rb_bench_ring(options, result))
    return {
        "mpps": float(result.mpps),
        "ns_per_packet": float(result.ns_per_packet),
        "seconds": float(result.seconds),
        "packets": int(result.packets),
        "checks_failed": int(result.checks_failed),
        "latency_ns": [float(v) for v in result.latency_ns],
    }
