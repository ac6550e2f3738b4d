# SPDX-License-Identifier: Apache-2.0
"""What ``make e2e`` has deployed. Without it there is nothing to collect here."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import testinfra

sys.path.insert(0, str(Path(__file__).parent))
from deployed import WORK, Deployment, connection

if "RINGBAR_E2E" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def deployment() -> Deployment:
    """What ``make e2e`` has made."""
    config = WORK / "ssh-config"
    names = re.findall(r"^Host (\S+)$", config.read_text(), re.MULTILINE)
    guests = [
        testinfra.get_host(f"ssh://{name}", ssh_config=str(config), sudo=True, controlpath=connection(name))
        for name in names
    ]
    return Deployment(testinfra.get_host("local://"), names, guests)
