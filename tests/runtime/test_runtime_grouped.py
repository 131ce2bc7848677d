"""Tokens times their experts' matrices: one by one or at once, the same, gradients included."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tpcompiler.runtime import grouped_mm


def one_by_one(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    rows, out = iter(x), []
    for expert, count in enumerate(counts):
        out += [next(rows) @ weight[expert] for _ in range(count)]
    out += [x.new_zeros(weight.shape[2]) for _ in range(len(x) - len(out))]
    return torch.stack(out)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
    st.integers(0, 2),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_rows_meet_the_matrix_of_their_expert(counts: list[int], spare: int, inner: int, outer: int) -> None:
    torch.manual_seed(sum(counts))
    x = torch.randn(sum(counts) + spare, inner, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(counts), inner, outer, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor(counts).cumsum(0).int()
    found, expected = grouped_mm(x, weight, ends), one_by_one(x, weight, counts)
    torch.testing.assert_close(found, expected)
    pull = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, (x, weight), pull),
        torch.autograd.grad(expected, (x, weight), pull, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_torch_may_compile_around_it() -> None:
    """Shapes are known without running it, and its registration is sound."""
    x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.tpcompiler.grouped_mm.default, (x, weight, torch.tensor([2, 5])))
