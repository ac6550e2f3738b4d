# SPDX-License-Identifier: Apache-2.0
"""The command line as it is typed: options, help, exit statuses, error documents. Nothing here needs the C core."""

from __future__ import annotations

import io
import json
import re
import resource
import shlex
import subprocess
import sys
import threading
from typing import Any

import pytest

from ringbar.cli import COMMANDS, common, main
from ringbar.errors import BadAddress, Busy, Error

Capture = pytest.CaptureFixture[str]

HELPS = [
    [],
    ["cluster"],
    ["cluster", "create"],
    ["cluster", "list"],
    ["cluster", "show"],
    ["cluster", "destroy"],
    ["queue"],
    ["queue", "create"],
    ["queue", "set"],
    ["queue", "destroy"],
    ["attach"],
    ["detach"],
    ["status"],
    ["top"],
    ["count"],
    ["send"],
    ["bridge"],
    ["balance"],
    ["fanout"],
    ["merge"],
    ["delay"],
    ["replicate"],
    ["pipeline"],
    ["capture"],
    ["worker"],
    ["worker", "list"],
    ["worker", "show"],
    ["worker", "set"],
    ["worker", "pause"],
    ["worker", "resume"],
    ["worker", "stop"],
    ["bench"],
    ["bench", "ring"],
    ["bench", "vm"],
    ["bench", "python"],
    ["doctor"],
]


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_has_examples_and_exits_zero(words: list[str], capsys: Capture) -> None:
    assert main([*words, "--help"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "examples:" in said.out
    assert re.search(rf"^  ringbar {' '.join(words)}", said.out.partition("examples:")[2], re.MULTILINE)


def test_help_names_every_command(capsys: Capture) -> None:
    main(["--help"])
    said = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", said, re.MULTILINE)


REPORTING = [words for words in HELPS if words and words not in (["cluster"], ["queue"], ["worker"], ["bench"])]


@pytest.mark.parametrize("words", REPORTING, ids=" ".join)
def test_every_command_that_reports_takes_json(words: list[str], capsys: Capture) -> None:
    main([*words, "--help"])
    assert "--json" in capsys.readouterr().out


def test_examples_in_help_can_be_parsed(capsys: Capture) -> None:
    """Every example is a command line that its own parser accepts."""
    from ringbar.cli import _parser, read

    tried = 0
    for words in HELPS[1:]:
        main([*words, "--help"])
        for line in capsys.readouterr().out.partition("examples:")[2].splitlines():
            command = shlex.split(re.split(r"\s{2,}|\|", line.strip())[0])
            if command[:1] == ["ringbar"]:
                read(_parser(command[1]), command[2:])
                tried += 1
    assert tried > 40


USAGE = [
    (["frobnicate"], "there is no command 'frobnicate'"),
    (["statsu"], "there is no command 'statsu'"),
    (["cluster"], "required"),
    (["cluster", "create"], "required"),
    (["cluster", "create", "ids"], "a number from 0 to 65535"),
    (["cluster", "create", "65536"], "a number from 0 to 65535"),
    (["cluster", "create", "-1"], ""),
    (["cluster", "create", "99", "--queues", "x"], "'x' is not a number"),
    (["cluster", "create", "99", "--queues", "1.5"], "not a whole number"),
    (["cluster", "create", "99", "--queues", "5000"], "at most 2048"),
    (["cluster", "create", "99", "--buffers", "0"], "at least 1"),
    (["cluster", "create", "99", "--buffers", "many"], "'many' is not a number"),
    (["cluster", "create", "99", "--size", "2q"], "unknown unit"),
    (["cluster", "create", "99", "--pages", "3M"], "invalid choice"),
    (["cluster", "create", "99", "--slots", "64"], "--queues is missing"),
    (["cluster", "create", "99", "--label", "x" * 32], "31 bytes"),
    (["queue", "set", "99@0"], "required"),
    (["queue", "set", "99@0", "--pause", "--resume"], "not allowed with"),
    (["attach"], "required"),
    (["attach", "qmp:/x", "99@0", "--pool", "rx"], "invalid choice"),
    (["attach", "qmp:/x", "99@0", "--timeout", "soon"], "'soon' is not a number"),
    (["attach", "qmp:/x", "99@0", "--timeout", "3 days"], "unknown unit"),
    (["count"], "required"),
    (["count", "-i", "99@0", "--packets", "0"], "at least 1"),
    (["count", "-i", "99@0", "--seconds", "nan"], "'nan' is not a number"),
    (["count", "-i", "eth 1"], "no interface can have this name"),
    (["count", "-i", "99@x"], "a number or a range"),
    (["count", "-i", "99@0,99@1"], "2 devices where one is wanted"),
    (["count", "-i", "70000@0"], "0 to 65535"),
    (["count", "-i", "99@0", "-c", "98"], "the queue is of cluster 99"),
    (["send", "-o", "99@0", "--rate", "0"], "more than 0"),
    (["send", "-o", "99@0", "--window", "4"], "add -i DEV"),
    (["send", "-o", "99@0", "--size", "60"], "--size 74"),
    (["send", "-o", "99@0", "-i", "98@0"], "packets move within one cluster"),
    (["send", "-o", "99@0", "-i", "99@0"], "would feed itself"),
    (["send", "-o", "99@0", "--core", "4095"], "no processor 4095"),
    (["send", "-o", "99@0", "--vlan", "1", "--size", "74"], "--size 78"),
    (["send", "-o", "99@0", "--size", "100,x"], "'x' is not a number"),
    (["send", "-o", "99@0", "--rate", "1Xpps"], "unknown unit"),
    (["send", "-o", "99@0", "--src", "10.0.0.300"], "no IP address"),
    (["send", "-o", "99@0", "--src", "10.0.0.9", "--dst", "::1"], "one IP version"),
    (["send", "-o", "99@0", "--dport", "90-80"], "80-90"),
    (["send", "-o", "99@0", "--vlan", "4095"], "4094"),
    (["send", "-o", "99@0", "--src-mac", "02:00"], "02:00:00:00:00:01"),
    (["send", "-o", "99@0", "--hex", "00ff"], "2 bytes"),
    (["send", "-o", "99@0", "--hex", "/nowhere/x"], "no such file"),
    (["send", "-o", "99@0", "--hex", "00" * 20, "--pcap", "x"], "one of the two"),
    (["send", "-o", "99@0", "--hex", "00" * 20, "--src", "10.0.0.1"], "--src is of packets made here"),
    (["send", "-o", "99@0", "--steer", "udp", "--take-all"], "not allowed with"),
    (["count", "-i", "99@0", "--partial"], "add --verify"),
    (["count", "-i", "99@0", "--name", "a/b"], "no name"),
    (["count", "-i", "99@0", "--steer", "udp"], "--filter"),
    (["worker", "stop"], "required"),
    (["worker", "stop", "../x"], "no name"),
    (["worker", "set", "w"], "nothing is to be changed"),
    (["worker", "set", "w", "-o", "99@x"], "a number or a range"),
    (["bridge", "-i", "99@0"], "required"),
    (["bridge", "-i", "99@0", "-o", "99@1", "-o", "99@2"], "each -i needs its -o"),
    (["bridge", "-i", "99@0", "-o", "99@1", "--both"], "one way only"),
    (["bridge", "-i", "99@0", "-o", "99@1", "-i", "99@0", "-o", "99@2"], "named twice"),
    (["bridge", "-i", "99@0", "-o", "99@1", "--idle", "lazy"], "invalid choice"),
    (["balance", "-i", "99@0"], "-o DEV, or -c ID -n N"),
    (["balance", "-o", "99@0"], "required"),
    (["balance", "-i", "99@0", "-n", "2"], "add -c ID"),
    (["balance", "-i", "99@0", "-c", "98", "-n", "2"], "packets move within one cluster"),
    (["balance", "-i", "zc:x", "-c", "98", "-n", "2", "-o", "98@0"], "one of the two"),
    (["balance", "-i", "zc:x", "-c", "98", "-n", "0"], "at least 1"),
    (["balance", "-i", "zc:x", "-c", "98", "-n", "2,x"], "'x' is not a number"),
    (["balance", "-i", "zc:x", "-c", "98", "-n", "200,200"], "at most 256"),
    (["balance", "-i", "99@0", "-o", "99@1", "-m", "random"], "there is no policy 'random'"),
    (["balance", "-i", "99@0", "-o", "99@1,99@2", "--weights", "1"], "1 weight for 2 outputs"),
    (["balance", "-i", "99@0", "-o", "99@1", "--weights", "0"], "from 1 to 1024"),
    (["balance", "-i", "99@0", "-o", "99@1", "-o", "99@1"], "named twice"),
    (["balance", "-i", "99@0-2", "-o", "99@2"], "would feed itself"),
    (["fanout", "-i", "99@0", "-o", "99@1-65"], "at most 64"),
    (["merge", "-i", "99@0", "-o", "99@1,99@2"], "2 devices where one is wanted"),
    (["merge", "-i", "99@0", "-o", "99@1", "--wait", "0"], "--wait 1ms"),
    (["delay", "-i", "99@0", "-o", "99@1"], "required"),
    (["delay", "-i", "99@0", "-o", "99@1", "--by", "2h"], "longer than an hour"),
    (["delay", "-i", "99@0", "-i", "99@1", "-o", "99@2", "--by", "1ms"], "each -i needs its -o"),
    (["replicate", "-i", "99@0"], "-o DEV,DEV"),
    (["replicate", "-i", "99@0,99@0", "-o", "99@2"], "named twice"),
    (["pipeline", "-i", "99@0", "-o", "99@1", "-i", "99@1"], "each -i needs its -o"),
    (["pipeline", "-i", "99@0", "-o", "99@1", "-g", "0,1"], "2 processors for 1 stage"),
    (["pipeline", "-i", "zc:x", "-o", "zc:y"], "add -c ID"),
    (["pipeline", "-i", "98@0", "-o", "99@1"], "packets move within one cluster"),
    (["capture", "-i", "99@0"], "required"),
    (["capture", "-w", "x"], "required"),
    (["capture", "-i", "99@0", "--observe", "99@0", "-w", "x"], "not allowed with"),
    (["bench", "ring", "--burst", "257"], "at most 256"),
    (["bench", "ring", "--touch", "32"], "at least 64"),
    (["bench", "ring", "--seconds", "0"], "measures nothing"),
]


@pytest.mark.parametrize(("words", "part"), USAGE, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_a_command_line_that_cannot_be_read_is_status_2(words: list[str], part: str, capsys: Capture) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert part in said.err
    assert "Traceback" not in said.err
    assert said.err.startswith("ringbar")


@pytest.mark.parametrize(("words", "part"), USAGE, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_with_json_the_error_is_the_one_document(words: list[str], part: str, capsys: Capture) -> None:
    assert main([*words, "--json"]) == 2
    said = capsys.readouterr()
    assert said.err == ""
    document = json.loads(said.out)
    assert set(document) == {"error"}
    assert set(document["error"]) == {"code", "message", "cure"}
    assert document["error"]["code"] in ("usage", "bad-address")
    assert part in f"{document['error']['message']} {document['error']['cure']}"


def test_packets_and_json_do_not_share_standard_output(capsys: Capture) -> None:
    assert main(["capture", "-i", "99@0", "-w", "-", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["cure"] == "-w FILE"


def test_without_a_command_the_usage_goes_to_standard_error(capsys: Capture) -> None:
    assert main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("usage: ringbar COMMAND")


def test_a_near_miss_is_named(capsys: Capture) -> None:
    main(["atach", "--json"])
    assert json.loads(capsys.readouterr().out)["error"]["cure"] == "ringbar attach --help"


def test_options_are_not_guessed_from_their_beginning(capsys: Capture) -> None:
    assert main(["attach", "qmp:/x", "99@0", "--use-last"]) == 2
    assert "--use-last" in capsys.readouterr().err


def _options(*words: str) -> Any:
    from ringbar.cli import _parser, read

    return read(_parser(words[0]), list(words[1:]))


def test_rx_does_not_swallow_what_follows() -> None:
    options = _options("attach", "qmp:/x", "--rx", "99@0", "99@1", "--tx", "99@2", "--tx", "99@3")
    assert (options.vm, options.queues, options.tx, options.rx) == ("qmp:/x", ["99@0", "99@1"], ["99@2", "99@3"], True)


def test_attach_defaults() -> None:
    options = _options("attach", "qmp:/x", "99@0")
    assert (options.pool, options.ready, options.use_last_slot, options.replug) == (None, False, False, False)


def test_detach_waits_thirty_seconds_unless_told() -> None:
    assert _options("detach", "qmp:/x").timeout == 30.0
    assert _options("detach", "qmp:/x", "--timeout", "500ms").timeout == 0.5


def test_buffers_can_be_auto() -> None:
    assert _options("cluster", "create", "99", "--buffers", "auto").buffers is None
    assert _options("cluster", "create", "99", "--buffers", "1M").buffers == 1_000_000


@pytest.mark.parametrize(
    ("function", "text", "value"),
    [
        (common.count, "64", 64),
        (common.count, "1M", 1_000_000),
        (common.count, "0.5k", 500),
        (common.size, "2k", 2048),
        (common.size, "4096", 4096),
        (common.rate, "14.88M", 14_880_000.0),
        (common.seconds, "10ms", 0.01),
        (common.seconds, "2min", 120.0),
        (common.cluster_id, "0", 0),
        (common.cluster_id, "65535", 65535),
    ],
)
def test_numbers_with_units(function: Any, text: str, value: float) -> None:
    assert function(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "k", "-1", "1e999", "inf", "nan", "1kk", "0x10", "1,000"])
def test_what_is_no_number_is_refused(text: str) -> None:
    import argparse

    with pytest.raises(argparse.ArgumentTypeError):
        common.count(text)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (14_880_000, "14.9M"),
        (148_800_000, "149M"),
        (999_999, "1.00M"),
        (2.5e9, "2.50G"),
    ],
)
def test_short_numbers_have_three_digits(value: float, shown: str) -> None:
    assert common.short(value) == shown


def test_bits_on_the_wire_count_preamble_fcs_and_gap() -> None:
    # 14.88 million packets of 60 bytes (64 with FCS) a second fill 10 Gbit/s: the figure everybody knows.
    assert common.wire_bits(14_880_952, 14_880_952 * 60) == pytest.approx(10e9, rel=1e-6)


def test_exit_statuses() -> None:
    assert common.exit_status(Error("x")) == 1
    assert common.exit_status(Busy("x")) == 1
    assert common.exit_status(BadAddress("x")) == 2
    assert common.exit_status(common.Usage("x")) == 2
    assert common.exit_status(common.Unfinished("x")) == 4
    assert common.exit_status(Error("x", code="not-finished")) == 4
    assert common.exit_status(TimeoutError()) == 4


class _Failing:
    """A command module whose command raises what it is told to."""

    def __init__(self, problem: BaseException) -> None:
        self.problem = problem

    def configure(self, name: str, parser: Any) -> None:
        common.add_json(parser)
        parser.set_defaults(run=self.run)

    def run(self, options: Any, out: common.Output) -> int:
        raise self.problem


@pytest.mark.parametrize(
    ("problem", "status", "code", "part"),
    [
        (Busy("zeek holds 99@0", holder="zeek", cure="kill 7"), 1, "busy", "zeek holds 99@0"),
        (PermissionError(13, "Permission denied", "/run/ringbar"), 1, "no-permission", "/run/ringbar"),
        (OSError(28, "No space left on device"), 1, "system", "No space left on device"),
        (KeyboardInterrupt(), 1, "interrupted", "interrupted"),
        (TimeoutError("no answer in 5 s"), 4, "not-finished", "no answer in 5 s"),
        (ImportError("no module", name="qemu.qmp"), 1, "not-installed", "qemu.qmp"),
        (ZeroDivisionError("division\nby zero"), 1, "internal", "division by zero"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else "",
)
def test_whatever_is_raised_is_one_message(
    problem: BaseException, status: int, code: str, part: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    monkeypatch.delenv("RINGBAR_DEBUG", raising=False)
    monkeypatch.setattr(importlib, "import_module", lambda name: _Failing(problem))
    assert main(["status"]) == status
    said = capsys.readouterr()
    assert said.out == ""
    assert part in said.err
    assert "Traceback" not in said.err
    assert main(["status", "--json"]) == status
    document = json.loads(capsys.readouterr().out)
    assert document["error"]["code"] == code
    assert part in document["error"]["message"]


def test_without_the_hosts_part_the_message_says_how_to_get_it(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{name}'", name="ringbar.host")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert main(["attach", "x"]) == 1
    assert "pip install 'ringbar[host]'" in capsys.readouterr().err


def test_tables_align_numbers_right_and_text_left() -> None:
    shown = common.table(("QUEUE", "N"), [("99@0", "7"), ("99@10", "1,234")])
    assert shown.splitlines() == ["QUEUE      N", "99@0       7", "99@10  1,234"]


def test_progress_is_silent_for_two_seconds_and_then_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    spoke = threading.Event()

    class Heard(io.StringIO):
        def write(self, text: str) -> int:
            written = super().write(text)
            spoke.set()
            return written

    heard = Heard()
    monkeypatch.setattr(sys, "stderr", heard)
    monkeypatch.setattr(common, "PROGRESS_AFTER", 1000.0)
    with common.Output().progress() as progress:
        progress("waiting for the guest")
    assert heard.getvalue() == ""
    monkeypatch.setattr(common, "PROGRESS_AFTER", 0.05)
    with common.Output().progress() as progress:
        progress("waiting for the guest")
        assert spoke.wait(30)
    assert "waiting for the guest" in heard.getvalue()
    assert "\r" not in heard.getvalue()  # no terminal: nothing is redrawn


def test_quiet_and_quick_commands_show_no_progress(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    with common.Output().progress() as progress:
        progress("quick")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(common, "PROGRESS_AFTER", 0.0)
    with common.Output(quiet=True).progress() as progress:
        progress("quiet")
    assert capsys.readouterr().err == ""


def test_a_nic_with_the_default_route_is_refused(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from ringbar.cli import running

    monkeypatch.setattr(running, "default_routes", lambda: {"eth7"})
    assert main(["count", "-i", "zc:eth7"]) == 1
    said = capsys.readouterr().err
    assert "eth7 carries the default route" in said
    assert "--take-all" in said


def _processor_seconds(*words: str) -> float:
    """The least of several runs of a Python program."""
    found = []
    for _ in range(7):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


@pytest.mark.slow
def test_the_command_line_starts_about_as_fast_as_what_it_is_made_of() -> None:
    parts = _processor_seconds("-c", "import argparse, dataclasses, inspect, re, typing, pathlib, json")
    assert _processor_seconds("-m", "ringbar", "--help") < 2 * parts


def test_help_imports_neither_the_core_nor_the_host() -> None:
    code = (
        "import sys; from ringbar.cli import main; main(['--help']); print([m for m in sys.modules if 'ringbar' in m])"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    modules = eval_list(said.splitlines()[-1])
    assert set(modules) <= {"ringbar", "ringbar.cli", "ringbar.cli.common", "ringbar.errors"}


def eval_list(text: str) -> list[str]:
    import ast

    found: list[str] = ast.literal_eval(text)
    return found
