# SPDX-License-Identifier: Apache-2.0
"""A program in a VM decides which packets the host's own stack may see."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from netspace import Space
from talk import answers, fetch, host_and_peer, ping, resolve
from vmtools import Program, Shell, vm

from ringbar.qemu.launch import Guest

pytestmark = pytest.mark.vm

DECIDE = """
import threading
zc = ringbar.Cluster.attach(99)
rx, tx = zc.open_queue(0, "rx"), zc.open_queue(1, "tx")
forbidden = {(6, 8080)}
seen = 0
def may_pass(packet):
    return packet[12:14] != b"\\x08\\x00" or (packet[23], packet[36] << 8 | packet[37]) not in forbidden
def decide():
    global seen
    for burst in rx:
        seen += len(burst)
        tx.send(burst.select([may_pass(burst.copy(i)) for i in range(len(burst))]), timeout=1)
threading.Thread(target=decide, daemon=True).start()
"""


class Host:
    """What runs on the host: card to VM, VM to stack, stack to card. Descriptors only as far as the VM."""

    def __init__(self, space: Space) -> None:
        import ringbar

        self.cluster = ringbar.Cluster.attach(99)
        self.card: Any = space.inside(lambda: self.cluster.open_device("zc:nic0", "rxtx"))
        self.stack: Any = space.inside(lambda: self.cluster.open_device("stack:nic0", "rxtx"))
        self.to_vm = self.cluster.open_queue(0, "tx")
        self.from_vm = self.cluster.open_queue(1, "rx")
        self.stop = threading.Event()
        self.failed: list[BaseException] = []
        self.thread = threading.Thread(target=lambda: space.inside(self._run))

    def _run(self) -> None:
        try:
            while not self.stop.is_set():
                for source, sink in (
                    (self.card, self.to_vm),
                    (self.from_vm, self.stack),
                    (self.stack, self.card),
                ):
                    with source.recv(64, 0.0005) as burst:
                        sink.send(burst)
        except BaseException as problem:  # the test says it
            self.failed.append(problem)

    def __enter__(self) -> Host:
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        self.thread.join()
        self.cluster.close()
        if self.failed:
            raise self.failed[0]


def test_the_vm_decides_what_the_host_may_see(
    shell: Shell, guest_pc: Guest, program: Callable[[Guest], Program]
) -> None:
    shell.cluster()
    shell("attach", vm(guest_pc), "99@0", "--tx", "99@1")
    with host_and_peer() as (host, peer), answers(host):
        with Host(host):
            assert not peer.inside(lambda: ping(1, 0.3)), "nobody in the VM lets anything through"
            guard = program(guest_pc)
            guard.do(DECIDE)
            assert peer.inside(lambda: ping(2))
            assert peer.inside(resolve)
            assert peer.inside(lambda: fetch(80, 50_000)) == 50_000
            assert peer.inside(lambda: fetch(8080, 10, 0.5)) == 0
            guard.do("forbidden = {(17, 53)}")
            assert peer.inside(lambda: fetch(8080, 10)) == 10
            assert not peer.inside(lambda: resolve(0.3))
            assert guard.do("answer = seen") > 20
            guard.do("zc.close()")
        assert peer.inside(lambda: fetch(8080, 10)) == 10, "the card is the kernel's again"
    shell.detach(guest_pc)
    shell.comes_home()
