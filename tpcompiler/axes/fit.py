"""A rule's pattern fitted to one call: which dimension each letter is, and of what size."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from math import prod

from torch import fx

from tpcompiler.axes.algebra import Terms
from tpcompiler.axes.map import Dims
from tpcompiler.errors import RuleError
from tpcompiler.ops.call import Call
from tpcompiler.ops.notation import ELLIPSIS, Group, Item, Letter, Pattern, letters_of
from tpcompiler.ops.operands import op_name
from tpcompiler.ops.views import Shape

Side = list[tuple[Item, int]]  # of one tensor: an item of the pattern and its size, for every dimension


class Fit:
    """Sizes of letters first, then, as operands and results are asked for, their terms.

    `operands` are those that the call gives, None for one whose values do not matter. Raises `RuleError` when the
    pattern does not fit, with pattern, shapes and node. `dynamic`: sizes that stand for ones known at run time only.
    """

    def __init__(
        self, terms: Terms, node: fx.Node, pattern: Pattern, sizes: dict[str, int], call: Call, dynamic: Container[int]
    ) -> None:
        self.terms, self.node, self.pattern = terms, node, pattern
        shapes = [s for s in call.operands if s is not None]
        wanted = _present(pattern, call.operands)
        if len(wanted) != len(shapes) or len(pattern.results) != len(call.results):
            raise self.misfit(f"does not fit operands {shapes}")
        self.operands = [None if x is None else self._side(x, s) for x, s in zip(wanted, shapes, strict=True)]
        self.results = [self._side(x, s) for x, s in zip(pattern.results, call.results, strict=True)]
        self.whole = set(pattern.marked("whole"))
        self._part(dynamic)
        self.sizes = dict(sizes)
        self.atoms: dict[str, int] = {}  # letter → its term
        self._measure([x for x in self.operands if x is not None] + self.results)

    def misfit(self, why: str) -> RuleError:
        return RuleError(f"{op_name(self.node)} at {self.node.name}: {self.pattern.text!r}: {why}")

    def _side(self, items: tuple[Item, ...], shape: Shape) -> Side:
        """What `...` covers becomes letters numbered from the right."""
        dots = sum(item == ELLIPSIS for item in items)
        extra = len(shape) - len(items) + dots
        if extra < 0 or (not dots and extra):
            raise self.misfit(f"does not fit shape {list(shape)}")
        flat: list[Item] = []
        for item in items:
            flat.extend([Letter(f"~{k}") for k in range(extra - 1, -1, -1)] if item == ELLIPSIS else [item])
        return list(zip(flat, shape, strict=True))

    def _part(self, dynamic: Container[int]) -> None:
        """A letter of two sizes, which are equal at run time only, becomes two letters, each needed whole."""
        sides = [x for x in self.operands if x is not None] + self.results
        found: dict[str, set[int]] = {}
        for item, n in (pair for side in sides for pair in side):
            if isinstance(item, Letter) and n != 1:
                found.setdefault(item.name, set()).add(n)
        apart = {name for name, sizes in found.items() if len(sizes) > 1 and any(n in dynamic for n in sizes)}
        apart -= {x.name for side in sides for item, _ in side if isinstance(item, Group) for x in item.letters()}
        for side in sides:
            for k, (item, n) in enumerate(side):
                if isinstance(item, Letter) and item.name in apart:
                    side[k] = (Letter(f"{item.name}@{n}", whole=True), n)
                    self.whole.add(f"{item.name}@{n}")

    # -- sizes ------------------------------------------------------------------------------------------------------

    def _measure(self, sides: list[Side]) -> None:
        for side in sides:
            for item, n in side:
                if isinstance(item, Letter) and n != 1 and self.sizes.setdefault(item.name, n) != n:
                    raise self.misfit(f"{item.name} is {self.sizes[item.name]} and {n}")
        for side in sides:
            for item, n in side:
                if isinstance(item, Group) and n != 1:
                    self._solve(item, n)

    def _solve(self, group: Group, n: int) -> None:
        """Deduce the one size that a group of known size leaves open, and check the rest."""
        unknown = [x.name for x in group.letters() if x.name not in self.sizes]
        if len(unknown) > 1:
            raise self.misfit(f"sizes of {' and '.join(unknown)} are open")
        for name in unknown:
            self.sizes[name] = 1
            base = self._size(group)
            self.sizes[name] = n // base if group.kind == "product" else n - base + 1
        if self._size(group) != n:
            raise self.misfit(f"{self._size(group)} elements for a dimension of {n}")

    def _size(self, item: Letter | Group) -> int:
        if isinstance(item, Letter):
            return self.sizes[item.name]
        sizes = [self._size(p) for p in item.parts]
        return prod(sizes) if item.kind == "product" else sum(sizes)

    # -- terms ------------------------------------------------------------------------------------------------------

    def term(self, item: Letter | Group) -> int:
        if isinstance(item, Letter):
            if item.name not in self.atoms:
                self.atoms[item.name] = self.terms.new(self.sizes.get(item.name, 1))
            return self.atoms[item.name]
        parts = [self.term(p) for p in item.parts]
        build = self.terms.product if item.kind == "product" else self.terms.concat
        return build(parts, self.node.name)

    def operand(self, side: Side, mine: Dims | None) -> Dims:
        """An operand's dimensions as the op sees them, unified with those it has (`mine`; None for a constant)."""
        out: list[int | None] = []
        for i, (item, n) in enumerate(side):
            if n == 1 or isinstance(item, str):
                out.append(None)
                continue
            own = None if mine is None else mine[i]
            if own is not None and isinstance(item, Letter):
                self.atoms.setdefault(item.name, own)
            term = self.term(item)
            if own is not None:
                self.terms.unify(own, term, self.node.name)
            out.append(term)
        return tuple(out)

    def result(self, side: Side) -> Dims:
        return tuple(None if n == 1 or isinstance(item, str) else self.term(item) for item, n in side)

    def terms_of(self, names: Iterable[str]) -> tuple[int, ...]:
        return tuple(self.atoms[x] for x in sorted(names) if x in self.atoms)

    @property
    def contracted(self) -> tuple[int, ...]:
        """What operands have and results have not."""
        mine = _names(self.operands) - _names(self.results) - self.whole - self.pattern.dropped
        return self.terms_of(mine)

    @property
    def made(self) -> tuple[int, ...]:
        """What results have and operands have not: the factors that a broadcast makes."""
        return self.terms_of(_names(self.results) - _names(self.operands))


def _names(sides: Sequence[Side | None]) -> set[str]:
    return {x.name for side in sides for item, _ in side or () for x in letters_of(item)}


def _present(pattern: Pattern, operands: Sequence[Shape | None]) -> tuple[tuple[Item, ...] | None, ...]:
    """A pattern's operands without those that the call leaves out (a missing bias or mask)."""
    if len(pattern.operands) == sum(s is not None for s in operands):
        return pattern.operands
    return tuple(items for items, s in zip(pattern.operands, operands, strict=False) if s is not None)
