"""Ops with a form of their own for a part of an axis: lookups, the vocabulary-parallel loss, norms over split axes."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from tpcompiler import runtime
from tpcompiler.layout import LocalRuns, Over
from tpcompiler.partition.builder import Builder, Op
from tpcompiler.partition.contraction import reduced
from tpcompiler.program import Cause


def special_form(b: Builder, op: Op, over: Over) -> fx.Node:
    """The runtime's form of the op. Raises `CannotSplit` when there is none: a rule of the user's may ask for any."""
    if op.name not in _FORMS:
        raise b.refuse(op.node, f"{op.name} has no form for a part of it", *op.relation.special)
    return _FORMS[op.name](b, op, over)


def _lookup(b: Builder, op: Op, over: Over) -> fx.Node:
    """Rows held elsewhere are zero: the sum over ranks is the embedding."""
    table = next(o for o in op.relation.operands if o.node == op.args["weight"].name)
    assert table.dims is not None
    rows = LocalRuns(b.dim(table.dims[0]))
    padding = () if op.args["padding_idx"] < 0 else (op.args["padding_idx"],)
    new = b.call(runtime.lookup, op.inputs[op.args["weight"]], op.inputs[op.args["indices"]], rows, *padding)
    return reduced(b, op, new, over)


def _norm(b: Builder, op: Op, over: Over) -> fx.Node:
    """Statistics are summed over ranks: one number a token, not the value."""
    args, inputs = op.args, op.inputs
    (size,) = args["normalized_shape"]
    names = ("weight", "bias") if op.name == "layer_norm" else ("weight",)
    vectors = (None if args[n] is None else inputs[args[n]] for n in names)
    call = (inputs[args["input"]], over, size, *vectors, args["eps"])
    cause = Cause(op.name, b.split_axes(op.relation.special))
    dims = b.dims(op.relation.results[0])
    return b.insert(getattr(runtime, op.name), call, op.node, "all-reduces of a number a token", dims, cause)


def _cross_entropy(b: Builder, op: Op, over: Over) -> fx.Node:
    """Of logits that are split over the vocabulary: they are never gathered."""
    args, inputs = op.args, op.inputs
    logits = op.relation.operands[0]
    assert logits.dims is not None
    rows = LocalRuns(b.dim(logits.dims[min(1, len(logits.dims) - 1)]))
    call = (inputs[args["self"]], inputs[args["target"]], over, rows)
    cause = Cause(op.name, b.split_axes(op.relation.special))
    dims = b.dims(op.relation.results[0])
    new = b.insert(runtime.cross_entropy, call, op.node, "all-reduces of a few numbers a token", dims, cause)
    given = {
        "weight": None if args["weight"] is None else inputs[args["weight"]],
        "reduction": ("none", "mean", "sum")[args["reduction"]],
        "ignore_index": args["ignore_index"],
        "label_smoothing": args["label_smoothing"],
    }
    defaults = {"weight": None, "reduction": "mean", "ignore_index": -100, "label_smoothing": 0.0}
    new.kwargs = {k: v for k, v in given.items() if v != defaults[k]}
    return new


_FORMS: dict[str, Callable[[Builder, Op, Over], fx.Node]] = {
    "embedding": _lookup,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "cross_entropy_loss": _cross_entropy,
}
