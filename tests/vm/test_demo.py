# SPDX-License-Identifier: Apache-2.0
"""The demo's path, NIC to VM 1 to VM 2 to NIC: the demo, one that is sabotaged, and real captures' packets."""

from __future__ import annotations

import json
import os
import pathlib
import struct
import subprocess
import sys
from typing import Any

import pytest
from vmtools import Shell, Tool, read_line, vm

from ringbar.qemu.launch import Guest

pytestmark = pytest.mark.vm

PACKETS = 200_000


def start_demo(shell: Shell, file: pathlib.Path, packets: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "ringbar.host.demo", "--packets", str(packets), "--json-file", str(file)],
        env={**os.environ, **shell.variables}, cwd=shell.root,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    shell.started.append(process)
    return process


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Until it has printed this on standard error."""
    while text not in read_line(process, 100, process.stderr):
        pass


def test_the_demo_brings_every_packet_back(shell: Shell, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "build" / "demo.json"
    process = start_demo(shell, file, PACKETS)
    out, err = process.communicate(timeout=110)
    assert process.returncode == 0, err
    said = json.loads(file.read_text())
    assert said["accelerator"] in ("tcg", "kvm") and said["accelerator"].upper() in out
    assert [v["name"] for v in said["vms"]] == ["vm1", "vm2"]
    assert said["hot_plugged_while_running"] is True
    assert said["sent"] == said["received"] == PACKETS
    assert [said[name] for name in ("lost", "reordered", "corrupted", "duplicated")] == [0, 0, 0, 0]
    assert said["copies_per_packet"] == 0
    assert said["seconds"] > 0
    assert len(said["rates_pps"]) == 5 and all(rate > 0 for rate in said["rates_pps"].values())
    assert f"{PACKETS:,} of {PACKETS:,}" in out
    assert shell.json("cluster", "list")["clusters"] == []


def test_a_sabotaged_demo_fails(shell: Shell, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "demo.json"
    process = start_demo(shell, file, 50_000_000)
    wait_for(process, "NICs:")
    wait_for(process, "received")  # packets are on their way
    shell("queue", "set", "99@1", "--pause")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 1, f"{out}{err}"
    assert "Traceback" not in err
    said = json.loads(file.read_text())
    assert said["lost"] > 0 and said["received"] < 50_000_000
    assert shell.json("cluster", "list")["clusters"] == []


# ---- real packets ---------------------------------------------------------------------------------------------------

CAPTURES = {
    "golang-github-google-gopacket-dev": ("test_dns.pcap", "test_ethernet.pcap"),
    "sip-tester": ("g711a.pcap", "dtmf_2833_1.pcap"),
}


def frames(file: pathlib.Path) -> list[bytes]:
    """The Ethernet frames of a capture, as they were on the wire."""
    data = file.read_bytes()
    order = "<" if data[:4] in (b"\xd4\xc3\xb2\xa1", b"\x4d\x3c\xb2\xa1") else ">"
    (link,) = struct.unpack(order + "I", data[20:24])
    assert link == 1, f"{file} is no capture of Ethernet"
    found, at = [], 24
    while at < len(data):
        _, _, length, wire = struct.unpack(order + "IIII", data[at : at + 16])
        assert length == wire, f"{file} has cut packets"
        found.append(data[at + 16 : at + 16 + length])
        at += 16 + length
    return found


@pytest.fixture(scope="session")
def captured(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Frames of real captures that Debian packages ship: DNS, TCP, and a telephone call (RTP)."""
    work = tmp_path_factory.mktemp("captures")
    for package in CAPTURES:
        done = subprocess.run(
            ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package],
            cwd=work, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"Debian's package {package} cannot be fetched: {done.stderr.strip()}")
    for archive in work.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(archive), str(work / "x")], check=True)
    found: list[bytes] = []
    for names in CAPTURES.values():
        for name in names:
            (file,) = (work / "x").rglob(name)
            found += frames(file)
    return found


# In a network name space of its own: two veth pairs; ringbar between the inner ends, plain sockets at the outer ones.
RELAY = """
import json, pathlib, socket, subprocess, sys
import ringbar

frames = [bytes.fromhex(line) for line in json.loads(sys.stdin.readline())]
for name in ("all", "default"):
    pathlib.Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
for one, other in (("rbgen", "rbin"), ("rbout", "rbchk")):
    subprocess.run(["ip", "link", "add", one, "type", "veth", "peer", "name", other], check=True)
    for name in (one, other):
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
everything = socket.htons(3)
sink = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, everything)
sink.bind(("rbchk", 3))
source = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
source.bind(("rbgen", 0))
sink.settimeout(20)
back = []
with ringbar.Cluster.attach(99) as zc, zc.open_device("zc:rbin", "rx") as nic, zc.open_queue(2, "rx") as last, \\
        zc.open_queue(0, "tx") as first, zc.open_device("zc:rbout", "tx") as out, \\
        ringbar.Bridge([nic, last], [first, out]) as bridge:
    try:
        for at in range(0, len(frames), 32):
            some = frames[at : at + 32]
            for frame in some:
                source.send(frame)
            while len(back) < at + len(some):
                back.append(sink.recv(65536))
    except TimeoutError:
        pass
    stats = bridge.stats()
print(json.dumps({"back": [frame.hex() for frame in back], "dropped": stats["dropped"]}))
"""


def test_real_packets_come_back_byte_for_byte(
    shell: Shell, guest_pc: Guest, guest_wide: Guest, captured: list[bytes]
) -> None:
    assert len(captured) > 200 and len({len(frame) for frame in captured}) > 10
    shell.cluster(99, 3)
    shell("attach", vm(guest_pc), "99@0", "--tx", "99@1")
    shell("attach", vm(guest_wide), "99@1", "--tx", "99@2")
    with Tool(guest_pc, "bridge", "-i", "99@0", "-o", "99@1"), Tool(guest_wide, "bridge", "-i", "99@1", "-o", "99@2"):
        done = subprocess.run(
            ["unshare", "--net", sys.executable, "-c", RELAY],
            input=json.dumps([frame.hex() for frame in captured]) + "\n",
            env={**os.environ, **shell.variables}, cwd=shell.root, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said: dict[str, Any] = json.loads(done.stdout)
        assert said["dropped"] == 0
        assert said["back"] == [frame.hex() for frame in captured]
        queues = shell.status()["queues"]
        assert [q["packets"] for q in queues[:2]] == [len(captured)] * 2
        assert all(q["copied"] == 0 for q in queues)
    shell.detach(guest_wide)
    shell.detach(guest_pc)
    shell.comes_home()
