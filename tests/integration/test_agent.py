# SPDX-License-Identifier: Apache-2.0
"""The agent: the same commands through a daemon, which can be killed and leaves nothing half done."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Shell

pytest.importorskip("fastapi")


class Agent:
    """An agent with the registry and memory of a Shell."""

    def __init__(self, rb: Shell) -> None:
        self.rb = rb
        self.path = rb.root / "run" / "agent.sock"
        self.process = self.launch()

    def launch(self) -> subprocess.Popen[str]:
        """Start it, and wait for the readiness that systemd would be told of."""
        notify = self.rb.root / "notify"
        notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            told.bind(str(notify))
            told.settimeout(30)
            process = subprocess.Popen(
                [sys.executable, "-m", "ringbar", "agent"],
                env={**self.rb.environment, "NOTIFY_SOCKET": str(notify)},
                cwd=self.rb.root,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.rb.started.append(process)
            assert b"READY=1" in told.recv(4096)
        return process

    def get(self, path: str) -> tuple[int, str]:
        return self.ask("GET", path)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("localhost", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.path))
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text


@pytest.fixture
def agent(rb: Shell) -> Iterator[Agent]:
    return Agent(rb)  # ended with the Shell's other processes


def test_commands_go_through_the_agent_and_say_the_same(rb: Shell) -> None:
    alone = [rb("cluster", "create", "5", "--queues", "2"), rb("cluster", "create", "5", "--queues", "2")]
    refused = rb.run("cluster", "create", "5", "--size", "4096")
    rb("cluster", "destroy", "5")
    agent = Agent(rb)
    through = [rb("cluster", "create", "5", "--queues", "2"), rb("cluster", "create", "5", "--queues", "2")]
    again = rb.run("cluster", "create", "5", "--size", "4096")
    assert (through, again.returncode, again.stderr) == (alone, refused.returncode, refused.stderr)
    events = json.loads(agent.get("/v1/events")[1])["events"]
    assert [e["kind"] for e in events] == ["agent-started", "cluster-created"]
    assert events[1]["by"].startswith(f"uid {os.getuid()} pid ")


def test_each_change_is_audited_with_who_asked_for_it(rb: Shell, agent: Agent) -> None:
    rb("cluster", "create", "7", "--queues", "1")
    rb("queue", "create", "7")
    rb("queue", "set", "7@0", "--pause")
    rb("queue", "set", "7@0", "--pause")  # unchanged: no event
    rb("queue", "destroy", "7@1")
    rb("cluster", "destroy", "7")
    events = rb.json("events")["events"]
    kinds = ["agent-started", "cluster-created", "queues-created", "queue-set", "queue-destroyed", "cluster-destroyed"]
    assert [e["kind"] for e in events] == kinds
    assert [e["sequence"] for e in events] == list(range(1, 7))
    assert all(e["by"] for e in events[1:])
    agent.process.terminate()
    log = [json.loads(line) for line in agent.process.communicate(timeout=30)[1].splitlines()]
    assert [line["event"] for line in log if line.get("audit")] == kinds[1:]


def test_a_killed_agent_leaves_everything_and_the_next_one_finds_it(rb: Shell, agent: Agent) -> None:
    rb("cluster", "create", "8", "--queues", "1")
    counting = rb.start("count", "-i", "8@0", "--packets", "1000", "--json")
    agent.process.send_signal(signal.SIGKILL)
    agent.process.wait()
    rb("send", "-o", "8@0", "--packets", "1000", "--quiet")
    assert json.loads(counting.communicate(timeout=30)[0])["packets"] == 1000
    again = Agent(rb)
    assert json.loads(again.get("/v1/clusters")[1])["clusters"][0]["id"] == 8
    events = json.loads(again.get("/v1/events")[1])["events"]
    assert [e["kind"] for e in events] == ["agent-started", "cluster-created", "agent-started"]


def test_a_second_agent_is_refused_and_told_of_the_first(rb: Shell, agent: Agent) -> None:
    second = rb.run("agent")
    assert second.returncode == 1
    assert f"an agent runs already (pid {agent.process.pid})" in second.stderr
    assert rb.json("cluster", "list") == {"clusters": []}


def test_without_an_agent_the_commands_act_themselves_and_events_says_what_to_do(rb: Shell) -> None:
    agent = Agent(rb)
    agent.process.terminate()
    agent.process.communicate(timeout=30)
    assert not agent.path.exists()
    rb("cluster", "create", "9")
    done = rb.run("events")
    assert done.returncode == 1
    assert "no agent listens" in done.stderr
    assert "systemctl start ringbar-agent" in done.stderr


def test_the_socket_is_for_its_owner_and_the_group_only(agent: Agent) -> None:
    assert stat.S_IMODE(agent.path.stat().st_mode) == 0o660


def test_events_are_followed_as_they_come(rb: Shell, agent: Agent) -> None:
    following = subprocess.Popen(
        [sys.executable, "-m", "ringbar", "events", "--follow", "--since", "0", "--json"],
        env=rb.environment,
        cwd=rb.root,
        stdout=subprocess.PIPE,
        text=True,
    )
    rb.started.append(following)
    assert following.stdout is not None
    assert json.loads(following.stdout.readline())["kind"] == "agent-started"
    rb("cluster", "create", "3")
    assert json.loads(following.stdout.readline())["subject"] == "3"
    following.send_signal(signal.SIGINT)
    assert following.wait(timeout=30) == 0


def test_metrics_follow_prometheus_conventions(rb: Shell, agent: Agent) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    rb("cluster", "create", "4", "--queues", "2")
    counting = rb.start("count", "-i", "4@1", "--packets", "10", "--json")
    rb("send", "-o", "4@1", "--packets", "10", "--quiet")
    counting.communicate(timeout=30)
    status, text = agent.get("/metrics")
    assert status == 200
    families = {f.name: f for f in parser.text_string_to_metric_families(text)}
    for family in families.values():
        assert family.name.startswith("ringbar_")
        assert family.documentation.endswith(".")
        names = {s.name for s in family.samples}
        assert names <= ({f"{family.name}_total"} if family.type == "counter" else {family.name})
    packets = {s.labels["queue"]: s.value for s in families["ringbar_queue_packets"].samples}
    assert packets == {"0": 0.0, "1": 10.0}


def test_status_and_metrics_tell_of_workers(rb: Shell, agent: Agent) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    rb("cluster", "create", "4", "--queues", "3", "--slots", "64")
    rb("balance", "-i", "4@0", "-o", "4@1,4@2", "-m", "rr", "--background", "--name", "lb")
    try:
        rb("send", "-o", "4@0", "--packets", "100", "--rate", "1k", "--quiet")
        until = time.monotonic() + 30
        while rb.json("status", "--sample", "0")["workers"][0]["packets"] < 100:
            assert time.monotonic() < until, "the worker took no packets"
        (worker,) = rb.json("status", "--sample", "0")["workers"]
        assert (worker["name"], worker["state"], worker["policy"]) == ("lb", "running", "rr")
        assert [(o["address"], o["packets"]) for o in worker["outputs"]] == [("4@1", 50), ("4@2", 50)]
        families = {f.name: f for f in parser.text_string_to_metric_families(agent.get("/metrics")[1])}
        (info,) = families["ringbar_worker_info"].samples
        assert info.labels == {"worker": "lb", "kind": "balancer", "policy": "rr", "state": "running"}
        assert [s.value for s in families["ringbar_worker_output_packets"].samples] == [50, 50]
    finally:
        rb("worker", "stop", "lb")


def test_a_worker_that_is_killed_is_an_event_and_one_that_is_stopped_is_none(rb: Shell, agent: Agent) -> None:
    rb("cluster", "create", "4", "--queues", "2", "--slots", "64")
    for name in ("first", "second"):  # the directory of workers is made with the first
        started = rb.json("bridge", "-i", "4@0", "-o", "4@1", "--background", "--name", name)["worker"]
        until = time.monotonic() + 30
        if name == "first":
            rb("worker", "stop", name)
            continue
        os.kill(started["pid"], signal.SIGKILL)
        while not (died := [e for e in rb.json("events")["events"] if e["kind"] == "worker-died"]):
            assert time.monotonic() < until, "its death was not seen"
    assert [e["subject"] for e in died] == ["second"]
    rb("worker", "stop", "second")


def test_the_dashboard_asks_for_metrics_that_there_are(agent: Agent) -> None:
    """Each name in its queries is served, and each label that it groups or filters by is one of that metric's."""
    from ringbar.host import model
    from ringbar.host.agent import metrics

    served = {
        sample: labels
        for family in metrics.families(model.Status())
        for sample, labels in [
            (family.name + ("_total" if family.type == "counter" else ""), set(getattr(family, "_labelnames", ())))
        ]
    }
    assert set(re.findall(r"^# TYPE (\S+)", agent.get("/metrics")[1], re.MULTILINE)) == set(served)
    board = json.loads((Path(metrics.__file__).parents[1] / "grafana" / "ringbar.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [v["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    assert len(queries) > 10
    for query in queries:
        names = re.findall(r"ringbar_\w+", query)
        assert names and set(names) <= set(served), query
        labels = set.intersection(*(served[name] for name in names))
        for group in re.findall(r"by \(([^)]*)\)", query):
            assert {word.strip() for word in group.split(",")} <= labels, query
        for name, selected in re.findall(r"(ringbar_\w+)\{([^}]*)\}", query):
            assert set(re.findall(r"(\w+)=", selected)) <= served[name], query
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/clusters/70000", None, 422, "bad-request"),
        ("GET", "/v1/clusters/12", None, 404, "no-such-cluster"),
        ("POST", "/v1/clusters", {"id": 1, "sise": 3}, 422, "bad-request"),
        ("POST", "/v1/clusters", "no object", 422, "bad-request"),
        ("DELETE", "/v1/queues/70000@0", None, 400, "bad-address"),
        ("DELETE", "/v1/queues/nonsense", None, 422, "bad-request"),
        ("POST", "/v1/attach", {"vm": "qmp:/nowhere", "rx": ["1@0"]}, 404, "no-such-cluster"),
        ("GET", "/v2/clusters", None, 404, "no-such-path"),
        ("PUT", "/v1/clusters", None, 405, "no-such-path"),
    ],
)
def test_a_bad_request_gets_one_clear_error(
    agent: Agent, method: str, path: str, body: Any, status: int, code: str
) -> None:
    got, text = agent.ask(method, path, body)
    error = json.loads(text)["error"]
    assert (got, error["code"]) == (status, code)
    assert error["message"]


def test_rubbish_on_the_socket_disturbs_nobody(rb: Shell, agent: Agent) -> None:
    def shout(data: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(agent.path))
            s.sendall(data)
            s.shutdown(socket.SHUT_WR)
            s.settimeout(30)
            while s.recv(4096):
                pass

    shouts = [
        b"\0" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/attach",
    ]
    threads = [threading.Thread(target=shout, args=(s,)) for s in shouts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert rb.json("cluster", "list") == {"clusters": []}


def test_the_openapi_surface_holds_for_whatever_fits_it(private_directories: Path, monkeypatch: Any) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    from ringbar.errors import Error
    from ringbar.host.agent import api
    from ringbar.host.agent.journal import Journal
    from ringbar.host.agent.rollback import Rollbacks
    from ringbar.host.service import Host

    monkeypatch.setenv("RINGBAR_RUN", str(private_directories / "run"))
    monkeypatch.setenv("RINGBAR_SHM", str(private_directories / "shm"))

    class Frugal(Host):
        """As the real one, but with no more memory than a test may take."""

        def create_cluster(self, cluster: int, **wanted: Any) -> Any:
            if (
                wanted["queues"] * (wanted["slots"] or 4096) > 20_000
                or (wanted["buffers"] or 65536) * wanted["size"] > 1 << 28
            ):
                raise Error("too large for a test", code="no-memory")
            return super().create_cluster(cluster, **wanted)

        def doctor(self, *arguments: Any, **options: Any) -> Any:
            return super().doctor("99", progress=options["progress"])

    journal = Journal(private_directories / "events.jsonl")
    app = api.build(Frugal(), journal, Rollbacks(Frugal(), journal), "0", 1)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app).exclude(path="/v1/events")

    for operation in schema.get_all_operations():

        @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.ok().as_strategy())
        def holds(case: Any) -> None:
            if isinstance(case.body, dict) and "timeout" in case.body:
                case.body["timeout"] = 0.01
            if case.query and "sample" in case.query:
                case.query["sample"] = 0.0
            # What no schema can say, such as that a cluster has the number already, is refused with the reason.
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        holds()
