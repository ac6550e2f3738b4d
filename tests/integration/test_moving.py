# SPDX-License-Identifier: Apache-2.0
"""The tools that pass packets on, as processes: everything adds up."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Shell

PACKETS = 20_000


def end(process: subprocess.Popen[str]) -> Any:
    """Ctrl-C; the document."""
    process.send_signal(signal.SIGINT)
    said, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(said)


def finish(process: subprocess.Popen[str], status: int = 0) -> Any:
    said, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    return json.loads(said)


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def waiting(rb: Shell, cluster: int) -> int:
    """Packets unread in any queue."""
    return sum(q["waiting"] for q in rb.json("status", str(cluster), "--sample", "0")["clusters"][0]["queues"])


def roomy(rb: Shell) -> None:
    """Cluster 9 with four queues: room for a tool that stands still for a second on a busy machine."""
    rb("cluster", "create", "9", "--queues", "4", "--slots", "16384")


def test_balanced_packets_add_up_over_three_consumers(rb: Shell) -> None:
    roomy(rb)
    counts = [rb.start("count", "-i", f"9@{q}", "--verify", "--partial", "--json") for q in (1, 2, 3)]
    lb = rb.start("balance", "-i", "9@0", "-o", "9@1-3", "--packets", str(PACKETS), "--json")
    rb("send", "-o", "9@0", "--packets", str(PACKETS), "--flows", "97", "--rate", "20k")
    balanced = finish(lb)
    until(lambda: waiting(rb, 9) == 0)
    received = [end(process) for process in counts]
    each = [one["received"]["packets"] for one in received]
    assert sum(each) == PACKETS and all(each)
    assert [port["packets"] for port in balanced["outputs"]] == each
    assert (balanced["packets"], balanced["dropped"]) == (PACKETS, 0)
    for one in received:  # every flow has one consumer, so what comes to it is in order
        verify = one["verify"]
        assert {name: verify[name] for name in ("reordered", "duplicated", "corrupted", "foreign")} == dict.fromkeys(
            ("reordered", "duplicated", "corrupted", "foreign"), 0
        )


@pytest.mark.parametrize("tool", ["balance", "fanout"])
def test_two_applications_each_get_everything_balanced_inside(rb: Shell, tool: str) -> None:
    roomy(rb)
    counts = [rb.start("count", "-i", f"9@{q}", "--verify", "--partial", "--json") for q in (1, 2, 3)]
    fan = rb.start(tool, "-i", "9@0", "-o", "9@1,9@2", "-o", "9@3", "--packets", str(PACKETS), "--json")
    rb("send", "-o", "9@0", "--packets", str(PACKETS), "--flows", "53", "--rate", "20k")
    said = finish(fan)
    until(lambda: waiting(rb, 9) == 0)
    received = [end(process) for process in counts]
    first, second, third = (one["received"]["packets"] for one in received)
    assert first + second == PACKETS and first and second
    assert third == PACKETS
    assert [port["application"] for port in said["outputs"]] == [1, 1, 2]
    assert said["dropped"] == 0
    for one in received:
        assert {name: n for name, n in one["verify"].items() if name != "latency_ns" and n} == {}


@pytest.mark.parametrize("tool", ["fanout", "replicate"])
def test_each_output_gets_every_packet_and_a_dead_one_costs_only_itself(rb: Shell, tool: str) -> None:
    rb("cluster", "create", "9", "--queues", "4", "--slots", "16384")
    counts = [rb.start("count", "-i", f"9@{q}", "--verify", "--json") for q in (1, 2)]
    killed = rb.start("count", "-i", "9@3")
    fan = rb.start(tool, "-i", "9@0", "-o", "9@1,9@2,9@3", "--json")
    rb("send", "-o", "9@0", "--packets", "2k", "--rate", "20k")
    killed.kill()
    looped = rb.json("send", "-o", "9@0", "--packets", "2k", "--rate", "20k", "--stream", "1")
    assert looped["sent"]["packets"] == 2000
    until(lambda: all(q["waiting"] == 0 for q in queues(rb) if q["address"] in ("9@0", "9@1", "9@2")))
    said = end(fan)
    assert [port["packets"] for port in said["outputs"][:2]] == [4000, 4000]
    for process in counts:
        process.send_signal(signal.SIGINT)
        one = finish(process)
        assert (one["received"]["packets"], one["verify"]["lost"], one["verify"]["foreign"]) == (2000, 0, 2000)
    left = rb.json("count", "-i", "9@3", "--seconds", "0.5")
    assert left["packets"] >= 2000 - 256  # what the killed one held in its hand is gone with it
    assert rb.json("count", "-i", "9@0", "--seconds", "0.1")["packets"] == 0  # whoever comes next gives all of it back
    until(lambda: all(q["lent"] == 0 for q in queues(rb)))


def queues(rb: Shell) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = rb.json("status", "9", "--sample", "0")["clusters"][0]["queues"]
    return found


def test_a_tool_makes_its_cluster_and_says_what_each_consumer_would_type(rb: Shell) -> None:
    rb("cluster", "create", "8", "--buffers", "16384")
    refused = rb.run("balance", "-i", "rbnone0", "-c", "8", "-n", "2", "--json")
    assert json.loads(refused.stdout)["error"]["code"] == "cluster-exists"
    assert [c["id"] for c in rb.json("cluster", "list")["clusters"]] == [8]  # what failed left nothing


def test_merged_packets_come_in_order_of_time(rb: Shell) -> None:
    roomy(rb)
    counting = rb.start("count", "-i", "9@3", "--verify", "--packets", str(PACKETS), "--json", "--seconds", "50")
    merge = rb.start("merge", "-i", "9@1,9@2", "-o", "9@3", "--wait", "2s", "--packets", str(PACKETS), "--json")
    split = rb.start("balance", "-i", "9@0", "-o", "9@1,9@2", "-m", "rr", "--json")
    rb("send", "-o", "9@0", "--packets", str(PACKETS), "--rate", "20k")
    verify = finish(counting)["verify"]
    assert {name: verify[name] for name in ("lost", "reordered", "duplicated", "corrupted")} == {
        "lost": 0,
        "reordered": 0,
        "duplicated": 0,
        "corrupted": 0,
    }
    merged = finish(merge)
    assert [port["packets"] for port in merged["inputs"]] == [PACKETS // 2] * 2
    end(split)


def test_delayed_packets_are_that_late(rb: Shell) -> None:
    rb("cluster", "create", "9", "--queues", "2", "--buffers", "65536")
    delay = rb.start("delay", "-i", "9@0", "-o", "9@1", "--by", "50ms", "--json")
    looped = rb.json("send", "-o", "9@0", "-i", "9@1", "--packets", "2k", "--rate", "20k")
    assert looped["verify"]["lost"] == 0
    assert looped["verify"]["latency_ns"]["min"] >= 45e6  # counted from the beginning of the burst it was made in
    assert end(delay)["packets"] == 2000


def test_packets_pass_every_stage_of_a_pipeline(rb: Shell) -> None:
    rb("cluster", "create", "9", "--queues", "4", "--buffers", "65536")
    stages = ["-i", "9@0", "-o", "9@1", "-i", "9@1", "-o", "9@2", "-i", "9@2", "-o", "9@3"]
    pipeline = rb.start("pipeline", *stages, "--json", "--packets", str(PACKETS))
    looped = rb.json("send", "-o", "9@0", "-i", "9@3", "--window", "512", "--packets", str(PACKETS))
    assert looped["verify"]["lost"] == 0
    assert [stage["packets"] for stage in finish(pipeline)["stages"]] == [PACKETS] * 3


def test_a_filter_takes_what_matches_and_counts_the_rest(rb: Shell) -> None:
    rb("cluster", "create", "9", "--queues", "2", "--buffers", "16384")
    bridge = rb.start("bridge", "-i", "9@0", "-o", "9@1", "--filter", "udp src port 1024", "--json")
    rb("send", "-o", "9@0", "--packets", "3000", "--flows", "3")
    until(lambda: waiting(rb, 9) == 1000)
    said = end(bridge)
    assert (said["outputs"][0]["packets"], said["drops"]["filter"]) == (1000, 2000)
    bad = rb.json("bridge", "-i", "9@0", "-o", "9@1", "--filter", "udp port port", status=1)["error"]
    assert "udp port port" in bad["message"]


def test_a_full_output_drops_and_does_not_hold_up_the_others(rb: Shell) -> None:
    rb("cluster", "create", "9", "--queues", "3", "--slots", "256", "--buffers", "16384")
    counting = rb.start("count", "-i", "9@2", "--json")
    lb = rb.start("balance", "-i", "9@0", "-o", "9@1,9@2", "-m", "rr", "--packets", "4000", "--json")
    rb("send", "-o", "9@0", "--packets", "4000", "--rate", "40k")  # nobody reads 9@1
    said = finish(lb)
    dead, alive = said["outputs"]
    assert dead["packets"] + dead["drops"]["full"] + dead["drops"]["credit"] == alive["packets"] == 2000
    until(lambda: waiting(rb, 9) == dead["packets"])
    assert end(counting)["packets"] == 2000


@pytest.mark.parametrize("flows", ["1", "50"])
def test_outputs_policy_and_filter_change_while_running_and_nothing_is_lost(rb: Shell, flows: str) -> None:
    roomy(rb)
    counts = [rb.start("count", "-i", f"9@{q}", "--json") for q in (1, 2, 3)]
    rb("balance", "-i", "9@0", "-o", "9@1", "--background", "--name", "lb")
    sending = rb.start("send", "-o", "9@0", "--packets", "40k", "--rate", "15k", "--flows", flows, "--json")
    for words in ("-o 9@1,9@2", "--policy rr", "-o 9@1,9@2,9@3", "--filter udp", "-o 9@3,9@1"):
        change = words.split()
        assert rb.json("worker", "set", "lb", *change)["result"] == "changed"
        assert rb.json("worker", "set", "lb", *change)["result"] == "unchanged"
    refused = rb.json("worker", "set", "lb", "-o", "9@9", status=1)["error"]
    assert "9@9" in refused["message"]
    assert rb.json("worker", "set", "lb", "--policy", "nonsense", status=1)["error"]["message"]
    settings = rb.json("worker", "show", "lb")["worker"]["settings"]
    assert (settings["out"], settings["policy"], settings["filter"]) == ([["9@3", "9@1"]], "rr", "udp")
    assert finish(sending)["sent"]["packets"] == 40_000
    until(lambda: waiting(rb, 9) == 0)
    stopped = rb.json("worker", "stop", "lb")["worker"]["summary"]
    assert stopped["packets"] == 40_000
    assert {reason: n for reason, n in stopped["drops"].items() if n} == {}
    assert sum(end(process)["packets"] for process in counts) == 40_000


def test_a_rate_is_held_within_one_percent(rb: Shell) -> None:
    rb("cluster", "create", "9", "--queues", "1", "--buffers", "16384")
    counting = rb.start("count", "-i", "9@0", "--json")
    for rate, name, asked in (("10k", "pps", 10_000), ("20Mbit/s", "bps", 20e6)):
        sent = rb.json("send", "-o", "9@0", "--rate", rate, "--seconds", "2", "--size", "imix")["sent"]
        assert sent[f"asked_{name}"] == asked
        assert sent[name] == pytest.approx(asked, rel=0.01)
    end(counting)


def test_frames_of_a_capture_file_are_sent_in_turn_at_a_rate(rb: Shell) -> None:
    scapy = pytest.importorskip("scapy.all")
    frames = [scapy.Ether() / scapy.IP(dst=f"10.0.0.{n}") / scapy.UDP() / (b"x" * n) for n in range(1, 11)]
    file = rb.root / "ten.pcap"
    scapy.wrpcap(str(file), frames)
    rb("cluster", "create", "9", "--queues", "1", "--buffers", "16384")
    sent = rb.json("send", "-o", "9@0", "--pcap", str(file), "--packets", "25", "--rate", "1k")["sent"]
    octets = sum(len(bytes(frames[i % 10])) for i in range(25))
    assert (sent["packets"], sent["bytes"]) == (25, octets)
    assert rb.json("send", "-o", "9@0", "--pcap", "/nowhere/x.pcap", "--packets", "1", status=1)["error"]["message"]
    assert rb.json("count", "-i", "9@0", "--packets", "25", "--seconds", "30")["bytes"] == octets


def test_frames_of_hexadecimal_digits_are_sent_in_turn(rb: Shell) -> None:
    rb("cluster", "create", "9", "--queues", "1", "--buffers", "16384")
    frames = rb.root / "frames.txt"
    frames.write_text(f"# two\n{'00 11 ' * 10}\n{'ff:' * 29}ff\n", encoding="ascii")
    sent = rb.json("send", "-o", "9@0", "--hex", str(frames), "--packets", "3")["sent"]
    assert (sent["packets"], sent["bytes"]) == (3, 20 + 30 + 20)
    said = rb.json("count", "-i", "9@0", "--packets", "3", "--seconds", "30")
    assert (said["packets"], said["bytes"]) == (3, 70)


def test_on_a_terminal_a_table_is_redrawn_and_ctrl_c_ends_with_the_summary(rb: Shell) -> None:
    rb("cluster", "create", "9", "--queues", "3", "--buffers", "65536")
    master, slave = pty.openpty()
    tool = subprocess.Popen(
        [sys.executable, "-m", "ringbar", "balance", "-i", "9@0", "-o", "9@1,9@2", "-m", "rr"],
        env=rb.environment,
        cwd=rb.root,
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=slave,
        text=True,
        start_new_session=True,
    )
    rb.started.append(tool)
    os.close(slave)
    said = ""

    def until_said(text: str) -> None:
        nonlocal said
        deadline = time.monotonic() + 60
        while text not in said:
            assert time.monotonic() < deadline, said
            if select.select([master], [], [], 1)[0]:
                said += os.read(master, 65536).decode(errors="replace")

    until_said("9@0 → 9@1,9@2")
    rb("send", "-o", "9@0", "--packets", "1000", "--rate", "10k")
    until_said("1,000 packets; drops 0")
    until_said("\x1b[3A\x1b[J")  # four lines are drawn over
    said = said.rpartition("\x1b[3A\x1b[J")[2]
    until_said("1,000 packets; drops 0")
    table = said.rpartition("\x1b[J")[2].splitlines()
    assert [line.split()[:2] for line in table[:3]] == [["in", "9@0"], ["out", "9@1"], ["out", "9@2"]]
    assert all(" 500  drops 0" in line for line in table[1:3])
    tool.send_signal(signal.SIGINT)
    out, _ = tool.communicate(timeout=30)
    os.close(master)
    assert tool.returncode == 0
    assert out.splitlines()[0].startswith("1,000 packets in ")
    assert "9@1: 500 packets" in out


def test_a_round_trip_of_so_many_seconds_waits_for_what_is_on_its_way(rb: Shell) -> None:
    rb("cluster", "create", "99", "--queues", "2")
    rb.start("bridge", "-i", "99@0", "-o", "99@1")
    said = rb.json("send", "-o", "99@0", "-i", "99@1", "--window", "512", "--seconds", "0.3")
    assert said["sent"]["packets"] == said["received"]["packets"] > 512 and said["verify"]["lost"] == 0


def test_a_round_trip_of_so_many_seconds_says_what_does_not_come_back(rb: Shell) -> None:
    rb("cluster", "create", "99", "--queues", "2")
    rb.start("bridge", "-i", "99@0", "-o", "99@1", "--filter", "tcp")
    said = rb.json("send", "-o", "99@0", "-i", "99@1", "--window", "64", "--seconds", "0.1", status=1)
    assert said["verify"]["lost"] == said["sent"]["packets"] == 64
