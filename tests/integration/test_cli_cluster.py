# SPDX-License-Identifier: Apache-2.0
"""The command line against real clusters: processes of their own, a registry of their own, no VM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Shell


def test_a_clusters_life(rb: Shell) -> None:
    made = rb.json("cluster", "create", "99", "--queues", "2", "--buffers", "16384", "--label", "ids")
    assert made["result"] == "changed"
    assert made["queues"] == ["99@0", "99@1"]
    assert (made["cluster"]["buffers"], made["cluster"]["label"]) == (16384, "ids")
    assert made["cluster"]["lives"] == "until destroyed"
    listed = rb.json("cluster", "list")["clusters"]
    assert [c["id"] for c in listed] == [99]
    shown = rb.json("cluster", "show", "99")
    assert [q["slots"] for q in shown["queues"]] == [4096, 4096]
    assert {s["kind"] for s in shown["segments"]} >= {"pool"}
    assert rb.json("cluster", "destroy", "99")["result"] == "changed"
    assert rb.json("cluster", "list")["clusters"] == []


def test_the_same_again_is_unchanged(rb: Shell) -> None:
    rb("cluster", "create", "99", "--queues", "2", "--buffers", "16384")
    assert rb.json("cluster", "create", "99", "--queues", "2", "--buffers", "16384")["result"] == "unchanged"
    assert rb("cluster", "create", "99", "--queues", "2").startswith("unchanged")
    rb("queue", "set", "99@0", "--pause")
    assert rb.json("queue", "set", "99@0", "--pause")["result"] == "unchanged"
    assert rb.json("status", "99@0")["clusters"][0]["queues"][0]["paused"] is True
    rb("queue", "destroy", "99@1")
    assert rb.json("queue", "destroy", "99@1")["result"] == "unchanged"
    rb("cluster", "destroy", "99")
    assert rb.json("cluster", "destroy", "99")["result"] == "unchanged"


def test_a_cluster_made_by_a_command_outlives_it_and_is_found_by_others(rb: Shell) -> None:
    rb("cluster", "create", "7", "--queues", "1", "--buffers", "16384")
    assert "7@0" in rb("status")
    assert "until destroyed" in rb("cluster", "list")


def test_sizes_are_computed_and_explained(rb: Shell) -> None:
    made = rb.json("cluster", "create", "7", "--queues", "2", "--slots", "1024")
    credit = rb.json("status", "7", "--sample", "0")["clusters"][0]["queues"][0]["credit"]
    assert credit == 1024 + 2 * 64
    assert f"2 x {credit:,} = {2 * credit:,}" in made["sizing"]
    assert made["cluster"]["buffers"] >= 2 * credit


def test_queue_create_takes_the_lowest_free_numbers(rb: Shell) -> None:
    rb("cluster", "create", "7", "--buffers", "16384", "--queues", "1", "--slots", "64")
    assert rb.json("queue", "create", "7", "--count", "2", "--slots", "128")["queues"] == ["7@1", "7@2"]
    rb("queue", "destroy", "7@1")
    assert rb.json("queue", "create", "7", "--slots", "64", "--credit", "100")["queues"] == ["7@1"]
    status = rb.json("status", "7@1", "--sample", "0")["clusters"][0]["queues"]
    assert [(q["slots"], q["credit"]) for q in status] == [(64, 100)]


def test_packets_of_send_are_verified_by_count(rb: Shell) -> None:
    rb("cluster", "create", "9", "--queues", "1", "--buffers", "16384")
    counting = rb.start("count", "-i", "9@0", "--verify", "--packets", "50k", "--json", "--seconds", "50")
    sent = rb.json("send", "-o", "9@0", "--packets", "50k", "--flows", "7", "--size", "100")
    said, _ = counting.communicate(timeout=60)
    assert counting.returncode == 0
    received = json.loads(said)
    assert sent["sent"]["packets"] == received["received"]["packets"] == 50_000
    assert received["received"]["bytes"] == 50_000 * 100
    faults = {name: n for name, n in received["verify"].items() if name != "latency_ns"}
    assert faults == dict.fromkeys(("lost", "reordered", "duplicated", "corrupted", "late", "foreign"), 0)


def test_a_bridge_brings_a_loop_back(rb: Shell) -> None:
    rb("cluster", "create", "9", "--queues", "2", "--buffers", "32768")
    bridge = rb.start("bridge", "-i", "9@0", "-o", "9@1", "--json")
    looped = rb.json("send", "-o", "9@0", "-i", "9@1", "--window", "512", "--packets", "20k")
    assert looped["received"]["packets"] == 20_000
    assert looped["verify"]["lost"] == 0
    assert looped["verify"]["latency_ns"]["min"] > 0
    bridge.send_signal(signal.SIGINT)
    said, _ = bridge.communicate(timeout=30)
    assert bridge.returncode == 0
    assert json.loads(said)["packets"] == 20_000
    # Everything is home again: nothing is lent once both ends are closed.
    queues = rb.json("status", "9", "--sample", "0")["clusters"][0]["queues"]
    assert [(q["waiting"], q["lent"]) for q in queues] == [(0, 0), (0, 0)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_tool_ends_with_its_summary_and_status_0(rb: Shell, number: signal.Signals) -> None:
    rb("cluster", "create", "9", "--queues", "1", "--buffers", "16384")
    counting = rb.start("count", "-i", "9@0", "--json")
    rb("send", "-o", "9@0", "--packets", "1000")
    deadline = time.monotonic() + 30
    while rb.json("status", "9@0", "--sample", "0")["clusters"][0]["queues"][0]["waiting"]:
        assert time.monotonic() < deadline
    counting.send_signal(number)
    said, _ = counting.communicate(timeout=30)
    assert counting.returncode == 0
    summary = json.loads(said)
    assert summary["packets"] == 1000
    assert summary["bps"] == pytest.approx(8 * (summary["bytes"] + 24 * 1000) / summary["seconds"])


SERVER = """
import sys, threading, ringbar
zc = ringbar.Cluster.attach(99)
with zc.open_queue(0, "tx") as tx:
    burst = tx.alloc(10)
    for i in range(10):
        burst[i][:60] = bytes(60)
        burst.lengths[i] = 60
    tx.send(burst)
with zc.open_queue(1, "rx") as rx:  # queue 0 stays its own while those ten are out
    threading.Thread(target=lambda: (sys.stdin.read(), rx.stop()), daemon=True).start()
    print("ready", flush=True)
    for _ in rx:
        pass
"""


def test_a_queue_that_another_program_serves_is_sent_to_by_a_hop(rb: Shell) -> None:
    rb("cluster", "create", "99", "--buffers", "65536", "--queues", "2", "--pages", "4k")
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=rb.environment, cwd=rb.root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        sending = rb.start("send", "-o", "99@0", "--rate", "500", "--json")
        first, _, hop = rb.json("status", "99", "--sample", "0")["clusters"][0]["queues"]
        assert first["producer"]["pid"] == sending.pid and hop["feeds"] == "99@0"
        assert (hop["producer"]["pid"], hop["consumer"]["pid"]) == (sending.pid, server.pid)
        sending.send_signal(signal.SIGINT)
        packets = json.loads(sending.communicate(timeout=30)[0])["sent"]["packets"]
        assert packets > 0
        assert rb.json("count", "-i", "99@0", "--packets", str(packets + 10))["packets"] == packets + 10
    finally:
        server.communicate(timeout=30)
    assert server.returncode == 0
    queues = rb.json("status", "99", "--sample", "0")["clusters"][0]["queues"]
    assert [(q["address"], q["lent"]) for q in queues] == [("99@0", 0), ("99@1", 0)]


def test_status_names_who_is_at_the_ends(rb: Shell) -> None:
    rb("cluster", "create", "9", "--queues", "1", "--buffers", "16384")
    counting = rb.start("count", "-i", "9@0")
    queue = rb.json("status", "9@0", "--sample", "0")["clusters"][0]["queues"][0]
    assert queue["producer"] is None
    assert (queue["consumer"]["pid"], queue["consumer"]["name"]) == (counting.pid, "count")
    assert f"nobody → {queue['consumer']['name']} (pid {counting.pid})" in rb("status", "9@0", "--sample", "0")


def test_what_a_killed_tool_held_comes_home(rb: Shell) -> None:
    rb("cluster", "create", "9", "--queues", "1", "--buffers", "16384")
    rb.start("count", "-i", "9@0").kill()
    rb("send", "-o", "9@0", "--packets", "100")
    again = rb.json("count", "-i", "9@0", "--packets", "100", "--seconds", "30")
    assert again["packets"] == 100
    queue = rb.json("status", "9@0", "--sample", "0")["clusters"][0]["queues"][0]
    assert (queue["waiting"], queue["consumer"]) == (0, None)


@pytest.mark.parametrize("kind", ["pcapng", "pcap"])
def test_capture_writes_what_was_sent(rb: Shell, tmp_path: Path, kind: str) -> None:
    scapy = pytest.importorskip("scapy.all")
    rb("cluster", "create", "9", "--queues", "1", "--buffers", "16384")
    file = tmp_path / f"out.{kind}"
    capturing = rb.start("capture", "-i", "9@0", "-w", str(file), "--packets", "300", "--json", "--seconds", "50")
    before = time.time()
    rb("send", "-o", "9@0", "--packets", "300", "--flows", "3")
    said, _ = capturing.communicate(timeout=60)
    assert capturing.returncode == 0
    assert json.loads(said)["written"] == 300
    packets = scapy.rdpcap(str(file))
    assert len(packets) == 300
    assert {p.sport for p in packets} == {1024, 1025, 1026}
    assert [int.from_bytes(bytes(p)[58:66], "little") for p in packets] == list(range(300))
    assert all(before - 1 < float(p.time) < time.time() + 1 for p in packets)


def test_capture_to_standard_output_is_a_capture_file(rb: Shell) -> None:
    rb("cluster", "create", "9", "--queues", "1", "--buffers", "16384")
    rb("send", "-o", "9@0", "--packets", "5")
    done = subprocess.run(
        [sys.executable, "-m", "ringbar", "capture", "-i", "9@0", "-w", "-", "--packets", "5"],
        env=rb.environment,
        cwd=rb.root,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout[:4] == bytes.fromhex("0a0d0d0a")
    assert done.stdout.count(b"RGBFLOW1"[::1]) == 5


def test_doctor_reports_in_both_forms(rb: Shell) -> None:
    report = rb.run("doctor", "--json")
    found = json.loads(report.stdout)
    assert {f["state"] for f in found["findings"]} <= {"ok", "warning", "missing"}
    assert {"kernel", "library"} <= {f["check"] for f in found["findings"]}
    assert report.returncode == (0 if found["good"] else 1)
    assert found["good"] == all(f["state"] != "missing" for f in found["findings"])


def test_doctor_says_where_memory_is_of_no_use_to_cards(rb: Shell, tmp_path: Path) -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout
    found = {f["check"]: f["state"] for f in rb.json("doctor", status=rb.run("doctor").returncode)["findings"]}
    assert found[rb.environment["RINGBAR_SHM"]] == "ok"
    rb.environment["RINGBAR_SHM"] = str(tmp_path)
    found = {f["check"]: f["state"] for f in rb.json("doctor", status=rb.run("doctor").returncode)["findings"]}
    assert found[str(tmp_path)] == ("ok" if kind.strip() == "tmpfs" else "warning")
    assert {"IOMMU", "memory types", "kernel features", "group", "agent"} <= set(found)


def test_doctor_clean_removes_files_of_clusters_that_are_gone(rb: Shell, private_directories: Path) -> None:
    stray = private_directories / "shm" / "ringbar.44.pool0"
    stray.write_bytes(bytes(4096))
    rb("cluster", "create", "9", "--queues", "1", "--buffers", "16384")
    kept = {p.name for p in (private_directories / "shm").iterdir()} - {stray.name}
    warned = [f for f in json.loads(rb.run("doctor", "--json").stdout)["findings"] if f["check"] == "leftovers"]
    assert warned[0]["state"] == "warning"
    assert stray.name in warned[0]["detail"]
    rb.run("doctor", "--clean")
    assert not stray.exists()
    assert {p.name for p in (private_directories / "shm").iterdir()} == kept


FIELDS = {"mpps", "ns_per_packet", "burst", "touch", "runs", "accelerator", "cores", "kernel", "commit", "command"}


@pytest.mark.parametrize("ends", ["threads", "processes"])
def test_bench_ring_reports_every_level(rb: Shell, ends: str) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    words = f"bench ring --ends {ends} --touch 0 --runs 2 --seconds 0.05 --no-peers"
    document = rb.json(*words.split())
    assert set(document) >= FIELDS
    assert (document["burst"], document["touch"], len(document["runs"])) == (32, 0, 2)
    assert set(document["levels"]) == ({"bare"} if ends == "threads" else {"bare", "ledger", "intent", "library"})
    assert all(level["mpps"] > 0 for level in document["levels"].values())
    assert document["checks_failed"] == 0
    assert rb.json(*document["command"].split()[1:-1])["burst"] == 32  # the command it names measures the same


def test_bench_ring_one_at_a_time_reports_round_trips(rb: Shell) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    document = rb.json(*"bench ring --burst 1 --touch 64 --runs 1 --seconds 0.05 --no-peers".split())
    trip = document["round_trip_ns"]
    assert 0 < trip["min"] <= trip["median"] <= trip["p99"] <= trip["p999"] <= trip["max"]


def test_bench_peers_measures_what_is_installed(rb: Shell) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    done = rb.run(*"bench peers --runs 1 --seconds 0.05 --json".split())
    document = json.loads(done.stdout)
    if done.returncode == 1:  # nothing of DPDK is here
        assert document["error"]["cure"]
        return
    assert set(document) >= {"accelerator", "cores", "kernel", "commit", "command", "burst"}
    assert {row["name"] for row in document["rows"]} | set(document["missing"]) == {"rte_ring", "memif"}
    for row in document["rows"]:
        assert row["mpps"] > 0 and row["ns_per_packet"] > 0 and len(row["runs"]) == 1 and row["command"]
    assert all(why["cure"] for why in document["missing"].values())


def test_bench_python_measures_a_consumer(rb: Shell) -> None:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler, for the producer")
    document = rb.json(*"bench python --runs 1 --seconds 0.05".split())
    assert set(document) >= FIELDS - {"touch"}
    assert document["packets"] > 0
    assert 0 < document["mean_burst"] <= 64
    assert rb.json("cluster", "list")["clusters"] == []
