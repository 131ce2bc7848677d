"""Compares all ranks of a program with the plain model's graph: outputs and gradients for the same state and inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from tpcompiler.api import Sharded
from tpcompiler.execute.interpret import interpret, interpret_capture
from tpcompiler.execute.simulate import executed, run_ranks
from tpcompiler.graphs import layout_of
from tpcompiler.layout import Dim, slice_on
from tpcompiler.program import Parameter, Program
from tpcompiler.runtime import Mesh, Ranks
from tpcompiler.runtime.runs import take_rows

Batch = dict[str, Tensor]  # placeholder → tensor
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Case:
    """The result of one comparison. Errors are relative to the largest element of the output, or of all gradients."""

    what: str
    errors: dict[str, float]
    tolerance: float
    notes: tuple[str, ...] = ()

    @property
    def max_rel_error(self) -> float:
        return max(self.errors.values(), default=0.0, key=lambda e: (e != e, e))

    @property
    def worst(self) -> str:
        return max(self.errors, key=lambda k: (self.errors[k] != self.errors[k], self.errors[k]), default="")

    @property
    def passed(self) -> bool:
        return not self.notes and self.max_rel_error <= self.tolerance


@dataclass(frozen=True)
class Results:
    outputs: list[Any]
    gradients: dict[str, Tensor | None]
    inputs: dict[str, Tensor | None] = field(default_factory=dict)  # gradients of inputs that ask for one


class Comparison:
    """Runs the plain graph and all ranks of the program from the same state, and compares them."""

    def __init__(self, sharded: Sharded, state: Mapping[str, Tensor], dtype: torch.dtype, backward: bool) -> None:
        self.sharded, self.state, self.dtype, self.backward = sharded, state, dtype, backward
        self.executed: dict[str, int] = {}

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    def case(self, what: str, batches: Sequence[Batch]) -> Case:
        program = self.sharded.program
        plain = self.plain(batches)
        log: list[Any] = []
        ranks = run_ranks(program.mesh, lambda r: self.rank(r, batches), log)
        errors, notes = self.compare(plain, ranks)
        counted = count_executed(log)
        listed = count_listed(program, len(batches), self.backward)
        if counted != listed:
            notes.append(f"executed collectives {counted}, the report lists {listed}")
        self.executed = self.executed or counted
        return Case(what, errors, self.tolerance, tuple(notes))

    def of_inputs(self, what: str, batch: Batch) -> Case:
        """Compares the gradients of all floating-point inputs, even of those that need none in the example."""
        asked = {k: x.detach().requires_grad_(x.is_floating_point()) for k, x in batch.items()}
        plain = self.plain([asked])
        ranks = run_ranks(self.sharded.program.mesh, lambda r: self.rank(r, [asked]), [])
        return Case(
            what, {k: max(_input_error(r, k, g) for r in ranks) for k, g in plain.inputs.items()}, self.tolerance
        )

    def plain(self, batches: Sequence[Batch]) -> Results:
        capture_ = self.sharded.capture
        buffers = {p.name for p in capture_.parameters if p.buffer}
        state = {k: v.clone().requires_grad_(v.is_floating_point() and k not in buffers) for k, v in self.state.items()}
        return self.run(lambda batch: interpret_capture(capture_, state, batch), state, batches)

    def rank(self, ranks: Ranks, batches: Sequence[Batch]) -> Results:
        program = self.sharded.program
        state = {}
        for p in program.capture.parameters:
            value = local_slice(self.state[p.name], program.dims[p.name], ranks.mesh, ranks.coords)
            state[p.name] = value.clone().requires_grad_(p.trainable and not p.buffer and value.is_floating_point())
        return self.run(lambda batch: interpret(program, ranks, state, batch), state, batches, ranks.coords)

    def run(
        self,
        forward: Callable[[Batch], Sequence[Any]],
        state: Mapping[str, Tensor],
        batches: Sequence[Batch],
        coords: Mapping[str, int] | None = None,
    ) -> Results:
        """Runs `forward` and backward over the batches. `coords` is the place of a rank, whose outputs may be slices;
        None for the plain model."""
        outputs: list[Any] = []
        inputs: dict[str, Tensor | None] = {}
        for n, given in enumerate(batches):
            batch = {k: x.detach().clone().requires_grad_(x.requires_grad) for k, x in given.items()}
            found = list(forward(batch))
            if self.backward:
                cotangents = [None if coords is None else self.cotangent(i, x, coords) for i, x in enumerate(found)]
                if (loss := probe(found, cotangents)) is not None:
                    loss.backward()
            inputs |= {f"input {k} of batch {n}": x.grad for k, x in batch.items() if x.requires_grad}
            outputs.extend(x.detach() if isinstance(x, Tensor) else x for x in found)
        return Results(outputs, {k: v.grad for k, v in state.items()}, inputs)

    def output_dims(self, i: int) -> tuple[Dim, ...]:
        """The layout of output `i`, counted over all batches. It is split if the spec leaves this output sharded."""
        flat = next(n for n in self.sharded.program.graph.nodes if n.op == "output").args[0]
        node = flat[i % len(flat)]
        return (layout_of(node) or ()) if isinstance(node, fx.Node) else ()

    def cotangent(self, i: int, x: Any, coords: Mapping[str, int]) -> Tensor | None:
        """A rank's part of the gradient of `probe` with respect to output `i`. The rank holds the part `x` of it."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return None
        dims = self.output_dims(i)
        shape = [d.size if d.over else n for n, d in zip(x.shape, dims, strict=True)] if dims else list(x.shape)
        return local_slice(cotangent(i, shape, x.dtype), dims, self.sharded.program.mesh, coords)

    def compare(self, plain: Results, ranks: Sequence[Results]) -> tuple[dict[str, float], list[str]]:
        program = self.sharded.program
        errors: dict[str, float] = {}
        notes: list[str] = []
        for i, expected in enumerate(plain.outputs):
            if not isinstance(expected, Tensor):
                continue
            dims, seen = self.output_dims(i), dict[Any, Tensor]()
            worst, same = 0.0, True
            for rank, result in enumerate(ranks):
                x, coords = result.outputs[i], program.mesh.coords(rank)
                worst = max(worst, relative(x, local_slice(expected, dims, program.mesh, coords)))
                first = seen.setdefault(tuple(coords[name] for d in dims for name in d.over), x)
                same = same and (torch.equal(x, first) or bool(first.isnan().any()))
            errors[f"output {i}"] = worst
            if not same:
                notes.append(f"output {i} is not the same bits on all ranks that hold the same part")
        if self.backward:
            self.compare_gradients(program, plain, ranks, errors, notes)
            errors |= {k: max(_input_error(r, k, g) for r in ranks) for k, g in plain.inputs.items()}
        return errors, notes

    def compare_gradients(
        self, program: Program, plain: Results, ranks: Sequence[Results], errors: dict[str, float], notes: list[str]
    ) -> None:
        scale = max(
            (float(g.abs().max()) for g in plain.gradients.values() if g is not None and g.numel()), default=1.0
        )
        for p in program.capture.parameters:
            expected = plain.gradients[p.name]
            if p.buffer or not p.trainable or expected is None:
                continue
            parts = [r.gradients[p.name] for r in ranks]
            whole, same = merged(parts, p, program)
            errors[p.name] = float("inf") if whole is None else relative(whole, expected, scale)
            if not same:
                notes.append(f"the gradient of {p.name} is not the same bits on ranks that hold the same part")


def _input_error(rank: Results, name: str, expected: Tensor | None) -> float:
    """The error of one rank's gradient of an input. It is 0 if the rank did not compute input gradients."""
    found = rank.inputs.get(name, expected)
    if found is None or expected is None:
        return 0.0 if found is expected else float("inf")
    return relative(found, expected)


def probe(outputs: Sequence[Any], cotangents: Sequence[Tensor | None] | None = None) -> Tensor | None:
    """A scalar that depends on every floating-point output. `cotangents` are its gradients with respect to the outputs,
    by default those of `cotangent`."""
    total: Tensor | None = None
    for i, (x, given) in enumerate(zip(outputs, cotangents or [None] * len(outputs), strict=True)):
        if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad:
            part = (x * (cotangent(i, x.shape, x.dtype) if given is None else given)).sum()
            total = part if total is None else total + part
    return total


def cotangent(i: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The gradient of `probe` with respect to output `i`: 1 for a scalar, fixed random numbers for any other shape."""
    if not shape:
        return torch.ones((), dtype=dtype)
    generator = torch.Generator().manual_seed(i)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype) / prod(shape) ** 0.5


def relative(a: Tensor, b: Tensor, scale: float | None = None) -> float:
    """The largest difference, divided by the largest element of `b` or by `scale`. Infinite for different shapes, and
    where values that are not finite differ."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    if not b.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    a, b = a.double(), b.double()
    same = torch.isfinite(b)
    if not torch.equal(a[~same], b[~same]) and not bool((a[~same].isnan() == b[~same].isnan()).all()):
        return float("inf")
    a, b = a[same], b[same]
    if not a.numel():
        return 0.0
    size = float(b.abs().max()) if scale is None else scale
    return float((a - b).abs().max()) / max(size, 1e-30)


def local_slice(value: Tensor, dims: Sequence[Dim], mesh: Mesh, coords: Mapping[str, int]) -> Tensor:
    """A rank's slice of a whole value."""
    for i, dim in enumerate(dims):
        if dim.over:
            value = take_rows(value, i, dim.runs(mesh, coords))
    return value


def merged(parts: Sequence[Tensor | None], p: Parameter, program: Program) -> tuple[Tensor | None, bool]:
    """The whole value from the ranks' slices, and whether all ranks that hold the same slice agree bit for bit."""
    mesh, dims = program.mesh, program.dims[p.name]
    whole: Tensor | None = None
    seen: dict[Any, Tensor] = {}
    same = True
    for rank, part in enumerate(parts):
        coords = mesh.coords(rank)
        runs = slice_on(dims, mesh, coords)
        if part is None:
            if all(runs):
                return None, same
            continue
        if runs in seen:
            same = same and torch.equal(seen[runs], part)
            continue
        seen[runs] = part
        whole = part.new_full(p.shape, float("nan")) if whole is None else whole
        index = [torch.cat([torch.arange(a, b) for a, b in r]) if r else torch.arange(0) for r in runs]
        if part.numel() or not p.shape:
            whole[torch.meshgrid(*index, indexing="ij") if index else ()] = part
    return whole, same


def count_executed(log: Sequence[Any]) -> dict[str, int]:
    out: dict[str, int] = {}
    for r in executed(log):
        out[f"{r.kind} {r.direction}"] = out.get(f"{r.kind} {r.direction}", 0) + 1
    return dict(sorted(out.items()))


def count_listed(program: Program, runs: int, backward: bool, halves: int = 0) -> dict[str, int]:
    """How many collectives of each kind and direction the list has for so many runs. In `halves` of the runs, an even
    batch is computed in two halves, as the emitted source does."""
    out: dict[str, int] = {}
    for c in program.collectives:
        if c.direction == "forward" or backward:
            name = f"{c.kind} {c.direction}"
            out[name] = out.get(name, 0) + (runs + halves * c.halved) * c.count
    return dict(sorted(out.items()))
