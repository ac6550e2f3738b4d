# SPDX-License-Identifier: Apache-2.0
"""The difference between a topology and what is there, as steps in the order in which they can be taken.

Pure: it looks at nothing but its arguments. The least change: what fits stays, and its packets flow on; what cannot
be changed in place is made anew; what belongs to nobody or to another file is used where it fits, and never removed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ringbar import address
from ringbar.host.clusters import BURST, USUAL_BUFFERS
from ringbar.host.topology.owned import Owned
from ringbar.host.topology.schema import ClusterPart, QueuePart, Topology, WorkerPart

End = tuple[str, str]
"""A queue's address, and ``rx`` or ``tx`` as the VM sees it."""


@dataclass
class QueueNow:
    """A queue as it is."""

    slots: int
    credit: int
    direct: bool
    filter: str | None = None


@dataclass
class ClusterNow:
    """A cluster as it is."""

    size: int
    pages: str
    buffers: int
    queues: dict[int, QueueNow] = field(default_factory=dict)


@dataclass
class Now:
    """What is there: clusters, the names of living workers, and what VMs hold (with their pool's mode by cluster)."""

    clusters: dict[int, ClusterNow] = field(default_factory=dict)
    workers: set[str] = field(default_factory=set)
    ends: dict[str, set[End]] = field(default_factory=dict)
    pools: dict[tuple[str, int], str] = field(default_factory=dict)


@dataclass
class Step:
    """One thing to do.

    :ivar do: ``worker-stop``, ``detach``, ``queue-destroy``, ``cluster-destroy``, ``cluster-create``,
        ``queue-create``, ``queue-filter``, ``attach``, ``worker-start``, ``worker-set``, ``forget``.
    :ivar subject: the cluster, queue, VM or worker.
    :ivar text: for people.
    """

    do: str
    subject: str
    text: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Plan:
    """The steps; ``conflicts`` says what cannot be, with the place in the file it is about."""

    steps: list[Step] = field(default_factory=list)
    conflicts: list[tuple[tuple[Any, ...], str]] = field(default_factory=list)


def spec(worker: WorkerPart) -> dict[str, Any]:
    """What a worker is started with, as plain data."""
    return worker.model_dump(by_alias=True, exclude_defaults=True) | {"kind": worker.kind}


def credit_of(queue: QueuePart) -> int:
    """The credit that a queue of these settings has."""
    return queue.credit or queue.slots + 2 * BURST


def buffers_of(cluster: ClusterPart) -> int:
    """How many buffers the queues of a cluster may lend, and its servers hold."""
    return sum(credit_of(queue) for _, queue in cluster.each_queue()) + 3 * BURST


_CHANGEABLE = {"out", "policy", "filter"}
_CHANGED_WHILE_RUNNING = ("balance", "fanout")


class _Planner:
    def __init__(self, wanted: Topology, now: Now, owned: Owned, others: list[Owned], vm: Callable[[str], str]) -> None:
        self.wanted, self.now, self.owned, self.others = wanted, now, owned, others
        self.plan = Plan()
        self.vms = {vm(name): part for name, part in wanted.vms.items()}
        self.names = {vm(name): name for name in wanted.vms}
        self.queues = {f"{c}@{q}": part for c, cluster in wanted.clusters.items() for q, part in cluster.each_queue()}
        self.gone_clusters: set[int] = set()
        self.gone_queues: set[str] = set()
        self.detached: set[tuple[str, str]] = set()  # VM and queue: both its ends are taken away

    def of_another(self, kind: str, subject: Any) -> str | None:
        """Which other topology owns it."""
        return next((o.name for o in self.others if subject in getattr(o, kind)), None)

    def conflict(self, where: tuple[Any, ...], what: str) -> None:
        self.plan.conflicts.append((where, what))

    def step(self, do: str, subject: Any, text: str, **details: Any) -> None:
        self.plan.steps.append(Step(do, str(subject), text, details))

    # ---- what does not fit

    def look_at_clusters(self) -> None:
        for number, part in self.wanted.clusters.items():
            have = self.now.clusters.get(number)
            if have is None:
                continue
            need = part.buffers if part.buffers != "auto" else buffers_of(part)
            why = ""
            if have.size != part.size:
                why = f"its buffers have {have.size} bytes, not {part.size}"
            elif part.pages not in ("auto", have.pages):
                why = f"its pages are {have.pages}, not {part.pages}"
            elif have.buffers < need:
                why = f"it has {have.buffers} buffers, and {need} are needed"
            if why and number in self.owned.clusters:
                self.gone_clusters.add(number)
            elif why:
                whose = self.of_another("clusters", number)
                maker = f"topology {whose} made it" if whose else "it was made by hand"
                self.conflict(("clusters", number), f"cluster {number} is there, {maker}, and {why}")
        for number in self.owned.clusters:
            if number in self.now.clusters and number not in self.wanted.clusters:
                self.gone_clusters.add(number)

    def look_at_queues(self) -> None:
        for name, part in self.queues.items():
            where = address.parse_queue(name)
            cluster = self.now.clusters.get(where.cluster)
            have = cluster.queues.get(where.queue) if cluster else None
            if have is None or where.cluster in self.gone_clusters:
                continue
            if (have.slots, have.credit, have.direct) == (part.slots, credit_of(part), part.direct):
                continue
            if name in self.owned.queues:
                self.gone_queues.add(name)
                continue
            whose = self.of_another("queues", name)
            maker = f"topology {whose} made it" if whose else "it was made by hand"
            self.conflict(
                ("clusters", where.cluster, "queues", where.queue),
                f"{name} is there, {maker}, with {have.slots} slots and credit {have.credit}"
                f"{', direct' if have.direct else ''}",
            )
        for name in self.owned.queues:
            where = address.parse_queue(name)
            there = where.cluster in self.now.clusters and where.queue in self.now.clusters[where.cluster].queues
            if there and name not in self.queues and where.cluster not in self.gone_clusters:
                self.gone_queues.add(name)

    def goes(self, queue: str) -> bool:
        """Is the queue removed, or made anew?"""
        return queue in self.gone_queues or address.parse_queue(queue).cluster in self.gone_clusters

    def touches_what_goes(self, worker: dict[str, Any]) -> bool:
        texts = [*worker["in"], *(d for group in worker["out"] for d in group)]
        devices = [d for text in texts for d in address.parse_devices(text)]
        return any(isinstance(d, address.QueueAddress) and self.goes(str(d)) for d in devices)

    # ---- steps

    def stop_workers(self) -> dict[str, str]:
        """Steps that end workers; returns what is to be done later: start or set."""
        later: dict[str, str] = {}
        for name, had in sorted(self.owned.workers.items()):
            part = self.wanted.workers.get(name)
            alive = name in self.now.workers
            if part is None:
                self.step("worker-stop", name, f"stop worker {name}", forget=True)
            elif not alive:
                later[name] = "start"
            elif spec(part) == had and not self.touches_what_goes(had):
                continue
            elif self.only_changed(spec(part), had) and not self.touches_what_goes(had):
                later[name] = "set"
            else:
                self.step("worker-stop", name, f"stop worker {name}, which is started anew", forget=False)
                later[name] = "start"
        for name in self.wanted.workers:
            if name in self.owned.workers:
                continue
            if name in self.now.workers:
                whose = self.of_another("workers", name)
                maker = f"topology {whose} started it" if whose else "it was started by hand"
                self.conflict(("workers", name), f"there is a worker {name}, and {maker}")
            later[name] = "start"
        return later

    @staticmethod
    def only_changed(part: dict[str, Any], had: dict[str, Any]) -> bool:
        if part["kind"] != had["kind"] or part["kind"] not in _CHANGED_WHILE_RUNNING:
            return False
        different = {k for k in part.keys() | had.keys() if part.get(k) != had.get(k)}
        return different <= _CHANGEABLE and not ("policy" in different and "policy" not in part)

    def replugged(self, vm: str) -> set[int]:
        """Clusters whose pool a VM has in another mode than the file says."""
        part = self.vms.get(vm)
        if part is None or part.pool is None:
            return set()
        clusters = {address.parse_queue(queue).cluster for queue, _ in part.ends()}
        return {c for c in clusters if self.now.pools.get((vm, c), part.pool) != part.pool}

    def detach(self) -> None:
        for vm, ends in sorted(self.owned.ends.items()):
            part = self.vms.get(vm)
            keep = part.ends() if part else set()
            held = self.now.ends.get(vm, set())
            drop = {e for e in ends & held if e not in keep or self.goes(e[0])}
            if drop:
                self.detached |= {(vm, queue) for queue, _ in drop}
                names = ", ".join(sorted({queue for queue, _ in drop}))
                self.step("detach", vm, f"detach {names} from {vm}", queues=sorted({queue for queue, _ in drop}))
            stale = {e for e in ends - held if e not in keep}
            if stale:
                self.step("forget", vm, f"forget what {vm} had", ends=sorted(stale))

    def remove(self) -> None:
        for name in sorted(self.gone_queues):
            why = ", which is made anew" if name in self.queues else ""
            self.step("queue-destroy", name, f"destroy queue {name}{why}")
        for number in sorted(self.gone_clusters):
            why = ", which is made anew" if number in self.wanted.clusters else ""
            self.step("cluster-destroy", number, f"destroy cluster {number}{why}")
        for name in sorted(self.owned.queues - self.gone_queues):
            where = address.parse_queue(name)
            there = where.cluster in self.now.clusters and where.queue in self.now.clusters[where.cluster].queues
            if name not in self.queues and (not there or where.cluster in self.gone_clusters):
                self.step("forget", name, f"forget queue {name}, which is gone", queue=name)
        for number in sorted(self.owned.clusters - self.gone_clusters):
            if number not in self.wanted.clusters:
                self.step("forget", number, f"forget cluster {number}, which is gone", cluster=number)

    def create(self) -> None:
        for number, part in sorted(self.wanted.clusters.items()):
            have = None if number in self.gone_clusters else self.now.clusters.get(number)
            if have is None:
                need = buffers_of(part)
                buffers = part.buffers if part.buffers != "auto" else max(USUAL_BUFFERS, 1 << (need - 1).bit_length())
                how = f"{buffers:,} buffers of {part.size:,} bytes"
                if part.buffers == "auto":
                    how += f" (its queues may lend {need - 3 * BURST:,})"
                details = part.model_dump(include={"size", "pages", "numa", "label"})
                self.step("cluster-create", number, f"make cluster {number}: {how}", buffers=buffers, **details)
            for queue, wanted in part.each_queue():
                name = f"{number}@{queue}"
                there = have.queues.get(queue) if have and name not in self.gone_queues else None
                if there is None:
                    text = f"make queue {name}: {wanted.slots} slots, credit {credit_of(wanted)}"
                    text += ", direct" if wanted.direct else ""
                    details = {"slots": wanted.slots, "credit": credit_of(wanted), "direct": wanted.direct}
                    self.step("queue-create", name, text, **details)
                self.filter(name, there, wanted.filter)

    def filter(self, name: str, there: QueueNow | None, wanted: str | None) -> None:
        have = there.filter if there else None
        if have == wanted:
            return
        if there is None or name in self.owned.queues:
            text = f"filter {name}: {wanted}" if wanted else f"remove the filter of {name}"
            self.step("queue-filter", name, text, filter=wanted)
        elif wanted is not None:  # of somebody else's the file says nothing where it names none
            where = address.parse_queue(name)
            has = f"with filter '{have}'" if have else "without a filter"
            self.conflict(("clusters", where.cluster, "queues", where.queue), f"{name} is not this file's, and {has}")

    def attach(self) -> None:
        for vm, part in sorted(self.vms.items()):
            replug = self.replugged(vm)
            held = {e for e in self.now.ends.get(vm, set()) if not self.goes(e[0]) and (vm, e[0]) not in self.detached}
            missing = part.ends() - held
            if missing or replug:
                rx = sorted(q for q, way in (part.ends() if replug else missing) if way == "rx")
                tx = sorted(q for q, way in (part.ends() if replug else missing) if way == "tx")
                words = [f"receive {', '.join(rx)}"] * bool(rx) + [f"send {', '.join(tx)}"] * bool(tx)
                anew = ", plugged in anew with pool " + str(part.pool) if replug else ""
                self.step(
                    "attach",
                    vm,
                    f"attach {vm}, to {' and '.join(words)}{anew}",
                    name=self.names[vm],
                    rx=rx,
                    tx=tx,
                    pool=part.pool,
                    replug=bool(replug),
                    own=sorted(missing | (self.owned.ends.get(vm, set()) & part.ends())),
                )

    def start_workers(self, later: dict[str, str]) -> None:
        for name, what in sorted(later.items()):
            part = self.wanted.workers[name]
            if what == "start":
                self.step("worker-start", name, f"start worker {name}: {describe(part)}", worker=spec(part))
                continue
            had, new = self.owned.workers[name], spec(part)
            changes = {k: new.get(k) for k in sorted(_CHANGEABLE) if new.get(k) != had.get(k)}
            text = f"change worker {name}: {', '.join(changes)}"
            self.step("worker-set", name, text, worker=new, changes=changes)


def describe(worker: WorkerPart) -> str:
    """A worker for people: ``balance zc:eth1 → 99@0,99@1 99@2``."""
    outputs = " ".join(",".join(group) for group in worker.outputs)
    return f"{worker.kind} {','.join(worker.inputs)} → {outputs}"


def plan(wanted: Topology, now: Now, owned: Owned, others: list[Owned], vm: Callable[[str], str] = str) -> Plan:
    """What has to be done.

    :param owned: what an earlier apply of this file made.
    :param others: what other files own.
    :param vm: gives the name by which ``now`` knows a VM that the file names.
    """
    p = _Planner(wanted, now, owned, others, vm)
    p.look_at_clusters()
    p.look_at_queues()
    later = p.stop_workers()
    p.detach()
    p.remove()
    p.create()
    p.attach()
    p.start_workers(later)
    return p.plan
