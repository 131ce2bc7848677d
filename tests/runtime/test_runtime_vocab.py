"""The vocabulary-parallel loss is `F.cross_entropy`, whatever rank holds which classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tpcompiler.execute.simulate import Executed, run_ranks
from tpcompiler.layout import join
from tpcompiler.runtime import Group, Mesh, Ranks, cross_entropy, take
from tpcompiler.runtime.runs import Run

Rows = tuple[Run, ...]
SHAPES = [(), (1,), (6,), (2, 3), (2, 1, 3)]  # of the target


@st.composite
def classes(draw: st.DrawFn) -> list[Rows]:
    """For each of 1 to 4 ranks, the classes it holds: parts, uneven, strided, none at all."""
    degree, n = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    if draw(st.booleans()):
        return [(Group(degree, r).part(n),) if Group(degree, r).local(n) else () for r in range(degree)]
    owner = draw(st.lists(st.integers(0, degree - 1), min_size=n, max_size=n))
    return [join(iter([(i, i + 1) for i in range(n) if owner[i] == r])) for r in range(degree)]


def sharded(
    logits: Tensor, target: Tensor, rows: list[Rows], upstream: Tensor, slack: int = 0, log: Any = None, **how: Any
) -> tuple[list[Tensor], Tensor]:
    """Each rank's loss, and the gradient of the logits put together; `slack` columns of padding a rank."""
    dim = 1 if target.dim() else 0
    weight = how.pop("weight", None)

    def fn(ranks: Ranks) -> tuple[Tensor, Tensor]:
        group = ranks.group("tensor")
        held = rows[group.index]
        pad = [0, 0] * (logits.dim() - 1 - dim) + [0, slack]
        mine = F.pad(take(logits, dim, held), pad, value=50.0).requires_grad_()
        w = None if weight is None else F.pad(take(weight, 0, held), (0, slack), value=9.0)
        loss = cross_entropy(mine, target, group, held, w, **how)
        loss.backward(upstream)
        assert mine.grad is not None
        return loss.detach(), mine.grad

    results = run_ranks(Mesh.of({"tensor": len(rows)}), fn, log)
    whole = torch.zeros_like(logits)
    for held, (_, grad) in zip(rows, results, strict=True):
        at = torch.tensor([i for a, b in held for i in range(a, b)], dtype=torch.long)
        whole.index_copy_(dim, at, grad.narrow(dim, 0, len(at)))
        assert not grad.narrow(dim, len(at), slack).any()
    return [loss for loss, _ in results], whole


def problem(rows: list[Rows], shape: tuple[int, ...], ignored: float) -> tuple[Tensor, Tensor, int]:
    n = max(b for r in rows for _, b in r)
    logits = torch.randn((shape[0], n, *shape[1:]) if shape else (n,), dtype=torch.double) * 3
    target = torch.randint(n, shape)
    return logits, target.masked_fill(torch.rand(shape) < ignored, -100), n


def plain(logits: Tensor, target: Tensor, upstream: Tensor | None, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = logits.clone().requires_grad_()
    loss = F.cross_entropy(x, target, **how)
    upstream = torch.randn_like(loss) if upstream is None else upstream
    loss.backward(upstream)
    assert x.grad is not None
    return loss.detach(), x.grad, upstream


@given(
    rows=classes(),
    shape=st.sampled_from(SHAPES),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    weighted=st.booleans(),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    slack=st.integers(0, 2),
)
def test_loss_and_gradient_are_the_plain_ones(
    rows: list[Rows],
    shape: tuple[int, ...],
    reduction: str,
    smoothing: float,
    weighted: bool,
    ignored: float,
    slack: int,
) -> None:
    logits, target, n = problem(rows, shape, ignored)
    how: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    how["weight"] = torch.rand(n, dtype=torch.double) if weighted else None
    expected, expected_grad, upstream = plain(logits, target, None, **how)
    losses, grad = sharded(logits, target, rows, upstream, slack, **how)
    for loss in losses:
        assert torch.equal(loss.isnan(), expected.isnan())
        assert torch.equal(loss.nan_to_num(), losses[0].nan_to_num())
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("index", [0, 3, 7, -1])
def test_any_index_can_be_the_ignored_one(index: int) -> None:
    rows: list[Rows] = [((0, 3),), ((3, 5),)]
    logits, target = torch.randn(6, 5, dtype=torch.double), torch.tensor([0, 3, 3, 1, 4, 0])
    target = torch.where(target == 1, index, target)
    expected, expected_grad, upstream = plain(logits, target, None, ignore_index=index, label_smoothing=0.2)
    losses, grad = sharded(logits, target, rows, upstream, ignore_index=index, label_smoothing=0.2)
    torch.testing.assert_close(losses[1], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("stray", [5, 99, -1])
def test_a_target_that_is_no_class_is_not_a_plausible_loss(stray: int) -> None:
    logits, target = torch.randn(3, 5), torch.tensor([0, stray, 4])
    losses, _ = sharded(logits, target, [((0, 3),), ((3, 5),)], torch.ones(3), reduction="none")
    assert losses[0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("value", [float("-inf"), 1e4])
def test_extreme_logits(value: float) -> None:
    """Classes that are ruled out, and logits whose exponentials overflow."""
    logits, target = torch.randn(4, 6, dtype=torch.double), torch.tensor([0, 1, 4, 5])
    logits[:, 2:4] = value
    expected, expected_grad, upstream = plain(logits, target, None)
    losses, grad = sharded(logits, target, [((0, 2),), ((2, 4),), ((4, 6),)], upstream)
    torch.testing.assert_close(losses[0], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    rows: list[Rows] = [((0, 300),), ((300, 512),)]
    logits, target = (torch.randn(64, 512) * 4).to(dtype), torch.randint(512, (64,))
    expected, expected_grad, _ = plain(logits.float(), target, torch.tensor(1.0))
    losses, grad = sharded(logits, target, rows, torch.tensor(1.0, dtype=dtype))
    assert losses[0].dtype == grad.dtype == dtype
    assert torch.equal(losses[0], expected.to(dtype))
    torch.testing.assert_close(grad, expected_grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    with torch.autocast("cpu", dtype=dtype):
        x = logits.clone().requires_grad_()
        loss = cross_entropy(x, target, Group(), ((0, 512),))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


@given(rows=classes(), smoothing=st.sampled_from([0.0, 0.1]), weighted=st.booleans())
def test_two_small_all_reduces_forward_and_none_backward(rows: list[Rows], smoothing: float, weighted: bool) -> None:
    logits, target, n = problem(rows, (5,), 0.0)
    weight = torch.rand(n, dtype=torch.double) if weighted else None
    log: list[Executed] = []
    sharded(logits, target, rows, torch.tensor(1.0).double(), log=log, weight=weight, label_smoothing=smoothing)
    if len(rows) > 1:
        assert [(r.kind, r.op, r.direction) for r in log] == [
            ("all_reduce", "max", "forward"),
            ("all_reduce", "sum", "forward"),
        ]
        assert sum(r.bytes for r in log) <= 8 * (5 * len(target) + 2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction: str) -> None:
    logits = torch.randn(3, 5, 2, dtype=torch.double, requires_grad=True)
    target = torch.randint(5, (3, 2))
    target[0, 0] = -100
    weight = torch.rand(5, dtype=torch.double)

    def fn(x: Tensor) -> Tensor:
        return cross_entropy(x, target, Group(), ((0, 5),), weight, reduction, label_smoothing=0.1)

    assert torch.autograd.gradcheck(fn, (logits,))


def test_nothing_of_the_logits_size_is_kept_but_the_logits() -> None:
    logits = torch.randn(32, 1000, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        cross_entropy(logits, torch.randint(1000, (32,)), Group(), ((0, 1000),))
    large = [t for t in kept if t.numel() >= logits.numel()]
    assert [t.data_ptr() for t in large] == [logits.data_ptr()]
