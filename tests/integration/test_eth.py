# SPDX-License-Identifier: Apache-2.0
"""Interfaces by their names, one copy a packet: what comes in, what goes out, and interfaces that come and go."""

from __future__ import annotations

import ctypes.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from netspace import Space, checksum, udp_frame, use_directories

pytest.importorskip("_cffi_backend", reason="cffi is not installed")
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making network interfaces needs root")
need_pcap = pytest.mark.skipif(ctypes.util.find_library("pcap") is None, reason="libpcap is not installed")

ALL = b"\xff" * 6
OWN = b"\x02\x00\x00\x00\x00\x07"


@pytest.fixture
def space(private_directories: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Space]:
    use_directories(private_directories, monkeypatch)
    with Space("rbeth") as made:
        made.pair("nic0", "far0")
        yield made


@pytest.fixture
def cluster(space: Space) -> Iterator[Any]:
    import ringbar

    with ringbar.Cluster.create(1, buffers=8192) as made:
        yield made


def opened(space: Space, cluster: Any, mode: str, name: str = "nic0", **options: Any) -> Any:
    return space.inside(lambda: cluster.open_device(name, mode, **options))


def received(rx: Any, n: int) -> list[bytes]:
    """Exactly n packets, within ten seconds."""
    got: list[bytes] = []
    deadline = time.monotonic() + 10
    while len(got) < n:
        assert time.monotonic() < deadline, f"{len(got)} of {n} packets came"
        with rx.recv(64, 0.5) as burst:
            got += [bytes(burst[i]) for i in range(len(burst))]
    return got


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def frames(n: int, dst: bytes = ALL, **fields: Any) -> list[bytes]:
    return [udp_frame(dst, OWN, i.to_bytes(4, "big") + bytes(20), **fields) for i in range(n)]


def test_what_arrives_is_received_in_order_with_the_kernels_time(space: Space, cluster: Any) -> None:
    with opened(space, cluster, "rx") as rx, space.wire("far0") as wire:
        before = time.time_ns()
        for frame in frames(100):
            wire.send(frame)
        with rx.recv(64, 5) as burst:
            assert before <= burst.timestamps[0] <= time.time_ns()
            first = [bytes(burst[i]) for i in range(len(burst))]
        assert first + received(rx, 100 - len(first)) == frames(100)
        stats = rx.stats()
        assert (stats["packets"], stats["mode"], stats["clock"], stats["kernel_dropped"]) == (100, "copy", "kernel", 0)
        assert rx.address == "nic0"


def test_what_is_sent_goes_out_and_does_not_come_back(space: Space, cluster: Any) -> None:
    with opened(space, cluster, "rxtx") as end, space.wire("far0") as wire, space.wire("nic0") as local:
        assert end.write(frames(50), timeout=5) == 50
        assert [wire.recv(2048) for _ in range(50)] == frames(50)
        local.send(frames(1)[0])  # another program's, on the same interface
        assert wire.recv(2048) == frames(1)[0]
        answer = frames(1, port=7)[0]
        wire.send(answer)
        assert received(end, 1) == [answer], "neither its own packets nor others that leave are received"


def test_a_queue_is_bridged_to_an_interface_and_back_without_losing_buffers(space: Space, cluster: Any) -> None:
    import ringbar

    cluster.create_queue(0, slots=256)
    with ringbar.Cluster.attach(1) as other, opened(space, cluster, "rx") as rx, space.wire("far0") as wire:
        out = opened(space, other, "tx")
        with cluster.open_queue(0, "tx") as tx, other.open_queue(0, "rx") as back:
            cluster.service()
            for _ in range(20):
                for frame in frames(100, dst=space.mac("nic0")):
                    wire.send(frame)
                came = 0
                while came < 100:
                    with rx.recv(64, 1) as burst:
                        came += tx.send(burst, timeout=1)
                gone = 0
                while gone < 100:
                    with back.recv(64, 1) as burst:
                        gone += out.send(burst, timeout=1)
                    cluster.service()
        out.close()
        cluster.service()
        assert cluster.queues[0].info()["lent"] == 0
        assert out.closed


def test_vlan_tag_that_the_kernel_took_off_is_put_back(space: Space, cluster: Any) -> None:
    tagged = ALL + OWN + b"\x81\x00\x60\x05" + udp_frame(ALL, OWN, bytes(40))[12:]
    double = ALL + OWN + b"\x88\xa8\x00\x07" + tagged[12:]
    with opened(space, cluster, "rx") as rx, space.wire("far0") as wire:
        wire.send(tagged)
        wire.send(double)
        assert received(rx, 2) == [tagged, double]


@need_pcap
def test_filter_means_the_same_in_the_kernel_and_here(space: Space, cluster: Any) -> None:
    plain = frames(3, port=53) + frames(3, port=54)
    tagged = [f[:12] + b"\x81\x00\x00\x05" + f[12:] for f in plain]
    with opened(space, cluster, "rx", filter="udp port 53") as rx, space.wire("far0") as wire:
        for frame in plain + tagged:
            wire.send(frame)
        wire.send(frames(4, port=53)[3])
        assert received(rx, 4) == frames(4, port=53), "a tag hides what is behind it, as in a capture file"
        assert rx.stats()["drops"]["filter"] == 6, "what the kernel filters is not counted"
        rx.filter = "vlan 5 and udp port 54"
        for frame in plain + tagged:
            wire.send(frame)
        assert received(rx, 3) == tagged[3:]
        rx.filter = None
        wire.send(plain[5])
        assert received(rx, 1) == [plain[5]]


def test_checksum_left_to_a_card_is_filled_in(space: Space, cluster: Any) -> None:
    """A program that sends through the kernel to a veth pair leaves its checksum to "the card"."""
    space.ip("addr add 198.51.100.2/24 dev far0")
    space.ip("neigh add 198.51.100.9 lladdr 02:00:00:00:00:09 dev far0")

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.sendto(b"odd length!", ("198.51.100.9", 5000))

    with opened(space, cluster, "rx", promiscuous=True) as rx:
        space.inside(send)
        got = b""
        while got[12:14] != b"\x08\x00":
            got = received(rx, 1)[0]
        ip, udp = got[14:34], got[34 : 45 + 8]
        pseudo = ip[12:20] + b"\x00\x11" + len(udp).to_bytes(2, "big")
        assert udp[6:8] != b"\0\0" and checksum(pseudo + udp) == 0


def test_promiscuous_mode_lasts_as_long_as_the_end(space: Space, cluster: Any) -> None:
    def promiscuous() -> bool:
        return "promiscuity 1" in space.ip("-d link show nic0")

    with opened(space, cluster, "rx", promiscuous=True) as rx, space.wire("far0") as wire:
        assert promiscuous()
        frame = udp_frame(b"\x02\x00\x00\x00\x00\x63", OWN, bytes(20))
        wire.send(frame)
        assert received(rx, 1) == [frame]
    assert not promiscuous()


def test_ends_of_a_fan_out_group_share_the_packets_flow_by_flow(space: Space, cluster: Any) -> None:
    import ringbar

    with ringbar.Cluster.attach(1) as other, space.wire("far0") as wire:
        ends = [opened(space, c, "rx", fanout=7) for c in (cluster, other)]
        flows = [udp_frame(ALL, OWN, bytes(20), port=port) for port in range(1000, 1064)]
        for frame in flows * 2:
            wire.send(frame)
        got: list[list[bytes]] = [[], []]

        def take() -> bool:
            for i, end in enumerate(ends):
                with end.recv(64, 0) as burst:
                    got[i] += [bytes(burst[k]) for k in range(len(burst))]
            return sum(map(len, got)) == 128

        until(take)
        assert all(got) and not set(got[0]) & set(got[1])
        for end in ends:
            end.close()


def test_snaplen_keeps_so_many_bytes(space: Space, cluster: Any) -> None:
    with opened(space, cluster, "rx", snaplen=60) as rx, space.wire("far0") as wire:
        frame = udp_frame(ALL, OWN, bytes(range(200)))
        wire.send(frame)
        assert received(rx, 1) == [frame[:60]]


def test_sent_is_received_plus_dropped_under_overload(space: Space, cluster: Any) -> None:
    """Nobody receives while far more is sent than the kernel's ring holds."""
    with opened(space, cluster, "rx") as rx, space.wire("far0") as wire:
        sent = 40000
        frame = udp_frame(ALL, OWN, bytes(700))
        for _ in range(sent):
            wire.send(frame)
        came = 0

        def all_accounted_for() -> bool:
            nonlocal came
            with rx.recv(256, 0.05) as burst:
                came += len(burst)
            return came + rx.stats()["kernel_dropped"] == sent

        until(all_accounted_for)
        assert rx.stats()["kernel_dropped"] > 0 and came > 0
        assert rx.stats()["packets"] == came


def test_a_frame_that_can_never_go_is_dropped_and_counted(space: Space, cluster: Any) -> None:
    space.ip("link set nic0 mtu 600")
    with opened(space, cluster, "tx") as tx, space.wire("far0") as wire:
        good = frames(2)
        assert tx.write([good[0], bytes(10), udp_frame(ALL, OWN, bytes(900)), good[1]], timeout=5) == 4
        assert [wire.recv(2048) for _ in range(2)] == good
        assert tx.stats()["drops"]["bad"] == 2 and tx.stats()["packets"] == 2


def test_interface_down_and_up_again_is_survived(space: Space, cluster: Any) -> None:
    with opened(space, cluster, "rxtx") as end, space.wire("far0") as wire:
        space.ip("link set nic0 down")
        assert len(end.recv(64, 0.05)) == 0
        assert end.write(frames(3)) == 0, "nothing can go: it stays with the program"
        space.ip("link set nic0 up")
        until(lambda: "LOWER_UP" in space.ip("link show nic0"))
        wire.settimeout(0.2)

        def comes() -> bool:
            wire.send(frames(1)[0])
            with end.recv(64, 0.1) as burst:
                return len(burst) > 0

        until(comes)

        def goes() -> bool:
            return bool(end.write(frames(1, port=9)) == 1)

        until(goes)
        wire.settimeout(5)
        while wire.recv(2048) != frames(1, port=9)[0]:
            pass


@pytest.mark.parametrize("mode", ["rx", "tx"])
def test_interface_that_vanishes_ends_in_an_error(space: Space, cluster: Any, mode: str) -> None:
    import ringbar

    with opened(space, cluster, mode) as end:
        space.ip("link del nic0")

        def use_it() -> None:
            for _ in range(100):
                if mode == "rx":
                    end.recv(64, 0.05)
                else:
                    end.write(frames(1))

        with pytest.raises(ringbar.Detached, match="nic0 is gone"):
            use_it()


def test_interface_that_is_not_there_is_named(space: Space, cluster: Any) -> None:
    import ringbar

    with pytest.raises(ringbar.NotFound, match="there is no interface nosuch"):
        opened(space, cluster, "rx", "nosuch")
    with pytest.raises(ringbar.Error, match="steering rule means nothing for nic0"):
        opened(space, cluster, "rx", steer="udp")


def test_missing_capability_is_named_with_its_cure(space: Space, cluster: Any) -> None:
    """A thread without capabilities: they are a thread's own."""
    import ringbar

    def without() -> None:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        if ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()):
            pytest.skip("capabilities cannot be given up here")
        with pytest.raises(ringbar.Error, match="CAP_NET_RAW") as caught:
            cluster.open_device("nic0", "rx")
        assert "setcap" in (caught.value.cure or "") and "AmbientCapabilities" in (caught.value.cure or "")

    space.inside(without)


def test_tools_take_interfaces_by_their_names(space: Space, cluster: Any) -> None:
    """``ringbar count`` in the name space, while packets come; it tells what the kernel dropped, too."""
    command = ["nsenter", f"--net=/run/netns/{space.name}", sys.executable, "-P", "-m", "ringbar"]
    counting = subprocess.Popen(
        [*command, "count", "-i", "nic0", "--packets", "200", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert counting.stderr is not None and b"receiving from nic0 (copy)" in counting.stderr.readline()
        done = subprocess.run(
            [*command, "send", "-o", "far0", "--packets", "200", "--json"], capture_output=True, timeout=60, check=True
        )
        assert json.loads(done.stdout)["sent"]["packets"] == 200
        out, err = counting.communicate(timeout=30)
        assert counting.returncode == 0, err
        assert json.loads(out)["packets"] == 200
        assert set(json.loads(out)["drops"]) >= {"filter", "bad"}
    finally:
        counting.kill()
        counting.wait()


def test_frames_that_the_kernel_put_together_come_as_the_wire_would_carry_them(space: Space, cluster: Any) -> None:
    """TCP from a neighbour on this machine comes in pieces of 64 KB without checksums."""
    with Space("rbethp") as peer:
        space.ip(f"link set far0 netns {peer.name}")
        peer.ip("link set far0 up")
        space.ip("addr add 198.51.100.1/24 dev nic0")
        peer.ip("addr add 198.51.100.2/24 dev far0")
        data = os.urandom(400_000)

        def listen() -> socket.socket:
            made = socket.create_server(("198.51.100.1", 80))
            made.settimeout(5)
            return made

        def send() -> None:
            with socket.create_connection(("198.51.100.1", 80), 5) as s:
                s.sendall(data)

        def take(listener: socket.socket) -> None:
            with listener.accept()[0] as s:
                while s.recv(65536):
                    pass

        with opened(space, cluster, "rx") as rx, space.inside(listen) as listener:
            sender = threading.Thread(target=lambda: peer.inside(send))
            taker = threading.Thread(target=take, args=(listener,))
            sender.start()
            taker.start()
            stream, first, at, longest = bytearray(len(data)), 0, 14, 0
            while stream != data:  # whatever was sent twice
                for packet in received(rx, 1):
                    if packet[at - 2 : at] != b"\x08\x00" or packet[at + 9] != 6:
                        continue
                    assert len(packet) <= at + 1500
                    ip = packet[at : at + int.from_bytes(packet[at + 2 : at + 4], "big")]
                    segment = ip[20:]
                    assert checksum(ip[:20]) == 0
                    assert checksum(ip[12:20] + b"\x00\x06" + len(segment).to_bytes(2, "big") + segment) == 0
                    sequence = int.from_bytes(segment[4:8], "big")
                    if segment[13] & 2:
                        first = sequence + 1
                    part = segment[segment[12] // 16 * 4 :]
                    where = (sequence - first) % 2**32
                    stream[where : where + len(part)] = part
                    longest = max(longest, len(part))
            sender.join()
            taker.join()
            assert longest > 1000
            assert rx.stats()["drops"]["bad"] == 0
