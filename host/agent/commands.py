# SPDX-License-Identifier: Apache-2.0
"""The commands ``agent`` and ``events``."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from typing import Any

from ringbar.cli.common import DONE, Output, add_json, examples
from ringbar.errors import NotFound
from ringbar.host.agent import socket_path


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    """Declare the options of command ``name``."""
    {"agent": _configure_agent, "events": _configure_events}[name](parser)


def _configure_agent(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "The daemon: what the other commands do to this host and its VMs, as a service on a Unix socket, and VMs that\n"
        "keep what they were given. While it runs, these commands go through it. No packet does: it can be stopped,\n"
        "killed and upgraded while traffic flows."
    )
    parser.epilog = examples(
        "ringbar agent                       in the foreground, until Ctrl-C; logs to standard error",
        "systemctl enable --now ringbar-agent.socket",
        f"curl --unix-socket {socket_path()} http://localhost/openapi.json",
    )
    parser.set_defaults(run=_agent)


def _agent(options: argparse.Namespace, out: Output) -> int:
    from ringbar.host.agent import daemon

    daemon.run()
    return DONE


def _configure_events(parser: argparse.ArgumentParser) -> None:
    parser.description = "What happened: changes with who asked for them, and what befell VMs. Needs the agent."
    parser.epilog = examples(
        "ringbar events",
        "ringbar events --follow             each as it comes, until Ctrl-C",
        "ringbar events --follow --json      one JSON object a line",
    )
    parser.add_argument("--follow", action="store_true", help="go on with each as it comes")
    parser.add_argument("--since", type=int, default=None, metavar="N", help="only those after event number N")
    add_json(parser)
    parser.set_defaults(run=_events)


def _events(options: argparse.Namespace, out: Output) -> int:
    from ringbar.host.agent.client import AgentHost, reachable

    if not reachable(socket_path()):
        raise NotFound(
            f"no agent listens at {socket_path()}, and it is what remembers events",
            code="no-agent",
            cure="systemctl start ringbar-agent, or ringbar agent &",
        )
    found: list[dict[str, Any]] = []
    with contextlib.suppress(KeyboardInterrupt):
        for event in AgentHost(socket_path()).events(options.since, options.follow):
            if options.follow and out.json:
                print(json.dumps(event), flush=True)
            elif out.json:
                found.append(event)
            else:
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time_ns"] / 1e9))
                by = f"  ({event['by']})" if event["by"] else ""
                print(f"{event['sequence']:>6}  {when}  {event['kind']:<18} {event['text']}{by}", flush=True)
    if out.json and not options.follow:
        out.document({"events": found})
    return DONE
