# SPDX-License-Identifier: Apache-2.0
"""Looking at what is there, and taking the steps of a plan.

What fails midway leaves a state that the next plan describes, and the next apply mends.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ringbar import address
from ringbar.cli import control
from ringbar.errors import BadAddress, Busy, Error, NotFound
from ringbar.host.topology import owned as ownership
from ringbar.host.topology.owned import Owned
from ringbar.host.topology.plan import ClusterNow, Now, Plan, QueueNow, Step, plan
from ringbar.host.topology.schema import Source

if TYPE_CHECKING:
    from ringbar.host.service import Host

Progress = Callable[[str], None]

START_TIMEOUT = 60.0
"""Seconds that a worker may take to open its devices."""


def vm_name(text: str) -> str:
    """The name by which attachments are kept."""
    vm = address.parse_vm(text)
    return f"qmp:{os.path.abspath(vm.value)}" if vm.kind == "qmp" else text


def look(host: Host) -> Now:
    """What is there now."""
    status = host.status()
    now = Now(workers={name for name in control.names() if control.alive(name)})
    for found in status.clusters:
        info = found.cluster
        queues = {q.id: QueueNow(q.slots, q.credit, q.direct, q.filter) for q in found.queues}
        now.clusters[info.id] = ClusterNow(info.buffer_size, info.pages or "4k", info.buffers, queues)
    for vm in status.vms:
        now.pools[vm.vm, vm.cluster] = vm.pool
        now.ends.setdefault(vm.vm, set()).update((b.queue, b.direction) for b in vm.bindings)
    return now


def make_plan(host: Host, source: Source) -> tuple[Plan, Owned]:
    """The plan for a file, and what it owns.

    :raises Error: the file asks for what cannot be; names the line.
    """
    mine = ownership.load(source.topology.name)
    made = plan(source.topology, look(host), mine, ownership.others(source.topology.name), vm_name)
    if made.conflicts:
        where, what = made.conflicts[0]
        error = source.error(where, what)
        more = len(made.conflicts) - 1
        cure = "remove it, or change the file" + (f"; {more} more conflict{'s' * (more > 1)}" if more else "")
        raise Error(error.message, code="conflict", cure=cure)
    return made, mine


def take(host: Host, steps: list[Step], mine: Owned, progress: Progress) -> None:
    """Take the steps, in order.

    :raises Error: of the first that fails; what was done before it stays, and is remembered.
    """
    for done, step in enumerate(steps):
        progress(f"{step.text} ({done + 1} of {len(steps)})")
        try:
            _take(host, step, mine, progress)
        except Error as e:
            told = f"{step.text}: {e.message}"
            if done:
                told += f"; {done} of {len(steps)} steps were taken, and apply again goes on from there"
            if isinstance(e, Busy):
                raise Busy(told, holder=e.holder, code=e.code, cure=e.cure) from None
            kind = type(e) if type(e) in (NotFound, BadAddress) else Error
            raise kind(told, code=e.code, cure=e.cure) from None


def _take(host: Host, step: Step, mine: Owned, progress: Progress) -> None:
    d = step.details
    if step.do == "cluster-create":
        mine.clusters.add(int(step.subject))
        ownership.save(mine)
        host.create_cluster(int(step.subject), progress=progress, **d)
    elif step.do == "queue-create":
        where = address.parse_queue(step.subject)
        mine.queues.add(step.subject)
        ownership.save(mine)
        host.create_queues(where.cluster, number=where.queue, progress=progress, **d)
    elif step.do == "queue-filter":
        host.set_queue(step.subject, expression=d["filter"] or "none")
    elif step.do == "attach":
        mine.ends[step.subject] = {(queue, way) for queue, way in d["own"]}
        ownership.save(mine)
        host.attach(d["name"], d["rx"], d["tx"], pool=d["pool"], replug=d["replug"], later=True, progress=progress)
    elif step.do == "worker-start":
        mine.workers[step.subject] = d["worker"]
        ownership.save(mine)
        start_worker(step.subject, d["worker"])
    elif step.do == "worker-set":
        fields = {k: v if v is not None else "none" for k, v in d["changes"].items()}
        control.ask(step.subject, "set", **fields)
        mine.workers[step.subject] = d["worker"]
    elif step.do == "worker-stop":
        with contextlib.suppress(NotFound):
            control.ask(step.subject, "stop")
        if d["forget"]:
            mine.workers.pop(step.subject, None)
    elif step.do == "detach":
        host.detach(step.subject, d["queues"], progress=progress)
        left = {e for e in mine.ends.get(step.subject, set()) if e[0] not in d["queues"]}
        mine.ends[step.subject] = left
    elif step.do == "queue-destroy":
        host.destroy_queue(step.subject)
        mine.queues.discard(step.subject)
    elif step.do == "cluster-destroy":
        host.destroy_cluster(int(step.subject), progress=progress)
        mine.clusters.discard(int(step.subject))
        mine.queues -= {q for q in mine.queues if address.parse_queue(q).cluster == int(step.subject)}
    elif step.do == "forget":
        mine.queues.discard(d.get("queue", ""))
        mine.clusters.discard(d.get("cluster", -1))
        if "ends" in d:
            mine.ends[step.subject] = mine.ends.get(step.subject, set()) - {(q, way) for q, way in d["ends"]}
    ownership.save(mine)


def command(name: str, worker: dict[str, Any]) -> list[str]:
    """The command line that starts a worker."""
    words = [worker["kind"]]
    groups = worker["out"]
    if worker["kind"] == "bridge":
        for device, group in zip(worker["in"], groups):
            words += ["-i", device, "-o", ",".join(group)]
    else:
        words += ["-i", ",".join(worker["in"])]
        flat = [device for group in groups for device in group]
        for group in [flat] if worker["kind"] == "replicate" else groups:
            words += ["-o", ",".join(group)]
    for option in ("policy", "filter", "steer", "by", "core", "idle"):
        if worker.get(option) is not None:
            words.append(f"--{option}={worker[option]}")  # one word: whatever it begins with, it is the value
    if worker.get("take_all"):
        words.append("--take-all")
    return [*words, "--background", "--name", name, "--json"]


def start_worker(name: str, worker: dict[str, Any]) -> None:
    """Start a worker in a process of its own, which neither this one's end nor its restart touches.

    :raises Error: what it said.
    """
    words = [sys.executable, "-m", "ringbar", *command(name, worker)]
    try:
        done = subprocess.run(words, cwd="/", capture_output=True, text=True, timeout=START_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise Error(f"worker {name} did not start in {START_TIMEOUT:g} s", code="not-finished") from None
    if done.returncode == 0:
        return
    try:
        said = json.loads(done.stdout)["error"]
    except (ValueError, KeyError, TypeError):
        said = {"message": done.stderr.strip() or f"worker {name} did not start", "code": "died", "cure": None}
    raise Error(said["message"], code=said["code"], cure=said["cure"])
