"""The parts of torch without a promise to stay that the runtime and the executors use, each with the public way tried.

Known to work with torch 2.13.0, which the tests run with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = [
    "all_gather",
    "all_reduce",
    "begin_all_gather",
    "begin_all_reduce",
    "finish",
    "is_factory",
    "memory_of",
    "pytree",
    "reduce_scatter",
]

# `pytree`: nested arguments and results, flat and back. There is no `torch.utils.pytree`, and `torch.fx` has only
# `map_arg`, which knows no keys and gives no structure to compare.

# Collectives that torch.compile traces and inductor may overlap. The public `torch.distributed.all_reduce` and its
# like change their argument in place; where torch.compile traces them, it puts these operators and a copy instead.


def all_reduce(x: Tensor, op: str, group: str) -> Tensor:
    """The elementwise "sum" or "max" over the process group of that name."""
    return _wait(torch.ops._c10d_functional.all_reduce(x.contiguous(), op, group))


def begin_all_reduce(x: Tensor, group: str) -> Tensor:
    """An `all_reduce` with "sum" that is under way until `finish`."""
    started: Tensor = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group)
    return started


def begin_all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """An `all_gather` that is under way until `finish`."""
    started: Tensor = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group)
    return started


def finish(x: Tensor) -> Tensor:
    """The result of what was begun."""
    return _wait(x)


def all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """All `size` ranks' tensors of one shape, one after the other along dimension 0."""
    return _wait(torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group))


def reduce_scatter(x: Tensor, size: int, group: str) -> Tensor:
    """This rank's part of the sum, along dimension 0 in `size` equal parts."""
    return _wait(torch.ops._c10d_functional.reduce_scatter_tensor(x.contiguous(), "sum", size, group))


def _wait(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)


def memory_of(t: Tensor) -> int:
    """An identity of a tensor's memory, which its views share. Public way tried: `data_ptr`, which is 0 on meta."""
    return int(t.untyped_storage()._cdata)


def is_factory(target: Any) -> bool:
    """Whether an ATen operator takes a device and no tensor. No public call tells the types of its arguments."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    arguments = target._schema.arguments
    return any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments)
