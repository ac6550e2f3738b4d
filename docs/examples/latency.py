#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A latency probe: one packet at a time goes out and is waited for, so it measures the way and not the queues on it.

latency.py OUT BACK [--packets N] [--interval S]

OUT and BACK are queues of one cluster, with something between that passes packets on: in a VM
`ringbar bridge -i 99@0 -o 99@1`, on the host `latency.py 99@0 99@1`. Packets of others that come by BACK are left out.
"""

from __future__ import annotations

import argparse
import statistics
import struct
import sys
import time

import ringbar

PROBE = struct.Struct("!6s6sHQQ")  # to, from, EtherType; the run's number, the packet's
MACS = (b"\x02\x00\x00\x00\x00\x02", b"\x02\x00\x00\x00\x00\x01", 0x88B5)


def round_trip(tx: ringbar.Tx, rx: ringbar.Rx, run: int, number: int, timeout: float = 1.0) -> int | None:
    """Nanoseconds until the packet was back; None: it did not come in time."""
    packet = PROBE.pack(*MACS, run, number).ljust(60, b"\0")
    began = time.perf_counter_ns()
    tx.write([packet])
    while (left := timeout - (time.perf_counter_ns() - began) / 1e9) > 0:
        burst = rx.recv(timeout=left)
        now = time.perf_counter_ns()
        mine = any(bytes(seen[: PROBE.size]) == packet[: PROBE.size] for seen in burst)
        burst.release()
        if mine:
            return now - began
    return None


def main() -> int:
    """Measure, and print; 1 when a packet did not come back."""
    words = argparse.ArgumentParser(description="measures round trips, one packet at a time")
    words.add_argument("out")
    words.add_argument("back")
    words.add_argument("--packets", type=int, default=1000)
    words.add_argument("--interval", type=float, default=0.001)
    options = words.parse_args()
    run, found = time.time_ns(), []
    with ringbar.Cluster.attach(int(options.out.partition("@")[0])) as zc:
        tx, rx = zc.open_device(options.out, "tx"), zc.open_device(options.back, "rx")
        for number in range(options.packets):
            found.append(round_trip(tx, rx, run, number))
            time.sleep(options.interval)
    back = sorted(ns / 1000 for ns in found if ns is not None)
    print(f"{len(found)} sent, {len(found) - len(back)} lost")
    if len(back) > 1:
        cuts = statistics.quantiles(back, n=100)
        print(f"round trip in us: least {back[0]:.1f}, median {cuts[49]:.1f}, 99 % {cuts[98]:.1f}, most {back[-1]:.1f}")
    return 0 if len(back) == len(found) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ringbar.Error as error:
        sys.exit(f"latency: {error.message}\n  to mend it: {error.cure}")
    except KeyboardInterrupt:
        pass
