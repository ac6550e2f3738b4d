# SPDX-License-Identifier: Apache-2.0
"""Topologies: from any state to any topology in one apply, a second changes nothing, nothing of others is removed."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("pydantic")

from hypothesis import given, settings
from hypothesis import strategies as st

from ringbar import address
from ringbar.host.topology.owned import Owned
from ringbar.host.topology.plan import ClusterNow, Now, Plan, QueueNow, Step, plan
from ringbar.host.topology.schema import Topology

CLUSTERS = (1, 2)
QUEUES = (0, 1, 2)
VMS = ("vm1", "vm2")
WORKERS = ("w1", "w2")
ADDRESSES = [f"{c}@{q}" for c in CLUSTERS for q in QUEUES]


def take(step: Step, now: Now, mine: Owned) -> None:
    """What the real steps do to the world, or an assertion where the world would refuse."""
    d = step.details
    if step.do == "cluster-create":
        assert int(step.subject) not in now.clusters
        now.clusters[int(step.subject)] = ClusterNow(
            d["size"], "4k" if d["pages"] == "auto" else d["pages"], d["buffers"]
        )
        mine.clusters.add(int(step.subject))
    elif step.do == "cluster-destroy":
        number = int(step.subject)
        assert not any(address.parse_queue(q).cluster == number for ends in now.ends.values() for q, _ in ends)
        del now.clusters[number]
        mine.clusters.discard(number)
        mine.queues = {q for q in mine.queues if address.parse_queue(q).cluster != number}
    elif step.do == "queue-create":
        where = address.parse_queue(step.subject)
        assert where.queue not in now.clusters[where.cluster].queues
        now.clusters[where.cluster].queues[where.queue] = QueueNow(d["slots"], d["credit"], d["direct"])
        mine.queues.add(step.subject)
    elif step.do == "queue-destroy":
        where = address.parse_queue(step.subject)
        assert not any(q == step.subject for ends in now.ends.values() for q, _ in ends), "an end is held"
        del now.clusters[where.cluster].queues[where.queue]
        mine.queues.discard(step.subject)
    elif step.do == "queue-filter":
        where = address.parse_queue(step.subject)
        now.clusters[where.cluster].queues[where.queue].filter = d["filter"]
    elif step.do == "attach":
        new = {(q, "rx") for q in d["rx"]} | {(q, "tx") for q in d["tx"]}
        for queue, _ in new:
            where = address.parse_queue(queue)
            assert where.queue in now.clusters[where.cluster].queues
        now.ends.setdefault(step.subject, set()).update(new)
        mine.ends[step.subject] = set(map(tuple, d["own"]))
        if d["pool"]:
            for queue, _ in new:
                now.pools[step.subject, address.parse_queue(queue).cluster] = d["pool"]
    elif step.do == "detach":
        now.ends[step.subject] = {e for e in now.ends[step.subject] if e[0] not in d["queues"]}
        mine.ends[step.subject] = {e for e in mine.ends[step.subject] if e[0] not in d["queues"]}
    elif step.do == "worker-start":
        assert step.subject not in now.workers
        now.workers.add(step.subject)
        mine.workers[step.subject] = d["worker"]
    elif step.do == "worker-set":
        assert step.subject in now.workers
        mine.workers[step.subject] = d["worker"]
    elif step.do == "worker-stop":
        now.workers.discard(step.subject)
        if d["forget"]:
            mine.workers.pop(step.subject, None)
    else:
        assert step.do == "forget"
        mine.queues.discard(d.get("queue", ""))
        mine.clusters.discard(d.get("cluster", -1))
        if "ends" in d:
            mine.ends[step.subject] -= set(map(tuple, d["ends"]))


@st.composite
def topologies(draw: Any, name: str = "mine") -> Topology:
    clusters: dict[Any, Any] = {}
    for number in draw(st.sets(st.sampled_from(CLUSTERS))):
        queues = {
            q: {
                "slots": draw(st.sampled_from([64, 128])),
                "filter": draw(st.sampled_from([None, "udp"])),
            }
            for q in draw(st.sets(st.sampled_from(QUEUES)))
        }
        clusters[number] = {"size": draw(st.sampled_from([1024, 2048])), "queues": queues}
    there = [f"{c}@{q}" for c, part in clusters.items() for q in part["queues"]]
    vms: dict[str, Any] = {}
    for vm in draw(st.sets(st.sampled_from(VMS))) if there else ():
        part: dict[str, Any] = {way: sorted(draw(st.sets(st.sampled_from(there), max_size=2))) for way in ("rx", "tx")}
        if part["rx"] or part["tx"]:
            vms[vm] = {**part, "pool": draw(st.sampled_from([None, "rw"]))}
    workers = {
        w: {
            "kind": draw(st.sampled_from(["balance", "bridge"])),
            "in": draw(st.sampled_from([*there, "eth0"])),
            "out": [[draw(st.sampled_from([*there, "eth1"]))]],
            "policy": draw(st.sampled_from([None, "ip"])),
        }
        for w in draw(st.sets(st.sampled_from(WORKERS)))
    }
    return Topology.model_validate({"ringbar": 1, "name": name, "clusters": clusters, "vms": vms, "workers": workers})


def go(wanted: Topology, now: Now, mine: Owned, others: list[Owned]) -> Plan:
    made = plan(wanted, now, mine, others)
    if not made.conflicts:
        for step in made.steps:
            take(step, now, mine)
    return made


def settled(wanted: Topology, now: Now) -> None:
    """The world is as the file says."""
    for number, part in wanted.clusters.items():
        assert now.clusters[number].size == part.size
        for index, queue in part.each_queue():
            have = now.clusters[number].queues[index]
            assert (have.slots, have.direct, have.filter) == (queue.slots, queue.direct, queue.filter)
    for vm, vm_part in wanted.vms.items():
        assert vm_part.ends() <= now.ends[vm]
    assert set(wanted.workers) <= now.workers


@settings(max_examples=400, deadline=None)
@given(st.lists(topologies(), min_size=1, max_size=4))
def test_each_apply_settles_and_a_second_changes_nothing(files: list[Topology]) -> None:
    now, mine = Now(), Owned("mine")
    for wanted in files:
        assert not go(wanted, now, mine, []).conflicts
        settled(wanted, now)
        assert go(wanted, now, mine, []).steps == []
    empty = Topology.model_validate({"ringbar": 1, "name": "mine"})
    go(empty, now, mine, [])
    assert mine.empty()
    assert (now.clusters, now.workers, {e for ends in now.ends.values() for e in ends}) == ({}, set(), set())


@settings(max_examples=300, deadline=None)
@given(topologies(), topologies(), st.data())
def test_an_apply_that_stopped_anywhere_is_mended_by_the_next(first: Topology, second: Topology, data: Any) -> None:
    now, mine = Now(), Owned("mine")
    go(first, now, mine, [])
    steps = plan(second, now, mine, []).steps
    for step in steps[: data.draw(st.integers(0, len(steps)))]:
        take(step, now, mine)
    assert not go(second, now, mine, []).conflicts
    settled(second, now)
    assert go(second, now, mine, []).steps == []


@settings(max_examples=300, deadline=None)
@given(topologies("theirs"), st.lists(topologies(), min_size=1, max_size=3))
def test_nothing_of_another_file_is_removed_or_changed(theirs: Topology, files: list[Topology]) -> None:
    now, other = Now(), Owned("theirs")
    go(theirs, now, other, [])
    mine = Owned("mine")
    for wanted in files:
        before = copy.deepcopy(now)
        made = go(wanted, now, mine, [other])
        if made.conflicts:
            assert now == before
        for number, cluster in before.clusters.items():
            if number in other.clusters:
                assert now.clusters[number].size == cluster.size
                for index, queue in cluster.queues.items():
                    if f"{number}@{index}" in other.queues:
                        assert now.clusters[number].queues[index] == queue
        assert set(other.workers) <= now.workers


def test_what_stays_is_not_touched_when_one_queue_changes() -> None:
    def file(slots: int) -> Topology:
        return Topology.model_validate(
            {
                "ringbar": 1,
                "name": "mine",
                "clusters": {1: {"queues": {0: {"slots": 64}, 1: {"slots": slots}}}},
                "vms": {"vm1": {"rx": "1@0"}, "vm2": {"rx": "1@1"}},
                "workers": {"w1": {"kind": "bridge", "in": "eth0", "out": "1@0"}},
            }
        )

    now, mine = Now(), Owned("mine")
    go(file(64), now, mine, [])
    steps = plan(file(128), now, mine, []).steps
    assert [(s.do, s.subject) for s in steps] == [
        ("detach", "vm2"),
        ("queue-destroy", "1@1"),
        ("queue-create", "1@1"),
        ("attach", "vm2"),
    ]
