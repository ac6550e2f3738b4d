# SPDX-License-Identifier: Apache-2.0
"""Topologies that were applied on trial: the one before comes back, unless somebody confirms in time."""

from __future__ import annotations

import logging
import threading
import time

from ringbar.errors import Error
from ringbar.host.agent.journal import Journal
from ringbar.host.service import Host
from ringbar.host.topology import owned

log = logging.getLogger("ringbar.agent")


class Rollbacks:
    """Waits for the next one that is due. When it is due is on disk: a killed agent's successor goes on waiting."""

    def __init__(self, host: Host, journal: Journal) -> None:
        self._host = host
        self._journal = journal
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def look(self) -> None:
        """Something was applied: when is the next one due?"""
        due = [o.rollback_at_ns for o in owned.others("") if o.rollback_at_ns]
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None
            if due:
                self._timer = threading.Timer(max(0.0, min(due) / 1e9 - time.time()), self._back)
                self._timer.daemon = True
                self._timer.start()

    def stop(self) -> None:
        """Wait for none any more."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None

    def _back(self) -> None:
        for topology in owned.others(""):
            if not topology.rollback_at_ns or topology.rollback_at_ns > time.time_ns():
                continue
            try:
                self._host.apply(topology.rollback_text, f"topology {topology.name} as it was before")
                self._journal.add(
                    "rolled-back", topology.name, f"topology {topology.name} is as it was before: nobody confirmed"
                )
            except Error as e:
                self._journal.add(
                    "rollback-failed", topology.name, f"topology {topology.name} could not be taken back: {e}"
                )
                topology.rollback_at_ns, topology.rollback_text = 0, ""
                owned.save(topology)
        self.look()
