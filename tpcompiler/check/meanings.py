"""The meaning of ATen's operations as terms: arguments by name, views and sums in normal form.

An operation that is not listed here becomes a term of its own, which is equal only where every argument is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import torch

from tpcompiler.check.normal_form import OPEN, Forms, broadcast
from tpcompiler.check.terms import Term
from tpcompiler.program import Training

Arguments = dict[str, Any]
Meaning = Callable[[Forms, Arguments], Any]
MEANINGS: dict[str, Meaning] = {}
_PLACES = ("device", "pin_memory", "layout", "cudnn_enable", "cudnn_enabled")  # where and by what, not what


def means(*names: str) -> Callable[[Meaning], Meaning]:
    """Registers a function as the meaning of the named operations."""

    def register(meaning: Meaning) -> Meaning:
        for name in names:
            MEANINGS[name] = meaning
        return meaning

    return register


def packet(target: torch._ops.OpOverload) -> str:
    """The name without its overload: `add` for `aten.add.Tensor`. A name of another library is kept whole."""
    name = target._schema.name.removeprefix("aten::")
    return f"bitwise_{name.strip('_')}" if name in ("__and__", "__or__", "__xor__") else name  # Python's operators


def draws(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation draws from torch's own generator with these arguments, in training or in evaluation."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if packet(target) == "scaled_dot_product_attention":
        p = bound(target, args, dict(kwargs))["dropout_p"]
        return bool(p.on or p.off) if isinstance(p, Training) else bool(p)
    return torch.Tag.nondeterministic_seeded in target.tags


@cache
def _schema(target: torch._ops.OpOverload) -> tuple[tuple[str, Any, bool], ...]:
    return tuple(
        (a.name, a.default_value if a.has_default_value() else None, isinstance(a.real_type, torch.NumberType))
        for a in target._schema.arguments
    )


def bound(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Arguments) -> Arguments:
    """Every argument by name, with defaults filled in, except those that only say on which device a tensor lies."""
    out: Arguments = {}
    real = any(isinstance(a, Term) and a.dtype is not None and a.dtype.is_floating_point for a in args)
    for i, (name, default, number) in enumerate(_schema(target)):
        value = args[i] if i < len(args) else kwargs.get(name, default)
        if number and real and type(value) is int:
            value = float(value)  # with real operands torch makes no difference between 2 and 2.0
        if name not in _PLACES:
            out[name] = tuple(value) if isinstance(value, list) else value
    return out


def listed(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


@means("view", "reshape", "_unsafe_view")
def _(f: Forms, a: Arguments) -> Any:
    shape = a.get("size", a.get("shape"))
    return NotImplemented if isinstance(shape, torch.dtype) or shape is None else f.reshape(a["self"], shape)


@means("flatten")
def _(f: Forms, a: Arguments) -> Any:
    x: Term = a["self"]
    if "start_dim" not in a or isinstance(a["start_dim"], str):
        return NotImplemented
    if x.rank == 0:
        return f.reshape(x, (1,))
    first, last = a["start_dim"] % x.rank, a["end_dim"] % x.rank
    return f.reshape(x, (*x.shape[:first], prod(x.shape[first : last + 1]), *x.shape[last + 1 :]))


@means("unflatten")
def _(f: Forms, a: Arguments) -> Any:
    x: Term = a["self"]
    if not isinstance(a["dim"], int):
        return NotImplemented
    d, sizes = a["dim"] % x.rank, tuple(a["sizes"])
    if -1 in sizes:
        sizes = tuple(x.shape[d] // -prod(sizes) if n == -1 else n for n in sizes)
    if prod(sizes) != x.shape[d]:
        raise ValueError(f"{x.shape[d]} rows as {list(sizes)}")
    return f.reshape(x, (*x.shape[:d], *sizes, *x.shape[d + 1 :]))


@means("unsqueeze")
def _(f: Forms, a: Arguments) -> Any:
    x: Term = a["self"]
    d = a["dim"] % (x.rank + 1)
    return f.reshape(x, (*x.shape[:d], 1, *x.shape[d:]))


@means("squeeze")
def _(f: Forms, a: Arguments) -> Any:
    x: Term = a["self"]
    given = a.get("dim")
    if isinstance(given, str) or x.rank == 0:
        return NotImplemented
    dims = range(x.rank) if given is None else [d % x.rank for d in listed(given)]
    return f.reshape(x, tuple(n for d, n in enumerate(x.shape) if n != 1 or d not in dims))


@means("contiguous", "alias", "view_as", "reshape_as", "clone")
def _(f: Forms, a: Arguments) -> Any:
    other = a.get("other")
    return a["self"] if other is None else f.reshape(a["self"], other.shape)


@means("to", "_to_copy", "float", "double")
def _(f: Forms, a: Arguments) -> Any:
    dtype = a.get("dtype")
    laid_out = a.get("memory_format") is not None or a.get("other") is not None
    return f.cast(a["self"], dtype) if isinstance(dtype, torch.dtype) and not laid_out else NotImplemented


@means("transpose", "swapaxes", "swapdims")
def _(f: Forms, a: Arguments) -> Any:
    x: Term = a["self"]
    i, j = (a.get(n, a.get(m)) for n, m in (("dim0", "axis0"), ("dim1", "axis1")))
    assert i is not None and j is not None
    order = list(range(x.rank))
    order[i], order[j] = order[j], order[i]
    return f.permute(x, order)


@means("t", "numpy_T", "mT")
def _(f: Forms, a: Arguments) -> Any:
    x: Term = a["self"]
    return (
        f.permute(x, [*range(x.rank - 2), *reversed(range(max(0, x.rank - 2), x.rank))])
        if x.rank <= 2
        else (NotImplemented)
    )


@means("permute")
def _(f: Forms, a: Arguments) -> Any:
    return f.permute(a["self"], a["dims"])


@means("movedim", "moveaxis")
def _(f: Forms, a: Arguments) -> Any:
    x: Term = a["self"]
    source, target = ([d % x.rank for d in listed(a[n])] for n in ("source", "destination"))
    order: list[int] = [-1] * x.rank
    for s, t in zip(source, target, strict=True):
        order[t] = s
    rest = iter(d for d in range(x.rank) if d not in source)
    return f.permute(x, [next(rest) if d == -1 else d for d in order])


@means("expand", "broadcast_to")
def _(f: Forms, a: Arguments) -> Any:
    return f.expand(a["self"], a["size"])


@means("expand_as")
def _(f: Forms, a: Arguments) -> Any:
    return f.expand(a["self"], a["other"].shape)


@means("broadcast_tensors")
def _(f: Forms, a: Arguments) -> Any:
    shape = broadcast([t.shape for t in a["tensors"]])
    return tuple(f.expand(t, shape) for t in a["tensors"])


@means("arange")
def _(f: Forms, a: Arguments) -> Any:
    start, stop, step, dtype = a.get("start", 0), a["end"], a.get("step", 1), a["dtype"]
    if not all(type(n) is int for n in (start, stop, step)) or step != 1:
        return NotImplemented
    return f.make("arange", (start, stop, dtype), (stop - start,), dtype or torch.int64)


@means("slice")
def _(f: Forms, a: Arguments) -> Any:
    return f.slice(a["self"], a["dim"], a["start"], a["end"]) if a["step"] == 1 else NotImplemented


@means("slice_scatter")
def _(f: Forms, a: Arguments) -> Any:
    """The rows before the written ones, the written rows, and the rows after them, joined."""
    x, src, d = a["self"], a["src"], a["dim"]
    start, stop = a["start"] or 0, OPEN if a["end"] is None else a["end"]
    if a["step"] != 1 or x.dtype != src.dtype or type(start) is not int or type(stop) is not int:
        return NotImplemented
    size = x.shape[d]
    start, stop = (min(max(i + size if i < 0 else i, 0), size) for i in (start, stop))
    if stop - start != src.shape[d]:
        return NotImplemented
    parts = [f.slice(x, d, 0, start)] * (start > 0) + [src] + [f.slice(x, d, stop, size)] * (stop < size)
    return f.cat(parts, d)


@means("narrow")
def _(f: Forms, a: Arguments) -> Any:
    start = a["start"]
    return f.slice(a["self"], a["dim"], start, start + a["length"]) if type(start) is int else NotImplemented


@means("select")
def _(f: Forms, a: Arguments) -> Any:
    x: Term = a["self"]
    if not isinstance(a["dim"], int):
        return NotImplemented
    d = a["dim"] % x.rank
    at = a["index"] + (x.shape[d] if a["index"] < 0 else 0)
    return f.reshape(f.slice(x, d, at, at + 1), (*x.shape[:d], *x.shape[d + 1 :]))


@means("split_with_sizes", "split", "unsafe_split", "split_with_sizes_copy")
def _(f: Forms, a: Arguments) -> Any:
    x: Term = a["self"]
    sizes: Any = a.get("split_sizes", a.get("split_size"))
    if isinstance(sizes, int):
        n, total = sizes, x.shape[a["dim"]]
        if n > total:
            return (f.slice(x, a["dim"], 0, n),)
        sizes = [min(n, total - i) for i in range(0, total, n)] if n else [0]
    return f.split(x, a["dim"], sizes)


@means("tensor_split")
def _(f: Forms, a: Arguments) -> Any:
    x: Term = a["self"]
    if type(a.get("sections")) is not int:
        return NotImplemented
    q, r = divmod(x.shape[a["dim"]], a["sections"])
    return f.split(x, a["dim"], [q + (i < r) for i in range(a["sections"])])


@means("chunk")
def _(f: Forms, a: Arguments) -> Any:
    x: Term = a["self"]
    total = x.shape[a["dim"]]
    n = -(-total // a["chunks"])
    return f.split(x, a["dim"], [min(n, total - i) for i in range(0, total, n)] if n else [0] * a["chunks"])


@means("unbind")
def _(f: Forms, a: Arguments) -> Any:
    x: Term = a["self"]
    d = a["dim"] % x.rank
    return tuple(f.reshape(f.slice(x, d, i, i + 1), (*x.shape[:d], *x.shape[d + 1 :])) for i in range(x.shape[d]))


@means("cat", "concat", "concatenate")
def _(f: Forms, a: Arguments) -> Any:
    parts = a["tensors"]
    dims = {p.rank for p in parts}
    alike = len(dims) == 1 and len({p.dtype for p in parts}) == 1
    return f.cat(parts, a["dim"]) if alike and isinstance(a["dim"], int) else NotImplemented


@means("stack")
def _(f: Forms, a: Arguments) -> Any:
    parts = a["tensors"]
    if len({p.dtype for p in parts}) > 1:
        return NotImplemented
    d = a["dim"] % (parts[0].rank + 1)
    return f.cat([f.reshape(p, (*p.shape[:d], 1, *p.shape[d:])) for p in parts], d)


@means("add", "sub", "rsub")
def _(f: Forms, a: Arguments) -> Any:
    x, y, k = a["self"], a["other"], a["alpha"]
    if isinstance(x, Term) and type(y) is int and y == 0 and k == 1 and not x.dtype.is_floating_point:
        return x if x.dtype != torch.bool else NotImplemented  # positions and nothing
    if not isinstance(x, Term) or not isinstance(y, Term) or isinstance(k, Term):
        return NotImplemented
    return NotImplemented if x.dtype == torch.bool or y.dtype == torch.bool else (x, y, k)


def added(f: Forms, name: str, found: tuple[Term, Term, Any]) -> Term:
    """`add`, `sub` or `rsub` of two values."""
    x, y, k = found
    if name == "rsub":
        x, y = y, x
    return f.sum([(1, x), (k if name == "add" else -k, y)])


def _real(x: Term) -> bool:
    return x.dtype.is_floating_point


@means("mul", "multiply")
def _(f: Forms, a: Arguments) -> Any:
    x, y = a["self"], a["other"]
    if isinstance(x, Term) and y == 1 and (type(y) is int or (type(y) is float and _real(x))):
        return x if x.dtype != torch.bool else NotImplemented  # a number changes no dtype within its kind
    if not isinstance(x, Term) or not isinstance(y, Term) or x.dtype != y.dtype:
        return NotImplemented
    first, second = sorted((x, y), key=lambda t: t.index)
    return f.make("times", (first, second), broadcast([x.shape, y.shape]), x.dtype)


@means("linear")
def _(f: Forms, a: Arguments) -> Any:
    return f.biased(f.linear(a["input"], a["weight"]), a["bias"])


@means("matmul", "mm", "bmm")
def _(f: Forms, a: Arguments) -> Any:
    other: Any = a.get("other", a.get("mat2"))
    return f.matmul(a["self"], other)


@means("addmm", "baddbmm")
def _(f: Forms, a: Arguments) -> Any:
    if a["beta"] != 1 or a["alpha"] != 1:
        return NotImplemented
    first, second = (a.get(n, a.get(m)) for n, m in (("mat1", "batch1"), ("mat2", "batch2")))
    assert first is not None and second is not None
    return f.biased(f.matmul(first, second), a["self"])


@means("mean")
def _(f: Forms, a: Arguments) -> Any:
    dims = a.get("dim")
    return f.mean(a["self"], None if dims is None else listed(dims), bool(a.get("keepdim")), a["dtype"])


@means("sum")
def _(f: Forms, a: Arguments) -> Any:
    dims = a.get("dim")
    return f.total(a["self"], None if dims is None else listed(dims), bool(a.get("keepdim")), a["dtype"])


@means("div", "true_divide")
def _(f: Forms, a: Arguments) -> Any:
    x, y = a["self"], a["other"]
    plain = isinstance(x, Term) and type(y) in (int, float) and a.get("rounding_mode") is None
    return f.make("divided", (x, float(y)), x.shape, x.dtype) if plain and x.dtype.is_floating_point else NotImplemented
