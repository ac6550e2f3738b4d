# SPDX-License-Identifier: Apache-2.0
"""What every bench document carries (the machine, the commit, the runs), and the table printed beside it."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

WIDTH = 80


def accelerator(cpuinfo: Path = Path("/proc/cpuinfo"), kvm: Path = Path("/dev/kvm")) -> str:
    """``"kvm"`` where QEMU can use it for a stock guest kernel, else ``"tcg"``; ``"none"`` without QEMU.

    ``/dev/kvm`` alone proves nothing: some hosts offer one that cannot boot a stock kernel. It counts only
    where the processor's flags show ``svm`` or ``vmx`` *and* the device opens.
    """
    flags: set[str] = set()
    try:
        for line in cpuinfo.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("flags"):
                flags.update(line.partition(":")[2].split())
                break
    except OSError:
        pass
    if flags & {"svm", "vmx"}:
        try:
            os.close(os.open(kvm, os.O_RDWR | os.O_CLOEXEC))
            return "kvm"
        except OSError:
            pass
    return "tcg" if shutil.which(f"qemu-system-{platform.machine()}") else "none"


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the kernel gives it, or its architecture where it gives none (aarch64)."""
    try:
        for line in cpuinfo.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def commit(directory: Path | None = None) -> str:
    """The git commit of the checkout this file lies in (``-dirty`` if changed), else ``ringbar VERSION``."""
    where = directory if directory is not None else Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "-C", str(where), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        if found.returncode == 0 and found.stdout.strip():
            return found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        return f"ringbar {metadata.version('ringbar')}"
    except metadata.PackageNotFoundError:
        return "unknown"


def machine() -> dict[str, Any]:
    """The facts of this machine that every bench document carries."""
    return {
        "accelerator": accelerator(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "cpu": cpu_model(),
        "load": round(os.getloadavg()[0], 2),
        "commit": commit(),
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios of alternating runs: run i of ours to run i of theirs, measured side by side.

    :raises ValueError: when the two differ in length, are empty, or a peer's figure is not above zero.
    """
    if len(ours) != len(theirs):
        raise ValueError(
            f"{len(ours)} runs of ours against {len(theirs)} of theirs: alternate them one for one"
        )
    if not ours:
        raise ValueError("no runs to compare")
    if any(value <= 0 for value in theirs):
        raise ValueError("a peer's figure is zero or below: that run measured nothing")
    return statistics.median(a / b for a, b in zip(ours, theirs))


def alternate(runs: int, *measures: Callable[[], float]) -> list[list[float]]:
    """Calls the measures in turn, ``runs`` times (A B A B ...); one list of figures for each measure."""
    if runs < 1:
        raise ValueError("at least one run")
    figures: list[list[float]] = [[] for _ in measures]
    for _ in range(runs):
        for kept, measure in zip(figures, measures):
            kept.append(measure())
    return figures


def figures(mpps: Sequence[float], *, burst: int, touch: int, **more: Any) -> dict[str, Any]:
    """One measurement's fields: the medians, and each run.

    :param mpps: million packets (or descriptors) a second, one number for each run.
    :param touch: bytes of each packet written and read; 0 for descriptors only.
    :raises ValueError: when there is no run, or one is not above zero.
    """
    if not mpps or any(value <= 0 for value in mpps):
        raise ValueError("a measurement has at least one run, each above zero")
    median = statistics.median(mpps)
    return {
        "mpps": round(median, 3),
        "ns_per_packet": round(1e3 / median, 4),
        "burst": burst,
        "touch": touch,
        "runs": [round(value, 3) for value in mpps],
        **more,
    }


def document(command: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """A bench document: the command that makes it again, what was measured, then the machine."""
    return {"command": command, **body, **machine()}


def print_table(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any] | None = None,
    out: TextIO | None = None,
) -> None:
    """Prints measurements for people, at most 80 columns wide.

    :param rows: each with ``name`` and ``mpps``; also ``runs`` (for the spread), ``ratio`` (to the peer),
        ``floor`` (the ratio that must be reached) and ``note`` (a line of its own).
    :param facts: what :func:`machine` gave; None leaves the machine out.
    """
    stream = out if out is not None else sys.stdout
    print(title, file=stream)
    print(f"{'':<34}{'million/s':>10}{'ns each':>9}{'low to high':>18}{'ratio':>9}", file=stream)
    for row in rows:
        mpps = float(row["mpps"])
        runs = [float(value) for value in row.get("runs", [])]
        spread = f"{min(runs):.1f} to {max(runs):.1f}" if len(runs) > 1 else ""
        compared = row.get("ratio")
        against = "" if compared is None else f"{float(compared):.2f}"
        name = str(row["name"])
        name = name if len(name) <= 33 else name[:30] + "..."
        each = f"{1e3 / mpps:.2f}" if mpps > 0 else "-"
        print(f"{name:<34}{mpps:>10.2f}{each:>9}{spread:>18}{against:>9}".rstrip(), file=stream)
        floor = row.get("floor")
        if floor is not None and compared is not None:
            verdict = "reached" if float(compared) >= float(floor) else "NOT reached"
            print(f"  must reach {float(floor):g} times the peer: {verdict}", file=stream)
        if row.get("note"):
            _wrapped(str(row["note"]), stream)
    if facts is not None:
        _wrapped(
            f"{facts['cores']} cores, {facts['cpu']}, kernel {facts['kernel']}, accelerator "
            f"{facts['accelerator']}, commit {facts['commit']}",
            stream,
        )


def _wrapped(text: str, stream: TextIO) -> None:
    for line in textwrap.wrap(text, WIDTH - 2):
        print(f"  {line}", file=stream)
