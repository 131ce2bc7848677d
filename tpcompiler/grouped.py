"""Grouped queries whose kv heads fit no factoring of the degree: 3 kv heads with groups of 2, over 5 ranks.

Heads are then split as one axis. Keys and values are made whole on every rank and repeated to all heads, and each rank
takes the heads it needs; gradients of keys and values are summed when they enter.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tpcompiler.axes.infer import AxisMap, bind, infer_axes
from tpcompiler.graphs import copy_graph
from tpcompiler.plan import unfit_products
from tpcompiler.plan.facts import gather_facts
from tpcompiler.program import Capture
from tpcompiler.spec import Spec

aten = torch.ops.aten


def infer_for(capture: Capture, spec: Spec) -> tuple[Capture, AxisMap]:
    """The axes of a capture, cut where the spec's degree asks for it; and the capture that they are of."""
    axes = infer_axes(capture)
    degree = spec.mesh.tensor
    if degree == 1 or spec.allow_empty or not unfit_products(gather_facts(capture, axes), degree):
        return capture, axes
    capture = repeat_grouped(capture)
    axes = infer_axes(capture)
    unfit = [set(pair) for pair in unfit_products(gather_facts(capture, axes), degree)]
    cut = {
        name for name, terms in axes.copied.items() if any(pair <= set(axes.leaves(t)) for t in terms for pair in unfit)
    }
    return capture, infer_axes(capture, frozenset(cut))


def repeat_grouped(capture: Capture) -> Capture:
    """Attention with grouped keys and values as attention with repeated ones."""
    graph = copy_graph(capture.graph)
    for node in list(graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default or not bind(node)["enable_gqa"]:
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
