# SPDX-License-Identifier: Apache-2.0
"""A lends to B, B returns or sub-lends to C. A and B have books; all may die at any step."""

from __future__ import annotations

from protocol import Queue, World

SIZES = (1, 1, 2)
VARIANTS = {
    "ok": "the protocol",
    "resume_early": "an adopter takes its own sub-loans into its hand while it waits for its lender's echo",
    "drop_once": "as ok, but what came back while waiting is dropped without a further session",
    "nosub": "the lender takes home what its dead client had sub-lent",
    "nowait": "a successor consumes before the echo",
}


def build(buffers: int, slots: int, crashes: int, variant: str) -> World:
    """The topology of this subject."""
    return World(
        buffers,
        slots,
        crashes,
        ("A", "B", "C"),
        2,
        (Queue(0, 1), Queue(1, 2)),
        (0,) * buffers,
        variant,
        reaper=True,
    )
