# SPDX-License-Identifier: Apache-2.0
"""Real VMs for the tests: each is booted once a session, with the package in /opt/ringbar."""

from __future__ import annotations

import importlib
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any, Callable

import pytest
import testinfra
from testinfra.host import Host

from ringbar.qemu import image as images
from ringbar.qemu.launch import QEMU, Guest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from vmtools import Program, Shell

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
def program() -> Iterator[Callable[[Guest], Program]]:
    """Starts programs in guests, and ends them after the test."""
    started: list[Program] = []

    def start(guest: Guest) -> Program:
        started.append(Program(guest))
        return started[-1]

    yield start
    for each in started:
        each.close()
