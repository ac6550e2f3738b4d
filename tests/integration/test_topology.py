# SPDX-License-Identifier: Apache-2.0
"""plan and apply, for real: clusters, queues, filters and workers, packets that flow on, and steps that fail."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import Shell
from .test_agent import Agent

pytest.importorskip("pydantic")

FILE = """\
ringbar: 1
name: line
clusters:
  61:
    queues:
      0-1: {slots: 256}
      2: {slots: 256, filter: udp}
workers:
  back: {kind: bridge, in: 61@0, out: 61@1}
"""


@pytest.fixture
def file(rb: Shell) -> Iterator[Callable[[str], str]]:
    def write(text: str) -> str:
        path = rb.root / "line.yaml"
        path.write_text(text)
        return str(path)

    yield write
    for worker in rb.json("worker", "list")["workers"]:
        rb.run("worker", "stop", worker["name"])


def test_apply_makes_it_so_and_a_second_time_changes_nothing(rb: Shell, file: Callable[[str], str]) -> None:
    path = file(FILE)
    rb("plan", path, "--check", status=3)
    assert rb.json("cluster", "list") == {"clusters": []}, "plan changed something"
    done = rb.json("apply", path)
    assert (done["result"], done["name"]) == ("changed", "line")
    assert [s["do"] for s in done["steps"]] == [
        "cluster-create",
        "queue-create",
        "queue-create",
        "queue-create",
        "queue-filter",
        "worker-start",
    ]
    assert rb.json("apply", path)["result"] == "unchanged"
    rb("plan", path, "--check", status=0)
    # No more than a queue has slots: how fast the machine is decides nothing.
    counting = rb.start("count", "-i", "61@1", "--packets", "200", "--json")
    rb("send", "-o", "61@0", "--packets", "200", "--rate", "20k", "--quiet")
    assert json.loads(counting.communicate(timeout=30)[0])["packets"] == 200


def test_what_stays_goes_on_while_the_rest_changes(rb: Shell, file: Callable[[str], str]) -> None:
    rb("apply", file(FILE))
    pid = rb.json("worker", "show", "back")["worker"]["pid"]
    changed = FILE.replace("2: {slots: 256, filter: udp}", "2: {slots: 512}\n      3: {slots: 64}")
    done = rb.json("apply", file(changed))
    assert [(s["do"], s["subject"]) for s in done["steps"]] == [
        ("queue-destroy", "61@2"),
        ("queue-create", "61@2"),
        ("queue-create", "61@3"),
    ]
    assert rb.json("worker", "show", "back")["worker"]["pid"] == pid


def test_only_what_the_file_owns_is_removed(rb: Shell, file: Callable[[str], str]) -> None:
    rb("cluster", "create", "62", "--queues", "1")
    rb("apply", file(FILE))
    rb("queue", "create", "61")  # by hand: 61@3
    kept = FILE.replace("workers:\n  back: {kind: bridge, in: 61@0, out: 61@1}\n", "").replace(
        "      2: {slots: 256, filter: udp}\n", ""
    )
    rb("apply", file(kept))
    assert rb.json("worker", "list")["workers"] == []
    status = {c["cluster"]["id"]: [q["id"] for q in c["queues"]] for c in rb.json("status")["clusters"]}
    assert status == {61: [0, 1, 3], 62: [0]}
    rb("apply", file("ringbar: 1\nname: line\n"))
    assert [c["id"] for c in rb.json("cluster", "list")["clusters"]] == [62]


def test_what_was_made_by_hand_and_does_not_fit_is_a_conflict_with_its_line(
    rb: Shell, file: Callable[[str], str]
) -> None:
    rb("cluster", "create", "61", "--size", "4096")
    refused = rb.run("apply", file(FILE))
    assert refused.returncode == 1
    assert "line.yaml:4: " in refused.stderr
    assert "it was made by hand, and its buffers have 4096 bytes, not 2048" in refused.stderr
    assert rb.json("cluster", "list")["clusters"][0]["queues"] == 0


def test_a_step_that_fails_leaves_what_the_next_apply_goes_on_from(rb: Shell, file: Callable[[str], str]) -> None:
    bad = FILE.replace("out: 61@1", "out: zc:nowhere0")
    refused = rb.run("apply", file(bad))
    assert refused.returncode == 1
    assert "start worker back" in refused.stderr
    assert "5 of 6 steps were taken" in refused.stderr
    assert [s["do"] for s in rb.json("plan", file(bad))["steps"]] == ["worker-start"]
    assert [s["do"] for s in rb.json("apply", file(FILE))["steps"]] == ["worker-start"]


def test_a_worker_that_was_killed_is_started_again(rb: Shell, file: Callable[[str], str]) -> None:
    import os
    import signal

    path = file(FILE)
    rb("apply", path)
    os.kill(rb.json("worker", "show", "back")["worker"]["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 30
    while rb.json("plan", path)["result"] == "unchanged":
        assert time.monotonic() < deadline
    assert [s["do"] for s in rb.json("apply", path)["steps"]] == ["worker-start"]


def test_rollback_needs_the_agent_and_comes_unless_confirmed(rb: Shell, file: Callable[[str], str]) -> None:
    path = file(FILE)
    assert "needs the agent" in rb.run("apply", path, "--rollback-after", "5").stderr
    Agent(rb)
    rb("apply", path)
    smaller = file(FILE.replace("      2: {slots: 256, filter: udp}\n", ""))
    rb("apply", smaller, "--rollback-after", "0.2")
    deadline = time.monotonic() + 30
    while "rolled-back" not in [e["kind"] for e in rb.json("events")["events"]]:
        assert time.monotonic() < deadline
    assert rb.json("plan", file(FILE))["result"] == "unchanged"
    rb(
        "apply",
        file(smaller_text := FILE.replace("      2: {slots: 256, filter: udp}\n", "")),
        "--rollback-after",
        "60",
    )
    rb("apply", file(smaller_text))  # confirms
    assert rb.json("plan", file(smaller_text))["result"] == "unchanged"


def test_the_agent_applies_what_lies_in_its_directory(rb: Shell, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("ringbar: 1\nname: broken\nclusters: 5\n")
    (tmp_path / "b.yaml").write_text(FILE.replace("workers:\n  back: {kind: bridge, in: 61@0, out: 61@1}\n", ""))
    rb.environment["RINGBAR_TOPOLOGIES"] = str(tmp_path)
    Agent(rb)
    kinds = [e["kind"] for e in rb.json("events")["events"]]
    assert kinds == ["apply-failed", "applied", "agent-started"]
    assert [c["id"] for c in rb.json("cluster", "list")["clusters"]] == [61]
