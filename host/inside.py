# SPDX-License-Identifier: Apache-2.0
"""``ringbar status`` inside a VM: what the host has plugged in, as far as a guest can see it."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
from typing import Any

from ringbar.errors import Error, NotFound
from ringbar.host import model

MAGIC = 0x315241424752
"""RB_MAGIC: the first eight bytes of every segment."""


def plugged_clusters() -> list[int]:
    """Numbers of the clusters whose memory is plugged into this VM."""
    from ringbar import guest

    found = set()
    for device in guest.find():
        with contextlib.suppress(Error, OSError, ValueError):
            segment = guest.open_segment(device, writable=False)
            try:
                with mmap.mmap(
                    segment.fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ, offset=segment.offset
                ) as page:
                    magic, _, _, cluster = struct.unpack("<QIII", page[:20])
            finally:
                os.close(segment.fd)
            if magic == MAGIC:
                found.add(cluster)
    return sorted(found)


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
