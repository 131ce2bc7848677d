"""Draws random operands to run a step on, such that a wrong step shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from tpcompiler.check.calls import outputs
from tpcompiler.check.cones import TensorInfo

SCALES = (1.0, 0.1, 0.01)  # small numbers show a constant like a norm's epsilon; large ones saturate a tanh


def draw(
    given: Sequence[TensorInfo],
    probe: Callable[[list[Tensor]], Any],
    special: set[int],
    seed: int,
    *,
    positive: bool = False,
    mask: int | None = None,
) -> list[Tensor]:
    """Tensors of the operands' shapes, real ones in double precision, on which `probe` succeeds.

    Integers lie below the longest dimension that `probe` accepts as an index, and include the numbers in `special`,
    which the call's arguments name (an ignored class, a padding row). Real numbers are normal, of a scale that the seed
    chooses. They are positive where the result would otherwise be mostly NaN. The operand `mask` gets some -inf. Raises
    the last error of `probe` when no choice succeeds.
    """
    generator = torch.Generator().manual_seed(seed)
    bounds = sorted({n for o in given for n in o.shape} | {2, 1}, reverse=True)
    if not any(_integer(o.dtype) for o in given):
        bounds = bounds[:1]
    error: Exception | None = None
    for bound in bounds:
        for extra in (special, {i for i in special if 0 <= i < bound}, set()):
            tensors = [_tensor(o, bound, extra, SCALES[seed % len(SCALES)], positive, generator) for o in given]
            if mask is not None:
                hidden = torch.rand(tensors[mask].shape, generator=generator) < 0.2
                tensors[mask] = tensors[mask].masked_fill(hidden, float("-inf"))
            try:
                with torch.no_grad():
                    result = probe(tensors)
            except Exception as e:
                error = e
                if not any(_integer(o.dtype) for o in given):
                    break
                continue
            if not positive and _meaningless(result):
                return draw(given, probe, special, seed, positive=True, mask=mask)
            return tensors
    assert error is not None
    raise error


def _integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def _tensor(
    o: TensorInfo, bound: int, special: set[int], scale: float, positive: bool, generator: torch.Generator
) -> Tensor:
    if o.dtype == torch.bool:
        return torch.rand(o.shape, generator=generator) < 0.7
    if _integer(o.dtype):
        n = prod(o.shape)
        spread = torch.randperm(n, generator=generator) + torch.rand(n, generator=generator, dtype=torch.float64)
        out = (spread * bound / n).long().clamp(max=bound - 1).reshape(o.shape)  # spread over the range, even if few
        wanted = sorted(special)[: n // 2]
        out.view(-1)[torch.randperm(n, generator=generator)[: len(wanted)]] = torch.tensor(wanted, dtype=torch.int64)
        return out.to(o.dtype)
    wide = torch.complex128 if o.dtype.is_complex else torch.float64
    if positive and not o.dtype.is_complex:
        return (torch.rand(o.shape, generator=generator, dtype=wide) + 0.5) * scale
    return torch.randn(o.shape, generator=generator, dtype=wide) * scale


def _meaningless(result: Any) -> bool:
    """Whether more than a quarter of a real result is NaN."""
    return any(
        t.is_floating_point() and t.numel() > 0 and bool(t.isnan().float().mean() > 0.25)
        for t in outputs(result)
        if isinstance(t, Tensor)
    )
