"""Terms are equal only where values are: normal forms against torch, over random programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tpcompiler.check.normal_form import Forms
from tpcompiler.check.terms import Term
from tpcompiler.check.translate import Translator

aten = torch.ops.aten
LEAVES = {"x": (4, 6), "y": (4, 6), "w": (6, 6), "b": (6,)}
Pair = tuple[Term, Tensor]  # a value as a term, and as numbers


class Both:
    """Every call is made twice: on terms and on numbers."""

    def __init__(self, seed: int = 0) -> None:
        self.translator = Translator(Forms())
        draw = torch.Generator().manual_seed(seed)
        self.values: list[Pair] = []
        for name, shape in LEAVES.items():
            term = self.translator.forms.make("leaf", (name,), shape, torch.float64)
            self.values.append((term, torch.randn(shape, dtype=torch.float64, generator=draw)))

    def call(self, target: Any, *args: Any) -> list[Pair]:
        def side(i: int) -> Any:
            def pick(a: Any) -> Any:
                if isinstance(a, tuple) and a and isinstance(a[0], Term):
                    return a[i]
                if isinstance(a, list):
                    return tuple(map(pick, a)) if i == 0 else [pick(v) for v in a]
                return a

            return tuple(map(pick, args))

        terms, numbers = self.translator.call(target, side(0), {}), target(*side(1))
        if isinstance(numbers, Tensor):
            return [(terms, numbers)]
        return list(zip(terms, numbers, strict=True))


def dim_of(draw: Random, x: Tensor) -> int:
    return draw.randrange(-x.dim(), x.dim())


def reshaped(draw: Random, x: Tensor) -> list[int]:
    """Sizes of as many elements."""
    n, sizes = x.numel(), []
    while n > 1 and len(sizes) < 3:
        size = draw.choice([k for k in range(2, n + 1) if n % k == 0])
        sizes.append(size)
        n //= size
    return [*sizes, n] if n > 1 or not sizes else sizes


def step(draw: Random, both: Both) -> list[Pair]:
    """A random call on values that there are."""
    pair = draw.choice(both.values)
    x = pair[1]
    if x.dim() == 0:
        return both.call(aten.unsqueeze.default, pair, 0)
    d = dim_of(draw, x)
    n = x.shape[d]
    start = draw.randrange(n)
    stop = draw.randrange(start + 1, n + 1)
    alike = [v for v in both.values if v[1].shape == x.shape]
    other = draw.choice(alike)
    calls: list[Callable[[], list[Pair]]] = [
        lambda: both.call(aten.reshape.default, pair, reshaped(draw, x)),
        lambda: both.call(aten.view.default, pair, [*x.shape[:1], -1]) if x.is_contiguous() else [],
        lambda: both.call(aten.transpose.int, pair, d, dim_of(draw, x)),
        lambda: both.call(aten.permute.default, pair, draw.sample(range(x.dim()), x.dim())),
        lambda: both.call(aten.slice.Tensor, pair, d, start, stop, 1),
        lambda: both.call(aten.slice.Tensor, pair, d, start - n, 2**63 - 1, draw.choice([1, 2])),
        lambda: both.call(aten.narrow.default, pair, d, start, stop - start),
        lambda: both.call(aten.select.int, pair, d, start),
        lambda: both.call(aten.unsqueeze.default, pair, d),
        lambda: both.call(aten.squeeze.dim, pair, d),
        lambda: both.call(aten.flatten.using_ints, pair, 0, -1),
        lambda: both.call(aten.cat.default, [pair, other], d),
        lambda: both.call(aten.split.Tensor, pair, draw.randrange(1, n + 1), d),
        lambda: both.call(aten.split_with_sizes.default, pair, [start, n - start], d),
        lambda: both.call(aten.chunk.default, pair, draw.randrange(1, 4), d),
        lambda: both.call(aten.add.Tensor, pair, other),
        lambda: both.call(aten.sub.Tensor, pair, other),
        lambda: both.call(aten.add.Tensor, pair, draw.choice(both.values[3:4])) if x.shape[-1] == 6 else [],
        lambda: both.call(aten.mul.Tensor, pair, draw.choice([2, 0.5])),
        lambda: both.call(aten.div.Tensor, pair, draw.choice([2, 4.0])),
        lambda: both.call(aten.sum.dim_IntList, pair, [d], draw.choice([True, False])),
        lambda: both.call(aten.mean.dim, pair, [d], draw.choice([True, False])),
        lambda: both.call(aten.linear.default, pair, both.values[2]) if x.shape[-1] == 6 else [],
        lambda: both.call(aten.linear.default, pair, both.values[2], both.values[3]) if x.shape[-1] == 6 else [],
        lambda: both.call(aten.matmul.default, pair, both.values[2]) if x.shape[-1] == 6 and x.dim() > 1 else [],
        lambda: both.call(aten.flip.default, pair, [d]),
        lambda: both.call(aten.roll.default, pair, [start], [d]),
        lambda: both.call(aten.repeat_interleave.self_int, pair, 2, d),
        lambda: both.call(aten.clamp.default, pair, -1, 1),
    ]
    return draw.choice(calls)()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_equal_terms_are_equal_values(seed: int) -> None:
    draw, both = Random(seed), Both(seed % 1000)
    for _ in range(60):
        both.values.extend(v for v in step(draw, both) if v[1].numel() and v[1].numel() <= 96)
    found: dict[Term, list[Tensor]] = defaultdict(list)
    for term, number in both.values:
        assert term.shape == tuple(number.shape), term
        assert term.dtype == number.dtype, term
        found[term].append(number)
    for term, numbers in found.items():
        for n in numbers[1:]:
            torch.testing.assert_close(n, numbers[0], rtol=1e-12, atol=1e-12, msg=str(term))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (lambda x, y: x.reshape(2, 2, 6).reshape(4, 6) + y, lambda x, y: y + x),
        (lambda x, y: torch.cat([x, y], 0)[:4], lambda x, y: x),
        (lambda x, y: torch.cat([x[:, :2], x[:, 2:]], 1), lambda x, y: x),
        (lambda x, y: x.transpose(0, 1).transpose(0, 1), lambda x, y: x),
        (lambda x, y: x[1:][:2], lambda x, y: x[1:3]),
        (lambda x, y: x.split(2, 0)[1], lambda x, y: x[2:4]),
    ],
    ids=["sums in any order", "a joined value's part", "parts joined in order", "twice turned", "slices", "split"],
)
def test_what_is_written_otherwise_is_one_term(one: Any, two: Any) -> None:
    both = Both()

    def term(f: Any) -> Term:
        graph = torch.fx.experimental.proxy_tensor.make_fx(f)(both.values[0][1], both.values[1][1]).graph
        env: dict[Any, Any] = {}
        inputs = iter(both.values)
        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = next(inputs)[0]
            elif node.op == "output":
                found: Term = env[node.args[0]]
                return found
            else:
                args = torch.fx.node.map_arg(tuple(node.args), lambda n: env[n])
                env[node] = both.translator.call(node.target, _tuples(args), dict(node.kwargs))
        raise AssertionError

    assert term(one) is term(two)


def _tuples(a: Any) -> Any:
    return tuple(map(_tuples, a)) if isinstance(a, (list, tuple)) else a
