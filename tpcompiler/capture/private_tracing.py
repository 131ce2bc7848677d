"""What capture uses of torch that is not documented as public, and what it patches there, in one place.

Each function says which public way was tried. All of it is known to work with torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental import proxy_tensor
from torch.nn.modules import transformer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tpcompiler.runtime.private_apis import memory_of, pytree

__all__ = [
    "TorchDispatchMode",
    "as_in_export",
    "memory_of",
    "own_kernels",
    "pytree",
    "quick_proxies",
    "view_at_once",
    "without_functions",
    "without_modes",
    "without_peeks_at_masks",
]

# `TorchDispatchMode` sees the operators below autograd. Public way tried: `torch.overrides.TorchFunctionMode`, which
# sees `F.linear` in a model's own words and never what a composite is made of.
# `memory_of` and `pytree` are those of the runtime.

_META = torch._C.DispatchKey.AutogradMeta


def without_modes() -> AbstractContextManager[object]:
    """While it lasts, no mode sees an operator. Public way tried: none; modes are left in order."""
    modes: AbstractContextManager[object] = _disable_current_modes()
    return modes


def without_functions() -> AbstractContextManager[object]:
    """While it lasts, no `TorchFunctionMode` sees a call. Public way tried: `torch.overrides.BaseTorchFunctionMode`,
    which adds a mode that does nothing and lets the others see the call all the same."""
    functions: AbstractContextManager[object] = torch._C.DisableTorchFunction()
    return functions


@contextmanager
def as_in_export() -> Iterator[None]:
    """While it lasts, `torch.compiler.is_exporting()` is true, so that a model takes the path that an export traces.
    Public way tried: none; only `torch.export` itself sets the flags."""
    with (
        mock.patch.object(torch.compiler, "_is_compiling_flag", True),
        mock.patch.object(torch.compiler, "_is_exporting_flag", True),
    ):
        yield


@contextmanager
def quick_proxies() -> Iterator[None]:
    """While it lasts, a trace writes no source text of intermediate graphs and no second record of every shape. Public
    way tried: none; `torch.export` has no switch for either."""
    with _use_lazy_graph_module(True), mock.patch.object(proxy_tensor, "_extract_tensor_metadata", _nothing):
        yield


@contextmanager
def own_kernels(kernels: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """While it lasts, each of these operators runs a kernel of ours on fake tensors of meta, below autograd. Public way
    tried: `torch.library.impl`, which cannot be undone and does not reach a composite before it is taken apart."""
    mine = [op for op in kernels if _META not in op.py_kernels]
    for op in mine:
        op.py_impl(_META)(kernels[op])
    try:
        yield
    finally:
        for op in mine:
            del op.py_kernels[_META]
            op._dispatch_cache.clear()


def view_at_once(op: Any, x: FakeTensor, *args: Any, **kwargs: Any) -> FakeTensor:
    """A view of a fake tensor, by the operator's kernel itself. Public way tried: calling `op`, which finds the view in
    a cache of torch's and then sets its storage twice. A tensor that a model holds in a list of its own is not fake."""
    if not isinstance(x, FakeTensor):
        with torch._C._AutoDispatchBelowAutograd():
            return op(x, *args, **kwargs)
    with in_kernel_invocation_manager(x.fake_mode):
        with torch._C._AutoDispatchBelowAutograd(), torch._C._DisablePythonDispatcher():
            out = op(x, *args, **kwargs).detach()
    return FakeTensor(x.fake_mode, out, x.device)


def without_peeks_at_masks() -> AbstractContextManager[object]:
    """While it lasts, `nn.Transformer` does not look whether a mask that it is given is the causal one: it believes its
    caller. Public way tried: `is_causal=True`, which models do not pass."""
    return mock.patch.object(transformer, "_detect_is_causal_mask", _believed)


def _believed(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
