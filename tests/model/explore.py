# SPDX-License-Identifier: Apache-2.0
"""A small explicit-state explorer: breadth first, hash-compacted states, counterexamples as numbered steps.

A model is a module of this directory with `build(buffers, slots, crashes, variant) -> Model`,
`VARIANTS` (name to the rule it leaves out) and `SIZES` (default buffers, slots, crashes).

    python3 tests/model/explore.py chain --buffers 1 --slots 1 --crashes 2 --variant ok

Exit status: 0 no counterexample, 1 a counterexample, 2 usage.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

State = tuple[Any, ...]
Step = tuple[str, State]


class Violation(Exception):
    """A step that breaks a property; the text says which."""


class Model(Protocol):
    """What the explorer needs to know of a model."""

    def initial(self) -> State:
        """The state to start from."""

    def steps(self, state: State) -> Iterator[Step]:
        """All (label, next state); labels of faults begin with CRASH or RESET. Raises Violation."""

    def check(self, state: State) -> str | None:
        """The property that this state breaks, or None."""

    def goal(self, state: State) -> bool:
        """True where everything is home and everybody alive; must stay reachable without further faults."""


@dataclass
class Result:
    """What an exploration found."""

    states: int
    exhaustive: bool
    seconds: float
    problem: str | None = None
    trace: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line, and the counterexample's numbered steps when there is one."""
        extent = "exhaustive" if self.exhaustive else "limit reached"
        head = f"{self.states} states in {self.seconds:.1f} s"
        if self.problem is None:
            return f"{head}, {extent}, no counterexample"
        lines = [f"{head}, COUNTEREXAMPLE: {self.problem}"]
        return "\n".join(lines + [f"  {n:2}. {label}" for n, label in enumerate(self.trace, 1)])


def _replay(model: Model, hashes: list[int]) -> tuple[list[str], State]:
    """The labels along a path of state hashes, by walking it again, and its last state."""
    state, labels = model.initial(), []
    for wanted in hashes[1:]:
        for label, following in model.steps(state):
            if hash(following) == wanted:
                labels.append(label)
                state = following
                break
    return labels, state


def explore(
    model: Model, max_states: int = 2_000_000, max_seconds: float = 600.0, progress: bool = True
) -> Result:
    """Visit every state breadth first, up to the limits.

    With `progress` and an exhaustive visit, every state must also be able to reach `goal` without another
    fault: this finds deadlocks, waits that never end and buffers that never come home.
    """
    start = time.monotonic()
    first = model.initial()
    number: dict[int, int] = {hash(first): 0}
    keys, parent = array("q", [hash(first)]), array("q", [-1])
    source, target, goals = array("i"), array("i"), []
    layer: list[tuple[int, State]] = [(0, first)]
    exhaustive = True

    def path(last: int) -> list[int]:
        found = []
        while last >= 0:
            found.append(keys[last])
            last = parent[last]
        return found[::-1]

    def failed(at: int, problem: str) -> Result:
        labels, _ = _replay(model, path(at))
        return Result(len(keys), exhaustive, time.monotonic() - start, problem, labels)

    while layer and exhaustive:
        following: list[tuple[int, State]] = []
        for at, state in layer:
            problem = model.check(state)
            if problem is not None:
                return failed(at, problem)
            if model.goal(state):
                goals.append(at)
            try:
                for label, nxt in model.steps(state):
                    key = hash(nxt)
                    to = number.get(key)
                    if to is None:
                        to = number[key] = len(keys)
                        keys.append(key)
                        parent.append(at)
                        following.append((to, nxt))
                    if progress and not label.startswith(("CRASH", "RESET")):
                        source.append(at)
                        target.append(to)
            except Violation as error:
                return failed(at, str(error))
            if len(keys) > max_states or time.monotonic() - start > max_seconds:
                exhaustive = False
                break
        layer = following
    if progress and exhaustive:
        stuck = _stuck(len(keys), source, target, goals)
        if stuck is not None:
            return failed(stuck, "stuck: from here no fault-free run brings every buffer home")
    return Result(len(keys), exhaustive, time.monotonic() - start)


def _stuck(count: int, source: array[int], target: array[int], goals: list[int]) -> int | None:
    """The first state in breadth-first order that cannot reach a goal, by a backward walk; None if none."""
    offset = array("i", bytes(4 * (count + 1)))
    for to in target:
        offset[to + 1] += 1
    for i in range(count):
        offset[i + 1] += offset[i]
    back, fill = array("i", bytes(4 * len(source))), array("i", offset)
    for at, to in zip(source, target):
        back[fill[to]] = at
        fill[to] += 1
    reached = bytearray(count)
    pending = list(goals)
    for at in goals:
        reached[at] = 1
    while pending:
        to = pending.pop()
        for i in range(offset[to], offset[to + 1]):
            if not reached[back[i]]:
                reached[back[i]] = 1
                pending.append(back[i])
    missing = reached.find(0)
    return None if missing < 0 else missing


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here))
    models = sorted(p.stem for p in here.glob("*.py") if "\nVARIANTS" in p.read_text())
    parser = argparse.ArgumentParser(description="explore one model of the ring protocol")
    parser.add_argument("model", choices=models)
    parser.add_argument("--buffers", type=int, help="buffers in all")
    parser.add_argument("--slots", type=int, help="slots of each forward ring")
    parser.add_argument("--crashes", type=int, help="crashes and resets in all")
    parser.add_argument("--variant", default="ok", help="ok, or a rule left out: see VARIANTS in the model")
    parser.add_argument("--states", type=int, default=5_000_000, help="stop after so many states")
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after so many seconds")
    parser.add_argument(
        "--safety-only",
        action="store_true",
        help="do not check that everything can still come home (saves 8 bytes an edge)",
    )
    args = parser.parse_args(argv)
    module = importlib.import_module(args.model)
    if args.variant not in module.VARIANTS:
        parser.error(f"variant of {args.model} is one of: {', '.join(module.VARIANTS)}")
    sizes = [
        given if given is not None else default
        for given, default in zip((args.buffers, args.slots, args.crashes), module.SIZES)
    ]
    if min(sizes[0], sizes[1]) < 1 or sizes[2] < 0:
        parser.error("at least 1 buffer, 1 slot and 0 crashes")
    result = explore(module.build(*sizes, args.variant), args.states, args.seconds, not args.safety_only)
    print(f"{args.model} {args.variant}: buffers {sizes[0]}, slots {sizes[1]}, crashes {sizes[2]}: {result}")
    return 0 if result.problem is None else 1


if __name__ == "__main__":
    # explore.Violation must be the class that the models raise, not a second copy in __main__
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.exit(importlib.import_module("explore").main())
