# SPDX-License-Identifier: Apache-2.0
"""A fans out to clients C and D, to both or to one of them, in one operation with a commit for each."""

from __future__ import annotations

from protocol import Queue, World

SIZES = (1, 1, 2)
VARIANTS = {
    "ok": "the protocol",
    "one_commit": "recovery decides for all outputs by the first one's committed index",
    "word_first": "the word says SHARED before its mask is written",
    "mask_last": "mask and word are written after the slots",
    "nointent": "take-back without an intent record",
    "nounread": "renewal takes unread packets home too",
}


def build(buffers: int, slots: int, crashes: int, variant: str) -> World:
    """The topology of this subject."""
    return World(
        buffers,
        slots,
        crashes,
        ("A", "C", "D"),
        1,
        (Queue(0, 1), Queue(0, 2)),
        (0,) * buffers,
        variant,
        fanout=(0, 1),
    )
