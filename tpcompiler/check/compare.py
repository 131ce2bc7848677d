"""Decides whether two tensors are equal, and gives the first example where they are not."""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE, ABSOLUTE = 1e-9, 1e-12
_HUGE = 1e8  # from here on a number is a mask's filling, which does not set the scale of the others


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal shapes and values. Real numbers may differ by the rounding of double precision."""
    if a.shape != b.shape:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return a.dtype == b.dtype and bool(torch.equal(a, b))
    if a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(torch.allclose(a, b, rtol=RELATIVE, atol=rounding(b), equal_nan=True))


def rounding(x: Tensor) -> float:
    """The largest number that rounding alone may leave where zero should be."""
    size = x.detach().abs()
    size = size[size < _HUGE]
    return ABSOLUTE * max(1.0, float(size.mean())) if size.numel() else ABSOLUTE


def difference(got: Tensor, expected: Tensor) -> str:
    """Where two tensors of one shape first differ, in words."""
    if got.shape != expected.shape:
        return f"shape {list(got.shape)}, not {list(expected.shape)}"
    if got.numel() == 0:
        return "no elements"
    if got.is_floating_point() or got.is_complex():
        differs = ~torch.isclose(got, expected.to(got.dtype), rtol=RELATIVE, atol=rounding(expected), equal_nan=True)
    else:
        differs = got != expected
    if not bool(differs.any()):
        return ""
    at = tuple(int(i) for i in differs.nonzero()[0])
    return f"at {list(at)}: {_number(got[at])}, the model's {_number(expected[at])}"


def factor(got: Tensor, expected: Tensor) -> float | None:
    """The number k with `got` = k · `expected`, if there is one."""
    if got.shape != expected.shape or got.numel() < 2 or not got.is_floating_point():
        return None
    norm = float((expected * expected).sum())
    if norm == 0:
        return None
    k = float((got * expected).sum()) / norm
    return k if torch.allclose(got, expected * k, rtol=1e-6, atol=1e-8) else None


def _number(x: Tensor) -> str:
    value = x.item()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
