#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A second endpoint: receives from a queue with nothing but docs/protocol.md, ``mmap`` and ``struct``.

It does not use ringbar. In a VM, give it the files of the devices' memory (``/sys/bus/pci/devices/*/resource2``, after
``echo 1 > enable``); on the host, a lane and a pool under /dev/shm serve to try it. Numbers in brackets are sections of
docs/protocol.md.

    guest_client.py LANE POOL... --cluster 99 --queue 0 [--packets N] [--keep]

Each packet is printed as its length and the CRC-32 of its bytes, and given back, or with --keep held until the end.
"""

from __future__ import annotations

import argparse
import mmap
import os
import platform
import secrets
import struct
import sys
import time
import zlib
from pathlib import Path

MAGIC, ABI = 0x315241424752, 1
POOL, LANE = 1, 2  # kinds of segment
OPEN = 1  # state of a segment
LEND = 1  # kind of leg
HEADER = struct.Struct("<QIIIIQQIIQII")  # [3] the first 64 bytes of a segment
ENTRY = struct.Struct("<IIIIIIQQII")  # [3] one of a lane's table
SLOT = struct.Struct("<IIQ")  # [2]
ENTRIES_AT, ENTRY_SIZE, CTL_AT, CTL_SIZE, RINGS_AT = 4096, 64, 16384, 1024, 81920
P, C, RP, RC, SESSION, PID, CLIENT_ABI, BOOT_ID, NAME, ECHO = 0, 128, 256, 384, 512, 520, 524, 528, 544, 640


class Unfit(Exception):
    """This memory cannot be used, and why."""


class Detached(Exception):
    """The host takes the queue away, or has done so."""


class Segment:
    """A mapped file. Its words are read and written whole, in the order of the program, which x86-64 keeps [5]."""

    def __init__(self, path: Path, cluster: int, writable: bool) -> None:
        with path.open("r+b" if writable else "rb") as file:
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self.memory = mmap.mmap(file.fileno(), 0, access=access)
        size = len(self.memory)
        if size < 4096:
            raise Unfit(f"{path} is too small for a segment")
        self.words = memoryview(self.memory).cast("I")
        self.longs = memoryview(self.memory).cast("Q")
        magic, abi, self.kind, of, self.number, wanted, self.generation, _, state, _, self.buffer_size, self.buffers = (
            HEADER.unpack_from(self.memory)
        )
        if magic != MAGIC or wanted > size:  # [7] attaching
            raise Unfit(f"{path} is no segment of ringbar")
        if abi != ABI:
            raise Unfit(f"{path} speaks ABI version {abi}, this program speaks {ABI}")
        if of != cluster or not self.generation or state != OPEN:
            raise Unfit(f"{path} is no open segment of cluster {cluster}")

    def get(self, at: int) -> int:
        """The 4-byte word at offset `at`."""
        return self.words[at // 4]

    def set(self, at: int, value: int) -> None:
        """Store it, modulo 2**32."""
        self.words[at // 4] = value & 0xFFFFFFFF


class Receiver:
    """The receiving end of a queue. ``recv`` and ``give`` as in the page; ``close`` at the end."""

    def __init__(self, lane: Segment, pools: list[Segment], queue: int) -> None:
        if lane.kind != LANE or len(lane.memory) < RINGS_AT:
            raise Unfit("the first file is no lane")
        self.lane, self.queue, self.generation = lane, queue, lane.generation
        self.pools: dict[int, Segment] = {}
        for pool in pools:
            size = pool.buffer_size
            if pool.kind != POOL or pool.generation != self.generation or pool.number > 7:
                raise Unfit("a file is no pool of the lane's cluster")
            if size < 256 or size > 16384 or size & (size - 1) or pool.buffers * size > len(pool.memory):
                raise Unfit("a pool has an impossible header")
            self.pools[pool.number] = pool
        self.in_hand: set[int] = set()
        self.skipped = 0
        self.echoed = False
        self._open()

    def _open(self) -> None:
        """[7] Find the entry and announce a session."""
        lane = self.lane
        self.epoch = lane.get(40)
        for number in range(64):
            self.entry = ENTRIES_AT + number * ENTRY_SIZE
            if lane.get(self.entry) != 1:  # ready
                continue
            entry = ENTRY.unpack_from(lane.memory, self.entry)
            _, queue, kind, slots, returns, _, self.forward, self.back, _, _ = entry
            if queue == self.queue and kind == LEND:
                break
        else:
            raise Unfit(f"queue {self.queue} is not here for receiving")
        for count, most in ((slots, 65536), (returns, 262144)):
            if count < 2 or count > most or count & (count - 1):
                raise Unfit("the table is impossible")
        end = self.back + 4 * returns
        if self.forward < RINGS_AT or self.back != self.forward + 16 * slots or end > len(lane.memory):
            raise Unfit("the table is impossible")
        self.slots, self.returns = slots, returns
        self.ctl = CTL_AT + number * CTL_SIZE

        lane.set(self.ctl + CLIENT_ABI, ABI)
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        lane.memory[self.ctl + BOOT_ID : self.ctl + BOOT_ID + 16] = bytes.fromhex(boot.replace("-", ""))
        lane.memory[self.ctl + NAME : self.ctl + NAME + 32] = b"guest_client".ljust(32, b"\0")
        lane.set(self.ctl + PID, os.getpid())
        self.session = 0
        while self.session in (0, lane.longs[(self.ctl + ECHO) // 8]):
            self.session = secrets.randbits(64)
        lane.longs[(self.ctl + SESSION) // 8] = self.session

    def _started(self) -> bool:
        """[6] The echo first, then the indices from the lane."""
        lane, ctl = self.lane, self.ctl
        if not self.echoed and lane.longs[(ctl + ECHO) // 8] == self.session:
            p, self.c, self.rp, rc = (lane.get(ctl + at) for at in (P, C, RP, RC))
            if (p - self.c) & 0xFFFFFFFF > self.slots:
                self.c = p
                lane.set(ctl + C, p)
            if (self.rp - rc) & 0xFFFFFFFF > self.returns:
                self.rp = rc
                lane.set(ctl + RP, rc)
            self.echoed = True
        return self.echoed

    def _check(self) -> None:
        """[7] At every burst: is the lane still what it was?"""
        lane = self.lane
        if lane.longs[32 // 8] != self.generation or lane.longs[0] != MAGIC:
            raise Detached("the queue was detached, or its cluster destroyed")
        epoch = lane.get(40)
        if epoch != self.epoch:
            self.epoch = epoch
            if lane.get(44) != OPEN or lane.get(self.entry) != 1 or lane.get(self.entry + 4) != self.queue:
                raise Detached("the queue is being detached")
        if lane.longs[(self.ctl + SESSION) // 8] != self.session:
            raise Detached("somebody else has opened the queue")

    def recv(self, n: int = 64) -> list[tuple[int, memoryview, int]]:
        """Up to n packets: handle, bytes, time stamp. Empty when there are none, or not yet an echo."""
        self._check()
        lane = self.lane
        if not self._started() or lane.get(self.entry + 40):  # paused
            return []
        unread = (lane.get(self.ctl + P) - self.c) & 0xFFFFFFFF
        if unread > self.slots:
            raise Unfit("the host's index is impossible")
        n = min(n, unread)
        copied = [
            SLOT.unpack_from(lane.memory, self.forward + 16 * ((self.c + i) & (self.slots - 1))) for i in range(n)
        ]
        self.c = (self.c + n) & 0xFFFFFFFF
        lane.set(self.ctl + C, self.c)  # [4] published before any of them is returned
        return [packet for slot in copied if (packet := self._packet(*slot)) is not None]

    def _packet(self, handle: int, word: int, stamp: int) -> tuple[int, memoryview, int] | None:
        """[2] What a descriptor stands for; None: skip it."""
        pool, index = self.pools.get(handle >> 24), handle & 0xFFFFFF
        length, offset = word & 0x7FFF, word >> 15 & 0x3FFF
        if handle == 0:
            return None
        if pool is None or not 0 < index < pool.buffers or length + offset > pool.buffer_size or handle in self.in_hand:
            self.skipped += 1
            return None
        self.in_hand.add(handle)
        at = index * pool.buffer_size + offset
        return handle, memoryview(pool.memory)[at : at + length], stamp

    def give(self, handles: list[int]) -> None:
        """[4] Give back: there is always room."""
        for handle in handles:
            self.in_hand.remove(handle)
            self.lane.set(self.back + 4 * (self.rp & (self.returns - 1)), handle)
            self.rp = (self.rp + 1) & 0xFFFFFFFF
        self.lane.set(self.ctl + RP, self.rp)

    def close(self) -> None:
        """Give back everything, and say that nobody is here. Safe after Detached; not after the generation changed."""
        if self.lane.longs[32 // 8] == self.generation:
            if self.in_hand:
                self.give(list(self.in_hand))
            self.lane.set(self.ctl + PID, 0)


def main() -> int:
    """0 when all packets came, 3 when the host detached the queue, 1 with a message otherwise."""
    parser = argparse.ArgumentParser(description="receive from a queue without ringbar")
    parser.add_argument("lane", type=Path)
    parser.add_argument("pool", type=Path, nargs="+")
    parser.add_argument("--cluster", type=int, required=True)
    parser.add_argument("--queue", type=int, required=True)
    parser.add_argument("--packets", type=int, default=0, help="end after so many; 0 = never")
    parser.add_argument("--keep", action="store_true", help="give nothing back before the end")
    options = parser.parse_args()
    if platform.machine() not in ("x86_64", "AMD64"):
        print("error: Python has no barriers, and this processor needs them", file=sys.stderr)
        return 1
    receiver = None
    try:
        pools = [Segment(path, options.cluster, writable=False) for path in options.pool]
        receiver = Receiver(Segment(options.lane, options.cluster, writable=True), pools, options.queue)
        print("open", flush=True)
        received, idle = 0, 0
        while not options.packets or received < options.packets:
            burst = receiver.recv()
            idle = 0 if burst else idle + 1
            for _, data, _ in burst:
                print(len(data), f"{zlib.crc32(data):08x}")
            sys.stdout.flush()
            received += len(burst)
            if burst and not options.keep:
                receiver.give([handle for handle, _, _ in burst])
            if idle > 100:
                time.sleep(0.0005)
    except (Unfit, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except Detached as problem:
        print(f"detached: {problem}", file=sys.stderr)
        return 3
    finally:
        if receiver is not None:
            receiver.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
