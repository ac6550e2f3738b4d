# SPDX-License-Identifier: Apache-2.0
"""What belongs to which topology file: one JSON file a topology, in ringbar's run directory.

It is written before a step is taken that makes something, and after one that removes something: an apply that is
killed in between leaves a mark for something that is not there, never something without its mark.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringbar.errors import Busy
from ringbar.host.records import for_group, make_directory, run_directory


@dataclass
class Owned:
    """What one topology made.

    :ivar queues: addresses.
    :ivar workers: by name, what each was started with.
    :ivar ends: by VM, pairs of address and ``rx`` or ``tx``.
    :ivar text: the file as it was applied last, to go back to; "" before the first was finished.
    :ivar rollback_at_ns: when ``rollback_text`` is applied again, unless somebody confirms; 0: never.
    """

    name: str
    clusters: set[int] = field(default_factory=set)
    queues: set[str] = field(default_factory=set)
    workers: dict[str, dict[str, Any]] = field(default_factory=dict)
    ends: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    text: str = ""
    rollback_at_ns: int = 0
    rollback_text: str = ""

    def empty(self) -> bool:
        """It owns nothing."""
        return not (self.clusters or self.queues or self.workers or any(self.ends.values()))

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "clusters": sorted(self.clusters),
            "queues": sorted(self.queues),
            "workers": self.workers,
            "ends": {vm: sorted(ends) for vm, ends in sorted(self.ends.items()) if ends},
            "text": self.text,
            "rollback_at_ns": self.rollback_at_ns,
            "rollback_text": self.rollback_text,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Owned:
        """The reverse."""
        return cls(
            data["name"],
            set(data["clusters"]),
            set(data["queues"]),
            dict(data["workers"]),
            {vm: {(a, w) for a, w in ends} for vm, ends in data["ends"].items()},
            data.get("text", ""),
            data.get("rollback_at_ns", 0),
            data.get("rollback_text", ""),
        )


def _directory() -> Path:
    return run_directory() / "topologies"


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Nobody else applies this topology meanwhile.

    :raises Busy: somebody does.
    """
    directory = _directory()
    make_directory(directory)
    fd = os.open(directory / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o660)
    for_group(fd, 0o660)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = "another process"
            raise Busy(
                f"topology {name} is being applied just now", holder=who, cure="wait until that has ended"
            ) from None
        yield
    finally:
        os.close(fd)


def load(name: str) -> Owned:
    """What the topology owns; nothing where it was never applied."""
    try:
        return Owned.from_json(json.loads((_directory() / f"{name}.json").read_text()))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return Owned(name)


def others(name: str) -> list[Owned]:
    """What all other topologies own."""
    try:
        names = sorted(path.stem for path in _directory().glob("*.json"))
    except OSError:
        return []
    return [load(other) for other in names if other != name]


def save(owned: Owned) -> None:
    """Put it in place, whole or not at all; one that owns nothing and was never finished leaves no file."""
    directory = _directory()
    make_directory(directory)
    path = directory / f"{owned.name}.json"
    if owned.empty() and not owned.text:
        path.unlink(missing_ok=True)
        return
    fd, temporary = tempfile.mkstemp(prefix=".", dir=directory)
    for_group(fd, 0o660)
    try:
        with os.fdopen(fd, "w") as file:
            json.dump(owned.to_json(), file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
