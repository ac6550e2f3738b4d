# SPDX-License-Identifier: Apache-2.0
"""VMs that libvirt runs (qemu:///system, QEMU as libvirt-qemu): attached by name, used, detached; beside libvirt's own
hot-plugs; with memory of every kind; and whatever can happen to them and to libvirt."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import mmap
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from libvirttools import Daemons, LibvirtGuest, TinyDomain, tiny_domain, virsh, why_not
from vmtools import Program, Raised, Shell, Tool, until

from ringbar.errors import Error, NotFound
from ringbar.host import records
from ringbar.host.service import Host
from ringbar.qemu import image as images
from ringbar.qemu import libvirt
from ringbar.qemu.hotplug import AsyncVm, Function, Vm
from ringbar.qemu.slots import PORT_XML

pytestmark = [pytest.mark.vm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

MIB = 1 << 20
PACKETS = 10_000


@pytest.fixture(scope="module", autouse=True)
def daemons() -> Iterator[Daemons]:
    """libvirt runs."""
    running = Daemons()
    yield running
    running.close()


@pytest.fixture(scope="module")
def pc(daemons: Daemons) -> Iterator[TinyDomain]:
    with tiny_domain("ringbar-test-pc") as vm:
        yield vm


@pytest.fixture(scope="module")
def bridge() -> Iterator[str]:
    """A bridge that leads nowhere, for virsh attach-interface."""
    name = "rbtestlv0"
    subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)
    yield name
    subprocess.run(["ip", "link", "del", name], check=True)


def contents(vm: TinyDomain) -> dict[str, list[str]]:
    """Everything in a domain that a plug touches."""
    def ask(what: str) -> str:
        return virsh("qemu-monitor-command", vm.domain, what)
    return {
        "devices": [n for n in ask('{"execute":"qom-list","arguments":{"path":"/machine/peripheral"}}').split('"')
                    if n.startswith("ringbar")],
        "objects": [n for n in ask('{"execute":"qom-list","arguments":{"path":"/objects"}}').split('"')
                    if n.startswith("ringbar")],
        "fdsets": [n for n in ask('{"execute":"query-fdsets"}').split('"') if n.startswith("ringbar")],
    }


NOTHING: dict[str, list[str]] = {"devices": [], "objects": [], "fdsets": []}


# ---- a whole life ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guest(daemons: Daemons) -> Iterator[LibvirtGuest]:
    from conftest import package_share

    with LibvirtGuest.start("libvirt", image=images.ensure(), share=package_share()) as started:
        assert isinstance(started, LibvirtGuest)
        started.wait_up()
        yield started


def test_attach_traffic_both_ways_detach_and_again(shell: Shell, guest: LibvirtGuest) -> None:
    shell.cluster()
    for turn, name in enumerate((guest.domain, guest.uuid), start=1):
        said = shell.json("attach", name, "99@0", "--tx", "99@1", "--pool", "rw")
        (attachment,) = said["attachments"]
        assert (attachment["vm"], attachment["uuid"], attachment["uri"]) == (guest.domain, guest.uuid, "qemu:///system")
        assert attachment["via"] == "libvirt's monitor commands" and attachment["state"] == "plugged"
        assert shell.json("attach", guest.domain, "99@0", "--tx", "99@1")["result"] == "unchanged"
        with Tool(guest, "bridge", "-i", "99@0", "-o", "99@1"):
            words = ("-o", "99@0", "-i", "99@1", "--window", "512", "--packets", str(PACKETS))
            said = shell.json("send", *words)
            assert said["received"]["packets"] == PACKETS
            assert not any(said["verify"][n] for n in ("lost", "reordered", "duplicated", "corrupted", "foreign"))
            assert f"vm:{guest.domain}" in shell("status", "99@0")
        assert shell.status()["queues"][0]["packets"] == turn * PACKETS
        assert shell.detach(guest)["result"] == "changed"
        shell.comes_home()
        assert shell.json("detach", guest.domain)["result"] == "unchanged"
    shell("cluster", "destroy", "99")


def test_a_read_only_pool_is_read_only_to_the_guest(shell: Shell, guest: LibvirtGuest) -> None:
    shell.cluster()
    said = shell.json("attach", guest.domain, "99@0")
    assert said["attachments"][0]["pool"] == "ro"
    with Program(guest) as program:
        program.do("zc = ringbar.Cluster.attach(99, timeout=20)\nrx = zc.open_queue(0, 'rx')")
        shell.json("send", "-o", "99@0", "--packets", "10")
        assert program.do("answer = len(rx.recv(10, 5))") == 10
        assert program.do("answer = zc.writable") is False
        with pytest.raises(Raised) as caught:
            program.do("zc.open_queue(0, 'rx', writable=True)")
        assert caught.value.code is not None
        program.do("rx.close()\nzc.close()")
    shell.detach(guest)
    shell.comes_home()


# ---- beside libvirt's own hot-plugs ---------------------------------------------------------------------------------


def nic(vm: TinyDomain, bridge: str) -> None:
    """One NIC more, as an operator does it."""
    virsh("attach-interface", vm.domain, "bridge", bridge, "--model", "virtio", "--live")


USER_NIC = "<interface type='user'><model type='virtio'/></interface>"


def nics_until_refused(vm: TinyDomain) -> str:
    """As many NICs as libvirt has places for; what it says in the end."""
    path = vm.directory / "nic.xml"
    path.write_text(USER_NIC)
    for _ in range(40):
        said = virsh("attach-device", vm.domain, str(path), "--live", status=None)
        if "error" in said:
            return said
    raise AssertionError("libvirt never ran out of places")


@pytest.mark.parametrize(("machine", "ports", "place", "total"), [
    ("pc", 0, "pci.0 slot 1f", 29),         # 32 without host bridge, PIIX3 and ours
    ("q35", 4, "pci.4 slot 0", 3),
])
def test_libvirts_own_hot_plugs_work_while_any_other_place_is_free(
    shell: Shell, bridge: str, machine: str, ports: int, place: str, total: int
) -> None:
    shell.cluster()
    with tiny_domain(f"ringbar-test-{machine}-full", machine, ports=ports, wide=ports > 0) as vm:
        before = len(vm.addresses())
        said = shell.json("attach", vm.domain, "99@0")
        assert said["attachments"][0]["where"] == place
        nic(vm, bridge)
        nic(vm, bridge)
        refused = nics_until_refused(vm)
        assert len(vm.addresses()) == before + total, vm.addresses()
        assert "ivshmem" in refused         # the one place left is ours
        assert len(vm.functions()) == 2 and all(vm.functions().values())
        shell.json("detach", vm.domain)
        assert vm.functions() == {}
        nic(vm, bridge)
        assert len(vm.addresses()) == before + total + 1
        # And now there is none for us; what libvirt gave away is known.
        error = shell.json("attach", vm.domain, "99@0", status=1)["error"]
        assert error["code"] == "no-free-slot"
        if machine == "q35":
            assert PORT_XML in error["cure"] and f"virsh edit {vm.domain}" in error["cure"]


def test_the_last_port_and_the_xml_that_adds_some(shell: Shell) -> None:
    shell.cluster()
    with tiny_domain("ringbar-test-last", "q35", ports=1, wide=True) as vm:
        error = shell.json("attach", vm.domain, "99@0", status=1)["error"]
        assert error["code"] == "last-slot" and "--use-last-slot" in error["cure"]
        assert contents(vm) == NOTHING
        findings = shell.json("doctor", vm.domain, status=None)["findings"]
        (slots,) = [f for f in findings if f["check"] == vm.domain and "root port" in f["detail"]]
        assert slots["state"] == "warning" and PORT_XML in slots["cure"]
        assert shell.json("attach", vm.domain, "99@0", "--use-last-slot")["result"] == "changed"
        shell.json("detach", vm.domain)
        # The cure as it is given.
        virsh("destroy", vm.domain)
        xml = virsh("dumpxml", vm.domain, "--inactive").replace("<devices>", f"<devices>{PORT_XML}")
        vm.define(xml, vm.directory)
        vm.start()
        assert shell.json("attach", vm.domain, "99@0")["attachments"][0]["where"] == "pci.2 slot 0"


# ---- memory ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def memory(kind: str, size: int) -> Iterator[int]:
    """A descriptor of memory as the core makes it: root's, mode 0660."""
    with contextlib.ExitStack() as stack:
        if kind == "sealed":
            fd = os.memfd_create("ringbar-test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
            stack.callback(os.close, fd)
            os.fchmod(fd, 0o660)
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        elif kind == "huge":
            setting = pathlib.Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
            if not setting.exists():
                pytest.skip("this kernel has no 2-MiB huge pages")
            before = setting.read_text()
            stack.callback(setting.write_text, before)
            setting.write_text(str(int(before) + size // (2 * MIB)))
            try:
                fd = os.memfd_create("ringbar-test", os.MFD_HUGETLB | os.MFD_CLOEXEC)
                stack.callback(os.close, fd)
                os.fchmod(fd, 0o660)
                os.ftruncate(fd, size)
                mmap.mmap(fd, size).close()
            except OSError as e:
                pytest.skip(f"no huge pages are free: {e}")
        else:
            directory = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm", prefix="rb-test-"))
            fd = os.open(f"{directory}/pool", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
            stack.callback(os.close, fd)
            os.ftruncate(fd, size)
        yield fd


@pytest.mark.parametrize("kind", ["file", "sealed", "huge"])
@pytest.mark.parametrize("readonly", [False, True], ids=["rw", "ro"])
def test_memory_that_only_root_may_open_is_handed_to_libvirts_qemu(pc: TinyDomain, kind: str, readonly: bool) -> None:
    size = 4 * MIB
    with memory(kind, size) as fd, mmap.mmap(fd, size) as view:
        before = os.fstat(fd)
        view[4096:4100] = (0x11223344).to_bytes(4, "little")
        with Vm.connect(pc.domain) as vm:
            plugged = vm.plug("ringbar-99", [Function("pool0", size, fd=fd, readonly=readonly)])
            (address,) = pc.wait_functions(1)
            pc.enable(address)
            assert pc.read(address, 4096) == 0x11223344
            pc.write(address, 8192, 0x55667788)
            assert int.from_bytes(view[8192:8196], "little") == (0 if readonly else 0x55667788)
            vm.unplug(plugged)
        after = os.fstat(fd)
        assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert contents(pc) == NOTHING


# ---- who it is ------------------------------------------------------------------------------------------------------


def error_of(vm: str, *, uri: str | None = None) -> Error:
    with pytest.raises(Error) as caught:
        asyncio.run(libvirt.Connection.open(vm, uri))
    assert caught.value.cure
    return caught.value


def test_a_domain_that_is_unknown_off_or_renamed(shell: Shell) -> None:
    shell.cluster()
    with tiny_domain("ringbar-test-old", start=False) as vm:
        assert shell.json("attach", "ringbar-test-none", "99@0", status=1)["error"]["code"] == "no-such-vm"
        error = shell.json("attach", vm.domain, "99@0", status=1)["error"]
        assert error["code"] == "vm-off" and f"virsh start {vm.domain}" in error["cure"]
        assert shell.json("detach", vm.domain)["result"] == "unchanged"
        vm.start()
        uuid = vm.uuid
        shell.json("attach", vm.domain, "99@0")
        assert [v["vm"] for v in shell.json("status", vm.domain)["vms"]] == [vm.domain]
        assert [v["vm"] for v in shell.json("status", uuid)["vms"]] == [vm.domain]
        virsh("destroy", vm.domain)
        virsh("domrename", vm.domain, "ringbar-test-new")
        old, vm.domain = vm.domain, "ringbar-test-new"
        vm.start()
        said = shell.json("attach", vm.domain, "99@0")
        assert [(a["vm"], a["uuid"]) for a in said["attachments"]] == [("ringbar-test-new", uuid)]
        assert any("has ended" in note for note in said["notes"])
        assert shell.json("attach", old, "99@0", status=1)["error"]["code"] == "no-such-vm"
        shell.json("detach", uuid)
        shell.comes_home()


def test_libvirt_that_is_not_there_and_a_vm_that_is_not(pc: TinyDomain) -> None:
    missing = error_of(pc.domain, uri="qemu+unix:///system?socket=/nonexistent/libvirt-sock")
    assert missing.code == "libvirt-unreachable" and "systemctl start" in str(missing.cure)
    unknown = error_of("00000000-0000-0000-0000-000000000001")
    assert isinstance(unknown, NotFound) and pc.domain in str(unknown.cure)


NOBODY = """
import asyncio, os
from ringbar.errors import Error
from ringbar.qemu import libvirt
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    asyncio.run(libvirt.find("any", "qemu+unix:///system?socket=/run/libvirt/virtlogd-sock"))
except Error as e:
    print(e.code, e.cure)
"""


def test_libvirt_that_may_not_be_used(daemons: Daemons, tmp_path: pathlib.Path) -> None:
    """virtlogd's socket stands for one that only root may open."""
    done = subprocess.run([sys.executable, "-c", NOBODY], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stdout.startswith("no-permission") and "usermod -aG libvirt" in done.stdout, done


def test_doctor_looks_at_a_domain(shell: Shell, pc: TinyDomain) -> None:
    report = shell.json("doctor", pc.domain, status=None)
    found = [(f["state"], f["detail"]) for f in report["findings"] if f["check"] == pc.domain]
    assert ("ok", "pc by libvirt's monitor commands, 30 of 32 hot-plug PCI slots free") in found
    assert ("ok", "its guest listens for hot-plug") in found
    (none,) = [f for f in shell.json("doctor", "rb-none", status=1)["findings"] if f["check"] == "rb-none"]
    assert none["state"] == "missing" and "no interface" in none["detail"]


# ---- what happens to it ---------------------------------------------------------------------------------------------


def test_saving_is_refused_while_attached_and_works_after(shell: Shell, pc: TinyDomain) -> None:
    shell.cluster()
    shell.json("attach", pc.domain, "99@0")
    said = virsh("managedsave", pc.domain, status=1)
    assert "ivshmem" in said
    assert shell.json("status", pc.domain)["vms"][0]["state"] == "plugged"
    shell.json("detach", pc.domain)
    virsh("managedsave", pc.domain)
    virsh("start", pc.domain)
    pc.connect()
    assert pc.functions() == {}
    assert shell.json("attach", pc.domain, "99@0")["result"] == "changed"
    assert len(pc.wait_functions(2)) == 2
    shell.json("detach", pc.domain)
    shell.comes_home()


@pytest.fixture
def host(shell: Shell) -> Host:
    """The service in this process, on the shell's registry."""
    return Host()


def test_a_domain_that_dies_in_the_middle_of_attach_leaves_nothing(
    shell: Shell, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.cluster()
    with tiny_domain("ringbar-test-dies") as vm:
        add = AsyncVm._add_device

        async def dying(self: AsyncVm, *arguments: Any, **options: Any) -> None:
            os.kill(vm.pid, signal.SIGKILL)
            await add(self, *arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(AsyncVm, "_add_device", dying)
            with pytest.raises(Error) as caught:
                host.attach(vm.domain, ["99@0"], [])
        assert caught.value.code == "vm-died", caught.value
        assert records.all_records() == []
        (status,) = host.status("99").clusters
        assert not [s for s in status.segments if s.vm] and status.queues[0].consumer is None
        until(lambda: virsh("domstate", vm.domain), lambda state: state == "shut off", "libvirt thinks it runs")
        vm.start()
        assert host.attach(vm.domain, ["99@0"], []).changed
        assert len(vm.wait_functions(2)) == 2
        host.detach(vm.domain, [])


def test_libvirt_restarted_while_attached_and_in_the_middle_of_attach(
    shell: Shell, host: Host, pc: TinyDomain, daemons: Daemons, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not daemons.ours:
        pytest.skip("libvirtd ran before the tests and is not theirs to restart")
    shell.cluster()
    host.attach(pc.domain, ["99@0"], [])
    daemons.stop()
    assert [a.state for a in host.status(pc.domain).vms] == ["plugged"]
    with pytest.raises(Error) as caught:
        host.attach(pc.domain, ["99@1"], [])
    assert caught.value.code == "libvirt-unreachable"
    daemons.start()
    assert host.detach(pc.domain, []).changed
    assert contents(pc) == NOTHING
    add: Any = AsyncVm._add_device
    calls: list[Any] = []

    async def interrupted(self: AsyncVm, *arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:         # one function is in
            daemons.stop()
            daemons.start()
        await add(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(AsyncVm, "_add_device", interrupted)
        with pytest.raises(Error) as caught:
            host.attach(pc.domain, ["99@0"], [])
    assert caught.value.code == "monitor-lost", caught.value
    assert contents(pc) == NOTHING and records.all_records() == []
    assert host.attach(pc.domain, ["99@0"], []).changed
    host.detach(pc.domain, [])
    shell.comes_home()


def test_a_connection_leaves_no_thread_and_no_descriptor(pc: TinyDomain) -> None:
    def once() -> None:
        with Vm.connect(pc.domain) as connected:
            assert connected.plugged() == []

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    once()
    before = until(held, lambda _: True, "")
    for _ in range(10):
        once()
    until(held, lambda now: now <= before, f"more than {before} threads or descriptors")
