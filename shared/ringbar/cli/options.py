# SPDX-License-Identifier: Apache-2.0
"""The options that all tools share: one word means one thing in every tool."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from ringbar import address
from ringbar.cli.common import Usage, add_json, cluster_id, count, plural, positive, rate, seconds

POLICIES = "rr, rr-burst, ip, 5tuple, gtp, gtp-session, gre, vxlan, vlan, input"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,30}")


def name(text: str) -> str:
    """A worker's name, as ``--name`` and ``ringbar worker`` take it."""
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"'{text}' is no name: up to 31 letters, digits, - and _")
    return text


def known_name(text: str) -> str:
    """A name that a worker may have, also one that its program chose, and a stage of a pipeline: ``W.1``."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,30}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no name: up to 31 letters, digits, -, _ and .")
    return text


def add_common(
    parser: argparse.ArgumentParser, run: Any, worker: bool, *, several: bool = False, named: bool = True
) -> None:
    """What every tool takes.

    :param worker: a C thread moves the packets, and it can go to the background.
    :param several: several threads do.
    :param named: False: there its name is another option's.
    """
    parser.add_argument("--seconds", type=seconds, metavar="S", help="end after S seconds")
    parser.add_argument("--packets", type=positive, metavar="N", help="end after N packets, such as 1M")
    parser.add_argument("-c", "--cluster", type=cluster_id, metavar="ID", help="the cluster, where no queue names it")
    parser.add_argument("--filter", metavar="EXPR", help="take only these packets (pcap syntax): 'udp and port 53'")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--steer", metavar="EXPR", help="of a zc: NIC take these only; the rest stays with the kernel")
    which.add_argument("--take-all", action="store_true", help="also a NIC with the default route or this SSH session")
    parser.add_argument("--promiscuous", action="store_true", help="of a NIC also what is sent to other machines")
    parser.add_argument("--xdp", choices=("auto", "driver", "generic"), default="auto", help="how a zc: NIC is opened")
    if worker:
        if several:
            parser.add_argument("-g", "--core", metavar="N[,N...]", help="run on these processors, one for each stage")
        else:
            parser.add_argument("-g", "--core", type=count, metavar="N", help="run on processor N")
        parser.add_argument(
            "--idle",
            choices=("busy", "adaptive", "event"),
            default="adaptive",
            help="what to do while nothing comes",
        )
        parser.add_argument("--background", action="store_true", help="go on in the background: see 'ringbar worker'")
        if named:
            parser.add_argument("--name", type=name, metavar="W", help="its name for 'ringbar worker'")
    parser.add_argument("--quiet", action="store_true", help="no live line")
    add_json(parser)
    parser.set_defaults(run=run)


def add_replay(parser: argparse.ArgumentParser) -> None:
    """How a ``pcap:`` input is played."""
    played = parser.add_argument_group("where an input is pcap:FILE")
    pace = played.add_mutually_exclusive_group()
    pace.add_argument("--speed", type=speed, metavar="X|max", help="times the recorded speed (default 1)")
    pace.add_argument("--pps", type=rate, metavar="N", help="so many packets per second instead, such as 1M")
    pace.add_argument("--gbps", type=rate, metavar="X", help="so many gigabits per second on the wire instead")
    played.add_argument("--loops", type=loops, default=1, metavar="N|forever", help="how often (default 1)")
    played.add_argument("--preload", action="store_true", help="read it into memory first")


def speed(text: str) -> float:
    """``2.5``; ``max`` is -1, as fast as it goes."""
    return -1.0 if text == "max" else rate(text)


def loops(text: str) -> int | None:
    """``3``; ``forever`` is None."""
    return None if text == "forever" else positive(text)


def add_inputs(parser: argparse.ArgumentParser, what: str = "DEVS") -> None:
    """``-i``, several of them."""
    parser.add_argument(
        "-i",
        dest="inputs",
        metavar=what,
        action="append",
        required=True,
        help="where from: 99@0, 99@0-3, zc:eth1; several with commas, or -i again",
    )


def add_outputs(parser: argparse.ArgumentParser, create: bool, applications: str) -> None:
    """``-o``, several of them, and with ``create`` ``-n``."""
    parser.add_argument("-o", dest="outputs", metavar="DEVS", action="append", default=[], help=applications)
    if create:
        parser.add_argument(
            "-n",
            dest="create",
            metavar="N[,N...]",
            type=numbers,
            help="with -c ID, instead of -o: make the cluster with so many queues for each application",
        )
        parser.add_argument("--slots", type=positive, metavar="N", help="of these queues (default 4096)")


def numbers(text: str) -> list[int]:
    """``2,1``."""
    found = [positive(part) for part in text.split(",")]
    if sum(found) > 256:
        raise argparse.ArgumentTypeError("at most 256 outputs")
    return found


def cores(text: str | None, threads: int) -> list[int | None]:
    """A processor for each thread.

    :raises Usage: not one for each.
    """
    if text is None:
        return [None] * threads
    try:
        found: list[int | None] = [count(part) for part in text.split(",")]
    except argparse.ArgumentTypeError as e:
        raise Usage(str(e), cure="-g 0,1") from None
    if len(found) != threads:
        raise Usage(f"{plural(len(found), 'processor')} for {plural(threads, 'stage')}", cure="one for each stage")
    return found


def devices(texts: Sequence[str]) -> list[str]:
    """All devices of several options, each by its canonical name, in the order written."""
    return [str(device) for text in texts for device in address.parse_devices(text)]


def groups(options: argparse.Namespace) -> list[list[str]]:
    """The outputs of each application: of each ``-o``, or of each number of ``-n``.

    :raises Usage: both or neither, or ``-n`` without ``-c``.
    """
    if options.create is None:
        if not options.outputs:
            raise Usage("no output is named", cure="-o DEV, or -c ID -n N makes a cluster with N queues")
        return [devices([text]) for text in options.outputs]
    if options.outputs:
        raise Usage("-o names outputs, and -n would make others", cure="one of the two")
    if options.cluster is None:
        raise Usage("-n makes queues, and -c does not say in which cluster", cure="add -c ID")
    first = 0
    found = []
    for number in options.create:
        found.append([f"{options.cluster}@{queue}" for queue in range(first, first + number)])
        first += number
    return found
