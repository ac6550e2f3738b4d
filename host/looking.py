# SPDX-License-Identifier: Apache-2.0
"""The commands that look: ``status`` and ``doctor``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ringbar.cli import worker
from ringbar.cli.common import DONE, FAILED, Output, add_connect, add_json, examples, plain, seconds, short, table
from ringbar.host.commands import service, short_queues

if TYPE_CHECKING:
    from ringbar.host import model

SAMPLE = 0.05
"""Seconds over which ``status`` takes rates."""


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    """Declare the options of command ``name``."""
    {"status": _configure_status, "doctor": _configure_doctor}[name](parser)


# ---- status -------------------------------------------------------------------------------------------------


def _configure_status(parser: argparse.ArgumentParser) -> None:
    parser.description = "What is there now: clusters, queues with who is at each end, VMs, rates, drops."
    parser.epilog = examples(
        "ringbar status",
        "ringbar status 99              one cluster, with its books: who holds which buffers",
        "ringbar status 99@0 --json",
        "ringbar status ids1            one VM",
    )
    parser.add_argument("target", metavar="CLUSTER|QUEUE|VM|WORKER", nargs="?", help="only this")
    parser.add_argument(
        "--sample",
        type=seconds,
        default=SAMPLE,
        metavar="S",
        help=f"take rates over S seconds (default {SAMPLE}); 0: none",
    )
    add_json(parser)
    parser.set_defaults(run=_status)


def _status(options: argparse.Namespace, out: Output) -> int:
    if options.target is not None and any(w["name"] == options.target for w in worker.all_workers(ask=False)):
        return worker.show(options.target, out)
    with out.progress() as progress:
        now = service().status(options.target, sample=options.sample, progress=progress)
    out.document(now)
    if out.json:
        return DONE
    for note in now.notes:
        out.say(note)
    if not now.clusters:
        out.say("no clusters; ringbar cluster create 99 --queues 1 makes one")
        out.say("(to give a VM one of its host's: on the host, ringbar attach VM 99@0)")
    blocks = []
    if now.clusters:
        blocks.append(_status_clusters(now))
    guest = any(c.cluster.guest for c in now.clusters)
    queues = [q for c in now.clusters for q in c.queues]
    if queues:
        blocks.append(_status_queues(queues, guest))
    if guest:
        blocks.append("who is at the ends, and what they hold, is known to the host: ringbar status there")
    devices = [d for c in now.clusters for d in c.devices]
    if devices:
        blocks.append(_status_devices(devices))
    if now.vms:
        blocks.append(_status_vms(now.vms))
    if options.target is None:
        workers = worker.all_workers(ask=False)
        blocks += [worker.listed(workers)] if workers else []
    else:
        blocks += [_status_books(c) for c in now.clusters if c.books]
    out.say("\n\n".join(blocks)) if blocks else None
    return DONE


def _status_clusters(now: model.Status) -> str:
    rows = []
    for status in now.clusters:
        c = status.cluster
        lent = sum(b.lent for b in status.books)
        rows.append(
            (
                c.id,
                c.label or "-",
                c.lives,
                f"{c.buffers:,}",
                "-" if c.guest else f"{lent:,}",
                c.buffer_size,
                c.pages or "-",
                c.queues,
            )
        )
    return table(("CLUSTER", "LABEL", "LIVES", "BUFFERS", "LENT", "SIZE", "PAGES", "QUEUES"), rows)


def _status_queues(queues: list[model.Queue], guest: bool) -> str:
    """The table of queues; a guest cannot see who is at their ends."""
    rows = []
    for q in queues:
        unseen = guest and not q.packets  # a guest's programs count what they send
        drops = " ".join(f"{reason} {n:,}" for reason, n in q.drops.items() if n) or "0"
        flags = [word for word, on in (("paused", q.paused), ("direct", q.direct), ("filtered", q.filter)) if on]
        if q.feeds:
            flags.append(f"feeds {q.feeds}")
        if q.stalled:
            flags.append(f"waits for process {q.server_pid}" if q.server_pid else "waits for a server")
        if q.quarantined:
            flags.append(f"{q.quarantined} quarantined")
        if q.foreign:
            flags.append(f"{q.foreign} foreign refused")
        rows.append(
            (
                q.address,
                "-" if guest else f"{q.producer or 'nobody'} → {q.consumer or 'nobody'}",
                "-" if unseen else f"{max(q.packets, q.received_packets):,}",
                "-" if q.pps is None or unseen else short(q.pps),
                f"{q.waiting:,}",
                "-" if guest else f"{q.lent:,}/{q.credit:,}",
                "-" if guest else f"{q.held:,}",
                drops,
                ", ".join(flags),
            )
        )
    return table(("QUEUE", "FROM → TO", "PACKETS", "PKT/S", "WAITING", "LENT", "HELD", "DROPS", ""), rows)


def _status_devices(devices: list[model.Device]) -> str:
    rows = [
        (
            f"  {d.name}" if d.fed_by else d.name,
            f"{d.process or 'a program'} (pid {d.pid})" if d.pid else "nobody (ended)",
            f"{d.mode} by {d.fed_by}" if d.fed_by else d.mode,
            d.clock,
            d.rule or "-",
        )
        for d in devices
    ]
    return table(("DEVICE", "OF", "MODE", "TIMESTAMPS", "TAKES"), rows)


def _status_vms(vms: list[model.Attachment]) -> str:
    rows = []
    for vm in vms:
        rx = short_queues([b.queue for b in vm.bindings if b.direction == "rx"]) or "-"
        tx = short_queues([b.queue for b in vm.bindings if b.direction == "tx"]) or "-"
        waits = "by interrupts" if vm.interrupts else f"polls: {vm.polls}" if vm.polls else "-"
        rows.append((vm.vm, vm.cluster, vm.state, rx, tx, vm.where or "-", vm.sees, waits))
    return table(("VM", "CLUSTER", "STATE", "RECEIVES", "SENDS", "AT", "SEES", "WAITS"), rows)


def _status_books(status: model.ClusterStatus) -> str:
    rows = [
        (
            f"{b.name or 'a program'} (pid {b.pid})" if b.pid else "nobody (ended)",
            f"{b.home:,}",
            f"{b.free:,}",
            f"{b.lent:,}",
            f"{b.devices:,}",
            f"{b.quiescing:,}",
            f"{b.shared:,}",
            f"{b.quarantined:,}",
        )
        for b in status.books
    ]
    header = (
        f"BUFFERS OF {status.cluster.id}",
        "HOME",
        "FREE",
        "LENT",
        "IN NICS",
        "QUIESCING",
        "SHARED",
        "QUARANTINED",
    )
    return table(header, rows)


# ---- doctor -------------------------------------------------------------------------------------------------


def _configure_doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = "What this host or guest can do, what is missing, and the command that mends it."
    parser.epilog = examples(
        "ringbar doctor",
        "ringbar doctor zc:eth1                  a network card",
        "ringbar doctor ids1                     a VM",
        "ringbar doctor --clean                  remove what dead programs left",
    )
    parser.add_argument("target", metavar="DEVICE|VM", nargs="?", help="examine this too")
    parser.add_argument(
        "--clean", action="store_true", help="remove what dead clusters, programs and VMs left behind"
    )
    add_connect(parser)
    add_json(parser)
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace, out: Output) -> int:
    with out.progress() as progress:
        report = service().doctor(
            options.target, clean=options.clean, connect=options.connect, progress=progress
        )
    out.document({"good": report.good, **plain(report)})
    for finding in report.findings:
        out.say(f"{finding.state:<8} {finding.check}: {finding.detail}")
        if finding.cure:
            out.say(f"{'':<8}   to mend it: {finding.cure}")
    for note in report.notes:
        out.say(note)
    return DONE if report.good else FAILED
