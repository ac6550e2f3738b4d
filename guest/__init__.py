# SPDX-License-Identifier: Apache-2.0
"""The guest's side: finds ringbar's shared memory among the PCI devices and opens it for mapping.

Only the standard library is needed, and no kernel module.
"""

from __future__ import annotations

from ringbar.guest.mapping import Segment, memory_type_of, open_segment, verify
from ringbar.guest.pci import Device, find, is_guest
from ringbar.guest.uevent import wait_for_device

__all__ = [
    "Device",
    "Segment",
    "find",
    "is_guest",
    "memory_type_of",
    "open_segment",
    "verify",
    "wait_for_device",
]
