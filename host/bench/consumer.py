# SPDX-License-Identifier: Apache-2.0
"""A Python consumer at its fastest: ``for burst in queue``, reading ``burst.lengths``, fed by a process of C."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ringbar.errors import Error
from ringbar.host.bench import programs

CLUSTER = 1
START_SECONDS = 20.0
"""Until the producer must have begun."""


@dataclass(frozen=True)
class Run:
    """One run.

    :ivar mpps: million packets a second that the consumer's loop went through.
    :ivar numpy: its version, or None.
    """

    mpps: float
    packets: int
    bursts: int
    seconds: float
    numpy: str | None
    producer: str


@contextlib.contextmanager
def private() -> Iterator[None]:
    """A registry and memory of our own, so that no cluster of this host is met."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="ringbar-bench-", dir=memory) as root:
        before = {name: os.environ.get(name) for name in ("RINGBAR_RUN", "RINGBAR_SHM")}
        os.environ.update(RINGBAR_RUN=root, RINGBAR_SHM=root)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextlib.contextmanager
def _producer(seconds: float) -> Iterator[None]:
    """A process of C that sends descriptors as fast as it goes, and writes no payload."""
    with tempfile.TemporaryDirectory(prefix="ringbar-bench-") as directory:
        program = programs.build(Path(directory), "pump.c", linked=True)
        process = subprocess.Popen(
            [str(program), "tx", f"{CLUSTER}@0", "64", "0", f"{seconds + START_SECONDS:g}", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "LD_LIBRARY_PATH": str(programs.library().parent)},
        )
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                _, said = process.communicate(timeout=START_SECONDS)
                raise Error(f"the producer did not start: {said.strip() or 'it said nothing'}", code="bench-failed")
            yield
        finally:
            process.kill()
            process.communicate(timeout=START_SECONDS)


def measure(*, burst: int, slots: int, seconds: float) -> Run:
    """One run of the consumer.

    :param burst: most packets that a step of its loop gets.
    :param slots: of the queue.
    :raises Error: the producer did not start, or nothing came.
    """
    import ringbar
    from ringbar.burst import numpy

    np = numpy()
    with private(), ringbar.Cluster.create(CLUSTER) as cluster:
        cluster.create_queue(0, slots=slots)
        with cluster.open_queue(0, "rx") as rx, _producer(seconds):
            packets = bursts = octets = 0
            began = 0.0
            deadline = time.monotonic() + START_SECONDS
            for got in rx.bursts(burst, timeout=1.0):
                if not began:  # the first packets warm it up: time counts from here
                    if len(got):
                        began = time.monotonic()
                        deadline = began + seconds
                    elif time.monotonic() > deadline:
                        raise Error("no packet came from the producer", code="bench-failed")
                    continue
                lengths = got.lengths
                packets += len(lengths)
                octets += int(lengths[0]) if len(lengths) else 0
                bursts += 1
                if not bursts & 63 and time.monotonic() >= deadline:
                    break
            took = time.monotonic() - began
    if not packets or octets != 64 * bursts:
        raise Error("what arrived is not what was sent", code="bench-failed")
    return Run(
        mpps=packets / took / 1e6,
        packets=packets,
        bursts=bursts,
        seconds=took,
        numpy=getattr(np, "__version__", None),
        producer="fed by a C program in another process, which writes no payload",
    )
