# SPDX-License-Identifier: Apache-2.0
"""QEMU: hot-plug into running VMs over QMP, guest images, and a launcher for them."""

from __future__ import annotations

from ringbar.qemu.hotplug import AsyncVm, Function, Plugged, Vm, VmInfo

__all__ = ["AsyncVm", "Function", "Plugged", "Vm", "VmInfo"]
