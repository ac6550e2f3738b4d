# SPDX-License-Identifier: Apache-2.0
"""A fans out to B and C, and B sends on to C: C gets the same buffer twice, and owes it to both."""

from __future__ import annotations

from protocol import Queue, World

SIZES = (1, 1, 1)
VARIANTS = {
    "ok": "the protocol",
    "nosub": "the lender takes home what its dead client had sub-lent",
}


def build(buffers: int, slots: int, crashes: int, variant: str) -> World:
    """The topology of this subject."""
    return World(
        buffers,
        slots,
        crashes,
        ("A", "B", "C"),
        2,
        (Queue(0, 1), Queue(0, 2), Queue(1, 2)),
        (0,) * buffers,
        variant,
        fanout=(0, 1),
    )
