# SPDX-License-Identifier: Apache-2.0
"""The grammar of addresses: what people may type, what is refused, and that refusals name a cure or the bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringbar import address
from ringbar.address import (
    FileAddress,
    InterfaceAddress,
    NicAddress,
    QueueAddress,
    StackAddress,
    VmAddress,
    format_queues,
    parse_cluster,
    parse_device,
    parse_devices,
    parse_queue,
    parse_queues,
    parse_vm,
)
from ringbar.errors import BadAddress


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("99@0", [QueueAddress(99, 0)]),
        ("zc:99@0", [QueueAddress(99, 0)]),
        ("099@007", [QueueAddress(99, 7)]),
        ("99@0-3", [QueueAddress(99, n) for n in range(4)]),
        ("65535@2047", [QueueAddress(65535, 2047)]),
        ("zc:eth1", [NicAddress("eth1")]),
        ("zc:eth1@2", [NicAddress("eth1", 2)]),
        ("zc:eth1@0-1", [NicAddress("eth1", 0, 1)]),
        ("zc:br-lan", [NicAddress("br-lan")]),
        ("zc:eth0.100", [NicAddress("eth0.100")]),
        ("eth1", [InterfaceAddress("eth1")]),
        ("zc", [InterfaceAddress("zc")]),
        ("pcap", [InterfaceAddress("pcap")]),
        ("a234567890abcde", [InterfaceAddress("a234567890abcde")]),
        ("stack:eth1", [StackAddress("eth1")]),
        ("pcap:/tmp/a.pcap", [FileAddress("/tmp/a.pcap")]),
        ("pcap:a,b@c d:e", [FileAddress("a,b@c d:e")]),
        ("zc:eth1,zc:eth2", [NicAddress("eth1"), NicAddress("eth2")]),
        ("99@0,eth1,pcap:/x,y", [QueueAddress(99, 0), InterfaceAddress("eth1"), FileAddress("/x,y")]),
    ],
)
def test_devices_are_read(text: str, expected: list[address.DeviceAddress]) -> None:
    assert parse_devices(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", ",", "eth1,", ",eth1", "eth1,,eth2", "99@", "@0", "99@x", "99@0-", "99@-1", "99@3-1", "99@0-1-2", "65536@0",
        "99@2048",
        "99@0-2048", "99@99999999999999999999", "zc:", "zc:99", "zc:@0", "zc:eth1@", "zc:eth1@x", "zc:eth1@65536",
        "zc:eth1@2-1", "99", "eth1@2",
        "stack:", "stack:99", "stack:a/b", "pcap:", "a b", "a\tb", "a/b", "a:b", "eth0:1",
        "zc:a:b",
        "a234567890abcdef", "ääääääää", ".", "..", "eth1\n", "99@0 ", " 99@0", "٩٩@0", "99@٠", "zc:zc:99@0",
        "eth1,eth1", "99@0-1,99@1", "\0", "stack:99@0", "pcap:a\0b",
    ],
)  # fmt: skip
def test_what_is_no_device_is_refused(text: str) -> None:
    with pytest.raises(BadAddress) as refused:
        parse_devices(text)
    assert refused.value.code == "bad-address"
    assert refused.value.message


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("99", "ip link set dev 99 name"),
        ("zc:99", "ip link set dev 99 name"),
        ("eth1@2", "zc:eth1@2"),
        ("eth0:1", "eth0"),
        ("99@3-1", "1-3"),
        ("99@x", "99@0"),
    ],
)
def test_a_refusal_names_the_cure(text: str, cure: str) -> None:
    with pytest.raises(BadAddress) as refused:
        parse_device(text)
    assert refused.value.cure is not None
    assert cure in refused.value.cure


def test_one_is_not_several() -> None:
    with pytest.raises(BadAddress, match="2 devices"):
        parse_device("zc:eth1,zc:eth2")
    with pytest.raises(BadAddress, match="4 queues"):
        parse_queue("99@0-3")
    with pytest.raises(BadAddress, match="not a queue"):
        parse_queues("99@0,eth1")
    assert parse_queue("zc:99@5") == QueueAddress(99, 5)


def test_clusters() -> None:
    assert parse_cluster("0") == 0
    assert parse_cluster("65535") == 65535
    for text in ("", "x", "-1", "65536", "1.0", "٩", "1" * 10_000):
        with pytest.raises(BadAddress):
            parse_cluster(text)


def test_vms() -> None:
    assert parse_vm("qmp:/run/vm/a b.qmp") == VmAddress("qmp", "/run/vm/a b.qmp")
    assert parse_vm("ids1") == VmAddress("name", "ids1")
    uuid = "6BA7B810-9DAD-11D1-80B4-00C04FD430C8"
    assert parse_vm(uuid) == VmAddress("uuid", uuid.lower())
    with pytest.raises(BadAddress, match="running number"):
        parse_vm("7")
    for text in ("", "qmp:", "a/b", "a\nb"):
        with pytest.raises(BadAddress):
            parse_vm(text)


def test_what_is_not_text_is_refused_too() -> None:
    for value in (None, 99, b"99@0"):
        with pytest.raises(BadAddress):
            parse_devices(value)  # type: ignore[arg-type]


_queue = st.builds(QueueAddress, st.integers(0, address.MAX_CLUSTER), st.integers(0, address.MAX_QUEUE))
_name = st.from_regex(r"[a-zA-Z_.\-][a-zA-Z0-9_.\-]{0,14}", fullmatch=True).filter(lambda n: n not in (".", ".."))
_nic = st.builds(NicAddress, _name, st.none() | st.integers(0, address.MAX_NIC_QUEUE))
_path = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
_device = st.one_of(_queue, _nic, st.builds(InterfaceAddress, _name), st.builds(StackAddress, _name))


@given(_device | st.builds(FileAddress, _path))
def test_every_address_reads_back_as_itself(device: address.DeviceAddress) -> None:
    assert parse_device(str(device)) == device


@given(st.lists(_device, min_size=1, max_size=6, unique=True), st.none() | st.builds(FileAddress, _path))
def test_every_list_reads_back_as_itself(devices: list[address.DeviceAddress], last: FileAddress | None) -> None:
    whole = [*devices, last] if last else devices
    assert parse_devices(",".join(map(str, whole))) == whole


@given(st.lists(_queue, min_size=1, max_size=40))
def test_queues_are_written_short_and_read_back(queues: list[QueueAddress]) -> None:
    assert parse_queues(format_queues(queues)) == sorted(set(queues))


def test_runs_are_written_as_ranges() -> None:
    queues = [QueueAddress(99, n) for n in (7, 0, 1, 2, 3)]
    assert format_queues(queues) == "99@0-3,99@7"
    assert format_queues([]) == ""


@given(st.text())
def test_any_text_is_read_or_refused_and_nothing_else(text: str) -> None:
    for parse in (parse_devices, parse_queues, parse_vm, parse_cluster):
        try:
            found = parse(text)
        except BadAddress:
            continue
        assert found is not None
