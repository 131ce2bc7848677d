"""Runs a graph node by node, for checks and tests: a `Capture` (the plain model), or a `Program` on one rank."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from tpcompiler import runtime
from tpcompiler.errors import TpcError
from tpcompiler.layout import LocalRuns, LocalSize
from tpcompiler.program import Capture, InputLeaf, Parameter, Program, Training
from tpcompiler.runtime import Ranks, Rng
from tpcompiler.runtime.private_apis import is_factory, pytree


def interpret(
    program: Program,
    ranks: Ranks,
    state: Mapping[str, Tensor],
    inputs: Mapping[str, Any] | Sequence[Any],
    *,
    training: bool = False,
    rng: Rng | None = None,
    device: torch.device | str | None = None,
) -> tuple[Any, ...]:
    """Runs `program` on this rank and returns its outputs as a flat tuple. They can be differentiated.

    `state` has this rank's parameters and buffers under any of their names. `inputs` has the tensor inputs by
    placeholder, or in the order of `capture.inputs`. `device` is where factory calls make their tensors; its default is
    the device of the first input. A value is freed after its last use. Raises `TpcError` for a value that is missing.
    """
    return _run(program.graph, program.capture, Resolver(ranks, training, rng), state, inputs, device)


def interpret_capture(
    capture: Capture,
    state: Mapping[str, Tensor],
    inputs: Mapping[str, Any] | Sequence[Any],
    *,
    training: bool = False,
    rng: Rng | None = None,
    device: torch.device | str | None = None,
) -> tuple[Any, ...]:
    """Runs the plain model's graph and returns its outputs; see `interpret`."""
    return _run(capture.graph, capture, Resolver(Ranks.single(), training, rng), state, inputs, device)


def bind_inputs(capture: Capture, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The tensor inputs of a call of the model's forward, by placeholder. Raises `TpcError` for a call that differs
    from the traced one in its structure or in a constant."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if spec != capture.in_spec:
        raise TpcError(f"{capture.model} was traced with other arguments: {capture.in_spec}, and is called with {spec}")
    out = {}
    for leaf, traced in zip(leaves, capture.input_leaves, strict=True):
        if isinstance(traced, InputLeaf):
            out[traced.node] = leaf
        elif leaf is not traced and leaf != traced:
            raise TpcError(f"{capture.model} was traced with the constant {traced!r}, and is called with {leaf!r}")
    return out


class Resolver:
    """Replaces what depends on rank or mode in a program's arguments by one rank's values."""

    def __init__(self, ranks: Ranks, training: bool, rng: Rng | None) -> None:
        self.ranks = ranks
        self.training = training
        self.rng = rng

    def value(self, a: Any) -> Any:
        """The argument `a` with everything in it that depends on rank or mode replaced. Nodes stay nodes."""
        if isinstance(a, (LocalSize, LocalRuns)):
            return a.resolve(self.ranks.mesh, self.ranks.coords)
        if isinstance(a, Training):
            return self.value(a.on if self.training else a.off)
        if isinstance(a, (tuple, list)):
            return type(a)(self.value(b) for b in a) if type(a) in (tuple, list) else [self.value(b) for b in a]
        if isinstance(a, slice):
            return slice(self.value(a.start), self.value(a.stop), self.value(a.step))
        if isinstance(a, Mapping):
            return {k: self.value(v) for k, v in a.items()}
        return a

    def call(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The node's arguments for this rank."""
        signature = _signature(node.target)
        if signature is None:
            return self.value(tuple(node.args)), self.value(dict(node.kwargs))
        given = signature.bind(*node.args, **node.kwargs).arguments
        if "group" in given:
            names = given["group"]
            assert isinstance(names, (tuple, list)), f"{node.name}: {names!r} is no tuple of mesh dimensions"
            given["group"] = self.ranks.group(tuple(names)).labelled(node.name)
            if node.target is runtime.gather and isinstance(given["rows"], LocalRuns):
                given["rows"] = self.rows_of_group(given["rows"], tuple(names))
        if "rng" in signature.parameters:
            if self.rng is None and self.value(given["training"]) and given["p"] > 0:
                raise TpcError(f"{node.name} draws random numbers: run it with an Rng, or with training=False")
            given["rng"] = self.rng
        return (), {k: self.value(v) for k, v in given.items()}

    def rows_of_group(self, rows: LocalRuns, over: tuple[str, ...]) -> tuple[Any, ...]:
        mesh = self.ranks.mesh
        return tuple(rows.resolve(mesh, mesh.coords(r)) for r in mesh.group(over, self.ranks.rank))


@cache
def _signature(target: Any) -> inspect.Signature | None:
    """The signature of one of the runtime's operators. None for any other target."""
    if inspect.isfunction(target) and target.__module__.startswith(runtime.__name__ + "."):
        return inspect.signature(target)
    return None


def _run(
    graph: fx.Graph,
    capture: Capture,
    resolver: Resolver,
    state: Mapping[str, Tensor],
    inputs: Mapping[str, Any] | Sequence[Any],
    device: torch.device | str | None,
) -> tuple[Any, ...]:
    if not isinstance(inputs, Mapping):
        inputs = dict(zip(capture.inputs, inputs, strict=True))
    given = {p.node: _stored(p, state) for p in capture.parameters} | dict(inputs)
    if device is None:
        device = next((v.device for v in inputs.values() if isinstance(v, Tensor)), torch.get_default_device())
    dead = _last_uses(graph)
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "output":
            return tuple(fx.node.map_arg(node.args[0], env.__getitem__))
        if node.op == "placeholder":
            if node.name not in given and node.users:
                raise TpcError(f"the input {node.name!r} is not given")
            env[node] = given.get(node.name)
        elif node.op == "get_attr":
            env[node] = _attribute(graph, str(node.target))
        else:
            assert node.op == "call_function", f"{node.name}: {node.op} in a flat graph"
            env[node] = _call(node, resolver, env, device)
        for last in dead.get(node, ()):
            del env[last]
    raise AssertionError("a graph without an output")


def _call(node: fx.Node, resolver: Resolver, env: Mapping[fx.Node, Any], device: torch.device | str) -> Any:
    args, kwargs = fx.node.map_arg(resolver.call(node), env.__getitem__)
    if is_factory(node.target) and kwargs.get("device") is None:
        kwargs = {**kwargs, "device": device}
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    try:
        return target(*args, **kwargs)
    except Exception as e:
        e.add_note(f"in {node.format_node()}")
        raise


def _stored(parameter: Parameter, state: Mapping[str, Tensor]) -> Tensor:
    for name in parameter.names:
        if name in state:
            return state[name]
    if parameter.buffer and parameter.value is not None:
        return parameter.value
    raise TpcError(f"no value is given for {'buffer' if parameter.buffer else 'parameter'} {parameter.name!r}")


def _attribute(graph: fx.Graph, target: str) -> Any:
    value: Any = graph.owning_module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Maps each node to the values whose last use it is. A node without users maps to itself."""
    out: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for used in (*node.all_input_nodes, node):
            if used not in seen:
                seen.add(used)
                out.setdefault(node, []).append(used)
    return out
