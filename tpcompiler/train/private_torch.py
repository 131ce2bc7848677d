"""What the trainer uses of torch that is not documented as public, in one place.

Each function says which public way was tried. All of it is known to work with torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, fx, nn


def equal_layers_share_a_graph(compiled: bool) -> AbstractContextManager[object]:
    """While this lasts, torch.compile treats the integers of a module as values that may differ between modules.

    Equal layers differ in the number of their dropout, and one graph must do for all of them. Public way tried:
    `torch.compile(dynamic=True)`, which makes the sizes of tensors dynamic too.
    """
    if not compiled:
        return nullcontext()
    patch: AbstractContextManager[object] = torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True)
    return patch


def parameters_here(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own dictionary of parameters, to be changed. Public way tried: `setattr`, which registers a tied
    parameter under one of its names alone."""
    return module._parameters


def buffers_here(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own dictionary of buffers, to be changed. Public way tried: `register_buffer`, which forgets whether
    the buffer is persistent."""
    return module._buffers


def zero_(tensors: Sequence[Tensor]) -> None:
    """All tensors become 0, in few kernels. Public way tried: `zero_` on each, which is one kernel each."""
    torch._foreach_zero_(list(tensors))


def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies, and casts, many tensors in few kernels. Public way tried: `copy_` on each, one kernel each."""
    torch._foreach_copy_(list(targets), list(sources))


def largest_values(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The infinity norm of each tensor. Public way tried: `torch.linalg.vector_norm` on each, one kernel each."""
    return list(torch._foreach_norm(list(tensors), float("inf")))


def is_steady(target: Callable[..., object] | str) -> bool:
    """Whether an operator's sizes do not depend on values. Public way tried: none; tags are on `OpOverload` alone."""
    return not (isinstance(target, torch._ops.OpOverload) and torch.Tag.data_dependent_output in target.tags)


def draws_numbers(target: Callable[..., object] | str) -> bool:
    """Whether an operator may draw from torch's own generator. Public way tried: none, as for `is_steady`."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def depends_on_values(node: fx.Node) -> bool:
    """Whether a size of a node's value is known at run time only. Public way tried: none; torch.export keeps unbacked
    symbols for itself."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    val = node.meta.get("val")
    return val is not None and bool(free_unbacked_symbols(val))
