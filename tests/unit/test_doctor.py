# SPDX-License-Identifier: Apache-2.0
"""``ringbar doctor`` looks at a host as a host and at a guest as a guest."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("plugged", "clusters", "guest"),
    [([], [], False), (["device"], [], True), (["device"], [99], False), ([], [99], False)],
)
@pytest.mark.parametrize("virtual", [False, True], ids=["iron", "vm"])
def test_host_or_guest(
    monkeypatch: pytest.MonkeyPatch, core: object, plugged: list[str], clusters: list[int], guest: bool, virtual: bool
) -> None:
    """The processor's hypervisor flag decides nothing: hosts are VMs themselves in many places."""
    from ringbar.host import inside, native

    monkeypatch.setattr("ringbar.guest.find", lambda: plugged)
    monkeypatch.setattr("ringbar.guest.is_guest", lambda: virtual)
    monkeypatch.setattr(native, "clusters", lambda: clusters)
    assert inside.in_guest() is guest


@pytest.mark.parametrize("virtual", [False, True], ids=["iron", "vm"])
@pytest.mark.parametrize("host", ["", "cluster", "agent", "qemu", "libvirt"])
def test_a_vm_with_nothing_of_a_host_is_a_guest_before_the_first_attach(
    monkeypatch: pytest.MonkeyPatch, core: object, private_directories: Path, host: str, virtual: bool
) -> None:
    from ringbar.host import agent, inside, native

    programs = private_directories / "bin"
    programs.mkdir()
    if host == "qemu":
        (programs / "qemu-system-x86_64").touch()
    elif host == "agent":
        agent.socket_path().touch()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(inside, "EMULATORS", programs)
    monkeypatch.setattr(inside, "has_libvirt", lambda: host == "libvirt")
    monkeypatch.setattr("ringbar.guest.find", lambda: [])
    monkeypatch.setattr("ringbar.guest.is_guest", lambda: virtual)
    monkeypatch.setattr(native, "clusters", lambda: [99] if host == "cluster" else [])
    assert inside.looks_like_a_guest() is (virtual and not host)


def test_a_guest_with_nothing_plugged_in_is_told_so_and_how(monkeypatch: pytest.MonkeyPatch, core: object) -> None:
    from ringbar.host import doctor_guest

    monkeypatch.setattr("ringbar.guest.find", lambda: [])
    (found,) = doctor_guest.devices()
    assert found.state == "warning" and "nothing is plugged into this VM" in found.detail
    assert found.cure is not None and "ringbar attach" in found.cure and "qemu-system" in found.cure
