# SPDX-License-Identifier: Apache-2.0
"""A fans out to clients C and D under masks and its own hold."""

from __future__ import annotations

from protocol import Queue, World

SIZES = (1, 1, 2)
VARIANTS = {
    "ok": "the protocol",
    "nohold": "the word carries no hold of the worker",
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
