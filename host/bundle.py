# SPDX-License-Identifier: Apache-2.0
"""``ringbar guest-bundle``: this very installation as one archive to copy into a VM.

The archive holds a wheel, made anew from the installed package (so it works wherever ringbar does, with no source and
no compiler), the C part of cffi for the Pythons asked for, and a script that installs both without network or pip.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import io
import os
import pathlib
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence

import ringbar
from ringbar.cli.common import DONE, Output, add_json, examples
from ringbar.errors import Error

LEFT_OUT = {"__pycache__", "bench", "systemd", "grafana"}
"""Directories that only a host uses."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""When everything inside was made, as far as its readers know: the same input gives the same archive."""
EPOCH_SECONDS = 315532800

METADATA = """\
Metadata-Version: 2.1
Name: ringbar
Version: {version}
Summary: Packets in shared buffers, passed on as descriptors: zero copy across processes and virtual machines
License: Apache-2.0
Requires-Python: >=3.9
Requires-Dist: cffi>=1.14
Provides-Extra: numpy
Requires-Dist: numpy>=1.19; extra == "numpy"
"""
SCRIPTS = "[console_scripts]\nringbar = ringbar.cli:main\n"


def package_files() -> Iterator[tuple[str, bytes]]:
    """Names (below ``ringbar/``) and contents of what a guest needs of this installation, in order of names."""
    root = pathlib.Path(ringbar.__file__).absolute().parent
    found: dict[str, pathlib.Path] = {}
    for directory, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        for name in files:
            if name.endswith((".py", "py.typed", ".rules", ".service")) or re.search(r"\.so(\.\d+)?$", name):
                path = pathlib.Path(directory, name)
                found[path.relative_to(root).as_posix()] = path
    found.pop("libringbar.so", None)  # the compiler's name of libringbar.so.0
    for name in sorted(found):
        yield name, found[name].read_bytes()


def glibc_needed(library: bytes) -> tuple[int, int]:
    """The newest version of glibc that the symbols of a shared library ask for, from their names in it."""
    versions = [(int(a), int(b)) for a, b in re.findall(rb"GLIBC_(\d+)\.(\d+)", library)]
    return max(versions, default=(2, 17))


def wheel() -> tuple[str, bytes]:
    """Name and bytes of a wheel with this installation.

    Its tag says the oldest Python and glibc it runs with, as PEP 600 has it: https://peps.python.org/pep-0600/
    """
    files = {f"ringbar/{name}": data for name, data in package_files()}
    if "ringbar/_core.abi3.so" not in files:
        raise Error("this installation of ringbar has no C part", code="not-built", cure="make setup")
    newest = max(glibc_needed(data) for name, data in files.items() if ".so" in name)
    tag = f"cp39-abi3-manylinux_{newest[0]}_{newest[1]}_{platform.machine()}"
    about = f"ringbar-{ringbar.__version__}.dist-info"
    files[f"{about}/METADATA"] = METADATA.format(version=ringbar.__version__).encode()
    files[f"{about}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: ringbar\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()
    files[f"{about}/entry_points.txt"] = SCRIPTS.encode()
    record = "".join(f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in files.items())
    files[f"{about}/RECORD"] = f"{record}{about}/RECORD,,\n".encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = (0o100755 if ".so" in name else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return f"ringbar-{ringbar.__version__}-{tag}.whl", out.getvalue()


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def own_backend() -> tuple[str, bytes]:
    """The C part of cffi that this Python uses."""
    import _cffi_backend

    path = pathlib.Path(_cffi_backend.__file__)
    return f"_cffi_backend{sysconfig.get_config_var('EXT_SUFFIX')}", path.read_bytes()


def fetched_backend(version: str) -> tuple[str, bytes]:
    """The C part of cffi for another Python, from the Python package index.

    :param version: as ``"3.13"``.
    :raises Error: pip is missing, the index does not answer, or it has none.
    """
    machine = platform.machine()
    with tempfile.TemporaryDirectory(prefix="ringbar-bundle-") as directory:
        platforms = [f"--platform=manylinux{old}_{machine}" for old in ("2014", "_2_17", "_2_28")]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
             "--only-binary=:all:", "--implementation=cp", f"--python-version={version}", *platforms,
             f"--dest={directory}", "cffi"],
            capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        found = sorted(pathlib.Path(directory).glob("cffi-*.whl"))
        if done.returncode != 0 or not found:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
            raise Error(
                f"cffi for Python {version} could not be fetched: {lines[-1].strip()}",
                code="not-fetched",
                cure="connect this host to the Python package index, or let the VM have python3-cffi-backend",
            )
        with zipfile.ZipFile(found[0]) as archive:
            (name,) = [name for name in archive.namelist() if name.startswith("_cffi_backend.")]
            return name, archive.read(name)


def write(path: pathlib.Path, pythons: Sequence[str]) -> dict[str, object]:
    """Write the archive; what is in it. A file that cannot be written whole is not left behind.

    :param pythons: versions of Python to bring cffi for, besides this host's own.
    """
    name, built = wheel()
    files = {name: (built, 0o644)}
    folder = pathlib.Path(ringbar.__file__).parent / "guest"
    files["install"] = ((folder / "install.py").read_bytes(), 0o755)
    for name in ("70-ringbar.rules", "ringbar-bells.service"):
        files[name] = ((folder / name).read_bytes(), 0o644)
    mine = f"{sys.version_info[0]}.{sys.version_info[1]}"
    backends = {mine: own_backend(), **{v: fetched_backend(v) for v in pythons if v != mine}}
    for file, data in backends.values():
        files[f"backends/{file}"] = (data, 0o755)
    packed = io.BytesIO()
    top = f"ringbar-guest-{ringbar.__version__}"
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for file in sorted(files):
            data, mode = files[file]
            entry = tarfile.TarInfo(f"{top}/{file}")
            entry.size, entry.mode, entry.mtime = len(data), mode, EPOCH_SECONDS
            archive.addfile(entry, io.BytesIO(data))
    whole = gzip.compress(packed.getvalue(), mtime=EPOCH_SECONDS)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(whole)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise Error(
            f"{path} cannot be written: {error.strerror}", code="not-written", cure="another place: -o FILE"
        ) from None
    return {
        "file": str(path), "bytes": len(whole), "folder": top, "wheel": name, "wheel_bytes": len(built),
        "pythons": list(backends),
    }  # fmt: skip


# ---- the command ----------------------------------------------------------------------------------------------


def configure(_: str, parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``guest-bundle``."""
    parser.description = (
        "Packs this installation as one archive for VMs: no compiler, network or pip is needed there.\n"
        "In the VM, as root: tar xzf FILE && ringbar-guest-*/install"
    )
    parser.epilog = examples(
        "ringbar guest-bundle",
        "ringbar guest-bundle -o /srv/ringbar.tar.gz --python 3.13    also for VMs with Debian 13",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=pathlib.Path,
        help=f"the archive (default ringbar-guest-VERSION-{platform.machine()}.tar.gz here)",
    )  # fmt: skip
    parser.add_argument(
        "--python", metavar="VERSION", action="append", default=[], type=_version,
        help="bring cffi for this version of Python too, from the Python package index; may be repeated",
    )  # fmt: skip
    add_json(parser)
    parser.set_defaults(run=_run)


def _version(text: str) -> str:
    if not re.fullmatch(r"3\.(9|[1-9]\d)", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no version of Python that ringbar runs with: 3.9, 3.10, ...")
    return text


def _run(options: argparse.Namespace, out: Output) -> int:
    name = f"ringbar-guest-{ringbar.__version__}-{platform.machine()}.tar.gz"
    with out.progress() as progress:
        progress("packing")
        made = write(options.output or pathlib.Path(name), options.python)
    out.document(made)
    pythons = made["pythons"]
    assert isinstance(pythons, list)
    out.say(f"{made['file']}: ringbar {ringbar.__version__}, with cffi for Python {', '.join(pythons)}")
    out.say(f"in the VM, as root: tar xzf {pathlib.Path(str(made['file'])).name} && {made['folder']}/install")
    return DONE
