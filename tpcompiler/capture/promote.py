"""Turns a capture to float64 for comparing numbers, even where the model itself asks for less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from tpcompiler.capture.recast import Recast
from tpcompiler.program import Capture, Parameter

aten = torch.ops.aten
_LOW = (torch.float32, torch.bfloat16, torch.float16)
_DEFAULT_DTYPE = tuple(
    getattr(getattr(aten, packet), name)
    for packet, names in {
        "arange": ("default", "start", "start_step"),
        "empty": ("memory_format",),
        **dict.fromkeys(("zeros", "ones", "full", "eye", "linspace", "rand", "randn", "scalar_tensor"), ("default",)),
    }.items()
    for name in names
)  # factories that use torch's default dtype when none is given


def float64(capture: Capture) -> Capture:
    """A copy that computes in float64 throughout, if its parameters, buffers and inputs are given in float64.

    The model's own casts are changed too (`.float()` in a norm, `dtype=` of a softmax, float factories), since they
    would leave errors of 1e-7 in a comparison to 1e-10.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    promoted = Recast(_dtype)
    for node in capture.graph.nodes:
        val = node.meta.get("val")
        inner = env
        if _makes_floats(node) and all(map(_is_integer, _tensors(node))):  # 1 / n in float32 would be too late
            inner = {**env, **{n: _cast(graph, env[n]) for n in _tensors(node)}}
        new = graph.node_copy(node, inner.__getitem__)
        env[node] = new
        new.meta = {**node.meta, "val": promoted(val)}
        new.args, new.kwargs = fx.node.map_aggregate((new.args, new.kwargs), _dtype)
        if node.target in _DEFAULT_DTYPE and "dtype" not in node.kwargs and _is_low(val):
            new.kwargs = {**new.kwargs, "dtype": torch.float64}
        elif _makes_floats(node) and inner is env:
            env[node] = _cast(graph, new)
    graph.lint()
    return replace(capture, graph=graph, parameters=tuple(map(_parameter, capture.parameters)))


def _makes_floats(node: fx.Node) -> bool:
    """Whether a node's result has torch's default dtype because its operands are only integers and booleans."""
    tensors = _tensors(node)
    named = any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values()))
    floats = any(n.meta["val"].is_floating_point() or n.meta["val"].is_complex() for n in tensors)
    return node.op == "call_function" and _is_low(node.meta.get("val")) and bool(tensors) and not floats and not named


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


def _is_integer(node: fx.Node) -> bool:
    return node.meta["val"].dtype is not torch.bool


def _cast(graph: fx.Graph, node: fx.Node) -> fx.Node:
    out = graph.call_function(aten.to.dtype, (node, torch.float64))
    out.meta = {**node.meta, "val": node.meta["val"].to(torch.float64)}
    return out


def _is_low(val: Any) -> bool:
    return isinstance(val, Tensor) and val.dtype in _LOW


def _dtype(a: Any) -> Any:
    if not isinstance(a, torch.dtype):
        return a
    return torch.float64 if a in _LOW else torch.complex128 if a is torch.complex64 else a


def _parameter(p: Parameter) -> Parameter:
    if p.dtype not in _LOW:
        return p
    return replace(p, dtype=torch.float64, value=None if p.value is None else p.value.to(torch.float64))
