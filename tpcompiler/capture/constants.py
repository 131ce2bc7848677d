"""Turns indexing by constant, consecutive indices into slices: `qkv[..., [-2], :]` takes one run of a dimension."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def slice_constant_runs(graph: fx.Graph, values: Mapping[str, Tensor]) -> None:
    """Turns `index` and `index_select` of one dimension by a constant i, i+1, …, j into the slice i:j+1, in place.

    `values` holds the values of placeholders, where they are known.
    """
    for node in list(graph.nodes):
        if node.target is aten.index.Tensor:
            picked = [(i, x) for i, x in enumerate(node.args[1]) if x is not None]
        elif node.target is aten.index_select.default:
            picked = [(node.args[1], node.args[2])]
        else:
            continue
        if len(picked) != 1 or not isinstance(picked[0][1], fx.Node):
            continue
        dim, index = picked[0]
        run = _run(values.get(index.name), node.args[0].meta["val"].shape[dim])
        if run is not None:
            node.target, node.args, node.kwargs = aten.slice.Tensor, (node.args[0], dim, *run), {}


def _run(index: Tensor | None, size: int | torch.SymInt) -> tuple[int, int] | None:
    """The first of consecutive indices into a dimension of a known size, and one past the last; None for others."""
    if index is None or index.dim() != 1 or index.dtype == torch.bool or not index.numel() or not isinstance(size, int):
        return None
    start = int(index[0]) % size
    wanted = torch.arange(start, start + len(index))
    return (start, start + len(index)) if torch.equal(index.long() % size, wanted) else None
