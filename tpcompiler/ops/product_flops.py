"""Counts the floating-point operations of one call from the op's record."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from tpcompiler.ops.measured import Measured
from tpcompiler.ops.notation import parse
from tpcompiler.ops.operands import bind, tensor_operands
from tpcompiler.ops.record import OpCall
from tpcompiler.ops.table import UNKNOWN, find
from tpcompiler.ops.views import Shape


def product_flops(node: fx.Node, shapes: Callable[[fx.Node], Sequence[Shape]]) -> int:
    """Floating-point operations of one call: 2·m·n·k for each matrix product in it, 0 for other ops.

    `shapes` gives the shapes of a node's tensor results.
    Causal attention counts as if no score were masked, as in arXiv 1909.08053 and in the formula of arXiv 2104.04473,
    §5.1.
    """
    rule = find(node.target) or UNKNOWN
    if not rule.sums and not rule.products:
        return 0
    operands = tensor_operands(node)
    given = tuple(None if n is None else shapes(n)[0] for n in operands)
    results = tuple(shapes(node))
    floating = tuple(n is not None and _floating(n) for n in operands)
    call = OpCall(given, results, bind(node), floating)
    line = rule.pattern(call)
    if line is None:
        return 0
    sizes = {n for shape in (*results, *given) for n in shape or ()}
    return Measured(node.name, parse(line[0]), line[1], call, sizes).flops(rule, call)


def _floating(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.is_floating_point()
