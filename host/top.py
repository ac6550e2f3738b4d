# SPDX-License-Identifier: Apache-2.0
"""``ringbar top``: workers, queues, NICs and VMs as they hang together, with rates and fill levels, in a terminal.

It reads the same state as ``ringbar status`` and the workers' counters in shared memory; no agent is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ringbar.cli.common import DONE, Output, Usage, add_json, examples, plural, seconds, short
from ringbar.errors import Error
from ringbar.host import model

INTERVAL = 1.0
SORTS = ("address", "rate", "fill", "drops")
BAR = 10


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``top``."""
    parser.description = (
        "Workers with what goes in and out of them, queues with fill levels, NICs and VMs, redrawn every second.\n"
        "Keys: q ends, arrows scroll, s sorts the queues by address, rate, fill level or drops, space stands still."
    )
    parser.epilog = examples(
        "ringbar top",
        "ringbar top --interval 5",
        "ringbar top --once            one frame, for a script or a mail",
        "ringbar top --json            the numbers behind it, once",
    )
    parser.add_argument("--interval", type=seconds, default=INTERVAL, metavar="S", help="seconds between two frames")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument("--sort", choices=SORTS, default="address", help="of the queues, at the beginning")
    add_json(parser)
    parser.set_defaults(run=_top)


@dataclass
class Snapshot:
    """What there was at one moment."""

    at: float
    status: model.Status
    workers: list[dict[str, Any]]


@dataclass
class View:
    """How it is drawn."""

    width: int = 80
    height: int = 0
    """Lines; 0: as many as there are."""
    sort: str = "address"
    scroll: int = 0
    colour: bool = False
    still: bool = False
    interval: float = INTERVAL
    plain: bool = False
    """Only ASCII."""


def look() -> Snapshot:
    """Read everything once."""
    from ringbar import workers
    from ringbar.host.service import Host

    found = []
    for record in workers.list():
        with contextlib.suppress(Error):  # ended meanwhile
            found.append(workers.read(record["name"]))
    return Snapshot(time.monotonic(), Host().status(None, sample=0), found)


# ---- a frame ------------------------------------------------------------------------------------------------


@dataclass
class _Rates:
    """Per second, between two looks."""

    queues: dict[str, float] = field(default_factory=dict)
    drops: dict[str, float] = field(default_factory=dict)
    ports: dict[tuple[str, str, str], float] = field(default_factory=dict)

    @classmethod
    def between(cls, before: Snapshot, now: Snapshot) -> _Rates:
        """What went by."""
        took = max(now.at - before.at, 1e-9)
        found = cls()
        earlier = {q.address: q for c in before.status.clusters for q in c.queues}
        for cluster in now.status.clusters:
            for q in cluster.queues:
                was = earlier.get(q.address, q)
                moved = max(q.packets - was.packets, q.received_packets - was.received_packets)
                found.queues[q.address] = max(moved, 0) / took
                found.drops[q.address] = max(sum(q.drops.values()) - sum(was.drops.values()), 0) / took
        ports = {key: port["packets"] for key, port in _ports(before)}
        for key, port in _ports(now):
            found.ports[key] = max(port["packets"] - ports.get(key, port["packets"]), 0) / took
        return found


def _ports(snapshot: Snapshot) -> Iterator[tuple[tuple[str, str, str], dict[str, Any]]]:
    for worker in snapshot.workers:
        for side in ("inputs", "outputs"):
            for port in worker[side]:
                yield (worker["name"], side, port["address"]), port


def frame(before: Snapshot, now: Snapshot, view: View) -> list[str]:
    """The lines of a frame, none wider than the view."""
    rates = _Rates.between(before, now)
    queues = {q.address: q for c in now.status.clusters for q in c.queues}
    body: list[str] = []
    drawn: set[str] = set()
    for worker in now.workers:
        body += _worker(worker, queues, rates, view)
        drawn |= {port["address"] for port in worker["outputs"]} if worker["alive"] else set()
    for status in now.status.clusters:
        body += _cluster(status, [q for q in status.queues if q.address not in drawn], rates, view)
    body += _nics(now, rates)
    body += _vms(now.status.vms)
    head = _head(now, rates, view)
    if view.height:
        room = max(view.height - len(head), 1)
        view.scroll = max(0, min(view.scroll, len(body) - room))
        more = len(body) - view.scroll - room
        body = body[view.scroll : view.scroll + room]
        if more > 0:
            body[-1] = f"... {plural(more + 1, 'line')} more: arrow keys"
    return [_fit(line, view) for line in head + body]


def _fit(line: str, view: View) -> str:
    line = line.rstrip()
    if view.plain:
        for sign, instead in (("→", ">"), ("█", "#"), ("·", ".")):
            line = line.replace(sign, instead)
    cut = line if len(line) <= view.width else line[: view.width - 1] + ("~" if view.plain else "…")
    if not view.colour:
        return cut
    if line[:1] not in (" ", ".", "") or " dead" in line[:40]:
        return f"\x1b[1m{cut}\x1b[0m"
    return f"\x1b[31m{cut}\x1b[0m" if "drops" in line else cut


def _head(now: Snapshot, rates: _Rates, view: View) -> list[str]:
    clusters = now.status.clusters
    alive = sum(1 for w in now.workers if w["alive"])
    dead = len(now.workers) - alive
    things = ", ".join(
        (
            plural(len(clusters), "cluster"),
            plural(sum(len(c.queues) for c in clusters), "queue"),
            plural(alive, "worker") + (f" (and {dead} dead)" if dead else ""),
            plural(len({v.vm for v in now.status.vms}), "VM"),
        )
    )
    through = short(sum(rates.queues.values()))
    lost = short(sum(rates.drops.values()))
    keys = "standing still: space goes on" if view.still else f"sort: {view.sort}   q ends"
    second = f"queues {through} packets/s, drops {lost}/s"
    return [f"ringbar top  {things}", f"{second}{keys:>{max(view.width - len(second), len(keys) + 2)}}", ""]


def _bar(part: float) -> str:
    """A fill level: ten places and a percentage."""
    part = min(max(part, 0.0), 1.0)
    full = round(part * BAR)
    if part > 0 and not full:
        full = 1
    return f"[{'█' * full}{'·' * (BAR - full)}]{part * 100:4.0f} %"


def _fill(q: model.Queue) -> float:
    return q.waiting / q.slots if q.slots else 0.0


def _lost(q: model.Queue, rates: _Rates) -> str:
    now = rates.drops.get(q.address, 0.0)
    reasons = " ".join(f"{reason} {short(n)}" for reason, n in q.drops.items() if n)
    return f"  drops {short(now)}/s ({reasons})" if reasons else ""


def _worker(worker: dict[str, Any], queues: dict[str, model.Queue], rates: _Rates, view: View) -> list[str]:
    """A worker, below it where its packets come from, and where they go."""
    stats = worker["stats"]
    state = "dead" if not worker["alive"] else "paused" if stats["paused"] else f"busy {stats['busy'] * 100:.0f} %"
    core = "" if worker["core"] is None else f" core {worker['core']}"
    policy = f" {worker['policy']}" if worker["policy"] else ""
    lines = [f"{worker['name']}  {worker['kind']}{policy}  {state}{core}  pid {worker['pid']}"]
    for port in worker["inputs"]:
        rate = short(rates.ports.get((worker["name"], "inputs", port["address"]), 0.0))
        lines.append(f"  {port['address']:<16} {rate:>7}/s → {_state(port)}")
    several = len({port["group"] for port in worker["outputs"]}) > 1
    for port in worker["outputs"]:
        rate = short(rates.ports.get((worker["name"], "outputs", port["address"]), 0.0))
        application = f" {port['group'] + 1}:" if several else ""
        line = f"      →{application} {port['address']:<12} {rate:>7}/s"
        q = queues.get(port["address"])
        if q is not None:
            line += f" {_bar(_fill(q))} → {q.consumer or 'nobody'}{_lost(q, rates)}"
        else:
            reasons = " ".join(f"{reason} {short(n)}" for reason, n in port["drops"].items() if n)
            line += f"  drops {reasons}" if reasons else ""
        lines.append(line + _state(port))
    return [*lines, ""]


def _state(port: dict[str, Any]) -> str:
    return "" if port["state"] == "open" else f" {port['state']}"


def _cluster(status: model.ClusterStatus, queues: list[model.Queue], rates: _Rates, view: View) -> list[str]:
    """A cluster, and its queues that no worker feeds."""
    c = status.cluster
    lent = sum(b.lent + b.devices for b in status.books)
    label = f" {c.label}" if c.label else ""
    level = "" if c.guest or not c.buffers else f"  lent {_bar(lent / c.buffers)}"
    lines = [f"cluster {c.id}{label}  {plural(c.buffers, 'buffer')}{level}  lives {c.lives}"]
    order = {
        "address": lambda q: (0.0, q.id),
        "rate": lambda q: (-rates.queues.get(q.address, 0.0), q.id),
        "fill": lambda q: (-_fill(q), q.id),
        "drops": lambda q: (-rates.drops.get(q.address, 0.0), q.id),
    }[view.sort]
    for q in sorted(queues, key=order):
        rate = short(rates.queues.get(q.address, 0.0))
        path = "" if c.guest else f" {q.producer or 'nobody'} → {q.consumer or 'nobody'}"
        flags = " paused" if q.paused else ""
        lines.append(f"  {q.address:<9} {rate:>7}/s {_bar(_fill(q))}{path}{flags}{_lost(q, rates)}")
    return [*lines, ""]


def _nics(now: Snapshot, rates: _Rates) -> list[str]:
    """What workers receive from and send to beside queues."""
    lines = []
    for (name, side, where), port in _ports(now):
        if where[:1].isdigit() and "@" in where:
            continue
        rate = short(rates.ports.get((name, side, where), 0.0))
        way = f"→ {name}" if side == "inputs" else f"← {name}"
        lines.append(f"  {where:<20} {rate:>7}/s  {port['packets']:>15,} packets  {way}{_state(port)}")
    for cluster in now.status.clusters:
        for nic in cluster.devices:
            who = f"{nic.process} (pid {nic.pid})" if nic.pid else "nobody (ended)"
            rule = f"  takes {nic.rule}" if nic.rule else ""
            lines.append(f"  {nic.name:<20} {nic.mode:<10} {who}{rule}")
    return ["NICs and files", *lines, ""] if lines else []


def _vms(vms: list[model.Attachment]) -> list[str]:
    lines = []
    for vm in vms:
        ends = [(b.direction, b.queue + ("" if b.open else " (not open)")) for b in vm.bindings]
        rx = ", ".join(queue for direction, queue in ends if direction == "rx")
        tx = ", ".join(queue for direction, queue in ends if direction == "tx")
        words = [f"receives {rx}" if rx else "", f"sends {tx}" if tx else "", f"pool {vm.pool}"]
        lines.append(f"  {vm.vm}  {vm.state}  {'  '.join(word for word in words if word)}")
    return ["VMs", *lines, ""] if lines else []


# ---- in the terminal ----------------------------------------------------------------------------------------


def _top(options: argparse.Namespace, out: Output) -> int:
    if options.interval < 0.1:
        raise Usage("frames come at most ten times a second", cure="--interval 0.1")
    view = View(sort=options.sort, interval=options.interval, plain=not _unicode())
    if out.json or options.once:
        before = look()
        time.sleep(min(options.interval, 1.0))
        now = look()
        if out.json:
            out.document({"status": now.status, "workers": now.workers})
            return DONE
        if sys.stdout.isatty():
            view.width = os.get_terminal_size().columns
            view.colour = True
        out.say("\n".join(frame(before, now, view)))
        return DONE
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Usage("top draws on a terminal", cure="ringbar top --once")
    view.colour = "NO_COLOR" not in os.environ
    _live(view)
    return DONE


def _unicode() -> bool:
    try:
        "→█·…".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _live(view: View) -> None:
    with _screen(), contextlib.suppress(KeyboardInterrupt):
        before = now = look()
        due = time.monotonic() + 0.3  # the first rates come soon
        while True:
            view.width, view.height = os.get_terminal_size()
            lines = frame(before, now, view)
            sys.stdout.write("\x1b[H" + "\x1b[K\r\n".join(lines) + "\x1b[J")
            sys.stdout.flush()
            key = _key(max(due - time.monotonic(), 0.0))
            if key in ("q", "Q", "\x03", "\x04"):
                return
            if key in ("s", "S"):
                view.sort = SORTS[(SORTS.index(view.sort) + 1) % len(SORTS)]
            elif key == " ":
                view.still = not view.still
            elif key in STEPS:
                view.scroll += STEPS[key] if abs(STEPS[key]) == 1 else (view.height - 4) * (STEPS[key] // 2)
            if time.monotonic() >= due:
                due = time.monotonic() + view.interval
                if not view.still:
                    before, now = now, look()


STEPS = {"\x1b[A": -1, "k": -1, "\x1b[B": 1, "j": 1, "\x1b[5~": -2, "\x1b[6~": 2}
"""Keys that scroll: by a line, by a page."""


def _key(wait: float) -> str:
    """A key, or "" when none came."""
    if not select.select([sys.stdin], [], [], wait)[0]:
        return ""
    return os.read(sys.stdin.fileno(), 16).decode(errors="replace")


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    """The terminal's other screen, with keys as they are pressed; as before in the end."""
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    try:
        tty.setcbreak(keyboard)
        sys.stdout.write("\x1b[?1049h\x1b[?25l\x1b[2J")
        yield
    finally:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
