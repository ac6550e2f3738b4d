# SPDX-License-Identifier: Apache-2.0
"""What the policies of balancers compute, against an independent computation on packets that scapy takes apart: packets
made for it, and those of real captures that Debian packages ship."""

from __future__ import annotations

import re
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

scapy_all = pytest.importorskip("scapy.all", reason="scapy is not installed")
gtp = pytest.importorskip("scapy.contrib.gtp")
gtp_v2 = pytest.importorskip("scapy.contrib.gtp_v2")
from hashing import computed, hash_words  # noqa: E402
from scapy.layers.inet import ICMP, IP, TCP, UDP  # noqa: E402
from scapy.layers.inet6 import (  # noqa: E402
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, GRE, Dot1AD, Dot1Q, Ether  # noqa: E402
from scapy.layers.sctp import SCTP  # noqa: E402
from scapy.layers.vxlan import VXLAN  # noqa: E402
from scapy.packet import NoPayload, Packet, Raw  # noqa: E402

POLICIES = ("ip", "5tuple", "gtp", "gtp-ip", "gre", "gre-ip", "vxlan", "vxlan-ip", "vlan")


def number(address: str) -> int:
    import ipaddress

    return int(ipaddress.ip_address(address))


EXTENSIONS = {0, 43, 44, 60, 135, 139, 140, 51}


def network(layer: Any) -> tuple[list[int], Any, int] | None:
    """Address a, address b, what follows and its protocol; for a fragment nothing follows."""
    if isinstance(layer, IP):
        addresses = [number(layer.src), number(layer.dst)]
        if layer.frag or layer.flags.MF:
            return addresses, None, 0
        return addresses, layer.payload, layer.proto
    addresses = [number(layer.src), number(layer.dst)]
    protocol, inner = layer.nh, layer.payload
    while protocol in EXTENSIONS and not isinstance(inner, (NoPayload, Raw)):
        if isinstance(inner, IPv6ExtHdrFragment) and (inner.offset or inner.m):
            return addresses, None, 0
        protocol, inner = inner.nh, inner.payload
    return addresses, inner, protocol


def ends(layer: Any, only_addresses: bool, session: int = 0) -> list[int]:
    """The words of an IP packet."""
    found = network(layer)
    assert found
    (a, b), inner, protocol = found
    a_port = b_port = 0
    if inner is not None and protocol in (6, 17, 132, 33, 136) and not session:
        start = bytes(inner)[:4]
        if len(start) == 4:
            a_port, b_port = struct.unpack(">HH", start)
    if only_addresses:
        a_port = b_port = protocol = 0
        session = 0
    first, second = sorted([(a, a_port), (b, b_port)])
    if isinstance(layer, IP):
        words = [first[0] << 16 | first[1] | protocol << 48, second[0] << 16 | second[1]]
    else:
        low = 2**64 - 1
        words = [first[0] >> 64, first[0] & low, second[0] >> 64, second[0] & low]
        words.append(first[1] << 16 | second[1] | protocol << 32)
    return words + ([session] if session else [])


def link(packet: Any) -> tuple[Any, int, list[int]]:
    """What follows the tags of an Ethernet frame, its EtherType, and the VLANs."""
    vlans, layer, kind = [], packet, packet.type if isinstance(packet, Ether) else packet.len
    while kind in (0x8100, 0x88A8, 0x9100) and not isinstance(layer.payload, (NoPayload, Raw)) and len(vlans) < 4:
        layer = layer.payload
        vlans.append(layer.vlan)
        kind = layer.type
    return layer.payload, kind, vlans


def macs(packet: Any, kind: int) -> list[int]:
    first, second = sorted(int(mac.replace(":", ""), 16) for mac in (packet.src, packet.dst))
    return [first, second | kind << 48]


def inner_of(policy: str, layer: Any) -> tuple[Any, int]:
    """The layer that counts, and what names a GTP-C transaction."""
    found = network(layer)
    assert found
    _, inner, protocol = found
    if policy.startswith("gtp") and isinstance(inner, UDP):
        if 2152 in (inner.sport, inner.dport):
            data = bytes(inner.payload)
            if len(data) > 8 and data[0] >> 4 == 3 and data[1] == 255:
                header = gtp.GTP_U_Header(data)
                at, following = (12, data[11]) if header.E or header.S or header.PN else (8, 0)
                while header.E and following:  # scapy does not know all extension headers
                    at += 4 * data[at]
                    following = data[at - 1]
                if data[at] >> 4 in (4, 6):
                    return (IP if data[at] >> 4 == 4 else IPv6)(data[at:]), 0
        elif 2123 in (inner.sport, inner.dport):
            data = bytes(inner.payload)
            if len(data) >= 8 and data[0] >> 5 == 1:
                header = gtp.GTPHeader(data)
                return layer, 1 << 32 | header.seq if header.S else 2 << 32 | header.teid
            if len(data) >= 8 and data[0] >> 5 == 2:
                header = gtp_v2.GTPHeader(data)
                return layer, 3 << 32 | header.seq
    if policy.startswith("gre") and protocol == 47 and isinstance(inner, GRE) and inner.version == 0:
        carried = inner.payload
        if isinstance(carried, (IP, IPv6, Ether)):
            return carried, 0
    tunnelled = isinstance(inner, UDP) and inner.dport == 4789 and isinstance(inner.payload, VXLAN)
    if policy.startswith("vxlan") and tunnelled:
        carried = inner.payload.payload
        if isinstance(carried, Ether) and inner.payload.flags.Instance:
            return carried, 0
    return layer, 0


def expected(policy: str, packet: Any) -> int:
    """The hash of a whole packet, by scapy's reading of it."""
    above, kind, vlans = link(packet)
    if policy == "vlan":
        outer, inner = [*vlans, 0, 0][:2]
        return hash_words([outer | inner << 16])
    only_addresses = policy == "ip" or policy.endswith("-ip")
    if isinstance(above, (IP, IPv6)):
        counted, session = inner_of(policy, above)
        if isinstance(counted, (IP, IPv6)):
            return hash_words(ends(counted, only_addresses, session))
        packet = counted
        above, kind, _ = link(packet)
        if isinstance(above, (IP, IPv6)):
            return hash_words(ends(above, only_addresses))
    return hash_words(macs(packet, kind))


# ---- packets made for it ---------------------------------------------------------------------------------------------

ETHERNET = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
V4 = IP(src="192.0.2.7", dst="198.51.100.9")
V6 = IPv6(src="2001:db8::7", dst="2001:db8:1::9")
SEGMENT = TCP(sport=40000, dport=443)
DATAGRAM = UDP(sport=53, dport=5353) / b"question"

MADE: dict[str, Packet] = {
    "TCP over IPv4": ETHERNET / V4 / SEGMENT,
    "UDP over IPv4": ETHERNET / V4 / DATAGRAM,
    "SCTP over IPv4": ETHERNET / V4 / SCTP(sport=36412, dport=36413),
    "ICMP over IPv4": ETHERNET / V4 / ICMP(),
    "IPv4 with options": ETHERNET / IP(src="192.0.2.7", dst="198.51.100.9", options=b"\x94\x04\0\0") / DATAGRAM,
    "first fragment": ETHERNET / IP(src="192.0.2.7", dst="198.51.100.9", flags="MF") / DATAGRAM,
    "later fragment": ETHERNET / IP(src="192.0.2.7", dst="198.51.100.9", frag=100, proto=17) / Raw(b"x" * 30),
    "TCP over IPv6": ETHERNET / V6 / SEGMENT,
    "UDP over IPv6 with extension headers": ETHERNET / V6 / IPv6ExtHdrHopByHop() / IPv6ExtHdrRouting()
    / IPv6ExtHdrDestOpt() / DATAGRAM,
    "IPv6 fragment": ETHERNET / V6 / IPv6ExtHdrFragment(offset=0, m=1, nh=17) / DATAGRAM,
    "IPv6 fragment that is whole": ETHERNET / V6 / IPv6ExtHdrFragment(offset=0, m=0, nh=17) / DATAGRAM,
    "one VLAN tag": ETHERNET / Dot1Q(vlan=42, prio=3) / V4 / SEGMENT,
    "two VLAN tags": ETHERNET / Dot1AD(vlan=100) / Dot1Q(vlan=200) / V6 / DATAGRAM,
    "ARP": ETHERNET / ARP(psrc="192.0.2.7", pdst="192.0.2.1"),
    "GTP-U": ETHERNET / V4 / UDP(sport=2152, dport=2152) / gtp.GTP_U_Header(teid=77)
    / IP(src="10.0.0.1", dst="10.9.9.9") / SEGMENT,
    "GTP-U with a sequence number, IPv6 inside": ETHERNET / V4 / UDP(sport=2152, dport=2152)
    / gtp.GTP_U_Header(teid=77, S=1, seq=9) / V6 / DATAGRAM,
    "GTP-U with an extension header": ETHERNET / V4 / UDP(sport=2152, dport=2152)
    / gtp.GTP_U_Header(teid=77, E=1, next_ex=0x85) / gtp.GTPPDUSessionContainer(type=0, QFI=9)
    / IP(src="10.0.0.1", dst="10.9.9.9") / DATAGRAM,
    "GTP-U echo": ETHERNET / V4 / UDP(sport=2152, dport=2152) / gtp.GTP_U_Header(gtp_type=1, S=1, seq=3) / b"\x0e\0",
    "GTP-C version 1": ETHERNET / V4 / UDP(sport=2123, dport=2123) / gtp.GTPHeader(gtp_type=16, teid=5, S=1, seq=4711)
    / Raw(b"\0" * 8),
    "GTP-C version 2": ETHERNET / V4 / UDP(sport=2123, dport=2123)
    / gtp_v2.GTPHeader(gtp_type=32, T=1, teid=5, seq=4711) / Raw(b"\0" * 8),
    "GRE with IPv4": ETHERNET / V4 / GRE() / IP(src="10.0.0.1", dst="10.9.9.9") / SEGMENT,
    "GRE with a key, a checksum and a sequence number": ETHERNET / V4
    / GRE(key_present=1, key=3, chksum_present=1, seqnum_present=1, sequence_number=9) / V6 / DATAGRAM,
    "GRE with Ethernet": ETHERNET / V4 / GRE(proto=0x6558) / Ether(src="02:00:00:00:00:03", dst="02:00:00:00:00:04")
    / IP(src="10.0.0.1", dst="10.9.9.9") / SEGMENT,
    "VXLAN": ETHERNET / V4 / UDP(sport=51234, dport=4789) / VXLAN(vni=42)
    / Ether(src="02:00:00:00:00:03", dst="02:00:00:00:00:04") / IP(src="10.0.0.1", dst="10.9.9.9") / SEGMENT,
    "VXLAN with ARP inside": ETHERNET / V6 / UDP(sport=51234, dport=4789) / VXLAN(vni=42)
    / Ether(src="02:00:00:00:00:03", dst="02:00:00:00:00:04") / ARP(),
}  # fmt: skip


def test_hashes_are_what_an_independent_computation_says(core: Any) -> None:
    for what, made in MADE.items():
        data = bytes(made)
        packet = Ether(data)
        for policy in POLICIES:
            assert computed(core, policy, data) == expected(policy, packet), (what, policy)


def turned(packet: Packet) -> Packet:
    """The same packet on its way back: every pair of addresses and ports swapped, but VXLAN's ports, where both
    directions go to the same."""
    back = packet.copy()
    layer: Any = back
    while not isinstance(layer, (NoPayload, Raw)):
        own = {field.name for field in layer.fields_desc}
        for one, other in (("src", "dst"), ("sport", "dport")):
            if own >= {one, other} and not (isinstance(layer, UDP) and layer.dport == 4789):
                first, second = getattr(layer, one), getattr(layer, other)
                setattr(layer, one, second)
                setattr(layer, other, first)
        layer = layer.payload
    return back


def test_both_directions_of_a_flow_meet(core: Any) -> None:
    for what, made in MADE.items():
        packet, back = bytes(made), bytes(turned(made))
        outer_differs = what.startswith("VXLAN")  # its outer source port says nothing
        assert packet != back
        for policy in POLICIES:
            if not (outer_differs and policy in ("5tuple", "gtp", "gre")):
                assert computed(core, policy, packet) == computed(core, policy, back), (what, policy)


def test_requests_and_answers_of_a_gtp_session_meet(core: Any) -> None:
    """They name different tunnel endpoints, and the same sequence number."""
    request = ETHERNET / V4 / UDP(sport=2123, dport=2123) / gtp_v2.GTPHeader(gtp_type=32, T=1, teid=0, seq=99)
    answer = Ether() / IP(src=V4.dst, dst=V4.src) / UDP(sport=2123, dport=2123)
    answer = answer / gtp_v2.GTPHeader(gtp_type=33, T=1, teid=0xABCDEF, seq=99)
    other = ETHERNET / V4 / UDP(sport=2123, dport=2123) / gtp_v2.GTPHeader(gtp_type=32, T=1, teid=0, seq=100)
    assert computed(core, "gtp", bytes(request)) == computed(core, "gtp", bytes(answer))
    assert computed(core, "gtp", bytes(request)) != computed(core, "gtp", bytes(other))


def test_all_fragments_of_a_datagram_meet(core: Any) -> None:
    whole = IP(src="192.0.2.7", dst="198.51.100.9", id=7) / UDP(sport=1, dport=2) / Raw(b"x" * 4000)
    parts = [bytes(ETHERNET / part) for part in scapy_all.fragment(whole, fragsize=1000)]
    assert len(parts) > 2
    for policy in ("5tuple", "ip", "gtp"):
        assert len({computed(core, policy, part) for part in parts}) == 1


def test_inner_flows_of_a_tunnel_are_told_apart_and_only_by_its_policy(core: Any) -> None:
    def tunnel(port: int) -> bytes:
        return bytes(ETHERNET / V4 / UDP(sport=2152, dport=2152) / gtp.GTP_U_Header(teid=1)
                     / IP(src="10.0.0.1", dst="10.9.9.9") / TCP(sport=port))  # fmt: skip

    many = [tunnel(port) for port in range(1000, 1100)]
    assert len({computed(core, "gtp", data) for data in many}) == 100
    for policy in ("5tuple", "gtp-ip", "gre", "vxlan"):
        assert len({computed(core, policy, data) for data in many}) == 1


@pytest.mark.parametrize("outputs", [2, 3, 7, 64])
def test_flows_spread_evenly(core: Any, outputs: int) -> None:
    """Neighbouring addresses and ports too: no output gets much more than its share."""
    head = bytes(ETHERNET / V4 / DATAGRAM)

    def flow(source: int, port: int) -> bytes:
        return head[:26] + source.to_bytes(4, "big") + head[30:34] + port.to_bytes(2, "big") + head[36:]

    for flows in (
        [flow(0x0A000000 + i, 1024) for i in range(8192)],  # many hosts
        [flow(0x0A000001, 1024 + i) for i in range(8192)],  # many ports
        [flow(0x0A000000 + (i << 8), 1024) for i in range(8192)],  # many networks
    ):
        load = Counter(computed(core, "5tuple", data) * outputs >> 32 for data in flows)
        share = 8192 / outputs
        # Chance alone stays within six standard deviations.
        assert set(load) == set(range(outputs))
        assert max(abs(n - share) for n in load.values()) < 6 * share**0.5


def test_a_packet_that_was_cut_is_hashed_by_what_is_left(core: Any) -> None:
    """What is cut off is not looked at: the bytes that lay behind it change nothing."""
    for what in ("UDP over IPv6 with extension headers", "GTP-U with an extension header", "VXLAN", "two VLAN tags"):
        data = bytes(MADE[what])
        for length in range(len(data)):
            for policy in POLICIES:
                cut = core.ffi.new("uint8_t[]", data[:length] + b"\xff" * 64)
                out = core.ffi.new("uint32_t *")
                core.check(core.lib.rb_policy_hash_of(policy.encode(), cut, length, out))
                assert out[0] == computed(core, policy, data[:length]), (what, length, policy)


def test_policies_that_do_not_hash_say_so(core: Any) -> None:
    for policy in ("rr", "input", "nonsense"):
        with pytest.raises(core.Error):
            computed(core, policy, b"x" * 60)


# ---- packets of real captures ----------------------------------------------------------------------------------------


def frames(file: Path) -> Iterator[bytes]:
    """The packets of a capture."""
    with scapy_all.RawPcapReader(str(file)) as reader:
        for data, _ in reader:
            yield bytes(data)


def listed(source: Path) -> Iterator[bytes]:
    """Packets that a Go program lists as bytes."""
    for match in re.finditer(r"= \[\]byte\{(.*?)\n\}", source.read_text(encoding="utf-8"), re.DOTALL):
        text = re.sub(r"//[^\n]*", "", match[1])
        values = [value.strip() for value in text.split(",") if value.strip()]
        if values and all(re.fullmatch(r"0x[0-9a-fA-F]{1,2}|\d+", value) for value in values):
            yield bytes(int(value, 0) for value in values)


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Ethernet frames of captures: DNS, TCP, a telephone call, GTP, GRE, VXLAN, ICMPv6, VLANs and more."""
    work = tmp_path_factory.mktemp("captures")
    for package in ("golang-github-google-gopacket-dev", "sip-tester"):
        done = subprocess.run(
            ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package],
            cwd=work, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"Debian's package {package} cannot be fetched: {done.stderr.strip()}")
    for archive in work.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(archive), str(work / "x")], check=True, timeout=60)
    found: list[bytes] = []
    for file in sorted((work / "x").rglob("*.pcap")):
        found += frames(file)
    for source in sorted((work / "x").rglob("layers/*_test.go")):
        found += listed(source)
    return [data for data in found if len(data) >= 14]


def test_hashes_of_real_packets_are_what_an_independent_computation_says(core: Any, captured: list[bytes]) -> None:
    assert len(captured) > 500
    kinds: Counter[str] = Counter()
    for data in captured:
        packet = Ether(data)
        for policy in POLICIES:
            assert computed(core, policy, data) == expected(policy, packet), (policy, data.hex())
        for policy in ("gtp", "gre", "vxlan"):
            kinds[policy] += computed(core, policy, data) != computed(core, "5tuple", data)
    assert min(kinds.values()) > 0, f"no packet of these tunnels among them: {kinds}"
