# SPDX-License-Identifier: Apache-2.0
"""The version stands in meson.build, and everything else says the same; docs/c.md has pkg-config asked."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
VERSION = re.search(r"^  version: '(\S+)',", (TOP / "meson.build").read_text(encoding="utf-8"), re.MULTILINE)[1]  # type: ignore[index]


def test_what_is_installed_has_it() -> None:
    ringbar = pytest.importorskip("ringbar._c", exc_type=ImportError)
    import ringbar as package

    command = [sys.executable, "-P", "-m", "ringbar", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout == f"ringbar {VERSION}\n"
    assert package.__version__ == ringbar.text(ringbar.lib.rb_version()) == metadata.version("ringbar") == VERSION


def test_a_copy_of_the_package_without_its_metadata_has_it(tmp_path: Path) -> None:
    package = pytest.importorskip("ringbar._c", exc_type=ImportError)
    shutil.copytree(Path(package.__file__).parent, tmp_path / "ringbar")
    code = "import sys; sys.path.insert(0, sys.argv.pop()); from ringbar.cli import _version; print(_version())"
    hidden = "import importlib.metadata as m\ndef no(name): raise m.PackageNotFoundError(name)\nm.version = no\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", hidden + code, str(tmp_path)], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout == f"{VERSION}\n"


def test_it_stands_nowhere_else() -> None:
    config = (TOP / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in config
    assert re.search(r"^version\s*=", config, re.MULTILINE) is None
    build = (TOP / "meson.build").read_text(encoding="utf-8")
    assert build.count(VERSION) == 1
    for name in ("shared", "host", "guest", "qemu"):
        for path in (TOP / name).rglob("*.py"):
            assert f'"{VERSION}' not in path.read_text(encoding="utf-8"), path
    assert 'release = version = metadata.version("ringbar")' in (TOP / "docs/conf.py").read_text(encoding="utf-8")


def test_the_changelog_knows_it_or_what_is_to_be_released() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (TOP / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings and headings[0] in ("Unreleased", VERSION)
