# SPDX-License-Identifier: Apache-2.0
"""Real VMs for the tests: each is booted once a session, with the package in /opt/ringbar."""

from __future__ import annotations

import importlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Callable

import pytest
import testinfra
from testinfra.host import Host

from ringbar.qemu import image as images
from ringbar.qemu.launch import QEMU, Guest

for _directory in pathlib.Path(__file__).parents[:2]:  # vmtools; netspace and talk
    sys.path.insert(0, str(_directory))
from vmtools import Launch, Program, Shell  # noqa: E402

PACKAGES = ("ringbar", "ringbar.guest")


def package_share() -> dict[str, str]:
    """What :meth:`Guest.start` shares so that ``PYTHONPATH=/opt/ringbar`` has this very package."""
    share = {}
    for name in PACKAGES:
        (path, *_) = importlib.import_module(name).__path__
        share[f"/opt/ringbar/{name.replace('.', '/')}"] = path
    return share


@pytest.fixture(scope="session", autouse=True)
def image() -> None:
    """The guests' image is made before any test begins to count its seconds."""
    if os.geteuid() == 0 and shutil.which(QEMU) is not None:
        images.ensure()


@pytest.fixture(scope="session")
def start_guest() -> Callable[..., Guest]:
    """:meth:`Guest.start` with the package shared; skips, saying why, where no VM can be started."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed")
    if os.geteuid() != 0:
        pytest.skip("real VMs need root (guest images, shared memory)")

    def start(name: str, **options: Any) -> Guest:
        return Guest.start(name, share={**package_share(), **options.pop("share", {})}, **options)

    return start


@pytest.fixture(scope="session")
def guest_pc(start_guest: Callable[..., Guest]) -> Iterator[Guest]:
    """A ``-M pc`` VM that is up."""
    with start_guest("pc") as guest:
        guest.wait_up()
        yield guest


@pytest.fixture(scope="session")
def guest_q35(start_guest: Callable[..., Guest]) -> Iterator[Guest]:
    """A ``-M q35`` VM that is up; its root ports ``rp0`` to ``rp5`` have the 2-MiB window they come with."""
    with start_guest("q35", machine="q35", root_ports=6) as guest:
        guest.wait_up()
        yield guest


@pytest.fixture(scope="session")
def host_pc(guest_pc: Guest) -> Host:
    """The ``pc`` VM as testinfra sees it, over SSH."""
    return testinfra.get_host(guest_pc.testinfra)


@pytest.fixture(scope="session")
def host_q35(guest_q35: Guest) -> Host:
    """The ``q35`` VM as testinfra sees it, over SSH."""
    return testinfra.get_host(guest_q35.testinfra)


@pytest.fixture(scope="session")
def guest_wide(start_guest: Callable[..., Guest]) -> Iterator[Guest]:
    """A q35 VM whose root ports have a window of 2 GiB for 64-bit BARs."""
    with start_guest("wide", machine="q35", pref64_reserve="2G") as guest:
        guest.wait_up()
        yield guest


@pytest.fixture(scope="session")
def host_wide(guest_wide: Guest) -> Host:
    """The q35 VM with wide windows as testinfra sees it, over SSH."""
    return testinfra.get_host(guest_wide.testinfra)


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    """``ringbar`` on the host, with a registry and memory that this test has for itself; also for this process."""
    shell = Shell()
    for name, value in shell.variables.items():
        monkeypatch.setenv(name, value)
    yield shell
    shell.close()


@pytest.fixture
def launch(shell: Shell) -> Iterator[Launch]:
    """Starts agents; returns when one is ready."""
    running: list[subprocess.Popen[str]] = []

    def start(**environment: str) -> subprocess.Popen[str]:
        place = shell.root / "notify"
        place.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            told.bind(str(place))
            told.settimeout(60)
            with open(shell.root / "agent.log", "a") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "ringbar", "agent"],
                    env={**os.environ, **shell.variables, **environment, "NOTIFY_SOCKET": str(place)},
                    cwd=shell.root,
                    stderr=log,
                    text=True,
                )
            running.append(process)
            assert b"READY=1" in told.recv(4096)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.terminate()
        process.wait(30)
    if running:
        print((shell.root / "agent.log").read_text())  # shown where the test failed


@pytest.fixture
def program() -> Iterator[Callable[[Guest], Program]]:
    """Starts programs in guests, and ends them after the test."""
    started: list[Program] = []

    def start(guest: Guest) -> Program:
        started.append(Program(guest))
        return started[-1]

    yield start
    for each in started:
        each.close()
