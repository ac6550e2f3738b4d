# SPDX-License-Identifier: Apache-2.0
"""docs/protocol.md says what rb_layout.h says: its tables are compared with what a C program prints."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
SOURCES = TOP / "shared" / "csrc"
PAGE = TOP / "docs" / "protocol.md"

#: Sections whose tables give bits: the masks in the order of the rows, as C expressions.
BITS = {
    "### Ledger words": ["RB_WORD(7, 0)", "RB_WORD(0, 0xffff)", "RB_WORD_SUB(3, 0, 0)", "RB_WORD_SUB(0, 0xffff, 0)",
                         "RB_WORD_SUB(0, 0, 0xffff)"],
    "## 9. Intents: the order of stores": ["RB_INTENT(15, 0, 0, 0)", "RB_INTENT(0, 0, 0xfff, 0)",
                                           "RB_INTENT(0, 0xffff, 0, 0)", "RB_INTENT(0, 0, 0, 0xffffffffu)"],
    "## 14. Bells": ["RB_ARMED(0, 0xffffffffu)", "RB_ARMED(0xffffffffu, 0)"],
}  # fmt: skip
HEADING = re.compile(r"^`struct (\w+)`, (\d+) bytes$")
ROW = re.compile(r"^\| (\d+) \| (\d+) \| `(\w+)` \|")
NUMBER = re.compile(r"^\| `(RB_\w+)` \| (\d+) \|")
BIT_ROW = re.compile(r"^\| (\d+)\.\.(\d+) \|")
STRUCT = re.compile(r"^struct (\w+) \{", re.MULTILINE)

Row = tuple[int, int, str]  # offset, size, field


@lru_cache(maxsize=1)
def page() -> tuple[dict[str, tuple[int, list[Row]]], dict[str, int], dict[str, list[tuple[int, int]]]]:
    """The page's structures (size and rows), its numbers, and its bits by section."""
    structures: dict[str, tuple[int, list[Row]]] = {}
    numbers: dict[str, int] = {}
    bits: dict[str, list[tuple[int, int]]] = {}
    current, section = "", ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            current, section = "", line
        elif match := HEADING.match(line):
            current = match[1]
            assert current not in structures, f"struct {current} has two tables"
            structures[current] = (int(match[2]), [])
        elif match := ROW.match(line):
            assert current, f"a row outside a structure's table: {line}"
            structures[current][1].append((int(match[1]), int(match[2]), match[3]))
        elif match := NUMBER.match(line):
            numbers[match[1]] = int(match[2])
        elif (match := BIT_ROW.match(line)) and section in BITS:
            bits.setdefault(section, []).append((int(match[1]), int(match[2])))
    return structures, numbers, bits


def ask(directory: Path, expressions: list[str]) -> list[int]:
    """What C expressions are, as the compiler of this machine sees them."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler (apt-get install gcc)")
    prints = "\n".join(f'    printf("%llu\\n", (unsigned long long)({e}));' for e in expressions)
    includes = "".join(f"#include {header}\n" for header in ('"rb_layout.h"', "<stddef.h>", "<stdio.h>"))
    source, program = directory / "ask.c", directory / "ask"
    source.write_text(f"{includes}int main(void)\n{{\n{prints}\n    return 0;\n}}\n", encoding="utf-8")
    done = subprocess.run([compiler, "-std=gnu11", f"-I{SOURCES}", "-o", str(program), str(source)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, f"the page names what rb_layout.h has not:\n{done.stderr}"
    said = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return [int(line) for line in said.split()]


def test_every_structure_has_a_table() -> None:
    assert set(page()[0]) == set(STRUCT.findall((SOURCES / "rb_layout.h").read_text(encoding="utf-8")))


def test_offsets_and_sizes(tmp_path: Path) -> None:
    expressions, said = [], []
    for name, (size, rows) in page()[0].items():
        expressions.append(f"sizeof(struct {name})")
        said.append((f"struct {name}", size))
        for offset, length, field in rows:
            expressions += [f"offsetof(struct {name}, {field})", f"sizeof(((struct {name} *)0)->{field})"]
            said += [(f"offset of {name}.{field}", offset), (f"size of {name}.{field}", length)]
    found = ask(tmp_path, expressions)
    wrong = [f"{what}: the page says {value}, it is {is_}" for (what, value), is_ in zip(said, found) if value != is_]
    assert not wrong, "\n".join(wrong)
    assert len(said) == len(found) > 150


def test_tables_leave_nothing_out() -> None:
    """Rows follow each other without a gap from 0 to the structure's end: a field that was added is missed."""
    for name, (size, rows) in page()[0].items():
        at = 0
        for offset, length, field in rows:
            assert offset == at, f"{name}.{field} is at {offset}, the row before ends at {at}"
            at += length
        assert at == size, f"the table of {name} ends at {at} of {size}"


def test_numbers(tmp_path: Path) -> None:
    numbers = page()[1]
    assert dict(zip(numbers, ask(tmp_path, list(numbers)))) == numbers
    assert len(numbers) > 15


def test_bits(tmp_path: Path) -> None:
    for section, masks in BITS.items():
        rows = page()[2].get(section, [])
        said = [(1 << (last + 1)) - (1 << first) for first, last in rows]
        assert said == ask(tmp_path, masks), section


def test_constants_of_the_text(tmp_path: Path) -> None:
    """Values that stand in sentences and cells."""
    text = PAGE.read_text(encoding="utf-8")
    expected = {
        "0x315241424752": "RB_MAGIC",
        "1 pool, 2 lane, 3 state, 4 bell":
            "RB_KIND_POOL * 1000 + RB_KIND_LANE * 100 + RB_KIND_STATE * 10 + RB_KIND_BELL",
        "0 free, 1 open, 2 closing, 3 gone":
            "RB_SEG_FREE * 1000 + RB_SEG_OPEN * 100 + RB_SEG_CLOSING * 10 + RB_SEG_GONE",
        "1 LEND, 2 GRANT, 3 DIRECT": "RB_LEG_LEND * 100 + RB_LEG_GRANT * 10 + RB_LEG_DIRECT",
        "0 none, 1 HOME, 2 LENT, 3 in a DEVICE, 4 SHARED, 5 QUARANTINED":
            "RB_W_HOME * 10000 + RB_W_LENT * 1000 + RB_W_DEVICE * 100 + RB_W_SHARED * 10 + RB_W_QUARANTINED",
        "0 none, 1 SHARED, 2 LENT, 3 in a DEVICE": "RB_SUB_SHARED * 100 + RB_W_LENT * 10 + RB_W_DEVICE",
        "0 none, 1 LEND, 2 TAKE, 3 GRANT, 4 COLLECT, 5 FAN":
            "RB_OP_LEND * 10000 + RB_OP_TAKE * 1000 + RB_OP_GRANT * 100 + RB_OP_COLLECT * 10 + RB_OP_FAN",
        "29 SHARED, 30 META, 31 MORE": "RB_SHARED * 100 + RB_META * 10 + RB_MORE",
    }  # fmt: skip
    for sentence in expected:
        assert sentence in text, sentence
    assert ask(tmp_path, list(expected.values())) == [0x315241424752, 1234, 123, 123, 12345, 123, 12345, 124]
