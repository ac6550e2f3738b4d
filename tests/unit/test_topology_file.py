# SPDX-License-Identifier: Apache-2.0
"""Topology files: what is wrong is told with its line."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("pydantic")

from ringbar.errors import Error
from ringbar.host.topology.apply import command
from ringbar.host.topology.plan import spec
from ringbar.host.topology.schema import Source, json_schema

WHOLE = """\
ringbar: 1
name: ids
clusters:
  99:
    label: ids-edge
    buffers: auto
    queues:
      0-2: {slots: 4096}
      3: {slots: 1024, credit: 512}
      4: {direct: true}
workers:
  edge:
    kind: balance
    in: [zc:eth1, zc:eth2]
    steer: not port 22
    out: [[99@0, 99@1], [99@2]]
    policy: 5tuple
    core: 2
  back: {kind: bridge, in: [99@3], out: [zc:eth3]}
vms:
  ids1: {rx: [99@0], tx: [99@3, 99@4], pool: rw}
  ids2: {rx: [99@1, 99@4]}
  qmp:/run/vm/rec.qmp: {rx: [99@2]}
"""


def test_the_whole_grammar_is_read() -> None:
    read = Source(WHOLE, "ids.yaml").topology
    assert dict(read.clusters[99].each_queue())[2].slots == 4096
    assert read.clusters[99].queues["0-2"] is not None
    assert read.workers["edge"].outputs == [["99@0", "99@1"], ["99@2"]]
    assert read.workers["back"].outputs == [["zc:eth3"]]
    assert read.vms["ids1"].ends() == {("99@0", "rx"), ("99@3", "tx"), ("99@4", "tx")}


def test_a_worker_becomes_the_command_a_person_would_type() -> None:
    read = Source(WHOLE, "ids.yaml").topology
    line = "balance -i zc:eth1,zc:eth2 -o 99@0,99@1 -o 99@2 --policy=5tuple"
    words = [*line.split(), "--steer=not port 22", "--core=2", "--background", "--name", "edge", "--json"]
    assert command("edge", spec(read.workers["edge"])) == words
    assert command("back", spec(read.workers["back"]))[:5] == ["bridge", "-i", "99@3", "-o", "zc:eth3"]


@pytest.mark.parametrize(
    ("change", "line", "says"),
    [
        (("ringbar: 1", "ringbar: 2"), 1, "ringbar"),
        (("name: ids\n", ""), 1, "name"),
        (("    label: ids-edge", "    labell: ids-edge"), 5, "there is no such setting"),
        (("0-2: {slots: 4096}", "0-2: {slots: 4095}"), 8, "4096 would be"),
        (("0-2: {slots: 4096}", "2-0: {slots: 4096}"), 8, "a queue is a number"),
        (("      4: {direct: true}", "      3: {direct: true}"), 10, "comes twice"),
        (("kind: balance", "kind: ballance"), 13, "kind"),
        (("zc:eth2]", "zc:eth2@x]"), 14, "eth2@x"),
        (("[99@2]]", "[99@7]]"), 16, "no queue 7"),
        (("ids2: {rx: [99@1, 99@4]}", "ids2: {rx: [99@1, 99@0]}"), 22, "receives from 99@0 already"),
        (("ids2: {rx: [99@1, 99@4]}", "ids2: {}"), 22, "neither receives nor sends"),
        (("pool: rw", "pool: ro"), 21, "needs to write packets"),
        (("pool: rw", "pool: own"), 21, "cannot send on direct queue 99@4: pool: rw"),
        (("in: [99@3]", "in: [99@4]"), 19, "only VMs use it"),
        (("  back: {", "  back: {{"), 20, "expected"),
        (("  99:", "  99: &a"), 16, "aliases"),
        (("in: [zc:eth1, zc:eth2]", "in: [pcap:/etc/shadow]"), 14, "tools that you start yourself"),
        (("policy: 5tuple", "policy: /tmp/mine.so:choose"), 17, "pattern"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(change: tuple[str, str], line: int, says: str) -> None:
    text = WHOLE.replace(*change, 1)
    if says == "aliases":
        text = text.replace("[[99@0, 99@1], [99@2]]", "*a")
    assert text != WHOLE
    with pytest.raises(Error) as told:
        Source(text, "ids.yaml")
    assert told.value.message.startswith(f"ids.yaml:{line}: ")
    assert says in told.value.message
    assert told.value.cure


@pytest.mark.parametrize(
    "text", ["", "[]", "ringbar", "\0", "a: &b [*b]", "{" * 5000, "? [1]: 2", "!!python/object:os.system x"]
)
def test_rubbish_is_refused_with_one_message(text: str) -> None:
    with pytest.raises(Error) as told:
        Source(text, "ids.yaml")
    assert "\n" not in told.value.message


def test_the_schema_for_editors_is_json_schema() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema))["properties"]["workers"]
