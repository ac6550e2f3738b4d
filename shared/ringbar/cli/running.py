# SPDX-License-Identifier: Apache-2.0
"""How a tool runs: opens its devices, goes on until told to end, and is interrupted without losing its summary."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ringbar import address
from ringbar.cli.common import Output, Usage
from ringbar.errors import Busy, Error, NotFound

TICK = 0.05
"""Seconds between two looks at a worker."""
SLOTS = 4096
"""Of queues that a tool makes."""
BURST = 64
SPARE = 16384
"""Buffers of a cluster that a tool makes, beside what its queues can lend: for NICs and what is in hands."""
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a service manager, a terminal or SSH connection that goes away: a tool closes its ends and sums up."""


def period(out: Output) -> float:
    """Seconds between two live lines."""
    return 0.25 if out.live.terminal else 1.0


def check_idle(options: argparse.Namespace) -> None:
    """Busy waiting is refused where threads outnumber processors (rule 8), and so is a processor that is not there."""
    cores = os.sched_getaffinity(0)
    if options.idle == "busy" and len(cores) < 2:
        raise Usage("--idle busy would take the only processor from everything else", cure="--idle adaptive")
    if options.core is not None and options.core not in cores:
        raise Usage(f"there is no processor {options.core} for this program", cure=f"one of {_listed(cores)}")


def _listed(numbers: set[int]) -> str:
    found = sorted(numbers)
    return f"0 to {found[-1]}" if found == list(range(len(found))) else ", ".join(map(str, found))


# ---- devices ------------------------------------------------------------------------------------------------


class Job:
    """A tool's cluster and its open ends.

    :ivar inputs: an end for each device to receive from.
    :ivar outputs: an end for each device to send to.
    """

    def __init__(self, cluster: Any, inputs: list[Any], outputs: list[Any]) -> None:
        self.cluster = cluster
        self.inputs = inputs
        self.outputs = outputs
        self._watching: Any = None
        self._before = {id(end): self._queue_drops(end) for end in inputs}

    def describe(self, end: Any) -> str:
        """``99@0``, or ``zc:eth1 (driver)``: a device says how it was opened."""
        if isinstance(end, str):
            return end
        mode = end.stats()["mode"]
        return str(end.address) if mode in ("", "loan") else f"{end.address} ({mode})"

    def _queue_drops(self, end: Any) -> dict[str, int]:
        where = address.parse_device(str(end.address).split(",")[0])
        if not isinstance(where, address.QueueAddress):
            return {}
        try:
            for queue in self._watch().queues:
                if queue.id == where.queue:
                    return dict(queue.info()["drops"])
        except Error:  # gone meanwhile
            pass
        return {}

    def _watch(self) -> Any:
        """Another attachment: the first belongs to a worker while it runs."""
        from ringbar import Cluster

        if self._watching is None:
            self._watching = Cluster.attach(self.cluster.id)
        return self._watching

    def close(self) -> None:
        """Let go of what was opened for looking."""
        if self._watching is not None:
            self._watching.close()

    def drops(self, end: Any) -> dict[str, int]:
        """Packets lost at this end since it was opened, by reason."""
        before = self._before.get(id(end), {})
        found = {k: v - before.get(k, 0) for k, v in self._queue_drops(end).items()}
        if not found:
            stats = end.stats()
            found = dict(stats["drops"])
            for name in ("kernel_dropped", "kernel_ring_full", "kernel_fill_empty", "kernel_invalid"):
                if stats.get(name):
                    found[name] = stats[name]
        return found


@contextlib.contextmanager
def opened(
    inputs: Sequence[str],
    outputs: Sequence[str],
    options: argparse.Namespace,
    *,
    queues: int = 0,
    by_worker: bool = False,
) -> Iterator[Job]:
    """Open devices by name, all from one attachment to their cluster; closed in the end.

    A device that is both input and output is opened once. Where no queue and no ``-c`` names a cluster, one is made
    that lives with the tool.

    :param queues: make the cluster of ``-c``, with so many queues.
    :param by_worker: a worker opens queues to send to, and sets the filter of what it receives from: of such queues
        there is only the address.
    :raises Usage: devices that do not fit together.
    :raises Error: what the core says of one that cannot be opened.
    """
    froms = [address.parse_device(text) for text in inputs]
    tos = [address.parse_device(text) for text in outputs]
    for name in {str(d) for d in froms if froms.count(d) > 1} | {str(d) for d in tos if tos.count(d) > 1}:
        raise Usage(f"{name} is named twice on the same side", cure="name each device once as -i and once as -o")
    for device in froms:
        if isinstance(device, address.NicAddress):
            _check_taken(device.interface, options)
        if isinstance(device, address.QueueAddress) and device in tos:
            raise Usage(f"{device} would feed itself", cure="name another queue")
    if options.steer is not None and not options.steer.strip():  # a script's variable that was not set
        raise Usage(
            "the rule of --steer is empty", cure="--steer 'udp port 5000', for example; --take-all takes everything"
        )
    if options.steer is not None and not any(isinstance(d, address.NicAddress) for d in froms):
        raise Usage("--steer says what to take of a zc: NIC, and none is an input", cure="--filter, or -i zc:eth1")
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(_cluster(froms + tos, options, queues))
        ends: dict[str, Any] = {}
        # Queues first: what a dead process had lent on one is taken over by who serves no other yet.
        for device in sorted(froms + tos, key=lambda d: not isinstance(d, address.QueueAddress)):
            if str(device) in ends:
                continue
            if by_worker and device not in froms and isinstance(device, address.QueueAddress):
                _check_there(cluster, device)
                ends[str(device)] = str(device)
                continue
            mode = "rxtx" if device in froms and device in tos else "rx" if device in froms else "tx"
            only_look = not tos and isinstance(device, address.StackAddress)
            end = ends[str(device)] = stack.enter_context(_open(cluster, device, mode, options, only_look))
            if "rx" in mode and options.filter is not None and not by_worker:
                end.filter = options.filter
        job = Job(cluster, [ends[str(d)] for d in froms], [ends[str(d)] for d in tos])
        stack.callback(job.close)
        yield job


def _check_there(cluster: Any, device: address.QueueAddress) -> None:
    known = {q.id for q in cluster.queues}
    if device.queue not in known:
        shown = address.format_queues(address.QueueAddress(device.cluster, q) for q in known)
        there = f"; there are: {shown}" if shown else ""
        cure = (
            f"on the host: ringbar attach VM {device}" if cluster.is_guest else f"ringbar queue create {device.cluster}"
        )
        raise NotFound(f"there is no queue {device}", code="no-such-queue", cure=cure + there)


def _open(
    cluster: Any, device: address.DeviceAddress, mode: str, options: argparse.Namespace, only_look: bool
) -> Any:
    if isinstance(device, address.QueueAddress):
        _check_there(cluster, device)
        return cluster.open_queue(device.queue, mode)
    more = {"observe": True} if only_look else {}
    return cluster.open_device(str(device), mode, **_device_options(device, mode, options), **more)


def _device_options(device: address.DeviceAddress, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, as far as this kind of device knows it."""
    found: dict[str, Any] = {}
    if isinstance(device, address.NicAddress):
        found["xdp"] = options.xdp
        if "rx" in mode:
            found.update(steer=options.steer, take_all=options.take_all)
    if isinstance(device, address.StackAddress) and "rx" in mode:
        found["take_all"] = options.take_all
    if isinstance(device, (address.NicAddress, address.InterfaceAddress)) and "rx" in mode:
        found["promiscuous"] = options.promiscuous
    if isinstance(device, address.FileAddress) and mode == "rx" and hasattr(options, "preload"):
        found.update({name: getattr(options, name) for name in ("speed", "pps", "gbps", "preload")})
        if options.loops != 1:
            return {**{name: value for name, value in found.items() if value}, "loops": options.loops}
    return {name: value for name, value in found.items() if value}


def _cluster(devices: list[address.DeviceAddress], options: argparse.Namespace, queues: int) -> Any:
    named = sorted({d.cluster for d in devices if isinstance(d, address.QueueAddress)})
    if len(named) > 1:
        raise Usage(
            f"clusters {named[0]} and {named[1]}: packets move within one cluster",
            cure="name queues of one cluster",
        )
    if named and options.cluster not in (None, named[0]):
        raise Usage(
            f"-c {options.cluster}, but the queue is of cluster {named[0]}",
            cure=f"-c {named[0]}, or leave it out",
        )
    from ringbar import Cluster

    wanted = named[0] if named else options.cluster
    if queues:
        slots = options.slots or SLOTS
        need = queues * (slots + 2 * BURST) + SPARE
        made = Cluster.create(wanted, buffers=max(65536, 1 << (need - 1).bit_length()), label="a tool")
        try:
            for number in range(queues):
                made.create_queue(number, slots=slots)
        except BaseException:
            made.close()
            raise
        return made
    if wanted is not None:
        return Cluster.attach(wanted)
    return own_cluster()


def own_cluster() -> Any:
    """A cluster for this tool alone, so any number will do."""
    from ringbar import Cluster

    for number in range(65535, 65535 - 256, -1):
        try:
            return Cluster.create(number, label="a tool")
        except Busy:
            continue
    raise Error("256 tools have clusters of their own already", code="busy", cure="end some, or name a cluster: -c ID")


# ---- a NIC that is needed (rule 10) -------------------------------------------------------------------------


def _check_taken(interface: str, options: argparse.Namespace) -> None:
    if options.take_all or options.steer is not None:
        return
    for needed, why in (
        (default_routes(), "carries the default route"),
        (session_interfaces(), "carries this SSH session"),
    ):
        if interface in needed:
            raise Error(
                f"{interface} {why}, which would be cut",
                code="nic-in-use",
                cure="another NIC, --steer 'not port 22', or --take-all",
            )


def default_routes() -> set[str]:
    """Interfaces that carry a default route."""
    found = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/route").read_text().splitlines()[1:]:
            fields = line.split()
            if len(fields) > 7 and fields[1] == "00000000" and fields[7] == "00000000":
                found.add(fields[0])
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/ipv6_route").read_text().splitlines():
            fields = line.split()
            # The kernel keeps a rejecting default on "lo" where there is none.
            if len(fields) > 9 and fields[0] == "0" * 32 and fields[1] == "00" and fields[9] != "lo":
                found.add(fields[9])
    return found


def session_interfaces() -> set[str]:
    """Interfaces that have the address by which this session was reached."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    if len(words) != 4:
        return set()
    mine = words[2]
    found = set()
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                if socket.inet_ntoa(reply[20:24]) == mine:
                    found.add(name)
    with contextlib.suppress(OSError, ValueError):
        wanted = socket.inet_pton(socket.AF_INET6, mine).hex()
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            fields = line.split()
            if fields[0] == wanted:
                found.add(fields[5])
    return found


# ---- going on and ending ------------------------------------------------------------------------------------


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """:data:`ENDING` wait for :func:`ticks`: a tool that has said that it runs always ends with its summary."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        while signal.sigtimedwait(ENDING, 0) is not None:  # the same wish, twice
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ticks(limit: float | None) -> Iterator[None]:
    """Every :data:`TICK` seconds, until ``limit`` seconds have gone (None: no limit), or a signal of :data:`ENDING`.

    Only within :func:`signals_wait`.
    """
    deadline = None if limit is None else time.monotonic() + limit
    while True:
        left = TICK if deadline is None else min(TICK, deadline - time.monotonic())
        if left <= 0 or signal.sigtimedwait(ENDING, left) is not None:
            return
        yield
