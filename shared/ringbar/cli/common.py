# SPDX-License-Identifier: Apache-2.0
"""What all commands share: option types, output, progress, exit statuses.

Only the standard library, and nothing of the C core: ``ringbar --help`` must be quick, and works in a guest.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from ringbar.errors import BadAddress, Error

# Exit statuses (rule 13 of the surface).
DONE = 0
FAILED = 1
USAGE = 2
DIFFERS = 3
UNFINISHED = 4

PROGRESS_AFTER = 2.0
"""Seconds of silence before a command says what it is doing."""

WIRE_OVERHEAD = 24
"""Bytes on an Ethernet wire beside those in the buffer: preamble 8, FCS 4, inter-frame gap 12."""


class Usage(Error):
    """The command line itself cannot be read: exit status 2."""

    default_code = "usage"


class Unfinished(Error):
    """Not finished within ``--timeout``; the state is kept and shown: exit status 4."""

    default_code = "not-finished"


def exit_status(error: BaseException) -> int:
    """The exit status that tells of ``error``."""
    if isinstance(error, (Usage, BadAddress)):
        return USAGE
    if isinstance(error, (Unfinished, TimeoutError)) or getattr(error, "code", "") == "not-finished":
        return UNFINISHED
    return FAILED


# ---- parser ---------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser that raises :class:`Usage` and shows examples as they are written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """What argparse cannot read."""
        raise Usage(message, cure=f"{self.prog} --help")


def examples(*lines: str) -> str:
    """The epilogue of a ``--help``: commands and, after two spaces, what they do."""
    return "examples:\n" + "\n".join("  " + line for line in lines)


def subcommands(parser: argparse.ArgumentParser, metavar: str) -> Any:
    """Subcommands of ``parser``, of which one must be named."""
    return parser.add_subparsers(metavar=metavar, required=True, dest="subcommand", parser_class=Parser)


_UNITS = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}
_BINARY = {"": 1, "k": 1 << 10, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_TIMES = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "m": 60.0, "min": 60.0, "h": 3600.0}


def _split(text: str) -> tuple[float, str]:
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    try:
        value = float(digits)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e18:  # also refuses nan and inf
        raise argparse.ArgumentTypeError(f"'{text}' is not a number")
    return value, text[len(digits) :]


def _scaled(text: str, units: dict[str, int]) -> float:
    value, unit = _split(text)
    if unit not in units:
        known = ", ".join(u for u in units if u)
        raise argparse.ArgumentTypeError(f"'{text}' has an unknown unit; known: {known}")
    return value * units[unit]


def count(text: str) -> int:
    """A whole number of things, ``64`` or ``1M`` (decimal units)."""
    value = _scaled(text, _UNITS)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number")
    return int(value)


def positive(text: str) -> int:
    """A whole number, at least 1."""
    value = count(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def size(text: str) -> int:
    """A number of bytes, ``2048`` or ``2k`` (binary units)."""
    value = _scaled(text, _BINARY)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of bytes")
    return int(value)


def rate(text: str) -> float:
    """Packets per second, ``14.88M``."""
    value = _scaled(text, _UNITS)
    if value <= 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def seconds(text: str) -> float:
    """A time in seconds, ``10``, ``2.5``, ``500ms``, ``2min``."""
    value, unit = _split(text)
    if unit not in _TIMES:
        raise argparse.ArgumentTypeError(f"'{text}' has an unknown unit; known: us, ms, s, min, h")
    return value * _TIMES[unit]


def cluster_id(text: str) -> int:
    """The number of a cluster, 0 to 65535."""
    if not (text.isascii() and text.isdigit()) or int(text) > 65535:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a cluster: a number from 0 to 65535 (a name goes to --label)"
        )
    return int(text)


def buffers(text: str) -> int | None:
    """A number of buffers, or ``auto`` (None)."""
    return None if text == "auto" else positive(text)


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output, errors too")


def add_connect(parser: argparse.ArgumentParser) -> None:
    """``-C URI``."""
    parser.add_argument(
        "-C", "--connect", metavar="URI", help="libvirt to ask for the VM (default qemu:///system)"
    )


# ---- output ---------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """``value`` with dataclasses, enumerations, sets and paths made into what JSON knows."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns: numbers to the right, text to the left, no trailing blanks."""
    lines = [[str(c) for c in row] for row in rows]
    kinds = [bool(lines) and all(_numeric(line[i]) for line in lines) for i in range(len(header))]
    widths = [
        max(len(header[i]), *(len(line[i]) for line in lines)) if lines else len(header[i]) for i in range(len(header))
    ]

    def one(cells: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if k else c.ljust(w) for c, w, k in zip(cells, widths, kinds)).rstrip()

    return "\n".join(one(line) for line in [list(header), *lines])


def _numeric(text: str) -> bool:
    return text[:1].isdigit() and text[-1:] in "0123456789kMG%" and "@" not in text and ":" not in text


def short(value: float) -> str:
    """``1234567`` as ``1.23M``: three digits that count."""
    for limit, divisor, unit in (
        (1e3, 1.0, ""),
        (1e6, 1e3, "k"),
        (1e9, 1e6, "M"),
        (1e12, 1e9, "G"),
        (1e18, 1e12, "T"),
    ):
        if abs(value) < limit * 0.9995:
            number = value / divisor
            return (
                f"{number:.0f}"
                if not unit or number >= 99.95
                else f"{number:.1f}"
                if number >= 9.995
                else f"{number:.2f}"
            ) + unit
    return f"{value:.3g}"


def binary(value: int) -> str:
    """Bytes for people: ``134217728`` as ``128 MiB``."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 1 << shift:
            number = value / (1 << shift)
            return f"{number:.0f} {unit}" if number == int(number) else f"{number:.1f} {unit}"
    return f"{value} bytes"


def wire_bits(packets: float, octets: float) -> float:
    """Bits that ``packets`` packets of ``octets`` bytes in all take on a wire: with preamble, FCS and gap."""
    return 8.0 * (octets + WIRE_OVERHEAD * packets)


class Output:
    """Where a command's words go: a JSON document, or lines for people.

    :param as_json: ``--json`` was given.
    :param quiet: ``--quiet`` was given: no live lines, no progress.
    :param command: for messages, for example ``"ringbar attach"``.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False, command: str = "ringbar") -> None:
        self.json = as_json
        self.quiet = quiet
        self.command = command
        self.live = Live(quiet)

    def say(self, text: str = "") -> None:
        """A line on standard output for people; nothing with ``--json``."""
        if not self.json:
            self.live.clear()
            print(text)

    def warn(self, text: str) -> None:
        """A warning on standard error; with ``--json`` the document carries it instead."""
        if not self.json:
            self.live.clear()
            print(f"warning: {text}", file=sys.stderr)

    def note(self, text: str) -> None:
        """A line on standard error: what is going on, not the result. ``--quiet`` silences it."""
        if not self.quiet:
            self.live.clear()
            print(text, file=sys.stderr, flush=True)

    def document(self, value: Any) -> None:
        """The one JSON document; nothing without ``--json``."""
        if self.json:
            self.live.clear()
            # in one line for a program, which is ten times as quick to write: thousands of queues fit in one document
            lines = 2 if sys.stdout.isatty() else None
            sys.stdout.write(json.dumps(plain(value), indent=lines, ensure_ascii=False) + "\n")
            sys.stdout.flush()

    def error(self, error: Error) -> None:
        """An error, as the document or as a message with its cure."""
        self.live.clear()
        if self.json:
            self.document({"error": error.as_json()})
            return
        print(f"{self.command}: {error.message}", file=sys.stderr)
        if error.cure:
            print(f"  to mend it: {error.cure}", file=sys.stderr)

    def progress(self) -> Progress:
        """A progress reporter to hand to the service: use it in a ``with``."""
        return Progress(self.live)


class Live:
    """Lines on standard error that are redrawn on a terminal; elsewhere only the last of them is written, each time."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._drawn = 0

    def show(self, text: str) -> None:
        """Draw ``text``, one line or several, in place of what was there."""
        if self.quiet:
            return
        with self._lock:
            if self.terminal:
                columns, rows = screen()
                lines = [line[: max(columns - 1, 20)] for line in text.split("\n")][-max(rows - 1, 1) :]
                self._erase()
                sys.stderr.write("\n".join(lines))
                self._drawn = len(lines)
            else:
                sys.stderr.write(text.rpartition("\n")[2] + "\n")
            sys.stderr.flush()

    def _erase(self) -> None:
        if self._drawn:
            up = f"\x1b[{self._drawn - 1}A" if self._drawn > 1 else ""
            sys.stderr.write(f"\r{up}\x1b[J")
            self._drawn = 0

    def clear(self) -> None:
        """Make way for an ordinary line."""
        with self._lock:
            if self._drawn:
                self._erase()
                sys.stderr.flush()


def screen() -> tuple[int, int]:
    """Columns and rows of the terminal that standard error is."""
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):
        return 80, 24
    return size.columns or 80, size.lines or 24  # a terminal that was never told its size says 0


class Progress:
    """What a long command is doing. Silent for the first two seconds, so that quick ones say nothing.

    Call it with each step, in the words of the person who waits: ``progress("waiting for the guest")``. On a
    terminal the step is redrawn with the seconds it has taken; elsewhere each step is a line, and one that takes
    long is repeated every ten seconds.
    """

    def __init__(self, live: Live) -> None:
        self._live = live
        self._step = ""
        self._shown = ""
        self._step_began = self._began = time.monotonic()
        self._changed = threading.Condition()
        self._ended = False
        self._thread: threading.Thread | None = None

    def __call__(self, step: str) -> None:
        """Say what is being done now."""
        with self._changed:
            self._step = step
            self._step_began = time.monotonic()
            self._changed.notify()

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        if not self._live.quiet:
            self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        self._live.clear()

    def _run(self) -> None:
        last = 0.0
        with self._changed:
            while not self._ended:
                now = time.monotonic()
                quiet_left = self._began + PROGRESS_AFTER - now
                if quiet_left > 0:
                    self._changed.wait(quiet_left)
                    continue
                new = self._step != self._shown
                if self._step and (new or now - last >= (0.5 if self._live.terminal else 10.0)):
                    took = now - self._step_began
                    self._live.show(f"{self._step} ({took:.0f} s)" if took >= 1 else self._step)
                    self._shown, last = self._step, now
                self._changed.wait(0.5)


Reporter = Callable[[str], None]
"""What service functions take as ``progress``: called with each step."""


def nothing(step: str) -> None:
    """A progress callback for those who do not care."""


def plural(number: int, noun: str) -> str:
    """``1 queue``, ``4 queues``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
