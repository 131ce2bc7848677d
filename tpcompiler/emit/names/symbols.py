"""The letters that symbolic sizes get, and how shapes are shown to a reader."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from tpcompiler.emit.ops.nodes import NodeResult, key, node_of, val_of
from tpcompiler.graphs import layout_of
from tpcompiler.layout import Concat, Dim, Factor, Product
from tpcompiler.runtime.mesh import Mesh

_BY_AXIS = {"batch": "b", "sequence": "s", "seq": "s", "tokens": "t", "source": "s", "target": "t"}
_BY_POSITION = ("b", "s", "t", "n", "m", "l", "j", "k", "r", "w")


def letters(inputs: Iterable[fx.Node], taken: Iterable[str]) -> dict[str, str]:
    """A short name for each symbol in the inputs' sizes: by its axis if that is known, otherwise by its position."""
    used, out = set(taken), dict[str, str]()
    for node in inputs:
        for position, size in enumerate(getattr(val_of(node), "shape", ())):
            if not isinstance(size, torch.SymInt) or key(size) in out:
                continue
            dims = layout_of(node)
            axis = getattr(dims[position], "name", "") if dims is not None else ""
            wanted = [_BY_AXIS[axis]] if axis in _BY_AXIS else []
            wanted += _BY_POSITION[position : position + 1]
            wanted += [f"{w}{i}" for w in wanted[:1] or ["n"] for i in range(2, len(used) + len(out) + 3)]
            out[key(size)] = next(w for w in wanted if w not in used)
            used.add(out[key(size)])
    return out


def told_by(result: NodeResult) -> list[str]:
    """The symbol that each dimension of a tensor tells, "" for a dimension that tells none. Each symbol comes once.

    A dimension that is split over ranks does not tell its global size.
    """
    node = node_of(result)
    val = None if node is None else val_of(node)
    if node is None or not isinstance(val, torch.Tensor):
        return []
    dims: Sequence[Dim | None] = layout_of(node) or (None,) * val.dim()
    whole = [isinstance(n, torch.SymInt) and (d is None or not d.over) for n, d in zip(val.shape, dims, strict=True)]
    found = [key(n) if w else "" for n, w in zip(val.shape, whole, strict=True)]
    return [s if s not in found[:i] else "" for i, s in enumerate(found)]


def shape(node: fx.Node, names: Mapping[str, str], mesh: Mesh) -> str | None:
    """`[b, s, heads/8·96]`: a tensor's shape in axis names, each split axis with its degree. None for no tensor."""
    val = val_of(node)
    if not isinstance(val, torch.Tensor):
        return None
    dims: Sequence[Dim | None] = layout_of(node) or (None,) * val.dim()
    parts = [_dim(d, size, names, mesh) for d, size in zip(dims, val.shape, strict=True)]
    return f"[{', '.join(parts)}]"


def _dim(dim: Dim | None, size: Any, names: Mapping[str, str], mesh: Mesh) -> str:
    if dim is None or not dim.over:
        return _size(size, names) if isinstance(size, torch.SymInt) or dim is None else str(size)
    if isinstance(dim, Factor):
        degree, axis = mesh.degree(dim.split), dim.name or _size(size, names)
        return axis if degree == 1 else f"{axis}/{degree}"
    assert isinstance(dim, (Product, Concat))
    inner = [_dim(p, "b" if p.dynamic_size else p.size, names, mesh) for p in dim.parts]
    if isinstance(dim, Concat):
        return f"{len(inner)}·{inner[0]}" if len(set(inner)) == 1 else "(" + " | ".join(inner) + ")"
    return "·".join(i for i in inner if i != "1") or "1"


def _size(size: Any, names: Mapping[str, str]) -> str:
    """A size for a reader: `b`, `768`, `2·s`."""
    if key(size) in names:
        return names[key(size)]
    said = re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), key(size)).replace(" ", "")
    said = re.sub(r"\(\(([^()]*)\)\)", r"(\1)", said)  # sympy puts a floor division in parentheses twice
    if re.fullmatch(r"\([^()]*\)", said):
        return said[1:-1]
    return "·".join(sorted(said.split("*"))) if re.fullmatch(r"\w+(\*\w+)+", said) else said.replace("*", "·")
