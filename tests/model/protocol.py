# SPDX-License-Identifier: Apache-2.0
"""The ring protocol as an explicit-state machine: who can do what next, and the properties.

One atomic step of this model is one store to shared memory (or one read that a decision hangs on). A party
runs a list of such stores; a crash drops the list and whatever the party had in its hand, and nothing else.
The subjects (lend.py, grant.py, chain.py, ...) only choose the topology and name the broken variants.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from explore import State, Step, Violation
from memory import FORWARD, LENT, OWN, RETURN, RING_NAME, Ops, Queue, put
from operations import Operations

__all__ = ["Queue", "World"]


class World(Operations):
    """A topology that the explorer can walk."""

    # ---- what a party can do next

    def served(self, p: int) -> list[int]:
        """The queues whose server end is at party p."""
        return [q for q, queue in enumerate(self.queues) if queue.server == p]

    def used(self, p: int) -> list[int]:
        """The queues whose client end is at party p."""
        return [q for q, queue in enumerate(self.queues) if queue.client == p]

    def steps(self, s: State) -> Iterator[Step]:
        """All next states."""
        for p, (status, ops, hand) in enumerate(s[4]):
            name = self.names[p]
            if ops:
                yield self.execute(s, p, ops[0], ops[1:])
            elif status[0] == "dead":
                yield from self.reopen(s, p)
            elif status[0] == "recover":
                step = self.recover(s, p)
                if step is not None:
                    yield step
                elif status[1]:
                    yield f"recoverer of {name}: clean, reaps", self.party(s, p, status=("reap", 0))
                else:
                    yield self.opened(s, p)
            else:
                if p < self.books:
                    yield from self.serve(s, p, status[0])
                if status[0] == "wait":
                    yield from self.wait(s, p, status)
                elif status[0] == "reap":
                    yield f"reaper of {name}: stops", self.party(s, p, status=("dead", 0))
                if status[0] == "live" or (status[0] == "wait" and self.variant == "nowait"):
                    yield from self.borrow(s, p, hand)
            if s[5] and status[0] != "dead" and p in (self.crashing or ()):
                if status != ("live", 0) or ops or hand or self.used(p):
                    yield from self.crash(s, p)

    def crash(self, s: State, p: int) -> Iterator[Step]:
        """The party dies; a guest may also leave any index of its own in the lane."""
        t = put(self.party(s, p, (), (), ("dead", 0)), 5, s[5] - 1)
        yield f"CRASH {self.names[p]}", t
        if not self.garbage or p not in self.guests:
            return
        mine = [q for q, queue in enumerate(self.queues) if queue.client in self.guests]
        for other in self.guests:
            t = self.party(t, other, (), (), ("dead", 0))
        for q in mine:
            for which in (FORWARD, RETURN):
                index = "C" if which == self.queues[q].lends else "P"
                for value in range(self.turn[which]):
                    u = self.ring(t, q, which, **{index: value})
                    u = put(u, 3, tuple(put(x, 4, x[2] + 1) if i in mine else x for i, x in enumerate(u[3])))
                    yield f"RESET of the guest: {index} of q{q}'s {RING_NAME[which]} ring is {value}", u

    def reopen(self, s: State, p: int) -> Iterator[Step]:
        """Somebody takes a dead party's place, or reaps it."""
        if p < self.books:
            yield f"{self.names[p]} adopted", self.party(s, p, status=("recover", 0))
            if self.reaper:
                yield f"{self.names[p]} found by a reaper", self.party(s, p, status=("recover", 1))
        else:
            yield self.opened(s, p)

    def opened(self, s: State, p: int) -> Step:
        """The new holder of a place begins: a new session on each of its client ends."""
        used = [q for q in self.used(p) if self.variant != "noself" or self.queues[q].server != p]
        if not used or self.variant == "nosession":
            return f"{self.names[p]}: resumes", self.party(s, p, status=("live", 0))
        fixes: Ops = ()
        if p in self.guests and self.variant == "fix_before":
            fixes = tuple(("fix", q) for q in used)
        program: Ops = fixes + tuple(("session", q) for q in used)
        return f"{self.names[p]}: opens", self.party(s, p, program, status=("wait", 0))

    def wait(self, s: State, p: int, status: tuple[str, int]) -> Iterator[Step]:
        """Go on once every session is echoed; open again if something was dropped meanwhile."""
        used = self.used(p)
        if any(s[3][q][2] != s[3][q][3] for q in used):
            return
        if status[1]:
            yield (
                f"{self.names[p]}: echoed, but sub-loans ended meanwhile: once more",
                self.party(s, p, tuple(("session", q) for q in used), status=("wait", 0)),
            )
            return
        fixes: Ops = ()
        if p in self.guests and self.variant not in ("fix_before", "nofix"):
            fixes = tuple(("fix", q) for q in used)
        yield f"{self.names[p]}: echoed, goes on", self.party(s, p, fixes, status=("live", 0))

    def serve(self, s: State, p: int, status: str) -> Iterator[Step]:
        """What the server of queues does: renew, take back, lend, grant."""
        name = self.names[p]
        if status == "wait" and self.variant == "wait_still":
            return
        for q in self.served(p):
            queue = self.queues[q]
            session, echo = s[3][q][2:4]
            if session != echo:
                yield f"{name}: sees session {session} of q{q}", self.party(s, p, (("renew", q, session),))
            which = FORWARD if queue.grant else RETURN
            ring = s[3][q][which]
            for n in range(1, min(self.burst, self.span(which, ring[1], ring[3])) + 1):
                yield f"{name}: takes {n} from q{q}", self.party(s, p, self.take(s, p, q, which, n))
            if status == "reap":
                continue
            if self.fanout is None or queue.grant or p != self.fans:
                yield from self.lend_next(s, p, q)
        if status == "live" and self.fanout is not None and p == self.fans:
            yield from self.fan(s, p)

    def available(self, s: State, p: int) -> list[int]:
        """What the free stack of book p holds."""
        mine = [b for b, _ in s[4][p][2]]
        once = self.variant == "nohold"  # what was shared is on the stack as soon as its last bit goes
        return [
            b
            for b in range(1, self.buffers + 1)
            if self.free(s, p, b) and (b not in mine or (once and s[1][p][b - 1]))
        ]

    def room(self, s: State, q: int, book: int, n: int = 1) -> bool:
        """Credit, and n slots free by both indices; a garbage index of the peer means full."""
        which = self.queues[q].lends
        ring = s[3][q][which]
        count = sum(self.lent(s, book, b, q) for b in range(1, self.buffers + 1))
        if count + n > self.credit and self.variant != "nocredit":
            return False
        if self.queues[q].grant and self.variant == "noindex":
            return True
        return self.ahead(which, ring[3], ring[2]) + n <= self.size[which]

    def fill(self, s: State, p: int, b: int) -> None:
        """The book takes a free buffer and writes into it: nobody may still be able to read it."""
        found = self.places(s, b)
        if found:
            raise Violation(
                f"{self.names[p]} takes {b} as free and writes into it, but it is in: " + ", ".join(found)
            )

    def lend_next(self, s: State, p: int, q: int) -> Iterator[Step]:
        """Lend or grant new buffers, or (lend queues) send on what is in the hand."""
        hand = s[4][p][2]
        name = self.names[p]
        free = self.available(s, p)
        for n in range(1, self.burst + 1):
            if len(free) >= n and self.room(s, q, p, n):
                for b in free[:n]:
                    self.fill(s, p, b)
                words = ((LENT + q, None),) * n
                yield (
                    f"{name}: fills and lends {free[:n]} on q{q}",
                    self.party(s, p, self.lend(s, q, tuple(free[:n]), words)),
                )
        if self.queues[q].grant or not self.room(s, q, p):
            return
        for b, came in hand:
            level0, level1 = s[0][p][b - 1]
            if came == OWN:
                word = (LENT + q, level1)
            elif self.queues[came].server == p:  # loopback: the lender is the borrower
                if level1 is not None and level1[0] == came:
                    word = (level0, (q, level1[1]))
                else:
                    word = (LENT + q, level1)
            else:
                if level1 is not None:
                    continue  # this book sub-lends it already: only return it
                client = self.queues[q].client
                nested = client < self.books and client != p and s[0][client][b - 1][1] is not None
                if self.variant != "nest" and (nested or level0 == LENT + q):
                    continue  # the borrower's book has no word left for it
                word = (level0, (q, came))
            yield f"{name}: lends {b} of its hand on q{q}", self.party(s, p, self.lend(s, q, (b,), (word,)))

    def fan(self, s: State, p: int) -> Iterator[Step]:
        """The fan-out worker: a new packet, or one that came to its hand, to some of the outputs."""
        hand = s[4][p][2]
        name = self.names[p]
        outputs = [q for q in self.fanout or () if self.room(s, q, p)]
        subsets = [c for n in range(1, len(outputs) + 1) for c in combinations(outputs, n)]
        free = self.available(s, p)
        if free and subsets and not any(came == OWN for _, came in hand) and not self.used(p):
            self.fill(s, p, free[0])
            for queues in subsets:
                yield f"{name}: {free[0]} to {queues}", self.party(s, p, self.fan_out(s, p, free[0], queues, None))
        for b, came in hand:
            if came == OWN:
                yield f"{name}: drops {b}", self.party(s, p, hand=tuple(x for x in hand if x[0] != b))
            elif s[0][p][b - 1][1] is not None:
                continue  # lent on already: only returned
            for queues in subsets:
                if came == OWN and any(self.lent(s, p, b, q) for q in queues):
                    continue  # has it already: a copy
                origin = None if came == OWN else came
                yield (
                    f"{name}: {b} of its hand to {queues}",
                    self.party(s, p, self.fan_out(s, p, b, queues, origin)),
                )

    def borrow(self, s: State, p: int, hand: tuple[Any, ...]) -> Iterator[Step]:
        """What the client of queues does: receive, return, take empties, send."""
        name = self.names[p]
        for q in self.used(p):
            queue = self.queues[q]
            which = queue.lends
            slots, head, tail, _ = s[3][q][which]
            count = self.ahead(which, head, tail)
            if count and count <= self.size[which] and len(hand) < self.hand:
                b = slots[tail % self.size[which]]
                following = (tail + 1) % self.turn[which]
                t = self.ring(s, q, which, C=following)
                if b == 0:
                    yield f"{name}: skips a zeroed slot of q{q}", t
                else:
                    if not self.lent(s, queue.server, b, q):
                        raise Violation(f"{name} receives {b} on q{q}, which is not lent on it any more")
                    if any(held == b and not (self.fanout and came != q) for held, came in hand):
                        raise Violation(f"{name} receives {b} on q{q} twice")
                    yield f"{name}: receives {b} on q{q}", self.party(t, p, hand=(*hand, (b, q)))
            back = FORWARD if queue.grant else RETURN
            _, head, tail, _ = s[3][q][back]
            if (
                not queue.grant
                and p not in self.guests
                and self.ahead(back, head, tail) >= self.size[back]
                and any(came == q for _, came in hand)
            ):
                raise Violation(f"the return ring of q{q} is full")
            if self.ahead(back, head, tail) >= self.size[back]:
                continue
            end = (head + 1) % self.turn[back]
            for b, came in hand:
                if came == OWN or (
                    p < self.books and self.queues[came].server == p and not queue.grant and came != q
                ):
                    continue
                if not queue.grant and came != q:
                    continue
                if queue.grant and (came not in self.domain(q)):
                    continue
                verb = "sends" if queue.grant else "returns"
                slot = ("slot", q, back, head % self.size[back], b)
                yield f"{name}: {verb} {b} on q{q}", self.party(s, p, (slot, ("peer", q, back, end, b, came)))
        if p < self.books and self.fanout is None:
            for b, came in hand:
                if came == OWN:
                    yield f"{name}: drops {b}", self.party(s, p, hand=tuple(x for x in hand if x[0] != b))

    # ---- properties

    def quiet(self, s: State) -> bool:
        """True when everybody lives and is between operations."""
        return all(status == ("live", 0) and not ops for status, ops, _ in s[4]) and all(
            x[2] == x[3] and not x[4] for x in s[3]
        )

    def check(self, s: State) -> str | None:
        """Conservation: at rest, what each queue has is what its server's ledger says is lent on it."""
        if not self.quiet(s):
            return None
        there: list[list[int]] = [[] for _ in self.queues]
        for q, queue in enumerate(self.queues):
            fwd, ret = s[3][q][:2]
            if queue.grant:
                there[q] += self.entries(RETURN, ret, ret[1], ret[2])
                for b in self.entries(FORWARD, fwd, fwd[1], fwd[3]):
                    by = [i for i in self.domain(q) if self.lent(s, queue.server, b, i)]
                    if not by:
                        return f"{b} was sent on q{q} but the ledger does not say that it is lent"
                    there[by[0]].append(b)
            else:
                there[q] += self.entries(FORWARD, fwd, fwd[1], fwd[2])
                there[q] += self.entries(RETURN, ret, ret[1], ret[3])
            there[q] = [b for b in there[q] if b]
        for _, _, hand in s[4]:
            for b, came in hand:
                if came != OWN:
                    there[came].append(b)
        for q, queue in enumerate(self.queues):
            # a buffer that the client sub-lent counts as there: its client still owes it
            client = queue.client
            if client < self.books:
                there[q] += [
                    b
                    for b in range(1, self.buffers + 1)
                    if s[0][client][b - 1][1] is not None and s[0][client][b - 1][1][1] == q
                ]
            ledger = [b for b in range(1, self.buffers + 1) if self.lent(s, queue.server, b, q)]
            if sorted(there[q]) != ledger:
                return f"q{q}: the ledger says lent {ledger}, but there are {sorted(there[q])}"
        return None

    def goal(self, s: State) -> bool:
        """Everybody alive and at rest, every buffer home, no hand holds any."""
        if not self.quiet(s) or any(hand for _, _, hand in s[4]):
            return False
        return all(self.free(s, self.home[b - 1], b) for b in range(1, self.buffers + 1)) and all(
            word[1] is None for book in s[0] for word in book
        )
