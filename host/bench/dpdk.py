# SPDX-License-Identifier: Apache-2.0
"""Running DPDK's own programs: bounded, in private directories, and ended by their own numbers."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ringbar.errors import Error

START_SECONDS = 30.0  # the most a peer may take to start, connect or stop


class NotAvailable(Error):
    """This peer can't be measured here: the message says what is missing, the cure installs it."""

    default_code = "peer-not-available"


class PeerFailed(Error):
    """The peer is installed but did not run to its end."""

    default_code = "peer-failed"


def two_cores() -> tuple[int, int]:
    """The first two processors this process may use.

    :raises NotAvailable: there is only one.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise NotAvailable(
            "a measurement between two cores needs two, and this process may use one",
            cure="widen it, for example: taskset -c 0,1 ringbar bench peers",
        )
    return allowed[0], allowed[1]


@contextlib.contextmanager
def runtime() -> Iterator[tuple[Path, dict[str, str]]]:
    """A private directory for sockets and DPDK's run-time files, and the environment that makes it used."""
    with tempfile.TemporaryDirectory(prefix="ringbar-bench-", dir="/tmp") as directory:
        yield Path(directory), {**os.environ, "RUNTIME_DIRECTORY": directory, "XDG_RUNTIME_DIR": directory}


def prefix(what: str) -> str:
    """A file prefix that no other DPDK process on this host has."""
    return f"ringbar-{os.getpid()}-{what}-{time.monotonic_ns()}"


def output(command: Sequence[str], environment: dict[str, str], seconds: float, text: str = "") -> str:
    """Runs a peer to its end; everything it printed. Ended by its number when it takes longer."""
    try:
        done = subprocess.run(
            list(command),
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            timeout=seconds,
            check=False,
        )
    except OSError as error:
        raise NotAvailable(
            f"{command[0]} can't be started: {error.strerror}", cure="run: apt-get install dpdk libdpdk-dev"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise PeerFailed(
            f"{Path(command[0]).name} did not finish within {seconds:g} s",
            cure=f"by hand: {shlex.join(command)}",
        ) from error
    if done.returncode != 0:
        raise PeerFailed(
            f"{Path(command[0]).name} failed: {last_line(done.stdout)}",
            cure=f"by hand: {shlex.join(command)}",
        )
    return done.stdout


def last_line(text: str) -> str:
    """What a program said last, cut to 200 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


@dataclass(frozen=True)
class PortStatistics:
    """``show port stats`` of testpmd: packets received so far, and packets a second since the last time."""

    packets: int
    rate: int


def parse_port_stats(text: str) -> PortStatistics:
    """The receive side of the last complete block that ``show port stats`` printed.

    :raises PeerFailed: when there is none.
    """
    packets = re.findall(r"RX-packets:\s*(\d+)\s+RX-missed", text)
    rates = re.findall(r"Rx-pps:\s*(\d+)", text)
    if not packets or not rates:
        raise PeerFailed(f"testpmd printed no port statistics: {last_line(text)}")
    return PortStatistics(int(packets[-1]), int(rates[-1]))


class Testpmd:
    """One interactive testpmd: commands go in through a pipe, what it prints comes back through a terminal.

    A terminal, because testpmd would keep its answers in a buffer for a pipe; a pipe for its input, because
    it then neither edits nor waits, and ends by itself when this process dies.
    """

    __test__ = False

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._command = list(command)
        self._environment = environment
        self._text = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._terminal = -1

    def __enter__(self) -> Testpmd:
        self._terminal, end = pty.openpty()
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=end,
                stderr=end,
                env=self._environment,
                start_new_session=True,
            )
        except OSError as error:
            os.close(self._terminal)
            raise NotAvailable(
                f"{self._command[0]} can't be started: {error.strerror}", cure="run: apt-get install dpdk"
            ) from error
        finally:
            os.close(end)
        try:
            self._expect("testpmd> ", START_SECONDS)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Asks it to quit, reads on so that it can, and ends it by its number if it does not."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.write(b"quit\n")
                process.stdin.close()
            deadline = time.monotonic() + 5.0
            while process.poll() is None and time.monotonic() < deadline:
                self._read(0.05)
            for number in (signal.SIGTERM, signal.SIGKILL):
                if process.poll() is not None:
                    break
                process.send_signal(number)
                deadline = time.monotonic() + 3.0
                while process.poll() is None and time.monotonic() < deadline:
                    self._read(0.05)
            process.wait()
        finally:
            os.close(self._terminal)

    def say(self, line: str, answer: str) -> str:
        """Sends a command; returns what came back, once ``answer`` and then the prompt were in it."""
        if self._process is None or self._process.stdin is None:
            raise PeerFailed("testpmd is not running")
        self._text = ""
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise PeerFailed(f"testpmd ended: {last_line(self._text)}") from error
        return self._expect(answer, START_SECONDS)

    def statistics(self) -> PortStatistics:
        """The receive statistics of port 0."""
        return parse_port_stats(self.say("show port stats 0", "Tx-bps:"))

    def wait_link(self) -> None:
        """Returns when port 0 is connected."""
        deadline = time.monotonic() + START_SECONDS
        while "Link status: up" not in self.say("show port info 0", "Link status: "):
            if time.monotonic() > deadline:
                raise PeerFailed("the two testpmd processes did not connect over memif")
            self._read(0.05)

    def _expect(self, answer: str, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while True:
            at = self._text.find(answer)
            if at >= 0 and (answer.endswith("> ") or "testpmd> " in self._text[at:]):
                return self._text
            if time.monotonic() > deadline:
                raise PeerFailed(f"testpmd did not answer within {seconds:g} s: {last_line(self._text)}")
            if not self._read(0.2):
                raise self._ended()

    def _read(self, seconds: float) -> bool:
        """Takes what it printed within ``seconds``; False when it has ended."""
        ready, _, _ = select.select([self._terminal], [], [], seconds)
        if not ready:
            return self._process is None or self._process.poll() is None
        try:
            data = os.read(self._terminal, 65536)
        except OSError:  # EIO: nobody holds the other end any more
            return False
        self._text += data.decode("utf-8", errors="replace").replace("\r", "")
        return bool(data)

    def _ended(self) -> Error:
        if "memif" in self._text and (
            "failed to parse device" in self._text
            or "Cannot find" in self._text
            or "no driver" in self._text.lower()
        ):
            return NotAvailable(
                "DPDK's memif driver is not installed",
                cure="run: apt-get install librte-net-memif23 (part of dpdk)",
            )
        return PeerFailed(
            f"testpmd ended: {last_line(self._text)}", cure=f"by hand: {shlex.join(self._command)}"
        )
