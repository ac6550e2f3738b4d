# SPDX-License-Identifier: Apache-2.0
"""Opens ringbar's devices in a VM to programs that are not root: ``python3 -m ringbar.guest.prepare [DEVICE...]``.

udev runs it as root for each device that comes (``70-ringbar.rules``). It does what such a program could not do itself:
it moves BARs that need it (:mod:`ringbar.guest.rescue`), enables the device, and gives the group ``ringbar`` the
file that maps it. For a doorbell it starts the service that hands out its interrupts (:mod:`ringbar.guest.bells`).
Devices whose memory is not ringbar's are left as they are.

What it cannot hand on is write-back memory: that comes from ``/dev/mem``, and whoever may open ``/dev/mem`` may do
anything. A program that is to have it without being root gets the capability from its service; ``docs/guest.md``
has the lines.
"""

from __future__ import annotations

import contextlib
import grp
import mmap
import os
import pathlib
import struct
import subprocess
import sys
from collections.abc import Sequence

from ringbar.attach import MAGIC
from ringbar.errors import Error, NotFound
from ringbar.guest import bells, pci
from ringbar.guest.mapping import open_segment

GROUP = "ringbar"
SERVICE = "ringbar-bells.service"
RUN = pathlib.Path("/run/ringbar")


def kind_of(device: pci.Device) -> int:
    """Which kind of ringbar's segments the memory of a device is; 0: none.

    :raises Error: it cannot be mapped; the message says why.
    """
    segment = open_segment(device, writable=False)
    try:
        with mmap.mmap(
            segment.fd, mmap.PAGESIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=segment.offset
        ) as page:
            magic, _, kind = struct.unpack_from("<8sII", page)
            return int(kind) if magic == MAGIC else 0
    finally:
        os.close(segment.fd)


def prepare(device: pci.Device, group: int) -> bool:
    """Give one device room, enable it and open it to a group; False for a device of another maker.

    :raises Error: not root, or there is no room for its memory; the message says which.
    """
    kind = kind_of(device)
    if not kind:
        return False
    resource = pci.get(device.name).resource  # its place may have changed
    os.chown(resource, 0, group)
    resource.chmod(0o660)
    if kind == bells.KIND and os.path.isdir("/run/systemd/system"):
        subprocess.run(["systemctl", "start", "--no-block", SERVICE], capture_output=True, check=False)
    return True


def _run_directory(group: int) -> None:
    """Where programs of one VM tell each other what they have open."""
    RUN.mkdir(mode=0o770, exist_ok=True)
    now = RUN.stat()
    if (now.st_uid, now.st_gid, now.st_mode & 0o7777) != (0, group, 0o2770):
        os.chown(RUN, 0, group)
        RUN.chmod(0o2770)  # systemd's udev may not do that; where systemd is, tmpfiles.d has made the directory


def main(names: Sequence[str]) -> int:
    """Prepare the devices of these names, or all; one line for each that could not be.

    :returns: the exit status: 0 when all are ready.
    """
    try:
        group = grp.getgrnam(GROUP).gr_gid
    except KeyError:
        print(f"ringbar: there is no group {GROUP}\n  to mend it: groupadd --system {GROUP}", file=sys.stderr)
        return 1
    failed = False
    try:
        _run_directory(group)
        # Of one that went meanwhile there is nothing to say.
        devices = []
        for name in names:
            with contextlib.suppress(NotFound):
                devices.append(pci.get(name))
        for device in devices if names else pci.find():
            try:
                prepare(device, group)
            except NotFound:
                continue
            except Error as error:
                failed = True
                print(f"ringbar: {error.message}\n  to mend it: {error.cure}", file=sys.stderr)
    except PermissionError as error:
        print(f"ringbar: no permission to {error.filename}\n  to mend it: run it as root", file=sys.stderr)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
