"""The attributes of an emitted class that say what a rank holds: groups, local sizes, rows, numbers."""

from __future__ import annotations

from collections.abc import Iterable
from keyword import iskeyword
from typing import Any

import torch.nn as nn

from tpcompiler.emit.names.names import RESERVED
from tpcompiler.emit.text.expr import ADD, ATOM, MULTIPLY, Expr, constant, number
from tpcompiler.layout import Concat, Dim, Factor, Product
from tpcompiler.runtime.mesh import Mesh

_MODULE = frozenset(dir(nn.Module)) | frozenset(vars(nn.Module())) | {"training"}


class Fields:
    """Attributes as they turn out to be needed; `lines` are the constructor's statements that make them."""

    def __init__(self, mesh: Mesh, taken: Iterable[str]) -> None:
        self.mesh = mesh
        self.taken = set(taken) | _MODULE | RESERVED
        self._made: dict[Any, str] = {}
        self._groups: list[str] = []
        self._rest: list[str] = []

    @property
    def lines(self) -> list[str]:
        """The constructor's statements."""
        return self.lines_of("rng")

    def lines_of(self, rng: str) -> list[str]:
        """`lines`, where random numbers come from `rng`."""
        return self._groups + ([f"{self._made['rng']} = {rng}"] if self.draws else []) + self._rest

    def _new(self, key: Any, wanted: str) -> str:
        stem = "".join(c if c.isalnum() or c == "_" else "_" for c in wanted) or "n"
        stem = f"n{stem}" if stem[0].isdigit() else stem
        name, i = stem, 2
        while name in self.taken:
            name, i = f"{stem}{i}", i + 1
        self.taken.add(name)
        self._made[key] = f"self.{name}"
        return self._made[key]

    def group(self, over: tuple[str, ...]) -> str:
        """`self.tensor`: the ranks of this rank's group over mesh dimensions."""
        if ("group", over) not in self._made:
            name = self._new(("group", over), "_".join(over))
            self._groups.append(f"{name} = ranks.group({', '.join(constant(n).text for n in over)})")
        return self._made["group", over]

    def rng(self) -> str:
        """`self.rng`: what counter-based dropout draws from."""
        if "rng" not in self._made:
            self._new("rng", "rng")
        return self._made["rng"]

    @property
    def draws(self) -> bool:
        """Are random numbers needed?"""
        return "rng" in self._made

    def argument(self, name: str) -> str:
        """`self.site`: an argument of the constructor, kept."""
        key = ("argument", name)
        if key not in self._made:
            attribute = self._new(key, name)
            self._rest.append(f"{attribute} = {name}")
        return self._made[key]

    def size(self, dim: Dim) -> Expr:
        """How much of `dim` this rank holds: `3 * self.heads * 96`."""
        if not dim.over:
            return number(dim.size)
        if isinstance(dim, Factor):
            return Expr(self._local(dim))
        assert isinstance(dim, (Product, Concat))
        parts = [self.size(p) for p in dim.parts if not (isinstance(dim, Product) and p.size == 1)]
        if isinstance(dim, Concat):
            if len({p.text for p in parts}) == 1:
                return Expr(f"{len(parts)} * {parts[0].at(MULTIPLY)}", MULTIPLY) if len(parts) > 1 else parts[0]
            return _joined(parts, "+", ADD)
        return _joined(parts, "*", MULTIPLY)

    def _local(self, factor: Factor) -> str:
        key = ("size", factor)
        if key not in self._made:
            group = self.group(factor.split)
            name = self._new(key, factor.name or f"n{factor.n}")
            degree = self.mesh.degree(factor.split)
            held = dict.fromkeys(str((factor.n + degree - 1 - i) // degree) for i in range(degree))
            self._rest.append(f"{name} = {group}.local({factor.n})  # {' or '.join(held)}")
        return self._made[key]

    def rows(self, dim: Dim) -> Expr:
        """The global indices of `dim` that this rank holds, as runs."""
        if not dim.over:
            return Expr(f"((0, {dim.size}),)")
        key = ("rows", dim)
        if key not in self._made:
            group = self.group(dim.over)
            name = self._new(key, f"{_split_name(dim)}_rows")
            self._rest.append(f"{name} = {self._runs(dim, group)}")
        return Expr(self._made[key])

    def _runs(self, dim: Dim, group: str) -> str:
        if isinstance(dim, Factor):
            return f"({group}.part({dim.n}),)"
        coords = self._coords(dim.over)
        return constant(tuple(dim.runs(self.mesh, c) for c in coords)).text + f"[{group}.index]"

    def _coords(self, over: tuple[str, ...]) -> list[dict[str, int]]:
        found: dict[int, dict[str, int]] = {}
        for rank in range(self.mesh.size):
            coords = self.mesh.coords(rank)
            found.setdefault(self.mesh.index(over, coords), coords)
        return [found[i] for i in sorted(found)]

    def all_rows(self, dim: Dim, over: tuple[str, ...]) -> Expr:
        """The rows of `dim` that each rank of the group over `over` holds."""
        assert set(dim.over) <= set(over), f"{dim} is not whole on the ranks of {over}"
        return self.table(tuple(dim.runs(self.mesh, c) for c in self._coords(over)), f"{_split_name(dim)}_rows")

    def table(self, rows: tuple[Any, ...], wanted: str = "rows") -> Expr:
        """A long constant, kept out of `forward`."""
        key = ("table", rows)
        if key not in self._made:
            name = self._new(key, wanted)
            self._rest.append(f"{name} = {constant(rows)}")
        return Expr(self._made[key])


def _split_name(dim: Dim) -> str:
    split = next((leaf for leaf in dim.leaves if leaf.split), None)
    return (split.name or str(split.n)) if split is not None else "all"


def _joined(parts: list[Expr], symbol: str, level: int) -> Expr:
    """Sums and products of whole numbers, which need no parentheses."""
    return parts[0] if len(parts) == 1 else Expr(f" {symbol} ".join(p.at(level) for p in parts), level)


def attribute(base: str, path: str) -> Expr:
    """`self.h[0].attn.weight` for "h.0.attn.weight"."""
    text = base
    for part in path.split("."):
        if part.isdigit():
            text += f"[{part}]"
        elif part.isidentifier() and not iskeyword(part):
            text += f".{part}"
        else:
            text = f"getattr({text}, {constant(part)})"
    return Expr(text, ATOM)
