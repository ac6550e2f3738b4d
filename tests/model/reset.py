# SPDX-License-Identifier: Apache-2.0
"""A guest receives on q0 and returns; a reset leaves any index of its own in the lane."""

from __future__ import annotations

from protocol import Queue, World

SIZES = (2, 2, 1)
VARIANTS = {
    "ok": "the protocol",
    "nozero": "unread slots whose handle is not lent, or is met twice, are left as they are",
    "nodrain": "renewal does not first drain what the indices say was returned",
    "nofix": "the new client does not correct an index outside the window",
    "fix_before": "the new client corrects its indices before the session instead of after the echo",
    "echo_reread": "the server reads the session again when it echoes",
}


def build(buffers: int, slots: int, crashes: int, variant: str) -> World:
    """The topology of this subject."""
    return World(
        buffers,
        slots,
        crashes,
        ("A", "G"),
        1,
        (Queue(0, 1),),
        (0,) * buffers,
        variant,
        guests=(1,),
        garbage=True,
    )
