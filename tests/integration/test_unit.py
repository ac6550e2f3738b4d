# SPDX-License-Identifier: Apache-2.0
"""The agent as its systemd unit runs it: not root, with the unit's capabilities and no others, most files read-only."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Shell

pytest.importorskip("fastapi")

USER = 64990
"""Of nobody."""
#: Memory that was writable does not become executable (PR_SET_MDWE, where the kernel has it): MemoryDenyWriteExecute.
DENY = "import ctypes, os, sys; ctypes.CDLL(None).prctl(65, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"


def directory() -> Path:
    """Where the package has the units."""
    import ringbar.host

    return Path(ringbar.host.__path__[0], "systemd")


def unit() -> dict[str, str]:
    text = (directory() / "ringbar-agent.service").read_text()
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))


def of_process(pid: int) -> dict[str, str]:
    return dict(re.findall(r"^(\w+):\s*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))


@pytest.fixture
def agent(rb: Shell) -> subprocess.Popen[str]:
    """Restricted as the unit says, in a name space with the ends rbu0 and rbu1 of a veth pair."""
    if os.geteuid() != 0:
        pytest.skip("giving powers away needs root")
    settings = unit()
    assert settings["AmbientCapabilities"] == settings["CapabilityBoundingSet"]
    capabilities = [f"+{name.removeprefix('CAP_').lower()}" for name in settings["AmbientCapabilities"].split()]
    some = ",".join(["-all", *capabilities])
    for name in ("run", "shm"):
        os.chown(rb.root / name, USER, USER)
    setpriv = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs"]
    setpriv += [f"--inh-caps={some}", f"--ambient-caps={some}", f"--bounding-set={some}"]
    setpriv += [sys.executable, "-c", DENY, sys.executable, "-m", "ringbar", "agent"]
    before = "mount -o remount,bind,ro / && ip link add rbu0 type veth peer name rbu1 && ip link set rbu0 up"
    before += " && ip link set rbu1 up"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(rb.root / "notify"))
        told.settimeout(60)
        process = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-c", f"{before} && exec {shlex.join(setpriv)}"],
            env={**rb.environment, "NOTIFY_SOCKET": str(rb.root / "notify")},
            cwd="/",
            stderr=subprocess.PIPE,
            text=True,
        )
        rb.started.append(process)
        assert b"READY=1" in told.recv(4096)
    return process


@pytest.fixture
def vm(rb: Shell) -> Iterator[str]:
    """One that was started with -S, as root."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    path = rb.root / "vm.qmp"
    words = "-M pc -accel tcg -m 8 -S -nodefaults -no-user-config -display none"
    process = subprocess.Popen(
        ["qemu-system-x86_64", *words.split(), "-qmp", f"unix:{path},server=on,wait=off"], stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until and process.poll() is None, "QEMU did not start"
        time.sleep(0.02)
    yield f"qmp:{path}"
    process.kill()
    process.wait()


def test_without_root_it_attaches_vms_and_runs_workers_on_cards(
    rb: Shell, agent: subprocess.Popen[str], vm: str
) -> None:
    me = of_process(agent.pid)
    assert me["Uid"].split() == [str(USER)] * 4 and me["NoNewPrivs"] == "1"
    assert rb.json("cluster", "create", "9", "--queues", "2", "--slots", "64")["changed"]
    (attachment,) = rb.json("attach", vm, "9@0", "--tx", "9@1")["attachments"]
    assert (attachment["state"], attachment["pool"]) == ("plugged", "own")
    assert {path.stat().st_uid for path in (rb.root / "shm").iterdir()} == {USER}
    topology = rb.root / "t.yaml"
    worker = "{kind: bridge, in: [zc:rbu0], out: [[9@0]], take_all: true}"
    topology.write_text(f"ringbar: 1\nname: t\nworkers:\n  edge: {worker}\n")
    rb("apply", str(topology))
    try:
        (found,) = rb.json("worker", "list")["workers"]
        assert found["state"] == "running"
        its: dict[str, Any] = of_process(found["pid"])
        assert its["Uid"].split() == [str(USER)] * 4 and its["CapEff"] == me["CapEff"]
        (device,) = rb.json("status", "9", "--sample", "0")["clusters"][0]["devices"]
        assert (device["name"], device["mode"]) == ("zc:rbu0", "driver")
    finally:
        rb("worker", "stop", "edge")
    assert rb.json("detach", vm, "--force", "--timeout", "0.1")["changed"]


def test_systemd_finds_nothing_wrong_with_the_units() -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    files = [str(directory() / f"ringbar-agent.{kind}") for kind in ("service", "socket")]
    done = subprocess.run([analyze, "verify", *files], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = subprocess.run(
        [analyze, "security", "--offline=true", "--threshold=50", "--no-pager", files[0]],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
