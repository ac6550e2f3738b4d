# SPDX-License-Identifier: Apache-2.0
"""The connection to a running QEMU through its QMP socket, and every way in which that can go wrong.

Whatever the socket does (absent, not ours to open, not QMP, taken by another client, closed in the middle), callers
see one :class:`ringbar.Error` with a code and a cure. QEMU serves one monitor client at a time; a second one is let
in to the socket but gets no greeting, which is how it is told apart here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError
from qemu.qmp.protocol import ConnectError, StateError
from qemu.qmp.qmp_client import GreetingError
from ringbar.errors import BadAddress, Busy, Error, NotFound
from ringbar.qemu.monitor import COMMAND_TIMEOUT, CommandError, Monitor, named

logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())    # errors are reported by us, once


def parse_address(address: str) -> str:
    """The socket's path from ``qmp:/path`` or ``/path``.

    :raise BadAddress: neither of the two, or longer than a Unix socket's name can be.
    """
    path = address[4:] if address.startswith("qmp:") else address
    if not path.startswith("/") or "\0" in path:
        raise BadAddress(f"{address!r} is not a QMP socket", cure="give it as qmp:/path/to/socket")
    if len(os.fsencode(path)) > 107:
        raise BadAddress(
            f"the path of the QMP socket is longer than the 107 bytes that Linux allows: {path}",
            cure="make a symbolic link with a shorter path and give that",
        )
    return path


def _listener_pid(path: str) -> int | None:
    """The process that has the listening socket open now (libvirt makes it and hands it to QEMU)."""
    inodes = set()
    with contextlib.suppress(OSError), open("/proc/net/unix", encoding="utf-8", errors="replace") as table:
        for line in table:
            fields = line.split(None, 7)
            if len(fields) == 8 and fields[3] == "00010000" and fields[7].rstrip("\n") == path:
                inodes.add(f"socket:[{fields[6]}]")
    for pid in filter(str.isdigit, os.listdir("/proc") if inodes else ()):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{fd}") in inodes:
                        return int(pid)
    return None


def _other_client(path: str, own_inode: int) -> str | None:
    """Who else is connected to the socket, as ``name (pid N)``, asked of ``ss``; None when nobody is, or unknown."""
    ss = shutil.which("ss")
    if ss is None:
        return None
    listing = subprocess.run([ss, "-xpH"], capture_output=True, text=True, errors="replace", timeout=10).stdout
    rows = [line.split(None, 8) for line in listing.splitlines()]
    rows = [row for row in rows if len(row) >= 8]
    taken = {row[7] for row in rows if row[4] == path and len(row) == 9 and "users:" in row[8]}
    for row in rows:
        if row[5] in taken and row[5] != str(own_inode) and len(row) == 9:
            user = re.search(r'"([^"]*)",pid=(\d+)', row[8])
            if user is not None:
                return f"{user[1]} (pid {user[2]})"
    return None


def _not_qmp(path: str, said: bytes) -> Error:
    """The error for a peer that speaks, but not QMP."""
    if said.startswith(b"RFB "):
        what = "a VNC server"
    elif b"monitor - type 'help'" in said or b"(qemu)" in said:
        what = "QEMU's human monitor (HMP)"
    elif said.startswith(b"SSH-"):
        what = "an SSH server"
    else:
        what = f"something that says {said[:40].decode('ascii', 'replace')!r}"
    return Error(
        f"{path} is not a QMP socket: {what} answers there",
        code="not-qmp", cure=f"start the VM with -qmp unix:{path},server=on,wait=off, or give its QMP socket",
    )


class Connection(Monitor):
    """One QMP session. Use :meth:`open`, then ``await close()``."""

    via = "QMP"

    def __init__(self, path: str, client: QMPClient, sock: socket.socket) -> None:
        pid = _listener_pid(path)
        if pid is None:
            pid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        super().__init__(path, pid)
        self._client = client

    @classmethod
    async def open(cls, address: str, timeout: float = 5.0) -> Connection:
        """Connects and negotiates.

        :param address: ``qmp:/path`` or ``/path``.
        :param timeout: seconds until a silent socket is given up.
        :raise NotFound: no such socket (``no-such-vm``), or nobody listens on it any more (``vm-off``).
        :raise Busy: another client holds the monitor (``monitor-busy``).
        :raise Error: ``no-permission``, ``not-qmp``.
        """
        path = parse_address(address)
        deadline = time.monotonic() + timeout
        sock = await cls._connect(path, deadline)
        own_inode = os.fstat(sock.fileno()).st_ino
        client = QMPClient("ringbar")
        connection = None
        try:
            client_sock = sock.dup()       # the client closes its own when it fails; peer questions need one still
            client_sock.setblocking(False)
            began = time.monotonic()
            try:
                await asyncio.wait_for(client.connect(client_sock), max(0.1, deadline - time.monotonic()))
            except (asyncio.TimeoutError, TimeoutError):
                raise cls._silent(path, own_inode, timeout) from None
            except ConnectError as err:
                raise cls._refused(path, err) from None
            greeted = time.monotonic()
            connection = cls(path, client, sock)
            connection.waited = greeted - began
            return connection
        finally:
            sock.close()
            if connection is None:
                with contextlib.suppress(Exception):
                    await client.disconnect()

    @staticmethod
    async def _connect(path: str, deadline: float) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            while True:
                try:
                    sock.connect(path)
                    return sock
                except BlockingIOError:     # its queue of waiting clients is full
                    if time.monotonic() >= deadline:
                        holder = _other_client(path, 0)
                        raise Busy(
                            f"other clients already wait for the monitor at {path}" +
                            (f", which {holder} holds" if holder else ""),
                            holder=holder, code="monitor-busy", cure="close the other client, or give the VM a "
                            "second QMP socket (-qmp unix:PATH,server=on,wait=off)",
                        ) from None
                    await asyncio.sleep(0.05)
        except FileNotFoundError:
            error: Error = NotFound(
                f"there is no socket {path}", code="no-such-vm",
                cure=f"start the VM with -qmp unix:{path},server=on,wait=off, or look for its socket with: ss -xl",
            )
        except PermissionError:
            error = Error(f"no permission to connect to {path}", code="no-permission",
                          cure="run the command as root or as the user that runs the VM")
        except ConnectionRefusedError:
            if os.path.exists(path) and not os.path.islink(path) and not _is_socket(path):
                error = Error(f"{path} is a file, not a socket", code="not-qmp",
                              cure=f"start the VM with -qmp unix:{path},server=on,wait=off, or give its QMP socket")
            else:
                error = NotFound(f"nobody listens on {path}: the VM is shut down", code="vm-off",
                                 cure="start the VM and run the command again")
        except OSError as err:
            error = Error(f"cannot connect to {path}: {err.strerror}", code="not-qmp",
                          cure="give the path of the VM's QMP socket")
        except BaseException:
            sock.close()
            raise
        sock.close()
        raise error

    @staticmethod
    def _silent(path: str, own_inode: int, timeout: float) -> Error:
        holder = None
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            holder = _other_client(path, own_inode)
        if holder is not None:
            return Busy(
                f"the monitor at {path} is held by {holder}; QEMU serves one client at a time", holder=holder,
                code="monitor-busy", cure="close that client, use the VM's libvirt name if libvirt holds it, or give "
                "the VM a second QMP socket (-qmp unix:PATH,server=on,wait=off)",
            )
        return Busy(
            f"{path} accepts the connection but sent no QMP greeting within {timeout:g} s: another monitor client "
            "(libvirt, the ringbar agent) holds it, or it is not a QMP socket", code="monitor-busy",
            cure=f"see who is connected with: ss -xp | grep {path}",
        )

    @staticmethod
    def _refused(path: str, err: ConnectError) -> Error:
        cause = err.exc
        if isinstance(cause, GreetingError):
            inner = cause.exc
            return _not_qmp(path, getattr(inner, "raw", b"") or repr(getattr(inner, "msg", "")).encode())
        if isinstance(cause, (EOFError, ConnectionError)):
            return Error(f"{path} closed the connection before any QMP greeting", code="not-qmp",
                         cure="give the QMP socket of a running VM")
        return Error(f"no QMP session with {path}: {cause}", code="not-qmp",
                     cure="give the QMP socket of a running VM")

    async def close(self) -> None:
        """Ends the session. Never fails: a QEMU that is gone has nothing left to close."""
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()

    async def execute(self, command: str, timeout: float = COMMAND_TIMEOUT, **arguments: Any) -> Any:
        """What QEMU answers. Underscores in argument names become hyphens.

        :raise CommandError: QEMU refused.
        :raise Error: ``vm-died``, ``monitor-lost`` or ``monitor-hangs``.
        """
        try:
            with self.waiting():
                return await asyncio.wait_for(self._client.execute(command, named(arguments) or None), timeout)
        except ExecuteError as err:
            raise CommandError(str(err)) from None
        except (asyncio.TimeoutError, TimeoutError):
            raise self.hangs(command, timeout) from None
        except (ExecInterruptedError, StateError, EOFError, OSError):
            raise await self.lost() from None

    async def add_fd(self, fd: int, opaque: str) -> tuple[int, int]:
        """See :meth:`Monitor.add_fd`."""
        await self._send_fd(fd, "add-fd")
        answer = await self.execute("add-fd", opaque=opaque)
        return int(answer["fdset-id"]), int(answer["fd"])

    async def get_fd(self, fd: int, name: str) -> None:
        """See :meth:`Monitor.get_fd`."""
        await self._send_fd(fd, "getfd")
        await self.execute("getfd", fdname=name)

    async def _send_fd(self, fd: int, command: str) -> None:
        deadline = time.monotonic() + COMMAND_TIMEOUT
        while True:
            try:
                self._client.send_fd_scm(fd)
                return
            except BlockingIOError:         # the socket's buffer is full: QEMU is busy
                if time.monotonic() > deadline:
                    raise self.hangs(command, COMMAND_TIMEOUT) from None
                await asyncio.sleep(0.01)
            except (StateError, OSError):
                raise await self.lost() from None

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[EventListener]:
        """Collects the named events from now on."""
        with self._client.listener(names) as listener:
            yield listener


def _is_socket(path: str) -> bool:
    import stat
    return stat.S_ISSOCK(os.stat(path).st_mode)
