"""The main loop: rewrites every plain node in order, after giving its operands the form that the op needs."""

from __future__ import annotations

from collections import ChainMap
from typing import Any

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.axes.infer import AxisMap, Relation
from tpcompiler.graphs import erase_dead, layout_of
from tpcompiler.layout import Factor, LocalRuns, unsplit
from tpcompiler.ops.operands import op_name
from tpcompiler.ops.table import find
from tpcompiler.partition.builder import Applied, Builder
from tpcompiler.partition.contraction import contraction
from tpcompiler.partition.dropout import dropout
from tpcompiler.partition.folded import Folded, apart, together
from tpcompiler.partition.fused import is_mixed, split_in_part, take_apart
from tpcompiler.partition.local import local
from tpcompiler.partition.special import special_form
from tpcompiler.plan import Plan
from tpcompiler.program import Capture, Cause, Program
from tpcompiler.spec.schema import Spec

aten = torch.ops.aten


def partition(capture: Capture, axes: AxisMap, plan: Plan, spec: Spec) -> Program:
    """Makes one graph for all ranks. Raises `CannotSplit`, which names a node, for axes without a form on one rank."""
    b = Builder(capture, axes, plan)
    left = _left_sharded(capture, spec)
    for node in capture.graph.nodes:
        if node.op == "output":
            _output(b, node, left)
        else:
            b.env[node] = _rewrite(b, node)
    erase_dead(b.graph)  # such as an `enter` of a bias, which is added after the reduction instead
    dims = {
        p.name: tuple(Factor(n) for n in p.shape) if p.buffer else b.dims(axes.values[p.node][0])
        for p in capture.parameters
    }
    taught = frozenset(str(n.target) for n in b.graph.nodes if (rule := find(n.target)) is not None and rule.taught)
    return Program(b.graph, plan.mesh, capture, dims, left_sharded=left, taught=taught)


def _rewrite(b: Builder, node: fx.Node) -> fx.Node:
    relation = b.axes.relations.get(node.name)
    try:
        if node.op == "call_function" and node.target is aten.dropout.default:
            return dropout(b, node)
        if relation is None:
            return b.copy(node)
        new = _op(b, node, relation)
        return _sliced(b, node, new) if node.name in b.axes.cut else new
    except Folded as e:
        assert relation is not None
        terms = [t for dims in (*relation.results, *(o.dims or () for o in relation.operands)) for t in dims]
        raise b.refuse(node, str(e), *terms) from None


def _op(b: Builder, node: fx.Node, relation: Relation) -> fx.Node:
    if is_mixed(b, relation):
        return take_apart(b, node, relation)
    for term in (*relation.contracted, *relation.special):
        if split_in_part(b.dim(term)):  # a sum over ranks would count the whole segments several times
            raise b.refuse(node, f"{op_name(node)} over segments of which some are split", term)
    op = Applied(node, relation, ChainMap(_operands(b, node, relation), b.env))
    if special := b.over(relation.special):
        return special_form(b, op, special)
    if partial := b.over(relation.contracted):
        return contraction(b, op, partial)
    return local(b, op)


def _operands(b: Builder, node: fx.Node, relation: Relation) -> dict[fx.Node, fx.Node]:
    """The operands in the form that the op needs.

    A live operand gets an `enter` if it needs a gradient and lacks a split axis of the op's results or contraction. A
    constant is whole on every rank, and the rank takes its part.
    """
    everywhere = [t for dims in relation.results for t in dims] + list(relation.contracted)
    present = b.over(everywhere)
    out = {}
    for operand in relation.operands:
        source = next(n for n in node.all_input_nodes if n.name == operand.node)
        if operand.dims is None:
            continue
        value = b.env[source]
        if operand.live:
            lacking = b.lacking(operand.dims, present)
            if lacking and source.name in b.axes.grads:
                mine = b.split_axes(operand.dims)
                cause = Cause(
                    op_name(node), tuple(a for a in b.split_axes(everywhere) if a not in mine), relation.rule.form
                )
                value = b.enter(value, source, lacking, cause)
        else:
            touched = [*everywhere, *operand.dims]
            if source.name in b.axes.grads and b.over(touched):  # it depends on an input that may need a gradient
                value = b.enter(value, source, b.over(touched), Cause(op_name(node), b.split_axes(touched)))
            for i, term in enumerate(operand.dims):
                if b.over([term]):
                    value = b.take(value, source, i, b.dim(term))
        out[source] = value
    return out


def _sliced(b: Builder, node: fx.Node, value: fx.Node) -> fx.Node:
    """Takes this rank's slice of a value that every rank computes whole. The value's gradient is summed over ranks."""
    terms = b.axes.values[node.name][0]
    over = b.over(terms)
    if over and node.name in b.axes.grads:
        value = b.enter(value, node, over, Cause(op_name(node), b.split_axes(terms)))
    for i, term in enumerate(terms):
        if b.over([term]):
            value = b.take(value, node, i, b.dim(term))
    return value


def _left_sharded(capture: Capture, spec: Spec) -> frozenset[int]:
    """The indices of the outputs that the spec leaves sharded."""
    names = enumerate(capture.output_names)
    return frozenset(i for i, name in names if spec.output(str(i), name) == "shard")


def _output(b: Builder, node: fx.Node, left: frozenset[int]) -> None:
    values = node.args[0]
    assert isinstance(values, tuple | list)
    out: list[Any] = []
    for i, value in enumerate(values):
        if not isinstance(value, fx.Node):
            out.append(value)
        else:
            out.append(b.env[value] if i in left else _whole(b, value))
    new = b.graph.output(tuple(out))
    new.meta.update(node.meta)


def _whole(b: Builder, value: fx.Node) -> fx.Node:
    """Gathers every split dimension of a value, so that each rank has the plain model's value."""
    new = b.env[value]
    for i, dim in enumerate(layout_of(new) or ()):
        if dim.over:
            dims = list(layout_of(new) or ())
            dims[i] = unsplit(dim)
            opened = apart(b.graph, new, i, dim, whole=False)
            cause = Cause("output", b.split_axes([b.axes.values[value.name][0][i]]))
            args = (opened.value, dim.over, opened.at, LocalRuns(opened.dim))
            new = b.insert(runtime.gather, args, value, "all-gather", dims, cause)
            new = b.describe(together(b.graph, new, opened), value, dims)
    return new
