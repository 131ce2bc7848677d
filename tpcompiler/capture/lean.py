"""Makes tracing fast: the shapes of large operators are computed directly.

To torch, `linear`, attention, norms and dropout are composites: it runs their parts on fake tensors to find a shape
that one line gives. The direct way makes capture of a deep model twice as fast. In unusual cases torch decides.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tpcompiler.capture.private_tracing import own_kernels, quick_proxies, view_at_once
from tpcompiler.graphs import same_size

aten = torch.ops.aten


def _all_same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))


def _linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor | None:
    plain = x.ndim >= 1 and w.ndim == 2 and same_size(x.shape[-1], w.shape[1]) and x.dtype == w.dtype
    if not plain or (b is not None and not (_all_same(b.shape, w.shape[:1]) and b.dtype == w.dtype)):
        return None
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    plain = (
        q.ndim == k.ndim == v.ndim == 4
        and q.dtype == k.dtype == v.dtype
        and same_size(q.shape[0], k.shape[0])
        and _all_same(k.shape[:3], v.shape[:3])
        and same_size(q.shape[3], k.shape[3])
        and not (is_causal and attn_mask is not None)
    )
    grouped = (
        enable_gqa and isinstance(q.shape[1], int) and isinstance(k.shape[1], int) and q.shape[1] % k.shape[1] == 0
    )
    if not plain or not (same_size(q.shape[1], k.shape[1]) or grouped):
        return None
    if attn_mask is not None:
        full = (*q.shape[:3], k.shape[2])
        aligned = zip(reversed(attn_mask.shape), reversed(full), strict=False)
        fits = attn_mask.ndim <= 4 and all(n is not None and (same_size(n, 1) or same_size(n, m)) for n, m in aligned)
        if not fits or attn_mask.dtype not in (torch.bool, q.dtype):
            return None
    batch, heads, rows, _ = q.shape
    return q.new_empty((batch, rows, heads, v.shape[3])).transpose(1, 2)  # as the fused kernels lay it out


def _layer_norm(
    x: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor | None:
    return _norm(x, shape, weight, bias)


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor | None:
    return _norm(x, shape, weight)


def _norm(x: Tensor, shape: Any, *scales: Tensor | None) -> Tensor | None:
    if len(shape) > x.ndim or not _all_same(tuple(x.shape[x.ndim - len(shape) :]), tuple(shape)):
        return None
    if any(s is not None and not (_all_same(s.shape, tuple(shape)) and s.dtype == x.dtype) for s in scales):
        return None
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _dropout(x: Tensor, p: float, train: bool) -> Tensor | None:
    return torch.empty_like(x) if train and 0.0 < p < 1.0 else None


_SHAPES: dict[Any, Callable[..., Tensor | None]] = {
    aten.linear.default: _linear,
    aten.scaled_dot_product_attention.default: _attention,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.dropout.default: _dropout,
}


_VIEWS = (aten.transpose.int, aten.unsqueeze.default, aten.t.default)  # not permute: its kernel fixes sizes


def _kernel(op: Any, shape: Callable[..., Tensor | None]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        out = shape(*args, **kwargs)
        return op.decompose(*args, **kwargs) if out is None else out

    return run


def _view(op: Any) -> Callable[..., Any]:
    return partial(view_at_once, op)


@contextmanager
def whole_operators() -> Iterator[None]:
    """Within the block, fake tensors on meta pass through the operators above in one step."""
    kernels = {**{op: _kernel(op, shape) for op, shape in _SHAPES.items()}, **{op: _view(op) for op in _VIEWS}}
    with own_kernels(kernels):
        yield


@contextmanager
def lean_tracing() -> Iterator[None]:
    """Within the block, tracing skips what is not needed here.

    It skips the source text of every intermediate graph, the second record of every value's shape, and garbage
    collection, which would search millions of live objects.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        with quick_proxies():
            yield
    finally:
        if enabled:
            gc.enable()
