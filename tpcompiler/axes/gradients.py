"""Which values gradients flow back through. Only those values have a gradient to be summed over ranks."""

from __future__ import annotations

from torch import fx

from tpcompiler.graphs import tensors
from tpcompiler.ops.operands import tensor_operands
from tpcompiler.ops.table import UNKNOWN, find


def carries(node: fx.Node) -> bool:
    """Whether a node's value is of a type that has gradients: floating-point, or complex as rotations are."""
    return any(v.dtype.is_floating_point or v.dtype.is_complex for v in tensors(node.meta.get("val")))


def passes(node: fx.Node) -> bool:
    """Whether gradients flow back through a node to its operands."""
    if node.op != "call_function" or not carries(node):
        return False
    rule = find(node.target) or UNKNOWN
    return rule.gradient and not rule.constant


def _read(node: fx.Node) -> list[fx.Node]:
    """The operands whose values a node reads. No other operand gets a gradient."""
    unread = (find(node.target) or UNKNOWN).unread if node.op == "call_function" else frozenset()
    if not unread:
        return node.all_input_nodes
    return [n for i, n in enumerate(tensor_operands(node)) if n is not None and i not in unread]


def carriers(graph: fx.Graph, sources: frozenset[str]) -> frozenset[str]:
    """The names of the nodes through which gradients flow back to a placeholder in `sources`."""
    out: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            found = node.name in sources
        else:
            unknown = node.op == "call_function" and node.meta.get("val") is None  # a node that the partitioner made
            found = (unknown or passes(node)) and not out.isdisjoint(_read(node))
        if found:
            out.add(node)
    return frozenset(n.name for n in out)


def reached(graph: fx.Graph) -> frozenset[str]:
    """The names of the nodes that a gradient of an output reaches. What a model detaches or computes under `no_grad`,
    such as the cycles of a recurrent model, is not among them."""
    out: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or (node in out and passes(node)):
            out.update(n for n in _read(node) if carries(n))
    return frozenset(n.name for n in out)
