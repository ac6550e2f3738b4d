# SPDX-License-Identifier: Apache-2.0
"""ringbar.h taken apart, for docs/c.md: its introduction, and sections of declarations with what is said of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_SECTION = re.compile(r"/\* ---- (.+?) -{4,}")
_NAME = re.compile(r"\b((?:rb|RB)_\w+)\b")


@dataclass
class Entry:
    """Declarations that stand together, and what the header says of them."""

    comment: str
    code: str

    @property
    def names(self) -> list[str]:
        """What it declares, and what it mentions."""
        return list(dict.fromkeys(_NAME.findall(self.code)))


@dataclass
class Section:
    """A part of the header."""

    title: str
    text: str = ""
    entries: list[Entry] = field(default_factory=list)


def _text(comment: str) -> str:
    """A comment's words, without its frame."""
    comment = comment.strip().removeprefix("/*").removesuffix("*/")
    lines = [re.sub(r"^ ?\* ?", "", line).rstrip() for line in comment.strip().splitlines()]
    return "\n".join(lines).strip()


def introduction(header: str) -> str:
    """The comment that the header begins with, without the licence."""
    return _text(header.split("*/")[0]).split("\n", 1)[1].strip()


def sections(header: str) -> list[Section]:
    """All that is declared, in order."""
    body = header[_SECTION.search(header).start() : header.rindex("#ifdef __cplusplus")]  # type: ignore[union-attr]
    found: list[Section] = []
    comment, code = "", ""

    def end_of_entry() -> None:
        nonlocal comment, code
        if code:
            found[-1].entries.append(Entry(_text(comment), code.rstrip()))
            comment, code = "", ""

    lines = iter(body.splitlines())
    for line in lines:
        if line.startswith("/*"):
            end_of_entry()
            while "*/" not in line:
                line += "\n" + next(lines)
            section = _SECTION.match(line)
            if section:
                found.append(Section(section[1], _text("/*" + line[section.end() :])))
            else:
                comment = line
        elif not line and code.count("{") == code.count("}"):
            end_of_entry()
        else:
            code += line + "\n"
    end_of_entry()
    return found
