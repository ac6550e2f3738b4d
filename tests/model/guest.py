# SPDX-License-Identifier: Apache-2.0
"""A guest receives on q0 and sends on q1; a reset leaves any index of its own in the lane."""

from __future__ import annotations

from protocol import Queue, World

SIZES = (1, 1, 1)
VARIANTS = {
    "ok": "the protocol",
    "nozero": "unread slots whose handle is not lent, or is met twice, are left as they are",
    "nodrain": "renewal does not first drain what the indices say was returned and sent",
    "drain_own": "renewal of a queue drains that queue only, not what the domain has sent on others",
    "noindex": "the server grants by credit alone, whatever the index of the return ring says",
}


def build(buffers: int, slots: int, crashes: int, variant: str) -> World:
    """The topology of this subject."""
    return World(
        buffers,
        slots,
        crashes,
        ("A", "G"),
        1,
        (Queue(0, 1), Queue(0, 1, True)),
        (0,) * buffers,
        variant,
        guests=(1,),
        garbage=True,
    )
