# SPDX-License-Identifier: Apache-2.0
"""``ringbar bench workers``: every row is measured and compared; how fast, the benchmark itself is for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ringbar.host.bench.dpdk import PeerFailed
from ringbar.host.bench.workers import parse_distributor


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="the worker and its source need a core each")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_workers_are_measured_by_outputs_and_buffers(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ringbar", *"bench workers --no-peers --runs 1 --seconds 0.02 --json".split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    rows = {row["name"]: row for row in document["rows"]}
    assert {"balancer-5tuple-4", "fanout-8", "outputs-2", "outputs-64", "buffers-4096", "buffers-1048576"} <= set(rows)
    assert all(row["cycles"] > 0 and row["mpps"] > 0 for row in rows.values())
    assert rows["balancer-5tuple-4"]["dpdk_distributor"] == {"missing": "left out"}
    assert "same process" in rows["fanout-8"]["consumers"]
    assert rows["fanout-8"]["bare_descriptor_ns"] > 0
    assert {rows["flat-outputs"]["dearest"], rows["flat-buffers"]["dearest"]} <= set(rows)
    assert {"accelerator", "cores", "kernel", "commit", "command"} <= set(document)


def test_the_distributor_s_figure_is_that_of_the_burst_mode() -> None:
    text = """\
==== Cache line switch test ===
Ticks per iteration = 310
=== Performance test of distributor (single mode) ===
Time per burst:  6000
Time per packet: 187
=== Performance test of distributor (burst mode) ===
Time per burst:  4032
Time per packet: 126
"""
    assert parse_distributor(text) == 126
    with pytest.raises(PeerFailed, match="no time per packet"):
        parse_distributor(text.partition("=== Performance test of distributor (burst")[0])
