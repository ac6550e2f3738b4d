# SPDX-License-Identifier: Apache-2.0
"""The kinds of workers: bridge, balancer, fan-out, replicate, merge, delay.

All of a worker's ends come from one Cluster object. An input is an Rx or a Queue, an output a Tx or a Queue; queues are
opened while the worker runs. Beside one of these, others can be given by address: ``"99@3"``, ``"zc:eth1"``.
What an output does not take is dropped and counted there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, Callable, Union

from . import _c
from ._c import NULL, ffi, lib
from .choose import Chooser, idle_function
from .cluster import Cluster, Queue
from .end import End
from .ends import Rx, Tx
from .errors import Error
from .workers import Input, Output, Worker, ports

Inputs = Union[Input, Iterable[Input]]
#: One output, several, or groups of them: ``[[a, b], [c]]`` are two applications that each get all traffic.
Outputs = Union[Output, Iterable[Union[Output, Iterable[Output]]]]
Weights = Sequence[Union[int, Sequence[int]]]
#: A name, ``"LIBRARY.so:FUNCTION"``, a C function (cffi, ctypes, numba's cfunc, an address), or a Python function.
Policy = Union[str, Callable[..., Any], int, Any]

_KEEP: Any = object()


def _one(item: Any) -> bool:
    return isinstance(item, (End, Queue, str))


class Planned(Worker):
    """A worker with a plan: between which ends packets move, and how. It can be changed while it runs: :meth:`set`."""

    #: As many outputs as inputs?
    _paired = False

    def __init__(
        self,
        inputs: Inputs,
        groups: list[list[Output]],
        *,
        policy: Policy | None = None,
        weights: Weights | None = None,
        wait: float = 0.0,
        filter: str | None = None,  # noqa: A002
        on_idle: Callable[[], Any] | Any = None,
        user: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._inputs: list[Input] = _list(inputs)
        self._groups = groups
        self._weights = weights
        self._wait = wait
        self._filter = filter
        self._user = user
        self._policy = policy
        self._chooser = None if policy is None else Chooser(policy, self)
        self._idle = idle_function(on_idle, self)
        #: What a function of the user raised; the worker has ended with it.
        self.failure: BaseException | None = None
        self._by_item: dict[tuple[str, str], End] = {}  # what each input and output was opened as
        self._check()

    # ---- plans ----

    def _check(self) -> None:
        """The shape of the plan, as far as it can be told without opening anything."""
        outputs = self._outputs
        if not self._inputs or not outputs:
            raise Error(f"a {self.kind} needs an input and an output", code="bad-value")
        for item in self._inputs:
            if not isinstance(item, (Rx, Queue, str)):
                raise Error(f"a worker wants Rx or Queue here, not {item!r}", code="bad-value")
        for output in outputs:
            if not isinstance(output, (Tx, Queue, str)):
                raise Error(f"a worker wants Tx or Queue here, not {output!r}", code="bad-value")
        if self._paired and len(self._inputs) != len(outputs):
            raise Error(
                f"{len(self._inputs)} inputs, {len(outputs)} outputs: a {self.kind} has one for each", code="bad-value"
            )
        self._flat_weights()

    @property
    def _outputs(self) -> list[Output]:
        return [output for group in self._groups for output in group]

    def _flat_weights(self) -> list[int]:
        outputs = self._outputs
        if self._weights is None:
            return [1] * len(outputs)
        flat: list[Any] = []
        for weight in self._weights:
            flat += [weight] if isinstance(weight, int) else list(weight)
        if len(flat) != len(outputs):
            raise Error(f"{len(flat)} weights for {len(outputs)} outputs", code="bad-value")
        return [_c.number(weight, 1, 1024, "a weight") for weight in flat]

    def _end(self, item: Any, kind: type[End]) -> End:
        """The end itself; of a queue, its end opened for this worker."""
        if isinstance(item, End):
            return item
        key = (kind.__name__, str(item))
        if key not in self._by_item:
            running = self._ptr != NULL  # then it is opened with what the worker has
            own = self._planned[0][0].cluster if running else self._first_cluster() if isinstance(item, str) else None
            self._by_item[key] = self._open(item, kind, own)
        return self._by_item[key]

    def _first_cluster(self) -> Cluster | None:
        return next((item.cluster for item in [*self._inputs, *self._outputs] if not isinstance(item, str)), None)

    def _opened_for_plan(self) -> tuple[list[End], list[End]]:
        ins = [self._end(item, Rx) for item in self._inputs]
        outs = [self._end(item, Tx) for item in self._outputs]
        if len({id(end.handle) for end in ins + outs}) != 1:
            raise Error(
                f"a {self.kind}'s ends come from one Cluster object",
                code="other-attachment",
                cure="open them all from one",
            )
        return ins, outs

    def _ends(self) -> list[End]:
        self.failure = None
        self._by_item.clear()
        try:
            ins, outs = self._opened_for_plan()
            if self._filter is not None:
                for end in ins:
                    end.filter = self._filter
        except BaseException:
            self._close_opened()
            raise
        self._planned = (ins, outs)
        return ins + outs

    def _plan(self) -> tuple[Any, Any]:
        """For C; and what must live while C looks at it."""
        ins, outs = self._planned
        groups = [number for number, group in enumerate(self._groups) for _ in group]
        plan = _c.options("rb_plan")
        inputs = ffi.new("rb_end *[]", [end.ptr for end in ins])
        outputs = ffi.new(
            "rb_output[]",
            [[end.ptr, group, weight] for end, group, weight in zip(outs, groups, self._flat_weights())],
        )
        setattr(plan, "in", inputs)
        plan.out, plan.ins, plan.outs = outputs, len(ins), len(outs)
        plan.wait_ns = round(self._wait * 1e9)
        keep: list[Any] = [inputs, outputs]
        if self._chooser is not None:
            keep.append(self._chooser.into(plan))
        if self._user is not None:
            plan.user = ffi.cast("void *", self._user)
        if self._idle is not None:
            plan.idle = self._idle
        return plan, keep

    def _launch(self, out: Any) -> int:
        plan, keep = self._plan()
        handle = self._planned[0][0].handle
        status = int(lib.rb_worker_start(out, handle.ptr, self.kind.encode(), plan, self._options))
        del keep
        return status

    def _change(self, **changes: Any) -> None:
        """Take up new values of attributes, at once when it runs; as before when that fails."""
        with self._lock:
            before = {name: getattr(self, name) for name in changes}
            known, opened = dict(self._by_item), list(self._opened)
            planned = getattr(self, "_planned", None)
            try:
                for name, value in changes.items():
                    setattr(self, name, value)
                self._check()
                if self._ptr != NULL:
                    with self.held():
                        self._take_up("_filter" in changes or "_inputs" in changes)
            except BaseException:
                for name, value in before.items():
                    setattr(self, name, value)
                if self._ptr != NULL:
                    self._planned = planned  # type: ignore[assignment]
                    with self.held():
                        for end in self._opened:
                            if end not in opened:
                                end.close()
                self._by_item, self._opened = known, opened
                raise

    def _take_up(self, filters: bool) -> None:
        """The thread stands still."""
        ins, outs = self._opened_for_plan()
        earlier = [(end, end.filter) for end in ins]
        try:
            if filters:
                for end in ins:
                    end.filter = self._filter
            self._planned = (ins, outs)
            plan, keep = self._plan()
            _c.check(lib.rb_worker_change(self._ptr, plan))
            del keep
        except BaseException:
            for end, expression in earlier:
                with contextlib.suppress(Error):
                    end.filter = expression
            raise
        used = ins + outs
        for key, end in list(self._by_item.items()):
            if end not in used:
                del self._by_item[key]
                self._opened.remove(end)
                end.close()

    # ---- reading ----

    def _read(self, ptr: Any) -> dict[str, Any]:
        return {**super()._read(ptr), **ports(lambda out, n: lib.rb_worker_ports(ptr, out, n))}

    def stats(self) -> dict[str, Any]:
        """As :meth:`Worker.stats`, and ``inputs`` and ``outputs``: of each ``address``, ``state`` (``"open"``,
        ``"ended"``, ``"failed"``), ``packets``, ``bytes``, ``drops`` by reason; of an output also ``group`` and
        ``weight``."""
        return super().stats()

    def _raise(self, stats: dict[str, Any]) -> None:
        if self.failure is not None:
            raise Error(
                f"the worker ended: {type(self.failure).__name__}: {self.failure}", code="worker-failed"
            ) from self.failure
        super()._raise(stats)

    def set(self, *, filter: str | None = _KEEP) -> None:  # noqa: A002
        """Change it, running or not; nothing is lost. An error leaves it as it was.

        :param filter: what it takes from its inputs (:attr:`End.filter`); the rest is dropped and counted. None = all.
        """
        self._change(**_changed(filter=filter))


def _changed(**values: Any) -> dict[str, Any]:
    return {f"_{name}": value for name, value in values.items() if value is not _KEEP}


def _list(items: Any) -> list[Any]:
    """One input or output, or several."""
    if _one(items):
        return [items]
    if not isinstance(items, Iterable):
        raise Error(f"a worker wants Rx, Tx or Queue here, not {items!r}", code="bad-value")
    return list(items)


def _groups(outputs: Outputs) -> list[list[Output]]:
    """``[[a, b], [c]]``. Outputs side by side are a group."""
    items = _list(outputs)
    return [items] if all(_one(item) for item in items) else [_list(item) for item in items]


def _each(outputs: Outputs) -> list[list[Output]]:
    """Every output a group of its own, unless grouped."""
    return [_list(item) for item in _list(outputs)]


class Bridge(Planned):
    """Moves packets from each input to its output.

    ``Bridge(rx, tx)``; several pairs: ``Bridge([rx1, rx2], [tx2, tx1])`` or ``Bridge([(rx1, tx2), (rx2, tx1)])``.
    """

    kind = "bridge"
    _paired = True

    def __init__(
        self,
        inputs: Inputs | Iterable[tuple[Input, Output]],
        outputs: Output | Iterable[Output] | None = None,
        *,
        filter: str | None = None,  # noqa: A002
        core: int | None = None,
        idle: str = "adaptive",
        burst: int = 64,
        packets: int | None = None,
        name: str | None = None,
        pulse: bool = False,
        on_idle: Any = None,
    ) -> None:
        """The other settings: see :class:`Worker`.

        :param inputs: where packets come from: Rx, or a Queue, which is then opened while the bridge runs. Without
            outputs: pairs of input and output.
        :param outputs: as many Tx or Queues.
        :param filter: only packets that match pass; the rest is dropped and counted.
        :param on_idle: called whenever nothing came: a function of Python, or of C (``rb_idle``).
        """
        if outputs is None:
            pairs = _list(inputs)
            if not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
                raise Error("a bridge wants inputs and outputs, or pairs of them", code="bad-value")
            inputs, outputs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        super().__init__(
            inputs,  # type: ignore[arg-type]
            [_list(outputs)],
            filter=filter, core=core, idle=idle, burst=burst, packets=packets, name=name, pulse=pulse, on_idle=on_idle,
        )  # fmt: skip

    def set(
        self,
        *,
        outputs: Output | Iterable[Output] = _KEEP,
        filter: str | None = _KEEP,  # noqa: A002
    ) -> None:
        """Change it, running or not; nothing is lost. An error leaves it as it was.

        :param outputs: other outputs.
        :param filter: see :class:`Bridge`.
        """
        groups = _KEEP if outputs is _KEEP else [_list(outputs)]
        self._change(**_changed(filter=filter, groups=groups))


class Balancer(Planned):
    """Each packet to one output, which the policy chooses.

    ``Balancer(rx, [a, b, c])``. With groups, ``Balancer(rx, [[a, b], [c]])``, to one of each group: two applications
    that each get all traffic, the first balanced inside. What an output does not take is dropped and counted there; it
    never holds up the others.
    """

    kind = "balancer"

    def __init__(
        self,
        inputs: Inputs,
        outputs: Outputs,
        policy: Policy = "5tuple",
        *,
        weights: Weights | None = None,
        filter: str | None = None,  # noqa: A002
        core: int | None = None,
        idle: str = "adaptive",
        burst: int = 64,
        packets: int | None = None,
        name: str | None = None,
        pulse: bool = False,
        on_idle: Any = None,
        user: Any = None,
    ) -> None:
        """The other settings: see :class:`Worker`.

        :param inputs: one Rx or Queue, or several.
        :param outputs: Tx or Queues; lists among them are groups.
        :param policy: ``"rr"``, ``"rr-burst"``, ``"ip"``, ``"5tuple"``, ``"gtp"``, ``"gre"``, ``"vxlan"`` (these
            three also with ``-ip``), ``"gtp-session"``, ``"vlan"``, ``"input"``; a function of C:
            ``"LIBRARY.so:FUNCTION"``, cffi's or ctypes' pointer, numba's ``cfunc``, an address (its signature is
            ``rb_choose`` in ringbar.h); or a function of Python, called as ``policy(packets)`` for every burst
            (:class:`Packets`), which returns the number of an output for each, or -1 to drop it; with groups, a mask
            of outputs.
        :param weights: how much of its group's traffic each output gets, in the shape of ``outputs``: ``[3, 1]``.
        :param filter: only packets that match are taken; the rest is dropped and counted.
        :param on_idle: called whenever nothing came: a function of Python, or of C (``rb_idle``).
        :param user: the first argument of a C function.
        """
        super().__init__(
            inputs, _groups(outputs), policy=policy, weights=weights, filter=filter, core=core, idle=idle, burst=burst,
            packets=packets, name=name, pulse=pulse, on_idle=on_idle, user=user,
        )  # fmt: skip

    _grouping = staticmethod(_groups)

    def _launch(self, out: Any) -> int:
        if len(self._groups) > 1:
            self.kind = "fanout"
        return super()._launch(out)

    def set(
        self,
        *,
        policy: Policy = _KEEP,
        outputs: Outputs = _KEEP,
        weights: Weights | None = _KEEP,
        filter: str | None = _KEEP,  # noqa: A002
        inputs: Inputs = _KEEP,
    ) -> None:
        """Change it, running or not; nothing is lost. An error leaves it as it was.

        :param outputs: all there shall be; the weights are then equal, unless given too. A balancer that was started
            with one group keeps one; with several, several.
        :param policy: see :class:`Balancer`; the others too.
        """
        changes = _changed(policy=policy, weights=weights, filter=filter)
        if outputs is not _KEEP:
            changes["_groups"] = self._grouping(outputs)
            changes.setdefault("_weights", None)
        if inputs is not _KEEP:
            changes["_inputs"] = _list(inputs)
        if policy is not _KEEP:
            changes["_chooser"] = Chooser(policy, self)
        self._change(**changes)


class Fanout(Balancer):
    """Every packet to every output, with no copy: they share the buffer; it comes home when the last has returned it.

    ``Fanout(rx, [a, b, c])``. A list among the outputs is a group that shares: ``Fanout(rx, [a, [b, c]])`` gives a
    everything, and balances it over b and c. With a function as policy, it returns a mask for each packet: bit k for
    output k. At most 64 outputs.
    """

    kind = "fanout"
    _grouping = staticmethod(_each)

    def __init__(self, inputs: Inputs, outputs: Outputs, policy: Policy = "5tuple", **options: Any) -> None:
        """As :class:`Balancer`.

        :param outputs: Tx or Queues; each gets everything, and so does each group.
        :param policy: how groups share; or a function that returns masks.
        """
        super().__init__(inputs, outputs, policy, **options)
        self._groups = _each(outputs)
        self._check()


class Replicate(Fanout):
    """What comes from one input goes out of several, NICs for example, with no copy where they allow it."""

    def __init__(self, input: Inputs, outputs: Outputs, **options: Any) -> None:  # noqa: A002
        """As :class:`Fanout`."""
        super().__init__(input, outputs, **options)


class Merge(Planned):
    """All inputs to one output, in order of their timestamps.

    Each input is in order by itself. The oldest packet goes on when every input has one to compare with, or when it has
    waited ``wait`` seconds here. Packets without a timestamp count as of their arrival.
    """

    kind = "merge"

    def __init__(
        self,
        inputs: Inputs,
        output: Output,
        *,
        wait: float = 0.001,
        filter: str | None = None,  # noqa: A002
        core: int | None = None,
        idle: str = "adaptive",
        burst: int = 64,
        packets: int | None = None,
        name: str | None = None,
        pulse: bool = False,
        on_idle: Any = None,
    ) -> None:
        """The other settings: see :class:`Worker`.

        :param wait: seconds, from 1e-9, that a packet waits at most for older ones of other inputs.
        """
        super().__init__(
            inputs, [[output]], wait=_time(wait, "wait"), filter=filter, core=core, idle=idle, burst=burst,
            packets=packets, name=name, pulse=pulse, on_idle=on_idle,
        )  # fmt: skip

    def set(
        self,
        *,
        inputs: Inputs = _KEEP,
        outputs: Output = _KEEP,
        wait: float = _KEEP,
        filter: str | None = _KEEP,  # noqa: A002
    ) -> None:
        """Change it, running or not; nothing is lost: what waits goes on first. An error leaves it as it was."""
        changes = _changed(filter=filter)
        if wait is not _KEEP:
            changes["_wait"] = _time(wait, "wait")
        if outputs is not _KEEP:
            changes["_groups"] = [_list(outputs)]
        if inputs is not _KEEP:
            changes["_inputs"] = _list(inputs)
        self._change(**changes)


class Delay(Planned):
    """Each input to its output, a time later.

    Only descriptors wait, so the packets stay in their buffers: with ``rate`` packets a second, ``rate * by`` buffers
    are held, which the credit of the input's queue and the pool must have. What they do not have is dropped where the
    packets come from (queue full, no buffer).
    """

    kind = "delay"
    _paired = True

    def __init__(
        self,
        inputs: Inputs,
        outputs: Output | Iterable[Output],
        by: float,
        *,
        filter: str | None = None,  # noqa: A002
        core: int | None = None,
        idle: str = "adaptive",
        burst: int = 64,
        packets: int | None = None,
        name: str | None = None,
        pulse: bool = False,
        on_idle: Any = None,
    ) -> None:
        """The other settings: see :class:`Worker`.

        :param by: seconds.
        """
        super().__init__(
            inputs, [_list(outputs)], wait=_time(by, "by"),
            filter=filter, core=core, idle=idle, burst=burst, packets=packets, name=name, pulse=pulse, on_idle=on_idle,
        )  # fmt: skip

    def set(
        self,
        *,
        by: float = _KEEP,
        outputs: Output | Iterable[Output] = _KEEP,
        filter: str | None = _KEEP,  # noqa: A002
    ) -> None:
        """Change it, running or not; nothing is lost. What waits already goes when it was due. An error leaves it as it
        was."""
        changes = _changed(filter=filter)
        if by is not _KEEP:
            changes["_wait"] = _time(by, "by")
        if outputs is not _KEEP:
            changes["_groups"] = [_list(outputs)]
        self._change(**changes)


def _time(seconds: float, what: str) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= 3600:
        raise Error(f"{what} goes from 0 to 3600 seconds, not {seconds!r}", code="bad-value")
    return float(seconds)
