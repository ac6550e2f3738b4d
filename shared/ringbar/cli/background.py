# SPDX-License-Identifier: Apache-2.0
"""A tool that goes on in the background: a process of its own, detached, that tells how its start went."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from ringbar.cli import control
from ringbar.cli.common import USAGE, Usage, exit_status
from ringbar.errors import Error

Body = Callable[[Callable[[dict[str, Any]], None]], int]
"""Does the work; calls its argument once, when the start has succeeded. Returns the exit status."""


def start(name: str, body: Body) -> dict[str, Any]:
    """Run ``body`` in a process that has neither our terminal nor our children's fate.

    What it prints goes to a log beside its control socket. Returns when it is ready.

    :returns: what it reported.
    :raises Error: the one with which its start failed.
    """
    log = control.place(name, "log")
    control.make_directory()
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _detach(name, log, writing, body)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)  # the one between: it has ended
    answer: dict[str, Any] = json.loads(said) if said else {}
    if "error" in answer:
        error = answer["error"]
        control.remove_log(name)
        kind = Usage if answer["status"] == USAGE else Error
        raise kind(error["message"], code=error["code"], cure=error["cure"])
    if "ready" not in answer:
        raise Error(f"worker {name} died while it started", code="died", cure=f"see {log}")
    return {**answer["ready"], "log": log}


def _detach(name: str, log: str, writing: int, body: Body) -> NoReturn:
    """In the child: a child of init, without a terminal, with only its own files open."""
    status = 1
    told = False
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.umask(0o027)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)  # until the tool has handlers of its own
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o640)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        for low, high in ((3, writing), (writing + 1, os.sysconf("SC_OPEN_MAX"))):
            os.closerange(low, min(high, 1 << 16))

        def tell(what: dict[str, Any]) -> None:
            os.write(writing, json.dumps(what).encode())
            os.close(writing)

        def ready(what: dict[str, Any]) -> None:
            nonlocal told
            told = True
            os.chdir("/")  # every path that was relative is open by now
            tell({"ready": what})

        try:
            status = body(ready)
        except BaseException as e:
            from ringbar.cli import unexpected

            error = e if isinstance(e, Error) else unexpected(e)
            if not told:
                tell({"error": error.as_json(), "status": exit_status(error)})
            print(f"ringbar: {error.message}", file=sys.stderr)
            if error.cure:
                print(f"  to mend it: {error.cure}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
