# SPDX-License-Identifier: Apache-2.0
"""Packets from one VM to another, through a direct lane or relayed by the host: ``ringbar bench vm``."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ringbar.errors import Error
from ringbar.host.bench import programs
from ringbar.host.bench.consumer import private

CLUSTER = 1
PUMP = "/opt/ringbar/pump"
START_SECONDS = 60.0

# In a guest: opens the plugged memory and becomes the pump, which inherits the descriptors.
_RUN = """
import os, sys
sys.path.insert(0, "/opt/ringbar/python")
from ringbar import guest
words = []
for device in guest.find():
    s = guest.open_segment(device, writable=True)
    os.set_inheritable(s.fd, True)
    words.append(f"{os.path.realpath(f'/proc/self/fd/{s.fd}')}:{s.offset}:{s.size}")
os.environ["LD_LIBRARY_PATH"] = "/opt/ringbar"
os.execv(sys.argv[1], [*sys.argv[1:], *words])
"""


@dataclass
class Measured:
    """What was measured.

    :ivar mpps: million packets a second, a number for each run.
    :ivar bound: what limits it, for people.
    """

    mpps: list[float]
    accelerator: str
    bound: str
    detail: dict[str, Any] = field(default_factory=dict)


def _package(directory: Path) -> Path:
    """What a guest needs of the Python package: its standard-library part."""
    import ringbar

    source, target = Path(str(ringbar.__file__)).parent, directory / "python" / "ringbar"
    target.mkdir(parents=True)
    for name in ("__init__.py", "errors.py"):
        shutil.copy(source / name, target / name)
    shutil.copytree(os.path.realpath(source / "guest"), target / "guest", ignore=shutil.ignore_patterns("__pycache__"))
    return directory / "python"


def measure(
    *, direct: bool, burst: int, touch: int, runs: int, seconds: float, progress: Callable[[str], None]
) -> Measured:
    """Boot two VMs, give one the sending end of a queue and the other the receiving one, and pump.

    :raises Error: a VM does not come up, or packets arrive that are not what was sent.
    """
    from ringbar.host.service import Host
    from ringbar.qemu import launch

    host = Host()
    with contextlib.ExitStack() as stack:
        stack.enter_context(private())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ringbar-bench-")))
        share = {
            PUMP: programs.build(directory, "pump.c", linked=True),
            "/opt/ringbar/python": _package(directory),
            "/opt/ringbar/libringbar.so.0": programs.library(),
        }
        progress("booting two VMs")
        one, two = stack.enter_context(launch.pair(share=share))
        host.create_cluster(CLUSTER, progress=progress)
        stack.callback(lambda: host.destroy_cluster(CLUSTER, force=True))
        sent = f"{CLUSTER}@0"
        received = sent if direct else f"{CLUSTER}@1"
        host.create_queues(CLUSTER, count=1 if direct else 2, slots=1024, direct=direct)
        for vm, rx, tx in ((one, [], [sent]), (two, [received], [])):
            name = f"qmp:{vm.qmp}"
            host.attach(name, rx, tx, pool="rw" if tx else None, progress=progress)
            stack.callback(host.detach, name, [], force=True)
        if not direct:
            stack.enter_context(_relay())
        progress(f"measuring {runs} runs of {seconds:g} s")
        mpps = _pump(one, two, sent, received, burst, touch, runs, seconds)
        bound = (
            "the two guests' processors"
            if direct
            else "one host thread that validates every descriptor, and shares the processors with two guests"
        )
        return Measured(mpps, one.accelerator, bound, {"bound": bound, "slots": 1024, "guests": 2})


@contextlib.contextmanager
def _relay() -> Iterator[None]:
    """A C thread of the host that takes every descriptor from one VM and lends it to the other."""
    import ringbar

    with ringbar.Cluster.attach(CLUSTER) as cluster:
        with cluster.open_queue(0, "rx") as rx, cluster.open_queue(1, "tx") as tx, ringbar.Bridge(rx, tx):
            yield


def _pump(
    one: Any, two: Any, sent: str, received: str, burst: int, touch: int, runs: int, seconds: float
) -> list[float]:
    """All runs in one opening of both ends: million packets a second at the receiver, for each."""
    whole = (runs + 1) * seconds

    def start(vm: Any, mode: str, queue: str, length: float) -> subprocess.Popen[str]:
        words = ["python3", "-c", _RUN, PUMP, mode, queue, str(burst), str(touch), f"{length:g}", str(runs)]
        process: subprocess.Popen[str] = vm.popen(
            shlex.join(words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        return process

    receiver = start(two, "rx", received, seconds)
    sender: subprocess.Popen[str] | None = None
    try:
        _ready(receiver, "receiver")
        sender = start(one, "tx", sent, whole + 5.0)
        _ready(sender, "sender")
        said, problem = receiver.communicate(timeout=START_SECONDS + whole)
    except subprocess.TimeoutExpired:
        raise Error("the guests did not finish", code="bench-failed") from None
    finally:
        for process in (receiver, sender):
            if process is not None and process.poll() is None:
                process.kill()
                process.communicate()
    results = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    if len(results) != runs:
        raise Error(f"the receiver failed: {problem.strip() or said.strip()}", code="bench-failed")
    wrong = results[-1]["wrong"]
    if wrong or not all(r["packets"] for r in results):
        counts = ", ".join(str(r["packets"]) for r in results)
        raise Error(f"{counts} packets arrived, {wrong} of them not what was sent", code="bench-failed")
    return [r["packets"] / r["seconds"] / 1e6 for r in results]


def _ready(process: subprocess.Popen[str], who: str) -> None:
    stdout: IO[str] | None = process.stdout
    assert stdout is not None
    if stdout.readline() != "ready\n":
        _, problem = process.communicate(timeout=START_SECONDS)
        raise Error(f"the {who} did not start: {problem.strip()}", code="bench-failed")
