# SPDX-License-Identifier: Apache-2.0
"""ringbar: zero-copy packet processing across processes and virtual machines.

The same on a host and in a VM::

    import ringbar

    zc = ringbar.Cluster.attach(99)
    with zc.open_queue(0, "rx") as rx:
        for burst in rx:                # len(burst), burst.lengths, burst.timestamps, burst.hashes
            first = burst[0]            # memoryview on the packet itself, no copy
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import BadAddress, Busy, Detached, Error, Incompatible, NotFound

if TYPE_CHECKING:
    from . import workers
    from .burst import Burst
    from .choose import Packets
    from .cluster import Cluster, Queue, clusters
    from .ends import Rx, RxTx, Tx
    from .flow import Flow
    from .kinds import Balancer, Bridge, Delay, Fanout, Merge, Replicate
    from .pipeline import Pipeline
    from .workers import Pulse, Worker

    __version__: str

__all__ = [
    "BadAddress", "Balancer", "Bridge", "Burst", "Busy", "Cluster", "Delay", "Detached", "Error",
    "Fanout", "Flow", "Incompatible", "Merge", "NotFound", "Packets", "Pipeline", "Pulse", "Queue",
    "Replicate", "Rx", "RxTx", "Tx", "Worker", "__version__", "clusters", "workers",
]  # fmt: skip

# What needs the C part is loaded when first asked for, so that addresses and errors are of use without it.
_HOME = {
    "Balancer": "kinds", "Bridge": "kinds", "Burst": "burst", "Cluster": "cluster", "Delay": "kinds",
    "Fanout": "kinds", "Flow": "flow", "Merge": "kinds", "Packets": "choose", "Pipeline": "pipeline",
    "Pulse": "workers", "Queue": "cluster", "Replicate": "kinds", "Rx": "ends", "RxTx": "ends",
    "Tx": "ends", "Worker": "workers", "clusters": "cluster",
}  # fmt: skip


def __getattr__(name: str) -> object:
    import importlib

    if name == "__version__":
        from ._c import lib, text

        found: object = text(lib.rb_version())
    elif name == "workers":
        found = importlib.import_module(".workers", __name__)
    elif name in _HOME:
        found = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    else:
        raise AttributeError(f"module 'ringbar' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
