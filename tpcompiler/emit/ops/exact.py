"""Calls as source: in a hand-written form if the tables have one, else as the exact ATen operator."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tpcompiler.emit.ops.arguments import PLACEMENT, Arguments, AtenCall, Speaker
from tpcompiler.emit.ops.idioms import idiom
from tpcompiler.emit.text.expr import ADD, ATOM, COMPARE, MULTIPLY, POWER, UNARY, Expr, binary, call
from tpcompiler.errors import TpcError


def spell(node: fx.Node, arguments: Arguments, speaker: Speaker) -> Expr:
    """The expression that computes `node` from `arguments`, which may differ from the node's own.

    Raises `TpcError` for a target that is neither an ATen operator nor arithmetic on sizes.
    """
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        c = AtenCall(node, arguments, speaker)
        found = idiom(c) if target.namespace == "aten" else None
        return _exact(c) if found is None else found
    operands = [speaker.expr(a) for a in arguments[0]]
    if target in _INFIX:
        return binary(operands[0], _INFIX[target][0], operands[1], _INFIX[target][1])
    if target in _CALLED:
        return call(_CALLED[target], (x.text for x in operands))
    if target in _OTHER:
        return _OTHER[target](*operands)
    raise TpcError(f"{node.name}: no way to write {target} as Python source")


def _exact(c: AtenCall) -> Expr:
    """`torch.ops.aten.name.overload(…)`, for a call without an idiom."""
    takes_tensors = any("Tensor" in str(a.type) for a in c.schema)
    args, positional = [], True
    for a in c.schema:
        if a.name == "device" and not takes_tensors:
            args.append(f"device={c.speaker.device()}")
        elif a.name in c.changed and not (a.name in PLACEMENT and c[a.name] is not None):
            value = c.x(a.name).text
            args.append(value if positional and not a.kwarg_only else f"{a.name}={value}")
        else:
            positional = False
    return call(f"torch.ops.{c.op.namespace}.{c.name}.{c.op._overloadname}", args)


_INFIX: dict[Any, tuple[str, int]] = {
    operator.add: ("+", ADD),
    operator.sub: ("-", ADD),
    operator.mul: ("*", MULTIPLY),
    operator.floordiv: ("//", MULTIPLY),
    operator.truediv: ("/", MULTIPLY),
    operator.mod: ("%", MULTIPLY),
    operator.eq: ("==", COMPARE),
    operator.ne: ("!=", COMPARE),
    operator.lt: ("<", COMPARE),
    operator.le: ("<=", COMPARE),
    operator.gt: (">", COMPARE),
    operator.ge: (">=", COMPARE),
}

_CALLED: dict[Any, str] = {
    torch.sym_max: "max",
    torch.sym_min: "min",
    torch.sym_float: "float",
    torch.sym_int: "int",
    torch.sym_not: "torch.sym_not",
}

_OTHER: dict[Any, Callable[..., Expr]] = {
    operator.pow: lambda a, b: Expr(f"{a.at(ATOM)} ** {b.at(UNARY)}", POWER),
    operator.neg: lambda a: Expr(f"-{a.at(UNARY)}", UNARY),
    operator.getitem: lambda a, b: Expr(f"{a.at(ATOM)}[{b}]"),
}
