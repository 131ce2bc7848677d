"""Joins the output layer with the loss: cross_entropy(linear(enter(x), w), y) → linear_cross_entropy(x, w, y).

Where the logits feed nothing but the loss, they need not exist: the joined operator has them in chunks of tokens.
Between the product and the loss there may be views that keep the classes together, and a cast.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.graphs import call, cause_of, copy_graph, copy_value, erase_dead, operand, over
from tpcompiler.layout import LocalRuns, Over
from tpcompiler.program import Program

aten = torch.ops.aten
_VIEWS = {aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_VIEWS |= {aten.contiguous.default, aten.clone.default}
_CASTS = {aten.to.dtype, aten._to_copy.default}


def fuse_losses(program: Program) -> Program:
    """Joins every loss over classes that is a mean or a sum, plain or over split classes, with its product."""
    graph = copy_graph(program.graph)
    for node in list(graph.nodes):
        if (loss := _loss(node)) is not None and (head := _head(loss)) is not None:
            _join(graph, node, loss, head)
    erase_dead(graph)
    return replace(program, graph=graph)


@dataclass(frozen=True)
class _Loss:
    logits: fx.Node
    target: fx.Node
    group: Over  # none where every rank has all classes
    rows: LocalRuns | None
    how: dict[str, Any]  # reduction and ignored index, where they are not the defaults


@dataclass(frozen=True)
class _Head:
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    dtype: torch.dtype | None
    product: fx.Node


def _loss(node: fx.Node) -> _Loss | None:
    """The loss that a node computes, if the joined operator can: without weights of classes and without smoothing."""
    args: Any = node.args
    given: dict[str, Any] = dict(node.kwargs)
    if node.target is runtime.cross_entropy:
        logits, target, group, rows = args
    elif node.target is aten.cross_entropy_loss.default:
        given |= zip([a.name for a in node.target._schema.arguments], args, strict=False)
        logits, target, group, rows = given.pop("self"), given.pop("target"), (), None
        given["reduction"] = ("none", "mean", "sum")[given.get("reduction", 1)]
    else:
        return None
    plain = given.get("weight") is None and not given.get("label_smoothing")
    if not plain or given.get("reduction", "mean") == "none":
        return None
    shapes = [n.meta["val"].shape for n in (logits, target)]
    if [len(s) for s in shapes] != [2, 1] or target.meta["val"].dtype.is_floating_point:
        return None
    defaults = {"reduction": "mean", "ignore_index": -100}
    how = {k: given[k] for k, v in defaults.items() if given.get(k, v) != v}
    return _Loss(logits, target, tuple(group), rows, how)


def _head(loss: _Loss) -> _Head | None:
    """The product that makes the logits, if they feed the loss alone."""
    node, dtype = loss.logits, None
    while len(node.users) == 1:
        if node.target in _CASTS and dtype is None and _dtype(node) in (torch.float32, torch.float64):
            dtype = _dtype(node)
        elif node.target not in _VIEWS or node.meta["val"].shape[-1] != operand(node).meta["val"].shape[-1]:
            break
        node = operand(node)
    if len(node.users) != 1:
        return None
    if node.target is operator.getitem and operand(node).target is runtime.entered_linear:
        joined: Any = operand(node)
        x, names, weights, biases = joined.args
        alone = len(weights) == 1 and tuple(names) == loss.group
        return _Head(x, weights[0], biases[0], dtype, node) if alone else None
    if node.target is not aten.linear.default or len(operand(node, 1).meta["val"].shape) != 2:
        return None
    x = operand(node)
    bias: Any = node.kwargs.get("bias", node.args[2] if len(node.args) > 2 else None)
    if loss.group:
        if x.target is not runtime.enter or len(x.users) != 1 or over(x) != loss.group:
            return None
        x = operand(x)
    return _Head(x, operand(node, 1), bias, dtype, node)


def _dtype(node: fx.Node) -> Any:
    return node.kwargs.get("dtype", node.args[1] if len(node.args) > 1 else None)


def _join(graph: fx.Graph, node: fx.Node, loss: _Loss, head: _Head) -> None:
    split = (loss.group, loss.rows) if loss.group else ()
    kwargs = {"bias": head.bias, "dtype": head.dtype}
    given = {k: v for k, v in kwargs.items() if v is not None} | loss.how
    with graph.inserting_before(node):
        made = call(graph, runtime.linear_cross_entropy, (head.x, head.weight, loss.target, *split), given)
    copy_value(made, node, "the loss of logits that exist in chunks", cause_of(node))
    node.replace_all_uses_with(made)
    line = head.product.meta.get("line")
    for other in graph.nodes:  # the name that the user's line gives is that of the logits, which are gone
        if line is not None and other.meta.get("line") == line:
            other.meta["line"] = (*line[:2], "")
