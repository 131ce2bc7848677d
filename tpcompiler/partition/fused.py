"""Takes a fused product apart when only some of its segments are split (one kv head: q is split, k and v are whole).

The input's gradient is the sum of the segments' gradients. Those of split segments are partial and those of whole ones
are not, so that no single `enter` is right for both. Each segment becomes a product of its own, and the results are
joined again.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from tpcompiler.axes.infer import Relation
from tpcompiler.graphs import layout_of
from tpcompiler.layout import Concat, Dim, LocalSize, Product, size_argument
from tpcompiler.ops.operands import bind, op_name
from tpcompiler.ops.record import WeightProduct
from tpcompiler.partition.builder import Builder
from tpcompiler.partition.contraction import multiplied
from tpcompiler.program import Cause

aten = torch.ops.aten


@dataclass(frozen=True)
class Fused:
    """A dimension `(before (part | part | …) after)` in which some segments are split and others are whole."""

    before: tuple[Dim, ...]
    parts: tuple[Dim, ...]
    after: tuple[Dim, ...]

    @property
    def plain(self) -> bool:
        """Whether the segments are the whole dimension."""
        return not self.before and not self.after

    @property
    def place(self) -> int:
        """The index of the segments among the dimensions that this one is opened into."""
        return int(bool(self.before))

    @property
    def last(self) -> int:
        """The index of the last of those dimensions."""
        return self.place + int(bool(self.after))

    def around(self, part: Dim) -> Dim:
        """The dimension `(before part after)`."""
        return part if self.plain else Product((*self.before, part, *self.after))

    def sizes(self, part: Dim) -> list[LocalSize | int]:
        """The local sizes of the dimensions that the fused one is opened into, with `part` in place of the segments."""
        dims = [Product(d) if len(d) > 1 else d[0] for d in (self.before, (part,), self.after) if d]
        return [size_argument(d) for d in dims]


def uneven_segments(dim: Dim) -> Fused | None:
    """The segments of a dimension if they are not all split alike, else None."""
    if isinstance(dim, Concat) and split_in_part(dim):
        return Fused((), _flat(dim), ())
    if isinstance(dim, Product):
        for i, p in enumerate(dim.parts):
            if isinstance(p, Concat) and split_in_part(p):
                return Fused(dim.parts[:i], _flat(p), dim.parts[i + 1 :])
    return None


def _flat(segments: Concat) -> tuple[Dim, ...]:
    """The segments, with nested segments listed one by one."""
    return tuple(x for p in segments.parts for x in (_flat(p) if isinstance(p, Concat) else (p,)))


def split_in_part(dim: Dim) -> bool:
    """Whether a dimension has segments, at any depth, that are not split alike."""
    if isinstance(dim, Concat) and len({p.over for p in dim.parts}) > 1:
        return True
    return isinstance(dim, Concat | Product) and any(map(split_in_part, dim.parts))


def is_mixed(b: Builder, relation: Relation) -> bool:
    """Whether only some segments of the result are split, while an operand that needs a gradient is whole. The
    operand's gradient would then count the whole segments once for each rank."""
    if not any(uneven_segments(d) for dims in relation.results for d in b.dims(dims)):
        return False
    present = b.over([t for dims in relation.results for t in dims])
    return any(o.dims is not None and o.node in b.axes.grads and b.lacking(o.dims, present) for o in relation.operands)


def take_apart(b: Builder, node: fx.Node, relation: Relation) -> fx.Node:
    """Replaces a product with a fused weight by one product for each segment. A product that is split gets an `enter`
    of its own.

    Raises `CannotSplit` for an op that is not such a product.
    """
    terms = relation.results[0]
    *lead, last = dims = b.dims(terms)
    product, fused, args = relation.rule.product, uneven_segments(last), bind(node)
    if (
        product is None
        or not relation.rule.adds_up(args)
        or fused is None
        or any(map(split_in_part, fused.parts))
        or any(d.over for d in lead)
        or b.over(relation.contracted)
    ):
        uneven = [t for t, d in zip(terms, dims, strict=True) if uneven_segments(d) is not None]
        raise b.refuse(node, f"{op_name(node)} of segments of which some are split", *uneven)
    x, bias = args[product.x], args.get(product.bias)
    weights = _segments(b, args[product.weight], product.along, fused)
    biases = [None] * len(weights) if bias is None else _segments(b, bias, -1, fused)
    at = len(lead)
    out = []
    for part, w, vector in zip(fused.parts, weights, biases, strict=True):
        piece = fused.around(part)
        value = b.env[x]
        if piece.over and x.name in b.axes.grads:
            leaves = tuple(a for a in b.split_axes(terms[-1:]) if set(b.plan.split[a]) <= set(piece.over))
            value = b.enter(value, x, b.in_order(set(piece.over)), Cause(op_name(node), leaves))
        new = _piece(b, node, product, value, w, vector, [*lead, piece])
        new.meta["val"] = _sized(node.meta["val"], at, piece.size)
        out.append(new if fused.plain else b.call(aten.unflatten.int, new, at, fused.sizes(part)))
    return _joined(b, out, at, fused, node, dims)


def _piece(
    b: Builder,
    node: fx.Node,
    product: WeightProduct,
    x: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    dims: Sequence[Dim],
) -> fx.Node:
    if bias is not None and product.along == 0:
        return b.describe(b.call(aten.linear.default, x, weight, bias), node, dims)
    new = b.describe(multiplied(b, product, x, weight), node, dims)
    return new if bias is None else b.describe(b.call(aten.add.Tensor, new, bias), node, dims)


def _segments(b: Builder, source: fx.Node, along: int, fused: Fused) -> list[fx.Node]:
    """The segments of a parameter as views: `(kv (q | k | v) d)` becomes `(kv q d)`, `(kv k d)` and `(kv v d)`."""
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
    """Joins the results of the segments as the fused product gives them."""
    if fused.plain:
        return b.describe(b.call(aten.cat.default, pieces, -1), like, dims)
    joined = b.call(aten.cat.default, pieces, at + fused.place)
    return b.describe(b.call(aten.flatten.using_ints, joined, at, at + fused.last), like, dims)


def _sized(val: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    return val.new_empty([size if i == dim else n for i, n in enumerate(val.shape)])
