"""Compiles the model of a run for its ranks: captured with the inputs that batches have, and reduced to one output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tpcompiler.api import Sharded, compile_capture
from tpcompiler.capture import Recorded, capture_recorded, float64, record
from tpcompiler.emit import load_source
from tpcompiler.errors import TpcError
from tpcompiler.load.target import Inputs, Loaded
from tpcompiler.program import Capture
from tpcompiler.runtime import Ranks, Rng
from tpcompiler.spec.schema import Spec

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Compiled:
    """A model for every rank of a mesh, and where its initial values come from."""

    sharded: Sharded
    recorded: Recorded

    @property
    def capture(self) -> Capture:
        return self.sharded.capture

    @property
    def takes(self) -> tuple[str, ...]:
        """What the model's forward calls its tensor inputs."""
        return self.capture.arg_names

    def module(self, ranks: Ranks, rng: Rng) -> nn.Module:
        """This rank's module, not yet allocated: its parameters and buffers are on the meta device."""
        built = load_source(self.sharded.source, f"tpc_{self.capture.model}").Model
        with torch.device("meta"):
            module: nn.Module = built(ranks, rng)
        trainable = {n: p.trainable for p in self.capture.parameters if not p.buffer for n in p.names}
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trainable[name])
        return module


def compile_model(
    loaded: Loaded,
    spec: Spec,
    inputs: Inputs,
    output: Callable[[Capture], int],
    *,
    double: bool = False,
    progress: Progress = lambda stage: None,
) -> Compiled:
    """Captures a model on meta, compiles it for the spec's ranks and proves it.

    Only the output whose index `output` returns is computed. `double` computes everything in float64, even where the
    model casts to another type. Raises `TpcError`.
    """
    with loaded.environment:
        progress("capturing the model")
        recorded = record(loaded.build)
        captured = capture_recorded(recorded, inputs, source=loaded.source)
    captured = only(captured, output(captured))
    if double:
        captured = float64(captured)
    sharded = compile_capture(captured, spec, progress=progress)
    progress("proving the program")
    return Compiled(sharded.proven(), recorded)


def only(capture: Capture, output: int) -> Capture:
    """The capture with only one of its outputs. The graph is changed in place."""
    node = next(n for n in capture.graph.nodes if n.op == "output")
    node.args = ((node.args[0][output],),)
    capture.graph.eliminate_dead_code()
    return replace(capture, out_spec=pytree.tree_structure(0))


def loss_output(capture: Capture) -> int:
    """The index of the loss: the only output that is a scalar. Raises `TpcError` if none or several are."""
    found = [i for i, v in enumerate(_outputs(capture)) if v.dim() == 0 and v.dtype.is_floating_point]
    if len(found) != 1:
        what = "none of its outputs is" if not found else f"{len(found)} of its outputs are"
        raise TpcError(
            f"{capture.source or capture.model}: the trainer needs a model that gives its loss when its labels are "
            f"given: {what} a single number, with the inputs {', '.join(capture.arg_names)}"
        )
    return found[0]


def logits_output(capture: Capture) -> int:
    """The index of the logits: the first floating-point output of shape [b, s, …]. Raises `TpcError` without one."""
    for i, v in enumerate(_outputs(capture)):
        if v.dim() == 3 and v.dtype.is_floating_point:
            return i
    raise TpcError(f"{capture.source or capture.model}: gives no logits [batch, sequence, vocabulary] without labels")


def _outputs(capture: Capture) -> list[Tensor]:
    node = next(n for n in capture.graph.nodes if n.op == "output")
    return [v.meta["val"] for v in node.args[0]]


def training_inputs(loaded: Loaded, available: Iterable[str]) -> Inputs:
    """The example inputs, which must be given by name, as the batches of a run give them.

    Raises `TpcError` when the model needs an input that the data, which has those in `available`, does not have.
    """
    args, kwargs = loaded.inputs()
    names = list(available)
    if args:
        raise TpcError(
            f"{loaded.source}: its example inputs are positional; the trainer gives inputs by name: let example_inputs "
            f"return a dictionary with {', '.join(names)}"
        )
    lacking = [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in names]
    if lacking:
        spare = next((name for name in names if name not in kwargs), names[0])
        raise TpcError(
            f"{loaded.source}: takes {lacking[0]}, and the data gives {', '.join(names)}; name it in train.data.names, "
            f"such as {{{spare}: {lacking[0]}}}, or take another train.data.task"
        )
    if not any(isinstance(v, Tensor) for v in kwargs.values()):
        raise TpcError(f"{loaded.source}: its example inputs hold no tensor")
    return (), kwargs


def select(tensors: Mapping[str, Tensor], takes: Sequence[str]) -> dict[str, Any]:
    """The tensors of a batch that the model takes."""
    return {name: tensors[name] for name in takes}
