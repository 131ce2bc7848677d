"""Symbolic sizes: the letters they get, and which values tell them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from tpcompiler.layout import Concat, Dim, Factor, Product

_LETTERS = {"batch": "b", "sequence": "s", "seq": "s", "tokens": "t", "source": "s", "target": "t"}
_BY_PLACE = ("b", "s", "t", "n", "m", "l", "j", "k", "r", "w")


def is_size(node: fx.Node) -> bool:
    """Is the node's value a number rather than a tensor? Such nodes are written where they are used."""
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def key(size: Any) -> str:
    """What two equal sizes share: the text of their symbolic expression."""
    return _text(size.node.expr) if isinstance(size, torch.SymInt) else str(size)


@lru_cache(maxsize=4096)
def _text(expression: Any) -> str:
    return str(expression)  # slow, and a program has few different ones


def dims_of(node: fx.Node) -> Sequence[Dim] | None:
    dims = node.meta.get("dims")
    return dims if isinstance(dims, (tuple, list)) and all(isinstance(d, Dim) for d in dims) else None


def whole(node: fx.Node, place: int) -> bool:
    """Does the running rank hold all of this dimension, so that `shape[place]` is the global size?"""
    dims = dims_of(node)
    return dims is None or not dims[place].over


def letters(inputs: Iterable[fx.Node], taken: Iterable[str]) -> dict[str, str]:
    """A short name for each symbol in the inputs' sizes: b and s for batch and sequence, others by place."""
    used, out = set(taken), dict[str, str]()
    for node in inputs:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            continue
        dims = dims_of(node)
        for place, size in enumerate(val.shape):
            if not isinstance(size, torch.SymInt) or key(size) in out:
                continue
            named = [getattr(dims[place], "name", "")] if dims is not None else []
            wanted = [_LETTERS[n] for n in named if n in _LETTERS] + list(_BY_PLACE[place : place + 1])
            wanted += [f"{w}{i}" for w in wanted[:1] or ["n"] for i in range(2, len(used) + len(out) + 3)]
            name = next(w for w in wanted if w not in used)
            used.add(name)
            out[key(size)] = name
    return out


def shown(size: Any, names: dict[str, str]) -> str:
    """A size for a reader: `b`, `768`, `2*s`."""
    if key(size) in names:
        return names[key(size)]
    said = re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), key(size)).replace(" ", "")
    return "·".join(sorted(said.split("*"))) if re.fullmatch(r"\w+(\*\w+)+", said) else said


def shape(node: fx.Node, names: dict[str, str], degree: Any) -> str | None:
    """`[b, s, heads/8·96]`: a value's shape in axis names, sharded ones with what they are divided by."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return None
    dims = dims_of(node) or (None,) * val.dim()
    parts = [_dim(d, size, names, degree) for d, size in zip(dims, val.shape, strict=True)]
    return f"[{', '.join(parts)}]"


def _dim(dim: Dim | None, size: Any, names: dict[str, str], degree: Any) -> str:
    if dim is None or not dim.over:
        return shown(size, names) if isinstance(size, torch.SymInt) or dim is None else str(size)
    if isinstance(dim, Factor):
        split = degree(dim.split)
        base = dim.name or shown(size, names)
        return base if split == 1 else f"{base}/{split}"
    assert isinstance(dim, (Product, Concat))
    inner = [_dim(p, "b" if p.dynamic_size else p.size, names, degree) for p in dim.parts]
    if isinstance(dim, Concat):
        return f"{len(inner)}·{inner[0]}" if len(set(inner)) == 1 else "(" + " | ".join(inner) + ")"
    return "·".join(i for i in inner if i != "1") or "1"
