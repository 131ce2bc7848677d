"""Which values a gradient flows back through: only those have one to be summed over ranks."""

from __future__ import annotations

from torch import fx

from tpcompiler.graphs import tensors
from tpcompiler.ops.operands import op_name

# Ops whose result has the operand's dimensions but not its gradient.
NO_GRADIENT = frozenset({"detach", "zeros_like", "ones_like", "full_like", "empty_like"})


def carries(node: fx.Node) -> bool:
    """Whether a node's value is of a type that gradients exist for. Rotations may be complex numbers."""
    return any(v.dtype.is_floating_point or v.dtype.is_complex for v in tensors(node.meta.get("val")))


def passes(node: fx.Node) -> bool:
    """Whether a gradient of a node's value becomes one of its operands'."""
    return node.op == "call_function" and carries(node) and op_name(node) not in NO_GRADIENT


def reached(graph: fx.Graph) -> frozenset[str]:
    """Names of the nodes that an output depends on in a way that gradients follow: not what a model computes under
    `no_grad` or detaches, as cycles of a recurrent model are."""
    out: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or (node in out and passes(node)):
            out.update(n for n in node.all_input_nodes if carries(n))
    return frozenset(n.name for n in out)
