"""Ops that contract a split axis. Their partial results are summed over the ranks; a bias or a division comes after."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.graphs import call, partial_note, set_argument
from tpcompiler.layout import Factor, Over
from tpcompiler.ops.operands import argument_place
from tpcompiler.ops.record import WeightProduct
from tpcompiler.partition.builder import Applied, Builder
from tpcompiler.program import Cause

aten = torch.ops.aten


def contraction(b: Builder, op: Applied, partial: Over) -> fx.Node:
    """Computes the op on this rank's part, and reduces the partial result over the mesh dimensions in `partial`."""
    product, name = op.relation.rule.product, op.relation.rule.bias
    if op.relation.rule.average:
        return _average(b, op, partial)
    if product is not None and product.bias:
        new = multiplied(b, product, op.inputs[op.args[product.x]], op.inputs[op.args[product.weight]])
        out, bias = reduced(b, op, new, partial), op.args[product.bias]
        return out if bias is None else _add_bias(b, op, out, bias)
    new = b.graph.node_copy(op.node, op.inputs.__getitem__)
    bias = op.args[name] if name else None
    if bias is None:
        return reduced(b, op, new, partial)
    set_argument(new, argument_place(new, name), None)
    return _add_bias(b, op, reduced(b, op, new, partial), bias, places=op.node.meta["val"].dim() - 2)


def multiplied(b: Builder, product: WeightProduct, x: fx.Node, weight: fx.Node) -> fx.Node:
    """The product without its bias."""
    return b.call(aten.linear.default if product.along == 0 else aten.matmul.default, x, weight)


def reduced(b: Builder, op: Applied, new: fx.Node, over: Over) -> fx.Node:
    """Sums `new`, this rank's partial result of the op, over the ranks along `over`."""
    dims = b.dims(op.relation.results[0])
    b.describe(new, op.node, dims, partial_note(over))
    cause = Cause(op.name, b.split_axes(op.relation.contracted), op.relation.rule.form)
    return b.insert(runtime.reduce, (new, over), op.node, "all-reduce", dims, cause)


def _add_bias(b: Builder, op: Applied, out: fx.Node, bias: fx.Node, places: int = 0) -> fx.Node:
    """Adds the bias once, after the reduction. A bias that lacks a split axis of the result gets an `enter`.

    `places` counts the dimensions of the result that come after the bias's.
    """
    value = b.env[bias]
    (result,) = op.relation.results
    mine = next(o for o in op.relation.operands if o.node == bias.name)
    assert mine.dims is not None
    lacking = b.lacking(mine.dims, b.over(result))
    if lacking and bias.name in b.axes.grads:
        value = b.enter(value, bias, lacking, Cause("add", b.split_axes(result)))
    if places:
        value = b.call(aten.reshape.default, value, [-1, *[1] * places])
        value.meta["val"] = bias.meta["val"].reshape(-1, *[1] * places)
        b.describe(value, bias, (*b.dims(mine.dims), *[Factor(1)] * places))
    return b.describe(b.call(aten.add.Tensor, out, value), op.node, b.dims(result))


def _average(b: Builder, op: Applied, partial: Over) -> fx.Node:
    """Sums this rank's part, reduces it, and divides by the whole count, because ranks' parts may differ in length."""
    args = op.args
    shape, given = b.axes.sizes[args["self"].name][0], args.get("dim")
    dims: list[int] = list(range(len(shape))) if given in (None, []) else _listed(given)
    count = prod(shape[i] for i in dims)
    kwargs = {"dtype": args["dtype"]} if args.get("dtype") is not None else {}
    call_args = (op.inputs[args["self"]], dims, bool(args.get("keepdim", False)))
    out = reduced(b, op, call(b.graph, aten.sum.dim_IntList, call_args, kwargs), partial)
    return b.describe(b.call(aten.div.Tensor, out, count), op.node, b.dims(op.relation.results[0]))


def _listed(value: Any) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value]
