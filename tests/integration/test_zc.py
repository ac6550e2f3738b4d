# SPDX-License-Identifier: Apache-2.0
"""NICs through the command line: frames there and back, and what a killed process leaves on an interface."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making network interfaces needs root")


class Net:
    """A network name space with two veth pairs, rba0-rba1 and rbb0-rbb1."""

    def __init__(self, root: Path) -> None:
        self.name = f"rbzc{secrets.token_hex(3)}"
        self.root = root
        self.environment = {**os.environ, "RINGBAR_RUN": str(root / "run"), "RINGBAR_SHM": str(root / "shm")}
        self.started: list[subprocess.Popen[str]] = []

    def ip(self, words: str) -> str:
        done = subprocess.run(["ip", "-n", self.name, *words.split()], capture_output=True, text=True, check=True)
        return done.stdout

    def command(self, *words: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.name}", sys.executable, "-m", "ringbar", *words]

    def json(self, *words: str, status: int = 0) -> Any:
        """A command to its end; its document."""
        done = subprocess.run(
            self.command(*words, "--json"),
            env=self.environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return json.loads(done.stdout)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A tool that runs until it is ended; returns when its devices are open."""
        process = subprocess.Popen(
            self.command(*words),
            env=self.environment,
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "receiving" in line or "\u2192" in line, line
        return process

    def inside(self, what: Callable[[], T]) -> T:
        """Call something in a thread that is in this name space."""
        result: list[T] = []

        def body() -> None:
            with open(f"/run/netns/{self.name}", "rb") as space:
                _setns(space.fileno())
                result.append(what())

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        return result[0]

    def programs(self) -> list[str]:
        """Interfaces that have an XDP program."""
        return [link["ifname"] for link in json.loads(self.ip("-j -d link show")) if "xdp" in link]


def _setns(descriptor: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns")


@pytest.fixture
def net(private_directories: Path) -> Iterator[Net]:
    made = Net(private_directories)
    subprocess.run(["ip", "netns", "add", made.name], check=True)
    try:
        for key in ("all", "default"):
            subprocess.run(
                ["ip", "netns", "exec", made.name, "sysctl", "-qw", f"net.ipv6.conf.{key}.disable_ipv6=1"], check=False
            )
        for pair in "ab":
            made.ip(f"link add rb{pair}0 type veth peer name rb{pair}1")
            for end in "01":
                made.ip(f"link set rb{pair}{end} up")
        yield made
    finally:
        for process in made.started:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=30)
        subprocess.run(["ip", "netns", "del", made.name], check=True)


def reaches_stack(net: Net, interface: str) -> bool:
    """Whether a UDP packet that arrives on an interface gets to a socket."""
    net.ip(f"addr replace 198.51.100.1/24 dev {interface}")
    mac = json.loads(net.ip(f"-j link show {interface}"))[0]["address"]

    def attempt() -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink, socket.socket(
            socket.AF_PACKET, socket.SOCK_RAW
        ) as wire:
            sink.bind(("198.51.100.1", 5555))
            sink.settimeout(5)
            wire.bind((interface[:-1] + "1", 0))
            header = bytes.fromhex("450000250000000040110000c6336402c6336401")
            total = sum(int.from_bytes(header[i : i + 2], "big") for i in range(0, 20, 2))
            total = (total & 0xFFFF) + (total >> 16)
            header = header[:10] + (~total & 0xFFFF).to_bytes(2, "big") + header[12:]
            udp = b"".join(n.to_bytes(2, "big") for n in (4444, 5555, 17, 0)) + b"ring here"
            wire.send(bytes.fromhex(mac.replace(":", "")) + bytes(6) + b"\x08\x00" + header + udp)
            try:
                return sink.recv(64) == b"ring here"
            except TimeoutError:
                return False

    return net.inside(attempt)


def test_frames_go_out_of_one_nic_and_come_in_by_the_other_unharmed(net: Net) -> None:
    found = net.json("send", "-o", "zc:rba0", "-i", "zc:rba1", "--packets", "20000", "--window", "512", "--size", "600")
    assert found["sent"]["packets"] == found["received"]["packets"] == 20000
    assert [found["verify"][fault] for fault in ("lost", "reordered", "duplicated", "corrupted")] == [0] * 4
    assert net.programs() == []


def test_a_killed_process_leaves_the_traffic_to_the_stack_and_the_next_command_cleans_up(net: Net) -> None:
    tool = net.start("count", "-i", "zc:rba0")
    assert net.programs() == ["rba0"]
    tool.send_signal(signal.SIGKILL)
    tool.wait(30)
    assert reaches_stack(net, "rba0")
    net.json("status")
    assert net.programs() == []


def test_a_killed_process_gives_its_buffers_back_to_a_persistent_cluster(net: Net) -> None:
    net.json("cluster", "create", "7", "--queues", "1", "--pages", "4k")
    tool = net.start("bridge", "-i", "zc:rba0", "-o", "7@0")
    tool.send_signal(signal.SIGKILL)
    tool.wait(30)
    status = net.json("status", "7")
    books = status["clusters"][0]["books"]
    assert sum(book["devices"] + book["quiescing"] + book["lent"] for book in books) == 0, books
    assert net.programs() == []
    again = net.json("bridge", "-i", "zc:rba0", "-o", "7@0", "--seconds", "0.2")
    assert again["dropped"] == 0
    net.json("cluster", "destroy", "7")


def test_a_nic_queue_has_one_owner_and_the_second_is_told_who(net: Net) -> None:
    tool = net.start("count", "-i", "zc:rba0")
    refused = net.json("count", "-i", "zc:rba0", status=1)
    assert refused["error"]["code"] == "busy"
    assert str(tool.pid) in refused["error"]["message"]
    tool.send_signal(signal.SIGINT)
    tool.communicate(timeout=30)
    assert tool.returncode == 0
    assert net.programs() == []


@pytest.mark.parametrize(
    ("prepare", "device", "words"),
    [
        ("", "zc:rbnone", "rbnone"),
        ("link set rba0 down", "zc:rba0", "down"),
        ("", "zc:rba0@9", "queue"),
    ],
)
def test_what_cannot_be_opened_is_named_with_its_cure(net: Net, prepare: str, device: str, words: str) -> None:
    if prepare:
        net.ip(prepare)
    refused = net.json("count", "-i", device, status=1)
    assert words in refused["error"]["message"]
    assert refused["error"]["cure"]


SHORT_FRAMES = """
from ringbar import Bridge, Cluster
with Cluster.create(5, queues=1) as zc, Cluster.attach(5) as other:
    with zc.open_queue(0, "tx") as tx, other.open_queue(0, "rx") as rx, other.open_device("zc:rba0", "tx") as out:
        zc.service()
        with Bridge(rx, out, packets=4) as bridge:
            tx.write([b"x" * 10, b"y" * 60, b"z" * 5, b"w" * 60])
            bridge.wait(20)
            stats = bridge.stats()
        print(stats["packets"], stats["dropped"], stats["error"], out.stats()["packets"], out.stats()["drops"]["bad"])
"""


def test_frames_too_short_for_a_nic_cost_only_themselves(net: Net) -> None:
    done = subprocess.run(
        ["nsenter", f"--net=/run/netns/{net.name}", sys.executable, "-c", SHORT_FRAMES],
        env=net.environment,
        cwd=net.root,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["4", "2", "0", "2", "2"], done.stdout + done.stderr
