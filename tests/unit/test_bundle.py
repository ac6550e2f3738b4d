# SPDX-License-Identifier: Apache-2.0
"""The archive for VMs: the same bytes each time, a wheel that pip takes, small, and nothing half written."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("_cffi_backend", reason="cffi is not installed")

from ringbar.errors import Error
from ringbar.host import bundle


def test_the_same_installation_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        bundle.write(tmp_path / name, [])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with tarfile.open(tmp_path / "one") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"install", "70-ringbar.rules", "ringbar-bells.service"} <= names


def test_pip_takes_the_wheel_and_it_stays_below_two_megabytes(tmp_path: Path) -> None:
    name, data = bundle.wheel()
    assert len(data) < 2 << 20
    (tmp_path / name).write_bytes(data)
    words = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path / "there"), str(tmp_path / name)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, cwd=tmp_path)
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import ringbar; print(ringbar.__file__, ringbar.__version__)"],
        env={"PYTHONPATH": str(tmp_path / "there")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split()[0].startswith(str(tmp_path / "there"))


def test_what_only_a_host_uses_is_left_out(tmp_path: Path) -> None:
    name, data = bundle.wheel()
    (tmp_path / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / name) as archive:
        names = archive.namelist()
    assert not [n for n in names if "/bench/" in n or "__pycache__" in n]
    assert len(names) == len(set(names)) and "ringbar/guest/prepare.py" in names


@pytest.mark.parametrize(
    "text, version",
    [(b"GLIBC_2.2.5\0GLIBC_2.34\0GLIBC_2.4", (2, 34)), (b"GLIBC_2.9\0GLIBC_2.10", (2, 10)), (b"", (2, 17))],
)
def test_the_newest_symbol_decides_the_tag(text: bytes, version: tuple[int, int]) -> None:
    assert bundle.glibc_needed(text) == version


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(Error, match="cannot be written"):
        bundle.write(tmp_path / "absent" / "file", [])
    assert not list(tmp_path.iterdir())
