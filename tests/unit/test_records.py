# SPDX-License-Identifier: Apache-2.0
"""What the registry keeps of attachments is for the whole group ``ringbar``, whoever came first."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from ringbar.host import records, wanted
from ringbar.host.native import RX
from ringbar.host.topology import owned
from ringbar.host.vms import Name


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_every_file_is_the_groups_whatever_the_umask(umask: int) -> None:
    before = os.umask(umask)
    try:
        with records.locked("qmp:/run/a.qmp"):
            records.write(records.Record("qmp:/run/a.qmp", 99, "plugged", "1:1", 1, 0, "ro"))
        wanted.add(Name("qmp:/run/a.qmp"), {99: [(0, RX)]}, None)
        with owned.locked("ids"):
            owned.save(owned.Owned("ids", clusters={99}))
    finally:
        os.umask(before)
    seen = 0
    for name in ("attachments", "wanted", "topologies"):
        directory = records.run_directory() / name
        assert mode(directory) == 0o2770, directory
        for path in directory.iterdir():
            seen += 1
            assert mode(path) == 0o660, path
    assert seen == 5


def test_a_lock_of_an_older_release_is_opened_to_the_group() -> None:
    records.folder().mkdir()
    (records.folder() / "lock").touch(0o640)
    with records.locked("qmp:/run/a.qmp"):
        assert mode(records.folder() / "lock") == 0o660


def test_a_member_of_the_group_locks_what_another_made() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root becomes another user")
    with records.locked("qmp:/run/a.qmp"):
        pass
    os.chown(records.folder(), -1, 4242)
    os.chown(records.folder() / "lock", -1, 4242)
    records.run_directory().parent.chmod(0o755)
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(4242)
            os.setuid(4343)
            with records.locked("qmp:/run/a.qmp", timeout=0.0):
                os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
