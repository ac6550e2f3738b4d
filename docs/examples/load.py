#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A load generator: sends at a rate, and where packets come back, says what became of them.

load.py OUT [BACK] [--pps N] [--seconds S]

OUT and BACK are queues of one cluster. `load.py 99@0` fills a queue for whoever receives it. `load.py 99@0 99@1`, with
`ringbar bridge -i 99@0 -o 99@1` in a VM, checks every packet that comes back. latency.py says how long one takes.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

import ringbar


def main() -> int:
    """Send, take back, and print what was found; 1 when something was lost or damaged."""
    words = argparse.ArgumentParser(description="sends at a rate")
    words.add_argument("out")
    words.add_argument("back", nargs="?")
    words.add_argument("--pps", type=float, default=10000)
    words.add_argument("--seconds", type=float, default=1)
    options = words.parse_args()
    number = int(options.out.partition("@")[0])
    with contextlib.ExitStack() as closed:
        tx = closed.enter_context(ringbar.Cluster.attach(number)).open_device(options.out, "tx")
        rx = None
        if options.back:
            rx = closed.enter_context(ringbar.Cluster.attach(number)).open_device(options.back, "rx")
        packets = int(options.pps * options.seconds)
        flow = ringbar.Flow(tx, rx, pps=options.pps, packets=packets, flows=64, size=[96, 600, 1500])
        found = flow.run(seconds=options.seconds + 5)  # ends when all are sent, and back
    print(f"{found['sent']} sent", end="")
    if rx is None:
        print()
        return 0
    faults = {name: found[name] for name in ("lost", "reordered", "duplicated", "corrupted")}
    print(f", {found['received']} back:", ", ".join(f"{n} {name}" for name, n in faults.items()))
    return 1 if any(faults.values()) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ringbar.Error as error:
        sys.exit(f"load: {error.message}\n  to mend it: {error.cure}")
    except KeyboardInterrupt:
        pass
