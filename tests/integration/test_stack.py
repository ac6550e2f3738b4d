# SPDX-License-Identifier: Apache-2.0
"""The kernel's side of an interface: packets given to it as if they had arrived, and what it sends, taken or seen."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from netspace import Space, checksum, udp_frame, use_directories

pytest.importorskip("_cffi_backend", reason="cffi is not installed")
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making network interfaces needs root")

PEER = b"\x02\x00\x00\x00\x00\x09"


@pytest.fixture
def space(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Space]:
    """nic0 with the host's address, and the address of a peer that nobody has to ask for; far0 is the wire."""
    use_directories(private_directories, monkeypatch)
    with Space("rbstk") as made:
        made.pair("nic0", "far0")
        made.ip("addr add 198.51.100.1/24 dev nic0")
        made.ip("neigh add 198.51.100.2 lladdr 02:00:00:00:00:09 dev nic0")
        yield made


@pytest.fixture
def cluster(space: Space) -> Iterator[Any]:
    import ringbar

    with ringbar.Cluster.create(1, buffers=16384) as made:
        yield made


def opened(space: Space, cluster: Any, mode: str, name: str = "stack:nic0", **options: Any) -> Any:
    return space.inside(lambda: cluster.open_device(name, mode, **options))


def bound(space: Space, port: int) -> socket.socket:
    """A UDP socket of the host."""

    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind(("198.51.100.1", port))
        made.settimeout(5)
        return made

    return space.inside(make)


def links(space: Space) -> set[str]:
    return {link["ifname"] for link in json.loads(space.ip("-j link show"))}


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline, "not within 10 s"
        time.sleep(0.002)


def taken(rx: Any, port: int) -> bytes:
    """The next UDP packet to that port; others are let go."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with rx.recv(1, 0.5) as burst:
            packet = bytes(burst[0]) if len(burst) else b""
        if packet[12:14] == b"\x08\x00" and packet[23] == 17 and packet[36:38] == port.to_bytes(2, "big"):
            return packet
    raise AssertionError("nothing came")


def nothing_left(space: Space) -> bool:
    qdiscs = space.run("tc", "qdisc", "show")
    return links(space) == {"lo", "nic0", "far0"} and "clsact" not in qdiscs


def test_what_is_sent_the_kernel_takes_as_received(space: Space, cluster: Any) -> None:
    with opened(space, cluster, "tx") as tx, bound(space, 5000) as sink, space.wire("far0") as wire:
        payloads = [i.to_bytes(2, "big") + bytes(i) for i in range(300)]
        packets = [udp_frame(space.mac("nic0"), PEER, p) for p in payloads]
        for i in range(0, 300, 50):  # as many as the socket holds
            assert tx.write(packets[i : i + 50], timeout=5) == 50
            sent = [(p, ("198.51.100.2", 4444)) for p in payloads[i : i + 50]]
            assert [sink.recvfrom(2048) for _ in sent] == sent
        assert tx.stats()["packets"] == 300
        wire.settimeout(0.2)
        with pytest.raises(TimeoutError):
            wire.recv(2048)  # nothing of it went out
    assert nothing_left(space)


def test_what_is_no_frame_is_dropped_and_counted(space: Space, cluster: Any) -> None:
    with opened(space, cluster, "tx") as tx, bound(space, 5000) as sink:
        good = udp_frame(space.mac("nic0"), PEER, b"good")
        assert tx.write([bytes(13), good, bytes(3)], timeout=5) == 3
        assert sink.recv(64) == b"good"
        assert tx.stats()["drops"]["bad"] == 2


def test_packets_arrive_after_the_card_was_given_another_address(space: Space, cluster: Any) -> None:
    with opened(space, cluster, "tx") as tx, bound(space, 5000) as sink:
        space.ip("link set nic0 address 02:00:00:00:00:55")
        sink.settimeout(0.05)

        def arrives() -> bool:
            tx.write([udp_frame(space.mac("nic0"), PEER, b"here")])
            try:
                return sink.recv(64) == b"here"
            except TimeoutError:
                return False

        until(arrives)


def test_what_the_kernel_sends_is_taken_and_goes_out_again_after_closing(space: Space, cluster: Any) -> None:
    with space.wire("far0") as wire, bound(space, 4000) as source:
        with opened(space, cluster, "rx") as rx:
            source.sendto(b"to the peer", ("198.51.100.2", 7000))
            packet = taken(rx, 7000)
            assert packet[:12] == PEER + space.mac("nic0") and packet.endswith(b"to the peer")
            udp = packet[34:]
            assert checksum(packet[26:34] + b"\x00\x11" + len(udp).to_bytes(2, "big") + udp) == 0
            wire.settimeout(0.2)
            with pytest.raises(TimeoutError):
                wire.recv(2048)
            stats = rx.stats()
            assert (stats["mode"], stats["clock"]) == ("copy", "software")
        wire.settimeout(5)
        source.sendto(b"by itself", ("198.51.100.2", 7000))
        assert wire.recv(2048).endswith(b"by itself")
    assert nothing_left(space)


def test_observed_packets_go_their_way_as_well_and_any_number_may_look(space: Space, cluster: Any) -> None:
    import ringbar

    with space.wire("far0") as wire, bound(space, 4000) as source, ringbar.Cluster.attach(1) as other:
        ends = [opened(space, c, "rx", observe=True) for c in (cluster, other)]
        source.sendto(b"seen by all", ("198.51.100.2", 7000))
        assert wire.recv(2048).endswith(b"seen by all")
        for rx in ends:
            assert taken(rx, 7000).endswith(b"seen by all")
            assert rx.stats()["mode"] == "observe"
            rx.close()
    assert nothing_left(space)


def test_what_a_program_sends_on_the_card_is_not_taken_again(space: Space, cluster: Any) -> None:
    with opened(space, cluster, "rx") as rx, space.wire("far0") as wire, bound(space, 4000) as source:
        out = opened(space, cluster, "tx", "nic0")
        source.sendto(b"on its way", ("198.51.100.2", 7000))
        packet = taken(rx, 7000)
        assert out.write([packet]) == 1
        assert wire.recv(2048) == packet
        assert not [1 for _ in range(5) for _ in rx.recv(1, 0.02).lengths]
        out.close()


def test_large_tcp_segments_are_taken_as_the_wire_would_carry_them(space: Space, cluster: Any) -> None:
    """The kernel leaves cutting up and checksums to the card: here there is none, so it is done before."""
    with opened(space, cluster, "rxtx") as end:

        def connect() -> socket.socket:
            made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            made.setblocking(False)
            made.connect_ex(("198.51.100.2", 80))
            return made

        def tcp() -> bytes:
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                with end.recv(1, 0.5) as burst:
                    if len(burst) and burst[0][23] == 6:
                        return bytes(burst[0])
            raise AssertionError("nothing came")

        with space.inside(connect) as host:
            syn = tcp()
            answer = bytearray(20)
            answer[0:2], answer[2:4] = syn[36:38], syn[34:36]
            answer[4:8] = (1000).to_bytes(4, "big")
            answer[8:12] = (int.from_bytes(syn[38:42], "big") + 1).to_bytes(4, "big")
            answer[12:16] = b"\x50\x12\xff\xff"
            addresses = syn[30:34] + syn[26:30]
            answer[16:18] = checksum(addresses + b"\x00\x06\x00\x14" + bytes(answer)).to_bytes(2, "big")
            ip = bytearray(b"\x45\x00\x00\x28" + bytes(4) + b"\x40\x06\x00\x00" + addresses)
            ip[10:12] = checksum(bytes(ip)).to_bytes(2, "big")
            assert end.write([space.mac("nic0") + PEER + b"\x08\x00" + bytes(ip) + bytes(answer)]) == 1
            assert tcp()[47] == 0x10, "connected"
            host.setblocking(True)
            data = os.urandom(5000)  # less than the kernel sends without an answer
            host.sendall(data)
            stream = b""
            while len(stream) < len(data):
                packet = tcp()
                assert len(packet) <= 1514
                segment = packet[34 : 14 + int.from_bytes(packet[16:18], "big")]
                assert checksum(packet[26:34] + b"\x00\x06" + len(segment).to_bytes(2, "big") + segment) == 0
                stream += segment[segment[12] // 16 * 4 :]
            assert stream == data


def test_another_taker_is_busy_and_circles_are_refused(space: Space, cluster: Any) -> None:
    import ringbar

    with ringbar.Cluster.attach(1) as other, opened(space, cluster, "rx"):
        with pytest.raises(ringbar.Busy, match=rf"held by process {os.getpid()} ") as busy:
            opened(space, other, "rx")
        assert busy.value.holder
    with opened(space, cluster, "rx", "nic0"), pytest.raises(ringbar.Error, match="would be received from nic0 again"):
        opened(space, cluster, "tx")
    with (
        opened(space, cluster, "tx"),
        pytest.raises(ringbar.Error, match="would be received from nic0 again") as caught,
    ):
        opened(space, cluster, "rx", "nic0")
    assert "zc:nic0" in (caught.value.cure or "")
    assert nothing_left(space)


def test_what_cannot_be_opened_says_why_and_leaves_nothing(space: Space, cluster: Any) -> None:
    import ringbar

    with pytest.raises(ringbar.NotFound, match="there is no interface nosuch"):
        opened(space, cluster, "rx", "stack:nosuch")

    def without() -> None:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        if ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()):
            pytest.skip("capabilities cannot be given up here")
        with pytest.raises(ringbar.Error, match="CAP_NET_ADMIN") as caught:
            cluster.open_device("stack:nic0", "tx")
        assert "setcap" in (caught.value.cure or "")

    space.inside(without)
    small = ringbar.Cluster.create(2, buffers=512, size=256)
    with small, pytest.raises(ringbar.Error, match="too small"):
        opened(space, small, "rx")
    assert nothing_left(space)


def test_interface_that_vanishes_ends_in_an_error(space: Space, cluster: Any) -> None:
    import ringbar

    rx = opened(space, cluster, "rx")
    tx = opened(space, cluster, "tx")
    space.ip("link del nic0")
    time.sleep(0.02)
    with pytest.raises(ringbar.Detached, match="nic0 is gone"):
        rx.recv(1, 5)
    with pytest.raises(ringbar.Detached, match="nic0 is gone"):
        tx.write([bytes(60)])
    rx.close()
    tx.close()
    assert links(space) == {"lo"}


HOLD = """
import ringbar, sys, time
zc = ringbar.Cluster.attach(1)
ends = [zc.open_device("stack:nic0", mode) for mode in ("rx", "tx")]
print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_program_leaves_nothing_and_the_kernel_sends_by_itself_again(
    space: Space, cluster: Any, private_directories: Path
) -> None:
    holder = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{space.name}", sys.executable, "-c", HOLD],
        stdout=subprocess.PIPE,
        text=True,
        cwd=private_directories,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        assert len(links(space)) == 5
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate(timeout=30)
    until(lambda: nothing_left(space))
    with space.wire("far0") as wire, bound(space, 4000) as source:
        source.sendto(b"free", ("198.51.100.2", 7000))
        assert wire.recv(2048).endswith(b"free")


def test_a_tool_that_only_counts_takes_nothing_away(space: Space, cluster: Any) -> None:
    command = ["nsenter", f"--net=/run/netns/{space.name}", sys.executable, "-P", "-m", "ringbar"]
    counting = subprocess.Popen(
        [*command, "count", "-i", "stack:nic0", "--packets", "5", "--filter", "udp port 7000", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert counting.stderr is not None and b"stack:nic0 (observe)" in counting.stderr.readline()
        with space.wire("far0") as wire, bound(space, 4000) as source:
            for _ in range(5):
                source.sendto(b"seen", ("198.51.100.2", 7000))
                assert wire.recv(2048).endswith(b"seen")
        out, err = counting.communicate(timeout=30)
        assert counting.returncode == 0, err
        assert json.loads(out)["packets"] == 5
    finally:
        counting.kill()
        counting.wait()


def test_the_way_to_the_host_is_not_cut_by_mistake(space: Space, cluster: Any) -> None:
    import ringbar

    space.ip("route add default via 198.51.100.2 dev nic0")
    with pytest.raises(ringbar.Busy, match="carries the default route") as caught:
        opened(space, cluster, "rx")
    assert "observe" in (caught.value.cure or "")
    opened(space, cluster, "rx", observe=True).close()
    opened(space, cluster, "rx", take_all=True).close()
    opened(space, cluster, "tx").close()
