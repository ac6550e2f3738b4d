# SPDX-License-Identifier: Apache-2.0
"""The tool ``tap``: a queue as an ordinary network interface, for programs that know no ringbar."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import Any

from ringbar import address
from ringbar.cli import running
from ringbar.cli.common import Output, Usage, examples, plural
from ringbar.cli.live import figures
from ringbar.cli.options import add_common
from ringbar.cli.task import Task, run


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tap``."""
    parser.description = (
        "Make a network interface that receives the packets of a queue, with one copy, for tcpdump, Suricata and any\n"
        "other program. With --tx, what the kernel sends out of the interface goes to that queue; without, the kernel\n"
        "answers nothing that it sees there. The interface is gone when this command ends, also when it is killed."
    )
    parser.epilog = examples(
        "ringbar tap 99@0 --name ids0",
        "ringbar tap 99@0 --tx 99@1 --name vm0 --mac 02:00:00:00:00:01     both ways",
        "ringbar tap 99@0 --name ids0 --netns sensors                      in that network namespace",
    )
    parser.add_argument("queue", metavar="QUEUE", help="whose packets the interface receives")
    parser.add_argument("--tx", metavar="QUEUE", help="where what the interface sends goes")
    parser.add_argument("--name", metavar="IFNAME", required=True, dest="interface", help="of the interface")
    parser.add_argument("--mac", metavar="MAC", help="its address (default: a random one)")
    parser.add_argument("--netns", metavar="NAME|PID|FILE", help="the network namespace it is made in (default: this)")
    add_common(parser, _tap, worker=True, named=False)


def _namespace(text: str) -> str:
    """The file of a network namespace."""
    if "/" in text:
        return os.path.abspath(text)
    return f"/proc/{text}/ns/net" if text.isdigit() else f"/run/netns/{text}"


def _tap(options: argparse.Namespace, out: Output) -> int:
    running.check_idle(options)
    options.name = None if not options.background else options.interface
    queues = [str(address.parse_queue(text)) for text in (options.queue, options.tx) if text is not None]
    where = f"tap:{address.check_interface(options.interface)}"
    for word, value in (("--mac", options.mac), ("--netns", options.netns)):
        if value is not None and ("," in value or not value):
            raise Usage(f"{word} {value!r} cannot be", cure="ringbar tap --help")
    if options.mac is not None:
        where += f",mac={options.mac}"
    if options.netns is not None:
        where += f",netns={_namespace(options.netns)}"

    @contextlib.contextmanager
    def prepare(out: Output) -> Iterator[Task]:
        with contextlib.ExitStack() as stack:
            job = stack.enter_context(running.opened(queues[:1], queues[1:], options))
            tap = stack.enter_context(job.cluster.open_tap(where, bool(job.outputs)))
            sends = f" → {job.outputs[0].address}" if job.outputs else ""
            out.note(f"{job.inputs[0].address} → {options.interface}{sends}")
            yield Tap(job, options, tap)

    return run("tap", options, out, prepare)


class Tap(Task):
    """From a queue to an interface, and perhaps from there to another queue."""

    tool = "tap"

    def __init__(self, job: running.Job, options: argparse.Namespace, tap: Any) -> None:
        from ringbar import Bridge

        self.interface, self.tap, self.rx = options.interface, tap, job.inputs[0]
        self.tx = job.outputs[0] if job.outputs else None
        froms, tos = [self.rx], [tap]
        if self.tx is not None:
            froms, tos = [self.rx, tap], [tap, self.tx]
        bridge = Bridge(froms, tos, core=options.core, idle=options.idle, packets=options.packets)
        super().__init__(job, bridge)

    def settings(self) -> dict[str, Any]:
        """See the base."""
        sent = [] if self.tx is None else [[self.tx.address]]
        return {"in": [self.rx.address], "out": [[self.tap.address], *sent]}

    def aside(self, stats: dict[str, Any]) -> str:
        """See the base."""
        return f"dropped {stats['dropped']:,}"

    def document(self, stats: dict[str, Any], took: float) -> dict[str, Any]:
        """See the base."""
        return {
            "interface": self.interface,
            "queue": self.rx.address,
            "tx": None if self.tx is None else self.tx.address,
            **figures(stats["packets"], stats["bytes"], took),
            "dropped": stats["dropped"],
        }

    def summary(self, stats: dict[str, Any], took: float) -> list[str]:
        """See the base."""
        received = self.rx.stats()["packets"]
        sent = "" if self.tx is None else f", {plural(self.tx.stats()['packets'], 'packet')} from it"
        down = self.tap.stats()["kernel_dropped"]
        return [
            f"{plural(received, 'packet')} to {self.interface}{sent} in {took:.2f} s; dropped {stats['dropped']:,}"
            + (f", {down:,} while it was down" if down else "")
        ]
