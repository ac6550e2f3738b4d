# SPDX-License-Identifier: Apache-2.0
"""A consumer that sleeps until its producer rings: no packet is left unread while it sleeps, whoever dies when.

Unlike the other models this one has processors that reorder: each side's stores wait in a buffer of its own and
reach memory later, in order, as on x86. `buffers` is how many packets are sent; `slots` means nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from explore import State, Step

SIZES = (3, 1, 2)
VARIANTS = {
    "ok": "the protocol",
    "producer_fence": "no fence between publishing and looking whether somebody sleeps",
    "consumer_fence": "no fence between arming and the last look",
    "nolook": "no last look between arming and sleeping",
    "drain_late": "what rang before is forgotten after the last look, not before arming",
    "same_number": "every arming has the same number",
    "number_anew": "a new consumer counts armings from 1 again",
    "noring": "a producer that takes over does not ring once",
}

# fields of a state; the two buffers hold pending stores: P of the producer, (number, index) of the consumer
P, WORD, BELL, P_AT, P_SENT, P_SEEN, P_RUNG, P_BUFFER, C_AT, C_READ, C_NUMBER, C_BUFFER, CRASHES = range(13)


def put(state: State, *changes: tuple[int, object]) -> State:
    """The state with some fields changed."""
    new = list(state)
    for field, value in changes:
        new[field] = value
    return tuple(new)


@dataclass(frozen=True)
class Bell:
    """One producer, one consumer, one ring."""

    packets: int
    crashes: int
    variant: str

    def initial(self) -> State:
        """Nothing sent, nobody asleep."""
        return (0, (0, 0), False, "publish", 0, (0, 0), 0, (), "look", 0, 0, (), self.crashes)

    def check(self, state: State) -> str | None:
        """All that matters is that the goal stays in reach."""
        return "the consumer has read what was never sent" if state[C_READ] > state[P_SENT] else None

    def goal(self, state: State) -> bool:
        """Everything was read."""
        return bool(state[C_READ] == self.packets)

    def steps(self, state: State) -> Iterator[Step]:
        """Single loads and stores; a store reaches memory in a step of its own."""
        if state[P_BUFFER]:
            yield "P reaches memory", put(state, (P, state[P_BUFFER][0]), (P_BUFFER, state[P_BUFFER][1:]))
        if state[C_BUFFER]:
            yield "the word reaches memory", put(state, (WORD, state[C_BUFFER][0]), (C_BUFFER, state[C_BUFFER][1:]))
        yield from self._producer(state)
        yield from self._consumer(state)
        if state[CRASHES]:
            yield from self._crashes(state)

    def _producer(self, s: State) -> Iterator[Step]:
        if s[P_AT] == "publish" and s[P_SENT] < self.packets:
            sent = s[P_SENT] + 1
            yield f"producer publishes {sent}", put(
                s, (P_SENT, sent), (P_BUFFER, (*s[P_BUFFER], sent)), (P_AT, "fence"))
        elif s[P_AT] == "fence" and (not s[P_BUFFER] or self.variant == "producer_fence"):
            yield "producer fences", put(s, (P_AT, "load"))
        elif s[P_AT] == "load":
            yield f"producer sees {s[WORD]}", put(s, (P_SEEN, s[WORD]), (P_AT, "ring"))
        elif s[P_AT] == "ring":
            number, index = s[P_SEEN]
            if number != s[P_RUNG] and index != s[P_SENT]:
                yield "producer rings", put(s, (P_RUNG, number), (BELL, True), (P_AT, "publish"))
            else:
                yield "producer need not ring", put(s, (P_AT, "publish"))

    def _consumer(self, s: State) -> Iterator[Step]:
        if s[C_AT] in ("look", "last look") and s[P] != s[C_READ]:
            yield f"consumer reads up to {s[P]}", put(s, (C_READ, s[P]), (C_AT, "look"))
        elif s[C_AT] == "look":
            bell = s[BELL] if self.variant == "drain_late" else False
            yield "consumer forgets what rang", put(s, (BELL, bell), (C_AT, "arm"))
        elif s[C_AT] == "arm":
            number = 1 if self.variant == "same_number" else s[C_NUMBER] + 1
            yield f"consumer arms {number} at {s[C_READ]}", put(
                s, (C_NUMBER, number), (C_BUFFER, (*s[C_BUFFER], (number, s[C_READ]))), (C_AT, "fence"))
        elif s[C_AT] == "fence" and (not s[C_BUFFER] or self.variant == "consumer_fence"):
            yield "consumer fences", put(s, (C_AT, "sleep" if self.variant == "nolook" else "last look"))
        elif s[C_AT] == "last look":
            yield "consumer finds nothing", put(s, (C_AT, "drain" if self.variant == "drain_late" else "sleep"))
        elif s[C_AT] == "drain":
            yield "consumer forgets what rang", put(s, (BELL, False), (C_AT, "sleep"))
        elif s[C_AT] == "sleep" and s[BELL]:
            yield "consumer wakes", put(s, (BELL, False), (C_AT, "look"))

    def _crashes(self, s: State) -> Iterator[Step]:
        """What was stored stays stored. A successor is there at once; its index is the lane's."""
        left = (CRASHES, s[CRASHES] - 1)
        sent = s[P_BUFFER][-1] if s[P_BUFFER] else s[P]
        yield "CRASH of the producer", put(
            s, left, (P, sent), (P_BUFFER, ()), (P_RUNG, 0), (P_AT, "publish"),
            (BELL, s[BELL] or self.variant != "noring"))
        word = s[C_BUFFER][-1] if s[C_BUFFER] else s[WORD]
        number = 0 if self.variant == "number_anew" else word[0]
        yield "CRASH of the consumer", put(
            s, left, (WORD, word), (C_BUFFER, ()), (C_NUMBER, number), (BELL, False), (C_AT, "look"))


def build(buffers: int, slots: int, crashes: int, variant: str) -> Bell:
    """The topology of this subject."""
    del slots
    return Bell(buffers, crashes, variant)
