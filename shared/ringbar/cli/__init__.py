# SPDX-License-Identifier: Apache-2.0
"""The command ``ringbar``.

Each command names the module that holds it; only that module is imported, so that the command line starts
fast and a guest needs nothing of the host's part. A module has ``configure(name, parser)``, which declares the
options and sets ``run``, a function of the parsed options and the :class:`~ringbar.cli.common.Output` that
returns the exit status.
"""

from __future__ import annotations

import argparse
import grp
import importlib
import os
import sys
from collections.abc import Sequence

from ringbar.cli.common import DONE, FAILED, Output, Parser, Usage, exit_status
from ringbar.errors import Error

_HOST = "ringbar.host.commands"
_LOOKING = "ringbar.host.looking"
_COUNTING = "ringbar.cli.counting"
_SENDING = "ringbar.cli.sending"
_MOVING = "ringbar.cli.moving"
_PIPELINE = "ringbar.cli.pipeline"
_CAPTURE = "ringbar.cli.capture"
_WORKER = "ringbar.cli.worker"
_BENCH = "ringbar.host.bench.commands"
_AGENT = "ringbar.host.agent.commands"
_TOPOLOGY = "ringbar.host.topology.commands"

COMMANDS: dict[str, tuple[str, str]] = {
    "cluster": (_HOST, "make, list, show and destroy clusters"),
    "queue": (_HOST, "make, pause, resume and destroy queues"),
    "attach": (_HOST, "give a running VM ends of queues"),
    "detach": (_HOST, "take them away again"),
    "guest-bundle": ("ringbar.host.bundle", "pack ringbar for VMs that have no compiler and no network"),
    "migrate": (_HOST, "move a running VM with its queues"),
    "status": (_LOOKING, "what is there now: clusters, queues, VMs, rates, drops"),
    "plan": (_TOPOLOGY, "what a topology file would change"),
    "apply": (_TOPOLOGY, "make it as a topology file says"),
    "events": (_AGENT, "what happened: changes, and what befell VMs"),
    "agent": (_AGENT, "the daemon that does these things, and keeps VMs attached"),
    "top": ("ringbar.host.top", "live view of workers, queues, NICs and VMs as they hang together"),
    "doctor": (_LOOKING, "what this host or guest can do, what is missing, and the command that mends it"),
    "count": (_COUNTING, "receive and count packets"),
    "send": (_SENDING, "generate packets with sequence numbers and checksums"),
    "bridge": (_MOVING, "move packets from one device to another"),
    "balance": (_MOVING, "share packets among several outputs"),
    "fanout": (_MOVING, "give every packet to several applications, without a copy"),
    "merge": (_MOVING, "bring several inputs together in order of time"),
    "delay": (_MOVING, "pass packets on a time later"),
    "replicate": (_MOVING, "send what comes from one device out of several"),
    "pipeline": (_PIPELINE, "pass packets through several stages, a thread each"),
    "capture": (_CAPTURE, "write packets to a pcapng or pcap file"),
    "tap": ("ringbar.cli.tap", "a queue as an ordinary network interface"),
    "worker": (_WORKER, "list, change, pause and stop tools that run in the background"),
    "bench": (_BENCH, "measure rings, VMs and Python on this machine"),
}

_GROUPS = (
    ("clusters and VMs, on the host", ("cluster", "queue", "attach", "detach", "migrate", "status", "top")),
    ("to bring ringbar into a VM, on the host", ("guest-bundle",)),
    ("all of it at once, on the host", ("plan", "apply", "agent", "events")),
    ("tools, on host and guest alike", ("count", "send", "bridge", "balance", "fanout", "merge", "delay", "replicate")),
    ("more tools, on host and guest alike", ("pipeline", "capture", "tap", "worker")),
    ("this machine", ("doctor", "bench")),
)


def _usage() -> str:
    lines = [
        "usage: ringbar COMMAND [OPTION...]",
        "",
        "Packets in shared buffers, passed on between programs and VMs as 16-byte descriptors.",
    ]
    for title, names in _GROUPS:
        lines += ["", f"{title}:"]
        lines += [f"  {name:<12} {COMMANDS[name][1]}" for name in names]
    lines += [
        "",
        "  -h, --help     this; 'ringbar COMMAND --help' has options and examples",
        "  -V, --version  the version",
        "",
        "examples:",
        "  ringbar cluster create 99 --queues 2               a cluster with queues 99@0 and 99@1",
        "  ringbar attach qmp:/run/vm1.qmp 99@0 --tx 99@1     the VM receives 99@0 and sends 99@1",
        "  ringbar count -i 99@1                              count what it sends",
        "",
        "exit status: 0 done, 1 failed or faults found, 2 usage, 3 plan --check differs, 4 not finished in --timeout",
    ]
    return "\n".join(lines)


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("ringbar")
    except metadata.PackageNotFoundError:  # a directory that was copied into a VM, or a checkout
        import ringbar

        try:
            return ringbar.__version__
        except ImportError:
            return "unknown (its C part is not built)"


def _parser(name: str) -> Parser:
    """The parser of command ``name``; imports its module."""
    module_name, summary = COMMANDS[name]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is not None and module_name.startswith(e.name):
            raise Error(
                f"'ringbar {name}' belongs to the host's part of ringbar, which is not installed here",
                code="not-installed",
                cure="pip install 'ringbar[host]'",
            ) from None
        raise
    parser = Parser(prog=f"ringbar {name}", description=summary[0].upper() + summary[1:] + ".")
    module.configure(name, parser)
    return parser


def read(parser: Parser, arguments: list[str]) -> argparse.Namespace:
    """Parse options. Positional ones may stand between the others: ``attach VM --rx 99@0 --tx 99@1 99@2``."""
    if any(isinstance(action, argparse._SubParsersAction) for action in parser._actions):
        return parser.parse_args(arguments)
    return parser.parse_intermixed_args(arguments)


def _group_cure() -> str:
    """For who may not open what the group may; as the core says it."""
    try:
        grp.getgrnam("ringbar")
    except KeyError:
        return (
            "run it as root (sudo); or make the group first (groupadd --system ringbar; usermod -aG ringbar USER), "
            "then the clusters anew"
        )
    return "join group ringbar: usermod -aG ringbar USER, and log in again"


def unexpected(error: BaseException) -> Error:
    """Any other exception as one sentence with, where known, its cure."""
    if isinstance(error, ImportError):
        missing = error.name or str(error)
        if "C part" in str(error):
            return Error(" ".join(str(error).split()), code="not-built", cure="make setup")
        if missing.startswith("ringbar"):
            return Error(
                f"this installation of ringbar is broken: {error}", code="not-installed", cure="install it anew"
            )
        return Error(
            f"the Python package '{missing}' is missing", code="not-installed", cure="pip install 'ringbar[host]'"
        )
    if isinstance(error, PermissionError):
        where = f" for {error.filename}" if error.filename else ""
        ours = str(error.filename).startswith(os.environ.get("RINGBAR_RUN") or "/run/ringbar")
        return Error(
            f"no permission{where}", code="no-permission", cure=_group_cure() if ours else "run it as root (sudo)"
        )
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return Error(f"{where}{error.strerror or error}", code="system")
    text = " ".join(str(error).split())
    return Error(
        f"internal error: {type(error).__name__}{': ' + text if text else ''}",
        code="internal",
        cure="set RINGBAR_DEBUG=1 to see where, and report it",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    :param argv: the arguments after the program's name; default ``sys.argv[1:]``.
    :returns: the exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Before anything is parsed: a command line that cannot be read must be told of in JSON too.
    out = Output(as_json="--json" in arguments)
    try:
        return _run(arguments, out)
    except SystemExit as e:  # argparse, after --help
        return e.code if isinstance(e.code, int) else FAILED
    except Error as e:
        out.error(e)
        return exit_status(e)
    except KeyboardInterrupt:
        out.error(Error("interrupted", code="interrupted"))
        return FAILED
    except BrokenPipeError:  # ringbar status | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except TimeoutError as e:
        out.error(Error(str(e) or "not finished in time", code="not-finished"))
        return exit_status(e)
    except Exception as e:
        if os.environ.get("RINGBAR_DEBUG"):
            raise
        out.error(unexpected(e))
        return FAILED


def _run(arguments: list[str], out: Output) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage(), file=sys.stdout if arguments else sys.stderr)
        return DONE if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"ringbar {_version()}")
        return DONE
    name = arguments[0]
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise Usage(
            f"there is no command '{name}'",
            cure=f"ringbar {near[0]} --help" if near else "ringbar --help lists them",
        )
    out.command = f"ringbar {name}"
    options = read(_parser(name), arguments[1:])
    out.json = bool(getattr(options, "json", False))
    out.quiet = out.live.quiet = bool(getattr(options, "quiet", False))
    status = options.run(options, out)
    sys.stdout.flush()
    return int(status)
