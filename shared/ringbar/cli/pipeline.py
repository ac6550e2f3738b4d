# SPDX-License-Identifier: Apache-2.0
"""The tool ``pipeline``: several stages, each a thread with an attachment of its own."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from ringbar import address
from ringbar.cli import running
from ringbar.cli.common import Output, Usage, examples, plural
from ringbar.cli.live import dropped, figures, rates
from ringbar.cli.moving import pairs
from ringbar.cli.options import add_common, add_replay, cores
from ringbar.cli.task import Task, run
from ringbar.errors import Error


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``pipeline``."""
    parser.description = (
        "Pass packets through stages, each a thread that moves them from its -i to its -o, without a copy.\n"
        "Stages of one process, or of several: a stage may be a program of your own or a VM instead."
    )
    parser.epilog = examples(
        "ringbar pipeline -i 99@0 -o 99@1 -i 99@1 -o 99@2",
        "ringbar pipeline -i zc:eth1 -o 99@0 -i 99@1 -o zc:eth2 -g 0,1    what stands between is your program",
    )
    add = parser.add_argument
    add("-i", dest="inputs", metavar="DEV", action="append", required=True, help="of each stage: from")
    add("-o", dest="outputs", metavar="DEV", action="append", required=True, help="of each stage: to")
    add_common(parser, _pipeline, worker=True, several=True)
    add_replay(parser)


def _pipeline(options: argparse.Namespace, out: Output) -> int:
    froms, tos = pairs(options, "pipeline")
    given = cores(options.core, len(froms))
    options.core = None
    for core in given:
        running.check_idle(argparse.Namespace(idle=options.idle, core=core))
    named = {d.cluster for d in map(address.parse_device, froms + tos) if isinstance(d, address.QueueAddress)}
    if options.cluster is None and not named:
        raise Usage("no stage names a queue, and -c does not say of which cluster the buffers are", cure="add -c ID")
    if len(named) > 1:
        first, second, *_ = sorted(named)
        raise Usage(f"clusters {first} and {second}: packets move within one cluster", cure="queues of one cluster")
    if options.cluster is None:
        options.cluster = named.pop()

    @contextlib.contextmanager
    def prepare(out: Output) -> Iterator[Task]:
        from ringbar import Bridge, Pipeline

        with contextlib.ExitStack() as stack:
            stages, jobs = [], []
            for number, (source, target, core) in enumerate(zip(froms, tos, given), 1):
                job = stack.enter_context(running.opened([source], [target], options, by_worker=True))
                out.note(f"{job.describe(job.inputs[0])} → {job.describe(job.outputs[0])}")
                jobs.append(job)
                stages.append(
                    Bridge(
                        job.inputs[0],
                        job.outputs[0],
                        filter=options.filter if number == 1 else None,
                        core=core,
                        idle=options.idle,
                        packets=options.packets if number == 1 else None,
                        name=f"{options.name}.{number}" if options.name else None,
                    )
                )
            yield Staged(jobs, _Chain(Pipeline(stages)), [froms, tos])

    return run("pipeline", options, out, prepare)


class _Chain:
    """A pipeline as one worker: it runs while its first stage does, and until what that passed on is through."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._before: list[int] = []

    def stats(self) -> dict[str, Any]:
        stages = self.pipeline.stats()
        moved = [stage["packets"] for stage in stages]
        still, self._before = moved == self._before, moved
        through = not stages[0]["running"] and still
        return {
            "stages": stages,
            "packets": stages[-1]["packets"],
            "bytes": stages[-1]["bytes"],
            "running": not through and all(stage["running"] for stage in stages[1:]),
        }

    def start(self) -> None:
        self.pipeline.start()

    def stop(self) -> None:
        self.pipeline.stop()

    def pause(self) -> None:
        self.pipeline.pause()

    def resume(self) -> None:
        self.pipeline.resume()


class Staged(Task):
    """``pipeline``."""

    tool = "pipeline"

    def __init__(self, jobs: list[running.Job], chain: _Chain, path: list[list[str]]) -> None:
        super().__init__(jobs[0], chain)
        self.path = path

    def settings(self) -> dict[str, Any]:
        """See the base."""
        return {"in": self.path[0], "out": [[device] for device in self.path[1]]}

    def aside(self, stats: dict[str, Any]) -> str:
        """See the base."""
        parts = []
        for number, stage in enumerate(stats["stages"], 1):
            if stage["dropped"]:
                parts.append(f"stage {number} {dropped(stage['drops'])}")
        return "; ".join(parts) or "drops 0"

    def document(self, stats: dict[str, Any], took: float) -> dict[str, Any]:
        """See the base."""
        stages = [
            {
                "in": source,
                "out": target,
                **{name: stage[name] for name in ("packets", "bytes", "dropped", "drops", "busy", "packets_per_burst")},
            }
            for source, target, stage in zip(*self.path, stats["stages"])
        ]
        return {"tool": self.tool, "stages": stages, **figures(stats["packets"], stats["bytes"], took)}

    def summary(self, stats: dict[str, Any], took: float) -> list[str]:
        """See the base."""
        lines = []
        for source, target, stage in zip(*self.path, stats["stages"]):
            lines.append(
                f"{source} → {target}: {plural(stage['packets'], 'packet')} in {took:.2f} s: "
                f"{rates(stage['packets'], stage['bytes'], took)}; {dropped(stage['drops'])}"
            )
        return lines

    def change(self, wanted: dict[str, Any]) -> list[str]:
        """See the base: only the filter of the first stage."""
        if set(wanted) != {"filter"}:
            raise Error("of a pipeline only the filter can be changed", code="not-changeable")
        self.worker.pipeline.workers[0].set(filter=None if wanted["filter"] == "none" else wanted["filter"])
        return ["filter changed"]
