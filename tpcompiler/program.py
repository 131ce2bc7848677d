"""What the stages hand to each other: `Capture` (the plain model as a graph) and `Program` (one rank's graph)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from tpcompiler.layout import Dim, Mesh


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer of the model. Tied weights are one `Parameter` with several names."""

    name: str  # its first name in `named_parameters()` or `named_buffers()`
    node: str  # the name of its placeholder in the graph
    shape: tuple[int, ...]  # of the plain model, before any split
    dtype: torch.dtype
    aliases: tuple[str, ...] = ()  # its other names (tied weights)
    trainable: bool = True  # requires_grad
    buffer: bool = False
    persistent: bool = True  # whether `state_dict()` has it
    value: torch.Tensor | None = field(default=None, compare=False)  # of a buffer: what the constructor computed

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


@dataclass(frozen=True)
class Capture:
    """A plain model as one flat, functional FX graph of ATen ops.

    Placeholders are parameters, buffers, then user inputs; one output node whose only argument is a flat tuple.
    Every node's `meta` has
        val      fake tensor(s) or SymInt, global sizes; batch and sequence symbolic
        module   the qualified name of the module whose forward ran it ("" = the root)
        stack    tuple of (qualified name, class name, call number), outermost first
        line     (file, line number, source text) of the user's model, or None
    A placeholder's `meta` also has `kind` ("parameter", "buffer" or "input") and `shown`, its name for the reader.
    Sizes are read from inputs only (`sym_size` of an input placeholder). No node names a device: factory calls
    take `device=None`, which an executor replaces. Training-only values are `Training(on, off)` arguments.
    """

    graph: fx.Graph
    parameters: tuple[Parameter, ...]  # buffers among them
    inputs: tuple[str, ...]  # placeholders of the tensor inputs, in order
    in_spec: pytree.TreeSpec  # of (args, kwargs); its leaves are `input_leaves`
    out_spec: pytree.TreeSpec
    input_leaves: tuple[Any, ...]  # the leaves of the example inputs: an `InputLeaf` for a tensor, or a constant
    model: str  # the model's class name
    source: str  # where the model stands, for messages
    arg_names: tuple[str, ...]  # what the model's forward calls the tensor inputs

    def __str__(self) -> str:
        return f"{self.model}\n" + "\n".join(map(_printed, self.graph.nodes))

    @cached_property
    def differentiable(self) -> frozenset[str]:
        """Placeholders that may need a gradient: trainable parameters, and inputs of a floating-point type."""
        nodes = self.graph.find_nodes(op="placeholder")
        return self.trainable | {n.name for n in nodes if n.name in self.inputs and _is_floating(n.meta.get("val"))}

    @cached_property
    def trainable(self) -> frozenset[str]:
        """Placeholders of the parameters that are trained."""
        return frozenset(p.node for p in self.parameters if p.trainable and not p.buffer)

    @cached_property
    def asked(self) -> frozenset[str]:
        """Placeholders that need a gradient in the example: trainable parameters, and inputs with `requires_grad`."""
        nodes = self.graph.find_nodes(op="placeholder")
        return self.trainable | {n.name for n in nodes if n.name in self.inputs and n.meta["val"].requires_grad}

    @cached_property
    def output_names(self) -> tuple[str, ...]:
        """The key of each output in what the model returns: `logits`, `1`, `states.0`; "" for a single bare tensor."""
        places = pytree.tree_unflatten(list(range(self.out_spec.num_leaves)), self.out_spec)
        try:
            paths = [path for path, _ in pytree.tree_flatten_with_path(places)[0]]
        except ValueError:  # a container without keys: outputs are numbered
            return tuple(map(str, range(self.out_spec.num_leaves)))
        return tuple(".".join(map(_key, path)) for path in paths)


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _key(key: Any) -> str:
    """One step of a path in a pytree: a dictionary's key, an index, or an attribute."""
    return str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)))


@dataclass(frozen=True)
class InputLeaf:
    """Stands in `Capture.input_leaves` for the tensor input with this placeholder."""

    node: str


@dataclass(frozen=True)
class Training:
    """An argument that depends on the module's mode: `on if self.training else off`."""

    on: Any
    off: Any


@dataclass(frozen=True)
class Collective:
    """A communication that the program does in one forward and backward."""

    kind: str  # all_reduce | all_gather | reduce_scatter
    direction: str  # forward | backward
    over: tuple[str, ...]  # mesh dimensions
    shape: tuple[Any, ...]  # of the value, ints and symbols, global batch and sequence
    dtype: torch.dtype
    node: str  # the program node that does it
    block: str  # the block it belongs to, e.g. "h.0 · attention"
    reason: str
    bytes: int = 0  # per rank, at the example's batch and sequence
    count: int = 1  # how many collectives this record stands for, when those of equal layers are listed once
    halved: bool = False  # whether each half of an even batch has this collective by itself


@dataclass(frozen=True)
class Cause:
    """Why a collective is in the program: the op that needs it, the split axes, and the op's special form, if any."""

    op: str
    axes: tuple[int, ...]
    form: str = ""  # a form of `ops.record`: "lookup", "norm", "loss"


@dataclass(frozen=True)
class Placed:
    """What partitioning and passes say about a node of a `Program`. It stands in `node.meta["placed"]`.

    `graphs` reads it (`layout_of`, `layouts_of`, `note_of`, `cause_of`) and writes it (`place_node`, `copy_value`).
    """

    layouts: tuple[tuple[Dim, ...], ...] = ()  # one layout for each tensor result, a `Dim` for each dimension of it
    note: str = ""  # what the node does across ranks, for the reader: "all-reduce", "partial over tensor"
    cause: Cause | None = None  # why the node communicates; None for a node that does not


@dataclass(frozen=True)
class Program:
    """One rank's graph, the same for all ranks (SPMD).

    Arguments may be `LocalSize`, `LocalRuns` or `Training`: `resolve` turns them into numbers for one rank. Besides
    ATen ops, nodes call the operators of `tpcompiler.runtime` (enter, reduce, …), whose group argument is here a
    tuple of mesh dimension names. A node's `meta` has the entries of a capture's nodes, and `placed`: see `Placed`.
    """

    graph: fx.Graph
    mesh: Mesh
    capture: Capture
    dims: dict[str, tuple[Dim, ...]]  # parameter name → layout
    collectives: tuple[Collective, ...] = ()
    left_sharded: frozenset[int] = frozenset()  # indices of the outputs that the spec leaves sharded
    taught: frozenset[str] = frozenset()  # operations that a user's rule speaks of, such as `mylib.rotate.default`

    def __str__(self) -> str:
        return f"{self.capture.model} over {self.mesh}\n" + "\n".join(map(_printed, self.graph.nodes))


def _printed(node: fx.Node) -> str:
    """A node as people read it: its name, the dtype and sizes of its value, the call, what it does across ranks, and
    the line of the model that it stands for."""
    val = node.meta.get("val")
    kind = (
        f": {str(val.dtype).removeprefix('torch.')}[{', '.join(map(str, val.shape))}]"
        if isinstance(val, torch.Tensor)
        else ""
    )
    placed, line = node.meta.get("placed"), node.meta.get("line")
    notes = [placed.note] if placed is not None and placed.note else []
    if line is not None:
        notes.append(f"{os.path.basename(line[0])}:{line[1]}")
    call = "" if node.op == "placeholder" else f" = {_call(node)}"
    return f"{node.name}{kind}{call}" + (f"  # {', '.join(notes)}" if notes else "")


def _call(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {_said(node.args[0])}"
    given = [*map(_said, node.args), *(f"{name}={_said(value)}" for name, value in node.kwargs.items())]
    name = node.target if isinstance(node.target, str | torch._ops.OpOverload) else node.target.__name__
    return f"{name}({', '.join(given)})"


def _said(argument: Any) -> str:
    """An argument by its `str`, also inside of a list, where Python would take its `repr`."""
    if isinstance(argument, list | tuple):
        return f"[{', '.join(map(_said, argument))}]"
    return str(argument)
