# SPDX-License-Identifier: Apache-2.0
"""The role ``host`` on a bare Debian 12 with systemd, whatever the machine itself runs: a container of its own.

It shares the kernel and the network with this machine. Its packages come from Debian, the wheels that ringbar needs
from a directory, as on a host that reaches no package index.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployed import TOP, WORK

PACKAGES = ("ca-certificates", "dbus", "python3", "python3-apt", "systemd-sysv")
HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
PAGES = 8


def run(*words: str | Path, timeout: float = 120) -> str:
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}"
    return done.stdout


def bare_debian() -> Path:
    """An archive with a minimal Debian 12, kept in the cache, with this machine's sources of packages."""
    lists = sorted(p for p in Path("/etc/apt").rglob("*") if p.suffix in (".list", ".sources") and p.stat().st_size)
    recipe = [*PACKAGES, *(path.read_text() for path in lists)]
    archive = Path(os.environ["RINGBAR_CACHE"], f"host-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]}.tar")
    if not archive.exists():
        with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".host-") as aside:
            made = Path(aside, "root.tar")
            run("mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}", "bookworm", made,
                *lists, timeout=280)
            made.rename(archive)
    return archive


class Container:
    """A directory with Debian in it, booted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.before = int(HUGE_PAGES.read_text())
        self.nspawn: subprocess.Popen[bytes] | None = None
        self.init = 0

    def boot(self) -> None:
        """Until its systemd has come up."""
        unit = [] if Path("/run/systemd/system").exists() else ["--keep-unit"]
        with open(WORK / "nspawn.log", "ab") as log:
            self.nspawn = subprocess.Popen(
                ["systemd-nspawn", "--quiet", "--register=no", *unit, "--boot", "--console=pipe", "--capability=all",
                 f"--bind-ro={TOP}", f"--bind-ro={WORK}", f"--directory={self.root}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "yes"},
            )  # fmt: skip
        children = Path(f"/proc/{self.nspawn.pid}/task/{self.nspawn.pid}/children")
        deadline = time.monotonic() + 60
        while True:
            assert self.nspawn.poll() is None and time.monotonic() < deadline, (WORK / "nspawn.log").read_text()
            found = children.read_text().split()
            self.init = int(found[-1]) if found else 0
            if self.init and self("systemctl", "is-system-running", check=False).strip() in ("running", "degraded"):
                return
            time.sleep(0.2)     # the polling interval of a bounded wait

    def __call__(self, *words: str | Path, check: bool = True, timeout: float = 250) -> str:
        """What a command prints in there."""
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        clean = [
            "env", "-i", "--chdir=/", f"PATH={path}", "HOME=/root", "LANG=C.UTF-8",
            f"ANSIBLE_CONFIG={TOP}/ansible/ansible.cfg",
        ]
        done = subprocess.run(
            ["nsenter", f"--target={self.init}", "--mount", "--uts", "--ipc", "--pid", "--", *clean, *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
        )
        assert done.returncode == 0 or not check, f"{words}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def stop(self) -> None:
        """Off, in an orderly way where it still can."""
        if self.nspawn is None:
            return
        self.nspawn.send_signal(signal.SIGTERM)     # asks the init inside to power off
        try:
            self.nspawn.wait(30)
        except subprocess.TimeoutExpired:
            self.nspawn.kill()
            self.nspawn.wait()
        with contextlib.suppress(OSError):
            Path("/run/systemd/nspawn/propagate", self.root.name).rmdir()
        self.nspawn = None

    def playbook(self, name: str, *options: str) -> dict[str, int]:
        """Run a playbook for this one host; its counts."""
        (wheel,) = (WORK / "dist").glob("ringbar-*.whl")
        variables = f"host_wheel={wheel} host_wheelhouse={WORK}/wheelhouse host_hugepages_2m={self.pages}"
        said = self(
            Path(sys.prefix, "bin/ansible-playbook"), "-i", TOP / "ansible/inventory/this-host.yml",
            "-e", variables, *options, TOP / "ansible" / name,
        )
        return {key: int(value) for key, value in re.findall(r"\b(ok|changed|failed)=(\d+)", said)}

    @property
    def pages(self) -> int:
        """Huge pages that the role is to set: those of this machine, and some."""
        return self.before + PAGES


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    root = WORK / "container"
    root.mkdir()
    run("tar", "--extract", "--numeric-owner", f"--directory={root}", f"--file={bare_debian()}")
    for path in ("/etc/ssl/certs/ca-certificates.crt", "/etc/resolv.conf", "/etc/hosts",
                 *map(str, Path("/etc/apt/apt.conf.d").glob("99*"))):
        if Path(path).exists():
            shutil.copyfile(path, f"{root}{path}")
    made = Container(root)
    try:
        made.boot()
        yield made
    finally:
        made.stop()
        HUGE_PAGES.write_text(str(made.before))
        shutil.rmtree(root)


def test_check_mode_on_a_bare_host_goes_through_and_leaves_it_bare(container: Container) -> None:
    assert container.playbook("site.yml", "--check")["changed"] > 5
    assert container("find", "/etc", "/opt", "/usr/local", "-name", "*ringbar*") == ""


def test_a_bare_host_gets_all_of_it(container: Container) -> None:
    counts = container.playbook("site.yml")
    assert counts["changed"] > 5
    assert container("ringbar", "--version").startswith("ringbar ")
    for unit in ("ringbar-agent.socket", "ringbar-agent.service"):
        assert container("systemctl", "is-enabled", unit) == "enabled\n"
        assert container("systemctl", "is-active", unit) == "active\n"
    assert "agent-started" in container("ringbar", "events")
    assert container("getent", "group", "ringbar")
    assert int(HUGE_PAGES.read_text()) == container.pages


def test_a_second_run_and_check_mode_change_nothing(container: Container) -> None:
    assert container.playbook("site.yml", "--check")["changed"] == 0
    assert container.playbook("site.yml")["changed"] == 0


def test_agent_and_huge_pages_come_back_at_boot(container: Container) -> None:
    container.stop()
    HUGE_PAGES.write_text(str(container.before))
    container.boot()
    assert container("systemctl", "is-active", "ringbar-agent.service") == "active\n"
    assert int(HUGE_PAGES.read_text()) == container.pages
    size = ("--queues", "1", "--slots", "1024", "--buffers", "4096", "--pages", "2M")
    container("ringbar", "cluster", "create", "98", *size)
    assert "98@0" in container("ringbar", "status")
    container("ringbar", "cluster", "destroy", "98")


def test_remove_takes_it_away_again(container: Container) -> None:
    container.playbook("remove.yml")
    assert container.playbook("remove.yml")["changed"] == 0
    left = container("find", "/etc", "/opt", "/usr/local", "/run/systemd", "/dev/shm", "-name", "*ringbar*")
    assert left == ""
    assert "0 loaded units" in container("systemctl", "--failed")
