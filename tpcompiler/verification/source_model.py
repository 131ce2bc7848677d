"""Compares the traced graph with the user's module: outputs and gradients in both modes, at the module's own dtype.

A trace may lose what a graph cannot show, such as a backward of the model's own or a branch on `self.training`. The
module itself is therefore run and differentiated, and the graph is compared with it. In training mode both run without
dropout, because they draw their masks in different ways.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tpcompiler.capture.caches import without_caches
from tpcompiler.capture.trace import split_example
from tpcompiler.execute.interpret import interpret_capture
from tpcompiler.graphs import copy_graph
from tpcompiler.program import Capture
from tpcompiler.verification.against_model import Case, probe, relative

aten = torch.ops.aten
TOLERANCE = 1e-4
_DROPOUTS = frozenset(
    f"{kind}dropout{suffix}" for kind in ("", "alpha_", "feature_", "feature_alpha_", "native_") for suffix in ("", "_")
) | {"dropout1d", "dropout2d", "dropout3d"}

_ONES = (aten.ones.default, aten.ones_like.default, aten.new_ones.default)
_DRAWS = {"bernoulli_": 1.0, "bernoulli": 1.0, "uniform_": 0.5, "rand": 0.5, "rand_like": 0.5}  # no path is left out


def same_as_module(captured: Capture, module: nn.Module, example_inputs: Any, backward: bool) -> list[Case]:
    """Compares them in evaluation and in training mode. The module is not changed."""
    return [
        _case("the traced graph is the module", captured, module, example_inputs, backward, training=False),
        _case("the same in training, dropout off", captured, module, example_inputs, backward, training=True),
    ]


def _case(what: str, captured: Capture, given: nn.Module, example: Any, backward: bool, *, training: bool) -> Case:
    module = without_caches(copy.deepcopy(given))  # the run changes running statistics and sets gradients
    module.train(training)
    args, kwargs = split_example(example)
    leaves, spec = pytree.tree_flatten((args, kwargs))

    def own(inputs: Sequence[Any]) -> Any:
        a, k = pytree.tree_unflatten(inputs, spec)
        return pytree.tree_leaves(module(*a, **k))

    def graph(inputs: Sequence[Any]) -> Any:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        batch = dict(zip(captured.inputs, tensors, strict=True))
        return interpret_capture(_without_dropout(captured, training), _held(module), batch, training=training)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = _run(graph, module, leaves, backward)  # first: running the module may change its buffers
        with NoDropout():
            expected = _run(own, module, leaves, backward)
    if len(found[0]) != len(expected[0]):
        return Case(what, {}, TOLERANCE, (f"the module gives {len(expected[0])} tensors, its graph {len(found[0])}",))
    errors = {f"output {i}": relative(a, b) for i, (a, b) in enumerate(zip(found[0], expected[0], strict=True))}
    scale = max((float(g.abs().max()) for g in expected[1].values() if g.numel()), default=1.0)
    errors |= {n: relative(found[1][n], g, scale or 1.0) for n, g in expected[1].items()}
    return Case(what, errors, TOLERANCE)


def _run(
    function: Callable[[Sequence[Any]], Any], module: nn.Module, leaves: Sequence[Any], backward: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Runs a function. Returns its output tensors, and the gradients of parameters and of inputs that require one."""
    module.zero_grad()
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in leaves]
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(backward):
        torch.manual_seed(0)
        out = [x for x in function(inputs) if isinstance(x, Tensor)]
        if (loss := probe(out)) is not None:
            loss.backward()
    asked = dict(module.named_parameters()) | {
        f"input {i}": x for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad
    }
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in asked.items()}
    return [x.detach() for x in out], gradients


def _held(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _without_dropout(captured: Capture, training: bool) -> Capture:
    """The capture with no dropout in training either. Stochastic depth leaves out no path, and scales all the same."""
    graph = copy_graph(captured.graph)
    for node in graph.nodes:
        if node.target is aten.dropout.default and training and _made(node.args[0]).target in _ONES:
            node.target, node.args = aten.div.Tensor, (node.args[0], 1 - node.args[1])
        elif node.target is aten.dropout.default:
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten.scaled_dot_product_attention.default:
            node.args = (*node.args[:4], 0.0, *node.args[5:])
    graph.eliminate_dead_code()
    return replace(captured, graph=graph)


def _made(node: fx.Node) -> fx.Node:
    """The node whose value this one casts."""
    while node.target in (aten.type_as.default, aten.to.dtype):
        node = node.all_input_nodes[0]
    return node


class NoDropout(TorchFunctionMode):
    """A mode in which dropout functions drop nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in _DRAWS:
            return func(*args, **kwargs).fill_(_DRAWS[name])
        if name in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name == "scaled_dot_product_attention":
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs["dropout_p"] = 0.0
        elif name == "multi_head_attention_forward":  # calls inside it are not seen: a mode is off in its own handler
            bound = inspect.signature(func).bind(*args, **kwargs)
            bound.arguments["dropout_p"] = 0.0
            return func(*bound.args, **bound.kwargs)
        return func(*args, **kwargs)
