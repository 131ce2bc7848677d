"""Fits a rule's pattern to one call: finds the term of every letter."""

from __future__ import annotations

from collections.abc import Container, Iterable

from torch import fx

from tpcompiler.axes.algebra import Terms
from tpcompiler.axes.map import Dims
from tpcompiler.ops.measured import Measured, Side
from tpcompiler.ops.notation import Letter, LetterGroup, Pattern
from tpcompiler.ops.operands import op_name
from tpcompiler.ops.record import OpCall


class Fit(Measured):
    """A pattern fitted to one call. `operand` and `result` give terms to the letters of one side.

    Raises `RuleError` as `Measured` does.
    """

    def __init__(
        self,
        terms: Terms,
        node: fx.Node,
        pattern: Pattern,
        sizes: dict[str, int],
        call: OpCall,
        dynamic: Container[int],
    ) -> None:
        super().__init__(f"{op_name(node)} at {node.name}", pattern, sizes, call, dynamic)
        self.terms, self.node = terms, node
        self.letter_terms: dict[str, int] = {}  # letter → its term

    def term(self, item: Letter | LetterGroup) -> int:
        """The term of a letter or a group. A letter without a term gets a new one."""
        if isinstance(item, Letter):
            if item.name not in self.letter_terms:
                self.letter_terms[item.name] = self.terms.new(self.sizes.get(item.name, 1))
            return self.letter_terms[item.name]
        parts = [self.term(p) for p in item.parts]
        build = self.terms.product if item.kind == "product" else self.terms.concat
        return build(parts, self.node.name)

    def operand(self, side: Side, mine: Dims | None) -> Dims:
        """An operand's dimensions as the op sees them. Unifies them with the operand's own, `mine`, which is None for a
        constant."""
        out: list[int | None] = []
        for i, (item, n) in enumerate(side):
            if n == 1 or isinstance(item, str):
                out.append(None)
                continue
            own = None if mine is None else mine[i]
            if own is not None and isinstance(item, Letter):
                self.letter_terms.setdefault(item.name, own)
            term = self.term(item)
            if own is not None:
                self.terms.unify(own, term, self.node.name)
            out.append(term)
        return tuple(out)

    def result(self, side: Side) -> Dims:
        return tuple(None if n == 1 or isinstance(item, str) else self.term(item) for item, n in side)

    def terms_of(self, names: Iterable[str]) -> tuple[int, ...]:
        return tuple(self.letter_terms[x] for x in sorted(names) if x in self.letter_terms)
