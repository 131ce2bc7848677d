"""Replaces a value that depends on tokens by a parameter where only its dtype is read.

What a model casts to its own dtype is `type_as` a neighbour (`capture/own_dtype.py`). For a mask or a table, that
neighbour would make it depend on tokens. A parameter has the same dtype, and is there before any token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from tpcompiler.graphs import copy_graph
from tpcompiler.program import Program

aten = torch.ops.aten


def refer_to_parameters(program: Program) -> Program:
    """The program with a parameter as the reference of every `type_as` whose reference is in the parameters' dtype.

    A model with parameters of several real dtypes stays as it is.
    """
    names = {p.node for p in program.capture.parameters if not p.buffer}
    graph = copy_graph(program.graph)
    parameters = [n for n in graph.nodes if n.op == "placeholder" and n.name in names and _is_real(n)]
    if len({n.meta["val"].dtype for n in parameters}) != 1:
        return program
    own = set(parameters)  # values that have the parameters' dtype, whichever that is
    for node in graph.nodes:
        if node.op == "call_function" and _follows(node, own):
            own.add(node)
        if node.target is aten.type_as.default and node.args[1] in own:
            node.args = (node.args[0], parameters[0])
    return replace(program, graph=graph)


def _follows(node: fx.Node, own: set[fx.Node]) -> bool:
    """Whether a result has the parameters' dtype, since the real operands have it and the call names no other."""
    if node.target is aten.type_as.default:
        return node.args[1] in own
    if node.target is aten.to.other or any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
        return False
    real = [n for n in node.all_input_nodes if _is_real(n)]
    return _is_real(node) and bool(real) and all(n in own for n in real)


def _is_real(node: fx.Node) -> bool:
    """Whether a node gives real numbers: in one tensor, or in the first of several."""
    value = node.meta.get("val")
    first = value[0] if isinstance(value, list | tuple) and value else value
    return isinstance(first, Tensor) and first.is_floating_point()
