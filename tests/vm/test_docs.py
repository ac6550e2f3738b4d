# SPDX-License-Identifier: Apache-2.0
"""The shell blocks of the documentation's pages that need virtual machines, in order, as docpages.py says.

quickstart.md and guest.md boot the VM that they speak of; the others find VMs of libvirt.
"""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

import docpages
import pytest
from libvirttools import Daemons, tiny_domain, why_not
from tinyguest import TinyVm

pytestmark = pytest.mark.vm

HERE = "tests/vm/test_docs.py"
DOMAINS = {
    "examples.md": ["fw1", "ids1"],
    "host.md": ["ids1"],
    "libvirt.md": ["ids1"],
    "topologies.md": ["ids1", "ids2"],
    "troubleshooting.md": ["ids1"],
}
"""VMs of libvirt that a page speaks of."""


@contextlib.contextmanager
def generator() -> Iterator[None]:
    """A VM that libvirt does not know, its monitor at /run/vm/gen.qmp."""
    directory = pathlib.Path("/run/vm")
    with tempfile.TemporaryDirectory(prefix="rb-") as aside, TinyVm(pathlib.Path(aside)) as vm:
        vm.wait_ready()
        directory.mkdir(exist_ok=True)
        link = directory / "gen.qmp"
        link.symlink_to(vm.qmp)
        try:
            yield
        finally:
            link.unlink()
            with contextlib.suppress(OSError):  # others' VMs are in it
                directory.rmdir()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page.name for page in docpages.PAGES if docpages.runner(page) == HERE])
def test_the_commands_of_a_page_work_in_order(page: str, image: None) -> None:
    with contextlib.ExitStack() as started:
        if page in DOMAINS:
            if why_not() is not None:
                pytest.skip(str(why_not()))
            started.callback(Daemons().close)
        for name in DOMAINS.get(page, ()):
            started.enter_context(tiny_domain(name))
        if page == "topologies.md":
            started.enter_context(generator())
        (path,) = [path for path in docpages.PAGES if path.name == page]
        good, said = docpages.run(docpages.session(path), alone=page not in DOMAINS, timeout=400)
    assert good, said
