# SPDX-License-Identifier: Apache-2.0
"""Tools as named workers: their life in the background, their control socket, and what becomes of them when killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Shell


@pytest.fixture
def rb9(rb: Shell) -> Iterator[Shell]:
    """Cluster 9 with three queues; workers that a test leaves behind are stopped."""
    rb("cluster", "create", "9", "--queues", "3", "--buffers", "65536")
    yield rb
    for worker in rb.json("worker", "list")["workers"]:
        rb.run("worker", "stop", worker["name"])


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def worker(rb: Shell, name: str) -> dict[str, Any]:
    return next(w for w in rb.json("worker", "list")["workers"] if w["name"] == name)


def test_a_worker_is_listed_paused_resumed_and_stopped(rb9: Shell) -> None:
    started = rb9.json("count", "-i", "9@0", "--background", "--name", "c0")["worker"]
    assert os.readlink(f"/proc/{started['pid']}/cwd") == "/"
    assert os.getsid(started["pid"]) != os.getsid(0)
    rb9("send", "-o", "9@0", "--packets", "1000")
    until(lambda: worker(rb9, "c0")["packets"] == 1000)
    assert rb9.json("worker", "pause", "c0")["result"] == "changed"
    assert rb9.json("worker", "pause", "c0")["result"] == "unchanged"
    rb9("send", "-o", "9@0", "--packets", "100")
    assert (worker(rb9, "c0")["state"], worker(rb9, "c0")["packets"]) == ("paused", 1000)
    assert rb9.json("worker", "resume", "c0")["result"] == "changed"
    until(lambda: worker(rb9, "c0")["packets"] == 1100)
    stopped = rb9.json("worker", "stop", "c0")
    assert (stopped["result"], stopped["worker"]["summary"]["packets"]) == ("changed", 1100)
    assert rb9.json("worker", "stop", "c0")["result"] == "unchanged"
    assert rb9.json("worker", "list")["workers"] == []
    assert rb9.json("status", "9@0", "--sample", "0")["clusters"][0]["queues"][0]["consumer"] is None


def test_a_worker_says_how_busy_it_is(rb9: Shell) -> None:
    rb9("balance", "-i", "9@0", "-o", "9@1", "--background", "--name", "b0")
    rb9("send", "-o", "9@0", "--packets", "100")
    until(lambda: worker(rb9, "b0")["packets"] == 100)
    assert 0 < worker(rb9, "b0")["summary"]["busy"] <= 1
    assert "% of its time in turns that moved something" in rb9("worker", "show", "b0")
    rb9("worker", "stop", "b0")


def test_each_change_of_a_worker_is_a_line_of_its_log_with_who_asked(rb9: Shell) -> None:
    log = rb9.json("balance", "-i", "9@0", "-o", "9@1", "--background", "--name", "b0")["worker"]["log"]
    rb9("worker", "set", "b0", "--policy", "rr")
    rb9("worker", "set", "b0", "--policy", "rr")  # unchanged: no line
    rb9("worker", "pause", "b0")
    found = re.findall(r"^\S+Z (.*) \(by uid (\d+) pid \d+\)$", Path(log).read_text(), re.MULTILINE)
    assert found == [("policy changed", str(os.getuid())), ("paused", str(os.getuid()))]
    rb9("worker", "stop", "b0")


def test_what_fails_at_the_start_is_said_by_whoever_started_it(rb9: Shell) -> None:
    missing = rb9.json("count", "-i", "9@7", "--background", status=1)["error"]
    assert missing["code"] == "no-such-queue"
    assert rb9.json("count", "-i", "9@0", "-c", "8", "--background", status=2)["error"]["code"] == "usage"
    rb9("count", "-i", "9@0", "--background", "--name", "one")
    busy = rb9.run("count", "-i", "9@1", "--background", "--name", "one")
    assert busy.returncode == 1 and "ringbar worker stop one" in busy.stderr
    assert [w["name"] for w in rb9.json("worker", "list")["workers"]] == ["one"]


def test_status_shows_workers_and_one_of_them_by_its_name(rb9: Shell) -> None:
    rb9("bridge", "-i", "9@0", "-o", "9@1", "--background", "--name", "b")
    assert "9@0 → 9@1" in rb9("status", "--sample", "0")
    assert rb9.json("status", "b")["worker"]["settings"]["in"] == ["9@0"]
    queue = rb9.json("status", "9@0", "--sample", "0")["clusters"][0]["queues"][0]
    assert queue["consumer"]["name"] == "b"


def test_names_are_found_for_those_that_have_none(rb9: Shell) -> None:
    for queue in (0, 1):
        assert rb9.json("count", "-i", f"9@{queue}", "--background")["worker"]["name"] == f"count-{queue + 1}"


def test_a_foreground_tool_with_a_name_is_a_worker_too(rb9: Shell) -> None:
    tool = rb9.start("bridge", "-i", "9@0", "-o", "9@1", "--name", "b", "--json")
    shown = rb9.json("worker", "show", "b")["worker"]
    assert (shown["pid"], shown["tool"], shown["settings"]["in"]) == (tool.pid, "bridge", ["9@0"])
    rb9("worker", "stop", "b")
    said, _ = tool.communicate(timeout=30)
    assert tool.returncode == 0 and json.loads(said)["packets"] == 0


def test_a_programs_own_worker_is_listed_and_cannot_be_told(rb9: Shell) -> None:
    program = """
import sys, ringbar
with ringbar.Cluster.attach(9) as zc, ringbar.Bridge(zc.queues[0], zc.queues[1], name="mine"):
    print("on", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=rb9.environment,
        cwd=rb9.root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    rb9.started.append(process)
    assert process.stdout is not None and process.stdout.readline() == "on\n"
    mine = worker(rb9, "mine")
    assert (mine["state"], mine["tool"], mine["pid"]) == ("running", "bridge", process.pid)
    assert rb9.json("worker", "pause", "mine", status=1)["error"]["code"] == "no-socket"
    assert rb9.json("worker", "stop", "mine", status=1)["error"]["code"] == "no-socket"
    process.communicate("", timeout=30)


def test_one_that_ends_by_itself_leaves_its_summary_in_its_log(rb9: Shell) -> None:
    started = rb9.json("count", "-i", "9@0", "--packets", "10", "--background", "--name", "ten")["worker"]
    rb9("send", "-o", "9@0", "--packets", "10")
    until(lambda: rb9.json("worker", "list")["workers"] == [])
    assert json.loads(Path(started["log"]).read_text(encoding="utf-8"))["packets"] == 10


# ---- its socket ----


class Client:
    """One connection to a worker's socket."""

    def __init__(self, rb: Shell, name: str) -> None:
        self.path = rb.root / "run" / "workers" / f"{name}.sock"
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(str(self.path))
        self.lines = self.socket.makefile("rb")

    def say(self, data: bytes) -> Any:
        self.socket.sendall(data)
        return self.hear()

    def hear(self) -> Any:
        line = self.lines.readline()
        return json.loads(line) if line else None


@pytest.fixture
def client(rb9: Shell) -> Iterator[Callable[[], Client]]:
    rb9("count", "-i", "9@0", "--background", "--name", "c0")
    made: list[Client] = []

    def connect() -> Client:
        made.append(Client(rb9, "c0"))
        return made[-1]

    yield connect
    for one in made:
        one.lines.close()
        one.socket.close()


def test_the_socket_is_for_its_owner_and_group(client: Callable[[], Client]) -> None:
    assert stat.S_IMODE(client().path.stat().st_mode) == 0o660


@pytest.mark.parametrize(
    "bad",
    [
        b"nonsense",
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 30_000,
        b"1" * 60_000,
        b'{"do": "dance"}',
        b'{"do": ["show"]}',
        b'{"do": "show", "more": 1}',
        b'{"do": "set", "out": "9@1"}',
        b'{"do": "set", "out": [[]]}',
        b'{"do": "set", "out": [[1]]}',
        b'{"do": "set", "policy": 1}',
        b'{"do": "set", "policy": "ip"}',
    ],
    ids=lambda b: repr(b[:30]),
)
def test_a_request_that_cannot_be_gets_an_error_line_and_the_next_an_answer(
    client: Callable[[], Client], bad: bytes
) -> None:
    one = client()
    answer = one.say(bad + b"\n")
    assert set(answer) == {"error"} and set(answer["error"]) == {"code", "message", "cure"}
    assert one.say(b'{"do": "show"}\n')["worker"]["name"] == "c0"


def test_a_request_without_end_is_cut_off_and_others_are_served(client: Callable[[], Client]) -> None:
    endless = client()
    answer = endless.say(b"x" * 65536)
    assert answer["error"]["code"] == "too-long"
    assert endless.hear() is None
    assert client().say(b'{"do": "show"}\n')["worker"]["state"] == "running"


def test_clients_that_say_nothing_make_way(client: Callable[[], Client]) -> None:
    silent = [client() for _ in range(20)]
    assert client().say(b'{"do": "show"}\n')["worker"]["state"] == "running"
    half = client()
    half.socket.sendall(b'{"do": "st')
    assert silent[0].hear() is None
    assert client().say(b'{"do": "show"}\n')["worker"]["state"] == "running"


def test_a_client_that_does_not_read_is_let_go(client: Callable[[], Client]) -> None:
    deaf = client()
    deaf.socket.settimeout(0)

    def ask_without_end() -> None:
        while True:
            deaf.socket.sendall(b'{"do": "show"}\n' * 1000)

    with pytest.raises((BlockingIOError, BrokenPipeError, ConnectionResetError)):
        ask_without_end()
    assert client().say(b'{"do": "show"}\n')["worker"]["state"] == "running"


def test_many_requests_in_one_breath_are_all_answered(client: Callable[[], Client]) -> None:
    one = client()
    one.socket.sendall(b'{"do": "pause"}\n{"do": "pause"}\n{"do": "resume"}\n')
    assert [one.hear()["changed"] for _ in range(3)] == [["paused"], [], ["resumed"]]


# ---- killed ----


def test_a_killed_worker_is_shown_dead_and_its_place_can_be_taken(rb9: Shell) -> None:
    started = rb9.json("count", "-i", "9@0", "--background", "--name", "c0")["worker"]
    rb9("send", "-o", "9@0", "--packets", "700")
    until(lambda: worker(rb9, "c0")["packets"] == 700)
    os.kill(started["pid"], signal.SIGKILL)
    until(lambda: worker(rb9, "c0")["state"] == "dead")
    last = worker(rb9, "c0")
    assert (last["packets"], last["settings"]["in"], last["pid"]) == (700, ["9@0"], started["pid"])
    assert "dead" in rb9("worker", "list")
    assert rb9.json("worker", "pause", "c0", status=1)["error"]["code"] == "dead"
    assert rb9.json("worker", "pause", "c1", status=1)["error"]["code"] == "no-such-worker"
    assert "700" in rb9("worker", "show", "c0")
    again = rb9.json("count", "-i", "9@0", "--background", "--name", "c0")["worker"]
    assert again["pid"] != started["pid"]
    os.kill(again["pid"], signal.SIGKILL)
    until(lambda: worker(rb9, "c0")["state"] == "dead")
    assert rb9.json("worker", "stop", "c0")["changed"] == ["cleaned up"]
    assert rb9.json("worker", "list")["workers"] == []


def test_doctor_tells_of_dead_workers_and_cleans_up_after_them(rb9: Shell) -> None:
    started = rb9.json("count", "-i", "9@0", "--background", "--name", "c0")["worker"]
    os.kill(started["pid"], signal.SIGKILL)
    until(lambda: worker(rb9, "c0")["state"] == "dead")
    found = json.loads(rb9.run("doctor", "--json").stdout)["findings"]
    assert [f["state"] for f in found if f["check"] == "leftovers" and "c0" in f["detail"]] == ["warning"]
    rb9.run("doctor", "--clean")
    assert rb9.json("worker", "list")["workers"] == []
    assert [p.name for p in (rb9.root / "run" / "workers").iterdir() if not p.name.startswith(".")] == []
