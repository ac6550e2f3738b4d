# SPDX-License-Identifier: Apache-2.0
"""Pools of all kinds in running VMs: small, large, of huge pages, sealed, read-only; and the memory type got."""

from __future__ import annotations

import os
import pathlib
import subprocess
from collections.abc import Callable, Iterator

import pytest
from vmtools import Program, Raised, Shell, Tool, in_guest, vm

import ringbar
from ringbar.qemu.launch import Guest

pytestmark = pytest.mark.vm

Start = Callable[[Guest], Program]
MIB = 1 << 20
PACKETS = 5_000

ECHO = """
zc = ringbar.Cluster.attach({0}, timeout=20)
tx, rx = zc.open_queue(1, "tx"), zc.open_queue(0, "rx")
answer = zc.writable
"""


def loop(shell: Shell, guest: Guest, cluster: int = 99, packets: int = PACKETS) -> None:
    """Packets to the guest and back, each verified."""
    with Tool(guest, "bridge", "-i", f"{cluster}@0", "-o", f"{cluster}@1"):
        words = ("-o", f"{cluster}@0", "-i", f"{cluster}@1", "--window", "512", "--packets", str(packets))
        said = shell.json("send", *words)
        assert said["received"]["packets"] == packets
        assert not any(said["verify"][name] for name in ("lost", "reordered", "duplicated", "corrupted", "foreign"))
        assert all(queue["copied"] == 0 for queue in shell.status(cluster)["queues"])


def memory_types(guest: Guest) -> list[str]:
    """What ``ringbar doctor`` in the guest says of each device."""
    found = in_guest(guest, "doctor", status=None)["findings"]
    return [f["detail"].partition("memory type ")[2] for f in found if f["check"].startswith("device ")]


@pytest.mark.parametrize(
    ("machine", "size"),
    [("pc", 64), ("pc", 1024), ("q35", 64), ("q35", 1024), ("wide", 1024)],
    ids=lambda value: f"{value}MiB" if isinstance(value, int) else str(value),
)
def test_a_pool_of_every_size_on_every_machine(
    shell: Shell, machine: str, size: int, request: pytest.FixtureRequest
) -> None:
    """q35: root ports with the 2-MiB window they come with, so the guest must move it; wide: with one reserved."""
    guest: Guest = request.getfixturevalue(f"guest_{machine}")
    made = shell.cluster(99, 2, "--size", "2048", "--buffers", str(size * MIB // 2048))
    assert made["cluster"]["buffers"] == size * MIB // 2048
    (pool,) = [s for s in shell.status()["segments"] if s["kind"] == "pool"]
    assert pool["size"] == size * MIB
    shell("attach", vm(guest), "99@0", "--tx", "99@1", timeout=90)
    loop(shell, guest)
    assert memory_types(guest) == ["write-back"] * 3  # lane, pool, and the one that it sends from
    shell.detach(guest)
    shell.comes_home()


@pytest.fixture
def huge_pages(tmp_path: pathlib.Path) -> Iterator[int]:
    """64 huge pages of 2 MiB are free; the setting is as before afterwards."""
    setting = pathlib.Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    free = setting.with_name("free_hugepages")
    if not setting.exists():
        pytest.skip("this kernel has no 2-MiB huge pages")
    before = int(setting.read_text())
    need = 64
    mounted = any(line.split()[2] == "hugetlbfs" for line in pathlib.Path("/proc/self/mounts").read_text().splitlines())
    if not mounted:
        done = subprocess.run(["mount", "-t", "hugetlbfs", "none", tmp_path], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no hugetlbfs can be mounted: {done.stderr.strip()}")
    try:
        setting.write_text(str(before + need))
        if int(free.read_text()) < need:
            pytest.skip(f"this machine gives only {free.read_text().strip()} of {need} huge pages")
        yield need
    finally:
        setting.write_text(str(before))
        if not mounted:
            subprocess.run(["umount", tmp_path], check=True)


def test_a_pool_of_huge_pages(shell: Shell, guest_pc: Guest, huge_pages: int) -> None:
    cluster = 20000 + os.getpid() % 40000  # hugetlbfs is everybody's: a number that no other run has
    shell.cluster(cluster, 2, "--pages", "2M", "--buffers", "32768")
    now = shell.status(cluster)
    (pool,) = [s for s in now["segments"] if s["kind"] == "pool"]
    assert now["cluster"]["pages"] == "2M" and pool["size"] == 64 * MIB
    assert os.statvfs(pool["path"]).f_bsize == 2 * MIB
    shell("attach", vm(guest_pc), f"{cluster}@0", "--tx", f"{cluster}@1")
    loop(shell, guest_pc, cluster)
    shell.detach(guest_pc)
    shell.comes_home(cluster)
    shell("cluster", "destroy", str(cluster))
    assert not os.path.exists(pool["path"])


def test_too_few_huge_pages_names_the_number(shell: Shell, huge_pages: int) -> None:
    said = shell.json("cluster", "create", "99", "--pages", "2M", "--buffers", str(1 << 24), status=1)
    assert "nr_hugepages" in said["error"]["cure"]
    assert any(character.isdigit() for character in said["error"]["message"])


def test_a_sealed_pool_has_no_path_and_is_passed_by_descriptor(
    shell: Shell, guest_pc: Guest, program: Start
) -> None:
    with ringbar.Cluster.create(99, buffers=16384, queues=2, sealed=True) as zc:
        (pool,) = [s for s in zc.status()["segments"] if s["kind"] == "pool"]
        assert pool["path"].startswith(f"/proc/{os.getpid()}/fd/")
        with open(pool["path"], "r+b") as file, pytest.raises(PermissionError):
            file.truncate(4096)
        shell("attach", vm(guest_pc), "99@0", "--tx", "99@1")
        loop(shell, guest_pc)
        shell.detach(guest_pc)
        shell.comes_home()


# Reads and writes a buffer of the pool as no honest program does: through /dev/mem, past ringbar.
THROUGH_DEV_MEM = """
import mmap, os
from ringbar import guest
answer = []
for device in guest.find():
    fd = os.open("/dev/mem", os.O_RDWR)
    with mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=device.address + {at}) as page:
        before = bytes(page[64:72])
        page[64:72] = b"scribble"
        answer.append([device.size, before.hex(), bytes(page[64:72]).hex()])
    os.close(fd)
"""


def test_a_read_only_pool_is_read_only(shell: Shell, guest_pc: Guest, program: Start) -> None:
    shell.cluster(99, 2, "--buffers", "32768")
    shell("attach", vm(guest_pc), "99@0")
    (attachment,) = shell.json("status")["vms"]
    assert attachment["pool"] == "ro" and attachment["sees"] == "can read all packets of cluster 99"
    one = program(guest_pc)
    one.do("zc = ringbar.Cluster.attach(99); rx = zc.open_queue(0, 'rx')")
    assert one.do("answer = zc.writable") is False
    with pytest.raises(Raised) as caught:
        one.do("zc.open_queue(0, 'tx').alloc(1)")
    assert caught.value.type in ("Error", "NotFound", "Busy") and caught.value.cure
    with pytest.raises(Raised) as caught:
        one.do("zc.open_queue(0, 'rx', writable=True)")
    assert caught.value.cure

    (pool,) = [s for s in shell.status()["segments"] if s["kind"] == "pool"]
    with open(pool["path"], "r+b") as file:
        file.seek(8192 + 64)
        file.write(b"original")
    devices = one.do(THROUGH_DEV_MEM.format(at=8192))
    (seen,) = [d for d in devices if d[0] == pool["size"]]
    assert seen[1] == b"original".hex()
    assert seen[2] == b"original".hex()  # the store vanished
    with open(pool["path"], "rb") as file:
        file.seek(8192 + 64)
        assert file.read(8) == b"original"


def test_a_read_only_vm_that_is_to_send_needs_a_replug(shell: Shell, guest_pc: Guest, program: Start) -> None:
    shell.cluster()
    shell("attach", vm(guest_pc), "99@0")
    said = shell.json("attach", vm(guest_pc), "--tx", "99@1", status=1)
    assert said["error"]["code"] == "needs-replug" and "--replug" in said["error"]["cure"]
    assert shell.json("status")["vms"][0]["pool"] == "ro"
    said = shell.json("attach", vm(guest_pc), "99@0", "--tx", "99@1", "--replug")
    assert said["attachments"][0]["pool"] == "own"
    loop(shell, guest_pc)


def test_what_a_vm_that_sends_may_write(shell: Shell, guest_pc: Guest, program: Start) -> None:
    """Its own pool, where nothing was asked for; everything with rw; and not nothing."""
    shell.cluster()
    said = shell.json("attach", vm(guest_pc), "99@0", "--tx", "99@1")
    assert said["attachments"][0]["pool"] == "own" and said["warnings"] == []
    said = shell.json("attach", vm(guest_pc), "99@0", "--pool", "rw", status=1)
    assert said["error"]["code"] == "needs-replug"
    said = shell.json("attach", vm(guest_pc), "99@0", "--pool", "rw", "--replug")
    assert said["attachments"][0]["pool"] == "rw"
    assert said["attachments"][0]["sees"] == "can read and change all packets of cluster 99"
    assert program(guest_pc).do(ECHO.format(99)) is True
    said = shell.json("attach", vm(guest_pc), "99@0", "--tx", "99@1", "--pool", "ro", status=1)
    assert said["error"]["code"] == "pool-read-only"


def test_a_pool_larger_than_the_ports_window_is_told_and_rescued(
    shell: Shell, start_guest: Callable[..., Guest]
) -> None:
    """attach says what stands in the way and the cure; a program of ringbar in the guest makes room."""
    shell.cluster(99, 2, "--buffers", "65536")
    with start_guest("narrow", machine="q35", root_ports=2, memory="384M") as guest:
        guest.wait_up()
        said = shell.json("attach", vm(guest), "99@0", "--tx", "99@1")
        assert any("pref64-reserve" in warning for warning in said["warnings"])
        loop(shell, guest)
        shell.detach(guest)
    shell.comes_home()


def test_a_vm_that_sends_has_a_pool_of_its_own(
    shell: Shell, guest_pc: Guest, guest_wide: Guest, program: Start
) -> None:
    """Who was plugged before that pool was there gets copies, who comes after reads the very buffers."""
    shell.cluster(99, 4)
    shell("attach", vm(guest_wide), "99@1")
    said = shell.json("attach", vm(guest_pc), "99@0", "--tx", "99@1")
    assert said["warnings"] == [] and said["attachments"][0]["pool"] == "own"
    assert said["attachments"][0]["sees"] == "can read all packets of cluster 99 and writes only a pool of its own"
    pools = [s for s in shell.status()["segments"] if s["kind"] == "pool"]
    assert [(s["id"], s["vm"]) for s in pools] == [(0, ""), (1, vm(guest_pc))]
    relay = shell.start("bridge", "-i", "99@3", "-o", "99@0")  # serves the sending VM
    for copied in (PACKETS, 0):
        before = shell.queue("99@1")["copied"]
        with Tool(guest_wide, "count", "-i", "99@1", "--verify", "--packets", str(PACKETS), "--json") as tool:
            assert in_guest(guest_pc, "send", "-o", "99@1", "--packets", str(PACKETS))["sent"]["packets"] == PACKETS
            seen = tool.end(ask=False)
        assert seen["received"]["packets"] == PACKETS
        assert not any(seen["verify"][name] for name in ("lost", "reordered", "duplicated", "corrupted", "foreign"))
        assert shell.queue("99@1")["copied"] - before == copied
        if copied:
            shell.detach(guest_wide)
            shell("attach", vm(guest_wide), "99@1")
    there = program(guest_pc)
    there.do("zc = ringbar.Cluster.attach(99, timeout=20)\nrx, tx = zc.open_queue(0, 'rx'), zc.open_queue(1, 'tx')")
    assert there.do("answer = zc.writable") is False
    assert there.do("burst = tx.alloc(4)\nanswer = [h >> 24 for h in burst.handles]") == [1] * 4
    there.do("burst.release()\nzc.close()")
    shell.detach(guest_pc)
    shell.finish(relay, ask=True)
    shell.detach(guest_wide)
    shell.comes_home()
    assert [s["id"] for s in shell.status()["segments"] if s["kind"] == "pool"] == [0]
