# SPDX-License-Identifier: Apache-2.0
"""Packets of a flow as scapy sees them; and what a flow says of packets that were lost, doubled or damaged."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

Make = Callable[..., list[bytes]]


@pytest.fixture
def made(pair: tuple[Any, Any], cluster: Any) -> Make:
    """Packets that a flow with such settings makes."""
    import ringbar

    tx, rx = pair

    def make(count: int, **settings: Any) -> list[bytes]:
        with ringbar.Flow(tx, packets=count, **settings) as flow:
            found: list[bytes] = []
            while len(found) < count:
                burst = rx.recv(64, timeout=10)
                assert len(burst)
                found += [burst.copy(i) for i in range(len(burst))]
                burst.release()
            assert flow.wait(10)
        return found

    return make


def _read(packet: bytes) -> Any:
    """By scapy, which must find its checksums right: it computes them anew."""
    scapy = pytest.importorskip("scapy.all")
    found = scapy.Ether(packet)
    again = scapy.Ether(packet)
    udp = again[scapy.UDP]
    if again.haslayer(scapy.IPv6) or udp.chksum:
        del udp.chksum
    if again.haslayer(scapy.IP):
        del again[scapy.IP].chksum, again[scapy.IP].len
    del udp.len
    assert bytes(again) == packet
    return found


def test_packets_are_ipv4_udp_with_right_checksums(made: Make) -> None:
    packets = [_read(p) for p in made(10)]
    assert {len(p) for p in packets} == {74}
    assert {(p["IP"].src, p["IP"].dst, p.sport, p.dport) for p in packets} == {("192.0.2.1", "192.0.2.2", 1024, 5000)}


def test_packets_can_be_ipv6_in_a_vlan(made: Make) -> None:
    packets = [_read(p) for p in made(6, src_ip="2001:db8::1-2001:db8::3", dst_ip="fd00::9", vlan=7, size=301)]
    assert {len(p) for p in packets} == {301}
    assert {p["Dot1Q"].vlan for p in packets} == {7}
    assert {p["IPv6"].src for p in packets} == {"2001:db8::1", "2001:db8::2", "2001:db8::3"}


def test_ranges_make_every_combination_before_one_comes_again(made: Make) -> None:
    settings = {"src_ip": "10.0.0.0/30", "dst_ip": "10.1.0.255-10.1.1.0", "src_port": "2000-2002", "port": "80-81"}
    flows = [(p["IP"].src, p["IP"].dst, p.sport, p.dport) for p in map(_read, made(96, **settings))]
    assert len(set(flows[:48])) == 4 * 2 * 3 * 2 and flows[48:] == flows[:48]
    assert {dst for _, dst, _, _ in flows} == {"10.1.0.255", "10.1.1.0"}
    some = [(p["IP"].src, p.sport) for p in map(_read, made(10, src_ip="10.0.0.0/30", flows=5))]
    assert len(set(some[:5])) == 5 and some[5:] == some[:5]  # source ports as needed: 2 with 4 addresses


def test_sizes_are_taken_in_turn(made: Make) -> None:
    from ringbar.flow import imix

    assert [len(p) for p in made(7, size=[100, 200, 1514])] == [100, 200, 1514, 100, 200, 1514, 100]
    sizes = [len(p) for p in made(24, size=imix())]
    assert (sizes.count(74), sizes.count(590), sizes.count(1514)) == (14, 8, 2)


def test_frames_are_sent_as_they_are(made: Make) -> None:
    frames = [bytes([n] * (20 + n)) for n in range(3)]
    assert made(7, frames=frames) == (frames * 3)[:7]


@pytest.mark.parametrize(
    "wrong",
    [
        {"src_ip": "10.0.0.1", "dst_ip": "::1"},
        {"src_ip": "10.0.0.9-10.0.0.1"},
        {"src_ip": "10.0.0.0/33"},
        {"src_ip": "::ffff:ffff-::1:0:0"},
        {"src_port": "80-"},
        {"port": "90-80"},
        {"vlan": 4095},
        {"bps": -1},
        {"size": []},
        {"size": [74, 73]},
        {"size": 77, "vlan": 1},
        {"frames": [b"short"]},
        {"flows": 0},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(cluster: Any, wrong: dict[str, Any]) -> None:
    import ringbar

    with pytest.raises(ringbar.Error) as caught:
        ringbar.Flow(cluster.queues[0], **wrong)
    assert caught.value.code == "bad-value"


def test_more_flows_than_the_ranges_make_are_refused_with_their_number(cluster: Any) -> None:
    import ringbar

    flow = ringbar.Flow(cluster.queues[0], src_port="1-2", src_ip="10.0.0.0/31", flows=5)
    with pytest.raises(ringbar.Error, match=r"make 4 flows, and not 5"):
        flow.start()


# ---- what is said of what arrives ----


@pytest.fixture
def verdict(cluster: Any) -> Callable[[list[bytes]], dict[str, Any]]:
    """What a flow that verifies says of these packets."""
    import ringbar

    def judge(packets: list[bytes]) -> dict[str, Any]:
        with ringbar.Cluster.attach(1) as other:
            flow = ringbar.Flow(None, other.queues[1])
            with flow, cluster.open_queue(1, "tx") as tx:
                assert tx.write(packets, timeout=20) == len(packets)
                stats = flow.stats()
                while stats["received"] + stats["foreign"] < len(packets):
                    assert stats["running"]
                    cluster.service()
                    stats = flow.stats()
            return flow.stats()  # stopped: a running flow counts what it received before what it makes of it

    return judge


FAULTS = ("lost", "reordered", "duplicated", "corrupted", "foreign", "late")


def test_every_fault_is_counted_exactly(made: Make, verdict: Callable[[list[bytes]], dict[str, Any]]) -> None:
    packets = made(3000, size=80)
    chance = random.Random(1)
    lost = set(chance.sample(range(1, 2999), 40))
    kept = [p for i, p in enumerate(packets) if i not in lost]
    twice = chance.sample(range(len(kept) - 200), 30)
    for i in sorted(twice, reverse=True):  # each again, a little later
        kept.insert(i + 50, kept[i])
    broken = bytearray(packets[5])
    broken[78] ^= 1
    said = verdict([*kept, bytes(broken), bytes(100)])
    assert {name: said[name] for name in FAULTS} == {
        "lost": 39,  # a damaged one is not missing as well
        "reordered": 0,
        "duplicated": 30,
        "corrupted": 1,
        "foreign": 1,
        "late": 0,
    }
    assert said["distinct"] == len(packets) - 40


def test_shuffled_packets_are_reordered_and_none_is_lost(
    made: Make, verdict: Callable[[list[bytes]], dict[str, Any]]
) -> None:
    packets = made(2000)
    random.Random(2).shuffle(packets)
    highest, behind = -1, 0
    for packet in packets:
        number = int.from_bytes(packet[58:66], "little")
        behind += number < highest
        highest = max(highest, number)
    said = verdict(packets)
    assert (said["lost"], said["duplicated"], said["reordered"]) == (0, 0, behind)


def test_what_comes_back_from_beyond_memory_is_neither_called_twice_nor_new(
    made: Make, verdict: Callable[[list[bytes]], dict[str, Any]]
) -> None:
    import struct

    def numbered(number: int) -> bytes:
        """A packet with this number, and the sum that its maker would have put there."""
        packet = bytearray(first)
        packet[58:66] = struct.pack("<Q", number)
        packet[54:58] = struct.pack("<I", _sum(packet))
        return bytes(packet)

    first = made(1)[0]
    assert numbered(0) == first  # this page computes the sum as the core does
    far = (1 << 20) + 5
    said = verdict([first, numbered(far), numbered(2), numbered(far), numbered(far - 1)])
    assert (said["late"], said["duplicated"], said["reordered"], said["distinct"]) == (1, 1, 1, 3)


def _sum(packet: bytearray) -> int:
    """The mark's sum, computed apart from the core."""
    data = bytearray(packet)
    data[54:58] = bytes(4)
    data[40:42] = bytes(2)
    mask, a = (1 << 64) - 1, 0x9E3779B97F4A7C15 ^ len(data)
    whole = len(data) & ~7
    for at in range(0, whole, 8):
        a = ((a ^ int.from_bytes(data[at : at + 8], "little")) * 0xFF51AFD7ED558CCD) & mask
        a ^= a >> 32
    a = ((a ^ int.from_bytes(data[whole:], "big")) * 0xFF51AFD7ED558CCD) & mask
    return a >> 32


def test_percentiles_lie_in_order_between_the_least_and_the_most(cluster: Any) -> None:
    import ringbar

    for packets in (1, 2, 3, 5000):
        with ringbar.Cluster.attach(1) as other:
            stats = ringbar.Flow(cluster.queues[0], other.queues[0], packets=packets, window=1).run(30)
        found = list(stats["latency_ns"].values())
        assert stats["latency_count"] == packets
        assert found == sorted(found)


# ---- rates ----


@pytest.mark.parametrize(
    ("settings", "per_packet"),
    [({"pps": 20_000}, None), ({"bps": 20e6}, 8 * (74 + 24)), ({"bps": 100e6, "size": [74, 1514]}, 8 * (794 + 24))],
    ids=["packets", "bits", "bits of two sizes"],
)
def test_a_rate_is_held_within_one_percent(core: Any, settings: dict[str, Any], per_packet: float | None) -> None:
    """By what the flow itself says it sent in what time; its receiver may stand still for a while."""
    import ringbar

    with ringbar.Cluster.create(2, buffers=32768) as cluster, ringbar.Cluster.attach(2) as other:
        cluster.create_queue(0, slots=8192)
        with ringbar.Flow(None, other.queues[0], verify=False), ringbar.Flow(cluster.queues[0], **settings) as flow:
            flow.wait(1.5)
            stats = flow.stop()
    got = stats["sent"] / stats["seconds"] * (per_packet or 1)
    assert got == pytest.approx(settings.get("pps") or settings["bps"], rel=0.01)
