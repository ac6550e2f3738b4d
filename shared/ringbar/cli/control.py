# SPDX-License-Identifier: Apache-2.0
"""How a named worker is asked and told: a socket, a JSON document a line in each direction.

``{"do": "show"}``, ``{"do": "pause"}``, ``{"do": "resume"}``, ``{"do": "stop"}``,
``{"do": "set", "out": [["99@0", "99@1"]], "policy": "ip", "filter": "udp"}``. The answer is
``{"changed": [...], "worker": {...}}`` or ``{"error": {"code", "message", "cure"}}``. Who may connect is a matter of
the socket's mode, 0660.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

from ringbar.errors import Busy, Error, NotFound

LONGEST = 65536
"""Bytes of a request, its newline included."""
CLIENTS = 16
"""Connections at once; the oldest makes way."""
PATIENCE = 10.0
"""Seconds that a client waits for an answer."""
VERBS = ("show", "pause", "resume", "set", "stop")
FIELDS = {"show": (), "pause": (), "resume": (), "stop": (), "set": ("out", "policy", "filter")}


def directory() -> str:
    """Where workers are registered: ``$RINGBAR_RUN/workers``, else ``/run/ringbar/workers``."""
    return os.path.join(os.environ.get("RINGBAR_RUN") or "/run/ringbar", "workers")


def make_directory() -> str:
    """The same, made where it is missing."""
    path = directory()
    os.makedirs(path, mode=0o755, exist_ok=True)
    return path


def place(name: str, what: str) -> str:
    """The path of a worker's ``sock`` or ``log``."""
    return os.path.join(directory(), f"{name}.{what}")


def _connect(name: str) -> socket.socket:
    """:raises OSError: nobody listens."""
    client = socket.socket(socket.AF_UNIX)
    try:
        client.settimeout(PATIENCE)
        with _short(directory()) as where:
            deadline = time.monotonic() + PATIENCE
            while True:
                try:
                    client.connect(f"{where}/{name}.sock")
                    break
                except BlockingIOError:  # so many are waiting already
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"worker {name} does not answer") from None
                    time.sleep(0.01)
    except BaseException:
        client.close()
        raise
    return client


@contextlib.contextmanager
def _short(path: str) -> Iterator[str]:
    """A path to a directory that fits a socket's address, however deep it lies."""
    handle = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)


def alive(name: str) -> bool:
    """Whether a process answers to that name. The kernel knows: a dead one's socket refuses."""
    try:
        _connect(name).close()
    except TimeoutError:
        return True
    except OSError:
        return False
    return True


def names() -> list[str]:
    """Names that have a socket, dead ones too."""
    try:
        return sorted(entry[:-5] for entry in os.listdir(directory()) if entry.endswith(".sock"))
    except FileNotFoundError:
        return []


def free_name(tool: str) -> str:
    """``balance-1``: the first that nobody answers to."""
    return next(name for name in (f"{tool}-{n}" for n in range(1, 100_000)) if not alive(name))


def check_free(name: str) -> None:
    """:raises Busy: a living worker has that name."""
    if alive(name):
        raise Busy(
            f"there is a worker {name} already",
            holder=name,
            cure=f"ringbar worker stop {name}, or another --name",
        )


def forget(name: str) -> bool:
    """Remove what a dead worker left of its socket and log. False: there was nothing."""
    found = False
    for what in ("sock", "log"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place(name, what))
            found = True
    return found


def remove_log(name: str) -> None:
    """Remove a worker's log."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(place(name, "log"))


def ask(name: str, verb: str, **fields: Any) -> dict[str, Any]:
    """Ask a worker; its answer. After ``stop`` it has ended.

    :raises NotFound: nobody has that name.
    :raises Error: what the worker answered.
    """
    try:
        client = _connect(name)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        raise NotFound(
            f"there is no worker {name}", code="no-such-worker", cure="ringbar worker list shows those that are there"
        ) from None
    with client:
        try:
            client.sendall(json.dumps({"do": verb, **fields}).encode() + b"\n")
            with client.makefile("rb") as stream:
                line = stream.readline(1 << 24)
                if verb == "stop" and stream.read(1):
                    line = b""
        except OSError as e:
            if isinstance(e, TimeoutError):
                raise TimeoutError(f"worker {name} does not answer") from None
            line = b""
    try:
        answer: dict[str, Any] = json.loads(line)
    except ValueError:
        raise Error(f"worker {name} ended before it answered", code="died", cure=f"see {place(name, 'log')}") from None
    if "error" in answer:
        error = answer["error"]
        raise Error(error["message"], code=error["code"], cure=error["cure"])
    return answer


Answer = Callable[[dict[str, Any]], dict[str, Any]]


class Server:
    """A worker's own end: its name is taken while this is open.

    :ivar asked_by: who asks for what is being answered, by the kernel's word.
    """

    def __init__(self, name: str) -> None:
        """Use it in a ``with``, in one thread.

        :raises Busy: a living worker has that name.
        """
        self.name = name
        self.asked_by = ""
        self._selector = selectors.DefaultSelector()
        self._buffers: dict[socket.socket, bytearray] = {}
        self._waiting: list[socket.socket] = []  # for the end
        path = make_directory()
        lock = os.open(os.path.join(path, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX)  # two that take one name at once
            check_free(name)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(place(name, "sock"))
            mask = os.umask(0o117)
            try:
                with _short(path) as where:
                    self._listener.bind(f"{where}/{name}.sock")
            finally:
                os.umask(mask)
            self._listener.listen(4 * CLIENTS)
            self._listener.setblocking(False)
        except BaseException:
            self._listener.close()
            raise
        finally:
            os.close(lock)
        self._selector.register(self._listener, selectors.EVENT_READ)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place(self.name, "sock"))
        self._listener.close()
        self._selector.close()
        for client in [*self._buffers, *self._waiting]:  # those that wait for the end learn of it now: the name is free
            client.close()

    def serve(self, answer: Answer) -> None:
        """Answer what has been asked; waits for nothing."""
        for key, _ in self._selector.select(0):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj in self._buffers:  # it did not have to make way meanwhile
                assert isinstance(key.fileobj, socket.socket)
                self._read(key.fileobj, answer)

    def finish(self, last: dict[str, Any]) -> None:
        """Tell those that asked for the end, now that it has come."""
        for client in self._waiting:
            self._say(client, {"changed": ["stopped"], **last})

    def _accept(self) -> None:
        for _ in range(CLIENTS):
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            client.setblocking(False)
            if len(self._buffers) >= CLIENTS:
                self._drop(next(iter(self._buffers)))
            self._buffers[client] = bytearray()
            self._selector.register(client, selectors.EVENT_READ)

    def _drop(self, client: socket.socket) -> None:
        self._selector.unregister(client)
        del self._buffers[client]
        client.close()

    def _read(self, client: socket.socket, answer: Answer) -> None:
        buffer = self._buffers[client]
        try:
            got = client.recv(LONGEST)
        except OSError as e:
            if e.errno not in (errno.EAGAIN, errno.EINTR):
                self._drop(client)
            return
        buffer += got
        while True:
            line, newline, rest = buffer.partition(b"\n")
            if not newline or len(line) >= LONGEST:
                break
            buffer[:] = rest
            if not self._obey(client, bytes(line), answer):
                return
        if len(buffer) >= LONGEST:
            self._say(client, _refusal(f"a request has at most {LONGEST - 1} bytes", "too-long"))
            self._drop(client)
        elif not got:
            self._drop(client)

    def _obey(self, client: socket.socket, line: bytes, answer: Answer) -> bool:
        """False: nothing more is read from this client."""
        try:
            request = _request(line)
            self.asked_by = _peer(client)
            said = answer(request)
        except Error as e:
            return self._say(client, {"error": e.as_json()}) or self._gone(client)
        if request["do"] == "stop":
            self._selector.unregister(client)
            del self._buffers[client]
            self._waiting.append(client)
            return False
        return self._say(client, said) or self._gone(client)

    def _gone(self, client: socket.socket) -> bool:
        self._drop(client)
        return False

    @staticmethod
    def _say(client: socket.socket, document: dict[str, Any]) -> bool:
        """False: the client does not read what it asked for."""
        data = json.dumps(document).encode() + b"\n"
        try:
            return client.send(data) == len(data)
        except OSError:
            return False


def _peer(client: socket.socket) -> str:
    try:
        pid, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return f"uid {uid} pid {pid}"
    except OSError:
        return "nobody who is still there"


def _refusal(message: str, code: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "cure": None}}


def _request(line: bytes) -> dict[str, Any]:
    """A request that can be read, with fields of the right kinds.

    :raises Error: what is wrong with it.
    """
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise Error("this is no JSON", code="bad-request", cure='one document a line: {"do": "show"}') from None
    if not isinstance(request, dict) or request.get("do") not in VERBS:
        raise Error("what shall be done?", code="bad-request", cure=f'{{"do": one of {", ".join(VERBS)}}}')
    unknown = set(request) - {"do", *FIELDS[request["do"]]}
    if unknown:
        raise Error(f"{request['do']} has no {sorted(unknown)[0]!r}", code="bad-request")
    out = request.get("out")
    if out is not None and not (
        isinstance(out, list)
        and out
        and all(isinstance(group, list) and group and all(isinstance(d, str) for d in group) for group in out)
    ):
        raise Error("out is a list of lists of devices", code="bad-request", cure='[["99@0", "99@1"], ["99@2"]]')
    for field in ("policy", "filter"):
        if not isinstance(request.get(field, ""), str):
            raise Error(f"{field} is text", code="bad-request")
    return request
