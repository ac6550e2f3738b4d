# SPDX-License-Identifier: Apache-2.0
"""Several processes as a program and a person see them: forks, stopped and killed servers, other versions. The core's
own tests of the same are in tests/c/test_life.c."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import Shell

SERVER = """
import sys, ringbar
with ringbar.Cluster.attach(99) as c, c.open_queue(0, "tx") as tx:
    assert tx.write([b"unread" * 10]) == 1
    print("ready", flush=True)
    sys.stdin.read()
"""

READER = """
import json, sys, ringbar
with ringbar.Cluster.attach(99) as c, c.open_queue(0, "rx") as rx:
    for burst in rx.bursts(timeout=0.1):
        assert not burst  # short waits are for other work
        break
    try:
        rx.recv(timeout=1)
        print(json.dumps("received"), flush=True)
    except TimeoutError as late:
        print(json.dumps(str(late)), flush=True)
    sys.stdin.readline()
    print(json.dumps([bytes(p).decode() for p in rx.recv(timeout=5)]), flush=True)
"""

FORKS = """
import json, os, ringbar
c = ringbar.Cluster.create(98, buffers=2048, queues=0)
q = c.create_queue(slots=64)
tx, rx = c.open_queue(q.id, "tx"), c.open_queue(q.id, "rx")
tx.write([b"x" * 60])
child = os.fork()
if not child:
    codes = []
    for use in (lambda: rx.recv(timeout=0), lambda: tx.alloc(1), lambda: c.open_queue(0, "rx"), lambda: c.status()):
        try:
            use()
            codes.append("worked")
        except ringbar.Error as error:
            codes.append(error.code if error.cure else "no cure")
    print(json.dumps(codes), flush=True)
    rx.close(); tx.close(); c.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(json.dumps([len(rx.recv(timeout=5)), ringbar.Cluster.attach(98).id]), flush=True)
"""


@contextlib.contextmanager
def program(rb: Shell, text: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", text], env=rb.environment, cwd=rb.root, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("on\n")
    process.stdin.flush()


def test_a_server_that_does_not_answer_is_named(rb: Shell) -> None:
    rb("cluster", "create", "99", "--buffers", "16384", "--queues", "1")
    with program(rb, SERVER) as server:
        assert line(server) == "ready"
        os.kill(server.pid, signal.SIGSTOP)
        assert os.waitid(os.P_PID, server.pid, os.WSTOPPED | os.WNOWAIT) is not None
        with program(rb, READER) as reader:
            said = line(reader)
            assert f"process {server.pid}" in said
            assert f"kill {server.pid}" in said
            assert f"waits for process {server.pid}" in rb("status", "99")
            shown = rb.json("status", "99@0")["clusters"][0]["queues"][0]
            assert shown["stalled"]
            assert shown["server_pid"] == server.pid
            server.kill()
            server.wait(30)
            tell(reader)
            assert line(reader) == '["' + "unread" * 10 + '"]'  # the next look answered for the dead


def test_a_forked_child_is_told_and_disturbs_nobody(rb: Shell) -> None:
    with program(rb, FORKS) as parent:
        assert line(parent) == '["forked", "forked", "forked", "forked"]'
        assert line(parent) == "[1, 98]"
        assert parent.wait(30) == 0


def test_a_cluster_of_another_version(rb: Shell) -> None:
    rb("cluster", "create", "99", "--buffers", "16384")
    state = rb.root / "run" / "99.state"
    with state.open("r+b") as memory:
        memory.seek(8)  # `abi` of the header
        memory.write(struct.pack("<I", 7))
    error = rb.json("count", "-i", "99@0", status=1)["error"]
    assert error["code"] == "abi-mismatch"
    assert "version 7" in error["message"]
    assert "version" in error["cure"]


def test_too_small_a_pool_says_what_would_do(rb: Shell) -> None:
    error = rb.json("cluster", "create", "99", "--buffers", "128", "--queues", "1", "--slots", "2", status=1)["error"]
    assert error["code"] == "pool-too-small"
    assert "--buffers 512" in error["cure"]
    rb("cluster", "create", "99", "--buffers", "128")
    error = rb.json("queue", "create", "99", "--slots", "2", status=1)["error"]
    assert error["cure"] == "make the cluster with --buffers 512"
    rb("cluster", "destroy", "99")
    rb("cluster", "create", "99", "--buffers", "512", "--queues", "1", "--slots", "2")
