# SPDX-License-Identifier: Apache-2.0
"""``ringbar status`` inside a VM: what the host has plugged in, as far as a guest can see it."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from ringbar.attach import plugged_clusters
from ringbar.errors import Error, NotFound
from ringbar.host import model

EMULATORS = Path("/usr/libexec")
"""Where some systems have QEMU outside of the path."""


def in_guest() -> bool:
    """Is this a guest of a ringbar host? It has devices of ours and no cluster of its own.

    The processor's hypervisor flag does not tell: hosts are VMs themselves in many places.
    """
    try:
        from ringbar import guest
    except ImportError:
        return False
    if not guest.find():
        return False
    try:
        from ringbar.host import native

        return not native.clusters()
    except (ImportError, Error):  # what is wrong with the library, a check of its own says
        return True


def looks_like_a_guest() -> bool:
    """Is this a guest, as far as one can tell where nothing may be plugged in yet?

    A VM that has neither what makes a host (a cluster, the agent, QEMU, libvirt) nor a shared memory is one that waits
    for its first ``ringbar attach``.
    """
    from ringbar.host.agent import socket_path

    if in_guest():
        return True
    try:
        from ringbar import guest
        from ringbar.host import native

        if not guest.is_guest() or native.clusters():
            return False
    except (ImportError, Error):
        return False
    return not (socket_path().exists() or has_qemu() or has_libvirt())


def has_qemu() -> bool:
    """Is there a QEMU for VMs?"""
    directories = [Path(d) for d in os.get_exec_path() if d] + [EMULATORS]
    return any(any(d.glob("qemu-system-*")) or (d / "qemu-kvm").exists() for d in directories)


def has_libvirt() -> bool:
    """Is libvirt installed, or a socket of it here?"""
    return shutil.which("virsh") is not None or Path("/run/libvirt").exists()


def status(cluster: int | None, queue: int | None, sample: float) -> model.Status:
    """The clusters of this VM.

    :param cluster: only this; None: all.
    :param queue: only this one of it.
    :param sample: seconds over which rates are taken; 0: none.
    :raises NotFound: it is not attached to this VM.
    """
    from ringbar import Cluster

    result = model.Status(sampled_seconds=sample)
    for number in plugged_clusters() if cluster is None else [cluster]:
        try:
            attached = Cluster.attach(number)
        except NotFound:
            if cluster is not None:
                raise
            continue
        with attached:
            before = {q["id"]: q["packets"] for q in attached.status()["queues"]}
            began = time.monotonic()
            if sample > 0 and before:
                time.sleep(sample)
            seen = attached.status()
            took = time.monotonic() - began
        queues = [_queue(q) for q in seen["queues"] if queue is None or q["id"] == queue]
        if queue is not None and not queues:
            raise NotFound(
                f"{number}@{queue} is not attached to this VM",
                code="no-such-queue",
                cure=f"on the host: ringbar attach VM {number}@{queue}",
            )
        if sample > 0:
            for shown in queues:
                shown.pps = (shown.packets - before.get(shown.id, shown.packets)) / took
        result.clusters.append(model.ClusterStatus(cluster=model.Cluster(**seen["cluster"]), queues=queues))
    return result


def _queue(found: dict[str, Any]) -> model.Queue:
    fields = {name: value for name, value in found.items() if name != "path"}
    for end in ("producer", "consumer"):
        fields[end] = None if found[end] is None else model.End(**found[end])
    return model.Queue(**fields)
