"""Brings products with experts into one form. The kernel that a model chooses depends on the device and the dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tpcompiler import runtime  # registers tpcompiler::grouped_mm

aten = torch.ops.aten
_PRODUCTS = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")


def portable_experts(graph: fx.Graph) -> None:
    """Turns products of tokens with their experts' matrices into `tpcompiler::grouped_mm`, and counts tokens in float,
    since integer `histc` exists only on CUDA, in place."""
    assert runtime.grouped_mm is not None
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target._schema.name in _PRODUCTS:
            _product(node)
        elif node.target is aten.histc.default and not node.args[0].meta["val"].is_floating_point():
            _count(graph, node)


def _product(node: fx.Node) -> None:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    given: list[Any] = [*node.args, *(node.kwargs.get(n) for n in names[len(node.args) :])]
    x, weight, ends, *rest = given
    if ends is not None and x.meta["val"].dim() == 2 and weight.meta["val"].dim() == 3 and not any(rest):
        node.target = torch.ops.tpcompiler.grouped_mm.default
        node.args, node.kwargs = (x, weight, ends), {}


def _count(graph: fx.Graph, node: fx.Node) -> None:
    """Counts tokens in float, which is exact up to 2^24 tokens an expert."""
    x: Any = node.args[0]
    with graph.inserting_before(node):
        wide = graph.call_function(aten.to.dtype, (x, torch.float32))
    wide.meta = {**node.meta, "val": x.meta["val"].to(torch.float32)}
    val = node.meta["val"]
    node.args = (wide, *node.args[1:])
    node.meta = {**node.meta, "val": val.to(torch.float32)}
    with graph.inserting_after(node):
        back = graph.call_function(aten.to.dtype, (node, val.dtype))
    back.meta = {**node.meta, "val": val}
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
