"""The operators equal the plain operations they stand for, forward and backward, for any split over any ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tpcompiler.execute.simulate import Executed, run_ranks
from tpcompiler.layout import join
from tpcompiler.runtime import (
    Group,
    Mesh,
    Parameters,
    Ranks,
    enter,
    gather,
    gather_sequence,
    lookup,
    reduce,
    scatter_sequence,
    take,
)
from tpcompiler.runtime.runs import Run

T = TypeVar("T")
Rows = tuple[Run, ...]
SHAPE = (3, 5, 4)


def over(degree: int, fn: Callable[[Group], T], log: list[Executed] | None = None) -> list[T]:
    return run_ranks(Mesh.of({"tensor": degree}), lambda ranks: fn(ranks.group("tensor")), log)


def leaf(x: Tensor) -> Tensor:
    """A leaf that needs a gradient, and in a memory order that is not its own."""
    x = x.detach().clone()
    return x.mT.contiguous().mT.requires_grad_() if x.dim() > 1 else x.requires_grad_()


def runs(indices: list[int]) -> Rows:
    return join(iter([(i, i + 1) for i in sorted(indices)]))


@st.composite
def splits(draw: st.DrawFn, largest: int = 9, shared: bool = True) -> list[Rows]:
    """For each of 2 to 4 ranks, the rows of a dimension it holds: any, uneven, none, strided, some held by several."""
    degree, n = draw(st.integers(2, 4)), draw(st.integers(1, largest))
    kind = draw(st.sampled_from(["parts", "strided", "any"]))
    if kind == "parts":
        group = [Group(degree, i) for i in range(degree)]
        return [(g.part(n),) if g.local(n) else () for g in group]
    if kind == "strided":
        owners = [[i % degree] for i in range(n)]
    else:
        ranks = st.integers(0, degree - 1)
        owners = [draw(st.lists(ranks, min_size=1, max_size=2 if shared else 1)) for _ in range(n)]
    return [runs([i for i in range(n) if r in owners[i]]) for r in range(degree)]


def length(rows: list[Rows]) -> int:
    return max(stop for r in rows for _, stop in r)


def index(rows: Rows) -> Tensor:
    return torch.tensor([i for start, stop in rows for i in range(start, stop)], dtype=torch.long)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_enter_sums_the_gradients_of_what_ranks_do(degree: int) -> None:
    x, w = torch.randn(SHAPE, dtype=torch.double), torch.randn(degree, *SHAPE, dtype=torch.double)

    def fn(group: Group) -> tuple[Tensor, Tensor]:
        mine = leaf(x)
        y = enter(mine, group)
        (y * w[group.index]).sum().backward()
        assert mine.grad is not None
        return y.detach(), mine.grad

    for y, grad in over(degree, fn):
        assert torch.equal(y, x)
        torch.testing.assert_close(grad, w.sum(0), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_reduce_sums_and_hands_each_the_gradient(degree: int) -> None:
    parts, u = torch.randn(degree, *SHAPE, dtype=torch.double), torch.randn(SHAPE, dtype=torch.double)

    def fn(group: Group) -> tuple[Tensor, Tensor]:
        mine = leaf(parts[group.index])
        y = reduce(mine, group)
        (y * u).sum().backward()
        assert mine.grad is not None
        return y.detach(), mine.grad

    results = over(degree, fn)
    for y, grad in results:
        torch.testing.assert_close(y, parts.sum(0), rtol=1e-14, atol=1e-14)
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad, u)


@given(rows=splits(), dim=st.integers(-3, 2))
def test_gather_is_the_inverse_of_take(rows: list[Rows], dim: int) -> None:
    shape = list(SHAPE)
    shape[dim] = length(rows)
    x, u = torch.randn(shape, dtype=torch.double), torch.randn(shape, dtype=torch.double)

    def fn(group: Group) -> tuple[Tensor, Tensor]:
        mine = leaf(take(x, dim, rows[group.index]))
        whole = gather(mine, group, dim, rows)
        (whole * u).sum().backward()
        assert mine.grad is not None
        return whole.detach(), mine.grad

    for r, (whole, grad) in enumerate(over(len(rows), fn)):
        assert torch.equal(whole, x)
        assert torch.equal(grad, u.index_select(dim, index(rows[r])))


@given(rows=splits(), dim=st.integers(-3, 2), more=st.integers(0, 3))
def test_take_is_index_select(rows: list[Rows], dim: int, more: int) -> None:
    shape = list(SHAPE)
    shape[dim] = length(rows) + more
    x = torch.randn(shape, dtype=torch.double)
    for r in rows:
        ours, plain = leaf(x), leaf(x)
        y, z = take(ours, dim, r), plain.index_select(dim, index(r))
        assert torch.equal(y, z)
        u = torch.randn_like(z)
        (y * u).sum().backward()
        (z * u).sum().backward()
        assert ours.grad is not None
        assert plain.grad is not None
        assert torch.equal(ours.grad, plain.grad)


@given(rows=splits(12, shared=False), padding=st.integers(-1, 11), slack=st.integers(0, 2))
def test_lookup_then_reduce_is_embedding(rows: list[Rows], padding: int, slack: int) -> None:
    n = length(rows)
    padding_idx = padding if 0 <= padding < n else None
    weight, ids = torch.randn(n, 3, dtype=torch.double), torch.randint(n, (4, 5))
    plain = leaf(weight)
    expected = F.embedding(ids, plain, padding_idx)
    u = torch.randn_like(expected)
    (expected * u).sum().backward()

    def fn(group: Group) -> tuple[Tensor, Tensor]:
        mine = leaf(F.pad(take(weight, 0, rows[group.index]), (0, 0, 0, slack), value=9.0))
        y = reduce(lookup(mine, ids, rows[group.index], padding_idx), group)
        (y * u).sum().backward()
        assert mine.grad is not None
        return y.detach(), mine.grad

    assert plain.grad is not None
    for r, (y, grad) in enumerate(over(len(rows), fn)):
        assert torch.equal(y, expected)
        assert torch.equal(grad, F.pad(plain.grad[index(rows[r])], (0, 0, 0, slack)))


@given(degree=st.integers(2, 4), size=st.integers(4, 9), dim=st.integers(0, 2))
def test_gather_sequence_backs_with_a_sum(degree: int, size: int, dim: int) -> None:
    shape = list(SHAPE)
    shape[dim] = size
    x, w = torch.randn(shape, dtype=torch.double), torch.randn(degree, *shape, dtype=torch.double)

    def fn(group: Group) -> tuple[Tensor, Tensor, Run]:
        start, stop = group.part(size)
        mine = leaf(x.narrow(dim, start, stop - start))
        whole = gather_sequence(mine, group, dim, size)
        (whole * w[group.index]).sum().backward()
        assert mine.grad is not None
        return whole.detach(), mine.grad, (start, stop)

    for whole, grad, (start, stop) in over(degree, fn):
        assert torch.equal(whole, x)
        torch.testing.assert_close(grad, w.sum(0).narrow(dim, start, stop - start), rtol=1e-14, atol=1e-14)


@given(degree=st.integers(2, 4), size=st.integers(4, 9), dim=st.integers(0, 2))
def test_scatter_sequence_backs_with_the_whole(degree: int, size: int, dim: int) -> None:
    shape = list(SHAPE)
    shape[dim] = size
    parts, u = torch.randn(degree, *shape, dtype=torch.double), torch.randn(shape, dtype=torch.double)

    def fn(group: Group) -> tuple[Tensor, Tensor, Run]:
        start, stop = group.part(size)
        mine = leaf(parts[group.index])
        y = scatter_sequence(mine, group, dim)
        (y * u.narrow(dim, start, stop - start)).sum().backward()
        assert mine.grad is not None
        return y.detach(), mine.grad, (start, stop)

    for y, grad, (start, stop) in over(degree, fn):
        torch.testing.assert_close(y, parts.sum(0).narrow(dim, start, stop - start), rtol=1e-14, atol=1e-14)
        assert torch.equal(grad, u)


@given(heads=st.integers(2, 7), degree=st.integers(2, 4), recompute=st.booleans())
def test_column_then_row_parallel_is_the_mlp(heads: int, degree: int, recompute: bool) -> None:
    """Two layers of Megatron's MLP: equal outputs and gradients, 1 all-reduce a layer and direction.

    Recomputation repeats none: it stops at the last value that backward needs, which comes before the reduction.
    """
    up, down = torch.randn(2, heads, 5, dtype=torch.double), torch.randn(2, 5, heads, dtype=torch.double)
    x = torch.randn(3, 5, dtype=torch.double)
    plain = [leaf(t) for t in (x, up, down)]
    y = plain[0]
    for layer in range(2):
        y = y + torch.tanh(y @ plain[1][layer].T) @ plain[2][layer].T
    y.square().sum().backward()

    def fn(group: Group) -> list[Tensor]:
        start, stop = group.part(heads)
        mine = [leaf(t) for t in (x, up[:, start:stop], down[..., start:stop])]

        def block(y: Tensor, layer: int) -> Tensor:
            h = torch.tanh(enter(y, group) @ mine[1][layer].T)
            return y + reduce(h @ mine[2][layer].T, group)

        z = mine[0]
        for layer in range(2):
            z = checkpoint(block, z, layer, use_reentrant=False) if recompute else block(z, layer)
        z.square().sum().backward()
        return [z.detach()] + [t.grad for t in mine if t.grad is not None]

    log: list[Executed] = []
    results = over(degree, fn, log)
    grads = [t.grad for t in plain]
    for r, (z, *mine) in enumerate(results):
        start, stop = Group(degree, r).part(heads)
        assert grads[0] is not None
        assert grads[1] is not None
        assert grads[2] is not None
        assert torch.equal(z, results[0][0])
        assert torch.equal(mine[0], results[0][1])
        for ours, expected in zip(
            [z, *mine], [y, grads[0], grads[1][:, start:stop], grads[2][..., start:stop]], strict=True
        ):
            torch.testing.assert_close(ours, expected.detach(), rtol=1e-10, atol=1e-12)
    directions = [r.direction for r in log]
    assert (directions.count("forward"), directions.count("backward")) == (2, 2)


def test_a_group_of_one_is_the_plain_program() -> None:
    x, group, log = torch.randn(3, 6, requires_grad=True), Ranks.single().group(), []
    for y in (
        enter(x, group),
        reduce(x, group),
        gather(x, group, 1, [((0, 6),)]),
        gather_sequence(x, group, 1),
        scatter_sequence(x, group, 1),
        take(x, 1, ((0, 6),)),
    ):
        log.append(torch.equal(y, x))
    assert all(log)


def test_parameters_nest_and_honour_contexts() -> None:
    with torch.device("meta"):
        module = Parameters(weight=(3, 4))
        module.inner = Parameters(bias=(2,), scale=())
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
        "weight": (3, 4),
        "inner.bias": (2,),
        "inner.scale": (),
    }
    assert list(module.state_dict()) == ["weight", "inner.bias", "inner.scale"]
    assert all(p.is_meta and p.requires_grad for p in module.parameters())
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert Parameters(weight=(1,)).weight.dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
