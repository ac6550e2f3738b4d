# SPDX-License-Identifier: Apache-2.0
"""The smallest guest that can answer questions about its PCI devices: Debian's cloud kernel and one ram disk.

The ram disk has busybox and a static C program (``mem``) that reads and writes a PCI function's ``resource2``. A
shell on the serial port takes one command at a time (:meth:`TinyVm.sh`). Kernel and ram disk are built once from
Debian packages (apt-get download, dpkg-deb, gcc) and cached in ``build/tinyguest``, or in ``$RINGBAR_CACHE``.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence

PACKAGE = "linux-image-cloud-amd64"
ROOT = pathlib.Path(__file__).resolve().parents[2]

INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo -onlcr
echo TINYGUEST-READY
while read -r line; do eval "$line"; echo "TINYGUEST-RC=$?"; done
"""

MEM_C = r"""
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
/* mem read FILE OFFSET | mem write FILE OFFSET VALUE: one aligned 32-bit word of a PCI resource */
int main(int argc, char **argv)
{
    int writing = argc == 5;
    if (argc < 4) { fprintf(stderr, "usage\n"); return 2; }
    off_t offset = (off_t)strtoull(argv[3], NULL, 0);
    int fd = open(argv[2], O_RDWR | O_SYNC);
    if (fd < 0) { perror("open"); return 1; }
    char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset & ~(off_t)4095);
    if (page == MAP_FAILED) { perror("mmap"); return 1; }
    volatile uint32_t *word = (volatile uint32_t *)(page + (offset & 4095));
    if (writing) *word = (uint32_t)strtoul(argv[4], NULL, 0);
    printf("0x%08x\n", (unsigned)*word);
    return 0;
}
"""


def why_not() -> str | None:
    """The reason why no VM can run here, or None."""
    for tool in ("qemu-system-x86_64", "apt-get", "dpkg-deb", "gcc"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    return None


def _newc(entries: Sequence[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive ("newc") of (name, mode, content)."""
    out = bytearray()
    for inode, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        raw = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
        out += b"070701" + b"".join(b"%08x" % f for f in fields) + raw
        out += b"\0" * (-len(out) % 4)
        out += data + b"\0" * (-len(data) % 4)
    return bytes(out)


def build() -> tuple[pathlib.Path, pathlib.Path]:
    """The kernel and the ram disk, built when the cache does not have them (about 3 s)."""
    cache = pathlib.Path(os.environ.get("RINGBAR_CACHE", str(ROOT / "build")))
    key = hashlib.sha256((INIT + MEM_C + PACKAGE).encode()).hexdigest()[:12]
    done = cache / f"tinyguest-{key}"
    if not done.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as name:
            work = pathlib.Path(name)
            depends = subprocess.run(
                ["apt-cache", "depends", PACKAGE], check=True, capture_output=True, text=True
            ).stdout
            kernel = re.search(r"Depends: (linux-image-\S+)", depends)
            assert kernel is not None, depends
            subprocess.run(
                ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", kernel[1], "busybox-static"],
                check=True, cwd=work, capture_output=True,
            )
            for deb in work.glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", str(deb), str(work / "x")], check=True)
            (work / "mem.c").write_text(MEM_C)
            subprocess.run(["gcc", "-static", "-O1", "-o", "mem", "mem.c"], check=True, cwd=work)
            ramdisk = _newc([
                ("bin", 0o040755, b""),
                ("dev", 0o040755, b""),
                ("init", 0o100755, INIT.encode()),
                ("bin/busybox", 0o100755, (work / "x/bin/busybox").read_bytes()),
                ("bin/mem", 0o100755, (work / "mem").read_bytes()),
            ])
            made = work / "made"
            made.mkdir()
            (made / "initrd").write_bytes(gzip.compress(ramdisk, 6, mtime=0))
            shutil.copy(next((work / "x/boot").glob("vmlinuz-*")), made / "vmlinuz")
            with contextlib.suppress(OSError):      # somebody else was faster: theirs is the same
                made.rename(done)
    return done / "vmlinuz", done / "initrd"


class TinyVm:
    """One running QEMU with the tiny guest. A context manager that ends the process by its pid."""

    def __init__(
        self,
        directory: pathlib.Path,
        machine: str = "pc",
        *,
        extra: Sequence[str] = (),
        append: str = "",
        firmware_only: bool = False,
    ) -> None:
        self.qmp = str(directory / "qmp.sock")
        self.second_qmp = str(directory / "qmp2.sock")      # for looking from outside while the first is in use
        self._serial_path = str(directory / "serial.sock")
        self.log = directory / "qemu.log"
        command = [
            "qemu-system-x86_64", "-M", machine, "-accel", "tcg,thread=multi", "-smp", "1,maxcpus=2", "-m", "256",
            "-nodefaults", "-no-user-config", "-display", "none", "-name", f"tiny-{machine.split(',')[0]}",
            "-chardev", f"socket,id=serial,path={self._serial_path},server=on,wait=off", "-serial", "chardev:serial",
            "-qmp", f"unix:{self.qmp},server=on,wait=off", "-qmp", f"unix:{self.second_qmp},server=on,wait=off",
        ]
        if firmware_only:
            command += ["-boot", "menu=on,splash-time=65000", "-fw_cfg", "name=etc/show-boot-menu,string=1"]
        else:
            kernel, initrd = build()
            command += ["-kernel", str(kernel), "-initrd", str(initrd), "-append",
                        f"console=ttyS0 quiet panic=-1 {append}"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen([*command, *extra], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self._buffer = b""
        self._serial: socket.socket | None = None

    def __enter__(self) -> TinyVm:
        try:
            deadline = time.monotonic() + 20
            while True:
                serial = socket.socket(socket.AF_UNIX)
                try:
                    serial.connect(self._serial_path)
                    probe = socket.socket(socket.AF_UNIX)
                    with contextlib.closing(probe):
                        probe.connect(self.second_qmp)
                    break
                except OSError:
                    serial.close()
                    if self.process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError("QEMU did not start: " + self.log.read_text()) from None
                    time.sleep(0.02)        # the polling interval of a bounded wait
            self._serial = serial
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends QEMU and waits for it."""
        if self._serial is not None:
            self._serial.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def _until(self, pattern: bytes, timeout: float) -> re.Match[bytes]:
        assert self._serial is not None
        deadline = time.monotonic() + timeout
        while True:
            match = re.search(pattern, self._buffer)
            if match is not None:
                return match
            self._serial.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                chunk = self._serial.recv(65536)
            except TimeoutError:
                chunk = b""
            if not chunk:
                raise TimeoutError(f"no {pattern!r} on the serial port; it said {self._buffer[-2000:]!r}")
            self._buffer += chunk

    def wait_ready(self, timeout: float = 90) -> None:
        """Until the guest's shell runs."""
        match = self._until(rb"TINYGUEST-READY\r?\n", timeout)
        self._buffer = self._buffer[match.end():]

    def sh(self, line: str, *, timeout: float = 30, check: bool = True) -> str:
        """What the command prints in the guest."""
        assert self._serial is not None
        self._buffer = b""
        self._serial.sendall(line.encode() + b"\n")
        match = self._until(rb"TINYGUEST-RC=(\d+)\r?\n", timeout)
        text = self._buffer[: match.start()].decode(errors="replace").replace("\r", "")
        self._buffer = self._buffer[match.end():]
        if check and match[1] != b"0":
            raise AssertionError(f"in the guest, {line!r} ended with {match[1].decode()}: {text}")
        return text.strip()

    def functions(self) -> dict[str, int]:
        """The ivshmem functions that the guest's kernel sees: address -> size of BAR 2 in bytes, 0 = unassigned."""
        text = self.sh(
            "for d in /sys/bus/pci/devices/*; do [ $(cat $d/vendor) = 0x1af4 ] && [ $(cat $d/device) = 0x1110 ] &&"
            " echo ${d##*/} $(stat -c %s $d/resource2 2>/dev/null || echo 0); done; true"
        )
        return {a: int(s) for a, s in (line.split() for line in text.splitlines())}

    def wait_functions(self, count: int, timeout: float = 20) -> dict[str, int]:
        """Until the guest sees so many ivshmem functions: hot-plug is asynchronous in the guest."""
        deadline = time.monotonic() + timeout
        while True:
            seen = self.functions()
            if len(seen) == count:
                return seen
            if time.monotonic() > deadline:
                raise AssertionError(f"the guest sees {seen}, not {count} functions\n{self.sh('dmesg | tail -20')}")

    def enable(self, address: str) -> None:
        """Turns on the memory decoding of a function that no driver claims."""
        self.sh(f"echo 1 > /sys/bus/pci/devices/{address}/enable")

    def read(self, address: str, offset: int) -> int:
        """A 32-bit word of the function's BAR 2."""
        return int(self.sh(f"mem read /sys/bus/pci/devices/{address}/resource2 {offset}"), 0)

    def write(self, address: str, offset: int, value: int) -> int:
        """Stores a word; what a load from the same place then gives."""
        return int(self.sh(f"mem write /sys/bus/pci/devices/{address}/resource2 {offset} {value:#x}"), 0)


@contextlib.contextmanager
def tiny_vm(machine: str = "pc", *, ready: bool = True, **options: object) -> Iterator[TinyVm]:
    """A VM in a directory of its own; both are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="rb-") as name:
        with TinyVm(pathlib.Path(name), machine, **options) as vm:  # type: ignore[arg-type]
            if ready:
                vm.wait_ready()
            yield vm
