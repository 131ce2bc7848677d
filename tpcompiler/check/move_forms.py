"""Facts about operations that only move elements: views, permutations, repetitions, and what index tensors pick."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod
from operator import mul
from typing import Any

from tpcompiler.check.calls import Slot
from tpcompiler.check.form import Dims, Form, RefutedError, label_rows
from tpcompiler.check.row_algebra import product
from tpcompiler.check.site import Shape, Site, numbered, plain, states
from tpcompiler.layout import LocalSize

# -- other shapes ------------------------------------------------------------------------------------------------------


def refined(old: Shape, new: Shape) -> tuple[Dims, Dims]:
    """Two shapes of one value as products of common factors, labelled by number. Where they have none, None."""
    if 0 in old or 0 in new:
        return plain(old, [None] * len(old)), plain(new, [None] * len(new))
    left: list[tuple[Any, ...]] = []
    right: list[tuple[Any, ...]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and old[i] == 1:
            left.append(((None, 1),))
            i += 1
            continue
        if j < len(new) and new[j] == 1:
            right.append(((None, 1),))
            j += 1
            continue
        a, b = i + 1, j + 1
        while prod(old[i:a]) != prod(new[j:b]):
            if prod(old[i:a]) < prod(new[j:b]):
                a += 1
            else:
                b += 1
        mine, theirs = _common(old[i:a], new[j:b], (i, j))
        left += mine
        right += theirs
        i, j = a, b
    return tuple(left), tuple(right)


def _common(old: Shape, new: Shape, name: tuple[int, int]) -> tuple[list[Any], list[Any]]:
    """Dimensions that together have equally many elements, as products of the factors between all their ends."""
    ends = [list(accumulate(reversed(shape), mul)) for shape in (old, new)]
    cuts = sorted({1, *ends[0], *ends[1]})
    whole = any(b % a for a, b in pairwise(cuts))

    def dims(shape: Shape) -> list[Any]:
        out, at = [], 1
        for n in reversed(shape):
            inner = [(a, b) for a, b in pairwise(cuts) if at <= a and b <= at * n]
            indices = tuple((((*name, a), b // a)) for a, b in reversed(inner))
            out.append(((None, n),) if whole else indices or ((None, n),))
            at *= n
        return out[::-1]

    return dims(old), dims(new)


@states("view reshape _unsafe_view flatten unflatten unsqueeze squeeze view_as reshape_as", ranked=True)
def _(s: Site) -> Form:
    x = s.a["self"]
    if prod(s.shape(x)) != prod(s.result()):
        raise RefutedError("no fact speaks of its arguments")
    if s.name == "squeeze" and any(s.rows(x, d) is not None for d in s.dims("dim", s.rank(x))):
        raise RefutedError("a rank with one row would lose the dimension")
    mine, made = refined(s.shape(x), s.result())
    other = s.a.get("other")
    form = Form([(x.i, mine)], [made])
    if isinstance(other, Slot) and other != x:
        form.operands.append((other.i, made))
        form.shapes = frozenset({other.i})
    rows = label_rows(s.geometry, Form([(x.i, mine)], [made], ignored=_rest(s, x)), s.given)
    said: Any = s.local.get("size", s.local.get("shape", s.local.get("sizes")))
    if said is not None:
        first = s.dim("dim", s.rank(x)) if s.name == "unflatten" else 0
        for d, n in enumerate(said, start=first):
            held = product(s.geometry, [(rows.get(label), size) for label, size in made[d]])
            if n != -1 and not s.agrees(n, held, s.result()[d]):
                raise RefutedError(f"dimension {d} is given as {n}, and the ranks hold {_say(held)}")
    return form


def _rest(s: Site, x: Slot) -> frozenset[int]:
    return frozenset(range(len(s.given))) - {x.i}


def _say(rows: Any) -> str:
    return "all of it" if rows is None else f"rows {rows}"


@states("transpose swapaxes swapdims t numpy_T mT permute movedim moveaxis")
def _(s: Site) -> Form:
    x = s.a["self"]
    rank = s.rank(x)
    order = list(range(rank))
    if s.name in ("transpose", "swapaxes", "swapdims"):
        names = ("axis0", "axis1") if s.name == "swapaxes" else ("dim0", "dim1")
        i, j = (s.dim(n, rank) for n in names)
        order[i], order[j] = order[j], order[i]
    elif s.name == "mT":
        order[-2:] = order[-1], order[-2]
    elif s.name in ("t", "numpy_T"):
        order.reverse()
    elif s.name == "permute":
        order = [d % rank for d in s.a["dims"]]
    else:
        source, target = s.dims("source", rank), s.dims("destination", rank)
        placed = dict(zip(target, source, strict=True))
        rest = iter([d for d in range(rank) if d not in source])
        order = [placed[d] if d in placed else next(rest) for d in range(rank)]
    shape = s.shape(x)
    return Form([(x.i, numbered(shape))], [plain(tuple(shape[d] for d in order), order)])


@states("tril triu flip roll constant_pad_nd pad diagonal diag_embed view_as_complex view_as_real unfold im2col")
def _(s: Site) -> Form:
    """Some dimensions are taken as a whole, and the others stay where they are."""
    x = s.a.get("self", s.a.get("input"))
    assert isinstance(x, Slot)
    rank = s.rank(x)
    if s.name == "diagonal":
        return _diagonal(s, x)
    whole: Sequence[int]
    if s.name in ("tril", "triu"):
        whole = range(rank - 2, rank)
    elif s.name in ("flip", "roll"):
        whole = s.dims("dims", rank)
    elif s.name in ("constant_pad_nd", "pad"):
        whole = range(rank - len(s.a["pad"]) // 2, rank)
    elif s.name == "unfold":
        whole = [s.dim("dimension", rank)]
    elif s.name == "im2col":
        whole = range(rank - 3, rank)
    else:
        whole = [rank - 1] if s.name == "view_as_complex" else []
    labels = [None if d in whole else d for d in range(rank)]
    result = s.result()
    made = [*labels, *[None] * (len(result) - rank)][: len(result)]
    return Form([(x.i, plain(s.shape(x), labels))], [plain(result, made)])


def _diagonal(s: Site, x: Slot) -> Form:
    rank = s.rank(x)
    gone = (s.dim("dim1", rank, 0), s.dim("dim2", rank, 1))
    labels = [None if d in gone else d for d in range(rank)]
    return Form([(x.i, plain(s.shape(x), labels))], [plain(s.result(), [d for d in labels if d is not None] + [None])])


# -- repetitions -------------------------------------------------------------------------------------------------------


@states("expand broadcast_to expand_as", ranked=True)
def _(s: Site) -> Form:
    x = s.a["self"]
    shape, result = s.shape(x), s.result()
    lead = len(result) - len(shape)
    labels: list[Any] = [("new", d) if d < lead or shape[d - lead] != n else d for d, n in enumerate(result)]
    operands = [(x.i, plain(shape, [labels[lead + d] if n == result[lead + d] else None for d, n in enumerate(shape)]))]
    other = s.a.get("other")
    form = Form(operands, [plain(result, labels)])
    if isinstance(other, Slot):
        if other != x:
            form.operands.append((other.i, plain(result, labels)))
            form.shapes = frozenset({other.i})
        return form
    for d, n in enumerate(s.local["size"]):
        if isinstance(n, LocalSize) and labels[d] == ("new", d):
            form.rows["new", d] = s.geometry.of_dim(n.dim)  # every row is the same, so that these are theirs as well
    rows = label_rows(s.geometry, form, s.given)
    for d, n in enumerate(s.local["size"]):
        if n != -1 and not s.agrees(n, rows.get(labels[d]), result[d]):
            raise RefutedError(f"dimension {d} is given as {n}, and the ranks hold {_say(rows.get(labels[d]))}")
    return form


@states("repeat", ranked=True)
def _(s: Site) -> Form:
    x = s.a["self"]
    shape, times = s.shape(x), s.local["repeats"]
    lead = len(times) - len(shape)
    dims: list[Any] = []
    form = Form([(x.i, numbered(shape))], [])
    for d, whole in enumerate(s.a["repeats"]):
        _repeated(s, form, ("r", d), times[d], whole)
        inner = () if d < lead else ((d - lead, shape[d - lead]),)
        dims.append(((("r", d), whole), *inner))
    form.results = [tuple(dims)]
    return form


@states("repeat_interleave", ranked=True)
def _(s: Site) -> Form:
    x, times = s.a["self"], s.a["repeats"]
    if type(times) is not int or s.a.get("dim") is None:
        raise RefutedError("no fact speaks of its arguments")
    d = s.dim("dim", s.rank(x))
    form = Form([(x.i, numbered(s.shape(x)))], [])
    _repeated(s, form, "r", s.local["repeats"], times)
    made = list(numbered(s.shape(x)))
    made[d] = (*made[d], ("r", times))
    form.results = [tuple(made)]
    size = s.local.get("output_size")
    if size is not None:
        rows = label_rows(s.geometry, form, s.given)
        held = product(s.geometry, [(rows.get(label), n) for label, n in made[d]])
        if not s.agrees(size, held, s.result()[d]):
            raise RefutedError(f"the result's size is given as {size}, and the ranks hold {_say(held)}")
    return form


def _repeated(s: Site, form: Form, label: Any, said: Any, whole: int) -> None:
    if isinstance(said, LocalSize):
        form.rows[label] = s.geometry.of_dim(said.dim)
    rows = form.rows.get(label)
    if not s.agrees(said, rows, whole):
        raise RefutedError(f"it repeats {said} times, and the model {whole} times")


# -- what index tensors pick -------------------------------------------------------------------------------------------


@states("index_select")
def _(s: Site) -> Form:
    x, index = s.a["self"], s.a["index"]
    d = s.dim("dim", s.rank(x))
    labels: list[Any] = list(range(s.rank(x)))
    picked = [*labels[:d], "p", *labels[d + 1 :]]
    operands = [(x.i, numbered(s.shape(x), whole=(d,))), (index.i, plain(s.shape(index), ["p"] * s.rank(index)))]
    return Form(operands, [plain(s.result(), picked)])


@states("gather take_along_dim")
def _(s: Site) -> Form:
    x, index = s.a["self"], s.a.get("index", s.a.get("indices"))
    assert isinstance(index, Slot)
    if s.a.get("dim") is None or s.rank(x) != s.rank(index):
        raise RefutedError("no fact speaks of its arguments")
    rank = s.rank(x)
    d = s.dim("dim", rank)
    same = [s.shape(x)[i] == s.shape(index)[i] == s.result()[i] and i != d for i in range(rank)]
    labels = [i if same[i] else None for i in range(rank)]
    picked = ["p" if i == d else label for i, label in enumerate(labels)]
    return Form(
        [(x.i, plain(s.shape(x), labels)), (index.i, plain(s.shape(index), picked))], [plain(s.result(), picked)]
    )


@states("scatter scatter_add scatter_reduce index_add index_copy select_scatter index_fill")
def written_along(s: Site) -> Form:
    """Written along one dimension, which is taken as a whole; the others stay where they are."""
    x = s.a["self"]
    shape = s.shape(x)
    d = s.dim("dim", len(shape), 0)
    labels: list[Any] = [None if i == d else i for i in range(len(shape))]
    operands: list[tuple[int, Dims]] = []
    for name in ("index", "src", "source", "value"):
        written = s.a.get(name)
        if not isinstance(written, Slot):
            continue
        its = s.shape(written)
        if len(its) == len(shape):
            same = [label if its[i] == shape[i] else None for i, label in enumerate(labels)]
        elif s.name == "select_scatter" and len(its) == len(shape) - 1:
            same = [label for i, label in enumerate(labels) if i != d]
        else:
            same = [None] * len(its)
        operands.append((written.i, plain(its, same)))
    if s.name.startswith("scatter"):
        labels = [_everywhere(labels[i], i, operands) for i in range(len(shape))]
        operands = [(o, tuple(((labels[i], n),) for i, ((_, n),) in enumerate(dims))) for o, dims in operands]
    return Form([(x.i, plain(shape, labels)), *operands], [plain(shape, labels)])


def _everywhere(label: Any, i: int, operands: Sequence[tuple[int, Dims]]) -> Any:
    """The label, if every operand has it: an index that is shorter than the value stands for its first rows alone."""
    return label if all(dims[i][0][0] == label for _, dims in operands) else None


@states("index")
def _(s: Site) -> Form:
    x = s.a["self"]
    _, picked, place, operands = _indexed(s)
    labels = [d for d in range(s.rank(x)) if d not in picked]
    made: list[Any] = [*labels[:place], *[("p", i) for i in range(_picked_rank(s))], *labels[place:]]
    operands.append((x.i, numbered(s.shape(x), whole=picked)))
    return Form(operands, [plain(s.result(), made)])


@states("index_put")
def _(s: Site) -> Form:
    x, values = s.a["self"], s.a["values"]
    shape = s.shape(x)
    _, picked, place, operands = _indexed(s)
    operands = [(i, plain(s.shape(Slot(i)), [None] * s.rank(Slot(i)))) for i, _ in operands]
    left = [d for d in range(len(shape)) if d not in picked]
    slots: list[Any] = [*left[:place], *[None] * _picked_rank(s), *left[place:]]
    its = s.shape(values)
    mine = slots[len(slots) - len(its) :]
    same = [label if label is not None and n == shape[label] else None for label, n in zip(mine, its, strict=True)]
    operands += [(x.i, numbered(shape, whole=picked)), (values.i, plain(its, same))]
    return Form(operands, [numbered(shape, whole=picked)])


def _picked_rank(s: Site) -> int:
    return max(s.rank(t) for t in s.a["indices"] if isinstance(t, Slot))


def _indexed(s: Site) -> tuple[list[Any], list[int], int, list[tuple[int, Dims]]]:
    """(index tensors, the dimensions that they index, where the picked dimensions stand, the index tensors' dims)"""
    indices = list(s.a["indices"])
    picked = [d for d, t in enumerate(indices) if t is not None]
    tensors = [indices[d] for d in picked]
    if not tensors or any(not isinstance(t, Slot) or _is_mask(s, t) for t in tensors):
        raise RefutedError("no fact speaks of masks as indices")
    shapes = [s.shape(t) for t in tensors]
    rank = max(map(len, shapes))
    sizes = [max(shape[i - rank + len(shape)] for shape in shapes if i - rank + len(shape) >= 0) for i in range(rank)]
    operands = []
    for t, shape in zip(tensors, shapes, strict=True):
        lead = rank - len(shape)
        labels = [("p", lead + i) if n == sizes[lead + i] else None for i, n in enumerate(shape)]
        operands.append((t.i, plain(shape, labels)))
    adjacent = picked == list(range(picked[0], picked[-1] + 1))
    return tensors, picked, picked[0] if adjacent else 0, operands


def _is_mask(s: Site, t: Slot) -> bool:
    dtype = s.given[t.i].operand.dtype
    return dtype.itemsize == 1
