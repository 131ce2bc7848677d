"""Proves that a mixer of rows is causal, by what later positions contribute to a value of rows and columns.

The proof is by the values' own expressions. A mask is computed; from it on, each operation says what becomes of the
places above the diagonal: `-inf` added to a finite score stays, a softmax makes it 0, and 0 times anything finite is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tpcompiler.decode.positional import LOW, Positional
from tpcompiler.decode.relate import ACROSS, Related
from tpcompiler.graphs import tensors
from tpcompiler.ops.notation import letters_of
from tpcompiler.ops.operands import bind, op_name
from tpcompiler.program import Training

Value = float | None
Relate = Callable[[fx.Node], "Related | str"]


class Future:
    """`upper(node, row, column)`: the one value at all places whose column is a later position than their row."""

    def __init__(self, positional: Positional, relate: Relate) -> None:
        self._positional, self._relate = positional, relate
        self._known: dict[tuple[fx.Node, int | None, int | None], Value] = {}

    def upper(self, node: fx.Node, row: int | None, column: int | None) -> Value:
        """`row`, `column`: dimensions of the node's value; None where it is the same along them. None: not known."""
        key = (node, row, column)
        if key not in self._known:
            self._known[key] = None
            self._known[key] = self._find(node, row, column)
        return self._known[key]

    def _find(self, node: fx.Node, row: int | None, column: int | None) -> Value:
        if node in self._positional.free:
            return self._positional.upper(node, row, column)
        if node.op != "call_function" or not isinstance(node.meta["val"], torch.Tensor):
            return None
        related = self._relate(node)
        if isinstance(related, str):
            return None
        if "softmax" in op_name(node) and "log" not in op_name(node):
            return self._softmax(node, row, column)
        inner = [self._operand(related, i, row, column) for i in range(len(related.nodes))]
        if len(inner) == 1 and (carries(related) or ACROSS.get(node.target) == "... -> ..."):
            return inner[0]
        return _pointwise(node, related, inner) if _is_pointwise(related) else self._joined(node, related, row, column)

    def _softmax(self, node: fx.Node, row: int | None, column: int | None) -> Value:
        given = bind(node)
        source: Any = given["self"]
        if row is None or column is None or given["dim"] % source.meta["val"].dim() != column:
            return None
        value = self.upper(source, row, column)
        return 0.0 if value is not None and value <= LOW else None

    def _operand(self, related: Related, i: int, row: int | None, column: int | None) -> Value:
        places = [self._place(related, i, d) for d in (row, column)]
        return self.upper(related.nodes[i], places[0], places[1])

    def _place(self, related: Related, i: int, dim: int | None) -> int | None:
        """Returns the dimension of an operand that is dimension `dim` of the result."""
        side = related.operands[i]
        if dim is None or side is None:
            return None
        node = related.nodes[i]
        letters = {x.name for x in letters_of(related.results[0][dim][0])}
        along = self._positional.along(node)
        found = [k for k, (item, n) in enumerate(side) if along[k] and {x.name for x in letters_of(item)} & letters]
        return found[0] if len(found) == 1 else None

    def _joined(self, node: fx.Node, related: Related, row: int | None, column: int | None) -> Value:
        """Returns the one of the joined values that has the columns."""
        if op_name(node) not in ("cat", "concat", "concatenate") or row is None or column is None:
            return None
        having = [i for i in range(len(related.nodes)) if self._place(related, i, column) is not None]
        return self._operand(related, having[0], row, column) if len(having) == 1 else None


def carries(related: Related) -> bool:
    """Whether an op gives the values of its one operand, in another shape or a part of them."""
    rule = related.rule
    return len(related.nodes) == 1 and not related.contracted and (bool(rule.shape) or rule.moves)


def _is_pointwise(related: Related) -> bool:
    return all(
        item_name.startswith("~")
        for side in (*related.operands, *related.results)
        for item, _ in side or ()
        for item_name in (x.name for x in letters_of(item))
    )


def _pointwise(node: fx.Node, related: Related, inner: list[Value]) -> Value:
    """What an elementwise op makes of the operands' values, as far as they are known."""
    known = dict(zip(related.nodes, inner, strict=True))
    for n, side in zip(related.nodes, related.operands, strict=True):
        if side is None and known[n] is None:
            known[n] = 0.0  # its values do not matter
    given = bind(node) if isinstance(node.target, torch._ops.OpOverload) else {}

    def of(name: str) -> Value:
        value = given.get(name)
        if isinstance(value, fx.Node):
            return known.get(value)
        return float(value) if isinstance(value, int | float) else None

    name = op_name(node)
    if (absorbed := _absorbed(name, of)) is not None:
        return absorbed
    if all(v is not None for v in known.values()):
        return _computed(node, known)
    return None


def _absorbed(name: str, of: Callable[[str], Value]) -> Value:
    a, b = of("self"), of("other")
    if name in ("add", "add_"):
        return next((v for v in (a, b) if v is not None and v <= LOW), None)
    if name == "sub":
        if b is not None and b >= -LOW:
            return -b
        return a if a is not None and a <= LOW else None
    if name in ("mul", "multiply", "logical_and", "bitwise_and", "__and__"):
        return next((v for v in (a, b) if v == 0), None)
    if name in ("div", "divide", "true_divide"):
        return 0.0 if a == 0 else None
    if name in ("logical_or", "bitwise_or", "__or__"):
        return next((v for v in (a, b) if v == 1), None)
    if name == "minimum":
        return next((v for v in (a, b) if v is not None and v <= LOW), None)
    if name == "where" and (seen := of("condition")) is not None:
        return a if seen else b
    if name == "masked_fill" and (hidden := of("mask")) is not None:
        return of("value") if hidden else a
    return None


def _computed(node: fx.Node, known: dict[fx.Node, Value]) -> Value:
    """The op itself on one element of each operand."""

    def element(a: Any) -> Any:
        if isinstance(a, fx.Node):
            if not tensors(a.meta.get("val")):
                raise TypeError("a size")
            return torch.tensor(known[a], dtype=torch.float64).to(a.meta["val"].dtype)
        if isinstance(a, Training):
            return a.off
        return a

    try:
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), element)
        value = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError):
        return None
    return float(value) if isinstance(value, torch.Tensor) and value.dim() == 0 and not value.isnan() else None
