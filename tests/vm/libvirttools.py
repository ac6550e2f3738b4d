# SPDX-License-Identifier: Apache-2.0
"""libvirt for tests: its daemons where none run, and domains of the two guests that the other VM tests use.

QEMU runs as libvirt-qemu here, as on a real host: what a domain opens by path lies where that user can read it.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from typing import Any

import tinyguest
from vmtools import until

from ringbar.qemu import image as images
from ringbar.qemu.launch import KERNEL_PARAMETERS, Guest, accelerator
from ringbar.qemu.monitor import process_start

URI = "qemu:///system"
NEEDED = ("virsh", "libvirtd", "virtlogd", "qemu-img")


def why_not() -> str | None:
    """The reason why no domain can run here, or None."""
    if os.geteuid() != 0:
        return "libvirt's system VMs need root"
    for tool in NEEDED:
        if shutil.which(tool) is None:
            return f"{tool} is not installed (apt-get install libvirt-daemon-system libvirt-clients)"
    return tinyguest.why_not()


def virsh(*words: str, status: int | None = 0, timeout: float = 60) -> str:
    """What a virsh command prints, both streams; the exit status must be ``status``."""
    done = subprocess.run(
        ["virsh", "-c", URI, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    assert status in (None, done.returncode), f"virsh {words}: {done.returncode}\n{done.stdout}"
    return done.stdout.strip()


#: Starts what it is told, and waits for whatever ends below it: libvirt's QEMUs are orphans, and where the first
#: process of a container does not wait for these, libvirt takes a QEMU that has ended for one that still runs.
KEEPER = """
import ctypes, os, signal, subprocess, sys, threading
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
def reap():
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            threading.Event().wait(0.02)
threading.Thread(target=reap, daemon=True).start()
for line in sys.stdin:
    print(subprocess.Popen(line.split(), stdin=subprocess.DEVNULL, stdout=sys.stderr).pid, flush=True)
"""


class Daemons:
    """libvirtd and virtlogd: those that run already, else two of our own, which end with the tests."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile()
        self._keeper: subprocess.Popen[str] | None = None
        self._own: dict[str, int] = {}
        try:
            if not self._answers():
                self._keeper = subprocess.Popen(
                    [sys.executable, "-c", KEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
                    text=True, start_new_session=True,      # Ctrl-C in the terminal is not for them
                )
                self._start("virtlogd", "/run/libvirt/virtlogd-sock")
                self.start()
        except BaseException:
            self.close()
            raise

    @property
    def ours(self) -> bool:
        """Whether tests may stop and start libvirtd."""
        return self._keeper is not None

    def _answers(self) -> bool:
        """Whether libvirt does; the first time it tries out every QEMU of this machine."""
        return subprocess.run(["virsh", "-c", URI, "version"], capture_output=True, timeout=120).returncode == 0

    def _start(self, name: str, path: str) -> None:
        assert self._keeper is not None and self._keeper.stdin is not None and self._keeper.stdout is not None
        self._keeper.stdin.write(f"{name}\n")
        self._keeper.stdin.flush()
        pid = self._own[name] = int(self._keeper.stdout.readline())
        deadline = time.monotonic() + 30
        while True:
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
                probe.connect(path)
                return
            alive = process_start(pid) is not None
            assert alive and time.monotonic() < deadline, f"{name} did not start: {self.said()}"
            time.sleep(0.02)        # the polling interval of a bounded wait

    def start(self) -> None:
        """libvirtd, which answers."""
        self._start("libvirtd", "/run/libvirt/libvirt-sock")
        assert self._answers(), self.said()

    def stop(self, name: str = "libvirtd") -> None:
        """End it; libvirtd's domains run on."""
        pid = self._own.pop(name)
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 30
        while process_start(pid) is not None:
            assert time.monotonic() < deadline, f"{name} does not end: {self.said()}"
            time.sleep(0.02)        # the polling interval of a bounded wait

    def said(self) -> str:
        """What the daemons printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def close(self) -> None:
        """End those of our own."""
        for name in reversed(list(self._own)):
            self.stop(name)
        if self._keeper is not None:
            self._keeper.communicate(timeout=30)
        self._log.close()


def domain_xml(
    name: str,
    machine: str,
    directory: pathlib.Path,
    kernel: pathlib.Path,
    initrd: pathlib.Path,
    cmdline: str,
    devices: str,
    *,
    ports: int = 0,
    memory: int = 256,
    arguments: Sequence[str] = (),
) -> str:
    """A domain that boots a kernel directly. maxcpus 2: see TinyVm. Files are left as they are (relabel no)."""
    for source, target in ((kernel, "vmlinuz"), (initrd, "initrd")):
        shutil.copyfile(source, directory / target)
    directory.chmod(0o755)
    kind = "kvm" if accelerator() == "kvm" else "qemu"
    cpu = "<cpu mode='host-passthrough'/>" if kind == "kvm" else ""
    controllers = "".join(f"<controller type='pci' index='{n}' model='pcie-root-port'/>" for n in range(1, ports + 1))
    more = "".join(f"<qemu:arg value='{a}'/>" for a in arguments)
    return f"""<domain type='{kind}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
      <name>{name}</name><memory unit='MiB'>{memory}</memory><vcpu current='1'>2</vcpu>{cpu}
      <os><type arch='x86_64' machine='{machine}'>hvm</type>
        <kernel>{directory}/vmlinuz</kernel><initrd>{directory}/initrd</initrd><cmdline>{cmdline}</cmdline></os>
      <features><acpi/></features><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>
      <devices><emulator>{shutil.which('qemu-system-x86_64')}</emulator>
        {controllers}<controller type='usb' model='none'/><memballoon model='none'/>{devices}</devices>
      <seclabel type='static' model='dac' relabel='no'><label>libvirt-qemu:libvirt-qemu</label></seclabel>
      <qemu:commandline>{more}</qemu:commandline></domain>"""


class _Defined:
    """A domain's life in libvirt, whatever runs in it."""

    domain = ""

    def define(self, xml: str, directory: pathlib.Path) -> None:
        """Make it known."""
        (directory / "domain.xml").write_text(xml)
        virsh("define", str(directory / "domain.xml"))

    def forget(self) -> None:
        """Off, and unknown. Again is allowed."""
        if not self.domain:
            return
        virsh("destroy", self.domain, status=None)
        virsh("managedsave-remove", self.domain, status=None)
        virsh("undefine", self.domain, status=None)

    @property
    def uuid(self) -> str:
        return virsh("domuuid", self.domain)


class TinyDomain(_Defined, tinyguest.TinyVm):
    """The tiny guest as a domain: :class:`tinyguest.TinyVm` without the QEMU of its own."""

    def __init__(
        self, directory: pathlib.Path, domain: str, machine: str, ports: int = 0, arguments: Sequence[str] = ()
    ) -> None:
        self.domain = domain
        self.directory = directory
        self._serial_path = str(directory / "serial.sock")
        self._serial = None
        self._buffer = b""
        serial = f"<serial type='unix'><source mode='bind' path='{self._serial_path}'/></serial>"
        kernel, initrd = tinyguest.build()
        xml = domain_xml(
            domain, machine, directory, kernel, initrd, "console=ttyS0 quiet panic=-1", serial, ports=ports,
            arguments=arguments,
        )
        self.define(xml, directory)

    def start(self) -> None:
        """Boot it, until its shell runs; of a domain that has just ended libvirt may know later than the agent."""
        until(lambda: virsh("domstate", self.domain), lambda state: state == "shut off", "it has not ended")
        virsh("start", self.domain)
        self.connect()
        self.wait_ready()

    def connect(self) -> None:
        """To the serial port of a domain that was started."""
        if self._serial is not None:
            self._serial.close()
        self._serial = socket.socket(socket.AF_UNIX)
        self._serial.connect(self._serial_path)
        self._buffer = b""

    def __enter__(self) -> TinyDomain:
        return self

    def close(self) -> None:
        """Off, and unknown to libvirt."""
        if self._serial is not None:
            self._serial.close()
        self.forget()

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return int(pathlib.Path(f"/run/libvirt/qemu/{self.domain}.pid").read_text())

    def addresses(self) -> list[str]:
        """PCI slots of the devices that libvirt knows: ``bus:slot``."""
        root = ET.fromstring(virsh("dumpxml", self.domain))
        found = [a for a in root.iterfind("devices/*/address") if a.get("type") == "pci"]
        return sorted(f"{int(a.get('bus', '0'), 0)}:{int(a.get('slot', '0'), 0):x}" for a in found)


@contextlib.contextmanager
def tiny_domain(
    name: str, machine: str = "pc", *, ports: int = 0, wide: bool = False, start: bool = True
) -> Iterator[TinyDomain]:
    """A domain in a directory of its own; both are gone afterwards.

    :param wide: its root ports have room for large memory, as docs/libvirt.md says it.
    """
    arguments = ("-global", "pcie-root-port.pref64-reserve=1G") if wide else ()
    with tempfile.TemporaryDirectory(prefix="rb-") as directory:
        with TinyDomain(pathlib.Path(directory), name, machine, ports, arguments) as vm:
            if start:
                vm.start()
            yield vm


class LibvirtGuest(_Defined, Guest):
    """The Python guest as a domain; SSH as in :class:`Guest`, over QEMU's user-mode network."""

    def _command(self, *unused: Any) -> list[str]:
        return []       # libvirt makes it

    def _launch(self, command: list[str]) -> None:
        self.domain = f"ringbar-test-{self.name}"
        directory = self.directory
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", os.fspath(self.image.disk), "-F", "raw",
             directory / "root.qcow2"],
            check=True, capture_output=True,
        )
        self.console.touch()
        for path in (directory / "root.qcow2", self.console):
            path.chmod(0o666)
        disks = "".join(
            f"<disk type='file' device='disk'><driver name='qemu' type='{kind}'/><source file='{directory / file}'/>"
            f"<target dev='{target}' bus='virtio'/></disk>"
            for kind, file, target in (("qcow2", "root.qcow2", "vda"), ("raw", "share.tar", "vdb"))
        )
        serial = f"<serial type='file'><source path='{self.console}'/></serial>"
        (directory / "share.tar").chmod(0o644)
        xml = domain_xml(
            self.domain, "pc", directory, self.image.kernel, self.image.initrd,
            f"{KERNEL_PARAMETERS} ringbar.name={self.name}", disks.replace("vdb' bus='virtio'/>",
            "vdb' bus='virtio'/><readonly/>") + serial, memory=512,
            arguments=("-netdev", "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-:22",
                       "-device", "virtio-net-pci,netdev=net,romfile=,addr=0x10"),
        )
        self.define(xml, directory)
        virsh("start", self.domain)
        self._thread = threading.Thread(target=self._watch, name=f"console of {self.name}", daemon=True)
        self._thread.start()
        table = virsh("qemu-monitor-command", self.domain, "--hmp", "info usernet")
        found = re.search(r"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", table)
        assert found is not None, table
        self.port = int(found[1])

    def _watch(self) -> None:
        """Counts the boots that the console shows."""
        with open(self.console, "rb") as console:
            while not self._ended:
                line = console.readline()
                if images.UP_MARK in line:
                    with self._changed:
                        self._boots += 1
                        self._changed.notify_all()
                elif not line:
                    time.sleep(0.05)        # a file has no event for this; waiters are bounded

    @property
    def running(self) -> bool:
        return virsh("domstate", self.domain, status=None) == "running"

    def kill(self) -> None:
        """Off, and unknown to libvirt."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(30)
        self.forget()
