#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Who talks most: receives a queue, on a host or in a VM, and prints the busiest sources of IPv4 every second.

monitor.py 99@0 [--seconds S] [--top N]

Python sees bursts, not packets: the headers of up to 256 packets are one array of numpy. With `ringbar attach VM 99@0`
on the host it runs in that VM, which can read the packets and not change them.
"""

from __future__ import annotations

import argparse
import ipaddress
import sys
import time

import numpy as np

import ringbar


def sources(headers: np.ndarray) -> np.ndarray:
    """The source addresses, as numbers, of those rows that are IPv4 without a VLAN tag."""
    ipv4 = (headers[:, 12] == 8) & (headers[:, 13] == 0)
    return np.ascontiguousarray(headers[ipv4, 26:30]).view(">u4").ravel()


def main() -> None:
    """Count until stopped."""
    words = argparse.ArgumentParser(description="the busiest sources of a queue")
    words.add_argument("queue")
    words.add_argument("--seconds", type=float, default=float("inf"))
    words.add_argument("--top", type=int, default=5)
    options = words.parse_args()
    cluster, _, queue = options.queue.partition("@")
    end = time.monotonic() + options.seconds
    with ringbar.Cluster.attach(int(cluster)) as zc, zc.open_queue(int(queue), "rx") as rx:
        print("receiving", options.queue, flush=True)
        while time.monotonic() < end:
            second, seen = time.monotonic() + 1, []
            while time.monotonic() < min(second, end):
                burst = rx.recv(256, timeout=0.1)
                if burst:
                    seen.append(sources(burst.headers(34)))
                burst.release()
            found, counts = np.unique(np.concatenate([*seen, np.empty(0, ">u4")]), return_counts=True)
            order = np.argsort(counts)[::-1][: options.top]
            print(
                "  ".join(f"{ipaddress.IPv4Address(int(found[i]))} {counts[i]}" for i in order) or "nothing", flush=True
            )


if __name__ == "__main__":
    try:
        main()
    except ringbar.Error as error:
        sys.exit(f"monitor: {error.message}\n  to mend it: {error.cure}")
    except KeyboardInterrupt:
        pass
