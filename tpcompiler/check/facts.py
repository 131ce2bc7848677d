"""Facts about operations, written independently of the compiler's own table.

* `_LINEAR` lists the arguments in which an operation is linear while the others are whole. Only these may be partial
  sums.
* A random operation may not make a value that several ranks hold: each would draw numbers of its own, and the copies
  would differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tpcompiler import runtime
from tpcompiler.check.calls import Call, Slot
from tpcompiler.check.meanings import bound, packet

MOVES = frozenset(
    """view reshape _unsafe_view flatten unflatten unsqueeze squeeze contiguous alias view_as reshape_as clone transpose
    swapaxes swapdims t numpy_T mT permute movedim moveaxis expand broadcast_to expand_as slice narrow select
    split_with_sizes split unsafe_split chunk tensor_split unbind cat concat concatenate stack repeat repeat_interleave
    flip roll tile
    constant_pad_nd pad tril triu diagonal""".split()
)
ALL = "all"  # linear in all of its tensors together
_LINEAR: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(MOVES - {"constant_pad_nd", "pad", "cat", "concat", "concatenate", "stack"}, ("self",)),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), (ALL,)),
    **dict.fromkeys(("add", "sub", "rsub"), (ALL,)),
    **dict.fromkeys(
        ("neg", "sum", "mean", "cumsum", "index_select", "index", "gather", "detach", "conj", "real", "imag"), ("self",)
    ),
    **dict.fromkeys(("view_as_real", "view_as_complex", "take_along_dim"), ("self",)),
    **dict.fromkeys(("mul", "multiply", "mm", "matmul", "bmm"), ("self", "other", "mat2")),
    **dict.fromkeys(("div", "true_divide"), ("self",)),
    "linear": ("input", "weight"),
    "dot": ("self", "tensor"),
    "outer": ("self", "vec2"),
    "embedding": ("weight",),
    "masked_fill": ("self",),
    **dict.fromkeys(("index_add", "scatter_add", "slice_scatter", "select_scatter", "index_put"), (ALL,)),
    **dict.fromkeys(("to", "_to_copy", "type_as", "float", "double"), ("self",)),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), ("input", "weight")),
    "einsum": ("tensors",),
}
_ADDENDS = ("self", "other", "tensors", "source", "src", "values")  # those that such an operation is linear in
_PARTIAL_OPERATORS = {
    runtime.reduce: "x",
    runtime.scatter_sequence: "x",
    runtime.dropout: "x",
    runtime.take: "x",
    runtime.grouped_mm: "x",
}


def named(call: Call) -> dict[str, Any]:
    """The call's arguments by name."""
    if isinstance(call.target, torch._ops.OpOverload):
        return bound(call.target, call.args, dict(call.kwargs))
    return dict(call.kwargs)


def _slots(a: Any) -> set[int]:
    if isinstance(a, Slot):
        return {a.i}
    return set().union(*map(_slots, a)) if isinstance(a, tuple) else set()


def not_linear(call: Call, partial: set[int]) -> str | None:
    """Why these operands of a call may not be partial sums; None when they may."""
    given = named(call)
    where = {name for name, a in given.items() if _slots(a) & partial}
    if not isinstance(call.target, torch._ops.OpOverload):
        allowed = _PARTIAL_OPERATORS.get(call.target)
        return None if where == {allowed} else f"{call} is not known to be linear in {', '.join(sorted(where))}"
    name = packet(call.target)
    linear = _LINEAR.get(name, ())
    if ALL in linear:
        values = {i for k in _ADDENDS for i in _slots(given.get(k))}
        scalar = any(isinstance(given.get(k), (int, float)) and given.get(k) != 0 for k in _ADDENDS)
        return None if values == partial and not scalar else f"{call} adds a whole value to a partial sum"
    if len(where) != 1 or not where <= set(linear):
        return f"{call} is not linear in {', '.join(sorted(where))}"
    (at,) = where
    if len(_slots(given[at]) & partial) > 1:
        return f"{call} multiplies two partial sums"
    if name == "masked_fill" and given.get("value") != 0:
        return f"{call} writes a number into a partial sum on every rank"
    if name in ("div", "true_divide") and given.get("rounding_mode") is not None:
        return f"{call} rounds a partial sum"
    if given.get("bias") is not None:
        return f"{call} adds its bias on every rank"
    return None
