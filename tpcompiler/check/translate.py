"""Turns calls into terms: ATen's operations, and the runtime's operators as a single rank would run them."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config

from tpcompiler import runtime
from tpcompiler.check.calls import GroupOver, by_name, runtime_signature
from tpcompiler.check.meanings import MEANINGS, added, bound, draws, packet
from tpcompiler.check.normal_form import Forms, OpenDtype
from tpcompiler.check.terms import Term, keyed
from tpcompiler.layout import LocalRuns, LocalSize
from tpcompiler.program import Training

aten = torch.ops.aten


_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
_SAME = (runtime.enter, runtime.cut_batch, runtime.join_batch)  # the value as it is


class Translator:
    """Turns calls into terms. The runtime's operators mean what they do on a single rank, which holds all rows."""

    def __init__(self, forms: Forms) -> None:
        self.forms = forms
        self._inferred: dict[Any, Any] = {}
        self.drawn: list[Term] = []  # what comes from torch's own generator, in order
        self._draws: Counter[Any] = Counter()

    def restart(self) -> None:
        """Begins to read another graph: its draws are numbered from the first again."""
        self.drawn, self._draws = [], Counter()

    def call(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any], known: Any = None) -> Any:
        """The result of a call: a term, a tuple of terms, or a number. `known` has its shapes and dtypes, if given."""
        if target is operator.getitem and isinstance(args[0], (tuple, Term)):
            return self.item(args[0], args[1])
        if isinstance(target, torch._ops.OpOverload):
            if target is aten.sym_size.int:
                return args[0].shape[args[1]]
            return self.aten(target, args, kwargs, known)
        if runtime_signature(target) is not None:
            return self.runtime(target, by_name(target, args, kwargs), known)
        if not any(isinstance(a, Term) for a in args):
            return target(*args, **kwargs)  # a size computed from sizes
        raise ValueError(f"{getattr(target, '__name__', target)} is not an operation that a program may call")

    def item(self, value: Any, i: int) -> Any:
        if isinstance(value, tuple):
            return value[i]
        assert value.items is not None
        shape, dtype = value.items[i]
        return self.forms.make("item", (value, i), shape, dtype)

    def aten(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any], known: Any = None) -> Any:
        """An operation of ATen in normal form, or a term of its own."""
        name, given = packet(target), bound(target, args, kwargs)
        if name in _CONVOLUTIONS and given["bias"] is not None:
            product = self.aten(target, *_without_bias(target, args, kwargs), known)
            bias = self.forms.reshape(given["bias"], (*given["bias"].shape, *[1] * (product.rank - 2)))
            return self.forms.biased(product, bias)
        meaning = MEANINGS.get(name)
        if meaning is not None:
            self.forms.known = tuple(known.shape) if isinstance(known, Tensor) else None
            found = meaning(self.forms, given)
            if found is not NotImplemented:
                if isinstance(found, tuple) and name in ("add", "sub", "rsub"):
                    try:
                        return added(self.forms, name, found)
                    except OpenDtype:
                        found = NotImplemented
                else:
                    return found
        return self.own(name, tuple(given.items()), known, lambda: (target, args, kwargs))

    def own(self, op: str, args: tuple[Any, ...], known: Any, call: Callable[[], Any]) -> Any:
        """A term without a normal form. Its shape is the one in `known`, or is found by running the call on meta. Two
        draws of random numbers from equal operands are two terms."""
        random = draws(*call())
        if random:
            number = self._draws[op, keyed(args)]
            self._draws[op, keyed(args)] += 1
            args = (*args, ("draw", number))
        found = self.forms.find(op, args)
        if found is None:
            described = described_value(known) if known is not None else self.infer(*call())
            if isinstance(described, list):
                found = self.forms.make(op, args, None, None, tuple(described))
            else:
                found = self.forms.make(op, args, *described)
        if random:
            self.drawn.append(found)
        return found if found.items is None else tuple(self.item(found, i) for i in range(len(found.items)))

    def infer(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The shape and dtype of a call's result, found by running it on meta tensors."""
        key = (target, keyed(_outline(tuple(args))), keyed(_outline(tuple(sorted(kwargs.items())))))
        if key not in self._inferred:

            def fill(a: Any) -> Any:
                if isinstance(a, Term):
                    return torch.empty(a.shape, dtype=a.dtype, device="meta")
                if isinstance(a, (tuple, list)):
                    return tuple(map(fill, a))
                return fill(a.on) if isinstance(a, Training) else a

            given = {k: fill(v) for k, v in kwargs.items()}
            if isinstance(target, torch._ops.OpOverload) and any(a.name == "device" for a in target._schema.arguments):
                given["device"] = "meta"
            self._inferred[key] = described_value(target(*map(fill, args), **given))
        return self._inferred[key]

    # -- the runtime's operators, on one rank alone -----------------------------------------------------------------

    def runtime(self, target: Any, a: dict[str, Any], known: Any) -> Any:
        """The meaning of one of the runtime's operators on whole values."""
        f = self.forms
        if target in (*_SAME, runtime.reduce, runtime.scatter_sequence):
            return a["x"]
        if target is runtime.gather_sequence:
            self._long(a.get("size"), a["x"].shape[a["dim"]])
            return a["x"]
        if target in (runtime.take, runtime.gather):
            self._rows(a["rows"], a["x"].shape[a["dim"]])
            return a["x"]
        if target is runtime.dropout:
            return f.dropout(a["x"], a["p"], mode_of(a["training"]), a["site"])
        if target is runtime.lookup:
            self._rows(a["rows"], a["weight"].shape[0])
            if a.get("size") is not None:
                self._long(a["size"], a["weight"].shape[0])
                return self.call(aten.index.Tensor, (a["weight"], (a["ids"],)), {})
            padding = a.get("padding_idx")
            return self.call(aten.embedding.default, (a["weight"], a["ids"], -1 if padding is None else padding), {})
        if target is runtime.rms_norm:
            args: tuple[Any, ...] = (a["x"], (a["size"],), a.get("weight"), a.get("eps"))
            self._long(a["size"], a["x"].shape[-1])
            return self.call(aten.rms_norm.default, args, {})
        if target is runtime.layer_norm:
            self._long(a["size"], a["x"].shape[-1])
            vectors = (a.get("weight"), a.get("bias"), a.get("eps", 1e-5))
            return self.call(aten.layer_norm.default, (a["x"], (a["size"],), *vectors), {}, None)
        if target is runtime.cross_entropy:
            self._rows(a["rows"], a["logits"].shape[min(1, a["logits"].rank - 1)])
            return self._loss(a)
        if target is runtime.linear_cross_entropy:
            return self._head(a)
        if target is runtime.entered_linear:
            pairs = zip(a["weights"], a["biases"], strict=True)
            return tuple(self.call(aten.linear.default, (a["x"], w, b), {}) for w, b in pairs)
        return self.own(f"runtime.{target.__name__}", tuple(sorted(a.items())), known, lambda: (target, (), a))

    def _loss(self, a: dict[str, Any]) -> Any:
        if a["target"].dtype.is_floating_point:
            raise ValueError("the loss for class probabilities cannot be computed on split classes")
        kind = ("none", "mean", "sum").index(a.get("reduction", "mean"))
        rest = (a.get("ignore_index", -100), float(a.get("label_smoothing", 0.0)))
        return self.call(aten.cross_entropy_loss.default, (a["logits"], a["target"], a.get("weight"), kind, *rest), {})

    def _head(self, a: dict[str, Any]) -> Any:
        """The product, a row a token, in the dtype that the call says, and the loss of it."""
        made = self.call(aten.linear.default, (a["x"], a["weight"], a.get("bias")), {})
        if a["target"].rank != 1:
            raise ValueError("the targets are not one a token")
        logits = self.forms.reshape(made, (-1, made.shape[-1]))
        if a.get("rows") is not None:
            self._rows(a["rows"], made.shape[-1])
        if a.get("dtype") is not None:
            logits = self.forms.cast(logits, a["dtype"])
        given: dict[str, Any] = {k: a[k] for k in ("target", "reduction", "ignore_index") if k in a}
        return self._loss(given | {"logits": logits})

    def _rows(self, rows: Any, size: int) -> None:
        if not isinstance(rows, LocalRuns):
            raise ValueError("the rows do not come from a layout")
        self._long(rows.dim.size, size)

    def _long(self, said: Any, size: int) -> None:
        if said is not None and said != size:
            raise ValueError(f"the call says that there are {said} rows, and there are {size}")


def all_nonzero() -> AbstractContextManager[None]:
    """While it lasts, `nonzero` of a tensor without values has as many rows as it can have: graph and source alike."""
    found: AbstractContextManager[None] = _config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
    return found


def _without_bias(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """A call's arguments with None for its bias."""
    at = [a.name for a in target._schema.arguments].index("bias")
    placed = at < len(args)
    return [None if placed and i == at else a for i, a in enumerate(args)], kwargs | ({} if placed else {"bias": None})


def mode_of(a: Any) -> Any:
    """An argument that may depend on the mode. One that is the same in both modes becomes a plain value."""
    if isinstance(a, Training):
        return a.on if keyed(a.on) == keyed(a.off) else a
    return a


def described_value(value: Any) -> Any:
    """A value's (shape, dtype), or the list of them for several values."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return [(tuple(v.shape), v.dtype) for v in value]


def whole_argument(a: Any) -> Any:
    """An argument as a single rank would have it."""
    if isinstance(a, LocalSize):
        return a.dim.size
    return mode_of(a)


def _outline(a: Any) -> Any:
    if isinstance(a, Term):
        return (a.shape, a.dtype)
    if isinstance(a, (tuple, list)):
        return tuple(map(_outline, a))
    return a


__all__ = ["GroupOver", "Translator", "described_value", "mode_of", "whole_argument"]
