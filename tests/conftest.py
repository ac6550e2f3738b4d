# SPDX-License-Identifier: Apache-2.0
"""The tests leave nothing behind: what appeared during the run and is still there at its end fails the run.
A skipped test of a level named in $RINGBAR_TESTS_NO_SKIP, such as "integration vm", fails.

Files and network objects do not say whose they are. While another test run is active on this machine they are listed
and do not fail the run; processes carry a mark and always do.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

#: Directories whose entries with "ringbar" in their name are ours.
PLACES = ("/dev/shm", "/run/ringbar", "/sys/fs/bpf")
BEFORE = pytest.StashKey[set[str]]()
#: Held shared by every run: who gets it exclusively is alone.
LOCK = pytest.StashKey[int]()


def _hugetlbfs() -> list[str]:
    """Where huge page file systems are mounted."""
    mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    return [line.split()[1] for line in mounts if line.split()[2] == "hugetlbfs"]


def _files() -> set[str]:
    found = set()
    for place in (*PLACES, *_hugetlbfs()):
        for path in Path(place).glob("*"):
            if "ringbar" in path.name or place == "/run/ringbar":
                found.add(f"file {path}")
    return found


def _network() -> set[str]:
    """Network name spaces; virtual interfaces and XDP programs of this one."""
    found = {f"network name space {path.name}" for path in Path("/run/netns").glob("*")}
    try:
        links = json.loads(subprocess.run(
            ["ip", "-j", "-d", "link", "show"], check=True, capture_output=True, text=True
        ).stdout)
    except (OSError, subprocess.CalledProcessError):
        return found
    for link in links:
        kind = link.get("linkinfo", {}).get("info_kind")
        if kind in ("veth", "tun", "bridge", "dummy"):
            found.add(f"{kind} interface {link['ifname']}")
        if "xdp" in link:
            found.add(f"XDP program on {link['ifname']}")
    return found


def _ours(pid: int) -> bool:
    """Whether a process descends from this run, or was started by one that did: its environment carries our mark."""
    try:
        return f"RINGBAR_TEST_RUN={os.getpid()}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _processes() -> set[str]:
    """Processes that the tests started, QEMUs above all."""
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid() or not _ours(int(entry.name)):
            continue
        try:
            state = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if state != "Z":
            found.add(f"process {entry.name}: {command[:120]}")
    return found


def _alone(lock: int) -> bool:
    """Whether no other test run is active on this machine."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _must_run(nodeid: str) -> bool:
    """Whether a test, or a module of tests, may not be skipped here."""
    return any(nodeid.startswith(f"tests/{level}/") for level in os.environ.get("RINGBAR_TESTS_NO_SKIP", "").split())


def _unskip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.outcome == "skipped" and not hasattr(report, "wasxfail") and _must_run(report.nodeid):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{why} ({report.nodeid} must run here: RINGBAR_TESTS_NO_SKIP)"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _unskip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _unskip(report)
    return report


def pytest_sessionstart(session: pytest.Session) -> None:
    os.environ["RINGBAR_TEST_RUN"] = str(os.getpid())
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so begins what a shell starts in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    lock = os.open(Path(tempfile.gettempdir(), "ringbar-tests.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    fcntl.flock(lock, fcntl.LOCK_SH)
    session.config.stash[LOCK] = lock
    session.config.stash[BEFORE] = _files() | _network()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    processes = _processes()
    others = (_files() | _network()) - session.config.stash[BEFORE]
    alone = _alone(session.config.stash[LOCK])
    os.close(session.config.stash[LOCK])
    if not processes and not others:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.section("left behind", red=True)
        for line in sorted(processes | others):
            reporter.line(line)
        if not alone:
            reporter.line("(another test run is active here: files and network objects may be its own)")
    if (processes or alone) and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
