# SPDX-License-Identifier: Apache-2.0
"""A whole topology of real VMs: two workers meet at one VM, two VMs have a direct queue, cards are at both ends."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from netspace import Space, udp_frame
from tinyguest import TinyVm
from vmtools import Program, Shell, until, vm

from ringbar.qemu.launch import Guest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(500)]

FILE = """\
ringbar: 1
name: ids
clusters:
  99:
    label: ids-edge
    queues:
      0-2: {{slots: 1024}}
      3: {{slots: 1024, credit: 512}}
      4: {{slots: 256, direct: true}}
workers:
  {edge}:
    kind: balance
    in: [zc:eth1, zc:eth2]
    steer: not port 22
    out: [[99@0, 99@1], [99@2]]
    policy: 5tuple
  {back}: {{kind: bridge, in: [99@3], out: [zc:eth3]}}
vms:
  {ids1}: {{rx: [99@0], tx: [99@3, 99@4], pool: rw}}
  {ids2}: {{rx: [99@1, 99@4]}}
  {rec}: {{rx: [99@2]}}
"""
SO_RCVBUFFORCE = 33
COUNT = 200
"""Packets, each of a flow of its own."""


class Site:
    """The VMs, a name space with the cards, and the topology's file."""

    def __init__(self, shell: Shell, space: Space, vms: dict[str, str]) -> None:
        self.shell, self.space, self.vms = shell, space, vms
        self.path = shell.root / "ids.yaml"

    def run(self, *words: str, status: int = 0) -> Any:
        """A command inside; its document."""
        options = self.shell.command(*words, "--json")
        options["args"] = ["nsenter", f"--net=/run/netns/{self.space.name}", *options["args"]]
        done = subprocess.run(**options, capture_output=True, timeout=150)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout)

    def apply(self, edge: str, back: str) -> None:
        self.path.write_text(FILE.format(edge=edge, back=back, **self.vms))
        said = self.run("apply", str(self.path))
        assert said["result"] == "changed"

    def packets(self) -> list[int]:
        """What has been passed to each of the three queues that receive from the cards."""
        return [self.shell.queue(f"99@{n}")["packets"] for n in range(3)]

    def send(self, interface: str, first: int) -> None:
        """Packets on the wire of a card, each of a flow of its own, no faster than they are balanced."""
        before = sum(self.packets())
        with self.space.wire(interface) as wire:
            for sent in range(0, COUNT, 50):
                for n in range(first + sent, first + sent + 50):
                    wire.send(udp_frame(b"\2" * 6, b"\4" * 6, b"%06d" % n, port=1024 + n))
                passed = before + 2 * (sent + 50)
                until(lambda: sum(self.packets()), lambda now, all_of=passed: now == all_of, "not all is balanced")


@pytest.fixture(scope="module")
def machines(start_guest: Callable[..., Guest]) -> Iterator[tuple[Guest, Guest, TinyVm]]:
    """ids1, ids2, and a VM that only records: what it does with its packets is nobody's business here."""
    with (
        start_guest("ids1") as one,
        start_guest("ids2") as two,
        tempfile.TemporaryDirectory(prefix="rb-") as directory,
        TinyVm(pathlib.Path(directory)) as recorder,
    ):
        recorder.wait_ready()
        one.wait_up()
        two.wait_up()
        yield one, two, recorder


@pytest.fixture
def site(shell: Shell, machines: tuple[Guest, Guest, TinyVm]) -> Iterator[Site]:
    one, two, recorder = machines
    with Space("rbtopo") as space:
        for n in (1, 2, 3):
            space.pair(f"eth{n}", f"wire{n}")
        made = Site(shell, space, {"ids1": vm(one), "ids2": vm(two), "rec": f"qmp:{recorder.qmp}"})
        try:
            yield made
        finally:
            made.path.write_text("ringbar: 1\nname: ids\n")
            made.run("apply", str(made.path))


OPEN = """
import ringbar
zc = ringbar.Cluster.attach(99)
rx = zc.open_queue({rx}, "rx")
"""
READ = """
bursts, seen = [], []
while len(seen) < {count}:
    burst = rx.recv(64, 10.0)
    if not len(burst):
        break
    seen += [int(bytes(b[42:48])) for b in burst]
    if {on}:
        tx.send(burst, timeout=10.0)
    burst.release()
answer = seen
"""
DIRECT = """
with zc.open_queue(4, "tx") as tx:
    out = tx.alloc(32)
    for i in range(len(out)):
        out[i][:60] = b"%060d" % i
        out.lengths[i] = 60
    tx.send(out, timeout=10.0)
    answer = 32 - len(out)
"""
DIRECT_READ = """
with zc.open_queue(4, "rx") as direct:
    got = 0
    while got < 32:
        burst = direct.recv(32, 10.0)
        if not len(burst):
            break
        got += len(burst)
        burst.release()
answer = got
"""


@pytest.mark.parametrize(("edge", "back"), [("edge", "back"), ("edge", "outward")], ids=["back-first", "edge-first"])
def test_two_workers_meet_at_one_vm_and_all_packets_pass(
    site: Site, machines: tuple[Guest, Guest, TinyVm], program: Callable[[Guest], Program], edge: str, back: str
) -> None:
    """Whichever of the two workers starts first; a second time, nothing changes."""
    site.apply(edge, back)
    assert site.run("apply", str(site.path))["result"] == "unchanged"
    site.run("plan", str(site.path), "--check")
    with site.space.wire("wire3") as out:
        out.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 22)  # what nobody has read yet is not lost
        site.send("wire1", 0)
        site.send("wire2", COUNT)
        here, there, recorded = site.packets()
        assert here + there == recorded == 2 * COUNT, "each of the two applications gets all"
        assert here > COUNT / 2 and there > COUNT / 2
        one, two = program(machines[0]), program(machines[1])
        one.do(OPEN.format(rx=0) + 'tx = zc.open_queue(3, "tx")')
        two.do(OPEN.format(rx=1))
        mine = one.do(READ.format(count=here, on=True))
        others = two.do(READ.format(count=there, on=False))
        assert len(mine) == here and len(others) == there
        assert sorted(mine + others) == list(range(2 * COUNT))
        assert [int(out.recv(2048)[42:48]) for _ in mine] == mine
    two.tell(DIRECT_READ)
    assert one.do(DIRECT) == 32 and two.answer() == 32
    assert site.run("apply", str(site.path))["result"] == "unchanged"


@pytest.mark.parametrize("killed", ["edge", "outward"])
def test_a_worker_that_was_killed_is_started_again_by_apply(
    site: Site, machines: tuple[Guest, Guest, TinyVm], program: Callable[[Guest], Program], killed: str
) -> None:
    """The VMs hold the dead one's buffers, and the other worker goes on."""
    site.apply("edge", "outward")
    one = program(machines[0])
    one.do(OPEN.format(rx=0) + 'tx = zc.open_queue(3, "tx")')
    workers = {w["name"]: w["pid"] for w in site.run("worker", "list")["workers"]}
    os.kill(workers[killed], signal.SIGKILL)
    until(lambda: site.run("plan", str(site.path))["steps"], bool, "it is not seen to be dead")
    (step,) = site.run("apply", str(site.path))["steps"]
    assert (step["do"], step["subject"]) == ("worker-start", killed)
    assert site.run("apply", str(site.path))["result"] == "unchanged"
    before = site.packets()[0]
    with site.space.wire("wire3") as out:
        out.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 22)  # what nobody has read yet is not lost
        site.send("wire1", 0)
        here = site.packets()[0] - before
        mine = one.do(READ.format(count=here, on=True))
        assert len(mine) == here
        assert [int(out.recv(2048)[42:48]) for _ in mine] == mine
