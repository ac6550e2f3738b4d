# SPDX-License-Identifier: Apache-2.0
"""A deployment that ``make e2e`` has made, as tests see it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from testinfra.host import Host

WORK = Path(os.environ.get("RINGBAR_E2E", ""))
"""Where ``scripts/e2e`` works."""
TOP = Path(__file__).parents[2]


def connection(name: str) -> str:
    """The socket of the one SSH connection to a guest: a login takes seconds where it is emulated."""
    return str(WORK / f"ssh-{name}")


@dataclasses.dataclass
class Deployment:
    """Host and guests, in the order that packets take."""

    host: Host
    names: list[str]
    guests: list[Host]

    def ringbar(self, *words: str, status: int = 0) -> Any:
        """A command's JSON document on the host."""
        done = subprocess.run(
            ["/usr/local/bin/ringbar", *words, "--json"], capture_output=True, text=True, timeout=120, cwd="/"
        )
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout)

    def ssh(self, name: str, command: str) -> str:
        """What a command in a guest prints, on a connection of its own; nothing while the guest cannot be reached."""
        words = ["ssh", "-F", str(WORK / "ssh-config"), "-o", "ConnectTimeout=5", "-o", "ControlPath=none"]
        try:
            return subprocess.run([*words, name, command], capture_output=True, text=True, timeout=30).stdout.strip()
        except subprocess.TimeoutExpired:
            return ""

    def hang_up(self, name: str) -> None:
        """End the connection that testinfra has to a guest: a reboot would leave it hanging."""
        words = ["ssh", "-F", str(WORK / "ssh-config"), "-o", f"ControlPath={connection(name)}", "-O", "exit", name]
        subprocess.run(words, capture_output=True, timeout=30)

    def through(self, packets: int) -> dict[str, Any]:
        """Send packets through all guests; what came back."""
        way = ("-o", "99@0", "-i", f"99@{len(self.names)}")
        seen: dict[str, Any] = self.ringbar(
            "send", *way, "--window", "512", "--packets", str(packets), "--seconds", "100"
        )
        return seen


def recap(*more: str) -> dict[str, dict[str, int]]:
    """Run the roles once more, as ``make e2e`` did; what they say for each machine.

    :param more: options of ansible-playbook.
    """
    command = [*(WORK / "roles").read_text().splitlines(), *more, "ansible/site.yml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, cwd=TOP)
    said = dict(re.findall(r"^(\S+)\s*: (ok=.*)$", done.stdout, re.MULTILINE))
    assert done.returncode == 0 and said, f"{done.stdout}\n{done.stderr}"
    changed = [line for line in done.stdout.splitlines() if line.startswith(("changed:", "TASK"))]
    print("\n".join(changed))
    return {name: {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", counts)} for name, counts in said.items()}
