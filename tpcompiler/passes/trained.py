"""The values that gradients of trainable parameters flow through."""

from __future__ import annotations

from torch import fx

from tpcompiler.program import Program


def trained_values(program: Program, graph: fx.Graph) -> set[fx.Node]:
    """The trainable parameters and floating-point inputs of a graph, and every value that depends on one."""
    sources = program.capture.differentiable
    out: set[fx.Node] = set()
    for node in graph.nodes:
        if node.name in sources if node.op == "placeholder" else not out.isdisjoint(node.all_input_nodes):
            out.add(node)
    return out
