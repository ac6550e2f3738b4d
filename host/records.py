# SPDX-License-Identifier: Apache-2.0
"""What is plugged into which VM, on disk: one JSON file per VM and cluster beside the registry.

A record is written before anything is plugged (state ``plugging``) and removed after everything is unplugged, so
that a command that is killed in between leaves a trace for the next one to clean up. Files are replaced atomically;
whoever changes an attachment holds the VM's lock from reading to writing, so a VM that is slow, or does not answer,
keeps nobody from the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import grp
import hashlib
import json
import os
import stat
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringbar.errors import Busy, Error

LOCK_TIMEOUT = 60.0
"""Seconds to wait for another command that is attaching or detaching."""
SLOT = 16
"""Bytes of the file of locks that one lock covers."""
VMS, CLUSTERS = 4096, 65536
"""So many locks for VMs, by a hash of their key (two that share one wait for each other), and one for each cluster."""


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

    :ivar vm: for people: ``qmp:/run/vm1.qmp``, or libvirt's name.
    :ivar state: ``plugging``, ``plugged``, ``closing`` or ``quarantined``.
    :ivar identity: this life of the VM.
    :ivar generation: this life of the cluster.
    :ivar lane: number of the VM's lane.
    :ivar pool: ``ro``, ``rw`` or ``own``.
    :ivar uuid: libvirt's of the VM; ``""`` for a monitor socket.
    :ivar uri: of libvirt's connection; ``""`` for a monitor socket.
    :ivar where: the PCI place, for people.
    :ivar via: how it was plugged, for people.
    :ivar bell: :data:`ringbar.host.bells.ON`, or why both sides poll.
    :ivar doorbell: the slot of its doorbell, where it has one.
    :ivar plugged: what the hot-plug back end needs to unplug it again.
    """

    vm: str
    cluster: int
    state: str
    identity: str
    generation: int
    lane: int
    pool: str
    uuid: str = ""
    uri: str = ""
    where: str = ""
    via: str = ""
    bell: str = ""
    doorbell: str = ""
    plugged: dict[str, Any] = field(default_factory=dict)
    since_ns: int = field(default_factory=time.time_ns)

    @property
    def key(self) -> str:
        """Which VM it is, whatever it is called."""
        return f"{self.uri}#{self.uuid}" if self.uuid else self.vm


def folder() -> Path:
    """Where they are kept."""
    return run_directory() / "attachments"


def for_group(fd: int, mode: int) -> None:
    """Give what we have made to the group ``ringbar``, whatever the umask; what another made stays as it is."""
    with contextlib.suppress(OSError):
        if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
            with contextlib.suppress(KeyError, PermissionError):  # no such group, or no member of it
                os.fchown(fd, -1, grp.getgrnam("ringbar").gr_gid)
            os.fchmod(fd, mode)  # last: a change of the group may clear bits


def make_directory(path: Path) -> None:
    """A directory of the registry, which the group writes too."""
    path.mkdir(mode=0o770, parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for_group(fd, 0o2770)
    os.close(fd)


def _path(key: str, cluster: int) -> Path:
    return folder() / f"{cluster}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _place(key: str) -> int:
    """Where in the file of locks the VM's is."""
    return SLOT * (int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % VMS)


def _ask(fd: int, kind: int, place: int) -> bool:
    """Get one lock of the file, or let go of it. Of an open file, so that threads exclude each other too."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi", kind, os.SEEK_SET, place, SLOT, 0))
        return True
    except (BlockingIOError, PermissionError):
        return False


@contextlib.contextmanager
def _lock(kind: int, place: int, timeout: float, refused: Callable[[int], Busy]) -> Iterator[None]:
    """Hold one lock; an exclusive one has its holder's pid written into it.

    :param refused: the error for a lock that this process holds for longer than ``timeout`` seconds.
    """
    directory = folder()
    try:
        make_directory(directory)
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o660)
        for_group(fd, 0o660)
    except PermissionError:
        raise Error(
            f"no permission to write {directory}", code="no-permission", cure="run it as root (sudo)"
        ) from None
    try:
        deadline = time.monotonic() + timeout
        while not _ask(fd, kind, place):
            if time.monotonic() >= deadline:
                pid = os.pread(fd, SLOT, place).decode("ascii", "replace").strip("\0 ")
                raise refused(int(pid) if pid.isdigit() else 0)
            time.sleep(0.05)
        try:
            if kind == fcntl.F_WRLCK:
                os.pwrite(fd, b"%-*d" % (SLOT, os.getpid()), place)
            yield
        finally:
            if kind == fcntl.F_WRLCK:
                os.pwrite(fd, bytes(SLOT), place)
            _ask(fd, fcntl.F_UNLCK, place)  # not only by closing: a child that was just forked has the file, too
    finally:
        os.close(fd)


def locked(key: str, timeout: float = LOCK_TIMEOUT) -> contextlib.AbstractContextManager[None]:
    """Nobody else changes this VM's attachments meanwhile; those of other VMs anybody may.

    :param key: the VM's, as a Record's.
    :raises Busy: when another command holds the lock for longer than ``timeout`` seconds; says which.
    """

    def refused(pid: int) -> Busy:
        holder = f"process {pid}" if pid else "another command"
        return Busy(
            f"{holder} has been attaching to or detaching from this VM for over {timeout:.0f} s",
            holder=holder,
            cure=f"wait for it, or end it: kill {pid}" if pid not in (0, os.getpid()) else "wait for it",
        )

    return _lock(fcntl.F_WRLCK, _place(key), timeout, refused)


@contextlib.contextmanager
def free(key: str) -> Iterator[bool]:
    """As :func:`locked`, without waiting: whether nobody else is at this VM just now, and we may write."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(key, timeout=0.0))
            got = True
        except Error:
            got = False
        yield got


def _in_use(cluster: int) -> Callable[[int], Busy]:
    return lambda pid: Busy(
        f"cluster {cluster} is being attached to a VM, taken away from one, or destroyed",
        holder=f"process {pid}" if pid else "another command",
        cure="wait for it; ringbar status shows which VM",
    )


def using(cluster: int) -> contextlib.AbstractContextManager[None]:
    """The cluster is not destroyed meanwhile."""
    return _lock(fcntl.F_RDLCK, SLOT * (VMS + cluster), LOCK_TIMEOUT, _in_use(cluster))


def destroying(cluster: int) -> contextlib.AbstractContextManager[None]:
    """Nobody attaches the cluster to a VM, or detaches it, meanwhile."""
    return _lock(fcntl.F_WRLCK, SLOT * (VMS + cluster), LOCK_TIMEOUT, _in_use(cluster))


def brief() -> contextlib.AbstractContextManager[None]:
    """For reading and writing what VMs shall have. Nothing is waited for inside."""
    return _lock(
        fcntl.F_WRLCK,
        SLOT * (VMS + CLUSTERS),
        LOCK_TIMEOUT,
        lambda pid: Busy("the list of what VMs shall have is locked", holder=f"process {pid}", cure=f"kill {pid}"),
    )


def _read(path: Path) -> Record | None:
    try:
        known = {f.name for f in dataclasses.fields(Record)}
        return Record(**{k: v for k, v in json.loads(path.read_text()).items() if k in known})
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return None  # gone meanwhile, or no record of ours


def all_records() -> list[Record]:
    """Every record, by VM and cluster. None when nothing was ever attached."""
    try:
        paths = sorted(folder().glob("*.json"))
    except PermissionError:
        return []
    found = [r for r in map(_read, paths) if r is not None]
    return sorted(found, key=lambda r: (r.vm, r.cluster))


def find(key: str, cluster: int) -> Record | None:
    """The record of this VM and cluster, if there is one."""
    return _read(_path(key, cluster))


def write(record: Record) -> None:
    """Put ``record`` in place, whole or not at all. The VM's lock is held."""
    path = _path(record.key, record.cluster)
    make_directory(path.parent)
    fd, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    for_group(fd, 0o660)
    try:
        with os.fdopen(fd, "w") as f:
            json.dump(dataclasses.asdict(record), f, indent=1)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def remove(record: Record) -> None:
    """Forget it. The VM's lock is held."""
    with contextlib.suppress(FileNotFoundError):
        _path(record.key, record.cluster).unlink()
