# SPDX-License-Identifier: Apache-2.0
"""The peers of ``ringbar bench``: their output is read right, and what is missing is said with its cure."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ringbar.errors import Error
from ringbar.host.bench import dpdk, peers, report

# What dpdk-test 22.11 printed for ring_perf_autotest; "legacy" and single-core lines are to be passed over.
AUTOTEST = """\
EAL: TSC frequency is ~2600000 KHz
RTE>>ring_perf_autotest

### Testing bulk enq/deq ###
legacy APIs: SP/SC: bulk (size: 32): 44.36

### Testing using two physical cores ###
legacy APIs: SP/SC: bulk (size: 8): 20.37
legacy APIs: SP/SC: bulk (size: 32): 13.34
legacy APIs: MP/MC: bulk (size: 32): 30.83

### Testing bulk enq/deq ###
elem APIs: element size 16B: SP/SC: bulk (size: 32): 52.00
elem APIs: element size 16B: MP/MC: bulk (size: 32): 65.62

### Testing using two physical cores ###
elem APIs: element size 16B: SP/SC: bulk (size: 8): 23.61
elem APIs: element size 16B: MP/MC: bulk (size: 8): 114.14
elem APIs: element size 16B: SP/SC: bulk (size: 32): 13.94
elem APIs: element size 16B: MP/MC: bulk (size: 32): 47.33

### Testing using all worker nodes ###
Test OK
RTE>>quit
"""

# Two answers of testpmd 22.11 to "show port stats 0".
PORT_STATS = """\
testpmd> show port stats 0

  ######################## NIC statistics for port 0  ########################
  RX-packets: 111505248  RX-missed: 0          RX-bytes:  7136336512
  RX-errors: 0
  RX-nombuf:  0         
  TX-packets: 0          TX-errors: 0          TX-bytes:  0

  Throughput (since last show)
  Rx-pps:            0          Rx-bps:            0
  Tx-pps:            0          Tx-bps:            0
  ############################################################################
testpmd> 
  ######################## NIC statistics for port 0  ########################
  RX-packets: 168629824  RX-missed: 0          RX-bytes:  10792308736
  RX-errors: 0
  RX-nombuf:  0         
  TX-packets: 0          TX-errors: 0          TX-bytes:  0

  Throughput (since last show)
  Rx-pps:     28496134          Rx-bps:  14590018560
  Tx-pps:            0          Tx-bps:            0
  ############################################################################
testpmd> 
"""  # noqa: W291

FAKE_TESTPMD = """\
#!{python}
import os, signal, sys
if {stubborn}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
packets = 0
print("EAL: fake", flush=True)
print("testpmd> ", end="", flush=True)
for line in sys.stdin:
    if line == "quit\\n" and not {stubborn}:
        break
    if line.startswith("show port info"):
        print("Link status: up")
    elif line.startswith("show port stats"):
        packets += 1000
        print(f"RX-packets: {{packets}}  RX-missed: 0  RX-bytes: 0")
        print("Rx-pps:  42000000  Rx-bps: 0")
        print("Tx-pps: 0  Tx-bps: 0")
    elif line.startswith("start"):
        print("txonly packet forwarding - ports=1")
    elif line.startswith("stop"):
        print("Done.")
    elif line.startswith("die"):
        print("EAL: Error: no memory", flush=True)
        os._exit(3)
    print("testpmd> ", end="", flush=True)
if {stubborn}:
    while True:
        signal.pause()
"""


def program(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def fake_testpmd(directory: Path, *, stubborn: bool = False) -> Path:
    return program(directory, "dpdk-testpmd", FAKE_TESTPMD.format(python=sys.executable, stubborn=stubborn))


def only(monkeypatch: pytest.MonkeyPatch, directory: Path, *tools: str) -> None:
    """PATH is this directory, with links to the tools named."""
    import shutil

    for tool in tools:
        found = shutil.which(tool)
        if found is None:
            pytest.skip(f"{tool} is not installed here")
        (directory / tool).symlink_to(found)
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "cache"))


# --- reading ------------------------------------------------------------


def test_autotest_takes_two_cores_16_bytes_and_halves_the_printed_sum() -> None:
    assert peers.parse_ring_perf_autotest(AUTOTEST) == pytest.approx(13.94 / 2)
    assert peers.parse_ring_perf_autotest(AUTOTEST, size=8) == pytest.approx(23.61 / 2)


def test_autotest_takes_hyperthreads_only_where_there_are_no_two_cores() -> None:
    threads = AUTOTEST.replace("two physical cores", "two hyperthreads").replace("13.94", "9.00")
    assert peers.parse_ring_perf_autotest(threads) == pytest.approx(4.5)
    assert peers.parse_ring_perf_autotest(threads + AUTOTEST) == pytest.approx(13.94 / 2)


def test_autotest_on_one_core_is_refused() -> None:
    one = AUTOTEST[: AUTOTEST.index("### Testing using two")]
    with pytest.raises(peers.PeerFailed, match="no SP/SC bulk 32 of two cores"):
        peers.parse_ring_perf_autotest(one)


def test_tsc_frequency() -> None:
    assert peers.parse_tsc_hz(AUTOTEST) == 2.6e9
    with pytest.raises(peers.PeerFailed, match="TSC"):
        peers.parse_tsc_hz("EAL: Detected CPU lcores: 2\n")


def test_port_stats_takes_the_last_block() -> None:
    assert dpdk.parse_port_stats(PORT_STATS) == dpdk.PortStatistics(168629824, 28496134)


@pytest.mark.parametrize("text", ["", "testpmd> \n", "RX-packets: 5 RX-missed: 0\n", "Bad arguments\n"])
def test_port_stats_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(peers.PeerFailed, match="no port statistics"):
        dpdk.parse_port_stats(text)


def test_rte_ring_bench_output() -> None:
    good = {
        "mpps": 400.5,
        "ns_per_element": 2.5,
        "cycles_per_element": 6.5,
        "elements": 10,
        "element_bytes": 16,
        "dpdk": "DPDK 22.11",
        "api": "x",
    }
    assert peers.parse_rte_ring_bench("EAL: a warning\n" + json.dumps(good) + "\n") == good
    for bad in ("", "{", "{}", json.dumps({**good, "mpps": 0}), json.dumps({"mpps": 1.0}), "[1]"):
        with pytest.raises(peers.PeerFailed, match="no figures"):
            peers.parse_rte_ring_bench(bad)


# --- what is missing ------------------------------------------------------------


def test_nothing_installed_names_the_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only(monkeypatch, tmp_path)
    for call, what in (
        (peers.rte_ring, "apt-get install gcc"),
        (peers.rte_ring_autotest, "apt-get install dpdk-dev"),
        (peers.memif, "apt-get install dpdk"),
    ):
        with pytest.raises(peers.NotAvailable) as caught:
            call(cores=(0, 1))
        assert isinstance(caught.value, Error)
        assert caught.value.code == "peer-not-available"
        assert caught.value.cure is not None
        assert what in caught.value.cure


def test_compiler_without_pkg_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only(monkeypatch, tmp_path, "cc")
    with pytest.raises(peers.NotAvailable, match="pkg-config is not installed"):
        peers.rte_ring(cores=(0, 1))


def test_compiler_without_dpdk_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only(monkeypatch, tmp_path, "cc", "pkg-config")
    monkeypatch.setenv("PKG_CONFIG_LIBDIR", str(tmp_path))  # a pkg-config that knows no package
    monkeypatch.delenv("PKG_CONFIG_PATH", raising=False)
    with pytest.raises(peers.NotAvailable, match="headers are not installed") as caught:
        peers.rte_ring(cores=(0, 1))
    assert caught.value.cure == "run: apt-get install libdpdk-dev"


def test_source_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SOURCE", "no_such_program.c")
    with pytest.raises(peers.NotAvailable, match="not installed with this package"):
        peers.build_rte_ring_bench()


def test_one_core_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    with pytest.raises(peers.NotAvailable, match="two cores"):
        dpdk.two_cores()


def test_no_runs_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only(monkeypatch, tmp_path)
    program(tmp_path, "dpdk-test", "#!/bin/sh\n")
    with pytest.raises(Error, match="0 runs"):
        peers.rte_ring_autotest(0, cores=(0, 1))


def test_a_peer_that_fails_says_its_last_line_and_how_to_see_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    only(monkeypatch, tmp_path)
    program(tmp_path, "dpdk-test", "#!/bin/sh\necho first\necho 'EAL: Cannot init memory'\nexit 1\n")
    with pytest.raises(peers.PeerFailed, match="EAL: Cannot init memory") as caught:
        peers.rte_ring_autotest(cores=(0, 1))
    assert caught.value.cure is not None
    assert "dpdk-test -l 0,1" in caught.value.cure


# --- driving testpmd ------------------------------------------------------------


def left_over() -> set[str]:
    return {entry.name for entry in Path("/tmp").glob("ringbar-bench-*")}


def test_memif_through_a_testpmd_that_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_testpmd(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    before = left_over()
    peer = peers.memif(0.01, 2, cores=(0, 1))
    assert peer.mpps_runs == [42.0, 42.0]
    assert "role=client,zero-copy=yes" in peer.command
    assert "--lcores 0@1,1@1" in peer.command
    assert peer.as_json()["ns_per_packet"] == pytest.approx(1e3 / 42, abs=1e-3)
    assert left_over() == before


def test_testpmd_that_dies_is_reported_and_reaped(tmp_path: Path) -> None:
    with dpdk.Testpmd([str(fake_testpmd(tmp_path))], dict(os.environ)) as tester:
        process = tester._process
        assert process is not None
        with pytest.raises(peers.PeerFailed, match="EAL: Error: no memory"):
            tester.say("die", "never said")
    assert process.poll() is not None


def test_testpmd_without_the_memif_driver(tmp_path: Path) -> None:
    path = program(
        tmp_path, "dpdk-testpmd", '#!/bin/sh\necho "EAL: failed to parse device \\"net_memif\\""\nexit 1\n'
    )
    with (
        pytest.raises(peers.NotAvailable, match="memif driver"),
        dpdk.Testpmd([str(path)], dict(os.environ)),
    ):
        pass


def test_testpmd_that_cannot_be_started(tmp_path: Path) -> None:
    with (
        pytest.raises(peers.NotAvailable, match="can't be started"),
        dpdk.Testpmd([str(tmp_path / "absent")], dict(os.environ)),
    ):
        pass


def test_a_stubborn_testpmd_is_ended_by_its_number(tmp_path: Path) -> None:
    start = time.monotonic()
    with dpdk.Testpmd([str(fake_testpmd(tmp_path, stubborn=True))], dict(os.environ)) as tester:
        process = tester._process
        assert process is not None
    assert process.returncode == -9
    assert time.monotonic() - start < 30


# --- the real ones ------------------------------------------------------------


def test_real_rte_ring_moves_elements() -> None:
    try:
        peer = peers.rte_ring(1, 0.05)
    except peers.NotAvailable as missing:
        pytest.skip(str(missing))
    assert len(peer.mpps_runs) == 1
    assert peer.mpps > 0
    assert peer.detail["element_bytes"] == 16
    assert peer.detail["elements"] > 0


def test_real_rte_ring_bench_refuses_bad_options() -> None:
    try:
        path = peers.build_rte_ring_bench()
    except peers.NotAvailable as missing:
        pytest.skip(str(missing))
    for options in (
        ["--cores", "0,0"],
        ["--slots", "1000"],
        ["--burst", "0"],
        ["--runs", "0"],
        ["--nonsense", "1"],
    ):
        done = subprocess.run([str(path), *options], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 2, options
        assert "usage:" in done.stderr


def _moves(pair: peers.Memif) -> bool:
    """Whether anything arrived in a tenth of a second, which on a loaded machine may pass without."""
    try:
        return pair.run(0.1) > 0
    except peers.PeerFailed:
        return False


def test_real_memif_moves_packets_and_leaves_nothing() -> None:
    before = left_over()
    try:
        with peers.Memif() as pair:
            processes = [side._process for side in (pair._receiver, pair._sender)]
            for _ in range(2):  # and again, after both have stood still
                assert any(_moves(pair) for _ in range(50)), "nothing moved in 5 s"
    except peers.NotAvailable as missing:
        pytest.skip(str(missing))
    assert all(process is not None and process.poll() is not None for process in processes)
    assert left_over() == before


# --- the report ------------------------------------------------------------


def test_ratio_is_the_median_of_the_pairs_not_the_ratio_of_medians() -> None:
    assert report.ratio([10, 100, 30], [10, 50, 10]) == 2.0
    for ours, theirs, why in (([1.0], [], "alternate"), ([], [], "no runs"), ([1.0], [0.0], "zero")):
        with pytest.raises(ValueError, match=why):
            report.ratio(ours, theirs)


def test_alternate_takes_turns() -> None:
    order: list[str] = []

    def measure(name: str, value: float) -> float:
        order.append(name)
        return value

    assert report.alternate(2, lambda: measure("a", 1.0), lambda: measure("b", 2.0)) == [
        [1.0, 1.0],
        [2.0, 2.0],
    ]
    assert order == ["a", "b", "a", "b"]


def test_accelerator_wants_the_flag_and_the_device(tmp_path: Path) -> None:
    cpuinfo, device = tmp_path / "cpuinfo", tmp_path / "kvm"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Test CPU\nflags\t\t: fpu vmx sse\n")
    assert report.accelerator(cpuinfo, device) in ("tcg", "none")  # the flag alone
    device.touch()
    assert report.accelerator(cpuinfo, device) == "kvm"
    cpuinfo.write_text("flags\t\t: fpu sse\n")
    assert report.accelerator(cpuinfo, device) in ("tcg", "none")  # the device alone


def test_accelerator_without_qemu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report.accelerator(tmp_path / "absent", tmp_path / "absent") == "none"


def test_commit_of_a_checkout_and_of_none(tmp_path: Path) -> None:
    outside = report.commit(tmp_path)
    assert outside == "unknown" or outside.startswith("ringbar ")
    run = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for step in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*run, *step], check=True, capture_output=True)
    short = subprocess.run([*run, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout[
        :12
    ]
    assert report.commit(tmp_path) == short
    (tmp_path / "file").write_text("x")
    subprocess.run([*run, "add", "file"], check=True, capture_output=True)
    assert report.commit(tmp_path) == f"{short}-dirty"


def test_document_carries_the_machine_and_the_median() -> None:
    made = report.document("ringbar bench ring --json", report.figures([1.0, 3.0, 2.0], burst=32, touch=0))
    assert made["mpps"] == 2.0
    assert made["ns_per_packet"] == 500.0
    assert made["runs"] == [1.0, 3.0, 2.0]
    assert {"accelerator", "cores", "kernel", "cpu", "commit", "burst", "touch", "command"} <= set(made)
    json.dumps(made)
    with pytest.raises(ValueError, match="at least one run"):
        report.figures([], burst=32, touch=0)


def test_table_stays_within_80_columns() -> None:
    rows = [
        {
            "name": "ringbar threads, a name that is far too long for its column",
            "mpps": 623.4,
            "runs": [600.1, 623.4],
            "ratio": 1.31,
            "floor": 1.2,
            "note": "word " * 40,
        },
        {"name": "rte_ring", "mpps": 403.2, "runs": [12345.6, 403.2]},
        {"name": "slow", "mpps": 1.0, "ratio": 0.5, "floor": 0.7},
    ]
    out = io.StringIO()
    report.print_table("Rings between two threads", rows, report.machine(), out)
    text = out.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "must reach 1.2 times the peer: reached" in text
    assert "must reach 0.7 times the peer: NOT reached" in text
