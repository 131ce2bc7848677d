"""`tpc verify`: all ranks run, and compared with the plain model: outputs, loss and every gradient.

The plain model's graph is the reference, in float64 with the casts that the model makes itself promoted, so that an
error is an error and not rounding. That the graph is the model is a case of its own, at the model's own precision.
Weights are the model's initial ones with noise on top: a bias that starts at zero must not hide its own mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tpcompiler.api import Sharded, compile_capture
from tpcompiler.capture import capture
from tpcompiler.capture.promote import float64
from tpcompiler.capture.trace import split_example
from tpcompiler.errors import TpcError
from tpcompiler.interpret import interpret, interpret_capture
from tpcompiler.layout import Dim
from tpcompiler.program import Capture, Parameter, Program
from tpcompiler.runtime import Mesh, Ranks
from tpcompiler.runtime.rows import take_rows
from tpcompiler.simulate import executed, run_ranks
from tpcompiler.spec import Spec

Batch = dict[str, Tensor]  # placeholder → tensor
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
NOISE = 0.02
LARGEST = 2 * 2**30  # bytes of weights that a verification is willing to hold several times over


@dataclass(frozen=True)
class Case:
    """One comparison. Errors are relative: to the largest element of an output, or of all gradients."""

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
class Report:
    """What `tpc verify` found. `errors` by name, over all cases; `collectives` as executed: kind and direction → count."""

    model: str
    mesh: Mesh
    cases: tuple[Case, ...]
    collectives: dict[str, int]
    sharded_fraction: float
    check: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(c.passed for c in self.cases) and not self.check.get("refused")

    @property
    def errors(self) -> dict[str, float]:
        out: dict[str, float] = {}
        for case in self.cases:
            for name, e in case.errors.items():
                out[name] = max(e, out.get(name, 0.0), key=lambda x: (x != x, x))
        return out

    @property
    def max_rel_error(self) -> float:
        return max((c.max_rel_error for c in self.cases), default=0.0, key=lambda e: (e != e, e))

    def as_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "max_rel_error": self.max_rel_error,
            "model": self.model,
            "mesh": dict(self.mesh.dims),
            "sharded_fraction": self.sharded_fraction,
            "collectives": self.collectives,
            "check": self.check,
            "cases": [
                {
                    "what": c.what,
                    "passed": c.passed,
                    "max_rel_error": c.max_rel_error,
                    "worst": c.worst,
                    "tolerance": c.tolerance,
                }
                | {"notes": list(c.notes)}
                for c in self.cases
            ],
        }

    def __str__(self) -> str:
        rows = [
            f"{'passed' if c.passed else 'FAILED':7} {c.max_rel_error:9.1e}  {c.what}  {'; '.join(c.notes)}"
            for c in self.cases
        ]
        return "\n".join([f"{self.model} on {self.mesh}: {'passed' if self.passed else 'FAILED'}", *rows])


def verify(
    model: Callable[[], nn.Module] | nn.Module,
    example_inputs: Any,
    spec: str | Path | Mapping[str, Any] | Spec,
    *,
    dtype: torch.dtype = torch.float64,
    backward: bool = True,
    micro_batches: int = 1,
    distributed: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Compile `model`, run every rank, and compare with the plain model.

    Cases: the traced graph against the module; outputs and gradients at the example's sizes, at smaller ones, and over
    `micro_batches` accumulated batches (3 when it is 1 and `backward`); with `distributed`, the emitted source and the
    written weights in real processes over gloo. Raises `TpcError` for bad input; differences are in the report.
    """
    tell = progress or (lambda stage: None)
    read = Spec.load(spec)
    if read.mesh.data > 1:
        read = read.with_(mesh={"tensor": read.mesh.tensor})
    tell("capturing the model")
    captured = capture(model, example_inputs)
    _affordable(captured)
    precise = float64(captured) if dtype == torch.float64 else captured
    sharded = compile_capture(precise, read, progress=tell)
    module = model if isinstance(model, nn.Module) else _built(model, seed)
    state = initial_state(captured, module, dtype, seed)
    batch = inputs_of(captured, example_inputs, dtype)
    tell("comparing the graph with the module")
    cases = [_same_graph(captured, module, example_inputs)]
    run = Comparison(sharded, state, dtype, backward)
    tell("running all ranks")
    cases.append(run.case("outputs and gradients" if backward else "outputs", [batch]))
    other = smaller(captured, batch)
    if other is not None:
        tell("running all ranks at other sizes")
        cases.append(run.case("the same at another batch and sequence", [other]))
    if backward:
        n = micro_batches if micro_batches > 1 else 3
        tell(f"running all ranks over {n} micro-batches")
        cases.append(run.case(f"gradients over {n} micro-batches", [vary(captured, batch, i) for i in range(n)]))
    if distributed:
        from tpcompiler.verify_processes import processes_case

        tell("running the emitted source in processes")
        cases.append(processes_case(sharded, state, batch, run, backward))
    return Report(captured.model, sharded.program.mesh, tuple(cases), run.executed, sharded.sharded_fraction)


def _affordable(captured: Capture) -> None:
    size = sum(p.bytes for p in captured.parameters)
    if size > LARGEST:
        raise TpcError(
            f"{captured.model} has {size / 2**30:.1f} GiB of parameters, too many to run all ranks in one process; "
            f"verify a smaller one: fewer layers prove the same, e.g. --set layers=2"
        )


def _built(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def initial_state(captured: Capture, module: nn.Module, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """The module's values in `dtype`, floating-point parameters with noise on top, by the capture's names."""
    held: dict[str, Tensor] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for p in captured.parameters:
        value = held.get(p.name, p.value)
        assert value is not None, p.name
        value = value.detach().cpu()
        if value.is_floating_point():
            value = value.to(dtype)
            if not p.buffer:
                value = value + NOISE * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(dtype)
        out[p.name] = value
    return out


def inputs_of(captured: Capture, example_inputs: Any, dtype: torch.dtype) -> Batch:
    """The example's tensors by placeholder, floating-point ones in `dtype`."""
    leaves, _ = pytree.tree_flatten(split_example(example_inputs))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    assert len(tensors) == len(captured.inputs), f"{len(tensors)} tensors for inputs {captured.inputs}"
    return {
        n: x.detach().to(dtype) if x.is_floating_point() else x.detach()
        for n, x in zip(captured.inputs, tensors, strict=True)
    }


def is_dynamic(size: int | torch.SymInt) -> bool:
    return not isinstance(size, int) and bool(size.node.expr.free_symbols)


def smaller(captured: Capture, batch: Batch) -> Batch | None:
    """The same inputs one element shorter in every dimension that is not fixed; None when there is none."""
    nodes = {n.name: n for n in captured.graph.nodes if n.op == "placeholder"}
    out: Batch = {}
    changed = False
    for name, x in batch.items():
        for i, n in enumerate(nodes[name].meta["val"].shape):
            if is_dynamic(n) and x.shape[i] > 2:
                x = x.narrow(i, 0, x.shape[i] - 1)
                changed = True
        out[name] = x.clone()
    return out if changed else None


def vary(captured: Capture, batch: Batch, i: int) -> Batch:
    """The same inputs in another order: rolled along every dimension that is not fixed, so that values stay valid."""
    nodes = {n.name: n for n in captured.graph.nodes if n.op == "placeholder"}
    out: Batch = {}
    for name, x in batch.items():
        dims = [d for d, n in enumerate(nodes[name].meta["val"].shape) if is_dynamic(n)]
        out[name] = x.roll([i] * len(dims), dims) if dims and i else x
    return out


def _same_graph(captured: Capture, module: nn.Module, example_inputs: Any) -> Case:
    """The captured graph against the module itself, in evaluation mode at the module's own precision."""
    args, kwargs = split_example(example_inputs)
    was = module.training
    module.eval()
    try:
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            expected = [x for x in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(x, Tensor)]
            held = {
                **dict(module.named_parameters(remove_duplicate=False)),
                **dict(module.named_buffers(remove_duplicate=False)),
            }
            leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            found = interpret_capture(captured, held, dict(zip(captured.inputs, leaves, strict=True)))
    finally:
        module.train(was)
    found_tensors = [x for x in found if isinstance(x, Tensor)]
    errors = {f"output {i}": relative(a, b) for i, (a, b) in enumerate(zip(found_tensors, expected, strict=True))}
    return Case("the traced graph is the module", errors, 1e-4)


def relative(a: Tensor, b: Tensor, scale: float | None = None) -> float:
    """Largest difference over the largest element of `b` (or `scale`); inf for other shapes or what is no number."""
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


@dataclass(frozen=True)
class Results:
    outputs: list[Any]
    gradients: dict[str, Tensor | None]


class Comparison:
    """The plain graph and all ranks of the program, from the same state."""

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

    def plain(self, batches: Sequence[Batch]) -> Results:
        state = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in self.state.items()}
        capture_ = self.sharded.capture
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
        """`coords`: of a rank, whose outputs may be slices; None for the plain model."""
        outputs: list[Any] = []
        for batch in batches:
            found = list(forward(batch))
            if self.backward:
                cotangents = [None if coords is None else self.cotangent(i, x, coords) for i, x in enumerate(found)]
                if (loss := probe(found, cotangents)) is not None:
                    loss.backward()
            outputs.extend(x.detach() if isinstance(x, Tensor) else x for x in found)
        return Results(outputs, {k: v.grad for k, v in state.items()})

    def output_dims(self, i: int) -> tuple[Dim, ...]:
        """How output `i` (of one batch after the other) lies on the mesh: an output may be left sharded on request."""
        flat = next(n for n in self.sharded.program.graph.nodes if n.op == "output").args[0]
        node = flat[i % len(flat)]
        return tuple(node.meta.get("dims") or ()) if isinstance(node, fx.Node) else ()

    def cotangent(self, i: int, x: Any, coords: Mapping[str, int]) -> Tensor | None:
        """A rank's part of the gradient of `probe` by output `i`, of which it has `x`."""
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


def probe(outputs: Sequence[Any], cotangents: Sequence[Tensor | None]) -> Tensor | None:
    """One number that every floating-point output moves; `cotangents` are its gradients where not the usual ones."""
    total: Tensor | None = None
    for i, (x, given) in enumerate(zip(outputs, cotangents, strict=True)):
        if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad:
            part = (x * (cotangent(i, x.shape, x.dtype) if given is None else given)).sum()
            total = part if total is None else total + part
    return total


def cotangent(i: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The gradient of `probe` by output `i`: 1 by scalars, fixed random numbers by others."""
    if not shape:
        return torch.ones((), dtype=dtype)
    generator = torch.Generator().manual_seed(i)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype) / prod(shape) ** 0.5


def local_slice(value: Tensor, dims: Sequence[Dim], mesh: Mesh, coords: Mapping[str, int]) -> Tensor:
    """One rank's slice of a whole value."""
    for i, dim in enumerate(dims):
        if dim.over:
            value = take_rows(value, i, dim.runs(mesh, coords))
    return value


def merged(parts: Sequence[Tensor | None], p: Parameter, program: Program) -> tuple[Tensor | None, bool]:
    """The whole value from the ranks' slices, and whether ranks that hold the same slice agree to the bit."""
    mesh, dims = program.mesh, program.dims[p.name]
    whole: Tensor | None = None
    seen: dict[Any, Tensor] = {}
    same = True
    for rank, part in enumerate(parts):
        coords = mesh.coords(rank)
        runs = tuple(d.runs(mesh, coords) for d in dims)
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


def count_listed(program: Program, runs: int, backward: bool) -> dict[str, int]:
    out: dict[str, int] = {}
    for c in program.collectives:
        if c.direction == "forward" or backward:
            out[f"{c.kind} {c.direction}"] = out.get(f"{c.kind} {c.direction}", 0) + runs * c.count
    return dict(sorted(out.items()))
