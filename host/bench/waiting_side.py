# SPDX-License-Identifier: Apache-2.0
"""One side of ``ringbar bench vm --waiting``: what the host's program and the VM's do alike; in the VM a program."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

PACKET = bytes(60)


def echo(rx: Any, tx: Any, busy: bool, n: int) -> None:
    """Send back n packets as they come, waiting by the strategy that is measured."""
    for _ in range(n):
        while True:
            burst = rx.recv(1, 0 if busy else 30)
            if len(burst):
                break
        tx.send(burst, timeout=30)


def trips(rx: Any, tx: Any, n: int, gap: float) -> list[int]:
    """Send n packets, ``gap`` seconds apart, and spin for each until it is back: nanoseconds."""
    took = []
    for _ in range(n):
        time.sleep(gap)
        begin = time.perf_counter_ns()
        tx.write([PACKET], timeout=30)
        while not len(rx.recv(1, 0)):
            pass
        took.append(time.perf_counter_ns() - begin)
    return took


def idle(rx: Any, busy: bool, seconds: float) -> float:
    """Wait for nothing: the share of a processor that it takes."""
    begin, used = time.monotonic(), time.process_time()
    while time.monotonic() - begin < seconds:
        rx.recv(1, 0 if busy else seconds / 4)
    return (time.process_time() - used) / (time.monotonic() - begin)


def main(cluster: str, waits: str) -> None:
    """In the VM: does what it is told, a line each, and answers with a line."""
    import ringbar

    zc = ringbar.Cluster.attach(int(cluster), timeout=30)
    with zc.open_queue(0, "rx") as rx, zc.open_queue(1, "tx") as tx:
        until = time.monotonic() + 20
        while rx.stats()["waits"] != waits and time.monotonic() < until:
            rx.recv(1, 0.1)
        print(rx.stats()["waits"], flush=True)
        for line in sys.stdin:
            what, *words = json.loads(line)
            done = {"echo": echo, "trips": trips}[what](rx, tx, *words) if what != "idle" else idle(rx, *words)
            print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
