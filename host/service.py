# SPDX-License-Identifier: Apache-2.0
"""The host service: what the commands do, without a word printed.

:class:`Host` is the boundary that the agent daemon will serve: plain values in, the dataclasses of
:mod:`ringbar.host.model` out, errors of :mod:`ringbar.errors`, progress through a callback. Everything that fails
midway is undone before the error is raised.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from ringbar import address
from ringbar.errors import Busy, Error, NotFound
from ringbar.host import model, native, records
from ringbar.host.attaching import Attach, Detach, describe, lane_of

Progress = Callable[[str], None]

ANNOUNCE_TIMEOUT = 2.0
"""Seconds that programs in a VM have to let go before the device is unplugged."""
USUAL_SLOTS = 4096
"""Of a queue where nothing else is said."""
USUAL_BUFFERS = 65536
"""Made where the queues do not need more."""
BURST = 64
"""The burst that sizes are computed with (RB_BURST)."""


def _silent(step: str) -> None:
    """No progress wanted."""


class Host:
    """What can be done to this host's clusters and VMs."""

    # ---- clusters

    def create_cluster(
        self,
        cluster: int,
        *,
        queues: int = 0,
        slots: int = 0,
        buffers: int | None = None,
        size: int = 2048,
        pages: str = "auto",
        numa: int | None = None,
        label: str = "",
        progress: Progress = _silent,
    ) -> model.ClusterCreated:
        """Make a cluster that lives until it is destroyed.

        :param queues: queues 0 to N-1 are made with it.
        :param slots: of these queues; 0: the default, 4096.
        :param buffers: how many; None: computed from the queues.
        :param size: bytes of a buffer.
        :param pages: ``4k``, ``2M``, ``1G``, or ``auto``.
        :param numa: memory node; None: wherever.
        :returns: ``changed`` false when the same cluster was there already.
        :raises Busy: when another cluster has the number.
        """
        need = queues * ((slots or USUAL_SLOTS) + 2 * BURST)
        least = need + 3 * BURST  # two bursts in its server's hand, and an extent that begins with the pool's header
        if queues and buffers is not None and buffers < least:
            raise Error(
                f"{queues} queues of {slots or USUAL_SLOTS} slots may lend {need} buffers, and {buffers} are asked for",
                code="pool-too-small",
                cure=f"--buffers {1 << (least - 1).bit_length()}, or --buffers auto",
            )
        progress(f"making cluster {cluster}: allocating memory")
        try:
            handle = native.Handle.create(
                cluster,
                buffers=buffers or 0,
                size=size,
                queues=queues,
                slots=slots,
                pages=pages,
                numa=numa,
                persistent=True,
                label=label,
            )
        except Error as refused:
            if cluster not in native.clusters():
                raise
            return self._same_cluster(cluster, queues, slots, buffers, size, pages, label, refused)
        with handle:
            info = self._info(handle)
            made = [handle.queue(q) for q in handle.queue_ids()]
        return model.ClusterCreated(
            changed=True, cluster=info, queues=[q.address for q in made], sizing=_sizing(info, made, buffers)
        )

    def _same_cluster(
        self,
        cluster: int,
        queues: int,
        slots: int,
        buffers: int | None,
        size: int,
        pages: str,
        label: str,
        refused: Error,
    ) -> model.ClusterCreated:
        """The cluster is there: unchanged when it is what was asked for, else the error."""
        with native.Handle.attach(cluster) as handle:
            info = self._info(handle)
            there = [handle.queue(q) for q in handle.queue_ids()]
        if not info.persistent:
            raise refused
        differs = []
        if size != info.buffer_size:
            differs.append(f"its buffers have {info.buffer_size} bytes, not {size}")
        if buffers is not None and buffers != info.buffers:
            differs.append(f"it has {info.buffers} buffers, not {buffers}")
        if pages not in ("auto", info.pages):
            differs.append(f"its pages are {info.pages}, not {pages}")
        if label and label != info.label:
            differs.append(f"its label is '{info.label}'")
        missing = [q for q in range(queues) if q not in {t.id for t in there}]
        if missing:
            differs.append(f"it has no queue {cluster}@{missing[0]}")
        elif slots and any(q.slots != slots for q in there if q.id < queues):
            differs.append(f"its queues do not have {slots} slots")
        if differs:
            raise Busy(
                f"cluster {cluster} is there already, and {differs[0]}",
                holder=f"cluster {cluster} ({info.lives})",
                code="exists",
                cure=f"use another number, ringbar queue create {cluster} for more queues, "
                f"or ringbar cluster destroy {cluster} first",
            )
        return model.ClusterCreated(changed=False, cluster=info, queues=[q.address for q in there])

    def list_clusters(self) -> list[model.Cluster]:
        """All clusters of this host, by number."""
        found = []
        for cluster in native.clusters():
            with contextlib.suppress(NotFound), native.Handle.attach(cluster) as handle:
                found.append(self._info(handle))
        return found

    def show_cluster(self, cluster: int) -> model.ClusterStatus:
        """One cluster: its settings, queues and segments."""
        with native.Handle.attach(cluster) as handle:
            return self._cluster_status(handle)

    def destroy_cluster(
        self, cluster: int, *, force: bool = False, progress: Progress = _silent
    ) -> model.ClusterDestroyed:
        """Remove a cluster, with everything in it.

        :param force: although processes or VMs use it: their ends fail with Detached.
        :returns: ``changed`` false when there was none.
        :raises Busy: in use, and not ``force``; names the user and what frees it.
        """
        done = model.ClusterDestroyed(changed=False, id=cluster)
        with records.locked():
            self._reclaim(done.notes)
            if cluster not in native.clusters():
                done.notes.append(f"there is no cluster {cluster}")
                return done
            users = [r for r in records.all_records() if r.cluster == cluster]
            if users and not force:
                raise Busy(
                    f"cluster {cluster} is attached to {users[0].vm}",
                    holder=users[0].vm,
                    cure=f"ringbar detach {users[0].vm} {cluster}",
                )
            progress(f"destroying cluster {cluster}")
            try:
                native.destroy(cluster, force)
            except NotFound:
                return done
            for user in users:
                done.warnings.append(f"{user.vm} still has its memory plugged in: ringbar detach {user.vm} {cluster}")
        done.changed = True
        return done

    # ---- queues

    def create_queues(
        self,
        cluster: int,
        *,
        count: int = 1,
        slots: int = 0,
        credit: int = 0,
        direct: bool = False,
        progress: Progress = _silent,
    ) -> model.QueuesChanged:
        """Make ``count`` more queues with the lowest free numbers; all or none.

        :param slots: 0: 4096.
        :param credit: most buffers lent at once; 0: slots and two bursts.
        :param direct: between two VMs, without the host.
        """
        made: list[int] = []
        with native.Handle.attach(cluster) as handle, contextlib.ExitStack() as undo:
            for _ in range(count):
                number = handle.create_queue(None, slots, credit, direct)
                undo.callback(handle.destroy_queue, number)
                made.append(number)
                progress(f"made {len(made)} of {count} queues")
            undo.pop_all()
        return model.QueuesChanged(changed=True, queues=[f"{cluster}@{q}" for q in made])

    def set_queue(self, queue: str, *, pause: bool | None = None) -> model.QueuesChanged:
        """Pause (True) or resume (False) a queue; None leaves it as it is."""
        where = address.parse_queue(queue)
        with native.Handle.attach(where.cluster) as handle:
            changed = pause is not None and self._queue(handle, where.queue).paused != pause
            if changed and pause is not None:
                handle.pause_queue(where.queue, pause)
        return model.QueuesChanged(changed=changed, queues=[str(where)])

    def destroy_queue(self, queue: str) -> model.QueuesChanged:
        """Remove a queue. Busy while somebody holds an end. ``changed`` false when there was none."""
        where = address.parse_queue(queue)
        with native.Handle.attach(where.cluster) as handle:
            changed = where.queue in handle.queue_ids()
            if changed:
                handle.destroy_queue(where.queue)
        return model.QueuesChanged(changed=changed, queues=[str(where)])

    # ---- VMs

    def attach(
        self,
        vm: str,
        rx: list[str],
        tx: list[str],
        *,
        pool: str | None = None,
        ready: bool = False,
        timeout: float = 60.0,
        use_last_slot: bool = False,
        replug: bool = False,
        connect: str | None = None,
        progress: Progress = _silent,
    ) -> model.Attached:
        """Give a running VM ends of queues.

        :param vm: ``qmp:SOCKET``.
        :param rx: queues that the VM receives.
        :param tx: queues that it sends.
        :param pool: ``ro``, ``rw``; None: ``ro``, with any ``tx`` ``rw``.
        :param ready: wait until a program in the VM has opened them.
        :param timeout: seconds for all of it.
        :param use_last_slot: take the VM's last free port.
        :param replug: unplug and plug again where a change needs it.
        :param connect: libvirt URI.
        :raises Error: code ``not-finished`` when it is attached, but no program opened it in time.
        """
        from ringbar.host import vms

        deadline = time.monotonic() + timeout
        name = vms.canonical(vm, connect)
        wanted: dict[int, list[tuple[int, int]]] = {}
        for texts, direction in ((rx, native.RX), (tx, native.TX)):
            for text in texts:
                for queue in address.parse_queues(text):
                    ends = wanted.setdefault(queue.cluster, [])
                    if (queue.queue, direction) not in ends:
                        ends.append((queue.queue, direction))
        result = model.Attached(changed=False)
        with records.locked():
            self._reclaim(result.notes)
            if not wanted and replug:
                wanted = {r.cluster: [] for r in records.all_records() if r.vm == name}
            if not wanted:
                raise Error(
                    f"no queue is named that {name} is to receive or to send",
                    code="no-queue",
                    cure=f"ringbar attach {vm} 99@0; ringbar status lists the queues",
                )
            with vms.connect(name, deadline, progress) as machine, contextlib.ExitStack() as undo:
                for cluster, ends in sorted(wanted.items()):
                    job = Attach(name, machine, cluster, ends, pool, use_last_slot, replug, deadline, progress)
                    result.changed |= job.run(undo, result)
                undo.pop_all()
        if ready:
            self._wait_ready(result, wanted, deadline, timeout, progress)
        return result

    def _wait_ready(
        self,
        result: model.Attached,
        wanted: dict[int, list[tuple[int, int]]],
        deadline: float,
        timeout: float,
        progress: Progress,
    ) -> None:
        for i, attachment in enumerate(result.attachments):
            names = {
                (f"{attachment.cluster}@{q}", "rx" if d == native.RX else "tx") for q, d in wanted[attachment.cluster]
            }
            with native.Handle.attach(attachment.cluster) as handle:
                while True:
                    bindings = handle.lane_bindings(attachment.lane)
                    missing = [b.queue for b in bindings if (b.queue, b.direction) in names and not b.open]
                    if not missing:
                        break
                    if time.monotonic() >= deadline:
                        raise Error(
                            f"attached, but no program in {attachment.vm} has opened {missing[0]} within {timeout:g} s",
                            code="not-finished",
                            cure=f"in the VM: ringbar count -i {missing[0]}",
                        )
                    progress(f"waiting for a program in {attachment.vm} to open {missing[0]}")
                    time.sleep(0.05)
            result.attachments[i].bindings = bindings
            result.attachments[i].state = "ready"

    def detach(
        self,
        vm: str,
        targets: list[str],
        *,
        timeout: float = 30.0,
        force: bool = False,
        connect: str | None = None,
        progress: Progress = _silent,
    ) -> model.DetachedFrom:
        """Take ends of queues away from a VM; with its last end of a cluster, the memory too.

        :param targets: clusters (``99``) or queues (``99@0``); none: everything.
        :param timeout: seconds for the guest to let go of the device.
        :param force: do not insist on the guest's answer: what it held stays quarantined until the VM ends.
        :raises Error: code ``not-finished`` when the guest did not let go: everything stays as it is.
        """
        from ringbar.host import vms

        name = vms.canonical(vm, connect)
        chosen: dict[int, set[int] | None] = {}
        for target in targets:
            if target.isdigit():
                chosen[address.parse_cluster(target)] = None
                continue
            for queue in address.parse_queues(target):
                kept = chosen.setdefault(queue.cluster, set())
                if kept is not None:
                    kept.add(queue.queue)
        result = model.DetachedFrom(changed=False, vm=name)
        deadline = time.monotonic() + timeout
        with records.locked():
            reclaimed = self._reclaim(result.notes)
            mine = [r for r in records.all_records() if r.vm == name]
            if not mine and name not in reclaimed:
                self._unknown(name, chosen, deadline, progress, result)
            for record in mine:
                if chosen and record.cluster not in chosen:
                    continue
                job = Detach(record, chosen.get(record.cluster), deadline, timeout, force, progress)
                job.run(result)
            result.changed |= name in reclaimed
            result.kept = [describe(r) for r in records.all_records() if r.vm == name and r.state != "quarantined"]
        return result

    def _unknown(
        self,
        name: str,
        chosen: dict[int, set[int] | None],
        deadline: float,
        progress: Progress,
        result: model.DetachedFrom,
    ) -> None:
        """A VM without a record: what it still has plugged in of ours is taken out."""
        from ringbar.host import vms

        try:
            machine = vms.connect(name, deadline, progress)
        except NotFound as e:
            if e.code == "vm-off":  # and so has nothing plugged in
                return
            raise
        with machine:
            for cluster in machine.clusters():
                if chosen and cluster not in chosen:
                    continue
                if not machine.unplug(cluster, deadline, progress):
                    raise Error(
                        f"the guest of {name} does not let go of cluster {cluster}",
                        code="not-finished",
                        cure=f"ringbar detach {name} again, or restart the VM",
                    )
                result.changed = True
                result.notes.append(f"unplugged what was left of cluster {cluster}, which no record knows")

    # ---- looking

    def status(self, target: str | None = None, *, sample: float = 0.0, progress: Progress = _silent) -> model.Status:
        """What is there now.

        :param target: a cluster, a queue or a VM; None: everything.
        :param sample: seconds over which rates are taken; 0: no rates.
        """
        from ringbar.host import doctor, inside

        if doctor.in_guest():
            cluster, queue, _ = _target(target)
            return inside.status(cluster, queue, sample)
        result = model.Status(sampled_seconds=sample)
        with contextlib.suppress(Busy, PermissionError):
            if records.all_records():
                with records.locked(timeout=0.0):
                    self._reclaim(result.notes)
        cluster, queue, vm = _target(target)
        if cluster is not None:
            wanted = [cluster]
        elif vm is not None:
            wanted = [r.cluster for r in records.all_records() if r.vm == vm]
        else:
            wanted = native.clusters()
        with contextlib.ExitStack() as handles:
            opened = []
            for number in wanted:
                try:
                    opened.append(handles.enter_context(native.Handle.attach(number)))
                except NotFound:
                    if cluster is not None:
                        raise
                    continue
                with contextlib.suppress(Error):  # somebody else does it just now
                    dead = native.reap(number)
                    if dead:
                        programs = f"{dead} dead program{'s' * (dead > 1)}"
                        result.notes.append(f"took home what {programs} held of cluster {number}")
            before = [self._queues(h, queue) for h in opened]
            began = time.monotonic()
            if sample > 0 and any(before):
                progress("measuring rates")
                time.sleep(sample)
            for handle, earlier in zip(opened, before):
                shown = self._cluster_status(handle, queue)
                took = time.monotonic() - began
                if sample > 0:
                    seen = {q.id: q for q in earlier}
                    for q in shown.queues:
                        was = seen.get(q.id, q)  # what a VM sends to a program here is received, and lent to nobody
                        q.pps = max(q.packets - was.packets, q.received_packets - was.received_packets) / took
                result.clusters.append(shown)
        result.vms = [
            describe(r)
            for r in records.all_records()
            if (cluster is None or r.cluster == cluster) and (vm is None or r.vm == vm)
        ]
        if queue is not None:
            result.vms = [a for a in result.vms if any(b.queue == f"{cluster}@{queue}" for b in a.bindings)]
        if vm is not None and not result.vms:
            raise NotFound(f"nothing is attached to {vm}", code="not-attached", cure=f"ringbar attach {vm} QUEUE")
        return result

    def doctor(self, target: str | None = None, *, clean: bool = False, progress: Progress = _silent) -> model.Report:
        """What this machine can do. ``clean`` removes what dead clusters and processes left."""
        from ringbar.host import doctor

        return doctor.examine(self, target, clean, progress)

    def reclaim(self) -> list[str]:
        """Take back what VMs that have ended held; what was done, for people."""
        notes: list[str] = []
        with records.locked():
            self._reclaim(notes)
        return notes

    # ---- inside

    def _info(self, handle: native.Handle) -> model.Cluster:
        info = handle.info()
        info.memory = sum(s.size for s in handle.segments())
        return info

    def _queue(self, handle: native.Handle, number: int) -> model.Queue:
        known = handle.queue_ids()
        if number not in known:
            shown = address.format_queues(address.QueueAddress(handle.id, q) for q in known)
            cure = f"ringbar queue create {handle.id}" + (f"; there are: {shown}" if shown else "")
            raise NotFound(f"there is no queue {handle.id}@{number}", code="no-such-queue", cure=cure)
        return handle.queue(number)

    def _queues(self, handle: native.Handle, only: int | None) -> list[model.Queue]:
        if only is not None:
            return [self._queue(handle, only)]
        found = []
        for number in handle.queue_ids():
            with contextlib.suppress(NotFound):  # destroyed meanwhile
                found.append(handle.queue(number))
        return found

    def _cluster_status(self, handle: native.Handle, only: int | None = None) -> model.ClusterStatus:
        return model.ClusterStatus(
            cluster=self._info(handle),
            queues=self._queues(handle, only),
            books=handle.books(),
            segments=handle.segments(),
        )

    def _reclaim(self, notes: list[str]) -> set[str]:
        """With the lock held: forget VMs that have ended. Their names."""
        gone = set()
        for record in records.all_records():
            if records.alive(record.identity):
                continue
            with lane_of(record) as handle:
                if handle is not None:
                    handle.lane_remove(record.lane)
            records.remove(record)
            gone.add(record.vm)
            notes.append(f"{record.vm} has ended: what it held of cluster {record.cluster} was taken home")
        return gone


def _target(text: str | None) -> tuple[int | None, int | None, str | None]:
    """What ``status`` was asked about: cluster, queue of it, VM."""
    if text is None:
        return None, None, None
    if text.isdigit():
        return address.parse_cluster(text), None, None
    if "@" in text and not text.startswith("qmp:"):
        where = address.parse_queue(text)
        return where.cluster, where.queue, None
    from ringbar.host import vms

    return None, None, vms.canonical(text, None)


def _sizing(info: model.Cluster, queues: list[model.Queue], given: int | None) -> str:
    """How the number of buffers came about, one sentence."""
    if given is not None:
        return f"{info.buffers:,} buffers, as asked for"
    if not queues:
        return f"{info.buffers:,} buffers, the usual number"
    need = sum(q.credit for q in queues)
    same = {q.credit for q in queues}
    total = f"{len(queues)} x {same.pop():,} = {need:,}" if len(same) == 1 else f"{need:,}"
    how = "computed" if need > USUAL_BUFFERS else "the usual number"
    return f"{info.buffers:,} buffers, {how}: the queues may lend {total} (slots and two bursts of {BURST} each)"
