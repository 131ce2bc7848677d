"""Stochastic depth as dropout: a mask of random zeros and ones, divided by the probability of a one, is dropout of
ones.

Models draw the mask in several ways: `bernoulli_(keep)`, `rand(shape) < keep`, `floor(keep + rand(shape))`; and divide
either the mask or what it multiplies. Where a mask chooses between two values, as in `where(rand(n) < p, none, y)`, it
is where dropout of ones gives zeros, and evaluation takes the second value. Dropout's masks are counter-based, so that
all ranks draw the same.
"""

from __future__ import annotations

from math import isclose
from typing import Any

import torch
from torch import fx

from tpcompiler.capture.origins import at
from tpcompiler.errors import ModelError

aten = torch.ops.aten

_ONES: dict[Any, Any] = {  # what makes a tensor that is then drawn into → the same of ones
    aten.empty.memory_format: aten.ones.default,
    aten.zeros.default: aten.ones.default,
    aten.ones.default: aten.ones.default,
    aten.rand.default: aten.ones.default,
    aten.new_empty.default: aten.new_ones.default,
    aten.new_zeros.default: aten.new_ones.default,
    aten.new_ones.default: aten.new_ones.default,
    aten.empty_like.default: aten.ones_like.default,
    aten.zeros_like.default: aten.ones_like.default,
    aten.ones_like.default: aten.ones_like.default,
    aten.rand_like.default: aten.ones_like.default,
}


def paths_as_dropout(graph: fx.Graph) -> None:
    """Rewrites every mask that is divided by the probability of its ones, in place. Others stay, and are refused."""
    for node in list(graph.nodes):
        base, kept = _drawn(node)
        if base is not None and base.target in _ONES:
            for mask, keep in kept:
                _rewrite(graph, base, mask, keep)


def _drawn(node: fx.Node) -> tuple[fx.Node | None, list[tuple[fx.Node, float]]]:
    """What says the shape of a draw, and the masks made of it, each with the probability of a one."""
    if node.target is aten.bernoulli.p:
        base, keep = node.args[:2]
        return base, [(node, keep)] if isinstance(keep, float) else []  # type: ignore[return-value]
    if node.target is aten.uniform.default and tuple(node.args[1:]) in ((), (0,), (0, 1), (0.0, 1.0)):
        return node.args[0], _compared(node)  # type: ignore[return-value]
    if node.target in (aten.rand.default, aten.rand_like.default):
        return node, _compared(node)
    return None, []


def _compared(uniform: fx.Node) -> list[tuple[fx.Node, float]]:
    """The masks made of numbers from [0, 1): those below a number, and the integral parts of sums with one."""
    out = []
    for user in uniform.users:
        number = next((a for a in user.args if isinstance(a, int | float)), None)
        if number is None or not 0 <= number <= 1:
            continue
        if user.target in (aten.lt.Scalar, aten.le.Scalar):
            out.append((user, float(number)))
        elif user.target in (aten.add.Tensor, aten.add.Scalar) and not user.kwargs:
            out += [(u, float(number)) for u in user.users if u.target is aten.floor.default]
    return out


def _rewrite(graph: fx.Graph, base: fx.Node, mask: fx.Node, keep: float) -> None:
    cast = [u for u in mask.users if u.target is aten.to.dtype]
    for node in [mask, *cast]:
        for user in list(node.users):
            if user.target is aten.div.Tensor and user.args[0] is node and _same(user.args[1], keep):
                user.replace_all_uses_with(_dropped(graph, base, user, keep))
            elif user.target is aten.mul.Tensor:
                i = user.args.index(node)
                other: Any = user.args[1 - i]
                if isinstance(other, fx.Node) and other.target is aten.div.Tensor and _same(other.args[1], keep):
                    with graph.inserting_before(user):
                        new = _dropped(graph, base, user, keep, node.meta["val"])
                    user.args = (other.args[0], new)
    for user in list(mask.users):
        if user.target in (aten.where.self, aten.where.ScalarSelf) and user.args[0] is mask:
            with graph.inserting_before(user):
                shown = torch.empty_like(mask.meta["val"], dtype=torch.float32)
                kept = _dropped(graph, base, user, 1 - keep, shown)
                left_out = graph.call_function(aten.eq.Scalar, (kept, 0))
                left_out.meta = {**user.meta, "val": mask.meta["val"]}
            user.args = (left_out, *user.args[1:])
    if keep and any(user.target is aten.mul.Tensor for node in [mask, *cast] for user in node.users):
        raise ModelError(
            f"{at(mask)}: draws random numbers, a mask of zeros and ones that is not divided by the probability of a "
            f"one, {keep}, so that training and evaluation differ in scale; divide by it, or set it to 1"
        )


def _same(a: Any, keep: float) -> bool:
    return isinstance(a, int | float) and isclose(a, keep, rel_tol=1e-9)


def _dropped(graph: fx.Graph, base: fx.Node, like: fx.Node, keep: float, val: Any = None) -> fx.Node:
    val = like.meta["val"] if val is None else val
    with graph.inserting_before(like):
        kwargs = {k: v for k, v in base.kwargs.items() if k not in ("dtype", "memory_format")} | {"dtype": val.dtype}
        ones = graph.call_function(_ONES[base.target], base.args, kwargs)
        new = graph.call_function(aten.dropout.default, (ones, 1 - keep, True))
    for node in (ones, new):
        node.meta = {**like.meta, "val": val}
    return new
