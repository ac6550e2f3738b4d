# SPDX-License-Identifier: Apache-2.0
"""The tool ``count``: receive packets and count them, or verify what ``send`` sent."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from ringbar.cli import running
from ringbar.cli.common import DONE, FAILED, Output, Usage, count, examples, plural
from ringbar.cli.live import dropped, figures, rates
from ringbar.cli.options import add_common, add_replay
from ringbar.cli.task import Task, run

FAULTS = ("lost", "reordered", "duplicated", "corrupted")
FOUND = (*FAULTS, "late", "foreign")
BURST = 256
"""Packets taken at once by a thread that passes none on."""


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``count``."""
    parser.description = (
        "Receive packets and count them. Bits are those on an Ethernet wire: preamble, FCS and gap included."
    )
    parser.epilog = examples(
        "ringbar count -i 99@0",
        "ringbar count -i zc:eth1 --seconds 10 --json",
        "ringbar count -i 99@1 --verify --packets 1M     check sequence numbers and checksums of 'ringbar send'",
        "ringbar count -i 99@2 --verify --partial        behind a balancer",
        "ringbar count -i 99@0 --background --name c0    see it with: ringbar worker show c0",
    )
    parser.add_argument("-i", dest="input", metavar="DEV", required=True, help="where from: 99@0, zc:eth1")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check what 'ringbar send' sent: lost, out of order, twice, damaged; latency",
    )
    parser.add_argument("--stream", type=count, metavar="N", help="with --verify: which sender (default 0)")
    parser.add_argument(
        "--partial", action="store_true", help="with --verify: others get the rest, so gaps are no losses"
    )
    add_common(parser, _count, worker=True)
    add_replay(parser)


def _count(options: argparse.Namespace, out: Output) -> int:
    for given, word in ((options.partial, "--partial"), (options.stream is not None, "--stream")):
        if given and not options.verify:
            raise Usage(f"{word} says what to verify, and --verify is missing", cure="add --verify")
    running.check_idle(options)

    @contextlib.contextmanager
    def prepare(out: Output) -> Iterator[Task]:
        with running.opened([options.input], [], options) as job:
            rx = job.inputs[0]
            out.note(f"receiving from {job.describe(rx)}")
            yield Verified(job, options, None, rx) if options.verify else Counted(job, options, rx)

    return run("count", options, out, prepare)


class Counted(Task):
    """``count``."""

    tool = "count"

    def __init__(self, job: running.Job, options: argparse.Namespace, rx: Any) -> None:
        from ringbar.flow import Flow

        flow = Flow(
            None,
            rx,
            verify=False,
            packets=options.packets,
            core=options.core,
            idle=options.idle,
            burst=BURST,
            name=options.name,
        )
        super().__init__(job, flow)
        self.rx = rx

    def settings(self) -> dict[str, Any]:
        """See the base."""
        return {"in": [self.rx.address], "out": []}

    def totals(self, stats: dict[str, Any]) -> tuple[int, int]:
        """See the base."""
        return stats["received"], stats["received_bytes"]

    def aside(self, stats: dict[str, Any]) -> str:
        """See the base."""
        return dropped(self.job.drops(self.rx))

    def document(self, stats: dict[str, Any], took: float) -> dict[str, Any]:
        """See the base."""
        packets, octets = self.totals(stats)
        return {"device": self.rx.address, **figures(packets, octets, took), "drops": self.job.drops(self.rx)}

    def summary(self, stats: dict[str, Any], took: float) -> list[str]:
        """See the base."""
        packets, octets = self.totals(stats)
        return [
            f"{plural(packets, 'packet')} ({octets:,} bytes) in {took:.2f} s: {rates(packets, octets, took)}; "
            f"{dropped(self.job.drops(self.rx))}"
        ]


class Verified(Task):
    """``count --verify`` and ``send``: sequence numbers at one end or both.

    :ivar tx: where packets are sent; None: they are not.
    :ivar rx: where they are verified; None: they are not.
    """

    def __init__(self, job: running.Job, options: argparse.Namespace, tx: Any, rx: Any, **settings: Any) -> None:
        from ringbar.flow import Flow

        self.tool = "count" if tx is None else "send"
        self.partial = bool(getattr(options, "partial", False))
        self.stalled = False
        self.stream = settings.pop("stream", options.stream or 0)
        flow = Flow(
            tx,
            rx,
            stream=self.stream,
            packets=options.packets,
            core=options.core,
            idle=options.idle,
            name=options.name,
            **settings,
        )
        super().__init__(job, flow)
        self.tx, self.rx, self.asked = tx, rx, settings

    def settings(self) -> dict[str, Any]:
        """See the base."""
        return {
            "in": [] if self.rx is None else [self.rx.address],
            "out": [] if self.tx is None else [[self.tx.address]],
            "stream": self.stream,
        }

    def totals(self, stats: dict[str, Any]) -> tuple[int, int]:
        """See the base: of what is received, where something is."""
        which = "sent" if self.rx is None else "received"
        return stats[which], stats[which + "_bytes"]

    def _faults(self, stats: dict[str, Any]) -> dict[str, int]:
        found = {name: stats[name] for name in FOUND}
        if self.tx is not None and self.stalled:
            found["lost"] += self._missing(stats)
        if self.partial:
            del found["lost"]
        return found

    def _missing(self, stats: dict[str, Any]) -> int:
        """What is neither here nor overtaken, and may still come."""
        return max(0, int(stats["sent"] - stats["received"] + stats["duplicated"] + stats["late"] - stats["lost"]))

    def aside(self, stats: dict[str, Any]) -> str:
        """See the base."""
        if self.rx is None:
            return f"no room {plural(stats['refused'], 'time')}" if stats["refused"] else "room for all"
        return ", ".join(f"{name} {n:,}" for name, n in self._faults(stats).items() if n or name == "lost")

    def document(self, stats: dict[str, Any], took: float) -> dict[str, Any]:
        """See the base."""
        took = stats["seconds"]
        document: dict[str, Any] = {}
        if self.tx is not None:
            document["sent"] = {
                "device": self.tx.address,
                **figures(stats["sent"], stats["sent_bytes"], took),
                "refused": stats["refused"],
            }
        if self.rx is not None:
            document["received"] = {
                "device": self.rx.address,
                **figures(stats["received"], stats["received_bytes"], took),
                "drops": self.job.drops(self.rx),
            }
            if self.tx is not None and not self.stalled:
                document["on_their_way"] = self._missing(stats)
            document["verify"] = {**self._faults(stats), "latency_ns": stats["latency_ns"]}
        return document

    def summary(self, stats: dict[str, Any], took: float) -> list[str]:
        """See the base."""
        took = stats["seconds"]
        lines = []
        if self.tx is not None:
            lines.append(
                f"sent {plural(stats['sent'], 'packet')} in {took:.2f} s: "
                f"{rates(stats['sent'], stats['sent_bytes'], took)}"
            )
            if stats["refused"] and self.rx is None:
                lines.append(
                    f"{self.tx.address} had no room {plural(stats['refused'], 'time')}: "
                    "its receiver is slower, or not there"
                )
        if self.rx is not None:
            lines.append(
                f"received {plural(stats['received'], 'packet')} in {took:.2f} s: "
                f"{rates(stats['received'], stats['received_bytes'], took)}; {dropped(self.job.drops(self.rx))}"
            )
            lines.append(", ".join(f"{name} {n:,}" for name, n in self._faults(stats).items()))
            if stats["latency_ns"]:
                names = ("least", "median", "99 %", "99.9 %", "most")
                shown = ", ".join(f"{n} {v / 1000:,.1f}" for n, v in zip(names, stats["latency_ns"].values()))
                lines.append(f"latency in microseconds: {shown}")
        return lines

    def status(self, stats: dict[str, Any]) -> int:
        """See the base: 1 when something was lost or damaged."""
        found = self._faults(stats)
        return FAILED if self.rx is not None and any(found.get(name) for name in FAULTS) else DONE
