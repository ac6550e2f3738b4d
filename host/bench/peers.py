# SPDX-License-Identifier: Apache-2.0
"""The peers that ``ringbar bench`` measures itself against, on the same cores in the same run.

Two of DPDK's ways to move packets between two cores, both from Debian's own packages:

* :func:`rte_ring`: an SP/SC ring of 16-byte elements, bulk 32 (descriptors only), by a small C program of
  ours; :func:`rte_ring_autotest` is DPDK's own measurement of the same, to check ours against.
* :func:`memif`: zero-copy shared-memory packets between two processes, testpmd to testpmd.

Nothing is left behind: each peer has a private runtime directory, its own file prefix and no huge pages,
every wait is bounded, and every process started here is ended by its own number.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from ringbar.errors import Error
from ringbar.host.bench.dpdk import (
    START_SECONDS,
    NotAvailable,
    PeerFailed,
    Testpmd,
    last_line,
    output,
    prefix,
    runtime,
    two_cores,
)

__all__ = [
    "Memif",
    "NotAvailable",
    "Peer",
    "PeerFailed",
    "build_rte_ring_bench",
    "memif",
    "parse_ring_perf_autotest",
    "parse_rte_ring_bench",
    "parse_tsc_hz",
    "rte_ring",
    "rte_ring_autotest",
]

SOURCE = "rte_ring_bench.c"
MEMORY_MIB = 512  # ordinary pages, of each testpmd
MEMIF_PACKET = 64  # bytes on the wire, as in the figures of the field


@dataclass(frozen=True)
class Peer:
    """What a peer reached.

    :param mpps_runs: million packets (or elements) a second, one number for each run.
    :param detail: what was measured and how, for the JSON document.
    :param command: the command line that does the same by hand.
    """

    name: str
    mpps_runs: list[float]
    detail: dict[str, Any] = field(default_factory=dict)
    command: str = ""

    @property
    def mpps(self) -> float:
        """The median of the runs, million a second."""
        return statistics.median(self.mpps_runs)

    def as_json(self) -> dict[str, Any]:
        """The object that bench documents carry."""
        return {
            "name": self.name,
            "mpps": round(self.mpps, 3),
            "ns_per_packet": round(1e3 / self.mpps, 4),
            "runs": [round(value, 3) for value in self.mpps_runs],
            "detail": self.detail,
            "command": self.command,
        }


# --- rte_ring ------------------------------------------------------------


def rte_ring(
    runs: int = 5,
    seconds: float = 0.5,
    *,
    burst: int = 32,
    slots: int = 1024,
    cores: tuple[int, int] | None = None,
) -> Peer:
    """DPDK's rte_ring, SP/SC bulk, 16-byte elements, between two cores.

    Each run is a process of its own: where the ring's pages lie moves the figure, and one process would
    measure one placement many times. To alternate, call it with ``runs=1``; the program is built only once.

    :param seconds: the timed part of each run.
    :raises NotAvailable: no compiler, no DPDK headers, no source of the program, or not two cores.
    :raises PeerFailed: it did not start, or what arrived was not what was sent.
    """
    pair = cores if cores is not None else two_cores()
    program = build_rte_ring_bench()
    command = [
        str(program),
        "--cores",
        f"{pair[0]},{pair[1]}",
        "--seconds",
        f"{seconds:g}",
        "--burst",
        str(burst),
        "--slots",
        str(slots),
        "--runs",
        "1",
    ]
    results: list[dict[str, Any]] = []
    with runtime() as (_, environment):
        for _run in range(_at_least_one(runs)):
            results.append(parse_rte_ring_bench(output(command, environment, seconds + START_SECONDS)))
    last = results[-1]
    return Peer(
        "rte_ring",
        [float(result["mpps"]) for result in results],
        {
            "dpdk": last["dpdk"],
            "api": last["api"],
            "burst": burst,
            "slots": slots,
            "element_bytes": last["element_bytes"],
            "cores": list(pair),
            "seconds": seconds,
            "cycles_per_element": round(
                statistics.median(float(r["cycles_per_element"]) for r in results), 4
            ),
            "elements": sum(int(result["elements"]) for result in results),
        },
        shlex.join(command),
    )


def parse_rte_ring_bench(text: str) -> dict[str, Any]:
    """The JSON object that ``rte_ring_bench`` prints.

    :raises PeerFailed: when there is none, or it lacks a figure.
    """
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                break
            wanted = {
                "mpps",
                "ns_per_element",
                "cycles_per_element",
                "elements",
                "element_bytes",
                "dpdk",
                "api",
            }
            if isinstance(found, dict) and wanted <= set(found) and float(found["mpps"]) > 0:
                return found
    raise PeerFailed("rte_ring_bench printed no figures", cure="run it by hand and look at what it says")


def build_rte_ring_bench() -> Path:
    """Builds the program with the system's compiler and DPDK's own flags, once; returns its path.

    The cache is ``$XDG_CACHE_HOME/ringbar`` (``~/.cache/ringbar``); source, flags and compiler make the name.
    """
    source = _source()
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise NotAvailable(
            "no C compiler, so DPDK's rte_ring can't be measured", cure="run: apt-get install gcc"
        )
    compile_flags = dpdk_flags("--cflags")
    link_flags = dpdk_flags("--libs")
    version = dpdk_flags("--modversion")
    # -O3 is what DPDK itself is built with. Its -march stays: with AVX copies the same ring came out slower.
    arguments = ["-std=gnu11", "-O3", "-Wall", "-Wextra", *compile_flags]
    key = hashlib.sha256(
        "\0".join([source.read_text(encoding="utf-8"), compiler, *arguments, *link_flags, *version]).encode()
    ).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ringbar"
    program = cache / f"rte_ring_bench-{key}"
    if program.exists():
        return program
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / "rte_ring_bench"
            built = subprocess.run(
                [compiler, *arguments, str(source), "-o", str(made), *link_flags],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            if built.returncode != 0:
                raise PeerFailed(
                    f"rte_ring_bench.c does not compile: {last_line(built.stderr)}",
                    cure=f"run: cc $(pkg-config --cflags libdpdk) {source} to see all of it",
                )
            os.replace(made, program)
    except OSError as error:
        raise PeerFailed(
            f"rte_ring_bench can't be kept in {cache}: {error.strerror}",
            cure="set XDG_CACHE_HOME to a directory that can be written",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise PeerFailed("the compiler did not finish rte_ring_bench.c in 120 s") from error
    return program


def rte_ring_autotest(runs: int = 1, *, cores: tuple[int, int] | None = None) -> Peer:
    """DPDK's own measurement, ``ring_perf_autotest`` of dpdk-test: the check of :func:`rte_ring`.

    It uses 4,096 slots and one million elements a run, a few milliseconds without warming up: it scatters.

    :raises NotAvailable: dpdk-test is not installed, or not two cores.
    """
    pair = cores if cores is not None else two_cores()
    program = shutil.which("dpdk-test")
    if program is None:
        raise NotAvailable("dpdk-test is not installed", cure="run: apt-get install dpdk-dev")
    cycles: list[float] = []
    mpps: list[float] = []
    with runtime() as (_, environment):
        command = [
            program,
            "-l",
            f"{pair[0]},{pair[1]}",
            "--no-huge",
            "-m",
            str(MEMORY_MIB),
            "--no-pci",
            "--no-telemetry",
            f"--file-prefix={prefix('test')}",
            "--log-level=lib.eal:debug",
        ]
        for _run in range(_at_least_one(runs)):
            text = output(command, environment, 120.0, "ring_perf_autotest\nquit\n")
            each = parse_ring_perf_autotest(text)
            cycles.append(each)
            mpps.append(parse_tsc_hz(text) / each / 1e6)
    return Peer(
        "rte_ring (ring_perf_autotest)",
        mpps,
        {
            "burst": 32,
            "slots": 4096,
            "element_bytes": 16,
            "cores": list(pair),
            "cycles_per_element": round(statistics.median(cycles), 4),
            "cycles_printed": round(2 * statistics.median(cycles), 4),
        },
        f"(echo ring_perf_autotest; echo quit) | {shlex.join(command)}",
    )


def parse_ring_perf_autotest(text: str, *, size: int = 32, element: int = 16) -> float:
    """Cycles per element of SP/SC bulk between two cores, from ring_perf_autotest's output.

    The test prints the producer's cycles per element *plus* the consumer's. Both run side by side for the
    same time, so one element leaves the ring every half of what is printed: that half is returned.

    :raises PeerFailed: when the output has no such line.
    """
    section = ""
    figures: dict[str, float] = {}
    line_of_interest = re.compile(
        rf"elem APIs: element size {element}B: SP/SC: bulk \(size: {size}\): ([0-9.]+)\s*$"
    )
    for line in text.splitlines():
        if line.startswith("### Testing"):
            section = line
        found = line_of_interest.match(line.strip())
        if found and "using two" in section:
            figures.setdefault("cores" if "physical cores" in section else "other", float(found.group(1)))
    printed = figures.get("cores", figures.get("other"))
    if printed is None or printed <= 0:
        raise PeerFailed(
            f"ring_perf_autotest printed no SP/SC bulk {size} of two cores: {last_line(text)}",
            cure="run dpdk-test by hand with two cores in -l",
        )
    return printed / 2


def parse_tsc_hz(text: str) -> float:
    """The clock that DPDK counts cycles by, in Hz, from its debug log."""
    found = re.search(r"TSC frequency is ~(\d+) KHz", text)
    if found is None or int(found.group(1)) == 0:
        raise PeerFailed("DPDK did not say its TSC frequency, so cycles can't be turned into time")
    return int(found.group(1)) * 1e3


# --- memif ------------------------------------------------------------


def memif(seconds: float = 1.0, runs: int = 5, *, cores: tuple[int, int] | None = None) -> Peer:
    """DPDK's memif with zero copy: one testpmd sends 64-byte packets, another receives; none reads a payload.

    :param seconds: the timed part of each run.
    :raises NotAvailable: dpdk-testpmd or its memif driver is not installed, or not two cores.
    :raises PeerFailed: the two did not start, connect or move packets.
    """
    with Memif(cores=cores) as pair:
        return Peer(
            "memif zero-copy",
            [pair.run(seconds) for _ in range(_at_least_one(runs))],
            {**pair.detail, "seconds": seconds},
            pair.command,
        )


class Memif:
    """Two connected testpmd processes. Between runs both stand still, so runs of ours can go in between.

    >>> with Memif() as pair:               # doctest: +SKIP
    ...     theirs = [pair.run() for _ in range(5)]
    """

    def __init__(self, *, cores: tuple[int, int] | None = None) -> None:
        self._cores = cores
        self._stack = contextlib.ExitStack()
        self._receiver: Testpmd
        self._sender: Testpmd
        self.command = ""
        self.detail: dict[str, Any] = {}

    def __enter__(self) -> Memif:
        first, second = self._cores if self._cores is not None else two_cores()
        program = shutil.which("dpdk-testpmd")
        if program is None:
            raise NotAvailable("dpdk-testpmd is not installed", cure="run: apt-get install dpdk")
        with contextlib.ExitStack() as stack:
            directory, environment = stack.enter_context(runtime())
            socket = directory / "memif.sock"
            sides = []
            for core, role, mode in (
                (second, "role=server", ["--forward-mode=rxonly"]),
                (first, "role=client,zero-copy=yes", ["--forward-mode=txonly", f"--txpkts={MEMIF_PACKET}"]),
            ):
                sides.append(
                    [
                        program,
                        "--lcores",
                        f"0@{core},1@{core}",
                        "--no-huge",
                        "-m",
                        str(MEMORY_MIB),
                        "--no-pci",
                        "--no-telemetry",
                        "--single-file-segments",
                        f"--file-prefix={prefix(role[5:11])}",
                        f"--vdev=net_memif,{role},socket={socket},socket-abstract=no",
                        "--",
                        "-i",
                        "--total-num-mbufs=32768",
                        *mode,
                    ]
                )
            self._receiver = stack.enter_context(Testpmd(sides[0], environment))
            self._sender = stack.enter_context(Testpmd(sides[1], environment))
            for side in (self._receiver, self._sender):
                side.wait_link()
            self.command = " ; ".join(shlex.join(side) for side in sides)
            self.detail = {
                "packet_bytes": MEMIF_PACKET,
                "burst": 32,
                "slots": 1024,
                "zero_copy": True,
                "payload_read": False,
                "cores": [first, second],
                "pages": "4k",
            }
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, seconds: float = 1.0) -> float:
        """Million packets a second that the receiver took, over ``seconds`` after the traffic has begun."""
        self._receiver.say("start", "packet forwarding")
        self._sender.say("start", "packet forwarding")
        try:
            deadline = time.monotonic() + START_SECONDS
            begun = self._receiver.statistics()
            while self._receiver.statistics().packets == begun.packets:
                if time.monotonic() > deadline:
                    raise PeerFailed("no packet passed between the two testpmd processes")
            time.sleep(0.2)  # warm: caches and mbuf pools settle
            self._receiver.statistics()  # testpmd reports the rate since the last time it was asked
            time.sleep(seconds)
            rate = self._receiver.statistics().rate
        finally:
            self._sender.say("stop", "Done.")
            self._receiver.say("stop", "Done.")
        if rate <= 0:
            raise PeerFailed("testpmd received nothing while it was measured")
        return rate / 1e6


def _at_least_one(runs: int) -> int:
    if runs < 1:
        raise Error(f"{runs} runs measure nothing", code="bad-runs", cure="ask for at least one")
    return runs


def _source() -> Path:
    here = Path(__file__).resolve()
    for candidate in (here.parents[2] / "tests" / "bench" / SOURCE, here.with_name(SOURCE)):
        if candidate.is_file():
            return candidate
    raise NotAvailable(f"{SOURCE} is not installed with this package", cure="run it in a checkout of ringbar")


def dpdk_flags(what: str) -> list[str]:
    """What ``pkg-config`` says of DPDK: ``--cflags``, ``--libs`` or ``--modversion``."""
    pkg_config = shutil.which("pkg-config")
    if pkg_config is None:
        raise NotAvailable(
            "pkg-config is not installed, so DPDK's headers can't be found",
            cure="run: apt-get install pkg-config libdpdk-dev",
        )
    try:
        found = subprocess.run(
            [pkg_config, what, "libdpdk"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise NotAvailable(
            f"pkg-config does not run: {error}", cure="run: apt-get install pkg-config"
        ) from error
    if found.returncode != 0:
        raise NotAvailable("DPDK's headers are not installed", cure="run: apt-get install libdpdk-dev")
    return shlex.split(found.stdout)
