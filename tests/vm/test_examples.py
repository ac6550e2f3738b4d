# SPDX-License-Identifier: Apache-2.0
"""The examples whose point is a VM, in one: a monitor of the host's packets, an IPS that decides what the host sees.
On a host's queues: tests/integration/test_examples.py."""

from __future__ import annotations

import pathlib
import shlex
import subprocess
from collections.abc import Callable, Iterator

import pytest
from talk import answers, fetch, host_and_peer
from vmtools import IN_GUEST, Shell, read_line, vm

from ringbar.qemu.launch import Guest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]  # the first makes an image with numpy

EXAMPLES = pathlib.Path(__file__).parents[2] / "docs/examples"


@pytest.fixture(scope="module")
def guest(start_guest: Callable[..., Guest]) -> Iterator[Guest]:
    """A VM with numpy, and the examples in /opt/examples."""
    with start_guest("examples", numpy=True, share={"/opt/examples": EXAMPLES}) as started:
        started.wait_up()
        yield started


class Example:
    """An example that runs in the guest until it is told to end."""

    def __init__(self, guest: Guest, *words: str) -> None:
        self.guest = guest
        line = f"echo $$; exec {shlex.join([*IN_GUEST, f'/opt/examples/{words[0]}', *words[1:]])}"
        self.process: subprocess.Popen[str] = guest.popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.pid = int(self.line())

    def line(self) -> str:
        return read_line(self.process, 30)

    def __enter__(self) -> Example:
        return self

    def __exit__(self, *exc: object) -> None:
        self.guest.ssh(["kill", "-INT", str(self.pid)], check=False)
        _, said = self.process.communicate(timeout=30)
        assert "Traceback" not in said, said


def test_the_monitor_in_a_vm_names_the_busiest_source(shell: Shell, guest: Guest) -> None:
    shell.cluster(queues=1)
    shell("attach", vm(guest), "99@0")
    with Example(guest, "monitor.py", "99@0") as monitor:
        assert monitor.line() == "receiving 99@0\n"
        shell("send", "-o", "99@0", "--packets", "500", "--src", "10.1.2.3")
        shell("send", "-o", "99@0", "--packets", "5", "--src", "10.9.9.9")
        assert any(monitor.line().startswith("10.1.2.3 ") for _ in range(10))
    shell.detach(guest)
    shell.comes_home()


def test_the_ips_in_a_vm_decides_what_the_host_sees(shell: Shell, guest: Guest) -> None:
    shell.cluster()
    shell("attach", vm(guest), "99@0", "--tx", "99@1")
    guest.ssh("echo 'tcp port 8080' > /tmp/rules")
    with host_and_peer() as (host, peer), answers(host):
        way = host.inside(
            lambda: shell.start("bridge", "-i", "zc:nic0", "-o", "99@0", "-i", "99@1", "-o", "stack:nic0")
        )
        assert peer.inside(lambda: fetch(80, 10, 0.3)) == 0, "nothing passes before the program in the VM runs"
        with Example(guest, "ips.py", "99@0", "99@1", "/tmp/rules") as ips:
            assert ips.line() == "99@0 → 99@1\n"
            assert peer.inside(lambda: fetch(80, 50_000)) == 50_000
            assert peer.inside(lambda: fetch(8080, 10, 0.5)) == 0
            guest.ssh("echo udp > /tmp/rules")
            assert ips.line() == "rules read again\n"
            assert peer.inside(lambda: fetch(8080, 10)) == 10
        shell.finish(way, ask=True)
    shell.detach(guest)
    shell.comes_home()
