# SPDX-License-Identifier: Apache-2.0
"""Steering rules behind libxdp's dispatcher, on a stock Debian kernel: beside other programs on one interface.

The machine that runs the tests may refuse the kind of program that the dispatcher calls; a VM's own kernel does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from vmtools import Program

from ringbar.qemu.launch import Guest

pytestmark = pytest.mark.vm

SETUP = """
import os, socket, struct
def udp(port):
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 36, 0, 0, 64, 17, 0, bytes(4), bytes(4))
    return bytes([2] * 12) + b"\\x08\\x00" + ip + struct.pack(">HHHH8s", 4000, port, 16, 0, b"ring")
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
wire.bind(("rbx1", 0))
stack = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x800))
stack.bind(("rbx0", 0x800))
def send(*ports):
    "What each end got of one packet to each port, and what the stack got."
    for port in ports:
        wire.send(udp(port))
    wire.send(udp(1))                            # nobody's: when the stack has it, everything before it has arrived
    passed = []
    stack.settimeout(10)
    while not passed or passed[-1] != 1:
        passed.append(int.from_bytes(stack.recv(200)[36:38], "big"))
    got = []
    for rx in ends:
        burst = rx.recv(64, timeout=0.1)
        got.append([int.from_bytes(bytes(view[36:38]), "big") for view in burst])
        burst.release()
    # by port: the kernel's copying receive path may swap neighbours, and no order is this test's matter
    return [sorted(ports) for ports in got], sorted(passed[:-1])
answer = [name for name in os.listdir("/sys/fs/bpf")]
"""


@pytest.fixture
def program(guest_pc: Guest, program: Callable[[Guest], Program]) -> Iterator[Program]:
    guest_pc.ssh(
        "mount -t bpf bpf /sys/fs/bpf; ip link add rbx0 numrxqueues 2 numtxqueues 2 type veth"
        " peer name rbx1 numrxqueues 2 numtxqueues 2 && for n in 0 1; do"
        " echo 1 > /proc/sys/net/ipv6/conf/rbx$n/disable_ipv6; ip link set rbx$n up; done"
    )
    try:
        started = program(guest_pc)
        started.do(SETUP)
        yield started
    finally:
        guest_pc.ssh("ip link del rbx0; umount /sys/fs/bpf")


def test_a_rule_holds_behind_the_dispatcher_and_is_replaced_there(program: Program) -> None:
    program.do(
        """
zc = ringbar.Cluster.create(61, buffers=32768)
ends = [zc.open_device("zc:rbx0", "rx", steer="udp port 5000")]
"""
    )
    assert program.do("answer = os.listdir('/sys/fs/bpf/xdp')")  # the dispatcher's files
    assert program.do("answer = send(5000, 6000, 7000)") == [[[5000]], [6000, 7000]]
    assert program.do("ends[0].steer('udp port 6000 or udp port 7000'); answer = send(5000, 6000, 7000)") == [
        [[6000, 7000]],
        [5000],
    ]
    program.do("zc.close()")
    assert program.do("ends = []; answer = send(5000, 6000)") == [[], [5000, 6000]]


def test_two_rules_on_two_queues_hold_beside_each_other(program: Program) -> None:
    """Two devices, each with a program of its own; what one leaves the next sees, and the stack at last."""
    flows = [5000 + n for n in range(32)]  # some go by each queue
    program.do(
        """
zc = ringbar.Cluster.create(62, buffers=65536)
ends = [zc.open_device(f"zc:rbx0@{n}", "rx", steer="udp portrange 5000-5999") for n in (0, 1)]
"""
    )
    got, passed = program.do(f"answer = send(6000, *{flows})")
    assert sorted([*got[0], *got[1]]) == flows and all(got)
    assert passed == [6000]
    program.do("ends.pop(0).close()")
    second, passed = program.do(f"answer = send(6000, *{flows})")
    assert second == got[1:]
    assert sorted(passed) == sorted([6000, *got[0]])
    program.do("zc.close()")
