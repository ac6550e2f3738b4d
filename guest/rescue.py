# SPDX-License-Identifier: Apache-2.0
"""Gives a device's BAR 2 a good place when the kernel could not.

A PCIe root port has a window of 2 MiB for its devices' 64-bit BARs, unless QEMU was told otherwise. A larger BAR 2 that
is plugged behind it stays *unassigned*; one that fits lies *below 4 GiB*, where the firmware's MTRRs make all memory
uncached. Both have the same cure: remove the port from the kernel's view and rescan its bus. The kernel then sizes the
window by what is behind the port and puts it above 4 GiB.

That is safe only while nothing else sits behind the port and nobody has the memory mapped: removing a device takes it
from its users, and it comes back at another address. So it is refused otherwise, with the QEMU option that makes
it needless.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import re
import subprocess
from collections.abc import Iterator

from ringbar.errors import Busy, Error, NotFound
from ringbar.guest import pci
from ringbar.guest.pci import PROC, SYSFS, Device

RESERVE = "start the VM with a larger window for this port: -device pcie-root-port,...,pref64-reserve=SIZE"
HOLE = "start the VM with a larger window: -global i440FX-pcihost.pci-hole64-size=SIZE (q35-pcihost on q35)"

LOCK = pathlib.Path("/run/ringbar-pci.lock")


@contextlib.contextmanager
def lock(path: pathlib.Path = LOCK) -> Iterator[None]:
    """One process of this guest at a time may move devices; nobody opens one meanwhile.

    Without the right to make the lock file there is also no right to move devices, so it is then skipped.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError:
        yield
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def settle(device: Device, sysfs: pathlib.Path = SYSFS) -> Device:
    """The device after the kernel has finished bringing it up.

    A device is announced before its BARs are assigned. Both happen under the kernel's hot-plug lock, and so does a
    rescan of the device's bus: when that returns, the BARs are where they will stay.

    :raises NotFound: the device is gone.
    """
    if not device.high:
        with contextlib.suppress(OSError):  # no right to: the caller's own steps will say so
            (device.path / "rescan").write_text("1")
    return pci.get(device.name, sysfs)


def behind(port: pathlib.Path) -> list[pathlib.Path]:
    """The PCI functions directly behind a port."""
    return sorted(path for path in port.iterdir() if pci._NAME.fullmatch(path.name) and path.is_dir())


def mapped_by(devices: list[Device], proc: pathlib.Path = PROC) -> int | None:
    """The id of a process that has memory of one of the devices mapped; None when there is none.

    Looks into every process this one may look into, itself included.
    """
    ranges = [(device.address, device.address + device.size) for device in devices if device.address is not None]
    files = {os.fspath(device.path / f"resource{bar}") for device in devices for bar in ("0", "2", "2_wc")}
    for entry in sorted(path for path in proc.iterdir() if path.name.isdigit()):
        try:
            text = (entry / "maps").read_text(errors="replace")
        except OSError:  # ended meanwhile, or not ours to see
            continue
        for line in text.splitlines():
            part = line.split(maxsplit=5)
            if len(part) < 6:
                continue
            if part[5] in files:
                return int(entry.name)
            if part[5] == "/dev/mem":
                low, _, high = part[0].partition("-")
                start = int(part[2], 16)
                end = start + int(high, 16) - int(low, 16)
                if any(start < top and bottom < end for bottom, top in ranges):
                    return int(entry.name)
    return None


def check(device: Device, sysfs: pathlib.Path = SYSFS, proc: pathlib.Path = PROC) -> pathlib.Path:
    """The port that can safely be removed and rescanned for this device.

    :raises Error: there is none: the message says what else sits there, the cure is the QEMU option.
    :raises Busy: a program has memory behind that port mapped.
    """
    trouble = f"the guest has no room for the memory of {device.name}"
    port = device.port
    if port is None:
        raise Error(f"{trouble}: it sits on a root bus", code="bar-unassigned", cure=HOLE)
    others = [path for path in behind(port) if not pci.is_ivshmem(path)]
    if others:
        names = ", ".join(path.name for path in others)
        raise Error(
            f"{trouble}, and its port {port.name} can't be reset because {names} sits behind it too",
            code="bar-unassigned", cure=RESERVE,
        )  # fmt: skip
    held = [path for path in behind(port) if (path / "driver").exists()]
    if held:
        driver = pathlib.Path(os.path.realpath(held[0] / "driver")).name
        raise Error(
            f"{trouble}, and its port {port.name} can't be reset because the driver {driver} has {held[0].name}",
            code="bar-unassigned", cure=RESERVE,
        )  # fmt: skip
    siblings = [found for found in (pci.read(path) for path in behind(port)) if found is not None]
    pid = mapped_by(siblings, proc)
    if pid is not None:
        raise Busy(
            f"{trouble}, and its port {port.name} can't be reset while process {pid} has memory behind it mapped",
            holder=f"process {pid}", code="bar-unassigned", cure=f"end process {pid} and try again, or {RESERVE}",
        )  # fmt: skip
    if not os.access(port / "remove", os.W_OK):
        raise Error(
            f"{trouble}; giving it room needs root", code="no-permission",
            cure=f"run the program once as root, or {RESERVE}",
        )  # fmt: skip
    return port


def _bus_of(port: pathlib.Path) -> pathlib.Path | None:
    """The directory of the bus that a port itself is on."""
    address = port.name.rpartition(":")[0]  # "0000:00"
    found = port.parent / "pci_bus" / address
    return found if re.fullmatch(r"[0-9a-f]{4,8}:[0-9a-f]{2}", address) and found.is_dir() else None


def rescue(device: Device, sysfs: pathlib.Path = SYSFS, proc: pathlib.Path = PROC) -> Device:
    """Give the device's BAR 2 a place above 4 GiB; call it with :func:`lock` held. Nothing is done when it has one.

    :return: the device as it is then; its address has changed.
    :raises Error: it can't be done safely (see :func:`check`), or did not help; then the cure is the QEMU option.
    """
    device = settle(device, sysfs)
    if device.high:
        return device
    port = check(device, sysfs, proc)
    bus = _bus_of(port)
    # A process of its own, so that nothing that ends this one can come between the two steps.
    files = [os.fspath(port / "remove"), os.fspath((bus or sysfs / "bus/pci") / "rescan")]
    steps = ["sh", "-c", 'echo 1 > "$1"; echo 1 > "$2"', "sh", *files]
    with subprocess.Popen(steps, start_new_session=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as shell:
        shell.wait()
    try:
        device = pci.get(device.name, sysfs)
    except NotFound:  # renumbered buses: let the caller look again
        raise NotFound(
            f"{device.name} came back under another name", code="no-device", cure="run the same command again"
        ) from None
    if not device.assigned:
        raise Error(
            f"the guest still has no room for the memory of {device.name} after a rescan of port {port.name}",
            code="bar-unassigned", cure=RESERVE,
        )  # fmt: skip
    return device
