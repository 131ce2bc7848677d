"""Fused products of which only some segments are split (one kv head: q split, k and v whole) are taken apart.

The input's gradient is the sum of the segments': of the split ones it is partial, of the whole ones it is not, and no
one `enter` is right for both. So each segment becomes a product of its own, and the results are joined again.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tpcompiler.axes.infer import Relation
from tpcompiler.graphs import layout_of
from tpcompiler.layout import Concat, Dim, LocalSize, Product, size_argument
from tpcompiler.ops.operands import bind, op_name
from tpcompiler.partition.builder import Builder
from tpcompiler.program import Cause

aten = torch.ops.aten


@dataclass(frozen=True)
class Fused:
    """A dimension `(before (part | part | …) after)` of whose segments only some are split."""

    before: tuple[Dim, ...]
    parts: tuple[Dim, ...]
    after: tuple[Dim, ...]

    @property
    def plain(self) -> bool:
        return not self.before and not self.after

    @property
    def place(self) -> int:
        """Where the segments stand among the dimensions that this one is opened into."""
        return int(bool(self.before))

    @property
    def last(self) -> int:
        """The last of those dimensions."""
        return self.place + int(bool(self.after))

    def around(self, part: Dim) -> Dim:
        return part if self.plain else Product((*self.before, part, *self.after))

    def sizes(self, part: Dim) -> list[LocalSize | int]:
        """Sizes of the dimensions that the fused one is opened into, with `part` in the segments' place."""
        dims = [Product(d) if len(d) > 1 else d[0] for d in (self.before, (part,), self.after) if d]
        return [size_argument(d) for d in dims]


@dataclass(frozen=True)
class Multiplied:
    """A product with one weight: `x @ weight + bias`, or as `linear` has it. `along`: the weight's output dimension."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    along: int


def uneven_segments(dim: Dim) -> Fused | None:
    """The segments of a dimension, when they are not all split alike."""
    if isinstance(dim, Concat) and split_in_part(dim):
        return Fused((), _flat(dim), ())
    if isinstance(dim, Product):
        for i, p in enumerate(dim.parts):
            if isinstance(p, Concat) and split_in_part(p):
                return Fused(dim.parts[:i], _flat(p), dim.parts[i + 1 :])
    return None


def _flat(segments: Concat) -> tuple[Dim, ...]:
    """The segments, those of segments among them."""
    return tuple(x for p in segments.parts for x in (_flat(p) if isinstance(p, Concat) else (p,)))


def split_in_part(dim: Dim) -> bool:
    """Whether any segments of a dimension, however deep, are not split alike."""
    if isinstance(dim, Concat) and len({p.over for p in dim.parts}) > 1:
        return True
    return isinstance(dim, Concat | Product) and any(map(split_in_part, dim.parts))


def is_mixed(b: Builder, relation: Relation) -> bool:
    """Whether the result is split in some of its segments only, and an operand lacks what splits them: its gradient
    would count the whole segments once a rank."""
    if not any(uneven_segments(d) for dims in relation.results for d in b.dims(dims)):
        return False
    present = b.over([t for dims in relation.results for t in dims])
    return any(
        o.live and o.dims is not None and o.node in b.axes.grads and b.lacking(o.dims, present)
        for o in relation.operands
    )


def take_apart(b: Builder, node: fx.Node, relation: Relation) -> fx.Node:
    """A product whose weight is fused from segments, as one product a segment, each with an `enter` of its own.

    Raises `CannotSplit` for ops that are no such product.
    """
    terms = relation.results[0]
    *lead, last = dims = b.dims(terms)
    found, fused = _multiplied(node), uneven_segments(last)
    if (
        found is None
        or fused is None
        or any(map(split_in_part, fused.parts))
        or any(d.over for d in lead)
        or b.over(relation.contracted)
    ):
        uneven = [t for t, d in zip(terms, dims, strict=True) if uneven_segments(d) is not None]
        raise b.refuse(node, f"{op_name(node)} of segments of which some are split", *uneven)
    weights = _segments(b, found.weight, found.along, fused)
    biases = [None] * len(weights) if found.bias is None else _segments(b, found.bias, -1, fused)
    at = len(lead)
    out = []
    for part, w, bias in zip(fused.parts, weights, biases, strict=True):
        piece = fused.around(part)
        value = b.env[found.x]
        if piece.over and found.x.name in b.axes.grads:
            leaves = tuple(a for a in b.split_axes(terms[-1:]) if set(b.plan.split[a]) <= set(piece.over))
            value = b.enter(value, found.x, b.in_order(set(piece.over)), Cause(op_name(node), leaves))
        new = _product(b, node, value, w, bias, [*lead, piece])
        out.append(new if fused.plain else b.call(aten.unflatten.int, new, at, fused.sizes(part)))
    return _joined(b, out, at, fused, node, dims)


def _multiplied(node: fx.Node) -> Multiplied | None:
    name, args = op_name(node), bind(node)
    if name == "linear":
        return Multiplied(args["input"], args["weight"], args["bias"], 0)
    if name in ("matmul", "mm"):
        return Multiplied(args["self"], args[{"mm": "mat2"}.get(name, "other")], None, -1)
    if name == "addmm" and args["beta"] == 1 and args["alpha"] == 1:
        return Multiplied(args["mat1"], args["mat2"], args["self"], -1)
    return None


def _product(
    b: Builder, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, dims: Sequence[Dim]
) -> fx.Node:
    extra: tuple[Any, ...] = () if bias is None else (bias,)
    if op_name(node) == "linear":
        return b.describe(b.call(node.target, x, weight, *extra), node, dims)
    new = b.describe(b.call(aten.matmul.default, x, weight), node, dims)
    return new if bias is None else b.describe(b.call(aten.add.Tensor, new, bias), node, dims)


def _segments(b: Builder, source: fx.Node, along: int, fused: Fused) -> list[fx.Node]:
    """A parameter's segments, as views: `(kv (q | k | v) d)` is three weights `(kv q d)`, `(kv k d)`, `(kv v d)`."""
    value = b.env[source]
    layout = layout_of(value)
    assert layout is not None
    along %= len(layout)
    opened = value if fused.plain else b.call(aten.unflatten.int, value, along, fused.sizes(Concat(fused.parts)))
    sizes = [size_argument(p) for p in fused.parts]
    whole = b.call(aten.split_with_sizes.default, opened, sizes, along + fused.place)
    out = []
    for i, part in enumerate(fused.parts):
        piece = b.call(operator.getitem, whole, i)
        if not fused.plain:
            piece = b.call(aten.flatten.using_ints, piece, along, along + fused.last)
        dims = list(layout)
        dims[along] = fused.around(part)
        piece.meta["val"] = _sized(source.meta["val"], along, dims[along].size)
        out.append(b.describe(piece, source, dims))
    return out


def _joined(b: Builder, pieces: list[fx.Node], at: int, fused: Fused, like: fx.Node, dims: Sequence[Dim]) -> fx.Node:
    """The segments' results joined again as the fused product gives them."""
    if fused.plain:
        return b.describe(b.call(aten.cat.default, pieces, -1), like, dims)
    joined = b.call(aten.cat.default, pieces, at + fused.place)
    return b.describe(b.call(aten.flatten.using_ints, joined, at, at + fused.last), like, dims)


def _sized(val: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    return val.new_empty([size if i == dim else n for i, n in enumerate(val.shape)])
