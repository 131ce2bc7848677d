"""The output layer and its loss become one operator where the logits feed the loss alone, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tpcompiler as tpc
from tpcompiler.api import Sharded
from tpcompiler.check import check
from tpcompiler.graphs import copy_graph
from tpcompiler.runtime import enter, linear_cross_entropy
from tpcompiler.runtime.groups import Group

VOCAB, WIDTH = 23, 12


class Head(nn.Module):
    """An embedding, a norm, an output layer, and a loss in one of the ways in which models write it."""

    def __init__(self, loss: str, tied: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.way = loss
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        logits = self.head(self.norm(self.embed(ids)))
        return _WAYS[self.way](logits, labels)


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    """As transformers does it: float32 logits, labels padded and moved."""
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.float().view(-1, VOCAB), labels.view(-1), ignore_index=-100, reduction="mean")


_WAYS: dict[str, Any] = {
    "flat": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten()),
    "transformers": shifted,
    "summed": lambda x, y: F.cross_entropy(x.view(-1, VOCAB), y.view(-1), reduction="sum", ignore_index=3) / 7,
    "cast later": lambda x, y: F.cross_entropy(x.view(-1, VOCAB).float(), y.view(-1)),
    "doubled": lambda x, y: F.cross_entropy(x.view(-1, VOCAB).double(), y.view(-1)),
    "smooth": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten(), label_smoothing=0.1),
    "unreduced": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="none").sum(),
    "logits too": lambda x, y: (F.cross_entropy(x.flatten(0, 1), y.flatten()), x),
    "capped": lambda x, y: F.cross_entropy(x.flatten(0, 1).tanh(), y.flatten()),
    "classes in the middle": lambda x, y: F.cross_entropy(x.transpose(1, 2), y),
    "two losses": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten()) + x.square().mean(),
}
JOINED = ("flat", "transformers", "summed", "cast later", "doubled")
INPUTS = {"ids": torch.arange(10).view(2, 5) % VOCAB, "labels": torch.arange(3, 13).view(2, 5) % VOCAB}


def compiled(way: str, degree: int, tied: bool = False, bias: bool = False, **spec: Any) -> Sharded:
    return tpc.shard(lambda: Head(way, tied, bias), INPUTS, {"mesh": {"tensor": degree}, **spec})


def joined_in(sharded: Sharded) -> list[fx.Node]:
    return [n for n in sharded.program.graph.nodes if n.target is linear_cross_entropy]


@pytest.mark.parametrize("way", list(_WAYS))
@pytest.mark.parametrize("degree", [pytest.param(1, marks=pytest.mark.nightly), 3])
def test_it_is_joined_where_the_logits_feed_the_loss_alone(way: str, degree: int) -> None:
    tied, bias = way == "flat", way in ("summed", "cast later")
    sharded = compiled(way, degree, tied, bias, overlap=degree == 3)
    assert len(joined_in(sharded)) == (way in JOINED)
    assert ("linear_cross_entropy(" in sharded.source) == (way in JOINED)
    assert sharded.check.passed
    spec = {"mesh": {"tensor": degree}, "overlap": degree == 1}
    report = tpc.verify(lambda: Head(way, tied, bias), INPUTS, spec)
    assert report.passed, str(report)


@pytest.mark.parametrize("spec", [{"shard": {"head": "replicate"}}, {"overlap": "halves"}, {}])
def test_other_layouts_of_the_head(spec: dict[str, Any]) -> None:
    module = import_module("models.gpt2")
    sizes = {"vocab": 23, "hidden": 16, "heads": 2, "layers": 2, "positions": 16}
    inputs = module.example_inputs(batch=2, sequence=5, vocab=23)
    if "shard" in spec:
        spec["shard"]["embedding"] = "replicate"  # they are tied
    report = tpc.verify(lambda: module.Model(**sizes), inputs, {"mesh": {"tensor": 2}, **spec})
    assert report.passed, str(report)
    sharded = tpc.shard(lambda: module.Model(**sizes), inputs, {"mesh": {"tensor": 2}, **spec})
    (node,) = joined_in(sharded)
    assert len(node.args) == (3 if "shard" in spec else 5)


def entered_already(node: fx.Node) -> None:
    with node.graph.inserting_before(node):
        entered = node.graph.call_function(enter, (node.args[0], ("tensor",)))
    entered.meta = dict(node.args[0].meta)  # type: ignore[union-attr]
    node.update_arg(0, entered)


def other_targets(node: fx.Node) -> None:
    with node.graph.inserting_before(node):
        flipped = node.graph.call_function(torch.ops.aten.flip.default, (node.args[2], [0]))
    flipped.meta = dict(node.args[2].meta)  # type: ignore[union-attr]
    node.update_arg(2, flipped)


FAULTS: dict[str, Any] = {
    "the gradient is summed twice": entered_already,
    "classes of one rank alone": lambda n: setattr(n, "args", n.args[:3]),
    "other targets": other_targets,
    "another reduction": lambda n: n.update_kwarg("reduction", "sum"),
    "another class ignored": lambda n: n.update_kwarg("ignore_index", 2),
    "another precision": lambda n: n.update_kwarg("dtype", torch.float64),
    "no precision": lambda n: setattr(n, "kwargs", {k: v for k, v in n.kwargs.items() if k != "dtype"}),
    "a bias": lambda n: n.update_kwarg("bias", next(p for p in n.graph.nodes if "norm_bias" in p.name)),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_the_checker_refuses_faults(fault: str) -> None:
    sharded = compiled("transformers", 2)
    graph = copy_graph(sharded.program.graph)
    FAULTS[fault](next(n for n in graph.nodes if n.target is linear_cross_entropy))
    graph.lint()
    assert not check(replace(sharded.program, graph=graph)).passed


def test_a_group_of_one_needs_no_collective() -> None:
    assert Group().begin_all_gather(torch.ones(1, 2)).shape == (1, 2)
    assert not compiled("flat", 1).program.collectives
