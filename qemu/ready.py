# SPDX-License-Identifier: Apache-2.0
"""Knowing over QMP that a guest is ready for hot-plug: that its operating system runs *and listens*.

A device_add while the guest is in its firmware can abort QEMU, and is lost on the guest in any case. QMP has no
command that tells; two registers do, and no firmware or boot loader sets either of them:

- ACPI hot-plug (``-M pc``, and ``-M q35`` as it comes): bit 1 of GPE0_EN. The operating system enables that general
  purpose event once it has loaded the ACPI tables, scanned the PCI bus and installed its hot-plug handlers. It is
  read with the monitor's ``i`` command at the address that ``info mtree`` shows. A reset of the VM clears it.
- Native hot-plug (``-M q35`` with ``acpi-pci-hotplug-with-bridge-support=off``): the hot-plug interrupt enable bit
  in the root port's slot control register, which the operating system's pciehp driver sets; read through the
  memory-mapped configuration space with ``xp``.

Neither read has a side effect, neither needs the guest's help, and both work under KVM and TCG, and with memory or
registers encrypted. The processor's state (an interrupt table in the upper half of the address space with paging
on) also tells an operating system from firmware, but does so a second too early, before the bus is scanned; here it
only decides how the wait is explained. A guest that runs without ACPI never gets ready, and the message says so.
"""

from __future__ import annotations

import re

from ringbar.qemu.monitor import CommandError, Monitor
from ringbar.qemu.slots import Place, Topology

_PCI_HOTPLUG_EVENT = 1 << 1         # GPE0 event 1 in QEMU's ACPI tables (_E01)
_HOTPLUG_INTERRUPT = 1 << 5         # HPIE of the PCI Express slot control register

_FIRMWARE = "the guest is still in its firmware or boot loader"
_NOT_LISTENING = "the guest's operating system runs but does not listen for PCI hot-plug yet"

#: Run states and what to say of them.
_STOPPED = {
    "paused": "the VM is paused",
    "inmigrate": "the VM is arriving by migration",
    "finish-migrate": "the VM is leaving by migration",
    "postmigrate": "the VM has left by migration",
    "suspended": "the guest sleeps",
    "io-error": "the VM is stopped by a disk error",
    "shutdown": "the VM is shut down",
    "guest-panicked": "the guest's kernel has panicked",
}


async def why_not_ready(connection: Monitor, topology: Topology, place: Place) -> str | None:
    """Why nothing can be plugged into this place now, as a sentence; None when it can."""
    state = str((await connection.execute("query-status"))["status"])
    if state == "prelaunch":  # started with -S: no instruction has run yet, and the firmware will find what is there
        return None
    if state != "running":
        return _STOPPED.get(state, f"the VM is in state {state}")
    if topology.acpi:
        listening = await _acpi_event_enabled(connection)
    elif place.port_devfn is not None:
        listening = await _port_interrupt_enabled(connection, place.port_devfn)
    else:       # below a switch, whose bus number only the guest knows
        return None if await _in_kernel(connection) else _FIRMWARE
    if listening:
        return None
    return _NOT_LISTENING if await _in_kernel(connection) else _FIRMWARE


def resume_cure(reason: str) -> str:
    """What mends the state that :func:`why_not_ready` gave."""
    if "paused" in reason:
        return "resume it (virsh resume NAME, or 'cont' in its monitor) and run the command again"
    if reason == _NOT_LISTENING:
        return "wait until it has booted; a guest kernel without ACPI (acpi=off) cannot be hot-plugged"
    return "wait until it has booted and run the command again, or give a longer --timeout"


def mapped_at(mtree: str, name: str) -> tuple[int, int] | None:
    """First and last address of a region in the text of ``info mtree``; None when it is not mapped."""
    for low, high, rest in re.findall(rf"([0-9a-f]{{16}})-([0-9a-f]{{16}}) \(.*?\): {re.escape(name)}\b(.*)", mtree):
        if "[disabled]" not in rest:
            return int(low, 16), int(high, 16)
    return None


async def _acpi_event_enabled(connection: Monitor) -> bool:
    region = mapped_at(await connection.hmp("info mtree"), "acpi-gpe0")
    if region is None or region[0] < 0x100:         # q35: not yet placed by the firmware
        return False
    low, high = region
    enable = low + (high - low + 1) // 2            # first half status, second half enable
    value = _number(await connection.hmp(f"i /b {enable:#x}"))
    return value not in (None, 0xFF) and bool((value or 0) & _PCI_HOTPLUG_EVENT)


async def _port_interrupt_enabled(connection: Monitor, devfn: int) -> bool:
    region = mapped_at(await connection.hmp("info mtree"), "pcie-mmcfg-mmio")
    if region is None:
        return False
    base = region[0] + (devfn << 12)
    offset = _number(await connection.hmp(f"xp /1bx {base + 0x34:#x}"))
    for _ in range(48):                             # as many capabilities as fit
        if not offset or offset == 0xFF:
            return False
        header = _number(await connection.hmp(f"xp /1hx {base + offset:#x}")) or 0
        if header & 0xFF == 0x10:                   # PCI Express
            control = _number(await connection.hmp(f"xp /1hx {base + offset + 0x18:#x}")) or 0
            return bool(control & _HOTPLUG_INTERRUPT)
        offset = header >> 8
    return False


async def _in_kernel(connection: Monitor) -> bool:
    try:
        return kernel_registers(await connection.hmp("info registers"))
    except CommandError:
        return False


def kernel_registers(text: str) -> bool:
    """Whether the registers (text of ``info registers``) are an operating system's: paging is on and the interrupt
    table lies in the upper half of the address space, where firmware and boot loaders never put it."""
    table = re.search(r"^IDT= *([0-9a-f]{8,16}) ", text, re.MULTILINE)
    cr0 = re.search(r"^CR0=([0-9a-f]{8})", text, re.MULTILINE)
    if table is None or cr0 is None or not int(cr0[1], 16) >> 31:
        return False
    return bool(int(table[1], 16) >> (4 * len(table[1]) - 1))


def _number(text: str) -> int | None:
    found = re.search(r"[=:] *0x([0-9a-f]+)", text)
    return int(found[1], 16) if found else None
