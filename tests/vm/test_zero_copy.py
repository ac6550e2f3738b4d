# SPDX-License-Identifier: Apache-2.0
"""Real AF_XDP zero copy: a VM with a newer kernel plays the host, this process the wire of its two NICs.

Each NIC's other end is a datagram socket here: one datagram is one frame, none is ever lost on the way (QEMU waits
while the NIC has no room), so every byte and every count can be compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import select
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import newer
import pytest
from vmtools import Program, Tool, in_guest

from ringbar.qemu import image as images
from ringbar.qemu import launch
from ringbar.qemu.launch import Guest

pytestmark = pytest.mark.vm

NICS = {
    # What the driver needs for zero copy: DMA addresses of its own, and no packets larger than a buffer.
    "virtio": "virtio-net-pci,iommu_platform=on,disable-legacy=on"
    ",guest_tso4=off,guest_tso6=off,guest_ufo=off,guest_csum=off,bus=rp{number}",
    "igb": "igb,bus=rp{number}",
}
SOL_XDP, XDP_OPTIONS, XDP_OPTIONS_ZEROCOPY = 283, 8, 1


class Wire:
    """The far end of a VM's NIC."""

    def __init__(self, directory: Path, number: int) -> None:
        self.near, self.far = directory / f"nic{number}", directory / f"wire{number}"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.far))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)

    def arguments(self, number: int, nic: str) -> list[str]:
        ends = f"local.type=unix,local.path={self.near},remote.type=unix,remote.path={self.far}"
        more = f"netdev=wire{number},mac=52:54:00:00:00:0{number},romfile="
        device = NICS[nic].format(number=number)
        return ["-netdev", f"dgram,id=wire{number},{ends}", "-device", f"{device},{more}"]

    def send(self, frame: bytes, timeout: float = 20.0) -> None:
        """One frame into the NIC; waits while QEMU has no room."""
        self.socket.settimeout(timeout)
        self.socket.sendto(frame, str(self.near))

    def flood(self, stop: threading.Event) -> None:
        """Frames without end, until told; those that find no room are left out."""
        while not stop.is_set():
            with contextlib.suppress(BlockingIOError, TimeoutError):
                self.send(frame(0, 200), 0.05)

    def recv(self, timeout: float = 20.0) -> bytes:
        """The next frame out of the NIC."""
        self.socket.settimeout(timeout)
        return self.socket.recv(65536)

    @contextlib.contextmanager
    def draining(self) -> Iterator[list[int]]:
        """Frames are taken off and counted, so that QEMU never waits (when a queue is reset while it does, QEMU 7.2
        fails an assertion of its own)."""
        seen = [0]
        over = threading.Event()

        def body() -> None:
            while not over.is_set() or select.select([self.socket], [], [], 0)[0]:
                if select.select([self.socket], [], [], 0.05)[0]:
                    self.socket.recv(65536, socket.MSG_DONTWAIT)
                    seen[0] += 1

        thread = threading.Thread(target=body)
        thread.start()
        try:
            yield seen
        finally:
            over.set()
            thread.join()


def frame(number: int, size: int, ethertype: int = 0x88B5) -> bytes:
    """A frame that nobody else sends: its number and bytes that follow from it."""
    head = bytes.fromhex("ffffffffffff 020000000001") + ethertype.to_bytes(2, "big") + number.to_bytes(4, "big")
    return head + hashlib.shake_128(str(number).encode()).digest(size - len(head))


SIZES = (60, 64, 65, 256, 1000, 1513, 1514)


@pytest.fixture(scope="module")
def wires() -> Iterator[list[Wire]]:
    directory = Path(tempfile.mkdtemp(prefix="ringbar-wire-"))
    made = [Wire(directory, number) for number in (1, 2)]
    yield made
    for wire in made:
        wire.socket.close()
    shutil.rmtree(directory)


@pytest.fixture(scope="module", params=sorted(NICS, reverse=True))
def host(request: pytest.FixtureRequest, start_guest: Callable[..., Guest], wires: list[Wire]) -> Iterator[Guest]:
    """The VM that plays the host: eth1 and eth2 are up."""
    nic: str = request.param
    extra = [word for number, wire in enumerate(wires, start=1) for word in wire.arguments(number, nic)]
    with pytest.MonkeyPatch.context() as patch:
        if nic == "igb":
            program, more = newer.qemu()
            patch.setattr(launch, "QEMU", program)
            extra += more
        image = newer.kernel(images.ensure(), *(newer.FULL if nic == "igb" else newer.CLOUD))
        started = start_guest(f"zc-{nic}", machine="q35", image=image, extra=extra)
    with started as guest:
        guest.wait_up()
        guest.ssh(
            "mount -t bpf bpf /sys/fs/bpf && for n in 1 2; do"
            " echo 1 > /proc/sys/net/ipv6/conf/eth$n/disable_ipv6; ip link set eth$n up;"
            " until ip link show eth$n | grep -q LOWER_UP; do sleep 0.05; done; done"
        )
        yield guest


BOTH = """
zc = ringbar.Cluster.create({cluster}, buffers=32768, size={size})
rx = [zc.open_device(name, "rx", writable=True) for name in ("zc:eth1", "zc:eth2")]
tx = [zc.open_device(name, "tx") for name in ("zc:eth1", "zc:eth2")]
import hashlib, os, socket, struct
def options(end):
    with socket.socket(44, socket.SOCK_RAW, 0, os.dup(end.fileno())) as same:
        return same.getsockopt({level}, {option})
def frames(end, n):
    "The next n frames of the test's own kind."
    while n:
        burst = end.recv(min(n, 64), timeout=20)
        assert len(burst), "no frame came for 20 s"
        kept = burst.select([bytes(view[12:14]) == b"\\x88\\xb5" for view in burst])
        n -= len(kept)
        yield kept
answer = {{end.address: [end.stats()["mode"], options(end)] for end in [*rx, *tx]}}
"""


def opened(program: Program, cluster: int, size: int) -> dict[str, list[object]]:
    """Both NICs, each way; what the ends say of themselves, and what the kernel says of their sockets."""
    text = BOTH.format(cluster=cluster, size=size, level=SOL_XDP, option=XDP_OPTIONS)
    found: dict[str, list[object]] = program.do(text)
    return found


@contextlib.contextmanager
def with_both(guest: Guest, cluster: int) -> Iterator[Program]:
    with Program(guest) as program:
        size = 4096 if guest.name == "zc-igb" else 2048
        assert opened(program, cluster, size) == {
            f"zc:eth{n}": ["zero-copy", XDP_OPTIONS_ZEROCOPY] for n in (1, 2)
        }
        yield program
        program.do("zc.close()")


def test_received_frames_leave_by_the_other_nic_from_the_same_buffers(host: Guest, wires: list[Wire]) -> None:
    packets = 3000  # more than the rings have
    with with_both(host, 71) as program:
        for there, back in ((0, 1), (1, 0)):
            program.tell(
                f"""
came, sent, copied = [], 0, []
for burst in frames(rx[{there}], {packets}):
    came += [hashlib.sha256(view).hexdigest()[:8] for view in burst]
    for view, handle in zip(burst, list(burst.handles)):
        view[6:12] = struct.pack(">HI", 0x0200, handle)   # the sender's address: which buffer this was received in
        del view
    sent += tx[{back}].send(burst, timeout=20)
answer = came, sent, rx[{there}].stats(), tx[{back}].stats()
"""
            )
            expected = [frame(number, SIZES[number % len(SIZES)]) for number in range(packets)]
            got = []
            for number, each in enumerate(expected):
                wires[there].send(each)
                if number >= 200:  # a window: neither side's sockets overflow
                    got.append(wires[back].recv())
            got += [wires[back].recv() for _ in range(packets - len(got))]
            came, sent, received, transmitted = program.answer(60)
            assert sent == packets
            assert came == [hashlib.sha256(each).hexdigest()[:8] for each in expected]
            assert [each[:6] + each[12:] for each in got] == [each[:6] + each[12:] for each in expected]
            handles = {int.from_bytes(each[8:12], "big") for each in got}
            assert all(each[6:8] == b"\x02\x00" for each in got) and 0 not in handles
            assert received["copied"] == transmitted["copied"] == 0
            for stats in (received, transmitted):
                assert not any(stats["drops"].values())
                assert stats["kernel_dropped"] == stats["kernel_ring_full"] == stats["kernel_invalid"] == 0


def test_generated_frames_leave_exactly_and_their_buffers_come_home(host: Guest, wires: list[Wire]) -> None:
    packets = 5000
    with with_both(host, 72) as program:
        program.tell(
            f"""
sent = 0
while sent < {packets}:
    out = tx[0].alloc(min(64, {packets} - sent))
    for i in range(len(out)):
        size = 60 + (sent + i) % 1400
        head = struct.pack(">6s6sHI", b"\\xff" * 6, b"\\2\\0\\0\\0\\0\\1", 0x88B5, sent + i)
        out[i][:size] = head.ljust(size, b"\\x5a")
        out.lengths[i] = size
    sent += tx[0].send(out, timeout=20)
answer = sent
"""
        )
        for number in range(packets):
            got = wires[0].recv()
            assert int.from_bytes(got[14:18], "big") == number
            assert len(got) == 60 + number % 1400 and got[18:] == b"\x5a" * (len(got) - 18)
        assert program.answer(60) == packets
        (book,) = program.do("tx[0].alloc(1).release(); answer = zc.status()['books']")
        assert book["home"] == book["free"] + book["lent"] + book["devices"]  # the fill rings and nothing else
        assert book["lent"] == 0


def test_buffers_in_which_a_card_would_cut_long_frames_are_not_used_for_zero_copy(
    host: Guest, wires: list[Wire]
) -> None:
    cuts = host.name == "zc-igb"
    with Program(host) as program:
        modes = opened(program, 76, 2048)
        assert (modes["zc:eth1"][0] == "zero-copy") is not cuts
        program.tell("answer = [bytes(view).hex() for burst in frames(rx[0], 3) for view in burst]")
        sent = [frame(number, size) for number, size in enumerate((1024, 1025, 1514))]
        for each in sent:
            wires[0].send(each)
        assert program.answer() == [each.hex() for each in sent]


def test_killed_in_mid_flight_it_opens_again_and_no_buffer_is_lost(host: Guest, wires: list[Wire]) -> None:
    in_guest(host, "cluster", "create", "73", "--buffers", "32768", "--size", "4096")
    for turn in range(2):
        with wires[0].draining(), wires[1].draining() as seen:
            tool = Tool(host, "bridge", "-c", "73", "-i", "zc:eth1", "-o", "zc:eth2")
            deadline = time.monotonic() + 20
            number, before = 0, seen[0]
            while seen[0] < before + 1000:
                assert time.monotonic() < deadline, f"turn {turn}: {seen[0] - before} of {number} frames came through"
                wires[0].send(frame(number, 200))
                number += 1
            stop = threading.Event()
            flood = threading.Thread(target=wires[0].flood, args=(stop,))
            flood.start()  # goes on before, while and after it dies
            try:
                tool.kill()
                tool.process.communicate(timeout=30)
            finally:
                stop.set()
                flood.join()
            (cluster,) = in_guest(host, "status", "73", "--sample", "0")["clusters"]
        books = cluster["books"]
        assert sum(book["devices"] + book["quiescing"] + book["lent"] for book in books) == 0, books
        assert "xdp" not in host.ssh("ip link show eth1; ip link show eth2").stdout
    in_guest(host, "cluster", "destroy", "73")


def test_after_closing_the_interface_is_as_before(host: Guest, wires: list[Wire]) -> None:
    with with_both(host, 75):
        assert "prog/xdp" in host.ssh("ip link show eth1").stdout
    for name in ("eth1", "eth2"):
        assert "xdp" not in host.ssh(f"ip -d link show {name}").stdout
    host.ssh("ip address replace 192.0.2.1/24 dev eth1")
    ask = bytes.fromhex("ffffffffffff 020000000001 0806 0001080006040001 020000000001 c0000202 000000000000 c0000201")
    with wires[0].draining():
        pass
    said = b""
    deadline = time.monotonic() + 30
    while said[12:14] != b"\x08\x06":  # igb takes its link down for a moment
        assert time.monotonic() < deadline, "the stack does not answer"
        wires[0].send(ask.ljust(60, b"\0"))
        with contextlib.suppress(TimeoutError):
            said = wires[0].recv(0.5)
    assert said[20:22] == b"\x00\x02" and said[28:32] == bytes([192, 0, 2, 1])  # the stack answers again


def test_a_rule_takes_without_a_copy_and_leaves_the_rest_to_the_stack(host: Guest, wires: list[Wire]) -> None:
    packets = 100
    with Program(host) as program:
        size = 4096 if host.name == "zc-igb" else 2048
        opened = program.do(
            f"""
import socket
zc = ringbar.Cluster.create(75, buffers=32768, size={size})
rx = zc.open_device("zc:eth1", "rx", steer="ether proto 0x88b5")
stack = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88b6))
stack.bind(("eth1", 0x88b6))
stack.settimeout(20)
def taken(n):
    got = []
    while len(got) < n:
        burst = rx.recv(64, timeout=20)
        assert len(burst), got
        got += [int.from_bytes(bytes(view[14:18]), "big") for view in burst if bytes(view[12:14]) == b"\\x88\\xb5"]
        burst.release()
    return got
answer = rx.stats()["mode"]
"""
        )
        assert opened == "zero-copy"
        for rule in (None, "ether proto 0x88b5 or arp"):  # the second while it runs
            if rule:
                program.do(f"rx.steer({rule!r})")
            for number in range(packets):
                wires[0].send(frame(number, 100))
                wires[0].send(frame(number, 100, 0x88B6))
            assert program.do(f"answer = taken({packets})") == list(range(packets))
            passed = f"answer = [int.from_bytes(stack.recv(200)[14:18], 'big') for _ in range({packets})]"
            assert program.do(passed) == list(range(packets))
        assert program.do("answer = rx.stats()['kernel_passed']") >= 2 * packets
        program.do("zc.close()")
