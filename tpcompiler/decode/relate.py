"""How the dimensions of a call's operands and results belong together, read off the op's line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.axes.primes import Primes
from tpcompiler.errors import RuleError
from tpcompiler.graphs import tensors
from tpcompiler.layout import LocalSize
from tpcompiler.ops.measured import Measured, Side
from tpcompiler.ops.notation import letters_of, parse
from tpcompiler.ops.operands import bind, op_name
from tpcompiler.ops.record import OpCall, OpRule
from tpcompiler.ops.table import find

# The lines of the operators between ranks, in global sizes: what crosses ranks never mixes positions.
ACROSS: dict[Any, str] = {
    **dict.fromkeys((runtime.enter, runtime.reduce, runtime.gather, runtime.take, runtime.dropout), "... -> ..."),
    runtime.lookup: "v! h, ... -> ... h",
    runtime.rms_norm: "... n!, n! -> ... n!",
    runtime.layer_norm: "... n!, n!, n! -> ... n!",
}
PLAIN = OpRule("")


@dataclass(frozen=True)
class Related:
    """A call's tensor operands in the order of its arguments, and the letters of all dimensions, in global sizes."""

    rule: OpRule
    nodes: tuple[fx.Node, ...]
    operands: tuple[Side | None, ...]  # of each node; None: its values do not matter
    results: tuple[Side, ...]
    whole: frozenset[str]
    contracted: frozenset[str]
    copies: frozenset[str]
    sizes: dict[str, int]

    def places(self, side: Side | None, letter: str) -> list[int]:
        """The dimensions in which a letter stands."""
        return [i for i, (item, _) in enumerate(side or ()) if letter in {x.name for x in letters_of(item)}]


def slots(node: fx.Node) -> list[fx.Node]:
    """Tensor operands in the order of the schema, each as often as it stands there."""
    if isinstance(node.target, torch._ops.OpOverload):
        given = bind(node)
        values = [given[a.name] for a in node.target._schema.arguments]
    else:
        values = [*node.args, *node.kwargs.values()]
    return [n for v in values for n in _nodes(v) if tensors(n.meta.get("val"))]


def _nodes(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _nodes(v)


def relate(node: fx.Node, sizes: Primes) -> Related | str:
    """The relation of a call, or why there is none."""
    nodes = slots(node)
    shapes = [sizes.shape(n.meta["val"]) for n in nodes if isinstance(n.meta["val"], torch.Tensor)]
    if len(shapes) != len(nodes):
        return f"{op_name(node)} takes a list of results"
    rule, given, operands = find(node.target), {}, shapes
    if isinstance(node.target, torch._ops.OpOverload):
        given = global_sizes(bind(node))
        operands = _left_out(node, given, shapes)
    elif node.target in ACROSS:
        width = " ".join(f"h{i}" for i in range(1, len(shapes[0])))
        line = ACROSS[node.target].replace(" h", f" {width}").split(" -> ")
        rule = OpRule(", ".join(line[0].split(", ")[: len(nodes)]) + " -> " + line[1])
    if rule is None:
        return f"{op_name(node)} has no rule"
    floating = tuple(n.meta["val"].dtype.is_floating_point for n in nodes)
    call = OpCall(tuple(operands), tuple(sizes.shape(v) for v in tensors(node.meta["val"])), given, floating)
    try:
        said = rule.pattern(call)
        if said is None:
            return f"{op_name(node)} with these arguments has no rule"
        fit = Measured(f"{op_name(node)} at {node.name}", parse(said[0]), said[1], call, sizes.dynamic)
    except RuleError as e:
        return str(e)
    return Related(
        rule,
        tuple(nodes),
        tuple(fit.operands),
        tuple(fit.results),
        frozenset(fit.whole),
        frozenset(fit.contracted),
        frozenset(fit.copies),
        fit.sizes,
    )


def global_sizes(value: Any) -> Any:
    """Arguments with what a rank holds of a dimension replaced by the dimension's size over all ranks."""
    if isinstance(value, LocalSize):
        return value.dim.size if not value.dim.dynamic_size else value
    if isinstance(value, dict):
        return {k: global_sizes(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [global_sizes(v) for v in value]
    return value


def _left_out(node: fx.Node, given: dict[str, Any], shapes: list[Any]) -> list[Any]:
    """The operands' shapes, with None for a tensor argument that is not given."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found, out = iter(shapes), []
    for a in node.target._schema.arguments:
        if "Tensor" in str(a.type):
            value = given[a.name]
            out += [None] if value is None else [next(found) for n in _nodes(value) if tensors(n.meta.get("val"))]
    return out
