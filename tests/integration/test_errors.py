# SPDX-License-Identifier: Apache-2.0
"""Bad input that needs no VM: each is one message with its cure, on a terminal and as JSON, and changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Shell

    Powerless = Callable[..., tuple[int, Any]]


def fails(rb: Shell, *words: str, code: str, says: str, cure: str, status: int = 1) -> None:
    """The command fails with this code, message and cure, in both forms."""
    error = rb.json(*words, status=status)["error"]
    assert error["code"] == code, error
    assert says in error["message"], error
    assert cure in (error["cure"] or ""), error
    done = rb.run(*words)
    assert done.returncode == status
    assert says in done.stderr
    assert cure in done.stderr
    assert done.stdout == ""
    for text in (error["message"], done.stderr):
        assert "Errno" not in text
        assert "Traceback" not in text


MASTER = """
import sys, ringbar
with ringbar.Cluster.create(99, buffers=16384, queues=1):
    print("made", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def master(rb: Shell) -> Iterator[subprocess.Popen[str]]:
    """A program that made cluster 99 and lives."""
    process = subprocess.Popen(
        [sys.executable, "-c", MASTER],
        env=rb.environment,
        cwd=rb.root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


# ---- clusters and queues


def test_cluster_id_in_use_by_another_kind_of_cluster(rb: Shell) -> None:
    rb("cluster", "create", "99", "--buffers", "16384", "--label", "ids")
    fails(
        rb, "cluster", "create", "99", "--buffers", "32768",
        code="exists", says="it has 16384 buffers, not 32768", cure="ringbar cluster destroy 99",
    )  # fmt: skip
    assert rb.json("cluster", "list")["clusters"][0]["buffers"] == 16384


def test_cluster_id_in_use_by_a_living_program_names_it(rb: Shell) -> None:
    with master(rb) as process:
        error = rb.json("cluster", "create", "99", status=1)["error"]
        assert str(process.pid) in error["message"]
        assert error["cure"]


def test_cluster_id_owned_by_a_dead_process_is_free_again(rb: Shell) -> None:
    with master(rb) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        assert rb.json("cluster", "create", "99", "--buffers", "16384")["result"] == "changed"
        assert rb.json("cluster", "show", "99")["cluster"]["persistent"] is True


def test_unknown_cluster(rb: Shell) -> None:
    for words in ("cluster show 99", "queue create 99", "status 99", "queue set 99@0 --pause"):
        fails(rb, *words.split(), code="no-such-cluster", says="no cluster 99", cure="ringbar cluster create 99")
    rb("cluster", "create", "7", "--buffers", "16384")
    assert "there are: 7" in rb.json("cluster", "show", "99", status=1)["error"]["cure"]


def test_unknown_queue(rb: Shell) -> None:
    rb("cluster", "create", "99", "--buffers", "16384", "--queues", "2")
    for words in ("status 99@5", "queue set 99@5 --pause", "count -i 99@5", "send -o 99@5"):
        fails(rb, *words.split(), code="no-such-queue", says="no queue 99@5", cure="there are: 99@0-1")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--size", "2000"], "2048"),
        (["--size", "128"], "256"),
        (["--size", "32768"], "16384"),
        (["--queues", "1", "--slots", "3000"], "2048"),
        (["--queues", "1", "--slots", "1"], "2"),
        (["--queues", "1", "--slots", "131072"], "65536"),
        (["--buffers", "17M"], "16"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_sizes_that_cannot_be_had_name_the_nearest(rb: Shell, words: list[str], says: str) -> None:
    error = rb.json("cluster", "create", "99", *words, status=1)["error"]
    assert says in f"{error['message']} {error['cure']}".replace(",", "")
    assert rb.json("cluster", "list")["clusters"] == []


def test_a_pool_too_small_for_its_queues_names_the_number_that_would_do(rb: Shell) -> None:
    error = rb.json("cluster", "create", "99", "--queues", "4", "--buffers", "1024", status=1)["error"]
    assert error["code"] == "pool-too-small"
    enough = int(re.search(r"--buffers (\d+)", error["cure"])[1])
    assert rb.json("cluster", "create", "99", "--queues", "4", "--buffers", str(enough))["result"] == "changed"


def test_not_enough_huge_pages_says_how_many_and_the_command(rb: Shell) -> None:
    pages = Path("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages")
    if not pages.exists():
        pytest.skip("this kernel has no huge pages of 1G")
    free = int((pages.parent / "free_hugepages").read_text())
    total = int(pages.read_text())
    buffers = (free + 3) << 19  # of 2 KiB: three pages more than are free
    error = rb.json("cluster", "create", "99", "--pages", "1G", "--buffers", str(buffers), status=1)["error"]
    assert error["code"] == "no-huge-pages"
    assert "missing" in error["message"]
    assert str(pages) in error["cure"]
    wanted = int(error["cure"].split("echo ")[1].split()[0])
    assert wanted >= total + 3
    assert rb.json("cluster", "list")["clusters"] == []


def test_an_end_that_is_held_names_the_holder(rb: Shell) -> None:
    rb("cluster", "create", "99", "--buffers", "16384", "--queues", "1")
    holder = rb.start("count", "-i", "99@0")
    error = rb.json("count", "-i", "99@0", status=1)["error"]
    assert error["code"] == "busy"
    assert str(holder.pid) in error["message"]
    error = rb.json("queue", "destroy", "99@0", status=1)["error"]
    assert error["code"] == "busy"
    assert rb.json("status", "99@0", "--sample", "0")["clusters"][0]["queues"][0]["consumer"]["pid"] == holder.pid


@pytest.fixture
def powerless(rb: Shell, private_directories: Path) -> Powerless:
    """Runs ``ringbar`` where cluster 99, and with ``everything`` the registry too, is another user's: root without
    root's power, since whoever else it could be might not be able to read this package."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to give files to another user")
    rb("cluster", "create", "99", "--buffers", "16384")

    def run(*words: str, everything: bool = True) -> tuple[int, Any]:
        for path in (private_directories, *private_directories.rglob("*")):
            os.chown(path, 65534, 65534)
            path.chmod(path.stat().st_mode & ~0o077 | (0 if everything or path.is_file() else 0o055))
        done = subprocess.run(
            ["setpriv", "--inh-caps=-all", "--bounding-set=-all", sys.executable, "-m", "ringbar", *words, "--json"],
            env=rb.environment, cwd="/", capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done.returncode, json.loads(done.stdout)

    return run


@pytest.mark.parametrize("everything", [True, False], ids=["registry", "cluster"])
@pytest.mark.parametrize("words", ["cluster show 99", "cluster list", "status", "status 99", "count -i 99@0"])
def test_no_permission_says_what_to_join(powerless: Powerless, words: str, everything: bool) -> None:
    status, document = powerless(*words.split(), everything=everything)
    assert status == 1
    assert document["error"]["code"] == "no-permission"
    assert "usermod -aG ringbar" in document["error"]["cure"]


def test_doctor_does_not_take_another_users_cluster_for_a_leftover(rb: Shell, powerless: Powerless) -> None:
    for everything in (True, False):
        _, report = powerless("doctor", "--clean", everything=everything)
        (clusters,) = [f for f in report["findings"] if f["check"] in ("clusters", "leftovers")]
        assert clusters["state"] == "missing"
        assert "no permission" in clusters["detail"]
        assert "usermod -aG ringbar" in clusters["cure"]
    assert rb.json("cluster", "show", "99")["cluster"]["id"] == 99


# ---- VMs that are none


def test_vm_socket_that_is_not_there(rb: Shell, tmp_path: Path) -> None:
    rb("cluster", "create", "99", "--buffers", "16384", "--queues", "1")
    for command in ("attach", "detach"):
        fails(
            rb, command, f"qmp:{tmp_path}/none.qmp", "99@0",
            code="no-such-vm", says=f"no socket {tmp_path}/none.qmp", cure="-qmp unix:",
        )  # fmt: skip
    assert not list((Path(rb.environment["RINGBAR_RUN"]) / "attachments").glob("*.json"))


@contextlib.contextmanager
def speaker(path: Path, greeting: bytes) -> Iterator[None]:
    """Something that listens on ``path``, says ``greeting``, and is no QMP."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(path))
    server.listen()
    server.settimeout(0.2)
    over = threading.Event()
    clients: list[socket.socket] = []

    def serve() -> None:
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = server.accept()
                clients.append(client)
                client.sendall(greeting)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for client in [*clients, server]:
            client.close()


@pytest.mark.parametrize(
    ("greeting", "says"),
    [
        (b"RFB 003.008\n", "VNC"),
        (b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) ", "HMP"),
        (b"SSH-2.0-dropbear\r\n", "SSH"),
    ],
    ids=["vnc", "hmp", "ssh"],
)
def test_a_socket_that_is_not_qmp(rb: Shell, tmp_path: Path, greeting: bytes, says: str) -> None:
    rb("cluster", "create", "99", "--buffers", "16384", "--queues", "1")
    with speaker(tmp_path / "x", greeting):
        fails(rb, "attach", f"qmp:{tmp_path}/x", "99@0", code="not-qmp", says=says, cure="-qmp unix:")
    status = rb.json("status", "99", "--sample", "0")
    assert status["clusters"][0]["cluster"]["lanes"] == 0
    assert status["vms"] == []


@contextlib.contextmanager
def stopped_qemu(path: Path, *options: str) -> Iterator[str]:
    """A QEMU that was started paused: it has a monitor, and no guest ever runs."""
    binary = shutil.which("qemu-system-x86_64")
    if binary is None:
        pytest.skip("no qemu-system-x86_64")
    process = subprocess.Popen(
        [binary, "-S", "-accel", "tcg", "-m", "64M", "-nodefaults", "-display", "none", *options,
         "-qmp", f"unix:{path}/m,server=on,wait=off", "-pidfile", f"{path}/pid"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while not (path / "pid").exists() or not (path / "m").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
        yield f"qmp:{path}/m"
    finally:
        process.kill()
        process.communicate(timeout=30)


def nothing_is_left(rb: Shell) -> None:
    """A failed attach has been undone completely."""
    status = rb.json("status", "99", "--sample", "0")
    assert status["vms"] == []
    assert [s["vm"] for s in status["clusters"][0]["segments"] if s["vm"]] == []
    assert [(q["producer"], q["consumer"], q["lent"]) for q in status["clusters"][0]["queues"]] == [(None, None, 0)] * 2
    assert not list((Path(rb.environment["RINGBAR_RUN"]) / "attachments").glob("*.json"))


def test_a_guest_that_does_not_run_is_not_plugged_into(rb: Shell, tmp_path: Path) -> None:
    rb("cluster", "create", "99", "--buffers", "16384", "--queues", "2")
    with stopped_qemu(tmp_path, "-incoming", "defer") as vm:
        words = ("attach", vm, "99@0", "--tx", "99@1", "--timeout", "1")
        fails(rb, *words, code="guest-not-ready", says="arriving by migration", cure="wait until")
        nothing_is_left(rb)
        findings = rb.json("doctor", vm, status=rb.run("doctor", vm).returncode)["findings"]
        assert any("arriving by migration" in f["detail"] for f in findings)
        assert rb.json("detach", vm)["result"] == "unchanged"


def test_a_vm_without_a_free_port(rb: Shell, tmp_path: Path) -> None:
    rb("cluster", "create", "99", "--buffers", "16384", "--queues", "2")
    with stopped_qemu(tmp_path, "-M", "q35") as vm:
        fails(rb, "attach", vm, "99@0", code="no-free-slot", says="no free hot-plug", cure="pcie-root-port")
        nothing_is_left(rb)


def test_the_last_port_is_not_taken_unasked(rb: Shell, tmp_path: Path) -> None:
    rb("cluster", "create", "99", "--buffers", "16384", "--queues", "2")
    with stopped_qemu(tmp_path, "-M", "q35", "-device", "pcie-root-port,id=p0,chassis=1") as vm:
        fails(rb, "attach", vm, "99@0", code="last-slot", says="only one free", cure="--use-last-slot")
        nothing_is_left(rb)


def test_one_bad_queue_among_several_undoes_the_others(rb: Shell, tmp_path: Path) -> None:
    rb("cluster", "create", "99", "--buffers", "16384", "--queues", "2")
    holder = rb.start("count", "-i", "99@1")
    with stopped_qemu(tmp_path) as vm:
        error = rb.json("attach", vm, "99@0", "99@1", "--timeout", "1", status=1)["error"]
        assert error["code"] == "busy"
        assert str(holder.pid) in error["message"]
        assert str(holder.pid) in error["cure"]
        status = rb.json("status", "99", "--sample", "0")
        assert status["clusters"][0]["queues"][0]["consumer"] is None
        assert [s for s in status["clusters"][0]["segments"] if s["vm"]] == []


def test_detach_from_a_vm_that_is_off_changes_nothing(rb: Shell, tmp_path: Path) -> None:
    with stopped_qemu(tmp_path) as vm:
        pass
    assert rb.json("detach", vm)["result"] == "unchanged"


def test_libvirts_running_number_is_no_name(rb: Shell) -> None:
    rb("cluster", "create", "99", "--buffers", "16384", "--queues", "1")
    fails(rb, "attach", "7", "99@0", code="bad-address", says="running number", cure="virsh", status=2)


def test_attach_without_a_queue(rb: Shell, tmp_path: Path) -> None:
    fails(rb, "attach", f"qmp:{tmp_path}/x", code="no-queue", says="no queue is named", cure="ringbar attach")


# ---- interfaces


def test_interface_that_is_not_there(rb: Shell) -> None:
    fails(rb, "count", "-i", "zc:nonesuch0", code="no-such-interface", says="nonesuch0", cure="ip link")


@pytest.fixture
def veth() -> Iterator[str]:
    """A veth pair that is down, in this network name space."""
    name = f"rbe{os.getpid() % 100000}"
    try:
        made = subprocess.run(
            ["ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}p"], capture_output=True, timeout=30
        )
    except FileNotFoundError:
        pytest.skip("no ip command")
    if made.returncode != 0:
        pytest.skip(f"no veth here: {made.stderr.decode().strip()}")
    yield name
    subprocess.run(["ip", "link", "del", name], check=True, timeout=30)


def test_interface_that_is_down(rb: Shell, veth: str) -> None:
    fails(
        rb,
        "count",
        "-i",
        f"zc:{veth}",
        "--seconds",
        "5",
        code="down",
        says=f"{veth} is down",
        cure=f"ip link set dev {veth} up",
    )


def test_a_rule_that_is_empty_does_not_take_everything(rb: Shell, veth: str) -> None:
    for rule in ("", " "):
        words = ("count", "-i", f"zc:{veth}", "--steer", rule)
        fails(rb, *words, code="usage", says="--steer is empty", cure="--take-all", status=2)


def test_the_tools_own_cluster_goes_with_a_failed_open(rb: Shell) -> None:
    rb.run("count", "-i", "zc:nonesuch0")
    assert rb.json("cluster", "list")["clusters"] == []


# ---- files


def test_a_capture_that_cannot_be_written_takes_no_packets(rb: Shell, tmp_path: Path) -> None:
    rb("cluster", "create", "99", "--buffers", "16384", "--queues", "1")
    rb("send", "-o", "99@0", "--packets", "10")
    fails(
        rb, "capture", "-i", "99@0", "-w", str(tmp_path), "--seconds", "1",
        code="cannot-write", says="is a directory", cure="-w FILE",
    )  # fmt: skip
    assert rb.json("status", "99@0", "--sample", "0")["clusters"][0]["queues"][0]["waiting"] == 10
