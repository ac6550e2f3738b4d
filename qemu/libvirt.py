# SPDX-License-Identifier: Apache-2.0
"""VMs of libvirt: found by name or UUID, and their QEMU reached through libvirt's monitor pass-through.

libvirt holds the monitor of its VMs, so the same QMP commands go through ``virDomainQemuMonitorCommand``, memory as
file descriptors through its form ``WithFiles``, and QEMU's events come back by
``virConnectDomainQemuMonitorEventRegister``. libvirt marks such a VM as tainted (``custom-monitor``) in its log.

libvirt's own ``<shmem>`` is not used: it has no read-only memory, no huge pages, no memory by descriptor, and
hot-plugs function 0 only, while a slot of ours has at least a lane and a pool.

libvirt's calls block. Each connection has one thread that makes them; one more thread for the whole process runs
libvirt's event loop, from which events and the keep-alive of connections come.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Callable, TypeVar
from urllib.parse import parse_qs, urlsplit

from ringbar.errors import Error, NotFound
from ringbar.qemu.monitor import COMMAND_TIMEOUT, CommandError, Monitor, named

try:
    import libvirt
    import libvirt_qemu
except ImportError:             # said with its cure when a VM of libvirt is asked for
    libvirt = libvirt_qemu = None

_T = TypeVar("_T")

#: Where VMs are looked for when nobody says otherwise.
DEFAULT_URI = "qemu:///system"
#: Keep-alive messages: every so many seconds, and how many may go unanswered.
_KEEPALIVE = (5, 3)
#: Seconds that libvirt may take to open a connection or to look a VM up.
OPEN_TIMEOUT = 10.0
#: The lowest number of a set of descriptors of ours; libvirt counts its own from 0.
_FIRST_FDSET = 0x72620000


@dataclass(frozen=True)
class Domain:
    """A VM that libvirt knows, running or not."""

    name: str
    uuid: str
    uri: str            #: the connection, as libvirt writes it
    id: int             #: libvirt's running number; -1 while the VM is off
    state: str          #: "running", "paused", "shut off", ...

    def __str__(self) -> str:
        return self.name if self.uri == DEFAULT_URI else f"{self.name} ({self.uri})"


def default_uri() -> str:
    """``$LIBVIRT_DEFAULT_URI``, else ``qemu:///system``."""
    return os.environ.get("LIBVIRT_DEFAULT_URI") or DEFAULT_URI


# ---- threads ------------------------------------------------------------------------------------------------------

_events_lock = threading.Lock()
_events_running = False


def _run_events() -> None:
    """Once in a process, before the first connection."""
    global _events_running
    with _events_lock:
        if _events_running:
            return
        libvirt.registerErrorHandler(_no_words, None)       # errors are reported by us, once
        libvirt.virEventRegisterDefaultImpl()

        def run() -> None:
            while True:
                with contextlib.suppress(libvirt.libvirtError):
                    libvirt.virEventRunDefaultImpl()

        threading.Thread(target=run, name="libvirt events", daemon=True).start()
        _events_running = True


def _no_words(context: Any, error: Any) -> None:
    """libvirt would print every error."""


class _Caller:
    """One thread that makes blocking calls in turn; a call that hangs holds up those behind it and nobody else."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="libvirt calls", daemon=True).start()

    def _run(self) -> None:
        while True:
            call = self._calls.get()
            if call is None:
                return
            call()

    def stop(self) -> None:
        """After the calls that were made."""
        self._calls.put(None)

    async def call(self, function: Callable[..., _T], *arguments: Any, timeout: float) -> _T:
        """What the function returns or raises; ``asyncio.TimeoutError`` when it takes too long."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_T] = loop.create_future()

        def tell(result: _T | None, error: BaseException | None) -> None:
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, error = None, None
            try:
                result = function(*arguments)
            except BaseException as err:
                error = err
            with contextlib.suppress(RuntimeError):     # nobody waits any more: the loop is closed
                loop.call_soon_threadsafe(tell, result, error)

        self._calls.put(run)
        return await asyncio.wait_for(answer, timeout)


# ---- finding ------------------------------------------------------------------------------------------------------


async def find(text: str, uri: str | None = None, timeout: float = OPEN_TIMEOUT) -> Domain:
    """The VM of this name or UUID.

    :param uri: of the connection; None: :func:`default_uri`.
    :raise NotFound: ``no-such-vm``.
    :raise Error: those of a connection that cannot be opened.
    """
    caller = _Caller()
    try:
        connection = await _open(caller, uri, timeout)
        try:
            return await caller.call(_describe, connection, text, timeout=timeout)
        except (asyncio.TimeoutError, TimeoutError):
            raise _silent(uri or default_uri(), timeout) from None
        except libvirt.libvirtError as err:
            raise _trouble(err, uri or default_uri()) from None
        finally:
            with contextlib.suppress(Exception):
                await caller.call(connection.close, timeout=1.0)
    finally:
        caller.stop()


@contextlib.asynccontextmanager
async def lifecycle(uuid: str, uri: str, told: Callable[[], None]) -> AsyncIterator[bool]:
    """While inside, ``told`` is called (in a thread of libvirt's) when the domain is started, and when the connection
    to libvirt is lost, so that the caller asks anew. Gives whether the domain runs now.

    :raise Error: libvirt cannot be asked, or has no such domain.
    """
    caller = _Caller()
    try:
        connection = await _open(caller, uri, OPEN_TIMEOUT)
        try:
            def arrived(_c: Any, _d: Any, event: int, _detail: int, _opaque: Any) -> None:
                if event == libvirt.VIR_DOMAIN_EVENT_STARTED:
                    told()

            def register() -> bool:
                handle = _lookup(connection, uuid)
                connection.registerCloseCallback(lambda *_: told(), None)
                registered.append(
                    connection.domainEventRegisterAny(handle, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, arrived, None))
                return bool(handle.isActive())

            def unregister() -> None:       # what is registered keeps the connection open
                for number in registered:
                    connection.domainEventDeregisterAny(number)
                connection.unregisterCloseCallback()

            registered: list[int] = []
            try:
                yield await caller.call(register, timeout=OPEN_TIMEOUT)
            except (asyncio.TimeoutError, TimeoutError):
                raise _silent(uri, OPEN_TIMEOUT) from None
            except libvirt.libvirtError as err:
                raise _trouble(err, uri) from None
            finally:
                with contextlib.suppress(Exception):
                    await caller.call(unregister, timeout=1.0)
        finally:
            with contextlib.suppress(Exception):
                await caller.call(connection.close, timeout=1.0)
    finally:
        caller.stop()


async def migrate(uuid: str, uri: str, to: str, timeout: float) -> None:
    """Moves a running domain to another host's libvirt, which its own libvirt connects to, and its definition with it.

    :raise Error: ``migration-failed``: it runs here as before.
    :raise TimeoutError: it was called off.
    """
    caller = _Caller()
    try:
        connection = await _open(caller, uri, OPEN_TIMEOUT)
        try:
            def move() -> None:
                flags = (libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_PERSIST_DEST
                         | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE | libvirt.VIR_MIGRATE_ABORT_ON_ERROR)
                _lookup(connection, uuid).migrateToURI3(to, {}, flags)

            try:
                await caller.call(move, timeout=timeout)
            except (asyncio.TimeoutError, TimeoutError):
                with contextlib.suppress(libvirt.libvirtError):
                    _lookup(connection, uuid).abortJob()
                raise TimeoutError(f"the VM could not be migrated within {timeout:g} s: it goes on here") from None
            except libvirt.libvirtError as err:
                raise Error(f"libvirt does not migrate it to {to}: {err.get_error_message()}",
                            code="migration-failed", cure=f"virsh -c {to} list shows whether it is reached") from None
        finally:
            with contextlib.suppress(Exception):
                await caller.call(connection.close, timeout=1.0)
    finally:
        caller.stop()


async def _open(caller: _Caller, uri: str | None, timeout: float) -> Any:
    if libvirt is None:
        raise Error("VMs of libvirt need Python's libvirt module, which is not installed here", code="not-installed",
                    cure="pip install 'ringbar[host]', or apt-get install python3-libvirt; or name the VM by its "
                    "monitor socket, qmp:PATH")
    wanted = uri or default_uri()
    check_uri(wanted)
    _run_events()
    try:
        connection = await caller.call(libvirt.open, wanted, timeout=timeout)
    except (asyncio.TimeoutError, TimeoutError):
        raise _silent(wanted, timeout) from None
    except libvirt.libvirtError as err:
        raise _trouble(err, wanted) from None
    with contextlib.suppress(libvirt.libvirtError):
        connection.setKeepAlive(*_KEEPALIVE)
    return connection


def check_uri(uri: str) -> None:
    """Refuses what is not a QEMU of this host. Who may ask the agent must not be able to let it run a command
    (``qemu+ext:///system?command=...``) or hand memory to a socket of anybody's.

    :raise Error: ``bad-uri``, ``not-qemu``, ``other-host``.
    """
    cure = "-C qemu:///system or -C qemu:///session"
    try:
        parts = urlsplit(uri)
        host = parts.hostname
        query = parse_qs(parts.query, strict_parsing=bool(parts.query), keep_blank_values=True)
    except ValueError:
        raise Error(f"{uri!r} is no URI of libvirt", code="bad-uri", cure=cure) from None
    driver, _, transport = parts.scheme.partition("+")
    if host is not None or transport in ("ssh", "libssh", "libssh2", "tcp", "tls"):
        raise Error(f"{uri} is another host's libvirt, and memory can only be plugged into VMs of this host",
                    code="other-host", cure=f"run ringbar on {host}" if host else cure)
    if driver not in ("", "qemu"):
        raise Error(f"{uri} is libvirt's driver {driver}; memory can be plugged into VMs of QEMU only",
                    code="not-qemu", cure=cure)
    where = parts.path in ("/system", "/session") and not set(query) - {"socket"}
    if not driver or transport not in ("", "unix") or not where:
        raise Error(f"{uri!r} is no URI that ringbar connects to", code="bad-uri", cure=cure)
    for path in query.get("socket", ()):
        with contextlib.suppress(OSError):      # one that is not there: libvirt says so
            if os.stat(path).st_uid not in (0, os.geteuid()):
                raise Error(f"the socket {path} belongs to another user", code="bad-uri", cure=cure)


def _silent(uri: str, timeout: float) -> Error:
    return Error(f"libvirt at {uri} did not answer within {timeout:g} s", code="libvirt-hangs",
                 cure="systemctl restart libvirtd (the VMs go on running)")


def _lookup(connection: Any, text: str) -> Any:
    if re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", text):
        return connection.lookupByUUIDString(text)
    return connection.lookupByName(text)


def _describe(connection: Any, text: str) -> Domain:
    """Blocking: name, UUID and state."""
    uri = str(connection.getURI())
    if os.geteuid() == 0 and uri == "qemu:///session":  # root's session is the system's libvirt
        uri = DEFAULT_URI
    try:
        domain = _lookup(connection, text)
    except libvirt.libvirtError as err:
        if err.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        names = sorted(d.name() for d in connection.listAllDomains())
        there = f"there are: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "there are none"
        cure = f"virsh -c {uri} list --all; {there}"
        raise NotFound(f"libvirt at {uri} has no VM {text}", code="no-such-vm", cure=cure) from None
    states = {getattr(libvirt, f"VIR_DOMAIN_{word}"): text for word, text in _STATES.items()}
    return Domain(domain.name(), domain.UUIDString(), uri, domain.ID(), states.get(domain.state()[0], "unknown"))


_STATES = {
    "NOSTATE": "unknown", "RUNNING": "running", "BLOCKED": "running", "PAUSED": "paused", "SHUTDOWN": "shutting down",
    "SHUTOFF": "shut off", "CRASHED": "crashed", "PMSUSPENDED": "asleep",
}


def _trouble(err: Any, uri: str) -> Error:
    """libvirt's error in our words."""
    said = str(err.get_error_message() or err)
    code = err.get_error_code()
    if code in (libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_AUTH_CANCELLED, libvirt.VIR_ERR_AUTH_UNAVAILABLE,
                libvirt.VIR_ERR_ACCESS_DENIED) or "Permission denied" in said:
        return Error(f"no permission to use libvirt at {uri}: {said}", code="no-permission",
                     cure="run it as root (sudo), or join the group: usermod -aG libvirt $USER, and log in again")
    if "Failed to connect socket" in said or "Cannot recv data" in said or "Connection refused" in said:
        return Error(f"libvirt does not run, or not at {uri}: {said}", code="libvirt-unreachable",
                     cure="systemctl start libvirtd (or virtqemud)")
    if code in (libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_INVALID_ARG, libvirt.VIR_ERR_NO_CONNECT,
                libvirt.VIR_ERR_CONFIG_UNSUPPORTED):
        return Error(f"libvirt cannot use {uri}: {said}", code="bad-uri",
                     cure="-C qemu:///system or -C qemu:///session")
    return Error(f"libvirt at {uri} failed: {said}", code="libvirt-failed", cure="see: journalctl -u libvirtd")


def _process(uuid: str, number: int) -> int:
    """QEMU's process of a running VM, by the arguments that libvirt gives it; 0 when it cannot be seen."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().decode("utf-8", "replace").split("\0")
            if any(a == "-uuid" and b.lower() == uuid for a, b in zip(words, words[1:])):
                if any(f"/domain-{number}-" in word for word in words):
                    return int(pid)
    return 0


# ---- the monitor --------------------------------------------------------------------------------------------------


class _Queue:
    """Events as the hot-plug code takes them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()

    def put(self, event: str, data: Any) -> None:
        """From libvirt's thread."""
        with contextlib.suppress(RuntimeError):         # the loop is closed
            self._loop.call_soon_threadsafe(self._queue.put_nowait, {"event": event, "data": data})

    async def get(self) -> Mapping[str, Any]:
        return await self._queue.get()


class Connection(Monitor):
    """The monitor of one running VM, through libvirt. Use :meth:`open`, then ``await close()``."""

    via = "libvirt's monitor commands"

    def __init__(self, domain: Domain, caller: _Caller, connection: Any, handle: Any) -> None:
        super().__init__(str(domain), _process(domain.uuid, domain.id))
        self.domain = domain
        self.libvirt_name = domain.name
        self._caller = caller
        self._connection = connection
        self._handle = handle

    @classmethod
    async def open(cls, text: str, uri: str | None = None, timeout: float = OPEN_TIMEOUT) -> Connection:
        """Connects to a running VM.

        :param text: its name or UUID.
        :param uri: of the connection; None: :func:`default_uri`.
        :raise NotFound: ``no-such-vm``, or ``vm-off``: it is not running.
        :raise Error: ``libvirt-unreachable``, ``no-permission``, ``other-host``, ``not-qemu``, ``not-installed``.
        """
        caller = _Caller()
        connection = None
        began = time.monotonic()
        try:
            connection = await _open(caller, uri, timeout)
            domain = await caller.call(_describe, connection, text, timeout=timeout)
            if domain.id < 0:
                where = "" if domain.uri == DEFAULT_URI else f"-c {domain.uri} "
                raise NotFound(f"the VM {domain} is {domain.state}", code="vm-off",
                               cure=f"virsh {where}start {domain.name}, and run the command again")
            handle = await caller.call(_lookup, connection, domain.uuid, timeout=timeout)
            answered = time.monotonic()
            opened = cls(domain, caller, connection, handle)
            opened.waited = answered - began
            return opened
        except BaseException as err:
            if connection is not None:
                with contextlib.suppress(Exception):
                    await caller.call(connection.close, timeout=1.0)
            caller.stop()
            if isinstance(err, (asyncio.TimeoutError, TimeoutError)):
                raise _silent(uri or default_uri(), timeout) from None
            if libvirt is not None and isinstance(err, libvirt.libvirtError):
                raise _trouble(err, uri or default_uri()) from None
            raise

    async def lapses(self) -> None:
        """See :meth:`Monitor.lapses`."""
        loop = asyncio.get_running_loop()
        over = asyncio.Event()

        def told(*_: Any) -> None:
            with contextlib.suppress(RuntimeError):         # the loop is closed
                loop.call_soon_threadsafe(over.set)

        connection = self._connection
        try:
            await self._caller.call(connection.registerCloseCallback, told, None, timeout=OPEN_TIMEOUT)
            await over.wait()
        except libvirt.libvirtError:        # it is over already
            return
        finally:
            with contextlib.suppress(Exception):        # as long as it is registered the connection stays open
                await self._caller.call(connection.unregisterCloseCallback, timeout=1.0)

    async def close(self) -> None:
        """Ends the session. Never fails, and does not wait for a libvirt that hangs."""
        with contextlib.suppress(Exception):
            await self._caller.call(self._connection.close, timeout=1.0)
        self._caller.stop()

    async def execute(self, command: str, timeout: float = COMMAND_TIMEOUT, **arguments: Any) -> Any:
        """See :meth:`Monitor.execute`."""
        return await self._ask(command, timeout, arguments)

    async def _ask(
        self, command: str, timeout: float, arguments: Mapping[str, Any], files: list[int] | None = None
    ) -> Any:
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = named(arguments)
        try:
            with self.waiting():
                said = await self._caller.call(self._monitor_command, json.dumps(message), files, timeout=timeout)
            answer = json.loads(said)
        except (asyncio.TimeoutError, TimeoutError):
            raise self.hangs(command, timeout) from None
        except libvirt.libvirtError as err:
            if err.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT:
                raise self.hangs(command, timeout) from None
            error = await self.lost()
            if error.code == "monitor-lost":
                if await self._usable():
                    raise _trouble(err, self.domain.uri) from None
                await self._reconnect()
            raise error from None
        if "error" in answer:
            raise CommandError(str(answer["error"].get("desc", answer["error"])))
        return answer["return"]

    def _monitor_command(self, message: str, files: list[int] | None) -> str:
        """Blocking."""
        if files is None:
            return str(libvirt_qemu.qemuMonitorCommand(self._handle, message, 0))
        said, returned = libvirt_qemu.qemuMonitorCommandWithFiles(self._handle, message, files, 0)
        for file in returned:
            file.close()
        return str(said)

    async def _usable(self) -> bool:
        """Whether libvirt is there and the VM runs."""
        with contextlib.suppress(libvirt.libvirtError, asyncio.TimeoutError, TimeoutError):
            return bool(await self._caller.call(self._handle.isActive, timeout=OPEN_TIMEOUT))
        return False

    async def _reconnect(self) -> None:
        """After libvirt was restarted: a connection for what follows, the taking back of what was begun. The command
        that failed is not repeated, since it may have been carried out."""
        deadline = time.monotonic() + OPEN_TIMEOUT
        while self.alive() and time.monotonic() < deadline:
            try:
                connection = await _open(self._caller, self.domain.uri, OPEN_TIMEOUT)
                self._handle = await self._caller.call(_lookup, connection, self.domain.uuid, timeout=OPEN_TIMEOUT)
                self._connection = connection
                return
            except (Error, libvirt.libvirtError, asyncio.TimeoutError, TimeoutError):
                await asyncio.sleep(0.2)

    async def add_fd(self, fd: int, opaque: str) -> tuple[int, int]:
        """See :meth:`Monitor.add_fd`. The set gets a number that libvirt will not give to one of its own."""
        used = {int(entry["fdset-id"]) for entry in await self.execute("query-fdsets")}
        number = max((n + 1 for n in used if n >= _FIRST_FDSET), default=_FIRST_FDSET)
        answer = await self._ask("add-fd", COMMAND_TIMEOUT, {"fdset_id": number, "opaque": opaque}, [fd])
        return int(answer["fdset-id"]), int(answer["fd"])

    async def get_fd(self, fd: int, name: str) -> None:
        """See :meth:`Monitor.get_fd`."""
        await self._ask("getfd", COMMAND_TIMEOUT, {"fdname": name}, [fd])

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[_Queue]:
        """See :meth:`Monitor.events`."""
        collected = _Queue()

        def arrived(_c: Any, _d: Any, event: str, _s: int, _us: int, details: str | None, _opaque: Any) -> None:
            collected.put(event, json.loads(details) if details else {})

        numbers: list[int] = []
        connection, register = self._connection, libvirt_qemu.qemuMonitorEventRegister
        try:
            try:
                numbers += [register(connection, self._handle, name, arrived, None) for name in names]
            except libvirt.libvirtError as err:
                raise _trouble(err, self.domain.uri) from None
            yield collected
        finally:
            for number in numbers:
                with contextlib.suppress(libvirt.libvirtError):
                    libvirt_qemu.qemuMonitorEventDeregister(connection, number)
