# SPDX-License-Identifier: Apache-2.0
"""Letting a QEMU that runs as another user open memory that is handed to it.

QEMU opens a descriptor that it was given anew, by ``/proc/self/fd/N``, and the kernel then looks at the file's owner
and mode: a QEMU of libvirt runs as ``libvirt-qemu`` and may not open a segment, which belongs to root and group
``ringbar`` with mode 0660. So for the moment of opening, and only then, the segment belongs to QEMU's user.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import stat
from collections.abc import Iterator

from ringbar.errors import Error

_CAP_DAC_OVERRIDE = 1


def _credentials(pid: int) -> tuple[int, set[int], int] | None:
    """User, groups and effective capabilities of a process; None when it is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            text = file.read()
    except OSError:
        return None
    found = {name: rest.split() for name, rest in re.findall(r"^(Uid|Gid|Groups|CapEff):(.*)$", text, re.MULTILINE)}
    groups = {int(found["Gid"][3]), *map(int, found.get("Groups", []))}
    return int(found["Uid"][3]), groups, int(found["CapEff"][0], 16)


def may_open(pid: int, status: os.stat_result, readonly: bool) -> bool:
    """Whether a process may open a file with this owner and mode (of access control lists nothing is known)."""
    who = _credentials(pid)
    if who is None:
        return True             # gone, which somebody else will notice
    user, groups, capabilities = who
    wanted = 4 if readonly else 6
    mode = stat.S_IMODE(status.st_mode)
    if user == status.st_uid:
        have = mode >> 6
    elif status.st_gid in groups:
        have = mode >> 3
    else:
        have = mode
    return have & wanted == wanted or bool(capabilities >> _CAP_DAC_OVERRIDE & 1)


def user_of(pid: int) -> str:
    """The user of a process, for people."""
    who = _credentials(pid)
    if who is None:
        return "unknown"
    try:
        return pwd.getpwuid(who[0]).pw_name
    except KeyError:
        return f"user {who[0]}"


@contextlib.contextmanager
def openable(fd: int, pid: int, readonly: bool, what: str) -> Iterator[None]:
    """While inside, the process may open the file behind the descriptor; owner and mode are as before afterwards.

    :param what: the file, for the message.
    :raise Error: ``no-permission``: we may not give it away.
    """
    before = os.fstat(fd)
    who = _credentials(pid)
    if who is None or may_open(pid, before, readonly):
        yield
        return
    try:
        os.fchown(fd, who[0], -1)
    except OSError:
        raise Error(f"QEMU runs as {user_of(pid)} and may not open the memory of {what}", code="no-permission",
                    cure=f"run ringbar as root (sudo), or as {user_of(pid)}") from None
    try:
        yield
    finally:
        os.fchown(fd, before.st_uid, -1)
        os.fchmod(fd, stat.S_IMODE(before.st_mode))
