# SPDX-License-Identifier: Apache-2.0
"""Where a VM may be moved to: who may ask the agent must not be able to let it, or libvirt, run a command."""

from __future__ import annotations

import pytest

from ringbar.errors import Error
from ringbar.host import migrating
from ringbar.host.vms import Name

DOMAIN = Name("ids1", "6d0e4f6c-0000-4000-8000-000000000001", "qemu:///system")


@pytest.mark.parametrize("to", ["qemu+ssh://host2/system", "qemu+ssh://admin@host-2.example:2222/system"])
def test_another_hosts_libvirt_is_taken(to: str) -> None:
    migrating._check(DOMAIN, to)


@pytest.mark.parametrize(
    "to",
    [
        "qemu+ext://host/system?command=/tmp/x",
        "qemu+ssh://host/system?command=/tmp/x",
        "qemu+ssh://-oProxyCommand=x/system",
        "qemu+ssh://-l@host/system",
        "qemu+unix:///system?socket=/tmp/x",
        "qemu:///system",
        "host2",
        "",
    ],
)
def test_everything_else_is_refused(to: str) -> None:
    with pytest.raises(Error) as told:
        migrating._check(DOMAIN, to)
    assert told.value.code == "bad-uri"


def test_a_socket_goes_to_a_socket() -> None:
    with pytest.raises(Error):
        migrating._check(Name("qmp:/run/a.qmp"), "qemu+ssh://host2/system")
