"""Recognises causal masks by their values, where a model builds them from sizes alone, and says `is_causal` instead.

Hugging Face models build an explicit mask even when none is given, which costs the fused attention kernel. Such a mask
is a function of the sizes; it is computed at several sizes and compared with the causal and with the full pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tpcompiler.capture.normalise import remove_dead, sdpa

aten = torch.ops.aten
_SIZES = (5, 23, 131)  # no constant below 8, nor a product of two, can hide a window from the largest
_SMALL = 8
_MOST = 1 << 26  # elements of a mask that are worth computing
_END = torch.iinfo(torch.int64).max


def recover_causal(graph: fx.Graph, values: Mapping[str, Tensor]) -> None:
    """Replaces causal attention masks by `is_causal=True`, and drops masks that hide nothing, in place.

    `values` holds the buffers by placeholder. A mask stays when it depends on an input or a parameter, when a constant
    in it matters (a sliding window), or when it cannot be computed.
    """
    verdicts: dict[tuple[fx.Node, Any, Any], str | None] = {}
    for node in graph.nodes:
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        mask, p, causal = sdpa(node)
        if not isinstance(mask, fx.Node) or causal:
            continue
        rows, columns = (node.args[i].meta["val"].shape[-2] for i in (0, 1))
        key = (mask, _expr(rows), _expr(columns))
        if key not in verdicts:
            cone = _cone_of(mask, values)
            verdicts[key] = _pattern(cone, rows, columns) if cone is not None else None
        if verdicts[key] is not None:
            node.args = (*node.args[:3], None, p, verdicts[key] == "causal")
    remove_dead(graph)


@dataclass(frozen=True)
class _Cone:
    """The nodes that a mask is computed by."""

    mask: fx.Node
    nodes: tuple[fx.Node, ...]  # in order; sizes and arithmetic on them among them
    buffers: Mapping[fx.Node, Tensor]
    symbols: tuple[Any, ...]


def _expr(n: Any) -> Any:
    return n.node.expr if isinstance(n, torch.SymInt) else n


def _cone_of(mask: fx.Node, values: Mapping[str, Tensor]) -> _Cone | None:
    found: set[fx.Node] = set()
    buffers: dict[fx.Node, Tensor] = {}
    symbols: dict[Any, None] = {}
    todo = [mask]
    while todo:
        node = todo.pop()
        if node in found:
            continue
        if node.op == "placeholder":
            if node.name not in values:
                return None
            buffers[node] = values[node.name]
            continue
        found.add(node)
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return None
        if node.target is aten.sym_size.int:
            symbols.update(dict.fromkeys(node.meta["val"].node.expr.free_symbols))
        else:
            todo += node.all_input_nodes
    order = tuple(n for n in mask.graph.nodes if n in found)
    return _Cone(mask, order, buffers, tuple(symbols))


def _pattern(cone: _Cone, rows: Any, columns: Any) -> str | None:
    """Which pattern a mask has: `causal`, `full`, or None for any other."""
    seen: set[str | None] = set()
    for sizes in _assignments(cone):
        height, width = _number(rows, sizes), _number(columns, sizes)
        if height is None or width is None or height * width > _MOST:
            return None
        for change in (None, *_constants(cone)):
            try:
                value = _evaluate(cone, sizes, change)
            except (RuntimeError, IndexError, TypeError, ValueError):  # sizes that this mask does not take
                return None
            seen.add(_compare(value, height, width))
            if None in seen or len(seen) > 1:
                return None
    return seen.pop() if seen else None


def _number(n: Any, sizes: Mapping[Any, int]) -> int | None:
    value = _expr(n)
    value = value if isinstance(value, int) else value.subs(sizes)
    return int(value) if isinstance(value, int) or value.is_number else None


def _assignments(cone: _Cone) -> Iterator[dict[Any, int]]:
    """Sizes to try: each symbol smaller and larger than the others, and as long as the buffers."""
    many = len(_SIZES)
    for k in range(many):
        yield {s: _SIZES[(i + k) % many] + i // many for i, s in enumerate(cone.symbols)}
    extents = {n for t in cone.buffers.values() for n in t.shape if n > 1}
    for n in sorted(extents):
        yield dict.fromkeys(cone.symbols, n)


def _constants(cone: _Cone) -> Iterator[Callable[[fx.Node, Any], Any]]:
    """Changes that make one large constant small. If one alters the pattern, the pattern holds only up to it."""
    for node in cone.nodes:
        for i, a in enumerate(node.args):
            if isinstance(a, (int, float)) and not isinstance(a, bool) and _SMALL <= abs(a) < 1e9 and a != _END:
                yield (
                    lambda n, args, node=node, i=i, a=a: (  # type: ignore[misc]
                        (*args[:i], type(a)(3 if a > 0 else -3), *args[i + 1 :]) if n is node else args
                    )
                )


def _evaluate(cone: _Cone, sizes: Mapping[Any, int], change: Callable[[fx.Node, Any], Any] | None) -> Tensor:
    env: dict[fx.Node, Any] = dict(cone.buffers)
    with torch.no_grad():
        for node in cone.nodes:
            if node.target is aten.sym_size.int:
                env[node] = _number(node.meta["val"], sizes)
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            if change is not None:
                args = change(node, args)
            if "device" in kwargs:
                kwargs = {**kwargs, "device": torch.device("cpu")}
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    result: Tensor = env[cone.mask]
    return result


def _compare(mask: Tensor, rows: int, columns: int) -> str | None:
    if mask.dtype is torch.bool:
        seen = mask
    else:
        seen = mask == 0
        if not bool((seen | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
            return None
    if bool(seen.all()):
        return "full"
    triangle = torch.ones(rows, columns, dtype=torch.bool).tril()
    try:
        same = torch.broadcast_shapes(mask.shape, triangle.shape)[-2:] == triangle.shape
    except RuntimeError:
        return None
    return "causal" if same and bool((seen == triangle).all()) else None
