# SPDX-License-Identifier: Apache-2.0
"""The agent: :class:`ringbar.host.service.Host` as a service on a Unix socket, which also keeps VMs attached.

``api`` is what it offers (REST), ``client`` the same as a Host object for the command line, ``daemon`` the process,
``journal`` what happened, ``watch`` the VMs' lives, ``metrics`` what Prometheus reads.
"""

from __future__ import annotations

from pathlib import Path


def socket_path() -> Path:
    """Where the agent listens: ``agent.sock`` in ringbar's run directory."""
    from ringbar.host.records import run_directory

    return run_directory() / "agent.sock"
