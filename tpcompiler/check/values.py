"""The model's values, each once, and those that only the program computes.

Equal calls on equal values are one value, so that a program's node finds the model's by computing the same thing. A
program's node that is the model's by other means (a bias added later, a mean from a sum) becomes a value of its own,
and `equal.py` looks for the model's value that it is.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tpcompiler.check.calls import WIDE, Call, Draws, Slot, make_call, read_call, renumber
from tpcompiler.check.cones import Operand
from tpcompiler.check.sizes import Sizes
from tpcompiler.program import Capture, Parameter
from tpcompiler.runtime import dropout

PARAMETER, BUFFER, INPUT, MADE = "parameter", "buffer", "input", "made"


class Value:
    """One tensor (or a list of them) of the model, or of the program seen as one rank's."""

    __slots__ = (
        "call",
        "constant",
        "index",
        "kind",
        "name",
        "opaque",
        "operands",
        "original",
        "out",
        "stored",
        "users",
    )

    def __init__(
        self, index: int, name: str, kind: str, out: Operand | None, call: Call | None, operands: tuple[Value, ...]
    ) -> None:
        self.index = index
        self.name = name
        self.kind = kind
        self.out = out  # None: a list
        self.call = call
        self.operands = operands
        self.users: list[Value] = []
        self.original = False  # the model's
        self.opaque = False  # not to be computed from its operands: other ranks have a part in it
        self.stored: Tensor | None = None  # a buffer's value
        self.constant: bool = kind == BUFFER if call is None else all(o.constant for o in operands)

    def __repr__(self) -> str:
        return self.name


class Values:
    """Values by the calls that make them."""

    def __init__(self) -> None:
        self.by_key: dict[Any, Value] = {}
        self.constants: list[Value] = []
        self.count = 0

    def add(self, name: str, kind: str, out: Operand | None, call: Call | None, operands: tuple[Value, ...]) -> Value:
        """A value that is not known yet."""
        value = Value(self.count, name, kind, out, call, operands)
        self.count += 1
        for o in dict.fromkeys(operands):
            o.users.append(value)
        if value.constant and call is not None:
            self.constants.append(value)
        return value

    def find(self, call: Call, operands: tuple[Value, ...], out: Operand | None) -> Value:
        """The value of a call: the model's, if it makes that call; a new one if not."""
        call, operands = distinct(call, operands)
        key = ("", call.key, operands)
        value = self.by_key.get(key)
        if value is None:
            value = self.by_key[key] = self.add(f"{call}", MADE, out, call, operands)
        return value

    def item(self, value: Value, i: int, out: Operand | None) -> Value:
        """The i-th of a list."""
        return self.find(make_call(operator.getitem, (Slot(0), i), ()), (value,), out)


class Table(Values):
    """The model's values. Programs add their own."""

    def __init__(self, capture: Capture, sizes: Sizes, sites: Mapping[int, Sequence[tuple[str, Any]]]) -> None:
        super().__init__()
        self.sizes = sizes
        self.sites = sites
        self.drawn = 0  # dropouts so far
        self.batched: dict[int, bool] = {}  # dropouts by site: whether different samples have different masks
        self.by_name: dict[str, Value] = {}
        self.outputs: tuple[Any, ...] = ()
        self.batch = _batch(capture)
        self.samples = None if self.batch is None else sizes(self.batch)
        stored = {p.node: p for p in capture.parameters}
        env: dict[fx.Node, Any] = {}
        for node in capture.graph.nodes:
            if node.op == "output":
                self.outputs = tuple(env[a] if isinstance(a, fx.Node) else a for a in node.args[0])
            elif node.op == "placeholder":
                env[node] = self._placeholder(node, stored.get(node.name))
            else:
                env[node] = self._read(node, env)

    def _placeholder(self, node: fx.Node, parameter: Parameter | None) -> Value | None:
        val = node.meta.get("val")
        if not isinstance(val, Tensor):
            return None
        real = val.is_floating_point() or val.is_complex()
        grad = parameter is not None and not parameter.buffer and parameter.trainable and real
        kind = INPUT if parameter is None else BUFFER if parameter.buffer else PARAMETER
        value = self.add(node.name, kind, Operand(self.sizes.shape(val.shape), val.dtype, grad), None, ())
        value.original = True
        if parameter is not None and parameter.value is not None:
            value.stored = parameter.value.to(WIDE.get(parameter.dtype, parameter.dtype))
        self.by_name[node.name] = value
        return value

    def _read(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if isinstance(node.meta.get("val"), (torch.SymInt, int)) and not isinstance(node.meta.get("val"), bool):
            return self.sizes(node.meta["val"])
        call, given = read_call(node, env)
        if call.target is torch.ops.aten.dropout.default:
            self.batched[self.drawn] = _has(node.meta["val"].shape, self.batch)
            call = self._counted(call)
        call, operands = distinct(call, tuple(env[n] for n in given))
        val = node.meta.get("val")
        grad = any(o.out is None or o.out.grad for o in operands)
        out = Operand(self.sizes.shape(val.shape), val.dtype, grad) if isinstance(val, Tensor) else None
        key = (node.name if call.random else "", call.key, operands)
        value = self.by_key.get(key)
        if value is None:
            value = self.by_key[key] = self.add(node.name, MADE, out, call, operands)
            value.original = True
            if call.random:
                self.by_key.setdefault(("", call.key, operands), value)
        self.by_name[node.name] = value
        return value

    def _counted(self, call: Call) -> Call:
        """The model's k-th dropout is the program's at site k; a mask is a function of the site and the place in it."""
        x, p, training = call.args
        site, self.drawn = self.drawn, self.drawn + 1
        counted = dict(self.sites.get(site, ()))
        if "samples" in counted:  # rows of several samples: the model's own number of them, not what the program says
            counted["samples"] = self.samples
        given = {"x": x, "p": p, "training": training, "rng": Draws, "site": site, **counted}
        return make_call(dropout, (), tuple(sorted(given.items())))


def _batch(capture: Capture) -> Any:
    """How many samples a batch has: dimension 0 of the first input."""
    for node in capture.graph.nodes:
        if node.op == "placeholder" and node.name in capture.inputs[:1] and node.meta["val"].dim():
            return node.meta["val"].shape[0]
    return None


def _has(shape: Sequence[Any], batch: Any) -> bool:
    """Whether a shape depends on an open number of samples."""
    if not isinstance(batch, torch.SymInt):
        return False
    found = {symbol for n in shape if isinstance(n, torch.SymInt) for symbol in n.node.expr.free_symbols}
    return batch.node.expr in found


def distinct(call: Call, operands: tuple[Value, ...]) -> tuple[Call, tuple[Value, ...]]:
    """The call with each value among its operands once."""
    order = {v: i for i, v in enumerate(dict.fromkeys(operands))}
    if len(order) == len(operands):
        return call, operands
    return renumber(call, [order[v] for v in operands]), tuple(order)


def own_values(value: Value) -> set[Value]:
    """The values that only the program computes, on the way from the model's to this one."""
    found: set[Value] = set()
    todo = [value]
    while todo:
        v = todo.pop()
        if v not in found and not v.original and v.call is not None:
            found.add(v)
            todo.extend(v.operands)
    return found


def leaves(value: Value) -> tuple[Value, ...]:
    """The model's values from which the program computes one of its own; in order of appearance."""
    found: dict[Value, None] = {}
    seen: set[Value] = set()

    def visit(v: Value) -> None:
        if v in seen:
            return
        seen.add(v)
        if v.original or v.call is None:
            found[v] = None
        else:
            for o in v.operands:
                visit(o)

    visit(value)
    return tuple(found)
