"""Gradients that a model defines itself are kept, or the model is refused by the line that defines them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tpcompiler.capture import capture
from tpcompiler.errors import ModelError
from tpcompiler.program import Capture
from tpcompiler.verification.source_model import same_as_module


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class BoundedRoot(torch.autograd.Function):
    """The derivative, except where it is very large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.abs().sqrt()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.sign() / (4 * x.abs()).clamp(min=1e-6).sqrt()


class Gelu(torch.autograd.Function):
    """The derivative, worked out by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(1.702 * x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(1.702 * x)
        return grad * (s + 1.702 * x * s * (1 - s))


class Two(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.how == "hook":
            x.register_hook(lambda grad: grad * 2)
        elif self.how == "checkpoint":
            return checkpoint(self.b, x, use_reentrant=True)  # type: ignore[no-any-return]
        elif self.how != "plain":
            x = globals()[self.how].apply(x)
        return self.b(x)  # type: ignore[no-any-return]


def traced(model: nn.Module) -> tuple[Capture, nn.Module, Any]:
    example = (torch.randn(2, 3, 8),)
    return capture(model, example), model, example


@pytest.mark.parametrize("how", ["plain", "checkpoint", "Gelu"])
def test_gradients_are_the_models_own(how: str) -> None:
    cases = same_as_module(*traced(Two(how)), backward=True)
    assert all(c.passed for c in cases), cases


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("Reversal", "Reversal has a backward"),
        ("Rounded", "Rounded has a backward"),
        ("BoundedRoot", "BoundedRoot has a backward"),
        ("hook", "a hook on a gradient"),
    ],
)
def test_other_gradients_are_refused_with_the_line(how: str, said: str) -> None:
    with pytest.raises(ModelError) as e:
        capture(Two(how), (torch.randn(2, 3, 8),))
    assert said in str(e.value) and "test_own_backward.py:" in str(e.value) and "\n" not in str(e.value)


def test_hooks_that_a_model_brings_along_are_refused() -> None:
    on_module, on_parameter = Two("plain"), Two("plain")
    on_module.b.register_full_backward_hook(lambda module, inputs, outputs: None)
    on_parameter.a.weight.register_hook(lambda grad: grad * 2)
    for model, said in ((on_module, "b has a backward hook"), (on_parameter, "a.weight has a hook")):
        with pytest.raises(ModelError, match=said):
            capture(model, (torch.randn(2, 3, 8),))
