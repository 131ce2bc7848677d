"""The joined output layer and loss are a product and `F.cross_entropy`, in chunks, whoever holds which classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.runtime.test_runtime_vocab import classes
from tpcompiler.execute.simulate import Executed, executed, run_ranks
from tpcompiler.runtime import Mesh, Ranks, head, linear_cross_entropy, take
from tpcompiler.runtime.runs import Run

Rows = tuple[Run, ...]
WIDTH = 5


def problem(rows: list[Rows], tokens: int, ignored: float, biased: bool) -> tuple[list[Tensor | None], Tensor]:
    n = max(b for r in rows for _, b in r)
    x, weight = torch.randn(tokens, WIDTH, dtype=torch.double), torch.randn(n, WIDTH, dtype=torch.double)
    bias = torch.randn(n, dtype=torch.double) if biased else None
    target = torch.randint(n, (tokens,))
    return [x, weight, bias], target.masked_fill(torch.rand(tokens) < ignored, -100)


def plain(operands: list[Tensor | None], target: Tensor, upstream: float, **how: Any) -> list[Tensor]:
    """The loss, and the gradients of the operands."""
    x, weight, bias = (None if t is None else t.clone().requires_grad_() for t in operands)
    assert x is not None and weight is not None
    loss = F.cross_entropy(F.linear(x, weight, bias), target, **how)
    loss.backward(torch.tensor(upstream).to(loss))
    return [loss.detach(), *(t.grad for t in (x, weight, bias) if t is not None and t.grad is not None)]


def joined(
    operands: list[Tensor | None], target: Tensor, rows: list[Rows], upstream: float, log: Any = None, **how: Any
) -> list[list[Tensor]]:
    """The same of each rank, with the gradients of the classes put together; each rank has a row of padding more."""

    def fn(ranks: Ranks) -> list[Tensor]:
        group = ranks.group("tensor")
        held = rows[group.index]
        x = operands[0].clone().requires_grad_()  # type: ignore[union-attr]
        own = [None if t is None else _padded(take(t, 0, held)).requires_grad_() for t in operands[1:]]
        loss = linear_cross_entropy(x, own[0], target, group, held, own[1], **how)  # type: ignore[arg-type]
        loss.backward(torch.tensor(upstream).to(loss))
        assert x.grad is not None
        return [loss.detach(), x.grad, *(t.grad for t in own if t is not None and t.grad is not None)]

    found = run_ranks(Mesh.of({"tensor": len(rows)}), fn, log)
    whole = []
    for i, t in enumerate(t for t in operands[1:] if t is not None):
        put = torch.zeros_like(t)
        for held, mine in zip(rows, found, strict=True):
            at = torch.tensor([c for a, b in held for c in range(a, b)], dtype=torch.long)
            put.index_copy_(0, at, mine[2 + i][: len(at)])
            assert not mine[2 + i][len(at) :].any()
        whole.append(put)
    return [[*mine[:2], *whole] for mine in found]


def _padded(t: Tensor) -> Tensor:
    return F.pad(t, [0, 0] * (t.dim() - 1) + [0, 1], value=9.0)


@given(
    rows=classes(),
    tokens=st.integers(1, 9),
    chunk=st.integers(1, 9),
    reduction=st.sampled_from(["mean", "sum"]),
    biased=st.booleans(),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
)
def test_loss_and_gradients_are_the_plain_ones(
    rows: list[Rows], tokens: int, chunk: int, reduction: str, biased: bool, ignored: float
) -> None:
    operands, target = problem(rows, tokens, ignored, biased)
    expected = plain(operands, target, 1.7, reduction=reduction)
    log: list[Executed] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CHUNK", chunk)
        found = joined(operands, target, rows, 1.7, log, reduction=reduction)
    for mine in found:
        assert torch.equal(mine[0].nan_to_num(), found[0][0].nan_to_num()), "the same bits on all ranks"
        for a, b in zip(mine, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
    if len(rows) > 1:
        crossed = [(r.kind, r.direction) for r in executed(log)]
        assert crossed == [("all_gather", "forward")] * -(-tokens // chunk) + [("all_reduce", "backward")]


def test_no_chunk_is_waited_for_before_the_next_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def noted(name: str, fn: Any) -> Any:
        def run(*args: Any) -> Any:
            events.append(name)
            return fn(*args)

        return run

    monkeypatch.setattr(head, "CHUNK", 2)
    monkeypatch.setattr(head, "chunk_numbers", noted("begin", head.chunk_numbers))
    monkeypatch.setattr(head, "chunk_losses", noted("end", head.chunk_losses))
    linear_cross_entropy(torch.randn(6, WIDTH, requires_grad=True), torch.randn(4, WIDTH), torch.randint(4, (6,)))
    assert events == ["begin", "begin", "end", "begin", "end", "end"]


@pytest.mark.parametrize("stray", [5, 99, -1])
def test_a_target_that_is_no_class_is_not_a_plausible_loss(stray: int) -> None:
    operands, _ = problem([((0, 3),), ((3, 5),)], 3, 0.0, False)
    found = joined(operands, torch.tensor([0, stray, 4]), [((0, 3),), ((3, 5),)], 1.0)
    assert all(mine[0].isnan() for mine in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, w, y = torch.randn(64, 32), torch.randn(512, 32), torch.randint(512, (64,))
    with torch.autocast("cpu", dtype=dtype):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        loss = linear_cross_entropy(*leaves, y)
        again = [t.clone().requires_grad_() for t in (x, w)]
        expected = F.cross_entropy(F.linear(*again), y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for t in (loss, expected):
        t.backward(torch.tensor(8.0))
    for a, b in zip(leaves, again, strict=True):
        assert a.grad is not None and b.grad is not None
        scale = float(b.grad.abs().max())
        torch.testing.assert_close(a.grad, b.grad, rtol=0.02, atol=4 * torch.finfo(dtype).eps * scale)
    low = linear_cross_entropy(x.to(dtype), w.to(dtype), y)
    assert low.dtype == dtype
    wide = linear_cross_entropy(x.to(dtype), w.to(dtype), y, dtype=torch.float32)
    assert torch.equal(wide, F.cross_entropy(F.linear(x.to(dtype), w.to(dtype)).float(), y))


def test_kept_is_one_tensor_of_the_logits_size_in_their_own_precision() -> None:
    x, w = torch.randn(32, 8, dtype=torch.bfloat16, requires_grad=True), torch.randn(1000, 8, dtype=torch.bfloat16)
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear_cross_entropy(x, w, torch.randint(1000, (32,)))
    assert [(t.shape, t.dtype) for t in kept if t.numel() >= 32 * 1000] == [((32, 1000), torch.bfloat16)]


def test_gradcheck_and_no_gradient_of_what_asks_for_none() -> None:
    x, w, b = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((3, 4), (6, 4), (6,)))
    target = torch.tensor([1, -100, 5])
    assert torch.autograd.gradcheck(lambda *t: linear_cross_entropy(t[0], t[1], target, bias=t[2]), (x, w, b))
    w.requires_grad_(False)
    linear_cross_entropy(x, w, target).backward()
    assert w.grad is None and x.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(x, w, target).requires_grad
