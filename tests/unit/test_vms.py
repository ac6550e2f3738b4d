# SPDX-License-Identifier: Apache-2.0
"""VMs as the service sees them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from ringbar.errors import Error
from ringbar.host import vms


def test_a_vm_that_ends_while_it_is_asked_gives_its_monitor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the agent, which lends it, would wait for it for ever."""
    said = []

    class Ending:
        via = "QMP"

        @classmethod
        def connect(cls, *address: object, **options: object) -> Ending:
            return cls()

        def info(self) -> None:
            raise Error("the VM ended in the middle of this", code="vm-died")

        def close(self) -> None:
            said.append("closed")

    @contextlib.contextmanager
    def lent(key: str) -> Iterator[None]:
        said.append("lent")
        try:
            yield
        finally:
            said.append("given back")

    monkeypatch.setattr(vms, "Vm", Ending)
    monkeypatch.setattr(vms, "monitor_lent", lent)
    with pytest.raises(Error, match="ended"):
        vms.connect(vms.Name("qmp:/vm"), time.monotonic() + 5, lambda step: None)
    assert said == ["lent", "closed", "given back"]
