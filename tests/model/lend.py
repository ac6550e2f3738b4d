# SPDX-License-Identifier: Apache-2.0
"""One server A lends to one plain client C, which returns: intents, committed indices, sessions, crashes."""

from __future__ import annotations

from protocol import Queue, World

SIZES = (2, 2, 2)
VARIANTS = {
    "ok": "the protocol",
    "nointent": "take-back without an intent record",
    "torn": "the intent is armed before its handles are stored",
    "ledger_last": "the ledger is written after the index is published",
    "nosession": "a successor goes on without a session: the dead hand is lost",
    "nowait": "a successor consumes before the echo",
    "repeat": "session numbers repeat",
    "nounread": "renewal takes unread packets home too",
}


def build(buffers: int, slots: int, crashes: int, variant: str) -> World:
    """The topology of this subject."""
    return World(
        buffers,
        slots,
        crashes,
        ("A", "C"),
        1,
        (Queue(0, 1),),
        (0,) * buffers,
        variant,
        burst=min(2, slots, buffers),
    )
