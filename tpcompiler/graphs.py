"""FX graphs: reading and writing nodes with types, which torch leaves open, and copies to work on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from tpcompiler.layout import Over

ORIGIN = ("module", "stack", "line")  # keys of `Node.meta`: see `program.Capture`


def call(graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> fx.Node:
    """`graph.call_function`, for arguments that fx does not list: `LocalSize`, `LocalRuns`, `Training`."""
    return graph.call_function(target, args, None if kwargs is None else dict(kwargs))


def set_arguments(node: fx.Node, *args: Any) -> None:
    """New positional arguments, likewise."""
    node.args = args


def set_argument(node: fx.Node, i: int, value: Any) -> None:
    """A new positional argument, likewise."""
    node.update_arg(i, value)


def operand(node: fx.Node, i: int = 0) -> fx.Node:
    """Positional argument `i`, where an op has a value there."""
    found = node.args[i]
    assert isinstance(found, fx.Node), f"argument {i} of {node.format_node()} is no node"
    return found


def over(node: fx.Node) -> Over:
    """The mesh dimensions that an `enter`, `reduce` or `gather` communicates over."""
    names: Any = node.args[1]
    return tuple(names)


def origin(node: fx.Node) -> dict[str, Any]:
    """Metadata: where in the user's model a node stands."""
    return {key: node.meta[key] for key in ORIGIN if key in node.meta}


def value_meta(node: fx.Node) -> dict[str, Any]:
    """Metadata for another node with the same value: all but what is said of this node alone."""
    return {key: value for key, value in node.meta.items() if key not in ("note", "because")}


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a node's `meta["val"]`: one, several, or none."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [v for v in value if isinstance(v, torch.Tensor)] if isinstance(value, list | tuple) else []


def examples(size: torch.SymInt) -> Mapping[Any, Any]:
    """The example's number for every symbol that its graph knows."""
    env = size.node.shape_env
    return getattr(env, "backed_var_to_val", None) or env.var_to_val  # the name changed with torch 2.13


def example_size(size: int | torch.SymInt) -> int:
    """A size at the example inputs."""
    return size if isinstance(size, int) else int(size.node.expr.subs(examples(size)))


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """The same nodes by the same names, metadata included: programs are values, and a rewrite works on a copy."""
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
