# SPDX-License-Identifier: Apache-2.0
"""The host service's part for clusters and queues."""

from __future__ import annotations

import contextlib

from ringbar import address
from ringbar.attach import refuse_to_hide
from ringbar.cli.common import plural
from ringbar.errors import Busy, Error, NotFound
from ringbar.host import model, native, records
from ringbar.host import wanted as shall
from ringbar.host.attachments import Attachments, Progress, silent

USUAL_SLOTS = 4096
"""Of a queue where nothing else is said."""
USUAL_BUFFERS = 65536
"""Made where the queues do not need more."""
BURST = 64
"""The burst that sizes are computed with (RB_BURST)."""


class Clusters(Attachments):
    """What can be done to this host's clusters and queues."""

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
        progress: Progress = silent,
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
                f"{plural(queues, 'queue')} of {slots or USUAL_SLOTS} slots may lend {need:,} buffers, and {buffers:,} "
                f"{'is' if buffers == 1 else 'are'} asked for",
                code="pool-too-small",
                cure=f"--buffers {1 << (least - 1).bit_length()}, or --buffers auto",
            )
        refuse_to_hide(cluster)
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
        self, cluster: int, *, force: bool = False, progress: Progress = silent
    ) -> model.ClusterDestroyed:
        """Remove a cluster, with everything in it.

        :param force: although processes or VMs use it: their ends fail with Detached.
        :returns: ``changed`` false when there was none.
        :raises Busy: in use, and not ``force``; names the user and what frees it.
        """
        done = model.ClusterDestroyed(changed=False, id=cluster)
        self._reclaim(done.notes)
        if not force:
            self._unused(cluster)  # at once, whatever is done to a VM that has it
        with records.destroying(cluster):
            if cluster not in native.clusters():
                done.notes.append(f"there is no cluster {cluster}")
                return done
            users = [r for r in records.all_records() if r.cluster == cluster]
            if not force:
                self._unused(cluster)
            progress(f"destroying cluster {cluster}")
            try:
                native.destroy(cluster, force)
            except NotFound:
                return done
            shall.forget_cluster(cluster)
            for user in users:
                done.warnings.append(f"{user.vm} still has its memory plugged in: ringbar detach {user.vm} {cluster}")
        done.changed = True
        return done

    def _unused(self, cluster: int) -> None:
        """:raises Busy: a VM has it."""
        for user in records.all_records():
            if user.cluster == cluster:
                raise Busy(
                    f"cluster {cluster} is attached to {user.vm}",
                    holder=user.vm,
                    cure=f"ringbar detach {user.vm} {cluster}",
                )

    # ---- queues

    def create_queues(
        self,
        cluster: int,
        *,
        count: int = 1,
        number: int | None = None,
        slots: int = 0,
        credit: int = 0,
        direct: bool = False,
        progress: Progress = silent,
    ) -> model.QueuesChanged:
        """Make ``count`` more queues; all or none.

        :param number: of the first; None: the lowest free ones.
        :param slots: 0: 4096.
        :param credit: most buffers lent at once; 0: slots and two bursts.
        :param direct: between two VMs, without the host.
        """
        made: list[int] = []
        with native.Handle.attach(cluster) as handle, contextlib.ExitStack() as undo:
            for i in range(count):
                new = handle.create_queue(None if number is None else number + i, slots, credit, direct)
                undo.callback(handle.destroy_queue, new)
                made.append(new)
                progress(f"made {len(made)} of {plural(count, 'queue')}")
            undo.pop_all()
        return model.QueuesChanged(changed=True, queues=[f"{cluster}@{q}" for q in made])

    def set_queue(
        self, queue: str, *, pause: bool | None = None, expression: str | None = None
    ) -> model.QueuesChanged:
        """Change a queue; None leaves it as it is.

        :param pause: pause (True) or resume (False).
        :param expression: its filter, in libpcap's syntax; ``none`` or an empty one removes the filter.
        """
        where = address.parse_queue(queue)
        with native.Handle.attach(where.cluster) as handle:
            now = self._queue(handle, where.queue)
            changed = False
            if expression is not None:
                wanted = None if expression.strip() in ("", "none") else expression
                if wanted != now.filter:
                    handle.filter_queue(where.queue, wanted)
                    changed = True
            if pause is not None and now.paused != pause:
                handle.pause_queue(where.queue, pause)
                changed = True
        return model.QueuesChanged(changed=changed, queues=[str(where)])

    def destroy_queue(self, queue: str) -> model.QueuesChanged:
        """Remove a queue. Busy while somebody holds an end. ``changed`` false when there was none."""
        where = address.parse_queue(queue)
        with native.Handle.attach(where.cluster) as handle:
            changed = where.queue in handle.queue_ids()
            if changed:
                handle.destroy_queue(where.queue)
        return model.QueuesChanged(changed=changed, queues=[str(where)])

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
            devices=handle.devices(),
            segments=handle.segments(),
        )


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
