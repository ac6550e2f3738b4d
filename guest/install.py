#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Installs ringbar in this VM from the files beside it: no network, no compiler, no pip.

usage: ./install          as root, for all of this VM
       PYTHON=venv/bin/python ./install    into a virtual environment

`ringbar guest-bundle` packs this script with the wheel. It needs Python 3.9 and nothing else; `./install --remove`
takes everything away again.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile

HERE = pathlib.Path(__file__).resolve().parent
RULES = pathlib.Path("/etc/udev/rules.d/70-ringbar.rules")
UNIT = pathlib.Path("/etc/systemd/system/ringbar-bells.service")
TMPFILES = pathlib.Path("/etc/tmpfiles.d/ringbar.conf")
DIRECTORY = "# Where programs of this VM tell each other what they have open.\nd /run/ringbar 2770 root ringbar\n"
COMMAND = "#!{python}\nimport sys\nfrom ringbar.cli import main\nsys.exit(main())\n"


def fail(problem: str, cure: str) -> None:
    """End with one message and its cure."""
    sys.exit(f"install: {problem}\n  to mend it: {cure}")


def glibc() -> tuple[int, ...]:
    """The C library's version; nothing where it is not glibc."""
    try:
        found = re.search(r"(\d+)\.(\d+)", os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (OSError, ValueError):
        found = None
    return tuple(int(part) for part in found.groups()) if found else ()


def check(wheel: pathlib.Path) -> None:
    """Whether this VM can run the wheel at all."""
    if sys.version_info < (3, 9):  # noqa: UP036 - the one file that an older Python may be asked to run
        fail(f"this is Python {sys.version.split()[0]}, and ringbar needs 3.9", "PYTHON=python3.9 ./install")
    found = re.search(r"manylinux_(\d+)_(\d+)_(\w+)\.whl$", wheel.name)
    if found is None:
        fail(f"{wheel.name} has no name of a wheel", "make the bundle anew on the host: ringbar guest-bundle")
        return
    if found[3] != os.uname().machine:
        fail(f"this VM is a {os.uname().machine} and the bundle is for {found[3]}", "make it on a host of this kind")
    needed = (int(found[1]), int(found[2]))
    if glibc() < needed:
        have = ".".join(map(str, glibc())) or "another C library"
        fail(f"the bundle needs glibc {needed[0]}.{needed[1]}, and this VM has {have}", "make it on an older host")


def backend(into: pathlib.Path) -> pathlib.Path | None:
    """The C part of cffi: this Python's own, else the bundle's for this version; the file that is to be copied."""
    done = subprocess.run([sys.executable, "-c", "import _cffi_backend"], capture_output=True, cwd="/", check=False)
    if done.returncode == 0:
        return None
    name = f"_cffi_backend{sysconfig.get_config_var('EXT_SUFFIX')}"
    if (into / name).exists() or (HERE / "backends" / name).exists():
        return HERE / "backends" / name
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    fail(
        f"this Python {version} has no cffi, and the bundle has none for it",
        f"on the host: ringbar guest-bundle --python {version}; or here: apt-get install python3-cffi-backend",
    )
    return None


def remove(into: pathlib.Path, command: pathlib.Path) -> None:
    """Take away what an earlier run installed; a Debian package's files are elsewhere and stay."""
    if not virtual() and UNIT.exists() and pathlib.Path("/run/systemd/system").is_dir():
        subprocess.run(["systemctl", "stop", UNIT.name], capture_output=True, check=False)
    for path in [into / "ringbar", *into.glob("ringbar-*.dist-info")]:
        shutil.rmtree(path, ignore_errors=True)
    for path in [command, *([] if virtual() else [RULES, UNIT, TMPFILES])]:
        if path.exists():
            path.unlink()


def virtual() -> bool:
    """Whether this is the Python of a virtual environment, which nothing outside concerns."""
    return sys.prefix != sys.base_prefix


def open_to_group(python: str) -> None:
    """The group, the udev rule that gives it the devices, and the service for their interrupts."""
    if subprocess.run(["getent", "group", "ringbar"], capture_output=True, check=False).returncode != 0:
        subprocess.run(["groupadd", "--system", "ringbar"], check=True)
    if RULES.parent.parent.is_dir() or shutil.which("udevadm"):
        RULES.parent.mkdir(parents=True, exist_ok=True)
        RULES.write_text((HERE / RULES.name).read_text().replace("@PYTHON@", python))
    if UNIT.parent.is_dir():
        UNIT.write_text((HERE / UNIT.name).read_text().replace("@PYTHON@", python))
    if shutil.which("systemd-tmpfiles"):  # udev runs its programs without the right to make such a directory
        TMPFILES.parent.mkdir(parents=True, exist_ok=True)
        TMPFILES.write_text(DIRECTORY)
        subprocess.run(["systemd-tmpfiles", "--create", str(TMPFILES)], capture_output=True, check=False)
    if pathlib.Path("/run/systemd/system").is_dir():
        subprocess.run(["systemctl", "daemon-reload"], capture_output=True, check=False)
    if shutil.which("udevadm"):  # fails where udev does not run: then there is nothing to tell
        for words in (["control", "--reload"], ["trigger", "--action=add", "--attr-match=vendor=0x1af4"]):
            subprocess.run(["udevadm", *words], capture_output=True, check=False)


def main() -> None:
    """Install or remove; says where."""
    wanted = os.environ.get("PYTHON")
    if wanted and not os.environ.get("RINGBAR_INSTALLING"):
        python = shutil.which(wanted) or ""
        if not python:
            fail(f"there is no {wanted}", "PYTHON=/path/to/python3 ./install")
        os.execve(python, [python, __file__, *sys.argv[1:]], {**os.environ, "RINGBAR_INSTALLING": "1"})
    if sys.argv[1:] not in ([], ["--remove"]):
        sys.exit(str(__doc__).strip())
    into = pathlib.Path(site.getsitepackages()[0])
    command = pathlib.Path(sys.prefix if virtual() else "/usr/local") / "bin/ringbar"
    wheels = sorted(HERE.glob("ringbar-*.whl"))
    try:
        if sys.argv[1:]:
            remove(into, command)
            print(f"removed from {into}")
            return
        if len(wheels) != 1:
            fail(f"there is not one wheel in {HERE}", "unpack the bundle anew")
        check(wheels[0])
        needed = backend(into)
        into.mkdir(parents=True, exist_ok=True)
        command.parent.mkdir(parents=True, exist_ok=True)
        remove(into, command)
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(into)
        if needed is not None:
            shutil.copyfile(needed, into / needed.name)
        command.write_text(COMMAND.format(python=sys.executable))
        command.chmod(0o755)
        if not virtual():
            open_to_group(sys.executable)
    except PermissionError as error:
        fail(f"no permission to write {error.filename}", "run it as root, or with PYTHON=venv/bin/python")
    words = [sys.executable, str(command), "--version"]
    said = subprocess.run(words, capture_output=True, text=True, cwd="/", check=False)
    if said.returncode != 0:
        fail(f"what was installed does not start: {said.stderr.strip()}", "report it")
    print(f"installed ringbar {said.stdout.strip().split()[-1]} in {into}")


if __name__ == "__main__":
    main()
