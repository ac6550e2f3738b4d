# SPDX-License-Identifier: Apache-2.0
"""Opens the memory of an ivshmem device for mapping, with the best memory type the guest can give.

=================  ======================================  ====================================================
memory type        what opens it                           what it means
=================  ======================================  ====================================================
write-back         /dev/mem, without O_SYNC, BAR > 4 GiB   ordinary memory: the one to have
uncached-minus     sysfs resource2; or BAR below 4 GiB     right, but tens of times slower where the processor
                                                           honours the guest's type (AMD, newer Intel)
write-combining    sysfs resource2_wc                      stores pass one another: the rings' release stores don't
                                                           hold on x86, so it is used on other architectures only
=================  ======================================  ====================================================

Why a small BAR may be uncached even through /dev/mem: behind a stock q35 root port it lies below 4 GiB, where one MTRR
of the firmware says uncached, and an uncached MTRR wins over everything. :mod:`ringbar.guest.rescue` moves it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import pathlib
import platform
import re

from ringbar.errors import Error
from ringbar.guest import pci
from ringbar.guest import rescue as rescuing
from ringbar.guest.pci import PROC, SYSFS, Device

WRITE_BACK = "write-back"
WRITE_COMBINING = "write-combining"
UNCACHED = "uncached-minus"

DEV_MEM = pathlib.Path("/dev/mem")

RIGHTS = (
    "run as root (or a service with CAP_SYS_RAWIO), or be in the group ringbar where the udev rule of "
    "`ringbar guest-bundle` is installed; without udev, as root: python3 -m ringbar.guest.prepare"
)


@dataclasses.dataclass(frozen=True)
class Segment:
    """One BAR, open: ``mmap(size, fd, offset)`` maps it. ``fd`` belongs to the caller, who closes it."""

    device: str  # "0000:00:1e.0"
    size: int  # bytes
    fd: int
    offset: int
    memory_type: str  # as a trial mapping got it; `verify` tells what the real one has


def open_segment(device: Device | str, *, writable: bool, sysfs: pathlib.Path = SYSFS) -> Segment:
    """Open BAR 2 of a device for mapping; moves it above 4 GiB first where that is needed and safe.

    :param writable: open for reading and writing.
    :raises NotFound: the device is gone.
    :raises Error: the BAR has no place and can't safely be given one, or this process lacks the rights.
    """
    with rescuing.lock():
        found = pci.get(device if isinstance(device, str) else device.name, sysfs)
        if not found.high:
            found = _place(found, sysfs)
        _enable(found)
        refusals: list[str] = []
        for path, offset in _ways(found):
            segment = _try(found, path, offset, writable, refusals)
            if segment is not None:
                return segment
    raise Error(
        f"no right to map the memory of {found.name} ({'; '.join(refusals)})", code="no-permission", cure=RIGHTS
    )


def _place(device: Device, sysfs: pathlib.Path) -> Device:
    """Have the BAR moved above 4 GiB; one that has a place below stays usable when that is refused."""
    try:
        return rescuing.rescue(device, sysfs)
    except Error:
        device = pci.get(device.name, sysfs)
        if device.assigned:
            return device
        raise


def _enable(device: Device) -> None:
    """Let the device answer to memory accesses: no driver does, so reads would give all ones."""
    if device.enabled:
        return
    try:
        (device.path / "enable").write_text("1")
    except OSError as error:
        raise Error(
            f"{device.name} is not enabled, and this process may not enable it ({error.strerror}; needs CAP_SYS_ADMIN)",
            code="no-permission", cure=RIGHTS,
        ) from None  # fmt: skip


def _ways(device: Device) -> list[tuple[pathlib.Path, int]]:
    """Files and offsets that map the BAR, the best first."""
    assert device.address is not None
    plain = (device.resource, 0)
    if platform.machine() in ("x86_64", "i686"):
        return [(DEV_MEM, device.address), plain]
    # Elsewhere /dev/mem maps a BAR as device memory; write-combining is normal memory, ordered by barriers.
    return [(device.resource.with_name(device.resource.name + "_wc"), 0), plain]


def _try(device: Device, path: pathlib.Path, offset: int, writable: bool, refusals: list[str]) -> Segment | None:
    """Open one way and prove with a trial page that it can be mapped: some refusals come only then."""
    try:
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        refusals.append(f"{path}: {error.strerror}")
        return None
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        with mmap.mmap(fd, mmap.PAGESIZE, flags=mmap.MAP_SHARED, prot=access, offset=offset):
            got = _listed(device.address or 0) or _deduced(device, path)
    except (OSError, ValueError) as error:
        os.close(fd)
        refusals.append(f"{path}: {error.strerror if isinstance(error, OSError) else error}")
        return None
    except BaseException:
        os.close(fd)
        raise
    return Segment(device=device.name, size=device.size, fd=fd, offset=offset, memory_type=got)


def verify(segment: Segment) -> str:
    """The memory type that a mapped segment really has; see :func:`memory_type_of`."""
    return memory_type_of(segment.device)


def memory_type_of(device: Device | str, sysfs: pathlib.Path = SYSFS) -> str:
    """The memory type of a device's BAR 2 as the kernel has it now: ``"write-back"``, ``"write-combining"`` or
    ``"uncached-minus"``.

    The kernel's own list (debugfs, needs root) counts while the BAR is mapped; else it is deduced from where the BAR
    is and how :func:`open_segment` would open it.

    :raises NotFound: the device is gone.
    """
    found = pci.get(device if isinstance(device, str) else device.name, sysfs)
    if found.address is None:
        raise Error(f"the memory of {found.name} has no place yet", code="bar-unassigned", cure="open it first")
    listed = _listed(found.address)
    if listed is not None:
        return listed
    ways = [path for path, _ in _ways(found) if os.access(path, os.R_OK)]
    return _deduced(found, ways[0] if ways else found.resource)


_LISTED = re.compile(r"\[mem (0x[0-9a-f]+)-(0x[0-9a-f]+)\] (\S+)|(\S+) @ (0x[0-9a-f]+)-(0x[0-9a-f]+)")


def parse_memtypes(text: str, address: int) -> str | None:
    """The type of an address in the text of ``pat_memtype_list``, both its old and its new form; None: not mapped."""
    for new_low, new_high, new_type, old_type, old_low, old_high in _LISTED.findall(text):
        low, high = int(new_low or old_low, 16), int(new_high or old_high, 16)
        if low <= address < high:
            return str(new_type or old_type)
    return None


def _listed(address: int) -> str | None:
    text = _read_debugfs("x86/pat_memtype_list")
    return parse_memtypes(text, address) if text is not None else None


def parse_mtrr(text: str, address: int) -> bool:
    """Whether an uncached range in the text of ``/proc/mtrr`` covers the address."""
    for base, size, unit, kind in re.findall(r"base=(0x[0-9a-f]+).*size=\s*(\d+)([KM])B.*: *(\S+)", text):
        start = int(base, 16)
        if kind == "uncachable" and start <= address < start + int(size) * (1024 if unit == "K" else 1 << 20):
            return True
    return False


def _deduced(device: Device, path: pathlib.Path) -> str:
    if path.name.endswith("_wc"):
        return WRITE_COMBINING
    if path != DEV_MEM or device.address is None:
        return UNCACHED
    try:
        mtrr = (PROC / "mtrr").read_text()
    except OSError:
        return WRITE_BACK if device.high else UNCACHED
    return UNCACHED if parse_mtrr(mtrr, device.address) else WRITE_BACK


# ---- debugfs without mounting it anywhere --------------------------------------------------------------------------

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # the same on every architecture
_FSCONFIG_CMD_CREATE = 6


def _read_debugfs(name: str) -> str | None:
    """A debugfs file's text; None where debugfs is not to be had. Leaves no mount behind."""
    mounted = SYSFS / "kernel/debug" / name
    try:
        return mounted.read_text()
    except OSError:
        pass
    libc = ctypes.CDLL(None, use_errno=True)
    context = libc.syscall(_FSOPEN, b"debugfs", 1)
    if context < 0:
        return None
    root = -1
    try:
        if libc.syscall(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0) < 0:
            return None
        root = libc.syscall(_FSMOUNT, context, 1, 0)
        if root < 0:
            return None
        with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=root)) as file:
            return file.read()
    except OSError:
        return None
    finally:
        os.close(context)
        if root >= 0:
            os.close(root)
