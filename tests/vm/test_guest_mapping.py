# SPDX-License-Identifier: Apache-2.0
"""ivshmem devices plugged into running VMs: found, given a place, mapped write-back, seen from both sides."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from testinfra.host import Host

from ringbar.qemu.launch import Guest

pytestmark = pytest.mark.vm

MIB = 1 << 20
SIZES = [1 * MIB, 2 * MIB, 64 * MIB, 1024 * MIB]


class Monitor:
    """Just enough QMP."""

    def __init__(self, path: os.PathLike[str]) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(os.fspath(path))
        self.lines = self.socket.makefile()
        self.lines.readline()  # the greeting
        self.gone: set[str] = set()
        self.execute("qmp_capabilities")

    def read(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.lines.readline())
        if message.get("event") == "DEVICE_DELETED" and "device" in message["data"]:
            self.gone.add(message["data"]["device"])
        return message

    def execute(self, command: str, **arguments: Any) -> Any:
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            message = self.read()
            assert "error" not in message, message
            if "return" in message:
                return message["return"]

    def unplug(self, device: str) -> None:
        self.execute("device_del", id=device)
        while device not in self.gone:
            self.read()
        self.gone.discard(device)

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


@contextlib.contextmanager
def plugged(guest: Guest, sizes: list[int], bus: str, slot: int) -> Iterator[list[mmap.mmap]]:
    """Memory of these sizes as functions 0, 1, ... of one slot; yields the host's mappings; unplugged after.

    Before the guest sees it, each has its number plus 1 in its first eight bytes and plus 50 in its last eight.
    """
    monitor = Monitor(guest.qmp)
    try:
        memories, objects = [], []
        with contextlib.ExitStack() as stack:
            for function in reversed(range(len(sizes))):  # function 0 last: then all appear together
                file = stack.enter_context(tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="ringbar-test-"))
                file.truncate(sizes[function])
                memories.append(mmap.mmap(file.fileno(), sizes[function]))
                memories[-1][:8], memories[-1][-8:] = bytes([function + 1] * 8), bytes([function + 50] * 8)
                name = f"test{function}"
                monitor.execute(
                    "object-add", **{"qom-type": "memory-backend-file", "mem-path": file.name},
                    id=f"{name}-mem", size=sizes[function], share=True,
                )  # fmt: skip
                objects.append(f"{name}-mem")
                monitor.execute(
                    "device_add", driver="ivshmem-plain", id=name, memdev=f"{name}-mem", bus=bus,
                    addr=f"{slot:#x}.{function}", multifunction=len(sizes) > 1,
                )  # fmt: skip
            try:
                yield memories[::-1]
            finally:
                monitor.unplug("test0")
                for name in objects:
                    monitor.execute("object-del", id=name)
                for memory in memories:
                    memory.close()
    finally:
        monitor.close()


# In the guest: wait for the devices, map each, exchange bytes at both ends, say what was got.
EXCHANGE = """
import json, mmap, os, sys
from ringbar import guest
count = int(sys.argv[1])
print("waiting", flush=True)
devices = []
while len(devices) < count:
    devices = guest.wait_for_device(60, known=[device.name for device in devices])
answers = []
for index, device in enumerate(devices):
    segment = guest.open_segment(device, writable=True)
    with mmap.mmap(segment.fd, segment.size, offset=segment.offset) as memory:
        answers.append(dict(
            name=segment.device, size=segment.size, opened=segment.memory_type, verified=guest.verify(segment),
            address=[found.address for found in guest.find()][index],
            read=[memory[at:at + 8].hex() for at in (0, segment.size - 8)],
        ))
        memory[8:16] = bytes([index] * 8)
        memory[segment.size - 16:segment.size - 8] = bytes([index + 100] * 8)
    os.close(segment.fd)
print(json.dumps(answers), flush=True)
"""


def program(guest: Guest, text: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python program in the guest, as root, with the package."""
    command = ["env", "PYTHONPATH=/opt/ringbar", "python3", "-c", text, *arguments]
    running: subprocess.Popen[str] = guest.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return running


def answer(running: subprocess.Popen[str]) -> Any:
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def exchange(guest: Guest, sizes: list[int], bus: str, slot: int) -> list[dict[str, Any]]:
    """Plug while the guest's program already waits, exchange bytes both ways, unplug; the guest's answers."""
    running = program(guest, EXCHANGE, str(len(sizes)))
    assert running.stdout is not None
    assert running.stdout.readline() == "waiting\n"
    with plugged(guest, sizes, bus, slot) as memories:
        answers: list[dict[str, Any]] = answer(running)
        for index, (memory, said) in enumerate(zip(memories, answers)):
            assert said["size"] == sizes[index]
            assert said["read"] == [f"{index + 1:02x}" * 8, f"{index + 50:02x}" * 8]
            assert memory[8:16] == bytes([index] * 8)
            assert memory[-16:-8] == bytes([index + 100] * 8)
    assert len(answers) == len(sizes)
    assert answer(program(guest, "from ringbar import guest; print(len(guest.find()))")) == 0
    return answers


def all_write_back(answers: list[dict[str, Any]]) -> None:
    for said in answers:
        assert said["address"] >= 1 << 32, said
        assert said["opened"] == said["verified"] == "write-back", said


def ids(size: int) -> str:
    return f"{size // MIB}MiB"


@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_pc_maps_every_size_write_back(guest_pc: Guest, size: int) -> None:
    all_write_back(exchange(guest_pc, [size], "pci.0", 0x1E))


@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_q35_port_with_stock_window_is_rescued(guest_q35: Guest, size: int) -> None:
    # 1 and 2 MiB get a place below 4 GiB (uncached), larger ones none: both are moved above 4 GiB.
    all_write_back(exchange(guest_q35, [size], f"rp{SIZES.index(size)}", 0))


@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_q35_port_with_reserved_window_maps_write_back(guest_wide: Guest, size: int) -> None:
    all_write_back(exchange(guest_wide, [size], f"rp{SIZES.index(size)}", 0))
    assert "no space" not in guest_wide.ssh("dmesg").stdout  # so nothing had to be rescued


@pytest.mark.parametrize("bus", ["pci.0", "rp0"])
def test_lane_and_pool_in_one_slot(guest_pc: Guest, guest_q35: Guest, bus: str) -> None:
    guest, slot = (guest_pc, 0x1D) if bus == "pci.0" else (guest_q35, 0)
    said = exchange(guest, [1 * MIB, 64 * MIB, 2 * MIB], bus, slot)
    all_write_back(said)
    assert [one["name"].rpartition(".")[2] for one in said] == ["0", "1", "2"]
    assert len({one["name"].rpartition(".")[0] for one in said}) == 1


def test_the_same_port_again_after_rescue(guest_q35: Guest) -> None:
    all_write_back(exchange(guest_q35, [64 * MIB], "rp1", 0))
    all_write_back(exchange(guest_q35, [1024 * MIB], "rp1", 0))


HOLDER = """
import mmap, os, sys
from ringbar import guest
from ringbar.guest import rescue
(device,) = guest.wait_for_device(60)
device = rescue.settle(device)
assert device.assigned and not device.high, device
fd = os.open(device.resource, os.O_RDWR)
memory = mmap.mmap(fd, device.size)
print(device.address, flush=True)
sys.stdin.readline()
"""

SECOND = """
import json
from ringbar import guest
from ringbar.errors import Busy
from ringbar.guest import rescue
(device,) = guest.find()
segment = guest.open_segment(device, writable=True)
try:
    rescue.rescue(device)
    refused = None
except Busy as busy:
    refused = [busy.holder, busy.cure]
print(json.dumps([guest.find()[0].address, segment.memory_type, guest.memory_type_of(device), refused]))
"""


def test_memory_that_a_program_has_mapped_is_not_moved(guest_q35: Guest) -> None:
    # rp5: no other test uses it, so that its window is still the firmware's, below 4 GiB.
    with plugged(guest_q35, [1 * MIB], "rp5", 0):
        command = ["env", "PYTHONPATH=/opt/ringbar", "python3", "-c", HOLDER]
        holder = guest_q35.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        try:
            address = int(holder.stdout.readline())
            now, opened, kernel_says, refused = answer(program(guest_q35, SECOND))
        finally:
            holder.communicate("\n", timeout=60)
    assert now == address
    assert opened == kernel_says == "uncached-minus"
    assert refused is not None
    assert refused[0].startswith("process ")
    assert "pref64-reserve" in refused[1]


AGAIN = """
from ringbar import guest
(first,) = guest.wait_for_device(60)
print(first.name, flush=True)
(second,) = guest.wait_for_device(60, known=[first.name])
print(second.name, flush=True)
"""


def test_a_known_device_that_comes_again_counts(guest_pc: Guest) -> None:
    waiting = program(guest_pc, AGAIN)
    assert waiting.stdout is not None
    with plugged(guest_pc, [1 * MIB], "pci.0", 0x1B):
        assert waiting.stdout.readline() == "0000:00:1b.0\n"
    with plugged(guest_pc, [2 * MIB], "pci.0", 0x1B):
        out, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, out, err) == (0, "0000:00:1b.0\n", "")


UNPRIVILEGED = """
import json, os
from ringbar import guest
from ringbar.errors import Error
(device,) = guest.wait_for_device(60)
os.setgid(65534)
os.setuid(65534)
try:
    guest.open_segment(device, writable=False)
    said = None
except Error as error:
    said = error.as_json()
print(json.dumps(said))
"""


def test_without_rights_the_error_names_them(guest_pc: Guest) -> None:
    with plugged(guest_pc, [1 * MIB], "pci.0", 0x1C):
        said = answer(program(guest_pc, UNPRIVILEGED))
    assert said["code"] == "no-permission"
    assert "CAP_SYS_RAWIO" in said["cure"]
    assert "udev" in said["cure"]


@pytest.mark.parametrize("hard", [False, True], ids=["asked", "reset"])
def test_memory_is_there_after_a_reboot(guest_pc: Guest, hard: bool) -> None:
    with plugged(guest_pc, [2 * MIB], "pci.0", 0x1E) as (memory,):
        guest_pc.reboot(hard=hard)
        memory[:8], memory[-8:] = b"\1" * 8, b"\x32" * 8
        (said,) = answer(program(guest_pc, EXCHANGE, "1"))
        assert said["read"] == ["01" * 8, "32" * 8]
        assert memory[8:16] == b"\0" * 8
        guest_pc.ssh("true")


def test_debugfs_is_read_without_leaving_a_mount(host_pc: Host, guest_pc: Guest) -> None:
    exchange(guest_pc, [1 * MIB], "pci.0", 0x1E)
    assert not host_pc.mount_point("/sys/kernel/debug").exists
    assert host_pc.system_info.codename == "bookworm"
    assert host_pc.check_output("uname -r") == guest_pc.image.kernel_release
    assert "cloud" in guest_pc.image.kernel_release
