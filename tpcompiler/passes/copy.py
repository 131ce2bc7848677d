"""A pass works on a copy: programs are values."""

from __future__ import annotations

from torch import fx


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """The same nodes by the same names, metadata included."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copied = new.node_copy(node, env.__getitem__)
        copied.meta = dict(node.meta)
        env[node] = copied
    return new


def erase_dead(graph: fx.Graph) -> None:
    """Remove what nobody uses; parameters and inputs stay."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    graph.lint()
