# SPDX-License-Identifier: Apache-2.0
"""Guest images: a small Debian 12 (or another release) with Debian's stock cloud kernel, built once from packages and
kept in a cache.

What makes it start fast, also without hardware virtualisation:

- Debian's kernel, unchanged, is given to QEMU directly (no boot loader). Its initial ram disk is one static busybox
  and the virtio modules that reach the disk and the network.
- The root file system is one read-only ext4 file without a journal. Every VM writes to a throw-away overlay of its
  own (``snapshot=on``), so any number of VMs share one file and its page cache.
- busybox is the init: it mounts, sets the address and starts an SSH server whose host keys are in the image.

Building needs root, mmdebstrap and mke2fs, and takes half a minute to a minute. The result is named by a hash of its
recipe, made aside and renamed when it is complete: a build that fails or is interrupted leaves nothing behind.
Any image may be deleted while no VM uses it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import lzma
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Callable

from ringbar.errors import Error

SUITE = "bookworm"
KERNEL_PACKAGE = "linux-image-cloud-amd64"

#: What every image has. The libraries are those that libringbar links with.
PACKAGES = (
    "busybox-static",
    "dropbear-bin",
    "iproute2",
    "libbpf1",
    "libnuma1",
    "libpcap0.8",
    "libxdp1",
    "pciutils",
    "python3",
    "python3-cffi-backend",
    "udev",
)

#: What other suites call some of them.
RENAMED = {"trixie": {"libpcap0.8": "libpcap0.8t64"}}

#: What the initial ram disk loads, after what these need.
BOOT_MODULES = ("virtio_pci", "virtio_blk", "virtio_net")

GUEST_ADDRESS = "10.0.2.15"  # QEMU's user-mode network
GUEST_GATEWAY = "10.0.2.2"

#: The bootstrap runs with mounts and processes of its own, which all go when it, or this process, is killed: so what
#: is left of an interrupted build can be removed without meeting a mounted /proc or /dev in it.
ALONE = (
    *("setpriv", "--pdeathsig", "KILL", "--"),
    *("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--"),
)

#: Printed on the serial console when the SSH server listens.
UP_MARK = b"ringbar-guest: up"

_INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
while read -r module; do $b insmod "/$module"; done < /modules
$b mount -t ext4 -o noatime /dev/vda /root
if [ -b /dev/vdb ]; then $b tar -x -f /dev/vdb -C /root; fi
$b mount --move /dev /root/dev
exec $b switch_root /root /sbin/init
"""

_BOOT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc -o nosuid,nodev,noexec proc /proc
$b mount -t sysfs -o nosuid,nodev,noexec sys /sys
$b mount -t tmpfs -o nosuid,nodev,mode=755 run /run
$b mkdir -p /dev/pts /dev/shm /run/lock
$b mount -t devpts -o gid=5,mode=620,ptmxmode=666 pts /dev/pts
$b mount -t tmpfs -o nosuid,nodev shm /dev/shm
$b ifconfig lo 127.0.0.1 up
$b ifconfig eth0 {address} netmask 255.255.255.0 up
$b route add default gw {gateway}
read -r line < /proc/cmdline
case "$line" in *ringbar.name=*) line=${{line##*ringbar.name=}}; $b hostname "${{line%% *}}";; esac
dropbear -R -s -j -k -p 22 && echo "{mark}" > /dev/console
"""

_INITTAB = """::sysinit:/etc/ringbar-boot
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/busybox umount -a -r
"""


@dataclasses.dataclass(frozen=True)
class Image:
    """A finished image: paths of what QEMU and ssh need. Nothing in it changes after it was built."""

    directory: pathlib.Path

    @property
    def kernel(self) -> pathlib.Path:
        """Debian's kernel, as packaged."""
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> pathlib.Path:
        """The initial ram disk."""
        return self.directory / "initrd"

    @property
    def disk(self) -> pathlib.Path:
        """The root file system: raw ext4, no partition table; give it to QEMU with ``snapshot=on``."""
        return self.directory / "root.ext4"

    @property
    def key(self) -> pathlib.Path:
        """The private key that logs in as root."""
        return self.directory / "id_ed25519"

    @property
    def host_key(self) -> str:
        """The guest's public host key, one ``known_hosts`` entry without the host name."""
        return (self.directory / "host_ed25519.pub").read_text().strip()

    @property
    def kernel_release(self) -> str:
        """What ``uname -r`` says in the guest."""
        return str(json.loads((self.directory / "recipe.json").read_text())["kernel"])


def cache_directory() -> pathlib.Path:
    """``$RINGBAR_CACHE``, else /var/cache/ringbar for root, else ~/.cache/ringbar."""
    named = os.environ.get("RINGBAR_CACHE")
    if named:
        return pathlib.Path(named)
    return pathlib.Path("/var/cache/ringbar") if os.geteuid() == 0 else pathlib.Path.home() / ".cache" / "ringbar"


def _say(text: str) -> None:
    print(f"ringbar image: {text}", file=sys.stderr, flush=True)


def recipe(*, numpy: bool = False, packages: Sequence[str] = (), suite: str = SUITE) -> dict[str, object]:
    """Everything that decides what an image holds; its hash is the image's name.

    :param numpy: put Debian's python3-numpy in (55 MiB more on disk, no boot time).
    :param packages: more Debian packages.
    :param suite: the release of Debian, by its code name.
    """
    more = (*packages, *(("python3-numpy",) if numpy else ()))
    renamed = RENAMED.get(suite, {})
    return {
        "suite": suite,
        "mirror": os.environ.get("RINGBAR_MIRROR", ""),
        "kernel_package": KERNEL_PACKAGE,
        "packages": sorted({renamed.get(name, name) for name in (*PACKAGES, *more)}),
        "init": _INIT,
        "boot": _boot_text(),
        "inittab": _INITTAB,
        "modules": BOOT_MODULES,
        "builder": 2,  # count up when the steps below change what is built
    }


def _boot_text() -> str:
    return _BOOT.format(address=GUEST_ADDRESS, gateway=GUEST_GATEWAY, mark=UP_MARK.decode())


def ensure(*, numpy: bool = False, packages: Sequence[str] = (), suite: str = SUITE) -> Image:
    """The image of this recipe: from the cache, else built now (about a minute; says so on standard error).

    :raises Error: not root, a tool is missing, or a package cannot be fetched.
    """
    what = recipe(numpy=numpy, packages=packages, suite=suite)
    name = "guest-" + hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    cache = cache_directory()
    final = cache / name
    if final.is_dir():
        return Image(final)
    if os.geteuid() != 0:
        raise Error(f"building a guest image in {cache} needs root", code="no-permission", cure="run as root")
    for tool, package in (("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs"), ("ssh-keygen", "openssh-client")):
        if shutil.which(tool) is None:
            raise Error(f"{tool} is not installed", code="missing-tool", cure=f"apt-get install {package}")
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(cache / f"{name}.lock"):
        if final.is_dir():  # another process built it while this one waited
            return Image(final)
        for stale in cache.glob(f".{name}-*"):  # of a build that was killed: the lock says nobody builds now
            shutil.rmtree(stale)
        aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
        try:
            _build(aside, what)
            aside.rename(final)
        finally:
            for _ in range(100):  # killed processes may still be adding to it for a moment
                shutil.rmtree(aside, ignore_errors=True)
                if not aside.exists():
                    break
    _say(f"kept as {final}")
    return Image(final)


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is building this image; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str | os.PathLike[str]], **kwargs: object) -> None:
    """Run quietly; when it fails, its last lines become the error."""
    done = subprocess.run(  # type: ignore[call-overload]
        [os.fspath(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        **kwargs,
    )
    if done.returncode != 0:
        tool = os.fspath(next(part for part in command if part not in ALONE))
        tail = " | ".join(line.strip() for line in done.stdout.splitlines()[-6:] if line.strip())
        raise Error(
            f"building the guest image failed in {tool}: {tail}",
            code="image-build-failed",
            cure="check the network and apt's sources, or set RINGBAR_MIRROR to a Debian mirror that answers",
        )


def _build(aside: pathlib.Path, what: dict[str, object]) -> None:
    root, kernel = aside / "root", aside / "kernel"
    root.mkdir()
    kernel.mkdir()
    packages = what["packages"]
    assert isinstance(packages, list)
    guest = f"a guest of Debian {what['suite']}"
    _say(f"making {guest} of {len(packages)} packages and what they need; about a minute, only once")
    # The kernel is fetched and unpacked beside the root, not installed into it: installing would bring
    # initramfs-tools and build a ram disk that is thrown away. $MMDEBSTRAP_APT_CONFIG: apt as for the new root.
    fetch = (
        'export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"; set -eu; '
        f"real=$(apt-cache depends {KERNEL_PACKAGE} | sed -n 's/^ *Depends: \\(linux-image-[0-9].*\\)/\\1/p'); "
        f'cd "{kernel}"; apt-get -o APT::Sandbox::User=root download "$real"'
    )
    command = [
        *ALONE, "mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(packages)}",
        "--aptopt=APT::Install-Recommends false", "--aptopt=Acquire::Languages none",
        "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=path-exclude=/usr/share/info/*",
        f"--customize-hook={fetch}", str(what["suite"]), os.fspath(root),
    ]  # fmt: skip
    if what["mirror"]:
        command.append(str(what["mirror"]))
    _run(command, env={**os.environ, "TMPDIR": os.fspath(aside), "SOURCE_DATE_EPOCH": "0"})
    steps: list[tuple[str, Callable[[], None]]] = [
        ("unpacking the kernel", lambda: _kernel(aside, root, kernel, what)),
        ("writing keys and the init", lambda: _configure(aside, root)),
        ("making the ram disk", lambda: _initrd(aside, root)),
        ("making the file system", lambda: _disk(aside, root)),
    ]
    for text, step in steps:
        _say(text)
        step()
    shutil.rmtree(root)
    shutil.rmtree(kernel)
    (aside / "recipe.json").write_text(json.dumps(what, indent=1, sort_keys=True) + "\n")
    aside.chmod(0o755)


def _kernel(aside: pathlib.Path, root: pathlib.Path, kernel: pathlib.Path, what: dict[str, object]) -> None:
    for package in kernel.glob("*.deb"):
        _run(["dpkg-deb", "-x", package, kernel])
    modules = next(path for path in (kernel / "lib/modules", kernel / "usr/lib/modules") if path.is_dir())
    releases = sorted(path.name for path in modules.iterdir())
    if len(releases) != 1:
        raise Error(f"expected one kernel, the package brought {releases}", code="image-build-failed")
    shutil.copyfile(kernel / f"boot/vmlinuz-{releases[0]}", aside / "vmlinuz")
    shutil.copytree(modules, root / "usr/lib/modules", symlinks=True)
    _run(["chroot", root, "/bin/busybox", "depmod", releases[0]])
    what["kernel"] = releases[0]


def _configure(aside: pathlib.Path, root: pathlib.Path) -> None:
    for name, comment in (("id_ed25519", "ringbar guest login"), ("host_ed25519", "ringbar guest")):
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", aside / name])
    ssh = root / "root/.ssh"
    ssh.mkdir(mode=0o700, exist_ok=True)
    shutil.copyfile(aside / "id_ed25519.pub", ssh / "authorized_keys")
    (ssh / "authorized_keys").chmod(0o600)
    shutil.copyfile(aside / "host_ed25519", root / "tmp/host_ed25519")
    (root / "etc/dropbear").mkdir(exist_ok=True)
    keys = ["/tmp/host_ed25519", "/etc/dropbear/dropbear_ed25519_host_key"]
    _run(["chroot", root, "dropbearconvert", "openssh", "dropbear", *keys])
    (root / "tmp/host_ed25519").unlink()
    (aside / "host_ed25519").unlink()
    _script(root / "etc/ringbar-boot", _boot_text())
    (root / "etc/inittab").write_text(_INITTAB)
    (root / "etc/fstab").write_text("")
    (root / "etc/resolv.conf").write_text("nameserver 10.0.2.3\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    (root / "usr/sbin/init").symlink_to("/bin/busybox")
    applets = subprocess.run(["chroot", root, "busybox", "--list"], check=True, capture_output=True, text=True)
    for applet in applets.stdout.split():  # busybox fills in for what Debian's minimum lacks
        if not any(os.path.lexists(root / folder / applet) for folder in ("usr/bin", "usr/sbin")):
            (root / "usr/sbin" / applet).symlink_to("/bin/busybox")


def _script(path: pathlib.Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _load_order(dependencies: str, wanted: Sequence[str]) -> list[str]:
    """The files of the wanted modules and of all they need, each after what it needs itself.

    :param dependencies: the text of ``modules.dep``: ``file: file it needs ...``.
    """
    needs = {}
    for line in dependencies.splitlines():
        file, _, rest = line.partition(":")
        needs[file] = rest.split()
    order: list[str] = []

    def load(file: str) -> None:
        for needed in needs[file]:
            load(needed)
        if file not in order:
            order.append(file)

    for name in wanted:
        found = [file for file in needs if pathlib.PurePath(file).name in (f"{name}.ko", f"{name}.ko.xz")]
        if not found:
            raise Error(f"this kernel has no module {name}", code="image-build-failed")
        load(found[0])
    return order


def _initrd(aside: pathlib.Path, root: pathlib.Path) -> None:
    tree = root / "tmp/initrd"
    for name in ("bin", "dev", "root"):
        (tree / name).mkdir(parents=True)
    shutil.copyfile(root / "bin/busybox", tree / "bin/busybox")
    (tree / "bin/busybox").chmod(0o755)
    (modules,) = (root / "usr/lib/modules").iterdir()
    built_in = {pathlib.PurePath(line).stem for line in (modules / "modules.builtin").read_text().splitlines()}
    wanted = [name for name in BOOT_MODULES if name not in built_in]
    order = _load_order((modules / "modules.dep").read_text(), wanted)
    names = []
    for module in map(pathlib.PurePath, order):
        names.append(module.name.removesuffix(".xz"))
        whole = (modules / module).read_bytes()
        (tree / names[-1]).write_bytes(lzma.decompress(whole) if module.suffix == ".xz" else whole)
    (tree / "modules").write_text("".join(f"{name}\n" for name in names))
    _script(tree / "init", _INIT)
    os.mknod(tree / "dev/console", 0o600 | 0o020000, os.makedev(5, 1))
    pack = "cd /tmp/initrd && busybox find . | busybox cpio -o -H newc > /tmp/initrd.cpio"
    _run(["chroot", root, "/bin/busybox", "sh", "-c", pack])
    (root / "tmp/initrd.cpio").rename(aside / "initrd")
    shutil.rmtree(tree)


def _disk(aside: pathlib.Path, root: pathlib.Path) -> None:
    used = sum(path.lstat().st_blocks for path in root.rglob("*")) // 2  # KiB
    size = used + used // 5 + 512 * 1024  # half a GiB to write in; the file is sparse
    features = "^has_journal,^metadata_csum_seed,^orphan_file"
    _run([
        "mke2fs", "-q", "-t", "ext4", "-O", features, "-m", "0", "-E", "root_owner=0:0", "-d", root,
        aside / "root.ext4", f"{size}k",
    ])  # fmt: skip
