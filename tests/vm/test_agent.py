# SPDX-License-Identifier: Apache-2.0
"""The agent and VMs' lives: what ends is taken home, what comes back has its queues, whoever was killed meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tinyguest import tiny_vm, why_not
from vmtools import Launch, Shell, attachments, is_plugged, kinds, state, until

from ringbar.errors import Error
from ringbar.host.agent.client import AgentHost

pytest.importorskip("fastapi")

pytestmark = [pytest.mark.vm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

def test_a_vm_gets_its_queues_whenever_it_runs(shell: Shell, launch: Launch, tmp_path: Path) -> None:
    link = tmp_path / "vm.qmp"  # the same address for each life of the VM
    name = f"qmp:{link}"
    shell.cluster(queues=2)
    agent = launch()
    shell("attach", name, "99@0", "--tx", "99@1", "--pool", "rw")
    assert state(shell) == "waiting"
    assert shell.json("attach", name, "99@0")["result"] == "unchanged"
    with tiny_vm() as vm:
        link.symlink_to(vm.qmp)
        is_plugged(shell)
        assert len(vm.wait_functions(2)) == 2
        assert [(b["queue"], b["direction"]) for b in attachments(shell)[0]["bindings"]] == [
            ("99@0", "rx"),
            ("99@1", "tx"),
        ]

        vm.sh("reboot -f &")  # the guest's kernel goes down and comes up: the same devices
        vm.wait_ready()
        assert len(vm.wait_functions(2)) == 2
        until(lambda: kinds(shell), lambda k: "vm-reset" in k, "no word of the reset")

        agent.send_signal(signal.SIGKILL)  # the agent dies; the VM ends and comes again while none is there
        agent.wait()
    link.unlink()
    with tiny_vm() as vm:
        link.symlink_to(vm.qmp)
        launch()
        is_plugged(shell)
        assert len(vm.wait_functions(2)) == 2
    link.unlink()
    until(lambda: state(shell), lambda s: s == "waiting", "the end of the VM was not seen")
    assert kinds(shell)[-1] == "vm-ended"
    shell.comes_home()
    shell("detach", name)
    assert attachments(shell) == []


def test_attaching_goes_on_while_the_agent_listens_to_the_monitor(shell: Shell, launch: Launch) -> None:
    shell.cluster(queues=3)
    launch()
    with tiny_vm() as vm:
        name = f"qmp:{vm.qmp}"
        for queue in ("99@0", "99@1", "99@2"):
            took = shell.json("attach", name, queue)["took"]
            assert took["own"] > 0 and took["waiting"] > 0
            assert took["total"] == pytest.approx(took["own"] + took["waiting"], abs=0.2)
        assert len(attachments(shell)[0]["bindings"]) == 3
        shell("detach", name, "99@1")
        shell("detach", name)
        assert vm.wait_functions(0) == {}
    assert kinds(shell) == ["attached"] * 3 + ["detached"] * 2


class Killer:
    """Stands between a monitor's client and QEMU, and ends the client before its Nth command gets through."""

    def __init__(self, path: Path, qemu: str) -> None:
        self.commands = 0
        self.kill_at = 0
        self.victim: subprocess.Popen[str] | None = None
        self._qemu = qemu
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, socket.socket(socket.AF_UNIX) as qemu:
                    qemu.connect(self._qemu)
                    back = threading.Thread(target=self._pump, args=(qemu, client, False), daemon=True)
                    back.start()
                    self._pump(client, qemu, True)
                    back.join()

    def _pump(self, one: socket.socket, other: socket.socket, counts: bool) -> None:
        """Data and descriptors from one to the other, until an end closes."""
        with contextlib.suppress(OSError):
            while True:
                data, files, _, _ = socket.recv_fds(one, 65536, 4)
                if not data:
                    break
                if counts:
                    self.commands += data.count(b'"execute"')
                    if self.victim is not None and self.commands >= self.kill_at:
                        self.victim.kill()
                        break
                socket.send_fds(other, [data], files)
                for file in files:
                    os.close(file)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("doing", ["attach", "detach"])
def test_an_agent_killed_anywhere_leaves_nothing_half_done(
    shell: Shell, launch: Launch, tmp_path: Path, doing: str
) -> None:
    shell.cluster(queues=1)
    with tiny_vm() as vm, contextlib.closing(Killer(tmp_path / "qmp", vm.second_qmp)) as killer:
        name = f"qmp:{tmp_path / 'qmp'}"
        for number in range(2, 80, int(os.environ.get("RINGBAR_TESTS_KILL_EVERY", "8"))):
            agent = launch()
            if doing == "detach":
                shell("attach", name, "99@0")
            killer.commands, killer.kill_at, killer.victim = 0, number, agent
            done = shell.run(doing, name, *(["99@0"] if doing == "attach" else []))
            killer.victim = None
            if done.returncode == 0:
                break  # it needs fewer commands than that
            agent.wait(10)
            assert "ended before it had answered" in done.stderr
            launch()
            shell("attach", name, "99@0")
            assert len(vm.wait_functions(2)) == 2
            shell("detach", name)
            assert vm.wait_functions(0) == {}
            shell.comes_home()
            stop(shell)
        else:
            pytest.fail("it never came to the end")
        assert number > 10, "hardly a command was seen"


def stop(shell: Shell) -> None:
    """End the agent that runs."""
    pid = int((shell.root / "run" / "agent.lock").read_text())
    os.kill(pid, signal.SIGTERM)
    until(lambda: (shell.root / "run" / "agent.sock").exists(), lambda there: not there, "the agent did not end")


def qmp(path: str, command: str, **arguments: Any) -> dict[str, Any]:
    """One command to QEMU behind the agent's back; its answer, which may be an error."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(path)
        with connection.makefile("rw") as lines:
            lines.readline()  # the greeting
            for name, values in (("qmp_capabilities", {}), (command, arguments)):
                lines.write(json.dumps({"execute": name, "arguments": values}) + "\n")
                lines.flush()
                said: dict[str, Any] = {}
                while not {"return", "error"} & set(said):
                    said = json.loads(lines.readline())
            return said


def test_a_vm_is_moved_with_its_queues_and_a_failure_leaves_it_as_it_was(shell: Shell, launch: Launch) -> None:
    shell.cluster(queues=2)
    launch()
    with tiny_vm() as here:
        name = f"qmp:{here.qmp}"
        shell("attach", name, "99@0", "--tx", "99@1", "--pool", "rw")
        here.wait_functions(2)
        by_hand = qmp(here.second_qmp, "migrate", uri="unix:/nowhere")
        assert "peer mode" in by_hand["error"]["desc"], by_hand
        refused = shell.run("migrate", name, f"qmp:{here.qmp}.nowhere")
        assert refused.returncode == 1
        assert "there is no socket" in refused.stderr
        assert len(here.wait_functions(2)) == 2
        with tiny_vm(ready=False, extra=["-incoming", "defer"]) as there:
            moved = shell.json("migrate", name, f"qmp:{there.qmp}")
            (attachment,) = moved["attachments"]
            assert attachment["vm"] == f"qmp:{there.qmp}"
            assert [b["queue"] for b in attachment["bindings"]] == ["99@0", "99@1"]
            assert len(there.wait_functions(2)) == 2
            assert [a["vm"] for a in attachments(shell)] == [f"qmp:{there.qmp}"]
            shell("detach", f"qmp:{there.qmp}")
    shell.comes_home()


@contextlib.contextmanager
def sleepers(directory: Path, count: int) -> Iterator[list[str]]:
    """QEMUs that were started with -S and next to no memory: their monitors."""
    started = []
    try:
        for number in range(count):
            path = directory / f"vm{number}.qmp"
            words = "-M pc -accel tcg -m 8 -S -nodefaults -no-user-config -display none "
            words += f"-qmp unix:{path},server=on,wait=off"
            started.append((subprocess.Popen(["qemu-system-x86_64", *words.split()], stderr=subprocess.DEVNULL), path))
        for _, path in started:
            until(path.exists, bool, "QEMU did not start")
        yield [f"qmp:{path}" for _, path in started]
    finally:
        for process, _ in started:
            process.kill()
        for process, _ in started:
            process.wait()


def open_files(process: subprocess.Popen[str]) -> list[str]:
    found = []
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(entry))
    return sorted(found)


def test_a_vm_that_does_not_boot_keeps_nobody_from_the_others(shell: Shell, launch: Launch, tmp_path: Path) -> None:
    shell.cluster(queues=3)
    launch()
    with tiny_vm(ready=False, firmware_only=True) as stuck, sleepers(tmp_path, 1) as (other,):
        patient = subprocess.Popen(**shell.command("attach", f"qmp:{stuck.qmp}", "99@0"), stderr=subprocess.PIPE)
        shell.started.append(patient)
        until(lambda: shell.json("status", "99", "--sample", "0")["vms"], bool, "the first attach has not begun")
        assert shell.json("attach", other, "99@1")["result"] == "changed"
        assert shell.json("detach", other, "--force", "--timeout", "0.1")["result"] == "changed"
        refused = shell.json("cluster", "destroy", "99", status=1)["error"]
        assert refused["code"] == "busy" and "is attached to" in refused["message"]
        assert patient.poll() is None, "it did not wait for the guest"
        patient.kill()
        patient.wait()

        # A shorter patience: it is remembered, tried again and again, and can be called off.
        said = shell.json("attach", f"qmp:{stuck.second_qmp}", "99@2", "--timeout", "1", status=4)["error"]
        assert said["code"] == "not-finished" and "calls it off" in said["cure"]
        until(lambda: kinds(shell), lambda k: "vm-waits" in k, "it was not tried again")
        assert shell.json("detach", f"qmp:{stuck.second_qmp}")["result"] == "changed"
        assert kinds(shell).count("vm-waits") == 1


def test_a_vm_that_boots_does_not_hold_up_the_agents_start(shell: Shell, launch: Launch, tmp_path: Path) -> None:
    with tiny_vm(ready=False, firmware_only=True) as booting, sleepers(tmp_path, 1) as (other,):
        vms = f"vms:\n  qmp:{booting.qmp}: {{rx: [7@0]}}\n  {other}: {{rx: [7@1]}}\n"
        (tmp_path / "topologies.d").mkdir()
        (tmp_path / "topologies.d" / "a.yaml").write_text(
            f"ringbar: 1\nname: a\nclusters:\n  7:\n    queues:\n      0-1: {{slots: 64}}\n{vms}"
        )
        launch(RINGBAR_TOPOLOGIES=str(tmp_path / "topologies.d"))
        states = {a["vm"]: a["state"] for a in attachments(shell)}
        assert states[other] == "plugged"
        assert states[f"qmp:{booting.qmp}"] in ("waiting", "plugging")
        assert "applied" in kinds(shell) and "apply-failed" not in kinds(shell)
        shell("detach", other, "--force", "--timeout", "0.1")
        shell("detach", f"qmp:{booting.qmp}")


def test_many_vms_and_two_operators_at_once(shell: Shell, launch: Launch, tmp_path: Path) -> None:
    count = 30
    shell.cluster(99, 0, "--buffers", "65536")
    shell("queue", "create", "99", "--count", str(count), "--slots", "256")
    agent = launch()
    host = AgentHost(shell.root / "run" / "agent.sock")
    (tmp_path / "first").mkdir()
    with sleepers(tmp_path / "first", 1) as (first_vm,):  # what the agent keeps open from now on, it keeps once
        host.attach(first_vm, ["99@0"], [])
    until(lambda: state(shell), lambda s: s == "waiting", "the end of the VM was not seen")
    host.detach(first_vm, [])
    before = open_files(agent)
    with sleepers(tmp_path, count) as names:
        failed: list[BaseException] = []

        def operate(mine: list[int]) -> None:
            try:
                for number in mine:
                    assert host.attach(names[number], [f"99@{number}"], []).changed
            except BaseException as e:
                failed.append(e)

        operators = [threading.Thread(target=operate, args=(list(range(first, count, 2)),)) for first in (0, 1)]
        for operator in operators:
            operator.start()
        for operator in operators:
            operator.join()
        assert failed == []
        now = attachments(shell)
        assert [a["state"] for a in now] == ["plugged"] * count
        assert sorted(b["queue"] for a in now for b in a["bindings"]) == sorted(f"99@{n}" for n in range(count))
    until(lambda: {a["state"] for a in attachments(shell)}, lambda s: s == {"waiting"}, "not all ends were seen", 60)
    for name in names:
        host.detach(name, [])
    assert attachments(shell) == []
    shell.comes_home()
    until(lambda: open_files(agent), lambda now: len(now) <= len(before) + 4, f"{before} were open, and these are", 90)


def test_a_hundred_cycles_leak_nothing(shell: Shell, launch: Launch) -> None:
    shell.cluster(queues=1)
    agent = launch()
    host = AgentHost(shell.root / "run" / "agent.sock")
    with tiny_vm() as vm:
        places = set()
        files: list[list[str]] = []
        maps: list[int] = []
        for cycle in range(100):
            try:
                (attachment,) = host.attach(f"qmp:{vm.qmp}", ["99@0"], []).attachments
                host.detach(f"qmp:{vm.qmp}", [])
            except Error as e:
                pytest.fail(f"cycle {cycle}: {e}; QEMU: {vm.process.poll()}, {vm.log.read_text()[-500:]}")
            places.add(attachment.where)
            if cycle in (9, 99):
                until(lambda: len(os.listdir(shell.root / "shm")), lambda n: n <= 4, "memory leaks")
                files.append(open_files(agent))
                maps.append(len(Path(f"/proc/{vm.process.pid}/maps").read_text().splitlines()))
        assert len(places) == 1, "PCI addresses leak"
        assert len(files[1]) <= len(files[0]) + 2, files
        assert maps[1] <= maps[0] + 8
        assert vm.wait_functions(0) == {}
    shell.comes_home()
