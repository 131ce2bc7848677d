"""The attributes of an emitted class that say what a rank holds: groups, local sizes, rows, numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn as nn

from tpcompiler.emit.names.namer import RESERVED
from tpcompiler.emit.text.expr import ADD, MULTIPLY, Expr, constant, number
from tpcompiler.layout import Concat, Dim, Factor, Product
from tpcompiler.runtime.mesh import Mesh

_MODULE = frozenset(dir(nn.ModuleList()))  # `dir` of an instance lists what the constructor sets, too


class Fields:
    """Collects attributes as they turn out to be needed. Each method returns how the attribute is written."""

    def __init__(self, mesh: Mesh, taken: Iterable[str]) -> None:
        self.mesh = mesh
        self._taken = set(taken) | _MODULE | RESERVED
        self._made: dict[Any, str] = {}
        self._groups: list[str] = []
        self._rest: list[str] = []
        self.later: list[str] = []  # statements that need the module's layers

    def lines(self, rng: str = "rng") -> list[str]:
        """The constructor's statements that set the attributes. Random numbers come from the expression `rng`."""
        return self._groups + ([f"{self._made['rng']} = {rng}"] if self.draws else []) + self._rest

    @property
    def draws(self) -> bool:
        """Are random numbers needed?"""
        return "rng" in self._made

    def _new(self, key: Any, wanted: str) -> str:
        """The attribute for `key`, by a name like `wanted` that is not taken."""
        stem = "".join(c if c.isalnum() or c == "_" else "_" for c in wanted) or "n"
        stem = f"n{stem}" if stem[0].isdigit() else stem
        name, i = stem, 2
        while name in self._taken:
            name, i = f"{stem}{i}", i + 1
        self._taken.add(name)
        self._made[key] = f"self.{name}"
        return self._made[key]

    def group(self, over: tuple[str, ...]) -> str:
        """`self.tensor`: this rank's group over mesh dimensions."""
        if ("group", over) not in self._made:
            name = self._new(("group", over), "_".join(over))
            self._groups.append(f"{name} = ranks.group({', '.join(constant(n).text for n in over)})")
        return self._made["group", over]

    def rng(self) -> str:
        """`self.rng`: what counter-based dropout draws from."""
        return self._made["rng"] if self.draws else self._new("rng", "rng")

    def halves(self, layers: str, cut: tuple[int, ...]) -> str:
        """`self.halves`: what runs the layers of a list on two halves of a batch; `cut` as in `runtime.Halves`."""
        key = ("halves", layers, cut)
        if key not in self._made:
            more = "" if cut == (0,) else f", cut={constant(cut)}"
            self.later.append(f"{self._new(key, 'halves')} = Halves({layers}, ranks{more})")
        return self._made[key]

    def argument(self, name: str) -> str:
        """`self.site`: an argument of the constructor."""
        key = ("argument", name)
        if key not in self._made:
            self._rest.append(f"{self._new(key, name)} = {name}")
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
            if len(parts) > 1 and len({p.text for p in parts}) == 1:
                return Expr(f"{len(parts)} * {parts[0].at(MULTIPLY)}", MULTIPLY)
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
        """The global indices of `dim` that this rank holds, as runs `((start, stop), …)`."""
        if not dim.over:
            return Expr(f"((0, {dim.size}),)")
        key = ("rows", dim)
        if key not in self._made:
            group = self.group(dim.over)
            name = self._new(key, f"{_split_name(dim)}_rows")
            if isinstance(dim, Factor):
                runs = f"({group}.part({dim.n}),)"
            else:
                runs = f"{constant(self._runs(dim, dim.over)).text}[{group}.index]"
            self._rest.append(f"{name} = {runs}")
        return Expr(self._made[key])

    def all_rows(self, dim: Dim, over: tuple[str, ...]) -> Expr:
        """The rows of `dim` that each rank of the group over `over` holds."""
        assert set(dim.over) <= set(over), f"{dim} is not whole on the ranks of {over}"
        return self.table(self._runs(dim, over), f"{_split_name(dim)}_rows")

    def _runs(self, dim: Dim, over: tuple[str, ...]) -> tuple[Any, ...]:
        """The runs that each rank of a group over `over` holds, by the rank's index in the group."""
        found: dict[int, dict[str, int]] = {}
        for rank in range(self.mesh.size):
            coords = self.mesh.coords(rank)
            found.setdefault(self.mesh.index(over, coords), coords)
        return tuple(dim.runs(self.mesh, found[i]) for i in sorted(found))

    def table(self, rows: tuple[Any, ...], wanted: str = "rows") -> Expr:
        """A long constant as an attribute, so that it does not stand in `forward`."""
        key = ("table", rows)
        if key not in self._made:
            self._rest.append(f"{self._new(key, wanted)} = {constant(rows)}")
        return Expr(self._made[key])


def _split_name(dim: Dim) -> str:
    split = next((leaf for leaf in dim.leaves if leaf.split), None)
    return (split.name or str(split.n)) if split is not None else "all"


def _joined(parts: list[Expr], symbol: str, level: int) -> Expr:
    """A sum or product of whole numbers, which needs no parentheses."""
    return parts[0] if len(parts) == 1 else Expr(f" {symbol} ".join(p.at(level) for p in parts), level)
