# SPDX-License-Identifier: Apache-2.0
"""Programs that know no ringbar, on its queues: docs/tools-on-queues.md, command by command, and what it promises."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from netspace import Space

from .conftest import Shell

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making interfaces needs root")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tools-on-queues.md"
SECTIONS = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
CHECKS = {  # what each section's commands must have said
    "tcpdump": {"192.0.2.2.5000: UDP": 9},
    "tshark and Wireshark": {"192.0.2.2    UDP": 6, "\n5000": 3},
    "Suricata": {"Engine started": 1},
    "Zeek": {"100 packets": 1},
    "Playing a capture file": {"20 packets": 3},
}


@pytest.fixture
def space() -> Iterator[Space]:
    with Space("rbtap") as made:
        yield made


def wait(what: Callable[[], bool], said: str) -> None:
    """Look until it is so."""
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline, said
        time.sleep(0.02)


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def exists(space: Space, interface: str) -> bool:
    return any(link["ifname"] == interface for link in json.loads(space.ip("-j link show")))


@pytest.mark.parametrize("title", [title for title, _ in SECTIONS])
def test_the_commands_of_the_page_do_what_it_says(rb: Shell, space: Space, tmp_path: Path, title: str) -> None:
    needs("tcpdump", "tshark")
    text = dict(SECTIONS)[title]
    programs = tmp_path / "bin"
    programs.mkdir()
    if title == "Suricata":
        import suricata

        suricata.program(programs)
    (programs / "ringbar").write_text(f'#!/bin/sh\nexec {sys.executable} -P -m ringbar "$@"\n')
    (programs / "ringbar").chmod(0o755)
    rb("cluster", "create", "99", "--queues", "2", "--buffers", "16384")
    rb.start("send", "-o", "99@0", "--rate", "200")
    script = "set -e -o pipefail\n" + "".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    work = tmp_path / "work"
    work.mkdir()
    output = tmp_path / "output"
    with output.open("w") as file:
        page = subprocess.Popen(
            ["ip", "netns", "exec", space.name, "bash", "-c", script],
            cwd=work,
            env={**rb.environment, "PATH": f"{programs}:{os.environ['PATH']}"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    status = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = page.wait(120)
    finally:  # what it left in the background, too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(page.pid, signal.SIGKILL)
        page.wait()
        if status != 0:
            rb.run("worker", "stop", "ids0")
    said = output.read_text(errors="replace")
    assert status == 0, said
    assert "Traceback" not in said
    for sign, times in CHECKS[title].items():
        assert said.count(sign) >= times, f"{sign!r} {times} times in:\n{said}"
    assert not exists(space, "ids0")


def test_every_section_of_the_page_is_tried() -> None:
    assert [title for title, _ in SECTIONS] == list(CHECKS)


# ---- tap ------------------------------------------------------------------------------------------------------------


def raw(space: Space, interface: str) -> socket.socket:
    def make() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        made.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
        made.bind((interface, 0))
        made.settimeout(20)
        return made

    return space.inside(make)


def test_packets_go_both_ways_as_they_are(rb: Shell, space: Space, tmp_path: Path) -> None:
    rb("cluster", "create", "99", "--queues", "2", "--buffers", "16384")
    mac = "02:00:00:00:00:0a"
    tap = rb.start("tap", "99@0", "--tx", "99@1", "--name", "tap0", "--mac", mac, "--netns", space.name, "--json")
    (link,) = json.loads(space.ip("-j link show tap0"))
    assert (link["address"], "UP" in link["flags"], link["mtu"]) == (mac, True, 1500)
    with raw(space, "tap0") as wire:
        rb("send", "-o", "99@0", "--packets", "500", "--rate", "5k")
        got = [wire.recv(2048) for _ in range(500)]
        numbers = [int.from_bytes(data[58:66], "little") for data in got]
        assert numbers == list(range(500))
        sent = [bytes([i]) * 12 + b"\x88\xb5" + os.urandom(60 + i) for i in range(40)]
        for data in sent:
            assert wire.send(data) == len(data)
    rb("capture", "-i", "99@1", "-w", str(tmp_path / "a.pcap"), "--packets", "40", "--seconds", "20")
    data, at, seen = (tmp_path / "a.pcap").read_bytes(), 24, []
    while at < len(data):
        length = int.from_bytes(data[at + 8 : at + 12], "little")
        seen.append(data[at + 16 : at + 16 + length])
        at += 16 + length
    assert seen == sent
    tap.send_signal(signal.SIGINT)
    said, _ = tap.communicate(timeout=20)
    assert tap.returncode == 0
    assert (json.loads(said)["packets"], json.loads(said)["dropped"]) == (540, 0)
    assert not exists(space, "tap0")


def test_the_interface_goes_with_a_killed_tap_and_the_queue_goes_on(rb: Shell, space: Space) -> None:
    rb("cluster", "create", "99", "--queues", "1", "--buffers", "16384")
    tap = rb.start("tap", "99@0", "--name", "tap0", "--netns", space.name)
    assert exists(space, "tap0")
    tap.kill()
    tap.wait(20)
    wait(lambda: not exists(space, "tap0"), "the interface is still there")
    rb("send", "-o", "99@0", "--packets", "10")
    assert rb.json("count", "-i", "99@0", "--packets", "10", "--seconds", "20")["packets"] == 10


def test_the_kernel_answers_nothing_without_a_queue_to_send_on(rb: Shell, space: Space) -> None:
    rb("cluster", "create", "99", "--queues", "1", "--buffers", "16384")
    space.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=0")
    rb.start("tap", "99@0", "--name", "tap0", "--netns", space.name)
    (link,) = json.loads(space.ip("-j addr show tap0"))
    assert "NOARP" in link["flags"]
    assert link["addr_info"] == []
    assert space.run("cat", "/proc/sys/net/ipv6/conf/tap0/disable_ipv6").strip() == "1"


def test_an_interface_that_vanishes_ends_the_tap_with_an_error(rb: Shell, space: Space) -> None:
    rb("cluster", "create", "99", "--queues", "2", "--buffers", "16384")
    tap = rb.start("tap", "99@0", "--tx", "99@1", "--name", "tap0", "--netns", space.name)
    space.ip("link del tap0")
    _, said = tap.communicate(timeout=30)
    assert tap.returncode == 1
    assert "interface tap0 is gone" in said


def test_what_comes_while_the_interface_is_down_is_lost_and_counted(rb: Shell, space: Space) -> None:
    rb("cluster", "create", "99", "--queues", "1", "--buffers", "16384")
    tap = rb.start("tap", "99@0", "--name", "tap0", "--netns", space.name, "--packets", "30")
    space.ip("link set tap0 down")
    rb("send", "-o", "99@0", "--packets", "30")
    said, _ = tap.communicate(timeout=30)
    assert tap.returncode == 0
    assert "30 packets to tap0" in said and "30 while it was down" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--name", "lo"), "there is an interface lo already"),
        (("--name", "tap0", "--netns", "none-such"), "its network namespace cannot be entered"),
        (("--name", "tap0", "--mac", "01:00:00:00:00:01"), "is no interface's MAC address"),
        (("--name", "tap0", "--mac", "02:00"), "is no interface's MAC address"),
        (("--name", "a-name-of-16-byte"), "at most 15 bytes"),
    ],
)
def test_a_tap_that_cannot_be_says_why(rb: Shell, words: tuple[str, ...], says: str) -> None:
    rb("cluster", "create", "99", "--queues", "1", "--buffers", "16384")
    done = rb.run("tap", "99@0", *words)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert rb.json("status", "99@0", "--sample", "0")["clusters"][0]["queues"][0]["consumer"] is None


# ---- capture --------------------------------------------------------------------------------------------------------


def test_a_live_reader_sees_packets_at_once_and_may_leave(rb: Shell) -> None:
    rb("cluster", "create", "99", "--queues", "1", "--buffers", "16384")
    capturing = subprocess.Popen(
        [sys.executable, "-P", "-m", "ringbar", "capture", "-i", "99@0", "-w", "-", "--quiet"],
        env=rb.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    rb.started.append(capturing)  # type: ignore[arg-type]
    assert capturing.stdout is not None and capturing.stderr is not None
    rb("send", "-o", "99@0", "--packets", "1")
    got = b""
    while b"RGBF" not in got:  # one packet, although nothing follows it
        piece = os.read(capturing.stdout.fileno(), 65536)
        assert piece
        got += piece
    assert capturing.poll() is None
    capturing.stdout.close()
    assert capturing.wait(20) == 0  # without another packet
    assert capturing.stderr.read() == b""


def test_a_truncated_file_is_played_as_far_as_it_goes_and_ends_with_status_1(rb: Shell, tmp_path: Path) -> None:
    rb("cluster", "create", "99", "--queues", "2", "--buffers", "16384")
    rb("send", "-o", "99@0", "--packets", "20")
    rb("capture", "-i", "99@0", "-w", str(tmp_path / "a.pcapng"), "--packets", "20")
    whole = (tmp_path / "a.pcapng").read_bytes()
    (tmp_path / "a.pcapng").write_bytes(whole[:-10])
    said = rb.json("bridge", "-i", f"pcap:{tmp_path}/a.pcapng", "-o", "99@1", "--speed", "max", status=1)
    assert (said["packets"], said["bytes"]) == (19, 19 * 74)
    assert "record 22, at byte" in said["error"]["message"] and "is cut off" in said["error"]["message"]
    assert rb.json("count", "-i", "99@1", "--packets", "19", "--seconds", "20")["packets"] == 19
    (tmp_path / "a.pcapng").write_bytes(whole)
    said = rb.json("bridge", "-i", f"pcap:{tmp_path}/a.pcapng", "-o", "99@1", "--speed", "max", "--loops", "3")
    assert (said["packets"], said["dropped"]) == (60, 0)
    assert "error" not in said


def test_a_slow_reader_of_a_pipe_sees_every_packet_of_a_played_file(rb: Shell, tmp_path: Path) -> None:
    rb("cluster", "create", "99", "--queues", "1", "--buffers", "16384")
    record = (1700000000).to_bytes(4, "little") + bytes(4) + 2 * (1400).to_bytes(4, "little") + b"\x55" * 1400
    head = bytes.fromhex("4d3cb2a1" "02000400" "0000000000000000" "ffff0000" "01000000")
    (tmp_path / "a.pcap").write_bytes(head + 12_000 * record)
    capturing = subprocess.Popen(
        [sys.executable, "-P", "-m", "ringbar", "capture", "-i", "99@0", "-w", "-", "--format", "pcap",
         "--packets", "12000"],
        env=rb.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    rb.started.append(capturing)  # type: ignore[arg-type]
    playing = rb.start("bridge", "-i", f"pcap:{tmp_path}/a.pcap", "-o", "99@0", "--speed", "max", "--json")

    def full() -> bool:
        return int(rb.json("status", "99@0", "--sample", "0")["clusters"][0]["queues"][0]["waiting"]) == 4096

    wait(full, "the queue does not fill up")
    assert playing.poll() is None  # it waits, and so does the capture
    said, _ = capturing.communicate(timeout=60)
    assert capturing.returncode == 0
    assert said == head[:16] + said[16:24] + 12_000 * record
    said, _ = playing.communicate(timeout=60)
    assert (json.loads(said)["packets"], json.loads(said)["dropped"]) == (12_000, 0)


def test_files_are_counted_and_named_while_they_rotate(rb: Shell, tmp_path: Path) -> None:
    rb("cluster", "create", "99", "--queues", "1", "--buffers", "16384")
    rb("send", "-o", "99@0", "--packets", "2000")
    said = rb.json(
        "capture", "-i", "99@0", "-w", str(tmp_path / "a.pcap"), "--packets", "2000", "--rotate-size", "64k",
        "--snaplen", "40",
    )  # fmt: skip
    assert len(said["files"]) == 2
    assert sorted(map(str, tmp_path.iterdir())) == said["files"]
    assert sum((Path(file).stat().st_size - 24) // 56 for file in said["files"]) == said["written"] == 2000
