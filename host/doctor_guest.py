# SPDX-License-Identifier: Apache-2.0
"""What ``ringbar doctor`` finds in a guest. Each function returns findings and changes nothing."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from ringbar.errors import Error
from ringbar.host import surroundings
from ringbar.host.model import Finding
from ringbar.host.surroundings import SYS

if TYPE_CHECKING:
    from ringbar.guest import Device

_RAWIO = 17


def devices() -> list[Finding]:
    """The memory that is plugged into this VM, and how it is mapped."""
    from ringbar import guest

    found = []
    there = list(guest.find())
    for device in there:
        with contextlib.suppress(Error, OSError):
            found.append(_device(device))
    if not there:
        detail = "nothing is plugged into this VM (it looks like a guest: no cluster, no agent, no QEMU, no libvirt)"
        cure = "on the host: ringbar attach VM 99@0; to be a host of VMs itself: apt-get install qemu-system-x86"
        found.append(Finding("devices", "warning", detail, cure))
    return found


def _device(device: Device) -> Finding:
    from ringbar import guest

    name = f"device {device.name}"
    try:
        segment = guest.open_segment(device, writable=False)
    except Error as e:
        return Finding(name, "missing", e.message, e.cure)
    os.close(segment.fd)
    detail = f"{segment.size >> 10:,} KiB, memory type {segment.memory_type}"
    if segment.memory_type == "uncached-minus":
        cure = "run as root without kernel lockdown, so that /dev/mem can be used"
        return Finding(name, "warning", f"{detail}: slow on real hardware", cure)
    return Finding(name, "ok", detail)


def memory() -> list[Finding]:
    """Whether memory can be mapped write-back."""
    lockdown = re.search(r"\[(\w+)\]", surroundings.read(SYS / "kernel/security/lockdown"))
    if lockdown and lockdown[1] != "none":
        detail = f"the kernel is locked down ({lockdown[1]}), so memory is mapped uncached"
        return [Finding("/dev/mem", "warning", detail, "boot without lockdown=, or with secure boot off")]
    if not surroundings.capabilities() >> _RAWIO & 1:
        return [Finding("/dev/mem", "missing", "no permission (CAP_SYS_RAWIO)", "run as root (sudo)")]
    try:
        os.close(os.open("/dev/mem", os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        return [
            Finding(
                "/dev/mem",
                "warning",
                f"does not open: {(e.strerror or str(e)).lower()}",
                "run as root (sudo)",
            )
        ]
    return [Finding("/dev/mem", "ok", "opens")]


def hot_plug() -> list[Finding]:
    """Whether this guest's kernel sees what is plugged in while it runs."""
    slots = SYS / "bus/pci/slots"
    number = len(list(slots.iterdir())) if slots.is_dir() else 0
    if number:
        return [Finding("hot-plug", "ok", f"{number} PCI slots that the kernel watches")]
    cure = "boot without acpi=off and pci=noacpi; on q35 with a kernel that has pciehp"
    return [Finding("hot-plug", "warning", "the kernel watches no PCI slot, and sees nothing that is plugged in", cure)]


def iommu() -> list[Finding]:
    """Whether this guest has a virtual IOMMU."""
    groups = SYS / "kernel/iommu_groups"
    number = len(list(groups.iterdir())) if groups.is_dir() else 0
    detail = f"virtual, {number} groups" if number else "none: vfio-pci cannot be used, programs wait by polling"
    return [Finding("IOMMU", "ok", detail)]


def interrupts() -> list[Finding]:
    """How programs in this VM wait."""
    from ringbar.guest import bells, find

    plugged = 0
    for device in find():
        with contextlib.suppress(Error, OSError):
            memory = bells.read(device)
            plugged += memory is not None and memory.generation != 0
    if not plugged:
        detail = "none: programs poll, and see a packet up to 1 ms late"
        return [Finding("interrupts", "ok", detail, "a VM with a virtual IOMMU, attached anew: docs/guest.md")]
    status = bells.status()
    if status is None:
        detail = "the doorbell service does not run: programs poll, and see a packet up to 1 ms late"
        cure = "systemctl start ringbar-bells; or, as root: python3 -m ringbar.guest.bells"
        return [Finding("interrupts", "warning", detail, cure)]
    found = [
        Finding("interrupts", "warning", f"programs poll: {why.partition(chr(10))[0]}", why.rpartition("mend it: ")[2])
        for why in status["wrong"].values()
    ]
    if status["bells"]:
        names = ", ".join(f"{cluster}" for cluster, _, _ in status["bells"])
        found.append(Finding("interrupts", "ok", f"programs of cluster {names} sleep until the host rings"))
    return found
