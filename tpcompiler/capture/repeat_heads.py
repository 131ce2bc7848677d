"""Repeats grouped keys and values to all heads, so that heads can be split as one axis."""

from __future__ import annotations

from dataclasses import replace

import torch

from tpcompiler.graphs import copy_graph
from tpcompiler.ops.operands import bind
from tpcompiler.program import Capture

aten = torch.ops.aten


def repeat_grouped(capture: Capture, only: frozenset[str] | None = None) -> Capture:
    """The capture with attention of grouped keys and values rewritten for repeated ones: all of it, or `only` some."""
    graph = copy_graph(capture.graph)
    for node in list(graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default or not bind(node)["enable_gqa"]:
            continue
        if only is not None and node.name not in only:
            continue
        query, *others = node.args[:3]
        heads = query.meta["val"].shape[-3]
        repeated = []
        for x in others:
            times = heads // x.meta["val"].shape[-3]
            with graph.inserting_before(node):
                new = graph.call_function(aten.repeat_interleave.self_int, (x, times, -3))
            shape = list(x.meta["val"].shape)
            shape[-3] = heads
            new.meta = {**x.meta, "val": x.meta["val"].new_empty(shape)}
            repeated.append(new)
        node.args = (query, *repeated, *node.args[3:])
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "enable_gqa"}
    graph.lint()
    return replace(capture, graph=graph)
