# SPDX-License-Identifier: Apache-2.0
"""The AF_XDP plug-in on veth pairs in network namespaces: bytes, modes, death of the owner, clean-up, errors.

Builds the plug-in and tests/c/test_xdp.c with the address and undefined-behaviour sanitizers, unless
RINGBAR_XDP_PLUGIN and RINGBAR_XDP_TEST name a plug-in and a driver program that are built already.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple, TypeVar

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "shared" / "csrc"
CLONE_NEWNET = 0x40000000
PORT = 9
SOURCES = ("xdp_plugin.c", "xdp_nic.c", "xdp_rule.c", "xdp_socket.c", "xdp_steer.c", "xdp_attach.c", "xdp_scan.c")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and XDP need root")

T = TypeVar("T")


class Built(NamedTuple):
    """The two things that were compiled."""

    plugin: str
    program: str


class Net(NamedTuple):
    """Two namespaces joined by veth pairs: a0, c0 and the many-queue m0 in ``near``; a1, c1 and m1 in ``far``."""

    near: str
    far: str


def run(*command: str, check: bool = True) -> str:
    """Run a command; its standard output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def in_netns(name: str, what: Callable[[], T]) -> T:
    """Call ``what`` in a thread of that network namespace; sockets that it makes stay there."""
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            with open(f"/run/netns/{name}", "rb") as ns:
                if ctypes.CDLL(None, use_errno=True).setns(ns.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            result.append(what())
        except BaseException as e:  # handed to the caller's thread
            failure.append(e)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The plug-in and its driver, compiled as shared/csrc/meson_xdp.txt says, with sanitizers."""
    given = os.environ.get("RINGBAR_XDP_PLUGIN"), os.environ.get("RINGBAR_XDP_TEST")
    if given[0] and given[1]:
        return Built(given[0], given[1])
    for tool in ("gcc", "clang"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    if not Path("/usr/include/xdp/libxdp.h").exists():
        pytest.skip("libxdp's headers are not installed (apt-get install libxdp-dev libbpf-dev)")
    out = tmp_path_factory.mktemp("xdp")
    arch = run("gcc", "-print-multiarch").strip()
    obj = out / "ringbar_xdp.bpf.o"
    run(
        "clang",
        "-O2",
        "-g",
        "-target",
        "bpf",
        "-Wall",
        "-Werror",
        "-idirafter",
        f"/usr/include/{arch}",
        "-c",
        str(CSRC / "ringbar_xdp.bpf.c"),
        "-o",
        str(obj),
    )
    numbers = ",".join(map(str, obj.read_bytes()))
    (out / "xdp_object.h").write_text(
        f"static const unsigned char xdp_object[] __attribute__((aligned(8))) = {{{numbers}}};\n"
    )
    common = [
        "gcc",
        "-std=gnu11",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        f"-I{CSRC}",
        f"-I{out}",
    ]
    plugin, program = out / "libringbar-xdp.so", out / "test_xdp"
    run(
        *common,
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        *(str(CSRC / f) for f in SOURCES),
        "-o",
        str(plugin),
        "-lxdp",
        "-lbpf",
    )
    run(*common, str(ROOT / "tests" / "c" / "test_xdp.c"), "-o", str(program), "-ldl", "-lpthread")
    return Built(str(plugin), str(program))


@pytest.fixture
def net() -> Iterator[Net]:
    """Fresh namespaces and links; all is gone afterwards."""
    net = Net(f"rbx{os.getpid()}n", f"rbx{os.getpid()}f")
    mounted_before = os.path.ismount("/sys/fs/bpf")
    try:
        for ns in net:
            run("ip", "netns", "add", ns)
            for scope in ("all", "default"):  # no router solicitations among our packets
                run("ip", "netns", "exec", ns, "sysctl", "-qw", f"net.ipv6.conf.{scope}.disable_ipv6=1", check=False)
        for number, (name, queues) in enumerate((("a", 1), ("c", 1), ("m", 4))):
            many = ["numtxqueues", str(queues), "numrxqueues", str(queues)]
            run(
                "ip",
                "-n",
                net.near,
                "link",
                "add",
                f"{name}0",
                *many,
                "type",
                "veth",
                "peer",
                "name",
                f"{name}1",
                *many,
                "netns",
                net.far,
            )
            mac = {}
            for ns, end in ((net.near, 0), (net.far, 1)):
                dev = f"{name}{end}"
                run("ip", "-n", ns, "addr", "add", f"10.99.{number}.{end + 1}/24", "dev", dev)
                run("ip", "-n", ns, "link", "set", dev, "up")
                mac[end] = json.loads(run("ip", "-n", ns, "-j", "link", "show", "dev", dev))[0]["address"]
            for ns, end in ((net.near, 0), (net.far, 1)):
                run(
                    "ip",
                    "-n",
                    ns,
                    "neigh",
                    "replace",
                    f"10.99.{number}.{2 - end}",
                    "lladdr",
                    mac[1 - end],
                    "dev",
                    f"{name}{end}",
                    "nud",
                    "permanent",
                )
        yield net
    finally:
        for ns in net:
            run("ip", "netns", "del", ns, check=False)
        pins = Path("/sys/fs/bpf/xdp")
        if not mounted_before and os.path.ismount("/sys/fs/bpf") and not (pins.exists() and any(pins.iterdir())):
            run("umount", "/sys/fs/bpf", check=False)


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """At least 16 free huge pages of 2 MiB; what was added is taken away."""
    setting = Path("/proc/sys/vm/nr_hugepages")

    def free() -> int:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("HugePages_Free"))

    added = max(0, 16 - free())
    setting.write_text(str(int(setting.read_text()) + added))
    try:
        if free() < 16:
            pytest.skip("this machine has no memory for 16 huge pages")
        yield
    finally:
        setting.write_text(str(max(0, int(setting.read_text()) - added)))


def drive(built: Built, command: str, *options: str, env: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    """Run the driver to its end; exit status and the last document that it printed."""
    done = subprocess.run(
        [built.program, built.plugin, command, *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **(env or {})},
    )
    assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert lines, f"{command} printed nothing: {done.stderr}"
    return done.returncode, json.loads(lines[-1])


class Holder:
    """A driver process that holds a device until it is closed or killed."""

    def __init__(self, built: Built, command: str, *options: str, before: tuple[str, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [*before, built.program, built.plugin, command, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.ready = self.read()
        assert self.ready.get("ready") is True, self.ready

    def read(self) -> dict[str, Any]:
        """The next document."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            raise AssertionError(f"the driver died: {self.process.stderr.read()}")
        document: dict[str, Any] = json.loads(line)
        return document

    def ask(self, letter: str) -> dict[str, Any]:
        """``f``: fill now; anything else: how many packets so far."""
        assert self.process.stdin is not None
        self.process.stdin.write(letter)
        self.process.stdin.flush()
        return self.read()

    def received(self, at_least: int) -> int:
        """Ask until so many packets were received (bounded); how many there are."""
        count = 0
        for _ in range(2000):
            count = int(self.ask("?")["received"])
            if count >= at_least:
                return count
        return count

    def kill(self) -> None:
        """SIGKILL, and wait until it is dead."""
        self.process.kill()
        self.process.wait(timeout=30)

    def close(self) -> dict[str, Any]:
        """Let it close the device; what it printed last."""
        assert self.process.stdin is not None and self.process.stdout is not None and self.process.stderr is not None
        self.process.stdin.close()
        last: dict[str, Any] = json.loads(self.process.stdout.read().splitlines()[-1])
        errors = self.process.stderr.read()
        assert self.process.wait(timeout=60) == 0, errors
        assert "Sanitizer" not in errors, errors
        return last

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


class Wire:
    """UDP from the far namespace to the near one, over link ``a`` or ``m``: who gets it, the stack or the device?"""

    def __init__(self, net: Net, link: str = "a") -> None:
        number = "acm".index(link)
        self.to = (f"10.99.{number}.1", PORT)
        self.listener = in_netns(net.near, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.sender = in_netns(net.far, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.listener.bind(self.to)
        self.token = 0

    def send(self) -> bytes:
        """One datagram, unlike all others."""
        self.token += 1
        payload = b"ringbar %d" % self.token
        self.sender.sendto(payload, self.to)
        return payload

    def reaches_stack(self, timeout: float = 5.0) -> bool:
        """Send one and wait for it. veth delivers in microseconds: a short time-out is enough to show absence."""
        payload = self.send()
        self.listener.settimeout(timeout)
        try:
            return self.listener.recv(100) == payload
        except socket.timeout:
            return False

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()
        self.sender.close()


def link_state(ns: str, dev: str) -> dict[str, Any]:
    """What ``ip`` says of an interface."""
    state: dict[str, Any] = json.loads(run("ip", "-n", ns, "-d", "-j", "link", "show", "dev", dev))[0]
    return state


def near(net: Net, dev: str = "a0") -> list[str]:
    """The options that name an interface of the near namespace."""
    return ["--netns", net.near, "--if", dev]


def attached(built: Built, net: Net, dev: str = "a0") -> bool:
    """Does the plug-in see a program of its own there?"""
    return bool(drive(built, "attached", *near(net, dev))[1]["attached"])


def pair_in_one(net: Net) -> list[str]:
    """a0 and a1, c0 and c1 all in the near namespace, as the driver is in one only; the options for it."""
    for dev in ("a1", "c1"):
        run("ip", "-n", net.far, "link", "set", dev, "netns", net.near)
        run("ip", "-n", net.near, "link", "set", dev, "up")
    return ["--netns", net.near, "--if", "a0", "--peer", "a1", "--out", "c0", "--end", "c1"]


# ---- bytes ----


@pytest.mark.parametrize("mode,got", [("auto", "driver"), ("driver", "driver"), ("generic", "generic")])
@pytest.mark.parametrize("chunk,length", [(2048, 64), (2048, 1514), (4096, 60)])
def test_every_byte_arrives(built: Built, net: Net, mode: str, got: str, chunk: int, length: int) -> None:
    """10,000 frames from one veth to the other, in order, whole, buffer headers untouched, every buffer back."""
    code, seen = drive(built, "pair", *pair_in_one(net), "--mode", mode, "--chunk", str(chunk), "--length", str(length))
    assert code == 0, seen
    assert seen["received"] == seen["sent"] == 10000
    assert seen["bad"] == seen["reordered"] == seen["headers_touched"] == 0
    assert seen["senders_buffers_back"] == 2000
    assert seen["rx"]["mode"] == got
    assert seen["rx"]["max_frame"] == chunk - 64 - 256
    assert not seen["tx"]["receives"] and seen["tx"]["kicks"] >= 10000 // 64


def test_huge_pages(built: Built, net: Net, huge_pages: None) -> None:
    """The same with the memory in huge pages."""
    code, seen = drive(built, "pair", *pair_in_one(net), "--huge")
    assert code == 0 and seen["received"] == 10000, seen


@pytest.mark.parametrize("mode", ["driver", "generic"])
def test_forward_without_copy(built: Built, net: Net, mode: str) -> None:
    """A buffer received on one interface is sent on another as it is: two UMEMs on the same memory."""
    code, seen = drive(built, "forward", *pair_in_one(net), "--mode", mode)
    assert code == 0 and seen["received"] == 10000 and seen["bad"] == 0, seen


def test_bad_frames_are_refused(built: Built, net: Net) -> None:
    """What the kernel would drop without completing it never reaches the ring."""
    code, seen = drive(built, "bad-tx", *near(net))
    assert code == 0 and seen["refused"] == 8


def test_send_then_receive_too(built: Built, net: Net) -> None:
    """A device opened to send attaches no program; it can begin to receive later."""
    with Wire(net) as wire, Holder(built, "addrx", *near(net), "--count", "5") as h:
        for _ in range(5):
            wire.send()
        assert h.close()["received"] >= 5
    assert not attached(built, net)


def test_many_queues(built: Built, net: Net) -> None:
    """All queues of an interface at once, whichever a flow is on."""
    with Wire(net, "m") as wire, Holder(built, "hold", *near(net, "m0")) as h:
        assert h.ready["dev"]["queues"] == 4
        for _ in range(200):
            with in_netns(net.far, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as s:
                s.sendto(b"flow", wire.to)
        assert h.received(200) >= 200
        assert h.close()["dev"]["rx_dropped"] == 0
    assert "xdp" not in link_state(net.near, "m0")


# ---- whose packets they are ----


def test_close_leaves_the_interface_as_before(built: Built, net: Net) -> None:
    """While open the device takes the packets; after close the stack does, and nothing of us is left."""
    before = link_state(net.near, "a0")
    assert "xdp" not in before
    with Wire(net) as wire:
        assert wire.reaches_stack()
        with Holder(built, "hold", *near(net)) as h:
            assert link_state(net.near, "a0")["xdp"]["mode"] == 1  # driver
            wire.send()
            assert h.received(1) >= 1
            assert not wire.reaches_stack(timeout=0.1)
            h.close()
        assert wire.reaches_stack()
    assert link_state(net.near, "a0") == before
    assert not attached(built, net)


def test_stack_keeps_packets_until_the_first_fill(built: Built, net: Net) -> None:
    """Opening alone takes nothing: without buffers packets would be lost."""
    with Wire(net) as wire, Holder(built, "fill-first", *near(net)) as h:
        assert wire.reaches_stack()
        h.ask("f")
        wire.send()
        assert h.received(1) >= 1
        assert not wire.reaches_stack(timeout=0.1)


@pytest.mark.parametrize("mode", ["driver", "generic"])
def test_killed_owner_gives_the_stack_its_packets_at_once(built: Built, net: Net, mode: str) -> None:
    """After SIGKILL the next packet is the stack's; the program stays until the next command takes it away."""
    with Wire(net) as wire:
        with Holder(built, "hold", *near(net), "--mode", mode) as h:
            wire.send()
            assert h.received(1) >= 1
            h.kill()
            assert wire.reaches_stack()
        assert attached(built, net)
        code, seen = drive(built, "cleanup", *near(net))
        assert seen["result"] == 1
        assert drive(built, "cleanup", *near(net))[1]["result"] == 0
        assert not attached(built, net) and "xdp" not in link_state(net.near, "a0")
        assert drive(built, "probe", *near(net))[1]["result"] == 0
        assert wire.reaches_stack()


@pytest.mark.parametrize("left,wanted", [("generic", "driver"), ("driver", "generic"), ("driver", "driver")])
def test_next_open_replaces_what_a_killed_owner_left(built: Built, net: Net, left: str, wanted: str) -> None:
    """Twenty times: a program left in one mode is in nobody's way in another, nor is the dying socket."""
    for _ in range(5):
        with Holder(built, "hold", *near(net), "--mode", left) as h:
            h.kill()
        code, seen = drive(built, "try", *near(net), "--mode", wanted)
        assert seen["result"] == 0, seen
        assert seen["dev"]["mode"] == wanted
        assert "xdp" not in link_state(net.near, "a0")


def test_a_living_owner_is_left_alone(built: Built, net: Net) -> None:
    """Neither cleanup nor a second open takes anything from it; the error names it."""
    with Wire(net) as wire, Holder(built, "hold", *near(net)) as h:
        assert drive(built, "cleanup", *near(net))[1]["result"] == 0
        code, seen = drive(built, "try", *near(net))
        assert seen["errno"] == "EBUSY" and seen["holder"] == h.process.pid
        assert str(h.process.pid) in seen["text"] and "stop process" in seen["cure"]
        assert drive(built, "probe", *near(net))[1]["errno"] == "EBUSY"
        code, seen = drive(built, "try", *near(net), "--flags", "tx")
        assert seen["errno"] == "EBUSY" and seen["holder"] == h.process.pid
        wire.send()
        assert h.received(1) >= 1


def test_two_processes_on_two_queues(built: Built, net: Net) -> None:
    """With libxdp's dispatcher their programs sit beside each other, and each can leave first."""
    with Wire(net, "m") as wire, Holder(built, "hold", *near(net, "m0"), "--queue", "0") as first:
        if not first.ready["dev"]["dispatcher"]:
            code, seen = drive(built, "try", *near(net, "m0"), "--queue", "1")
            assert seen["errno"] == "EBUSY" and seen["holder"] == first.process.pid
            pytest.skip("no dispatcher here: " + first.ready["dev"]["note"])
        with Holder(built, "hold", *near(net, "m0"), "--queue", "1") as second:
            first.close()
            second.ask("?")
            assert attached(built, net, "m0")
            with Holder(built, "hold", *near(net, "m0"), "--queue", "2") as third:
                second.kill()
                assert drive(built, "cleanup", *near(net, "m0"))[1]["result"] == 1
                assert third.ask("?")["received"] >= 0 and attached(built, net, "m0")
                third.close()
        assert not attached(built, net, "m0") and "xdp" not in link_state(net.near, "m0")
        assert wire.reaches_stack()


def test_a_fork_that_outlives_its_parent_holds_nothing(built: Built, net: Net) -> None:
    """The device is dead in the child, so the parent's death frees the interface."""
    child = 0
    try:
        with Wire(net) as wire:
            with Holder(built, "orphan", *near(net)) as h:
                child = int(h.ready["child"])
                wire.send()
                assert h.received(1) >= 1
                h.kill()
                os.kill(child, 0)
                assert wire.reaches_stack()
            assert drive(built, "try", *near(net))[1]["result"] == 0
            os.kill(child, 0)
    finally:
        if child:
            os.kill(child, signal.SIGKILL)


def test_interface_that_vanishes(built: Built, net: Net) -> None:
    """Removing the interface under a device is survived, and closing it works."""
    with Holder(built, "hold", *near(net, "c0")) as h:
        run("ip", "-n", net.near, "link", "del", "c0")
        assert h.close()["dev"]["receives"] is True


def test_killed_with_its_own_bpffs(built: Built, net: Net) -> None:
    """``ip netns exec`` gives a process a private /sys/fs/bpf, which dies with it, libxdp's files included.

    What is on the interface is found and removed without them.
    """
    private = ("unshare", "--mount", "sh", "-c", 'mount -t bpf bpf /sys/fs/bpf && exec "$@"', "sh")
    with Wire(net) as wire:
        with Holder(built, "hold", *near(net), before=private) as h:
            wire.send()
            assert h.received(1) >= 1
            h.kill()
            assert wire.reaches_stack()
        code, seen = drive(built, "try", *near(net))
        assert seen["result"] == 0, seen
        assert "xdp" not in link_state(net.near, "a0")


def test_a_living_owner_with_its_own_bpffs(built: Built, net: Net) -> None:
    """Its files are out of sight, its programs are not: it is left alone and named."""
    private = ("unshare", "--mount", "sh", "-c", 'mount -t bpf bpf /sys/fs/bpf && exec "$@"', "sh")
    with Wire(net) as wire, Holder(built, "hold", *near(net), before=private) as h:
        assert drive(built, "cleanup", *near(net))[1]["result"] == 0
        code, seen = drive(built, "try", *near(net))
        assert seen["errno"] == "EBUSY" and seen["holder"] == h.process.pid, seen
        wire.send()
        assert h.received(1) >= 1
        h.close()
    assert "xdp" not in link_state(net.near, "a0")


def test_close_from_another_namespace(built: Built, net: Net) -> None:
    """Closing takes our program off the interface that was opened, whichever namespace the thread is in by then."""
    assert drive(built, "try", *near(net), "--broken", "netns")[1]["result"] == 0
    assert "xdp" not in link_state(net.near, "a0")


def test_without_bpffs(built: Built, net: Net) -> None:
    """Then the program is alone on the interface, and the note says so."""
    code, seen = drive(built, "try", *near(net), env={"LIBXDP_BPFFS": "/nonexistent"})
    assert seen["result"] == 0 and not seen["dev"]["dispatcher"]
    assert "no bpffs" in seen["dev"]["note"]


# ---- errors: the cause in one sentence, the cure in another ----


@pytest.mark.parametrize(
    "options,errno,text,cure",
    [
        (["--if", "nowhere"], "ENODEV", 'no interface "nowhere"', "ip -brief link"),
        (["--if", "a0", "--queue", "5"], "ERANGE", "a0 has no queue 5: it has 1", "zc:a0@0"),
        (["--if", "m0", "--queue", "4"], "ERANGE", "m0 has no queue 4: it has 4", "ethtool -L m0"),
        (["--if", "a0", "--chunk", "1024"], "EINVAL", "2048 or 4096", "--size 2048"),
        (["--if", "a0", "--chunk", "8192"], "EINVAL", "2048 or 4096", "--size 4096"),
        (["--if", "a0", "--mode", "zero-copy"], "EOPNOTSUPP", "no AF_XDP zero copy", "leave the mode open"),
        (["--if", "a0", "--broken", "memory"], "EINVAL", "does not begin on a page", ""),
        (["--if", "a0", "--broken", "size"], "EINVAL", "not a multiple", ""),
        (["--if", "a0", "--broken", "ring"], "EINVAL", "powers of two", ""),
        (["--if", "a0", "--broken", "ro"], "EFAULT", "not mapped writable", "read-write"),
        (["--if", "a0", "--broken", "memlock"], "ENOBUFS", "may lock only 64 KiB", "ulimit -l"),
        (["--if", "a0", "--broken", "capabilities"], "EPERM", "cap_net_admin, cap_net_raw", "setcap "),
        (["--if", "a0", "--broken", "bpf"], "EPERM", "cap_bpf", "setcap "),
    ],
)
def test_errors(built: Built, net: Net, options: list[str], errno: str, text: str, cure: str) -> None:
    """Each names its cause and what mends it, and leaves nothing behind."""
    code, seen = drive(built, "try", "--netns", net.near, *options)
    assert seen["errno"] == errno, seen
    assert text in seen["text"]
    assert cure in seen["cure"] if cure else seen["cure"] == ""
    assert "xdp" not in link_state(net.near, "a0")


@pytest.mark.parametrize("flags", ["rx", "tx"])
def test_interface_down(built: Built, net: Net, flags: str) -> None:
    """A device on an interface that is down would be silent."""
    run("ip", "-n", net.near, "link", "set", "a0", "down")
    code, seen = drive(built, "try", *near(net), "--flags", flags)
    assert seen["errno"] == "ENETDOWN" and seen["cure"] == "ip link set dev a0 up"


#: Buffer, an MTU too large for it, the largest that is not; from kernel 6.6 on packets may come in 17 buffers.
LARGEST = (
    [(2048, 29359, 29358), (4096, 64175, 64174)]
    if tuple(int(n) for n in os.uname().release.split("-")[0].split(".")[:2]) >= (6, 6)
    else [(2048, 1711, 1710), (4096, 3759, 3758)]
)


@pytest.mark.parametrize("chunk,mtu,largest", LARGEST)
def test_mtu_too_large(built: Built, net: Net, chunk: int, mtu: int, largest: int) -> None:
    """The error gives the largest MTU, and with that MTU it works (in generic mode where the driver wants less)."""
    for ns, dev in ((net.near, "a0"), (net.far, "a1")):
        run("ip", "-n", ns, "link", "set", dev, "mtu", str(mtu))
    code, seen = drive(built, "try", *near(net), "--chunk", str(chunk))
    assert seen["errno"] == "EMSGSIZE" and f"the largest MTU is {largest}" in seen["text"]
    assert f"ip link set dev a0 mtu {largest}" in seen["cure"]
    for ns, dev in ((net.near, "a0"), (net.far, "a1")):
        run("ip", "-n", ns, "link", "set", dev, "mtu", str(largest))
    code, seen = drive(built, "try", *near(net), "--chunk", str(chunk))
    assert seen["result"] == 0
    if seen["dev"]["mode"] == "generic":
        assert "no driver mode" in seen["dev"]["note"]


@pytest.mark.parametrize("mode,option", [("xdpdrv", "xdpdrv"), ("xdpgeneric", "xdpgeneric")])
def test_somebody_elses_program(built: Built, net: Net, tmp_path: Path, mode: str, option: str) -> None:
    """A program that leaves no room for ours is named and left alone; the cure, once done, works."""
    if not shutil.which("clang"):
        pytest.skip("clang, which makes the other program, is not installed")
    source = tmp_path / "other.c"
    source.write_text('__attribute__((section("xdp"), used)) int somebody_else(void *ctx) { return 2; }\n')
    run("clang", "-O2", "-target", "bpf", "-c", str(source), "-o", str(tmp_path / "other.o"))
    run("ip", "-n", net.near, "link", "set", "dev", "a0", mode, "obj", str(tmp_path / "other.o"), "sec", "xdp")
    before = link_state(net.near, "a0")["xdp"]
    code, seen = drive(built, "try", *near(net))
    assert seen["errno"] == "EBUSY" and "somebody_else" in seen["text"]
    cure = f"ip link set dev a0 {option} off"
    assert cure in seen["cure"]
    assert drive(built, "cleanup", *near(net))[1]["result"] == 0
    assert link_state(net.near, "a0")["xdp"] == before
    run("ip", "netns", "exec", net.near, *cure.split())
    assert drive(built, "try", *near(net))[1]["result"] == 0


def test_a_failed_open_detaches_again(built: Built, net: Net) -> None:
    """The queue is taken by a socket that attached nothing: our program must not stay after the failed bind."""
    with Holder(built, "hold", *near(net), "--flags", "tx"):
        code, seen = drive(built, "try", *near(net))
        assert seen["errno"] == "EBUSY" and "another AF_XDP socket" in seen["text"]
        assert "xdp" not in link_state(net.near, "a0")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
