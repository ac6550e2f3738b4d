# SPDX-License-Identifier: Apache-2.0
"""What a tool says while it runs, and at its end: now, average and total, drops by reason.

Bits are those on an Ethernet wire: preamble 8, FCS 4 and inter-frame gap 12 bytes are added to every packet.
"""

from __future__ import annotations

import re
import time
from typing import Any

from ringbar.cli.common import WIRE_OVERHEAD, plural, short, wire_bits


def bits(packets: float, octets: float, took: float) -> str:
    """``8.10 Gbit/s``."""
    return re.sub("([kMGT]?)$", r" \1bit/s", short(wire_bits(packets, octets) / max(took, 1e-9)), count=1)


def rates(packets: float, octets: float, took: float) -> str:
    """``12.3M packets/s, 8.10 Gbit/s on the wire``."""
    return f"{short(packets / max(took, 1e-9))} packets/s, {bits(packets, octets, took)} on the wire"


def figures(packets: int, octets: int, took: float) -> dict[str, Any]:
    """The same for JSON."""
    took = max(took, 1e-9)
    return {
        "seconds": took,
        "packets": packets,
        "bytes": octets,
        "pps": packets / took,
        "bps": wire_bits(packets, octets) / took,
        "wire_overhead": WIRE_OVERHEAD,
    }


def dropped(drops: dict[str, int]) -> str:
    """``drops 0``, or ``drops full 12``."""
    return "drops " + (" ".join(f"{reason} {n:,}" for reason, n in drops.items() if n) or "0")


class Pace:
    """When to draw, and what went by since the last time.

    :ivar began: when the tool began, by :func:`time.monotonic`.
    """

    def __init__(self, period: float) -> None:
        self.began = self.shown = time.monotonic()
        self.period = period
        self.last = (0, 0)

    @property
    def took(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def due(self) -> bool:
        """Whether it is time for a live line."""
        return time.monotonic() - self.shown >= self.period

    def line(self, packets: int, octets: int, aside: str) -> str:
        """Now, total, ``aside`` and average, so that a narrow terminal cuts the last; the next ``now`` begins here."""
        now = time.monotonic()
        before, took = self.last, now - self.shown
        self.last, self.shown = (packets, octets), now
        ever = now - self.began
        return (
            f"{rates(packets - before[0], octets - before[1], took)}; {plural(packets, 'packet')}; {aside}; "
            f"average {short(packets / max(ever, 1e-9))}, {bits(packets, octets, ever)}"
        )
