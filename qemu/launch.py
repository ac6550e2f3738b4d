# SPDX-License-Identifier: Apache-2.0
"""Starts throw-away VMs from the images of :mod:`ringbar.qemu.image`, for tests, the demo and measurements.

::

    with Guest.start("one") as one, Guest.start("two", machine="q35") as two:   # both boot at the same time
        one.wait_up()
        two.wait_up()
        print(one.ssh("uname -r").stdout)

A VM has nothing that outlives it: no daemon, no file outside its private directory, and QEMU is killed by the kernel
when the process that started it dies. Its network is QEMU's user mode, closed to the outside (``restrict=on``), with
one port of 127.0.0.1 forwarded to its SSH server.

Room for memory that is plugged in later (tried with QEMU 7.2, SeaBIOS 1.16, Linux 6.1; see ``tests/vm``):

- ``pc``: SeaBIOS leaves a window of ``pci-hole64-size`` above the memory for 64-bit BARs, 2 GiB by default. It is
  raised to 64 GiB here, so BARs of 1 GiB and more that are plugged while the VM runs get their place at once.
- ``q35``: the window is 32 GiB, but a hot-plugged device sits behind a root port, and a root port's own window is
  2 MiB unless it was started with ``pref64-reserve`` (the parameter ``pref64_reserve``). A larger BAR stays
  unassigned until the guest gives the port a new window (:mod:`ringbar.guest.rescue`).
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import IO, Any

from ringbar.errors import Error
from ringbar.qemu import image as images

QEMU = "qemu-system-x86_64"

#: Kernel parameters that save boot time; none changes what a test sees of PCI or of memory types. KASLR stays on:
#: without it every reboot unpacks the kernel over its own translated code, which costs TCG 4 seconds.
KERNEL_PARAMETERS = (
    "console=ttyS0 quiet loglevel=4 mitigations=off audit=0 no_timer_check random.trust_cpu=on net.ifnames=0 panic=-1"
)


def accelerator() -> str:
    """``"kvm"`` where it really works, else ``"tcg"``.

    /dev/kvm alone is not enough: under some nested hypervisors it opens, yet no stock kernel boots. KVM counts only
    where the processor also shows ``svm`` or ``vmx``.
    """
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text()
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return "tcg"
    return "kvm" if re.search(r"^flags\s*:.*\b(svm|vmx)\b", flags, re.MULTILINE) else "tcg"


class Guest:
    """One running VM. Make it with :meth:`start`; use it in ``with``, which ends the VM and frees everything."""

    def __init__(self, name: str, image: images.Image, directory: pathlib.Path) -> None:
        """Not for callers: :meth:`start` fills in the rest."""
        self.name = name
        self.image = image
        self.directory = directory
        self._lock = _hold(directory)
        #: The QMP socket, for the one client that plugs devices.
        self.qmp = directory / "qmp"
        #: The serial console of all boots so far.
        self.console = directory / "console.log"
        #: An ssh_config(5) file in which this VM has its name, and 127.0.0.1.
        self.ssh_config = directory / "ssh_config"
        #: The port of 127.0.0.1 that leads to the VM's SSH server.
        self.port = 0
        self.accelerator = accelerator()
        #: Seconds from start to the first time that the SSH server listened; None before.
        self.boot_seconds: float | None = None
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False
        self._boots = 0
        self._master_for = 0
        self._control: socket.socket | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def start(
        cls,
        name: str,
        *,
        machine: str = "pc",
        memory: str = "512M",
        image: images.Image | None = None,
        share: Mapping[str, str | os.PathLike[str]] | None = None,
        extra: Sequence[str] = (),
        append: str = "",
        root_ports: int = 4,
        pref64_reserve: str | None = None,
        numpy: bool = False,
    ) -> Guest:
        """Start a VM and return while it boots; :meth:`wait_up` waits for it.

        :param name: the VM's name, also its host name: letters, digits and ``-``.
        :param machine: ``"pc"``, ``"q35"`` or a version of these.
        :param memory: as QEMU takes it, for example ``"512M"``.
        :param image: the image; None for the default one, built now if it is not in the cache.
        :param share: guest path to host file or directory, in place before the SSH server starts, again after each
            reboot. Symbolic links are followed.
        :param extra: more arguments for QEMU.
        :param append: more kernel parameters.
        :param root_ports: ``q35`` only: empty ports ``rp0``, ``rp1``, ... to plug devices into.
        :param pref64_reserve: ``q35`` only: the window for 64-bit BARs of each port, for example ``"1G"``.
        :param numpy: for the default image: with numpy.
        :raises Error: QEMU is missing or did not start; the message has what it said.
        """
        if not re.fullmatch(r"[A-Za-z0-9-]{1,32}", name):
            raise Error(f"{name!r} is no VM name", code="bad-name", cure="use 1 to 32 letters, digits and -")
        if shutil.which(QEMU) is None:
            raise Error(f"{QEMU} is not installed", code="missing-tool", cure="apt-get install qemu-system-x86")
        image = image or images.ensure(numpy=numpy)
        _sweep()
        directory = pathlib.Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-{name}-"))
        guest = cls(name, image, directory)
        try:
            command = guest._command(machine, memory, append, root_ports, pref64_reserve)
            if share:
                packed = directory / "share.tar"
                with open(packed, "wb") as file:
                    _pack(share, file)
                command += ["-drive", f"if=none,id=share,format=raw,readonly=on,file={packed}"]
                command += ["-device", f"virtio-blk-pci,drive=share{_root_bus(machine, 4)}"]
            guest._launch([*command, *extra])
            guest._write_ssh_config()
        except BaseException:
            guest.stop()
            raise
        return guest

    def _command(
        self, machine: str, memory: str, append: str, root_ports: int, pref64_reserve: str | None
    ) -> list[str]:
        kvm = self.accelerator == "kvm"
        q35 = machine.startswith(("q35", "pc-q35"))
        host_bridge = "q35-pcihost" if q35 else "i440FX-pcihost"
        # maxcpus=2: with one possible processor TCG's guest atomics are not atomic to other processes.
        command = [
            QEMU, "-name", self.name, "-M", machine, "-m", memory, "-smp", "1,maxcpus=2",
            "-accel", "kvm" if kvm else "tcg,thread=multi", "-cpu", "host" if kvm else "max",
            "-global", f"{host_bridge}.pci-hole64-size=64G",
            "-nodefaults", "-no-user-config", "-display", "none",
            "-kernel", os.fspath(self.image.kernel), "-initrd", os.fspath(self.image.initrd),
            "-append", f"{KERNEL_PARAMETERS} ringbar.name={self.name} {append}".strip(),
            "-drive", f"if=none,id=root,format=raw,snapshot=on,file={self.image.disk}",
            "-device", f"virtio-blk-pci,drive=root{_root_bus(machine, 2)}",
            "-netdev", "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-:22",
            "-device", f"virtio-net-pci,netdev=net,romfile={_root_bus(machine, 3)}",
            "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
            "-qmp", f"unix:{self.qmp},server=on,wait=off",
        ]  # fmt: skip
        if q35:
            reserve = f",pref64-reserve={pref64_reserve}" if pref64_reserve else ""
            for port in range(root_ports):
                slot, function = 0x10 + port // 8, port % 8
                more = ",multifunction=on" if function == 0 and root_ports - port > 1 else ""
                command += [
                    "-device",
                    f"pcie-root-port,id=rp{port},chassis={port + 1},addr={slot:#x}.{function}{more}{reserve}",
                ]
        return command

    def _launch(self, command: list[str]) -> None:
        ours, theirs = socket.socketpair()
        self._control = ours
        self._monitor_lines = ours.makefile("r", encoding="utf-8")
        started = threading.Event()
        command += ["-chardev", f"socket,id=control,fd={theirs.fileno()}", "-mon", "chardev=control,mode=control"]
        # The thread that starts QEMU must live as long as QEMU: the death signal comes when that *thread* ends.
        self._thread = threading.Thread(
            target=self._serve, args=(command, theirs, started), name=f"console of {self.name}", daemon=True
        )
        self._thread.start()
        started.wait()
        theirs.close()
        try:
            ours.settimeout(30)
            self._read_monitor()
            self._execute("qmp_capabilities")
            table = self._execute("human-monitor-command", {"command-line": "info usernet"})
        except (OSError, ValueError) as error:
            said = (self.directory / "qemu.log").read_text(errors="replace").strip()
            raise Error(f"QEMU did not start: {said or error}", code="qemu-failed") from None
        found = re.search(r"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", str(table))
        if found is None:
            raise Error(f"QEMU forwards no port: {table}", code="qemu-failed")
        self.port = int(found[1])

    def _serve(self, command: list[str], theirs: socket.socket, started: threading.Event) -> None:
        """Run QEMU and read its console until it ends; counts the boots."""
        begin = time.monotonic()
        try:
            with open(self.directory / "qemu.log", "wb") as log:
                process = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", "--", *command],
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            (self.directory / "qemu.log").write_text(str(error))
            self._ended = True
            return
        finally:
            if "process" in locals():
                self._process = process
            started.set()
        assert process.stdout is not None
        with process.stdout, open(self.console, "wb", buffering=0) as console:
            for line in process.stdout:
                console.write(line)
                if images.UP_MARK in line:
                    with self._changed:
                        self._boots += 1
                        if self.boot_seconds is None:
                            self.boot_seconds = time.monotonic() - begin
                        self._changed.notify_all()
        process.wait()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    # ---- the launcher's own monitor, so that the QMP socket stays free -------------------------------------------

    def _read_monitor(self) -> dict[str, Any]:
        line = self._monitor_lines.readline()
        if not line:
            raise OSError("it closed its monitor")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        assert self._control is not None
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        self._control.sendall(json.dumps(message).encode() + b"\n")
        while True:
            answer = self._read_monitor()
            if "error" in answer:
                raise Error(f"QEMU refused {command}: {answer['error'].get('desc')}", code="qemu-failed")
            if "return" in answer:
                return answer["return"]

    # ---- state ---------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether QEMU lives."""
        return self._process is not None and self._process.poll() is None

    def wait_up(self, timeout: float = 60.0) -> None:
        """Wait until the VM's SSH server listens and has let us in.

        :param timeout: seconds.
        :raises Error: QEMU ended meanwhile, or the time is over; the message has the console's last lines.
        """
        self._wait_boot(1, timeout)
        if self._master_for == self._boots:
            return
        boots = self._boots
        socket_path = self.directory / "ssh"
        with contextlib.suppress(FileNotFoundError):
            socket_path.unlink()
        with open(self.directory / "ssh.log", "wb") as log:
            done = subprocess.run(
                ["ssh", "-F", os.fspath(self.ssh_config), "-M", "-N", "-f", self.name],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, timeout=timeout,
            )  # fmt: skip
        if done.returncode != 0:
            said = (self.directory / "ssh.log").read_text(errors="replace").strip()
            raise Error(f"VM {self.name} runs but SSH failed: {said}", code="guest-unreachable")
        self._master_for = boots

    def _wait_boot(self, boots: int, timeout: float) -> None:
        with self._changed:
            if self._changed.wait_for(lambda: self._boots >= boots or self._ended, timeout) and not self._ended:
                return
        what = "ended" if self._ended else f"was not up after {timeout:g} s"
        raise Error(f"VM {self.name} {what}; {self._last_words()}", code="guest-not-up")

    def _last_words(self) -> str:
        lines: collections.deque[str] = collections.deque(maxlen=5)
        for path in (self.console, self.directory / "qemu.log"):
            with contextlib.suppress(OSError):
                lines.extend(line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip())
        return "last lines: " + " | ".join(lines) if lines else "it said nothing"

    # ---- commands in the guest -----------------------------------------------------------------------------------

    def _write_ssh_config(self) -> None:
        known = self.directory / "known_hosts"
        known.write_text(f"[127.0.0.1]:{self.port} {self.image.host_key}\n")
        self.ssh_config.write_text(
            f"Host {self.name} 127.0.0.1\n"
            f"  HostName 127.0.0.1\n  Port {self.port}\n  User root\n"
            f"  IdentityFile {self.image.key}\n  IdentitiesOnly yes\n  PasswordAuthentication no\n  BatchMode yes\n"
            f"  UserKnownHostsFile {known}\n  StrictHostKeyChecking yes\n  UpdateHostKeys no\n  LogLevel ERROR\n"
            f"  ConnectTimeout 20\n  ServerAliveInterval 15\n  ControlPath {self.directory / 'ssh'}\n"
        )

    @property
    def testinfra(self) -> str:
        """The address for ``testinfra.get_host``; uses the connection that :meth:`wait_up` has opened."""
        return f"ssh://root@127.0.0.1:{self.port}?controlpersist=0&ssh_config={self.ssh_config}"

    def _ssh_command(self, command: str | Sequence[str], *options: str) -> list[str]:
        self.wait_up()
        line = command if isinstance(command, str) else shlex.join(command)
        return ["ssh", "-F", os.fspath(self.ssh_config), *options, self.name, line]

    def ssh(
        self, command: str | Sequence[str], timeout: float = 60.0, *, check: bool = True, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root in the guest and wait for it; boots the VM's connection when it is not up yet.

        :param command: a shell line, or a list of words.
        :param timeout: seconds; then :class:`subprocess.TimeoutExpired`.
        :param check: raise :class:`Error` with what it said when it fails.
        :param stdin: its standard input.
        """
        done = subprocess.run(
            self._ssh_command(command),
            input=stdin,
            capture_output=True, text=True, errors="replace", timeout=timeout,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise Error(
                f"in VM {self.name}, {command!r} failed with {done.returncode}: {(done.stderr or done.stdout).strip()}",
                code="guest-command-failed",
            )
        return done

    def popen(self, command: str | Sequence[str], *, tty: bool = False, **kwargs: Any) -> subprocess.Popen[Any]:
        """Start a long-running command in the guest; ``kwargs`` go to :class:`subprocess.Popen`.

        :param tty: give it a terminal, so that it ends (SIGHUP) when the returned process is killed.
        """
        kwargs.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen(self._ssh_command(command, *(("-tt",) if tty else ())), **kwargs)

    def copy(self, files: Mapping[str, str | os.PathLike[str]], timeout: float = 60.0) -> None:
        """Copy host files and directories into the guest: guest path to host path. Until the VM ends."""
        packed = io.BytesIO()
        _pack(files, packed)
        done = subprocess.run(
            self._ssh_command("tar -x -f - -C /"), input=packed.getvalue(), capture_output=True, timeout=timeout
        )
        if done.returncode != 0:
            raise Error(f"copying into VM {self.name} failed: {done.stderr.decode(errors='replace').strip()}")

    # ---- ends ----------------------------------------------------------------------------------------------------

    def reboot(self, *, hard: bool = False, crash: bool = False, timeout: float = 60.0) -> None:
        """Reboot and wait until it is up again.

        :param hard: press the reset button instead of asking the guest; once more when nothing came of it. Under TCG
            one reset of some hundred has left a guest before its kernel's first line; standard error says where.
        :param crash: its kernel panics, and by ``panic=-1`` starts anew.
        """
        self.wait_up(timeout)
        boots = self._boots
        if hard:
            self._execute("system_reset")
            try:
                self._wait_boot(boots + 1, timeout)
            except Error as error:
                if not self.running:
                    raise
                where = self._execute("human-monitor-command", {"command-line": "info registers"})
                print(f"{error}; the reset button is pressed again. Its processor was at:\n{where}", file=sys.stderr)
                self._execute("system_reset")
                self._wait_boot(boots + 1, timeout)
        else:
            line = "echo c > /proc/sysrq-trigger" if crash else "reboot"
            with self.popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as command:
                try:
                    self._wait_boot(boots + 1, timeout)
                finally:
                    command.kill()  # its connection ended with the kernel that it was to
        self.wait_up(timeout)

    def kill(self) -> None:
        """End QEMU as a crash would (SIGKILL) and wait for its end; the directory stays until :meth:`stop`."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        if self._thread is not None:
            self._thread.join(30)

    def stop(self) -> None:
        """End the VM and free everything: process, sockets, directory. Again is allowed."""
        self.kill()
        if self._control is not None:
            self._monitor_lines.close()
            self._control.close()
        if (self.directory / "ssh").exists():  # its master ends by itself with the connection; this makes it sure
            subprocess.run(
                ["ssh", "-F", os.fspath(self.ssh_config), "-O", "exit", self.name],
                stdin=subprocess.DEVNULL, capture_output=True, timeout=30,
            )  # fmt: skip
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


_PREFIX = "ringbar-guest-"


def _root_bus(machine: str, slot: int) -> str:
    """Fixed low slots on the root bus keep everything above free for plugging."""
    bus = "pcie.0" if machine.startswith(("q35", "pc-q35")) else "pci.0"
    return f",bus={bus},addr={slot:#x}"


def _hold(directory: pathlib.Path) -> int | None:
    """A descriptor with a lock on a directory, which whoever lives has on its own; None: somebody has it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _sweep() -> None:
    """Remove directories left by processes that were killed: they have no lock, and a process id that is not to be
    seen, which alone may be one in another pid name space."""
    for path in pathlib.Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = path.name[len(_PREFIX) :].partition("-")[0]
        with contextlib.suppress(OSError):  # it went meanwhile
            if pid.isdigit() and not pathlib.Path("/proc", pid).exists() and (lock := _hold(path)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _pack(files: Mapping[str, str | os.PathLike[str]], out: IO[bytes]) -> None:
    """A tar of host files at guest paths, owned by root; symbolic links followed, Python's caches left out."""

    def keep(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if "__pycache__" in info.name:
            return None
        info.uid = info.gid = 0
        info.uname = info.gname = "root"
        return info

    with tarfile.open(fileobj=out, mode="w", dereference=True) as tar:
        for inside, outside in files.items():
            if not os.path.exists(outside):
                raise Error(f"{os.fspath(outside)} does not exist", code="not-found")
            tar.add(outside, arcname=inside.lstrip("/"), filter=keep)


@contextlib.contextmanager
def pair(**kwargs: Any) -> Iterator[tuple[Guest, Guest]]:
    """Two guests ``vm1`` and ``vm2`` of the same kind, booted at the same time, both up."""
    with Guest.start("vm1", **kwargs) as one, Guest.start("vm2", **kwargs) as two:
        one.wait_up()
        two.wait_up()
        yield one, two
