# SPDX-License-Identifier: Apache-2.0
"""What is plugged into which VM, on disk: one JSON file per VM and cluster beside the registry.

A record is written before anything is plugged (state ``plugging``) and removed after everything is unplugged, so
that a command that is killed in between leaves a trace for the next one to clean up. Files are replaced atomically;
whoever changes an attachment holds the lock from reading to writing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringbar.errors import Busy, Error

LOCK_TIMEOUT = 60.0
"""Seconds to wait for another command that is attaching or detaching."""


def run_directory() -> Path:
    """Where the registry is: ``$RINGBAR_RUN``, else ``/run/ringbar``."""
    return Path(os.environ.get("RINGBAR_RUN") or "/run/ringbar")


def start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None when it does not exist or is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def alive(identity: str) -> bool:
    """Does the QEMU process ``PID:STARTTIME`` still run?"""
    pid, _, start = identity.partition(":")
    return pid.isdigit() and start.isdigit() and start_time(int(pid)) == int(start)


@dataclass
class Record:
    """One attachment as it is kept.

    :ivar vm: as the person named it, canonical: ``qmp:/run/vm1.qmp``.
    :ivar state: ``plugging``, ``plugged``, ``closing`` or ``quarantined``.
    :ivar identity: this life of the VM.
    :ivar generation: this life of the cluster.
    :ivar lane: number of the VM's lane.
    :ivar pool: ``ro`` or ``rw``.
    :ivar where: the PCI place, for people.
    :ivar plugged: what the hot-plug back end needs to unplug it again.
    """

    vm: str
    cluster: int
    state: str
    identity: str
    generation: int
    lane: int
    pool: str
    where: str = ""
    plugged: dict[str, Any] = field(default_factory=dict)
    since_ns: int = field(default_factory=time.time_ns)


def _directory() -> Path:
    return run_directory() / "attachments"


def _path(vm: str, cluster: int) -> Path:
    return _directory() / f"{cluster}-{hashlib.sha256(vm.encode()).hexdigest()[:16]}.json"


@contextlib.contextmanager
def locked(timeout: float = LOCK_TIMEOUT) -> Iterator[None]:
    """Nobody else changes attachments meanwhile.

    :raises Busy: when another command holds the lock for longer than ``timeout`` seconds; says which.
    """
    directory = _directory()
    try:
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
    except PermissionError:
        raise Error(
            f"no permission to write {directory}", code="no-permission", cure="run it as root (sudo)"
        ) from None
    try:
        _wait_for(fd, timeout)
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d" % os.getpid(), 0)
        try:
            yield
        finally:
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def _wait_for(fd: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                pid = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
                holder = f"process {pid}" if pid else "another command"
                raise Busy(
                    f"{holder} has been attaching or detaching for over {timeout:.0f} s",
                    holder=holder,
                    cure=f"wait for it, or end it: kill {pid}" if pid else "wait for it",
                ) from None
            time.sleep(0.05)


def _read(path: Path) -> Record | None:
    try:
        known = {f.name for f in dataclasses.fields(Record)}
        return Record(**{k: v for k, v in json.loads(path.read_text()).items() if k in known})
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return None  # gone meanwhile, or no record of ours


def all_records() -> list[Record]:
    """Every record, by VM and cluster. None when nothing was ever attached."""
    try:
        paths = sorted(_directory().glob("*.json"))
    except PermissionError:
        return []
    found = [r for r in map(_read, paths) if r is not None]
    return sorted(found, key=lambda r: (r.vm, r.cluster))


def find(vm: str, cluster: int) -> Record | None:
    """The record of this VM and cluster, if there is one."""
    return _read(_path(vm, cluster))


def write(record: Record) -> None:
    """Put ``record`` in place, whole or not at all. The lock is held."""
    path = _path(record.vm, record.cluster)
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(fd, "w") as f:
            json.dump(dataclasses.asdict(record), f, indent=1)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def remove(record: Record) -> None:
    """Forget it. The lock is held."""
    with contextlib.suppress(FileNotFoundError):
        _path(record.vm, record.cluster).unlink()
