#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""An intrusion prevention of few words: passes packets on unless they fit a rule; the rules may change while it runs.

ips.py IN OUT RULES [--seconds S]

RULES is a file with one libpcap expression a line; what fits one of them is dropped. It is read again when it changes.
The packets are moved by a C thread; Python only looks at the file.

In a VM it decides what the host may see of its card eth1. On the host:

    ringbar attach VM 99@0 --tx 99@1
    ringbar bridge -i zc:eth1 -o 99@0 -i 99@1 -o stack:eth1

and in the VM: ips.py 99@0 99@1 rules.txt
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import ringbar


def expression(file: Path) -> str | None:
    """What passes; None: everything."""
    rules = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return f"not ({' or '.join(f'({rule})' for rule in rules)})" if rules else None


def main() -> None:
    """Pass packets on until stopped."""
    words = argparse.ArgumentParser(description="drops what fits a rule")
    words.add_argument("receives")
    words.add_argument("sends")
    words.add_argument("rules", type=Path)
    words.add_argument("--seconds", type=float, default=float("inf"))
    options = words.parse_args()
    end = time.monotonic() + options.seconds
    changed = options.rules.stat().st_mtime_ns
    zc = ringbar.Cluster.attach(int(options.receives.partition("@")[0]))
    rx, tx = zc.open_device(options.receives, "rx"), zc.open_device(options.sends, "tx")
    with ringbar.Bridge(rx, tx, filter=expression(options.rules)) as bridge:
        print(options.receives, "→", options.sends, flush=True)
        while time.monotonic() < end and bridge.running:
            time.sleep(0.1)
            now = options.rules.stat().st_mtime_ns
            if now != changed:
                changed = now
                bridge.set(filter=expression(options.rules))
                print("rules read again", flush=True)
        stats = bridge.stats()
    print(f"{stats['packets']} packets, {stats['drops']['filter']} dropped by the rules")


if __name__ == "__main__":
    try:
        main()
    except ringbar.Error as error:
        sys.exit(f"ips: {error.message}\n  to mend it: {error.cure}")
    except OSError as error:
        sys.exit(f"ips: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        pass
