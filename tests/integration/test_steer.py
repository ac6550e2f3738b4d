# SPDX-License-Identifier: Apache-2.0
"""Selective bypass: a steering rule names what is taken from a NIC, everything else stays with the kernel."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from typing import Any

import pytest
from nets import Net, Program
from nets import net as net  # a fixture

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making network interfaces needs root")

#: Receives from rba0 by $RULE and answers each line: a rule replaces the one before, an empty line tells what came.
TAKER = """
import json, os, sys, threading
from ringbar import Cluster, Error
zc = Cluster.attach(5) if os.environ.get("ATTACH") else Cluster.create(5)
options = json.loads(os.environ.get("OPTIONS", "{}"))
rx = zc.open_device(os.environ.get("DEVICE", "zc:rba0"), "rx", steer=os.environ.get("RULE"), **options)
print("ready", rx.stats()["mode"], rx.address, flush=True)
ports, asked = {}, []
def listen():
    for line in sys.stdin:
        asked.append(line.rstrip("\\n"))
    asked.append(None)
threading.Thread(target=listen, daemon=True).start()
while True:
    burst = rx.recv(64, timeout=0.02)
    for i in range(len(burst)):
        b = burst.copy(i)
        port = int.from_bytes(b[36:38], "big") if b[12:14] == b"\\x08\\x00" and b[23] == 17 else -1
        ports[port] = ports.get(port, 0) + 1
    burst.release()
    if asked and not len(burst):
        what = asked.pop(0)
        if what is None:
            break
        if what:
            try:
                rx.steer(what)
                print("steered", flush=True)
            except Error as e:
                print("refused", e.code, e.message, flush=True)
        else:
            print(json.dumps({"ports": ports, "stats": rx.stats(), "devices": zc.status()["devices"]}), flush=True)
rx.close()
"""


class Wire:
    """UDP and TCP from the far name space to the near one."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.sender = net.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM), far=True)
        self.sockets = [self.sender]

    def listen(self, port: int) -> socket.socket:
        """The stack's own socket."""
        made = self.net.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        made.bind(("198.51.100.1", port))
        self.sockets.append(made)
        return made

    def send(self, port: int, count: int = 1) -> None:
        for n in range(count):
            self.sender.sendto(b"ring %d" % n, ("198.51.100.1", port))

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        for made in self.sockets:
            made.close()


def received(taker: Program, expected: dict[str, int]) -> dict[str, Any]:
    """What a taker says once it has as much as expected: packets may wait for the kernel's own threads."""
    for _ in range(500):
        seen: dict[str, Any] = json.loads(taker.ask())
        if seen["ports"] == expected:
            return seen
    raise AssertionError(f"{seen['ports']} and not {expected}")


def waiting(sock: socket.socket, timeout: float) -> int:
    """Datagrams that came: the first may take ``timeout``, the rest are there with it."""
    count = 0
    sock.settimeout(timeout)
    with contextlib.suppress(socket.timeout, BlockingIOError):
        while sock.recv(100):
            count += 1
            sock.settimeout(0.05)
    return count


def test_a_tcp_connection_lives_while_all_of_a_udp_port_is_captured(net: Net) -> None:
    net.move_away()
    before = net.ip("-d -j link show rba0")
    with Wire(net) as wire:
        stack = wire.listen(5000)
        server = net.inside(lambda: socket.create_server(("198.51.100.1", 8080)))
        wire.sockets.append(server)
        client = net.inside(lambda: socket.create_connection(("198.51.100.1", 8080), timeout=30), far=True)
        wire.sockets.append(client)
        accepted, _ = server.accept()
        wire.sockets.append(accepted)
        taker = net.python(TAKER, RULE="udp port 5000")
        assert taker.line().startswith("ready")
        echoed = 0

        def echo() -> None:
            while data := accepted.recv(4096):
                accepted.sendall(data)

        echoing = threading.Thread(target=echo)
        echoing.start()
        for n in range(100):
            wire.send(5000, 20)
            client.sendall(b"%08d" % n)
            echoed += client.recv(8, socket.MSG_WAITALL) == b"%08d" % n
        client.shutdown(socket.SHUT_WR)
        echoing.join(30)
        assert echoed == 100
        seen = received(taker, {"5000": 2000})
        assert seen["stats"]["kernel_passed"] >= 100
        assert waiting(stack, 0.0) == 0
        taker.end()
        wire.send(5000)
        assert waiting(stack, 10) == 1
    after = json.loads(net.ip("-d -j link show rba0"))
    assert after == json.loads(before)


def test_a_killed_takers_traffic_falls_to_the_stack_at_once(net: Net) -> None:
    net.move_away()
    with Wire(net) as wire:
        stack, other = wire.listen(5000), wire.listen(6000)
        taker = net.python(TAKER, RULE="udp port 5000")
        taker.line()
        wire.send(5000)
        received(taker, {"5000": 1})
        taker.process.send_signal(signal.SIGKILL)
        taker.process.wait(30)
        wire.send(5000)
        wire.send(6000)
        assert waiting(stack, 10) == 1 and waiting(other, 10) == 1
    assert net.programs() == ["rba0"]
    net.json("status")
    assert net.programs() == []


def test_a_rule_is_replaced_while_packets_flow_and_none_is_lost_between(net: Net) -> None:
    """Both rules name port 5000: whatever the moment of the change, all of it is taken."""
    net.move_away()
    rules = ("udp port 5000", "udp port 5000 or udp port 6000", "udp portrange 5000-5010", "all", "udp")
    with Wire(net) as wire:
        stack = wire.listen(5000)
        taker = net.python(TAKER, RULE=rules[0])
        taker.line()
        sent = 0
        stop = threading.Event()

        def flow() -> None:
            nonlocal sent
            while not stop.wait(0.0005):
                wire.send(5000)
                sent += 1

        flowing = threading.Thread(target=flow)
        flowing.start()
        try:
            for rule in rules * 4:
                assert taker.ask(rule) == "steered"
        finally:
            stop.set()
            flowing.join(30)
        received(taker, {"5000": sent})
        assert sent > 0 and waiting(stack, 0.0) == 0


def test_a_bad_rule_is_refused_and_the_old_one_holds(net: Net) -> None:
    net.move_away()
    with Wire(net) as wire:
        stack = wire.listen(6000)
        taker = net.python(TAKER, RULE="udp port 5000")
        taker.line()
        assert taker.ask("udp prt 5000").startswith("refused bad-filter")
        assert "XDP" in taker.ask("inbound")
        assert taker.ask(" or ".join(f"host 10.1.{n // 200}.{n % 200}" for n in range(2500))).startswith("refused")
        wire.send(5000)
        wire.send(6000)
        received(taker, {"5000": 1})
        assert waiting(stack, 10) == 1


def test_long_lists_of_prefixes_and_ports_are_one_rule(net: Net) -> None:
    net.move_away()
    prefixes = " or ".join(f"src net 10.{n}.0.0/16" for n in range(120))
    ports = " or ".join(f"udp dst port {n}" for n in range(5000, 5100, 2))
    with Wire(net) as wire:
        stack = wire.listen(5003)
        taker = net.python(TAKER, RULE=f"({prefixes}) or ({ports})")
        taker.line()
        for port in (5000, 5003, 5098):
            wire.send(port)
        received(taker, {"5000": 1, "5098": 1})
        assert waiting(stack, 10) == 1


def test_several_takers_each_get_what_their_rule_names(net: Net) -> None:
    """The first process owns the NIC's queue and feeds the second; a third changes its mind; each may leave."""
    net.move_away()
    with Wire(net) as wire:
        stack = wire.listen(9000)
        owner = net.python(TAKER, RULE="udp port 5000 or udp port 7000")
        owner.line()
        second = net.python(TAKER, RULE="udp port 6000 or udp port 7000", ATTACH="1")
        assert second.line() == "ready fed zc:rba0"
        third = net.python(TAKER, RULE="udp port 8000", ATTACH="1")
        assert third.line() == "ready fed zc:rba0"
        for port in (5000, 6000, 7000, 8000, 9000):
            wire.send(port, 10)
        received(second, {"6000": 10, "7000": 10})  # the first match
        received(third, {"8000": 10})
        seen = received(owner, {"5000": 10})
        assert waiting(stack, 10) == 10
        shown = [(d["name"], d["mode"], d["pid"], d["rule"]) for d in seen["devices"]]
        assert shown[1:] == [
            ("zc:rba0", "fed", second.pid, "udp port 6000 or udp port 7000"),
            ("zc:rba0", "fed", third.pid, "udp port 8000"),
        ]
        assert shown[0][2:] == (owner.pid, "udp port 5000 or udp port 7000")
        assert third.ask("udp port 9000") == "steered"
        wire.send(9000, 5)
        wire.send(8000, 5)
        received(third, {"8000": 10, "9000": 5})
        third.end()
        second.process.kill()  # its rule goes too
        second.process.wait(30)
        for _ in range(200):
            devices = json.loads(owner.ask())["devices"]
            if len(devices) == 1:
                break
        assert len(devices) == 1
        wire.send(9000, 3)
        wire.send(7000, 3)
        assert waiting(stack, 10) == 3
        received(owner, {"5000": 10, "7000": 3})
        books = net.json("status", "5")["clusters"][0]
        assert not books["queues"]
        owner.end()


@pytest.mark.parametrize("killed", [False, True])
def test_takers_are_detached_when_the_owner_ends(net: Net, killed: bool) -> None:
    net.move_away()
    net.json("cluster", "create", "5", "--pages", "4k")
    owner = net.python(TAKER, RULE="udp port 5000", ATTACH="1")
    owner.line()
    second = net.python(TAKER, RULE="udp port 6000", ATTACH="1")
    assert second.line() == "ready fed zc:rba0"
    if killed:
        owner.process.kill()
        owner.process.wait(30)
    else:
        owner.end()
    _, said = second.process.communicate(timeout=30)
    assert "Detached" in said and "zc:rba0" in said
    status = net.settled("5")
    assert not status["queues"] and not status["devices"]
    assert sum(b["devices"] + b["quiescing"] + b["lent"] for b in status["books"]) == 0
    assert net.programs() == []
    net.json("cluster", "destroy", "5")


def test_a_second_process_without_a_rule_is_told_who_has_the_nic(net: Net) -> None:
    net.move_away()
    owner = net.python(TAKER, RULE="udp port 5000")
    owner.line()
    second = net.python(TAKER, ATTACH="1")
    _, said = second.process.communicate(timeout=30)
    assert "Busy" in said and str(owner.pid) in said
    owner.end()


def test_a_nic_with_the_default_route_needs_a_rule_or_a_word(net: Net) -> None:
    net.move_away()
    net.ip("route add default via 198.51.100.2 dev rba0")
    _, said = net.python(TAKER).process.communicate(timeout=30)
    assert "carries the default route" in said and "--take-all" in said
    for options in ({"RULE": "udp port 5000"}, {"OPTIONS": '{"take_all": true}'}, {"RULE": "all"}):
        taker = net.python(TAKER, **options)
        assert taker.line().startswith("ready")
        taker.end()
    net.ip("route del default")
    _, said = net.python(TAKER, SSH_CONNECTION="192.0.2.7 40000 198.51.100.1 22").process.communicate(timeout=30)
    assert "SSH session" in said


def test_promiscuous_mode_ends_with_the_device_however_it_ends(net: Net) -> None:
    net.move_away()

    def promiscuous() -> int:
        return int(json.loads(net.ip("-d -j link show rba0"))[0]["promiscuity"])

    for end in ("close", "kill"):
        taker = net.python(TAKER, RULE="udp", OPTIONS='{"promiscuous": true}')
        taker.line()
        assert promiscuous() == 1
        if end == "close":
            taker.end()
        else:
            taker.process.kill()
            taker.process.wait(30)
        assert promiscuous() == 0


def test_some_queues_of_a_nic_are_one_device(net: Net) -> None:
    net.move_away(queues=4)
    taker = net.python(TAKER, DEVICE="zc:rba0@1-2")
    assert taker.line() == "ready driver zc:rba0@1-2"
    taker.end()
    _, said = net.python(TAKER, DEVICE="zc:rba0@2-5").process.communicate(timeout=30)
    assert "has no queues 2 to 5: it has 4" in said


def test_busy_polling_receives(net: Net) -> None:
    net.move_away()
    with Wire(net) as wire:
        taker = net.python(TAKER, RULE="udp port 5000", OPTIONS='{"busy_poll": 50}')
        taker.line()
        wire.send(5000, 100)
        received(taker, {"5000": 100})
        taker.end()


METADATA = """
import json, sys
from ringbar import Cluster
with Cluster.create(5) as zc:
    rx = zc.open_device("zc:rba0", "rx", metadata=True, steer="udp port 5000")
    print("ready", flush=True)
    for rule in ("udp port 5000", "all", "udp port 6000"):
        rx.steer(rule)
        print("steered", flush=True)
        sys.stdin.readline()
        came = []
        while burst := rx.recv(64, timeout=0.5 if came else 20):
            for i, hash_ in enumerate(burst.hashes):
                came.append([int.from_bytes(burst.copy(i)[36:38], "big"), int(hash_)])
            burst.release()
        print(json.dumps(came), flush=True)
    print(rx.stats()["clock"])
"""


def test_a_driver_that_knows_them_gives_the_hashes_of_packets(net: Net) -> None:
    """veth hashes flows, and keeps no time of its own: the clock is then the host's."""
    release = os.uname().release.split(".")
    if (int(release[0]), int(release[1].split("-")[0])) < (6, 3):
        pytest.skip("drivers tell XDP programs what they know from kernel 6.3 on")
    net.move_away()
    with Wire(net) as wire:
        program = net.python(METADATA)
        assert program.line() == "ready"
        for expected in ([5000] * 3, [5000] * 3 + [6000] * 3, [6000] * 3):
            assert program.line() == "steered"
            wire.send(5000, 3)
            wire.send(6000, 3)
            came = [each for each in json.loads(program.ask()) if each[0] in (5000, 6000)]
            assert [port for port, _ in came] == expected
            assert all(hash_ for _, hash_ in came)
            assert len({hash_ for _, hash_ in came}) == len(set(expected))
        assert program.end() == "software\n"
    assert net.programs() == []
    killed = net.python(METADATA)
    killed.line()
    killed.process.kill()
    killed.process.wait(30)
    assert net.programs() == ["rba0"]
    net.json("status")
    assert net.programs() == []


def test_tools_share_a_nic_and_status_shows_who_takes_what(net: Net) -> None:
    net.move_away()
    net.json("cluster", "create", "99", "--pages", "4k")
    owner = net.start("count", "-c", "99", "-i", "zc:rba0", "--steer", "udp port 5000")
    fed = net.start("count", "-c", "99", "-i", "zc:rba0", "--steer", "udp port 6000", "--packets", "20", "--json")
    devices = net.json("status", "99")["clusters"][0]["devices"]
    assert [(d["name"], d["pid"], d["rule"], d["fed_by"]) for d in devices] == [
        ("zc:rba0", owner.pid, "udp port 5000", None),
        ("zc:rba0", fed.pid, "udp port 6000", "99@0"),
    ]
    assert [d["mode"] for d in devices] == ["driver", "fed"]
    with Wire(net) as wire:
        for _ in range(20):
            wire.send(5000)
            wire.send(6000)
        out, err = fed.communicate(timeout=30)
        assert fed.returncode == 0, err
        assert json.loads(out)["packets"] == 20, out
    owner.send_signal(signal.SIGINT)
    owner.communicate(timeout=30)
    net.json("cluster", "destroy", "99")
