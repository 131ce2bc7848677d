"""Takes a call of torch's Python functions apart into ATen calls, recorded once for each kind of operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from tpcompiler.check.terms import Term, keyed
from tpcompiler.check.translate import Translator


class TensorSlot:
    """Stands for the i-th tensor of a call."""

    __slots__ = ("i",)

    def __init__(self, i: int) -> None:
        self.i = i


class Decomposer:
    """Turns Python's calls into terms."""

    def __init__(self, translator: Translator) -> None:
        self.translator = translator

    def call(self, func: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...], terms: Sequence[Term]) -> Any:
        """The terms of a call's result. Among the arguments, `TensorSlot(i)` stands for `terms[i]`."""
        outline = tuple((t.shape, t.dtype) for t in terms)
        graph = _recorded(func, args, kwargs, outline)
        env: dict[fx.Node, Any] = {}
        places = iter(terms)

        def read(a: Any) -> Any:
            if isinstance(a, fx.Node):
                return env[a]
            return tuple(map(read, a)) if isinstance(a, (tuple, list)) else a

        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = next(places)
            elif node.op == "output":
                return read(node.args[0])
            else:
                env[node] = self.translator.call(
                    node.target, read(node.args), {k: read(v) for k, v in node.kwargs.items()}
                )
        raise AssertionError("a graph without an output")


_KNOWN: dict[Any, fx.Graph] = {}  # shared by all programs: what a function of torch calls does not depend on them
_MOST = 8192


def _recorded(func: Any, args: Any, kwargs: Any, outline: Any) -> fx.Graph:
    key = (func, _key(args), _key(kwargs), outline, torch.get_default_dtype())
    if key not in _KNOWN:
        if len(_KNOWN) >= _MOST:
            _KNOWN.clear()
        _KNOWN[key] = _record(func, args, kwargs, outline)
    return _KNOWN[key]


def _record(func: Any, args: Any, kwargs: Any, outline: Any) -> fx.Graph:
    made = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in outline]

    def run(*tensors: Tensor) -> Any:
        def fill(a: Any) -> Any:
            if isinstance(a, TensorSlot):
                return tensors[a.i]
            if isinstance(a, list):
                return list(map(fill, a))
            if isinstance(a, tuple):
                return tuple(map(fill, a))
            return slice(fill(a.start), fill(a.stop), fill(a.step)) if isinstance(a, slice) else a

        with torch.device("meta"):
            return func(*fill(args), **{k: fill(v) for k, v in kwargs})

    graph = make_fx(run, pre_dispatch=True)(*made).graph
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise ValueError(f"{node.target} writes in place")
    return graph


def _key(a: Any) -> Any:
    if isinstance(a, TensorSlot):
        return ("place", a.i)
    if isinstance(a, (tuple, list)):
        return (type(a).__name__, tuple(map(_key, a)))
    if isinstance(a, slice):
        return ("slice", _key(a.start), _key(a.stop), _key(a.step))
    return keyed(a)
