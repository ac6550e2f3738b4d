# SPDX-License-Identifier: Apache-2.0
"""Named workers as ``status`` and ``/metrics`` tell of them: what they keep in shared memory, nobody is asked."""

from __future__ import annotations

import contextlib
from typing import Any

from ringbar.errors import NotFound
from ringbar.host import model


def workers() -> list[model.Worker]:
    """All of this machine, by name; stages of a pipeline one by one."""
    from ringbar import workers as core

    found = []
    for record in core.list():
        with contextlib.suppress(NotFound):  # its name was given up meanwhile
            found.append(_worker(core.read(record["name"])))
    return found


def _worker(record: dict[str, Any]) -> model.Worker:
    stats = record["stats"]
    alive = "paused" if stats["paused"] else "running" if stats["running"] else "ended"
    return model.Worker(
        name=record["name"],
        kind=record["kind"],
        state=alive if record["alive"] else "dead",
        pid=record["pid"],
        policy=record["policy"],
        core=record["core"],
        since_ns=record["since_ns"],
        packets=stats["packets"],
        bytes=stats["bytes"],
        dropped=stats["dropped"],
        drops=stats["drops"],
        bursts=stats["bursts"],
        cycles_busy=stats["cycles_busy"],
        cycles_total=stats["cycles_total"],
        inputs=[_port(port) for port in record["inputs"]],
        outputs=[_port(port) for port in record["outputs"]],
    )


def _port(port: dict[str, Any]) -> model.Port:
    wanted = ("address", "state", "packets", "bytes", "drops", "group")
    return model.Port(**{name: port[name] for name in wanted if name in port})
