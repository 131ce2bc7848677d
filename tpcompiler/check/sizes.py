"""Chooses numbers for the symbolic sizes (batch, sequence), different from all other sizes in the graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from tpcompiler.program import Capture

_PRIMES = (
    *(3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109),
    *(113, 127, 131, 137, 139, 149, 151, 157, 163, 167, 173, 179, 181, 191, 193, 197, 199, 211, 223, 227, 229, 233),
)


ENDLESS = 1 << 31  # from here on, a number means the end of a dimension and is no size


class Sizes:
    """A number for every symbol of a capture. Symbols that are equal in the example get equal numbers."""

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


def made_of(integers: set[int]) -> set[int]:
    """The primes that are among the given numbers, or are the sum or the difference of two of them."""

    def made(p: int) -> bool:
        return p in integers or any(p - a in integers or p + a in integers for a in integers)

    return set(filter(made, _PRIMES))


def choices(capture: Capture, taken: Iterable[int], degree: int, avoid: Iterable[int] = ()) -> Iterator[Sizes]:
    """Sizes to run at, in the order in which to try them.

    The first two are small primes that are not in `taken`, those not in `avoid` preferred. Multiples of the degree and
    the example's own sizes follow.
    """
    known = hints(capture)
    distinct = sorted(set(known.values()))
    if not distinct:
        yield Sizes({})
        return
    used, shy = set(taken), set(avoid)
    free = sorted((p for p in _PRIMES if p not in used), key=lambda p: p in shy)
    for primes in (free[: len(distinct)], free[len(distinct) : 2 * len(distinct)]):
        small = dict(zip(distinct, sorted(primes), strict=False))
        yield Sizes({s: small.get(h, h) for s, h in known.items()})
    even = {h: degree * (i + 1) for i, h in enumerate(distinct)}
    yield Sizes({s: even[h] for s, h in known.items()})
    yield Sizes(dict(known))


def hints(capture: Capture) -> dict[Any, int]:
    """The example's number for every symbol in the inputs' shapes, and a new one for each that only a run knows."""
    found: dict[Any, int] = {}
    for node in capture.graph.nodes:
        val = node.meta.get("val")
        if node.op == "placeholder" and isinstance(val, Tensor):
            for n in val.shape:
                if isinstance(n, torch.SymInt):
                    for symbol in n.node.expr.free_symbols:
                        found[symbol] = _hint(n, symbol)
    known: set[Any] = set()  # the sizes that were looked into
    vals = [node.meta.get("val") for node in capture.graph.nodes]
    of_run = {s: None for val in vals for s in _symbols(val, known) if s not in found}
    free = (p for p in _PRIMES if p not in set(found.values()))
    return found | dict(zip(of_run, free, strict=False))


def _symbols(val: Any, known: set[Any]) -> Iterator[Any]:
    """The symbols of a value's shape, or of a size, in an order that repeats; none of a size that is `known`."""
    sizes: tuple[Any, ...] = tuple(val.shape) if isinstance(val, Tensor) else (val,)
    if isinstance(val, (tuple, list)):
        sizes = tuple(n for v in val if isinstance(v, Tensor) for n in v.shape)
    for n in sizes:
        if isinstance(n, torch.SymInt) and n.node.expr not in known:
            known.add(n.node.expr)
            yield from sorted(n.node.expr.free_symbols, key=str)


def _hint(n: torch.SymInt, symbol: Any) -> int:
    env = n.node.shape_env
    for table in ("backed_var_to_val", "var_to_val"):
        found = getattr(env, table, None)
        if found is not None and symbol in found:
            return int(found[symbol])
    return int(n.node.hint)


def example(capture: Capture) -> Iterator[Sizes]:
    """The example's own sizes."""
    yield Sizes(hints(capture), of_example=True)


def beyond(capture: Capture, constants: Iterable[int], *, computed: bool) -> Iterator[Sizes]:
    """Sizes to compare structure at, which are never run: primes larger than every constant and small sums of them.

    Where the graphs compute sizes from sizes (`computed`), even numbers follow, since s // 2 and (s - 1) // 2 are equal
    at odd s.
    """
    known = hints(capture)
    distinct = sorted(set(known.values()))
    least = 8 * max((n for n in constants if n < ENDLESS), default=1) + 10_000
    primes: list[int] = []
    for i in range(len(distinct)):
        primes.append(int(sympy.nextprime(max(least, (primes or [0])[-1]) + 9973 * (i + 1))))
    for factor in (1, 2) if computed and distinct else (1,):
        large = {h: p * factor for h, p in zip(distinct, primes, strict=True)}
        yield Sizes({s: large[h] for s, h in known.items()})


def short(capture: Capture, cuts: Iterable[int], *, ones: bool) -> Iterator[Sizes]:
    """Sizes at which other things happen than at large ones: on both sides of every number at which a program slices,
    and, where asked, a single element."""
    known = hints(capture)
    distinct = sorted(set(known.values()))
    if distinct and ones:
        yield Sizes(dict.fromkeys(known, 1))
    for cut in sorted(cuts):
        for least in (cut // 2, cut + 1, 2 * cut - 1):
            near = {h: max(least, 2) + i for i, h in enumerate(distinct)}
            yield Sizes({s: near[h] for s, h in known.items()})
