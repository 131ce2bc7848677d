"""Batch and sequence at small sizes that nothing else in the graphs has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tpcompiler.program import Capture

_PRIMES = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73)


class Sizes:
    """A number for every symbol of a capture: symbols that are equal in the example stay equal."""

    def __init__(self, numbers: dict[Any, int], *, of_example: bool = False) -> None:
        self.numbers = numbers
        self.of_example = of_example
        self._known: dict[Any, int] = {}

    def __call__(self, n: Any) -> int:
        """A size as a number."""
        if not isinstance(n, torch.SymInt):
            return int(n)
        expr = n.node.expr
        if expr not in self._known:
            self._known[expr] = int(expr.xreplace(self.numbers))
        return self._known[expr]

    def shape(self, shape: Sequence[Any]) -> tuple[int, ...]:
        return tuple(map(self, shape))


def choices(capture: Capture, taken: Iterable[int], degree: int) -> Iterator[Sizes]:
    """Sizes to run at, smallest first: primes not among `taken`, then multiples of the degree, then the example's."""
    hints = _hints(capture)
    distinct = sorted(set(hints.values()))
    if not distinct:
        yield Sizes({})
        return
    used = set(taken)
    free = [p for p in _PRIMES if p not in used]
    small = dict(zip(distinct, free, strict=False))
    yield Sizes({s: small.get(h, h) for s, h in hints.items()})
    even = {h: degree * (i + 1) for i, h in enumerate(distinct)}
    yield Sizes({s: even[h] for s, h in hints.items()})
    yield Sizes(dict(hints))


def _hints(capture: Capture) -> dict[Any, int]:
    """The example's number for every symbol in the inputs' shapes."""
    hints: dict[Any, int] = {}
    for node in capture.graph.nodes:
        val = node.meta.get("val")
        if node.op == "placeholder" and isinstance(val, Tensor):
            for n in val.shape:
                if isinstance(n, torch.SymInt):
                    for symbol in n.node.expr.free_symbols:
                        hints[symbol] = _hint(n, symbol)
    return hints


def _hint(n: torch.SymInt, symbol: Any) -> int:
    env = n.node.shape_env
    for table in ("backed_var_to_val", "var_to_val"):
        found = getattr(env, table, None)
        if found is not None and symbol in found:
            return int(found[symbol])
    return int(n.node.hint)


_BEYOND = ((10007, 20011, 30011, 40009, 50021, 60013), (100003, 200003, 300007, 400009, 500009, 600011))


def example(capture: Capture) -> Iterator[Sizes]:
    """The example's own sizes."""
    yield Sizes(_hints(capture), of_example=True)


def beyond(capture: Capture) -> Iterator[Sizes]:
    """Sizes that stand for all: primes beyond every constant of a model, to compare structure at, not to run."""
    hints = _hints(capture)
    distinct = sorted(set(hints.values()))
    for primes in _BEYOND[: 2 if distinct else 1]:
        large = dict(zip(distinct, primes, strict=False))
        yield Sizes({s: large.get(h, 7919 * (i + 1)) for i, (s, h) in enumerate(hints.items())})
