# SPDX-License-Identifier: Apache-2.0
"""Hot-plug into real VMs (TCG, Debian's cloud kernel): plug, use, unplug, refuse, roll back, die."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import mmap
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tinyguest

from ringbar.errors import Busy, Error
from ringbar.qemu.hotplug import AsyncVm, Function, Plugged, Vm
from ringbar.qemu.qmp import Connection

pytestmark = pytest.mark.skipif(tinyguest.why_not() is not None, reason=str(tinyguest.why_not()))

MIB = 1 << 20
SLOT = "ringbar-99"
PORTS = ("-device", "pcie-root-port,id=rp0,chassis=1", "-device", "pcie-root-port,id=rp1,chassis=2,pref64-reserve=1G")
NATIVE = (*PORTS, "-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")
MACHINES = {"pc": ("pc", ()), "q35": ("q35", PORTS), "q35-native": ("q35", NATIVE)}


class Memory:
    """A 1 MiB lane by path and a 64 MiB pool in a sealed memfd, looked at from the host."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.lane_path = str(directory / "lane")
        with open(self.lane_path, "wb") as lane:
            lane.truncate(MIB)
        self.pool_fd = os.memfd_create("pool", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(self.pool_fd, 64 * MIB)
        fcntl.fcntl(self.pool_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        with open(self.lane_path, "r+b") as lane:
            self.lane = mmap.mmap(lane.fileno(), MIB)
        self.pool = mmap.mmap(self.pool_fd, 64 * MIB)

    def functions(self, *, readonly: bool = False) -> list[Function]:
        return [Function("lane0", MIB, path=self.lane_path),
                Function("pool1", 64 * MIB, fd=self.pool_fd, readonly=readonly)]

    def word(self, memory: mmap.mmap, offset: int) -> int:
        return int.from_bytes(memory[offset:offset + 4], "little")

    def close(self) -> None:
        self.lane.close()
        self.pool.close()
        os.close(self.pool_fd)


@pytest.fixture
def memory() -> Iterator[Memory]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="rb-test-") as directory:
        made = Memory(pathlib.Path(directory))
        yield made
        made.close()


@pytest.fixture(params=list(MACHINES))
def running(request: pytest.FixtureRequest) -> Iterator[tinyguest.TinyVm]:
    machine, extra = MACHINES[request.param]
    with tinyguest.tiny_vm(machine, extra=extra) as vm:
        yield vm


@pytest.fixture
def pc() -> Iterator[tinyguest.TinyVm]:
    with tinyguest.tiny_vm("pc") as vm:
        yield vm


def qmp(path: str, command: str, **arguments: Any) -> Any:
    """One command over a session of its own."""
    async def ask() -> Any:
        connection = await Connection.open(path)
        try:
            return await connection.execute(command, **arguments)
        finally:
            await connection.close()
    return asyncio.run(ask())


def contents(path: str) -> dict[str, Any]:
    """Everything in the VM that a plug touches."""
    async def ask() -> dict[str, Any]:
        connection = await Connection.open(path)
        try:
            return {
                "devices": sorted(await connection.qom_list("/machine/peripheral")),
                "objects": sorted(await connection.qom_list("/objects")),
                "fdsets": await connection.execute("query-fdsets"),
                "memory": [m for m in (await connection.hmp("info mtree")).splitlines() if "ivshmem" in m],
            }
        finally:
            await connection.close()
    return asyncio.run(ask())


def open_files(pid: int) -> list[str]:
    """What QEMU still has open of ours; waits up to 10 s for its deferred (RCU) closing to happen."""
    base = f"/proc/{pid}/fd"
    deadline = time.monotonic() + 10
    while True:
        links = []
        for fd in os.listdir(base):
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(f"{base}/{fd}"))
        ours = sorted(link for link in links if "memfd:pool" in link or "rb-test-" in link)
        if not ours or time.monotonic() > deadline:
            return ours
        time.sleep(0.05)        # the polling interval of a bounded wait


def test_plug_use_unplug_and_again(running: tinyguest.TinyVm, memory: Memory) -> None:
    before = contents(running.second_qmp)
    with Vm.connect(f"qmp:{running.qmp}") as vm:
        for turn in (1, 2):
            memory.pool[8192:8196] = (0x1000 + turn).to_bytes(4, "little")
            plugged = vm.plug(SLOT, memory.functions(), use_last_slot=False)
            assert [plugged] == vm.plugged()
            assert Plugged.from_dict(json.loads(json.dumps(plugged.as_dict()))) == plugged
            lane, pool = sorted(running.wait_functions(2).items())
            assert (lane[1], pool[1]) == (MIB, 64 * MIB)
            assert lane[0].endswith(".0") and pool[0].endswith(".1")
            running.enable(lane[0])
            running.enable(pool[0])
            assert all(vm.bars(plugged).values())
            assert running.read(pool[0], 8192) == 0x1000 + turn
            assert running.write(pool[0], 64 * MIB - 4, 0xBEEF + turn) == 0xBEEF + turn
            assert memory.word(memory.pool, 64 * MIB - 4) == 0xBEEF + turn
            running.write(lane[0], MIB - 4, 0xCAFE + turn)
            assert memory.word(memory.lane, MIB - 4) == 0xCAFE + turn
            vm.unplug(plugged)
            assert vm.plugged() == []
            assert running.functions() == {}
    assert contents(running.second_qmp) == before
    assert open_files(running.process.pid) == []


def test_readonly_pool_discards_the_guests_stores(running: tinyguest.TinyVm, memory: Memory) -> None:
    memory.pool[4096:4100] = (0x11223344).to_bytes(4, "little")
    with Vm.connect(running.qmp) as vm:
        vm.plug(SLOT, memory.functions(readonly=True))
        lane, pool = sorted(running.wait_functions(2))
        running.enable(lane)
        running.enable(pool)
        assert running.read(pool, 4096) == 0x11223344
        assert running.write(pool, 4096, 0x55667788) == 0x11223344
        assert memory.word(memory.pool, 4096) == 0x11223344
        running.write(lane, 4096, 0x55667788)
        assert memory.word(memory.lane, 4096) == 0x55667788


def test_eight_functions_in_one_slot(running: tinyguest.TinyVm, tmp_path: pathlib.Path) -> None:
    functions = []
    for number in range(8):
        path = tmp_path / str(number)
        path.write_bytes(number.to_bytes(4, "little") + bytes(4092))
        functions.append(Function(f"f{number}", 4096, path=str(path)))
    with Vm.connect(running.qmp) as vm:
        plugged = vm.plug(SLOT, functions)
        seen = sorted(running.wait_functions(8))
        for number, address in enumerate(seen):
            running.enable(address)
            assert running.read(address, 0) == number
        vm.unplug(plugged)
        assert running.functions() == {}


def test_firmware_is_waited_for(memory: Memory) -> None:
    said: list[str] = []
    with tinyguest.tiny_vm("pc", ready=False) as tiny, Vm.connect(tiny.qmp) as vm:
        plugged = vm.plug(SLOT, memory.functions(), timeout=60, progress=said.append)
        assert "firmware" in said[0] and said[-1].startswith("plugging")
        tiny.wait_ready()
        assert len(tiny.wait_functions(2)) == 2
        vm.unplug(plugged)


@pytest.mark.parametrize("name", list(MACHINES))
def test_guest_that_never_leaves_its_firmware(name: str, memory: Memory) -> None:
    machine, extra = MACHINES[name]
    with tinyguest.tiny_vm(machine, ready=False, extra=extra, firmware_only=True) as tiny:
        before = contents(tiny.second_qmp)
        with Vm.connect(tiny.qmp) as vm, pytest.raises(Error) as caught:
            vm.plug(SLOT, memory.functions(), timeout=3)
        assert caught.value.code == "guest-not-ready" and "firmware" in caught.value.message
        assert contents(tiny.second_qmp) == before


def test_rebooting_guest_is_waited_for(pc: tinyguest.TinyVm, memory: Memory) -> None:
    said: list[str] = []
    with Vm.connect(pc.qmp) as vm:
        qmp(pc.second_qmp, "system_reset")
        vm.plug(SLOT, memory.functions(), timeout=60, progress=said.append)
        assert said[0].startswith("waiting") and said[-1].startswith("plugging")
        pc.wait_ready()
        assert len(pc.wait_functions(2)) == 2


def test_guest_without_acpi_is_not_plugged_into(memory: Memory) -> None:
    with tinyguest.tiny_vm("pc", append="acpi=off") as tiny, Vm.connect(tiny.qmp) as vm:
        with pytest.raises(Error) as caught:
            vm.plug(SLOT, memory.functions(), timeout=1)
        assert caught.value.code == "guest-not-ready" and "does not listen" in caught.value.message
        assert "acpi" in str(caught.value.cure)
        assert vm.plugged() == []


def test_paused_vm_is_waited_for(pc: tinyguest.TinyVm, memory: Memory) -> None:
    said: list[str] = []

    def resume(text: str) -> None:
        said.append(text)
        if "paused" in text:
            qmp(pc.second_qmp, "cont")

    with Vm.connect(pc.qmp) as vm:
        qmp(pc.second_qmp, "stop")
        with pytest.raises(Error) as caught:
            vm.plug(SLOT, memory.functions(), timeout=0.5)
        assert caught.value.code == "guest-not-ready" and "paused" in caught.value.message
        assert "resume" in str(caught.value.cure)
        assert vm.plugged() == []

        def from_thread(text: str) -> None:     # the callback runs inside the VM's event loop
            thread = threading.Thread(target=resume, args=(text,))
            thread.start()
            thread.join()

        vm.plug(SLOT, memory.functions(), progress=from_thread)
        assert "paused" in said[0]
        assert len(pc.wait_functions(2)) == 2


def test_guest_that_ignores_unplug_can_let_go_later(running: tinyguest.TinyVm, memory: Memory) -> None:
    with Vm.connect(running.qmp) as vm:
        plugged = vm.plug(SLOT, memory.functions())
        running.wait_functions(2)
        qmp(running.second_qmp, "stop")
        with pytest.raises(Error) as caught:
            vm.unplug(plugged, timeout=1)
        assert caught.value.code == "unplug-refused" and "paused" in caught.value.message
        assert "--force" in str(caught.value.cure)
        with pytest.raises(Error):              # asked again: "already in the process of unplug"
            vm.unplug(plugged, timeout=1)
        assert vm.plugged() == [plugged]
        qmp(running.second_qmp, "cont")
    with Vm.connect(running.qmp) as vm:         # another process, which knows only what QEMU says
        vm.unplug(vm.plugged()[0])
        assert vm.plugged() == []


def test_guest_whose_kernel_ignores_hotplug(memory: Memory) -> None:
    with tinyguest.tiny_vm("pc", append="acpiphp.disable=1") as tiny, Vm.connect(tiny.qmp) as vm:
        plugged = vm.plug(SLOT, memory.functions())
        tiny.sh("echo 1 > /sys/bus/pci/rescan")
        tiny.wait_functions(2)
        with pytest.raises(Error) as caught:
            vm.unplug(plugged, timeout=2)
        assert caught.value.code == "unplug-refused" and "did not answer" in caught.value.message
        assert vm.plugged() == [plugged]
        assert len(tiny.functions()) == 2
        qmp(tiny.second_qmp, "system_reset")    # "restart the guest" of the cure
        vm.unplug(plugged)
        assert vm.plugged() == []


@pytest.mark.parametrize("fails_at", [0, 1])
def test_failure_midway_is_rolled_back(
    running: tinyguest.TinyVm, memory: Memory, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU itself refuses one function (an address out of range) after others went in."""
    functions = [*memory.functions(), Function("lane2", MIB, path=memory.lane_path)]
    real = AsyncVm._add_device

    async def add(self: AsyncVm, device: str, place: Any, number: int, rings: bool, *, multifunction: bool) -> None:
        if number == fails_at:
            await self._connection.execute("device_add", driver="ivshmem-plain", id=device, memdev=f"{device}.mem",
                                           bus=place.bus, addr="ff.0")
        await real(self, device, place, number, rings, multifunction=multifunction)

    before = contents(running.second_qmp)
    with Vm.connect(running.qmp) as vm:
        monkeypatch.setattr(AsyncVm, "_add_device", add)
        with pytest.raises(Error) as caught:
            vm.plug(SLOT, functions)
        assert caught.value.code == "plug-failed" and "taken back" not in caught.value.message
        assert contents(running.second_qmp) == before
        assert open_files(running.process.pid) == []
        monkeypatch.undo()
        plugged = vm.plug(SLOT, memory.functions())
        assert len(running.wait_functions(2)) == 2
        vm.unplug(plugged)


def test_memory_that_qemu_cannot_map_is_rolled_back(pc: tinyguest.TinyVm, memory: Memory) -> None:
    before = contents(pc.second_qmp)
    sealed = os.memfd_create("pool", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.ftruncate(sealed, MIB)
        fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with Vm.connect(pc.qmp) as vm, pytest.raises(Error) as caught:
            vm.plug(SLOT, [*memory.functions(), Function("pool2", MIB, fd=sealed)])
    finally:
        os.close(sealed)
    assert caught.value.code == "no-permission"
    assert contents(pc.second_qmp) == before
    assert open_files(pc.process.pid) == []


@pytest.mark.parametrize("moment", ["object-add", "device_add"])
def test_qemu_killed_during_plug(
    pc: tinyguest.TinyVm, memory: Memory, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Connection.execute

    async def execute(self: Connection, command: str, *args: Any, **named: Any) -> Any:
        if command == moment:
            pc.process.send_signal(signal.SIGKILL)
            pc.process.wait()
        return await real(self, command, *args, **named)

    files = sorted(os.listdir("/proc/self/fd"))
    with Vm.connect(pc.qmp) as vm:
        monkeypatch.setattr(Connection, "execute", execute)
        with pytest.raises(Error) as caught:
            vm.plug(SLOT, memory.functions())
    assert caught.value.code == "vm-died" and "could not" not in caught.value.message
    assert sorted(os.listdir("/proc/self/fd")) == files
    monkeypatch.undo()
    with pytest.raises(Error) as caught:
        Vm.connect(pc.qmp)
    assert caught.value.code == "vm-off"


def test_places_of_a_q35(memory: Memory) -> None:
    with tinyguest.tiny_vm("q35", extra=PORTS) as tiny, Vm.connect(tiny.qmp) as vm:
        first = vm.plug(SLOT, memory.functions())
        assert first.bus == "rp1"               # the one with the reserved window
        with pytest.raises(Busy) as busy:
            vm.plug(SLOT, memory.functions())
        assert busy.value.code == "already-plugged"
        other = [Function("lane0", MIB, path=memory.lane_path)]
        with pytest.raises(Error) as caught:
            vm.plug("ringbar-7", other)
        assert caught.value.code == "last-slot" and "--use-last-slot" in str(caught.value.cure)
        second = vm.plug("ringbar-7", other, use_last_slot=True)
        assert second.bus == "rp0"
        with pytest.raises(Error) as caught:
            vm.plug("ringbar-8", other, use_last_slot=True)
        assert caught.value.code == "no-free-slot" and "pcie-root-port" in str(caught.value.cure)
        assert len(vm.plugged()) == 2


def test_q35_without_ports(memory: Memory) -> None:
    with tinyguest.tiny_vm("q35", ready=False) as tiny, Vm.connect(tiny.qmp) as vm, pytest.raises(Error) as caught:
        vm.plug(SLOT, memory.functions())
    assert caught.value.code == "no-free-slot"


def test_info_and_neighbours(pc: tinyguest.TinyVm) -> None:
    with Vm.connect(pc.qmp) as vm:
        info = vm.info()
        assert (info.name, info.pid, info.state, info.accelerator) == ("tiny-pc", pc.process.pid, "running", "tcg")
        assert info.machine.startswith("pc-i440fx-") and info.start_time is not None
        assert vm.neighbours() == []


def test_async_facade(pc: tinyguest.TinyVm, memory: Memory) -> None:
    async def work() -> None:
        async with await AsyncVm.connect(pc.qmp) as vm:
            plugged = await vm.plug(SLOT, memory.functions())
            await asyncio.get_running_loop().run_in_executor(None, pc.wait_functions, 2)
            await vm.unplug(plugged)
            assert await vm.plugged() == []
    asyncio.run(work())


def test_cancelled_plug_is_taken_back(
    pc: tinyguest.TinyVm, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between the two functions."""
    real = AsyncVm._add_device

    async def add(self: AsyncVm, device: str, place: Any, number: int, rings: bool, *, multifunction: bool) -> None:
        if number == 0:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()
        await real(self, device, place, number, rings, multifunction=multifunction)

    before = contents(pc.second_qmp)
    with Vm.connect(pc.qmp) as vm:
        monkeypatch.setattr(AsyncVm, "_add_device", add)
        with pytest.raises(KeyboardInterrupt):
            vm.plug(SLOT, memory.functions())
    assert contents(pc.second_qmp) == before
