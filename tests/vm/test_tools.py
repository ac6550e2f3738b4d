# SPDX-License-Identifier: Apache-2.0
"""The tools in a VM, exactly as on the host: balanced, given to all, in the background, changed while they run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from vmtools import Program, Raised, Shell, Tool, in_guest, until, vm

from ringbar.qemu.launch import Guest

pytestmark = pytest.mark.vm

PACKETS = 3000


def attached(shell: Shell, guest: Guest, sends: int) -> subprocess.Popen[str]:
    """A VM that receives 99@0 and sends on 99@1 and so on; one program of the host serves it: it brings what comes on
    99@4 to 99@0, and what the VM sends to 99@5 and so on."""
    shell.cluster(99, 8, "--buffers", "32768")
    numbers = range(1, 1 + sends)
    sent = [word for q in numbers for word in ("--tx", f"99@{q}")]
    shell("attach", vm(guest), "99@0", *sent, "--pool", "rw")
    back = [word for q in numbers for word in ("-i", f"99@{q}", "-o", f"99@{q + 4}")]
    return shell.start("bridge", "-i", "99@4", "-o", "99@0", *back, "--json")


def through(shell: Shell) -> int:
    """Packets that the host got back from the VM and passed on."""
    return sum(q["packets"] for q in shell.status()["queues"] if q["address"] in ("99@5", "99@6", "99@7"))


def passed(shell: Shell, guest: Guest, tool: str, copies: int, *outputs: str) -> tuple[Any, list[Any]]:
    """Packets through a tool in the VM, and what programs of the host received: documents of the tool and of each."""
    server = attached(shell, guest, 3)
    counts = [shell.start("count", "-i", f"99@{q}", "--json") for q in (5, 6, 7)]
    with Tool(guest, tool, "-i", "99@0", *outputs, "--json") as running:
        for turn in range(1, 4):  # no more at once than a queue has room for, however slow the VM is
            shell("send", "-o", "99@4", "--packets", str(PACKETS // 3), "--flows", "31", "--stream", str(turn))
            until(lambda: through(shell), lambda n: n == copies * turn * PACKETS // 3, "packets that came through")  # noqa: B023
        said = running.end()
    received = [shell.finish(process, ask=True) for process in counts]
    shell.finish(server, ask=True)
    shell.detach(guest)
    shell.comes_home()
    return said, [one["packets"] for one in received]


def test_a_balancer_in_a_vm_shares_every_packet_once(shell: Shell, guest_pc: Guest) -> None:
    said, each = passed(shell, guest_pc, "balance", 1, "-o", "99@1-3")
    assert sum(each) == PACKETS and all(each)
    assert [port["packets"] for port in said["outputs"]] == each
    assert said["dropped"] == 0


def test_a_fan_out_in_a_vm_gives_everything_to_each_application(shell: Shell, guest_pc: Guest) -> None:
    said, (first, second, third) = passed(shell, guest_pc, "fanout", 2, "-o", "99@1,99@2", "-o", "99@3")
    assert (first + second, third) == (PACKETS, PACKETS)
    assert said["dropped"] == 0


def test_a_worker_in_a_vm_is_listed_changed_and_stopped_there(shell: Shell, guest_pc: Guest) -> None:
    attached(shell, guest_pc, 2)
    counts = [shell.start("count", "-i", f"99@{q}", "--json") for q in (5, 6)]
    started = in_guest(guest_pc, "balance", "-i", "99@0", "-o", "99@1", "--background", "--name", "lb")["worker"]
    try:
        assert [w["name"] for w in in_guest(guest_pc, "worker", "list")["workers"]] == ["lb"]
        shell("send", "-o", "99@4", "--packets", "500", "--rate", "10k")
        assert in_guest(guest_pc, "worker", "set", "lb", "-o", "99@1,99@2", "--policy", "rr")["result"] == "changed"
        shell("send", "-o", "99@4", "--packets", "500", "--rate", "10k")
        until(
            lambda: in_guest(guest_pc, "worker", "show", "lb")["worker"]["packets"], lambda n: n == 1000, "the worker"
        )
        assert started["pid"] == in_guest(guest_pc, "worker", "show", "lb")["worker"]["pid"]
    finally:
        stopped = in_guest(guest_pc, "worker", "stop", "lb")["worker"]["summary"]
    assert (stopped["packets"], stopped["dropped"]) == (1000, 0)
    assert in_guest(guest_pc, "worker", "list")["workers"] == []
    until(lambda: shell.status()["queues"], lambda qs: all(q["waiting"] == 0 for q in qs), "packets that wait")
    assert [shell.finish(process, ask=True)["packets"] for process in counts] == [750, 250]


def test_a_vm_makes_no_cluster_that_hides_its_hosts(
    shell: Shell, guest_pc: Guest, program: Callable[[Guest], Program]
) -> None:
    shell.cluster(99, 1)
    shell("attach", vm(guest_pc), "99@0")
    inside = program(guest_pc)
    with pytest.raises(Raised) as caught:
        inside.do("ringbar.Cluster.create(99, buffers=1024)")
    assert caught.value.code == "would-hide"
