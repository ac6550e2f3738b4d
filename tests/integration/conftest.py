# SPDX-License-Identifier: Apache-2.0
"""For tests that run the command line: a registry and memory of their own, and a shell that ends what it started."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for nets, netspace and talk


@pytest.fixture
def private_directories() -> Iterator[Path]:
    """A directory with ``run`` and ``shm``, for RINGBAR_RUN and RINGBAR_SHM."""
    root = Path(tempfile.mkdtemp(prefix="ringbar-test-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    for name in ("run", "shm"):
        (root / name).mkdir()
    yield root
    shutil.rmtree(root, ignore_errors=True)


class Shell:
    """Runs ``ringbar`` with a registry and memory of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {**os.environ, "RINGBAR_RUN": str(root / "run"), "RINGBAR_SHM": str(root / "shm")}
        self.started: list[subprocess.Popen[str]] = []

    def __call__(self, *words: str, status: int = 0) -> str:
        """Run to the end; what it printed. The exit status must be ``status``."""
        done = self.run(*words)
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ringbar", *words],
            env=self.environment,
            cwd=self.root,  # not the checkout: python -m puts it first in the path, and it has a "qemu"
            capture_output=True,
            text=True,
            timeout=60,
        )

    def json(self, *words: str, status: int = 0) -> Any:
        """Run with --json; the document."""
        return json.loads(self(*words, "--json", status=status))

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a tool and wait until its devices are open."""
        process = subprocess.Popen(
            [sys.executable, "-m", "ringbar", *words],
            env=self.environment,
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        assert process.stderr is not None
        assert select.select([process.stderr], [], [], 30)[0], "the tool says nothing"
        line = process.stderr.readline()
        assert any(sign in line for sign in ("receiving", "sending", "→")), line
        return process

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=30)


@pytest.fixture
def rb(private_directories: Path) -> Iterator[Shell]:
    pytest.importorskip("ringbar._c", exc_type=ImportError)
    shell = Shell(private_directories)
    yield shell
    shell.end()
