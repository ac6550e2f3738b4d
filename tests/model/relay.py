# SPDX-License-Identifier: Apache-2.0
"""A lends to B on q0; B serves C: it sub-lends on q1, and C sends those on to B on the grant queue q2."""

from __future__ import annotations

from protocol import Queue, World

SIZES = (1, 1, 2)
VARIANTS = {
    "ok": "the protocol",
    "resume_early": "an adopter takes its own sub-loans into its hand while it waits for its lender's echo",
    "drop_once": "as ok, but what came back while waiting is dropped without a further session",
    "drain_own": "renewal of a queue drains that queue only, not what the domain has sent on others",
    "nosub": "the lender takes home what its dead client had sub-lent",
}


def build(buffers: int, slots: int, crashes: int, variant: str) -> World:
    """The topology of this subject: the first buffer is at home at A, a second at B."""
    return World(
        buffers,
        slots,
        crashes,
        ("A", "B", "C"),
        2,
        (Queue(0, 1), Queue(1, 2), Queue(1, 2, True)),
        tuple(b % 2 for b in range(buffers)),
        variant,
        reaper=True,
    )
