# SPDX-License-Identifier: Apache-2.0
"""The guest's PCI discovery and the safety of its rescue, against a made-up sysfs."""

from __future__ import annotations

import mmap
import os
import pathlib
import subprocess
import sys

import pytest

from ringbar.errors import Busy, Error, NotFound
from ringbar.guest import mapping, pci, rescue, uevent

ZERO = "0x0000000000000000 0x0000000000000000 0x0000000000000000"
MIB = 1 << 20


class FakeSysfs:
    """Just the files that the code reads: devices under /sys/devices, links under /sys/bus/pci/devices."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        (root / "bus/pci/devices").mkdir(parents=True)
        (root / "devices/pci0000:00/pci_bus/0000:00").mkdir(parents=True)
        (root / "devices/pci0000:00/pci_bus/0000:00/rescan").write_text("")

    def add(
        self, name: str, *, behind: str = "", ids: tuple[int, int] = (0x1AF4, 0x1110), address: int = 0, size: int = 0
    ) -> pathlib.Path:
        path = self.root / "devices/pci0000:00" / behind / name
        path.mkdir(parents=True)
        (path / "vendor").write_text(f"{ids[0]:#06x}\n")
        (path / "device").write_text(f"{ids[1]:#06x}\n")
        bar = f"{address:#018x} {address + size - 1:#018x} 0x000000000014220c" if size else ZERO
        (path / "resource").write_text("\n".join([ZERO, ZERO, bar, *[ZERO] * 10]) + "\n")
        (path / "enable").write_text("0\n")
        for file in ("remove", "rescan"):
            (path / file).write_text("")
        (self.root / "bus/pci/devices" / name).symlink_to(path)
        return path


@pytest.fixture
def sysfs(tmp_path: pathlib.Path) -> FakeSysfs:
    return FakeSysfs(tmp_path / "sys")


@pytest.fixture
def proc(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "proc").mkdir()
    return tmp_path / "proc"


PORT = (0x1B36, 0x000C)


def test_nothing_there(tmp_path: pathlib.Path, sysfs: FakeSysfs) -> None:
    assert pci.find(tmp_path / "no sysfs") == []
    assert pci.find(sysfs.root) == []


def test_find_reads_bar_2(sysfs: FakeSysfs) -> None:
    sysfs.add("0000:00:1e.0", address=0x1_0400_0000, size=64 * MIB)
    sysfs.add("0000:00:02.0", ids=(0x1AF4, 0x1041), address=0xFE000000, size=4096)
    (device,) = pci.find(sysfs.root)
    assert (device.name, device.slot, device.function) == ("0000:00:1e.0", (0, 0, 0x1E), 0)
    assert (device.address, device.size) == (0x1_0400_0000, 64 * MIB)
    assert device.assigned
    assert device.high
    assert device.port is None
    assert not device.enabled


def test_unassigned_and_low(sysfs: FakeSysfs) -> None:
    sysfs.add("0000:00:10.0", ids=PORT)
    sysfs.add("0000:01:00.0", behind="0000:00:10.0")
    sysfs.add("0000:01:00.1", behind="0000:00:10.0", address=0xFE800000, size=MIB)
    none, low = pci.find(sysfs.root)
    assert not none.assigned
    assert none.size == 0
    assert none.port is not None
    assert none.port.name == "0000:00:10.0"
    assert low.assigned
    assert not low.high


def test_order_and_slots(sysfs: FakeSysfs) -> None:
    for name in ("0000:00:1e.1", "10000:00:01.0", "0000:0a:00.0", "0000:00:1e.0", "0000:00:1d.0"):
        sysfs.add(name, address=0x1_0000_0000, size=MIB)
    found = pci.find(sysfs.root)
    names = ["0000:00:1d.0", "0000:00:1e.0", "0000:00:1e.1", "0000:0a:00.0", "10000:00:01.0"]
    assert [device.name for device in found] == names
    assert [[device.function for device in slot] for slot in pci.slots(found)] == [[0], [0, 1], [0], [0]]


def test_device_that_goes_while_looking(sysfs: FakeSysfs) -> None:
    path = sysfs.add("0000:00:1e.0", address=0x1_0000_0000, size=MIB)
    (path / "resource").unlink()
    assert pci.find(sysfs.root) == []
    with pytest.raises(NotFound, match=r"0000:00:1e\.0"):
        pci.get("0000:00:1e.0", sysfs.root)


def test_is_guest(sysfs: FakeSysfs, proc: pathlib.Path) -> None:
    assert not pci.is_guest(sysfs.root, proc)
    (proc / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu sse hypervisors\n")
    assert not pci.is_guest(sysfs.root, proc)
    (proc / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu hypervisor sse\n")
    assert pci.is_guest(sysfs.root, proc)
    (proc / "cpuinfo").unlink()
    vendor = sysfs.root / "class/dmi/id/sys_vendor"
    vendor.parent.mkdir(parents=True)
    vendor.write_text("QEMU\n")
    assert pci.is_guest(sysfs.root, proc)
    vendor.unlink()
    assert not pci.is_guest(sysfs.root, proc)
    sysfs.add("0000:00:1e.0")
    assert pci.is_guest(sysfs.root, proc)


# ---- rescue ---------------------------------------------------------------------------------------------------------


def port_with(sysfs: FakeSysfs, *, low: bool = False) -> tuple[pathlib.Path, pci.Device]:
    port = sysfs.add("0000:00:10.0", ids=PORT)
    address, size = (0xFE800000, MIB) if low else (0, 0)
    path = sysfs.add("0000:01:00.0", behind="0000:00:10.0", address=address, size=size)
    device = pci.read(path)
    assert device is not None
    return port, device


def untouched(sysfs: FakeSysfs) -> bool:
    return all(not path.read_text() for path in sysfs.root.rglob("remove"))


def test_rescue_resets_a_port_of_our_own(sysfs: FakeSysfs, proc: pathlib.Path) -> None:
    port, device = port_with(sysfs, low=True)
    assert rescue.check(device, sysfs.root, proc) == port.resolve()
    rescue.rescue(device, sysfs.root, proc)
    assert (port / "remove").read_text() == "1\n"
    assert (port.parent / "pci_bus/0000:00/rescan").read_text() == "1\n"


def test_rescue_that_does_not_help_names_the_option(sysfs: FakeSysfs, proc: pathlib.Path) -> None:
    _, device = port_with(sysfs)
    with pytest.raises(Error, match=r"after a rescan of port 0000:00:10\.0") as caught:
        rescue.rescue(device, sysfs.root, proc)
    assert "pref64-reserve" in str(caught.value.cure)


def test_rescue_leaves_good_places_alone(sysfs: FakeSysfs, proc: pathlib.Path) -> None:
    path = sysfs.add("0000:00:1e.0", address=0x1_0000_0000, size=MIB)
    device = pci.read(path)
    assert device is not None
    assert rescue.rescue(device, sysfs.root, proc) == device
    assert untouched(sysfs)
    assert (path / "rescan").read_text() == ""


def test_no_rescue_on_a_root_bus(sysfs: FakeSysfs, proc: pathlib.Path) -> None:
    device = pci.read(sysfs.add("0000:00:1e.0"))
    assert device is not None
    with pytest.raises(Error, match="root bus") as caught:
        rescue.rescue(device, sysfs.root, proc)
    assert "pci-hole64-size" in str(caught.value.cure)
    assert untouched(sysfs)


def test_no_rescue_beside_another_device(sysfs: FakeSysfs, proc: pathlib.Path) -> None:
    _, device = port_with(sysfs)
    sysfs.add("0000:01:00.1", behind="0000:00:10.0", ids=(0x1AF4, 0x1041))
    with pytest.raises(Error, match=r"0000:01:00\.1 sits behind it too") as caught:
        rescue.rescue(device, sysfs.root, proc)
    assert "pref64-reserve" in str(caught.value.cure)
    assert untouched(sysfs)


def test_no_rescue_of_a_port_with_a_bridge_behind(sysfs: FakeSysfs, proc: pathlib.Path) -> None:
    _, device = port_with(sysfs)
    sysfs.add("0000:01:01.0", behind="0000:00:10.0", ids=PORT)
    with pytest.raises(Error, match=r"0000:01:01\.0"):
        rescue.rescue(device, sysfs.root, proc)
    assert untouched(sysfs)


def test_no_rescue_under_a_driver(sysfs: FakeSysfs, proc: pathlib.Path) -> None:
    _, device = port_with(sysfs)
    driver = sysfs.root / "bus/pci/drivers/vfio-pci"
    driver.mkdir(parents=True)
    (device.path / "driver").symlink_to(driver)
    with pytest.raises(Error, match=r"driver vfio-pci has 0000:01:00\.0"):
        rescue.rescue(device, sysfs.root, proc)
    assert untouched(sysfs)


@pytest.mark.parametrize(
    ("line", "held"),
    [
        ("7f0000000000-7f0000002000 rw-s fe7ff000 00:05 8     /dev/mem", True),
        ("7f0000000000-7f0000001000 rw-s fe7ff000 00:05 8     /dev/mem", False),
        ("7f0000000000-7f0000001000 rw-s fe8ff000 00:05 8     /dev/mem", True),
        ("7f0000000000-7f0000001000 rw-s fe900000 00:05 8     /dev/mem", False),
        ("7f0000000000-7f0000001000 rw-s fe800000 00:05 8     /dev/memory", False),
        ("7f0000000000-7f0000001000 r--s 00000000 00:15 8     {device}/resource2_wc", True),
        ("7f0000000000-7f0000001000 rw-p 00000000 00:00 0", False),
    ],
)  # fmt: skip
def test_no_rescue_while_mapped(sysfs: FakeSysfs, proc: pathlib.Path, line: str, held: bool) -> None:
    _, device = port_with(sysfs, low=True)
    (proc / "812").mkdir()
    (proc / "812/maps").write_text(line.format(device=device.path) + "\n")
    (proc / "813").mkdir()  # ended meanwhile: no maps
    if held:
        with pytest.raises(Busy) as caught:
            rescue.rescue(device, sysfs.root, proc)
        assert caught.value.holder == "process 812"
        assert untouched(sysfs)
    else:
        rescue.check(device, sysfs.root, proc)


def test_lock_excludes(tmp_path: pathlib.Path) -> None:
    other = (
        "import fcntl, sys\n"
        "with open(sys.argv[1]) as file:\n"
        "    try:\n"
        "        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "    except BlockingIOError:\n"
        "        sys.exit(3)\n"
    )
    path = tmp_path / "lock"
    with rescue.lock(path):
        assert subprocess.run([sys.executable, "-c", other, path], check=False).returncode == 3
    assert subprocess.run([sys.executable, "-c", other, path], check=False).returncode == 0


# ---- mapping --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_dev_mem(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(mapping, "DEV_MEM", tmp_path / "no /dev/mem")
    monkeypatch.setattr(rescue, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(mapping, "_read_debugfs", lambda name: None)


@pytest.mark.usefixtures("no_dev_mem")
@pytest.mark.parametrize("writable", [False, True])
def test_open_segment_falls_back_to_sysfs(sysfs: FakeSysfs, writable: bool) -> None:
    path = sysfs.add("0000:00:1e.0", address=0x1_0000_0000, size=MIB)
    for name in ("resource2", "resource2_wc"):
        (path / name).write_bytes(bytes(MIB))
    segment = mapping.open_segment("0000:00:1e.0", writable=writable, sysfs=sysfs.root)
    assert (segment.device, segment.size, segment.offset) == ("0000:00:1e.0", MIB, 0)
    # On x86 never write-combining: its stores pass one another.
    assert segment.memory_type == ("uncached-minus" if os.uname().machine == "x86_64" else "write-combining")
    assert (path / "enable").read_text() == "1"
    access = mmap.PROT_READ | mmap.PROT_WRITE
    if writable:
        mmap.mmap(segment.fd, segment.size, prot=access, offset=segment.offset).close()
    else:
        with pytest.raises(PermissionError):
            mmap.mmap(segment.fd, segment.size, prot=access, offset=segment.offset)
    os.close(segment.fd)


@pytest.mark.usefixtures("no_dev_mem")
def test_open_segment_without_rights_leaks_nothing(sysfs: FakeSysfs) -> None:
    path = sysfs.add("0000:00:1e.0", address=0x1_0000_0000, size=MIB)
    (path / "resource2").write_bytes(b"")  # opens, but a trial page of it can't be mapped
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(Error, match="resource2") as caught:
        mapping.open_segment("0000:00:1e.0", writable=True, sysfs=sysfs.root)
    assert caught.value.code == "no-permission"
    assert "CAP_SYS_RAWIO" in str(caught.value.cure)
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.usefixtures("no_dev_mem")
def test_open_segment_of_an_unassigned_bar(sysfs: FakeSysfs) -> None:
    sysfs.add("0000:00:1e.0")
    with pytest.raises(Error) as caught:
        mapping.open_segment("0000:00:1e.0", writable=True, sysfs=sysfs.root)
    assert caught.value.code == "bar-unassigned"


def test_memtype_list() -> None:
    text = (
        "PAT memtype list:\n"
        "PAT: [mem 0x00000000fe800000-0x00000000fe900000] uncached-minus\n"
        "PAT: [mem 0x0000000140000000-0x0000000180000000] write-back\n"
    )
    assert mapping.parse_memtypes(text, 0xFE800000) == "uncached-minus"
    assert mapping.parse_memtypes(text, 0x17FFFFFFF) == "write-back"
    assert mapping.parse_memtypes(text, 0x180000000) is None
    assert mapping.parse_memtypes("write-combining @ 0x1000-0x2000\n", 0x1000) == "write-combining"


def test_mtrr() -> None:
    text = (
        "reg00: base=0x0c0000000 ( 3072MB), size= 1024MB, count=1: uncachable\n"
        "reg01: base=0x100000000 ( 4096MB), size= 1024MB, count=1: write-back\n"
    )
    assert mapping.parse_mtrr(text, 0xFE800000)
    assert not mapping.parse_mtrr(text, 0x100000000)
    assert not mapping.parse_mtrr("", 0xFE800000)


# ---- waiting --------------------------------------------------------------------------------------------------------


def test_wait_for_a_device_that_is_there(sysfs: FakeSysfs) -> None:
    sysfs.add("0000:00:1e.0")
    assert [device.name for device in uevent.wait_for_device(0, sysfs=sysfs.root)] == ["0000:00:1e.0"]


def test_wait_times_out(sysfs: FakeSysfs) -> None:
    sysfs.add("0000:00:1e.0")
    with pytest.raises(TimeoutError):
        uevent.wait_for_device(0.05, known=["0000:00:1e.0"], sysfs=sysfs.root)


def test_only_pci_announcements_count() -> None:
    path = b"@/devices/pci0000:00/0000:00:10.0/0000:01:00.0\0"
    assert uevent._pci_event(b"add" + path + b"ACTION=add\0SUBSYSTEM=pci\0") == ("add", "0000:01:00.0")
    assert uevent._pci_event(b"remove" + path + b"ACTION=remove\0SUBSYSTEM=pci\0") == ("remove", "0000:01:00.0")
    assert uevent._pci_event(b"add@/devices/virtual/net/x\0ACTION=add\0SUBSYSTEM=net\0") is None
    assert uevent._pci_event(b"libudev\0SUBSYSTEM=pci\0") is None
