# SPDX-License-Identifier: Apache-2.0
"""The command ``worker``: tools that run in the background, or were given a name."""

from __future__ import annotations

import argparse
from typing import Any

from ringbar.cli import control
from ringbar.cli.common import DONE, Output, Usage, add_json, examples, plural, short, subcommands, table
from ringbar.cli.options import known_name
from ringbar.errors import Busy, Error, NotFound


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``worker``."""
    parser.epilog = examples(
        "ringbar worker list",
        "ringbar worker set balance-1 -o 99@0,99@1,99@2 --policy ip",
        "ringbar worker stop balance-1",
    )
    commands = subcommands(parser, "list|show|set|pause|resume|stop")
    _sub(commands, "list", "list the workers of this machine", _list, "ringbar worker list --json")
    for verb, summary, run, line in (
        ("show", "show what a worker was told to do and what it did", _show, "ringbar worker show balance-1"),
        ("set", "change a worker while it runs, losing nothing", _set, "ringbar worker set balance-1 --policy ip"),
        ("pause", "make a worker stand still: its inputs keep what comes", _pause, "ringbar worker pause balance-1"),
        ("resume", "let it go on", _pause, "ringbar worker resume balance-1"),
        ("stop", "end a worker; clean up after one that died", _stop, "ringbar worker stop balance-1"),
    ):
        sub = _sub(commands, verb, summary, run, line)
        sub.add_argument("name", metavar="NAME", type=known_name)
        if verb == "set":
            sub.add_argument(
                "-o", dest="outputs", metavar="DEVS", action="append", help="its outputs from now on, as at its start"
            )
            sub.add_argument("-m", "--policy", metavar="P", help="how packets are dealt out")
            sub.add_argument("--filter", metavar="EXPR", help="which packets of its inputs it takes; none: all")


def _sub(commands: Any, name: str, summary: str, run: Any, *lines: str) -> Any:
    parser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=examples(*lines)
    )
    add_json(parser)
    parser.set_defaults(run=run)
    return parser


def all_workers(ask: bool = True) -> list[dict[str, Any]]:
    """Every worker that has a name, as its own process tells it, or where that is gone its last counters.

    ``state`` is ``running``, ``paused``, ``dead``, or ``silent``: it lives and does not answer.

    :param ask: False: only what lies in shared memory, which takes no time.
    """
    from ringbar import workers

    names = control.names()
    records = {record["name"]: record for record in workers.list()}
    own = {name for name in records if name.rpartition(".")[0] in names}  # stages of a pipeline, shown with it
    if not ask:
        return [_recorded(name, False) for name in sorted(set(records) - own)]
    return [one(name) for name in sorted({*names, *records} - own)]


def one(name: str) -> dict[str, Any]:
    """One worker.

    :raises NotFound: there is none of that name.
    """
    silent = False
    try:
        answer: dict[str, Any] = control.ask(name, "show")["worker"]
        return answer
    except TimeoutError:
        silent = True
    except Error:
        pass
    try:
        return _recorded(name, silent)
    except NotFound:
        if name not in control.names():
            raise
        state = "silent" if silent else "dead"  # before it had begun
        start = {"name": name, "tool": "-", "state": state, "pid": "-", "packets": 0, "bytes": 0}
        return {**start, "settings": {}, "summary": {}}


def _recorded(name: str, silent: bool) -> dict[str, Any]:
    """What a worker left in shared memory, or a program's own worker that has no socket to ask."""
    from ringbar import workers

    record = workers.read(name)
    applications: dict[int, list[str]] = {}
    for port in record["outputs"]:
        applications.setdefault(port["group"], []).append(port["address"])
    stats = record["stats"]
    alive = "silent" if silent else "paused" if stats["paused"] else "running" if stats["running"] else "ended"
    return {
        "name": name,
        "tool": record["kind"],
        "pid": record["pid"],
        "since_ns": record["since_ns"],
        "state": alive if record["alive"] else "dead",
        "settings": {
            "in": [port["address"] for port in record["inputs"]],
            "out": [applications[group] for group in sorted(applications)],
            "policy": record["policy"],
        },
        "packets": stats["packets"],
        "bytes": stats["bytes"],
        "summary": {
            "inputs": record["inputs"],
            "outputs": record["outputs"],
            "dropped": stats["dropped"],
            "drops": stats["drops"],
            "busy": stats["busy"],
            "packets_per_burst": stats["packets_per_burst"],
        },
    }


def _list(options: argparse.Namespace, out: Output) -> int:
    found = all_workers()
    out.document({"workers": found})
    if not found:
        out.say("no workers; a tool becomes one with --background")
        return DONE
    out.say(listed(found))
    return DONE


def listed(found: list[dict[str, Any]]) -> str:
    """A table of workers."""
    rows = [
        (
            w["name"],
            w.get("tool", "-"),
            w["state"],
            w.get("pid", "-"),
            path_of(w.get("settings", {})),
            f"{w.get('packets', 0):,}",
        )
        for w in found
    ]
    return table(("WORKER", "TOOL", "STATE", "PID", "FROM → TO", "PACKETS"), rows)


def path_of(settings: dict[str, Any]) -> str:
    """``99@0 → 99@1,99@2 + 99@3``."""
    out = " + ".join(",".join(group) for group in settings.get("out", []))
    return " → ".join(part for part in (",".join(settings.get("in", [])), out) if part)


def _show(options: argparse.Namespace, out: Output) -> int:
    return show(options.name, out)


def show(name: str, out: Output) -> int:
    """Tell of one worker.

    :raises NotFound: there is none of that name.
    """
    worker = one(name)
    out.document({"worker": worker})
    for name in ("name", "tool", "state", "pid"):
        out.say(f"{name:<8}  {worker[name]}")
    out.say(f"{'path':<8}  {path_of(worker['settings']) or '-'}")
    for name, value in worker["settings"].items():
        if name not in ("in", "out") and value is not None:
            out.say(f"{name:<8}  {value}")
    out.say(f"{'packets':<8}  {worker['packets']:,} ({short(worker['bytes'])} bytes)")
    told = worker["summary"]
    if told.get("packets_per_burst"):
        share = f"{100 * told['busy']:.0f} % of its time in turns that moved something"
        out.say(f"{'busy':<8}  {share}, {told['packets_per_burst']:.1f} packets a burst")
    ports = [port for side in ("inputs", "outputs") for port in worker["summary"].get(side, [])]
    if ports:
        out.say()
        rows = [
            (
                port.get("device") or port["address"],
                port["state"],
                f"{port['packets']:,}",
                " ".join(f"{reason} {n:,}" for reason, n in port["drops"].items() if n) or "0",
            )
            for port in ports
        ]
        out.say(table(("DEVICE", "STATE", "PACKETS", "DROPS"), rows))
    return DONE


def _tell(options: argparse.Namespace, out: Output, answer: dict[str, Any]) -> int:
    changed = answer["changed"]
    out.document({"result": "changed" if changed else "unchanged", **answer})
    out.say(f"{options.name} {', '.join(changed)}" if changed else f"unchanged: {options.name} is so already")
    return DONE


def _ask(name: str, verb: str, **fields: Any) -> dict[str, Any]:
    """Tell a worker.

    :raises Error: it is dead, or of a program without a socket, or it refuses.
    """
    try:
        return control.ask(name, verb, **fields)
    except NotFound:
        found = one(name)
        if found["state"] == "dead":
            raise Error(f"worker {name} is dead", code="dead", cure=f"ringbar worker stop {name} cleans up") from None
        raise _no_socket(name, found["pid"]) from None


def _no_socket(name: str, pid: int) -> Busy:
    return Busy(
        f"{name} is a worker of process {pid}, which has no socket to be told by",
        code="no-socket",
        cure="change it in its program",
    )


def _pause(options: argparse.Namespace, out: Output) -> int:
    return _tell(options, out, _ask(options.name, options.subcommand))


def _set(options: argparse.Namespace, out: Output) -> int:
    from ringbar.cli.options import devices

    fields: dict[str, Any] = {}
    if options.outputs:
        fields["out"] = [devices([text]) for text in options.outputs]
    for name in ("policy", "filter"):
        if getattr(options, name) is not None:
            fields[name] = getattr(options, name)
    if not fields:
        raise Usage("nothing is to be changed", cure="-o DEVS, --policy P or --filter EXPR")
    return _tell(options, out, _ask(options.name, "set", **fields))


def dead_workers() -> list[str]:
    """Names of those that died."""
    return [found["name"] for found in all_workers() if found["state"] == "dead"]


def forget(name: str) -> bool:
    """Remove what a dead worker left; False: there was nothing.

    :raises Busy: it lives, and has no socket by which it could be stopped.
    """
    from ringbar import workers

    found = False
    stages = [record["name"] for record in workers.list() if record["name"].rpartition(".")[0] == name]
    for record in (name, *stages):
        try:
            workers.forget(record)
            found = True
        except NotFound:
            pass
        except Busy as e:
            raise _no_socket(record, one(record)["pid"]) from e
    return control.forget(name) or found


def _stop(options: argparse.Namespace, out: Output) -> int:
    name = options.name
    if not control.alive(name):
        found = forget(name)
        out.document({"result": "changed" if found else "unchanged", "changed": ["cleaned up"] if found else []})
        out.say(f"{name} was dead; what it left is removed" if found else f"unchanged: there is no worker {name}")
        return DONE
    answer = control.ask(name, "stop")
    out.document({"result": "changed", **answer})
    worker = answer["worker"]
    out.say(f"{name} stopped after {plural(worker['packets'], 'packet')}")
    return DONE
