# SPDX-License-Identifier: Apache-2.0
"""How late a waiting program sees a packet, and what waiting costs: ``ringbar bench vm --waiting``.

One VM with a virtual IOMMU. A packet goes to one side, which waits by the strategy that is measured, and comes back to
the other, which spins: so a round trip is late by what one waiting side takes to wake. Packets are 20 ms apart, so that
whoever may sleep does. Then nothing is sent, and the processor time of both sides is taken.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringbar.errors import Error
from ringbar.host.bench import waiting_side
from ringbar.host.bench.consumer import private

CLUSTER = 1
GAP = 0.02
"""Seconds between two packets: more than it takes an end to go to sleep."""
START_SECONDS = 60.0
IOMMU = ("-device", "intel-iommu,intremap=on")

@dataclass
class Waited:
    """One strategy, one side waiting.

    :ivar microseconds: of each round trip.
    :ivar idle: share of one processor that the waiting program took while nothing came.
    :ivar qemu: the share that QEMU's process took meanwhile.
    """

    strategy: str
    side: str
    microseconds: list[float]
    idle: float
    qemu: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON and the table."""
        ordered = sorted(self.microseconds)
        return {
            "strategy": self.strategy,
            "waits": self.side,
            "median_us": round(statistics.median(ordered), 1),
            "p99_us": round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], 1),
            "idle_share": round(self.idle, 4),
            "qemu_share": round(self.qemu, 4),
        }


class _Program:
    """The program in the VM."""

    def __init__(self, vm: Any, waits: str) -> None:
        words = ["env", "PYTHONPATH=/opt/ringbar", "python3", "-m", waiting_side.__name__, str(CLUSTER), waits]
        self.process: subprocess.Popen[str] = vm.popen(
            shlex.join(words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.waits = self._line().strip()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            _, problem = self.process.communicate(timeout=START_SECONDS)
            raise Error(f"the program in the VM failed: {problem.strip().splitlines()[-1:]}", code="bench-failed")
        return line

    def tell(self, *words: Any) -> None:
        """Let it do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """What came of it."""
        return json.loads(self._line())

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            self.process.communicate(timeout=30)
        if self.process.poll() is None:
            self.process.kill()


def _ticks(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))


@contextlib.contextmanager
def _attached(vm: Any, interrupts: bool) -> Iterator[tuple[_Program, Any, Any]]:
    """The VM's program, and the host's ends."""
    import ringbar
    from ringbar.host.service import Host

    host, name = Host(), f"qmp:{vm.qmp}"
    (attached,) = host.attach(name, [f"{CLUSTER}@0"], [f"{CLUSTER}@1"], interrupts=interrupts).attachments
    with contextlib.ExitStack() as stack:
        stack.callback(host.detach, name, [], force=True)
        cluster = stack.enter_context(ringbar.Cluster.attach(CLUSTER))
        tx = stack.enter_context(cluster.open_queue(0, "tx"))
        rx = stack.enter_context(cluster.open_queue(1, "rx"))
        program = _Program(vm, "bell" if interrupts else "polling")
        stack.callback(program.close)
        if attached.interrupts != interrupts or program.waits != ("bell" if interrupts else "polling"):
            raise Error(f"the VM waits by {program.waits}: {attached.polls}", code="bench-failed")
        yield program, rx, tx


def _strategy(
    name: str, busy: bool, parts: tuple[_Program, Any, Any], pid: int, trips: int, seconds: float
) -> list[Waited]:
    program, rx, tx = parts
    program.tell("echo", busy, trips)
    to_guest = waiting_side.trips(rx, tx, trips, GAP)
    program.answer()
    program.tell("trips", trips, GAP)
    waiting_side.echo(rx, tx, busy, trips)
    to_host = program.answer()
    used = _ticks(pid)
    begin = time.monotonic()
    program.tell("idle", busy, seconds)
    guest_idle = program.answer()
    share = (_ticks(pid) - used) / (time.monotonic() - begin)
    host_idle = waiting_side.idle(rx, busy, seconds)
    return [
        Waited(name, "VM", [t / 1e3 for t in to_guest], guest_idle, share),
        Waited(name, "host", [t / 1e3 for t in to_host], host_idle, 0.0),
    ]


def measure(*, trips: int, seconds: float, progress: Callable[[str], None]) -> tuple[list[Waited], str]:
    """All strategies, one after the other in the same VM. :return: what was measured, and the accelerator."""
    import ringbar
    from ringbar.host.service import Host
    from ringbar.qemu import launch

    source = Path(str(ringbar.__file__)).parent
    share = {"/opt/ringbar/ringbar": source, "/opt/ringbar/ringbar/guest": Path(os.path.realpath(source / "guest"))}
    host = Host()
    found: list[Waited] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(private())
        progress("booting a VM with a virtual IOMMU")
        vm = stack.enter_context(launch.Guest.start(
            "waits", machine="q35", pref64_reserve="1G", share=share, extra=IOMMU, append="intel_iommu=on"))
        vm.wait_up()
        host.create_cluster(CLUSTER, progress=progress)
        stack.callback(lambda: host.destroy_cluster(CLUSTER, force=True))
        host.create_queues(CLUSTER, count=2, slots=1024)
        with _attached(vm, False) as parts:
            for name, busy in (("busy", True), ("adaptive", False)):
                progress(f"measuring: {name}")
                found += _strategy(name, busy, parts, vm.pid, trips, seconds)
        with _attached(vm, True) as parts:
            progress("measuring: interrupts")
            found += _strategy("interrupts", False, parts, vm.pid, trips, seconds)
        return found, str(vm.accelerator)


def table(rows: list[Waited]) -> str:
    """For people."""
    lines = [f"{'':<12}{'waits':>6}{'median us':>11}{'p99 us':>10}{'idle':>9}{'QEMU idle':>11}"]
    for row in rows:
        d = row.as_dict()
        qemu = f"{d['qemu_share']:.1%}" if row.side == "VM" else "-"
        lines.append(f"{row.strategy:<12}{row.side:>6}{d['median_us']:>11,.0f}{d['p99_us']:>10,.0f}"
                     f"{d['idle_share']:>9.1%}{qemu:>11}")
    return "\n".join(lines)
