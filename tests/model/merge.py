# SPDX-License-Identifier: Apache-2.0
"""A live handle with book L opens an end bound to the dead book M: M is merged into L under the lock.

One buffer is followed. Its chain of loans is chosen first, among all that the rules allow: home, hop, hop...;
the last party has it (in a ring of the last hop, or in a hand). Each hop has its own queue; a party with a word
has level 0 where the chain begins and level 1 (queue, origin) where it sub-lends. Other servers (D, E) may at
any time be in the middle of a session renewal: read the client end's book, then that book's word, then leave
the buffer or take it home. The merge: refuse where two words would not fit into one, record the new word, arm,
store it, bind the lanes, disarm; the old words stay. The merger may die at any step; the next one continues.

`buffers` is the longest chain in parties, `slots` is not used.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Optional

from explore import State, Step, Violation

SIZES = (6, 1, 2)
VARIANTS = {
    "ok": "the protocol",
    "norefuse": "the open is not refused where two level-1 words would have to become one",
    "norecord": "the new word is not recorded, but combined again after a crash",
    "clear_early": "the dead book's word is cleared before the lanes are bound to the live one",
    "clear": "the dead book's word is cleared once the lanes are bound to the live one",
    "lanes_first": "the lanes are bound to the live book before the words are merged",
}
Word = tuple[Optional[int], Optional[tuple[int, int]]]  # level 0: queue lent on; level 1: (queue, origin)
EMPTY: Word = (None, None)


def words(chain: tuple[str, ...], hops: tuple[int, ...], book: str) -> Word:
    """A book's word for the buffer: `hops[i]` is the queue from chain[i] to chain[i + 1]."""
    level0 = hops[0] if chain[0] == book and hops else None
    level1 = next(((hops[i], hops[i - 1]) for i in range(1, len(hops)) if chain[i] == book), None)
    return level0, level1


def legal(chain: tuple[str, ...]) -> bool:
    """Nobody lends to itself, and no book sub-lends a buffer twice (the rule `nest` of pingpong.py)."""
    inner = chain[1:-1]
    return all(a != b for a, b in zip(chain, chain[1:])) and len(set(inner)) == len(inner)


def combine(live: Word, dead: Word) -> Word | None:
    """The one word that says what two said, loans between the two collapsed; None where there is none."""
    loans: list[tuple[int | None, int]] = []
    for level0, level1 in (live, dead):
        loans += [] if level0 is None else [(None, level0)]
        loans += [] if level1 is None else [(level1[1], level1[0])]
    for _ in range(len(loans)):
        for first, second in product(loans, loans):
            if second[0] == first[1]:
                loans = [x for x in loans if x not in (first, second)] + [(first[0], second[1])]
                break
    homes = [q for origin, q in loans if origin is None]
    subs = [(q, origin) for origin, q in loans if origin is not None]
    if len(homes) > 1 or len(subs) > 1:
        return None
    return (homes[0] if homes else None), (subs[0] if subs else None)


def merged(chain: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The chain as it is with M called L, loans from L to itself that went on left out, and its queues."""
    names = ["L" if p == "M" else p for p in chain]
    parties, hops = [names[0]], list(range(len(chain) - 1))
    kept: list[int] = []
    for i in hops:
        if i + 2 < len(names) and names[i] == names[i + 1]:
            continue  # L to L, and on from there
        kept.append(i)
        parties.append(names[i + 1])
    return tuple(parties), tuple(kept)


@dataclass
class Merge:
    """State: (chain, pc, recorded word, armed, L's word, M's word, lanes bound, observer, crashes left)."""

    longest: int
    crashes: int
    variant: str

    def initial(self) -> State:
        """No chain chosen yet."""
        return ((), "choose", None, False, EMPTY, EMPTY, 0, None, self.crashes)

    def order(self) -> tuple[str, ...]:
        """The merger's program after arming."""
        return {
            "clear_early": ("store", "wipe", "bind", "disarm"),
            "clear": ("store", "bind", "wipe", "disarm"),
            "lanes_first": ("bind", "store", "disarm"),
        }.get(self.variant, ("store", "bind", "disarm"))

    def lanes(self, chain: tuple[str, ...]) -> list[int]:
        """The queues that have an end bound to M, in the order they are bound to L."""
        return [i for i in range(len(chain) - 1) if "M" in chain[i : i + 2]]

    def steps(self, state: State) -> Iterator[Step]:
        """All next states."""
        chain, pc, record, armed, live, dead, bound, observer, crashes = state
        if pc == "choose":
            for n in range(2, self.longest + 1):
                for names in product("LMDE", repeat=n):
                    if legal(names):
                        hops = tuple(range(n - 1))
                        yield (
                            f"loans {' -> '.join(names)}",
                            (
                                names,
                                "check",
                                None,
                                False,
                                words(names, hops, "L"),
                                words(names, hops, "M"),
                                0,
                                None,
                                crashes,
                            ),
                        )
            return
        yield from self.merger(state)
        # a third server renews the session of a client end bound to L or M, whose holder has sub-lent
        lanes = self.lanes(chain)
        for q in range(len(chain) - 2):
            if chain[q] in "DE" and chain[q + 1] in "LM" and observer is None:
                book = "L" if q in lanes[:bound] else chain[q + 1]
                yield (
                    f"{chain[q]}: renews q{q}, its client's book is {book}",
                    (*state[:7], (q, book), crashes),
                )
        if observer is not None:
            q, book = observer
            level1 = (live if book == "L" else dead)[1]
            if level1 is None or level1[1] != q:
                raise Violation(
                    f"{chain[q]} takes the buffer home: book {book} does not say sub-lent, but "
                    f"{chain[-1]} has it ({' -> '.join(chain)})"
                )
            yield f"{chain[q]}: leaves it, sub-lent", (*state[:7], None, crashes)
        if crashes and pc not in ("done", "refused", "check"):
            yield (
                "CRASH of the merger",
                (
                    chain,
                    "resume" if armed else "check",
                    None if not armed else record,
                    armed,
                    live,
                    dead,
                    bound,
                    observer,
                    crashes - 1,
                ),
            )

    def merger(self, state: State) -> Iterator[Step]:
        """The next store of whoever merges."""
        chain, pc, record, _armed, live, dead, bound, observer, crashes = state
        rest = (observer, crashes)
        if pc == "check":
            value = combine(live, dead)
            if value is None:
                if self.variant == "norefuse":
                    raise Violation(f"no word for {live} and {dead} ({' -> '.join(chain)})")
                yield "L: refuses the open", (chain, "refused", None, False, live, dead, bound, *rest)
                return
            yield f"L: records {value}", (chain, "arm", value, False, live, dead, bound, *rest)
        elif pc == "arm":
            yield "L: arms", (chain, self.order()[0], record, True, live, dead, bound, *rest)
        elif pc == "resume":
            value = combine(live, dead) if self.variant == "norecord" else record
            if value is None:
                raise Violation(f"combining again fails: {live} and {dead} ({' -> '.join(chain)})")
            yield (
                "next recoverer: starts over",
                (chain, self.order()[0], value, True, live, dead, bound, *rest),
            )
        elif pc in ("store", "wipe", "bind", "disarm"):
            order = (*self.order(), "done")
            after = order[order.index(pc) + 1]
            if pc == "store":
                yield f"L: word {record}", (chain, after, record, True, record, dead, bound, *rest)
            elif pc == "wipe":
                yield "L: clears M's word", (chain, after, record, True, live, EMPTY, bound, *rest)
            elif pc == "bind":
                lanes = self.lanes(chain)
                if bound < len(lanes):
                    yield f"L: binds q{lanes[bound]}", (chain, pc, record, True, live, dead, bound + 1, *rest)
                else:
                    yield "L: all bound", (chain, after, record, True, live, dead, bound, *rest)
            else:
                yield "L: disarms", (chain, after, None, False, live, dead, bound, *rest)

    def check(self, state: State) -> str | None:
        """When merged, L's word is the word of the collapsed chain."""
        chain, pc, live = state[0], state[1], state[4]
        if pc != "done":
            return None
        names, hops = merged(chain)
        expected = words(names, hops, "L")
        return (
            None if live == expected else f"L's word is {live}, should be {expected} ({' -> '.join(chain)})"
        )

    def goal(self, state: State) -> bool:
        """The merge is done or was refused."""
        return state[1] in ("done", "refused")


def build(buffers: int, slots: int, crashes: int, variant: str) -> Merge:
    """The model of this subject."""
    return Merge(buffers, crashes, variant)
