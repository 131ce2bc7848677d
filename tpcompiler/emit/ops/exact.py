"""Calls as source: the idiom where the tables have one, else `torch.ops.aten.name.overload(…)`, always exact."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tpcompiler.emit.ops.arguments import PLACEMENT, Call, Says
from tpcompiler.emit.ops.idioms import idiom
from tpcompiler.emit.text.expr import ADD, ATOM, COMPARE, MULTIPLY, POWER, UNARY, Expr, binary, call
from tpcompiler.errors import TpcError


def spell(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], scope: Says) -> Expr:
    """The expression that computes `node` from its arguments (given apart, so that the caller may replace some)."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        c = Call(node, args, kwargs, scope)
        if target.namespace == "aten":
            said = idiom(c)
            if said is not None:
                return said
        return _exact(c)
    if target in _SYMBOLIC:
        return _SYMBOLIC[target](*(scope.expr(a) for a in args))
    raise TpcError(f"{node.name}: no way to write {target} as Python source")


def _exact(c: Call) -> Expr:
    """The very operator, for whatever has no idiom."""
    takes_tensors = any("Tensor" in str(a.type) for a in c.schema)
    args, positional = [], True
    for a in c.schema:
        if a.name == "device" and not takes_tensors:
            args.append(f"device={c.scope.device()}")
        elif a.name in c.changed and not (a.name in PLACEMENT and c[a.name] is not None):
            value = c.scope.expr(c[a.name]).text
            args.append(value if positional and not a.kwarg_only else f"{a.name}={value}")
        else:
            positional = False
    namespace = c.op.namespace
    return call(f"torch.ops.{namespace}.{c.name}.{c.op._overloadname}", args)


_SYMBOLIC: dict[Any, Callable[..., Expr]] = {
    operator.add: lambda a, b: binary(a, "+", b, ADD),
    operator.sub: lambda a, b: binary(a, "-", b, ADD),
    operator.mul: lambda a, b: binary(a, "*", b, MULTIPLY),
    operator.floordiv: lambda a, b: binary(a, "//", b, MULTIPLY),
    operator.truediv: lambda a, b: binary(a, "/", b, MULTIPLY),
    operator.mod: lambda a, b: binary(a, "%", b, MULTIPLY),
    operator.pow: lambda a, b: Expr(f"{a.at(ATOM)} ** {b.at(UNARY)}", POWER),
    operator.neg: lambda a: Expr(f"-{a.at(UNARY)}", UNARY),
    operator.eq: lambda a, b: binary(a, "==", b, COMPARE),
    operator.ne: lambda a, b: binary(a, "!=", b, COMPARE),
    operator.lt: lambda a, b: binary(a, "<", b, COMPARE),
    operator.le: lambda a, b: binary(a, "<=", b, COMPARE),
    operator.gt: lambda a, b: binary(a, ">", b, COMPARE),
    operator.ge: lambda a, b: binary(a, ">=", b, COMPARE),
    operator.getitem: lambda a, b: Expr(f"{a.at(ATOM)}[{b}]"),
    torch.sym_max: lambda a, b: call("max", (a.text, b.text)),
    torch.sym_min: lambda a, b: call("min", (a.text, b.text)),
    torch.sym_float: lambda a: call("float", (a.text,)),
    torch.sym_int: lambda a: call("int", (a.text,)),
    torch.sym_not: lambda a: call("torch.sym_not", (a.text,)),
}
