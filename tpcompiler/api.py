"""The Python API: runs the stages one after the other and keeps the result of each."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tpcompiler.axes.algebra import Mark
from tpcompiler.axes.infer import AxisMap
from tpcompiler.capture import capture as capture_model
from tpcompiler.capture import capture_recorded, record
from tpcompiler.capture.unfused import dropping_attention, unfuse_dropping_attention
from tpcompiler.errors import CheckError
from tpcompiler.partition import CannotSplit, partition
from tpcompiler.passes import run_passes
from tpcompiler.plan import Plan, make_plan
from tpcompiler.plan.collectives import folded, list_collectives
from tpcompiler.plan.grouped_heads import infer_for
from tpcompiler.program import Capture, Program
from tpcompiler.spec.schema import Spec

if TYPE_CHECKING:
    from tpcompiler.check import CheckReport

Progress = Callable[[str], None]
MOMENTS = 2 * 4  # bytes of optimizer state for a parameter's element: Adam's two moments in float32


@dataclass(frozen=True)
class Sharded:
    """A compiled model: the result of every stage. `source`, `check` and `memory` are computed at first use."""

    spec: Spec
    capture: Capture
    axes: AxisMap
    plan: Plan
    program: Program
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def source(self) -> str:
        """The emitted Python file."""
        from tpcompiler.emit import emit

        with _timed(self.seconds, "emit"):
            return emit(self.program)

    @cached_property
    def check(self) -> CheckReport:
        """The static checker's verdict on the program and on its source. It takes seconds, and no GPU and no weights.

        Proofs are kept on disk: the same checker does not prove the same program again under the same torch.
        """
        from tpcompiler.check import proof

        return proof(self.program, self.source)

    def proven(self) -> Sharded:
        """Returns this compilation if the checker accepts it; else raises `CheckError`, one line."""
        if not self.check.passed:
            first, *others = self.check.refused
            more = f" (and {len(others)} more)" if others else ""
            model = self.capture.model
            raise CheckError(f"{model} is not written or run: the checker refuses the program at {first}{more}")
        return self

    @cached_property
    def memory(self) -> dict[str, int]:
        """Bytes on the rank that holds most: its parameters, their gradients, Adam's moments, and the total of these.

        Activations are not included.
        """
        worst = max(map(self.memory_on, range(self.program.mesh.size)), key=sum)
        return dict(zip(("parameters", "gradients", "optimizer"), worst, strict=True)) | {"total": sum(worst)}

    def memory_on(self, rank: int) -> tuple[int, int, int]:
        """Bytes of one rank's parameters and buffers, of the gradients, and of Adam's moments."""
        mesh = self.program.mesh
        coords = mesh.coords(rank)
        held = gradients = moments = 0
        for p in self.capture.parameters:
            n = prod(dim.local_size(mesh, coords) for dim in self.program.dims[p.name])
            held += n * p.dtype.itemsize
            if p.trainable and not p.buffer:
                gradients += n * p.dtype.itemsize
                moments += n * MOMENTS
        return held, gradients, moments

    @cached_property
    def sharded_fraction(self) -> float:
        """Bytes of matrix parameters that are split, over bytes of all matrix parameters."""
        matrices = [p for p in self.capture.parameters if not p.buffer and len(p.shape) > 1]
        split = sum(p.bytes for p in matrices if any(d.over for d in self.program.dims[p.name]))
        return split / max(1, sum(p.bytes for p in matrices))

    def report(self) -> dict[str, Any]:
        """The report that `tpc shard --json` prints and that `cli/tables.py` draws."""
        return {
            "model": self.capture.model,
            "mesh": dict(self.program.mesh.dims),
            "blocks": [
                {"kind": b.kind, "name": b.name, "layers": b.layers, "axis": b.axis, "size": b.size}
                | {"over": list(b.over), "local": list(b.local), "parameters": list(b.parameters)}
                for b in self.plan.blocks
            ],
            "collectives": [
                {
                    "kind": c.kind,
                    "direction": c.direction,
                    "over": list(c.over),
                    "shape": list(c.shape),
                    "bytes": c.bytes,
                }
                | {"block": c.block, "node": c.node, "count": c.count, "reason": c.reason}
                for c in folded(self.program.collectives, self.plan)
            ],
            "memory": self.memory,
            "replicated": [{"name": r.name, "bytes": r.bytes, "reason": r.reason} for r in self.plan.replicated],
            "sharded_fraction": self.sharded_fraction,
            "check": self.check.as_dict(),
            "seconds": {k: round(v, 3) for k, v in self.seconds.items()} | {"check": round(self.check.seconds, 3)},
        }

    def write(
        self,
        directory: str | Path,
        weights: Any = None,
        progress: Callable[[int, int], None] | None = None,
        dtype: torch.dtype | None = None,
        force: bool = False,
    ) -> None:
        """Writes `model.py`, `manifest.json`, buffers, and the ranks' weights if there are any: all of it or nothing.

        `weights` is anything `tpcompiler.weights.open_source` takes. A directory that holds weights or a checkpoint is
        replaced only with `force`; else this raises `WeightsError`.
        """
        from tpcompiler.weights import output, refuse_to_replace, write_shards, write_text

        if not force:
            refuse_to_replace(directory)
        self.proven()
        source = self.source
        with output(directory) as new:
            write_shards(
                weights,
                self.capture.parameters,
                self.program.dims,
                self.program.mesh,
                new,
                spec=self.spec.dump(),
                dtype=dtype,
                progress=progress,
            )
            write_text(new / "model.py", source)


def shard(
    model: Callable[[], nn.Module] | nn.Module,
    example_inputs: Any,
    spec: str | Path | Mapping[str, Any] | Spec,
    *,
    progress: Progress | None = None,
    source: str = "",
) -> Sharded:
    """Compile a model for the ranks of a spec. The program that is returned is proven equal to the model.

    `model` is a module or a function that builds one (its parameters are then never allocated). `example_inputs` is a
    tuple, a dictionary of keyword arguments, or a pair of both (docs/loops.md). Raises `TpcError`, one line.
    """
    seconds: dict[str, float] = {}
    tell = progress or (lambda stage: None)
    read = Spec.load(spec)
    tell("capturing the model")
    with _timed(seconds, "capture"):
        captured = capture_model(model, example_inputs, source=source)
    sharded = compile_capture(captured, read, progress=tell, seconds=seconds)
    tell("proving the program")
    return sharded.proven()


def compile_capture(
    captured: Capture, spec: Spec, *, progress: Progress | None = None, seconds: dict[str, float] | None = None
) -> Sharded:
    """Runs the stages from axes to passes. The program is not proven yet: call `proven` before it runs."""
    seconds = {} if seconds is None else seconds
    tell = progress or (lambda stage: None)
    tell("inferring axes")
    with _timed(seconds, "axes"):
        if spec.attention_dropout == "exact":
            captured = unfuse_dropping_attention(captured)
        captured, axes = infer_for(captured, spec)
    tell("planning")
    while True:  # Two cases without a form show only in a plan's layouts: an op other than a product over segments that
        # are split in part, and an axis folded into the batch. All other cases are known from the ops' records.
        with _timed(seconds, "plan"):
            plan = make_plan(captured, axes, spec)
        if shared := _drops_apart(captured, axes, plan):
            with _timed(seconds, "axes"):
                captured, axes = infer_for(unfuse_dropping_attention(captured, shared), spec)
            continue
        try:
            with _timed(seconds, "partition"):
                program = partition(captured, axes, plan, spec)
            break
        except CannotSplit as e:
            axes = _without(axes, e)
    tell("running the passes")
    with _timed(seconds, "passes"):
        program = run_passes(program, spec.overlap)
        program = replace(program, collectives=list_collectives(program, plan))
    return Sharded(spec, captured, axes, plan, program, seconds)


def _drops_apart(captured: Capture, axes: AxisMap, plan: Plan) -> frozenset[str]:
    """The fused attentions with dropout that several ranks compute alike: their kernels would draw different masks."""
    tensor = {name for name in plan.mesh.names if name != "data" and plan.mesh[name] > 1}

    def over(name: str) -> set[str]:
        dims = plan.dims(axes, axes.values[name][0]) if name in axes.values else ()
        return {n for dim in dims for n in dim.over}

    return frozenset(name for name in dropping_attention(captured) if not tensor <= over(name))


def _without(axes: AxisMap, refused: CannotSplit) -> AxisMap:
    """The axes, with those that have no form on one rank marked whole. That costs parallelism, never correctness."""
    assert refused.leaves, str(refused)
    mark = Mark(refused.node, refused.why)
    return replace(axes, marks=axes.marks | {leaf: (*axes.marks.get(leaf, ()), mark) for leaf in refused.leaves})


def parallelize(
    model: Callable[[], nn.Module] | nn.Module,
    example_inputs: Any,
    spec: str | Path | Mapping[str, Any] | Spec,
    mesh: Any = None,
    *,
    weights: Any = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """This rank's module, ready to train. Every rank calls this function.

    `mesh` is a `DeviceMesh` whose dimension names are the spec's. Its default is the processes that torchrun started.
    `weights` is anything that `tpcompiler.weights.open_source` takes. Without it, the values are those of `model` if it
    is a module. If it is a function, they are drawn as the constructor draws them, from the spec's seed and each
    parameter's name, so that they are the same on any mesh. No rank ever makes or reads more than one whole parameter
    at a time. Buffers keep their values.

    `device` is by default that of the mesh, or that of the processes' backend. `dtype` converts floating-point
    parameters and buffers. Call `module.rng.at(step, first_sample)` on all ranks before each step to draw new dropout
    masks. Raises `TpcError`, one line.
    """
    from tpcompiler.emit import load_source
    from tpcompiler.runtime import Rng
    from tpcompiler.runtime.precision import cast
    from tpcompiler.weights.fill import InitialValues, device_of, fill_from, own_values, ranks_of
    from tpcompiler.weights.on_mesh import OnMesh, attach

    read = Spec.load(spec)
    recorded = record(model)
    sharded = compile_capture(capture_recorded(recorded, example_inputs), read).proven()
    program = sharded.program
    ranks = ranks_of(mesh, program.mesh)
    where = torch.device(device) if device is not None else device_of(mesh)
    name = hashlib.sha256(sharded.source.encode()).hexdigest()[:12]  # two programs are two modules to torch.compile
    emitted = load_source(sharded.source, f"tpc_{sharded.capture.model}_{name}")
    with where:
        module: nn.Module = emitted.Model(ranks, Rng(read.seed, where))
    if dtype is not None:
        module = cast(module, dtype)
    if weights is None:
        weights = own_values(model) if isinstance(model, nn.Module) else InitialValues(recorded, read.seed)
    fill_from(module, program, ranks.coords, weights)
    attach(module, OnMesh(program, ranks, mesh, where.type))
    return module


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


__all__ = ["Sharded", "compile_capture", "parallelize", "shard"]
