"""Slices, selections and new dimensions as one subscript: `x[:, None, :-1, 0]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tpcompiler.emit.text.expr import ATOM, UNARY, Expr

_WHOLE = ":"


def slice_(x: Expr, rank: int, dim: int, bounds: Sequence[Expr | None]) -> Expr:
    """`x[:, start:stop:step]` along `dim` of a tensor of `rank` dimensions; bounds that cut nothing are left out."""
    start, stop, step = ("" if b is None else b.text for b in bounds)
    start = "" if start == "0" else start
    stop = "" if stop == str(sys.maxsize) else stop
    entry = f"{start}:{stop}" + (f":{step}" if step not in ("", "1") else "")
    if entry == _WHOLE:
        return x
    return _put(x, rank, dim % rank, entry)


def select(x: Expr, rank: int, dim: int, index: Expr) -> Expr:
    """`x[:, index]`"""
    return _put(x, rank, dim % rank, index.text)


def unsqueeze(x: Expr, rank: int, dim: int) -> Expr:
    """`x.unsqueeze(dim)` alone, `x[:, None, 0]` among other indices."""
    base, entries = x.index or (x, (_WHOLE,) * rank)
    at = _place(entries, dim % (rank + 1))
    entries = (*entries[:at], "None", *entries[at:])
    if x.index is None:
        return Expr(f"{x.at(ATOM)}.unsqueeze({dim})", ATOM, (base, entries))
    return _subscript(base, entries)


def index_tensors(x: Expr, items: Sequence[Expr | None]) -> Expr:
    """`x[:, ids]`: whole dimensions where an item is None."""
    entries = [_WHOLE if i is None else i.text for i in items]
    while entries[-1] == _WHOLE:
        entries.pop()
    return Expr(f"{x.at(ATOM)}[{', '.join(entries)}]")


def _put(x: Expr, rank: int, dim: int, entry: str) -> Expr:
    base, entries = x.index or (x, (_WHOLE,) * rank)
    at = _place(entries, dim)
    if entries[at] != _WHOLE:  # sliced before: the second cut counts from the first
        base, entries, at = Expr(x.text, x.level), (_WHOLE,) * rank, dim
    return _subscript(base, (*entries[:at], entry, *entries[at + 1 :]))


def _place(entries: tuple[str, ...], dim: int) -> int:
    """Where among the entries the result's dimension `dim` stands; selected ones are no dimensions of the result."""
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
