"""Faults that sampling lets through, each refused by structure: planted in graphs and in emitted sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from benchmarks.faults import after, copied, skip
from tpcompiler.api import Sharded, compile_capture
from tpcompiler.capture import capture
from tpcompiler.check import check
from tpcompiler.program import Program
from tpcompiler.runtime import dropout, linear_cross_entropy, lookup, reduce
from tpcompiler.spec.schema import Spec

aten = torch.ops.aten


@cache
def model(name: str, degree: int = 2, **sizes: int) -> Sharded:
    module = import_module(f"models.{name}")
    given = {"vocab": 101, "hidden": 32, "layers": 1, **sizes}
    captured = capture(lambda: module.Model(**given), module.example_inputs(vocab=given["vocab"]))
    return compile_capture(captured, Spec.load({"mesh": {"tensor": degree}}))


def first(program: Program, *targets: Any) -> fx.Node:
    return next(n for n in program.graph.nodes if n.target in targets)


def behind(node: fx.Node, op: Any, *args: Any) -> None:
    """The reduction of `node` moved behind an operation."""
    partial = node.args[0]
    assert isinstance(partial, fx.Node)
    skip(node)
    new = after(partial, op, partial, *args)
    after(new, reduce, new, ("tensor",))


GRAPHS: dict[str, Callable[[Program], object]] = {
    "a reduction behind a clamp that no draw reaches": lambda p: behind(first(p, reduce), aten.clamp.default, -8, 8),
    "a reduction behind a threshold": lambda p: behind(first(p, reduce), aten.threshold.default, -50.0, 0.0),
    "a clamp that no draw reaches": lambda p: after(n := first(p, aten.gelu.default), aten.clamp.default, n, -1e4, 1e4),
    "positions clamped": lambda p: after(n := first(p, aten.arange.default), aten.clamp.default, n, 0, 1000),
    "positions modulo a length": lambda p: after(n := first(p, aten.arange.default), aten.remainder.Scalar, n, 1000),
    "a dropout missing": lambda p: skip(first(p, dropout)),
    "a dropout at another site": lambda p: first(p, dropout).update_arg(4, 17),
    "torch's own dropout": lambda p: own_dropout(first(p, dropout)),
    "another ignored index": lambda p: first(p, linear_cross_entropy).update_kwarg("ignore_index", -1),
    "a padding row": lambda p: setattr(n := first(p, lookup), "args", (*n.args, 3)),
    "a cast through bfloat16": lambda p: bfloat16(first(p, aten.gelu.default)),
}


def own_dropout(node: fx.Node) -> None:
    new = after(node, aten.dropout.default, node, 0.1, True)
    new.update_arg(0, node.args[0])


def bfloat16(node: fx.Node) -> None:
    narrow = after(node, aten.to.dtype, node, torch.bfloat16)
    after(narrow, aten.to.dtype, narrow, torch.float32)


@pytest.mark.parametrize("fault", GRAPHS)
def test_a_fault_of_the_graph_is_refused(fault: str) -> None:
    mutant = copied(model("gpt2").program)
    GRAPHS[fault](mutant)
    mutant.graph.lint()
    assert not check(mutant).passed


DROPS = "dropout(y, 0.1, self.training, self.rng, 1)"
WPE = "self.wpe = Parameters(weight=(self.vocab2, 32))"
SOURCES = {
    "a branch on a length": ("        x = self.h[0](x)\n", "        x = self.h[0](x) if s > 12 else x\n"),
    "a length compared": ("x = self.h[0](x)\n", "x = self.h[0](x) * (s > 1)\n"),
    "a length modulo another": ("positions = torch.arange(s,", "positions = torch.arange(s % 4096,"),
    "one rank scales": ("        x = self.h[0](x)\n", "        x = self.h[0](x) * (1 + (self.tensor.index == 1))\n"),
    "one rank skips a collective": (
        "reduce(y, self.tensor)",
        "(y if self.tensor.index else reduce(y, self.tensor))",
    ),
    "rows of the first rank": ("(self.tensor.part(101),)", "((0, 51),)"),
    "another probability": (DROPS, DROPS.replace("0.1", "0.2")),
    "another site": ("self.training, self.rng, 1)", "self.training, self.rng, 2)"),
    "dropout left off": (DROPS, "dropout(y, 0.1, False, self.rng, 1)"),
    "torch's dropout": (DROPS, "F.dropout(y, 0.1, self.training)"),
    "training scaled": ("return x + dropout(y", "return x * (2.0 if self.training else 1.0) + dropout(y"),
    "not trained": (WPE, f"{WPE}.requires_grad_(False)"),
    "bfloat16": (WPE, f"{WPE}.to(torch.bfloat16)"),
    "untied": ("entropy(x, self.wte.weight,", "entropy(x, self.wte.weight.detach(),"),
    "in place": ("x = self.h[0](x)\n", "x = self.h[0](x).mul_(1)\n"),
    "state": ("x = self.h[0](x)\n", "self.seen = self.h[0](x)\n        x = self.seen\n"),
    "a hook": ("        x = self.h[0](x)\n", "        x = self.h[0](x)\n        x.register_hook(print)\n"),
    "no gradient": ("x = self.h[0](x)\n", "x = self.h[0](x).data\n"),
    "keys cut": ("= F.layer_norm(x, (32,), self.ln_f", "= F.layer_norm(x[:, :1000], (32,), self.ln_f"),
    "labels rolled": ("labels.flatten()", "labels.roll(1, -1).flatten()"),
    "a reduction twice": ("reduce(y, self.tensor)", "reduce(reduce(y, self.tensor), self.tensor)"),
    "an ignored class": ("rows=self.vocab_rows)\n", "rows=self.vocab_rows, ignore_index=-1)\n"),
    "another module": ("import torch\n", "import os\nimport torch\n"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SOURCES)
def test_a_fault_of_the_source_is_refused(fault: str) -> None:
    sharded = model("gpt2")
    old, new = SOURCES[fault]
    edited = sharded.source.replace(old, new)
    assert edited != sharded.source, sharded.source
    assert not check(sharded.program, source=edited).passed


def test_the_last_rank_of_eight_is_read() -> None:
    sharded = model("llama", 8, heads=8, kv_heads=8, intermediate=48)
    assert check(sharded.program, source=sharded.source).passed
    old = "self.vocab_rows = (self.tensor.part(101),)"
    rows = [sharded.program.mesh.coords(r) for r in range(8)]
    held = [(i * 13 - max(0, i - 5), (i + 1) * 13 - max(0, i - 4)) for i in range(len(rows))]
    right = f"self.vocab_rows = {tuple((h,) for h in held)}[self.tensor.index]"
    wrong = right.replace(str(held[7]), str((held[7][0] - 1, held[7][1] - 1)))
    assert old in sharded.source
    assert check(sharded.program, source=sharded.source.replace(old, right)).passed
    assert not check(sharded.program, source=sharded.source.replace(old, wrong)).passed


def test_real_widths_without_rotation_are_refused() -> None:
    sharded = model("llama", 8, hidden=8192, heads=64, kv_heads=8, intermediate=1024)
    assert check(sharded.program).passed
    mutant = copied(sharded.program)
    attention = first(mutant, aten.scaled_dot_product_attention.default)
    rotated = attention.args[0]
    assert isinstance(rotated, fx.Node) and rotated.target is aten.cat.default
    (plain,) = {
        n.args[0].args[0]
        for s in rotated.all_input_nodes
        for m in s.all_input_nodes
        for n in m.all_input_nodes
        if n.target.__name__ == "getitem"
    }
    attention.update_arg(0, plain)
    mutant.graph.lint()
    assert not check(mutant).passed


class Drops(nn.Module):
    """Attention that no axis splits, with the fused kernel's dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if self.training else 0.0)


def test_copies_of_attention_draw_the_same_numbers() -> None:
    module = import_module("models.gpt2")
    captured = capture(lambda: module.Model(vocab=101, hidden=32, layers=1), module.example_inputs(vocab=101))
    spec = Spec.load({"mesh": {"tensor": 2}, "shard": {"attention": "replicate"}})
    sharded = compile_capture(captured, spec)
    assert not any(n.target is aten.scaled_dot_product_attention.default for n in sharded.program.graph.nodes)
    assert check(sharded.program, source=sharded.source).passed


def test_each_rank_drawing_its_own_numbers_is_refused() -> None:
    sharded = model("gpt2")
    whole = replace(
        sharded.program, mesh=replace(sharded.program.mesh, dims=(("data", 1), ("other", 2), ("tensor", 2)))
    )
    report = check(whole)
    assert not report.passed
    assert "numbers of its own" in str(report)
