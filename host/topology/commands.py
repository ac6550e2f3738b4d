# SPDX-License-Identifier: Apache-2.0
"""The commands ``plan`` and ``apply``."""

from __future__ import annotations

import argparse
import sys

from ringbar.cli.common import DIFFERS, DONE, Output, add_json, examples, plain, plural, seconds
from ringbar.errors import Error
from ringbar.host.commands import service


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    """Declare the options of command ``name``."""
    parser.add_argument(
        "file", metavar="FILE", nargs="?" if name == "plan" else None, help="a topology; -: standard input"
    )
    add_json(parser)
    if name == "plan":
        parser.description = "What applying a topology would do: nothing is changed."
        parser.epilog = examples(
            "ringbar plan ids.yaml",
            "ringbar plan ids.yaml --check       exit status 3 when something would change",
            "ringbar plan --schema               the JSON Schema for editors",
        )
        parser.add_argument("--check", action="store_true", help="exit with 3 when something would change")
        parser.add_argument("--schema", action="store_true", help="print the schema of topology files")
        parser.set_defaults(run=_plan)
        return
    parser.description = (
        "Make it as a topology file says, with the least change: what fits stays, and its packets flow on.\n"
        "Only what bears the file's name is ever removed. A second time changes nothing."
    )
    parser.epilog = examples(
        "ringbar apply ids.yaml",
        "ringbar apply ids.yaml --rollback-after 60    as before after 60 s, unless 'ringbar apply ids.yaml' confirms",
    )
    parser.add_argument(
        "--rollback-after", type=seconds, metavar="S", help="go back after S seconds unless it is applied again (agent)"
    )
    parser.set_defaults(run=_apply)


def _text(file: str) -> str:
    try:
        if file == "-":
            return sys.stdin.read()
        with open(file, encoding="utf-8") as opened:
            return opened.read()
    except OSError as e:
        raise Error(
            f"{file}: {(e.strerror or str(e)).lower()}", code="no-such-file", cure="name a topology file"
        ) from None
    except UnicodeDecodeError:
        raise Error(f"{file} is no text in UTF-8", code="bad-topology", cure="save it as UTF-8") from None


def _plan(options: argparse.Namespace, out: Output) -> int:
    if options.schema:
        import json

        from ringbar.host.topology.schema import json_schema

        print(json.dumps(json_schema(), indent=2))
        return DONE
    if options.file is None:
        raise Error("which file?", code="usage", cure="ringbar plan FILE")
    made = service().plan(_text(options.file), options.file)
    out.document({"result": "differs" if made.changed else "unchanged", **plain(made)})
    if not made.changed:
        out.say(f"unchanged: everything is as {options.file} says")
        return DONE
    for step in made.steps:
        out.say(f"  {_sign(step.do)} {step.text}")
    out.say(f"{plural(len(made.steps), 'step')}; ringbar apply {options.file} takes them")
    return DIFFERS if options.check else DONE


def _sign(do: str) -> str:
    kind = do.rsplit("-", 1)[-1]
    return {"create": "+", "start": "+", "attach": "+", "set": "~", "filter": "~"}.get(kind, "-")


def _apply(options: argparse.Namespace, out: Output) -> int:
    text = _text(options.file)
    with out.progress() as progress:
        done = service().apply(text, options.file, rollback_after=options.rollback_after, progress=progress)
    out.document({"result": "changed" if done.changed else "unchanged", **plain(done)})
    for step in done.steps:
        out.say(f"  {_sign(step.do)} {step.text}")
    if not done.changed:
        out.say(f"unchanged: everything is as {options.file} says")
    if options.rollback_after is not None:
        out.say(f"in {options.rollback_after:g} s it is as before; to keep it: ringbar apply {options.file}")
    return DONE
