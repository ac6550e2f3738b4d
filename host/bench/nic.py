# SPDX-License-Identifier: Apache-2.0
"""``ringbar bench nic``: devices against a bare AF_XDP loop and AF_PACKET's TPACKET_V3, on veth.

    source --> a1 ==veth== a0 --> the program that is measured --> b0 ==veth== b1 (the sink)

All in a network namespace of its own. The source is the kernel itself (live frames of a test run,
``tests/bench/nic_source.c``) on one core, the program that is measured runs on another, and both are started for each
run. The source keeps a window of frames on their way, fewer than the rings hold. What is sent is counted where it
arrives, by the sink's own counter.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringbar.errors import Error
from ringbar.host.bench import programs, report
from ringbar.host.bench.consumer import private
from ringbar.host.bench.dpdk import NotAvailable, PeerFailed, last_line, two_cores

RING = 2048
"""Entries of each AF_XDP ring, ours and the bare loop's."""
WINDOW = 1536
"""Frames on their way: none is lost for want of room in a ring."""
NO_WINDOW = 2**31 - 1
ADDRESS = "192.0.2.2"
"""Of the interface that is received on: the frames' destination (``tests/bench/nic_bench.h``)."""
MAC = "02:00:00:00:00:02"
PASSES = "udp port 53"
"""A steering rule that takes none of the frames."""
START_SECONDS = 20.0


@dataclass
class Place:
    """The namespace, the programs and the two cores.

    :ivar modes: what each program said it got, by what it does and its first address.
    """

    space: str
    directory: Path
    cores: tuple[int, int]
    seconds: float
    burst: int
    modes: dict[str, str] = field(default_factory=dict)

    def ip(self, words: str) -> None:
        """``ip`` in the namespace."""
        _run("ip", "-n", self.space, *words.split())

    def command(self, program: str, *words: str) -> list[str]:
        """A program of ours in the namespace."""
        return ["nsenter", f"--net=/run/netns/{self.space}", str(self.directory / program), *words]

    @contextlib.contextmanager
    def started(self, *words: str) -> Iterator[str]:
        """A program that runs while the block does; its first line."""
        process = subprocess.Popen(
            self.command(*words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline().strip()
            if not line:
                raise PeerFailed(f"{words[0]} did not start: {last_line(process.stderr.read())}")
            yield line
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=START_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()

    def run(self, program: str, *words: str) -> float:
        """Run a program to its end; million packets a second.

        A run in which nothing moved, because others had the cores all the while, is taken again.

        :raises PeerFailed: it failed, or nothing moved in three runs.
        """
        for _ in range(3):
            mpps = self._once(program, *words)
            if mpps > 0:
                return mpps
        raise PeerFailed(
            f"{program} {words[0]}: nothing moved in {self.seconds:g} s, three times",
            cure="give it longer runs (--seconds), or a machine with less other work",
        )

    def _once(self, program: str, *words: str) -> float:
        command = self.command(
            program, *words, "--seconds", f"{self.seconds:g}", "--burst", str(self.burst), "--ring", str(RING),
            "--core", str(self.cores[1]),
        )  # fmt: skip
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=START_SECONDS + self.seconds
            )
        except subprocess.TimeoutExpired as error:
            raise PeerFailed(f"{program} did not finish within {START_SECONDS + self.seconds:g} s") from error
        if done.returncode != 0:
            raise PeerFailed(f"{program} {words[0]}: {last_line(done.stderr)}")
        said = json.loads(done.stdout)
        self.modes[f"{words[0]} {words[2]}"] = said["mode"]
        return float(said["mpps"])

    def fed(self, window: int, program: str, *words: str) -> float:
        """The same, while the source sends."""
        with self.started("nic_source", "a1", str(self.cores[0]), str(window)) as progress:
            return self.run(program, *words, "--progress", progress)

    def passed(self) -> float:
        """Nanoseconds of one core for each frame that is made, received and passed on to the stack."""
        with self.started("nic_source", "a1", str(self.cores[0]), str(NO_WINDOW)):
            begun = self.run("nic_count", "transmit", "--out", "a1", "--sink", "a0")
        return 1e3 / begun


@contextlib.contextmanager
def place(seconds: float, burst: int, progress: Callable[[str], None]) -> Iterator[Place]:
    """Compile the programs and make the namespace; both are gone afterwards.

    :raises NotAvailable: not root, one core, no compiler, or a kernel without live frames (before 5.18).
    """
    if os.geteuid() != 0:
        raise NotAvailable("making network interfaces needs root", cure="run it with sudo")
    cores = two_cores()
    with tempfile.TemporaryDirectory(prefix="ringbar-bench-") as name, private():
        directory = Path(name)
        progress("compiling the programs")
        for file in ("nic_source.c", "nic_count.c", "bare_xdp.c", "tpacket_v3.c"):
            programs.build(directory, file, linked=False)
        for file in ("nic.c", "inject.c"):
            programs.build(directory, file, linked=True)
        space = f"rbbench{os.getpid()}"
        _run("ip", "netns", "add", space)
        try:
            made = Place(space, directory, cores, seconds, burst)
            for kind in ("all", "default"):
                _run("nsenter", f"--net=/run/netns/{space}", "sysctl", "-qw", f"net.ipv6.conf.{kind}.disable_ipv6=1")
            for pair in "ab":
                made.ip(f"link add {pair}0 type veth peer name {pair}1")
                for end in "01":
                    made.ip(f"link set {pair}{end} up")
            # Without a program a veth takes frames of XDP only when it has a receive context, which GRO gives it.
            _run("nsenter", f"--net=/run/netns/{space}", "ethtool", "-K", "a0", "gro", "on")
            yield made
        finally:
            _run("ip", "netns", "del", space)


def _run(*words: str) -> None:
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    except FileNotFoundError as error:
        raise NotAvailable(f"{words[0]} is not installed", cure="apt-get install iproute2 ethtool procps") from error
    if done.returncode != 0:
        raise Error(f"{' '.join(words)}: {last_line(done.stderr)}", code="bench-failed")


Row = dict[str, Any]


def rows(where: Place, runs: int, progress: Callable[[str], None]) -> list[Row]:
    """All rows, one after the other; what is compared alternates."""
    sink = ["--sink", "b1"]
    zc = {"in": ("--in", "zc:a0"), "out": ("--out", "zc:b0")}
    bare = {"in": ("--in", "a0"), "out": ("--out", "b0")}
    kinds: list[tuple[str, list[str], list[str]]] = [
        ("receive", ["in"], []),
        ("transmit", ["out"], sink),
        ("forward", ["in", "out"], sink),
    ]
    found = []
    for name, ends, more in kinds:

        def by(
            kinds: dict[str, tuple[str, str]],
            program: str,
            name: str = name,
            ends: list[str] = ends,
            more: list[str] = more,
        ) -> Callable[[], float]:
            words = [name, *(word for end in ends for word in kinds[end]), *more]
            if "in" in ends:
                return lambda: where.fed(WINDOW, program, *words)
            return lambda: where.run(program, *words)

        measured = _alternate(
            runs,
            progress,
            name,
            {
                "ringbar": by(zc, "nic"),
                "bare AF_XDP": by(bare, "bare_xdp"),
                "TPACKET_V3": by(bare, "tpacket_v3"),
                "ringbar, eth1": by(bare, "nic"),
            },
        )
        found.append(_compared(name, where, measured))
    bypass = _bypass(where, runs, progress)
    return [*found, _inject(where, runs, progress), bypass]  # measured last: it gives a0 an address


def _alternate(
    runs: int, progress: Callable[[str], None], row: str, measures: dict[str, Callable[[], float]]
) -> dict[str, list[float]]:
    done = [0]

    def told(name: str, measure: Callable[[], float]) -> Callable[[], float]:
        def run() -> float:
            progress(f"{row}: {name}, run {done[0] // len(measures) + 1} of {runs}")
            done[0] += 1
            return measure()

        return run

    found = report.alternate(runs, *(told(name, measure) for name, measure in measures.items()))
    return dict(zip(measures, found))


def _compared(name: str, where: Place, measured: dict[str, list[float]]) -> Row:
    ours = measured["ringbar"]
    row: Row = {"name": name, **report.figures(ours, burst=where.burst, touch=0)}
    row["mode"] = where.modes[f"{name} {'zc:b0' if name == 'transmit' else 'zc:a0'}"]
    for peer, field_name in (("bare AF_XDP", "bare_af_xdp"), ("TPACKET_V3", "tpacket_v3")):
        row[field_name] = report.figures(measured[peer], burst=where.burst, touch=0)
        row[f"ratio_to_{field_name}"] = round(report.ratio(ours, measured[peer]), 3)
    copies = measured["ringbar, eth1"]
    row["one_copy"] = report.figures(copies, burst=where.burst, touch=0)
    row["one_copy"]["ratio_to_tpacket_v3"] = round(report.ratio(copies, measured["TPACKET_V3"]), 3)
    return row


def _inject(where: Place, runs: int, progress: Callable[[str], None]) -> Row:
    """Frames into a0's stack by each method, counted at a UDP socket."""
    where.ip(f"address add {ADDRESS}/24 dev a0")
    where.ip(f"link set a0 address {MAC}")
    where.ip("tuntap add dev tap mode tap")
    where.ip("link add v0 type veth peer name v1")
    where.ip("link set v0 up")
    match = "u32 match u32 0 0 action mirred ingress redirect dev a0".split()
    for name in ("tap", "v1"):
        where.ip(f"link set {name} address {MAC} up")  # else its frames count as another host's, and are dropped
        _run("tc", "-n", where.space, "qdisc", "add", "dev", name, "clsact")
        _run("tc", "-n", where.space, "filter", "add", "dev", name, "ingress", "protocol", "all", *match)
    methods: dict[str, Callable[[], float]] = {
        "ringbar, stack:": lambda: where.run("inject", "ringbar", "--out", "a0", "--sink", "a0"),
        "live frames": lambda: where.run("inject", "live", "--out", "a0", "--sink", "a0"),
        "TAP": lambda: where.run("inject", "tap", "--out", "tap", "--sink", "a0"),
        "veth": lambda: where.run("inject", "veth", "--out", "v0", "--sink", "a0"),
    }
    try:
        methods["ringbar, stack:"]()
    except PeerFailed:
        del methods["ringbar, stack:"]
    measured = _alternate(runs, progress, "inject", methods)
    chosen = "ringbar, stack:" if "ringbar, stack:" in measured else "TAP"
    row: Row = {"name": "inject", "method": chosen, **report.figures(measured[chosen], burst=where.burst, touch=0)}
    row["frames_per_second"] = round(row["mpps"] * 1e6)
    row["methods"] = {name: round(report.figures(f, burst=1, touch=0)["mpps"] * 1e6) for name, f in measured.items()}
    return row


def _bypass(where: Place, runs: int, progress: Callable[[str], None]) -> Row:
    """What a frame costs that is passed on to the kernel: no program, the shortest there is, and ours with a rule."""

    def with_program(*words: str) -> float:
        with where.started(*words):
            return where.passed()

    measured = _alternate(
        runs,
        progress,
        "bypass",
        {
            "ringbar": lambda: with_program("nic", "hold", "--in", "zc:a0", "--steer", PASSES),
            "XDP_PASS": lambda: with_program("bare_xdp", "hold", "--in", "a0"),
            "none": where.passed,
        },
    )
    frames = {name: [1e3 / ns for ns in times] for name, times in measured.items()}
    row: Row = {"name": "bypass", "steer": PASSES, **report.figures(frames["ringbar"], burst=where.burst, touch=0)}
    row["ns_without_program"] = round(_median(measured["none"]), 1)
    row["ns_with_an_empty_program"] = round(_median(measured["XDP_PASS"]), 1)
    row["cost_ns"] = round(_median(_differences(measured["ringbar"], measured["none"])), 1)
    row["cost_ns_of_the_rule"] = round(_median(_differences(measured["ringbar"], measured["XDP_PASS"])), 1)
    return row


def _differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(first, second)]


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def table(rows: Sequence[Row]) -> list[Row]:
    """The rows as lines for people: each measurement, then what it is compared to."""
    lines: list[Row] = []
    for row in rows:
        lines.append(dict(row))
        for field_name, name in (("bare_af_xdp", "bare AF_XDP"), ("tpacket_v3", "TPACKET_V3"), ("one_copy", "eth1")):
            if field_name in row:
                ratio = row.get(f"ratio_to_{field_name}")
                lines.append({"name": f"  {name}", **row[field_name], **({"ratio": ratio} if ratio else {})})
        if row["name"] == "inject":
            each = ", ".join(f"{name} {rate:,}" for name, rate in row["methods"].items())
            lines[-1]["note"] = f"by {row['method']}; frames/s delivered to a UDP socket: {each}"
        if row["name"] == "bypass":
            lines[-1]["note"] = (
                f"a frame passed on costs {row['cost_ns']} ns more than without a program, "
                f"{row['cost_ns_of_the_rule']} ns more than with an empty one"
            )
    return lines
