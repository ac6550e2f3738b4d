# SPDX-License-Identifier: Apache-2.0
"""A fans out to C and D; C sends shared buffers back on q2, and A moves the bit to where it is not set."""

from __future__ import annotations

from protocol import Queue, World

SIZES = (1, 1, 1)
VARIANTS = {
    "ok": "the protocol",
    "nohold": "a shared buffer in the server's hand is home when its last bit goes",
    "drain_own": "renewal of a queue drains that queue only, not what the domain has sent on others",
}


def build(buffers: int, slots: int, crashes: int, variant: str) -> World:
    """The topology of this subject."""
    return World(
        buffers,
        slots,
        crashes,
        ("A", "C", "D"),
        1,
        (Queue(0, 1), Queue(0, 2), Queue(0, 1, True)),
        (0,) * buffers,
        variant,
        fanout=(0, 1),
    )
