# SPDX-License-Identifier: Apache-2.0
"""The PCI topology of a running VM, and the places in it where a slot of functions can be hot-plugged.

``-M pc``: the slots 0 to 31 of bus ``pci.0``. The *highest* free one is taken: libvirt counts upwards and collides
with what it does not know. ``-M q35``: every hot-plug capable root or downstream port is one place.

The device tree (QOM) is asked rather than ``query-pci``, which shows what the guest's firmware has numbered so far
and before that puts everything on bus 0.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence

from ringbar.errors import Error
from ringbar.qemu.monitor import Monitor

#: A property that was not given on QEMU's command line.
_UNSET = 2**64 - 1


@dataclasses.dataclass(frozen=True)
class Place:
    """One free place. ``bus`` and ``slot`` are what device_add wants."""

    bus: str
    slot: int
    window: int | None = None       #: bytes of 64-bit prefetchable address space that the port reserves, if it says
    port_devfn: int | None = None   #: device and function of the port, when it sits on the root bus

    def addr(self, function: int) -> str:
        """The ``addr`` property of a function here, for example ``1e.2``."""
        return f"{self.slot:x}.{function}"


@dataclasses.dataclass(frozen=True)
class Device:
    """A device on a PCI bus, as QEMU's object tree shows it."""

    path: str
    type: str
    bus: str
    devfn: int


@dataclasses.dataclass(frozen=True)
class Topology:
    """What of a VM matters for hot-plug."""

    machine: str                    #: "pc" or "q35"
    total: int                      #: places that can be hot-plugged into, free or not
    free: tuple[Place, ...]         #: in the order of their making
    devices: tuple[Device, ...]
    acpi: bool                      #: hot-plug goes through ACPI (else through the port's own registers)


async def read_topology(connection: Monitor) -> Topology:
    """Asks the VM for its PCI devices.

    :raise Error: ``no-hotplug``: neither ``-M pc`` nor ``-M q35``.
    """
    children = await connection.qom_list("/machine")
    if "i440fx" in children:
        machine, root = "pc", "/machine/i440fx/pci.0"
    elif "q35" in children:
        machine, root = "q35", "/machine/q35/pcie.0"
    else:
        kind = await connection.qom_get("/machine", "type", "unknown")
        raise Error(f"the VM's machine type {kind} has no PCI hot-plug that ringbar knows", code="no-hotplug",
                    cure="use -M pc or -M q35")
    port_types = {t["name"] for t in await connection.execute("qom-list-types", implements="pcie-slot")}
    devices: list[Device] = []
    places: list[Place] = []
    total = 0
    acpi = True
    todo = [root]
    while todo:
        bus_path = todo.pop(0)
        bus = bus_path.rpartition("/")[2]
        taken = [n for n in await connection.qom_list(bus_path) if n.startswith("child[")]
        for name in sorted(taken, key=lambda child: int(child[6:-1])):      # as they were made; QEMU shuffles them
            path = await connection.qom_get(bus_path, name)
            if not path:
                continue
            kind = str(await connection.qom_get(path, "type"))
            device = Device(path, kind, bus, int(await connection.qom_get(path, "addr", 0)))
            devices.append(device)
            if kind == "ICH9-LPC":
                acpi = bool(await connection.qom_get(path, "acpi-pci-hotplug-with-bridge-support", False))
            below = [n for n, t in (await connection.qom_list(path)).items() if t in ("child<PCI>", "child<PCIE>")]
            todo += [f"{path}/{n}" for n in below]
            if kind in port_types and below and await connection.qom_get(path, "hotplug", True):
                total += 1
                if not any(n.startswith("child[") for n in await connection.qom_list(f"{path}/{below[0]}")):
                    window = await connection.qom_get(path, "pref64-reserve", _UNSET)
                    places.append(Place(below[0], 0, None if int(window) in (0, _UNSET) else int(window),
                                        device.devfn if bus_path == root else None))
    if machine == "pc":
        used = {d.devfn >> 3 for d in devices if d.bus == "pci.0"}
        enabled = bool(await connection.qom_get(root, "hotplug-handler"))
        total = 32 if enabled else 0
        places = [Place("pci.0", slot) for slot in range(32) if slot not in used] if enabled else []
    return Topology(machine, total, tuple(places), tuple(devices), acpi)


def choose(
    topology: Topology, sizes: Sequence[int], *, use_last_slot: bool = False, libvirt_name: str | None = None
) -> Place:
    """The place to plug functions of these sizes (bytes) into.

    On q35 a port whose reserved window is large enough is preferred (the smallest such), since the guest's kernel
    cannot enlarge a window for a BAR; otherwise the last port. In a VM of libvirt it is the last in any case: libvirt
    does not know what is plugged in by us, takes its lowest place that it thinks free, and gives up when it is not.

    :param libvirt_name: of a VM that libvirt runs.
    :raise Error: ``no-free-slot``; ``last-slot`` when only one is left and ``use_last_slot`` is not set.
    """
    where = "root port" if topology.machine == "q35" else "PCI slot"
    if not topology.free:
        raise Error(f"the VM has no free hot-plug {where} (of {topology.total})", code="no-free-slot",
                    cure=cure_for_none(topology, libvirt_name))
    if len(topology.free) == 1 and not use_last_slot:
        cure = "give --use-last-slot to take it"
        if topology.machine == "q35":
            cure += f", or {more_ports(libvirt_name)}"
        raise Error(
            f"only one free hot-plug {where} is left in the VM (of {topology.total}); libvirt or you may need it",
            code="last-slot", cure=cure)
    if topology.machine == "pc":
        return max(topology.free, key=lambda place: place.slot)
    if libvirt_name is not None:
        return max(topology.free, key=lambda place: _number(place.bus))
    need = sum(sizes)
    wide = [place for place in topology.free if place.window is not None and place.window >= need]
    if wide:
        return min(reversed(wide), key=lambda place: place.window or 0)
    return topology.free[-1]


def _number(bus: str) -> int:
    """Of ``pci.4``: libvirt's index of the port, by which it takes them."""
    digits = re.search(r"[0-9]+$", bus)
    return int(digits[0]) if digits else -1


#: One more port in a domain's XML; libvirt gives it index and address.
PORT_XML = "<controller type='pci' model='pcie-root-port'/>"


def more_ports(libvirt_name: str | None, count: int = 1) -> str:
    """How a q35 VM gets more places, for people."""
    if libvirt_name is None:
        return ("start the VM with one more, QEMU: -device pcie-root-port,id=ringbar0,chassis=90,pref64-reserve=1G; "
                f"libvirt: {PORT_XML} in <devices>")
    return (f"virsh edit {shlex.quote(libvirt_name)}, add to <devices>: {PORT_XML * count} (a port each), "
            "shut the VM down and start it")


def cure_for_none(topology: Topology, libvirt_name: str | None) -> str:
    """What mends a VM without a free place."""
    if topology.machine == "q35":
        return more_ports(libvirt_name, 2)
    if topology.total:
        return "unplug a device the VM does not need"
    return "start the VM without -global PIIX4_PM.acpi-root-pci-hotplug=off"
