# SPDX-License-Identifier: Apache-2.0
"""Policy gtp-session: all messages of a GTP-C session meet, whoever sends them, against scapy's reading of them."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("scapy")
gtp = pytest.importorskip("scapy.contrib.gtp")
v2 = pytest.importorskip("scapy.contrib.gtp_v2")

from hashing import computed, hash_words  # noqa: E402
from scapy.layers.inet import IP, UDP  # noqa: E402
from scapy.layers.inet6 import IPv6  # noqa: E402
from scapy.layers.l2 import Ether  # noqa: E402

OUTPUTS = 16
MME, SGW, PGW, OTHER_MME = "192.0.2.1", "192.0.2.9", "192.0.2.17", "198.51.100.3"


def message(source: str, destination: str, header: Any) -> bytes:
    network = IPv6 if ":" in source else IP
    link = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
    return bytes(link / network(src=source, dst=destination) / UDP(sport=2123, dport=2123) / header)


def f_teid(teid: int, node: str, interface: int = 10, instance: int = 0) -> Any:
    family: dict[str, Any] = {"ipv4_present": 1, "ipv4": node}
    if ":" in node:  # scapy takes a number here
        family = {"ipv6_present": 1, "ipv6": int.from_bytes(socket.inet_pton(socket.AF_INET6, node), "big")}
    return v2.IE_FTEID(instance=instance, InterfaceType=interface, GRE_Key=teid, **family)


def version_2(kind: int, teid: int, *senders: Any, sequence: int = 1) -> Any:
    elements = [v2.IE_IMSI(IMSI="001010123456789"), *senders]
    known = {32: v2.GTPV2CreateSessionRequest, 33: v2.GTPV2CreateSessionResponse, 34: v2.GTPV2ModifyBearerRequest}
    return v2.GTPHeader(gtp_type=kind, T=1, teid=teid, seq=sequence) / known[kind](IE_list=elements)


def opened(ours: int, theirs: int) -> list[bytes]:
    """An MME opens a session, and the SGW answers."""
    request, answer = version_2(32, 0, f_teid(ours, MME)), version_2(33, ours, f_teid(theirs, SGW, 11))
    return [message(MME, SGW, request), message(SGW, MME, answer)]


def version_1(kind: int, teid: int, sender: int = 0, *more: Any, sequence: int = 1) -> Any:
    elements = [gtp.IE_IMSI(), gtp.IE_Routing(), gtp.IE_Recovery(), gtp.IE_SelectionMode(), gtp.IE_TEIDI(TEIDI=0xBEEF)]
    if kind == 17:
        elements = [gtp.IE_Cause(), gtp.IE_ReorderingRequired(), gtp.IE_Recovery(), gtp.IE_TEIDI(TEIDI=0xBEEF)]
    if sender:
        elements.append(gtp.IE_TEICP(TEICI=sender))
    known = {16: gtp.GTPCreatePDPContextRequest, 17: gtp.GTPCreatePDPContextResponse}
    return gtp.GTPHeader(gtp_type=kind, S=1, teid=teid, seq=sequence) / known[kind](IE_list=[*elements, *more])


def words(node: str, teid: int) -> list[int]:
    packed = socket.inet_pton(socket.AF_INET6 if ":" in node else socket.AF_INET, node).rjust(16, b"\0")
    return [int.from_bytes(packed[:8], "big"), int.from_bytes(packed[8:], "big"), teid]


def output_of(node: str, teid: int) -> int:
    """Where a session goes that this node opened with this TEID of its own."""
    return hash_words(words(node, teid)) * OUTPUTS >> 32


@pytest.fixture
def balanced(core: Any) -> Iterator[Any]:
    """A function: messages in, the output of each out."""
    import ringbar

    with ringbar.Cluster.create(1, buffers=16384) as cluster:
        for number in range(OUTPUTS + 1):
            cluster.create_queue(number, slots=256)
        with ringbar.Cluster.attach(1) as own, ringbar.Cluster.attach(1) as readers:
            tx = cluster.open_queue(0, "tx")
            rx = [readers.open_queue(n + 1, "rx") for n in range(OUTPUTS)]
            with ringbar.Balancer(own.queues[0], own.queues[1 : OUTPUTS + 1], policy="gtp-session") as worker:

                def send(*messages: bytes) -> list[int]:
                    outputs = []
                    for data in messages:
                        assert tx.write([data], timeout=10) == 1
                        took: list[int] = []
                        deadline = time.monotonic() + 10
                        while not took:
                            assert time.monotonic() < deadline, f"{worker.stats()}"
                            cluster.service()
                            for number, end in enumerate(rx):
                                with end.recv(1, timeout=0) as burst:
                                    took += [number] * len(burst)
                        outputs += took
                    return outputs

                yield send


@pytest.mark.parametrize(("opener", "answerer"), [(MME, SGW), ("2001:db8::1", "2001:db8::9")], ids=["IPv4", "IPv6"])
def test_both_directions_of_a_session_meet(balanced: Any, opener: str, answerer: str) -> None:
    chosen = random.Random(7)
    for _ in range(40):
        ours, theirs = chosen.getrandbits(32) or 1, chosen.getrandbits(32) or 1
        outputs = balanced(
            message(opener, answerer, version_2(32, 0, f_teid(ours, opener), f_teid(0xDEAD, answerer, 7, 1))),
            message(answerer, opener, version_2(33, ours, f_teid(theirs, answerer, 11), f_teid(0xDEAD, opener, 7, 1))),
            message(opener, answerer, version_2(34, theirs, sequence=2)),
            message(answerer, opener, version_2(34, ours, sequence=900)),
        )
        assert outputs == [output_of(opener, ours)] * 4


def test_both_directions_of_a_version_1_session_meet(balanced: Any) -> None:
    for ours, theirs in ((5, 6), (7, 0xFFFFFFFF), (1 << 31, 1)):
        outputs = balanced(
            message(MME, SGW, version_1(16, 0, ours)),
            message(SGW, MME, version_1(17, ours, theirs)),
            message(MME, SGW, version_1(16, theirs, sequence=77)),
        )
        assert outputs == [output_of(MME, ours)] * 3


def test_a_node_that_takes_a_session_over_belongs_to_it(balanced: Any) -> None:
    balanced(*opened(11, 22))
    outputs = balanced(
        message(OTHER_MME, SGW, version_2(34, 22, f_teid(33, OTHER_MME))),
        message(SGW, OTHER_MME, version_2(34, 33)),
    )
    assert outputs == [output_of(MME, 11)] * 2


def test_the_answer_of_a_pgw_has_its_teid_elsewhere(balanced: Any) -> None:
    outputs = balanced(
        message(SGW, PGW, version_2(32, 0, f_teid(11, SGW, 6))),
        message(PGW, SGW, version_2(33, 11, f_teid(22, PGW, 7, 1))),
        message(SGW, PGW, version_2(34, 22)),
        message(PGW, SGW, version_2(34, 11)),
    )
    assert outputs == [output_of(SGW, 11)] * 4


def test_a_node_may_name_another_address_than_it_sends_from(balanced: Any) -> None:
    card = "203.0.113.77"
    outputs = balanced(
        message(MME, SGW, version_2(32, 0, f_teid(11, MME))),
        message(SGW, MME, version_2(33, 11, f_teid(22, card, 11))),
        message(MME, card, version_2(34, 22)),
    )
    assert outputs == [output_of(MME, 11)] * 3
    outputs = balanced(
        message(MME, SGW, version_1(16, 0, 5, gtp.IE_NSAPI(), gtp.IE_GSNAddress(length=4, ipv4_address=MME))),
        message(SGW, MME, version_1(17, 5, 6, gtp.IE_ChargingId(), gtp.IE_GSNAddress(length=4, ipv4_address=card))),
        message(MME, card, version_1(16, 6)),
    )
    assert outputs == [output_of(MME, 5)] * 3


def test_a_teid_for_user_traffic_is_none_of_control(balanced: Any) -> None:
    balanced(*opened(11, 22))
    balanced(*opened(44, 55))
    balanced(message(SGW, MME, version_2(34, 44, f_teid(22, SGW, 1))))  # S1-U: the same number, another meaning
    assert balanced(message(MME, SGW, version_2(34, 22))) == [output_of(MME, 11)]


def test_a_teid_that_is_used_again_means_the_new_session(balanced: Any) -> None:
    balanced(*opened(11, 22))
    balanced(*opened(44, 22))
    assert balanced(message(MME, SGW, version_2(34, 22))) == [output_of(MME, 44)]
    balanced(message(SGW, OTHER_MME, version_2(32, 0, f_teid(22, SGW, 6))))  # and now it opens one itself
    assert balanced(message(MME, SGW, version_2(34, 22))) == [output_of(SGW, 22)]


def test_sessions_spread(balanced: Any) -> None:
    outputs = balanced(*(message(MME, SGW, version_2(32, 0, f_teid(teid, MME))) for teid in range(1, 101)))
    assert outputs == [output_of(MME, teid) for teid in range(1, 101)]
    assert len(set(outputs)) == OUTPUTS


def test_what_belongs_to_no_session_goes_by_transaction(balanced: Any, core: Any) -> None:
    echo = message(MME, SGW, v2.GTPHeader(gtp_type=1, T=0, seq=9) / b"\x03\0\x01\0\x07")
    cut_off = message(MME, SGW, version_2(32, 0, f_teid(11, MME)))[:60]
    for data in (echo, cut_off):
        assert balanced(data) == [computed(core, "gtp", data) * OUTPUTS >> 32]


def test_a_packet_alone_has_no_session(core: Any) -> None:
    with pytest.raises(core.Error, match="does not hash packets one by one"):
        computed(core, "gtp-session", message(MME, SGW, version_2(32, 0, f_teid(11, MME))))
