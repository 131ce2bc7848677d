"""Checks before the first step, and without weights, whether a model can run on the batches that it will get."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tpcompiler.errors import TpcError
from tpcompiler.execute.interpret import interpret_capture
from tpcompiler.program import Capture, Training


def check_inputs(
    capture: Capture, inputs: Mapping[str, Tensor], largest_id: int | None = None, ids: str = "input_ids"
) -> None:
    """Raises `TpcError`, one line, when the model cannot run on inputs like these.

    It cannot if an index lies beyond the end of a table, or if shapes do not fit, as for a sequence that is longer than
    the table of positions. `inputs` are by placeholder, as `bind_inputs` gives them. `largest_id` is the largest token
    id of all data, which need not be in this batch. `ids` is what the model calls its tokens. Parameters are not
    needed: indices are computed with values, everything else with shapes alone.
    """
    planted = dict(inputs)
    for name, argument in zip(capture.inputs, capture.arg_names, strict=True):
        if largest_id is not None and argument == ids and name in planted:
            planted[name] = planted[name].clone()
            planted[name].view(-1)[0] = largest_id
    owners = {p.node: p for p in capture.parameters}
    for node in capture.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.aten.embedding.default:
            table, index = node.args[0], node.args[1]
            values = evaluate_node(capture, index, planted)
            if values is not None and values.numel():
                name = owners[table.name].name if table.name in owners else table.name
                _check_range(name, table.meta["val"].shape[0], values, index, planted)
    _check_shapes(capture, inputs)


def _check_range(table: str, rows: int, values: Tensor, index: fx.Node, inputs: Mapping[str, Tensor]) -> None:
    largest, smallest = int(values.max()), int(values.min())
    if largest < rows and smallest >= 0:
        return
    wrong = largest if largest >= rows else smallest
    if _reads(index, inputs):
        raise TpcError(
            f"data: holds token id {wrong}, but {table} has {rows} rows; a vocabulary of {largest + 1} or more would "
            f"work (or the tokenizer that the ids were made with)"
        )
    raise TpcError(
        f"train.sequence: positions go to {wrong}, but {table} has {rows} rows; sequence {rows} or less would work"
    )


def _reads(index: fx.Node, inputs: Mapping[str, Tensor]) -> bool:
    """Whether an index depends on the values of inputs, and not only on their sizes."""
    return any(n.op == "placeholder" and n.name in inputs for n in ancestors(index, _takes_values))


def _takes_values(node: fx.Node) -> bool:
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    return not (name in ("sym_size", "new_zeros", "new_ones", "new_full", "new_empty") or name.endswith("_like"))


def ancestors(node: fx.Node, through: Any = lambda _: True) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            if n.op != "call_function" or through(n):
                stack += n.all_input_nodes
    return seen


def evaluate_node(capture: Capture, index: fx.Node, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """The values of an index, or None if they depend on parameters."""
    buffers = {p.node: p for p in capture.parameters}
    wanted = ancestors(index)
    env: dict[fx.Node, Any] = {}

    def read(a: Any) -> Any:
        return a.off if isinstance(a, Training) else a

    for node in capture.graph.nodes:
        if node not in wanted:
            continue
        if node.op == "placeholder":
            known = inputs[node.name].cpu() if node.name in inputs else buffers[node.name].value
            if known is None:
                return None
            env[node] = known
        else:
            args = fx.node.map_aggregate(fx.node.map_arg(node.args, env.__getitem__), read)
            kwargs = fx.node.map_aggregate(fx.node.map_arg(node.kwargs, env.__getitem__), read)
            env[node] = node.target(*args, **kwargs)
    value = env[index]
    return value if isinstance(value, Tensor) else None


def _check_shapes(capture: Capture, inputs: Mapping[str, Tensor]) -> None:
    state = {p.name: torch.empty(p.shape, dtype=p.dtype, device="meta") for p in capture.parameters}
    try:
        with torch.no_grad():
            interpret_capture(capture, state, {k: v.to("meta") for k, v in inputs.items()}, device="meta")
    except (RuntimeError, IndexError) as e:
        sizes = ", ".join(f"{k} {list(v.shape)}" for k, v in inputs.items())
        reason = str(e).strip().splitlines()[0]
        raise TpcError(f"train.sequence: {capture.model} cannot run on {sizes}: {reason}") from None
