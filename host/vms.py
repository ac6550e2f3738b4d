# SPDX-License-Identifier: Apache-2.0
"""VMs as the service sees them: found by what a person typed, and reached through QEMU's monitor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ringbar import address
from ringbar.errors import Error, NotFound
from ringbar.host import records, surroundings
from ringbar.host.model import Finding, Segment
from ringbar.qemu import Function, Plugged, Vm, bell, libvirt, qmp
from ringbar.qemu.bell import Refusal
from ringbar.qemu.monitor import Monitor
from ringbar.qemu.ready import why_not_ready
from ringbar.qemu.slots import cure_for_none, more_ports, read_topology

Progress = Callable[[str], None]

PLACE_TIMEOUT = 3.0
"""Seconds that a guest may take to give plugged memory its place."""
LOOK = 0.05
"""Seconds between two looks at it."""
LONGEST_NAME = 100
"""Bytes of a VM's name; one that is longer is shown by its UUID (a lane has room for 127)."""


@dataclass(frozen=True)
class Name:
    """Which VM is meant, whatever was typed.

    :ivar shown: for people: ``qmp:/absolute/path``, or libvirt's name.
    :ivar uuid: libvirt's, which a rename leaves; ``""`` for a monitor socket.
    :ivar uri: of libvirt's connection; ``""`` for a monitor socket.
    """

    shown: str
    uuid: str = ""
    uri: str = ""

    @property
    def key(self) -> str:
        """What attachments are kept by."""
        return f"{self.uri}#{self.uuid}" if self.uuid else self.shown

    @property
    def typed(self) -> str:
        """How a command takes it."""
        return typed(self.shown, self.uri)


def typed(shown: str, uri: str) -> str:
    """A VM's name as a command takes it: with ``-C`` where libvirt's connection is not the usual one."""
    word = shlex.quote(shown)
    return word if uri in ("", libvirt.default_uri()) else f"{word} -C {shlex.quote(uri)}"


def canonical(text: str, uri: str | None) -> Name:
    """The VM that was typed; libvirt is asked for its name and UUID.

    :param uri: of libvirt's connection, where one was given.
    :raises BadAddress: for what can be no VM.
    :raises NotFound: libvirt has no such VM.
    :raises Error: libvirt cannot be asked.
    """
    vm = address.parse_vm(text)
    if vm.kind == "qmp":
        if uri is not None:
            raise Error(
                f"--connect {uri} names libvirt, and {text} is a monitor socket",
                code="bad-address",
                cure="leave --connect out, or name the VM as virsh list does",
            )
        return Name(f"qmp:{os.path.abspath(vm.value)}")
    return _name(asyncio.run(libvirt.find(vm.value, uri)))


def _name(domain: libvirt.Domain) -> Name:
    shown = domain.name
    if len(shown.encode()) > LONGEST_NAME or shown.startswith("direct:"):
        shown = domain.uuid
    return Name(shown, domain.uuid, domain.uri)


def known(text: str, uri: str | None) -> Name:
    """The VM that was typed, which may be gone: one that has attachments is found without asking libvirt.

    :raises Error: as :func:`canonical`.
    """
    vm = address.parse_vm(text)
    if vm.kind != "qmp":
        names = {Name(r.vm, r.uuid, r.uri) for r in records.all_records() if r.uuid}
        found = [n for n in names if vm.value in (n.shown, n.uuid) and uri in (None, n.uri)]
        if len(found) > 1:
            found = [n for n in found if n.uri == libvirt.default_uri()]
        if len(found) == 1:
            return found[0]
    return canonical(text, uri)


@dataclass
class Placed:
    """What was plugged.

    :ivar saved: for the record.
    :ivar where: for people.
    :ivar notes: what is not as it should be.
    """

    saved: dict[str, Any]
    where: str
    notes: list[str] = field(default_factory=list)


def connect(name: Name, deadline: float, progress: Progress) -> Machine:
    """Connect to the VM's monitor, through libvirt where it runs the VM.

    :raises NotFound: no such VM, or it is off.
    :raises Busy: somebody else holds its monitor.
    """
    progress(f"connecting to {name.shown}")
    timeout = max(0.5, min(5.0, deadline - time.monotonic()))
    with contextlib.ExitStack() as stack:
        stack.enter_context(monitor_lent(name.key))
        vm = Vm.connect(name.uuid or name.shown, timeout, uri=name.uri or None)
        stack.callback(vm.close)
        machine = Machine(name.shown, vm)  # which asks the VM, and that may end meanwhile
        machine.stack = stack.pop_all()
        return machine


def check_listens(name: Name) -> None:
    """A monitor's socket that nobody listens at is told at once; of VMs of libvirt, libvirt says so.

    :raises NotFound: it is off.
    """
    if name.uuid:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(name.shown.removeprefix("qmp:"))
        except OSError:
            raise NotFound(f"nobody listens at {name.shown}", code="vm-off", cure="start the VM") from None


def _nobody(key: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


monitor_lent: Callable[[str], contextlib.AbstractContextManager[None]] = _nobody
"""Inside it nobody else in this process uses the VM's monitor, which has one client at a time. The agent, which
listens there for events, puts its own here."""


class Machine:
    """A running VM. Use it in ``with``.

    :ivar identity: this life of it, ``QEMUPID:STARTTIME``.
    :ivar via: how its QEMU is reached, for people.
    :ivar stack: what is let go of in the end.
    """

    def __init__(self, name: str, vm: Vm) -> None:
        self.name = name
        self.stack = contextlib.ExitStack()
        self.via = vm.via
        self._vm = vm
        self._slept = 0.0
        info = vm.info()
        if not info.pid or info.start_time is None:
            raise Error(
                f"the QEMU process of {name} is not visible from here, so its end could not be noticed",
                code="other-namespace",
                cure="run ringbar where QEMU's process can be seen (the host's pid namespace)",
            )
        self.identity = f"{info.pid}:{info.start_time}"

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the monitor; what is plugged stays."""
        self.stack.close()

    @property
    def waited(self) -> float:
        """Seconds spent waiting for libvirt, QEMU and the guest."""
        return self._vm.waited + self._slept

    @staticmethod
    def slot(cluster: int) -> str:
        """How the objects of a cluster are named in QEMU."""
        return f"ringbar-{cluster}"

    def clusters(self) -> list[int]:
        """Clusters of which something is plugged in, remains included."""
        found = []
        for plugged in self._vm.plugged():
            match = re.fullmatch(r"ringbar-(\d+)", plugged.slot)
            if match:
                found.append(int(match[1]))
        return found

    def neighbours(self) -> list[str]:
        """Devices in the VM that map all its memory for themselves: VFIO and vhost-user."""
        return self._vm.neighbours()

    def bells(self) -> list[str]:
        """Slots of the doorbells that are in the VM: they stay when clusters go."""
        return [p.slot for p in self._vm.plugged() if re.fullmatch(r"ringbar-bell\d+", p.slot) and p.devices]

    def plug_bell(
        self, slot: str, function: Function, use_last_slot: bool, deadline: float, progress: Progress
    ) -> None:
        """Plug a doorbell, in a slot of its own."""
        timeout = max(0.0, deadline - time.monotonic())
        self._vm.plug(slot, [function], timeout=timeout, use_last_slot=use_last_slot, progress=progress)

    def no_bell(self) -> Refusal | None:
        """Why this VM should have no doorbell; None: it can."""
        return self._vm.no_bell()

    def plug(
        self,
        cluster: int,
        lanes: list[Segment],
        pools: list[Segment],
        writable: set[int],
        use_last_slot: bool,
        deadline: float,
        progress: Progress,
    ) -> Placed:
        """Plug the VM's lane as function 0, pool n as function n + 1, lanes to other VMs as what is left.

        A VM believes the number, not the header of a pool, which the VM that transmits from it can overwrite.

        :param lanes: the VM's own first.
        :param writable: pools that the guest may write to; to the lanes it always may.
        :param deadline: for the guest to be ready for it.
        :raises Error: nothing stays behind in the VM.
        """
        if len(lanes) + len(pools) > 8:
            raise Error(
                f"{len(lanes)} lanes and {len(pools)} pools of cluster {cluster} do not fit a PCI slot of 8 functions",
                code="too-many-segments",
                cure="fewer direct queues for this VM, or a cluster with fewer pools",
            )
        with contextlib.ExitStack() as files:
            functions = [_function("lane", lane, True, files) for lane in lanes]
            functions += [_function("pool", pool, pool.id in writable, files, pool.id + 1) for pool in pools]
            plugged = self._vm.plug(
                self.slot(cluster),
                functions,
                timeout=max(0.0, deadline - time.monotonic()),
                use_last_slot=use_last_slot,
                progress=progress,
            )
        placed = Placed(plugged.as_dict(), f"{plugged.bus} slot {plugged.addr}")
        with contextlib.suppress(Error):
            self._await_places(plugged, progress, placed)
        return placed

    def _await_places(self, plugged: Plugged, progress: Progress, placed: Placed) -> None:
        """Wait until the guest has given every function's memory an address; say so when it does not."""
        if self._vm.info().state == "prelaunch":  # its firmware will
            return
        progress("waiting for the guest to take the device")
        until = time.monotonic() + PLACE_TIMEOUT
        while True:
            missing = [device for device, where in self._vm.bars(plugged).items() if where is None]
            if not missing:
                return
            if time.monotonic() >= until:
                names = ", ".join(device.partition(".")[2] for device in missing)
                placed.notes.append(
                    f"the guest has not given {names} an address yet: programs of ringbar in the VM see to that; "
                    "or start the VM with ports that have room (QEMU: -global pcie-root-port.pref64-reserve=1G)"
                )
                return
            time.sleep(LOOK)
            self._slept += LOOK

    def unplug(self, cluster: int, deadline: float, progress: Progress) -> bool:
        """Unplug everything of a cluster, also what an interrupted plug left. False: the guest does not let go."""
        found = [p for p in self._vm.plugged() if p.slot == self.slot(cluster)]
        for plugged in found:
            try:
                self._vm.unplug(plugged, timeout=max(0.0, deadline - time.monotonic()))
            except Error as e:
                if e.code == "vm-died":
                    return True
                if e.code == "unplug-refused":
                    progress(e.message)
                    return False
                raise
        return True


def _function(
    kind: str, segment: Segment, writable: bool, files: contextlib.ExitStack, number: int | None = None
) -> Function:
    """A segment as a PCI function, its memory by descriptor: so that it does not matter what QEMU can reach."""
    name = f"{kind}{segment.id}"
    try:
        fd = os.open(segment.path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as e:
        raise Error(
            f"the memory of {name} cannot be opened: {(e.strerror or str(e)).lower()}",
            code="no-permission" if isinstance(e, PermissionError) else "no-such-file",
            cure="run it as root (sudo)" if isinstance(e, PermissionError) else "ringbar cluster list",
        ) from None
    files.callback(os.close, fd)
    return Function(name, segment.size, fd=fd, readonly=not writable, number=number)


# ---- doctor -------------------------------------------------------------------------------------------------


def examine(text: str, uri: str | None, progress: Progress) -> list[Finding]:
    """What stands in the way of attaching to this VM."""
    name = canonical(text, uri)
    progress(f"asking {name.shown}")
    findings = asyncio.run(_examine(name))
    with connect(name, time.monotonic() + 5.0, progress) as machine:
        neighbours = machine.neighbours()
    if neighbours:
        detail = f"{', '.join(neighbours)}: an attached pool is mapped, and with VFIO locked, for these too"
        findings.append(Finding(name.shown, "warning", detail))
    return findings


async def _examine(name: Name) -> list[Finding]:
    monitor: Monitor
    if name.uuid:
        monitor = await libvirt.Connection.open(name.uuid, name.uri)
    else:
        monitor = await qmp.Connection.open(name.shown)
    try:
        return [*await _plugging(name.shown, monitor), *surroundings.confined(name.shown, monitor.pid)]
    finally:
        await monitor.close()


async def _plugging(shown: str, monitor: Monitor) -> list[Finding]:
    """Device, place and guest."""
    types = await monitor.execute("qom-list-types", implements="ivshmem-plain")
    if not types:
        cure = "a QEMU with ivshmem, such as Debian's qemu-system-x86"
        return [Finding(shown, "missing", "its QEMU has no ivshmem-plain", cure)]
    topology = await read_topology(monitor)
    free, kind = len(topology.free), "root port" if topology.machine == "q35" else "PCI slot"
    detail = f"{topology.machine} by {monitor.via}, {free} of {topology.total} hot-plug {kind}s free"
    more = more_ports(monitor.libvirt_name) if topology.machine == "q35" else cure_for_none(topology, None)
    if free > 1:
        findings = [Finding(shown, "ok", detail)]
    elif free:
        cure = f"ringbar attach --use-last-slot takes the last one; or {more}"
        findings = [Finding(shown, "warning", detail, cure)]
    else:
        return [Finding(shown, "missing", detail, cure_for_none(topology, monitor.libvirt_name))]
    why = await why_not_ready(monitor, topology, topology.free[-1])
    if why is None:
        findings.append(Finding(shown, "ok", "its guest listens for hot-plug"))
    else:
        findings.append(Finding(shown, "warning", why, "wait until it has booted; attach waits too"))
    refusal = await bell.refusal(monitor)
    if refusal is None:
        findings.append(Finding(shown, "ok", "it can have interrupts"))
    else:
        findings.append(Finding(shown, "ok", f"no interrupts, so both sides poll: {refusal.why}", refusal.cure))
    return findings
