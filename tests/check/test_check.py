"""The static checker: it refuses what changes a value or a gradient, accepts what is right, and `shard` obeys it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.faults import FAULTS
from benchmarks.mutants import Reference, judge
from tests.test_compile import small
from tests.zoo import multi_query
from tpcompiler.api import Sharded, compile_capture
from tpcompiler.capture import capture
from tpcompiler.capture.promote import float64
from tpcompiler.check import check
from tpcompiler.errors import CheckError
from tpcompiler.runtime import dropout, enter
from tpcompiler.spec.schema import Spec


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


class Rows(nn.Module):
    """Dropout of rows (b s)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        return F.dropout(self.down(F.relu(self.up(rows))), 0.1, self.training).view(x.shape)


def test_a_dropout_of_rows_counts_the_samples_that_the_batch_has() -> None:
    sharded = compile_capture(capture(Rows, (torch.randn(2, 6, 12),)), Spec.load({"mesh": {"tensor": 2}}))
    assert check(sharded.program, source=sharded.source).passed
    (node,) = (n for n in sharded.program.graph.nodes if n.target is dropout)
    samples = node.kwargs["samples"]
    for wrong in ({}, {"samples": sequence(node)}, {"batch_dim": None}):
        node.kwargs = wrong
        assert not check(sharded.program).passed
    node.kwargs = {"samples": samples}
    assert check(sharded.program).passed


def sequence(node: torch.fx.Node) -> torch.fx.Node:
    """The size of the input's dimension 1, to be read before `node`."""
    (x,) = (n for n in node.graph.nodes if n.name == "x")
    with node.graph.inserting_before(node):
        return node.graph.call_function(torch.ops.aten.sym_size.int, (x, 1))


class Times(nn.Module):
    """Times a vector of ones."""

    ones: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("ones", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.ones


def scaled() -> nn.Module:
    """The first segment of each fused product is also the first segment of that product times ones."""
    model = multi_query.Model()
    model.h = model.h[:1]
    fused = model.h[0].c_attn
    model.h[0].c_attn = nn.Sequential(fused, Times(fused.out_features))
    return model


def test_a_segment_that_equals_a_later_value_does_not_hide_the_product() -> None:
    captured = float64(capture(scaled, multi_query.example_inputs()))
    sharded = compile_capture(captured, Spec.load({"mesh": {"tensor": 2}}))
    assert check(sharded.program, source=sharded.source).passed
    (node,) = (n for n in sharded.program.graph.nodes if n.target is torch.ops.aten.cat.default)
    queries, keys, values = node.args[0]
    node.args = ((queries, values, keys), *node.args[1:])
    assert not check(sharded.program).passed


class Neighbours(nn.Module):
    """Each token with the one before it, side by side: the sequence over a shift of itself, of no known length."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(8 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.up(x))
        return self.down(torch.cat((h[:, :-1], h[:, 1:]), -1))


def test_a_sequence_beside_a_shift_of_itself_is_proven() -> None:
    sharded = compile_capture(capture(Neighbours, (torch.randn(2, 6, 12),)), Spec.load({"mesh": {"tensor": 2}}))
    assert check(sharded.program, source=sharded.source).passed
    assert sharded.sharded_fraction == 1
