# SPDX-License-Identifier: Apache-2.0
"""Which libvirt is connected to: QEMU's of this host, and nothing that runs a command or leads elsewhere."""

from __future__ import annotations

import os
import pathlib

import pytest

from ringbar.errors import Error
from ringbar.qemu import libvirt


@pytest.mark.parametrize("uri", [
    "qemu:///system", "qemu:///session", "qemu+unix:///system", "qemu+unix:///system?socket=/nonexistent/sock",
])
def test_qemu_of_this_host(uri: str) -> None:
    libvirt.check_uri(uri)


@pytest.mark.parametrize(("uri", "code"), [
    ("qemu+ssh://elsewhere/system", "other-host"),
    ("qemu://elsewhere/system", "other-host"),
    ("qemu+ssh:///system?command=/tmp/anything", "other-host"),
    ("test:///default", "not-qemu"),
    ("lxc:///system", "not-qemu"),
    ("qemu+ext:///system?command=/tmp/anything", "bad-uri"),
    ("qemu:///system?command=/tmp/anything", "bad-uri"),
    ("qemu:///embed?root=/tmp", "bad-uri"),
    ("qemu:///", "bad-uri"),
    ("/system", "bad-uri"),
    ("", "bad-uri"),
    ("qemu:///system?a", "bad-uri"),
    ("qemu://[/system", "bad-uri"),
])
def test_what_is_refused(uri: str, code: str) -> None:
    with pytest.raises(Error) as caught:
        libvirt.check_uri(uri)
    assert caught.value.code == code and caught.value.cure


def test_a_socket_of_another_user_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "sock"
    path.touch()
    libvirt.check_uri(f"qemu:///system?socket={path}")
    if os.geteuid() != 0:
        pytest.skip("making a file of another user needs root")
    os.chown(path, 65534, 65534)
    with pytest.raises(Error) as caught:
        libvirt.check_uri(f"qemu:///system?socket={path}")
    assert caught.value.code == "bad-uri"


def test_the_usual_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    assert libvirt.default_uri() == "qemu:///system"
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu:///session")
    assert libvirt.default_uri() == "qemu:///session"
