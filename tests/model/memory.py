# SPDX-License-Identifier: Apache-2.0
"""What is shared: rings, queues, ledgers, intents; and what it means.

ring    (slots, P, C, X): the producer's and the consumer's index, both in the lane, and X, the server's
        committed copy of the one that it owns, in `state`
queue   (forward, return, session, echo, dirty); `dirty` is a ghost: the peer was reset, its indices may be
        anything until this session is echoed
word    (level 0, level 1): level 0 is NONE (not at home in this book), HOME, LENT + q, or SHARED; level 1 is None,
        (q, origin), or (SHARED, origin). The mask of outputs is kept beside; it counts only where a level says SHARED
intent  (operation or "", q, ring, base, end, handles); of a fan-out, instead of q, (q, base, end) for each output
party   (status, program, hand); a hand holds (buffer, queue it came by), OWN for a buffer of the book's own
state   (ledgers, masks, intents, queues, parties, crashes left)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from explore import State

NONE, HOME, LENT, SHARED = -9, 0, 1, 100
OWN = -7
FORWARD, RETURN = 0, 1
Ops = tuple[tuple[Any, ...], ...]
Ring = tuple[Any, ...]
RING_NAME = ("forward", "return")


def put(items: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    """A copy of a tuple with one item replaced."""
    return (*items[:at], value, *items[at + 1 :])


@dataclass(frozen=True)
class Queue:
    """A queue's two ends. `grant`: the client produces and the server grants it empties."""

    server: int
    client: int
    grant: bool = False

    @property
    def lends(self) -> int:
        """The ring on which the server lends: forward, or return on a grant queue."""
        return RETURN if self.grant else FORWARD


@dataclass
class Memory:
    """A topology. Party p with a book uses book p; a party without one is a plain client or a guest."""

    buffers: int
    slots: int
    crashes: int
    names: tuple[str, ...]
    books: int  # parties 0 .. books-1 have a book
    queues: tuple[Queue, ...]
    home: tuple[int, ...]  # party at whose home each buffer is
    variant: str = "ok"
    credit: int = 0  # 0: as many as there are buffers
    burst: int = 1
    hand: int = 2  # most buffers in a client's hand
    guests: tuple[int, ...] = ()  # the programs of the guest: one domain, reset together
    garbage: bool = False  # a reset leaves any index in the lane
    fanout: tuple[int, ...] | None = None  # outputs of the fan-out worker
    fans: int = 0  # the party that fans out
    crashing: tuple[int, ...] | None = None  # who may crash; everybody by default
    reaper: bool = False  # somebody may recover a dead book without adopting it
    size: list[int] = field(default_factory=list)  # entries of the forward and of the return ring
    turn: list[int] = field(default_factory=list)  # their indices count modulo this

    def __post_init__(self) -> None:
        self.credit = self.credit or self.buffers
        self.size = [self.slots, self.credit]
        self.turn = [(4 if self.garbage else 2) * n for n in self.size]
        if self.crashing is None:
            self.crashing = tuple(range(len(self.names)))

    # ---- small helpers

    def initial(self) -> State:
        """Everything home, everybody alive."""
        ledgers = tuple(
            tuple((HOME if self.home[b] == p else NONE, None) for b in range(self.buffers))
            for p in range(self.books)
        )
        rings = (((0,) * self.slots, 0, 0, 0), ((0,) * self.credit, 0, 0, 0))
        queues = tuple((*rings, 0, 0, 0) for _ in self.queues)
        parties = tuple((("live", 0), (), ()) for _ in self.names)
        return (
            ledgers,
            ((0,) * self.buffers,) * self.books,
            (("", 0, 0, 0, 0, ()),) * self.books,
            queues,
            parties,
            self.crashes,
        )

    def ahead(self, ring: int, head: int, tail: int) -> int:
        """How far `head` is before `tail`; more than the ring's size means that one of them is garbage."""
        return int((head - tail) % self.turn[ring])

    def span(self, ring: int, head: int, tail: int) -> int:
        """The number of entries between two indices; none when one of them is garbage."""
        n = self.ahead(ring, head, tail)
        return n if n <= self.size[ring] else 0

    def entries(self, which: int, ring: Ring, head: int, tail: int) -> list[int]:
        """The handles between two indices, oldest first."""
        return [ring[0][(tail + i) % self.size[which]] for i in range(self.span(which, head, tail))]

    def lent(self, s: State, book: int, b: int, q: int) -> bool:
        """True if the word of handle b in this book says lent on queue q, at either level."""
        level0, level1 = s[0][book][b - 1]
        if level1 is not None and level1[0] == q:
            return True
        return bool(level0 == LENT + q or (self.shared(s, book, b) and s[1][book][b - 1] >> q & 1))

    def shared(self, s: State, book: int, b: int) -> bool:
        """True if the word of handle b in this book says SHARED, at either level."""
        level0, level1 = s[0][book][b - 1]
        return bool(level0 == SHARED or (level1 is not None and level1[0] == SHARED))

    def free(self, s: State, book: int, b: int) -> bool:
        """True if the word says home."""
        level0, level1 = s[0][book][b - 1]
        return level1 is None and bool(level0 == HOME)

    def domain(self, q: int) -> list[int]:
        """All queues of the same server and client: a descriptor sent on one may name a buffer of another."""
        return [
            i
            for i, other in enumerate(self.queues)
            if other.server == self.queues[q].server and self.together(other.client, self.queues[q].client)
        ]

    def together(self, p: int, other: int) -> bool:
        """True for the same party, or two programs of the one guest."""
        return p == other or (p in self.guests and other in self.guests)

    def party(
        self,
        s: State,
        p: int,
        ops: Ops = (),
        hand: tuple[Any, ...] | None = None,
        status: tuple[str, int] | None = None,
    ) -> State:
        """The state with a party's program, hand and status replaced."""
        old = s[4][p]
        new = (old[0] if status is None else status, ops, old[2] if hand is None else hand)
        return put(s, 4, put(s[4], p, new))

    def ring(self, s: State, q: int, which: int, **fields: Any) -> State:
        """The state with fields (slots, P, C, X) of one ring replaced."""
        new = list(s[3][q][which])
        for name, value in fields.items():
            new[("slots", "P", "C", "X").index(name)] = value
        return put(s, 3, put(s[3], q, put(s[3][q], which, tuple(new))))

    def word(self, s: State, book: int, b: int, value: Any) -> State:
        """The state with one ledger word replaced."""
        return put(s, 0, put(s[0], book, put(s[0][book], b - 1, value)))

    def mask(self, s: State, book: int, b: int, value: int) -> State:
        """The state with one mask of a shared buffer replaced."""
        return put(s, 1, put(s[1], book, put(s[1][book], b - 1, value)))

    def clear(self, s: State, book: int, b: int, q: int) -> State:
        """Take handle b back from queue q: the inner level first; one store."""
        level0, level1 = s[0][book][b - 1]
        if level1 is not None and level1[0] == q:
            return self.word(s, book, b, (level0, None))
        if level0 == LENT + q:
            return self.word(s, book, b, (HOME, level1))
        rest = s[1][book][b - 1] & ~(1 << q)
        if rest:
            return self.mask(s, book, b, rest)
        return self.word(s, book, b, (level0, None) if level1 is not None else (HOME, None))

    def origin(self, s: State, book: int, b: int, q: int) -> int | None:
        """Where a buffer lent on q was borrowed, or None when it is the book's own."""
        level1 = s[0][book][b - 1][1]
        if level1 is None or (level1[0] == SHARED and s[1][book][b - 1] != 1 << q):
            return None
        return level1[1] if level1[0] in (q, SHARED) else None

    def places(self, s: State, b: int) -> list[str]:
        """Where a handle can still be read or will come back from: rings and hands."""
        found = []
        for q, (fwd, ret, _, _, dirty) in enumerate(s[3]):
            if dirty:
                continue
            grant = self.queues[q].grant
            ends = ((fwd[1], fwd[3]), (ret[3], ret[2])) if grant else ((fwd[3], fwd[2]), (ret[1], ret[3]))
            op, at, ring_of, base, _, taken = s[2][self.queues[q].server]
            for which, ring in ((FORWARD, fwd), (RETURN, ret)):
                if (
                    op == "take"
                    and (at, ring_of, base) == (q, which, ring[3])
                    and b in taken
                    and not any(self.lent(s, self.queues[q].server, b, i) for i in self.domain(q))
                ):
                    continue  # applied by the armed intent: only the commit is to come
                found += [f"{RING_NAME[which]} ring of q{q}"] * self.entries(which, ring, *ends[which]).count(
                    b
                )
        for p, (_, _, hand) in enumerate(s[4]):
            found += [f"hand of {self.names[p]}" for held, _ in hand if held == b]
        return found
