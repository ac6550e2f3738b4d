# SPDX-License-Identifier: Apache-2.0
"""The process ``ringbar agent``: its socket, its log, its start and its end.

Nothing of the data path lives here: tools and workers are processes of their own, rings and ledgers are in shared
memory, attachments are records on disk. Whatever kills this process stops no packet, and the next one finds it all.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ringbar.errors import Busy, Error
from ringbar.host.agent import api, socket_path
from ringbar.host.agent.at_start import AtStart
from ringbar.host.agent.journal import Journal
from ringbar.host.agent.rollback import Rollbacks
from ringbar.host.agent.watch import Watcher
from ringbar.host.service import Host

GROUP = "ringbar"
"""Its members may use the agent."""
AT_ONCE = 64
"""Requests that are worked on at the same time; an attach may wait for its guest."""
LISTEN_FD = 3
"""The first socket that systemd hands over (sd_listen_fds(3))."""

log = logging.getLogger("ringbar.agent")


class _JsonLines(logging.Formatter):
    """A log line is a JSON object: time, level, message, and what the caller adds."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        for name in ("event", "subject", "by", "audit"):
            if getattr(record, name, None):
                line[name] = getattr(record, name)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _WithPeer(H11Protocol):
    """Says who the peer is: the kernel's word for the other end of a Unix socket, not the caller's."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            size = struct.calcsize("3i")
            pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
            self.client = (f"uid {uid} pid {pid}", 0)


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); nothing where it does not listen."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
        s.connect("\0" + address[1:] if address.startswith("@") else address)
        s.sendall(state.encode())


@contextlib.contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """One agent for a run directory.

    :raises Busy: there is one already.
    """
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(directory / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    except PermissionError:
        raise Error(f"no permission to write {directory}", code="no-permission", cure="run it as root (sudo)") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            raise Busy(f"an agent runs already (pid {pid})", holder=f"pid {pid}", cure=f"kill {pid}") from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        yield
    finally:
        os.close(fd)


def handed_over() -> socket.socket | None:
    """The socket that systemd listens on for us (socket activation), if it does."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS", "0") == "0":
        return None
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    os.set_inheritable(LISTEN_FD, False)
    return socket.socket(fileno=LISTEN_FD)


def listen(path: Path) -> socket.socket:
    """A socket of our own, for root and the group ``ringbar``."""
    import grp

    with contextlib.suppress(FileNotFoundError):
        path.unlink()  # of an agent that is dead: only_one() holds the lock
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o117)
    try:
        listening.bind(str(path))
    except OSError as e:
        listening.close()
        raise Error(f"the socket {path} cannot be made: {(e.strerror or str(e)).lower()}", code="no-socket") from None
    finally:
        os.umask(before)
    with contextlib.suppress(KeyError, PermissionError):
        os.chown(path, -1, grp.getgrnam(GROUP).gr_gid)
    listening.listen(64)
    return listening


class _Server(uvicorn.Server):
    """uvicorn's server; signals are handled by :func:`_serve`, readiness is told to systemd."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        notify(f"READY=1\nSTATUS=listening on {socket_path()}")


async def _serve(server: _Server, listening: socket.socket, journal: Journal) -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(AT_ONCE, "request"))
    journal.follow_in(loop)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, server)
    await server.serve(sockets=[listening])


def _stop(server: _Server) -> None:
    notify("STOPPING=1")
    server.should_exit = True


def run() -> None:
    """Serve until SIGTERM or SIGINT.

    :raises Busy: an agent runs already.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    from ringbar.cli import _version

    directory = socket_path().parent
    with only_one(directory):
        path = socket_path()
        listening = handed_over()
        ours = listening is None
        if listening is None:
            listening = listen(path)
        journal = Journal(directory / "events.jsonl")
        host = Host()
        host.stays = True
        rollbacks = Rollbacks(host, journal)
        watcher = Watcher(host, journal)
        topologies = AtStart(host, journal)
        try:
            for note in host.reclaim():
                journal.add("reclaimed", "", note)
            version = _version()
            host.remember()
            topologies.apply()
            rollbacks.look()
            watcher.start()
            host.on_change = watcher.look
            app = api.build(host, journal, rollbacks, version, os.getpid())
            config = uvicorn.Config(
                app,
                http=_WithPeer,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=5,
                h11_max_incomplete_event_size=64 << 10,
            )
            journal.add("agent-started", "", f"agent {version} started (pid {os.getpid()})")
            asyncio.run(_serve(_Server(config), listening, journal))
            journal.add("agent-stopped", "", "agent stopped; packets go on")
        finally:
            topologies.stop()
            rollbacks.stop()
            watcher.stop()
            listening.close()
            if ours:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
