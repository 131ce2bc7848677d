"""A pattern matched with the shapes of one call, which gives each letter its dimension and its size."""

from __future__ import annotations

from collections.abc import Container, Sequence
from math import prod

from tpcompiler.errors import RuleError
from tpcompiler.ops.notation import ELLIPSIS, WHOLE_ELLIPSIS, Item, Letter, LetterGroup, Pattern, letters_of
from tpcompiler.ops.record import OpCall, OpRule
from tpcompiler.ops.views import Shape

Side = list[tuple[Item, int]]  # one tensor: for each dimension, an item of the pattern and its size


class Measured:
    """The sides of a pattern, and the sizes of its letters. `operands` has a side for each operand that the call gives,
    or None where the op does not read its values.

    `dynamic` holds the sizes that stand for ones known at run time only. Raises `RuleError`, which says `where`, the
    pattern and the shapes, when the pattern does not fit the call.
    """

    def __init__(
        self, where: str, pattern: Pattern, sizes: dict[str, int], call: OpCall, dynamic: Container[int]
    ) -> None:
        self.where, self.pattern = where, pattern
        self.whole = set(pattern.marked("whole"))
        shapes = [s for s in call.operands if s is not None]
        wanted = _present(pattern, call.operands)
        if len(wanted) != len(shapes) or len(pattern.results) != len(call.results):
            raise self.misfit(f"does not fit operands {shapes}")
        self.operands = [None if x is None else self._side(x, s) for x, s in zip(wanted, shapes, strict=True)]
        self.results = [self._side(x, s) for x, s in zip(pattern.results, call.results, strict=True)]
        self._part(dynamic)
        self.sizes = dict(sizes)
        self._measure([x for x in self.operands if x is not None] + self.results)

    def misfit(self, why: str) -> RuleError:
        return RuleError(f"{self.where}: {self.pattern.text!r}: {why}")

    @property
    def contracted(self) -> set[str]:
        """The letters that the op sums over: operands have them, results do not."""
        return _names(self.operands) - _names(self.results) - self.whole - self.pattern.dropped

    @property
    def copies(self) -> set[str]:
        """The letters along which the op copies: results have them, operands do not."""
        return _names(self.results) - _names(self.operands) - self.whole

    def size(self, item: Letter | LetterGroup) -> int:
        """The elements of a letter or of a group."""
        if isinstance(item, Letter):
            return self.sizes.get(item.name, 1)
        sizes = [self.size(p) for p in item.parts]
        return prod(sizes) if item.kind == "product" else sum(sizes)

    def flops(self, rule: OpRule, call: OpCall) -> int:
        """Floating-point operations of the op's products: for each product, one multiplication and one addition for
        every combination of the letters of its two operands."""
        sides = [*self.operands, *self.results]
        if rule.products:
            return sum(2 * self._volume(_names([sides[i], sides[j]])) for i, j in rule.products)
        if not rule.sums or rule.form:
            return 0
        bias = rule.product is not None and call.args.get(rule.product.bias) is not None
        multiplied = sum(call.floating) - bias
        return 2 * max(multiplied - 1, 0) * self._volume(_names(self.results) | self.contracted)

    def _volume(self, names: set[str]) -> int:
        return prod(self.sizes.get(name, 1) for name in names)

    def _side(self, items: tuple[Item, ...], shape: Shape) -> Side:
        """Pairs the items of a side with the sizes of a shape. The letters for `...` are numbered from the right."""
        dots = sum(item in (ELLIPSIS, WHOLE_ELLIPSIS) for item in items)
        extra = len(shape) - len(items) + dots
        if extra < 0 or (not dots and extra):
            raise self.misfit(f"does not fit shape {list(shape)}")
        covered = [f"~{k}" for k in range(extra - 1, -1, -1)]
        flat: list[Item] = []
        for item in items:
            flat.extend(map(Letter, covered) if item in (ELLIPSIS, WHOLE_ELLIPSIS) else [item])
            if item == WHOLE_ELLIPSIS:
                self.whole.update(covered)
        return list(zip(flat, shape, strict=True))

    def _part(self, dynamic: Container[int]) -> None:
        """Replaces a letter with several sizes, equal at run time only, by a letter for each size, needed whole."""
        sides = [x for x in self.operands if x is not None] + self.results
        found: dict[str, set[int]] = {}
        for item, n in (pair for side in sides for pair in side):
            if isinstance(item, Letter) and n != 1:
                found.setdefault(item.name, set()).add(n)
        apart = {name for name, sizes in found.items() if len(sizes) > 1 and any(n in dynamic for n in sizes)}
        apart -= {x.name for side in sides for item, _ in side if isinstance(item, LetterGroup) for x in item.letters()}
        for side in sides:
            for k, (item, n) in enumerate(side):
                if isinstance(item, Letter) and item.name in apart:
                    side[k] = (Letter(f"{item.name}@{n}", whole=True), n)
                    self.whole.add(f"{item.name}@{n}")

    def _measure(self, sides: list[Side]) -> None:
        for side in sides:
            for item, n in side:
                if isinstance(item, Letter) and n != 1 and self.sizes.setdefault(item.name, n) != n:
                    raise self.misfit(f"{item.name} is {self.sizes[item.name]} and {n}")
        for side in sides:
            for item, n in side:
                if isinstance(item, LetterGroup) and n != 1:
                    self._solve(item, n)

    def _solve(self, group: LetterGroup, n: int) -> None:
        """Computes the one unknown size in a group of `n` elements. Raises `RuleError` if there are several, or if the
        sizes do not make up `n`."""
        unknown = list(dict.fromkeys(x.name for x in group.letters() if x.name not in self.sizes))
        if len(unknown) > 1:
            raise self.misfit(f"sizes of {' and '.join(unknown)} are open")
        for name in unknown:
            self.sizes[name] = 1
            base = self.size(group)
            self.sizes[name] = n // base if group.kind == "product" else n - base + 1
        if self.size(group) != n:
            raise self.misfit(f"{self.size(group)} elements for a dimension of {n}")


def _names(sides: Sequence[Side | None]) -> set[str]:
    return {x.name for side in sides for item, _ in side or () for x in letters_of(item)}


def _present(pattern: Pattern, operands: Sequence[Shape | None]) -> tuple[tuple[Item, ...] | None, ...]:
    """The sides of a pattern without those of operands that the call leaves out, such as a bias or a mask."""
    if len(pattern.operands) == sum(s is not None for s in operands):
        return pattern.operands
    return tuple(items for items, s in zip(pattern.operands, operands, strict=False) if s is not None)
