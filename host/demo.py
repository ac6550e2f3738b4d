# SPDX-License-Identifier: Apache-2.0
"""``make demo``: packets from a NIC, through two running VMs, and back, without a copy.

    flow -> zc:rbgen ==veth== zc:rbin -> 99@0 -> VM 1 -> 99@1 -> VM 2 -> 99@2 -> zc:rbout ==veth== zc:rbchk -> flow

Two VMs boot first. Only when both are up is the cluster made and plugged into them. One host thread moves descriptors
between the NICs and the VMs' lanes; one more generates numbered packets at one far end and checks every byte at the
other. All of it runs in a network name space of its own, which goes with this process however it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from ringbar import Bridge, Cluster
from ringbar.errors import Error
from ringbar.flow import Flow
from ringbar.host.guests import BRIDGE, bridging, package
from ringbar.host.service import Host
from ringbar.qemu import image
from ringbar.qemu.launch import pair

CLUSTER, FAR = 99, 98
LINKS = (("rbgen", "rbin"), ("rbout", "rbchk"))
WINDOW = 1024
"""Most packets on their way at once: fewer than any ring on the path has slots, so nothing need be dropped."""

HOPS = ("sent", "to VM 1", "VM 1 to VM 2", "from VM 2", "received")


def say(text: str) -> None:
    """One line of progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def enter_namespace() -> None:
    """Start this program again in a network name space of its own, once.

    The guests' image is made before that: its packages come over the network that is left behind.
    """
    if os.environ.get("RINGBAR_DEMO_NAMESPACE") == "own":
        return
    unshare = shutil.which("unshare")
    if unshare is None:
        raise Error("unshare is not installed", code="missing-tool", cure="apt-get install util-linux")
    image.ensure()
    os.environ["RINGBAR_DEMO_NAMESPACE"] = "own"
    os.execv(unshare, [unshare, "--net", sys.executable, *sys.orig_argv[1:]])


def make_links() -> None:
    """Two veth pairs, quiet: no IPv6 chatter."""
    commands = ["ip link set lo up"]
    pathlib.Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
    pathlib.Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    for one, other in LINKS:
        commands += [
            f"ip link add {one} type veth peer name {other}",
            f"ip link set {one} up",
            f"ip link set {other} up",
        ]
    for command in commands:
        done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise Error(f"{command}: {done.stderr.strip()}", code="no-links", cure="run as root")


class Table:
    """Packets per second at each hop, redrawn on a terminal, a line every five seconds elsewhere."""

    def __init__(self) -> None:
        self.last = dict.fromkeys(HOPS, 0)
        self.at = time.monotonic()
        self.live = sys.stderr.isatty()
        self.shown = 0.0

    def show(self, counts: dict[str, int], total: int) -> None:
        """Print the rates since the last call."""
        now = time.monotonic()
        if not self.live and now - self.shown < 5:
            return
        rates = {hop: (counts[hop] - self.last[hop]) / max(now - self.at, 1e-6) for hop in HOPS}
        line = "  ".join(f"{hop} {rates[hop] / 1e3:,.0f}k/s" for hop in HOPS)
        line = f"{100 * counts['received'] // max(total, 1):3d} %  {line}"
        print(f"\r\x1b[K{line}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)
        self.last, self.at, self.shown = counts, now, now

    def done(self) -> None:
        """Leave the live line."""
        if self.live:
            print(file=sys.stderr)


def counts_of(zc: Cluster, flow: dict[str, Any]) -> dict[str, int]:
    """Packets so far at each hop."""
    queues = {q["id"]: q for q in zc.status()["queues"]}
    return {
        "sent": flow["sent"],
        "to VM 1": queues[0]["packets"],
        "VM 1 to VM 2": queues[1]["received_packets"],
        "from VM 2": queues[2]["received_packets"],
        "received": flow["received"],
    }


@contextlib.contextmanager
def attached(host: Host, socket: pathlib.Path, receives: str, sends: str) -> Iterator[float]:
    """A queue to receive and one to send for a running VM; yields the seconds that attaching took."""
    began = time.monotonic()
    host.attach(f"qmp:{socket}", [receives], [sends], pool="rw", progress=lambda step: None)
    try:
        yield time.monotonic() - began
    finally:
        host.detach(f"qmp:{socket}", [])


def traffic(zc: Cluster, view: Cluster, far: Cluster, packets: int, size: int) -> dict[str, Any]:
    """Send `packets` packets around and check each; what became of them."""
    with contextlib.ExitStack() as ends:
        inputs = [ends.enter_context(zc.open_device("zc:rbin", "rx")), ends.enter_context(zc.open_queue(2, "rx"))]
        outputs = [ends.enter_context(zc.open_queue(0, "tx")), ends.enter_context(zc.open_device("zc:rbout", "tx"))]
        sink = ends.enter_context(far.open_device("zc:rbchk", "rx"))
        source = ends.enter_context(far.open_device("zc:rbgen", "tx"))
        modes = {end.address: end.stats()["mode"] for end in (inputs[0], outputs[1], sink, source)}
        say("NICs: " + ", ".join(f"{name} in {mode} mode" for name, mode in modes.items()))
        table = Table()
        with Bridge(inputs, outputs) as bridge, Flow(source, sink, packets=packets, size=size, window=WINDOW) as flow:
            began = time.monotonic()
            quiet_since, last = began, 0
            stats = flow.stats()
            while flow.running:
                flow.wait(0.5)
                stats = flow.stats()
                if stats["received"] != last:
                    quiet_since, last = time.monotonic(), stats["received"]
                elif time.monotonic() - quiet_since > 20:
                    break  # what is missing now is lost
                table.show(counts_of(view, stats), packets)
            final = flow.stop()
            seconds = time.monotonic() - began
            counts = counts_of(view, final)
            table.done()
            dropped = bridge.stats()["dropped"]
        copied = sum(q["copied"] for q in view.status()["queues"])
    lost = packets - (final["received"] - final["duplicated"] - final["corrupted"])
    return {
        "sent": final["sent"],
        "received": final["received"],
        "lost": lost,
        "reordered": final["reordered"],
        "corrupted": final["corrupted"],
        "duplicated": final["duplicated"],
        "dropped_by_bridge": dropped,
        "copies_per_packet": copied / max(final["received"], 1),
        "seconds": round(seconds, 3),
        "rates_pps": {hop: round(counts[hop] / seconds) for hop in HOPS},
        "latency_ns": final["latency_ns"],
        "modes": modes,
    }


def demo(packets: int, size: int) -> dict[str, Any]:
    """The whole of it. Returns the document that is written to the file."""
    from ringbar.host.bench.report import machine

    began = time.monotonic()
    make_links()
    host = Host()
    facts = machine()
    say(f"booting two VMs ({facts['accelerator'].upper()}) ...")
    with pair(share=package()) as (one, two), contextlib.ExitStack() as stack:
        say(f"both are up after {time.monotonic() - began:.1f} s; making cluster {CLUSTER} and plugging it into them")
        zc = stack.enter_context(Cluster.create(CLUSTER, queues=3))
        view = stack.enter_context(Cluster.attach(CLUSTER))
        far = stack.enter_context(Cluster.create(FAR))
        first = stack.enter_context(attached(host, one.qmp, f"{CLUSTER}@0", f"{CLUSTER}@1"))
        second = stack.enter_context(attached(host, two.qmp, f"{CLUSTER}@1", f"{CLUSTER}@2"))
        say(f"plugged into running VMs in {first:.2f} s and {second:.2f} s; starting `{BRIDGE}` in each")
        stack.enter_context(bridging(one, f"{CLUSTER}@0", f"{CLUSTER}@1"))
        stack.enter_context(bridging(two, f"{CLUSTER}@1", f"{CLUSTER}@2"))
        say(f"traffic starts after {time.monotonic() - began:.1f} s")
        result = traffic(zc, view, far, packets, size)
        vms = [{"name": vm.name, "machine": "pc", "boot_seconds": round(vm.boot_seconds or 0, 2)} for vm in (one, two)]
    return {
        **facts,
        "vms": vms,
        "hot_plugged_while_running": True,
        "attach_seconds": [round(first, 3), round(second, 3)],
        "packets": packets,
        "size": size,
        **result,
    }


def main() -> int:
    """Run the demo; exit status 0 only when every packet came back, once, in order, unharmed."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--packets", type=int, default=1_000_000, help="how many (default one million)")
    parser.add_argument("--size", type=int, default=128, help="bytes of each (default 128)")
    parser.add_argument("--json-file", type=pathlib.Path, default=pathlib.Path("build/demo.json"))
    options = parser.parse_args()
    enter_namespace()
    result = demo(options.packets, options.size)
    options.json_file.parent.mkdir(parents=True, exist_ok=True)
    options.json_file.write_text(json.dumps(result, indent=2) + "\n")
    bad = {key: result[key] for key in ("lost", "reordered", "corrupted", "duplicated") if result[key]}
    print(
        f"{result['received']:,} of {result['sent']:,} packets came back through {len(result['vms'])} VMs "
        f"({result['accelerator'].upper()}) in {result['seconds']:.1f} s, "
        f"{result['received'] / result['seconds']:,.0f} a second, {result['copies_per_packet']:g} copies per packet "
        f"between NIC and NIC; lost {result['lost']}, reordered {result['reordered']}, corrupted {result['corrupted']}"
    )
    print(f"written to {options.json_file}")
    return 1 if bad or result["received"] < options.packets else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Error as error:
        sys.exit(f"ringbar: {error}")
