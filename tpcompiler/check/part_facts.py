"""Facts about parts of a dimension: slices, segments, and concatenations, of values that ranks hold rows of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tpcompiler.check.calls import Slot
from tpcompiler.check.claims import Claim, Rows
from tpcompiler.check.form import Fact, Form, RefutedError
from tpcompiler.check.move_forms import written_along
from tpcompiler.check.row_algebra import before, joined, lengths, sliced
from tpcompiler.check.site import Site, numbered, plain, states
from tpcompiler.layout import LocalSize

_END = 1 << 31  # from here on, an end means the end of the dimension
Ends = list[tuple[int, int]]  # for each rank, where its slice begins and ends


@states(
    "slice narrow select split split_with_sizes unsafe_split chunk tensor_split unbind split_with_sizes_copy",
    ranked=True,
)
def _(s: Site) -> Form | Fact:
    x = s.a["self"]
    d = s.dim("dim", s.rank(x), 0)
    rows = s.rows(x, d)
    gone = s.name in ("select", "unbind")
    if rows is None:
        if s.call.by_rank:
            raise RefutedError("each rank takes a part of its own of what all have whole")
        labels = list(range(s.rank(x)))
        mine = [(x.i, numbered(s.shape(x), whole=(d,)))]
        results = []
        for m in s.made:
            assert m is not None
            kept = [*labels[:d], *([] if gone else [None]), *labels[d + 1 :]]
            results.append(plain(m.shape, kept))
        return Form(mine, results)
    if gone or s.name == "tensor_split" or s.a.get("step", 1) != 1:
        raise RefutedError(f"it takes a part of dimension {d}, of which ranks hold rows {rows}")
    return _of_split(s, x, d, rows)


def _of_split(s: Site, x: Slot, d: int, rows: Rows) -> Fact:
    """Parts of a dimension that is split: each rank must take those of its rows that lie in the model's part."""
    size = s.shape(x)[d]
    claim = s.given[x.i].claim
    claims = []
    for start, stop in _own_parts(s, rows, size, "takes"):
        part = sliced(s.geometry, rows, size, start, stop)
        claims.append(Claim((*claim.rows[:d], part, *claim.rows[d + 1 :]), claim.partial))
    return Fact(tuple(claims), ((),), claim.partial)


def _own_parts(s: Site, rows: Rows, size: int, does: str) -> list[tuple[int, int]]:
    """The model's parts. Raises `RefutedError` unless each rank's are the rows of them that it holds."""
    whole = _ends(s, s.a, lambda r: size, 1)
    local = _ends(s, s.local, lengths(rows).__getitem__, s.geometry.size)
    for [(start, stop)], ends in zip(whole, local, strict=True):
        for r, (a, b) in enumerate(ends):
            mine = before(rows, r, start), before(rows, r, stop)
            if (a, b) != mine and not (a == b and mine[0] == mine[1]):
                raise RefutedError(
                    f"rank {r} {does} its rows {a} to {b}, which are not rows {start} to {stop} of the model"
                )
    return [ends[0] for ends in whole]


def _ends(s: Site, a: Any, size: Any, ranks: int) -> list[Ends]:
    """For each result, where its part begins and ends on each rank."""

    def value(n: Any, r: int) -> int:
        if isinstance(n, LocalSize):
            return n.dim.local_size(s.geometry.mesh, s.geometry.coords[r])
        if type(n) is not int:
            raise RefutedError("no fact speaks of its arguments")
        return n

    def bounded(n: int, r: int) -> int:
        return min(max(n + size(r) if n < 0 else n, 0), size(r))

    if s.name in ("slice", "narrow", "slice_scatter"):
        start = a["start"] if a["start"] is not None else 0
        out = []
        for r in range(ranks):
            first = bounded(value(start, r), r)
            if s.name == "narrow":
                out.append((first, first + value(a["length"], r)))
            else:
                end = a["end"]
                stop = size(r) if end is None or (type(end) is int and end >= _END) else bounded(value(end, r), r)
                out.append((first, max(first, stop)))
        return [out]
    if s.name == "chunk":
        return _chunks(s, a["chunks"], size, ranks)
    said = a.get("split_sizes", a.get("split_size"))
    if not isinstance(said, tuple):
        n = len(s.made)
        if type(said) is not int and not isinstance(said, LocalSize):
            raise RefutedError("no fact speaks of its arguments")
        parts = [
            [(min(i * value(said, r), size(r)), min((i + 1) * value(said, r), size(r))) for r in range(ranks)]
            for i in range(n)
        ]
    else:
        at = [0] * ranks
        parts = []
        for n in said:
            parts.append([(at[r], at[r] + value(n, r)) for r in range(ranks)])
            at = [stop for _, stop in parts[-1]]
    if any(parts[-1][r][1] != size(r) for r in range(ranks)):
        raise RefutedError("its parts do not make up what a rank holds")
    return parts


def _chunks(s: Site, chunks: Any, size: Any, ranks: int) -> list[Ends]:
    if type(chunks) is not int:
        raise RefutedError("no fact speaks of its arguments")
    out: list[Ends] = [[] for _ in s.made]
    for r in range(ranks):
        n = -(-size(r) // chunks)
        if (-(-size(r) // n) if n else chunks) != len(s.made):
            raise RefutedError(f"rank {r} has other than {len(s.made)} chunks")
        for i, ends in enumerate(out):
            ends.append((min(i * n, size(r)), min((i + 1) * n, size(r))))
    return out


@states("glu")
def _(s: Site) -> Form | Fact:
    x = s.a["self"]
    d = s.dim("dim", s.rank(x), -1)
    rows, half = s.rows(x, d), s.shape(x)[d] // 2
    if rows is None:
        labels = numbered(s.shape(x), whole=(d,))
        return Form([(x.i, labels)], [numbered(s.result(), whole=(d,))])
    first, second = sliced(s.geometry, rows, 2 * half, 0, half), sliced(s.geometry, rows, 2 * half, half, 2 * half)
    if first is not second:
        raise RefutedError("a rank's rows of the first half are not those of the second")
    claim = s.given[x.i].claim
    if claim.partial:
        raise RefutedError("it is not linear")
    return Fact((Claim((*claim.rows[:d], first, *claim.rows[d + 1 :])),), ((),))


@states("cat concat concatenate stack")
def _(s: Site) -> Form | Fact:
    parts: Sequence[Slot] = s.a["tensors"]
    d = s.dim("dim", len(s.result()), 0)
    if s.name == "stack":
        labels = [i for i in range(len(s.result())) if i != d]
        made = plain(s.result(), [None if i == d else i for i in range(len(s.result()))])
        return Form([(p.i, plain(s.shape(p), labels)) for p in parts], [made])
    if any(s.rank(p) != len(s.result()) for p in parts):
        raise RefutedError("no fact speaks of values of different ranks")
    rows = [s.rows(p, d) for p in parts]
    if all(r is None for r in rows):
        whole = [(p.i, numbered(s.shape(p), whole=(d,))) for p in parts]
        return Form(whole, [numbered(s.result(), whole=(d,))])
    return _joined(s, parts, rows, d)


def _joined(s: Site, parts: Sequence[Slot], rows: Sequence[Rows | None], d: int) -> Fact:
    claims = [s.given[p.i].claim for p in parts]
    others = [(*c.rows[:d], *c.rows[d + 1 :]) for c in claims]
    if any(o != others[0] for o in others):
        raise RefutedError("its operands are split in different ways")
    if len({c.partial for c in claims}) > 1:
        raise RefutedError("it joins a whole value and a partial sum")
    made = joined(s.geometry, [(r, s.shape(p)[d]) for r, p in zip(rows, parts, strict=True)])
    claim = Claim((*claims[0].rows[:d], made, *claims[0].rows[d + 1 :]), claims[0].partial)
    return Fact((claim,), ((),) * len(s.given), claims[0].partial)


@states("slice_scatter", ranked=True)
def _(s: Site) -> Form | Fact:
    """A part of a dimension is overwritten: of a split one, each rank writes those rows of the part that it holds."""
    x, src = s.a["self"], s.a["src"]
    d = s.dim("dim", s.rank(x), 0)
    rows, size = s.rows(x, d), s.shape(x)[d]
    if rows is None:
        if s.call.by_rank:
            raise RefutedError("each rank writes a part of its own into what all have whole")
        return written_along(s)
    if s.a.get("step", 1) != 1:
        raise RefutedError(f"it writes with a step into dimension {d}, of which ranks hold rows {rows}")
    ((start, stop),) = _own_parts(s, rows, size, "writes")
    claim, written = (s.given[a.i].claim for a in (x, src))
    if written.rows != (*claim.rows[:d], sliced(s.geometry, rows, size, start, stop), *claim.rows[d + 1 :]):
        raise RefutedError("what is written is split in another way than what it is written into")
    if claim.partial != written.partial:
        raise RefutedError("it joins a whole value and a partial sum")
    return Fact((claim,), ((),) * len(s.given), claim.partial)


# -- constants ---------------------------------------------------------------------------------------------------------


@states("zeros ones full empty new_zeros new_ones new_full new_empty", ranked=True)
def _(s: Site) -> Form:
    """Every element is the same number, so that a rank's are those of any rows of the right count."""
    result = s.result()
    form = Form([], [numbered(result)], ignored=frozenset(range(len(s.given))), flat=True)
    for d, n in enumerate(s.local["size"]):
        if isinstance(n, LocalSize):
            form.rows[d] = s.geometry.of_dim(n.dim)
        if not s.agrees(n, form.rows.get(d), result[d]):
            raise RefutedError(f"dimension {d} is given as {n}")
    return form
