# SPDX-License-Identifier: Apache-2.0
"""Moving a VM with its queues: detach, migrate, attach on the other side. What fails leaves the VM here, as it was.

Attached memory is of this host (ivshmem with ``master=off``), so QEMU refuses to migrate a VM that has it: the
program in the VM sees its queues detached, and attached again after the move.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ringbar.errors import Error, NotFound
from ringbar.host import model, records
from ringbar.host import wanted as shall
from ringbar.qemu import libvirt, qmp
from ringbar.qemu.monitor import CommandError, Monitor

if TYPE_CHECKING:
    from ringbar.host.service import Host
    from ringbar.host.vms import Name

Progress = Callable[[str], None]

LOOK = 0.1
"""Seconds between two looks at how far QEMU is; it tells by events only when asked for, and libvirt may not have."""
PIPE = "ringbar-migration"
"""The descriptor's name in both QEMUs."""
_ANOTHER_HOST = r"qemu\+(ssh|tls)://([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]{1,5})?/system"
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")


def migrate(host: Host, vm: str, to: str, timeout: float, connect: str | None, progress: Progress) -> model.Migrated:
    """Move a running VM.

    :param to: ``qmp:SOCKET`` of a QEMU on this host that was started with ``-incoming defer``, or libvirt's URI of
        another host, ``qemu+ssh://HOST/system``.
    :param timeout: seconds for all of it.
    :raises Error: the VM runs here, with what it had.
    """
    from ringbar.host import vms

    deadline = time.monotonic() + timeout
    name = vms.known(vm, connect)
    _check(name, to)
    had = _what_it_has(name)
    progress(f"detaching {name.shown}")
    if had.shares:
        host.detach(vm, [], timeout=timeout, connect=connect, progress=progress)
    try:
        with vms.monitor_lent(name.key):
            if name.uuid:
                asyncio.run(_by_libvirt(name, to, deadline, progress))
            else:
                asyncio.run(_by_qmp(name, to, deadline, progress))
    except BaseException as e:
        if had.shares:
            progress(f"putting back what {name.shown} had")
            try:
                host.give_back(had, timeout=60.0, progress=progress)
            except Error as again:
                raise Error(
                    f"{e}; and what {name.shown} had could not be attached again: {again.message}",
                    code="migration-failed",
                    cure=f"ringbar attach {name.typed} QUEUE",
                ) from None
            if host.stays:
                host.remember()
        raise
    done = model.Migrated(changed=True, vm=name.shown, to=to)
    if had.shares:
        _attach_there(host, name, had, to, deadline, progress, done)
    return done


def _check(name: Name, to: str) -> None:
    if name.uuid:
        # libvirtd connects there, and ssh after it: nothing that lets either of them run a command of the caller's.
        if not re.fullmatch(_ANOTHER_HOST, to):
            raise Error(f"{to!r} names no other host's libvirt", code="bad-uri", cure="such as qemu+ssh://HOST/system")
    elif not to.startswith("qmp:"):
        raise Error(
            f"{name.shown} is known by its monitor socket, and {to!r} is none",
            code="bad-uri",
            cure="qmp:SOCKET of a QEMU on this host that was started with -incoming defer",
        )


def _what_it_has(name: Name) -> shall.Wanted:
    """What is plugged in, and what it shall have."""
    from ringbar.host.attaching import describe

    found = shall.find(name.key) or shall.Wanted(name.shown, name.uuid, name.uri)
    for record in records.all_records():
        if record.key != name.key or record.state != "plugged":
            continue
        bindings = describe(record).bindings
        found.shares[record.cluster] = shall.Share(
            [b.queue for b in bindings if b.direction == "rx"],
            [b.queue for b in bindings if b.direction == "tx"],
            record.pool,
        )
    return found


async def _by_qmp(name: Name, to: str, deadline: float, progress: Progress) -> None:
    """Over a pair of connected sockets, one end handed to each QEMU, whoever these run as."""
    source = await qmp.Connection.open(name.shown)
    try:
        target = await qmp.Connection.open(to)
        try:
            state = str((await target.execute("query-status"))["status"])
            if state != "inmigrate":
                raise Error(
                    f"{to} waits for no VM: it is in state {state}",
                    code="not-incoming",
                    cure="start that QEMU, with the same devices, with -incoming defer",
                )
            here, there = socket.socketpair()
            with here, there:
                await target.get_fd(there.fileno(), PIPE)
                await source.get_fd(here.fileno(), PIPE)
            await target.execute("migrate-incoming", uri=f"fd:{PIPE}")
            await source.execute("migrate", uri=f"fd:{PIPE}")
            await _arrives(source, name, deadline, progress)
        finally:
            await target.close()
    except CommandError as e:
        raise Error(f"QEMU does not migrate {name.shown}: {e.message}", code="migration-failed") from None
    finally:
        await source.close()


async def _arrives(source: Monitor, name: Name, deadline: float, progress: Progress) -> None:
    while True:
        now = await source.execute("query-migrate")
        state = now.get("status", "setup")
        if state == "completed":
            return
        if state in ("failed", "cancelled"):
            why = now.get("error-desc") or "QEMU does not say why"
            raise Error(f"the migration of {name.shown} failed: {why}", code="migration-failed")
        if time.monotonic() >= deadline:
            with contextlib.suppress(Error):
                await source.execute("migrate_cancel")
            raise TimeoutError(f"{name.shown} could not be migrated in time: it goes on here, with what it had")
        ram = now.get("ram", {})
        if ram.get("total"):
            progress(f"migrating {name.shown}: {100 * ram.get('transferred', 0) // ram['total']} %")
        await asyncio.sleep(LOOK)


async def _by_libvirt(name: Name, to: str, deadline: float, progress: Progress) -> None:
    progress(f"migrating {name.shown} to {to}")
    await libvirt.migrate(name.uuid, name.uri, to, max(1.0, deadline - time.monotonic()))


def _attach_there(
    host: Host, name: Name, had: shall.Wanted, to: str, deadline: float, progress: Progress, done: model.Migrated
) -> None:
    """What it had, on the other side."""
    from ringbar.host import vms

    if not name.uuid:
        shall.remove(name.key, {})
        there = shall.Wanted(f"qmp:{os.path.abspath(to.removeprefix('qmp:'))}", shares=had.shares)
        try:
            done.attachments = host.give_back(
                there, timeout=max(1.0, deadline - time.monotonic()), progress=progress
            ).attachments
        except (Error, TimeoutError) as e:
            raise Error(
                f"{name.shown} is at {to} now, and has not got its queues there: {e}",
                code="not-attached",
                cure=f"ringbar attach {vms.Name(there.vm).typed} {_words(had)}",
            ) from None
        if host.stays:
            host.remember()
        return
    where = urlsplit(to)
    user = f"{where.username}@" if where.username else ""
    command = f"ringbar attach {shlex.quote(name.shown)} {_words(had)}"
    progress(f"on {where.hostname}: {command}")
    try:
        said = subprocess.run(
            [*SSH, *(["-p", str(where.port)] if where.port else []), f"{user}{where.hostname}", command],
            capture_output=True,
            text=True,
            timeout=max(10.0, deadline - time.monotonic()),
            check=False,
        )
        problem = said.stderr.strip().splitlines()[0] if said.returncode and said.stderr.strip() else ""
        if said.returncode == 0:
            return
    except (OSError, subprocess.TimeoutExpired) as e:
        problem = str(e)
    raise NotFound(
        f"{name.shown} is on {where.hostname} now, and has not got its queues there: {problem or 'ssh failed'}",
        code="not-attached",
        cure=f"on {where.hostname}: {command}",
    )


def _words(had: shall.Wanted) -> str:
    """The arguments of attach that give what it had."""
    words: list[str] = []
    for share in had.shares.values():
        words += share.rx
        words += [word for queue in share.tx for word in ("--tx", queue)]
    pools = {share.pool for share in had.shares.values() if share.pool}
    if len(pools) == 1:
        words += ["--pool", pools.pop()]
    return " ".join(words)
