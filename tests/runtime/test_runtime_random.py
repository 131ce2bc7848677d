"""Dropout's mask depends on where an element stands in the unsharded run, and on nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tpcompiler.layout import join
from tpcompiler.runtime import Rng, dropout, take
from tpcompiler.runtime.random import philox
from tpcompiler.runtime.runs import Run

Rows = tuple[Run, ...]


def words(*values: int) -> list[Tensor]:
    return [torch.tensor(v) for v in values]


# Known answers of the Random123 library (kat_vectors).
@pytest.mark.parametrize(
    ("word", "rounds", "expected"),
    [
        (0, 7, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        (0, 10, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, 10, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_philox_is_philox(word: int, rounds: int, expected: list[int]) -> None:
    assert [int(w) for w in philox(words(*[word] * 4), words(word, word), rounds)] == expected


@st.composite
def subsets(draw: st.DrawFn, n: int) -> Rows:
    """Rows that a rank may hold of `n`: a part, strided, anything."""
    if draw(st.booleans()):
        start = draw(st.integers(0, n))
        return join(iter([(start, draw(st.integers(start, n)))]))
    return join(iter([(i, i + 1) for i in sorted(draw(st.sets(st.integers(0, n - 1))))]))


def keep(shape: tuple[int, ...], rng: Rng, site: int = 5, p: float = 0.4, **how: Any) -> Tensor:
    """The mask that dropout of ones shows."""
    return dropout(torch.ones(shape), p, True, rng, site, **how) != 0


@given(
    shape=st.lists(st.integers(1, 19), min_size=1, max_size=4).map(tuple),
    batch=st.integers(0, 3),
    data=st.data(),
)
def test_no_layout_changes_the_mask(shape: tuple[int, ...], batch: int, data: st.DataObject) -> None:
    """Any dimensions split any way, any micro-batch, the batch dimension anywhere: the slice of the whole mask."""
    batch_dim = batch % len(shape)
    whole = keep(shape, Rng(3).at(7), batch_dim=batch_dim)
    first = data.draw(st.integers(0, shape[batch_dim] - 1))
    last = data.draw(st.integers(first + 1, shape[batch_dim]))
    expected = whole.narrow(batch_dim, first, last - first)
    rows = []
    for dim, size in enumerate(shape):
        if dim != batch_dim and data.draw(st.booleans()):
            held = data.draw(subsets(size))
            expected = take(expected, dim, held)
            rows.append((dim, size, held))
    mine = keep(tuple(expected.shape), Rng(3).at(7, first), batch_dim=batch_dim, rows=tuple(rows))
    assert torch.equal(mine, expected)


@given(batch=st.integers(1, 4), length=st.integers(1, 5), width=st.integers(1, 20), first=st.integers(0, 3))
def test_rows_of_samples_are_their_samples(batch: int, length: int, width: int, first: int) -> None:
    """A value of shape [(b s), h] has the mask of its [b, s, h], also in a later micro-batch."""
    plain = keep((first + batch, length * width), Rng(3))
    flat = keep((batch * length, width), Rng(3).at(0, first), samples=batch)
    assert flat.shape == (batch * length, width)
    rows = keep(((first + batch) * length, width), Rng(3), samples=first + batch)
    assert torch.equal(flat, rows[first * length :])
    if width % 8 == 0:
        assert torch.equal(flat.flatten(), plain[first:].flatten())


def test_without_a_batch_dimension_samples_do_not_count() -> None:
    one, two = (keep((6, 40), Rng(1).at(0, first), batch_dim=None) for first in (0, 9))
    assert torch.equal(one, two)


@given(p=st.sampled_from([0.0, 0.1, 0.5, 0.93, 1.0]), batch_dim=st.integers(0, 1))
def test_values_and_gradients_are_those_of_the_mask(p: float, batch_dim: int) -> None:
    x = torch.randn(5, 6, 21, dtype=torch.double).transpose(0, 1).requires_grad_()
    y = dropout(x, p, True, Rng(8), 2, batch_dim=batch_dim)
    mask = keep(tuple(x.shape), Rng(8), 2, p, batch_dim=batch_dim)
    scale = mask.double() * (1 / (1 - p) if p < 1 else 0)
    assert torch.equal(y, x * scale)
    u = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, u)
    assert torch.equal(grad, u * scale)


def test_evaluation_draws_nothing() -> None:
    x = torch.randn(3, 4)
    assert dropout(x, 0.5, False, Rng(0), 1) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_has_the_same_mask(dtype: torch.dtype) -> None:
    y = dropout(torch.ones(4, 33, dtype=dtype), 0.4, True, Rng(3), 5)
    assert y.dtype == dtype
    assert torch.equal(y != 0, keep((4, 33), Rng(3)))


def test_a_seed_of_64_bits_counts_as_a_whole() -> None:
    masks = [keep((64, 64), Rng(seed)) for seed in (1, 1 + 2**32, 2**63 + 1, 2**64 - 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


N = 1 << 20


def z(hits: Tensor, p: float) -> float:
    """By how many standard deviations the share of hits differs from `p`."""
    return float((hits.double().mean() - p) / math.sqrt(p * (1 - p) / hits.numel()))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_dropped_is_p(p: float) -> None:
    dropped = ~keep((1024, N // 1024), Rng(11), p=p)
    exact = round(p * 2**16) / 2**16
    assert abs(z(dropped, exact)) < 4
    for dim in (0, 1):  # and nowhere more than elsewhere
        share = dropped.double().mean(dim)
        spread = share.var() / (exact * (1 - exact) / dropped.shape[dim])
        assert abs(float(spread) - 1) < 0.2


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 7, 8, 9, 16, 64, 1000, 1024, 4096])
def test_neighbours_and_strided_elements_are_independent(lag: int) -> None:
    dropped = ~keep((1024, N // 1024), Rng(12), p=0.5).flatten()
    assert abs(z(dropped[lag:] == dropped[:-lag], 0.5)) < 4


def test_lanes_are_independent() -> None:
    """All pairs of the 8 elements that one Philox call serves, and their parity."""
    lanes = ~keep((N // 8, 8), Rng(13), p=0.5)
    for i in range(8):
        for j in range(i):
            assert abs(z(lanes[:, i] == lanes[:, j], 0.5)) < 4.5
    assert abs(z(lanes.sum(1) % 2 == 1, 0.5)) < 4


@pytest.mark.parametrize("what", ["site", "step", "seed", "sample"])
def test_masks_of_other_sites_steps_seeds_and_samples_are_independent(what: str) -> None:
    def mask(i: int) -> Tensor:
        number = dict.fromkeys(["site", "step", "seed", "sample"], 3) | {what: i}
        rng = Rng(number["seed"]).at(number["step"], 64 * number["sample"])
        return keep((64, 1024), rng, number["site"], p=0.5)

    masks = [mask(i) for i in (0, 1, 2, 3, 4, 8, 255, 256, 65535)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs(z(a == b, 0.5)) < 4.5


def test_a_compiled_program_is_compiled_once_for_all_steps_and_sites() -> None:
    rng, compiled = Rng(4), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    def fn(x: Tensor, site: Tensor) -> Tensor:
        return dropout(x, 0.3, True, rng, site)

    fast = torch.compile(fn, backend=backend, fullgraph=True)
    x, sites = torch.randn(4, 50), torch.arange(3)
    for step in range(3):
        rng.at(step, first_sample=2 * step)
        assert torch.equal(fast(x, sites[step]), dropout(x, 0.3, True, rng, step))
    assert len(compiled) == 1


@pytest.mark.nightly
def test_inductor_draws_the_same_bits() -> None:
    rng = Rng(2**40 + 5).at(6, 1000)
    x = torch.randn(6, 33, 50, requires_grad=True)

    def fn(x: Tensor) -> Tensor:
        return dropout(x, 0.3, True, rng, 9, rows=((2, 77, ((3, 40), (60, 73))),))

    fast, plain = torch.compile(fn, fullgraph=True)(x), fn(x)
    assert torch.equal(fast, plain)
    u = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(fast, x, u)[0], torch.autograd.grad(plain, x, u)[0])


@pytest.mark.gpu
def test_gpus_draw_the_same_bits() -> None:
    x, rng = torch.randn(6, 33, 50), Rng(2**40 + 5).at(6, 1000)
    plain = dropout(x, 0.3, True, rng, 9)
    assert torch.equal(dropout(x.cuda(), 0.3, True, rng, 9).cpu(), plain)
    rng.to("cuda")
    assert torch.equal(dropout(x.cuda(), 0.3, True, rng, 9).cpu(), plain)
    assert torch.equal(torch.compile(dropout)(x.cuda(), 0.3, True, rng, 9).cpu(), plain)
