# SPDX-License-Identifier: Apache-2.0
"""``ringbar bench workers``: what a packet costs the core of a balancer or fan-out (``host/bench/balance.c``)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringbar.host import native
from ringbar.host.bench import peers, programs, report
from ringbar.host.bench.consumer import private
from ringbar.host.bench.dpdk import (
    NotAvailable,
    PeerFailed,
    last_line,
    output,
    prefix,
    runtime,
    two_cores,
)

BUFFERS = 65536
OUTPUTS = (2, 4, 8, 16, 32, 64)
POOLS = (4096, 65536, 1048576)
FANNED = 8
SLOTS = 4096
"""Of each output of the fan-out (balance.c), and of the bare ring it is compared to: larger rings cost more."""
DPDK_SECONDS = 90.0
"""On two idle cores the distributor's test takes some seconds."""

Row = dict[str, Any]


@dataclass
class Bench:
    """The compiled program, and how it is run."""

    program: Path
    cores: tuple[int, int]
    seconds: float
    burst: int

    def cycles(self, kind: str, outputs: int, buffers: int) -> float:
        """Cycles of the worker's core for a packet, the median of many turns of 4096 (fewer in a small pool)."""
        words = [kind, outputs, buffers, f"{self.seconds:g}", self.burst, *self.cores]
        limit = self.seconds + 30
        try:
            done = subprocess.run(
                [str(self.program), *map(str, words)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=limit,
            )
        except subprocess.TimeoutExpired as error:
            raise PeerFailed(f"{kind} to {outputs} outputs did not finish within {limit:g} s") from error
        if done.returncode != 0:
            raise PeerFailed(
                f"{kind} to {outputs} outputs: {last_line(done.stderr)}",
                cure="give it longer runs (--seconds), or a machine with less other work",
            )
        said = json.loads(done.stdout)
        if said["dropped"]:
            raise PeerFailed(f"{kind} to {outputs} outputs dropped {said['dropped']} packets")
        self.hz = float(said["mpps"]) * 1e6 * float(said["cycles"])
        return float(said["cycles"])

    def row(self, name: str, cycles: Sequence[float], **more: Any) -> Row:
        """Its fields: cycles as packets a second and nanoseconds."""
        figures = report.figures([self.hz / each / 1e6 for each in cycles], burst=self.burst, touch=0)
        return {"name": name, **figures, "cycles": round(self.hz / figures["mpps"] / 1e6, 2), **more}


@contextmanager
def bench(seconds: float, burst: int, progress: Callable[[str], None]) -> Iterator[Bench]:
    """Compile the program; a registry and memory of our own while the block runs.

    :raises NotAvailable: one core, or no compiler.
    """
    cores = two_cores()
    with tempfile.TemporaryDirectory(prefix="ringbar-bench-") as directory, private():
        progress("compiling the program")
        program = programs.build(Path(directory), "balance.c", linked=True)
        yield Bench(program, cores, seconds, burst)


def rows(bench: Bench, runs: int, progress: Callable[[str], None], *, dpdk: bool = True) -> list[Row]:
    """All rows; what is compared alternates."""
    found = [_balancer(bench, runs, progress, dpdk), _fanout(bench, runs, progress)]
    found += _flat(bench, runs, progress, "outputs", {f"outputs-{n}": (n, BUFFERS) for n in OUTPUTS})
    found += _flat(bench, runs, progress, "buffers", {f"buffers-{n}": (4, n) for n in POOLS})
    return found


def _alternate(
    runs: int, progress: Callable[[str], None], measures: dict[str, Callable[[], float]]
) -> dict[str, list[float]]:
    def told(name: str, measure: Callable[[], float]) -> Callable[[], float]:
        def run() -> float:
            progress(f"measuring {name}")
            return measure()

        return run

    found = report.alternate(runs, *(told(name, measure) for name, measure in measures.items()))
    return dict(zip(measures, found))


def _balancer(bench: Bench, runs: int, progress: Callable[[str], None], dpdk: bool) -> Row:
    ours = "ringbar, balancer 5tuple to 4"
    measures = {ours: lambda: bench.cycles("balancer", 4, BUFFERS)}
    by, missing = "", "left out"
    if dpdk:
        try:
            by, measures["DPDK's distributor"] = _peer(bench, progress)
        except (NotAvailable, PeerFailed) as error:
            missing = str(error)
    measured = _alternate(runs, progress, measures)
    row = bench.row("balancer-5tuple-4", measured[ours], policy="5tuple", outputs=4, buffers=BUFFERS)
    theirs = measured.get("DPDK's distributor")
    if theirs is None:
        row["dpdk_distributor"] = {"missing": missing}
    else:
        row["dpdk_distributor"] = {"cycles": sorted(theirs)[len(theirs) // 2], "runs": theirs, "measured_by": by}
        row["ratio_to_dpdk_distributor"] = round(report.ratio(theirs, measured[ours]), 3)
    return row


def _peer(bench: Bench, progress: Callable[[str], None]) -> tuple[str, Callable[[], float]]:
    """DPDK's distributor by DPDK's own test; where that does not finish, by a program that stands other work."""
    progress("DPDK's distributor, one worker core, burst mode")
    try:
        distributor(bench.cores)
        return "dpdk-test distributor_perf_autotest", lambda: distributor(bench.cores)
    except PeerFailed:
        program = build_distributor(bench.program.parent)
        run_distributor(program, bench.cores, bench.seconds)
        return "distributor_bench.c", lambda: run_distributor(program, bench.cores, bench.seconds)


def _fanout(bench: Bench, runs: int, progress: Callable[[str], None]) -> Row:
    """What each consumer beyond the first adds, against one descriptor through a bare ring between two threads."""

    def bare() -> float:
        """The best of short runs: others use the two cores too, and the cheapest descriptor is the hardest measure."""
        found = (
            native.bench_ring(
                processes=False, burst=bench.burst, touch=0, slots=SLOTS, level=0, seconds=0.01, cores=bench.cores
            )
            for _ in range(10)
        )
        return 1e3 / max(float(result["mpps"]) for result in found)

    measured = _alternate(
        runs,
        progress,
        {
            "fanout to 8": lambda: bench.cycles("fanout", FANNED, BUFFERS),
            "fanout to 1": lambda: bench.cycles("fanout", 1, BUFFERS),
            "bare rings": bare,
        },
    )
    pairs = zip(measured["fanout to 8"], measured["fanout to 1"])
    extra = [(eight - one) / (FANNED - 1) / bench.hz * 1e9 for eight, one in pairs]
    row = bench.row("fanout-8", measured["fanout to 8"], outputs=FANNED, buffers=BUFFERS)
    row["consumers"] = "drained by one thread of the same process"
    row["one_consumer_ns"] = round(sorted(measured["fanout to 1"])[runs // 2] / bench.hz * 1e9, 3)
    row["extra_consumer_ns"] = round(sorted(extra)[runs // 2], 3)
    row["bare_descriptor_ns"] = round(sorted(measured["bare rings"])[runs // 2], 3)
    row["ratio_to_bare_descriptor"] = round(report.ratio(extra, measured["bare rings"]), 3)
    return row


def _flat(
    bench: Bench, runs: int, progress: Callable[[str], None], what: str, sizes: dict[str, tuple[int, int]]
) -> list[Row]:
    """A row for each size, and one that says how far the dearest is above the cheapest."""

    def measure(outputs: int, buffers: int) -> Callable[[], float]:
        return lambda: bench.cycles("balancer", outputs, buffers)

    measured = _alternate(runs, progress, {name: measure(*size) for name, size in sizes.items()})
    found = [bench.row(name, measured[name], outputs=size[0], buffers=size[1]) for name, size in sizes.items()]
    first = found[0]
    worst = max(found, key=lambda row: float(row["ns_per_packet"]))
    growth = report.ratio(measured[worst["name"]], measured[first["name"]]) - 1
    summary = {**first, "name": f"flat-{what}", "growth": round(growth, 3), "dearest": worst["name"]}
    return [*found, summary]


def distributor(cores: tuple[int, int]) -> float:
    """Cycles a packet of DPDK's distributor in burst mode, by ``distributor_perf_autotest`` with one worker core.

    :raises NotAvailable: dpdk-test is not installed.
    :raises PeerFailed: it did not finish (its two threads spin for each other: with other work on their cores it
        takes minutes), or printed nothing.
    """
    program = shutil.which("dpdk-test")
    if program is None:
        raise NotAvailable("dpdk-test is not installed", cure="run: apt-get install dpdk-dev")
    with runtime() as (_, environment):
        command = [program, *_eal(cores)]
        return parse_distributor(output(command, environment, DPDK_SECONDS, "distributor_perf_autotest\nquit\n"))


def build_distributor(directory: Path) -> Path:
    """Compile ``tests/bench/distributor_bench.c`` with DPDK's own flags.

    :raises NotAvailable: DPDK's headers are not installed.
    """
    flags = [*peers.dpdk_flags("--cflags"), *peers.dpdk_flags("--libs")]
    return programs.build(directory, "distributor_bench.c", *flags, linked=False)


def run_distributor(program: Path, cores: tuple[int, int], seconds: float) -> float:
    """Cycles a packet, in the better slices of a run on cores that others use too."""
    with runtime() as (_, environment):
        command = [str(program), *_eal(cores), "--log-level=error", "--", f"{seconds:g}"]
        text = output(command, environment, seconds + 30.0)
        return float(json.loads(text.splitlines()[-1])["cycles"])


def _eal(cores: tuple[int, int]) -> list[str]:
    return [
        "-l", f"{cores[0]},{cores[1]}", "--no-huge", "-m", "512", "--no-pci", "--no-telemetry",
        f"--file-prefix={prefix('distributor')}",
    ]  # fmt: skip


def parse_distributor(text: str) -> float:
    """Cycles a packet in burst mode, from the test's output.

    :raises PeerFailed: when it has no such line.
    """
    _, _, burst = text.partition("burst mode")
    found = re.search(r"Time per packet:\s*(\d+)", burst)
    if found is None or int(found[1]) == 0:
        raise PeerFailed(f"distributor_perf_autotest printed no time per packet: {last_line(text)}")
    return float(found[1])


def table(rows: Sequence[Row]) -> list[Row]:
    """The rows as lines for people."""
    lines = []
    for row in rows:
        line = dict(row)
        if row["name"] == "balancer-5tuple-4":
            peer = row["dpdk_distributor"]
            line["ratio"] = row.get("ratio_to_dpdk_distributor")
            line["note"] = f"DPDK's distributor: {peer.get('missing') or str(peer['cycles']) + ' cycles a packet'}"
        if "extra_consumer_ns" in row:
            line["note"] = (
                f"each consumer beyond the first: {row['extra_consumer_ns']} ns, {row['ratio_to_bare_descriptor']} "
                f"times a descriptor through a bare ring ({row['bare_descriptor_ns']} ns); consumers {row['consumers']}"
            )
        if "growth" in row:
            line["note"] = f"{row['dearest']} costs {row['growth']:+.0%} against the first"
        lines.append(line)
    return lines


__all__ = ["bench", "distributor", "parse_distributor", "rows", "table"]
