# SPDX-License-Identifier: Apache-2.0
"""Giving a VM ends of queues, and taking them away: the steps, and their undoing in reverse.

The order is chosen so that whatever fails or is killed can be cleaned up: the lane and its bindings first (they
cost the VM nothing), then the record on disk, then the plug. Unplugging goes the other way, and buffers are taken
home only after the guest can no longer write to them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ringbar.errors import Busy, Error, NotFound
from ringbar.host import bells, model, native, records
from ringbar.host.records import Record

if TYPE_CHECKING:
    from ringbar.host.vms import Machine, Name

Progress = Callable[[str], None]

ANNOUNCE_TIMEOUT = 2.0
"""Seconds that programs in a VM have to let go before the device is unplugged."""

RW_WARNING = "the VM can change every packet of cluster {}, since it sends on a direct queue"
LEAST_OWN = 1024
"""Buffers of a VM's own pool, where its queues do not need more."""
MOST_BUFFERS = 1 << 24


@contextlib.contextmanager
def lane_of(record: Record) -> Iterator[native.Handle | None]:
    """The cluster of a record, or None when it is gone or its number was given to another."""
    try:
        handle = native.Handle.attach(record.cluster)
    except NotFound:
        yield None
        return
    with handle:
        yield handle if handle.info().generation == record.generation else None


def sees(record: Record) -> str:
    """What the VM can see, for people (rule 5)."""
    what = "read and change" if record.pool == "rw" else "read"
    own = " and writes only a pool of its own" if record.pool == "own" else ""
    return f"can {what} all packets of cluster {record.cluster}{own}"


def describe(record: Record) -> model.Attachment:
    """An attachment as it is now."""
    bindings: list[model.Binding] = []
    state = record.state
    with lane_of(record) as handle:
        if handle is None:
            state = "cluster destroyed"
        elif state != "quarantined":
            bindings = handle.lane_bindings(record.lane)
            if state == "plugged" and any(b.open for b in bindings):
                state = "ready"
    return model.Attachment(
        vm=record.vm,
        cluster=record.cluster,
        state=state,
        pool=record.pool,
        sees=sees(record),
        bindings=bindings,
        where=record.where,
        via=record.via,
        uuid=record.uuid,
        uri=record.uri,
        lane=record.lane,
        identity=record.identity,
        since_ns=record.since_ns,
        interrupts=record.bell == bells.ON,
        polls="" if record.bell == bells.ON else record.bell,
    )


def _end(direction: str) -> int:
    return native.RX if direction == "rx" else native.TX


class Attach:
    """One VM and one cluster: bind ends, and plug what is not plugged yet. The VM's lock is held.

    :param ends: pairs of queue number and direction (``native.RX``, ``native.TX``).
    :param pool: mode asked for; None: by what the ends need.
    :param deadline: on the monotonic clock.
    :param interrupts: True: a doorbell; False: none; None: if the VM can have one.
    :ivar boots_until: how long a guest that boots is waited for; the deadline, unless it is set.
    """

    def __init__(
        self,
        name: Name,
        machine: Machine,
        cluster: int,
        ends: list[tuple[int, int]],
        pool: str | None,
        use_last_slot: bool,
        replug: bool,
        deadline: float,
        progress: Progress,
        interrupts: bool | None = None,
    ) -> None:
        self.name = name
        self.vm = name.shown
        self.interrupts = interrupts
        self.machine = machine
        self.cluster = cluster
        self.ends = list(ends)
        self.pool = pool
        self.use_last_slot = use_last_slot
        self.replug = replug
        self.deadline = deadline
        self.boots_until = deadline
        self.progress = progress

    def run(self, undo: contextlib.ExitStack, result: model.Attached) -> bool:
        """Do it; what undoes it is pushed on ``undo``. True when anything changed."""
        sends = any(d == native.TX for _, d in self.ends)
        if self.pool == "ro" and sends:
            raise Error(
                "a VM that sends needs to write packets, and --pool ro does not let it",
                code="pool-read-only",
                cure="--pool own, or leave --tx out",
            )
        with native.Handle.attach(self.cluster) as handle:
            known = handle.queue_ids()
            for queue, _ in self.ends:
                if queue not in known:
                    raise NotFound(
                        f"there is no queue {self.cluster}@{queue}",
                        code="no-such-queue",
                        cure=f"ringbar queue create {self.cluster}",
                    )
            generation = handle.info().generation
            record = self._usable(records.find(self.name.key, self.cluster), generation, result)
            if record is not None:
                wanted = self.pool or self._mode(handle, record.pool)
                if wanted != record.pool and not (wanted == "ro" and self.pool is None):
                    record = self._change(handle, record, wanted, undo, result)
            if record is not None and self.interrupts is not None and self.interrupts != (record.bell == bells.ON):
                bells.why_not(self.machine, self.interrupts)
                record = self._change(handle, record, record.pool, undo, result)
            if record is not None and self._new_direct(handle, record):
                record = self._change(handle, record, record.pool, undo, result)
            if record is not None:
                changed = self._bind(handle, record.lane, undo)
            else:
                mode = self.pool or self._mode(handle, "ro")
                if mode == "rw" and self.pool is None:
                    result.warnings.append(RW_WARNING.format(self.cluster))
                record = self._plug(handle, generation, mode, undo, result)
                changed = True
        result.attachments.append(describe(record))
        return changed

    def _mode(self, handle: native.Handle, present: str) -> str:
        """The pool mode that the ends need, where none was asked for."""
        sent = [queue for queue, direction in self.ends if direction == native.TX]
        if present == "rw" or not sent:
            return present
        return "rw" if any(handle.queue(queue).direct for queue in sent) else "own"

    def _own_buffers(self, handle: native.Handle) -> int:
        """How large the VM's own pool is: what its queues may hold, and two bursts."""
        need = sum(handle.queue(queue).credit for queue, direction in self.ends if direction == native.TX)
        return min(MOST_BUFFERS, max(LEAST_OWN, 1 << (need + 3 * native.BURST - 1).bit_length()))

    def _usable(self, record: Record | None, generation: int, result: model.Attached) -> Record | None:
        """The record, if its plug can be used; what an interrupted or outlived one left is removed."""
        if record is None:
            return None
        there = self.cluster in self.machine.clusters()
        if record.state == "plugged" and record.generation == generation and there:
            return record
        if not there:
            self.progress(f"nothing of cluster {self.cluster} is in {self.vm} any more: plugging it in anew")
        elif record.state == "quarantined" or record.generation != generation:
            what = "its memory is of a cluster that is gone" if record.state != "quarantined" else "it is quarantined"
            self.progress(f"unplugging from {self.vm} what is left there: {what}")
        else:
            self.progress(f"cleaning up in {self.vm} after a command that did not finish")
        if not self.machine.unplug(self.cluster, self.deadline, self.progress):
            raise Error(
                f"{self.vm} does not let go of what was plugged into it before",
                code="not-finished",
                cure=f"ringbar detach {self.name.typed} {self.cluster}, or restart the VM",
            )
        with lane_of(record) as handle:
            if handle is not None:
                handle.lane_remove(record.lane)
        records.remove(record)
        result.notes.append(f"removed from {self.vm} what was left of cluster {self.cluster}")
        return None

    def _change(
        self,
        handle: native.Handle,
        record: Record,
        mode: str,
        undo: contextlib.ExitStack,
        result: model.Attached,
    ) -> Record | None:
        """Another pool mode needs the device plugged anew, which is only done when asked for."""
        if not self.replug:
            why = "sends now" if mode != "ro" and self.pool is None else f"shall have --pool {mode}"
            if mode == record.pool:
                why = "gets a direct queue, which has memory of its own"
                if self.interrupts is not None and self.interrupts != (record.bell == bells.ON):
                    why = f"shall have {'interrupts' if self.interrupts else 'no interrupts'}"
            raise Error(
                f"{self.vm} has cluster {self.cluster} plugged in with --pool {record.pool} and {why}",
                code="needs-replug",
                cure="add --replug: it is unplugged and plugged in anew, and programs in the VM attach again",
            )
        kept = [(int(b.queue.split("@")[1]), _end(b.direction)) for b in handle.lane_bindings(record.lane)]
        again = model.DetachedFrom(changed=False, vm=self.vm)
        Detach(record, None, self.deadline, self.deadline - time.monotonic(), False, self.progress).unplug(
            again, self.machine
        )
        undo.callback(self._put_back, kept, record.pool, record.bell == bells.ON)
        self.use_last_slot = True  # the slot that it had
        self.ends = kept + [end for end in self.ends if end not in kept]
        if self.pool is None and any(d == native.TX for _, d in self.ends):
            result.notes.append(f"plugging cluster {self.cluster} in anew")
        return None

    def _put_back(self, ends: list[tuple[int, int]], pool: str, interrupts: bool) -> None:
        """What was unplugged to be plugged anew could not be: as it was before."""
        deadline = max(self.deadline, time.monotonic() + 30)
        before = Attach(
            self.name, self.machine, self.cluster, ends, pool, True, False, deadline, self.progress, interrupts
        )
        with contextlib.ExitStack() as undo:
            before.run(undo, model.Attached(changed=False))
            undo.pop_all()

    def _bind(self, handle: native.Handle, lane: int, undo: contextlib.ExitStack) -> bool:
        changed = False
        for queue, direction in self.ends:
            try:
                new = handle.lane_bind(lane, queue, direction)
            except Busy as e:
                raise self._held(handle, queue, direction, e) from None
            if new:
                changed = True
                undo.callback(_unbind, self.cluster, lane, queue, direction)
        return changed

    def _held(self, handle: native.Handle, queue: int, direction: int, refused: Busy) -> Busy:
        """Who holds that end, since when, and what frees it (rule 2)."""
        info = handle.queue(queue)
        holder = info.consumer if direction == native.RX else info.producer
        if holder is None:
            return refused
        side = "receives" if direction == native.RX else "sends on"
        since = ""
        if holder.since_ns:
            since = time.strftime(" since %Y-%m-%d %H:%M:%S", time.localtime(holder.since_ns / 1e9))
        cure = f"ringbar detach {holder.vm} {info.address}" if holder.vm else f"end it: kill {holder.pid}"
        return Busy(f"{holder} {side} {info.address}{since}", holder=str(holder), cure=cure)

    def _plug(
        self,
        handle: native.Handle,
        generation: int,
        mode: str,
        undo: contextlib.ExitStack,
        result: model.Attached,
    ) -> Record:
        """A new lane, its bindings, the record, the devices."""
        lane = handle.lane_create(self.vm, self.machine.identity)
        undo.callback(_remove_lane, self.cluster, lane)
        own = handle.lane_pool(lane, self._own_buffers(handle)) if mode == "own" else None
        self._bind(handle, lane, undo)
        segments = handle.segments()
        lanes = [s for s in segments if s.kind == "lane" and s.id == lane]
        lanes += [s for s in segments if s.kind == "lane" and s.vm in self._direct(handle)]
        pools = [s for s in segments if s.kind == "pool" and s.state == "open"]
        record = Record(
            vm=self.vm,
            cluster=self.cluster,
            state="plugging",
            identity=self.machine.identity,
            generation=generation,
            lane=lane,
            pool=mode,
            uuid=self.name.uuid,
            uri=self.name.uri,
            via=self.machine.via,
        )
        records.write(record)
        undo.callback(records.remove, record)
        neighbours = self.machine.neighbours()
        if neighbours:
            result.warnings.append(f"{self.vm} has {', '.join(neighbours)}: the pool is mapped for these too")
        writable = {own} if own is not None else {s.id for s in pools if not s.vm} if mode == "rw" else set()
        refusal = bells.why_not(self.machine, self.interrupts)
        placed = self.machine.plug(
            self.cluster, lanes, pools, writable, self.use_last_slot, self.boots_until, self.progress
        )
        undo.callback(self._unplug, record)
        record.bell = refusal.why if refusal is not None else self._bell(handle, record)
        result.warnings += placed.notes
        record.plugged = placed.saved
        record.where = placed.where
        record.state = "plugged"
        records.write(record)
        return record

    def _bell(self, handle: native.Handle, record: Record) -> str:
        """Give the lane a doorbell. One that was not asked for need not be.

        :return: for the record: that there is one, or why not.
        """
        try:
            record.doorbell = bells.give(
                self.machine, handle, record.lane, self.use_last_slot, self.deadline, self.progress
            )
        except Error as e:
            if self.interrupts or e.code == "vm-died":
                raise
            return e.message
        return bells.ON

    def _new_direct(self, handle: native.Handle, record: Record) -> bool:
        """Is a direct queue asked for that the VM does not have? Its lane has to be plugged in too."""
        have = {b.queue for b in handle.lane_bindings(record.lane)}
        return any(handle.queue(q).direct and f"{self.cluster}@{q}" not in have for q, _ in self.ends)

    def _direct(self, handle: native.Handle) -> set[str]:
        """Names of the lanes of direct queues among the ends: each has one of its own, which both its VMs map."""
        return {f"direct:{queue}" for queue, _ in self.ends if handle.queue(queue).direct}

    def _unplug(self, record: Record) -> None:
        with contextlib.suppress(Error):
            self.machine.unplug(record.cluster, time.monotonic() + 10.0, self.progress)


def _unbind(cluster: int, lane: int, queue: int, direction: int) -> None:
    """Undo a binding; the handle that made it may be closed by now."""
    with contextlib.suppress(Error), native.Handle.attach(cluster) as handle:
        handle.lane_unbind(lane, queue, direction)


def _remove_lane(cluster: int, lane: int) -> None:
    with contextlib.suppress(Error), native.Handle.attach(cluster) as handle:
        handle.lane_remove(lane)


class Detach:
    """One VM and one cluster: unbind some ends, or unplug everything. The VM's lock is held.

    :param queues: numbers; None: all.
    :param timeout: what the deadline was made of, for messages.
    """

    def __init__(
        self,
        record: Record,
        queues: set[int] | None,
        deadline: float,
        timeout: float,
        force: bool,
        progress: Progress,
    ) -> None:
        self.record = record
        self.queues = queues
        self.deadline = deadline
        self.timeout = timeout
        self.force = force
        self.progress = progress

    def run(self, result: model.DetachedFrom) -> None:
        """Do it; ``result`` says what was taken away."""
        from ringbar.host import vms

        record = self.record
        with lane_of(record) as handle:
            bindings = handle.lane_bindings(record.lane) if handle is not None else []
            if handle is not None and self.queues is not None:
                mine = [b for b in bindings if int(b.queue.split("@")[1]) in self.queues]
                if not mine:
                    return
                if len(mine) < len(bindings):
                    for binding in mine:
                        queue = int(binding.queue.split("@")[1])
                        handle.lane_unbind(record.lane, queue, _end(binding.direction))
                        result.queues.append(binding.queue)
                    result.changed = True
                    return
        try:
            machine = vms.connect(vms.Name(record.vm, record.uuid, record.uri), self.deadline, self.progress)
        except Error as unreachable:
            if not records.alive(record.identity):
                self._home(result, still_mapped=False)  # it ended while we looked
            elif self.force:
                self._quarantine(result, unreachable.message)
            else:
                raise
            return
        with machine:
            self.unplug(result, machine)

    def unplug(self, result: model.DetachedFrom, machine: Machine) -> None:
        """Announce, unplug, take home.

        :raises Error: code ``not-finished`` when the guest does not let go, and not by force.
        """
        from ringbar.host import vms

        record = self.record
        record.state = "closing"
        records.write(record)
        with lane_of(record) as handle:
            if handle is not None:
                self.progress(f"telling the programs in {record.vm} to let go")
                left = max(0.0, min(ANNOUNCE_TIMEOUT, self.deadline - time.monotonic()))
                if not handle.lane_announce(record.lane, left):
                    result.notes.append(f"a program in {record.vm} did not let go in time: it gets an error")
        self.progress(f"waiting for the guest of {record.vm} to let go of the device")
        if machine.unplug(record.cluster, self.deadline, self.progress):
            self._home(result, still_mapped=False)
        elif not records.alive(record.identity):
            self._home(result, still_mapped=False)
        elif self.force:
            self._quarantine(result, f"the guest did not let go within {self.timeout:g} s")
        else:
            raise Error(
                f"the guest of {record.vm} did not let go of the device within {self.timeout:g} s; "
                "it stays attached, state closing",
                code="not-finished",
                cure=f"once the guest runs again, ringbar detach {vms.typed(record.vm, record.uri)} {record.cluster}; "
                "with --force what it holds stays quarantined until the VM ends",
            )

    def _quarantine(self, result: model.DetachedFrom, why: str) -> None:
        self._home(result, still_mapped=True)
        result.warnings.append(
            f"{why}: taken away by force; the guest can still write to the buffers it held, "
            "so they stay quarantined until the VM ends"
        )

    def _home(self, result: model.DetachedFrom, still_mapped: bool) -> None:
        record = self.record
        with lane_of(record) as handle:
            if handle is not None:
                result.queues += [b.queue for b in handle.lane_bindings(record.lane)]
                handle.lane_remove(record.lane, still_mapped)
        bells.release(record)
        if still_mapped:
            record.state = "quarantined"
            records.write(record)
        else:
            records.remove(record)
        result.changed = True
