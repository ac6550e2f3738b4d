# SPDX-License-Identifier: Apache-2.0
"""The agent and VMs that libvirt runs: each row of the table in docs/agent.md that a domain can go through."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest
from libvirttools import URI, Daemons, TinyDomain, tiny_domain, virsh, why_not
from vmtools import Launch, Shell, attachments, kinds, state, until

from ringbar.qemu import libvirt

pytest.importorskip("fastapi")

pytestmark = [pytest.mark.vm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture(scope="module", autouse=True)
def daemons() -> Iterator[Daemons]:
    """libvirt runs."""
    running = Daemons()
    yield running
    running.close()


@pytest.fixture
def domain(daemons: Daemons, shell: Shell) -> Iterator[TinyDomain]:
    """One that is off, and cluster 99 with two queues."""
    shell.cluster(queues=2)
    with tiny_domain("ringbar-test-life", start=False) as vm:
        yield vm
        shell("detach", vm.domain)


def has(shell: Shell, what: str, before: int = 0) -> None:
    """Wait until the agent has seen more events of this kind than before; QEMU may tell of one reset several times."""
    until(lambda: kinds(shell), lambda k: k.count(what) > before, f"not more than {before} {what}", timeout=90)


def comes_back(shell: Shell, vm: TinyDomain, functions: int = 2) -> None:
    """It has its queues, and its guest sees them."""
    until(lambda: [a["state"] for a in attachments(shell)], lambda s: s == ["plugged"], "not plugged in", timeout=90)
    vm.wait_functions(functions)


def waits(shell: Shell) -> None:
    """Nothing is plugged in any more, all it held is home, and it is remembered."""
    until(lambda: state(shell), lambda s: s == "waiting", "its end was not seen")
    shell.comes_home()


def test_a_domain_has_its_queues_whenever_it_runs(shell: Shell, launch: Launch, domain: TinyDomain) -> None:
    launch()
    shell("attach", domain.domain, "99@0", "--tx", "99@1")  # lane, pool, and a pool of its own
    assert state(shell) == "waiting"

    domain.start()
    comes_back(shell, domain, 3)
    (attachment,) = attachments(shell)
    assert (attachment["uuid"], attachment["via"]) == (domain.uuid, "libvirt's monitor commands")

    virsh("suspend", domain.domain)
    has(shell, "vm-paused")
    assert state(shell) == "plugged"
    virsh("resume", domain.domain)
    has(shell, "vm-resumed")
    domain.wait_functions(3)

    virsh("reset", domain.domain)
    has(shell, "vm-reset")
    domain.wait_ready()
    domain.wait_functions(3)

    seen = kinds(shell).count("vm-reset")
    domain.sh("reboot -f &")  # from inside
    has(shell, "vm-reset", seen)
    domain.wait_ready()
    domain.wait_functions(3)

    seen = kinds(shell).count("vm-reset")
    domain.sh("echo c > /proc/sysrq-trigger &")  # its kernel crashes, and starts anew
    has(shell, "vm-reset", seen)
    domain.wait_ready()
    domain.wait_functions(3)

    domain.sh("poweroff -f &")  # shut off from inside
    waits(shell)
    domain.start()
    comes_back(shell, domain, 3)

    virsh("destroy", domain.domain)
    waits(shell)
    domain.start()
    comes_back(shell, domain, 3)

    os.kill(domain.pid, signal.SIGKILL)  # QEMU is killed
    waits(shell)
    domain.start()
    comes_back(shell, domain, 3)


def test_a_domain_that_is_renamed_is_known_by_its_uuid(shell: Shell, launch: Launch, domain: TinyDomain) -> None:
    launch()
    domain.start()
    shell("attach", domain.domain, "99@0")
    domain.wait_functions(2)
    virsh("destroy", domain.domain)
    waits(shell)
    old, domain.domain = domain.domain, "ringbar-test-renamed"
    virsh("domrename", old, domain.domain)
    domain.start()
    comes_back(shell, domain)
    assert [a["uuid"] for a in shell.json("status", domain.domain, "--sample", "0")["vms"]] == [domain.uuid]


def test_libvirt_is_restarted_and_the_agent_goes_on_listening(
    shell: Shell, launch: Launch, domain: TinyDomain, daemons: Daemons
) -> None:
    if not daemons.ours:
        pytest.skip("libvirtd ran before the tests and is not theirs to restart")
    launch()
    domain.start()
    shell("attach", domain.domain, "99@0")
    domain.wait_functions(2)
    daemons.stop()
    daemons.start()
    log = shell.root / "agent.log"
    until(log.read_text, lambda text: "listening to" in text, "the agent did not see it")

    def paused() -> list[str]:
        virsh("suspend", domain.domain)
        virsh("resume", domain.domain)
        return kinds(shell)

    until(paused, lambda k: "vm-paused" in k, "no events after the restart", timeout=60)

    virsh("destroy", domain.domain)
    waits(shell)
    daemons.stop()  # while it waits for the domain to start
    daemons.start()
    domain.start()
    comes_back(shell, domain)


def test_an_agent_that_starts_before_libvirt_gives_a_topologys_domain_its_queues_later(
    shell: Shell, launch: Launch, domain: TinyDomain, daemons: Daemons
) -> None:
    if not daemons.ours:
        pytest.skip("libvirtd ran before the tests and is not theirs to restart")
    directory = shell.root / "topologies.d"
    directory.mkdir()
    (directory / "a.yaml").write_text(f"ringbar: 1\nname: a\nvms:\n  {domain.domain}: {{rx: [99@0]}}\n")
    domain.start()
    daemons.stop()
    launch(RINGBAR_TOPOLOGIES=str(directory))
    assert kinds(shell) == ["apply-failed"]
    daemons.start()
    comes_back(shell, domain)
    assert kinds(shell).count("apply-failed") == 1


def test_a_migration_that_fails_leaves_the_domain_as_it_was(shell: Shell, launch: Launch, domain: TinyDomain) -> None:
    launch()
    domain.start()
    shell("attach", domain.domain, "99@0")
    there = "qemu+ssh://nobody@ringbar-test.invalid/system"
    refused = shell.json("migrate", domain.domain, there, status=1, timeout=120)
    assert refused["error"]["code"] == "migration-failed"
    comes_back(shell, domain)


def test_waiting_for_a_domain_leaves_no_thread_and_no_descriptor(domain: TinyDomain) -> None:
    uuid = domain.uuid

    async def once() -> None:
        async with libvirt.lifecycle(uuid, URI, lambda: None) as running:
            assert not running

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    asyncio.run(once())
    before = until(held, lambda _: True, "")
    for _ in range(10):
        asyncio.run(once())
    until(held, lambda now: now <= before, f"more than {before} threads or descriptors")
