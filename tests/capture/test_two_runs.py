"""Two runs on meta settle that training and evaluation are alike, and only where they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpcompiler.capture.init import record
from tpcompiler.capture.trace import trace


class Model(nn.Module):
    def __init__(self, does: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.drop, self.norm = nn.Linear(4, 4), nn.Dropout(0.3), nn.BatchNorm1d(4)
        self.does = does

    def forward(self, x: Tensor) -> Any:
        return self.does(self, self.layer(x))


def attention(self: Any, x: Tensor) -> Tensor:
    q = x.unflatten(-1, (2, 2)).unsqueeze(1)
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.1 if self.training else 0.0)


def literal(self: Any, x: Tensor) -> Tensor:
    return x * torch.tensor([1.0, 2.0, 3.0, 4.0] if self.training else [1.0, 2.0, 3.0, 5.0])


def written(self: Any, x: Tensor) -> Tensor:
    """In evaluation dropout gives its operand, and the write changes x."""
    y = F.dropout(x, 0.3, self.training)
    y.view(-1).add_(1)
    return x + y


ALIKE: dict[str, Callable[[Any, Tensor], Any]] = {
    "module": lambda self, x: self.drop(x) + x,
    "function": lambda self, x: F.dropout(x, p=0.2, training=self.training),
    "torch": lambda self, x: torch.dropout(x, 0.2, self.training),
    "branch": lambda self, x: F.dropout(x, 0.2) if self.training else x,
    "attention": attention,
    "literal": lambda self, x: x * torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "tuple": lambda self, x: {"a": (x, None), "b": 3},
}
OTHER: dict[str, Callable[[Any, Tensor], Any]] = {
    "always": lambda self, x: F.dropout(x, 0.2),
    "scale": lambda self, x: x * (2 if self.training else 1),
    "literal": literal,
    "written": written,
    "in place": lambda self, x: F.dropout(x * 1, 0.2, self.training, inplace=True),
    "norm": lambda self, x: self.norm(x),
    "order": lambda self, x: (x, x + 1) if self.training else (x + 1, x),
    "number": lambda self, x: (x, self.training),
    "gradient": lambda self, x: x + (x * 2 if self.training else (x * 2).detach()),
    "dtype": lambda self, x: x.to(torch.bfloat16 if self.training else torch.float32) + 1,
    "alpha": lambda self, x: F.alpha_dropout(x, 0.3, self.training),
    "long": lambda self, x: x * 2 if not self.training and x.shape[0] > 2000 else x,
    "parameter": lambda self, x: F.linear(x, self.layer.weight if self.training else self.layer.weight.clone()),
}


@pytest.mark.parametrize("name", ALIKE)
def test_dropout_alone_makes_no_difference(name: str) -> None:
    assert not evaluated(ALIKE[name])


@pytest.mark.parametrize("name", OTHER)
def test_whatever_else_differs_is_not_settled(name: str) -> None:
    assert evaluated(OTHER[name])


def test_no_grad_in_training_alone_is_not_settled() -> None:
    def does(self: Any, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.training):
            y = x * 2
        return x + y

    assert evaluated(does)


def test_what_a_forward_keeps_in_its_module_is_forgotten() -> None:
    def does(self: Any, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return x * self.calls  # type: ignore[no-any-return]

    assert not evaluated(does)


def evaluated(does: Callable[[Any, Tensor], Any]) -> bool:
    """Whether evaluation was exported for itself, or the model refused because of what training writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trace(record(Model(does)), (torch.randn(3, 4),)).evaluated is not None
