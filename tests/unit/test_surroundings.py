# SPDX-License-Identifier: Apache-2.0
"""What ``ringbar doctor`` says of the host around it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ringbar.host import surroundings, xdp_features


@pytest.fixture
def sys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """/sys of a host that a test makes up, and AppArmor's file on it."""
    monkeypatch.setattr(surroundings, "SYS", tmp_path)
    monkeypatch.setattr(surroundings, "APPARMOR_FILE", tmp_path / "libvirt-qemu")
    return tmp_path


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_apparmors_cure_is_the_command_that_mends_it(sys: Path) -> None:
    assert [f.state for f in surroundings.confinement()] == ["ok"]
    put(sys / "module/apparmor/parameters/enabled", "Y\n")
    (warned,) = surroundings.confinement()
    assert warned.state == "warning" and warned.cure is not None
    subprocess.run(warned.cure, shell=True, check=True)
    (mended,) = surroundings.confinement()
    assert mended.state == "ok"
    assert len((sys / "libvirt-qemu").read_text().splitlines()) == 2


def test_selinux_is_told_of_only_where_it_enforces(sys: Path) -> None:
    put(sys / "fs/selinux/enforce", "0")
    assert [f.check for f in surroundings.confinement()] == ["confinement"]
    put(sys / "fs/selinux/enforce", "1")
    (warned,) = surroundings.confinement()
    assert (warned.check, warned.state) == ("SELinux", "warning")


def test_a_qemu_that_is_not_confined_is_no_finding(sys: Path) -> None:
    assert surroundings.confined("ids1", 1 << 22) == []


def test_the_iommu_is_told_by_its_groups(sys: Path) -> None:
    assert "off" in surroundings.iommu()[0].detail
    (sys / "kernel/iommu_groups/0").mkdir(parents=True)
    assert "on, 1 groups" in surroundings.iommu()[0].detail


@pytest.mark.parametrize(
    ("bits", "said"),
    [(0, "generic mode"), (xdp_features.BASIC, "with a copy"), (xdp_features.BASIC | xdp_features.ZERO_COPY, "zero")],
)
def test_what_a_driver_can_do_is_said_in_words(bits: int, said: str) -> None:
    assert said in surroundings.xdp("eth1", {"eth1": bits})
    assert "when it is opened" in surroundings.xdp("eth1", None)


def test_the_kernel_tells_of_every_interface() -> None:
    found = xdp_features.look()
    if found is None:
        pytest.skip("kernels before 6.3 do not tell")
    assert found["lo"] == 0
