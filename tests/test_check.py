"""The static checker: it refuses what changes a value or a gradient, accepts what is right, and `shard` obeys it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import FAULTS
from benchmarks.mutants import Reference, judge
from tests.test_compile import small
from tpcompiler.api import Sharded, compile_capture
from tpcompiler.capture import capture
from tpcompiler.check import check
from tpcompiler.errors import CheckError
from tpcompiler.runtime import enter
from tpcompiler.spec import Spec


def compiled(name: str, degree: int, **sizes: Any) -> tuple[Sharded, Reference]:
    build, inputs = small(name, **sizes)
    captured = capture(build, inputs)
    alone = compile_capture(captured, Spec.load({"mesh": {"tensor": 1}})).program
    return compile_capture(captured, Spec.load({"mesh": {"tensor": degree}})), Reference(alone, inputs)


@pytest.mark.parametrize(("name", "degree"), [("gpt2", 3), ("llama", 8)])
def test_every_kind_of_fault_is_refused(name: str, degree: int) -> None:
    sharded, reference = compiled(name, degree, layers=1)
    assert check(sharded.program).passed
    judged = 0
    for fault in FAULTS:
        site = next(iter(fault.sites(sharded.program)), None)
        if site is not None:
            verdict = judge(name, degree, sharded.program, reference, fault, site)
            assert verdict.refused or not verdict.changes, f"{fault.name} at {site} was let through"
            judged += verdict.changes
    assert judged >= 25


def test_equal_layers_cost_nothing() -> None:
    steps = {n: check(compiled("gpt2", 2, layers=n)[0].program).distinct_steps for n in (2, 6)}
    assert steps[2] == steps[6]


def test_what_is_refused_is_not_written(tmp_path: Path) -> None:
    sharded, _ = compiled("gpt2", 2, layers=1)
    graph = sharded.program.graph
    node = next(n for n in graph.nodes if n.target is enter)
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)
    broken = replace(sharded, program=replace(sharded.program, graph=graph))
    with pytest.raises(CheckError) as e:
        broken.write(tmp_path / "out")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


def test_an_edited_source_is_refused() -> None:
    sharded, _ = compiled("gpt2", 2, layers=1)
    assert check(sharded.program, source=sharded.source).passed
    edited = sharded.source.replace('approximate="tanh"', 'approximate="none"')
    assert edited != sharded.source
    assert not check(sharded.program, source=edited).passed
