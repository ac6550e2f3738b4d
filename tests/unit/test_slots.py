# SPDX-License-Identifier: Apache-2.0
"""Choosing a place, reading registers, and what is refused before a VM is touched."""

from __future__ import annotations

import os
import pathlib

import pytest

from ringbar.errors import Error
from ringbar.qemu.hotplug import Function, Plugged, check_functions
from ringbar.qemu.ready import kernel_registers, mapped_at
from ringbar.qemu.slots import Place, Topology, choose

MIB = 1 << 20


def pc(*free: int) -> Topology:
    return Topology("pc", 32, tuple(Place("pci.0", slot) for slot in free), (), True)


def q35(*windows: int | None) -> Topology:
    return Topology("q35", 4, tuple(Place(f"rp{n}", 0, w) for n, w in enumerate(windows)), (), True)


def test_pc_takes_the_highest_slot() -> None:
    place = choose(pc(3, 9, 31, 30), [MIB])
    assert (place.bus, place.slot, place.addr(2)) == ("pci.0", 31, "1f.2")


@pytest.mark.parametrize(("windows", "size", "bus"), [
    ((None, None), MIB, "rp1"),                             # no window says it: the last, libvirt takes the first
    ((1 << 30, None), MIB, "rp0"),                          # reserved
    ((1 << 30, 1 << 27, None), 64 * MIB, "rp1"),            # the smallest that is large enough
    ((1 << 30, 1 << 27, 1 << 27), 64 * MIB, "rp2"),         # of equals the last
    ((1 << 25, None), 64 * MIB, "rp1"),                     # reserved but too small
    ((1 << 30, 1 << 26), 65 * MIB, "rp0"),
])
def test_q35_prefers_a_window_that_is_large_enough(windows: tuple[int | None, ...], size: int, bus: str) -> None:
    assert choose(q35(*windows), [size]).bus == bus


@pytest.mark.parametrize("topology", [pc(4), q35(None)])
def test_the_last_place_must_be_asked_for(topology: Topology) -> None:
    with pytest.raises(Error) as caught:
        choose(topology, [MIB])
    assert caught.value.code == "last-slot" and "--use-last-slot" in str(caught.value)
    assert choose(topology, [MIB], use_last_slot=True) == topology.free[0]


@pytest.mark.parametrize(("topology", "cure"), [
    (pc(), "unplug"), (q35(), "<controller type='pci' model='pcie-root-port'/>"),
    (Topology("pc", 0, (), (), True), "acpi-root-pci-hotplug"),
])
def test_no_place_is_an_error_with_its_cure(topology: Topology, cure: str) -> None:
    with pytest.raises(Error) as caught:
        choose(topology, [MIB], use_last_slot=True)
    assert caught.value.code == "no-free-slot" and cure in str(caught.value.cure)


@pytest.mark.parametrize(("text", "kernel"), [
    ("IDT=     000f61be 00000000\nCR0=00000011 CR2=0\n", False),                    # SeaBIOS
    ("IDT=     0000000004332050 000001ff\nCR0=80050033 CR2=0\n", False),            # boot loader, OVMF: low
    ("IDT=     fffffe0000000000 00000fff\nCR0=80050033 CR2=0\n", True),             # Linux
    ("IDT=     fffffe0000000000 00000fff\nCR0=00000033 CR2=0\n", False),            # no paging
    ("IDT=     ff401000 000007ff\nCR0=80050033 CR2=0\n", True),                     # 32-bit kernel
    ("", False),
])
def test_registers_tell_a_kernel_from_firmware(text: str, kernel: bool) -> None:
    assert kernel_registers(text) is kernel


def test_mapped_regions_are_found_and_disabled_ones_are_not() -> None:
    line = "    000000000000afe0-000000000000afe3 (prio 0, i/o): acpi-gpe0"
    assert mapped_at(line, "acpi-gpe0") == (0xAFE0, 0xAFE3)
    assert mapped_at(line + " [disabled]", "acpi-gpe0") is None
    assert mapped_at(line, "acpi-gpe") is None


@pytest.mark.parametrize(("slot", "changes", "code"), [
    ("99", {}, "bad-slot"),
    ("ringbar-9.9", {}, "bad-slot"),
    ("ringbar-99", {"name": "lane.0"}, "bad-slot"),
    ("ringbar-99", {"fd": 0}, "bad-slot"),
    ("ringbar-99", {"path": None}, "bad-slot"),
    ("ringbar-99", {"size": 5000}, "bad-size"),
    ("ringbar-99", {"size": 0}, "bad-size"),
    ("ringbar-99", {"size": -4096}, "bad-size"),
    ("ringbar-99", {"size": 2048}, "bad-size"),
    ("ringbar-99", {"size": 8192}, "bad-size"),             # not the file's
    ("ringbar-99", {"path": "/nonexistent/lane"}, "no-such-file"),
    ("ringbar-99", {"path": "/dev"}, "no-such-file"),
    ("ringbar-99", {"path": None, "fd": 987654}, "no-such-file"),
])
def test_bad_functions_are_refused(tmp_path: pathlib.Path, slot: str, changes: dict[str, object], code: str) -> None:
    lane = tmp_path / "lane"
    lane.write_bytes(bytes(4096))
    good: dict[str, object] = {"name": "lane0", "size": 4096, "path": str(lane)}
    check_functions("ringbar-99", [Function(**good)])  # type: ignore[arg-type]
    with pytest.raises(Error) as caught:
        check_functions(slot, [Function(**{**good, **changes})])  # type: ignore[arg-type]
    assert caught.value.code == code


def test_counts_and_names_of_functions(tmp_path: pathlib.Path) -> None:
    lane = tmp_path / "lane"
    lane.write_bytes(bytes(4096))
    functions = [Function(f"f{n}", 4096, path=str(lane)) for n in range(9)]
    check_functions("ringbar-99", functions[:8])
    for bad in ([], functions, [functions[0], functions[0]]):
        with pytest.raises(Error) as caught:
            check_functions("ringbar-99", bad)
        assert caught.value.code == "bad-slot"


def test_an_odd_size_is_answered_with_the_next_power() -> None:
    with pytest.raises(Error) as caught:
        check_functions("ringbar-99", [Function("lane0", 5000, path="/x")])
    assert "8192" in str(caught.value.cure)


def test_memory_by_descriptor_is_checked_too() -> None:
    fd = os.memfd_create("lane")
    try:
        os.ftruncate(fd, 4096)
        check_functions("ringbar-99", [Function("lane0", 4096, fd=fd)])
        with pytest.raises(Error) as caught:
            check_functions("ringbar-99", [Function("lane0", 8192, fd=fd)])
    finally:
        os.close(fd)
    assert caught.value.code == "bad-size"


def test_plugged_survives_a_turn_through_a_dictionary() -> None:
    plugged = Plugged("ringbar-99", "pci.0", "1f", ("ringbar-99.lane0",), ("ringbar-99.lane0.mem",), (3,))
    assert Plugged.from_dict(plugged.as_dict()) == plugged
