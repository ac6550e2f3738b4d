# SPDX-License-Identifier: Apache-2.0
"""A lends to B on q0 and B to A on q1: both are server and client of the other, and buffers pass A twice."""

from __future__ import annotations

from protocol import Queue, World

SIZES = (1, 1, 2)
VARIANTS = {
    "ok": "the protocol",
    "wait_still": "an adopter does not serve while it waits for its lender's echo: two wait for each other",
    "drop_once": "what came back while waiting is dropped without a further session",
    "resume_early": "an adopter takes its own sub-loans into its hand while it waits for its lender's echo",
    "nest": "a book sub-lends what its borrower's book has already borrowed and lent on",
}


def build(buffers: int, slots: int, crashes: int, variant: str) -> World:
    """The topology of this subject: the first buffer is at home at A, the second at B, and so on."""
    return World(
        buffers,
        slots,
        crashes,
        ("A", "B"),
        2,
        (Queue(0, 1), Queue(1, 0)),
        tuple(b % 2 for b in range(buffers)),
        variant,
        credit=buffers + 1,
    )
