"""What the report predicts: one rank's step and the timeline of one layer, on the machine of the spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, get_args

from tpcompiler.api import Sharded, compile_capture
from tpcompiler.cost.layer_timeline import Timeline, layer_timeline
from tpcompiler.cost.predict import CostModel, ParallelLayout, Prediction
from tpcompiler.cost.rates import Recompute
from tpcompiler.graphs import example_size
from tpcompiler.spec.schema import Spec


@dataclass(frozen=True)
class Predicted:
    step: Prediction
    timeline: Timeline | None
    batch: int  # sequences a micro-batch of one rank
    sequence: int
    machine: str  # what it is predicted for, "h200" or "an H100, by default"


def predicted(sharded: Sharded) -> Predicted:
    """A step of one micro-batch a data rank, at the spec's sizes and recomputation, in 16 bits."""
    spec = sharded.spec
    batch, sequence = _sizes(sharded)
    recompute = spec.train.get("activation_checkpointing", "none")
    layout = ParallelLayout(
        tensor=spec.mesh.tensor,
        data=spec.mesh.data,
        micro=batch,
        recompute=cast(Recompute, recompute if recompute in get_args(Recompute) else "none"),
        overlap=bool(spec.overlap) and spec.mesh.tensor > 1,
    )
    priced = compile_capture(sharded.capture, spec.with_(overlap=True))
    model = CostModel(priced.program, priced.plan)
    step = model.predict(layout, spec.hardware, batch * layout.data, sequence)
    return Predicted(step, layer_timeline(model, layout, spec.hardware, sequence), batch, sequence, machine(spec))


def machine(spec: Spec) -> str:
    """What the spec calls its machine."""
    if "hardware" not in spec.model_fields_set:
        return "an H100, because the spec names no hardware"
    return spec.hardware.base or "the spec's hardware"


def _sizes(sharded: Sharded) -> tuple[int, int]:
    """Batch and sequence: those of the trainer's micro-batch where the spec says them, else of the example."""
    nodes = {n.name: n for n in sharded.capture.graph.find_nodes(op="placeholder")}
    shapes = [[example_size(n) for n in nodes[name].meta["val"].shape] for name in sharded.capture.inputs]
    shape = max(shapes, key=len, default=[1, 1])
    train = sharded.spec.train
    batch, sequence = train.get("micro_batch", shape[0] if shape else 1), train.get("sequence")
    return int(batch), int(sequence or (shape[1] if len(shape) > 1 else 1))
