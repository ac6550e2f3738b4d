# SPDX-License-Identifier: Apache-2.0
"""``ringbar bench agent``: every figure is measured; how good they are, the benchmark itself is for."""

from __future__ import annotations

import pytest
from tinyguest import why_not
from vmtools import Shell

pytest.importorskip("fastapi")

pytestmark = [pytest.mark.vm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


def test_the_agent_is_measured(shell: Shell) -> None:
    document = shell.json("bench", "agent", "--runs", "1", "--vms", "2", "--seconds", "1", timeout=300)
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == ["attach-own", "guest-sees", "status-1000", "idle-cpu", "idle-memory"]
    assert all(row["value"] > 0 for name, row in rows.items() if name != "idle-cpu")
    assert all(row["reached"] is (row["value"] <= row["at_most"]) for row in rows.values())
    assert {"accelerator", "cores", "kernel", "commit", "command"} <= set(document)
    assert shell.json("cluster", "list")["clusters"] == []
