"""Fused attention draws its dropout from torch's generator: right only where no two ranks hold the same heads."""

from __future__ import annotations

import torch

from tpcompiler.graphs import layouts_of
from tpcompiler.program import Program, Training


def draws_apart(program: Program) -> bool:
    """Whether ranks that hold the same attention would each drop other elements of it."""
    split = {name for name, degree in program.mesh.dims if degree > 1 and name != "data"}
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            drops = any(isinstance(a, Training) and a.on for a in (*node.args, *node.kwargs.values()))
            if drops and split - {n for layout in layouts_of(node) for d in layout for n in d.over}:
                return True
    return False
