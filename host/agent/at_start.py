# SPDX-License-Identifier: Apache-2.0
"""The topologies in /etc/ringbar/topologies.d: applied when the agent starts."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from ringbar.errors import Error
from ringbar.host.agent.journal import Journal
from ringbar.host.service import Host

FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0
"""Seconds before a file is tried again that libvirt was missing for."""
_LATER = ("libvirt-unreachable", "libvirt-hangs")
"""What another try may mend: the host boots, and libvirt has not come up yet."""


class AtStart:
    """Makes it as the files say. One that fails stops neither the others nor the agent."""

    def __init__(self, host: Host, journal: Journal) -> None:
        self._host = host
        self._journal = journal
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def apply(self) -> None:
        """All files, in the order of their names; those that libvirt is missing for again later."""
        directory = Path(os.environ.get("RINGBAR_TOPOLOGIES") or "/etc/ringbar/topologies.d")
        left = [path for path in sorted(directory.glob("*.yaml")) if not self._one(path)]
        if left:
            self._thread = threading.Thread(target=self._again, args=(left,), name="topologies", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Try none again; returns when none is being applied."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(10)

    def _one(self, path: Path, told: bool = False) -> bool:
        """Whether that was all that can be done.

        :param told: that it fails was said before.
        """
        try:
            done = self._host.apply(path.read_text(encoding="utf-8"), str(path))
        except (Error, OSError, UnicodeDecodeError) as e:
            later = isinstance(e, Error) and e.code in _LATER
            if not (later and told):
                again = "; it is tried again" if later else ""
                self._journal.add("apply-failed", str(path), f"{path} was not applied: {e}{again}")
            return not later
        if done.changed:
            steps = "; ".join(step.text for step in done.steps)
            self._journal.add("applied", done.name, f"{path} applied: {steps}")
        return True

    def _again(self, left: list[Path]) -> None:
        pause = FIRST_PAUSE
        while left and not self._over.wait(pause):
            left = [path for path in left if not self._one(path, told=True)]
            pause = min(2 * pause, LONGEST_PAUSE)
