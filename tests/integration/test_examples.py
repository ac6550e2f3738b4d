# SPDX-License-Identifier: Apache-2.0
"""The programs in docs/examples, on queues of this host. In VMs: tests/vm/test_examples.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from netspace import use_directories
from talk import answers, fetch, host_and_peer

from .conftest import Shell

pytest.importorskip("numpy", reason="the monitor counts with numpy")

EXAMPLES = Path(__file__).parents[2] / "docs/examples"


@pytest.fixture
def started(rb: Shell) -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def run(rb: Shell, name: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", str(EXAMPLES / name), *words],
        env=rb.environment, cwd=rb.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said, process.communicate()[1]
    return said


def test_the_monitor_names_the_busiest_source(rb: Shell, started: list[subprocess.Popen[str]]) -> None:
    rb("cluster", "create", "99", "--queues", "1")
    monitor = run(rb, "monitor.py", "99@0")
    started.append(monitor)
    assert line(monitor) == "receiving 99@0\n"
    rb("send", "-o", "99@0", "--packets", "3000", "--src", "10.1.2.3")
    for _ in range(20):
        said = line(monitor)
        if "10.1.2.3" in said:
            break
    assert said.startswith("10.1.2.3 ")


def test_the_ips_drops_what_fits_a_rule_and_reads_its_rules_again(
    rb: Shell, started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    rules = tmp_path / "rules"
    rules.write_text("# nothing of this host\nsrc host 10.6.6.6\n")
    rb("cluster", "create", "99", "--queues", "2")
    ips = run(rb, "ips.py", "99@0", "99@1", str(rules))
    started.append(ips)
    assert line(ips) == "99@0 → 99@1\n"
    for source in ("10.6.6.6", "10.7.7.7"):
        rb("send", "-o", "99@0", "--packets", "100", "--src", source)
    seen = rb.json("count", "-i", "99@1", "--packets", "100")
    assert seen["packets"] == 100
    rules.write_text("src host 10.7.7.7\n")
    assert line(ips) == "rules read again\n"
    for source in ("10.7.7.7", "10.6.6.6"):
        rb("send", "-o", "99@0", "--packets", "50", "--src", source)
    seen = rb.json("count", "-i", "99@1", "--packets", "50", "--filter", "src host 10.6.6.6")
    assert seen["packets"] == 50
    assert rb.json("status", "99@0", "--sample", "0")["clusters"][0]["queues"][0]["packets"] == 300


@pytest.mark.skipif(os.geteuid() != 0, reason="making network interfaces needs root")
def test_the_ips_before_the_stack_decides_what_the_host_sees(
    rb: Shell, started: list[subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_directories(rb.root, monkeypatch)
    rules = tmp_path / "rules"
    rules.write_text("tcp port 8080\n")
    with host_and_peer() as (host, peer), answers(host):
        rb("cluster", "create", "99", "--queues", "2", "--buffers", "16384")
        way = host.inside(lambda: rb.start("bridge", "-i", "zc:nic0", "-o", "99@0", "-i", "99@1", "-o", "stack:nic0"))
        assert peer.inside(lambda: fetch(80, 10, 0.3)) == 0, "nothing passes before the program runs"
        started.append(run(rb, "ips.py", "99@0", "99@1", str(rules)))
        assert line(started[-1]) == "99@0 → 99@1\n"
        assert peer.inside(lambda: fetch(80, 50_000)) == 50_000
        assert peer.inside(lambda: fetch(8080, 10, 0.5)) == 0
        rules.write_text("udp\n")
        assert line(started[-1]) == "rules read again\n"
        assert peer.inside(lambda: fetch(8080, 10)) == 10
        way.kill()
        way.wait()
        assert peer.inside(lambda: fetch(8080, 10)) == 10, "the card is the kernel's again"


def test_the_load_generator_says_that_nothing_was_lost(rb: Shell) -> None:
    rb("cluster", "create", "99", "--queues", "2")
    done = run(rb, "load.py", "99@0", "99@0", "--pps", "5000", "--seconds", "0.2")
    out, err = done.communicate(timeout=30)
    assert out == "1000 sent, 1000 back: 0 lost, 0 reordered, 0 duplicated, 0 corrupted\n", err
    assert done.returncode == 0
    assert run(rb, "load.py", "99@1", "--pps", "1000", "--seconds", "0.1").communicate(timeout=30)[0] == "100 sent\n"


def test_the_load_generator_fails_when_packets_do_not_come_back(rb: Shell) -> None:
    rb("cluster", "create", "99", "--queues", "2")
    rb.start("bridge", "-i", "99@0", "-o", "99@1", "--filter", "less 1000")  # swallows those of 1500 bytes
    done = run(rb, "load.py", "99@0", "99@1", "--pps", "3000", "--seconds", "0.1")
    out, err = done.communicate(timeout=30)
    assert "100 lost" in out and done.returncode == 1, out + err


def test_the_latency_probe_measures_the_delay_that_is_there(rb: Shell) -> None:
    rb("cluster", "create", "99", "--queues", "2")
    rb.start("delay", "-i", "99@0", "-o", "99@1", "--by", "20ms")
    done = run(rb, "latency.py", "99@0", "99@1", "--packets", "20")
    out, err = done.communicate(timeout=30)
    assert out.startswith("20 sent, 0 lost\nround trip in us: least ") and done.returncode == 0, err
    assert float(out.split("least ")[1].split(",")[0]) >= 20_000


def test_the_latency_probe_says_what_was_lost(rb: Shell) -> None:
    rb("cluster", "create", "99", "--queues", "2")
    rb.start("bridge", "-i", "99@0", "-o", "99@1", "--filter", "tcp")
    done = run(rb, "latency.py", "99@0", "99@1", "--packets", "2")
    out, err = done.communicate(timeout=30)
    assert out == "2 sent, 2 lost\n" and done.returncode == 1, err


def test_the_chain_is_a_topology_that_can_be_planned(rb: Shell) -> None:
    said = rb.json("plan", str(EXAMPLES / "chain.yaml"))
    assert "error" not in said and "worker way" in str(said) and "ids1" in str(said)


@pytest.mark.parametrize(
    "name, words", [("monitor.py", ["98@0"]), ("load.py", ["98@0", "98@0"]), ("latency.py", ["98@0", "98@1"])]
)
def test_without_its_cluster_an_example_says_what_to_do(rb: Shell, name: str, words: list[str]) -> None:
    out, err = run(rb, name, *words).communicate(timeout=30)
    assert "Traceback" not in err and "to mend it: " in err and "ringbar cluster create 98" in err
