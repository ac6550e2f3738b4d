# SPDX-License-Identifier: Apache-2.0
"""Newer software than the guests' image has, for a VM that plays the host: kernels with AF_XDP zero copy (virtio-net
from 6.11, igb from 6.14) and a QEMU that emulates igb (from 8.0), both from Debian's backports.

They are named by suite, so the newest there is today is taken, fetched with apt without touching the system's own apt
or packages, unpacked, and kept in the images' cache; an entry may be deleted at any time. A kernel is used with the
root file system of the guests' usual image: only the kernel and the ram disk's modules are others.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence

from ringbar.qemu import image as images

MIRROR = os.environ.get("RINGBAR_MIRROR") or "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
BUILDER = 1  # count up when the steps below change what is built

CLOUD = ("linux-image-cloud-amd64", "virtio_blk", "virtio_net")  # 37 MB
"""A kernel without drivers of real cards, and what its ram disk loads."""
FULL = ("linux-image-amd64", "virtio_pci", "virtio_blk", "virtio_net", "ext4", "igb")  # 121 MB


def kernel(base: images.Image, package: str, *modules: str, suite: str = "trixie-backports") -> images.Image:
    """The image ``base`` with the newest kernel of a suite; from the cache, else fetched and made (a few seconds)."""

    def make(work: pathlib.Path, made: pathlib.Path) -> None:
        tree = fetch(work, suite, [package], r"linux-(image|binary|modules)-[0-9].*")
        (file,) = [*tree.glob("usr/lib/modules/*/vmlinuz"), *tree.glob("boot/vmlinuz-*")]
        release = next(path.name for path in tree.glob("usr/lib/modules/*"))
        shutil.copyfile(file, made / "vmlinuz")
        (made / "initrd").write_bytes(_initrd(base.initrd.read_bytes(), tree, modules))
        (made / "recipe.json").write_text(json.dumps({"kernel": release, "suite": suite}))
        for same in (base.disk, base.key, base.directory / "host_ed25519.pub"):
            (made / same.name).symlink_to(same)

    return images.Image(kept("kernel", make, base.directory.name, suite, package, *modules))


def qemu(suite: str = "bookworm-backports") -> tuple[str, list[str]]:
    """A newer QEMU that runs with the libraries of the installed one: its program, and arguments it must be given."""

    def make(work: pathlib.Path, made: pathlib.Path) -> None:
        names = ["qemu-system-x86", "qemu-system-data", "seabios"]
        fetch(work, suite, names, "|".join(names)).rename(made / "tree")

    share = kept("qemu", make, suite) / "tree/usr/share"
    return str(share.parent / "bin/qemu-system-x86_64"), ["-L", str(share / "seabios"), "-L", str(share / "qemu")]


def kept(kind: str, make: Callable[[pathlib.Path, pathlib.Path], None], *recipe: str) -> pathlib.Path:
    """The directory of this recipe in the cache; made aside and renamed when it is complete."""
    name = hashlib.sha256(json.dumps([*recipe, BUILDER]).encode()).hexdigest()[:16]
    final = images.cache_directory() / f"{kind}-{name}"
    if not final.is_dir():
        with tempfile.TemporaryDirectory(prefix=f".{kind}-", dir=final.parent) as aside:
            made = pathlib.Path(aside) / "made"
            made.mkdir()
            make(pathlib.Path(aside), made)
            made.chmod(0o755)
            try:
                made.rename(final)
            except OSError:  # another process was faster: its is as good
                assert final.is_dir()
    return final


def fetch(work: pathlib.Path, suite: str, packages: Sequence[str], wanted: str) -> pathlib.Path:
    """Unpack Debian packages of a suite into a directory; the system's own apt and packages stay as they are.

    :param packages: of these and all they depend on, those whose names match ``wanted`` wholly.
    """
    for folder in ("lists/partial", "archives/partial", "debs", "tree"):
        (work / folder).mkdir(parents=True)
    (work / "sources.list").write_text(f"deb [signed-by={KEYRING}] {MIRROR} {suite} main\n")
    (work / "status").write_text("")
    (work / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{work}/sources.list"; Dir::Etc::sourceparts "/dev/null"; Dir::Cache "{work}";\n'
        f'Dir::State::lists "{work}/lists"; Dir::State::status "{work}/status";\n'
        'APT::Sandbox::User "root"; Acquire::Languages "none";\n'
    )
    environment = {**os.environ, "APT_CONFIG": str(work / "apt.conf")}

    def run(*words: str) -> str:
        done = subprocess.run(words, env=environment, cwd=work / "debs", capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    run("apt-get", "update", "-q")
    every = "--no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances".split()
    known = run("apt-cache", "depends", "--recurse", *every, *packages).splitlines()
    chosen = sorted({line.strip() for line in known if re.fullmatch(wanted, line)})
    run("apt-get", "download", "-q", *chosen)
    for deb in (work / "debs").glob("*.deb"):
        run("dpkg-deb", "-x", str(deb), str(work / "tree"))
    return work / "tree"


def _initrd(old: bytes, tree: pathlib.Path, modules: Sequence[str]) -> bytes:
    """The ram disk with this kernel's modules instead of those in it."""
    order = _load_order(tree, modules)
    listed = "".join(f"{name}.ko\n" for name, _ in order).encode()
    out = bytearray()
    kept = [entry for entry in _entries(old) if not re.search(rb"(\.ko|/modules|^modules)\0$", entry[1])]
    new = [
        *kept,
        *((_file(0o100644), f"{name}.ko\0".encode(), content) for name, content in order),
        (_file(0o100644), b"modules\0", listed),
        (_file(0), b"TRAILER!!!\0", b""),
    ]
    for inode, (fields, name, data) in enumerate(new, start=1):
        fields = [inode, *fields[1:6], len(data), *fields[7:11], len(name), 0]
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + name
        out += b"\0" * (-len(out) % 4)
        out += data + b"\0" * (-len(data) % 4)
    return bytes(out)


def _file(mode: int) -> list[int]:
    return [0, mode, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]


def _entries(cpio: bytes) -> Iterator[tuple[list[int], bytes, bytes]]:
    """The files of a "newc" archive: header fields, name, content."""
    at = 0
    while cpio[at : at + 6] == b"070701":
        fields = [int(cpio[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = cpio[at + 110 : at + 110 + fields[11]]
        data = at + 110 + fields[11] + (-(110 + fields[11]) % 4)
        if name == b"TRAILER!!!\0":
            return
        yield fields, name, cpio[data : data + fields[6]]
        at = data + fields[6] + (-fields[6] % 4)


def _load_order(tree: pathlib.Path, wanted: Sequence[str]) -> list[tuple[str, bytes]]:
    """Modules with what they need before them, as their own ``depends=`` says."""
    found = tree.glob("usr/lib/modules/*/kernel/**/*.ko*")
    files = {path.name.partition(".ko")[0].replace("-", "_"): path for path in found}
    order: dict[str, bytes] = {}

    def load(name: str) -> None:
        if name in order or name not in files:  # not a file: built in
            return
        content = files[name].read_bytes()
        content = lzma.decompress(content) if files[name].suffix == ".xz" else content
        needs = re.search(rb"\0depends=([^\0]*)\0", content)
        for needed in needs[1].decode().split(",") if needs else ():
            load(needed.replace("-", "_"))
        order[name] = content

    for name in wanted:
        load(name)
    return list(order.items())
