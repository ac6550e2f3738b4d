# SPDX-License-Identifier: Apache-2.0
"""NICs through the command line: frames there and back, and what a killed process leaves on an interface."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from nets import Net
from nets import net as net  # a fixture

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making network interfaces needs root")


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
    books = net.settled("7")["books"]
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


NO_COPY = """
import socket
from ringbar import Cluster
with Cluster.create(5) as zc:
    nics = [zc.open_device(name, "rxtx", writable=True) for name in ("zc:rba0", "zc:rbb0")]
    wires = []
    for name in ("rba1", "rbb1"):
        wires.append(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        wires[-1].bind((name, 3))
        wires[-1].settimeout(20)
    for there, back in ((0, 1), (1, 0)):
        for n in range(500):
            wires[there].send(b"\\2\\0\\0\\0\\0\\1" + bytes(6) + b"\\x88\\xb5" + n.to_bytes(4, "big") + bytes(46))
            while not len(burst := nics[there].recv(1, timeout=20)):
                pass
            handle = int(burst.handles[0])
            burst[0][6:12] = b"\\2\\0" + handle.to_bytes(4, "big")
            assert nics[back].send(burst, timeout=20) == 1
            frame = wires[back].recv(200)
            while frame[12:14] != b"\\x88\\xb5":
                frame = wires[back].recv(200)
            assert int.from_bytes(frame[14:18], "big") == n and int.from_bytes(frame[8:12], "big") == handle != 0
    for nic in nics:
        stats = nic.stats()
        assert stats["packets"] == 1000 and stats["copied"] == 0 and not any(stats["drops"].values()), stats
    print("good")
"""


def test_what_one_nic_receives_leaves_by_another_in_the_same_buffer(net: Net) -> None:
    assert net.python(NO_COPY).end() == "good\n"


OVERLOAD = """
import json
from ringbar import Cluster
with Cluster.create(5, buffers=65536) as zc, Cluster.attach(5) as other:
    rx, tx = zc.open_device("zc:rba0", "rx"), other.open_device("zc:rba1", "tx")
    sent = 0
    while sent < 30000:
        out = tx.alloc(64)
        for i in range(len(out)):
            out[i][:60] = b"\\2\\0\\0\\0\\0\\1" + bytes(6) + b"\\x88\\xb5" + bytes(46)
            out.lengths[i] = 60
        sent += tx.send(out, timeout=20)
    while tx.count:
        other.service()
    got = 0
    while burst := rx.recv(64, timeout=0.5):
        got += len(burst)
        burst.release()
    print(json.dumps({"sent": sent, "got": got, "rx": rx.stats(), "tx": tx.stats()}))
"""


def test_sent_is_received_and_dropped_under_overload(net: Net) -> None:
    """30,000 frames meet a receiver that looks the other way: every one is received, or counted by somebody."""
    seen = json.loads(net.python(OVERLOAD).end())
    rx, tx = seen["rx"], seen["tx"]
    assert seen["sent"] == tx["packets"] and seen["got"] == rx["packets"] > 0
    dropped = rx["kernel_dropped"] + rx["kernel_ring_full"]
    assert dropped > 0, seen
    assert seen["sent"] == seen["got"] + dropped + rx["kernel_passed"] + tx["nic_tx_dropped"], seen


LINK = """
import sys
from ringbar import Cluster, Error
with Cluster.create(5) as zc:
    rx = zc.open_device("zc:rba0", "rx")
    print("ready", flush=True)
    try:
        while True:
            burst = rx.recv(64, timeout=0.05)
            for view in burst:
                if bytes(view[12:14]) == b"\\x88\\xb5":
                    print(bytes(view[14:20]).decode(), flush=True)
            burst.release()
    except Error as e:
        print(type(e).__name__, e.code, e.message)
"""


def test_a_link_that_goes_down_comes_back_and_an_interface_that_vanishes_is_an_error(net: Net) -> None:
    def wire(text: bytes) -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind(("rba1", 0))
            raw.send(bytes.fromhex("020000000001") + bytes(6) + b"\x88\xb5" + text + bytes(46))

    program = net.python(LINK)
    assert program.line() == "ready"
    net.inside(lambda: wire(b"first."))
    assert program.line() == "first."
    for end in "10":
        net.ip(f"link set rba{end} down")
        net.ip(f"link set rba{end} up")
    net.inside(lambda: wire(b"second"))
    assert program.line() == "second"
    net.ip("link del rba0")
    assert program.line() == "Detached interface-gone interface rba0 is gone"
    program.end()


def test_doctor_examines_an_interface_of_its_own_name_space(net: Net) -> None:
    net.ip("link set rba0 mtu 2000")
    report = net.json("doctor", "zc:rba0", status=None)
    (findings,) = [value for value in report.values() if isinstance(value, list) and value and "check" in value[0]]
    found = {f["detail"]: f["state"] for f in findings if f["check"] == "zc:rba0"}
    tells = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 3)
    can = "XDP in the driver, with a copy" if tells else "what its driver can do is said when it is opened"
    (driver,) = [detail for detail in found if detail.startswith(f"driver veth, 1 receive queue; {can}")]
    assert found.pop(driver) == found.pop("rba0 is up, mtu 2000") == "ok"
    (mtu,) = found
    assert "more than the 1710" in mtu
    (card,) = [f["detail"] for f in findings if f["check"] == "card rba0"]
    assert card.startswith(f"veth, 1 queue; {can}")


JUMBO = """
import json, socket
from ringbar import Bridge, Cluster
with Cluster.create(5, buffers=32768) as zc, Cluster.attach(5) as other:
    rx, out = zc.open_device("zc:rba0", "rx"), zc.open_device("zc:rbb0", "tx")
    wires = []
    for name in ("rba1", "rbb1"):
        wires.append(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        wires[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        wires[-1].bind((name, 0x88b5))
        wires[-1].settimeout(20)
    def frame(n, size):
        return (b"\\2\\0\\0\\0\\0\\1" + bytes(6) + b"\\x88\\xb5" + n.to_bytes(4, "big")).ljust(size, bytes([n % 256]))
    sizes = [60, 1700, 1728, 1729, 4000, 8999, 9014, 100]
    with Bridge(rx, out) as bridge:
        for n in range(200):
            sent = frame(n, sizes[n % len(sizes)])
            wires[0].send(sent)
            got = wires[1].recv(10000)
            assert got == sent, (n, len(sent), len(got))
    wires[0].send(frame(7, 9014))
    while not len(burst := rx.recv(64, timeout=20)):
        pass
    whole = b"".join(bytes(view) for view in burst)
    assert whole == frame(7, 9014) and len(burst) == 6
    print(json.dumps([rx.stats(), out.stats()]))
"""


def test_packets_larger_than_a_buffer_come_and_go_in_several(net: Net) -> None:
    release = os.uname().release.split(".")
    if (int(release[0]), int(release[1].split("-")[0])) < (6, 6):
        pytest.skip("AF_XDP packets in several buffers came with kernel 6.6")
    for nic in ("rba0", "rba1", "rbb0", "rbb1"):
        net.ip(f"link set {nic} mtu 9000")
    rx, tx = json.loads(net.python(JUMBO).end())
    assert rx["packets"] == 201 and tx["packets"] == 200
    assert not any(rx["drops"].values()) and not any(tx["drops"].values()) and not rx["kernel_dropped"]


@pytest.mark.parametrize("inside", [True, False])
def test_what_several_nics_held_comes_home_wherever_the_next_command_runs(net: Net, inside: bool) -> None:
    """Killed with two NICs full of buffers and frames on their way; the next command may be in another name space."""
    net.json("cluster", "create", "7", "--queues", "1", "--pages", "4k")
    for _ in range(3):
        both = net.start("bridge", "-c", "7", "-i", "zc:rba0", "-o", "zc:rbb0", "--both")
        send = net.start("send", "-o", "zc:rba1", "--size", "200")
        both.send_signal(signal.SIGKILL)
        both.wait(30)
        send.kill()
        send.wait(30)
        if not inside:
            net.leave()
        status = net.settled("7")
        net.enter()
        assert sum(b["devices"] + b["quiescing"] + b["lent"] for b in status["books"]) == 0, status["books"]
        assert not status["devices"]
    net.json("cluster", "destroy", "7")
    net.json("status")
    assert net.programs() == []
