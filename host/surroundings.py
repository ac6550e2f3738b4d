# SPDX-License-Identifier: Apache-2.0
"""What ``ringbar doctor`` finds around ringbar: the kernel's features, network cards, the IOMMU, memory types, what
confines QEMU, who may use ringbar, and the agent. Each function returns findings and changes nothing."""

from __future__ import annotations

import grp
import os
import platform
import re
from pathlib import Path

from ringbar.host import nic, xdp_features
from ringbar.host.agent import socket_path
from ringbar.host.model import Finding

SYS = Path("/sys")
GROUP = "ringbar"
MOST_CARDS = 24
"""Interfaces that are told of; of more, only those that are cards."""
APPARMOR_FILE = Path("/etc/apparmor.d/local/abstractions/libvirt-qemu")
"""Where a host's own rules for all VMs of libvirt belong."""

_LATER = (
    ((5, 18), "frames injected by the kernel's test runs"),
    ((6, 3), "what a card's driver can do"),
    ((6, 6), "packets in several buffers, and stack: that leaves nothing behind when killed"),
)
"""What newer kernels bring."""


def read(path: Path) -> str:
    """What a file says; nothing where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def capabilities() -> int:
    """Those of this process, as bits."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", read(Path("/proc/self/status")), re.MULTILINE)
    return int(found[1], 16) if found else 0


def kernel_features() -> list[Finding]:
    """What this kernel brings beside AF_XDP."""
    have = nic.kernel()
    without = [f"{text} (from {a}.{b})" for (a, b), text in _LATER if have < (a, b)]
    detail = f"without {'; '.join(without)}" if without else "packets in several buffers, tcx, what drivers can do"
    found = [Finding("kernel features", "ok", detail)]
    if not Path("/dev/net/tun").exists():
        found.append(Finding("TUN/TAP", "warning", "no /dev/net/tun: no ringbar tap, no stack:", "modprobe tun"))
    if read(Path("/proc/sys/net/core/bpf_jit_enable")) == "0":
        cure = "sysctl -w net.core.bpf_jit_enable=1"
        found.append(Finding("BPF", "warning", "programs are interpreted, which makes XDP slow", cure))
    return found


# ---- network cards ------------------------------------------------------------------------------------------


def xdp(name: str, features: dict[str, int] | None) -> str:
    """What an interface's driver can do for ``zc:``, in words."""
    if features is None:
        return "what its driver can do is said when it is opened (kernels from 6.3 tell before)"
    bits = features.get(name, 0)
    if not bits & xdp_features.BASIC:
        return "no XDP in the driver: generic mode, with a copy"
    if bits & xdp_features.ZERO_COPY:
        return "XDP in the driver, zero copy"
    return "XDP in the driver, with a copy"


def cards() -> list[Finding]:
    """Every network card, and what it can do for ``zc:``."""
    names = nic.names()
    if len(names) > MOST_CARDS:
        names = [name for name in names if (SYS / "class/net" / name / "device").exists()]
    features = xdp_features.look()
    found = []
    for name in names:
        seen = nic.look(name)
        if seen is not None:
            state = "" if seen.up else ", down"
            queues = f"{seen.queues} queue{'s' * (seen.queues > 1)}"
            detail = f"{seen.driver}, {queues}{state}; {xdp(name, features)}"
            found.append(Finding(f"card {name}", "ok", detail))
    return found or [Finding("cards", "ok", "none but lo")]


# ---- memory -------------------------------------------------------------------------------------------------


def iommu() -> list[Finding]:
    """Whether devices are kept from memory that is not theirs."""
    groups = SYS / "kernel/iommu_groups"
    number = len(list(groups.iterdir())) if groups.is_dir() else 0
    if number:
        detail = f"on, {number} groups; for VMs that have VFIO devices an attached pool is locked in memory"
    else:
        detail = "off: ringbar needs none, VFIO passthrough does"
    return [Finding("IOMMU", "ok", detail)]


def memory_types() -> list[Finding]:
    """Whether a guest's own choice of caching holds on this processor."""
    if platform.machine() != "x86_64":
        return [Finding("memory types", "ok", "of host and guest the stricter one holds")]
    text = read(Path("/proc/cpuinfo"))
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    if flags is not None and "pat" not in flags[1].split():
        cure = "switch PAT on in this machine's firmware, or at its host (QEMU: -cpu host)"
        return [Finding("memory types", "warning", "the processor has no PAT: guests map memory uncached", cure)]
    if "AuthenticAMD" in text or "HygonGenuine" in text:
        detail = "PAT; what a guest chooses holds, so one that maps uncached is slow (ringbar doctor in it tells)"
    else:
        detail = "PAT; what a guest chooses may hold: one that maps uncached is slow then (ringbar doctor in it tells)"
    return [Finding("memory types", "ok", detail)]


# ---- confinement --------------------------------------------------------------------------------------------


def apparmor_lines() -> list[str]:
    """What AppArmor has to let QEMU open."""
    directory = os.environ.get("RINGBAR_SHM") or "/dev/shm"
    return [f"{directory}/ringbar.* rw,", "/dev/hugepages*/ringbar.* rw,"]


def _apparmor_cure() -> str:
    return f"printf '%s\\n' {' '.join(repr(line) for line in apparmor_lines())} >> {APPARMOR_FILE}"


def _selinux_cure() -> str:
    directory = os.environ.get("RINGBAR_SHM") or "/dev/shm"
    return f"see what it refuses: ausearch -m avc -ts recent; chcon -t svirt_image_t {directory}/ringbar.*"


def confinement() -> list[Finding]:
    """What keeps QEMU from memory that it is handed, on this host."""
    found = []
    if read(SYS / "module/apparmor/parameters/enabled") == "Y":
        have = {line.strip() for line in read(APPARMOR_FILE).splitlines()}
        if have >= set(apparmor_lines()):
            found.append(Finding("AppArmor", "ok", f"on, and {APPARMOR_FILE} has ringbar's lines"))
        else:
            detail = f"on: where it confines VMs of libvirt, {APPARMOR_FILE} needs two lines more"
            found.append(Finding("AppArmor", "warning", detail, _apparmor_cure()))
    if read(SYS / "fs/selinux/enforce") == "1":
        detail = "enforcing: VMs of libvirt may be kept from a pool's memory"
        found.append(Finding("SELinux", "warning", detail, _selinux_cure()))
    return found or [Finding("confinement", "ok", "neither AppArmor nor SELinux is on")]


def confined(shown: str, pid: int) -> list[Finding]:
    """Whether AppArmor or SELinux stands between this VM's QEMU and the memory, and the lines to add.

    :param pid: QEMU's.
    """
    label = read(Path(f"/proc/{pid}/attr/current"))
    if label.endswith("(enforce)"):
        detail = f"AppArmor confines its QEMU to {label.split()[0]}"
        return [Finding(shown, "warning", detail, f"{_apparmor_cure()}, then shut the VM down and start it")]
    if label.count(":") >= 3 and "unconfined" not in label:
        return [Finding(shown, "warning", f"SELinux confines its QEMU to {label.split(':')[2]}", _selinux_cure())]
    return []


# ---- who and what -------------------------------------------------------------------------------------------


def people() -> list[Finding]:
    """Who may use ringbar here."""
    try:
        members = grp.getgrnam(GROUP)
    except KeyError:
        detail = f"there is no group {GROUP}: only root may use clusters that root made, and the agent"
        return [Finding("group", "warning", detail, f"groupadd --system {GROUP}")]
    if os.geteuid() != 0 and members.gr_gid not in {os.getegid(), *os.getgroups()}:
        cure = f"usermod -aG {GROUP} $USER, and log in again"
        return [Finding("group", "warning", f"this user is not in the group {GROUP}", cure)]
    return [Finding("group", "ok", f"{GROUP}: its members may use clusters and the agent")]


def agent() -> list[Finding]:
    """Whether VMs keep what they were given."""
    from ringbar.host.agent.client import reachable

    if reachable(socket_path()):
        return [Finding("agent", "ok", f"listens at {socket_path()}")]
    detail = "does not run: commands do it all themselves, and a VM that comes back does not get its queues back"
    return [Finding("agent", "ok", f"{detail} (systemctl enable --now ringbar-agent.socket)")]
