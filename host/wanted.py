# SPDX-License-Identifier: Apache-2.0
"""What VMs shall have, also while they are off: one JSON file a VM, kept by its UUID or socket.

Written by attach and detach, each time under a lock that nobody holds for long; the agent gives a VM that comes back
what stands here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ringbar import address
from ringbar.errors import NotFound
from ringbar.host import model, native
from ringbar.host.records import all_records, brief, for_group, make_directory, run_directory

if TYPE_CHECKING:
    from ringbar.host.vms import Name


@dataclass
class Share:
    """What a VM shall have of one cluster: addresses, and the pool's mode (None: by what it needs)."""

    rx: list[str] = field(default_factory=list)
    tx: list[str] = field(default_factory=list)
    pool: str | None = None
    since_ns: int = field(default_factory=time.time_ns)


@dataclass
class Wanted:
    """What a VM shall have, by cluster."""

    vm: str
    uuid: str = ""
    uri: str = ""
    shares: dict[int, Share] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """As a Record's and a Name's."""
        return f"{self.uri}#{self.uuid}" if self.uuid else self.vm


def _directory() -> Path:
    return run_directory() / "wanted"


def _path(key: str) -> Path:
    return _directory() / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> Wanted | None:
    try:
        data = json.loads(path.read_text())
        shares = {int(c): Share(**s) for c, s in data["shares"].items()}
        return Wanted(data["vm"], data["uuid"], data["uri"], shares)
    except (FileNotFoundError, PermissionError, ValueError, KeyError, TypeError, AttributeError):
        return None


def everything() -> list[Wanted]:
    """What all VMs shall have."""
    try:
        paths = sorted(_directory().glob("*.json"))
    except OSError:
        return []
    return [w for w in map(_read, paths) if w is not None]


def find(key: str) -> Wanted | None:
    """What one VM shall have."""
    return _read(_path(key))


def _write(wanted: Wanted) -> None:
    path = _path(wanted.key)
    if not wanted.shares:
        path.unlink(missing_ok=True)
        return
    make_directory(path.parent)
    fd, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    for_group(fd, 0o660)
    try:
        with os.fdopen(fd, "w") as file:
            json.dump(asdict(wanted), file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def add(name: Name, ends: dict[int, list[tuple[int, int]]], pool: str | None) -> bool:
    """The VM shall have these ends (queue number and direction, by cluster) too.

    :returns: False when it had them all.
    """
    with brief():
        return _add(name, ends, pool)


def _add(name: Name, ends: dict[int, list[tuple[int, int]]], pool: str | None) -> bool:
    wanted = find(name.key) or Wanted(name.shown, name.uuid, name.uri)
    wanted.vm = name.shown
    changed = False
    for cluster, pairs in ends.items():
        share = wanted.shares.setdefault(cluster, Share())
        if pool is not None and share.pool != pool:
            share.pool, changed = pool, True
        for queue, direction in pairs:
            side = share.rx if direction == native.RX else share.tx
            if f"{cluster}@{queue}" not in side:
                side.append(f"{cluster}@{queue}")
                changed = True
    _write(wanted)
    return changed


def remove(key: str, chosen: dict[int, set[int] | None]) -> list[str]:
    """The VM shall not have these any more (none named: nothing at all). What it shall have no longer, as addresses."""
    if find(key) is None:  # the usual case where no agent runs
        return []
    with brief():
        return _remove(key, chosen)


def _remove(key: str, chosen: dict[int, set[int] | None]) -> list[str]:
    wanted = find(key)
    if wanted is None:
        return []
    gone: list[str] = []
    for cluster, share in list(wanted.shares.items()):
        if chosen and cluster not in chosen:
            continue
        queues = chosen.get(cluster) if chosen else None
        for side in (share.rx, share.tx):
            drop = [a for a in side if queues is None or address.parse_queue(a).queue in queues]
            side[:] = [a for a in side if a not in drop]
            gone += drop
        if not share.rx and not share.tx:
            del wanted.shares[cluster]
    _write(wanted)
    return sorted(set(gone))


def forget_cluster(cluster: int) -> None:
    """The cluster is gone: nobody shall have anything of it."""
    if not any(cluster in wanted.shares for wanted in everything()):
        return
    with brief():
        for wanted in everything():
            if wanted.shares.pop(cluster, None) is not None:
                _write(wanted)


def check(ends: dict[int, list[tuple[int, int]]]) -> None:
    """These queues exist.

    :raises NotFound: one does not.
    """
    for cluster, pairs in ends.items():
        with native.Handle.attach(cluster) as handle:
            known = handle.queue_ids()
        for queue, _ in pairs:
            if queue not in known:
                raise NotFound(
                    f"there is no queue {cluster}@{queue}",
                    code="no-such-queue",
                    cure=f"ringbar queue create {cluster}",
                )


def describe(wanted: Wanted, cluster: int) -> model.Attachment:
    """What a VM waits for, as an attachment."""
    share = wanted.shares[cluster]
    bindings = [model.Binding(a, "rx") for a in share.rx] + [model.Binding(a, "tx") for a in share.tx]
    return model.Attachment(
        vm=wanted.vm,
        cluster=cluster,
        state="waiting",
        pool=share.pool or ("own" if share.tx else "ro"),
        sees="is not running: it gets them when it is",
        bindings=bindings,
        since_ns=share.since_ns,
    )


def waiting() -> list[tuple[str, model.Attachment]]:
    """What VMs shall have and have not, since they are off or still on their way; with the VM's key."""
    plugged = {(r.key, r.cluster) for r in all_records()}
    return [
        (wanted.key, describe(wanted, cluster))
        for wanted in everything()
        for cluster in sorted(wanted.shares)
        if (wanted.key, cluster) not in plugged
    ]
