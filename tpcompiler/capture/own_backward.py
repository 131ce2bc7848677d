"""Gradients that a model defines itself, which `torch.export` drops without a word.

While a model is traced, an `autograd.Function` whose backward is the derivative of its forward is traced as that
forward. Reentrant checkpointing is traced as the function that it computes. Any other backward of a model's own, and
any hook on a gradient, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import CheckpointFunction

from tpcompiler.capture.private_tracing import pytree, without_functions, without_modes
from tpcompiler.capture.refusals import CannotTrace
from tpcompiler.graphs import example_size

LARGEST = 2**22  # elements of an operand on which a backward is tried
CLOSE = 1e-6  # relative difference of gradients in float64 that counts as none
DRAWS = 4


@contextmanager
def own_backwards() -> Iterator[None]:
    """Within the block, tracing keeps the gradients that a model defines itself, or raises `CannotTrace`."""
    torchs = Function.apply.__func__  # type: ignore[attr-defined]

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:
            return _recomputed(*args)
        if cls.__module__.partition(".")[0] == "torch":
            return torchs(cls, *args, **kwargs)
        if not _is_derivative(cls, args, torchs):
            raise CannotTrace(
                f"{cls.__name__} has a backward that is not the derivative of its forward, which a trace does not "
                f"keep; write it with detach (x + (value - x).detach()), or as torch.library.custom_op"
            )
        return _forward(cls, args)

    with (
        mock.patch.object(Function, "apply", classmethod(apply)),
        mock.patch.object(Tensor, "register_hook", _refuse_hook),
    ):
        yield


def refuse_hooks(model: nn.Module) -> None:
    """Raises `CannotTrace` if a model has hooks on gradients."""
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise CannotTrace(f"{name or type(module).__name__} has a backward hook, which a trace does not keep")
    for name, p in model.named_parameters():
        if p._backward_hooks:
            raise CannotTrace(f"{name} has a hook on its gradient, which a trace does not keep; remove it")


def _refuse_hook(tensor: Tensor, hook: Any) -> Any:
    raise CannotTrace("a hook on a gradient, which a trace does not keep; scale the gradient with detach instead")


def _recomputed(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
    """Computes what reentrant checkpointing does, which gives no gradient when no operand needs one."""
    needed = any(isinstance(a, Tensor) and a.requires_grad for a in args)
    with torch.set_grad_enabled(needed and torch.is_grad_enabled()):
        return function(*args)


class _Context:
    """Stands for a function's `ctx` while its forward is run as plain torch."""

    saved_tensors: tuple[Any, ...] = ()
    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass

    def mark_non_differentiable(self, *tensors: Any) -> None:
        pass


def _forward(cls: type[Function], args: Any) -> Any:
    forward: Any = cls.forward
    return forward(*args) if cls.setup_context is not Function.setup_context else forward(_Context(), *args)


def _is_derivative(cls: type[Function], args: Any, apply: Callable[..., Any]) -> bool:
    """Whether a function's backward gives the gradients that autograd gives for its forward, at all magnitudes."""
    shapes = [tuple(map(example_size, t.shape)) for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
    if any(torch.Size(s).numel() > LARGEST for s in shapes):
        return False
    with without_modes(), without_functions(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return all(_agree(cls, args, apply) for _ in range(DRAWS))


def _agree(cls: type[Function], args: Any, apply: Callable[..., Any]) -> bool:
    drawn = pytree.tree_map_only(Tensor, _draw, args)
    try:
        mine = _gradients(lambda *a: apply(cls, *a), drawn)
        plain = _gradients(lambda *a: _forward(cls, a), drawn)
    except Exception:  # it writes in place, needs a device, or its forward has no derivative
        return False
    return all(torch.allclose(a, b, rtol=CLOSE, atol=CLOSE, equal_nan=True) for a, b in zip(mine, plain, strict=True))


def _draw(like: Tensor) -> Tensor:
    """Real values for an operand, of all magnitudes and both signs, including zeros."""
    shape = tuple(map(example_size, like.shape))
    if not like.is_floating_point():
        return torch.randint(0, 2, shape, device="cpu").to(like.dtype)
    value = torch.randn(shape, dtype=torch.float64, device="cpu")
    value = value * 10 ** (torch.rand(shape, dtype=torch.float64, device="cpu") * 14 - 9)
    return value.masked_fill(torch.rand(shape, device="cpu") < 0.02, 0.0).requires_grad_()


def _gradients(function: Callable[..., Any], args: Any) -> list[Tensor]:
    """The results, and the operands' gradients for random gradients of the results."""
    leaves = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor) and t.requires_grad]
    with torch.enable_grad():
        results = [t for t in pytree.tree_leaves(function(*args)) if isinstance(t, Tensor)]
    live = [t for t in results if t.requires_grad]
    if not leaves or not live:
        return results
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(t.dtype) for t in live]
    found = torch.autograd.grad(live, leaves, given, allow_unused=True)
    return results + [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]
