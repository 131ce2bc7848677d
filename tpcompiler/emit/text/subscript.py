"""Slices, selections and new dimensions written as one subscript: `x[:, None, :-1, 0]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tpcompiler.emit.text.expr import ATOM, UNARY, Expr

_WHOLE = ":"


def slice_(x: Expr, rank: int, dim: int, bounds: Sequence[Expr | None]) -> Expr:
    """`x[:, start:stop:step]` along `dim` of a tensor of `rank` dimensions. Bounds that cut nothing are left out."""
    start, stop, step = ("" if b is None else b.text for b in bounds)
    start = "" if start == "0" else start
    stop = "" if stop == str(sys.maxsize) else stop
    entry = f"{start}:{stop}" + (f":{step}" if step not in ("", "1") else "")
    return x if entry == _WHOLE else _put(x, rank, dim % rank, entry)


def select(x: Expr, rank: int, dim: int, index: Expr) -> Expr:
    """`x[:, index]`"""
    return _put(x, rank, dim % rank, index.text)


def unsqueeze(x: Expr, rank: int, dim: int) -> Expr:
    """`x.unsqueeze(dim)` for a plain value, `x[:, None, 0]` together with other indices."""
    base, entries = x.index or (x, (_WHOLE,) * rank)
    at = _position(entries, dim % (rank + 1))
    entries = (*entries[:at], "None", *entries[at:])
    if x.index is None:
        return Expr(f"{x.at(ATOM)}.unsqueeze({dim})", ATOM, (base, entries))
    return _subscript(base, entries)


def index_tensors(x: Expr, items: Sequence[Expr | None]) -> Expr:
    """`x[:, ids]`. An item None keeps its whole dimension."""
    entries = [_WHOLE if i is None else i.text for i in items]
    while entries[-1] == _WHOLE:
        entries.pop()
    return Expr(f"{x.at(ATOM)}[{', '.join(entries)}]")


def _put(x: Expr, rank: int, dim: int, entry: str) -> Expr:
    base, entries = x.index or (x, (_WHOLE,) * rank)
    at = _position(entries, dim)
    if entries[at] != _WHOLE:  # The dimension has been sliced before, and the second slice counts from the first.
        base, entries, at = Expr(x.text, x.level), (_WHOLE,) * rank, dim
    return _subscript(base, (*entries[:at], entry, *entries[at + 1 :]))


def _position(entries: tuple[str, ...], dim: int) -> int:
    """The entry that makes dimension `dim` of the result. A selected dimension is not in the result."""
    kept = [i for i, e in enumerate(entries) if ":" in e or e == "None"]
    return kept[dim] if dim < len(kept) else len(entries)


def _subscript(base: Expr, entries: tuple[str, ...]) -> Expr:
    shown = list(entries)
    while shown and shown[-1] == _WHOLE:
        shown.pop()
    lead = next((i for i, e in enumerate(shown) if e != _WHOLE), len(shown))
    if lead > 2 and len(shown) == len(entries):
        shown[:lead] = ["..."]
    return Expr(f"{base.at(ATOM)}[{', '.join(shown)}]" if shown else base.at(UNARY), ATOM, (base, entries))
