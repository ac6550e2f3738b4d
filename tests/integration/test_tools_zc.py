# SPDX-License-Identifier: Apache-2.0
"""A tool that takes a NIC and makes the cluster for its consumers."""

from __future__ import annotations

import json
import os
import signal

import pytest
from nets import Net
from nets import net as net  # a fixture

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making network interfaces needs root")


@pytest.mark.parametrize("tool", ["balance", "fanout"])
def test_a_tool_makes_its_cluster_and_says_what_each_consumer_would_type(net: Net, tool: str) -> None:
    running = net.start(tool, "-i", "zc:rba0", "-c", "7", "-n", "2,1", "--slots", "1024", "--json")
    assert running.stderr is not None
    said = [running.stderr.readline().strip() for _ in range(5)]
    typed = [f"ringbar count -i 7@{q}" for q in range(3)]
    assert said == ["application 1:", *typed[:2], "application 2:", typed[2]]
    made = net.json("cluster", "show", "7")
    assert made["cluster"]["persistent"] is False and [q["slots"] for q in made["queues"]] == [1024] * 3
    refused = net.json("balance", "-i", "zc:rbb0", "-c", "7", "-n", "1", status=1)["error"]
    assert refused["code"] == "cluster-exists"
    net.json("send", "-o", "zc:rba1", "--packets", "600", "--flows", "20", "--rate", "20k")
    # What they would type, as typed:
    first, second = (net.json(*line.split()[1:], "--packets", "1", "--seconds", "30") for line in typed[:2])
    assert first["packets"] == second["packets"] == 1
    running.send_signal(signal.SIGINT)
    document, _ = running.communicate(timeout=30)
    outputs = [port["packets"] for port in json.loads(document)["outputs"]]
    assert outputs[0] + outputs[1] == outputs[2] == 600
    assert net.json("cluster", "list")["clusters"] == []  # it lived with the tool
