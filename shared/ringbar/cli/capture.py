# SPDX-License-Identifier: Apache-2.0
"""The tool ``capture``: packets to a file or a pipe, written by the C core."""

from __future__ import annotations

import argparse
import contextlib
import errno
import glob
import os
import select
import stat
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ringbar import address
from ringbar.cli import running
from ringbar.cli.common import DONE, Output, Usage, examples, plural, positive, seconds, size
from ringbar.cli.live import dropped, figures, rates
from ringbar.cli.options import add_common, add_replay
from ringbar.cli.task import Task, run
from ringbar.errors import Error

if TYPE_CHECKING:
    from ringbar import Bridge


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``capture``."""
    parser.description = "Write packets to a file, with times in nanoseconds: pcapng, or pcap where the name ends so."
    parser.epilog = examples(
        "ringbar capture -i 99@0 -w packets.pcapng --seconds 10",
        "ringbar capture -i zc:eth1 -w - | tcpdump -nr -",
        "ringbar capture --observe 99@0 -w seen.pcapng      without taking packets away",
        "ringbar capture -i 99@0 -w day.pcapng --rotate-size 1G --snaplen 128",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-i", dest="input", metavar="DEV", help="take packets from there: 99@0, zc:eth1")
    source.add_argument("--observe", metavar="QUEUE", help="look at a queue that others use, and take nothing away")
    parser.add_argument("-w", dest="file", metavar="FILE|-", required=True, help="where to; - is standard output")
    parser.add_argument("--format", choices=("pcapng", "pcap"), help="(default: by the file's name, else pcapng)")
    parser.add_argument("--snaplen", type=positive, metavar="BYTES", help="keep the first BYTES of each packet")
    parser.add_argument(
        "--rotate-size",
        type=size,
        metavar="BYTES",
        help="begin the next file before one gets larger: FILE_00001_DATE-TIME.pcapng and so on",
    )
    parser.add_argument(
        "--rotate-seconds", type=seconds, metavar="S", help="begin the next file with the first packet after S seconds"
    )
    add_common(parser, _capture, worker=True)
    add_replay(parser)


def _capture(options: argparse.Namespace, out: Output) -> int:
    if options.file == "-":
        if options.json:
            raise Usage("--json and the packets cannot both go to standard output", cure="-w FILE")
        if options.background:
            raise Usage("standard output cannot follow into the background", cure="-w FILE")
        if sys.stdout.isatty():
            raise Usage("packets are not for a terminal", cure="-w FILE, or pipe it: ... -w - | tcpdump -nr -")
    elif not os.path.isabs(options.file):  # a tool in the background has another directory
        options.file = os.path.abspath(options.file) if options.background else options.file
    running.check_idle(options)

    @contextlib.contextmanager
    def prepare(out: Output) -> Iterator[Task]:
        observing = options.observe is not None
        with _observed(options) if observing else running.opened([options.input], [], options) as job:
            rx = job.inputs[0]
            with job.cluster.open_device(
                f"pcap:{options.file}",
                "tx",
                interface=str(rx.address),
                snaplen=options.snaplen,
                format=options.format,
                rotate_bytes=options.rotate_size,
                rotate_seconds=options.rotate_seconds,
            ) as tx:
                doing = f"observing {options.observe}" if observing else f"receiving from {job.describe(rx)}"
                out.note(f"{doing}, writing to {'standard output' if options.file == '-' else options.file}")
                yield Capture(job, options, out, tx)

    return run("capture", options, out, prepare)


class Capture(Task):
    """From one input to a capture file."""

    tool = "capture"

    def __init__(self, job: running.Job, options: argparse.Namespace, out: Output, tx: Any) -> None:
        self.options, self.out, self.tx, self.rx = options, out, tx, job.inputs[0]
        self.reader = _Reader() if options.file == "-" else None
        self.began = time.time()
        super().__init__(job, self._writer())

    def _writer(self) -> Bridge:
        from ringbar import Bridge

        task = self

        class Writer(Bridge):
            """A bridge whose last packets are written before it counts as stopped."""

            def stop(self) -> dict[str, Any]:
                """See the base.

                :raises Error: the file cannot be written. A reader that has seen enough is no error.
                """
                try:
                    stats = super().stop()
                    task.tx.flush()
                    return stats
                except Error as e:
                    if e.code == "reader-gone" or self.stats().get("error") == -errno.EPIPE:
                        return self.stats()
                    raise

        options = self.options
        return Writer(self.rx, self.tx, core=options.core, idle=options.idle, packets=options.packets)

    def settings(self) -> dict[str, Any]:
        """See the base."""
        return {"in": [self.rx.address], "out": [[self.tx.address]]}

    def over(self, stats: dict[str, Any]) -> bool:
        """See the base: whoever reads the packets is gone."""
        return self.reader is not None and self.reader.gone()

    def _drops(self, stats: dict[str, Any]) -> dict[str, int]:
        """Of the input, and those that the file or its reader was too slow for."""
        drops = dict(self.job.drops(self.rx))
        drops["full"] = drops.get("full", 0) + int(stats["dropped"])
        return drops

    def aside(self, stats: dict[str, Any]) -> str:
        """See the base."""
        return dropped(self._drops(stats))

    def document(self, stats: dict[str, Any], took: float) -> dict[str, Any]:
        """See the base."""
        options = self.options
        found = {
            "device": self.rx.address,
            **figures(stats["packets"], stats["bytes"], took),
            "written": stats["packets"] - stats["dropped"],
            "drops": self._drops(stats),
            "file": options.file,
            "format": options.format or ("pcap" if options.file.endswith(".pcap") else "pcapng"),
        }
        if options.rotate_size or options.rotate_seconds:
            found["files"] = _files(options.file, self.began)
        if options.observe is not None:
            found["observed"] = options.observe
        return found

    def summary(self, stats: dict[str, Any], took: float) -> list[str]:
        """See the base; with packets on standard output it goes to standard error."""
        line = (
            f"{plural(stats['packets'], 'packet')} ({stats['bytes']:,} bytes) in {took:.2f} s: "
            f"{rates(stats['packets'], stats['bytes'], took)}; {dropped(self._drops(stats))}"
        )
        if self.reader is None:
            return [line]
        self.out.note(line)
        return []

    def status(self, stats: dict[str, Any]) -> int:
        """See the base."""
        return DONE


def _files(file: str, since: float) -> list[str]:
    """Those that were begun, in order."""
    stem, suffix = os.path.splitext(file)
    pattern = f"{glob.escape(stem)}_[0-9][0-9][0-9][0-9][0-9]_*{glob.escape(suffix)}"
    return sorted(name for name in glob.glob(pattern) if os.stat(name).st_mtime >= since - 2)


class _Reader:
    """Whoever reads standard output: is it still there?"""

    def __init__(self) -> None:
        self._poll = select.poll()
        mode = os.fstat(sys.stdout.fileno()).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            self._poll.register(sys.stdout.fileno(), 0)

    def gone(self) -> bool:
        """No more than a look."""
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in self._poll.poll(0))


@contextlib.contextmanager
def _observed(options: argparse.Namespace) -> Iterator[running.Job]:
    from ringbar import Cluster

    where = address.parse_queue(options.observe)
    with Cluster.attach(where.cluster) as cluster, cluster.observe(where.queue) as rx:
        if options.filter is not None:
            rx.filter = options.filter
        job = running.Job(cluster, [rx], [])
        try:
            yield job
        finally:
            job.close()
