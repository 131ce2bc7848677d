"""Numbers for symbolic sizes, so that dimensions can be compared by divisibility."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils._sympy import functions as symbolic

from tpcompiler.graphs import examples
from tpcompiler.ops.views import Shape

_LARGE = 2**24  # larger than any size of a model


class Primes:
    """Represents every distinct example size by a prime of its own, so that no two sizes fit each other by accident.

    Symbols with the same example size, such as the batch of ids and that of labels, are one size to the model.
    """

    def __init__(self, apart: int = 1) -> None:
        """`apart` is the least distance between primes, so that no size plus a few elements equals another size."""
        # The primes are so large that a few thousandths of one (a chunk of a sequence) are large as well.
        self._primes = _primes_above(2**36, apart)
        self._symbols: dict[Any, int] = {}
        self._cache: dict[Any, int] = {}
        self.dynamic: dict[int, str] = {}  # numbers that stand for sizes known at run time only, with their expressions

    def __call__(self, size: int | torch.SymInt) -> int:
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if expr not in self._cache:
            self._cache[expr] = self._number(expr, examples(size))
        return self._cache[expr]

    def _number(self, expr: Any, known: Mapping[Any, Any]) -> int:
        settled = _settled(expr, known)
        values = {symbol: self._prime(known.get(symbol, symbol)) for symbol in settled.free_symbols}
        number = int(settled.subs(values))
        if not values or all(int(settled.subs({s: n * k for s, n in values.items()})) == number for k in (2, 3, 5)):
            return number  # a constant: 256 · n // n does not depend on n
        if number < _LARGE:  # such as a remainder; a small number would fit other sizes by accident
            number = next(self._primes)
        self.dynamic[number] = str(expr)
        return number

    def _prime(self, example: Any) -> int:
        if example not in self._symbols:
            self._symbols[example] = next(self._primes)
            self.dynamic[self._symbols[example]] = f"s{len(self._symbols)}"
        return self._symbols[example]

    def shape(self, value: torch.Tensor) -> Shape:
        """A value's shape with a number for each symbolic size."""
        return tuple(self(n) for n in value.shape)


def _settled(expr: Any, known: Mapping[Any, Any]) -> Any:
    """Replaces each maximum and minimum by the term that it selects at the traced sizes, because it might select
    another one at a prime: `64 - Max(0, 64 - s)` becomes `s`."""

    def winner(*terms: Any, greatest: bool) -> Any:
        return (max if greatest else min)(terms, key=lambda t: int(t.subs(known)))

    for kind in (symbolic.Max, symbolic.Min):
        expr = expr.replace(kind, partial(winner, greatest=kind is symbolic.Max))
    return expr


def _primes_above(n: int, apart: int) -> Iterator[int]:
    while True:
        n += 1
        if all(n % k for k in range(2, int(n**0.5) + 1)):
            yield n
            n += apart - 1
