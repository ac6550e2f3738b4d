# SPDX-License-Identifier: Apache-2.0
"""The tool ``send``: packets with sequence numbers, or frames that are given, at a chosen rate."""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

from ringbar.cli import running
from ringbar.cli.common import Output, Usage, count, examples, positive, rate, size
from ringbar.cli.counting import Verified
from ringbar.cli.options import add_common
from ringbar.cli.task import Task, run
from ringbar.errors import Error

STALL = 2.0
"""Seconds without a packet after which what a loop has not brought back is lost."""
MOST_FRAMES = 64 << 20
"""Bytes of frames that are held in memory."""


def sizes(text: str) -> list[int] | str:
    """``74``, ``64,1500``, ``imix``."""
    return text if text == "imix" else [size(part) for part in text.split(",")]


def speed(text: str) -> tuple[str, float]:
    """``1M`` or ``1Mpps`` packets a second, ``2.5Gbit/s`` or ``2.5Gbps`` bits a second on the wire."""
    match = re.fullmatch(r"(.*?)(pps|bit/s|bps)?", text)
    assert match is not None
    return ("bps" if match[2] in ("bit/s", "bps") else "pps"), rate(match[1])


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``send``."""
    parser.description = (
        "Generate Ethernet/IP/UDP packets with sequence numbers, times and checksums, for 'count --verify'; or send\n"
        "frames that are given. With -i the packets are expected back there, and verified.\n"
        "Rates are those on an Ethernet wire: preamble, FCS and gap, 24 bytes a packet, count as bits."
    )
    parser.epilog = examples(
        "ringbar send -o 99@0 --packets 1M",
        "ringbar send -o zc:eth1 --rate 1M --size 1500 --flows 64",
        "ringbar send -o zc:eth1 --rate 2.5Gbit/s --size imix --src 10.0.0.0/24 --dport 80-89",
        "ringbar send -o 99@0 -i 99@1 --window 256 --seconds 10     through a VM and back",
        "ringbar send -o 99@0 --hex frames.txt --packets 100        a frame a line, in turn",
        "ringbar send -o 99@0 --pcap trace.pcap --rate 100k         the frames of a file, again and again",
    )
    add = parser.add_argument
    add("-o", dest="output", metavar="DEV", required=True, help="where to: 99@0, zc:eth1")
    add("-i", dest="input", metavar="DEV", help="where they come back: verify them")
    add(
        "--size",
        type=sizes,
        default=[0],
        metavar="BYTES",
        help="of a packet without FCS (default: the least, 74); several with commas, in turn; imix: 7 of the least, "
        "4 of 590, 1 of 1514",
    )
    add("--rate", type=speed, metavar="RATE", help="1M packets a second, or 2.5Gbit/s (default: all that goes)")
    add("--flows", type=positive, metavar="N", help="so many of the combinations below (default: all)")
    add("--src", metavar="IP", help="from: an address, 10.0.0.1-10.0.0.9, 10.0.0.0/24; IPv6 too")
    add("--dst", metavar="IP", help="to, likewise")
    add("--sport", metavar="PORT", help="UDP source port or range 1024-2047 (default: as many as --flows needs)")
    add("--dport", metavar="PORT", help="UDP destination port or range (default 5000)")
    add("--vlan", type=count, metavar="ID", help="the packets carry this tag")
    add("--src-mac", metavar="MAC", help="(default 02:00:00:00:00:01)")
    add("--dst-mac", metavar="MAC", help="(default 02:00:00:00:00:02)")
    add("--window", type=positive, metavar="N", help="with -i: most packets on their way at once")
    add(
        "--stream",
        type=count,
        metavar="N",
        help="tells this sender from others (default 0; with -i a random one, so that what an earlier one left on the "
        "way is not taken for this one's)",
    )
    add("--hex", metavar="FILE|HEX", help="send these frames: a line of hexadecimal digits each; - is standard input")
    add("--pcap", metavar="FILE", help="send the frames of a capture file, in turn, again and again; once: --packets")
    add_common(parser, _send, worker=True)


OWN = ("src", "dst", "sport", "dport", "vlan", "src_mac", "dst_mac", "flows", "stream", "input", "window")
"""Options of packets that are made here."""


def _send(options: argparse.Namespace, out: Output) -> int:
    if options.window is not None and options.input is None:
        raise Usage("--window counts packets until they come back, and -i does not say where", cure="add -i DEV")
    given = [word for word in ("hex", "pcap") if getattr(options, word) is not None]
    if len(given) == 2:
        raise Usage("--hex and --pcap both say what to send", cure="one of the two")
    if given:
        for word in (*OWN, "size"):
            if getattr(options, word) not in (None, [0]):
                shown = "-i" if word == "input" else f"--{word.replace('_', '-')}"
                raise Usage(f"{shown} is of packets made here, and --{given[0]} sends others", cure=f"no {shown}")
    running.check_idle(options)
    settings = _settings(options)
    frames = _hex(options.hex) if options.hex is not None else _pcap(options.pcap) if options.pcap is not None else []
    if frames:
        settings = {"frames": frames, **{k: v for k, v in settings.items() if k in ("pps", "bps")}}

    @contextlib.contextmanager
    def prepare(out: Output) -> Iterator[Task]:
        inputs = [] if options.input is None else [options.input]
        with running.opened(inputs, [options.output], options) as job:
            rx = job.inputs[0] if job.inputs else None
            expecting = f", expecting them at {job.describe(rx)}" if rx else ""
            out.note(f"sending to {job.describe(job.outputs[0])}{expecting}")
            yield Sending(job, options, job.outputs[0], rx, **settings)

    return run("send", options, out, prepare)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """For :class:`ringbar.flow.Flow`; wrong ones are refused before anything is opened.

    :raises Usage: what is wrong.
    """
    from ringbar import flow

    six = any(text is not None and ":" in text for text in (options.src, options.dst))
    least = flow.least_size(six, options.vlan is not None)
    found: list[int] = flow.imix(least) if options.size == "imix" else options.size
    small = [n for n in found if 0 < n < least]
    if small:
        raise Usage(
            f"a packet of {small[0]} bytes has no room for its sequence number", cure=f"--size {least} or more"
        )
    settings: dict[str, Any] = {
        "size": 0 if found == [0] else found,
        "flows": options.flows,
        "window": options.window,
        "vlan": options.vlan,
        "src_ip": options.src,
        "dst_ip": options.dst,
        "src_mac": options.src_mac,
        "dst_mac": options.dst_mac,
        "src_port": options.sport,
        "port": options.dport or 5000,
    }
    if options.rate is not None:
        settings[options.rate[0]] = options.rate[1]
    try:
        flow.check(**settings)
    except Error as e:
        raise Usage(e.message, cure=e.cure) from None
    stream = options.stream
    if stream is None:
        stream = 0 if options.input is None else random.getrandbits(32)
    return {**settings, "stream": stream}


def _hex(text: str) -> list[bytes]:
    """Frames as hexadecimal digits: given, or a line each of a file; blanks and colons between them do not count."""
    if text == "-":
        lines = sys.stdin.read(2 * MOST_FRAMES).splitlines()
    elif re.fullmatch(r"[0-9a-fA-F: ]+", text):
        lines = [text]
    else:
        try:
            with open(text, encoding="ascii", errors="replace") as file:
                lines = file.read(2 * MOST_FRAMES).splitlines()
        except OSError as e:
            why = (e.strerror or str(e)).lower()
            raise Usage(f"{text} cannot be read: {why}", cure="--hex FILE, HEX or -") from None
    found: list[bytes] = []
    for number, line in enumerate(lines, 1):
        digits = re.sub(r"[\s:]", "", line.partition("#")[0])
        if not digits:
            continue
        try:
            frame = bytes.fromhex(digits)
        except ValueError:
            raise Usage(
                f"line {number} of the frames is not hexadecimal: {line.strip()[:40]!r}",
                cure="two digits a byte, a frame a line",
            ) from None
        if not 14 <= len(frame) <= 32767:
            raise Usage(f"frame {len(found) + 1} has {len(frame)} bytes", cure="an Ethernet header is 14 bytes")
        found.append(frame)
    if not found:
        raise Usage("there is no frame to send", cure="--hex with a line of hexadecimal digits for each")
    return found


def _pcap(path: str) -> list[bytes]:
    """The frames of a capture file, in memory."""
    from ringbar import Cluster
    from ringbar.cli.running import own_cluster

    found: list[bytes] = []
    octets = 0
    cluster: Cluster = own_cluster()
    with cluster, cluster.open_device(f"pcap:{path}", "rx", speed=-1) as rx:
        for burst in rx:
            for i in range(len(burst)):
                found.append(burst.copy(i))
                octets += len(found[-1])
            if octets > MOST_FRAMES:
                raise Error(
                    f"{path} has more than {MOST_FRAMES >> 20} MiB of frames",
                    code="too-long",
                    cure=f"ringbar bridge -i pcap:{path} -o DEV sends files of any length",
                )
    frames = [frame for frame in found if len(frame) >= 14]
    if not frames:
        raise Error(f"{path} has no frame to send", code="no-frames")
    return frames


class Sending(Verified):
    """``send``: over, too, when a loop does not bring back what was sent."""

    def __init__(self, job: running.Job, options: argparse.Namespace, tx: Any, rx: Any, **settings: Any) -> None:
        super().__init__(job, options, tx, rx, **settings)
        self._loop = rx is not None
        self._least = options.packets if self._loop else None
        self._seen = (-1, -1)
        self._moved = time.monotonic()

    def settings(self) -> dict[str, Any]:
        """See the base."""
        rates = {name: self.asked[name] for name in ("pps", "bps") if self.asked.get(name)}
        return {**super().settings(), **rates}

    def document(self, stats: dict[str, Any], took: float) -> dict[str, Any]:
        """See the base; with the rate that was asked for."""
        document = super().document(stats, took)
        for name in ("pps", "bps"):
            if self.asked.get(name):
                document["sent"][f"asked_{name}"] = self.asked[name]
        return document

    def finish(self) -> float:
        """See the base; what is on its way is not lost because the time is over."""
        if not self._loop or self.stalled or not self.worker.running:
            return 0.0
        self.worker.finish()
        return STALL

    def over(self, stats: dict[str, Any]) -> bool:
        """See the base."""
        now = time.monotonic()
        if (stats["sent"], stats["received"]) != self._seen:
            self._seen, self._moved = (stats["sent"], stats["received"]), now
        elif self._least is not None and stats["sent"] >= self._least and now - self._moved >= STALL:
            self.stalled = True  # all was sent, and the rest does not come back
        return self.stalled
