"""Normal forms: the closed list of equalities by which a program may differ from its model in writing.

Each equality holds for all values and sizes (`tests/check/test_check_normal_form.py` compares them with torch):

* A chain of reshapes is one `reshape`, a chain of permutations is one `permute`, and a view that changes nothing is its
  operand.
* `split`, `chunk`, `narrow`, `select` and `slice` are all `slice`. A slice of a slice is one slice, and a slice of a
  concatenation is the part that it falls into.
* Neighbouring slices of one value, concatenated in order, are one slice of that value.
* Nested sums are one sum of all addends in any order. A view, slice or dropout of a sum is the sum of the addends'.
* A product's bias is an addend. A product with rows of a weight is those rows of the whole product.
* A mean is a sum divided by the count. Dropout of a reshaped value is the reshaped dropout.
* A cast is one operation under many names. A reshape of a cast value is the cast of the reshaped value.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from tpcompiler.check.terms import Shape, Term, TermStore

OPEN = 1 << 31  # from here on, the end of a slice means the end of the dimension


class OpenDtype(Exception):
    """Raised for a sum without a normal form, because its addends' dtypes alone do not determine its dtype."""


class Forms(TermStore):
    """Builds terms in normal form."""

    known: Shape | None = None  # the shape of the value that is being read, where the model gives it

    # -- views ------------------------------------------------------------------------------------------------------

    def reshape(self, x: Term, shape: Sequence[int]) -> Term:
        """`x` in another shape. One size may be -1, and is then computed from the others."""
        shape = _resolved(tuple(shape), prod(x.shape))
        if prod(shape) != prod(x.shape):
            raise ValueError(f"{list(x.shape)} has no shape {list(shape)}")
        if shape == x.shape:
            return x
        if x.op == "reshape":
            return self.reshape(x.args[0], shape)
        if x.op == "cast":
            return self.cast(self.reshape(x.args[0], shape), x.dtype)
        if x.op == "sum":
            moved = [self._reshaped_addend(v, x.shape, shape) for _, v in x.args[0]]
            if all(m is not None for m in moved):
                return self._sum(((c, m) for (c, _), m in zip(x.args[0], moved, strict=True)), shape, x.dtype)
        return self.make("reshape", (x, shape), shape, x.dtype)

    def cast(self, x: Term, dtype: torch.dtype) -> Term:
        """`x` in another dtype. A cast to its own is kept: at run time it may have another."""
        return self.make("cast", (x, dtype), x.shape, dtype)

    def _reshaped_addend(self, v: Term, old: Shape, new: Shape) -> Term | None:
        """An addend in the new shape of its sum. It has the sum's whole shape, or is broadcast over leading dimensions.

        None where no shape of the addend broadcasts to the same values.
        """
        if v.shape == old:
            return self.reshape(v, new)
        tail = v.shape
        while tail and tail[0] == 1:
            tail = tail[1:]
        if tail and tail != old[len(old) - len(tail) :]:
            return None
        for k in range(len(new) + 1):
            if prod(new[len(new) - k :]) == prod(tail) and (tail or k == 0):
                return self.reshape(v, new[len(new) - k :])
        return None

    def permute(self, x: Term, order: Sequence[int]) -> Term:
        """`x` with its dimensions in another order."""
        order = tuple(d % x.rank for d in order)
        if order == tuple(range(x.rank)):
            return x
        if x.op == "permute":
            return self.permute(x.args[0], [x.args[1][d] for d in order])
        shape = tuple(x.shape[d] for d in order)
        if x.op == "sum":
            moved = [self._trimmed(self.permute(self._padded(v, x.rank), order)) for _, v in x.args[0]]
            return self._sum(((c, m) for (c, _), m in zip(x.args[0], moved, strict=True)), shape, x.dtype)
        return self.make("permute", (x, order), shape, x.dtype)

    def _padded(self, v: Term, rank: int) -> Term:
        return self.reshape(v, (1,) * (rank - v.rank) + v.shape)

    def _trimmed(self, v: Term) -> Term:
        shape = v.shape
        while shape and shape[0] == 1:
            shape = shape[1:]
        return self.reshape(v, shape)

    # -- slices -----------------------------------------------------------------------------------------------------

    def slice(self, x: Term, d: int, start: int | None, stop: int | None) -> Term:
        """Rows `start` to `stop` of dimension `d`. A `stop` beyond the size is kept as written, since the size may only
        stand for an open length."""
        d %= x.rank
        size = x.shape[d]
        a, b = start or 0, size if stop is None or stop >= OPEN else stop
        a, b = a + size if a < 0 else a, b + size if b < 0 else b
        if (a, b) == (0, size):
            return x
        if a < 0 or b > size or a > b:
            found = self.find("slice", (x, d, a, b))
            held = (*x.shape[:d], max(0, min(b, size) - max(a, 0)), *x.shape[d + 1 :])
            shape = found.shape if found else self.known or held
            return self.make("slice", (x, d, a, b), shape, x.dtype)
        if x.op == "slice" and x.args[1] == d and x.args[2] >= 0 and x.args[3] <= x.args[0].shape[d]:
            return self.slice(x.args[0], d, x.args[2] + a, x.args[2] + b)
        if x.op == "cat" and x.args[1] == d:
            taken = _between(x.args[0], d, a, b)
            if taken is not None:
                return self.cat(taken, d)
        shape = (*x.shape[:d], b - a, *x.shape[d + 1 :])
        if x.op == "sum":
            moved = [(c, self._sliced_addend(v, x, d, a, b)) for c, v in x.args[0]]
            return self._sum(moved, shape, x.dtype)
        return self.make("slice", (x, d, a, b), shape, x.dtype)

    def _sliced_addend(self, v: Term, x: Term, d: int, a: int, b: int) -> Term:
        at = d - (x.rank - v.rank)
        return v if at < 0 or (v.shape[at] == 1 and x.shape[d] != 1) else self.slice(v, at, a, b)

    def split(self, x: Term, d: int, sizes: Sequence[int]) -> tuple[Term, ...]:
        """`x` split along dimension `d` into segments of the given sizes."""
        d %= x.rank
        if sum(sizes) != x.shape[d]:
            raise ValueError(f"segments of {list(sizes)} of {x.shape[d]} rows")
        out, at = [], 0
        for n in sizes:
            out.append(self.slice(x, d, at, at + n))
            at += n
        return tuple(out)

    def cat(self, parts: Sequence[Term], d: int) -> Term:
        """The concatenation of values along dimension `d`."""
        d %= parts[0].rank
        flat: list[Term] = []
        for p in parts:
            for q in p.args[0] if p.op == "cat" and p.args[1] == d else (p,):
                joined = self._continued(flat[-1], q, d) if flat else None
                if joined is not None:
                    flat[-1] = joined
                elif q.shape[d] or len(parts) == 1:
                    flat.append(q)
        if len(flat) == 1:
            return flat[0]
        shape = (*flat[0].shape[:d], sum(p.shape[d] for p in flat), *flat[0].shape[d + 1 :])
        return self.make("cat", (tuple(flat), d), shape, flat[0].dtype)

    def _continued(self, a: Term, b: Term, d: int) -> Term | None:
        """One slice for two neighbouring slices of one value, or None. Two sums are joined addend by addend."""
        if a.dtype != b.dtype:
            return None
        if a.op == b.op == "slice" and a.args[:2] == b.args[:2] and a.args[1] == d and a.args[3] == b.args[2]:
            return self.slice(a.args[0], d, a.args[2], b.args[3])
        if a.op == b.op == "sum" and len(a.args[0]) == len(b.args[0]):
            rest, out = list(b.args[0]), []
            for c, v in a.args[0]:
                at = d - (a.rank - v.rank)
                for pair in rest:
                    same = v if pair[1] is v and (at < 0 or v.shape[at] == 1 != a.shape[d]) else None
                    joined = same or (self._continued(v, pair[1], at) if at >= 0 else None)
                    if pair[0] == c and joined is not None:
                        rest.remove(pair)
                        out.append((c, joined))
                        break
                else:
                    return None
            shape = (*a.shape[:d], a.shape[d] + b.shape[d], *a.shape[d + 1 :])
            return self._sum(out, shape, a.dtype)
        return None

    # -- sums and products ------------------------------------------------------------------------------------------

    def sum(self, addends: Sequence[tuple[Any, Term]]) -> Term:
        """The sum of number · value, in the shape that the values broadcast to."""
        values = [v for _, v in addends]
        shape = broadcast([v.shape for v in values])
        dtype = values[0].dtype
        for v in values[1:]:
            dtype = _promoted(dtype, v.dtype, [v.rank for v in values])
        return self._sum(addends, shape, dtype)

    def _sum(self, addends: Any, shape: Shape, dtype: torch.dtype) -> Term:
        flat: list[tuple[Any, Term]] = []
        for c, v in addends:
            if v.op == "sum" and v.dtype == dtype and dtype.is_floating_point:
                flat += [(float(c) * k, u) for k, u in v.args[0]]
            else:
                flat.append((float(c), self._trimmed(v) if v.rank == len(shape) and v.shape[:1] == (1,) else v))
        flat.sort(key=lambda p: (p[1].index, p[0]))
        if len(flat) == 1 and flat[0][0] == 1 and flat[0][1].shape == shape:
            return flat[0][1]
        key = (*[c for c, _ in flat], *[v.index for _, v in flat], shape)  # sums can have hundreds of addends
        return self.make("sum", (tuple(flat), shape), shape, dtype, key=key)

    def linear(self, x: Term, w: Term) -> Term:
        """`x @ w.T`. Where `w` is rows of a weight, the result is those columns of the whole weight's product."""
        lead, k = x.shape[:-1], w.shape[-1]
        if x.shape[-1] != k:
            raise ValueError(f"{list(x.shape)} times a weight of {list(w.shape)}")

        def pulled(u: Term) -> Term | None:
            found: Term | None = None
            if u.op == "reshape" and u.args[0].shape[-1:] == (k,) and u.shape[-1] == k:
                inner = pulled(u.args[0])
                found = None if inner is None else self.reshape(inner, lead + u.shape[:-1])
            elif u.op == "slice" and u.args[1] < u.rank - 1:
                inner = pulled(u.args[0])
                found = None if inner is None else self.slice(inner, len(lead) + u.args[1], u.args[2], u.args[3])
            elif u.op == "cat" and u.args[1] < u.rank - 1:
                parts = [pulled(p) for p in u.args[0]]
                found = None if None in parts else self.cat(parts, len(lead) + u.args[1])  # type: ignore[arg-type]
            if found is None and u.rank == 2:
                return self.make("linear", (x, u), (*lead, u.shape[0]), x.dtype)
            return found

        made = pulled(w)
        return made if made is not None else self.make("linear", (x, w), (*lead, *w.shape[:-1]), x.dtype)

    def matmul(self, x: Term, w: Term) -> Term:
        """`x @ w`. Where `w` is columns of a weight, the result is those columns of the whole weight's product."""
        lead = x.shape[:-1]

        def pulled(u: Term) -> Term | None:
            found: Term | None = None
            if u.op == "reshape" and u.rank > 1 and u.args[0].shape[:1] == u.shape[:1]:
                inner = pulled(u.args[0])
                found = None if inner is None else self.reshape(inner, lead + u.shape[1:])
            elif u.op == "slice" and u.args[1] > 0:
                inner = pulled(u.args[0])
                found = None if inner is None else self.slice(inner, len(lead) + u.args[1] - 1, *u.args[2:])
            elif u.op == "cat" and u.args[1] > 0:
                parts = [pulled(p) for p in u.args[0]]
                found = None if None in parts else self.cat(parts, len(lead) + u.args[1] - 1)  # type: ignore[arg-type]
            if found is None and u.rank == 2:
                return self.make("matmul", (x, u), (*lead, u.shape[1]), x.dtype)
            return found

        if x.rank >= 1 and w.rank == 2:
            if x.shape[-1] != w.shape[0]:
                raise ValueError(f"{list(x.shape)} times {list(w.shape)}")
            made = pulled(w)
            assert made is not None
            return made
        if x.rank < 2 or w.rank < 2:
            shape = (*x.shape[:-1], *((*w.shape[:-2], w.shape[-1]) if w.rank > 1 else ()))
            return self.make("matmul", (x, w), shape, x.dtype)
        if x.shape[-1] != w.shape[-2]:
            raise ValueError(f"{list(x.shape)} times {list(w.shape)}")
        shape = (*broadcast([x.shape[:-2], w.shape[:-2]]), x.shape[-2], w.shape[-1])
        return self.make("matmul", (x, w), shape, x.dtype)

    def biased(self, product: Term, bias: Term | None) -> Term:
        return product if bias is None else self._sum([(1, product), (1, bias)], product.shape, product.dtype)

    def mean(self, x: Term, dims: Sequence[int] | None, keep: bool, dtype: Any) -> Term:
        """The mean over dimensions: the sum divided by the count."""
        at = tuple(range(x.rank)) if not dims else tuple(d % x.rank for d in dims)
        total = self.total(x, at, keep, dtype)
        return self.make("divided", (total, float(prod(x.shape[d] for d in at))), total.shape, total.dtype)

    def total(self, x: Term, dims: Sequence[int] | None, keep: bool, dtype: Any) -> Term:
        """The sum of `x` over dimensions; over all of them where `dims` is empty."""
        at = tuple(sorted(range(x.rank) if not dims else (d % x.rank for d in dims)))
        shape = tuple(1 if d in at else n for d, n in enumerate(x.shape) if keep or d not in at)
        made = dtype or (x.dtype if x.dtype.is_floating_point or x.dtype.is_complex else torch.int64)
        return self.make("total", (x, at, keep, dtype), shape, made)

    def dropout(self, x: Term, p: Any, mode: Any, site: Any) -> Term:
        """The runtime's dropout at one site. It moves inside a reshape, and to each addend of a sum."""
        if x.op == "reshape":
            return self.reshape(self.dropout(x.args[0], p, mode, site), x.shape)
        if x.op == "sum":
            full = [(c, self.dropout(self.expand(v, x.shape), p, mode, site)) for c, v in x.args[0]]
            return self._sum(full, x.shape, x.dtype)
        return self.make("dropout", (x, p, mode, site), x.shape, x.dtype)

    def expand(self, x: Term, shape: Sequence[int]) -> Term:
        """`x` expanded to a shape."""
        lead = len(shape) - x.rank
        shape = tuple(x.shape[i - lead] if n == -1 else n for i, n in enumerate(shape))
        if broadcast([x.shape, shape]) != shape:
            raise ValueError(f"{list(x.shape)} expanded to {list(shape)}")
        if shape == x.shape:
            return x
        x = self._trimmed(x)
        return self.make("expand", (x, shape), shape, x.dtype)


def _resolved(shape: Shape, count: int) -> Shape:
    if -1 not in shape:
        return shape
    rest = -prod(shape)
    if rest <= 0 or count % rest:
        raise ValueError(f"{count} elements have no shape {list(shape)}")
    return tuple(count // rest if n == -1 else n for n in shape)


def _between(parts: Sequence[Term], d: int, a: int, b: int) -> list[Term] | None:
    """The parts that make up rows `a` to `b`; None where `a` or `b` falls inside a part."""
    taken, at = [], 0
    for p in parts:
        end = at + p.shape[d]
        if a <= at and end <= b and end > at:
            taken.append(p)
        elif at < a < end or at < b < end:
            return None
        at = end
    return taken or None


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """The shape that the given shapes broadcast to."""
    rank = max(map(len, shapes))
    out = []
    for d in range(rank):
        sizes = {s[d - rank + len(s)] for s in shapes if d - rank + len(s) >= 0} - {1}
        if len(sizes) > 1:
            raise ValueError(f"shapes {[list(s) for s in shapes]} do not broadcast")
        out.append(sizes.pop() if sizes else 1)
    return tuple(out)


def _promoted(a: torch.dtype, b: torch.dtype, ranks: Sequence[int]) -> torch.dtype:
    if a == b:
        return a
    if 0 in ranks and any(ranks):
        raise OpenDtype  # only torch knows what a tensor without dimensions does to the dtype
    return torch.promote_types(a, b)
