# SPDX-License-Identifier: Apache-2.0
"""Network name spaces with veth pairs, and the command line and programs inside them."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


class Net:
    """A network name space with two veth pairs, rba0-rba1 and rbb0-rbb1."""

    def __init__(self, root: Path) -> None:
        self.name = f"rbzc{secrets.token_hex(3)}"
        self.root = root
        self.environment = {**os.environ, "RINGBAR_RUN": str(root / "run"), "RINGBAR_SHM": str(root / "shm")}
        self.far_name = f"{self.name}f"
        self.entered = True
        self.started: list[subprocess.Popen[str]] = []

    def ip(self, words: str) -> str:
        done = subprocess.run(["ip", "-n", self.name, *words.split()], capture_output=True, text=True, check=True)
        return done.stdout

    def command(self, *words: str) -> list[str]:
        inside = ["nsenter", f"--net=/run/netns/{self.name}"] if self.entered else []
        return [*inside, sys.executable, "-m", "ringbar", *words]

    def leave(self) -> None:
        """Run commands in this process's own name space, until :meth:`enter`."""
        self.entered = False

    def enter(self) -> None:
        """Run commands inside again."""
        self.entered = True

    def json(self, *words: str, status: int | None = 0) -> Any:
        """A command to its end; its document."""
        done = subprocess.run(
            self.command(*words, "--json"),
            env=self.environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert status is None or done.returncode == status, done.stdout + done.stderr
        return json.loads(done.stdout)

    def settled(self, cluster: str) -> Any:
        """What ``status`` says of a cluster once no dead process's buffers are out: the kernel lets go of them when it
        comes to it, and each command looks again."""
        for _ in range(30):
            status = self.json("status", cluster)["clusters"][0]
            if not sum(b["devices"] + b["quiescing"] + b["lent"] for b in status["books"] if not b["pid"]):
                break
        return status

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A tool that runs until it is ended; returns when its devices are open."""
        process = subprocess.Popen(
            self.command(*words),
            env=self.environment,
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        assert process.stderr is not None
        line = process.stderr.readline()
        assert any(sign in line for sign in ("receiving", "sending", "\u2192")), line
        return process

    def python(self, code: str, **environment: str) -> Program:
        """A Python program inside; it is ended with the test at the latest."""
        process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self.name}", sys.executable, "-u", "-c", code],
            env={**self.environment, **environment},
            cwd=self.root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return Program(process)

    def inside(self, what: Callable[[], T], far: bool = False) -> T:
        """Call something in a thread that is in this name space, or in the far one; sockets made there stay there."""
        result: list[T] = []
        failure: list[BaseException] = []

        def body() -> None:
            try:
                with open(f"/run/netns/{self.far_name if far else self.name}", "rb") as space:
                    _setns(space.fileno())
                result.append(what())
            except BaseException as e:  # handed to the caller's thread
                failure.append(e)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return result[0]

    def move_away(self, pair: str = "a", queues: int = 1) -> None:
        """rba1 goes to a name space of its own, the far one: 198.51.100.1 here, 198.51.100.2 there.

        :param queues: how many the pair has.
        """
        subprocess.run(["ip", "netns", "add", self.far_name], check=True)
        if queues > 1:
            self.ip(f"link del rb{pair}0")
            many = f"numtxqueues {queues} numrxqueues {queues}"
            self.ip(f"link add rb{pair}0 {many} type veth peer name rb{pair}1 {many}")
        self.ip(f"link set rb{pair}1 netns {self.far_name}")
        for name, end in ((self.name, 0), (self.far_name, 1)):
            nic = f"rb{pair}{end}"
            for words in (f"addr replace 198.51.100.{end + 1}/24 dev {nic}", f"link set {nic} up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *words.split()], check=True)

    def programs(self) -> list[str]:
        """Interfaces that have an XDP program."""
        return [link["ifname"] for link in json.loads(self.ip("-j -d link show")) if "xdp" in link]


class Program:
    """A running program that answers lines with lines."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid
        self._read = b""  # and not yet asked for: a file object would keep it from select

    def line(self, timeout: float = 30) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None and self.process.stderr is not None
        while b"\n" not in self._read:
            assert select.select([self.process.stdout], [], [], timeout)[0], "the program says nothing"
            more = os.read(self.process.stdout.fileno(), 65536)
            assert more, self.process.stderr.read()
            self._read += more
        text, _, self._read = self._read.partition(b"\n")
        return text.decode()

    def ask(self, words: str = "") -> str:
        """Say a line; the next line that it prints."""
        assert self.process.stdin is not None
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()
        return self.line()

    def end(self) -> str:
        """Close its input and wait; what it printed last."""
        out, err = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, out + err
        return self._read.decode() + out


def _setns(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns")


@pytest.fixture
def net(private_directories: Path) -> Iterator[Net]:
    made = Net(private_directories)
    subprocess.run(["ip", "netns", "add", made.name], check=True)
    try:
        for key in ("all", "default"):
            subprocess.run(
                ["ip", "netns", "exec", made.name, "sysctl", "-qw", f"net.ipv6.conf.{key}.disable_ipv6=1"], check=False
            )
        for pair in "ab":
            made.ip(f"link add rb{pair}0 type veth peer name rb{pair}1")
            for end in "01":
                made.ip(f"link set rb{pair}{end} up")
        yield made
    finally:
        for process in made.started:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=30)
        subprocess.run(["ip", "netns", "del", made.name], check=True)
        if Path("/run/netns", made.far_name).exists():
            subprocess.run(["ip", "netns", "del", made.far_name], check=True)
