# SPDX-License-Identifier: Apache-2.0
"""What a QMP socket can be instead of a VM that answers: each is one error with a code and a cure."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, Callable

import pytest

from ringbar.errors import BadAddress, Busy, Error, Incompatible, NotFound
from ringbar.qemu.hotplug import Function, Vm
from ringbar.qemu.monitor import process_start
from ringbar.qemu.qmp import parse_address

VERSION = {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}
GREETING = json.dumps({"QMP": {"version": VERSION, "capabilities": []}}).encode() + b"\r\n"


@pytest.fixture
def path() -> Iterator[str]:
    """A place for a socket, short enough for any checkout."""
    with tempfile.TemporaryDirectory(prefix="rb-") as directory:
        yield f"{directory}/qmp.sock"


@contextlib.contextmanager
def serving(path: str, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """A server thread that gives one client to ``serve``."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)

    def run() -> None:
        with contextlib.suppress(OSError):
            client, _ = listener.accept()
            with client:
                serve(client)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        listener.close()
        assert not thread.is_alive()


def until_closed(client: socket.socket) -> None:
    """Reads until the other side has gone."""
    while client.recv(4096):
        pass


def saying(text: bytes) -> Callable[[socket.socket], None]:
    def serve(client: socket.socket) -> None:
        client.sendall(text)
        until_closed(client)
    return serve


def fake_qemu(answers: dict[str, Any]) -> Callable[[socket.socket], None]:
    """A QMP server with fixed answers; an Exception closes the connection; unknown commands are refused."""
    def serve(client: socket.socket) -> None:
        client.sendall(GREETING)
        pending = ""
        while chunk := client.recv(65536):
            pending += chunk.decode()
            try:                            # requests come one at a time, without a line's end
                request = json.loads(pending)
            except ValueError:
                continue
            pending = ""
            answer = answers.get(request["execute"])
            if isinstance(answer, Exception):
                return
            reply: dict[str, Any] = {"id": request["id"]} if "id" in request else {}
            if request["execute"] == "qmp_capabilities":
                reply["return"] = {}
            elif answer is None:
                reply["error"] = {"class": "CommandNotFound", "desc": "no such command"}
            else:
                reply["return"] = answer
            client.sendall(json.dumps(reply).encode() + b"\r\n")
    return serve


def refused(address: str, timeout: float = 5.0) -> Error:
    """The error of a connection that must fail."""
    with pytest.raises(Error) as caught:
        Vm.connect(address, timeout=timeout)
    assert caught.value.cure
    return caught.value


@pytest.mark.parametrize("address", ["web1", "", "qmp:", "qmp:relative/path", "tcp:1:2", "/a\0b", "/" + "x" * 108])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(BadAddress) as caught:
        parse_address(address)
    assert caught.value.cure


def test_both_forms_of_an_address() -> None:
    assert parse_address("qmp:/run/vm.qmp") == parse_address("/run/vm.qmp") == "/run/vm.qmp"


def test_socket_absent(path: str) -> None:
    error = refused("qmp:" + path)
    assert isinstance(error, NotFound) and error.code == "no-such-vm" and path in error.message


def test_vm_shut_down(path: str) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as left_over:
        left_over.bind(path)
    error = refused(path)
    assert isinstance(error, NotFound) and error.code == "vm-off" and "shut down" in error.message


def test_a_file_that_is_no_socket(path: str) -> None:
    pathlib.Path(path).touch()
    assert refused(path).code == "not-qmp"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without permission")
def test_no_permission(path: str) -> None:
    with serving(path, until_closed):
        os.chmod(path, 0o600)
        os.chmod(os.path.dirname(path), 0o755)
        os.seteuid(65534)
        try:
            error = refused(path)
        finally:
            os.seteuid(0)
    assert error.code == "no-permission" and "root" in str(error.cure)


@pytest.mark.parametrize(("text", "what"), [
    (b"RFB 003.008\n", "VNC"),
    (b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) ", "human monitor"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH"),
    (b"hello\n", "hello"),
    (b'{"not": "a greeting"}\n', "not"),
    (b"[1, 2]\n", ""),
    (b"\xff\xfe\n", ""),
])
def test_something_else_answers(path: str, text: bytes, what: str) -> None:
    with serving(path, saying(text)):
        error = refused(path)
    assert error.code == "not-qmp" and what in error.message


def test_something_that_hangs_up(path: str) -> None:
    with serving(path, lambda client: None):
        assert refused(path).code == "not-qmp"


def test_something_silent(path: str) -> None:
    with serving(path, until_closed):
        error = refused(path, timeout=0.3)
    assert error.code == "monitor-busy" and "greeting" in error.message


def test_queue_of_waiting_clients_is_full(path: str) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX)))
        listener.bind(path)
        listener.listen(0)
        waiting = stack.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX)))
        waiting.connect(path)
        error = refused(path, timeout=0.3)
    assert isinstance(error, Busy) and error.code == "monitor-busy"


def test_qemu_without_ivshmem(path: str, tmp_path: pathlib.Path) -> None:
    lane = tmp_path / "lane"
    lane.write_bytes(bytes(4096))
    with serving(path, fake_qemu({"qom-list-types": [], "qom-list": [], "query-fdsets": []})), Vm.connect(path) as vm:
        with pytest.raises(Incompatible) as caught:
            vm.plug("ringbar-99", [Function("lane0", 4096, path=str(lane))])
    assert caught.value.code == "no-ivshmem"


def test_connection_that_breaks_while_the_process_lives(path: str) -> None:
    with serving(path, fake_qemu({"query-version": ConnectionError()})), Vm.connect(path) as vm:
        with pytest.raises(Error) as caught:
            vm.info()
    assert caught.value.code == "monitor-lost"      # this process serves, and it is alive


def test_start_time_of_a_process() -> None:
    assert process_start(os.getpid()) is not None
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_start(child.pid) is None         # a zombie runs no VM
    child.wait()
    assert process_start(child.pid) is None


needs_qemu = pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed")


@pytest.fixture
def qemu(path: str) -> Iterator[str]:
    """A QEMU without a machine: its QMP socket; beside it ``hmp.sock`` and ``vnc.sock``."""
    base = os.path.dirname(path)
    with open(f"{base}/log", "wb") as log:
        process = subprocess.Popen([
            "qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none",
            "-qmp", f"unix:{path},server=on,wait=off", "-monitor", f"unix:{base}/hmp.sock,server=on,wait=off",
            "-vnc", f"unix:{base}/vnc.sock", "-daemonize", "-pidfile", f"{base}/pid",
        ], stdout=log, stderr=log)
    assert process.wait(30) == 0, pathlib.Path(f"{base}/log").read_text()
    pid = int(pathlib.Path(f"{base}/pid").read_text())
    pidfd = os.pidfd_open(pid)
    try:
        yield path
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
        import select
        select.select([pidfd], [], [], 10)
        os.close(pidfd)


@needs_qemu
def test_the_other_sockets_of_a_real_qemu(qemu: str) -> None:
    base = os.path.dirname(qemu)
    files = sorted(os.listdir("/proc/self/fd"))
    error = refused(f"{base}/hmp.sock")
    assert error.code == "not-qmp" and "human monitor" in error.message
    error = refused(f"{base}/vnc.sock")
    assert error.code == "not-qmp" and "VNC" in error.message
    assert sorted(os.listdir("/proc/self/fd")) == files     # nothing of a failed connection stays open


@needs_qemu
def test_another_client_holds_the_monitor_of_a_real_qemu(qemu: str) -> None:
    with Vm.connect(qemu):
        error = refused(qemu, timeout=0.5)
    assert isinstance(error, Busy) and error.code == "monitor-busy"
    if shutil.which("ss") is not None:
        assert error.holder is not None and f"(pid {os.getpid()})" in error.holder
    Vm.connect(qemu).close()                        # free again


@needs_qemu
def test_machine_without_pci_hotplug(qemu: str, tmp_path: pathlib.Path) -> None:
    lane = tmp_path / "lane"
    lane.write_bytes(bytes(4096))
    with Vm.connect(qemu) as vm:
        with pytest.raises(Error) as caught:
            vm.plug("ringbar-99", [Function("lane0", 4096, path=str(lane))])
        assert vm.plugged() == []
    assert caught.value.code == "no-hotplug"
