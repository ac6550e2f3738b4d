# SPDX-License-Identifier: Apache-2.0
"""Finds ivshmem devices (PCI 1af4:1110) in sysfs, and where their shared memory (BAR 2) is.

A VM's attachment to one cluster is one PCI slot: function 0 is the lane, functions 1 to 7 are pools. What a device
holds is told by the segment header in its memory, not by PCI.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import re

from ringbar.errors import NotFound

SYSFS = pathlib.Path("/sys")
PROC = pathlib.Path("/proc")

VENDOR, DEVICE = 0x1AF4, 0x1110
BAR = 2

#: Below it is the 32-bit hole, which firmware marks uncached in the MTRRs.
FOUR_GIB = 1 << 32

_NAME = re.compile(r"([0-9a-f]{4,8}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")


@dataclasses.dataclass(frozen=True, order=True)
class Device:
    """One ivshmem function as it was when looked at; ordered by slot, then function."""

    slot: tuple[int, int, int]  # domain, bus, device
    function: int
    name: str = dataclasses.field(compare=False)  # "0000:00:1e.0"
    path: pathlib.Path = dataclasses.field(compare=False)  # its real directory in sysfs
    address: int | None = dataclasses.field(compare=False)  # of BAR 2 in the guest's memory; None: unassigned
    size: int = dataclasses.field(compare=False)  # bytes of BAR 2; 0 while unassigned

    @property
    def assigned(self) -> bool:
        """Whether BAR 2 has a place in the guest's address space."""
        return self.address is not None

    @property
    def high(self) -> bool:
        """Whether BAR 2 lies above 4 GiB, where it can be mapped write-back."""
        return self.address is not None and self.address >= FOUR_GIB

    @property
    def port(self) -> pathlib.Path | None:
        """The PCI bridge (root port) it sits behind, as a sysfs directory; None on a root bus."""
        return self.path.parent if _NAME.fullmatch(self.path.parent.name) else None

    @property
    def resource(self) -> pathlib.Path:
        """The file that maps BAR 2."""
        return self.path / f"resource{BAR}"

    @property
    def enabled(self) -> bool:
        """Whether the device answers to memory accesses."""
        return _text(self.path / "enable") not in ("", "0")


def _text(path: pathlib.Path) -> str:
    """A sysfs attribute; empty when it is not there, for devices may go while one looks at them."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def is_ivshmem(path: pathlib.Path) -> bool:
    """Whether a PCI device's directory is that of an ivshmem device."""
    return _text(path / "vendor") == f"{VENDOR:#06x}" and _text(path / "device") == f"{DEVICE:#06x}"


def read(path: pathlib.Path) -> Device | None:
    """Look at one PCI device's directory; None when it is gone or no ivshmem device."""
    path = pathlib.Path(os.path.realpath(path))
    name = _NAME.fullmatch(path.name)
    lines = _text(path / "resource").splitlines()
    if name is None or len(lines) <= BAR or not is_ivshmem(path):
        return None
    domain, bus, device, function = (int(part, 16) for part in name.groups())
    start, end, flags = (int(part, 16) for part in lines[BAR].split())
    # An unassigned BAR shows as zeros, on some kernels as its bare size at address 0.
    assigned = start != 0 and end > start and flags != 0
    return Device(
        slot=(domain, bus, device),
        function=function,
        name=path.name,
        path=path,
        address=start if assigned else None,
        size=end - start + 1 if assigned else 0,
    )


def find(sysfs: pathlib.Path = SYSFS) -> list[Device]:
    """All ivshmem devices, by slot and function; empty when there is none.

    :param sysfs: where sysfs is mounted.
    """
    folder = sysfs / "bus/pci/devices"
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return sorted(device for device in (read(folder / name) for name in names) if device is not None)


def get(name: str, sysfs: pathlib.Path = SYSFS) -> Device:
    """The device of this name, as it is now.

    :raises NotFound: it is gone, or is no ivshmem device.
    """
    device = read(sysfs / "bus/pci/devices" / name)
    if device is None:
        raise NotFound(f"there is no shared-memory device {name}", code="no-device", cure="attach the VM on the host")
    return device


def slots(devices: list[Device]) -> list[list[Device]]:
    """The devices grouped by slot: each group is one attachment, its first member function 0 (the lane)."""
    return [list(group) for _, group in itertools.groupby(sorted(devices), key=lambda device: device.slot)]


def is_guest(sysfs: pathlib.Path = SYSFS, proc: pathlib.Path = PROC) -> bool:
    """Whether this machine is a VM: it has an ivshmem device, its firmware is QEMU's, or its processor shows the
    hypervisor flag (x86 only).

    A host that is itself a VM (nested, or in a cloud) shows the flag too; only :func:`find` tells whether there is
    memory to attach.
    """
    if find(sysfs) or _text(sysfs / "class/dmi/id/sys_vendor") == "QEMU":
        return True
    flags = re.search(r"^flags\s*:(.*)$", _text(proc / "cpuinfo"), re.MULTILINE)
    return flags is not None and "hypervisor" in flags[1].split()
