# SPDX-License-Identifier: Apache-2.0
"""Every unit test has a registry and memory of its own, and leaves nothing behind."""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for hashing


@pytest.fixture(autouse=True)
def private_directories(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """RINGBAR_RUN and RINGBAR_SHM of this test alone, for /run/ringbar and /dev/shm; child processes inherit them."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    root = Path(tempfile.mkdtemp(prefix="ringbar-test-", dir=memory))
    for variable, name in (("RINGBAR_RUN", "run"), ("RINGBAR_SHM", "shm")):
        (root / name).mkdir()
        monkeypatch.setenv(variable, str(root / name))
    yield root
    gc.collect()  # attachments that a failed test left in a traceback or a cycle
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def core() -> Any:
    """The C part; skips where it is not built."""
    try:
        import ringbar._c
    except ImportError as problem:
        pytest.skip(f"the C core is not built: {problem}")
    return ringbar._c


@pytest.fixture
def cluster(core: Any) -> Iterator[Any]:
    """A small cluster with two queues of 256 slots, 1@0 and 1@1."""
    import ringbar

    with ringbar.Cluster.create(1, buffers=8192) as made:
        made.create_queue(0, slots=256)
        made.create_queue(1, slots=256)
        yield made


@pytest.fixture
def pair(cluster: Any) -> Iterator[tuple[Any, Any]]:
    """Both ends of 1@0 in one program: (tx, rx), each of its own Cluster object, as two programs have."""
    import ringbar

    with ringbar.Cluster.attach(1) as other, cluster.open_queue(0, "tx") as tx, other.open_queue(0, "rx") as rx:
        cluster.service()  # the lender greets the consumer, who receives nothing before
        yield tx, rx
