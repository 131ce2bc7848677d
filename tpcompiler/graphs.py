"""FX graphs: typed access to nodes, which torch leaves untyped, and copies to work on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tpcompiler.layout import Dim, Over
from tpcompiler.program import Cause, Placed

ORIGIN = ("module", "stack", "line")  # keys of `Node.meta`: see `program.Capture`


def call(graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> fx.Node:
    """`graph.call_function` for arguments whose types fx does not know: `LocalSize`, `LocalRuns`, `Training`."""
    return graph.call_function(target, args, None if kwargs is None else dict(kwargs))


def set_arguments(node: fx.Node, *args: Any) -> None:
    """Sets a node's positional arguments. As in `call`, fx need not know their types."""
    node.args = args


def set_argument(node: fx.Node, i: int, value: Any) -> None:
    """Sets positional argument `i` of a node. As in `call`, fx need not know its type."""
    node.update_arg(i, value)


def operand(node: fx.Node, i: int = 0) -> fx.Node:
    """Positional argument `i` of a node. It must be a node itself."""
    found = node.args[i]
    assert isinstance(found, fx.Node), f"argument {i} of {node.format_node()} is not a node"
    return found


def over(node: fx.Node, place: int = 1) -> Over:
    """The mesh dimensions that an operator of the runtime communicates over: the argument in that place."""
    names: Any = node.args[place]
    return tuple(names)


def origin(node: fx.Node) -> dict[str, Any]:
    """The metadata that says where in the user's model a node stands."""
    return {key: node.meta[key] for key in ORIGIN if key in node.meta}


def placed(node: fx.Node) -> Placed:
    """What partitioning and passes say about a node; an empty record for a node of a plain graph."""
    found = node.meta.get("placed")
    return found if isinstance(found, Placed) else Placed()


def layouts_of(node: fx.Node) -> tuple[tuple[Dim, ...], ...]:
    """The layout of each tensor result, a `Dim` for each dimension; empty when none is known (sizes, constants)."""
    return placed(node).layouts


def layout_of(node: fx.Node) -> tuple[Dim, ...] | None:
    """The layout of a node's one tensor result; None when none is known or when the node has several results."""
    layouts = placed(node).layouts
    return layouts[0] if len(layouts) == 1 and isinstance(node.meta.get("val"), torch.Tensor) else None


def note_of(node: fx.Node) -> str:
    """What a node does across ranks, for the reader: "all-reduce", "partial over tensor". Often empty."""
    return placed(node).note


def cause_of(node: fx.Node) -> Cause | None:
    """The op and the split axes that a collective is for."""
    return placed(node).cause


def place_node(node: fx.Node, about: Placed) -> None:
    """Records what partitioning or a pass says about a node."""
    node.meta["placed"] = about


def partial_note(names: Over) -> str:
    """The note of a value that is this rank's part of a sum over these mesh dimensions."""
    return f"partial over {'·'.join(names)}"


def copy_value(new: fx.Node, like: fx.Node, note: str = "", cause: Cause | None = None) -> fx.Node:
    """Gives a new node the metadata of `like`, whose value and layout it shares, with its own note and cause."""
    new.meta = dict(like.meta)
    place_node(new, replace(placed(like), note=note, cause=cause))
    return new


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a node's `meta["val"]`: one, several, or none."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [v for v in value if isinstance(v, torch.Tensor)] if isinstance(value, list | tuple) else []


def examples(size: torch.SymInt) -> Mapping[Any, Any]:
    """Maps every symbol of the graph that `size` belongs to to its value at the example inputs."""
    env = size.node.shape_env
    return getattr(env, "backed_var_to_val", None) or env.var_to_val  # the name changed with torch 2.13


def example_size(size: int | torch.SymInt) -> int:
    """A size at the example inputs. One that only a run can tell, as of `nonzero`, counts as the example's longest."""
    if isinstance(size, int):
        return size
    known = examples(size)
    at = size.node.expr.subs(known)
    return int(at.subs(dict.fromkeys(at.free_symbols, max(known.values(), default=1))))


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are certainly equal. Nothing is assumed about symbols."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.node.expr == b.node.expr)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same nodes, names and metadata. Programs are never changed: every rewrite works on a copy."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copied = new.node_copy(node, env.__getitem__)
        copied.meta = dict(node.meta)
        env[node] = copied
    return new


def erase_dead(graph: fx.Graph) -> None:
    """Removes nodes that nothing uses. Parameters and inputs stay."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    graph.lint()
