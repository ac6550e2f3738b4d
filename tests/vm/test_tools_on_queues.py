# SPDX-License-Identifier: Apache-2.0
"""In a VM as on a host: queues as interfaces, captures, capture files played, and ordinary programs on all of them."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys

import pytest
from netspace import Space
from vmtools import RINGBAR_IN_GUEST, Shell, Tool, in_guest, read_line, until, vm

from ringbar.qemu.launch import Guest

pytestmark = pytest.mark.vm

ECHO = (
    "import socket; s = socket.create_server(('10.77.0.2', 5000)); print('up', flush=True); c, _ = s.accept()\n"
    "while data := c.recv(65536): c.sendall(data)"
)


def frames(count: int) -> list[bytes]:
    """Ethernet frames that no kernel sends by itself."""
    return [bytes([2, 0, 0, 0, 0, i % 256]) * 2 + b"\x88\xb5" + os.urandom(46 + i * 7 % 1400) for i in range(count)]


def pcap(packets: list[bytes]) -> bytes:
    """A capture file, a packet each microsecond."""
    out = struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 65535, 1)
    for number, data in enumerate(packets):
        out += struct.pack("<IIII", 1_700_000_000, number * 1000, len(data), len(data)) + data
    return out


def packets_of(data: bytes) -> list[bytes]:
    """The packets of a pcap file."""
    found, at = [], 24
    while at < len(data):
        (length,) = struct.unpack("<I", data[at + 8 : at + 12])
        found.append(data[at + 16 : at + 16 + length])
        at += 16 + length
    return found


def test_two_kernels_talk_tcp_over_queues(shell: Shell, guest_pc: Guest) -> None:
    tcpdump = shutil.which("tcpdump")
    assert tcpdump is not None
    linked = subprocess.run(["ldd", tcpdump], capture_output=True, text=True, check=True).stdout
    (crypto,) = re.findall(r"/\S*/libcrypto\.so\S*", linked)  # the only library that the image has not
    shell.cluster()
    shell("attach", vm(guest_pc), "99@0", "--tx", "99@1", "--pool", "rw")
    guest_pc.copy({"/usr/bin/tcpdump": tcpdump, crypto: crypto})
    guest_pc.ssh("test -c /dev/net/tun || modprobe tun")
    with Space("rbtapvm") as space:
        shell.start("tap", "99@1", "--tx", "99@0", "--name", "host0", "--netns", space.name)
        space.ip("addr add 10.77.0.1/24 dev host0")
        with Tool(guest_pc, "tap", "99@0", "--tx", "99@1", "--name", "vm0") as tap:
            guest_pc.ssh("ip addr add 10.77.0.2/24 dev vm0")
            seeing = guest_pc.popen(
                ["/usr/bin/tcpdump", "-Z", "root", "-nli", "vm0", "-c", "20", "tcp port 5000"],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            told = ""
            while "listening on vm0" not in told:
                told += read_line(seeing, 30, seeing.stderr)
            echo = guest_pc.popen(["python3", "-c", ECHO], stdout=subprocess.PIPE, text=True)
            assert echo.stdout is not None and echo.stdout.readline() == "up\n"
            data = os.urandom(300_000)
            client = (
                "import socket, sys, threading\n"
                "data = sys.stdin.buffer.read()\n"
                "s = socket.create_connection(('10.77.0.2', 5000), 20)\n"
                "threading.Thread(target=lambda: (s.sendall(data), s.shutdown(1))).start()\n"
                "while piece := s.recv(65536): sys.stdout.buffer.write(piece)"
            )
            done = subprocess.run(
                ["ip", "netns", "exec", space.name, sys.executable, "-c", client],
                input=data, capture_output=True, timeout=60,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert done.stdout == data
            echo.communicate(timeout=30)
            said, _ = seeing.communicate(timeout=30)
            assert said.count("10.77.0.1") == 20 and "Flags [S.]" in said
            tap.kill()
            tap.process.communicate(timeout=30)
            until(lambda: guest_pc.ssh("ip -br link").stdout, lambda links: "vm0" not in links, "vm0 is still there")
    shell.comes_home(granted=False)
    shell("detach", vm(guest_pc))  # the killed tool cannot let go
    shell.comes_home()


def test_a_vm_plays_capture_files_and_writes_them(shell: Shell, guest_wide: Guest, tmp_path: pathlib.Path) -> None:
    shell.cluster()
    shell("attach", vm(guest_wide), "99@0", "--tx", "99@1", "--pool", "rw")
    packets = frames(3000)
    (tmp_path / "a.pcap").write_bytes(pcap(packets))
    guest_wide.copy({"/tmp/a.pcap": tmp_path / "a.pcap"})
    for more in ((), ("--preload", "--speed", "max")):
        file = tmp_path / "b.pcap"
        capturing = shell.start("capture", "-i", "99@1", "-w", str(file), "--packets", "3000", "--json")
        said = in_guest(guest_wide, "bridge", "-i", "pcap:/tmp/a.pcap", "-o", "99@1", *more)
        assert (said["packets"], said["dropped"]) == (3000, 0)
        assert shell.finish(capturing)["written"] == 3000
        assert packets_of(file.read_bytes()) == packets
    with Tool(guest_wide, "capture", "-i", "99@0", "-w", "/tmp/c.pcap", "--packets", "3000", "--json") as tool:
        shell("bridge", "-i", f"pcap:{tmp_path}/a.pcap", "-o", "99@0", "--speed", "max")
        assert tool.end(ask=False)["written"] == 3000
    done = subprocess.run(guest_wide._ssh_command("cat /tmp/c.pcap"), capture_output=True, timeout=60)
    assert packets_of(done.stdout) == packets
    shell.detach(guest_wide)
    shell.comes_home()


def test_a_capture_in_a_vm_goes_through_ssh_into_tshark(shell: Shell, guest_pc: Guest) -> None:
    assert shutil.which("tshark") is not None
    shell.cluster()
    shell("attach", vm(guest_pc), "99@0")
    sending = shell.start("send", "-o", "99@0", "--rate", "200")
    capturing = guest_pc.popen(
        [*RINGBAR_IN_GUEST, "capture", "-i", "99@0", "-w", "-", "--packets", "50"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    done = subprocess.run(
        ["tshark", "-r", "-", "-T", "fields", "-e", "udp.dstport"], stdin=capturing.stdout, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    _, said = capturing.communicate(timeout=30)
    assert capturing.returncode == 0, said
    assert done.stdout.split() == ["5000"] * 50
    shell.finish(sending, ask=True)
    shell.detach(guest_pc)
    shell.comes_home()


def test_a_file_is_not_played_where_a_vm_cannot_send(shell: Shell, guest_pc: Guest, tmp_path: pathlib.Path) -> None:
    shell.cluster()
    shell("attach", vm(guest_pc), "99@0")
    (tmp_path / "a.pcap").write_bytes(pcap(frames(1)))
    guest_pc.copy({"/tmp/a.pcap": tmp_path / "a.pcap"})
    said = in_guest(guest_pc, "count", "-c", "99", "-i", "pcap:/tmp/a.pcap", status=1)
    assert "read the packets" in said["error"]["message"] or "sends" in said["error"]["message"]
    shell.detach(guest_pc)
