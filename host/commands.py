# SPDX-License-Identifier: Apache-2.0
"""The commands that change things on the host: ``cluster``, ``queue``, ``attach``, ``detach``.

Thin: options in, one call of :class:`ringbar.host.service.Host`, words out.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING, Any

from ringbar.cli.common import (
    DONE,
    Output,
    Usage,
    add_connect,
    add_json,
    binary,
    buffers,
    cluster_id,
    count,
    examples,
    plain,
    plural,
    positive,
    seconds,
    size,
    subcommands,
    table,
)

if TYPE_CHECKING:
    from ringbar.host import model
    from ringbar.host.service import Host


def service() -> Host:
    """The boundary: the agent where one runs, else the same in this process."""
    from ringbar.host.agent import socket_path

    if os.path.exists(socket_path()):  # not its own: that raises where it cannot be looked for
        from ringbar.host.agent.client import AgentHost, reachable

        if reachable(socket_path()):
            return AgentHost(socket_path())
    from ringbar.host.service import Host

    return Host()


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    """Declare the options of command ``name``."""
    {
        "cluster": _configure_cluster,
        "queue": _configure_queue,
        "attach": _configure_attach,
        "detach": _configure_detach,
        "migrate": _configure_migrate,
    }[name](parser)


def _sub(commands: Any, name: str, summary: str, run: Any, *lines: str) -> Any:
    parser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=examples(*lines)
    )
    add_json(parser)
    parser.set_defaults(run=run)
    return parser


def _document(change: model.Change) -> dict[str, Any]:
    """A change as JSON: first whether there was one, in words too."""
    return {"result": "changed" if change.changed else "unchanged", **plain(change)}


def _tell(change: model.Change, out: Output) -> None:
    for note in change.notes:
        out.say(note)
    for warning in change.warnings:
        out.warn(warning)


# ---- cluster ------------------------------------------------------------------------------------------------


def _configure_cluster(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "ringbar cluster create 99 --queues 2      a cluster with queues 99@0 and 99@1",
        "ringbar cluster list",
        "ringbar cluster destroy 99",
    )
    commands = subcommands(parser, "create|list|show|destroy")
    create = _sub(
        commands,
        "create",
        "make a cluster that lives until it is destroyed or the host reboots",
        _cluster_create,
        "ringbar cluster create 99 --queues 4",
        "ringbar cluster create 7 --buffers 1M --pages 2M --label ids",
    )
    create.add_argument("id", metavar="ID", type=cluster_id, help="its number, 0 to 65535")
    create.add_argument(
        "--queues", type=count, default=0, metavar="N", help="make queues ID@0 to ID@N-1 with it"
    )
    create.add_argument(
        "--slots", type=positive, default=0, metavar="N", help="of these queues (default 4096)"
    )
    create.add_argument(
        "--buffers",
        type=buffers,
        default=None,
        metavar="N|auto",
        help="packet buffers (auto: computed from the queues)",
    )
    create.add_argument(
        "--size", type=size, default=2048, metavar="BYTES", help="of a buffer, 256 to 16384 (default 2048)"
    )
    create.add_argument(
        "--pages",
        choices=("auto", "4k", "2M", "1G"),
        default="auto",
        help="pages of the pool (auto: 2M where some are free)",
    )
    create.add_argument("--numa", type=count, default=None, metavar="N", help="memory node")
    create.add_argument("--label", default="", help="a name for people's eyes, up to 31 bytes")
    _sub(commands, "list", "list the clusters of this host", _cluster_list, "ringbar cluster list --json")
    show = _sub(commands, "show", "show a cluster's settings", _cluster_show, "ringbar cluster show 99")
    show.add_argument("id", metavar="ID", type=cluster_id)
    destroy = _sub(
        commands,
        "destroy",
        "remove a cluster with everything in it",
        _cluster_destroy,
        "ringbar cluster destroy 99",
    )
    destroy.add_argument("id", metavar="ID", type=cluster_id)
    destroy.add_argument(
        "--force", action="store_true", help="although programs or VMs use it: their ends fail"
    )


def _cluster_create(options: argparse.Namespace, out: Output) -> int:
    if len(options.label.encode()) > 31:
        raise Usage(f"the label '{options.label}' is longer than 31 bytes", cure="a shorter --label")
    if options.queues > 2048:
        raise Usage(f"a cluster has at most 2048 queues, not {options.queues}", cure="--queues 2048 or fewer")
    if options.slots and not options.queues:
        raise Usage("--slots says how large the queues are, and --queues is missing", cure="add --queues N")
    with out.progress() as progress:
        made = service().create_cluster(
            options.id,
            queues=options.queues,
            slots=options.slots,
            buffers=options.buffers,
            size=options.size,
            pages=options.pages,
            numa=options.numa,
            label=options.label,
            progress=progress,
        )
    out.document(_document(made))
    info = made.cluster
    assert info is not None
    if not made.changed:
        out.say(f"unchanged: cluster {info.id} is there already")
        return DONE
    out.say(
        f"cluster {info.id}: {info.buffers:,} buffers of {info.buffer_size:,} bytes, "
        f"{binary(info.memory)} of memory in pages of {info.pages}; lives {info.lives}"
    )
    out.say(made.sizing)
    if made.queues:
        out.say(f"{'queue' if len(made.queues) == 1 else 'queues'} {short_queues(made.queues)}")
    _tell(made, out)
    return DONE


def short_queues(addresses: list[str]) -> str:
    """Addresses as short as they can be read: ``99@0-3``."""
    from ringbar import address

    return address.format_queues(address.parse_queue(a) for a in addresses)


def _cluster_list(options: argparse.Namespace, out: Output) -> int:
    found = service().list_clusters()
    out.document({"clusters": found})
    if not found:
        out.say("no clusters; ringbar cluster create 99 --queues 1 makes one")
    elif not out.json:
        out.say(_cluster_table(found))
    return DONE


def _cluster_table(found: list[model.Cluster]) -> str:
    rows = [
        (
            c.id,
            c.label or "-",
            c.lives,
            f"{c.buffers:,}",
            c.buffer_size,
            c.pages,
            c.queues,
            c.lanes,
            binary(c.memory),
        )
        for c in found
    ]
    return table(("CLUSTER", "LABEL", "LIVES", "BUFFERS", "SIZE", "PAGES", "QUEUES", "LANES", "MEMORY"), rows)


def _cluster_show(options: argparse.Namespace, out: Output) -> int:
    shown = service().show_cluster(options.id)
    out.document(shown)
    if out.json:
        return DONE
    c = shown.cluster
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(c.created_ns / 1e9))
    facts = [
        ("cluster", f"{c.id}{f' ({c.label})' if c.label else ''}"),
        ("lives", c.lives),
        ("made", made),
        (
            "buffers",
            f"{c.buffers:,} of {c.buffer_size:,} bytes in {plural(c.pools, 'pool')}, pages of {c.pages}",
        ),
        ("sealed", "yes" if c.sealed else "no"),
    ]
    for name, value in facts:
        out.say(f"{name:<8}  {value}")
    if shown.queues:
        out.say()
        rows = [(q.address, q.slots, q.credit, "direct" if q.direct else "by the host") for q in shown.queues]
        out.say(table(("QUEUE", "SLOTS", "CREDIT", "PATH"), rows))
    if shown.segments:
        out.say()
        places = [(f"{s.kind} {s.id}", binary(s.size), s.state, s.vm or "-", s.path) for s in shown.segments]
        out.say(table(("SEGMENT", "BYTES", "STATE", "VM", "PATH"), places))
    return DONE


def _cluster_destroy(options: argparse.Namespace, out: Output) -> int:
    with out.progress() as progress:
        done = service().destroy_cluster(options.id, force=options.force, progress=progress)
    out.document(_document(done))
    if not done.changed:
        out.say(f"unchanged: there is no cluster {options.id}")
        return DONE
    out.say(f"cluster {options.id} destroyed")
    _tell(done, out)
    return DONE


# ---- queue --------------------------------------------------------------------------------------------------


def _configure_queue(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "ringbar queue create 99 --count 2",
        "ringbar queue set 99@0 --pause",
        "ringbar queue destroy 99@1",
    )
    commands = subcommands(parser, "create|set|destroy")
    create = _sub(
        commands,
        "create",
        "make queues, with the lowest free numbers",
        _queue_create,
        "ringbar queue create 99 --count 4 --slots 8192",
        "ringbar queue create 99 --direct        from one VM to another, without the host",
    )
    create.add_argument("id", metavar="ID", type=cluster_id, help="the cluster")
    create.add_argument("--count", type=positive, default=1, metavar="N", help="how many (default 1)")
    create.add_argument(
        "--slots",
        type=positive,
        default=0,
        metavar="N",
        help="packets that wait in it, 2 to 65536 (default 4096)",
    )
    create.add_argument(
        "--credit",
        type=positive,
        default=0,
        metavar="N",
        help="most buffers lent at once (default slots + 128)",
    )
    create.add_argument("--direct", action="store_true", help="between two VMs, which then trust each other")
    change = _sub(
        commands,
        "set",
        "change a queue",
        _queue_set,
        "ringbar queue set 99@0 --pause     nothing is delivered, and what is sent is refused",
        "ringbar queue set 99@0 --filter 'udp port 53'     only these are passed on from now on",
        "ringbar queue set 99@0 --filter none --resume",
    )
    change.add_argument("queue", metavar="QUEUE", help="such as 99@0")
    change.add_argument("--filter", metavar="EXPR|none", help="pass on only what matches (libpcap's syntax)")
    which = change.add_mutually_exclusive_group()
    which.add_argument("--pause", action="store_true", help="deliver nothing")
    which.add_argument("--resume", action="store_true", help="go on")
    destroy = _sub(
        commands, "destroy", "remove a queue that nobody holds", _queue_destroy, "ringbar queue destroy 99@1"
    )
    destroy.add_argument("queue", metavar="QUEUE", help="such as 99@0")


def _queue_create(options: argparse.Namespace, out: Output) -> int:
    with out.progress() as progress:
        made = service().create_queues(
            options.id,
            count=options.count,
            slots=options.slots,
            credit=options.credit,
            direct=options.direct,
            progress=progress,
        )
    out.document(_document(made))
    out.say(f"{'queue' if len(made.queues) == 1 else 'queues'} {short_queues(made.queues)}")
    return DONE


def _queue_set(options: argparse.Namespace, out: Output) -> int:
    pause = True if options.pause else False if options.resume else None
    if pause is None and options.filter is None:
        raise Usage("one of --filter, --pause and --resume is required", cure="ringbar queue set --help")
    done = service().set_queue(options.queue, pause=pause, expression=options.filter)
    out.document(_document(done))
    what = [] if pause is None else ["paused" if pause else "resumed"]
    if options.filter is not None:
        what.append("unfiltered" if options.filter.strip() in ("", "none") else f"filtered by: {options.filter}")
    said = ", ".join(what)
    out.say(f"{done.queues[0]} {said}" if done.changed else f"unchanged: {done.queues[0]} is {said}")
    return DONE


def _queue_destroy(options: argparse.Namespace, out: Output) -> int:
    done = service().destroy_queue(options.queue)
    out.document(_document(done))
    out.say(
        f"{done.queues[0]} destroyed" if done.changed else f"unchanged: there is no queue {done.queues[0]}"
    )
    return DONE


# ---- attach, detach -----------------------------------------------------------------------------------------


def _configure_attach(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Give a running VM ends of queues: the rings and packet buffers are plugged into it as a PCI device.\n"
        "Queues named alone are what the VM receives, --tx is what it sends. Done again, nothing changes."
    )
    parser.epilog = examples(
        "ringbar attach ids1 99@0                            the VM receives queue 0",
        "ringbar attach ids1 99@0 --tx 99@1                  and sends on queue 1",
        "ringbar attach ids1 99@2 --ready                    wait until a program in it opened the queue",
        "ringbar attach qmp:/run/vm1.qmp 99@0                a VM that libvirt does not run",
    )
    parser.add_argument("vm", metavar="VM", help="name or UUID in libvirt, or qmp:SOCKET, QEMU's monitor socket")
    parser.add_argument(
        "queues", metavar="QUEUE", nargs="*", help="what the VM receives, such as 99@0 or 99@0-3"
    )
    parser.add_argument("--rx", action="store_true", help="the VM receives the queues named (it does anyway)")
    parser.add_argument(
        "--tx", action="append", default=[], metavar="QUEUE", help="a queue that the VM sends"
    )
    parser.add_argument(
        "--pool",
        choices=("ro", "rw", "own"),
        help="the packet buffers in the VM: ro, read-only (default); own, read-only but for a pool of its own that it "
        "sends from (default with --tx); rw, all writable (fastest; default with --tx of a direct queue)",
    )
    parser.add_argument(
        "--ready", action="store_true", help="wait until a program in the VM has opened the queues"
    )
    parser.add_argument(
        "--timeout", type=seconds, default=60.0, metavar="S", help="seconds for all of it (default 60)"
    )
    parser.add_argument("--use-last-slot", action="store_true", help="take the VM's last free PCI port")
    parser.add_argument(
        "--replug", action="store_true", help="unplug and plug in again where a change of the pool needs it"
    )
    parser.add_argument(
        "--interrupts", action=argparse.BooleanOptionalAction, default=None,
        help="both sides sleep until the other rings, or do not; default: where the VM has a virtual IOMMU",
    )
    add_connect(parser)
    add_json(parser)
    parser.set_defaults(run=_attach)


def _attach(options: argparse.Namespace, out: Output) -> int:
    with out.progress() as progress:
        done = service().attach(
            options.vm,
            options.queues,
            options.tx,
            pool=options.pool,
            ready=options.ready,
            timeout=options.timeout,
            use_last_slot=options.use_last_slot,
            replug=options.replug,
            interrupts=options.interrupts,
            connect=options.connect,
            progress=progress,
        )
    out.document(_document(done))
    for attachment in done.attachments:
        rx = short_queues([b.queue for b in attachment.bindings if b.direction == "rx"])
        tx = short_queues([b.queue for b in attachment.bindings if b.direction == "tx"])
        ends = ", ".join(
            part for part in (f"receives {rx}" if rx else "", f"sends {tx}" if tx else "") if part
        )
        by = f" by {attachment.via}" if attachment.via else ""
        prefix = "" if done.changed else "unchanged: "
        out.say(f"{prefix}{attachment.vm} {ends or 'has no queue'}; {attachment.state} at {attachment.where}{by}")
        out.say(f"{attachment.vm} {attachment.sees}")
        if attachment.polls or attachment.interrupts:
            how = f"polls: {attachment.polls}" if attachment.polls else "waits by interrupts"
            out.say(f"{attachment.vm} {how}")
    _tell(done, out)
    return DONE


def _configure_detach(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Take ends of queues away from a VM; with its last one of a cluster, the memory too.\n"
        "Programs in the VM are told first, and the guest has to let go of the device."
    )
    parser.epilog = examples(
        "ringbar detach ids1                          everything",
        "ringbar detach ids1 99                       all of cluster 99",
        "ringbar detach qmp:/run/vm1.qmp 99@0         one queue",
    )
    parser.add_argument("vm", metavar="VM", help="name or UUID in libvirt, or qmp:SOCKET")
    parser.add_argument(
        "targets", metavar="CLUSTER|QUEUE", nargs="*", help="what to take away (default: everything)"
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=30.0,
        metavar="S",
        help="seconds for the guest to let go (default 30)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="if the guest does not let go: keep what it held in quarantine until the VM ends",
    )
    add_connect(parser)
    add_json(parser)
    parser.set_defaults(run=_detach)


def _detach(options: argparse.Namespace, out: Output) -> int:
    with out.progress() as progress:
        done = service().detach(
            options.vm,
            options.targets,
            timeout=options.timeout,
            force=options.force,
            connect=options.connect,
            progress=progress,
        )
    out.document(_document(done))
    if done.changed:
        what = short_queues(done.queues) if done.queues else "everything"
        out.say(f"{done.vm}: {what} detached")
    else:
        out.say(f"unchanged: nothing of that is attached to {done.vm}")
    _tell(done, out)
    return DONE


def _configure_migrate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Move a running VM with its queues: detach, migrate, attach on the other side. Memory that is plugged in\n"
        "belongs to this host, so QEMU refuses to migrate a VM that has it. What fails leaves the VM as it was."
    )
    parser.epilog = examples(
        "ringbar migrate ids1 qemu+ssh://host2/system            ringbar and the clusters are there too",
        "ringbar migrate qmp:/run/vm1.qmp qmp:/run/vm1b.qmp      a QEMU on this host, started with -incoming defer",
    )
    parser.add_argument("vm", metavar="VM", help="libvirt's name or UUID, or qmp:SOCKET")
    parser.add_argument("to", metavar="DESTURI", help="libvirt's URI of the other host, or qmp:SOCKET")
    parser.add_argument(
        "--timeout", type=seconds, default=300.0, metavar="S", help="seconds for all of it (default 300)"
    )
    add_connect(parser)
    add_json(parser)
    parser.set_defaults(run=_migrate)


def _migrate(options: argparse.Namespace, out: Output) -> int:
    with out.progress() as progress:
        done = service().migrate(
            options.vm, options.to, timeout=options.timeout, connect=options.connect, progress=progress
        )
    out.document(_document(done))
    out.say(f"{done.vm} is at {done.to}")
    for attachment in done.attachments:
        out.say(f"{attachment.vm} has {short_queues([b.queue for b in attachment.bindings])} at {attachment.where}")
    return DONE
