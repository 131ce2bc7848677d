"""Brings a graph of `torch.export` into the one form that the other stages read. `PASSES` lists the steps in order."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from tpcompiler.capture.functional import functionalise
from tpcompiler.capture.input_sizes import replace
from tpcompiler.capture.origins import at, line_of, recurrent_mode, stack_of
from tpcompiler.capture.paths import paths_as_dropout
from tpcompiler.capture.spelling import one_spelling
from tpcompiler.errors import ModelError
from tpcompiler.program import Training

aten = torch.ops.aten
_END = torch.iinfo(torch.int64).max


def normalise(graph: fx.Graph) -> None:
    """Runs the steps on a flat graph, in place."""
    for step in PASSES:
        step(graph)
    modes(graph)
    remove_dead(graph)
    graph.lint()


def inline(graph: fx.Graph, owner: torch.nn.Module) -> None:
    """Inlines `no_grad` and autocast regions, which export keeps as submodules."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        name = node.target.name() if callable(node.target.name) else str(node.target)
        if name == "wrap_with_set_grad_enabled":
            enabled, inner, *args = node.args
            stop = not enabled
        elif name == "wrap_with_autocast":
            _, _, enabled, _, inner, *args = node.args
            if enabled:
                raise ModelError(
                    f"{at(node)}: an autocast region inside of the model; take it out, precision is the trainer's"
                )
            stop = False
        else:
            raise ModelError(f"{at(node)}: {name} (control flow or a custom region) cannot be taken apart")
        body = getattr(owner, inner.target)
        inline(body.graph, body)
        with graph.inserting_before(node):
            outputs = _copy(body.graph, graph, args)
            if stop:
                outputs = [_detached(graph, o) for o in outputs]
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)


def _copy(source: fx.Graph, into: fx.Graph, args: Any) -> list[Any]:
    given = iter(args)
    env: dict[fx.Node, Any] = {}
    for n in source.nodes:
        if n.op == "placeholder":
            env[n] = next(given)
        elif n.op == "output":
            out = n.args[0] if isinstance(n.args[0], (tuple, list)) else (n.args[0],)
            return [env[o] if isinstance(o, fx.Node) else o for o in out]
        else:
            env[n] = into.node_copy(n, lambda m: env[m])
    raise AssertionError("a graph without output")


def _detached(graph: fx.Graph, node: Any) -> Any:
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
        return node
    out = graph.call_function(aten.detach.default, (node,))
    out.meta = dict(node.meta)
    return out


def strip_assertions(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        name = str(node.target)
        if node.op == "call_function" and (
            name.startswith(("aten._assert", "aten.sym_constrain_range", "aten._functional_assert"))
            or node.target is torch._check
        ):
            graph.erase_node(node)


def describe(graph: fx.Graph) -> None:
    """Gives every node the `meta` that `program.Capture` documents."""
    for node in graph.nodes:
        stack = stack_of(node)
        node.meta = {
            **{k: node.meta[k] for k in ("kind", "shown", "written") if k in node.meta},
            "val": node.meta.get("val"),
            "module": stack[-1][0] if stack else "",
            "stack": stack,
            "line": line_of(node),
        }


def drop_devices(graph: fx.Graph) -> None:
    """Removes devices. Writes casts as `to.dtype`, and only where the type changes."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _CASTS:
            x = node.args[0]
            if not isinstance(x, fx.Node):
                continue
            if x.meta["val"].dtype == node.meta["val"].dtype:
                _become(graph, node, x)
            else:
                node.target, node.args, node.kwargs = aten.to.dtype, (x, node.meta["val"].dtype), {}
            continue
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("pin_memory", "layout")}
        if "device" in kwargs or (node.target in _FACTORIES and not node.all_input_nodes):
            kwargs["device"] = None
        node.kwargs = kwargs


_CASTS = tuple(
    getattr(getattr(aten, packet), name)
    for packet, names in {
        "to": ("dtype", "device", "dtype_layout", "other"),
        "_to_copy": ("default",),
        "type_as": ("default",),
    }.items()
    for name in names
)
_FACTORIES = (
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.empty.memory_format,
    aten.scalar_tensor.default,
    aten.eye.default,
    aten.linspace.default,
    aten.rand.default,
    aten.randn.default,
)


_IDENTITIES = (aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.lift.default)


def drop_copies(graph: fx.Graph) -> None:
    """Removes copies and views that change nothing in a functional graph. A `clone` stays where it orders memory."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        x = node.args[0]
        if node.target in _IDENTITIES:
            _become(graph, node, x)
        elif node.target is aten.clone.default:
            if node.kwargs.get("memory_format") is torch.contiguous_format:
                node.target, node.kwargs = aten.contiguous.default, {}
            else:
                _become(graph, node, x)
        elif node.target is aten.slice.Tensor:
            start, end, step = _padded(node.args[2:5], (None, None, 1))
            if start in (0, None) and end in (_END, None) and step in (1, None):
                _become(graph, node, x)
        elif node.target is aten.detach_.default:
            node.target = aten.detach.default


def reshape_views(graph: fx.Graph) -> None:
    """Turns `view` into `reshape`, since strides may differ at other sizes, in the other mode, or on one rank."""
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default


def drop_detached_constants(graph: fx.Graph) -> None:
    """Removes `detach` of values that no gradient flows through."""
    live: set[fx.Node] = set()
    for node in list(graph.nodes):
        val = node.meta.get("val")
        if node.op == "placeholder":
            if isinstance(val, Tensor) and _carries(val) and node.meta.get("kind") != "buffer":
                live.add(node)
        elif node.target is aten.detach.default:
            if node.args[0] not in live:
                _become(graph, node, node.args[0])
        elif any(n in live for n in node.all_input_nodes) and _carries(val):
            live.add(node)


def _carries(val: Any) -> bool:
    """Whether a gradient can flow through a value."""
    return not isinstance(val, Tensor) or val.is_floating_point() or val.is_complex()


def _become(graph: fx.Graph, node: fx.Node, x: Any) -> None:
    node.replace_all_uses_with(x)
    graph.erase_node(node)


_DROPOUTS = (
    aten.dropout.default,
    aten.alpha_dropout.default,
    aten.feature_dropout.default,
    aten.feature_alpha_dropout.default,
    aten.native_dropout.default,
)


def modes(graph: fx.Graph) -> None:
    """Turns what tracing fixed to training mode into `Training(on, off)`: dropout, and the statistics of batch norms.

    A dropout that is off in training stays off.
    """
    for node in list(graph.nodes):
        if node.target in _DROPOUTS:
            x, p, on = node.args
            if not on or p == 0.0:
                if node.target is not aten.native_dropout.default:
                    _become(graph, node, x)
                continue
            node.args = (x, p, Training(True, False))
        elif node.target is aten.scaled_dot_product_attention.default:
            node.args, node.kwargs = _sdpa_arguments(node)
        elif node.target is aten.batch_norm.default and node.args[5] is True:
            node.args = (*node.args[:5], Training(True, False), *node.args[6:])
        elif (at_train := recurrent_mode(node)) is not None and node.args[at_train] is True:
            node.args = (*node.args[:at_train], Training(True, False), *node.args[at_train + 1 :])


def _sdpa_arguments(node: fx.Node) -> tuple[Any, Any]:
    """Arguments in one form: (q, k, v, mask, dropout_p, is_causal), then `scale` and `enable_gqa` by name if set."""
    mask, p, causal = sdpa(node)
    if p and not isinstance(p, Training):
        p = Training(p, 0.0)
    kwargs = {k: v for k, v in node.kwargs.items() if k in ("scale", "enable_gqa") and v not in (None, False)}
    return (*node.args[:3], mask, p, causal), kwargs


def sdpa(node: fx.Node) -> tuple[Any, Any, Any]:
    """The mask, the dropout probability and `is_causal` of a node that calls scaled_dot_product_attention."""
    mask, p, causal = _padded(node.args[3:6], (None, 0.0, False))
    k = node.kwargs
    return k.get("attn_mask", mask), k.get("dropout_p", p), k.get("is_causal", causal)


def _padded(given: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    return given + defaults[len(given) :]


def remove_dead(graph: fx.Graph) -> None:
    """Removes nodes that nothing uses, including random ones. Placeholders stay."""
    for node in reversed(graph.nodes):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)


PASSES: tuple[Callable[[fx.Graph], None], ...] = (
    strip_assertions,
    functionalise,
    describe,
    drop_devices,
    drop_copies,
    reshape_views,
    one_spelling,
    paths_as_dropout,
    drop_detached_constants,
    remove_dead,
)
__all__ = ["inline", "normalise", "remove_dead", "replace", "sdpa"]
