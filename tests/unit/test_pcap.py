# SPDX-License-Identifier: Apache-2.0
"""Capture files as devices: played at their own or another rate, written, cut, and not written."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringbar import Bridge, Cluster
from ringbar.errors import Error

pytestmark = pytest.mark.usefixtures("core")

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND

Packet = tuple[int, bytes]


@pytest.fixture
def zc() -> Iterator[Cluster]:
    with Cluster.create(61, buffers=8192, queues=1) as cluster:
        yield cluster


def frame(number: int, length: int) -> bytes:
    return random.Random(number).randbytes(length)


def pcap(packets: list[Packet], *, order: str = "<", nano: bool = True, link: int = 1) -> bytes:
    """A pcap file, made here and not by the code that is tested."""
    unit = 1 if nano else 1000
    out = struct.pack(order + "IHHiIII", 0xA1B23C4D if nano else 0xA1B2C3D4, 2, 4, 0, 0, 65535, link)
    for ts, data in packets:
        out += struct.pack(order + "IIII", ts // SECOND, ts % SECOND // unit, len(data), len(data)) + data
    return out


def records(data: bytes) -> list[Packet]:
    """The packets of a pcapng file with one interface whose times are nanoseconds; read here, likewise."""
    found, at = [], 0
    while at < len(data):
        kind, length = struct.unpack("<II", data[at : at + 8])
        assert struct.unpack("<I", data[at + length - 4 : at + length]) == (length,)
        if kind == 6:
            _, high, low, kept, _ = struct.unpack("<IIIII", data[at + 8 : at + 28])
            found.append((high << 32 | low, data[at + 28 : at + 28 + kept]))
        at += length
    assert at == len(data)
    return found


def some(count: int, gap: int = 1000) -> list[Packet]:
    return [(START + i * gap, frame(i, 60 + i * 37 % 1400)) for i in range(count)]


def play(zc: Cluster, file: Path, **options: object) -> list[Packet]:
    """All packets of a device, with their times."""
    found: list[Packet] = []
    with zc.open_device(f"pcap:{file}", "rx", **options) as rx:
        for burst in rx:
            found += [(int(ts), bytes(data)) for ts, data in zip(burst.timestamps, burst)]
    return found


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("nano", [True, False])
def test_packets_are_played_with_their_bytes_and_times(zc: Cluster, tmp_path: Path, order: str, nano: bool) -> None:
    packets = some(300)
    (tmp_path / "a.pcap").write_bytes(pcap(packets, order=order, nano=nano))
    assert play(zc, tmp_path / "a.pcap") == packets


def test_loops_play_it_again_read_or_preloaded(zc: Cluster, tmp_path: Path) -> None:
    packets = some(100)
    (tmp_path / "a.pcap").write_bytes(pcap(packets))
    for preload in (False, True):
        assert play(zc, tmp_path / "a.pcap", speed=-1, loops=3, preload=preload) == 3 * packets
    with zc.open_device(f"pcap:{tmp_path}/a.pcap", "rx", speed=-1, loops=None, preload=True) as rx:
        assert sum(len(burst) for burst, _ in zip(rx, range(50))) > 1000


def test_what_is_preloaded_needs_no_file_any_more(zc: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "a.pcap"
    file.write_bytes(pcap(some(10)))
    with zc.open_device(f"pcap:{file}", "rx", speed=-1, preload=True) as rx:
        file.write_bytes(b"")
        assert [bytes(data) for data in rx.recv(64, 1)] == [data for _, data in some(10)]


@pytest.mark.parametrize(
    ("options", "least"),
    [({}, 0.4), ({"speed": 4}, 0.1), ({"pps": 50}, 0.38), ({"gbps": 20 * 8 * 84 / 0.4 / 1e9}, 0.38)],
    ids=["as recorded", "four times as fast", "packets per second", "bits per second"],
)
def test_the_rate_is_kept(zc: Cluster, tmp_path: Path, options: dict[str, float], least: float) -> None:
    packets = [(START + i * SECOND // 50, frame(i, 60)) for i in range(21)]  # 20 gaps of 20 ms
    (tmp_path / "a.pcap").write_bytes(pcap(packets))
    began = time.monotonic()
    assert play(zc, tmp_path / "a.pcap", **options) == packets
    assert time.monotonic() - began >= least * 0.99


def test_as_fast_as_it_goes_asks_for_no_time(zc: Cluster, tmp_path: Path) -> None:
    (tmp_path / "a.pcap").write_bytes(pcap([(START, frame(0, 60)), (START + 10**6 * SECOND, frame(1, 60))]))
    assert len(play(zc, tmp_path / "a.pcap", speed=-1)) == 2


def test_times_that_run_backwards_hold_nothing_up(zc: Cluster, tmp_path: Path) -> None:
    packets = [(START, frame(0, 60)), (START - 10**6 * SECOND, frame(1, 60)), (START, frame(2, 60))]
    (tmp_path / "a.pcap").write_bytes(pcap(packets))
    assert play(zc, tmp_path / "a.pcap") == packets


def test_what_is_whole_is_played_then_one_error(zc: Cluster, tmp_path: Path) -> None:
    packets = some(10)
    whole = pcap(packets)
    (tmp_path / "a.pcap").write_bytes(whole[:-5])
    for preload in (False, True):
        with zc.open_device(f"pcap:{tmp_path}/a.pcap", "rx", speed=-1, preload=preload) as rx:
            assert [bytes(data) for data in rx.recv(64, 1)] == [data for _, data in packets[:9]]
            for _ in range(2):
                with pytest.raises(Error, match=r"a\.pcap: record 10, at byte \d+, is cut off: \d+ of its \d+ bytes"):
                    rx.recv(64, 1)


def test_packets_that_no_buffer_can_hold_are_counted(zc: Cluster, tmp_path: Path) -> None:
    packets = [(START, frame(0, 60)), (START, frame(1, 4000)), (START, b""), (START, frame(2, 1984))]
    (tmp_path / "a.pcap").write_bytes(pcap(packets))
    with zc.open_device(f"pcap:{tmp_path}/a.pcap", "rx") as rx:
        assert [len(data) for data in rx.recv(64, 1)] == [60, 1984]
        assert rx.stats()["drops"]["bad"] == 2
        assert (rx.stats()["mode"], rx.stats()["clock"]) == ("copy", "file")


def test_files_that_cannot_be_played_say_why(zc: Cluster, tmp_path: Path) -> None:
    def fails(text: str, name: str, data: bytes | None = None, cure: str | None = None, **options: object) -> None:
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(Error, match=text) as caught:
            zc.open_device(f"pcap:{tmp_path / name}", "rx", **options)
        if cure is not None:
            assert cure in str(caught.value.cure)

    fails("No such file", "none")
    fails("Is a directory", ".")
    fails("it is empty", "empty", b"")
    fails("compressed with gzip", "a.gz", b"\x1f\x8b\x08\x00" + bytes(20), cure=f"gunzip {tmp_path}/a.gz")
    fails("no capture file", "text", b"hello, world")
    fails("of the 24 bytes of its header", "short", pcap([])[:20])
    fails("link type 101", "raw", pcap(some(1), link=101))
    fails("cannot all be kept", "good", pcap(some(1)), pps=1.0, gbps=1.0)
    with pytest.raises(Error, match="played or written, not both"):
        zc.open_device(f"pcap:{tmp_path}/good", "rxtx")
    with pytest.raises(Error, match="at most"):
        zc.open_device("pcap:/" + "x" * 600, "rx")


def test_a_pipe_is_played_as_it_comes(zc: Cluster, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    packets = some(5)
    whole = pcap(packets)

    def write() -> None:
        with fifo.open("wb", buffering=0) as file:
            for at in range(0, len(whole), 100):
                file.write(whole[at : at + 100])

    writer = threading.Thread(target=write)
    writer.start()
    assert play(zc, fifo) == packets
    writer.join()
    ends = os.pipe()
    with pytest.raises(Error, match="no file that can be read again") as caught:
        zc.open_device(f"pcap:/dev/fd/{ends[0]}", "rx", loops=2)
    assert caught.value.cure == "preload it"
    os.write(ends[1], whole)
    os.close(ends[1])
    assert play(zc, Path(f"/dev/fd/{ends[0]}"), loops=2, speed=-1, preload=True) == 2 * packets
    os.close(ends[0])


def test_a_fast_file_waits_for_a_slow_queue(zc: Cluster, tmp_path: Path) -> None:
    packets = [(START, b"x" * 60)] * 20_000
    (tmp_path / "a.pcap").write_bytes(pcap(packets))
    with Cluster.attach(61) as other, other.open_queue(0, "rx") as consumer:
        file, tx = zc.open_device(f"pcap:{tmp_path}/a.pcap", "rx", speed=-1), zc.open_queue(0, "tx")
        with file, tx, Bridge(file, tx) as bridge:
            got = 0
            while got < len(packets):
                got += len(consumer.recv(256, 5.0))
            assert bridge.wait(5.0)
            assert bridge.stats()["dropped"] == 0
            assert got == len(packets)


# ---- writing --------------------------------------------------------------------------------------------------------


def write(zc: Cluster, file: Path | str, packets: list[bytes], **options: object) -> None:
    with zc.open_device(f"pcap:{file}", "tx", **options) as tx:
        assert tx.write(packets) == len(packets)
        tx.flush()
        assert tx.stats()["packets"] == len(packets)


def test_what_is_written_is_what_was_sent(zc: Cluster, tmp_path: Path) -> None:
    packets = some(3000)
    (tmp_path / "a.pcap").write_bytes(pcap(packets))
    for name in ("b.pcapng", "b.pcap"):
        with zc.open_device(f"pcap:{tmp_path}/a.pcap", "rx", speed=-1) as rx:
            with zc.open_device(f"pcap:{tmp_path}/{name}", "tx", interface="99@0") as tx:
                for burst in rx:
                    there = len(burst)
                    assert tx.send(burst) == there
        assert play(zc, tmp_path / name, speed=-1) == packets
    assert records((tmp_path / "b.pcapng").read_bytes()) == packets
    assert (tmp_path / "b.pcap").read_bytes()[24:] == pcap(packets)[24:]
    head = (tmp_path / "b.pcapng").read_bytes()[:500]
    assert b"99@0" in head and b"ringbar 0." in head


def test_packets_without_a_time_get_the_present(zc: Cluster, tmp_path: Path) -> None:
    before = time.time_ns()
    write(zc, tmp_path / "a.pcapng", [b"x" * 60])
    ((ts, _),) = records((tmp_path / "a.pcapng").read_bytes())
    assert before <= ts <= time.time_ns()


def test_a_snapshot_length_keeps_the_beginning(zc: Cluster, tmp_path: Path) -> None:
    write(zc, tmp_path / "a.pcap", [frame(1, 500)], snaplen=40)
    data = (tmp_path / "a.pcap").read_bytes()
    assert struct.unpack("<II", data[32:40]) == (40, 500)
    assert data[40:] == frame(1, 500)[:40]


def test_files_follow_one_another(zc: Cluster, tmp_path: Path) -> None:
    packets = [frame(i, 1000) for i in range(200)]
    write(zc, tmp_path / "a.pcapng", packets, rotate_bytes=65536)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4
    assert [f.name[:8] for f in files] == [f"a_0000{n}_" for n in (1, 2, 3, 4)]
    assert all(f.stat().st_size <= 65536 and f.suffix == ".pcapng" for f in files)
    assert [data for f in files for _, data in records(f.read_bytes())] == packets
    with zc.open_device(f"pcap:{tmp_path}/t.pcap", "tx", rotate_seconds=0.05) as tx:
        for i in range(3):
            tx.write([packets[i]])
            began = time.monotonic()
            while time.monotonic() < began + 0.06:
                zc.service()
    assert len(list(tmp_path.glob("t_*.pcap"))) == 3


def test_a_full_disk_is_one_error_and_leaves_whole_packets(zc: Cluster, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk can be made: {done.stderr.strip()}")
    try:
        with zc.open_device(f"pcap:{disk}/a.pcapng", "tx") as tx:
            tx.write([frame(i, 1000) for i in range(500)])
            with pytest.raises(Error, match=r"No space left on device; it ends after \d+ packets") as caught:
                tx.flush()
            assert caught.value.code == "disk-full"
            with pytest.raises(Error, match="No space left"):
                tx.write([b"x" * 60])
        kept = records((disk / "a.pcapng").read_bytes())
        assert f"after {len(kept)} packets" in str(caught.value)
        assert [data for _, data in kept] == [frame(i, 1000) for i in range(len(kept))] and len(kept) > 200
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_reader_that_leaves_is_told_of_and_kills_nobody(zc: Cluster, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with zc.open_device(f"pcap:{fifo}", "tx") as tx:
        tx.write([b"x" * 60])
        tx.flush()
        assert os.read(reader, 4) == bytes.fromhex("0a0d0d0a")
        os.close(reader)
        tx.write([b"x" * 60])
        with pytest.raises(Error, match="is gone") as caught:
            tx.flush()
        assert caught.value.code == "reader-gone"


def test_a_slow_reader_loses_packets_and_holds_up_nobody(zc: Cluster, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with zc.open_device(f"pcap:{fifo}", "tx") as tx:
        accepted = 0
        for _ in range(100):
            accepted += tx.write([b"x" * 1500] * 64)
        assert 2000 < accepted < 6400  # what waits, and what the pipe holds
        got = bytearray()
        os.set_blocking(reader, True)

        def read() -> None:
            while piece := os.read(reader, 1 << 20):
                got.extend(piece)

        thread = threading.Thread(target=read)
        thread.start()
        tx.flush()
    thread.join()
    os.close(reader)
    assert len(records(bytes(got))) == accepted


def test_a_file_is_not_played_while_it_is_written(zc: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "a.pcap"
    file.write_bytes(pcap(some(3)))
    with zc.open_device(f"pcap:{file}", "rx"), pytest.raises(Error, match="already open in this program"):
        zc.open_device(f"pcap:{file}", "tx")
    assert file.read_bytes() == pcap(some(3))
    with zc.open_device(f"pcap:{file}", "tx"), pytest.raises(Error, match="is being written by this program"):
        zc.open_device(f"pcap:{file}", "rx")


def test_a_capture_that_cannot_be_written_says_why(zc: Cluster, tmp_path: Path) -> None:
    with pytest.raises(Error, match="is a directory"):
        zc.open_device(f"pcap:{tmp_path}", "tx")
    with pytest.raises(Error, match="no such file"):
        zc.open_device(f"pcap:{tmp_path}/none/a.pcap", "tx")


def test_a_file_is_played_onto_a_queue_that_a_dead_process_fed(tmp_path: Path) -> None:
    (tmp_path / "a.pcap").write_bytes(pcap(some(3)))
    code = (
        "import os, ringbar; zc = ringbar.Cluster.create(62, buffers=8192, queues=1, persistent=True)\n"
        "tx = zc.open_queue(0, 'tx'); assert tx.write([b'x' * 60] * 5) == 5; os._exit(0)"
    )
    try:
        subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
        with Cluster.attach(62) as zc, Cluster.attach(62) as other:
            with zc.open_device(f"pcap:{tmp_path}/a.pcap", "rx", speed=-1) as file, zc.open_queue(0, "tx") as tx:
                assert tx.send(file.recv(64, 1)) == 3
                with other.open_queue(0, "rx") as rx:
                    zc.service()
                    got = [bytes(data) for data in rx.recv(64, 5)]
            assert got == [b"x" * 60] * 5 + [data for _, data in some(3)]
    finally:
        with contextlib.suppress(Error):
            Cluster.attach(62).destroy()
