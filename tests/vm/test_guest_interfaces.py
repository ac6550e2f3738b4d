# SPDX-License-Identifier: Apache-2.0
"""A VM's own interfaces, bridged to queues of the host; and the kernel's side of one, under Debian 12's kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from netspace import udp_frame
from testinfra.host import Host
from vmtools import Program, Shell, Tool, in_guest, vm

from ringbar.qemu.launch import Guest

pytestmark = pytest.mark.vm

PACKETS = 5000


@pytest.fixture
def veth(guest_pc: Guest, host_pc: Host) -> Iterator[Guest]:
    """The VM with a pair of interfaces, near and far."""
    guest_pc.ssh("modprobe tun")
    guest_pc.ssh("ip link add near type veth peer name far && ip link set near up && ip link set far up")
    guest_pc.ssh("ip addr add 198.51.100.1/24 dev near; ip neigh add 198.51.100.2 lladdr 02:00:00:00:00:09 dev near")
    yield guest_pc
    guest_pc.ssh("ip link del near")


def test_an_ordinary_interface_feeds_a_queue_of_the_host_and_is_fed_by_one(shell: Shell, veth: Guest) -> None:
    shell.cluster()
    shell("attach", vm(veth), "99@0", "--tx", "99@1")
    with Tool(veth, "bridge", "-i", "near", "-o", "99@1"):
        counting = shell.start("count", "-i", "99@1", "--verify", "--packets", str(PACKETS), "--json")
        sent = in_guest(veth, "send", "-o", "far", "--packets", str(PACKETS), "--rate", "20k")
        assert sent["sent"]["packets"] == PACKETS
        said = shell.finish(counting)
        assert said["received"]["packets"] == PACKETS and said["verify"]["corrupted"] == said["verify"]["lost"] == 0
    with (
        Tool(veth, "bridge", "-i", "99@0", "-o", "near"),
        Tool(veth, "count", "-i", "far", "--verify", "--packets", str(PACKETS), "--json") as tool,
    ):
        assert (
            shell.json("send", "-o", "99@0", "--packets", str(PACKETS), "--rate", "20k")["sent"]["packets"] == PACKETS
        )
        said = tool.end(ask=False)
        assert said["received"]["packets"] == PACKETS and said["verify"]["corrupted"] == said["verify"]["lost"] == 0
    shell.comes_home(granted=False)
    shell.detach(veth)
    shell.comes_home()


TAKE = """
import socket
zc = ringbar.Cluster.create(7, buffers=4096)
source = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
wire.bind(("far", 3))
wire.settimeout(0.5)
def out(text):
    source.sendto(text, ("198.51.100.2", 7000))
def on_wire(text):
    try:
        while not wire.recv(2048).endswith(text):
            pass
        return True
    except TimeoutError:
        return False
def came(rx, text):
    for _ in range(20):
        with rx.recv(1, 0.5) as burst:
            if len(burst) and burst.copy(0).endswith(text):
                return True
    return False
"""


def test_what_an_older_kernel_sends_is_taken_or_observed(
    veth: Guest, host_pc: Host, program: Callable[[Guest], Program]
) -> None:
    """Debian 12 has no links for such programs: a filter does it, which lets packets go when its process is dead."""
    here = program(veth)
    here.do(TAKE)
    here.do("rx = zc.open_device('stack:near', 'rx'); out(b'one'); answer = came(rx, b'one'), on_wire(b'one')")
    assert here.do("answer = came(rx, b'one')") is False
    here.do("rx.close(); out(b'two')")
    assert here.do("answer = on_wire(b'two')") is True
    seen = here.do(
        "rx = zc.open_device('stack:near', 'rx', observe=True); out(b'three'); "
        "answer = came(rx, b'three'), on_wire(b'three')"
    )
    assert seen == [True, True]
    here.do("rx.close()")
    assert "clsact" not in host_pc.check_output("tc qdisc show")
    here.do("tx = zc.open_device('stack:near', 'tx'); sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)")
    here.do("sink.bind(('198.51.100.1', 5000)); sink.settimeout(5)")
    mac = bytes.fromhex(host_pc.file("/sys/class/net/near/address").content_string.strip().replace(":", ""))
    frame = udp_frame(mac, bytes(6), b"ring").hex()
    assert here.do(f"tx.write([bytes.fromhex('{frame}')]); answer = sink.recv(64) == b'ring'") is True
    here.do("rx = zc.open_device('stack:near', 'rx')")
    here.kill()
    after = program(veth)
    after.do(TAKE.replace("create(7, buffers=4096)", "create(8, buffers=4096)"))
    assert after.do("out(b'four'); answer = on_wire(b'four')") is True, "what is left behind lets everything go"
    in_guest(veth, "cluster", "list")
    assert "clsact" not in host_pc.check_output("tc qdisc show"), "and goes with the next command"
    after.do("zc.close()")
