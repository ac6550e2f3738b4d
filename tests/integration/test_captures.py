# SPDX-License-Identifier: Apache-2.0
"""Real capture files that Debian packages ship, some made to try pcapng readers with: ours sees what tshark sees."""

from __future__ import annotations

import concurrent.futures
import pathlib
import shutil
import subprocess
import sys
from decimal import Decimal

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "vm"))

import newer

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = ("golang-github-google-gopacket-dev", "sip-tester")


@pytest.fixture(scope="module")
def captures() -> list[pathlib.Path]:
    """All of them; fetched when the cache does not have them."""
    if shutil.which("tshark") is None:
        pytest.skip("tshark is not installed")

    def make(work: pathlib.Path, made: pathlib.Path) -> None:
        tree = newer.fetch(work, "bookworm", PACKAGES, "|".join(PACKAGES))
        for number, file in enumerate(sorted(tree.glob("**/*.pcap*"))):
            shutil.copyfile(file, made / f"{number:02}-{file.name}")

    return sorted(newer.kept("captures", make, *PACKAGES).glob("*.pcap*"))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tests of the reader, under the sanitizers."""
    program = tmp_path_factory.mktemp("program") / "test_pcapfile"
    command = ["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-O1", "-g", "-fsanitize=address,undefined"]
    command += ["-fno-sanitize-recover=all", "-I", str(ROOT / "shared/csrc"), "-o", str(program)]
    command += [str(ROOT / "tests/c/test_pcapfile.c"), str(ROOT / "shared/csrc/pcapfile.c")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(program)


def test_times_and_lengths_are_those_that_tshark_sees(captures: list[pathlib.Path], program: str) -> None:
    assert len(captures) > 60

    def compare(file: pathlib.Path) -> int:
        said = subprocess.run([program, "--list", str(file)], capture_output=True, text=True, check=True, timeout=60)
        ours = [tuple(map(int, line.split()[2:])) for line in said.stdout.splitlines() if line[0].isdigit()]
        fields = ("frame.time_epoch", "frame.cap_len", "frame.len", "frame.interface_id")
        words = [word for field in fields for word in ("-e", field)]
        shown = subprocess.run(
            ["tshark", "-n", "-r", str(file), "-T", "fields", *words], capture_output=True, text=True, timeout=60
        ).stdout
        theirs = []
        for line in shown.splitlines():
            time, kept, length, interface = line.split("\t")
            if interface or file.suffix == ".pcap":
                theirs.append((int(Decimal(time or 0) * 10**9), int(kept), int(length)))
        assert ours == theirs, f"{file}: {said.stdout}\n{shown}"
        return len(ours)

    # Of those that are there in both byte orders, which other tests compare, each in one.
    some = [file for i, file in enumerate(captures) if file.suffix == ".pcap" or i % 2]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        packets = sum(pool.map(compare, some))
    assert packets > 400


def test_tampered_real_captures_are_read_without_harm(captures: list[pathlib.Path], program: str) -> None:
    done = subprocess.run([program, *map(str, captures)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
