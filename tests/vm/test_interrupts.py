# SPDX-License-Identifier: Apache-2.0
"""Interrupts: a VM with a virtual IOMMU and its host sleep until the other rings."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vmtools import Launch, Program, Shell, in_guest, monitor, until, vm

import ringbar
from ringbar.qemu.launch import Guest

IOMMU = ("-device", "intel-iommu,intremap=on")
Start = Callable[[Guest], Program]


@pytest.fixture(scope="module")
def iommu(start_guest: Callable[..., Guest]) -> Iterator[Guest]:
    """A q35 VM with a virtual IOMMU, which its kernel uses."""
    with start_guest("iommu", machine="q35", pref64_reserve="1G", extra=IOMMU, append="intel_iommu=on") as guest:
        guest.wait_up()
        yield guest


@pytest.fixture(scope="module")
def doorbells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the host has written down of doorbells, which stay in the VM, while each test has a registry of its own."""
    return tmp_path_factory.mktemp("doorbells")


@pytest.fixture(autouse=True)
def nothing_stays(request: pytest.FixtureRequest, shell: Shell, doorbells: Path) -> Iterator[None]:
    """After every test the VM has nothing of ours but its doorbell, and every buffer is home."""
    kept = Path(shell.variables["RINGBAR_RUN"], "attachments")
    kept.mkdir()
    for file in doorbells.iterdir():
        shutil.copy(file, kept)
    yield
    for file in kept.glob("*.bell"):
        shutil.copy(file, doorbells)
    if "iommu" not in request.fixturenames:
        return
    guest = request.getfixturevalue("iommu")
    shell.run("detach", vm(guest), timeout=90)
    assert not [p for p in monitor(guest, "qom-list", path="/machine/peripheral") if re.match(r"ringbar-\d", p["name"])]
    assert not [f for f in monitor(guest, "query-fdsets") if f]
    for cluster in json.loads(shell("cluster", "list", "--json"))["clusters"]:
        shell.comes_home(cluster["id"])


def interrupts(guest: Guest) -> int:
    """How many the guest's kernel has counted for doorbells."""
    lines = guest.ssh("grep vfio-msix /proc/interrupts", check=False).stdout.splitlines()
    return sum(int(line.split()[1]) for line in lines)


def attach(shell: Shell, guest: Guest, *words: str) -> dict[str, Any]:
    """Attach; the attachment, which has interrupts."""
    (attached,) = shell.json("attach", vm(guest), *words)["attachments"]
    assert attached["interrupts"] and not attached["polls"], attached
    return dict(attached)


def send(shell: Shell, queue: str, packets: int = 1, *more: str) -> None:
    """Send from the host."""
    shell("send", "-o", queue, "--packets", str(packets), "--quiet", *more)


RECEIVE = """
import threading, time
zc = ringbar.Cluster.attach(99, timeout=30)
rx = zc.open_queue({queue}, "rx")
got, ended = [], []
def receive():
    try:
        for burst in rx:
            got.append(len(burst))
        ended.append("end")
    except Exception as problem:
        ended.append(type(problem).__name__)
    rx.close()
thread = threading.Thread(target=receive, daemon=True)
thread.start()
"""
SWITCHES = """
import resource, time
before = resource.getrusage(resource.RUSAGE_SELF)
time.sleep(2)
now = resource.getrusage(resource.RUSAGE_SELF)
answer = now.ru_nvcsw - before.ru_nvcsw
"""


def receiver(program: Start, guest: Guest, queue: int = 0, waits: str = "bell") -> Program:
    """A program in the VM that receives, and how it waits."""
    inside = program(guest)
    inside.do(RECEIVE.format(queue=queue))
    until(lambda: inside.do("answer = rx.stats()['waits']"), lambda how: how == waits, "it does not wait so")
    return inside


def gets(inside: Program, packets: int) -> None:
    """The program has received so many."""
    until(lambda: inside.do("answer = sum(got)"), lambda n: n == packets, f"{packets} did not come")


def test_a_waiting_program_is_woken_by_an_interrupt(shell: Shell, iommu: Guest, program: Start) -> None:
    shell.cluster()
    attach(shell, iommu, "99@0")
    inside = receiver(program, iommu)
    send(shell, "99@0")
    gets(inside, 1)
    # Asleep it is woken at most four times a second to look around; a program that polls, a thousand times.
    assert inside.do(SWITCHES) < 100
    before = interrupts(iommu)
    send(shell, "99@0")
    gets(inside, 2)
    assert interrupts(iommu) > before
    said = [f for f in in_guest(iommu, "doctor", status=None)["findings"] if f["check"] == "interrupts"]
    assert [f["state"] for f in said] == ["ok"] and "cluster 99" in said[0]["detail"], said


def test_who_is_awake_is_not_interrupted(shell: Shell, iommu: Guest, program: Start) -> None:
    shell.cluster()
    attach(shell, iommu, "99@0")
    inside = receiver(program, iommu)
    before = interrupts(iommu)
    send(shell, "99@0", 4000, "--rate", "4000")
    gets(inside, 4000)
    assert interrupts(iommu) - before < 400


def test_the_host_sleeps_until_the_vm_rings(shell: Shell, iommu: Guest, program: Start) -> None:
    shell.cluster()
    attach(shell, iommu, "--tx", "99@1")
    inside = program(iommu)
    inside.do("zc = ringbar.Cluster.attach(99, timeout=30)\ntx = zc.open_queue(1, 'tx')")
    with ringbar.Cluster.attach(99) as zc, zc.open_queue(1, "rx") as rx:
        assert rx.stats()["waits"] == "bell"
        inside.tell("answer = tx.write([bytes(60)], timeout=20)")
        assert len(rx.recv(timeout=20)) == 1
        assert inside.answer() == 1
        inside.tell("import time; time.sleep(2); answer = tx.write([bytes(60)], timeout=20)")
        before = Path(f"/proc/{os.getpid()}/status").read_text()
        assert len(rx.recv(timeout=20)) == 1
        after = Path(f"/proc/{os.getpid()}/status").read_text()
        assert inside.answer() == 1
        first, last = (int(re.findall(r"\nvoluntary_ctxt_switches:\s*(\d+)", text)[0]) for text in (before, after))
        assert last - first < 200
    inside.close()


def test_a_worker_with_idle_event_sleeps_until_the_host_rings(shell: Shell, iommu: Guest, program: Start) -> None:
    shell.cluster()
    attach(shell, iommu, "99@0", "--tx", "99@1")
    inside = program(iommu)
    inside.do(
        "zc = ringbar.Cluster.attach(99, timeout=30)\n"
        "bridge = ringbar.Bridge(zc.queues[0], zc.queues[1], idle='event').start()"
    )
    with ringbar.Cluster.attach(99) as zc, zc.open_queue(1, "rx") as rx:
        for turn in range(2):
            send(shell, "99@0")
            assert len(rx.recv(timeout=20)) == 1
            before = interrupts(iommu)
            until(lambda: inside.do(SWITCHES), lambda number: number < 100, "the worker does not sleep", 40)
            send(shell, "99@0")
            assert len(rx.recv(timeout=20)) == 1, turn
            assert interrupts(iommu) > before
    inside.do("bridge.stop(); zc.close()")
    inside.close()


def test_interrupts_go_on_without_the_agent_and_with_the_next(
    shell: Shell, launch: Launch, iommu: Guest, program: Start
) -> None:
    shell.cluster()
    agent = launch()
    attach(shell, iommu, "99@0")
    inside = receiver(program, iommu)

    def is_woken(packets: int) -> None:
        before = interrupts(iommu)
        until(lambda: inside.do(SWITCHES), lambda number: number < 100, "it polls", 40)
        send(shell, "99@0")
        gets(inside, packets)
        assert interrupts(iommu) > before

    is_woken(1)
    agent.kill()
    agent.wait(10)
    is_woken(2)
    launch()
    is_woken(3)
    (attached,) = shell.json("status", "--sample", "0")["vms"]
    assert attached["interrupts"] and attached["state"] == "ready"
    inside.close()
    shell.detach(iommu)


def test_asyncio_waits_for_the_interrupt(shell: Shell, iommu: Guest, program: Start) -> None:
    shell.cluster()
    attach(shell, iommu, "99@0")
    inside = program(iommu)
    inside.do("""
import asyncio, threading
zc = ringbar.Cluster.attach(99, timeout=30)
rx = zc.open_queue(0, "rx")
got = []
async def receive():
    async for burst in rx:
        got.append(len(burst))
thread = threading.Thread(target=lambda: asyncio.run(receive()), daemon=True)
thread.start()
""")
    send(shell, "99@0")
    gets(inside, 1)
    assert inside.do(SWITCHES) < 100
    before = interrupts(iommu)
    send(shell, "99@0")
    gets(inside, 2)
    assert interrupts(iommu) > before
    inside.do("rx.stop(); thread.join(10); answer = thread.is_alive()")


def test_two_programs_and_a_killed_one(shell: Shell, iommu: Guest, program: Start) -> None:
    shell.cluster()
    attach(shell, iommu, "99@0", "99@1")
    one, two = receiver(program, iommu, 0), receiver(program, iommu, 1)
    for queue, inside in (("99@0", one), ("99@1", two)):
        send(shell, queue)
        gets(inside, 1)
    one.kill()
    send(shell, "99@1")
    gets(two, 2)
    again = receiver(program, iommu, 0)
    before = interrupts(iommu)
    assert again.do(SWITCHES) < 100
    send(shell, "99@0")
    gets(again, 1)
    assert interrupts(iommu) > before


def test_without_the_service_programs_poll_until_it_is_back(shell: Shell, iommu: Guest, program: Start) -> None:
    shell.cluster()
    attach(shell, iommu, "99@0")
    inside = receiver(program, iommu)
    iommu.ssh("kill -9 $(grep -al 'ringbar.guest.bell[s]' /proc/[0-9]*/cmdline | cut -d/ -f3)")
    until(lambda: inside.do(SWITCHES), lambda number: number < 100, "it polls", 40)
    assert inside.do("answer = rx.stats()['waits']") == "bell"
    before = interrupts(iommu)
    send(shell, "99@0")
    gets(inside, 1)
    assert interrupts(iommu) > before


def test_detached_and_attached_again(shell: Shell, iommu: Guest, program: Start) -> None:
    shell.cluster()

    def once() -> None:
        attach(shell, iommu, "99@0")
        inside = receiver(program, iommu)
        send(shell, "99@0")
        gets(inside, 1)
        assert shell.detach(iommu)["changed"]
        until(lambda: inside.do("answer = ended"), lambda how: how == ["Detached"], "it was not told")

    def plugged() -> list[str]:
        there = monitor(iommu, "qom-list", path="/machine/peripheral")
        return sorted(p["name"] for p in there if p["name"].startswith("ringbar-bell"))

    once()
    before = plugged()  # it stays, for the next
    once()
    assert plugged() == before and before


def test_taken_away_by_force_from_a_paused_vm(shell: Shell, iommu: Guest, program: Start) -> None:
    shell.cluster()
    attach(shell, iommu, "99@0")
    receiver(program, iommu)
    monitor(iommu, "stop")
    try:
        done = shell.json("detach", vm(iommu), "--force", "--timeout", "3")
        assert done["changed"] and "quarantined" in " ".join(done["warnings"])
    finally:
        monitor(iommu, "cont")
    shell("attach", vm(iommu), "99@0")
    inside = receiver(program, iommu)
    send(shell, "99@0")
    gets(inside, 1)


def test_a_rebooted_vm_has_interrupts_again(shell: Shell, iommu: Guest, program: Start) -> None:
    shell.cluster()
    attach(shell, iommu, "99@0")
    receiver(program, iommu)
    iommu.reboot()
    inside = receiver(program, iommu)
    send(shell, "99@0")
    gets(inside, 1)
    assert inside.do(SWITCHES) < 100


def test_a_vm_without_an_iommu_polls_and_says_why(shell: Shell, guest_wide: Guest, program: Start) -> None:
    shell.cluster()
    refused = shell.json("attach", vm(guest_wide), "99@0", "--interrupts", status=1)["error"]
    assert refused["code"] == "no-interrupts" and "virtual IOMMU" in refused["message"] and refused["cure"]
    (attached,) = shell.json("attach", vm(guest_wide), "99@0")["attachments"]
    assert not attached["interrupts"] and attached["polls"] == "it has no virtual IOMMU"
    assert "polls: it has no virtual IOMMU" in shell("status", "99", "--sample", "0")
    inside = receiver(program, guest_wide, waits="polling")
    assert inside.do(SWITCHES) > 100
    send(shell, "99@0")
    gets(inside, 1)
    (said,) = [f for f in in_guest(guest_wide, "doctor", status=None)["findings"] if f["check"] == "interrupts"]
    assert "poll" in said["detail"]
    shell.detach(guest_wide)


def test_interrupts_can_be_left_out_and_added(shell: Shell, iommu: Guest, program: Start) -> None:
    shell.cluster()
    (attached,) = shell.json("attach", vm(iommu), "99@0", "--no-interrupts")["attachments"]
    assert not attached["interrupts"] and attached["polls"]
    assert shell.json("attach", vm(iommu), "99@0", "--interrupts", status=1)["error"]["code"] == "needs-replug"
    attach(shell, iommu, "99@0", "--interrupts", "--replug")
    inside = receiver(program, iommu)
    send(shell, "99@0")
    gets(inside, 1)
