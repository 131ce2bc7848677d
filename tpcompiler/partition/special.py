"""Ops that have a special form for a part of an axis: lookups, the vocabulary-parallel loss, norms over split axes."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from tpcompiler import runtime
from tpcompiler.layout import LocalRuns, Over
from tpcompiler.partition.builder import Applied, Builder
from tpcompiler.partition.contraction import reduced
from tpcompiler.program import Cause


def special_form(b: Builder, op: Applied, over: Over) -> fx.Node:
    """Calls the runtime's operator that the op's record names as its form."""
    return _FORMS[op.relation.rule.form](b, op, over)


def _lookup(b: Builder, op: Applied, over: Over) -> fx.Node:
    """Rows that other ranks hold are zero here, so that the sum over ranks is the embedding, or `table[ids]`."""
    args = op.args
    plain = "weight" in args
    source, ids = (args["weight"], args["indices"]) if plain else (args["self"], args["indices"][0])
    table = next(o for o in op.relation.operands if o.node == source.name)
    assert table.dims is not None
    dim = b.dim(table.dims[0])
    new = b.call(runtime.lookup, op.inputs[source], op.inputs[ids], LocalRuns(dim))
    if not plain:
        new.update_kwarg("size", dim.size)
    elif args["padding_idx"] >= 0:
        new.args = (*new.args, args["padding_idx"])
    return reduced(b, op, new, over)


def _norm(b: Builder, op: Applied, over: Over) -> fx.Node:
    """A norm over a split axis. It sums statistics over the ranks, a number for each token, never the value itself."""
    args, inputs = op.args, op.inputs
    (size,) = args["normalized_shape"]
    form = op.relation.rule.form
    names = ("weight", "bias") if form == "layer_norm" else ("weight",)
    vectors = (None if args[n] is None else inputs[args[n]] for n in names)
    call = (inputs[args["input"]], over, size, *vectors, args["eps"])
    cause = Cause(op.name, b.split_axes(op.relation.special), op.relation.rule.form)
    dims = b.dims(op.relation.results[0])
    return b.insert(getattr(runtime, form), call, op.node, "all-reduces of a number a token", dims, cause)


def _cross_entropy(b: Builder, op: Applied, over: Over) -> fx.Node:
    """The loss of logits that are split over the vocabulary and never gathered."""
    args, inputs = op.args, op.inputs
    logits = op.relation.operands[0]
    assert logits.dims is not None
    rows = LocalRuns(b.dim(logits.dims[min(1, len(logits.dims) - 1)]))
    call = (inputs[args["self"]], inputs[args["target"]], over, rows)
    cause = Cause(op.name, b.split_axes(op.relation.special), op.relation.rule.form)
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


_FORMS: dict[str, Callable[[Builder, Applied, Over], fx.Node]] = {
    "lookup": _lookup,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "loss": _cross_entropy,
}
