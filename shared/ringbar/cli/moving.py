# SPDX-License-Identifier: Apache-2.0
"""The tools that pass packets on: ``bridge``, ``balance``, ``fanout``, ``merge``, ``delay``, ``replicate``."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ringbar import address
from ringbar.cli import running
from ringbar.cli.common import Output, Usage, count, examples, plural, seconds, short
from ringbar.cli.live import bits, dropped, figures, rates
from ringbar.cli.options import POLICIES, add_common, add_inputs, add_outputs, add_replay, devices, groups
from ringbar.cli.task import Task, run
from ringbar.errors import Error

LOSSES = "What an output does not take is dropped and counted there; it never holds up the others."


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    """Declare the options of command ``name``."""
    {
        "bridge": _configure_bridge,
        "balance": _configure_balance,
        "fanout": _configure_fanout,
        "replicate": _configure_replicate,
        "merge": _configure_merge,
        "delay": _configure_delay,
    }[name](parser)


# ---- what all of them are ------------------------------------------------------------------------------------


class Moving(Task):
    """Packets from inputs to outputs.

    :ivar applications: the outputs, by address: each group gets all traffic.
    """

    def __init__(self, tool: str, job: running.Job, worker: Any, applications: list[list[str]], **told: Any) -> None:
        super().__init__(job, worker)
        self.tool = tool
        self.applications = applications
        self.told = told
        self._rows: dict[tuple[bool, str], tuple[int, int]] = {}

    def settings(self) -> dict[str, Any]:
        """See the base."""
        return {"in": [rx.address for rx in self.job.inputs], "out": self.applications, **self.told}

    def aside(self, stats: dict[str, Any]) -> str:
        """See the base."""
        return dropped(self._drops(stats))

    def _drops(self, stats: dict[str, Any]) -> dict[str, int]:
        return {reason: n for reason, n in stats["drops"].items() if n}

    def rows(self, stats: dict[str, Any], took: float) -> list[str]:
        """See the base: a row for each input and output, where there are several."""
        ports = [(False, port) for port in stats["inputs"]] + [(True, port) for port in stats["outputs"]]
        found = []
        for out, port in ports:
            packets, octets = port["packets"], port["bytes"]
            before = self._rows.get((out, port["address"]), (0, 0))
            self._rows[out, port["address"]] = (packets, octets)
            side = "in" if not out else f"app {port['group'] + 1}" if len(self.applications) > 1 else "out"
            state = "" if port["state"] == "open" else f" {port['state']}"
            found.append(
                f"{side:<6} {port['address']:<16} {short((packets - before[0]) / max(took, 1e-9)):>6} packets/s "
                f"{bits(packets - before[0], octets - before[1], took):>12} {packets:>15,}  "
                f"{dropped(port['drops'])}{state}"
            )
        return found if len(found) > 2 else []

    def document(self, stats: dict[str, Any], took: float) -> dict[str, Any]:
        """See the base."""
        found: dict[str, Any] = {"tool": self.tool}
        if self.tool == "bridge":
            outs = [device for group in self.applications for device in group]
            found["pairs"] = [f"{rx.address} → {out}" for rx, out in zip(self.job.inputs, outs)]
        for side in ("inputs", "outputs"):
            found[side] = [_port(port) for port in stats[side]]
        return {
            **found,
            **figures(stats["packets"], stats["bytes"], took),
            "dropped": stats["dropped"],
            "drops": stats["drops"],
            "busy": stats["busy"],
            "packets_per_burst": stats["packets_per_burst"],
        }

    def summary(self, stats: dict[str, Any], took: float) -> list[str]:
        """See the base."""
        lines = [
            f"{plural(stats['packets'], 'packet')} in {took:.2f} s: "
            f"{rates(stats['packets'], stats['bytes'], took)}; {dropped(self._drops(stats))}"
        ]
        if len(stats["outputs"]) > 1:
            for port in stats["outputs"]:
                which = f" (application {port['group'] + 1})" if len(self.applications) > 1 else ""
                lines.append(
                    f"{port['address']}{which}: {plural(port['packets'], 'packet')}, {port['bytes']:,} bytes; "
                    f"{dropped(port['drops'])}"
                )
        return lines

    def change(self, wanted: dict[str, Any]) -> list[str]:
        """See the base."""
        changed, settings = [], self.settings()
        arguments: dict[str, Any] = {}
        for name, value in wanted.items():
            if name == "policy" and "policy" not in self.told:
                raise Error(f"a {self.tool} has no policy", code="not-changeable", cure="balance and fanout have")
            if name == "filter" and value == "none":
                value = None
            if settings[name] == value:
                continue
            changed.append(f"{'outputs' if name == 'out' else name} changed")
            arguments["outputs" if name == "out" else name] = value
        if "outputs" in arguments:
            arguments["outputs"] = self._outputs(arguments["outputs"])
        if arguments:
            self.worker.set(**arguments)
            self.applications = wanted.get("out", self.applications)
            self.told.update({k: v for k, v in arguments.items() if k in ("policy", "filter")})
        return changed

    def _outputs(self, wanted: list[list[str]]) -> Any:
        """Other outputs, in the shape that the worker takes; NICs that are open already stay so.

        :raises Usage: there is no such queue, or it is the worker's own input.
        """
        mine = {str(end.address): end for end in self.job.outputs if not isinstance(end, str)}
        inputs = {str(end.address) for end in self.job.inputs}
        found = []
        for group in wanted:
            for device in (address.parse_device(text) for text in group):
                if str(device) in inputs and isinstance(device, address.QueueAddress):
                    raise Usage(f"{device} would feed itself", cure="name another queue")
                if isinstance(device, address.QueueAddress) and device.cluster != self.job.cluster.id:
                    raise Usage(
                        f"{device} is of another cluster", cure=f"name queues of cluster {self.job.cluster.id}"
                    )
            found.append([mine.get(text, text) for text in group])
        if self.tool in ("bridge", "delay"):
            return [device for group in found for device in group]
        if self.tool == "merge":
            if len(found) != 1 or len(found[0]) != 1:
                raise Usage("merge has one output", cure="-o DEV")
            return found[0][0]
        return found if len(found) > 1 or self.tool == "fanout" else found[0]


def _port(port: dict[str, Any]) -> dict[str, Any]:
    found = {"device": port["address"]}
    if "group" in port:
        found["application"] = port["group"] + 1
    return {**found, **{name: port[name] for name in ("state", "packets", "bytes", "drops")}}


Make = Callable[..., Any]


def _move(
    tool: str,
    options: argparse.Namespace,
    out: Output,
    inputs: list[str],
    applications: list[list[str]],
    make: Make,
    **told: Any,
) -> int:
    """Run a tool whose worker ``make(inputs, groups of outputs, settings)`` makes."""
    running.check_idle(options)
    names = [device for group in applications for device in group]
    create = len(names) if getattr(options, "create", None) is not None else 0

    @contextlib.contextmanager
    def prepare(out: Output) -> Iterator[Task]:
        with running.opened(inputs, names, options, queues=create, by_worker=True) as job:
            ends = iter(job.outputs)
            outputs = [[next(ends) for _ in group] for group in applications]
            _say_path(tool, out, job, applications)
            if create:
                _say_consumers(out, applications)
            worker = make(
                job.inputs,
                outputs,
                filter=options.filter,
                core=options.core,
                idle=options.idle,
                packets=options.packets,
                name=options.name,
            )
            yield Moving(tool, job, worker, applications, filter=options.filter, **told)

    return run(tool, options, out, prepare)


def _say_path(tool: str, out: Output, job: running.Job, applications: list[list[str]]) -> None:
    if tool in ("bridge", "delay"):
        for rx, tx in zip(job.inputs, job.outputs):
            out.note(f"{job.describe(rx)} → {job.describe(tx)}")
        return
    froms = ",".join(job.describe(rx) for rx in job.inputs)
    out.note(f"{froms} → {' + '.join(','.join(group) for group in applications)}")


def _say_consumers(out: Output, applications: list[list[str]]) -> None:
    """The line that each consumer would type."""
    for number, group in enumerate(applications, 1):
        if len(applications) > 1:
            out.note(f"application {number}:")
        for device in group:
            out.note(f"  ringbar count -i {device}")


# ---- bridge, delay --------------------------------------------------------------------------------------------


def _configure_bridge(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Move packets from one device to another, without a copy.\nWhat the output refuses is dropped and counted."
    )
    parser.epilog = examples(
        "ringbar bridge -i zc:eth1 -o 99@0",
        "ringbar bridge -i 99@0 -o 99@1                          in a VM: back to the host",
        "ringbar bridge -i zc:eth1 -o zc:eth2 --both             two NICs, both ways",
        "ringbar bridge -i zc:eth1 -o 99@0 -i 99@1 -o zc:eth1    two pairs",
        "ringbar bridge -i pcap:day.pcapng -o 99@0 --speed 10    play a capture file",
        "ringbar bridge -i 99@0 -o 99@1 --filter 'not arp'       only what matches",
    )
    _add_pairs(parser)
    parser.add_argument("--both", action="store_true", help="also from each -o to its -i, for NICs")
    add_common(parser, _bridge, worker=True)
    add_replay(parser)


def _add_pairs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", dest="inputs", metavar="DEV", action="append", required=True, help="from; may come again")
    parser.add_argument("-o", dest="outputs", metavar="DEV", action="append", required=True, help="to; one for each -i")


def pairs(options: argparse.Namespace, tool: str) -> tuple[list[str], list[str]]:
    """The inputs, and as many outputs."""
    froms, tos = ([str(address.parse_device(text)) for text in side] for side in (options.inputs, options.outputs))
    if len(froms) != len(tos):
        raise Usage(
            f"{plural(len(froms), 'input')}, {plural(len(tos), 'output')}: each -i needs its -o",
            cure=f"ringbar {tool} -i FROM -o TO -i FROM -o TO",
        )
    return froms, tos


def _bridge(options: argparse.Namespace, out: Output) -> int:
    froms, tos = pairs(options, "bridge")
    if options.both:
        for name in froms + tos:
            if isinstance(address.parse_device(name), address.QueueAddress):
                raise Usage(
                    f"{name} carries packets one way only, so --both is for NICs",
                    cure="name a second pair: -i FROM -o TO -i FROM -o TO",
                )
        froms, tos = froms + tos, tos + froms

    def make(inputs: list[Any], outputs: list[list[Any]], **settings: Any) -> Any:
        from ringbar import Bridge

        return Bridge(inputs, [tx for group in outputs for tx in group], **settings)

    return _move("bridge", options, out, froms, [[device] for device in tos], make)


def _configure_delay(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Move packets from one device to another, a time later.\n"
        "They wait in their buffers: RATE times DELAY of them are held, which the input's queue must be able to lend."
    )
    parser.epilog = examples(
        "ringbar delay -i 99@0 -o 99@1 --by 10ms",
        "ringbar delay -i zc:eth1 -o zc:eth2 --by 250us",
    )
    _add_pairs(parser)
    parser.add_argument("--by", type=seconds, required=True, metavar="TIME", help="10ms, 250us, 1.5s")
    add_common(parser, _delay, worker=True)
    add_replay(parser)


def _delay(options: argparse.Namespace, out: Output) -> int:
    froms, tos = pairs(options, "delay")
    if options.by > 3600:
        raise Usage("no packet waits longer than an hour", cure="--by 1h or less")

    def make(inputs: list[Any], outputs: list[list[Any]], **settings: Any) -> Any:
        from ringbar import Delay

        return Delay(inputs, [tx for group in outputs for tx in group], options.by, **settings)

    return _move("delay", options, out, froms, [[device] for device in tos], make, by=options.by)


# ---- balance, fanout, replicate -------------------------------------------------------------------------------


def _add_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--policy",
        default="5tuple",
        metavar="P",
        help=f"how packets are dealt out: {POLICIES}, or LIBRARY.so:FUNCTION (default 5tuple: both directions of a "
        "flow to the same output)",
    )
    parser.add_argument(
        "--weights", metavar="W[,W...]", type=_weights, help="shares of the outputs, in their order (default: equal)"
    )


def _weights(text: str) -> list[int]:
    found = [count(part) for part in text.split(",")]
    if any(not 1 <= weight <= 1024 for weight in found):
        raise argparse.ArgumentTypeError("a weight goes from 1 to 1024")
    return found


NAMED = frozenset(
    "rr rr-burst ip 5tuple gtp gtp-ip gtp-session gre gre-ip vxlan vxlan-ip vlan input".split()
)


def check_policy(policy: str) -> str:
    """A policy that there is.

    :raises Usage: there is none such.
    """
    if policy not in NAMED and ":" not in policy:
        raise Usage(f"there is no policy '{policy}'", cure=f"-m one of {POLICIES}, or LIBRARY.so:FUNCTION")
    return policy


def _check_weights(options: argparse.Namespace, applications: list[list[str]]) -> None:
    outputs = sum(len(group) for group in applications)
    if options.weights is not None and len(options.weights) != outputs:
        raise Usage(
            f"{plural(len(options.weights), 'weight')} for {plural(outputs, 'output')}",
            cure="one for each, in their order",
        )


def _configure_balance(parser: argparse.ArgumentParser) -> None:
    parser.description = f"Share the packets of some inputs among outputs. {LOSSES}"
    parser.epilog = examples(
        "ringbar balance -i zc:eth1 -c 99 -n 4                 make cluster 99 with a queue for each of four programs",
        "ringbar balance -i zc:eth1,zc:eth2 -o 99@0-3 -m ip",
        "ringbar balance -i 99@0 -o 99@1,99@2 -o 99@3          two programs share; a third gets everything",
        "ringbar balance -i zc:eth1 -c 99 -n 2,1               the same, in a cluster of its own",
        "ringbar balance -i 99@0 -o 99@1,99@2 --background --name lb     then: ringbar worker set lb --policy ip",
    )
    add_inputs(parser)
    add_outputs(parser, True, "to these; each -o is one application that gets all traffic, shared among its devices")
    _add_policy(parser)
    add_common(parser, _balance, worker=True)
    add_replay(parser)


def _balance(options: argparse.Namespace, out: Output) -> int:
    applications = groups(options)
    _check_weights(options, applications)

    def make(inputs: list[Any], outputs: list[list[Any]], **settings: Any) -> Any:
        from ringbar import Balancer

        shape = outputs if len(outputs) > 1 else outputs[0]
        return Balancer(inputs, shape, options.policy, weights=options.weights, **settings)

    policy = check_policy(options.policy)
    return _move("balance", options, out, devices(options.inputs), applications, make, policy=policy)


def _configure_fanout(parser: argparse.ArgumentParser) -> None:
    parser.description = f"Every packet to every application, without a copy. {LOSSES}"
    parser.epilog = examples(
        "ringbar fanout -i zc:eth1 -c 99 -n 3                  make cluster 99 with a queue for each of three programs",
        "ringbar fanout -i 99@0 -o 99@1,99@2,99@3              each of them gets everything",
        "ringbar fanout -i 99@0 -o 99@1,99@2 -o 99@3           two applications: the first shares, the second gets all",
        "ringbar fanout -i zc:eth1 -c 99 -n 2,1                the same, in a cluster of its own",
    )
    add_inputs(parser)
    add_outputs(
        parser,
        True,
        "to these; one -o: each device gets all traffic; several: each -o does, and shares it among its devices",
    )
    _add_policy(parser)
    add_common(parser, _fanout, worker=True)
    add_replay(parser)


def _each(applications: list[list[str]]) -> list[list[str]]:
    """One list of outputs: every one of them is an application."""
    return [[device] for device in applications[0]] if len(applications) == 1 else applications


def _fanout(options: argparse.Namespace, out: Output) -> int:
    applications = _each(groups(options))
    _check_weights(options, applications)
    if sum(len(group) for group in applications) > 64:
        raise Usage("a packet goes to at most 64 outputs", cure="a second fanout behind one of the outputs")

    def make(inputs: list[Any], outputs: list[list[Any]], **settings: Any) -> Any:
        from ringbar import Fanout

        return Fanout(inputs, outputs, options.policy, weights=options.weights, **settings)

    policy = check_policy(options.policy)
    return _move("fanout", options, out, devices(options.inputs), applications, make, policy=policy)


def _configure_replicate(parser: argparse.ArgumentParser) -> None:
    parser.description = f"What comes from one device goes out of several, NICs for example. {LOSSES}"
    parser.epilog = examples(
        "ringbar replicate -i zc:eth1 -o zc:eth2,zc:eth3",
        "ringbar replicate -i 99@0 -o zc:eth2,99@1",
    )
    add_inputs(parser)
    add_outputs(parser, False, "to all of these")
    add_common(parser, _replicate, worker=True)
    add_replay(parser)


def _replicate(options: argparse.Namespace, out: Output) -> int:
    options.create = None
    if not options.outputs:
        raise Usage("no output is named", cure="-o DEV,DEV")
    tos = devices(options.outputs)
    if len(tos) > 64:
        raise Usage("a packet goes to at most 64 outputs", cure="a second replicate behind one of the outputs")

    def make(inputs: list[Any], outputs: list[list[Any]], **settings: Any) -> Any:
        from ringbar import Replicate

        return Replicate(inputs, outputs, **settings)

    return _move("replicate", options, out, devices(options.inputs), [[device] for device in tos], make)


# ---- merge ----------------------------------------------------------------------------------------------------


def _configure_merge(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "All inputs to one output, in order of their timestamps.\n"
        "A packet waits for older ones of other inputs, but no longer than --wait."
    )
    parser.epilog = examples(
        "ringbar merge -i zc:eth1,zc:eth2 -o 99@0              two directions of a tap become one",
        "ringbar merge -i 99@0-3 -o 99@4 --wait 5ms",
    )
    add_inputs(parser)
    parser.add_argument("-o", dest="output", metavar="DEV", required=True, help="where to: 99@0, zc:eth1")
    parser.add_argument("--wait", type=seconds, default=0.001, metavar="TIME", help="(default 1ms)")
    add_common(parser, _merge, worker=True)
    add_replay(parser)


def _merge(options: argparse.Namespace, out: Output) -> int:
    if not 0 < options.wait <= 3600:
        raise Usage("a packet waits more than no time and at most an hour", cure="--wait 1ms")

    def make(inputs: list[Any], outputs: list[list[Any]], **settings: Any) -> Any:
        from ringbar import Merge

        return Merge(inputs, outputs[0][0], wait=options.wait, **settings)

    output = str(address.parse_device(options.output))
    return _move("merge", options, out, devices(options.inputs), [[output]], make, wait=options.wait)
