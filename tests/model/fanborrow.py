# SPDX-License-Identifier: Apache-2.0
"""A lends to B, which fans out what it borrowed to C and D; the last of them brings it back to A."""

from __future__ import annotations

from protocol import Queue, World

SIZES = (1, 1, 1)
VARIANTS = {
    "ok": "the protocol",
    "one_commit": "recovery decides for all outputs by the first one's committed index",
    "nosub": "the lender takes home what its dead client had sub-lent",
}


def build(buffers: int, slots: int, crashes: int, variant: str) -> World:
    """The topology of this subject."""
    return World(
        buffers,
        slots,
        crashes,
        ("A", "B", "C", "D"),
        2,
        (Queue(0, 1), Queue(1, 2), Queue(1, 3)),
        (0,) * buffers,
        variant,
        fanout=(1, 2),
        fans=1,
    )
