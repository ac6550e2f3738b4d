# SPDX-License-Identifier: Apache-2.0
"""A tool at work: a worker, what is told of it, what can be changed meanwhile, in the foreground and the background."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from ringbar.cli import background, control, running
from ringbar.cli.common import DONE, FAILED, Output
from ringbar.cli.live import Pace
from ringbar.errors import Error


class Task:
    """What a tool does. A kind of tool defines what is below.

    :ivar tool: the command, such as ``balance``.
    :ivar worker: the :class:`ringbar.workers.Worker` that moves the packets; not started yet.
    :ivar job: its open ends.
    """

    tool = ""

    def __init__(self, job: running.Job, worker: Any) -> None:
        self.job = job
        self.worker = worker

    def settings(self) -> dict[str, Any]:
        """What it was told to do, for ``ringbar worker show``."""
        raise NotImplementedError

    def totals(self, stats: dict[str, Any]) -> tuple[int, int]:
        """Packets and bytes so far."""
        return int(stats["packets"]), int(stats["bytes"])

    def aside(self, stats: dict[str, Any]) -> str:
        """What stands behind the live line: drops and faults."""
        raise NotImplementedError

    def rows(self, stats: dict[str, Any], took: float) -> list[str]:
        """Lines above the live line, on a terminal; ``took``: seconds since they were drawn last."""
        return []

    def over(self, stats: dict[str, Any]) -> bool:
        """It is over, although the thread has not ended."""
        return False

    def finish(self) -> float:
        """Its time is over: take in nothing new. How many seconds it may need for what it has begun."""
        return 0.0

    def document(self, stats: dict[str, Any], took: float) -> dict[str, Any]:
        """The summary for ``--json``."""
        raise NotImplementedError

    def summary(self, stats: dict[str, Any], took: float) -> list[str]:
        """The summary for people."""
        raise NotImplementedError

    def status(self, stats: dict[str, Any]) -> int:
        """The exit status."""
        return DONE

    def change(self, wanted: dict[str, Any]) -> list[str]:
        """Change settings while it runs; what was changed.

        :raises Error: it cannot be; then everything is as before.
        """
        for name in wanted:
            if name != "filter" or not self.job.inputs:
                raise Error(f"a {self.tool} has no {name} that can be changed", code="not-changeable")
        value = None if wanted["filter"] == "none" else wanted["filter"]
        if all(rx.filter == value for rx in self.job.inputs):
            return []
        with self.worker.held():
            for rx in self.job.inputs:
                rx.filter = value
        return ["filter changed"]


Prepare = Callable[[Output], "contextlib.AbstractContextManager[Task]"]
"""Opens the devices and makes the task; leaving it closes them."""


def run(tool: str, options: argparse.Namespace, out: Output, prepare: Prepare) -> int:
    """Run a tool as its options say: here until its end, or in the background."""
    options.tool = tool
    if not options.background:
        return _work(options.name, options, out, prepare, lambda ready: None)
    name = options.name = options.name or control.free_name(tool)
    control.check_free(name)

    def body(ready: Callable[[dict[str, Any]], None]) -> int:
        return _work(name, options, Output(out.json, True, out.command), prepare, ready)

    answer = background.start(name, body)
    out.document({"worker": answer})
    for line in answer["said"]:
        out.say(line)
    out.say(f"worker {name} (pid {answer['pid']}) goes on; see it: ringbar worker show {name}")
    out.say(f"end it: ringbar worker stop {name}")
    return DONE


class _Telling(Output):
    """Notes what a tool says at its start, for whoever started it."""

    def __init__(self, out: Output) -> None:
        super().__init__(out.json, out.quiet, out.command)
        self.live, self.said = out.live, list[str]()

    def note(self, text: str) -> None:
        self.said.append(text)
        super().note(text)


def _work(
    name: str | None,
    options: argparse.Namespace,
    plain: Output,
    prepare: Prepare,
    ready: Callable[[dict[str, Any]], None],
) -> int:
    out = _Telling(plain)
    with contextlib.ExitStack() as stack:
        stack.enter_context(running.signals_wait())
        server = stack.enter_context(control.Server(name)) if name else None
        _call_oneself(name or options.tool)
        task = stack.enter_context(prepare(out))
        task.worker.start()
        since = time.time_ns()
        stack.callback(_quietly, task.worker.stop)
        pace = Pace(running.period(out))

        def shown(stats: dict[str, Any]) -> dict[str, Any]:
            packets, octets = task.totals(stats)
            return {
                "name": name,
                "tool": task.tool,
                "pid": os.getpid(),
                "since_ns": since,
                "state": "paused" if state["paused"] else "running",
                "settings": task.settings(),
                "packets": packets,
                "bytes": octets,
                "summary": task.document(stats, pace.took),
            }

        state = {"paused": False, "stop": False}

        def answer(request: dict[str, Any]) -> dict[str, Any]:
            changed = _obey(request, task, state)
            if changed and options.background and server is not None:  # a line of its log
                when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                print(f"{when} {', '.join(changed)} (by {server.asked_by})", file=sys.stderr, flush=True)
            return {"changed": changed, "worker": shown(task.worker.stats())}

        ready({"name": name, "tool": task.tool, "pid": os.getpid(), "said": out.said, "settings": task.settings()})
        for _ in running.ticks(options.seconds):
            stats = task.worker.stats()
            if not stats["running"] or task.over(stats):
                break
            if server is not None:
                server.serve(answer)
                if state["stop"]:
                    break
            if pace.due():
                rows = task.rows(stats, time.monotonic() - pace.shown) if out.live.terminal else []
                line = "paused; " if state["paused"] else ""
                line += pace.line(*task.totals(stats), task.aside(stats))
                out.live.show("\n".join([*rows, line]))
        took = pace.took
        for _ in running.ticks(task.finish()):
            if not task.worker.stats()["running"]:
                break
        failed = _quietly(task.worker.stop)
        out.live.clear()
        stats = task.worker.stats()
        document = task.document(stats, took)
        if server is not None:
            server.finish({"worker": {**shown(stats), "state": "stopped"}})
            if state["stop"] and options.background:  # whoever stopped it has the summary
                control.remove_log(server.name)
        if failed is not None:
            document["error"] = failed.as_json()
        out.document(document)
        for line in task.summary(stats, took):
            out.say(line)
        if failed is not None:
            if not out.json:
                out.error(failed)
            return FAILED
        return task.status(stats)


def _call_oneself(name: str) -> None:
    """The process's name, by which ``status`` shows who is at a queue's end."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as file:
        file.write(name[:15])


def _obey(request: dict[str, Any], task: Task, state: dict[str, bool]) -> list[str]:
    """Do what a control request says; what was changed."""
    verb = request["do"]
    if verb in ("pause", "resume"):
        wanted = verb == "pause"
        if state["paused"] == wanted:
            return []
        (task.worker.pause if wanted else task.worker.resume)()
        state["paused"] = wanted
        return ["paused" if wanted else "resumed"]
    if verb == "set":
        return task.change({k: v for k, v in request.items() if k != "do"})
    if verb == "stop":
        state["stop"] = True
        return ["stopped"]
    return []


def _quietly(stop: Callable[[], Any]) -> Error | None:
    """Stop a worker; the error with which it had ended."""
    try:
        stop()
    except Error as e:
        return e
    return None
