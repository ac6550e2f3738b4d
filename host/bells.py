# SPDX-License-Identifier: Apache-2.0
"""The doorbells of a VM: whether it gets one, the event descriptors behind it, and for which attachment it is.

A doorbell has a PCI slot of its own and stays in the VM when an attachment goes, for the next one: QEMU goes on
listening to the event descriptors of one that was unplugged, and crashes when their numbers are used again. This
process makes the descriptors, QEMU keeps them, and a file says which they are, by the kernel's numbers and QEMU's
process. So nothing of ours has to live on: whoever needs them takes them from QEMU. What the VM can write is never
read for that.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ringbar.errors import Error
from ringbar.host import native, records

if TYPE_CHECKING:
    from ringbar.host.vms import Machine
    from ringbar.qemu.bell import Refusal

ON = "interrupts"
"""What :attr:`Record.bell` says of an attachment with a doorbell; else why it has none."""

_SIZE = 4096
_CLUSTER_AT, _GENERATION_AT = 16, 32    # of a segment's header
_PIDFD_GETFD = 438                      # the same on every architecture


@dataclasses.dataclass(frozen=True)
class Doorbell:
    """One that is in a VM.

    :ivar identity: that life of the VM.
    :ivar slot: how it is called in QEMU.
    :ivar ids: the kernel's numbers of its event descriptors, the host's first.
    :ivar memory: device and inode of its memory.
    """

    identity: str
    slot: str
    ids: list[int]
    memory: list[int]

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return int(self.identity.partition(":")[0])

    @property
    def path(self) -> Path:
        """Where it is written down."""
        return records.folder() / f"{self.slot}-{self.identity.replace(':', '-')}.bell"

    def write(self) -> None:
        """Write it down. The records' lock is held."""
        self.path.write_text(json.dumps(dataclasses.asdict(self)))

    def open(self) -> int | None:
        """Its memory, which QEMU has; None when it has not."""
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found = entry.stat()
                if [found.st_dev, found.st_ino] == self.memory:
                    return os.open(entry, os.O_RDWR | os.O_CLOEXEC)
        return None

    def descriptors(self, files: contextlib.ExitStack) -> list[int]:
        """Its event descriptors, from QEMU.

        :raises Error: this process may not look into QEMU's, or it has not all of them.
        """
        numbers: dict[int, int] = {}
        process = -1
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{self.pid}/fdinfo").iterdir():
                with contextlib.suppress(OSError):
                    number = _id(entry)
                    if number is not None:
                        numbers[number] = int(entry.name)
            process = os.pidfd_open(self.pid)
            files.callback(os.close, process)
        fds = []
        for wanted in self.ids:
            libc = ctypes.CDLL(None, use_errno=True)
            fd = libc.syscall(_PIDFD_GETFD, process, numbers[wanted], 0) if wanted in numbers and process >= 0 else -1
            if fd < 0:
                raise Error("the doorbell's descriptors cannot be had from QEMU", code="no-permission",
                            cure="run it as root (sudo); it needs Linux 5.6")
            files.callback(os.close, fd)
            fds.append(int(fd))
        return fds


def _id(fdinfo: Path) -> int | None:
    found = re.search(r"^eventfd-id:\s*(\d+)", fdinfo.read_text(), re.MULTILINE)
    return int(found[1]) if found else None


def _event(files: contextlib.ExitStack) -> int:
    """A new event descriptor; os.eventfd is not in Python 3.9."""
    fd: int = ctypes.CDLL(None, use_errno=True).eventfd(0, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        raise Error(
            f"no event descriptor: {os.strerror(ctypes.get_errno()).lower()}",
            code="failed",
            cure="ulimit -n 4096, or attach it with --no-interrupts",
        )
    files.callback(os.close, fd)
    return fd


def why_not(machine: Machine, wanted: bool | None) -> Refusal | None:
    """Why an attachment gets no doorbell; None: it does.

    :param wanted: True: asked for; False: refused by whoever attaches; None: if the VM can use it.
    :raises Error: it was asked for and cannot be.
    """
    from ringbar.qemu.bell import Refusal  # not in a VM, where this is imported too

    if wanted is False:
        return Refusal("attached with --no-interrupts", "detach it, and attach it without")
    refusal = machine.no_bell()
    if refusal is not None and wanted:
        raise Error(f"{machine.name} cannot have interrupts: {refusal.why}", code="no-interrupts", cure=refusal.cure)
    return refusal


def _standing(machine: Machine) -> list[Doorbell]:
    """Doorbells that are in this VM; what is written of others that ended is removed."""
    there, found = machine.bells(), []
    for path in sorted(records.folder().glob("*.bell")):
        try:
            bell = Doorbell(**json.loads(path.read_text()))
        except (ValueError, TypeError):
            path.unlink(missing_ok=True)
            continue
        if not records.alive(bell.identity) or (bell.identity == machine.identity and bell.slot not in there):
            path.unlink(missing_ok=True)
        elif bell.identity == machine.identity:
            found.append(bell)
    return found


def _plug(
    machine: Machine, taken: set[str], use_last_slot: bool, deadline: float, progress: Callable[[str], None]
) -> Doorbell:
    from ringbar.qemu import Function
    from ringbar.qemu.bell import VECTORS, Bell

    names = (f"ringbar-bell{n}" for n in range(1000))
    slot = next(name for name in names if name not in taken and name not in machine.bells())
    with contextlib.ExitStack() as files:
        memory = os.memfd_create("ringbar-bell", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        files.callback(os.close, memory)
        os.ftruncate(memory, _SIZE)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        fds = [_event(files) for _ in range(1 + VECTORS)]
        ids = [_id(Path(f"/proc/self/fdinfo/{fd}")) for fd in fds]
        if None in ids:
            raise Error("this kernel does not number event descriptors", code="not-supported", cure="Linux 5.6")
        status = os.fstat(memory)
        bell = Doorbell(machine.identity, slot, [i for i in ids if i is not None], [status.st_dev, status.st_ino])
        bell.write()        # before it is plugged: it can never be taken out again
        try:
            function = Function("bell", _SIZE, fd=memory, bell=Bell(fds[0], tuple(fds[1:])))
            machine.plug_bell(slot, function, use_last_slot, deadline, progress)
        except BaseException:
            bell.path.unlink(missing_ok=True)
            raise
    return bell


def give(
    machine: Machine, handle: native.Handle, lane: int, use_last_slot: bool, deadline: float,
    progress: Callable[[str], None],
) -> str:
    """Let one of the VM's doorbells, or a new one, be this lane's. :return: its slot."""
    standing = _standing(machine)
    taken = {r.doorbell for r in records.all_records() if r.identity == machine.identity and r.cluster != handle.id}
    free = [bell for bell in standing if bell.slot not in taken]
    bell = free[0] if free else _plug(machine, taken, use_last_slot, deadline, progress)
    with contextlib.ExitStack() as files:
        memory = bell.open()
        if memory is None:
            raise Error(f"the memory of {bell.slot} is not in QEMU any more", code="plug-failed",
                        cure="attach it with --no-interrupts")
        files.callback(os.close, memory)
        fds = bell.descriptors(files)
        handle.bell_memory(lane, memory)
        handle.lane_bells(lane, bell.pid, fds)
    return bell.slot


def release(record: records.Record) -> None:
    """The attachment has gone, its doorbell is nobody's now."""
    for path in records.folder().glob(f"{record.doorbell}-*.bell") if record.doorbell else ():
        with contextlib.suppress(OSError, ValueError, TypeError):
            bell = Doorbell(**json.loads(path.read_text()))
            memory = bell.open() if bell.identity == record.identity and records.alive(bell.identity) else None
            if memory is not None:
                os.pwrite(memory, bytes(4), _CLUSTER_AT)
                os.pwrite(memory, bytes(8), _GENERATION_AT)
                os.close(memory)
