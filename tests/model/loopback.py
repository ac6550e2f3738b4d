# SPDX-License-Identifier: Apache-2.0
"""A lends to itself on q0 and sends on, directly, to client C on q1: one lend from LENT q0 to LENT q1."""

from __future__ import annotations

from protocol import Queue, World

SIZES = (1, 1, 2)
VARIANTS = {
    "ok": "the protocol",
    "noself": "an adopter does not renew the session of a client end whose server is the same book",
}


def build(buffers: int, slots: int, crashes: int, variant: str) -> World:
    """The topology of this subject."""
    return World(buffers, slots, crashes, ("A", "C"), 1, (Queue(0, 0), Queue(0, 1)), (0,) * buffers, variant)
