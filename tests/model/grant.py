# SPDX-License-Identifier: Apache-2.0
"""A lends to client C on q0 and grants it empties on q1, on which C sends empties and received buffers."""

from __future__ import annotations

from protocol import Queue, World

SIZES = (2, 1, 2)
VARIANTS = {
    "ok": "the protocol",
    "drain_own": "renewal of a queue drains that queue only, not what the domain has sent on others",
    "nodrain": "renewal only looks at the queue's own rings and drains nothing",
    "nointent": "take without an intent record",
    "nowait": "a successor consumes before the echo",
}


def build(buffers: int, slots: int, crashes: int, variant: str) -> World:
    """The topology of this subject."""
    return World(
        buffers, slots, crashes, ("A", "C"), 1, (Queue(0, 1), Queue(0, 1, True)), (0,) * buffers, variant
    )
