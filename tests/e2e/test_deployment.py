# SPDX-License-Identifier: Apache-2.0
"""Host and guests after the roles, in the order of a deployment's life: each test leaves it as the next wants it."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
from deployed import Deployment, recap
from testinfra.host import Host

PACKETS = 100_000
FEW = 4_000
"""Fit into every queue on the way: where nobody holds a sender back, a slow guest loses none of them."""
FAULTS = ("lost", "reordered", "duplicated", "corrupted", "foreign")
IVSHMEM = "1af4:1110"


def flows(deployment: Deployment) -> None:
    """Packets go through all guests, and come back as they were."""
    seen = deployment.through(PACKETS)
    assert seen["received"]["packets"] == PACKETS, seen
    assert not any(seen["verify"][fault] for fault in FAULTS), seen


def until(look: Callable[[], Any], what: str, seconds: float) -> Any:
    """What ``look`` sees once it is true; a bounded wait for what has no event."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, f"{what} after {seconds:g} s"
        time.sleep(0.5)
    return seen


def functions(guest: Host) -> list[str]:
    """Shared memory devices in a guest."""
    return guest.check_output(f"lspci -n -d {IVSHMEM}").splitlines()


def attached(deployment: Deployment) -> dict[str, str]:
    """VMs of cluster 99 and their states."""
    return {vm["vm"]: vm["state"] for vm in deployment.ringbar("status")["vms"]}


def queues(deployment: Deployment) -> list[dict[str, Any]]:
    """The queues of cluster 99, in order."""
    (cluster,) = deployment.ringbar("status", "99")["clusters"]
    found: list[dict[str, Any]] = cluster["queues"]
    return found


def passed(deployment: Deployment) -> list[int]:
    """How many packets each queue has passed on so far."""
    return [max(queue["packets"], queue["received_packets"]) for queue in queues(deployment)]


def tool(*words: str) -> subprocess.Popen[str]:
    """Start a tool of ringbar on the host."""
    command = ["/usr/local/bin/ringbar", *words, "--quiet", "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/")


# ---- what the roles left --------------------------------------------------------------------------------------------


def test_the_host_has_packages_group_and_command(deployment: Deployment) -> None:
    host = deployment.host
    for package in ("libxdp1", "libbpf1", "libpcap0.8", "python3-libvirt"):
        assert host.package(package).is_installed, package
    assert host.group("ringbar").exists
    assert host.file("/usr/local/bin/ringbar").linked_to == "/opt/ringbar/bin/ringbar"
    assert host.file("/opt/ringbar/ringbar-guest.tar.gz").size > 100_000


def test_the_hosts_agent_serves_and_knows_the_topology(deployment: Deployment) -> None:
    host = deployment.host
    if host.file("/run/systemd/system").exists:
        for unit in ("ringbar-agent.socket", "ringbar-agent.service"):
            assert host.service(unit).is_enabled and host.service(unit).is_running, unit
    said = deployment.ringbar("events")
    assert any(event["kind"] == "agent-started" for event in said["events"]), said
    assert host.file("/etc/ringbar/topologies.d/chain.yaml").contains("name: chain")


def test_the_hosts_huge_pages_are_there_and_the_cluster_lies_in_them(deployment: Deployment) -> None:
    assert any("pagesize=2M" in line for line in deployment.host.file("/proc/mounts").content_string.splitlines())
    assert deployment.ringbar("cluster", "show", "99")["cluster"]["pages"] == "2M"


def test_guests_have_group_udev_rule_command_and_unit(deployment: Deployment) -> None:
    for guest in deployment.guests:
        assert guest.group("ringbar").exists
        assert guest.file("/etc/udev/rules.d/70-ringbar.rules").contains("ringbar.guest.prepare")
        unit = guest.service("ringbar-bridge.service")
        assert unit.is_enabled and unit.is_running
        assert guest.check_output("ringbar --version") == deployment.host.check_output("ringbar --version")


def test_guests_got_their_packages_from_nowhere_but_the_box(deployment: Deployment) -> None:
    for guest in deployment.guests:
        assert guest.package("python3").is_installed
        assert not guest.package("python3-cffi-backend").is_installed     # the bundle has it
        assert guest.run("ip route get 1.1.1.1").rc != 0


def test_running_guests_have_the_devices_and_the_group_may_use_them(deployment: Deployment) -> None:
    assert attached(deployment) == dict.fromkeys(deployment.names, "ready")
    for guest in deployment.guests:
        found = functions(guest)
        assert len(found) >= 2, found        # a lane and a pool at least
        for line in found:
            resource = guest.file(f"/sys/bus/pci/devices/0000:{line.split()[0]}/resource2")
            assert (resource.group, resource.mode) == ("ringbar", 0o660), line


def test_guests_map_the_memory_write_back(deployment: Deployment) -> None:
    for guest in deployment.guests:
        findings = json.loads(guest.run("ringbar doctor --json").stdout)["findings"]
        devices = [f for f in findings if f["check"].startswith("device ")]
        assert len(devices) == len(functions(guest))
        assert all(f["state"] == "ok" and "memory type write-back" in f["detail"] for f in devices), devices


# ---- packets --------------------------------------------------------------------------------------------------------


def test_packets_go_through_all_guests_and_none_is_lost(deployment: Deployment) -> None:
    before = passed(deployment)
    flows(deployment)
    assert [after - then for after, then in zip(passed(deployment), before)] == [PACKETS] * (len(deployment.names) + 1)


def test_a_sender_and_a_counter_of_their_own_agree(deployment: Deployment) -> None:
    """One process serves the guests; the two tools reach it over queues of the host."""
    last = len(deployment.names)
    there, back = (f"99@{last + 1}", f"99@{last + 2}")
    deployment.ringbar("queue", "create", "99", "--count", "2")
    serving = tool("bridge", "-i", there, "-o", "99@0", "-i", f"99@{last}", "-o", back)
    counting = tool("count", "-i", back, "--verify", "--packets", str(FEW), "--seconds", "100")
    try:
        for number in (last + 1, last + 2):
            until(lambda n=number: queues(deployment)[n]["consumer"], f"nobody receives from 99@{number}", 30)
        deployment.ringbar("send", "-o", there, "--packets", str(FEW))
        seen = json.loads(counting.communicate(timeout=120)[0])
    finally:
        for process in (serving, counting):
            process.terminate()
            process.communicate(timeout=30)
    assert seen["received"]["packets"] == FEW and not any(seen["verify"][fault] for fault in FAULTS), seen
    for queue in (there, back):
        deployment.ringbar("queue", "destroy", queue)


# ---- the roles again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--check"], []], ids=["check mode", "for real"])
def test_the_roles_change_nothing_a_second_time(deployment: Deployment, options: list[str]) -> None:
    said = recap(*options)
    assert set(said) == {"localhost", *deployment.names}
    assert {name: counts["changed"] for name, counts in said.items()} == dict.fromkeys(said, 0)


def test_check_mode_tells_what_would_change_and_changes_nothing(deployment: Deployment) -> None:
    said = recap("--check", "--limit", "localhost", "-e", '{"host_users": ["nobody"]}')
    assert said["localhost"]["changed"] == 1
    assert "ringbar" not in deployment.host.user("nobody").groups


# ---- a guest's life -------------------------------------------------------------------------------------------------


def test_a_guest_that_reboots_gets_its_queues_back_and_packets_flow_again(deployment: Deployment) -> None:
    name, guest = deployment.names[0], deployment.guests[0]
    boot = deployment.ssh(name, "cat /proc/sys/kernel/random/boot_id")
    assert boot
    deployment.hang_up(name)
    deployment.ssh(name, "sudo systemctl reboot")
    until(
        lambda: deployment.ssh(name, "cat /proc/sys/kernel/random/boot_id") not in ("", boot),
        f"{name} has not come up again", 200,
    )
    until(lambda: attached(deployment).get(name) == "ready", f"no program of {name} has opened its queues", 60)
    assert len(functions(guest)) >= 2
    flows(deployment)


def test_detached_guests_have_no_devices_and_nothing_is_lent_to_them(deployment: Deployment) -> None:
    for name, guest in zip(deployment.names, deployment.guests):
        assert deployment.ringbar("detach", name)["result"] == "changed"
        assert functions(guest) == []
    assert attached(deployment) == {}
    assert [queue["lent"] for queue in queues(deployment)] == [0] * (len(deployment.names) + 1)
