# SPDX-License-Identifier: Apache-2.0
"""``ringbar guest-bundle`` in VMs that never saw this source: installed with nothing at hand, used without root."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from vmtools import READY, Shell, read_line, vm

from ringbar.qemu import image as images
from ringbar.qemu.launch import Guest

pytestmark = pytest.mark.vm

PACKETS = 20_000
NOT_ROOT = "busybox su watcher -s /bin/sh -c"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ringbar.host import bundle as made

    file = tmp_path_factory.mktemp("bundle") / "ringbar.tar.gz"
    made.write(file, ["3.13"])
    return file


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def guest(request: pytest.FixtureRequest, bundle: Path) -> Iterator[Guest]:
    """A VM with Debian's packages alone, udev at work, and the bundle installed by its own script."""
    request.getfixturevalue("start_guest")  # skips where no VM can be started
    # Debian 13 without its package of cffi's C part: the bundle's is used.
    with Guest.start(request.param, image=images.ensure(suite=request.param)) as guest:
        guest.wait_up()
        if request.param == "trixie":
            guest.ssh("rm /usr/lib/python3/dist-packages/_cffi_backend*.so")
        guest.ssh("/lib/systemd/systemd-udevd --daemon")
        guest.copy({"/root/ringbar.tar.gz": bundle})
        said = guest.ssh("cd /root && tar xzf ringbar.tar.gz && ringbar-guest-*/install")
        assert said.stdout.startswith("installed ringbar "), said.stdout
        guest.ssh("useradd --no-create-home -G ringbar watcher && useradd --no-create-home stranger")
        yield guest


def test_who_is_not_root_receives_once_udev_has_opened_the_device(shell: Shell, guest: Guest) -> None:
    shell.cluster()
    shell("attach", vm(guest), "99@0")
    guest.ssh("udevadm settle")
    files = "lspci -D -n -d 1af4:1110 | sed 's,\\(^[^ ]*\\).*,/sys/bus/pci/devices/\\1/resource2,'"
    opened = guest.ssh(f"stat -c '%G %a' $({files})")
    assert opened.stdout.split() == ["ringbar", "660"] * 2
    count = f"{NOT_ROOT} 'exec ringbar count -i 99@0 --verify --packets {PACKETS} --json' watcher"
    process = guest.popen(count, stdout=-1, stderr=-1, text=True)
    said = ""
    while not any(sign in said for sign in READY):
        said += read_line(process, 30, process.stderr)
    shell.json("send", "-o", "99@0", "--packets", str(PACKETS))
    out, err = process.communicate(timeout=60)
    document = json.loads(out)
    assert document["received"]["packets"] == PACKETS and document["verify"]["lost"] == 0, err
    shell.comes_home()
    shell.detach(guest)


def test_a_service_with_the_one_capability_has_write_back_memory(shell: Shell, guest: Guest) -> None:
    shell.cluster()
    shell("attach", vm(guest), "99@0")
    guest.ssh("udevadm settle; chgrp kmem /dev/mem; chmod 660 /dev/mem")
    code = (
        "from ringbar.guest import find, open_segment; "
        "print([open_segment(device, writable=False).memory_type for device in find()])"
    )
    service = (
        "setpriv --reuid watcher --regid ringbar --groups ringbar,kmem --inh-caps +sys_rawio --ambient-caps +sys_rawio"
    )
    try:
        assert "write-back" not in guest.ssh(f"{NOT_ROOT} \"python3 -c '{code}'\" watcher").stdout
        found = guest.ssh(f"{service} python3 -c '{code}'").stdout
        assert found.strip() == str(["write-back"] * 2)
    finally:
        guest.ssh("chmod 640 /dev/mem")
    shell.detach(guest)


def test_who_is_not_in_the_group_is_told_so(shell: Shell, guest: Guest) -> None:
    shell.cluster()
    shell("attach", vm(guest), "99@0")
    guest.ssh("udevadm settle")
    done = guest.ssh("busybox su stranger -s /bin/sh -c 'ringbar count -i 99@0 --json'", check=False)
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 1 and error["code"] == "no-permission" and "ringbar" in error["cure"]
    shell.detach(guest)


def test_another_makers_device_keeps_its_rights(guest: Guest) -> None:
    from vmtools import monitor

    monitor(guest, "object-add", **{"qom-type": "memory-backend-ram", "id": "foreign", "size": 1 << 20, "share": True})
    monitor(guest, "device_add", driver="ivshmem-plain", id="foreign0", memdev="foreign", addr="0x1c")
    found = "/sys/bus/pci/devices/0000:00:1c.0/resource2"
    guest.ssh(f"for i in $(seq 50); do [ -e {found} ] && break; sleep 0.1; done; udevadm settle")
    assert guest.ssh(f"stat -c '%G %a' {found}").stdout.split() == ["root", "600"]


def test_installed_again_and_removed_nothing_stays(guest: Guest) -> None:
    for _ in range(2):
        guest.ssh("cd /root && ringbar-guest-*/install")
    guest.ssh("cd /root && ringbar-guest-*/install --remove")
    left = guest.ssh("find /usr /etc -path '*dist-packages/ringbar*' -o -name '70-ringbar*' -o -path '*bin/ringbar'")
    assert left.stdout == ""
    guest.ssh("cd /root && ringbar-guest-*/install")


def test_a_python_without_cffi_is_told_where_to_get_it(guest: Guest) -> None:
    files = "$(ls -d /usr/l*/python3/dist-packages/_cffi_backend* /usr/local/lib/python3*/dist-packages/_cffi_backend*)"
    guest.ssh(f"mv /root/ringbar-guest-*/backends /root/aside; tar cf /root/cffi.tar {files}; rm {files}")
    try:
        done = guest.ssh("cd /root && ringbar-guest-*/install", check=False)
        assert done.returncode == 1 and "ringbar guest-bundle --python 3." in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        guest.ssh("mv /root/aside /root/ringbar-guest-*/backends; tar xf /root/cffi.tar -C /")
