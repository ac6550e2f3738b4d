# SPDX-License-Identifier: Apache-2.0
"""A doorbell device under vfio-pci: its interrupts as event descriptors, and one that rings the host when written to.

vfio needs a virtual IOMMU that remaps interrupts. The device does no DMA; of the IOMMU only that is used. The other
functions of its slot are in the same IOMMU group and stay without a driver, which vfio allows, so nothing changes for
programs that have mapped them.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import pathlib
import struct
import subprocess
import time

from ringbar.errors import Error
from ringbar.guest.pci import SYSFS, Device

MODULES = ("vfio-pci", "vfio_iommu_type1")
OPEN_TIMEOUT = 5.0
"""Seconds that another user of the group has to let go of it."""

# <linux/vfio.h>
_TYPE1 = 1
_BAR0, _CONFIG = 0, 7
_MSIX, _RELEASE = 2, 4
_DATA_EVENTFD, _ACTION_TRIGGER = 1 << 2, 1 << 5
_SET_IOMMU, _GROUP_STATUS, _SET_CONTAINER, _DEVICE_FD = 102, 103, 104, 106
_REGION_INFO, _IRQ_INFO, _SET_IRQS, _IOEVENTFD = 108, 109, 110, 116
_VIABLE = 1

_COMMAND, _MEMORY_AND_MASTER = 4, 6     # of the PCI configuration space
_DOORBELL = 12                          # of BAR 0: peer << 16 | vector


def event() -> int:
    """A new event descriptor; os.eventfd is not in Python 3.9."""
    fd: int = ctypes.CDLL(None, use_errno=True).eventfd(0, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def _ioctl(fd: int, number: int, argument: bytearray | int) -> int:
    return fcntl.ioctl(fd, 0x3B << 8 | number, argument)


def _bind(device: Device) -> None:
    """Have vfio-pci take the device, and no other of its kind."""
    if (device.path / "driver").exists():
        return
    if not (SYSFS / "bus/pci/drivers/vfio-pci").exists() or not pathlib.Path("/dev/vfio/vfio").exists():
        subprocess.run(["modprobe", "-a", *MODULES], capture_output=True, check=False)
    if not (SYSFS / "bus/pci/drivers/vfio-pci").exists():
        raise Error("this VM's kernel has no vfio-pci", code="no-vfio", cure="modprobe -a vfio-pci vfio_iommu_type1")
    (device.path / "driver_override").write_text("vfio-pci")
    (SYSFS / "bus/pci/drivers_probe").write_text(device.name)


def _group(device: Device) -> str:
    try:
        return os.path.basename(os.readlink(device.path / "iommu_group"))
    except OSError:
        raise Error(
            "this VM's kernel does not use a virtual IOMMU", code="no-iommu",
            cure="boot it with intel_iommu=on, on a VM that has one (docs/guest.md)",
        ) from None


class Doorbell:
    """One doorbell device, in use by this process; no other can open it meanwhile.

    :ivar released: becomes readable when the kernel wants the device back: it is being unplugged. Then close.
    """

    def __init__(self, device: Device, peer: int, vector: int, vectors: int) -> None:
        """:param peer: the host's number in ivshmem's protocol, and ``vector`` its interrupt.

        :param vectors: the device's own.
        :raises Error: this VM cannot; the message says what is missing.
        """
        self.device = device
        self._open: list[int] = []
        try:
            group = _group(device)
            _bind(device)
            self._fd = self._device(group, device.name)
            self.ring = self._event()
            self.released = self._event()
            self._start(peer, vector, vectors)
        except OSError as error:
            self.close()
            raise Error(
                f"vfio does not give {device.name}: {error.strerror}", code="no-vfio",
                cure="dmesg | grep -i -e vfio -e dmar says why; interrupt remapping is needed",
            ) from None
        except BaseException:
            self.close()
            raise

    def _event(self) -> int:
        self._open.append(event())
        return self._open[-1]

    def _device(self, group: str, name: str) -> int:
        deadline = time.monotonic() + OPEN_TIMEOUT
        while True:
            try:
                self._open.append(os.open(f"/dev/vfio/{group}", os.O_RDWR | os.O_CLOEXEC))
                break
            except OSError:     # its node is just being made, or a predecessor just ending
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        status = bytearray(struct.pack("II", 8, 0))
        _ioctl(self._open[-1], _GROUP_STATUS, status)
        if not struct.unpack("II", status)[1] & _VIABLE:
            raise Error(f"another device of the IOMMU group of {name} has a driver", code="no-vfio",
                        cure=f"ls /sys/kernel/iommu_groups/{group}/devices")
        container = os.open("/dev/vfio/vfio", os.O_RDWR | os.O_CLOEXEC)
        self._open.insert(0, container)     # closed last
        group_fd = self._open[1]
        _ioctl(group_fd, _SET_CONTAINER, bytearray(struct.pack("i", container)))
        _ioctl(container, _SET_IOMMU, _TYPE1)
        self._open.append(_ioctl(group_fd, _DEVICE_FD, bytearray(name.encode() + b"\0")))
        return self._open[-1]

    def _region(self, index: int) -> int:
        info = bytearray(struct.pack("IIIIQQ", 32, 0, index, 0, 0, 0))
        _ioctl(self._fd, _REGION_INFO, info)
        return int(struct.unpack("IIIIQQ", info)[5])

    def _start(self, peer: int, vector: int, vectors: int) -> None:
        """Without bus mastering its interrupts vanish without a word."""
        at = self._region(_CONFIG) + _COMMAND
        (command,) = struct.unpack("<H", os.pread(self._fd, 2, at))
        os.pwrite(self._fd, struct.pack("<H", command | _MEMORY_AND_MASTER), at)
        self._irqs(_MSIX, 0, [-1] * vectors)        # all are set up now: a kernel before 6.5 cannot add any later
        self._irqs(_RELEASE, 0, [self.released])
        ring = struct.pack("IIQQii", 32, 4, self._region(_BAR0) + _DOORBELL, peer << 16 | vector, self.ring, 0)
        _ioctl(self._fd, _IOEVENTFD, bytearray(ring))

    def _irqs(self, index: int, start: int, fds: list[int]) -> None:
        head = struct.pack("IIIII", 20 + 4 * len(fds), _DATA_EVENTFD | _ACTION_TRIGGER, index, start, len(fds))
        _ioctl(self._fd, _SET_IRQS, bytearray(head + struct.pack(f"{len(fds)}i", *fds)))

    def interrupt(self, vector: int, fd: int) -> None:
        """From now on this interrupt is counted in that event descriptor; -1: in none."""
        self._irqs(_MSIX, vector, [fd])

    def close(self) -> None:
        """Give the device back. Event descriptors of others stay, and nothing writes to them any more."""
        while self._open:
            os.close(self._open.pop())
