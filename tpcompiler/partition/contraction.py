"""Ops over a split axis: a partial result is summed over the ranks; what must be done once comes after."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.graphs import call, partial_note
from tpcompiler.layout import Over
from tpcompiler.ops.table import PLAIN_SUMS
from tpcompiler.partition.builder import Builder, Op
from tpcompiler.program import Cause

aten = torch.ops.aten


def contraction(b: Builder, op: Op, partial: Over) -> fx.Node:
    """The op on this rank's part, its partial result reduced. Raises `CannotSplit` for an op without such a form."""
    args, inputs = op.args, op.inputs
    bias = None
    if op.name == "linear":
        bias = args["bias"]
        new = b.call(op.node.target, inputs[args["input"]], inputs[args["weight"]])
    elif op.name in ("addmm", "baddbmm") and args["beta"] == 1 and args["alpha"] == 1:
        bias = args["self"]
        first, second = ("mat1", "mat2") if op.name == "addmm" else ("batch1", "batch2")
        new = b.call(aten.matmul.default, inputs[args[first]], inputs[args[second]])
    elif op.name == "mean":
        return _mean(b, op, partial)
    elif op.name in PLAIN_SUMS:
        new = b.graph.node_copy(op.node, inputs.__getitem__)
    else:
        raise b.refuse(op.node, f"{op.name} has no form for a part of it", *op.relation.contracted)
    out = reduced(b, op, new, partial)
    return out if bias is None else _add_bias(b, op, out, bias)


def reduced(b: Builder, op: Op, new: fx.Node, over: Over) -> fx.Node:
    """The sum over ranks of `new`, a partial form of the op's result."""
    dims = b.dims(op.relation.results[0])
    b.describe(new, op.node, dims, partial_note(over))
    cause = Cause(op.name, b.split_axes(op.relation.contracted))
    return b.insert(runtime.reduce, (new, over), op.node, "all-reduce", dims, cause)


def _add_bias(b: Builder, op: Op, out: fx.Node, bias: fx.Node) -> fx.Node:
    """After the reduction, once. The bias may still lack an axis that the result has."""
    value = b.env[bias]
    (result,) = op.relation.results
    mine = next(o for o in op.relation.operands if o.node == bias.name)
    assert mine.dims is not None
    lacking = b.lacking(mine.dims, b.over(result))
    if lacking and bias.name in b.axes.grads:
        value = b.enter(value, bias, lacking, Cause("add", b.split_axes(result)))
    return b.describe(b.call(aten.add.Tensor, out, value), op.node, b.dims(result))


def _mean(b: Builder, op: Op, partial: Over) -> fx.Node:
    """Sum of this rank's part, all-reduced, over the whole count: parts may be of different lengths."""
    args = op.args
    shape = args["self"].meta["val"].shape
    given = args.get("dim")
    dims: list[int] = list(range(len(shape))) if given in (None, []) else _listed(given)
    count = prod(shape[i] for i in dims)
    if not isinstance(count, int):
        raise b.refuse(op.node, "a mean over it and over the batch at once", *op.relation.contracted)
    kwargs = {"dtype": args["dtype"]} if args.get("dtype") is not None else {}
    call_args = (op.inputs[args["self"]], dims, bool(args.get("keepdim", False)))
    out = reduced(b, op, call(b.graph, aten.sum.dim_IntList, call_args, kwargs), partial)
    return b.describe(b.call(aten.div.Tensor, out, count), op.node, b.dims(op.relation.results[0]))


def _listed(value: Any) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value]
