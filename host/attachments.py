# SPDX-License-Identifier: Apache-2.0
"""The host service's part for VMs: attach, detach, what VMs shall have, and what ended ones held."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ringbar import address
from ringbar.errors import Error, NotFound
from ringbar.host import model, native, records
from ringbar.host import wanted as shall
from ringbar.host.attaching import Attach, Detach, describe, lane_of

if TYPE_CHECKING:
    from ringbar.host.vms import Name

Progress = Callable[[str], None]

GLANCE = 1.0
"""Seconds that a guest which boots is waited for where nobody waits for the answer."""


def _took(began: float, waited: float) -> model.Took:
    total = time.monotonic() - began
    return model.Took(*(round(1e3 * part, 1) for part in (total, waited, total - waited)))


def silent(step: str) -> None:
    """No progress wanted."""


class Attachments:
    """What can be done to this host's VMs.

    :ivar stays: this process goes on when a command has ended: it is the agent.
    :ivar on_change: called after a VM was given something, or it was taken away.
    """

    stays = False
    on_change: Callable[[], None] = staticmethod(lambda: None)

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
        interrupts: bool | None = None,
        connect: str | None = None,
        later: bool = False,
        progress: Progress = silent,
    ) -> model.Attached:
        """Give a running VM ends of queues.

        :param vm: a name or UUID that libvirt knows, or ``qmp:SOCKET``.
        :param rx: queues that the VM receives.
        :param tx: queues that it sends.
        :param pool: ``ro``, ``rw``, ``own``; None: ``ro``, with any ``tx`` ``own``, with a direct one ``rw``.
        :param ready: wait until a program in the VM has opened them.
        :param timeout: seconds for all of it.
        :param use_last_slot: take the VM's last free port.
        :param replug: unplug and plug again where a change needs it.
        :param interrupts: True: with a doorbell, or not at all; False: without; None: where the VM can use one.
        :param connect: URI of libvirt's connection; None: ``$LIBVIRT_DEFAULT_URI``, else ``qemu:///system``.
        :param later: the agent takes a VM that boots as one that is off: it gets its queues when it is ready.
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
        self._reclaim(result.notes)
        with records.locked(name.key):
            began = time.monotonic()
            self._reclaim(result.notes, name.key)
            if not wanted and replug:
                wanted = {r.cluster: [] for r in records.all_records() if r.key == name.key}
            if not wanted:
                raise Error(
                    f"no queue is named that {name.shown} is to receive or to send",
                    code="no-queue",
                    cure=f"ringbar attach {name.typed} 99@0; ringbar status lists the queues",
                )
            try:
                machine = vms.connect(name, deadline, progress)
            except NotFound as off:
                if not self.stays or off.code not in ("vm-off", "no-such-vm"):
                    raise
                return self._await(name, wanted, pool, result)
            try:
                with machine, contextlib.ExitStack() as undo:
                    for cluster, ends in sorted(wanted.items()):
                        job = Attach(
                            name, machine, cluster, ends, pool, use_last_slot, replug, deadline, progress, interrupts
                        )
                        if later and self.stays:
                            job.boots_until = min(deadline, time.monotonic() + GLANCE)
                        with records.using(cluster):
                            result.changed |= job.run(undo, result)
                    undo.pop_all()
                    result.took = _took(began, machine.waited)
            except Error as e:
                if not self.stays or e.code != "guest-not-ready":
                    raise
                self._await(name, wanted, pool, result)
                if later:
                    return result
                cure = f"wait: it gets its queues when it is ready; ringbar detach {name.typed} calls it off"
                raise Error(e.message, code="not-finished", cure=cure) from None
            if self.stays:
                shall.add(name, wanted, pool)
        self.on_change()
        if ready:
            self._wait_ready(result, wanted, deadline, timeout, progress)
        return result

    def _await(
        self, name: Name, ends: dict[int, list[tuple[int, int]]], pool: str | None, result: model.Attached
    ) -> model.Attached:
        """The VM is off: remembered, and done when it comes."""
        shall.check(ends)
        result.changed |= shall.add(name, ends, pool)
        wanted = shall.find(name.key)
        assert wanted is not None
        result.attachments += [shall.describe(wanted, cluster) for cluster in sorted(ends)]
        self.on_change()
        return result

    def give_back(self, wanted: shall.Wanted, *, timeout: float, progress: Progress = silent) -> model.Attached:
        """Attach what a VM shall have. The agent calls this when the VM has come (back).

        :raises NotFound: it is off.
        """
        from ringbar.host import vms

        deadline = time.monotonic() + timeout
        name = vms.Name(wanted.vm, wanted.uuid, wanted.uri)
        result = model.Attached(changed=False)
        vms.check_listens(name)  # before others are kept waiting: many VMs may be off
        self._reclaim(result.notes)
        with records.locked(name.key):
            self._reclaim(result.notes, name.key)
            with vms.connect(name, deadline, progress) as machine, contextlib.ExitStack() as undo:
                for cluster, share in sorted(wanted.shares.items()):
                    ends = [(address.parse_queue(a).queue, native.RX) for a in share.rx]
                    ends += [(address.parse_queue(a).queue, native.TX) for a in share.tx]
                    job = Attach(name, machine, cluster, ends, share.pool, False, False, deadline, progress)
                    with records.using(cluster):
                        result.changed |= job.run(undo, result)
                undo.pop_all()
        return result

    def remember(self) -> None:
        """What VMs have now they shall have when they come back, too. The agent begins with this."""
        from ringbar.host import vms

        for record in records.all_records():
            if record.state != "plugged" or not records.alive(record.identity):
                continue
            found = describe(record).bindings
            ends = [
                (address.parse_queue(b.queue).queue, native.RX if b.direction == "rx" else native.TX) for b in found
            ]
            shall.add(vms.Name(record.vm, record.uuid, record.uri), {record.cluster: ends}, record.pool)

    def vm_was_reset(self, key: str) -> None:
        """The VM was reset: what its programs held comes home now, not when the next one opens a queue."""
        for record in records.all_records():
            if record.key == key and record.state == "plugged":
                with lane_of(record) as handle:
                    if handle is not None:
                        handle.lane_reset(record.lane)

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
        progress: Progress = silent,
    ) -> model.DetachedFrom:
        """Take ends of queues away from a VM; with its last end of a cluster, the memory too.

        :param targets: clusters (``99``) or queues (``99@0``); none: everything.
        :param timeout: seconds for the guest to let go of the device.
        :param force: do not insist on the guest's answer: what it held stays quarantined until the VM ends.
        :raises Error: code ``not-finished`` when the guest did not let go: everything stays as it is.
        """
        from ringbar.host import vms

        name = vms.known(vm, connect)
        chosen: dict[int, set[int] | None] = {}
        for target in targets:
            if target.isdigit():
                chosen[address.parse_cluster(target)] = None
                continue
            for queue in address.parse_queues(target):
                kept = chosen.setdefault(queue.cluster, set())
                if kept is not None:
                    kept.add(queue.queue)
        result = model.DetachedFrom(changed=False, vm=name.shown)
        deadline = time.monotonic() + timeout
        reclaimed = self._reclaim(result.notes)
        with records.locked(name.key):
            reclaimed |= self._reclaim(result.notes, name.key)
            mine = [r for r in records.all_records() if r.key == name.key]
            waited = shall.remove(name.key, chosen)
            result.changed |= bool(waited)
            if waited and not mine:
                result.queues += waited
            elif not mine and name.key not in reclaimed:
                self._unknown(name, chosen, deadline, progress, result)
            for record in mine:
                if chosen and record.cluster not in chosen:
                    continue
                with records.using(record.cluster):
                    Detach(record, chosen.get(record.cluster), deadline, timeout, force, progress).run(result)
            result.changed |= name.key in reclaimed
            left = [r for r in records.all_records() if r.key == name.key and r.state != "quarantined"]
            result.kept = [describe(r) for r in left]
        self.on_change()
        return result

    def _unknown(
        self,
        name: Name,
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
                        f"the guest of {name.shown} does not let go of cluster {cluster}",
                        code="not-finished",
                        cure=f"ringbar detach {name.typed} again, or restart the VM",
                    )
                result.changed = True
                result.notes.append(f"unplugged what was left of cluster {cluster}, which no record knows")

    def reclaim(self) -> list[str]:
        """Take back what VMs that have ended held; what was done, for people."""
        notes: list[str] = []
        self._reclaim(notes)
        return notes

    def _reclaim(self, notes: list[str], mine: str = "") -> set[str]:
        """Forget VMs that have ended, but those that somebody else is at just now. Their keys.

        :param mine: key of the VM whose lock is held.
        """
        gone = set()
        for record in records.all_records():
            if records.alive(record.identity):
                continue
            with contextlib.nullcontext(True) if record.key == mine else records.free(record.key) as ours:
                if not ours or records.find(record.key, record.cluster) != record:
                    continue
                with records.using(record.cluster), lane_of(record) as handle:
                    if handle is not None:
                        handle.lane_remove(record.lane)
                records.remove(record)
            gone.add(record.key)
            notes.append(f"{record.vm} has ended: what it held of cluster {record.cluster} was taken home")
        return gone
