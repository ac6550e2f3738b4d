# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration. `make docs` builds with warnings as errors, in the environment that has ringbar installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from typing import Any, ClassVar

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, os.path.dirname(__file__))
import header

project = "ringbar"
copyright = "the ringbar authors; Apache-2.0"
release = version = metadata.version("ringbar")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

html_theme = "alabaster"
html_theme_options = {"description": "packets in shared buffers, across processes and VMs", "fixed_sidebar": True}
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}


class CommandHelp(SphinxDirective):
    """``{ringbar-help} COMMAND``: what ``ringbar COMMAND --help`` prints, so that it is never out of date."""

    required_arguments = 0
    optional_arguments = 3
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        command = [sys.executable, "-P", "-m", "ringbar", *self.arguments, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
        if done.returncode != 0:
            raise self.error(f"ringbar {' '.join(self.arguments)} --help: {done.stderr.strip()}")
        return [nodes.literal_block(done.stdout, done.stdout, language="text")]


class Header(SphinxDirective):
    """``{ringbar-header}``: ringbar.h, section by section; what its comments say, and the declarations themselves."""

    def run(self) -> list[nodes.Node]:
        path = os.path.join(self.env.srcdir, "../shared/csrc/ringbar.h")
        self.env.note_dependency(os.path.abspath(path))
        with open(path, encoding="utf-8") as file:
            text = file.read()
        opening = header.introduction(text)
        made: list[nodes.Node] = [nodes.literal_block(opening, opening, language="text")]
        for each in header.sections(text):
            section = nodes.section(ids=[nodes.make_id(f"c-{each.title}")])
            section += nodes.title(each.title, each.title.capitalize())
            section += [nodes.paragraph(part, part) for part in each.text.split("\n\n") if part]
            for entry in each.entries:
                if entry.comment:
                    section += nodes.paragraph(entry.comment, entry.comment)
                section += nodes.literal_block(entry.code, entry.code, language="c")
            made.append(section)
        return made


def setup(app: Sphinx) -> None:
    app.add_directive("ringbar-help", CommandHelp)
    app.add_directive("ringbar-header", Header)
