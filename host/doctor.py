# SPDX-License-Identifier: Apache-2.0
"""``ringbar doctor``: what this host or guest can do, what is missing, and the command that mends it.

Every check is a function that returns findings and changes nothing. Only ``--clean`` changes anything, and then only
what belongs to nobody any more.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import os
import platform
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ringbar import address
from ringbar.cli import worker
from ringbar.cli.common import plural
from ringbar.errors import BadAddress, Error, NotFound
from ringbar.host import doctor_guest, inside, records, surroundings
from ringbar.host.model import Finding, Report

if TYPE_CHECKING:
    from ringbar.host.service import Host

Progress = Callable[[str], None]

OLDEST_KERNEL = (5, 10)
"""AF_XDP with shared memory as used here; Debian 11's."""
SHM_WANTED = 192 << 20
"""Bytes of a pool of the usual size and its lanes."""
_CAPABILITIES = {
    12: "CAP_NET_ADMIN",
    13: "CAP_NET_RAW",
    14: "CAP_IPC_LOCK",
    21: "CAP_SYS_ADMIN",
    39: "CAP_BPF",
}


def examine(host: Host, target: str | None, clean: bool, connect: str | None, progress: Progress) -> Report:
    """All checks of this machine, and of ``target`` (a device or a VM)."""
    report = Report()
    around, inner = surroundings, doctor_guest
    checks: list[Callable[[], list[Finding]]] = [_kernel, around.kernel_features, _core, _filters]
    guest = inside.looks_like_a_guest()
    if guest:
        checks += [inner.devices, inner.memory, inner.hot_plug, inner.iommu, inner.interrupts, _af_xdp_in_guest]
    else:
        checks += [_huge_pages, _shm, around.iommu, around.memory_types, _capabilities, around.people, around.agent]
        checks += [_kvm, _qemu, _libvirt, around.confinement, _af_xdp]
    checks.append(around.cards)
    for check in checks:
        progress(f"checking {check.__name__.strip('_').replace('_', ' ')}")
        report.findings += check()
    if not guest:
        progress("looking for what dead programs left")
        _leftovers(host, clean, report)
    if target is not None:
        report.findings += _target(target, connect, progress)
    return report


def _version(text: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


# ---- both ---------------------------------------------------------------------------------------------------


def _kernel() -> list[Finding]:
    release, machine = platform.release(), platform.machine()
    if machine not in ("x86_64", "aarch64"):
        return [Finding("kernel", "missing", f"{machine}: ringbar knows x86-64 and aarch64")]
    if _version(release) < OLDEST_KERNEL:
        wanted = ".".join(map(str, OLDEST_KERNEL))
        return [
            Finding(
                "kernel",
                "warning",
                f"Linux {release}, older than {wanted}",
                "apt-get install linux-image-amd64",
            )
        ]
    return [Finding("kernel", "ok", f"Linux {release}, {machine}")]


def _core() -> list[Finding]:
    try:
        import ringbar

        return [Finding("library", "ok", f"libringbar {ringbar.__version__}")]
    except ImportError as e:
        return [Finding("library", "missing", " ".join(str(e).split()), "make setup")]


# ---- host ---------------------------------------------------------------------------------------------------


def _huge_pages() -> list[Finding]:
    found = []
    for directory in sorted(Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB")):
        size = int(directory.name[len("hugepages-") : -2])
        name = {2048: "2M", 1048576: "1G"}.get(size)
        if name is None:
            continue
        total, free = (int(surroundings.read(directory / f) or 0) for f in ("nr_hugepages", "free_hugepages"))
        mounted = _hugetlbfs(size)
        if total and not mounted:
            where = f"/dev/hugepages{name}"
            found.append(
                Finding(
                    f"huge pages {name}",
                    "warning",
                    f"{total} there, but hugetlbfs with this size is mounted nowhere",
                    f"mkdir -p {where} && mount -t hugetlbfs -o pagesize={name} none {where}",
                )
            )
        elif total:
            found.append(Finding(f"huge pages {name}", "ok", f"{free} of {total} free, {mounted}"))
        elif name == "2M":
            found.append(
                Finding(
                    "huge pages 2M",
                    "warning",
                    "none: pools use pages of 4k, which costs speed",
                    f"echo 128 > {directory}/nr_hugepages",
                )
            )
    return found or [Finding("huge pages", "warning", "this kernel has none: pools use pages of 4k")]


def _hugetlbfs(size: int) -> str:
    """Where hugetlbfs with pages of ``size`` KiB is mounted."""
    units = {"K": 1, "M": 1024, "G": 1024 * 1024}
    for line in surroundings.read(Path("/proc/self/mounts")).splitlines():
        fields = line.split()
        if len(fields) > 3 and fields[2] == "hugetlbfs":
            option = re.search(r"pagesize=(\d+)([KMG])", fields[3])
            if (int(option[1]) * units[option[2]] if option else 2048) == size:
                return fields[1]
    return ""


def _shm() -> list[Finding]:
    where = os.environ.get("RINGBAR_SHM") or "/dev/shm"
    try:
        stat = os.statvfs(where)
    except OSError as e:
        return [Finding(where, "missing", (e.strerror or str(e)).lower(), f"mount -t tmpfs none {where}")]
    if not os.access(where, os.W_OK):
        return [Finding(where, "missing", "cannot be written", "run as root, or as a member of group ringbar")]
    kind = _file_system(where)
    if kind not in ("tmpfs", "hugetlbfs"):
        detail = f"lies on {kind}, whose memory the kernel lends to no network card: no zc: devices"
        return [Finding(where, "warning", detail, f"mount -t tmpfs none {where}, or RINGBAR_SHM=/dev/shm")]
    free, total = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
    detail = f"{free >> 20:,} of {total >> 20:,} MiB free"
    if free < SHM_WANTED:
        more = (total - free + 2 * SHM_WANTED) >> 20
        cure = f"mount -o remount,size={more}M {where}"
        return [Finding(where, "warning", f"{detail}; a usual pool takes {SHM_WANTED >> 20}", cure)]
    return [Finding(where, "ok", detail)]


def _file_system(path: str) -> str:
    """Of which kind it is there."""
    best, kind = "", "an unknown file system"
    for line in surroundings.read(Path("/proc/self/mounts")).splitlines():
        where, found = line.split()[1:3]
        if len(where) >= len(best) and os.path.commonpath([where, os.path.realpath(path)]) == where:
            best, kind = where, found
    return kind


def _capabilities() -> list[Finding]:
    have = surroundings.capabilities()
    names = {n: name for n, name in _CAPABILITIES.items() if not have >> n & 1}
    if have >> 21 & 1:  # CAP_SYS_ADMIN includes CAP_BPF
        names.pop(39, None)
    if not names:
        return [Finding("permissions", "ok", "all that network cards and VMs need")]
    return [
        Finding(
            "permissions",
            "warning",
            f"without {', '.join(names.values())}: no zc: network cards, and VMs only of this user",
            "run as root (sudo ringbar ...)",
        )
    ]


def _af_xdp() -> list[Finding]:
    found = []
    try:
        socket.socket(44, socket.SOCK_RAW).close()  # AF_XDP
        found.append(Finding("AF_XDP", "ok", "the kernel has it"))
    except PermissionError:
        found.append(
            Finding("AF_XDP", "warning", "no permission to see whether the kernel has it", "run as root (sudo)")
        )
    except OSError:
        cure = "a kernel with CONFIG_XDP_SOCKETS, such as Debian's: apt-get install linux-image-amd64"
        found.append(Finding("AF_XDP", "missing", "the kernel has no XDP sockets: no zc: network cards", cure))
    if ctypes.util.find_library("xdp") is None:
        found.append(Finding("libxdp", "missing", "not installed: no zc: network cards", "apt-get install libxdp1"))
    else:
        found.append(Finding("libxdp", "ok", "installed"))
    if any(" bpf " in line for line in surroundings.read(Path("/proc/self/mounts")).splitlines()):
        found.append(Finding("bpffs", "ok", "mounted"))
    else:
        found.append(
            Finding(
                "bpffs",
                "warning",
                "not mounted: one XDP program per network card",
                "mount -t bpf bpf /sys/fs/bpf",
            )
        )
    return found


def _af_xdp_in_guest() -> list[Finding]:
    """A guest needs no cards of its own."""
    for finding in (found := _af_xdp()):
        finding.state = "warning" if finding.state == "missing" else finding.state
    return found


def _filters() -> list[Finding]:
    for name in ("libpcap.so.0.8", "libpcap.so.1"):
        with contextlib.suppress(OSError):
            ctypes.CDLL(name)
            return [Finding("libpcap", "ok", "installed: filters can be set here")]
    return [Finding("libpcap", "warning", "not installed: no filters, no --steer", "apt-get install libpcap0.8")]


def _kvm() -> list[Finding]:
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", surroundings.read(Path("/proc/cpuinfo")), re.MULTILINE)
    words = set(flags[1].split()) if flags else set()
    works = platform.machine() == "aarch64" or bool(words & {"svm", "vmx"})
    if not Path("/dev/kvm").exists():
        cure = "modprobe kvm_intel || modprobe kvm_amd; in a VM: switch nested virtualisation on at its host"
        return [Finding("KVM", "warning", "no /dev/kvm: VMs are emulated (TCG), which is slow", cure)]
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        why = (e.strerror or str(e)).lower()
        return [Finding("KVM", "warning", f"/dev/kvm does not open: {why}", "usermod -aG kvm $USER, and log in again")]
    if not works:
        return [
            Finding(
                "KVM",
                "warning",
                "/dev/kvm opens, but the processor shows neither vmx nor svm: stock kernels do not boot under it, "
                "and VMs are emulated (TCG)",
                "switch nested virtualisation on at the host of this machine",
            )
        ]
    return [Finding("KVM", "ok", "usable")]


def _qemu() -> list[Finding]:
    binary = shutil.which(f"qemu-system-{platform.machine()}")
    if binary is None:
        return [Finding("QEMU", "missing", "not installed", "apt-get install qemu-system-x86")]
    try:
        version = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=20).stdout
        devices = subprocess.run([binary, "-device", "help"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as e:
        return [
            Finding(
                "QEMU",
                "missing",
                f"{binary} does not run: {e}",
                "apt-get install --reinstall qemu-system-x86",
            )
        ]
    found = re.search(r"version (\S+)", version)
    shown = f"{binary}, version {found[1] if found else 'unknown'}"
    if '"ivshmem-plain"' not in devices.stdout + devices.stderr:
        return [
            Finding(
                "QEMU",
                "missing",
                f"{shown}, has no ivshmem-plain",
                "a QEMU built with CONFIG_IVSHMEM, such as Debian's",
            )
        ]
    return [Finding("QEMU", "ok", f"{shown}, with ivshmem-plain")]


def _libvirt() -> list[Finding]:
    if not inside.has_libvirt():
        return [Finding("libvirt", "ok", "not here: VMs are named by their monitor, qmp:SOCKET")]
    sockets = [p for p in ("/run/libvirt/libvirt-sock", "/run/libvirt/virtqemud-sock") if Path(p).exists()]
    if not sockets:
        return [Finding("libvirt", "warning", "installed, but it does not run", "systemctl start libvirtd")]
    return [Finding("libvirt", "ok", f"listens on {sockets[0]}")]


def _leftovers(host: Host, clean: bool, report: Report) -> None:
    """Records of VMs that ended, buffers that dead programs held, files of clusters that are gone."""
    try:
        from ringbar.host import native

        before = set(native.clusters())  # this reaps clusters that lived with a process that died
    except (ImportError, Error) as e:
        report.findings.append(Finding("clusters", "missing", " ".join(str(e).split()), getattr(e, "cure", None)))
        return
    ended = [r for r in records.all_records() if not records.alive(r.identity)]
    files = _stray_files(before | _unreadable(before))
    if clean:
        report.notes += host.reclaim()
        for cluster in sorted(before):
            dead = native.reap(cluster)
            if dead:
                report.notes.append(f"cluster {cluster}: took home what {dead} dead program{'s' * (dead > 1)} held")
        for path in files:
            with contextlib.suppress(OSError):
                path.unlink()
                report.notes.append(f"removed {path}")
        ended, files = [], [p for p in files if p.exists()]
    for record in ended:
        detail = f"{record.vm} has ended, and what it held of cluster {record.cluster} is not home yet"
        report.findings.append(Finding("leftovers", "warning", detail, "ringbar doctor --clean"))
    if files:
        shown = ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        total = sum(p.stat().st_size for p in files if p.exists())
        detail = f"{total >> 20:,} MiB in files of clusters that are gone: {shown}"
        report.findings.append(Finding("leftovers", "warning", detail, "ringbar doctor --clean"))
    died = worker.dead_workers()
    if clean:
        report.notes += [f"worker {name} was dead; what it left is removed" for name in died if worker.forget(name)]
        died = []
    if died:
        detail = f"{plural(len(died), 'worker')} died: {', '.join(died[:3])}{' ...' if len(died) > 3 else ''}"
        report.findings.append(Finding("leftovers", "warning", detail, "ringbar doctor --clean"))
    if not ended and not files and not died:
        number = len(before)
        report.findings.append(
            Finding("leftovers", "ok", f"none; {number} cluster{'' if number == 1 else 's'} on this host")
        )


def _unreadable(known: set[int]) -> set[int]:
    """Clusters of the registry that cannot be opened: another user's, another version's. Their files are not ours to
    judge."""
    from ringbar.host import native

    found = set()
    for link in records.run_directory().glob("*.state"):
        if not link.stem.isdecimal() or int(link.stem) in known:
            continue
        try:
            native.Handle.attach(int(link.stem)).close()
        except NotFound:  # it is gone
            continue
        except Error:
            pass
        found.add(int(link.stem))
    return found


def _stray_files(known: set[int]) -> list[Path]:
    """Segments of clusters that the registry does not know, which nobody has open."""
    directories = {os.environ.get("RINGBAR_SHM") or "/dev/shm"}
    for line in surroundings.read(Path("/proc/self/mounts")).splitlines():
        fields = line.split()
        # With a registry of one's own, what lies in the huge pages of all may be another registry's.
        if len(fields) > 2 and fields[2] == "hugetlbfs" and "RINGBAR_RUN" not in os.environ:
            directories.add(fields[1])
    found = []
    for directory in sorted(directories):
        with contextlib.suppress(PermissionError):  # what this user may not look into, he did not leave there
            for path in sorted(Path(directory).glob("ringbar.*.*")):
                name = re.fullmatch(r"ringbar\.(\d+)\.(pool|lane|state)\d+", path.name)
                if name and int(name[1]) not in known and not path.is_symlink() and path.is_file():
                    found.append(path)
    return _unused(found) if found else []


def _unused(paths: list[Path]) -> list[Path]:
    """Those that no process maps or has open (as far as this user can see)."""
    wanted = {}
    for path in paths:
        with contextlib.suppress(OSError):
            stat = path.stat()
            wanted[(stat.st_dev, stat.st_ino)] = path
    used = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for line in (process / "maps").read_text(errors="replace").splitlines():
                fields = line.split(None, 5)
                if len(fields) == 6 and "ringbar." in fields[5]:
                    major, minor = (int(n, 16) for n in fields[3].split(":"))
                    used.add((os.makedev(major, minor), int(fields[4])))
    return [path for key, path in wanted.items() if key not in used]


# ---- one device or VM ---------------------------------------------------------------------------------------


def _target(text: str, connect: str | None, progress: Progress) -> list[Finding]:
    """A device, or a VM: an interface's name that no interface has may be the name of a VM."""
    if text.startswith("qmp:") or connect is not None:
        return _vm(text, connect, progress)
    try:
        device = address.parse_device(text)
    except BadAddress:
        if address.parse_vm(text).kind == "uuid" or not re.search(r"[:,@]", text):
            return _vm(text, connect, progress)
        raise
    interface = getattr(device, "interface", None)
    if interface is None:
        return [Finding(text, "ok", "a queue or a file: ringbar status, or open it")]
    more = []
    if isinstance(device, address.InterfaceAddress) and not Path("/sys/class/net", interface).exists():
        from ringbar.host import vms

        try:
            vms.canonical(text, None)
            return _vm(text, None, progress)
        except Error as e:
            if Path("/run/libvirt").exists() and e.code != "no-such-vm":
                more.append(Finding(text, "missing", f"nor can a VM be looked for: {e.message}", e.cure))
    return [*_interface(text, str(interface)), *more]


#: Largest MTU that fits a buffer of 2048 and of 4096 bytes, beside the buffer's header, the kernel's room and a tag.
_MTU = {2048: 1710, 4096: 3758}


def _interface(text: str, name: str) -> list[Finding]:
    from ringbar.cli import running
    from ringbar.host import nic, xdp_features

    found = nic.look(name)
    if found is None:
        there = ", ".join(nic.names()) or "none but lo"
        return [Finding(text, "missing", f"there is no interface {name}", f"ip link; there are: {there}")]
    findings = []
    if not found.up:
        findings.append(Finding(text, "missing", f"{name} is down", f"ip link set {name} up"))
    else:
        findings.append(Finding(text, "ok", f"{name} is up, mtu {found.mtu}"))
    plural = "" if found.queues == 1 else "s"
    can = surroundings.xdp(name, xdp_features.look())
    findings.append(Finding(text, "ok", f"driver {found.driver}, {found.queues} receive queue{plural}; {can}"))
    if name in running.default_routes() | running.session_interfaces():
        detail = f"{name} carries the default route or this SSH session"
        findings.append(Finding(text, "warning", detail, "another NIC, --steer RULE, or --take-all"))
    if found.mtu > _MTU[2048]:
        detail = f"mtu {found.mtu} is more than the {_MTU[2048]} that 2048-byte buffers hold ({_MTU[4096]}: 4096)"
        if nic.kernel() >= (6, 6):
            findings.append(Finding(text, "ok", f"{detail}: larger packets come in several buffers"))
        else:
            cure = f"ip link set {name} mtu 1500; packets in several buffers need kernel 6.6"
            findings.append(Finding(text, "warning", detail, cure))
    return findings


def _vm(text: str, connect: str | None, progress: Progress) -> list[Finding]:
    from ringbar.host import vms

    try:
        return vms.examine(text, connect, progress)
    except Error as e:
        return [Finding(text, "missing", e.message, e.cure)]
