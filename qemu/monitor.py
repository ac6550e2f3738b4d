# SPDX-License-Identifier: Apache-2.0
"""What hot-plug asks of a running QEMU: one interface with two back ends.

:class:`ringbar.qemu.qmp.Connection` speaks QMP over QEMU's own socket; :class:`ringbar.qemu.libvirt.Connection` has
libvirt, which holds that socket, pass the same commands on. Everything above knows only :class:`Monitor`.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ringbar.errors import Error

#: Seconds that QEMU may take to answer one command. Its main loop can be held up by large memory being mapped.
COMMAND_TIMEOUT = 30.0


class CommandError(Error):
    """QEMU understood a command and refused it. ``message`` is QEMU's own sentence."""

    default_code = "qemu-refused"


class Events(Protocol):
    """Events as they come: ``{"event": name, "data": {...}}``."""

    async def get(self) -> Mapping[str, Any]:
        """The next one; waits for it."""


def process_start(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; None when it is gone (or a zombie)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


class Monitor(abc.ABC):
    """A session with one life of one VM.

    :ivar name: the VM for messages: its socket's path, or its libvirt name.
    :ivar via: how it is reached, for people.
    :ivar libvirt_name: the VM's name where libvirt runs it, else None.
    :ivar pid: QEMU's process, 0 when it runs where we cannot see it (another pid namespace).
    :ivar start_time: when that process was started, clock ticks since boot.
    :ivar waited: seconds spent waiting for libvirt, QEMU and the guest.
    """

    via: str
    libvirt_name: str | None = None

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        self.start_time: int | None = process_start(pid) if pid else None
        self.waited = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What passes inside counts as waiting for others."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.waited += time.monotonic() - began

    @abc.abstractmethod
    async def close(self) -> None:
        """Ends the session. Never fails: a QEMU that is gone has nothing left to close."""

    @abc.abstractmethod
    async def execute(self, command: str, timeout: float = COMMAND_TIMEOUT, **arguments: Any) -> Any:
        """What QEMU answers. Underscores in argument names become hyphens.

        :raise CommandError: QEMU refused.
        :raise Error: ``vm-died``, ``monitor-lost`` or ``monitor-hangs``.
        """

    @abc.abstractmethod
    async def add_fd(self, fd: int, opaque: str) -> tuple[int, int]:
        """Gives QEMU a descriptor. :return: the number of the set, and QEMU's own number of the descriptor."""

    @abc.abstractmethod
    async def get_fd(self, fd: int, name: str) -> None:
        """Gives QEMU a descriptor by a name, for the next command that uses it up."""

    @abc.abstractmethod
    def events(self, *names: str) -> AbstractContextManager[Events]:
        """Collects the named events from now on."""

    async def lapses(self) -> None:
        """Returns when the session is over although the VM goes on: libvirt was restarted."""
        await asyncio.Event().wait()

    def alive(self) -> bool:
        """False once the QEMU process that we connected to has ended."""
        return self.start_time is not None and process_start(self.pid) == self.start_time

    async def lost(self) -> Error:
        """The error for a session that broke: QEMU has died, or only the connection is gone."""
        for _ in range(40):         # a dying process closes its sockets a moment before it is gone
            if not self.alive():
                return Error(f"the VM behind {self.name} ended in the middle of this", code="vm-died",
                             cure="start the VM and run the command again")
            await asyncio.sleep(0.05)
        return Error(f"the monitor connection to {self.name} broke, the VM still runs", code="monitor-lost",
                     cure="run the command again")

    def hangs(self, command: str, timeout: float) -> Error:
        """The error for a monitor that is silent."""
        return Error(f"the VM behind {self.name} does not answer its monitor ({command}, {timeout:g} s)",
                     code="monitor-hangs", cure="see whether QEMU is stopped or waits for its disk")

    async def hmp(self, line: str) -> str:
        """The text that a human monitor command prints."""
        return str(await self.execute("human-monitor-command", command_line=line))

    async def qom_list(self, path: str) -> dict[str, str]:
        """Name -> type of the object's properties."""
        return {p["name"]: p["type"] for p in await self.execute("qom-list", path=path)}

    async def qom_get(self, path: str, name: str, default: Any = None) -> Any:
        """A property's value, ``default`` when the object has no such property (or cannot say)."""
        try:
            return await self.execute("qom-get", path=path, property=name)
        except CommandError:
            return default


def named(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a Python call with the names that QMP gives them."""
    return {key.replace("_", "-"): value for key, value in arguments.items()}
