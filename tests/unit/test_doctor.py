# SPDX-License-Identifier: Apache-2.0
"""``ringbar doctor`` looks at a host as a host and at a guest as a guest."""

from __future__ import annotations

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
    from ringbar.host import doctor, native

    monkeypatch.setattr("ringbar.guest.find", lambda: plugged)
    monkeypatch.setattr("ringbar.guest.is_guest", lambda: virtual)
    monkeypatch.setattr(native, "clusters", lambda: clusters)
    assert doctor.in_guest() is guest
