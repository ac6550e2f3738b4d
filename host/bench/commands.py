# SPDX-License-Identifier: Apache-2.0
"""``ringbar bench ring|vm|nic|workers|python|peers|agent``: this machine measured, with the peers it is compared to."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

from ringbar.cli.common import DONE, FAILED, Output, Usage, add_json, examples, positive, seconds, size, subcommands

LEVELS = ("bare", "ledger", "intent", "library")
"""What a ring run includes: the rings alone, + the ledger, + intent records (the protocol), + the checks of what is in
hand (rb_send, rb_recv)."""


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    """Declare the options of command ``name``."""
    parser.epilog = examples(
        "ringbar bench ring --ends threads --touch 0        descriptors only, against DPDK's rte_ring",
        "ringbar bench ring --ends processes --touch 64     whole packets, against DPDK's memif",
        "ringbar bench vm --direct --touch 64               from one VM to another",
        "ringbar bench nic                                  devices, against a bare AF_XDP loop and TPACKET_V3",
        "ringbar bench workers                              balancer and fan-out, against DPDK's distributor",
        "ringbar bench python",
        "ringbar bench peers                                DPDK's rings and memif alone",
        "ringbar bench agent                                what attaching costs, and the agent itself",
    )
    commands = subcommands(parser, "ring|vm|nic|workers|python|peers|agent")
    ring = _sub(
        commands,
        "ring",
        "measure the loan rings between two processors",
        _ring,
        "ringbar bench ring --ends threads --burst 32 --touch 0 --json",
        "ringbar bench ring --ends processes --burst 32 --touch 64 --json",
        "ringbar bench ring --burst 1 --touch 64              one at a time, and round trips",
        burst=32,
        most=256,
        touch=64,
    )
    ring.add_argument(
        "--ends", choices=("threads", "processes"), default="processes", help="who is at the ends (default processes)"
    )
    ring.add_argument(
        "--level",
        choices=LEVELS,
        help="the headline: bare rings, + ledger, + intent records, the whole library "
        "(default: bare for threads, else intent)",
    )
    ring.add_argument("--slots", type=positive, default=1024, metavar="N", help="of the queue (default 1024)")
    ring.add_argument("--no-peers", action="store_true", help="leave DPDK's rings out")
    vm = _sub(
        commands,
        "vm",
        "measure from one VM to another; boots two",
        _vm,
        "ringbar bench vm --direct --touch 64 --json",
        "ringbar bench vm --touch 64",
        "ringbar bench vm --waiting",
        burst=32,
        most=256,
        touch=64,
    )
    vm.add_argument("--direct", action="store_true", help="a direct lane; else the host relays")
    vm.add_argument(
        "--waiting", action="store_true",
        help="instead: how late a waiting side sees a packet and what waiting costs, by strategy; boots one VM",
    )
    _sub(
        commands,
        "nic",
        "measure devices on veth, in a network namespace of its own",
        _nic,
        "ringbar bench nic --json",
        burst=64,
        most=256,
        touch=None,
    )
    workers = _sub(
        commands,
        "workers",
        "measure a balancer and a fan-out: what a packet costs the worker's core",
        _workers,
        "ringbar bench workers --json",
        burst=64,
        most=256,
        touch=None,
    )
    workers.add_argument("--no-peers", action="store_true", help="leave DPDK's distributor out")
    python = _sub(
        commands,
        "python",
        "measure a Python consumer: for burst in queue, reading burst.lengths",
        _python,
        "ringbar bench python --burst 64 --json",
        burst=64,
        most=65536,
        touch=None,
    )
    python.add_argument("--slots", type=positive, default=4096, metavar="N", help="of the queue (default 4096)")
    _sub(
        commands,
        "peers",
        "measure DPDK's rte_ring and memif alone, on the cores that the others use",
        _peers,
        "ringbar bench peers --json",
        burst=32,
        most=256,
        touch=None,
    )
    agent = commands.add_parser(
        "agent",
        help="measure attach, status and the idle agent; boots a VM",
        description="Measure attach, status and the idle agent; boots a VM.",
        epilog=examples("ringbar bench agent --json", "ringbar bench agent --vms 32 --seconds 30"),
    )
    agent.add_argument("--runs", type=positive, default=5, metavar="N", help="the median of N runs (default 5)")
    agent.add_argument("--vms", type=positive, default=10, metavar="N", help="attached while it is idle (default 10)")
    agent.add_argument(
        "--seconds", type=seconds, default=30.0, metavar="S", help="for which it is looked at while idle (default 30)"
    )
    add_json(agent)
    agent.set_defaults(run=_agent)


def _sub(
    commands: Any,
    name: str,
    summary: str,
    run: Callable[..., int],
    *lines: str,
    burst: int,
    most: int,
    touch: int | None,
) -> Any:
    parser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=examples(*lines)
    )
    parser.add_argument(
        "--burst", type=positive, default=burst, metavar="N", help=f"packets at once, 1 to {most} (default {burst})"
    )
    if touch is not None:
        parser.add_argument(
            "--touch",
            type=size,
            default=touch,
            metavar="BYTES",
            help=f"of each packet written, and one word of each line read; 0: descriptors only (default {touch})",
        )
    parser.add_argument("--runs", type=positive, default=5, metavar="N", help="the median of N runs (default 5)")
    parser.add_argument("--seconds", type=seconds, default=0.5, metavar="S", help="of each run (default 0.5)")
    add_json(parser)
    parser.set_defaults(run=run, most_burst=most)
    return parser


def _check(options: argparse.Namespace) -> None:
    if options.burst > options.most_burst:
        raise Usage(f"a burst has at most {options.most_burst} packets, not {options.burst}", cure="a smaller --burst")
    touch = getattr(options, "touch", 0)
    if touch and touch < 64:
        raise Usage(f"packets have at least 64 bytes, not {touch}", cure="--touch 64, or 0 for descriptors only")
    if options.seconds <= 0:
        raise Usage("a run of no length measures nothing", cure="--seconds 0.5")


# ---- ring ---------------------------------------------------------------------------------------------------


def _ring(options: argparse.Namespace, out: Output) -> int:
    _check(options)
    from ringbar.host import native
    from ringbar.host.bench import report
    from ringbar.host.bench.dpdk import two_cores

    cores = two_cores()
    threads = options.ends == "threads"
    level = options.level or ("bare" if threads else "intent")
    some = set(LEVELS) if options.touch == 0 else {"bare", level, "library"}
    wanted = [level] if threads else sorted(some, key=LEVELS.index)

    def ours(which: str) -> Callable[[], float]:
        def run() -> float:
            result = native.bench_ring(
                processes=not threads,
                burst=options.burst,
                touch=options.touch,
                slots=options.slots,
                level=LEVELS.index(which),
                seconds=options.seconds,
                cores=cores,
            )
            checks.append(result["checks_failed"])
            return float(result["mpps"])

        return run

    checks: list[int] = []
    with out.progress() as progress, contextlib.ExitStack() as stack:
        measures = {f"ringbar, {which}": ours(which) for which in wanted}
        peer, missing = (None, "left out") if options.no_peers else _peer(options, cores, stack, progress)
        if peer is not None:
            measures[peer.name] = peer.run
        figures = _alternate(options.runs, measures, progress)
        latency = None
        if options.burst == 1:
            progress("measuring round trips")
            latency = native.bench_ring(
                processes=not threads,
                burst=1,
                touch=options.touch,
                slots=options.slots,
                level=LEVELS.index(level),
                latency=True,
                seconds=options.seconds,
                cores=cores,
            )["latency_ns"]
    body: dict[str, Any] = report.figures(figures[f"ringbar, {level}"], burst=options.burst, touch=options.touch)
    body.update(ends=options.ends, level=level, slots=options.slots, checks_failed=sum(checks))
    body["levels"] = {
        which: report.figures(figures[f"ringbar, {which}"], burst=options.burst, touch=options.touch)
        for which in wanted
    }
    rows = [{"name": f"ringbar, {which}", **body["levels"][which]} for which in wanted]
    if peer is not None:
        theirs = figures[peer.name]
        ratio = report.ratio(figures[f"ringbar, {level}"], theirs)
        body["peer"] = {"name": peer.name, **report.figures(theirs, burst=32, touch=peer.touch), **peer.detail()}
        body["ratio"] = round(ratio, 3)
        rows[wanted.index(level)]["ratio"] = ratio
        rows.append({"name": peer.name, **body["peer"]})
    else:
        body["peer"] = {"missing": missing}
    if latency is not None:
        names = ("min", "median", "p99", "p999", "max")
        body["round_trip_ns"] = dict(zip(names, latency))
    document = report.document(_command(options), body)
    out.document(document)
    if not out.json:
        report.print_table(
            f"loan rings between two {options.ends}, burst {options.burst}, {options.touch} bytes", rows, document
        )
        if latency is not None:
            out.say("  round trip in ns: " + ", ".join(f"{n} {v:,.0f}" for n, v in body["round_trip_ns"].items()))
        if peer is None and not options.no_peers:
            out.say(f"  no peer: {missing}")
        if body["checks_failed"]:
            out.warn(f"{body['checks_failed']} checks failed: packets were not what was sent")
    return FAILED if body["checks_failed"] else DONE


def _command(options: argparse.Namespace) -> str:
    """The command that measures the same again."""
    words = ["ringbar bench", options.subcommand]
    for name in ("ends", "burst", "touch", "slots", "level", "runs", "seconds"):
        value = getattr(options, name, None)
        if value is not None:
            words.append(f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}")
    flags = ("direct", "waiting", "no_peers")
    words += [f"--{name.replace('_', '-')}" for name in flags if getattr(options, name, False)]
    return " ".join([*words, "--json"])


def _alternate(
    runs: int, measures: dict[str, Callable[[], float]], progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """Runs of each, A B A B, so that noise meets all alike."""
    from ringbar.host.bench import report

    done = [0]

    def told(name: str, measure: Callable[[], float]) -> Callable[[], float]:
        def run() -> float:
            progress(f"measuring {name}, run {done[0] // len(measures) + 1} of {runs}")
            done[0] += 1
            return measure()

        return run

    found = report.alternate(runs, *(told(name, measure) for name, measure in measures.items()))
    return dict(zip(measures, found))


class _Peer:
    """What the rings are compared to."""

    def __init__(self, name: str, touch: int, run: Callable[[], float], detail: Callable[[], dict[str, Any]]) -> None:
        self.name = name
        self.touch = touch
        self.run = run
        self.detail = detail


def _peer(
    options: argparse.Namespace, cores: tuple[int, int], stack: contextlib.ExitStack, progress: Callable[[str], None]
) -> tuple[_Peer | None, str]:
    """rte_ring for descriptors, memif for packets; or why it cannot be measured."""
    from ringbar.host.bench import peers

    try:
        if options.touch:
            progress("starting DPDK's memif")
            pair = stack.enter_context(peers.Memif(cores=cores))
            return _Peer(
                "DPDK memif zero-copy",
                0,
                lambda: pair.run(max(options.seconds, 0.5)),
                lambda: {"detail": pair.detail, "command": pair.command},
            ), ""
        progress("building DPDK's rte_ring measurement")
        peers.build_rte_ring_bench()
        last: list[peers.Peer] = []

        def run() -> float:
            last.append(peers.rte_ring(1, options.seconds, burst=32, slots=options.slots, cores=cores))
            return last[-1].mpps

        return _Peer(
            "DPDK rte_ring SP/SC bulk 32", 0, run, lambda: {"detail": last[-1].detail, "command": last[-1].command}
        ), ""
    except peers.NotAvailable as e:
        return None, str(e)


# ---- python -------------------------------------------------------------------------------------------------


def _python(options: argparse.Namespace, out: Output) -> int:
    _check(options)
    from ringbar.host.bench import consumer, report

    with out.progress() as progress:
        runs: list[consumer.Run] = []

        def one() -> float:
            runs.append(consumer.measure(burst=options.burst, slots=options.slots, seconds=options.seconds))
            return runs[-1].mpps

        figures = _alternate(options.runs, {"python": one}, progress)
    body = report.figures(figures["python"], burst=options.burst, touch=0)
    body.update(
        consumer="for burst in queue, reading burst.lengths",
        numpy=runs[-1].numpy,
        slots=options.slots,
        packets=sum(r.packets for r in runs),
        mean_burst=round(sum(r.packets for r in runs) / max(1, sum(r.bursts for r in runs)), 1),
        producer=runs[-1].producer,
    )
    document = report.document(_command(options), body)
    out.document(document)
    if not out.json:
        report.print_table(f"Python consumer, bursts of up to {options.burst}", [{"name": "python", **body}], document)
        out.say(f"  {body['mean_burst']} packets a burst, numpy {body['numpy'] or 'not installed'}; {body['producer']}")
    return DONE


# ---- nic ----------------------------------------------------------------------------------------------------


def _nic(options: argparse.Namespace, out: Output) -> int:
    _check(options)
    from ringbar.host.bench import nic, report

    with out.progress() as progress, nic.place(options.seconds, options.burst, progress) as where:
        rows = nic.rows(where, options.runs, progress)
    document = report.document(_command(options), {"rows": rows, "network": "veth", "burst": options.burst})
    out.document(document)
    if not out.json:
        report.print_table(f"devices on veth, bursts of {options.burst}", nic.table(rows), document)
    return DONE


# ---- workers ------------------------------------------------------------------------------------------------


def _workers(options: argparse.Namespace, out: Output) -> int:
    _check(options)
    from ringbar.host.bench import report, workers

    with out.progress() as progress, workers.bench(options.seconds, options.burst, progress) as bench:
        rows = workers.rows(bench, options.runs, progress, dpdk=not options.no_peers)
    document = report.document(_command(options), {"rows": rows, "burst": options.burst})
    out.document(document)
    if not out.json:
        report.print_table(f"workers, bursts of {options.burst}", workers.table(rows), document)
    return DONE


# ---- peers --------------------------------------------------------------------------------------------------


def _peers(options: argparse.Namespace, out: Output) -> int:
    _check(options)
    from ringbar.host.bench import peers, report
    from ringbar.host.bench.dpdk import two_cores

    cores = two_cores()
    measures: dict[str, Callable[[], peers.Peer]] = {
        "rte_ring": lambda: peers.rte_ring(options.runs, options.seconds, burst=options.burst, cores=cores),
        "memif": lambda: peers.memif(max(options.seconds, 0.5), options.runs, cores=cores),
    }
    rows: list[dict[str, Any]] = []
    missing: dict[str, peers.NotAvailable] = {}
    with out.progress() as progress:
        for name, measure in measures.items():
            progress(f"measuring DPDK's {name}")
            try:
                rows.append({**measure().as_json(), "name": name})
            except peers.NotAvailable as e:
                missing[name] = e
    if not rows:
        raise missing["rte_ring"]
    why = {name: {"message": e.message, "cure": e.cure} for name, e in missing.items()}
    document = report.document(_command(options), {"rows": rows, "missing": why, "burst": options.burst})
    out.document(document)
    if not out.json:
        report.print_table("DPDK, on two cores", rows, document)
        for name, said in why.items():
            out.say(f"  {name} was left out: {said['message']}; {said['cure']}")
    return DONE


# ---- vm -----------------------------------------------------------------------------------------------------


def _waiting(options: argparse.Namespace, out: Output) -> int:
    from ringbar.host.bench import report, waiting

    with out.progress() as progress:
        rows, accelerator = waiting.measure(
            trips=100 * options.runs, seconds=max(2.0, options.seconds), progress=progress
        )
    body = {"round_trips": 100 * options.runs, "strategies": [row.as_dict() for row in rows]}
    document = {**report.document(_command(options), body), "accelerator": accelerator}
    out.document(document)
    out.say(f"a round trip of one packet, one side waiting, the other spinning ({accelerator})")
    out.say(waiting.table(rows))
    return DONE


def _vm(options: argparse.Namespace, out: Output) -> int:
    if options.waiting:
        return _waiting(options, out)
    _check(options)
    if options.touch % 64:
        raise Usage(f"--touch {options.touch} is no whole number of lines of 64 bytes", cure="--touch 64")
    from ringbar.host.bench import guests, report

    with out.progress() as progress:
        measured = guests.measure(
            direct=options.direct,
            burst=options.burst,
            touch=options.touch,
            runs=options.runs,
            seconds=options.seconds,
            progress=progress,
        )
    body = report.figures(measured.mpps, burst=options.burst, touch=options.touch)
    body.update(path="direct" if options.direct else "relayed by the host", **measured.detail)
    document = {**report.document(_command(options), body), "accelerator": measured.accelerator}
    out.document(document)
    if not out.json:
        path = "a direct lane" if options.direct else "the host"
        report.print_table(
            f"from VM to VM over {path} ({measured.accelerator})", [{"name": "ringbar", **body}], document
        )
        if measured.bound:
            out.say(f"  bounded by: {measured.bound}")
    return DONE


# ---- agent --------------------------------------------------------------------------------------------------


def _agent(options: argparse.Namespace, out: Output) -> int:
    if options.seconds <= 0:
        raise Usage("a run of no length measures nothing", cure="--seconds 30")
    from ringbar.host.bench import agent, report

    with out.progress() as progress:
        rows = agent.measure(options.runs, options.vms, options.seconds, progress)
    words = f"ringbar bench agent --runs {options.runs} --vms {options.vms} --seconds {options.seconds:g}"
    out.document(report.document(words, {"rows": rows}))
    for row in rows:
        limit = f"at most {row['at_most']:g}: {'reached' if row['reached'] else 'NOT reached'}"
        out.say(f"{row['value']:>8g} {row['unit']:<4} {row['what']}; {limit}")
    return DONE
