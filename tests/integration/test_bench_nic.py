# SPDX-License-Identifier: Apache-2.0
"""``ringbar bench nic``: every row is measured and compared; how fast, the benchmark itself is for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="making network interfaces needs root"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="source and receiver need a core each"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]


def test_every_device_is_measured_against_its_peers(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ringbar", "bench", "nic", "--runs", "1", "--seconds", "0.05", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == ["receive", "transmit", "forward", "inject", "bypass"]
    for name in ("receive", "transmit", "forward"):
        assert rows[name]["mode"] == ("generic" if name == "transmit" else "driver")
        assert rows[name]["ratio_to_bare_af_xdp"] > 0 and rows[name]["ratio_to_tpacket_v3"] > 0
    assert all(row["mpps"] > 0 for row in rows.values())
    assert {"live frames", "TAP", "veth"} <= set(rows["inject"]["methods"])
    assert rows["bypass"]["ns_without_program"] > 0
    assert {"accelerator", "cores", "kernel", "commit", "command"} <= set(document)
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"rbbench{os.getpid()}" not in spaces
