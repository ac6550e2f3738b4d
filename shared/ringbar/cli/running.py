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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ringbar import address
from ringbar.cli.common import Output, Usage
from ringbar.errors import Busy, Error, NotFound

TICK = 0.05
"""Seconds between two looks at a worker."""
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
        self._before = {id(end): self._queue_drops(end) for end in inputs}

    def describe(self, end: Any) -> str:
        """``99@0``, or ``zc:eth1 (driver)``: a device says how it was opened."""
        mode = end.stats()["mode"]
        return str(end.address) if mode in ("", "loan") else f"{end.address} ({mode})"

    def _queue_drops(self, end: Any) -> dict[str, int]:
        where = address.parse_device(str(end.address).split(",")[0])
        if not isinstance(where, address.QueueAddress):
            return {}
        for queue in self.cluster.queues:
            if queue.id == where.queue:
                return dict(queue.info()["drops"])
        return {}

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
def opened(inputs: Sequence[str], outputs: Sequence[str], options: argparse.Namespace) -> Iterator[Job]:
    """Open devices by name, all from one attachment to their cluster; closed in the end.

    A device that is both input and output is opened once. Where no queue and no ``-c`` names a cluster, one is made
    that lives with the tool.

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
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(_cluster(froms + tos, options))
        ends: dict[str, Any] = {}
        for device in froms + tos:
            if str(device) not in ends:
                mode = "rxtx" if device in froms and device in tos else "rx" if device in froms else "tx"
                ends[str(device)] = stack.enter_context(_open(cluster, device, mode, options))
        yield Job(cluster, [ends[str(d)] for d in froms], [ends[str(d)] for d in tos])


def _open(cluster: Any, device: address.DeviceAddress, mode: str, options: argparse.Namespace) -> Any:
    if isinstance(device, address.QueueAddress):
        known = {q.id for q in cluster.queues}
        if device.queue not in known:
            shown = address.format_queues(address.QueueAddress(device.cluster, q) for q in known)
            there = f"; there are: {shown}" if shown else ""
            cure = (
                f"on the host: ringbar attach VM {device}"
                if cluster.is_guest
                else f"ringbar queue create {device.cluster}"
            )
            raise NotFound(f"there is no queue {device}", code="no-such-queue", cure=cure + there)
        return cluster.open_queue(device.queue, mode)
    return cluster.open_device(str(device), mode, xdp=options.xdp)


def _cluster(devices: list[address.DeviceAddress], options: argparse.Namespace) -> Any:
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
    if wanted is not None:
        return Cluster.attach(wanted)
    for number in range(65535, 65535 - 256, -1):  # for this tool alone, so any number will do
        try:
            return Cluster.create(number, label="a tool")
        except Busy:
            continue
    raise Error("256 tools have clusters of their own already", code="busy", cure="end some, or name a cluster: -c ID")


# ---- a NIC that is needed (rule 10) -------------------------------------------------------------------------


def _check_taken(interface: str, options: argparse.Namespace) -> None:
    if options.take_all:
        return
    for needed, why in (
        (default_routes(), "carries the default route"),
        (session_interfaces(), "carries this SSH session"),
    ):
        if interface in needed:
            raise Error(
                f"{interface} {why}, which would be cut",
                code="nic-in-use",
                cure="another NIC, or --take-all",
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
def interruptible(stop: Callable[[], None]) -> Iterator[None]:
    """:data:`ENDING` call ``stop`` instead of ending the program, so that a summary follows."""

    def handler(number: int, frame: object) -> None:
        stop()

    before = {number: signal.signal(number, handler) for number in ENDING}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def ticks(limit: float | None) -> Iterator[None]:
    """Every :data:`TICK` seconds, until ``limit`` seconds have gone (None: no limit), or a signal of :data:`ENDING`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    deadline = None if limit is None else time.monotonic() + limit
    try:
        while True:
            left = TICK if deadline is None else min(TICK, deadline - time.monotonic())
            if left <= 0 or signal.sigtimedwait(ENDING, left) is not None:
                return
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def bursts(rx: Any, packets: int | None, limit: float | None, most: int) -> Iterator[Any]:
    """Bursts from ``rx`` until so many packets came, so many seconds have gone, or it is stopped.

    An empty one comes now and then while nothing is received. The caller releases them.
    """
    deadline = None if limit is None else time.monotonic() + limit
    left = packets
    while left is None or left > 0:
        wait = TICK if deadline is None else min(TICK, deadline - time.monotonic())
        if wait <= 0:
            return
        try:
            burst = rx.recv(most if left is None else min(most, left), timeout=wait)
        except EOFError:
            return
        if left is not None:
            left -= len(burst)
        yield burst
