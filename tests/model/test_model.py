# SPDX-License-Identifier: Apache-2.0
"""The protocol's models: the correct ones have no counterexample, each rule left out has one."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from explore import explore

# model, buffers, slots, crashes: small enough to be visited whole in a few seconds each
CORRECT = [
    ("lend", 2, 2, 1),
    ("lend", 2, 1, 2),
    ("credit", 2, 2, 1),
    ("grant", 1, 1, 2),
    ("reset", 1, 1, 2),
    ("reset", 2, 1, 1),
    ("guest", 1, 1, 0),
    ("programs", 1, 1, 0),
    ("loopback", 1, 1, 2),
    ("chain", 1, 1, 2),
    ("relay", 1, 1, 1),
    ("pingpong", 1, 1, 1),
    ("fanout", 1, 1, 1),
    ("moved", 1, 1, 0),
    ("fanborrow", 1, 1, 0),
    ("twoways", 1, 1, 0),
    ("merge", 6, 1, 2),
    ("bell", 3, 1, 2),
]
# too large to be visited whole here: breadth first up to a limit (README.md has the whole visits)
PARTIAL = [
    ("guest", 1, 1, 1),
    ("programs", 1, 1, 1),
    ("pingpong", 1, 1, 2),
    ("moved", 1, 1, 1),
    ("fanborrow", 1, 1, 1),
    ("twoways", 1, 1, 1),
    ("relay", 1, 1, 2),
]
PARTIAL_STATES = 60_000
BROKEN_SIZES = {"reset": (1, 1, 2), "lend": (2, 2, 2), "grant": (1, 1, 2)}
MODELS = sorted({name for name, *_ in CORRECT})
BROKEN = [(name, v) for name in MODELS for v in importlib.import_module(name).VARIANTS if v != "ok"]


@pytest.mark.parametrize(("name", "buffers", "slots", "crashes"), CORRECT)
def test_correct_model_has_no_counterexample(name: str, buffers: int, slots: int, crashes: int) -> None:
    result = explore(importlib.import_module(name).build(buffers, slots, crashes, "ok"))
    assert result.problem is None, str(result)
    assert result.exhaustive, str(result)


@pytest.mark.parametrize(("name", "buffers", "slots", "crashes"), PARTIAL)
def test_larger_model_has_no_counterexample_so_far(name: str, buffers: int, slots: int, crashes: int) -> None:
    model = importlib.import_module(name).build(buffers, slots, crashes, "ok")
    result = explore(model, max_states=PARTIAL_STATES)
    assert result.problem is None, str(result)
    assert result.states >= PARTIAL_STATES, str(result)


@pytest.mark.parametrize(("name", "variant"), BROKEN)
def test_rule_left_out_has_a_counterexample(name: str, variant: str) -> None:
    module = importlib.import_module(name)
    result = explore(module.build(*BROKEN_SIZES.get(name, module.SIZES), variant))
    assert result.problem is not None, str(result)
    assert result.trace, str(result)
