"""Finds out from its graph which labels a causal model wants: the tokens themselves, or the token after each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from tpcompiler.errors import TpcError
from tpcompiler.program import Capture
from tpcompiler.train.settings import Data
from tpcompiler.train.step.limits import ancestors, evaluate_node

_LOSSES = ("nll_loss", "cross_entropy", "gather")  # ops that pick the probability of a target


def shifts_inside(capture: Capture, inputs: Mapping[str, Tensor], labels: str) -> bool | None:
    """Whether the model compares the scores at a position with the label after it. None if the graph does not tell.

    The ops between labels and loss are run with labels that are all different, which shows where each label ends up.
    `inputs` are by placeholder. `labels` is what the model calls its labels.
    """
    place = dict(zip(capture.arg_names, capture.inputs, strict=True)).get(labels)
    if place is None or place not in inputs or inputs[place].dim() != 2:
        return None
    rows, length = inputs[place].shape
    marks = torch.arange(1, rows * length + 1).view(rows, length)
    planted = {**inputs, place: marks}
    for node in capture.graph.nodes:
        name = str(node.target).removeprefix("aten.")
        if node.op != "call_function" or not name.startswith(_LOSSES):
            continue
        for target in node.all_input_nodes:
            seen = _seen(capture, target, place, planted)
            if seen is None:
                continue
            for shifted, expected in ((True, marks[:, 1:]), (False, marks)):
                if _contains(seen, expected, marks):
                    return shifted
    return None


def _seen(capture: Capture, target: fx.Node, place: str, planted: Mapping[str, Tensor]) -> Tensor | None:
    """The values of an integer operand of the loss, if the labels alone determine it; else None."""
    val = target.meta.get("val")
    if not isinstance(val, Tensor) or val.dtype.is_floating_point:
        return None
    above = {n.name for n in ancestors(target) if n.op == "placeholder"}
    if place not in above:
        return None
    return evaluate_node(capture, target, planted)


def _contains(seen: Tensor, expected: Tensor, marks: Tensor) -> bool:
    """Whether the targets are these labels in order. Ignored labels (below 1) may stand between them."""
    found = seen.flatten()
    found = found[(found >= 1) & (found <= int(marks.max()))]
    return found.numel() == expected.numel() and bool((found == expected.flatten()).all())


def check_labels(capture: Capture, inputs: Mapping[str, Tensor], data: Data) -> None:
    """Raises `TpcError` when `data.labels` would shift labels twice, or not at all."""
    inside = shifts_inside(capture, inputs, data.names.get("labels", "labels"))
    if inside is None or inside == (data.labels == "same"):
        return
    if inside:
        raise TpcError(
            f"data.labels: next, but {capture.model} shifts the labels itself, so that it would learn to guess the "
            f"token after the next; data.labels: same would work"
        )
    raise TpcError(
        f"data.labels: same, but {capture.model} compares each position with its own label, so that it would learn to "
        f"copy its input; data.labels: next would work"
    )
