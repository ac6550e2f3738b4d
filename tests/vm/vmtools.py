# SPDX-License-Identifier: Apache-2.0
"""What the VM tests are made of: ``ringbar`` on the host, programs in guests, and QEMU's monitor behind its back."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from ringbar.qemu.launch import Guest

IN_GUEST = ["env", "PYTHONPATH=/opt/ringbar", "python3"]
RINGBAR_IN_GUEST = [*IN_GUEST, "-m", "ringbar"]
READY = ("receiving", "sending", "→")

T = TypeVar("T")


def until(look: Callable[[], T], good: Callable[[T], bool], what: str, timeout: float = 20.0) -> T:
    """Look again and again until it is good; the bounded wait for what has no event."""
    deadline = time.monotonic() + timeout
    while True:
        seen = look()
        if good(seen):
            return seen
        assert time.monotonic() < deadline, f"{what} after {timeout:g} s: {seen}"
        time.sleep(0.05)


def read_line(process: subprocess.Popen[str], timeout: float, stream: Any = None) -> str:
    """The next line that a process prints; its end, or silence for ``timeout`` seconds, fails the test."""
    stream = stream or process.stdout
    assert stream is not None
    deadline = time.monotonic() + timeout
    line = b""
    while not line.endswith(b"\n"):  # byte by byte: nothing is read ahead that communicate() would miss
        left = max(0.0, deadline - time.monotonic())
        assert select.select([stream], [], [], left)[0], f"{process.args!r} says nothing for {timeout:g} s"
        byte = os.read(stream.fileno(), 1)
        if not byte:
            process.wait(10)
            said = process.stderr.read() if process.stderr is not None and stream is not process.stderr else ""
            raise AssertionError(f"{process.args!r} ended with {process.returncode}: {line.decode()}{said}")
        line += byte
    return line.decode(errors="replace")


class Shell:
    """``ringbar`` on the host, with a registry and memory of its own."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="ringbar-test-", dir="/dev/shm"))
        self.variables = {"RINGBAR_RUN": str(self.root / "run"), "RINGBAR_SHM": str(self.root / "shm")}
        for path in self.variables.values():
            os.mkdir(path)
        self.started: list[subprocess.Popen[str]] = []
        self.vms: set[str] = set()

    def command(self, *words: str) -> dict[str, Any]:
        """What Popen takes."""
        self.vms |= set(words[1:2]) if words[0] == "attach" else set()
        return {
            "args": [sys.executable, "-m", "ringbar", *words],
            "env": {**os.environ, **self.variables},
            "cwd": self.root,  # not the checkout: python -m puts it first in the path, and it has a "qemu"
            "text": True,
        }

    def run(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        done = subprocess.run(**self.command(*words), capture_output=True, timeout=timeout)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def __call__(self, *words: str, status: int | None = 0, timeout: float = 60) -> str:
        """Run a command; what it printed. The exit status must be ``status``; None: any."""
        done = self.run(*words, timeout=timeout)
        assert status in (None, done.returncode), f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def json(self, *words: str, status: int | None = 0, timeout: float = 60) -> Any:
        """Run a command with --json; the document."""
        return json.loads(self(*words, "--json", status=status, timeout=timeout))

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a tool and wait until its devices are open."""
        process = subprocess.Popen(**self.command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.started.append(process)
        line = read_line(process, 30, process.stderr)
        assert any(sign in line for sign in READY), line
        return process

    def finish(self, process: subprocess.Popen[str], *, ask: bool = False, status: int | None = 0) -> Any:
        """Wait until a tool has ended (told to with ``ask``); its JSON document, or None where it printed none."""
        if ask:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in err, err
        assert status is None or process.returncode == status, f"{process.args!r}: {process.returncode}\n{out}\n{err}"
        return json.loads(out) if out.lstrip().startswith("{") else None

    # ---- clusters and VMs

    def cluster(self, cluster: int = 99, queues: int = 2, *more: str) -> dict[str, Any]:
        """Make a cluster with 16,384 buffers of 2 KiB and queues of 1,024 slots, where nothing else is said."""
        size = () if "--buffers" in more else ("--buffers", "16384")
        some = ("--queues", str(queues), "--slots", "1024") if queues else ()
        made: dict[str, Any] = self.json("cluster", "create", str(cluster), *some, *size, *more)
        return made

    def status(self, cluster: int = 99) -> dict[str, Any]:
        """The cluster now; what the dead left is taken home first, as by every command."""
        (found,) = self.json("status", str(cluster), "--sample", "0")["clusters"]
        return dict(found)

    def queue(self, queue: str) -> dict[str, Any]:
        """One queue now."""
        (found,) = self.json("status", queue, "--sample", "0")["clusters"][0]["queues"]
        return dict(found)

    def out(self, cluster: int = 99, *, granted: bool = True) -> dict[str, int]:
        """Buffers that are neither at home nor unread in a ring, by where they are; nothing when all is well.

        :param granted: also the empties that VMs were given to send with, which come back with the detach.
        """
        now = self.status(cluster)
        found = {}
        unread = sum(queue["waiting"] for queue in now["queues"] if not queue["granted"])
        for queue in now["queues"]:
            found[f"lent {queue['address']}"] = queue["lent"] - (0 if queue["granted"] else queue["waiting"])
            for name in ("held", "quarantined", "foreign", *(("granted",) if granted else ())):
                found[f"{name} {queue['address']}"] = queue[name]
        if granted:
            found["lent by all"] = sum(book["lent"] for book in now["books"]) - unread
        for book in now["books"]:
            found[f"quarantined of book {book['id']}"] = book["quarantined"]
            assert book["home"] == book["free"] + book["lent"] + book["devices"] + book["quiescing"] + book[
                "shared"] + book["quarantined"], book
        return {where: n for where, n in found.items() if n}

    def comes_home(self, cluster: int = 99, *, granted: bool = True) -> None:
        """Every buffer is at home, at the latest when whoever still serves has looked."""
        until(lambda: self.out(cluster, granted=granted), lambda out: not out, "not all is home")

    def detach(self, guest: Guest, *words: str, **options: Any) -> dict[str, Any]:
        """Detach; the document. The programs in the guest, if any, let go in time."""
        said: dict[str, Any] = self.json("detach", vm(guest), *words, **options)
        assert not any("did not let go" in note for note in said["notes"]), said
        return said

    # ---- the end

    def close(self) -> None:
        """End what was started, detach what is attached, destroy what was made."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=30)
        for vm in sorted(self.vms):
            self.run("detach", vm, timeout=90)
        for cluster in json.loads(self.run("cluster", "list", "--json").stdout)["clusters"]:
            self.run("cluster", "destroy", str(cluster["id"]), "--force")
        shutil.rmtree(self.root, ignore_errors=True)


SERVER = r"""
import json, os, sys
def send(**what):
    os.write(1, (json.dumps(what) + "\n").encode())
import ringbar
space = {"ringbar": ringbar}
send(value=os.getpid())
for line in sys.stdin:
    try:
        code = compile(json.loads(line), "test", "exec")
        space.pop("answer", None)
        exec(code, space)
        send(value=space.get("answer"))
    except BaseException as problem:
        send(error={
            "type": type(problem).__name__, "message": getattr(problem, "message", str(problem)),
            **{name: getattr(problem, name, None) for name in ("code", "cure", "holder")},
        })
"""


class Raised(Exception):
    """What a program in a guest raised: ``type``, ``message``, ``code``, ``cure``, ``holder``."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['type']}: {error['message']} ({error['cure']})")
        self.type, self.message = str(error["type"]), str(error["message"])
        self.code, self.cure, self.holder = error["code"], error["cure"], error["holder"]


class Program:
    """A Python program in a guest that runs what it is told, piece by piece; what it sets as ``answer`` comes back."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.process: subprocess.Popen[str] = guest.popen(
            [*IN_GUEST, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.pid = int(self.answer(30))

    def tell(self, code: str) -> None:
        """Let it run this; :meth:`answer` waits for the end."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()

    def answer(self, timeout: float = 30) -> Any:
        """What the code answered.

        :raises Raised: what it raised.
        """
        said = json.loads(read_line(self.process, timeout))
        if "error" in said:
            raise Raised(said["error"])
        return said["value"]

    def do(self, code: str, timeout: float = 30) -> Any:
        """Run this to its end; the answer."""
        self.tell(code)
        return self.answer(timeout)

    def kill(self) -> None:
        """kill -9, in the living guest."""
        self.guest.ssh(["kill", "-9", str(self.pid)])
        self.process.wait(30)

    def close(self) -> None:
        """End it, which closes what it has open; with a VM that runs no more, only the connection."""
        if self.process.poll() is None and not self.guest.running:
            self.process.kill()
        with contextlib.suppress(OSError, ValueError):
            self.process.communicate(timeout=30)
        for file in (self.process.stdin, self.process.stdout, self.process.stderr):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None and value is not None:
            self.process.kill()
        self.close()


class Tool:
    """A ``ringbar`` tool in a guest, with its devices open."""

    def __init__(self, guest: Guest, *words: str) -> None:
        self.guest = guest
        line = f"echo $$; exec {shlex.join([*RINGBAR_IN_GUEST, *words])}"
        self.process: subprocess.Popen[str] = guest.popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        said = ""
        try:
            self.pid = int(read_line(self.process, 30))
            while not any(sign in said for sign in READY):
                said += read_line(self.process, 30, self.process.stderr)
        except AssertionError as problem:
            self.process.kill()
            self.process.communicate()
            raise AssertionError(f"{problem}: {said}") from None

    def kill(self, name: str = "KILL") -> None:
        """Send it a signal, from inside the guest."""
        self.guest.ssh(["kill", f"-{name}", str(self.pid)], check=name != "KILL")

    def end(self, status: int | None = 0, *, ask: bool = True) -> Any:
        """Wait for its end, by Ctrl-C where asked for; its JSON document, or None where it printed none."""
        if ask and self.process.poll() is None:
            self.kill("INT")
        out, err = self.process.communicate(timeout=60)
        assert "Traceback" not in err, err
        assert status is None or self.process.returncode == status, f"{self.process.returncode}\n{out}\n{err}"
        return json.loads(out) if out.lstrip().startswith("{") else None

    def __enter__(self) -> Tool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            if value is None:
                self.end()
            else:
                self.kill()
                self.process.communicate(timeout=30)


def in_guest(guest: Guest, *words: str, status: int | None = 0, timeout: float = 60) -> Any:
    """Run a ``ringbar`` command with --json in a guest; the document. Never a traceback."""
    done = guest.ssh([*RINGBAR_IN_GUEST, *words, "--json"], timeout, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    assert status in (None, done.returncode), f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout)


def monitor(guest: Guest, command: str, **arguments: Any) -> Any:
    """One command to QEMU behind ringbar's back."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(os.fspath(guest.qmp))
        with connection.makefile("rw") as lines:
            lines.readline()  # the greeting
            for name, values in (("qmp_capabilities", {}), (command, arguments)):
                lines.write(json.dumps({"execute": name, "arguments": values}) + "\n")
                lines.flush()
                while True:
                    said = json.loads(lines.readline())
                    assert "error" not in said, said
                    if "return" in said:
                        break
    return said["return"]


def vm(guest: Guest) -> str:
    """The guest as ``ringbar attach`` takes it."""
    return getattr(guest, "domain", f"qmp:{guest.qmp}")  # one of libvirt has its name there



# ---- the agent ------------------------------------------------------------------------------------------------------


class Launch(Protocol):
    """Starts agents; returns when one is ready."""

    def __call__(self, **environment: str) -> subprocess.Popen[str]: ...


def kinds(shell: Shell) -> list[str]:
    """What has happened, by the agent."""
    return [e["kind"] for e in shell.json("events")["events"] if e["kind"] != "agent-started"]


def attachments(shell: Shell) -> list[dict[str, Any]]:
    return list(shell.json("status", "--sample", "0")["vms"])


def state(shell: Shell) -> str:
    """Of the only attachment."""
    (one,) = attachments(shell)
    return str(one["state"])


def is_plugged(shell: Shell) -> None:
    """Wait until the only attachment is."""
    until(lambda: state(shell), lambda s: s == "plugged", "not plugged in", timeout=90)
