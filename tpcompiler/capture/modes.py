"""Checks that one graph holds for training and evaluation; otherwise the model is refused.

The model is traced in both modes. Only what an argument `Training(on, off)` expresses may differ: dropout, attention's
dropout, running statistics. The training graph, read in evaluation mode, is compared with the evaluation graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from tpcompiler.capture.origins import at
from tpcompiler.errors import ModelError
from tpcompiler.graphs import same_size
from tpcompiler.program import Training

aten = torch.ops.aten


def same_in_evaluation(trained: fx.Graph, evaluated: fx.Graph) -> None:
    """Raises `ModelError`, with the line, when a model's evaluation differs from its graph read in evaluation mode."""
    numbers: dict[Any, int] = {}
    expected = _numbered(evaluated, numbers)
    found = _numbered(trained, numbers)
    if _output(trained, found) == _output(evaluated, expected):
        return
    known = set(expected.values())
    stranger = next((n for n in trained.nodes if n.op == "call_function" and found[n] not in known), None)
    if stranger is None:
        known = set(found.values())
        stranger = next((n for n in evaluated.nodes if n.op == "call_function" and expected[n] not in known), None)
    where = "the model's outputs" if stranger is None else at(stranger)
    raise ModelError(
        f"{where}: the model computes something else in training than in evaluation, and one program would do the "
        "same in both; say the difference by torch.nn.functional.dropout, or by an argument of the forward"
    )


def _output(graph: fx.Graph, numbered: Mapping[fx.Node, int]) -> int:
    return numbered[next(n for n in graph.nodes if n.op == "output")]


def _numbered(graph: fx.Graph, numbers: dict[Any, int]) -> dict[fx.Node, int]:
    """A number for each node. Nodes that compute the same in evaluation have equal numbers."""
    out: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.target is aten.dropout.default and isinstance(node.args[2], Training) and not node.args[2].off:
            out[node] = out[node.args[0]]
            continue
        if (kept := _times_ones(node)) is not None:
            out[node] = out[kept]
            continue
        key: Any = str(node.target) if node.op == "placeholder" else _key((node.args, node.kwargs), out)
        out[node] = numbers.setdefault((node.op, "" if node.op == "output" else str(node.target), key), len(numbers))
    return out


def _times_ones(node: fx.Node) -> fx.Node | None:
    """What a value is in evaluation that training multiplies by dropout of ones, or replaces where that is zero; None
    for any other value."""
    """What a node multiplies by dropout of ones, or takes where that is not zero: it is ones in evaluation."""
    if node.target in (aten.where.self, aten.where.ScalarSelf):
        return _second(node)
    if node.target is not aten.mul.Tensor or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    for x, mask in (node.args, node.args[::-1]):
        assert isinstance(x, fx.Node)
        assert isinstance(mask, fx.Node)
        if _drops_ones(mask) and _alike(x, node):
            return x
    return None


def _second(node: fx.Node) -> fx.Node | None:
    """The value that `where` takes where dropout of ones did not give zero."""
    mask, _, x = node.args
    if not isinstance(mask, fx.Node) or mask.target is not aten.eq.Scalar or mask.args[1] != 0:
        return None
    return x if _drops_ones(mask.args[0]) and isinstance(x, fx.Node) and _alike(x, node) else None


def _drops_ones(node: Any) -> bool:
    ones = (aten.ones.default, aten.ones_like.default, aten.new_ones.default)
    return node.target is aten.dropout.default and isinstance(node.args[0], fx.Node) and node.args[0].target in ones


def _alike(x: fx.Node, node: fx.Node) -> bool:
    a, b = x.meta["val"], node.meta["val"]
    return a.dtype == b.dtype and a.dim() == b.dim() and all(map(same_size, a.shape, b.shape))


def _key(a: Any, numbered: Mapping[fx.Node, int]) -> Any:
    if isinstance(a, fx.Node):
        return "node", numbered[a]
    if isinstance(a, Training):
        return _key(a.off, numbered)
    if isinstance(a, (tuple, list)):
        return tuple(_key(b, numbered) for b in a)
    if isinstance(a, Mapping):
        return tuple((k, _key(v, numbered)) for k, v in sorted(a.items()))
    if isinstance(a, slice):
        return "slice", _key((a.start, a.stop, a.step), numbered)
    return type(a).__name__, str(a)
