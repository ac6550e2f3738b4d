# SPDX-License-Identifier: Apache-2.0
"""What the agent costs: ``ringbar bench agent``.

An agent of its own, many VMs that were started with ``-S`` and next to no memory, and one VM that runs: how long an
attach takes the agent itself, when the guest has its queue, how long a status of 1,000 queues takes, and what the
agent uses while nothing happens.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ringbar.errors import Error
from ringbar.host import guests
from ringbar.host.agent import socket_path
from ringbar.host.agent.client import AgentHost, reachable
from ringbar.host.bench.consumer import private

Progress = Callable[[str], None]

QUEUES = 1000
START_SECONDS = 60.0
TICKS = os.sysconf("SC_CLK_TCK")

# In the guest: prints when it has a queue that was not there when it began.
WAITER = """
import time, ringbar
print("waiting", flush=True)
with ringbar.Cluster.attach(1, timeout=None) as zc, zc.open_queue(0, "rx"):
    print(time.clock_gettime(time.CLOCK_MONOTONIC), flush=True)
"""


@contextlib.contextmanager
def running() -> Iterator[subprocess.Popen[bytes]]:
    """An agent, on the registry that the environment names."""
    log = tempfile.TemporaryFile()
    agent = subprocess.Popen([sys.executable, "-m", "ringbar", "agent"], cwd="/", stderr=log)
    try:
        until = time.monotonic() + START_SECONDS
        while not (socket_path().exists() and reachable(socket_path())):
            if agent.poll() is not None or time.monotonic() > until:
                log.seek(0)
                said = log.read().decode(errors="replace").strip()
                raise Error(f"the agent did not start: {said}", code="bench-failed")
            time.sleep(0.02)
        yield agent
    finally:
        agent.terminate()
        agent.wait()
        log.close()


@contextlib.contextmanager
def sleepers(count: int) -> Iterator[list[str]]:
    """VMs that were started with ``-S``: their monitors."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise Error("qemu-system-x86_64 is not installed", code="not-installed", cure="apt-get install qemu-system-x86")
    started = []
    with tempfile.TemporaryDirectory(prefix="ringbar-bench-") as directory:
        try:
            for number in range(count):
                path = Path(directory, f"{number}.qmp")
                words = "-M pc -accel tcg -m 8 -S -nodefaults -no-user-config -display none "
                words += f"-qmp unix:{path},server=on,wait=off"
                started.append((subprocess.Popen([qemu, *words.split()], stderr=subprocess.DEVNULL), path))
            until = time.monotonic() + START_SECONDS
            while not all(path.exists() for _, path in started):
                if time.monotonic() > until:
                    raise Error("QEMU did not start", code="bench-failed")
                time.sleep(0.02)
            yield [f"qmp:{path}" for _, path in started]
        finally:
            for process, _ in started:
                process.kill()
            for process, _ in started:
                process.wait()


def row(name: str, text: str, figures: list[float], unit: str, at_most: float) -> dict[str, Any]:
    """One figure: the median, and what it shall not exceed."""
    value = statistics.median(figures)
    return {
        "name": name,
        "what": text,
        "value": round(value, 2),
        "unit": unit,
        "at_most": at_most,
        "reached": value <= at_most,
        "runs": [round(figure, 2) for figure in figures],
    }


def measure(runs: int, vms: int, idle: float, progress: Progress) -> list[dict[str, Any]]:
    """All figures.

    :param runs: of each, but what the agent uses while idle.
    :param vms: how many are attached then.
    :param idle: seconds for which it is looked at.
    """
    with private(), running() as agent:
        host = AgentHost(socket_path())
        host.create_cluster(1, buffers=65536)
        host.create_queues(1, count=1 + vms, slots=64)
        try:
            return [
                *_attaching(host, runs, progress),
                _status(host, runs, progress),
                *_idling(host, agent.pid, vms, idle, progress),
            ]
        finally:
            host.destroy_cluster(1, force=True)


def _attaching(host: AgentHost, runs: int, progress: Progress) -> list[dict[str, Any]]:
    from ringbar.qemu.launch import Guest

    own, sees = [], []
    progress("booting a VM")
    with Guest.start("bench", share=guests.package()) as guest:
        guest.wait_up()
        name = f"qmp:{guest.qmp}"
        for run in range(runs):
            progress(f"attaching: {run + 1} of {runs}")
            waiter = guest.popen(["python3", "-c", WAITER], stdout=subprocess.PIPE, text=True)
            try:
                assert waiter.stdout is not None
                if waiter.stdout.readline() != "waiting\n":
                    raise Error("the program in the VM did not start", code="bench-failed")
                took = host.attach(name, ["1@0"], []).took
                assert took is not None
                own.append(took.own)
                had = float(waiter.stdout.readline())
            finally:
                waiter.kill()
                waiter.communicate()
            sees.append(had - _kernel_saw(guest.ssh("dmesg").stdout))
            host.detach(name, [])
        accelerator = guest.accelerator
    return [
        row("attach-own", "attach to a running VM: the agent's own share", own, "ms", 50),
        row(
            "guest-sees",
            f"from the guest kernel's hot-plug event to an open queue ({accelerator})",
            [1e3 * figure for figure in sees],
            "ms",
            1000,
        ),
    ]


def _kernel_saw(messages: str) -> float:
    """When the guest's kernel saw the last device of ours come, in seconds since its boot."""
    found = re.findall(r"^\[ *([0-9.]+)\] pci \S+: \[1af4:1110\]", messages, re.MULTILINE)
    if not found:
        raise Error("the guest's kernel says nothing of the device", code="bench-failed")
    return float(found[-1])


def _status(host: AgentHost, runs: int, progress: Progress) -> dict[str, Any]:
    host.create_cluster(2, buffers=65536)
    try:
        host.create_queues(2, count=QUEUES, slots=16, credit=16)
        took = []
        for run in range(runs):
            progress(f"status of {QUEUES} queues: {run + 1} of {runs}")
            began = time.monotonic()
            subprocess.run(
                [sys.executable, "-m", "ringbar", "status", "2", "--json"],
                cwd="/",
                stdout=subprocess.DEVNULL,
                check=True,
            )
            took.append(1e3 * (time.monotonic() - began))
    finally:
        host.destroy_cluster(2)
    return row("status-1000", f"ringbar status --json of {QUEUES:,} queues, rates included", took, "ms", 200)


def _idling(host: AgentHost, pid: int, vms: int, seconds: float, progress: Progress) -> list[dict[str, Any]]:
    with sleepers(vms) as names:
        for number, name in enumerate(names, 1):
            progress(f"attaching to {number} of {vms} VMs")
            host.attach(name, [f"1@{number}"], [])
        progress(f"looking at the idle agent for {seconds:g} s")
        time.sleep(1)  # what the last attach left to do
        before = _cpu(pid)
        time.sleep(seconds)
        used = 100 * (_cpu(pid) - before) / seconds
        resident = _resident(pid)
    for name in names:  # they have ended: one that was started with -S does not let go
        host.detach(name, [])
    return [
        row("idle-cpu", f"of a core, idle, with {vms} VMs attached, over {seconds:g} s", [used], "%", 1),
        row("idle-memory", f"resident, with {vms} VMs attached", [resident], "MiB", 80),
    ]


def _cpu(pid: int) -> float:
    """Seconds of processor time of a process, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _resident(pid: int) -> float:
    """MiB of a process in memory."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0
