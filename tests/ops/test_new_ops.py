"""An op that the compiler does not know becomes one by a single line, and every stage then knows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tpcompiler as tpc
from tpcompiler.errors import RuleError, TpcError
from tpcompiler.graphs import tensors
from tpcompiler.ops.table import RULES, find
from tpcompiler.train.step.flops import forward_flops

HIDDEN, WIDE = 12, 24


@torch.library.custom_op("tpctest::project", mutates_args=())
def project(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


@project.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    return grad @ weight.mT, x.flatten(0, -2).mT @ grad.flatten(0, -2)


project.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class Projected(nn.Module):
    """A product with a weight, as an op of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, WIDE)
        self.down = nn.Parameter(torch.randn(WIDE, HIDDEN) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + project(F.gelu(self.up(self.norm(x))), self.down)


class Flipped(Projected):
    """A linear op: it reverses dimension 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.fliplr(F.gelu(self.up(self.norm(x)))) @ self.down


class Dotted(Projected):
    """A pointwise product with a reduction: one number for each token."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.up(self.norm(x)))
        return x + torch.linalg.vecdot(y, torch.tanh(y))[..., None] + y @ self.down


class Inner(Projected):
    """A product of two operands, the second one transposed."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.inner(F.gelu(self.up(self.norm(x))), self.down.mT)


UP, DOWN = 2 * 3 * 7 * HIDDEN * WIDE, 2 * 3 * 7 * WIDE * HIDDEN
CASES: dict[str, tuple[type[nn.Module], str, dict[str, Any], int, int]] = {
    # name: the model, the line, what else the record says, all-reduces in forward, FLOPs
    "aten::fliplr": (Flipped, "b s! ... -> b s! ...", {"linear": (0,)}, 1, UP + DOWN),
    "aten::linalg_vecdot": (Dotted, "< n >, < n > -> < >", {"sums": True}, 2, UP + DOWN + 2 * 3 * 7 * WIDE),
    "aten::inner": (Inner, "... i, o i -> ... o", {"sums": True, "kept": True}, 1, UP + DOWN),
    "tpctest::project": (
        Projected,
        "... i, i o -> ... o",
        {"sums": True, "product": tpc.WeightProduct("x", "weight"), "kept": True},
        1,
        UP + DOWN,
    ),
}


@pytest.fixture(autouse=True)
def _table_as_before() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def _spec(degree: int) -> dict[str, Any]:
    up = {"parameter": "up.weight", "dimension": 0}
    return {"mesh": {"tensor": degree}, "shard": {"head": "replicate"}, "axes": [up]}


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("op", list(CASES))
def test_one_line_splits_runs_differentiates_counts_and_proves(op: str, degree: int) -> None:
    model, line, known, reduces, flops = CASES[op]
    inputs = {"x": torch.randn(3, 7, HIDDEN)}
    with pytest.raises(TpcError, match="has no rule"):
        tpc.shard(model, inputs, _spec(degree))

    tpc.rule(op, line, **known)
    sharded = tpc.shard(model, inputs, _spec(degree))
    assert not {"up.weight", "down"} & {r.name for r in sharded.plan.replicated}, str(sharded.plan)
    forward = [c for c in sharded.program.collectives if c.direction == "forward"]
    assert len(forward) == reduces, [str(c) for c in forward]
    assert sharded.check.passed, str(sharded.check)
    assert len(sharded.check.ran) == 1 and "run on random operands" in str(sharded.check), "no fact speaks of the op"
    assert forward_flops(sharded.capture.graph, {"x": (3, 7, HIDDEN)}) == flops
    report = tpc.verify(model, inputs, _spec(degree))  # every rank, forward and backward, against the plain model
    assert report.passed, str(report)


def test_a_line_with_a_size_needs_no_function() -> None:
    """`repeat_interleave` is written in the notation alone: the partitioner makes the argument that `r` names local."""
    record = RULES["aten::repeat_interleave.self_int"]
    assert isinstance(record.line, str) and dict(record.sizes) == {"r": "repeats"}

    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 1)
            self.q, self.o = nn.Linear(HIDDEN, WIDE), nn.Linear(WIDE, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.o(self.q(x) * self.one(x).repeat_interleave(WIDE, -1))

    sharded = tpc.shard(Repeated, {"x": torch.randn(3, 7, HIDDEN)}, {"mesh": {"tensor": 3}})
    (node,) = [n for n in sharded.program.graph.nodes if n.target is torch.ops.aten.repeat_interleave.self_int]
    assert node.args[1].dim.size == WIDE and node.args[1].dim.over == ("tensor",)
    assert tpc.verify(Repeated, {"x": torch.randn(3, 7, HIDDEN)}, {"mesh": {"tensor": 3}}).passed


@pytest.mark.parametrize(
    ("known", "what"),
    [
        ({"form": "lookups"}, "'lookups' is not known"),
        ({"part": "half"}, "'half' is not known"),
        ({"sum": True}, "sum"),
        ({"sizes": {"z": "repeats"}}, "'z'"),
    ],
)
def test_a_record_that_cannot_be_meant_is_refused(known: dict[str, Any], what: str) -> None:
    with pytest.raises(RuleError) as e:
        tpc.rule("mylib::op", "... n -> ... n", **known)
    assert what in str(e.value) and "\n" not in str(e.value)


def test_a_letter_without_a_form_is_known_to_be_whole_before_planning() -> None:
    """The user's rule asks for a form and names none: its axis is marked when axes are inferred."""
    tpc.rule("tpctest::project", "... i+, i+ o -> ... o")
    with pytest.raises(TpcError, match="has no form for a part of it"):
        tpc.shard(Projected, {"x": torch.randn(3, 7, HIDDEN)}, _spec(2))


def test_products_of_experts_count_and_are_kept() -> None:
    """The op that capture writes, and the one that torch runs, both have the record of a product."""
    from torch.utils.checkpoint import CheckpointPolicy

    from tpcompiler.runtime import grouped_mm
    from tpcompiler.train.step.prepare import _kept

    class Experts(nn.Module):
        def forward(self, x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
            out: Tensor = grouped_mm(x, w, ends)
            return out

    inputs = {"x": torch.randn(10, 4), "w": torch.randn(3, 4, 5), "ends": torch.tensor([2, 7, 10])}
    graph = torch.export.export(Experts(), (), inputs, strict=False).graph
    assert any(find(n.target) for n in graph.nodes if tensors(n.meta.get("val")))
    assert forward_flops(graph) == 2 * 10 * 4 * 5
    for op in (torch.ops.tpcompiler.grouped_mm.default, torch.ops.aten._grouped_mm.default):
        assert _kept(None, op) == CheckpointPolicy.MUST_SAVE
    assert _kept(None, torch.ops.aten.bmm.default) == CheckpointPolicy.PREFER_RECOMPUTE
