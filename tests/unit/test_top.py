# SPDX-License-Identifier: Apache-2.0
"""What ``ringbar top`` draws, of states made up here; and its keys, on a terminal of a test's own."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ringbar.cli import main
from ringbar.host import model, top


def queue(number: int, **fields: Any) -> model.Queue:
    usual: dict[str, Any] = {
        "slots": 100,
        "credit": 228,
        "direct": False,
        "paused": False,
        "producer": None,
        "consumer": None,
        "waiting": 0,
        "lent": 0,
        "held": 0,
        "granted": 0,
        "quarantined": 0,
        "packets": 0,
        "bytes": 0,
        "copied": 0,
        "foreign": 0,
        "drops": {"full": 0, "filter": 0},
        "received_packets": 0,
        "received_bytes": 0,
        "stalled": False,
    }
    return model.Queue(address=f"99@{number}", id=number, **{**usual, **fields})


def cluster(*queues: model.Queue) -> model.ClusterStatus:
    made = model.Cluster(
        id=99, label="ids", lives="until destroyed", persistent=True, owner_pid=0, buffer_size=2048, buffers=1000,
        free=0, pages="4k", pools=1, lanes=1, queues=len(queues), sealed=False, guest=False, generation=1, created_ns=0,
    )  # fmt: skip
    book = model.Book(
        id=0, pid=7, name="lb", home=0, free=0, lent=500, devices=0, quiescing=0, shared=0, quarantined=0
    )
    return model.ClusterStatus(made, list(queues), [book])


def worker(name: str, outputs: dict[str, int], **fields: Any) -> dict[str, Any]:
    port = {"state": "open", "bytes": 0, "drops": {"full": 0}}
    return {
        "name": name,
        "kind": "balancer",
        "policy": "ip",
        "pid": 7,
        "core": None,
        "alive": True,
        "stats": {"paused": False, "busy": 0.5},
        "inputs": [{**port, "address": "zc:eth1", "packets": sum(outputs.values())}],
        "outputs": [{**port, "address": a, "packets": n, "group": i} for i, (a, n) in enumerate(outputs.items())],
        **fields,
    }


def drawn(before: top.Snapshot, now: top.Snapshot, **view: Any) -> str:
    return "\n".join(top.frame(before, now, top.View(**view)))


def snapshots(
    first: list[model.Queue], second: list[model.Queue], workers: tuple[list[Any], list[Any]] = ([], [])
) -> tuple[top.Snapshot, top.Snapshot]:
    """Two looks, two seconds apart."""
    return (
        top.Snapshot(10.0, model.Status([cluster(*first)]), workers[0]),
        top.Snapshot(12.0, model.Status([cluster(*second)]), workers[1]),
    )


def test_rates_are_differences_by_time_and_levels_are_of_now() -> None:
    said = drawn(
        *snapshots(
            [queue(0, packets=1000, drops={"full": 10})],
            [queue(0, packets=3000, waiting=50, drops={"full": 30}, consumer=model.End(pid=812, name="zeek"))],
        )
    )
    line = next(line for line in said.splitlines() if "99@0" in line)
    assert "1.00k/s" in line and "[█████·····]  50 %" in line
    assert "nobody → zeek (pid 812)" in line
    assert "drops 10/s (full 30)" in said or line.endswith("…")
    assert "lent [█████·····]  50 %" in said
    assert "queues 1.00k packets/s, drops 10/s" in said


def test_a_workers_outputs_hang_below_it_with_their_queues() -> None:
    looks = snapshots(
        [queue(0), queue(1), queue(2)],
        [queue(0, waiting=100), queue(1), queue(2)],
        ([worker("lb", {"99@0": 100, "99@1": 0})], [worker("lb", {"99@0": 300, "99@1": 20})]),
    )
    lines = drawn(*looks).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("lb "))
    assert "balancer ip" in lines[at] and "busy 50 %" in lines[at]
    assert "zc:eth1" in lines[at + 1] and "110/s" in lines[at + 1]
    assert "→ 1: 99@0" in lines[at + 2] and "100/s" in lines[at + 2] and "100 %" in lines[at + 2]
    assert "→ 2: 99@1" in lines[at + 3] and "10/s" in lines[at + 3]
    alone = [line for line in lines if line.startswith("  99@")]
    assert [line.split()[0] for line in alone] == ["99@2"]  # the others are drawn already
    assert "NICs and files" in lines


def test_a_dead_worker_is_called_so_and_its_queues_are_their_clusters_again() -> None:
    looks = snapshots([queue(0)], [queue(0)], ([], [worker("lb", {"99@0": 1}, alive=False)]))
    said = drawn(*looks)
    assert "lb  balancer ip  dead" in said
    assert "0 workers (and 1 dead)" in said
    assert any(line.startswith("  99@0") for line in said.splitlines())


def test_nics_are_shown_with_who_has_them_and_what_is_taken() -> None:
    before, now = snapshots([queue(0)], [queue(0)])
    now.status.clusters[0].devices = [
        model.Device("zc:eth1", 812, "lb", "zero-copy", "software", receives=True, rule="not port 22")
    ]
    assert "zc:eth1              zero-copy  lb (pid 812)  takes not port 22" in drawn(before, now)


def test_vms_are_shown_with_what_they_hold() -> None:
    before, now = snapshots([queue(0)], [queue(0)])
    bindings = [model.Binding("99@0", "rx", open=True), model.Binding("99@1", "tx")]
    now.status.vms = [model.Attachment("ids1", 99, "ready", "own", "its own", bindings)]
    said = drawn(before, now)
    assert "ids1  ready  receives 99@0  sends 99@1 (not open)  pool own" in said


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("plain", [False, True])
def test_no_line_is_wider_than_the_terminal(width: int, plain: bool) -> None:
    long = model.End(pid=4194304, name="x" * 31, vm="qmp:/run/" + "y" * 90)
    queues = [queue(n, waiting=n, consumer=long, drops={"full": 10**15}) for n in range(50)]
    looks = snapshots(queues, queues, ([], [worker("w" * 31, {f"99@{n}": n for n in range(20)})]))
    lines = top.frame(*looks, top.View(width=width, plain=plain))
    assert max(map(len, lines)) <= width
    assert not plain or "".join(lines).isascii()


def test_a_frame_fits_and_scrolls_no_further_than_its_end() -> None:
    queues = [queue(n) for n in range(50)]
    view = top.View(height=20, scroll=1000)
    looks = snapshots(queues, queues)
    lines = top.frame(*looks, view)
    assert len(lines) <= 20 and "99@49" in "\n".join(lines)
    view.scroll = 0
    lines = top.frame(*looks, view)
    assert len(lines) == 20 and "more" in lines[-1]


@pytest.mark.parametrize(("sort", "order"), [("address", "012"), ("rate", "120"), ("fill", "201"), ("drops", "102")])
def test_queues_are_sorted_as_wanted(sort: str, order: str) -> None:
    before = [queue(n, drops={"full": 0}) for n in range(3)]
    now = [
        queue(0, packets=1, waiting=20, drops={"full": 10}),
        queue(1, packets=9, waiting=10, drops={"full": 20}),
        queue(2, packets=5, waiting=30),
    ]
    lines = drawn(*snapshots(before, now), sort=sort).splitlines()
    assert "".join(line.split()[0][-1] for line in lines if line.startswith("  99@")) == order


def test_without_a_terminal_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top"]) == 2
    assert "ringbar top --once" in capsys.readouterr().err


def test_on_a_terminal_it_draws_obeys_keys_and_leaves_it_as_it_was(core: Any, private_directories: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-m", "ringbar", "top", "--interval", "0.2"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=private_directories,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(slave)
    said = ""
    try:

        def until(text: str) -> None:
            nonlocal said
            deadline = time.monotonic() + 60
            while text not in said:
                assert time.monotonic() < deadline, said
                if select.select([master], [], [], 1)[0]:
                    said += os.read(master, 65536).decode(errors="replace")

        until("sort: address")
        os.write(master, b"s")
        until("sort: rate")
        os.write(master, b" ")
        until("standing still")
        os.write(master, b"q")
        until("\x1b[?1049l")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
