# SPDX-License-Identifier: Apache-2.0
"""A lends to C on q0 with a credit of one buffer less than there are: the return ring is never full."""

from __future__ import annotations

from protocol import Queue, World

SIZES = (2, 2, 1)
VARIANTS = {"ok": "the protocol", "nocredit": "the server lends as long as the forward ring has room"}


def build(buffers: int, slots: int, crashes: int, variant: str) -> World:
    """The topology of this subject."""
    return World(
        buffers,
        slots,
        crashes,
        ("A", "C"),
        1,
        (Queue(0, 1),),
        (0,) * buffers,
        variant,
        credit=max(1, buffers - 1),
    )
