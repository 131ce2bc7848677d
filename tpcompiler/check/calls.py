"""A call without its graph: one operation and its arguments, as each rank calls it or as the model would."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from tpcompiler import runtime
from tpcompiler.layout import Dim, LocalRuns, LocalSize
from tpcompiler.program import Training
from tpcompiler.runtime import Group, Rng

aten = torch.ops.aten
Resolve = Callable[[Any], Any]

WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}
SEED = 20


@dataclass(frozen=True)
class Slot:
    """Stands for the i-th operand."""

    i: int


@dataclass(frozen=True)
class GroupOver:
    """Stands for the communication group over mesh dimensions."""

    names: tuple[str, ...]


class RngSlot:
    """Stands for the random number generator."""


@dataclass(frozen=True, eq=False)
class Call:
    """An operation and its arguments: nested tuples of numbers, `Slot`s, and placeholders for what depends on the rank.

    Equal calls have equal keys.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    key: Any
    by_rank: bool  # some argument depends on the rank
    over: tuple[str, ...] | None  # the mesh dimensions of its communication group; None without one

    @property
    def random(self) -> bool:
        """Whether the result is drawn from torch's own generator."""
        return isinstance(self.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in self.target.tags

    def __str__(self) -> str:
        return str(getattr(self.target, "__name__", self.target)).removeprefix("aten.")


def make_call(target: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> Call:
    found = _leaves(args, kwargs)
    by_rank = any(isinstance(a, (LocalSize, LocalRuns)) for a in found)
    over = next((a.names for a in found if isinstance(a, GroupOver)), None)
    return Call(target, args, kwargs, (target, _key(args), _key(kwargs)), by_rank, over)


def read_call(node: fx.Node, env: Mapping[fx.Node, Any]) -> tuple[Call, tuple[fx.Node, ...]]:
    """Reads a node as a call and its operands. An operand that is a number in `env` becomes a number of the call."""
    operands: dict[fx.Node, Slot] = {}

    def read(a: Any) -> Any:
        if isinstance(a, fx.Node):
            value = env[a]
            if isinstance(value, (int, float, bool)):
                return value
            return operands.setdefault(a, Slot(len(operands)))
        if isinstance(a, (tuple, list)):
            return tuple(map(read, a))
        if isinstance(a, slice):
            return slice(read(a.start), read(a.stop), read(a.step))
        return a

    signature = runtime_signature(node.target)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dict(node.kwargs)
    if signature is None:
        args = read(tuple(node.args))
    else:
        kwargs = by_name(node.target, node.args, node.kwargs)
        if "group" in kwargs:
            kwargs["group"] = GroupOver(tuple(kwargs["group"]))
        if "rng" in signature.parameters:
            kwargs["rng"] = RngSlot
    pairs = tuple((k, read(v)) for k, v in sorted(kwargs.items()) if not (k == "device" and v is None))
    return make_call(node.target, args, pairs), tuple(operands)


def globalise(call: Call) -> Call:
    """The call that a single rank would make, on whole operands."""
    if not call.by_rank and call.over is None and not _has_rows(call):
        return call

    def whole(a: Any) -> Any:
        if isinstance(a, LocalSize):
            return a.dim.size
        if isinstance(a, LocalRuns):
            return ((0, a.dim.size),)
        if isinstance(a, GroupOver):
            return GroupOver(())
        return tuple(map(whole, a)) if isinstance(a, tuple) else a

    pairs = tuple((k, whole(v)) for k, v in call.kwargs)
    if call.target is runtime.gather:
        pairs = tuple(
            (k, (v,) if k == "rows" and isinstance(dict(call.kwargs)["rows"], LocalRuns) else v) for k, v in pairs
        )
    if call.target is runtime.dropout:
        pairs = tuple((k, v) for k, v in pairs if k != "rows")
    return make_call(call.target, whole(call.args), pairs)


def _has_rows(call: Call) -> bool:
    return call.target is runtime.dropout and any(k == "rows" for k, _ in call.kwargs)


def run(
    call: Call,
    tensors: Sequence[Any],
    resolve: Resolve,
    training: bool = False,
    *,
    wide: bool = True,
    device: str = "cpu",
) -> Any:
    """Runs a call on tensors. `resolve` gives this rank's value of what depends on the rank. With `wide`, real dtypes
    become float64."""

    def fill(a: Any) -> Any:
        if isinstance(a, Slot):
            return tensors[a.i]
        if isinstance(a, tuple):
            return tuple(map(fill, a))
        if isinstance(a, torch.dtype):
            return WIDE.get(a, a) if wide else a
        if isinstance(a, Training):
            return fill(a.on if training else a.off)
        if a is RngSlot:
            return Rng(SEED)
        if isinstance(a, (LocalSize, LocalRuns, GroupOver)):
            return resolve(a)
        if isinstance(a, slice):
            return slice(fill(a.start), fill(a.stop), fill(a.step))
        return a

    kwargs = {k: fill(v) for k, v in call.kwargs}
    if makes_tensors(call.target):
        kwargs.setdefault("device", device)
    return call.target(*map(fill, call.args), **kwargs)


def alone(a: Any) -> Any:
    """The `resolve` of `run` for a single rank, which holds everything whole."""
    if isinstance(a, GroupOver):
        return Group()
    if isinstance(a, LocalSize):
        return a.dim.size
    return ((0, a.dim.size),)


def numbers(call: Call) -> set[int]:
    """The integers among the arguments, without those inside lists."""
    return {a for a in (*call.args, *(v for _, v in call.kwargs)) if type(a) is int}


def integers(call: Call) -> set[int]:
    """The integers among the arguments, including those inside lists."""
    return {a for a in _leaves(call.args, call.kwargs) if type(a) is int}


def modes(call: Call) -> list[Training]:
    """The arguments that differ between training and evaluation."""
    return [a for a in _leaves(call.args, call.kwargs) if isinstance(a, Training)]


def substitute(call: Call, change: Mapping[int, int]) -> Call:
    """The call with some of its integers changed."""

    def new(a: Any) -> Any:
        if isinstance(a, tuple):
            return tuple(map(new, a))
        return change.get(a, a) if type(a) is int else a

    return make_call(call.target, new(call.args), new(call.kwargs))


def replaced(call: Call, name: str, value: Any) -> Call:
    """The call with another value for one keyword argument."""
    return make_call(call.target, call.args, tuple((k, value if k == name else v) for k, v in call.kwargs))


def dims_of(call: Call) -> list[Dim]:
    """The dimensions whose local size or rows are arguments of the call."""
    return [a.dim for a in _leaves(call.args, call.kwargs) if isinstance(a, (LocalSize, LocalRuns))]


@cache
def runtime_signature(target: Any) -> inspect.Signature | None:
    """The signature of one of the runtime's operators; None for everything else."""
    if inspect.isfunction(target) and target.__module__.startswith(runtime.__name__ + "."):
        return inspect.signature(target)
    return None


def by_name(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one of the runtime's operators by name. Raises TypeError where its signature does not match."""
    names = _places(target)
    if len(args) <= len(names) and kwargs.keys() <= _names(target) and kwargs.keys().isdisjoint(names[: len(args)]):
        return {**dict(zip(names, args, strict=False)), **kwargs}
    signature = runtime_signature(target)
    assert signature is not None
    return dict(signature.bind(*args, **kwargs).arguments)


@cache
def _places(target: Any) -> tuple[str, ...]:
    signature = runtime_signature(target)
    assert signature is not None
    return tuple(n for n, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)


@cache
def _names(target: Any) -> frozenset[str]:
    signature = runtime_signature(target)
    assert signature is not None
    return frozenset(n for n, p in signature.parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def moves(call: Call) -> bool:
    """Whether the call is an operator of the runtime that may only move a value between ranks: any but dropout."""
    return runtime_signature(call.target) is not None and call.target is not runtime.dropout


@cache
def makes_tensors(target: Any) -> bool:
    """Whether an operation is a factory, which takes a device and no tensor."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    arguments = target._schema.arguments
    return any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments)


def outputs(result: Any) -> list[Tensor]:
    """The tensors of a result: one alone, or several in a list."""
    return [result] if isinstance(result, Tensor) else list(result)


def _leaves(args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> list[Any]:
    """The values inside nested arguments, in order."""
    found: list[Any] = []
    todo: list[Any] = [v for _, v in reversed(kwargs)]
    todo += reversed(args)
    while todo:  # a loop is faster than recursion, and this runs for every call of every layer
        a = todo.pop()
        if isinstance(a, tuple):
            todo += reversed(a)
        else:
            found.append(a)
    return found


def _key(a: Any) -> Any:
    """A hashable stand-in for an argument, different for 1, 1.0 and True."""
    if isinstance(a, tuple):
        return tuple(map(_key, a))
    if isinstance(a, slice):
        return ("slice", _key(a.start), _key(a.stop), _key(a.step))
    if isinstance(a, (bool, float)):
        return (type(a).__name__, repr(a))
    if isinstance(a, Training):
        return ("training", _key(a.on), _key(a.off))
    return a
