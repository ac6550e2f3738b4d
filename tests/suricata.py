# SPDX-License-Identifier: Apache-2.0
"""Suricata, which Debian 12 has in its backports only: unpacked into the images' cache; the system stays as it is."""

from __future__ import annotations

import pathlib
import re
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent / "vm"))

import newer

NEEDS = (
    "libbpf1", "libcap-ng0", "libevent-2.1-7", "libevent-core-2.1-7", "libevent-pthreads-2.1-7", "libhiredis0.14",
    "libhyperscan5", "libjansson4", "libluajit-5.1-2", "liblz4-1", "libmagic1", "libmagic-mgc", "libmaxminddb0",
    "libmnl0", "libnet1", "libnetfilter-log1", "libnetfilter-queue1", "libnfnetlink0", "libnuma1", "libpcap0.8",
    "libpcre2-8-0", "librte-net-bond23", "libxdp1", "libyaml-0-2",
)  # fmt: skip


def program(directory: pathlib.Path) -> pathlib.Path:
    """A command ``suricata`` in ``directory`` that runs it; fetched when the cache does not have it (3 s)."""

    def make(work: pathlib.Path, made: pathlib.Path) -> None:
        for suite, names in (("bookworm-backports", ("suricata", "libhtp2")), ("bookworm", NEEDS)):
            part = work / suite
            part.mkdir()
            wanted = "|".join(re.escape(name) for name in names) + "|librte-.*23"
            tree = newer.fetch(part, suite, names, wanted)
            shutil.copytree(tree, made / "tree", symlinks=True, dirs_exist_ok=True)

    tree = newer.kept("suricata", make, "bookworm") / "tree"
    (libraries,) = (path.parent for path in (tree / "usr/lib").glob("*/libhtp.so.2"))
    command = directory / "suricata"
    settings = tree / "etc/suricata/suricata.yaml"
    command.write_text(
        f"#!/bin/sh\nLD_LIBRARY_PATH={libraries} exec {tree}/usr/bin/suricata -c {settings} \\\n"
        f"  --set classification-file={tree}/etc/suricata/classification.config \\\n"
        f"  --set reference-config-file={tree}/etc/suricata/reference.config "
        '"$@"\n'
    )
    command.chmod(0o755)
    return command
