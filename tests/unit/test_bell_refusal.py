# SPDX-License-Identifier: Apache-2.0
"""Which VMs can have interrupts: what QEMU says of its devices, and what is made of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ringbar.qemu.bell import refusal


class Qemu:
    """Answers as QEMU's monitor does, for a VM with these devices."""

    def __init__(self, devices: dict[str, dict[str, Any]], types: bool = True) -> None:
        self.devices = devices
        self.types = types

    async def execute(self, command: str, **arguments: Any) -> Any:
        assert (command, arguments) == ("qom-list-types", {"implements": "ivshmem-doorbell"})
        return [{"name": "ivshmem-doorbell"}] if self.types else []

    async def qom_list(self, path: str) -> dict[str, str]:
        return {name: f"child<{name}>" for name in self.devices} if path.endswith("-anon") else {"type": "string"}

    async def qom_get(self, path: str, name: str, default: Any = None) -> Any:
        return self.devices[path.rpartition("/")[2]].get(name, default)


@pytest.mark.parametrize(
    ("devices", "why"),
    [
        ({"intel-iommu": {"intremap": "on"}}, None),
        ({"virtio-net-pci": {}, "amd-iommu": {"intremap": "on"}}, None),
        ({}, "no virtual IOMMU"),
        ({"virtio-net-pci": {}}, "no virtual IOMMU"),
        ({"intel-iommu": {"intremap": "off"}}, "does not remap"),
        ({"virtio-iommu-pci": {}}, "does not remap"),
    ],
)
def test_a_vm_needs_an_iommu_that_remaps_interrupts(devices: dict[str, dict[str, Any]], why: str | None) -> None:
    found = asyncio.run(refusal(Qemu(devices)))  # type: ignore[arg-type]
    if why is None:
        assert found is None
    else:
        assert found is not None and why in found.why and found.cure


def test_a_qemu_without_the_device() -> None:
    found = asyncio.run(refusal(Qemu({"intel-iommu": {"intremap": "on"}}, types=False)))  # type: ignore[arg-type]
    assert found is not None and "ivshmem-doorbell" in found.why
