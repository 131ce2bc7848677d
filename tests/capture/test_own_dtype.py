"""One graph runs in every dtype as the plain model would: its upcasts stay, and the rest follows the model's dtype."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.hf import FAMILIES, inputs
from tpcompiler.api import shard
from tpcompiler.capture import capture
from tpcompiler.capture.trace import split_example
from tpcompiler.check import check
from tpcompiler.execute.interpret import bind_inputs, interpret_capture
from tpcompiler.program import Capture
from tpcompiler.runtime.precision import cast

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Model(nn.Module):
    def __init__(self, does: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.weight, self.does = nn.Linear(8, 8), nn.Parameter(torch.rand(8)), does
        self.register_buffer("table", torch.rand(8))

    def forward(self, x: Tensor) -> Any:
        return self.does(self, self.layer(x))


def norm(self: Any, x: Tensor) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return self.weight * y.to(x.dtype)  # type: ignore[no-any-return]


def masked(self: Any, x: Tensor) -> Tensor:
    scores = x @ x.mT
    mask = torch.full(scores.shape[-2:], torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)
    return F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(x.dtype) @ x


def rotary(self: Any, x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[1], device=x.device).float()[:, None] * self.table.float()
    return x * angles.cos().to(x.dtype)


def filled(self: Any, x: Tensor) -> Tensor:
    return x.masked_fill(x > 0.5, torch.finfo(x.dtype).min).softmax(-1) + torch.ones(8, dtype=x.dtype)


FOLLOW: dict[str, Callable[[Any, Tensor], Any]] = {"norm": norm, "masked": masked, "rotary": rotary, "filled": filled}
BAKED: dict[str, Callable[[Any, Tensor], Any]] = {
    "branch": lambda self, x: x * 2 if x.dtype == torch.bfloat16 else x * 3,
    "explicit": lambda self, x: (x.bfloat16() * 2).to(x.dtype),
    "epsilon": lambda self, x: x + torch.finfo(x.dtype).eps,
    "in place": lambda self, x: x.float().mul_(2) + x,
    "half": lambda self, x: x.sum(-1, dtype=x.dtype),
}


@pytest.mark.parametrize("name", FOLLOW)
def test_the_graph_does_in_every_dtype_what_the_model_does(name: str) -> None:
    model = Model(FOLLOW[name])
    captured = capture(model, (torch.randn(3, 5, 8),))
    for dtype in DTYPES:
        same(captured, model, (torch.randn(3, 5, 8),), dtype)


@pytest.mark.parametrize("name", BAKED)
def test_what_cannot_follow_is_as_it_was_traced(name: str) -> None:
    model = Model(BAKED[name])
    captured = capture(model, (torch.randn(3, 5, 8),))
    assert not any(n.target is aten.type_as.default for n in captured.graph.nodes)
    same(captured, model, (torch.randn(3, 5, 8),), torch.float32)


@pytest.mark.parametrize("name", ["llama", "gpt2", pytest.param("seq2seq", marks=pytest.mark.nightly)])
def test_plain_models_in_bfloat16(name: str) -> None:
    module = importlib.import_module(f"models.{name}")
    model = module.Model()
    same(capture(module.Model, module.example_inputs()), model, module.example_inputs(), torch.bfloat16)


@pytest.mark.parametrize("name", ["llama:causal-lm", pytest.param("t5:seq2seq", marks=pytest.mark.nightly)])
def test_families_in_bfloat16(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    same(capture(model, inputs(family)), model, inputs(family), torch.bfloat16)


def test_the_emitted_source_has_the_models_upcasts() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.weight = nn.Embedding(16, 8), nn.Parameter(torch.ones(8))
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            return x + self.down(F.gelu(self.up(norm(self, x))))  # type: ignore[no-any-return]

    sharded = shard(Stack, (torch.randint(0, 16, (3, 5)),), {"mesh": {"tensor": 2}})
    source = sharded.source
    assert sharded.check.passed, sharded.check
    for cast_ in (".to(torch.float32)", ".type_as(x)"):
        assert cast_ in source, source
        assert not check(sharded.program, source=source.replace(cast_, "")).passed
    assert not check(sharded.program, source=source.replace("torch.float32", "torch.float64")).passed
    assert not check(sharded.program, source=source.replace(".type_as(x)", ".type_as(y)")).passed


def same(captured: Capture, model: nn.Module, example: Any, dtype: torch.dtype) -> None:
    """The graph and the module in one dtype, to rounding."""
    cast(model.eval(), dtype)
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, split_example(example)
    )
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    with torch.no_grad():
        wanted = [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]
        found = [t for t in interpret_capture(captured, state, bind_inputs(captured, *args, **kwargs)) if t is not None]
    assert [t.dtype for t in found] == [t.dtype for t in wanted]
    rounding = 4 * torch.finfo(dtype).eps  # sums in another order: attention's kernels differ by mask and by layout
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= rounding * b.abs().max(), (a - b).abs().max()
