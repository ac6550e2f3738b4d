# SPDX-License-Identifier: Apache-2.0
"""What a server does, store by store: lend, take, session renewal, and the recovery of a dead book."""

from __future__ import annotations

from typing import Any

from explore import State, Step, Violation
from memory import FORWARD, LENT, OWN, RETURN, RING_NAME, SHARED, Memory, Ops, put


class Operations(Memory):
    """Programs are lists of stores; `execute` does the next one, `recover` finishes what a crash left."""

    # ---- programs: lists of stores

    def lend(self, s: State, q: int, handles: tuple[int, ...], words: tuple[Any, ...]) -> Ops:
        """Lend: handles, arm, ledger, slots, committed index, lane index, disarm."""
        which = self.queues[q].lends
        base = s[3][q][which][3]
        end = (base + len(handles)) % self.turn[which]
        head: Ops = (("handles", handles), ("arm", "lend", q, which, base, end))
        if self.variant == "torn":
            head = (head[1], head[0])
        ledger: Ops = tuple(("word", b, w) for b, w in zip(handles, words))
        slots: Ops = tuple(
            ("slot", q, which, (base + i) % self.size[which], b) for i, b in enumerate(handles)
        )
        tail: Ops = (("commit", q, which, end, (), handles), ("publish", q, which), ("disarm",))
        if self.variant == "ledger_last":
            return head + slots + tail[:2] + ledger + tail[2:]
        return head + ledger + slots + tail

    def fan_out(self, s: State, p: int, b: int, queues: tuple[int, ...], origin: int | None) -> Ops:
        """Lend one buffer on several queues: handles, arm, mask, word, slots, and for each: commit, publish."""
        outs = tuple((q, s[3][q][FORWARD][3], (s[3][q][FORWARD][3] + 1) % self.turn[FORWARD]) for q in queues)
        level0, level1 = s[0][p][b - 1]
        prior = s[1][p][b - 1] if self.shared(s, p, b) else 0
        mask = prior | sum(1 << q for q in queues)
        plain = mask == 1 << queues[0]
        target = LENT + queues[0] if plain else SHARED
        if origin is not None:
            word: Any = (level0, (queues[0] if plain else SHARED, origin))
        else:
            word = (target, level1)
        ledger: Ops = (("mask", b, mask), ("word", b, word))
        if plain:
            ledger = ledger[1:]
        elif self.variant == "word_first":
            ledger = ledger[::-1]
        slots: Ops = tuple(("slot", q, FORWARD, base % self.size[FORWARD], b) for q, base, _ in outs)
        tail: Ops = ()
        for q, _, end in outs:
            tail += (("commit", q, FORWARD, end, (), (b,)), ("publish", q, FORWARD))
        arm: Ops = (("handles", (b,)), ("arm", "fan", outs, 0, 0, 0))
        if self.variant == "mask_last":
            return (*arm, *slots, *tail, *ledger, ("disarm",))
        return (*arm, *ledger, *slots, *tail, ("disarm",))

    def recover_fan(self, s: State, p: int) -> Step:
        """The next step of finishing a fan-out: each output by its own committed index."""
        outs, handles = s[2][p][1], s[2][p][5]
        who = f"recoverer of {self.names[p]}"
        for q, base, _ in outs:
            done = s[3][q][FORWARD][3]
            decides = (s[3][outs[0][0]][FORWARD][3], outs[0][1]) if self.variant == "one_commit" else (done, base)
            if decides[0] == decides[1]:
                for b in handles:
                    if self.lent(s, p, b, q):
                        return f"{who}: fan-out to q{q} not committed, {b} back", self.clear(s, p, b, q)
            elif s[3][q][FORWARD][1] != done:
                return f"{who}: publish q{q}", self.ring(s, q, FORWARD, P=done)
        return f"{who}: disarm", put(s, 2, put(s[2], p, ("", 0, 0, 0, 0, ())))

    def take(self, s: State, p: int, q: int, which: int, n: int = 1) -> Ops:
        """Take n entries that the client wrote: handles, arm, ledger, commit, publish, disarm."""
        ring = s[3][q][which]
        end = (ring[3] + n) % self.turn[which]
        named = self.domain(q) if which == FORWARD else [q]
        clears: Ops = ()
        gained: tuple[Any, ...] = ()
        taken: tuple[int, ...] = ()
        for i in range(n):
            b = ring[0][(ring[3] + i) % self.size[which]]
            by = next((i for i in named if b and self.lent(s, p, b, i)), None)
            if by is None or b in taken:
                if b and not s[3][q][4]:
                    raise Violation(
                        f"honest {self.names[self.queues[q].client]} accused: {RING_NAME[which]} ring "
                        f"of q{q} has {b}, not lent to it"
                    )
                continue
            taken += (b,)
            clears += (("clear", b, by),)
            origin = self.origin(s, p, b, by)
            if origin is not None:
                gained += ((b, origin),)
            elif which == FORWARD:
                gained += ((b, OWN),)
        last: Ops = (("commit", q, which, end, gained, ()), ("publish", q, which))
        if self.variant == "nointent":
            return clears + last
        record = ("take", q, which, ring[3], end)
        return (("handles", taken), ("arm", *record), *clears, *last, ("disarm",))

    def execute(self, s: State, p: int, op: tuple[Any, ...], rest: Ops) -> Step:
        """One step of a party's program."""
        status, _, hand = s[4][p]
        kind = op[0]
        label = " ".join(str(x) for x in op)
        t = s
        if kind == "handles":
            t = put(s, 2, put(s[2], p, (*s[2][p][:5], op[1])))
        elif kind == "arm":
            t = put(s, 2, put(s[2], p, (*op[1:], s[2][p][5])))
        elif kind == "disarm":
            clean: tuple[int, ...] = s[2][p][5] if self.variant == "torn" else ()
            t = put(s, 2, put(s[2], p, ("", 0, 0, 0, 0, clean)))
        elif kind == "word":
            t = self.word(s, p, op[1], op[2])
        elif kind == "mask":
            t = self.mask(s, p, op[1], op[2])
        elif kind == "clear":
            t = self.clear(s, p, op[1], op[2])
        elif kind == "slot":
            _, q, which, at, b = op
            t = self.ring(s, q, which, slots=put(s[3][q][which][0], at, b))
        elif kind == "commit":
            _, q, which, end, gained, lost = op
            t = self.ring(s, q, which, X=end)
            hand = tuple(x for x in hand if x[0] not in lost)
            if status[0] == "live" or (self.variant == "resume_early" and status[0] == "wait"):
                hand += tuple(x for x in gained if x not in hand)
            elif status[0] == "wait" and any(o != OWN for _, o in gained) and self.variant != "drop_once":
                status = ("wait", 1)
        elif kind == "publish":
            _, q, which = op
            field_name = "P" if which == self.queues[q].lends else "C"
            t = self.ring(s, q, which, **{field_name: s[3][q][which][3]})
        elif kind == "peer":  # the client publishes what it wrote: return or send
            _, q, which, end, b, came = op
            t = self.ring(s, q, which, P=end)
            hand = tuple(x for x in hand if x != (b, came))
        elif kind == "session":
            number = s[3][op[1]][2] + 1
            if self.variant == "repeat":
                number %= 2
            t = put(s, 3, put(s[3], op[1], put(s[3][op[1]], 2, number)))
            label = f"session {number} of q{op[1]}"
        elif kind == "fix":
            t = self.fix(s, op[1])
        elif kind == "renew":
            return self.renew(s, p, op, rest)
        elif kind == "zero":
            return self.zero(s, p, op, rest)
        elif kind == "scan":
            _, q, b, unread = op
            if self.reclaimable(s, p, q, b, unread):
                origin = self.origin(s, p, b, q)
                t = self.clear(s, p, b, q)
                label = f"scan of q{q}: {b} comes home"
                if origin is not None and (status[0] == "live" or self.variant == "resume_early"):
                    hand += ((b, origin),)
                elif origin is not None and status[0] == "wait" and self.variant != "drop_once":
                    status = ("wait", 1)
            else:
                label = f"scan of q{q}: leave {b}"
        elif kind == "echo":
            _, q, number = op
            if self.variant == "echo_reread":
                number = s[3][q][2]
            new = put(s[3][q], 3, number)
            if number >= new[4]:
                new = put(new, 4, 0)
            t = put(s, 3, put(s[3], q, new))
        return f"{self.names[p]}: {label}", self.party(t, p, rest, hand, status)

    # ---- session renewal, by the server or whoever acts as it

    def renew(self, s: State, p: int, op: tuple[Any, ...], rest: Ops) -> Step:
        """Drain what the client wrote, mend the unread slots (guests), scan, and echo the session."""
        _, q, number = op
        if self.variant != "nodrain":
            for i in self.domain(q):
                which = FORWARD if self.queues[i].grant else RETURN
                ring = s[3][i][which]
                if self.variant == "drain_own" and i != q:
                    continue
                if (i == q or which == FORWARD) and self.span(which, ring[1], ring[3]):
                    return (
                        f"{self.names[p]}: renewal of q{q}: drain q{i}",
                        self.party(s, p, (*self.take(s, p, i, which), op, *rest)),
                    )
        which = self.queues[q].lends
        ring = s[3][q][which]
        unread = tuple(self.entries(which, ring, ring[3], ring[2]))
        if self.variant == "nounread":
            unread = ()
        program: Ops = ()
        if self.queues[q].client in self.guests and self.variant != "nozero":
            program = (("zero", q, ring[3], len(unread), ()),)
            scans: Ops = ()
        else:
            scans = tuple(("scan", q, b, unread) for b in range(1, self.buffers + 1))
        return (
            f"{self.names[p]}: renewal of q{q} to session {number}: unread {unread}",
            self.party(s, p, program + scans + (("echo", q, number),) + rest),
        )

    def zero(self, s: State, p: int, op: tuple[Any, ...], rest: Ops) -> Step:
        """From the newest unread slot back: a handle lent here and not yet met stands, others are zeroed."""
        _, q, index, left, met = op
        which = self.queues[q].lends
        if left == 0:
            scans: Ops = tuple(("scan", q, b, met) for b in range(1, self.buffers + 1))
            return f"{self.names[p]}: slots of q{q} checked", self.party(s, p, scans + rest)
        at = (index - 1) % self.turn[which]
        b = s[3][q][which][0][at % self.size[which]]
        if b and self.lent(s, p, b, q) and b not in met:
            return (
                f"{self.names[p]}: slot of {b} stands",
                self.party(s, p, (("zero", q, at, left - 1, (*met, b)), *rest)),
            )
        t = self.ring(s, q, which, slots=put(s[3][q][which][0], at % self.size[which], 0))
        return f"{self.names[p]}: zero a slot ({b})", self.party(
            t, p, (("zero", q, at, left - 1, met), *rest)
        )

    def reclaimable(self, s: State, p: int, q: int, b: int, unread: tuple[int, ...]) -> bool:
        """True if b is lent on q and nobody has it: not unread, not on its way back, not sub-lent."""
        if not self.lent(s, p, b, q) or b in unread:
            return False
        if self.variant == "nodrain" and not self.queues[q].grant:
            ret = s[3][q][RETURN]
            if b in self.entries(RETURN, ret, ret[1], ret[3]):
                return False
        if self.variant == "nodrain" and self.queues[q].grant:
            fwd = s[3][q][FORWARD]
            if b in self.entries(FORWARD, fwd, fwd[1], fwd[3]):
                return False
        client = self.queues[q].client
        if client < self.books and self.variant != "nosub":
            level1 = s[0][client][b - 1][1]
            if level1 is not None and level1[1] == q:
                return False
        return True

    def fix(self, s: State, q: int) -> State:
        """A guest's new client: its own index outside the window becomes the server's."""
        for which in (FORWARD, RETURN):
            _, head, tail, _ = s[3][q][which]
            if self.ahead(which, head, tail) > self.size[which]:
                if which == self.queues[q].lends:
                    s = self.ring(s, q, which, C=head)
                else:
                    s = self.ring(s, q, which, P=tail)
        return s

    # ---- recovery of a dead book: one store, decided from `state` alone

    def recover(self, s: State, p: int) -> Step | None:
        """The next step of finishing book p's intent, or None when it is clean."""
        op, q, which, base, end, handles = s[2][p]
        if op == "fan":
            return self.recover_fan(s, p)
        done = s[3][q][which][3] if op else 0
        who = f"recoverer of {self.names[p]}"
        if op and done == base:
            named = self.domain(q) if op == "take" and which == FORWARD else [q]
            for b in handles:
                for i in named:
                    if b and self.lent(s, p, b, i):
                        return f"{who}: {op} not committed, {b} home", self.clear(s, p, b, i)
            if op == "take":
                return f"{who}: commit take", self.ring(s, q, which, X=end)
        elif op:
            name = "P" if which == self.queues[q].lends else "C"
            if s[3][q][which][1 if name == "P" else 2] != done:
                return f"{who}: publish", self.ring(s, q, which, **{name: done})
        if op:
            clean: tuple[int, ...] = handles if self.variant == "torn" else ()
            return f"{who}: disarm", put(s, 2, put(s[2], p, ("", 0, 0, 0, 0, clean)))
        return None
