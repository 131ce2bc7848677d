"""Writes out attention with dropout, so that its masks are counter-based like all others.

A fused kernel draws its own random numbers, so that masks depend on how heads lie on ranks. With
`attention_dropout: exact` in the spec, attention with dropout is computed from its parts instead, and the run is the
same at every degree. Attention with dropout that several ranks compute alike is always written out: otherwise their
masks would differ, and with them the gradients of the weights that they all hold.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tpcompiler.capture.repeat_heads import repeat_grouped
from tpcompiler.graphs import copy_graph
from tpcompiler.ops.operands import bind
from tpcompiler.program import Capture, Training

aten = torch.ops.aten


def dropping_attention(capture: Capture) -> frozenset[str]:
    """The names of the fused attentions that have dropout."""
    fused = capture.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    return frozenset(n.name for n in fused if bind(n)["dropout_p"])


def unfuse_dropping_attention(capture: Capture, only: frozenset[str] | None = None) -> Capture:
    """The capture with every attention that has dropout, or with `only` these, as products, softmax and dropout."""
    found = dropping_attention(capture) if only is None else only
    capture = repeat_grouped(capture, found)
    graph = copy_graph(capture.graph)
    for node in list(graph.nodes):
        if node.name in found:
            with graph.inserting_before(node):
                node.replace_all_uses_with(_Writer(graph, node).attention())
            graph.erase_node(node)
    graph.lint()
    return replace(capture, graph=graph)


class _Writer:
    def __init__(self, graph: fx.Graph, like: fx.Node) -> None:
        self.graph, self.like = graph, like

    def call(self, target: torch._ops.OpOverload, *args: object, **kwargs: object) -> fx.Node:
        """A new node with the attention's origin, and a value inferred from its operands' values."""
        new = self.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
        new.meta = {k: v for k, v in self.like.meta.items() if k != "val"}
        mode = next(n for n in self.like.all_input_nodes).meta["val"].fake_mode
        values: Any = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])  # type: ignore[type-var]
        with mode:
            if target is aten.dropout.default:
                new.meta["val"] = values[0][0]
            else:
                device = {"device": "meta"} if "device" in kwargs else {}
                new.meta["val"] = target(*values[0], **{**values[1], **device})
        return new

    def attention(self) -> fx.Node:
        a = bind(self.like)
        q, k, v, mask, p = a["query"], a["key"], a["value"], a["attn_mask"], a["dropout_p"]
        scale = a["scale"] if a["scale"] is not None else 1 / math.sqrt(q.meta["val"].shape[-1])
        scores = self.call(
            aten.matmul.default, self.call(aten.mul.Tensor, q, scale), self.call(aten.transpose.int, k, -2, -1)
        )
        if a["is_causal"]:
            scores = self.call(
                aten.masked_fill.Scalar, scores, self.call(aten.logical_not.default, self.causal(q, k)), -math.inf
            )
        if mask is not None and mask.meta["val"].dtype == torch.bool:
            scores = self.call(aten.masked_fill.Scalar, scores, self.call(aten.logical_not.default, mask), -math.inf)
        elif mask is not None:
            scores = self.call(aten.add.Tensor, scores, mask)
        weights = self.call(aten.softmax.int, scores, -1)
        mode = Training(True, False)
        weights = self.call(aten.dropout.default, weights, p.on if isinstance(p, Training) else p, mode)
        return self.call(aten.matmul.default, weights, v)

    def causal(self, q: fx.Node, k: fx.Node) -> fx.Node:
        sizes = [self.size(q, -2), self.size(k, -2)]
        return self.call(aten.tril.default, self.call(aten.ones.default, sizes, dtype=torch.bool, device=None))

    def size(self, x: fx.Node, dim: int) -> fx.Node | int:
        n = x.meta["val"].shape[dim]
        if isinstance(n, int):
            return n
        for node in self.graph.nodes:  # sizes are read from inputs only
            if isinstance(node.meta.get("val"), torch.SymInt) and node.meta["val"].node.expr == n.node.expr:
                return node
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        for node in self.graph.find_nodes(op="placeholder"):
            shape = getattr(node.meta.get("val"), "shape", ())
            for i, m in enumerate(shape):
                if not isinstance(m, int) and m.node.expr == n.node.expr:
                    with self.graph.inserting_before(first):
                        new = self.graph.call_function(aten.sym_size.int, (node, i))
                    new.meta = {"val": m}
                    return new
        raise AssertionError(f"no input has the size {n}")
