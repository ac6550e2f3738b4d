# SPDX-License-Identifier: Apache-2.0
"""Two programs of one guest: X receives on q0, Y sends on q1; each may die, and the guest may be reset."""

from __future__ import annotations

from protocol import Queue, World

SIZES = (1, 1, 1)
VARIANTS = {
    "ok": "the protocol",
    "drain_own": "renewal of a queue drains that queue only, not what the domain has sent on others",
    "nozero": "unread slots whose handle is not lent, or is met twice, are left as they are",
}


def build(buffers: int, slots: int, crashes: int, variant: str) -> World:
    """The topology of this subject."""
    return World(
        buffers,
        slots,
        crashes,
        ("A", "X", "Y"),
        1,
        (Queue(0, 1), Queue(0, 2, True)),
        (0,) * buffers,
        variant,
        guests=(1, 2),
        garbage=True,
    )
