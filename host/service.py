# SPDX-License-Identifier: Apache-2.0
"""The host service: what the commands do, without a word printed.

:class:`Host` is the boundary that the agent daemon will serve: plain values in, the dataclasses of
:mod:`ringbar.host.model` out, errors of :mod:`ringbar.errors`, progress through a callback. Everything that fails
midway is undone before the error is raised.
"""

from __future__ import annotations

import contextlib
import re
import time
from typing import TYPE_CHECKING

from ringbar import address
from ringbar.errors import Error, NotFound
from ringbar.host import model, native, records
from ringbar.host import wanted as shall
from ringbar.host.attaching import describe
from ringbar.host.attachments import Progress, silent
from ringbar.host.clusters import Clusters

if TYPE_CHECKING:
    from ringbar.host.topology.plan import Step
    from ringbar.host.vms import Name

__all__ = ["Host", "Progress", "silent"]


class Host(Clusters):
    """What can be done to this host's clusters and VMs."""

    # ---- looking

    def status(self, target: str | None = None, *, sample: float = 0.0, progress: Progress = silent) -> model.Status:
        """What is there now.

        :param target: a cluster, a queue or a VM; None: everything.
        :param sample: seconds over which rates are taken; 0: no rates.
        """
        from ringbar.host import inside, working

        named = working.workers() if target is None else []
        if inside.in_guest():
            cluster, queue, _ = _target(target)
            result = inside.status(cluster, queue, sample)
            result.workers = named
            return result
        result = model.Status(workers=named, sampled_seconds=sample)
        self._reclaim(result.notes)
        cluster, queue, vm = _target(target)
        if cluster is not None:
            wanted = [cluster]
        elif vm is not None:
            wanted = [r.cluster for r in records.all_records() if r.key == vm.key]
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
            if (cluster is None or r.cluster == cluster) and (vm is None or r.key == vm.key)
        ]
        keys = {w.key for w in shall.everything() if vm is None or w.key == vm.key}
        result.vms += [a for key, a in shall.waiting() if key in keys and (cluster is None or a.cluster == cluster)]
        if queue is not None:
            result.vms = [a for a in result.vms if any(b.queue == f"{cluster}@{queue}" for b in a.bindings)]
        if vm is not None and not result.vms:
            raise NotFound(
                f"nothing is attached to {vm.shown}", code="not-attached", cure=f"ringbar attach {vm.typed} QUEUE"
            )
        return result

    def doctor(
        self,
        target: str | None = None,
        *,
        clean: bool = False,
        connect: str | None = None,
        progress: Progress = silent,
    ) -> model.Report:
        """What this machine can do. ``clean`` removes what dead clusters and processes left.

        :param target: a device or a VM to look at too.
        :param connect: URI of libvirt's connection, for a VM.
        """
        from ringbar.host import doctor

        return doctor.examine(self, target, clean, connect, progress)

    def migrate(
        self, vm: str, to: str, *, timeout: float = 300.0, connect: str | None = None, progress: Progress = silent
    ) -> model.Migrated:
        """Detach, migrate, and attach on the other side.

        :param to: ``qmp:SOCKET`` of a QEMU that waits with ``-incoming defer``, or libvirt's URI of another host.
        :raises Error: the VM is here as it was, or, code ``not-attached``, there without its queues.
        """
        from ringbar.host import migrating

        return migrating.migrate(self, vm, to, timeout, connect, progress)

    # ---- topologies

    def plan(self, text: str, file: str) -> model.Planned:
        """What applying a topology would do.

        :param text: the file's content; ``file`` its name, for messages.
        """
        from ringbar.host.topology.apply import make_plan
        from ringbar.host.topology.schema import Source

        source = Source(text, file)
        made, _ = make_plan(self, source)
        return model.Planned(
            changed=bool(made.steps), name=source.topology.name, steps=[_step(step) for step in made.steps]
        )

    def apply(
        self, text: str, file: str, *, rollback_after: float | None = None, progress: Progress = silent
    ) -> model.Planned:
        """Make it so, with the least change. A second time changes nothing.

        :param rollback_after: seconds after which the one before is applied again, unless this one is by then,
            without this option. Only the agent, which goes on after the command, can promise that.
        :raises Error: of the first step that failed; the next apply goes on from there.
        """
        from ringbar.host.topology import owned
        from ringbar.host.topology.apply import make_plan, take
        from ringbar.host.topology.schema import Source

        if rollback_after is not None and not self.stays:
            raise Error(
                "going back by itself needs the agent, which is there when this command has ended",
                code="no-agent",
                cure="systemctl start ringbar-agent, or ringbar agent &",
            )
        source = Source(text, file)
        with owned.locked(source.topology.name):
            made, mine = make_plan(self, source)
            before = mine.text
            if rollback_after is not None and (made.steps or not mine.rollback_at_ns):
                mine.rollback_text = before or f"ringbar: 1\nname: {source.topology.name}\n"
                mine.rollback_at_ns = time.time_ns() + int(rollback_after * 1e9)
                owned.save(mine)
            take(self, made.steps, mine, progress)
            mine.text = text
            if rollback_after is None:
                mine.rollback_at_ns, mine.rollback_text = 0, ""
            owned.save(mine)
        return model.Planned(
            changed=bool(made.steps), name=source.topology.name, steps=[_step(step) for step in made.steps]
        )


def _step(step: Step) -> model.Step:
    return model.Step(do=step.do, subject=step.subject, text=step.text)


def _target(text: str | None) -> tuple[int | None, int | None, Name | None]:
    """What ``status`` was asked about: cluster, queue of it, VM."""
    if text is None:
        return None, None, None
    if text.isdigit():
        return address.parse_cluster(text), None, None
    if re.match(r"(zc:)?[0-9]+@", text):
        where = address.parse_queue(text)
        return where.cluster, where.queue, None
    from ringbar.host import vms

    return None, None, vms.known(text, None)
