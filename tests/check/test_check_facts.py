"""What the checker calls certain of operations, held against torch: sums come through what is called linear."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tpcompiler.check.calls import Slot, make_call
from tpcompiler.check.facts import not_linear

aten = torch.ops.aten
IDS = torch.tensor([[2, 0, 1], [1, 1, 2], [0, 2, 2], [2, 1, 0]])

LINEAR: list[tuple[Callable[..., Tensor], tuple[object, ...]]] = [
    (aten.neg.default, ()),
    (aten.sum.dim_IntList, ([-1],)),
    (aten.mean.dim, ([-1],)),
    (aten.cumsum.default, (1,)),
    (aten.mul.Tensor, (torch.randn(6),)),
    (aten.div.Tensor, (torch.rand(6) + 1,)),
    (aten.matmul.default, (torch.randn(6, 5),)),
    (aten.linear.default, (torch.randn(5, 6),)),
    (aten.transpose.int, (0, 1)),
    (aten.slice.Tensor, (-1, 1, 5)),
    (aten.masked_fill.Scalar, (torch.rand(6) < 0.5, 0)),
    (aten.index_select.default, (-1, torch.tensor([0, 5, 5]))),
    (aten.flip.default, ([0],)),
    (aten.tril.default, ()),
    (aten.roll.default, ([2], [1])),
    (aten.detach.default, ()),
    (aten.unflatten.int, (-1, [2, 3])),
    (aten.expand.default, ([2, 4, 3, 6],)),
    (aten.diagonal.default, ()),
]

NOT_LINEAR: list[tuple[Callable[..., Tensor], tuple[object, ...]]] = [
    (aten.relu.default, ()),
    (aten.clamp.default, (-8.0, 8.0)),
    (aten.threshold.default, (5.0, 0.0)),
    (aten.add.Scalar, (1.0,)),
    (aten.masked_fill.Scalar, (torch.rand(6) < 0.5, 1.0)),
    (aten.linear.default, (torch.randn(5, 6), torch.randn(5))),
    (aten.div.Tensor_mode, (torch.rand(6) + 1,)),
    (aten.amax.default, ([-1],)),
    (aten.softmax.int, (-1,)),
    (aten.abs.default, ()),
    (aten.mul.Tensor, (Slot(0),)),
]


@pytest.mark.parametrize(("op", "rest"), LINEAR, ids=lambda x: str(x) if callable(x) else "")
def test_sums_come_through_what_is_called_linear(op: Callable[..., Tensor], rest: tuple[object, ...]) -> None:
    assert not_linear(make_call(op, (Slot(0), *rest), ()), {0}) is None
    x, y = torch.randn(2, 4, 3, 6)
    torch.testing.assert_close(op(x, *rest) + op(y, *rest), op(x + y, *rest), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(op(-3 * x, *rest), -3 * op(x, *rest), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("op", "rest"), NOT_LINEAR, ids=lambda x: str(x) if callable(x) else "")
def test_a_partial_sum_may_not_stand_elsewhere(op: Callable[..., Tensor], rest: tuple[object, ...]) -> None:
    kwargs = (("rounding_mode", "floor"),) if op is aten.div.Tensor_mode else ()
    assert not_linear(make_call(op, (Slot(0), *rest), kwargs), {0}) is not None


def test_a_value_written_into_another_is_partial_when_both_are() -> None:
    for op, rest in ((aten.index_add.default, (0, IDS[0])), (aten.scatter_add.default, (0, IDS))):
        call = make_call(op, (Slot(0), *rest, Slot(1)), ())
        assert not_linear(call, {0, 1}) is None
        assert not_linear(call, {1}) is not None
