# SPDX-License-Identifier: Apache-2.0
"""VMs as the service sees them: found by what a person typed, and reached through QEMU's monitor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ringbar import address
from ringbar.errors import Error
from ringbar.host.model import Finding, Segment
from ringbar.qemu import Function, Plugged, Vm
from ringbar.qemu.qmp import Connection
from ringbar.qemu.ready import why_not_ready
from ringbar.qemu.slots import read_topology

Progress = Callable[[str], None]

PLACE_TIMEOUT = 3.0
"""Seconds that a guest may take to give plugged memory its place."""


def canonical(text: str, connect_uri: str | None) -> str:
    """The name that an attachment is kept by: ``qmp:/absolute/path``.

    :raises BadAddress: for what can be no VM.
    :raises Error: ``not-supported`` for a libvirt name.
    """
    vm = address.parse_vm(text)
    if vm.kind != "qmp" or connect_uri is not None:
        what = f"--connect {connect_uri}" if connect_uri is not None else f"'{text}', a libvirt name,"
        raise Error(
            f"{what} cannot be used yet: VMs are reached through QEMU's own monitor",
            code="not-supported",
            cure="name the VM by its monitor socket, qmp:/run/vm1.qmp "
            "(QEMU: -qmp unix:/run/vm1.qmp,server=on,wait=off)",
        )
    return f"qmp:{os.path.abspath(vm.value)}"


def require(name: str) -> None:
    """Raise what is wrong with a VM that should be there."""
    connect(name, time.monotonic() + 5.0, _silent).close()


def _silent(step: str) -> None:
    """No progress wanted."""


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


def connect(name: str, deadline: float, progress: Progress) -> Machine:
    """Connect to the VM's monitor.

    :raises NotFound: no such VM, or it is off.
    :raises Busy: somebody else holds its monitor.
    """
    progress(f"connecting to {name}")
    vm = Vm.connect(name, timeout=max(0.5, min(5.0, deadline - time.monotonic())))
    try:
        return Machine(name, vm)
    except BaseException:
        vm.close()
        raise


class Machine:
    """A running VM. Use it in ``with``.

    :ivar identity: this life of it, ``QEMUPID:STARTTIME``.
    """

    def __init__(self, name: str, vm: Vm) -> None:
        self.name = name
        self._vm = vm
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
        self._vm.close()

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

    def plug(
        self,
        cluster: int,
        lanes: list[Segment],
        pools: list[Segment],
        writable: bool,
        use_last_slot: bool,
        deadline: float,
        progress: Progress,
    ) -> Placed:
        """Plug the VM's lane as function 0, then lanes to other VMs, then the pools.

        :param lanes: the VM's own first.
        :param writable: the guest may write to the pools; to the lanes it always may.
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
            functions += [_function("pool", pool, writable, files) for pool in pools]
            plugged = self._vm.plug(
                self.slot(cluster),
                functions,
                timeout=max(0.0, deadline - time.monotonic()),
                use_last_slot=use_last_slot,
                progress=progress,
            )
        placed = Placed(plugged.as_dict(), f"{plugged.bus} slot {plugged.addr}")
        with contextlib.suppress(Error):
            self._await_places(plugged, deadline, progress, placed)
        return placed

    def _await_places(self, plugged: Plugged, deadline: float, progress: Progress, placed: Placed) -> None:
        """Wait until the guest has given every function's memory an address; say so when it does not."""
        progress("waiting for the guest to take the device")
        until = min(deadline, time.monotonic() + PLACE_TIMEOUT)
        while True:
            missing = [device for device, where in self._vm.bars(plugged).items() if where is None]
            if not missing:
                return
            if time.monotonic() >= until:
                names = ", ".join(device.partition(".")[2] for device in missing)
                placed.notes.append(
                    f"the guest has not given {names} an address yet: programs of ringbar in the VM see to that; "
                    "or start the VM with a port that has room (-device pcie-root-port,pref64-reserve=1G)"
                )
                return
            time.sleep(0.05)

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


def _function(kind: str, segment: Segment, writable: bool, files: contextlib.ExitStack) -> Function:
    """A segment as a PCI function: memory without a path is passed by descriptor."""
    name = f"{kind}{segment.id}"
    if not segment.path.startswith("/proc/"):
        return Function(name, segment.size, path=segment.path, readonly=not writable)
    try:
        fd = os.open(segment.path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as e:
        raise Error(
            f"the memory of {name} cannot be opened: {(e.strerror or str(e)).lower()}",
            code="no-permission" if isinstance(e, PermissionError) else "no-such-file",
            cure="run it as root (sudo)" if isinstance(e, PermissionError) else "ringbar cluster list",
        ) from None
    files.callback(os.close, fd)
    return Function(name, segment.size, fd=fd, readonly=not writable)


# ---- doctor -------------------------------------------------------------------------------------------------


def examine(text: str, progress: Progress) -> list[Finding]:
    """What stands in the way of attaching to this VM."""
    name = canonical(text, None)
    progress(f"asking {name}")
    findings = asyncio.run(_examine(name))
    with connect(name, time.monotonic() + 5.0, progress) as machine:
        neighbours = machine.neighbours()
    if neighbours:
        detail = f"{', '.join(neighbours)}: an attached pool is mapped, and with VFIO locked, for these too"
        findings.append(Finding(name, "warning", detail))
    return findings


async def _examine(name: str) -> list[Finding]:
    connection = await Connection.open(name)
    try:
        types = await connection.execute("qom-list-types", implements="ivshmem-plain")
        if not types:
            cure = "a QEMU with ivshmem, such as Debian's qemu-system-x86"
            return [Finding(name, "missing", "its QEMU has no ivshmem-plain", cure)]
        topology = await read_topology(connection)
        free, kind = len(topology.free), "root port" if topology.machine == "q35" else "PCI slot"
        detail = f"{topology.machine}, {free} of {topology.total} hot-plug {kind}s free"
        if free > 1:
            findings = [Finding(name, "ok", detail)]
        elif free:
            findings = [Finding(name, "warning", detail, "ringbar attach --use-last-slot takes the last one")]
        else:
            cure = "start it with -device pcie-root-port,id=ringbar0,chassis=90,pref64-reserve=1G"
            return [Finding(name, "missing", detail, cure if topology.machine == "q35" else None)]
        why = await why_not_ready(connection, topology, topology.free[-1])
        if why is None:
            findings.append(Finding(name, "ok", "its guest listens for hot-plug"))
        else:
            findings.append(Finding(name, "warning", why, "wait until it has booted; attach waits too"))
        return findings
    finally:
        await connection.close()
