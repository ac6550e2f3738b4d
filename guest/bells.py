# SPDX-License-Identifier: Apache-2.0
"""The doorbell service of a VM: ``python3 -m ringbar.guest.bells``, as root, one for all its programs.

vfio lets one process have a device, and several programs share an attachment. So this service opens the doorbells of
all attachments, and hands each program two event descriptors for each end of a queue that it opens: one that an
interrupt from the host makes readable, one that rings the host when it is written to. After that it is not on any
path: the kernel does both.

A program asks over a socket, and keeps the connection for as long as it has the end open: when one of the two is gone,
the other notices. Everything is set up anew for whoever asks next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import grp
import json
import mmap
import os
import pathlib
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import Any, Callable

from ringbar.errors import Error, NotFound
from ringbar.guest import pci, uevent
from ringbar.guest.mapping import open_segment
from ringbar.guest.vfio import Doorbell, event

MAGIC = b"RGBAR1\0\0"
KIND = 4
"""Of a segment: the memory of a doorbell."""
GROUP = "ringbar"
START_TIMEOUT = 10.0
"""Seconds that a service which a program started may take to answer."""
LOOK_AGAIN = 5.0
"""Seconds until a device that could not be opened is tried again."""


def run_directory() -> pathlib.Path:
    """Where programs of one VM meet."""
    return pathlib.Path(os.environ.get("RINGBAR_RUN") or "/run/ringbar")


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a doorbell's memory says: which lane it is for, and how to ring the host."""

    cluster: int
    generation: int
    lane: int
    vectors: int
    peer: int
    vector: int

    @property
    def key(self) -> tuple[int, int, int]:
        """What programs ask by."""
        return self.cluster, self.generation, self.lane


def read(device: pci.Device) -> Memory | None:
    """The memory of a doorbell; None for another device.

    :raises Error: it cannot be mapped.
    """
    segment = open_segment(device, writable=False)
    try:
        with mmap.mmap(
            segment.fd, mmap.PAGESIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=segment.offset
        ) as page:
            return parse(page)
    finally:
        os.close(segment.fd)


def parse(page: mmap.mmap) -> Memory | None:
    """The same of memory that is mapped. Without a lane its generation is 0."""
    magic, _, kind, cluster, lane, _, generation = struct.unpack_from("<8sIIIIQQ", page)
    vectors, peer, vector = struct.unpack_from("<III", page, 256)
    if magic != MAGIC or kind != KIND or not 0 < vectors <= 2048:
        return None
    return Memory(cluster, generation, lane, vectors, peer, vector)


class Bell:
    """One doorbell device. Its memory says which lane it is for, which changes while it stays plugged in.

    :ivar leases: programs that have an interrupt of it, by entry of the lane.
    """

    def __init__(self, device: pci.Device, memory: Memory) -> None:
        self.leases: dict[int, socket.socket] = {}
        self._segment = open_segment(device, writable=False)
        try:
            self._page = mmap.mmap(
                self._segment.fd, mmap.PAGESIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ,
                offset=self._segment.offset,
            )
            self.device = Doorbell(device, memory.peer, memory.vector, memory.vectors)
        except BaseException:
            os.close(self._segment.fd)
            raise

    def memory(self) -> Memory | None:
        """What it says now."""
        return parse(self._page)

    def close(self) -> None:
        """Give the device back."""
        self.device.close()
        self._page.close()
        os.close(self._segment.fd)


class Service:
    """All doorbells of this VM. One thread, which sleeps unless a program asks or a device comes or goes."""

    def __init__(self, listener: socket.socket) -> None:
        self._wait = selectors.DefaultSelector()
        self._listener = listener
        self._events = uevent.listen()
        self._bells: dict[str, Bell | None] = {}    # devices that were looked at, by name; None: not a doorbell
        self._wrong: dict[str, str] = {}            # devices that cannot be used, and why
        self._watch(listener, self._accept)
        self._watch(self._events, self._changed)
        self._scan()

    def _watch(self, what: Any, act: Callable[[], None]) -> None:
        self._wait.register(what, selectors.EVENT_READ, act)

    def run(self) -> None:
        """Serve until a signal ends the process."""
        while True:
            for key, _ in self._wait.select(LOOK_AGAIN if self._wrong else None):
                if key.fd in self._wait.get_map():     # not closed by what was done for another
                    key.data()
            if self._wrong:
                self._scan()

    # ---- devices ----

    def _changed(self) -> None:
        with contextlib.suppress(OSError):      # some were lost: look anyhow
            while self._events.recv(65536, socket.MSG_DONTWAIT):
                pass
        self._scan()

    def _scan(self) -> None:
        found = {device.name: device for device in pci.find()}
        for name in [name for name in self._bells if name not in found]:
            self._release(name)
        for name in [name for name in self._wrong if name not in found]:
            del self._wrong[name]
        for name, device in found.items():
            if name not in self._bells:
                self._look(device)

    def _look(self, device: pci.Device) -> None:
        try:
            memory = read(device)
            bell = Bell(device, memory) if memory is not None else None
            self._bells[device.name] = bell
            if bell is not None:
                self._watch(bell.device.released, lambda: self._release(device.name))
        except NotFound:        # gone again
            return
        except (Error, OSError) as error:
            why = f"{device.name}: {error}"
            if isinstance(error, Error):
                why = f"{device.name}: {error.message}\n  to mend it: {error.cure}"
            if self._wrong.get(device.name) != why:
                print(f"ringbar: {why}", file=sys.stderr, flush=True)
            self._wrong[device.name] = why
            return
        self._wrong.pop(device.name, None)

    def _release(self, name: str) -> None:
        """The kernel wants it back, and its removal waits until we have closed it; or it is gone."""
        bell = self._bells.pop(name)
        if bell is None:
            return
        self._wait.unregister(bell.device.released)
        for entry in list(bell.leases):
            self._end(bell, entry)
        bell.close()

    # ---- programs ----

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        client.settimeout(1.0)      # of ours; one that asks nothing holds up nobody
        self._watch(client, lambda: self._asked(client))

    def _asked(self, client: socket.socket) -> None:
        try:
            request = json.loads(client.recv(4096) or b"null")
            if request is None:
                raise OSError
            if request.get("do") == "status":
                now = [bell.memory() for bell in self._bells.values() if bell is not None]
                keys = [list(m.key) for m in now if m is not None and m.generation]
                answer: dict[str, Any] = {"bells": keys, "wrong": self._wrong}
                client.send(json.dumps(answer).encode())
                return
            self._hand_out(client, request)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._gone(client)

    def _hand_out(self, client: socket.socket, request: dict[str, Any]) -> None:
        key = (int(request["cluster"]), int(request["generation"]), int(request["lane"]))
        entry = int(request["entry"])
        bell = self._find(key)
        if bell is None:
            self._scan()        # its announcement may still be under way
            bell = self._find(key)
        if bell is None:
            why = "; ".join(self._wrong.values()) or "there is no such doorbell"
            client.send(json.dumps({"error": why}).encode())
            self._gone(client)
            return
        if entry in bell.leases:        # of a program that has just ended, or of an attachment that has gone
            self._end(bell, entry)
        mine = event()
        try:
            bell.device.interrupt(entry, mine)
            bell.leases[entry] = client
            socket.send_fds(client, [b"{}"], [mine, bell.device.ring])
        finally:
            os.close(mine)

    def _find(self, key: tuple[int, int, int]) -> Bell | None:
        for bell in self._bells.values():
            memory = bell.memory() if bell is not None else None
            if memory is not None and memory.key == key:
                return bell
        return None

    def _end(self, bell: Bell, entry: int) -> None:
        client = bell.leases.pop(entry)
        with contextlib.suppress(OSError):
            bell.device.interrupt(entry, -1)
        with contextlib.suppress(KeyError):
            self._wait.unregister(client)
        client.close()

    def _gone(self, client: socket.socket) -> None:
        for bell in [bell for bell in self._bells.values() if bell is not None]:
            for entry in [entry for entry, holder in bell.leases.items() if holder is client]:
                self._end(bell, entry)
        if client.fileno() >= 0:
            self._wait.unregister(client)
            client.close()


# ---- for programs ------------------------------------------------------------------------------------------------


def _connect() -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        client.settimeout(5.0)
        client.connect(os.fspath(run_directory() / "bells"))
    except BaseException:
        client.close()
        raise
    return client


def start() -> bool:
    """Start the service where nobody else does: as root, on a VM without systemd. True when it answers."""
    if os.geteuid() != 0 or os.path.isdir("/run/systemd/system"):
        return False
    with subprocess.Popen(
        [sys.executable, "-m", "ringbar.guest.bells", "--daemon"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as started:
        try:
            return started.wait(START_TIMEOUT) == 0
        except subprocess.TimeoutExpired:
            started.kill()
            return False


def ask(cluster: int, generation: int, lane: int, entry: int) -> tuple[int, int, int]:
    """The bell of one end of a queue: descriptors to sleep on, to ring, and of the connection that keeps it.

    :raises Error: there is none; the message says why.
    """
    try:
        try:
            client = _connect()
        except (FileNotFoundError, ConnectionRefusedError):  # perhaps nobody started it
            if not start():
                raise
            client = _connect()
    except (OSError, subprocess.SubprocessError):
        raise Error(
            "the doorbell service does not run in this VM", code="no-bell-service",
            cure="systemctl start ringbar-bells; or, as root: python3 -m ringbar.guest.bells",
        ) from None
    try:
        request = {"cluster": cluster, "generation": generation, "lane": lane, "entry": entry}
        client.send(json.dumps(request).encode())
        said, fds, _, _ = socket.recv_fds(client, 4096, 2)
        answer = json.loads(said or b'{"error": "the doorbell service ended"}')
        if "error" in answer or len(fds) != 2:
            raise Error(str(answer.get("error")), code="no-bell", cure="ringbar doctor")
        return fds[0], fds[1], client.detach()
    except (OSError, ValueError):
        raise Error("the doorbell service did not answer", code="no-bell", cure="ringbar doctor") from None
    finally:
        client.close()      # of a detached one nothing


def status() -> dict[str, Any] | None:
    """What the service has: ``bells`` (cluster, generation, lane) and ``wrong`` (device: why). None without it."""
    try:
        with _connect() as client:
            client.send(b'{"do": "status"}')
            found: dict[str, Any] = json.loads(client.recv(65536))
            return found
    except (OSError, ValueError):
        return None


# ---- the process -------------------------------------------------------------------------------------------------


def _listen(directory: pathlib.Path) -> socket.socket | None:
    """The socket that programs ask at; None: another service has it. Its lock is held until this process ends."""
    with contextlib.suppress(KeyError, PermissionError):
        group = grp.getgrnam(GROUP).gr_gid
        if not directory.exists():
            directory.mkdir(mode=0o770)
            os.chown(directory, 0, group)
            directory.chmod(0o2770)
    directory.mkdir(mode=0o755, exist_ok=True)
    lock = os.open(directory / "bells.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    path = directory / "bells"
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    listener.bind(os.fspath(path))
    with contextlib.suppress(KeyError):
        os.chown(path, 0, grp.getgrnam(GROUP).gr_gid)
    path.chmod(0o660)
    listener.listen(64)
    return listener


def _answers() -> bool:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if status() is not None:
            return True
        time.sleep(0.02)
    return False


def main(words: list[str]) -> int:
    """Run the service; with ``--daemon`` in the background, and return when it answers.

    :returns: the exit status.
    """
    if words not in ([], ["--daemon"]):
        print("usage: python3 -m ringbar.guest.bells [--daemon]", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("ringbar: vfio devices are opened by root\n  to mend it: run it as root", file=sys.stderr)
        return 1
    if words:
        if os.fork():
            return 0 if _answers() else 1
        os.setsid()
        os.chdir("/")
    try:
        listener = _listen(run_directory())
    except OSError as error:
        print(f"ringbar: {error.filename or run_directory()}: {error.strerror}\n  to mend it: as root, see that "
              "it can be written to", file=sys.stderr)
        return 1
    if listener is None:
        print("ringbar: the doorbell service runs already")
        return 0
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(KeyboardInterrupt):
        Service(listener).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
