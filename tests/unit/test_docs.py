# SPDX-License-Identifier: Apache-2.0
"""The documentation names what there is, and all of it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
DOCS = TOP / "docs"
HEADER = (TOP / "shared/csrc/ringbar.h").read_text(encoding="utf-8")


def sources() -> str:
    places = [TOP / name for name in ("shared", "host", "guest", "qemu")]
    files = [path for place in places for path in place.rglob("*") if path.suffix in (".c", ".py")]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def test_the_codes_that_troubleshooting_names_are_those_of_the_program() -> None:
    page, known = (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), sources()
    rows = re.findall(r"^\| ((?:`[a-z0-9-]+`(?:, )?)+) \|", page, re.MULTILINE)
    named = {code for row in rows for code in re.findall(r"`([a-z0-9-]+)`", row) if "-" in code}
    named |= set(re.findall(r"^`([a-z]+-[a-z-]+)`:", page, re.MULTILINE))
    assert len(named) > 15
    assert [code for code in sorted(named) if f'"{code}"' not in known] == []


def test_every_page_is_in_the_contents() -> None:
    listed = re.findall(r"^([a-z-]+)$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "index")


def test_every_command_has_its_help_on_the_page_of_commands() -> None:
    pytest.importorskip("ringbar.host")
    said = subprocess.run(
        [sys.executable, "-P", "-m", "ringbar", "--help"], capture_output=True, text=True, check=True, cwd="/"
    ).stdout
    commands = re.findall(r"^  ([a-z-]+) +[a-z]", said.partition("exit status")[0], re.MULTILINE)
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```\{ringbar-help\} ([a-z-]+)", page, re.MULTILINE)
    assert len(commands) > 20 and set(commands) - {"ringbar"} == set(shown)


def test_every_public_object_of_python_is_on_its_page() -> None:
    ringbar = pytest.importorskip("ringbar")
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    names = {name for name in ringbar.__all__ if not name.startswith("__")} - {"workers"}
    shown = set(re.findall(r"^\.\. auto(?:class|function|exception):: ringbar\.(\w+)$", page, re.MULTILINE))
    assert names == shown


def test_every_public_function_of_c_is_on_its_page_with_what_the_header_says_of_it() -> None:
    spec = importlib.util.spec_from_file_location("header", DOCS / "header.py")
    assert spec is not None and spec.loader is not None
    header = sys.modules["header"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(header)
    entries = [entry for section in header.sections(HEADER) for entry in section.entries]
    shown = {name: entry for entry in entries for name in entry.names}
    functions = set(re.findall(r"^(?:RB_API|static inline) [^;({]*?\b(rb_\w+)\(", HEADER, re.MULTILINE))
    assert len(functions) > 70 and functions - set(shown) == set()
    assert [entry.code for entry in entries if "RB_API" in entry.code and not entry.comment] == []
    assert "THE LIFE OF A BUFFER" in header.introduction(HEADER)


def test_ringbar_h_is_documented_by_that_and_not_copied() -> None:
    assert "{ringbar-header}" in (DOCS / "c.md").read_text(encoding="utf-8")
