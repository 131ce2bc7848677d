"""The dtype of the model's own: float32 where it is traced, whatever it runs in later.

Traced in float32, `x.float()` and `y.to(x.dtype)` are the same and nothing. So a float32 model is traced in bfloat16,
where both are seen: what is cast to float32 is an upcast that the model asks for, what becomes bfloat16 follows the
model. The former stays; the latter becomes `type_as` a value in the model's own dtype. The largest and the smallest
number of the dtype become those of bfloat16, which float32 and float64 hold as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from tpcompiler.capture.private_tracing import pytree
from tpcompiler.capture.recast import Recast

aten = torch.ops.aten
OWN = torch.bfloat16
SHOWN = torch.float32
LIMITS = tuple((getattr(torch.finfo(OWN), n), getattr(torch.finfo(SHOWN), n)) for n in ("min", "max"))


def can_follow(model: nn.Module) -> bool:
    """Whether all of a model's real numbers are float32."""
    found = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    return found == {SHOWN}


@contextmanager
def lowered(model: nn.Module) -> Iterator[dict[int, int]]:
    """While it lasts, the model's float32 parameters and buffers on meta are bfloat16. Gives whom each stands for."""
    before: list[tuple[Any, str, Any]] = []
    made: dict[int, Tensor] = {}
    try:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, t in list(held.items()):
                    if t is not None and t.dtype == SHOWN:
                        before.append((held, name, t))
                        held[name] = made.setdefault(id(t), _lower(t))  # type: ignore[assignment]
        yield {id(low): key for key, low in made.items()}
    finally:
        for held, name, t in before:
            held[name] = t


def _lower(t: Tensor) -> Tensor:
    low = torch.empty_strided(t.shape, t.stride(), dtype=OWN, device="meta")
    return nn.Parameter(low, t.requires_grad) if isinstance(t, nn.Parameter) else low.requires_grad_(t.requires_grad)


def follows(graph: fx.Graph) -> bool:
    """Whether `follow` can say everything in a graph that was traced in bfloat16."""
    return all(node.target in (*_CASTS, *_CONSTANTS) for node in graph.nodes if _names_own(node))


def follow(graph: fx.Graph) -> None:
    """Casts to bfloat16 become casts to a neighbour's dtype, and float32 is shown in bfloat16's place, in place."""
    latest: fx.Node | None = None
    computed: set[fx.Node] = set()  # what depends on a parameter or an input, all the way in the model's dtype
    for node in list(graph.nodes):
        operands = _tensors(node)
        if node.op == "call_function" and _names_own(node):
            reference = _ancestor(node) or latest or _first(graph)
            if node.target in _CASTS:
                node.target, node.args, node.kwargs = aten.type_as.default, (node.args[0], reference), {}
            else:
                _made_as(graph, node, reference)
        given = node.op == "placeholder" and node.meta.get("kind") != "buffer"
        if _is_own(node) and (given or not computed.isdisjoint(operands)):
            computed.add(node)
            latest = latest if given else node
    shown = Recast(lambda dtype: SHOWN if dtype == OWN else dtype)
    for node in graph.nodes:
        node.meta["val"] = shown(node.meta.get("val"))


_CASTS = (aten.to.dtype,)
_FILLED = "full zeros ones scalar_tensor arange full_like zeros_like ones_like new_full new_zeros new_ones"
_CONSTANTS = tuple(
    getattr(getattr(aten, packet), overload)
    for packet in _FILLED.split()
    for overload in ("default", "start", "start_step")
    if hasattr(getattr(aten, packet), overload)
)  # their numbers are the same, whether they are made in a dtype or cast to it


def _made_as(graph: fx.Graph, node: fx.Node, reference: fx.Node) -> None:
    node.kwargs = {**node.kwargs, "dtype": SHOWN}
    with graph.inserting_after(node):
        new = graph.call_function(aten.type_as.default, (node, reference))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _ancestor(node: fx.Node) -> fx.Node | None:
    """The nearest value in the model's own dtype that the node is computed from. Buffers may be kept in another."""
    seen: set[fx.Node] = set()
    layer = _tensors(node)
    while layer:
        for n in layer:
            if _is_own(n) and n.meta.get("kind") != "buffer":
                return n
        seen.update(layer)
        layer = [m for n in layer for m in _tensors(n) if m not in seen]
    return None


def _first(graph: fx.Graph) -> fx.Node:
    return next(n for n in graph.nodes if n.op == "placeholder" and _is_own(n) and n.meta.get("kind") == "parameter")


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


def _is_own(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.dtype == OWN


def _names_own(node: fx.Node) -> bool:
    return any(a == OWN for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, torch.dtype))
