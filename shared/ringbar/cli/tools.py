# SPDX-License-Identifier: Apache-2.0
"""The tools, on host and guest alike: ``count``, ``send``, ``bridge``, ``capture``."""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ringbar import address
from ringbar.cli import running
from ringbar.cli.common import (
    DONE,
    FAILED,
    WIRE_OVERHEAD,
    Output,
    Usage,
    add_json,
    cluster_id,
    count,
    examples,
    plural,
    positive,
    rate,
    seconds,
    short,
    size,
    wire_bits,
)

if TYPE_CHECKING:
    from ringbar.flow import Flow

COUNT_BURST = 256
"""Packets taken at once by tools that do not pass them on."""
STALL = 2.0
"""Seconds without a packet after which what a loop has not brought back is lost."""
LEAST_SIZE = 74
"""Bytes of a packet of ``send``: Ethernet, IPv4, UDP, and 32 of its own."""


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    """Declare the options of command ``name``."""
    {
        "count": _configure_count,
        "send": _configure_send,
        "bridge": _configure_bridge,
        "capture": _configure_capture,
    }[name](parser)


def _common(parser: argparse.ArgumentParser, run: Any, worker: bool) -> None:
    """The options of every tool; ``worker``: a C thread moves the packets."""
    parser.add_argument("--seconds", type=seconds, metavar="S", help="end after S seconds")
    parser.add_argument("--packets", type=positive, metavar="N", help="end after N packets, such as 1M")
    parser.add_argument("-c", "--cluster", type=cluster_id, metavar="ID", help="the cluster, where no queue names it")
    parser.add_argument("--take-all", action="store_true", help="also a NIC with the default route or this SSH session")
    parser.add_argument("--xdp", choices=("auto", "driver", "generic"), default="auto", help="how a zc: NIC is opened")
    if worker:
        parser.add_argument("-g", "--core", type=count, metavar="N", help="run on processor N")
        parser.add_argument(
            "--idle",
            choices=("busy", "adaptive", "event"),
            default="adaptive",
            help="what to do while nothing comes",
        )
    parser.add_argument("--quiet", action="store_true", help="no live line")
    add_json(parser)
    parser.set_defaults(run=run)


def _rates(packets: float, octets: float, took: float) -> str:
    """``12.3M packets/s, 8.10 Gbit/s on the wire``."""
    took = max(took, 1e-9)
    bits = re.sub("([kMGT]?)$", r" \1bit/s", short(wire_bits(packets, octets) / took), count=1)
    return f"{short(packets / took)} packets/s, {bits} on the wire"


def _figures(packets: int, octets: int, took: float) -> dict[str, Any]:
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


def _dropped(drops: dict[str, int]) -> str:
    """``drops 0``, or ``drops full 12``."""
    return "drops " + (" ".join(f"{reason} {n:,}" for reason, n in drops.items() if n) or "0")


# ---- count --------------------------------------------------------------------------------------------------


def _configure_count(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Receive packets and count them. Bits are those on an Ethernet wire: preamble, FCS and gap included."
    )
    parser.epilog = examples(
        "ringbar count -i 99@0",
        "ringbar count -i zc:eth1 --seconds 10 --json",
        "ringbar count -i 99@1 --verify --packets 1M     check sequence numbers and checksums of 'ringbar send'",
    )
    parser.add_argument("-i", dest="input", metavar="DEV", required=True, help="where from: 99@0, zc:eth1")
    parser.add_argument(
        "--verify", action="store_true", help="check what 'ringbar send' sent: lost, reordered, corrupted"
    )
    parser.add_argument("--stream", type=count, default=0, metavar="N", help="with --verify: which sender (default 0)")
    _common(parser, _count, worker=False)


def _count(options: argparse.Namespace, out: Output) -> int:
    with running.opened([options.input], [], options) as job:
        rx = job.inputs[0]
        out.note(f"receiving from {job.describe(rx)}")
        if options.verify:
            return _verify(options, out, job, None, rx)
        meter = _Meter(out, job, rx)
        with running.interruptible(rx.stop):
            for burst in running.bursts(rx, options.packets, options.seconds, COUNT_BURST):
                burst.release()
                meter.tick()
        return meter.end()


class _Meter:
    """Counts what an end received: a live line, then the summary."""

    def __init__(self, out: Output, job: running.Job, rx: Any) -> None:
        self.out = out
        self.job = job
        self.rx = rx
        self.began = self.shown = time.monotonic()
        self.period = running.period(out)
        self.last = (0, 0)

    def figures(self) -> tuple[int, int]:
        """Packets and bytes so far."""
        stats = self.rx.stats()
        return int(stats["packets"]), int(stats["bytes"])

    def tick(self) -> None:
        """Draw the live line when it is time."""
        now = time.monotonic()
        if now - self.shown < self.period:
            return
        packets, octets = self.figures()
        line = _rates(packets - self.last[0], octets - self.last[1], now - self.shown)
        self.out.live.show(f"{line}; {packets:,} packets, {_dropped(self.job.drops(self.rx))}")
        self.last, self.shown = (packets, octets), now

    def end(self, **more: Any) -> int:
        """The summary."""
        took = time.monotonic() - self.began
        packets, octets = self.figures()
        drops = self.job.drops(self.rx)
        self.out.document({"device": self.rx.address, **_figures(packets, octets, took), "drops": drops, **more})
        self.out.say(
            f"{plural(packets, 'packet')} ({octets:,} bytes) in {took:.2f} s: {_rates(packets, octets, took)}; "
            f"{_dropped(drops)}"
        )
        return DONE


# ---- send ---------------------------------------------------------------------------------------------------


def _configure_send(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Generate Ethernet/IPv4/UDP packets with sequence numbers, times and checksums, for 'count --verify'.\n"
        "With -i the packets are expected back there, and verified."
    )
    parser.epilog = examples(
        "ringbar send -o 99@0 --packets 1M",
        "ringbar send -o zc:eth1 --rate 1M --size 1500 --flows 64",
        "ringbar send -o 99@0 -i 99@1 --window 256 --seconds 10     through a VM and back",
    )
    parser.add_argument("-o", dest="output", metavar="DEV", required=True, help="where to: 99@0, zc:eth1")
    parser.add_argument("-i", dest="input", metavar="DEV", help="where they come back: verify them")
    parser.add_argument("--size", type=size, default=0, metavar="BYTES", help="of a packet without FCS (default 74)")
    parser.add_argument(
        "--rate", type=rate, metavar="PPS", help="packets per second, such as 1M (default: all that goes)"
    )
    parser.add_argument("--flows", type=positive, default=1, metavar="N", help="UDP source ports (default 1)")
    parser.add_argument("--window", type=positive, metavar="N", help="with -i: most packets on their way at once")
    parser.add_argument(
        "--stream",
        type=count,
        metavar="N",
        help="tells this sender from others (default 0; with -i a random one, so that what an earlier one left on the "
        "way is not taken for this one's)",
    )
    _common(parser, _send, worker=True)


def _send(options: argparse.Namespace, out: Output) -> int:
    if options.window is not None and options.input is None:
        raise Usage("--window counts packets until they come back, and -i does not say where", cure="add -i DEV")
    if options.size and options.size < 74:
        raise Usage(f"a packet of {options.size} bytes has no room for its sequence number", cure="--size 74 or more")
    running.check_idle(options)
    inputs = [] if options.input is None else [options.input]
    with running.opened(inputs, [options.output], options) as job:
        rx = job.inputs[0] if job.inputs else None
        out.note(
            f"sending to {job.describe(job.outputs[0])}" + (f", expecting them at {job.describe(rx)}" if rx else "")
        )
        return _verify(options, out, job, job.outputs[0], rx)


def _verify(options: argparse.Namespace, out: Output, job: running.Job, tx: Any, rx: Any) -> int:
    """Run a flow until it ends; the summary. Exit status 1 when something was lost or damaged."""
    from ringbar.flow import Flow

    stream = options.stream
    if stream is None:
        stream = 0 if rx is None else random.getrandbits(32)
    flow = Flow(
        tx,
        rx,
        size=getattr(options, "size", 0) or LEAST_SIZE,
        flows=getattr(options, "flows", 1),
        stream=stream,
        packets=options.packets,
        pps=getattr(options, "rate", None),
        window=getattr(options, "window", None),
        core=getattr(options, "core", None),
        idle=getattr(options, "idle", "adaptive"),
    )
    stats = _watch(flow, out, options.seconds, options.packets if tx and rx else None, rx is not None)
    took = stats["seconds"]
    document: dict[str, Any] = {}
    faults = 0
    if tx is not None:
        document["sent"] = {"device": tx.address, **_figures(stats["sent"], stats["sent_bytes"], took)}
        document["sent"]["refused"] = stats["refused"]
        out.say(
            f"sent {plural(stats['sent'], 'packet')} in {took:.2f} s: "
            f"{_rates(stats['sent'], stats['sent_bytes'], took)}"
        )
        if stats["refused"] and rx is None:
            times = plural(stats["refused"], "time")
            out.say(f"{tx.address} had no room {times}: its receiver is slower, or not there")
    if rx is not None:
        document["received"] = {
            "device": rx.address,
            **_figures(stats["received"], stats["received_bytes"], took),
            "drops": job.drops(rx),
        }
        found = {name: stats[name] for name in ("lost", "reordered", "duplicated", "corrupted", "foreign")}
        if tx is not None:  # what is neither here nor overtaken may still come, unless it was waited for
            missing = max(0, stats["sent"] - stats["received"] + stats["duplicated"] - stats["lost"])
            if stats["stalled"]:
                found["lost"] += missing
            else:
                document["on_their_way"] = missing
        document["verify"] = {**found, "latency_ns": stats["latency_ns"]}
        faults = sum(found[name] for name in ("lost", "reordered", "duplicated", "corrupted"))
        out.say(
            f"received {plural(stats['received'], 'packet')} in {took:.2f} s: "
            f"{_rates(stats['received'], stats['received_bytes'], took)}; {_dropped(job.drops(rx))}"
        )
        out.say(", ".join(f"{name} {n:,}" for name, n in found.items()))
        if stats["latency_ns"]:
            names = ("least", "median", "99 %", "99.9 %", "most")
            shown = ", ".join(f"{n} {v / 1000:,.1f}" for n, v in zip(names, stats["latency_ns"].values()))
            out.say(f"latency in microseconds: {shown}")
    out.document(document)
    return FAILED if faults else DONE


def _watch(flow: Flow, out: Output, limit: float | None, least: int | None, receives: bool) -> dict[str, Any]:
    """Run ``flow`` with a live line until it ends, ``limit`` seconds have gone, or Ctrl-C.

    :param least: on a loop, so many are sent; when they are and no more come back for a while, it is over too.
    :param receives: packets are expected; the live line is about those.
    """
    period = running.period(out)
    stalled = False
    with flow:
        began = shown = moved = time.monotonic()
        last = seen = flow.stats()
        for _ in running.ticks(limit):
            now = time.monotonic()
            stats = flow.stats()
            if not stats["running"]:
                break
            if (stats["sent"], stats["received"]) != (seen["sent"], seen["received"]):
                seen, moved = stats, now
            elif least is not None and stats["sent"] >= least and now - moved >= STALL:
                stalled = True  # all was sent, and the rest does not come back
                break
            if now - shown >= period:
                which = "received" if receives else "sent"
                line = _rates(stats[which] - last[which], stats[which + "_bytes"] - last[which + "_bytes"], now - shown)
                text = f"{which} {line}"
                if which == "received":
                    text += f"; lost {stats['lost']:,}, corrupted {stats['corrupted']:,}"
                elif stats["refused"] > last["refused"]:
                    text += "; waiting for room"
                out.live.show(f"{text}; {stats[which]:,} packets")
                last, shown = stats, now
        flow.stop()
        stats = flow.stats()
    out.live.clear()
    stats.setdefault("seconds", time.monotonic() - began)
    stats["stalled"] = stalled
    return stats


# ---- bridge -------------------------------------------------------------------------------------------------


def _configure_bridge(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Move packets from one device to another, without a copy.\nWhat the output refuses is dropped and counted."
    )
    parser.epilog = examples(
        "ringbar bridge -i zc:eth1 -o 99@0",
        "ringbar bridge -i 99@0 -o 99@1                          in a VM: back to the host",
        "ringbar bridge -i zc:eth1 -o zc:eth2 --both             two NICs, both ways",
        "ringbar bridge -i zc:eth1 -o 99@0 -i 99@1 -o zc:eth1    two pairs",
    )
    parser.add_argument("-i", dest="inputs", metavar="DEV", action="append", required=True, help="from; may come again")
    parser.add_argument("-o", dest="outputs", metavar="DEV", action="append", required=True, help="to; one for each -i")
    parser.add_argument("--both", action="store_true", help="also from each -o to its -i, for NICs")
    _common(parser, _bridge, worker=True)


def _bridge(options: argparse.Namespace, out: Output) -> int:
    if len(options.inputs) != len(options.outputs):
        raise Usage(
            f"{plural(len(options.inputs), 'input')}, {plural(len(options.outputs), 'output')}: each -i needs its -o",
            cure="ringbar bridge -i FROM -o TO -i FROM -o TO",
        )
    running.check_idle(options)
    froms, tos = list(options.inputs), list(options.outputs)
    if options.both:
        for name in froms + tos:
            if isinstance(address.parse_device(name), address.QueueAddress):
                raise Usage(
                    f"{name} carries packets one way only, so --both is for NICs",
                    cure="name a second pair: -i FROM -o TO -i FROM -o TO",
                )
        froms, tos = froms + tos, tos + froms
    with running.opened(froms, tos, options) as job:
        for rx, tx in zip(job.inputs, job.outputs):
            out.note(f"{job.describe(rx)} → {job.describe(tx)}")
        return _run_bridge(options, out, job)


def _run_bridge(options: argparse.Namespace, out: Output, job: running.Job) -> int:
    from ringbar import Bridge

    bridge = Bridge(job.inputs, job.outputs, core=options.core, idle=options.idle, packets=options.packets)
    period = running.period(out)
    with bridge:
        began = shown = time.monotonic()
        last = bridge.stats()
        for _ in running.ticks(options.seconds):
            now = time.monotonic()
            stats = bridge.stats()
            if not stats["running"]:
                break
            if now - shown >= period:
                line = _rates(stats["packets"] - last["packets"], stats["bytes"] - last["bytes"], now - shown)
                out.live.show(f"{line}; {stats['packets']:,} packets, dropped {stats['dropped']:,}")
                last, shown = stats, now
        took = time.monotonic() - began
        bridge.stop()
        stats = bridge.stats()
    pairs = [f"{rx.address} → {tx.address}" for rx, tx in zip(job.inputs, job.outputs)]
    figures = _figures(stats["packets"], stats["bytes"], took)
    out.document({"pairs": pairs, **figures, "dropped": stats["dropped"]})
    out.say(
        f"{plural(stats['packets'], 'packet')} in {took:.2f} s: {_rates(stats['packets'], stats['bytes'], took)}; "
        f"dropped {stats['dropped']:,}"
    )
    return DONE


# ---- capture ------------------------------------------------------------------------------------------------


def _configure_capture(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write packets to a file, with times in nanoseconds: pcapng, or pcap where the name ends so."
    parser.epilog = examples(
        "ringbar capture -i 99@0 -w packets.pcapng --seconds 10",
        "ringbar capture -i zc:eth1 -w - | tcpdump -nr -",
        "ringbar capture --observe 99@0 -w seen.pcapng      without taking packets away",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-i", dest="input", metavar="DEV", help="take packets from there: 99@0, zc:eth1")
    source.add_argument("--observe", metavar="QUEUE", help="look at a queue that others use, and take nothing away")
    parser.add_argument("-w", dest="file", metavar="FILE|-", required=True, help="where to; - is standard output")
    parser.add_argument("--format", choices=("pcapng", "pcap"), help="(default: by the file's name, else pcapng)")
    parser.add_argument(
        "--snap", type=positive, default=None, metavar="BYTES", help="keep the first BYTES of each packet"
    )
    _common(parser, _capture, worker=False)


def _capture(options: argparse.Namespace, out: Output) -> int:
    from ringbar.cli import pcap

    if options.file == "-":
        if options.json:
            raise Usage("--json and the packets cannot both go to standard output", cure="-w FILE")
        if sys.stdout.isatty():
            raise Usage("packets are not for a terminal", cure="-w FILE, or pipe it: ... -w - | tcpdump -nr -")
    kind = options.format or ("pcap" if options.file.endswith(".pcap") else "pcapng")
    observing = options.observe is not None
    with _observed(options.observe) if observing else running.opened([options.input], [], options) as job:
        rx = job.inputs[0]
        with pcap.create(options.file, kind, str(rx.address), options.snap) as writer:
            doing = f"observing {options.observe}" if observing else f"receiving from {job.describe(rx)}"
            out.note(f"{doing}, writing {kind} to {options.file}")
            meter = _Meter(out, job, rx)
            try:
                with running.interruptible(rx.stop):
                    for burst in running.bursts(rx, options.packets, options.seconds, COUNT_BURST):
                        writer.write(burst)
                        if not len(burst):
                            writer.flush()
                        burst.release()
                        meter.tick()
            except BrokenPipeError:  # the reader has seen enough
                writer.forget()
        if options.file == "-":
            out.note(f"{plural(writer.packets, 'packet')} written")
            return DONE
        observed = {"observed": options.observe} if observing else {}
        return meter.end(file=options.file, format=kind, written=writer.packets, **observed)


@contextlib.contextmanager
def _observed(queue: str) -> Iterator[running.Job]:
    from ringbar import Cluster

    where = address.parse_queue(queue)
    with Cluster.attach(where.cluster) as cluster, cluster.observe(where.queue) as rx:
        yield running.Job(cluster, [rx], [])
