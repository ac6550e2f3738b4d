# SPDX-License-Identifier: Apache-2.0
"""Each variable of the Ansible roles has a default, a description that ansible checks, and a line in the README."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ANSIBLE = Path(__file__).parents[2] / "ansible"


def read(path: str) -> Any:
    return yaml.safe_load((ANSIBLE / path).read_text())


@pytest.mark.parametrize("role", ["host", "guest"])
def test_each_variable_of_a_role_is_described(role: str) -> None:
    defaults = read(f"roles/{role}/defaults/main.yml")
    specs = read(f"roles/{role}/meta/argument_specs.yml")["argument_specs"]
    for entry, spec in specs.items():
        assert set(spec["options"]) == set(defaults), entry
        for name, option in spec["options"].items():
            assert option["description"], name
            if "default" in option:
                assert option["default"] == defaults[name], name
    table = re.findall(rf"^\| `({role}_\w+)` \|", (ANSIBLE / "README.md").read_text(), re.MULTILINE)
    assert table == list(defaults)
