# SPDX-License-Identifier: Apache-2.0
"""Filters in libpcap's syntax, on ends and on queues, set, replaced and removed while packets flow."""

from __future__ import annotations

import ctypes.util
import json
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("_cffi_backend", reason="cffi is not installed")
pytestmark = pytest.mark.skipif(ctypes.util.find_library("pcap") is None, reason="libpcap is not installed")


def frame(protocol: int = 17, port: int = 5000, tag: int = 0) -> bytes:
    """Ethernet, IPv4 and the first eight bytes of UDP or TCP; tag goes into the last byte."""
    ip = bytes([0x45, 0, 0, 48, 0, 0, 0, 0, 64, protocol, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2])
    return bytes(12) + b"\x08\x00" + ip + (1234).to_bytes(2, "big") + port.to_bytes(2, "big") + bytes(23) + bytes([tag])


def tags(burst: Any) -> list[int]:
    """The last bytes of its packets."""
    return [burst[i][len(MIXED[0]) - 1] for i in range(len(burst))]


MIXED = [frame(port=53 if i % 3 == 0 else 5000, tag=i) for i in range(30)]
DNS = [i for i in range(30) if i % 3 == 0]


def test_receiving_end_hands_out_only_what_matches(pair: Any) -> None:
    tx, rx = pair
    rx.filter = "udp port 53"
    assert tx.write(MIXED) == 30
    with rx.recv(64, 1) as burst:
        assert tags(burst) == DNS
    assert rx.stats()["drops"]["filter"] == 20
    rx.filter = "not udp port 53"
    tx.write(MIXED)
    with rx.recv(64, 1) as burst:
        assert tags(burst) == [i for i in range(30) if i % 3]
    rx.filter = None
    tx.write(MIXED)
    with rx.recv(64, 1) as burst:
        assert len(burst) == 30


def test_sending_end_keeps_what_does_not_match_and_counts_it(pair: Any) -> None:
    tx, rx = pair
    tx.filter = "udp port 53"
    assert tx.filter == "udp port 53"
    assert tx.write(MIXED) == 30, "filtered packets count as accepted"
    with rx.recv(64, 1) as burst:
        assert tags(burst) == DNS
    assert tx.stats()["drops"]["filter"] == 20


def test_queue_filter_is_set_and_removed_by_another_handle_while_packets_flow(cluster: Any, pair: Any) -> None:
    import ringbar

    tx, rx = pair
    with ringbar.Cluster.attach(1) as other:
        queue = next(q for q in other.queues if q.id == 0)
        assert queue.filter is None
        queue.filter = "udp port 53"
        assert queue.filter == "udp port 53"
        tx.write(MIXED)
        with rx.recv(64, 1) as burst:
            assert tags(burst) == DNS
        assert queue.info()["drops"]["filter"] == 20
        assert queue.info()["packets"] == 10
        queue.filter = None
        tx.write(MIXED)
        with rx.recv(64, 1) as burst:
            assert len(burst) == 30
        assert queue.filter is None


def test_filtered_buffers_go_home(cluster: Any, pair: Any) -> None:
    """Far more packets than the queue has credit pass through a filter that lets none through."""
    tx, rx = pair
    next(q for q in cluster.queues if q.id == 0).filter = "tcp"
    assert sum(tx.write(MIXED) for _ in range(1000)) == 30000
    cluster.service()
    info = next(q for q in cluster.queues if q.id == 0).info()
    assert (info["lent"], info["packets"], info["drops"]["filter"]) == (0, 0, 30000)
    assert len(rx.recv(64, 0)) == 0


def test_full_queue_takes_what_does_not_match_up_to_the_first_that_does(cluster: Any, pair: Any) -> None:
    tx, rx = pair
    queue = next(q for q in cluster.queues if q.id == 0)
    assert tx.write([frame(port=53, tag=1)] * 300) == 256
    queue.filter = "udp port 53"
    with tx.alloc(4) as burst:
        for i, port in enumerate((5000, 5000, 53, 5000)):
            data = frame(port=port, tag=i)
            burst[i][: len(data)] = data
            burst.lengths[i] = len(data)
        assert tx.send(burst) == 2
        assert tags(burst) == [2, 3]


def test_filter_of_a_destroyed_queue_does_not_come_back_with_its_number(cluster: Any) -> None:
    queue = cluster.create_queue(7)
    queue.filter = "tcp"
    queue.destroy()
    assert cluster.create_queue(7).filter is None


@pytest.mark.parametrize(
    ("expression", "where"),
    [
        ("udp prt 53", '"prt" (character 5)'),
        ("tcp and and port 80", '"and" (character 9)'),
        ("tcp and", "at its end"),
        ("(tcp or udp", "at its end"),
        ("port 80)", '")" (character 8)'),
        ("ip[6:2 & 0x1fff = 0", "character"),
    ],
)
def test_malformed_filter_says_where(pair: Any, expression: str, where: str) -> None:
    import ringbar

    _tx, rx = pair
    rx.filter = "udp"
    with pytest.raises(ringbar.Error) as caught:
        rx.filter = expression
    assert expression in str(caught.value)
    assert where in str(caught.value)
    assert caught.value.code == "bad-filter"
    assert "pcap-filter" in (caught.value.cure or "")
    assert rx.filter == "udp", "the filter stays as it was"


def test_queue_filter_that_is_too_long_is_refused(cluster: Any) -> None:
    import ringbar

    with pytest.raises(ringbar.Error, match="at most 511"):
        cluster.queues[0].filter = "udp or " * 100 + "tcp"


def test_filter_that_would_take_libpcap_minutes_is_refused(pair: Any) -> None:
    import ringbar

    with pytest.raises(ringbar.Error, match="8192 is the most"):
        pair[0].filter = " or ".join(f"host 10.0.{i // 250}.{i % 250}" for i in range(800))


def test_filter_in_open_device_applies_from_the_first_packet(cluster: Any, core: Any) -> None:
    import ringbar

    with ringbar.Cluster.attach(1) as other, cluster.open_queue(1, "tx") as tx:
        with pytest.raises(ringbar.Error, match="cannot be compiled"):
            other.open_device("1@1", "rx", filter="udp prt 53")
        with other.open_device("1@1", "rx", filter="udp port 53") as rx:
            cluster.service()
            tx.write(MIXED)
            with rx.recv(64, 1) as burst:
                assert tags(burst) == DNS


def test_option_of_another_kind_of_device_is_refused(cluster: Any) -> None:
    import ringbar

    for option in ({"steer": "tcp"}, {"promiscuous": True}, {"fanout": 7}, {"speed": 2.0}, {"xdp": "driver"}):
        with pytest.raises(ringbar.Error, match="means nothing for 1@0"):
            cluster.open_device("1@0", "rx", **option)
    with pytest.raises(TypeError, match="unexpected keyword"):
        cluster.open_device("1@0", "rx", colour="red")


def test_queue_set_filter_on_the_command_line(cluster: Any) -> None:
    def ringbar(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "ringbar", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = ringbar("queue", "set", "1@0", "--filter", "udp port 53", "--pause")
    assert done.returncode == 0 and "filtered by: udp port 53" in done.stdout and "paused" in done.stdout
    assert ringbar("queue", "set", "1@0", "--filter", "udp port 53").stdout.startswith("unchanged")
    shown = json.loads(ringbar("status", "1", "--json").stdout)
    assert [q["filter"] for c in shown["clusters"] for q in c["queues"]] == ["udp port 53", None]
    assert ringbar("queue", "set", "1@0", "--filter", "none", "--resume").returncode == 0
    assert cluster.queues[0].filter is None
    wrong = ringbar("queue", "set", "1@0", "--filter", "udp prt 53")
    assert wrong.returncode == 1 and '"prt"' in wrong.stderr
    assert ringbar("queue", "set", "1@0").returncode == 2
