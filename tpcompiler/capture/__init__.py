"""Capture: a plain PyTorch model becomes one flat, functional graph of ATen operations, with no weights in memory."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from tpcompiler.capture.constants import slice_constant_runs
from tpcompiler.capture.empty import drop_empty, set_unset
from tpcompiler.capture.experts import portable_experts
from tpcompiler.capture.functional import unkept_writes
from tpcompiler.capture.init import Recorded, record
from tpcompiler.capture.input_sizes import sizes_from_inputs
from tpcompiler.capture.masks import recover_causal
from tpcompiler.capture.modes import same_in_evaluation
from tpcompiler.capture.normalise import inline, normalise
from tpcompiler.capture.origins import at, draws_apart
from tpcompiler.capture.own_dtype import follow, follows
from tpcompiler.capture.promote import float64
from tpcompiler.capture.trace import Traced, split_example, trace
from tpcompiler.errors import ModelError
from tpcompiler.program import Capture, InputLeaf, Parameter

__all__ = ["Recorded", "capture", "capture_recorded", "float64", "record", "split_example"]


def capture(build: Callable[[], nn.Module] | nn.Module, example_inputs: Any, *, source: str = "") -> Capture:
    """Traces a model at `example_inputs`. The graph holds for any batch and sequence that the model takes.

    `build` makes the model (its parameters are never allocated), or is one (it stays as it is). `example_inputs` is a
    tuple of positional arguments, a dictionary of keyword arguments, or (tuple, dictionary). `source` says in messages
    where the model stands. Errors: `ModelError`, one line that names the model's own line.
    """
    return capture_recorded(record(build, source=source), example_inputs, source=source)


def capture_recorded(recorded: Recorded, example_inputs: Any, *, source: str = "", own: bool = True) -> Capture:
    """`capture` for a model that `record` has built, so that a caller who also needs initial values builds it once.

    `own`: casts and limits follow the dtype that the model runs in; otherwise float32 is baked in.
    """
    model = recorded.model
    traced = trace(recorded, example_inputs, source, own)
    exported = traced.exported
    graph = exported.graph_module.graph
    inline(graph, exported.graph_module)
    parameters = _placeholders(graph, exported, recorded, source)
    inputs, leaves, names = _inputs(graph, traced)
    drop_empty(graph)
    set_unset(graph)
    normalise(graph)
    _no_noise(graph)
    evaluated = () if traced.evaluated is None else (_evaluated(traced.evaluated, recorded, source),)
    unkept_writes(graph, *evaluated)
    try:
        for other in evaluated:
            same_in_evaluation(graph, other)
    except ModelError:
        if traced.low:  # what is float32 in training alone differs in bfloat16
            return capture_recorded(recorded, example_inputs, source=source, own=False)
        raise
    sizes_from_inputs(graph, inputs)
    constants = {p.node: p.value for p in parameters if p.value is not None}
    recover_causal(graph, constants)
    slice_constant_runs(graph, constants)
    portable_experts(graph)
    if traced.low:
        if not follows(graph):
            return capture_recorded(recorded, example_inputs, source=source, own=False)
        follow(graph)
    return Capture(
        graph=graph,
        parameters=parameters,
        inputs=tuple(n.name for n in inputs),
        in_spec=traced.in_spec,
        out_spec=exported.call_spec.out_spec,
        input_leaves=leaves,
        model=type(model).__name__,
        source=source,
        arg_names=names,
    )


def _evaluated(exported: ExportedProgram, recorded: Recorded, source: str) -> fx.Graph:
    """The graph of the model in evaluation mode."""
    graph = exported.graph_module.graph
    inline(graph, exported.graph_module)
    _placeholders(graph, exported, recorded, source)
    _flat_output(graph)
    drop_empty(graph)
    set_unset(graph)
    normalise(graph)
    return graph


def _no_noise(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if draws_apart(node):
            raise ModelError(
                f"{at(node)}: draws random numbers, and no two ranks would draw the same; set them to none, use "
                "torch.nn.functional.dropout, or take them as an input"
            )


def _placeholders(graph: fx.Graph, exported: ExportedProgram, recorded: Recorded, source: str) -> tuple[Parameter, ...]:
    """Parameters and buffers, each once. Placeholders of one tensor are merged, and lifted constants become buffers."""
    model = recorded.model
    nodes = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    tensors: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    kept = model.state_dict(keep_vars=True)
    merged: dict[int, list[tuple[str, fx.Node]]] = {}
    constants: dict[str, Tensor] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert spec.target is not None
            merged.setdefault(id(tensors[spec.target]), []).append((spec.target, nodes[spec.arg.name]))
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            assert spec.target is not None
            constants[spec.target] = exported.constants[spec.target]
            merged[id(constants[spec.target])] = [(spec.target, nodes[spec.arg.name])]
        elif spec.kind is not InputKind.USER_INPUT:
            raise ModelError(f"{spec.target}: {spec.kind.name.lower().replace('_', ' ')} inside of a model")
    for out in exported.graph_signature.output_specs:
        if out.kind is not OutputKind.USER_OUTPUT:
            raise ModelError(
                f"{out.target}: the forward writes to it ({out.kind.name.lower().replace('_', ' ')}); "
                "return the new value instead"
            )
    order = {name: i for i, name in enumerate(tensors)}
    result = []
    for found in merged.values():
        found.sort(key=lambda f: order.get(f[0], 0))
        (name, node), *others = found
        aliases = [n for n, t in tensors.items() if name in tensors and t is tensors[name] and n != name]
        for _, other in others:
            other.replace_all_uses_with(node)
            graph.erase_node(other)
        t = tensors.get(name, constants.get(name))
        assert t is not None
        buffer = not isinstance(t, nn.Parameter)
        if buffer and not recorded.tape.has_value(t):
            raise ModelError(f"{source or name}: the constant {name} has no value that could be kept; make it a buffer")
        node.meta["kind"] = "buffer" if buffer else "parameter"
        node.meta["shown"] = name
        value = recorded.value(t) if buffer else None
        shape = tuple(t.shape)
        result.append(
            Parameter(name, node.name, shape, t.dtype, tuple(aliases), t.requires_grad, buffer, name in kept, value)
        )
    return tuple(sorted(result, key=lambda p: p.buffer))


def _inputs(graph: fx.Graph, traced: Traced) -> tuple[list[fx.Node], tuple[Any, ...], tuple[str, ...]]:
    """The tensor inputs' placeholders, and the place of each in the flattened example. Constants leave the graph."""
    nodes = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    specs = [s for s in traced.exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    inputs: list[fx.Node] = []
    leaves: list[Any] = []
    names: list[str] = []
    for spec, leaf, name in zip(specs, traced.leaves, traced.arg_names, strict=True):
        node = nodes[spec.arg.name]
        if isinstance(leaf, Tensor):
            while hasattr(builtins, node.name) or node.name in ("device", "inf", "nan", "torch"):
                node.name += "_1"  # fx would rename such a node in every copy of the graph
            node.meta["kind"] = "input"
            node.meta["shown"] = name
            inputs.append(node)
            leaves.append(InputLeaf(node.name))
            names.append(name)
        else:
            assert isinstance(spec.arg, ConstantArgument) or not node.users
            graph.erase_node(node)
            leaves.append(leaf)
    _flat_output(graph)
    return inputs, tuple(leaves), tuple(names)


def _flat_output(graph: fx.Graph) -> None:
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = (tuple(output.args[0]),)
