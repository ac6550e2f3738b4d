# SPDX-License-Identifier: Apache-2.0
"""Packets to and from running VMs, every one checked: attached by the command line, sent and verified by the tools."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from testinfra.host import Host
from vmtools import RINGBAR_IN_GUEST, Program, Raised, Shell, Tool, in_guest, until, vm

from ringbar.qemu.launch import Guest

pytestmark = pytest.mark.vm

PACKETS = 30_000
NOTHING_WRONG = {"lost": 0, "reordered": 0, "duplicated": 0, "corrupted": 0, "foreign": 0}


def faultless(said: dict[str, object], packets: int) -> None:
    """A document of ``send -i`` or ``count --verify``: every packet, once, in order, unharmed."""
    received, verify = said["received"], said["verify"]
    assert isinstance(received, dict) and isinstance(verify, dict)
    assert received["packets"] == packets
    assert {name: verify[name] for name in NOTHING_WRONG} == NOTHING_WRONG


def ivshmem_devices(host: Host) -> int:
    """How many devices of ours the guest's kernel sees, by lspci in the guest."""
    return int(host.check_output("lspci -n -d 1af4:1110 | wc -l"))


@pytest.fixture(params=["pc", "wide"])
def guest(request: pytest.FixtureRequest) -> Guest:
    found: Guest = request.getfixturevalue(f"guest_{request.param}")
    return found


def test_attach_loop_detach_and_again(shell: Shell, guest: Guest, request: pytest.FixtureRequest) -> None:
    host: Host = request.getfixturevalue(f"host_{guest.name}")
    shell.cluster()
    assert ivshmem_devices(host) == 0
    for turn in (1, 2):
        said = shell.json("attach", vm(guest), "99@0", "--tx", "99@1", "--pool", "rw")
        assert said["result"] == "changed"
        (attachment,) = said["attachments"]
        assert (attachment["vm"], attachment["state"], attachment["pool"]) == (vm(guest), "plugged", "rw")
        assert {(b["queue"], b["direction"]) for b in attachment["bindings"]} == {("99@0", "rx"), ("99@1", "tx")}
        assert shell.json("attach", vm(guest), "99@0", "--tx", "99@1")["result"] == "unchanged"
        assert ivshmem_devices(host) == 2  # lane and pool
        with Tool(guest, "bridge", "-i", "99@0", "-o", "99@1"):
            said = shell.json(
                "send", "-o", "99@0", "-i", "99@1", "--window", "512", "--packets", str(PACKETS), "--size", "512"
            )
            faultless(said, PACKETS)
        shell.comes_home(granted=False)
        now = shell.status()
        assert now["queues"][0]["packets"] == turn * PACKETS
        assert now["queues"][1]["received_packets"] == PACKETS  # by this attachment
        assert now["queues"][0]["copied"] == now["queues"][1]["copied"] == 0
        assert shell.detach(guest)["result"] == "changed"
        shell.comes_home()
        assert ivshmem_devices(host) == 0
        assert shell.json("status")["vms"] == []
        assert shell.json("detach", vm(guest))["result"] == "unchanged"


def test_guest_receives(shell: Shell, guest_pc: Guest) -> None:
    shell.cluster()
    shell("attach", vm(guest_pc), "99@0")
    with Tool(guest_pc, "count", "-i", "99@0", "--verify", "--packets", str(PACKETS), "--json") as tool:
        # What a full ring refuses stays with the sender, so nothing is lost without a window.
        said = shell.json("send", "-o", "99@0", "--packets", str(PACKETS))
        assert said["sent"]["packets"] == PACKETS
        faultless(tool.end(ask=False), PACKETS)
    shell.comes_home()


def test_guest_sends(shell: Shell, guest_wide: Guest) -> None:
    shell.cluster()
    shell("attach", vm(guest_wide), "--tx", "99@1")
    counting = shell.start("count", "-i", "99@1", "--verify", "--packets", str(PACKETS), "--json")
    said = in_guest(guest_wide, "send", "-o", "99@1", "--packets", str(PACKETS))
    assert said["sent"]["packets"] == PACKETS
    faultless(shell.finish(counting), PACKETS)
    shell.detach(guest_wide)
    shell.comes_home()


def test_the_host_relays_from_vm_to_vm(shell: Shell, guest_pc: Guest, guest_wide: Guest) -> None:
    shell.cluster(99, 3)
    shell("attach", vm(guest_pc), "99@0", "--tx", "99@1")
    shell("attach", vm(guest_wide), "99@1", "--tx", "99@2")
    with Tool(guest_pc, "bridge", "-i", "99@0", "-o", "99@1"), Tool(guest_wide, "bridge", "-i", "99@1", "-o", "99@2"):
        said = shell.json("send", "-o", "99@0", "-i", "99@2", "--window", "512", "--packets", str(PACKETS))
        faultless(said, PACKETS)
        shown = {q["address"]: q for q in shell.status()["queues"]}
        assert shown["99@1"]["producer"]["vm"] == vm(guest_pc) and shown["99@1"]["consumer"]["vm"] == vm(guest_wide)
        assert shown["99@1"]["packets"] == shown["99@1"]["received_packets"] == PACKETS
        assert all(q["copied"] == q["foreign"] == 0 for q in shown.values())
    shell.comes_home(granted=False)
    shell.detach(guest_wide)
    shell.detach(guest_pc)
    shell.comes_home()


def test_one_program_receives_from_a_vm_and_another_sends_to_it(shell: Shell, guest_pc: Guest) -> None:
    """The first serves the VM. What the second sends comes by a hop, which goes with it."""
    shell.cluster(99, 2)
    shell("attach", vm(guest_pc), "99@0", "--tx", "99@1")
    counting = shell.start("count", "-i", "99@1", "--verify", "--packets", str(PACKETS), "--json")
    with Tool(guest_pc, "bridge", "-i", "99@0", "-o", "99@1"):
        sending = shell.start("send", "-o", "99@0", "--packets", str(PACKETS), "--rate", "3k", "--json")
        hop = shell.status()["queues"][-1]
        assert (hop["feeds"], hop["producer"]["pid"], hop["consumer"]["pid"]) == ("99@0", sending.pid, counting.pid)
        assert shell.finish(sending)["sent"]["packets"] == PACKETS
        faultless(shell.finish(counting), PACKETS)
    shell.detach(guest_pc)
    shell.comes_home()
    assert [q["address"] for q in shell.status()["queues"]] == ["99@0", "99@1"]


def test_a_direct_queue_needs_no_host(shell: Shell, guest_pc: Guest, guest_wide: Guest) -> None:
    shell.cluster(99, 0)
    shell("queue", "create", "99", "--direct", "--slots", "1024")
    shell("attach", vm(guest_pc), "--tx", "99@0")
    shell("attach", vm(guest_wide), "99@0", "--pool", "rw")
    with Tool(guest_wide, "count", "-i", "99@0", "--verify", "--packets", str(PACKETS), "--json") as tool:
        assert in_guest(guest_pc, "send", "-o", "99@0", "--packets", str(PACKETS))["sent"]["packets"] == PACKETS
        faultless(tool.end(ask=False), PACKETS)
    shell.detach(guest_pc)
    shell.detach(guest_wide)
    shell.comes_home()


def test_the_second_opener_is_told_who_has_it(
    shell: Shell, guest_pc: Guest, program: Callable[[Guest], Program]
) -> None:
    shell.cluster()
    shell("attach", vm(guest_pc), "99@0", "--tx", "99@1")
    first, second = program(guest_pc), program(guest_pc)
    for one in (first, second):
        one.do("zc = ringbar.Cluster.attach(99)")
    first.do("rx = zc.open_queue(0, 'rx')")
    with pytest.raises(Raised) as caught:
        second.do("rx = zc.open_queue(0, 'rx')")
    assert (caught.value.type, caught.value.code) == ("Busy", "busy")
    assert str(first.pid) in caught.value.message and str(first.pid) in caught.value.cure
    said = guest_pc.ssh([*RINGBAR_IN_GUEST, "count", "-i", "99@0"], check=False)
    assert said.returncode == 1 and str(first.pid) in said.stderr and "Traceback" not in said.stderr
    second.do("tx = zc.open_queue(1, 'tx')")  # the attachment is shared: the other queue is free
    first.do("rx.close()")
    second.do("rx = zc.open_queue(0, 'rx')")


def test_a_guest_without_the_device_says_so(guest_pc: Guest) -> None:
    done = guest_pc.ssh([*RINGBAR_IN_GUEST, "count", "-i", "99@0"], check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "cluster 99" in done.stderr and "on the host" in done.stderr


def test_another_abi_is_refused_with_both_versions(
    shell: Shell, guest_pc: Guest, program: Callable[[Guest], Program]
) -> None:
    shell.cluster()
    shell("attach", vm(guest_pc), "99@0")
    (lane,) = [s for s in shell.status()["segments"] if s["kind"] == "lane" and s["vm"]]
    with open(lane["path"], "r+b") as memory:
        memory.seek(8)
        memory.write((7).to_bytes(4, "little"))
    with pytest.raises(Raised) as caught:
        program(guest_pc).do("ringbar.Cluster.attach(99)")
    assert caught.value.type == "Incompatible"
    assert "7" in caught.value.message and "1" in caught.value.message
    assert caught.value.cure


def test_status_and_ready_name_the_program_in_the_guest(
    shell: Shell, guest_pc: Guest, program: Callable[[Guest], Program]
) -> None:
    shell.cluster()
    said = shell.json("attach", vm(guest_pc), "99@0", "--ready", "--timeout", "3", status=4)
    assert said["error"]["code"] == "not-finished"
    assert shell.json("status")["vms"][0]["state"] == "plugged"  # kept
    one = program(guest_pc)
    one.do("zc = ringbar.Cluster.attach(99); rx = zc.open_queue(0, 'rx')")
    said = shell.json("attach", vm(guest_pc), "99@0", "--ready", "--timeout", "10")
    assert said["attachments"][0]["state"] == "ready"
    consumer = shell.queue("99@0")["consumer"]
    assert (consumer["vm"], consumer["pid"]) == (vm(guest_pc), one.pid)


def test_more_queues_are_attached_without_a_plug(
    shell: Shell, guest_pc: Guest, program: Callable[[Guest], Program]
) -> None:
    shell.cluster(99, 3)
    shell("attach", vm(guest_pc), "99@0", "--tx", "99@1")
    one = program(guest_pc)
    one.do("zc = ringbar.Cluster.attach(99); rx = zc.open_queue(0, 'rx')")
    assert one.do("answer = [q.id for q in zc.queues]") == [0, 1]
    shell("attach", vm(guest_pc), "99@2")
    assert one.do("answer = [q.id for q in zc.queues]") == [0, 1, 2]
    one.do("more = zc.open_queue(2, 'rx')")
    shell("detach", vm(guest_pc), "99@2")
    with pytest.raises(Raised) as caught:
        one.do("more.recv(1, timeout=5)")
    assert caught.value.type == "Detached"
    assert one.do("answer = len(rx.recv(1, timeout=0))") == 0  # the other stays
    until(lambda: shell.queue("99@2")["consumer"], lambda seen: seen is None, "99@2 is not free")
