"""`tpc verify`: runs all ranks and compares outputs, loss and every gradient with the plain model's.

The plain model's graph is the reference. It runs in float64, and the model's own casts become casts to float64, so that
a difference is an error and not rounding. Another case compares the graph with the model itself, at the model's own
precision. Weights are the model's initial ones plus noise, because a bias of zero would hide errors in its use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tpcompiler.api import compile_capture
from tpcompiler.capture import capture
from tpcompiler.capture.promote import float64
from tpcompiler.capture.trace import split_example
from tpcompiler.errors import TpcError
from tpcompiler.execute.interpret import interpret_capture
from tpcompiler.program import Capture
from tpcompiler.runtime import Mesh
from tpcompiler.spec.schema import Spec
from tpcompiler.verification.against_model import Batch, Case, Comparison
from tpcompiler.verification.emitted import emitted_case
from tpcompiler.verification.processes import processes_case
from tpcompiler.verification.source_model import same_as_module

NOISE = 0.02
LARGEST = 2 * 2**30  # bytes of weights; a verification, which holds several copies, refuses larger models


@dataclass(frozen=True)
class Report:
    """What `tpc verify` found. `errors` has the largest of each name over all cases. `collectives` counts the executed
    ones by kind and direction."""

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
        rows += [f"FAILED  the check refuses {r['said']}" for r in self.check.get("refused", ())]
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
    source: str = "",
) -> Report:
    """Compile `model`, run every rank, and compare with the plain model.

    Compared are: the traced graph with the module; outputs and gradients at the example's sizes, at smaller ones, and
    accumulated over `micro_batches` batches (3 if it is 1 and `backward` is true); and the emitted source. With
    `distributed`, the emitted source also runs with written weights in real processes, over NCCL if each rank can have
    a GPU, else over gloo. Raises `TpcError` for bad input. Differences are in the report.
    """
    tell = progress or (lambda stage: None)
    read = Spec.load(spec)
    if read.mesh.data > 1:
        read = read.with_(mesh={"tensor": read.mesh.tensor})
    tell("capturing the model")
    captured = capture(model, example_inputs, source=source)
    _affordable(captured)
    precise = float64(captured) if dtype == torch.float64 else captured
    sharded = compile_capture(precise, read, progress=tell)
    module = model if isinstance(model, nn.Module) else _built(model, seed)
    state = initial_state(captured, module, dtype, seed)
    batch = inputs_of(captured, example_inputs, dtype)
    tell("checking the program")
    checked = sharded.check.as_dict()
    tell("comparing the graph with the module")
    cases = same_as_module(captured, module, example_inputs, backward)
    run = Comparison(sharded, state, dtype, backward)
    cases += _on_ranks(run, precise, state, batch, micro_batches, distributed, tell)
    return Report(captured.model, sharded.program.mesh, tuple(cases), run.executed, sharded.sharded_fraction, checked)


def _on_ranks(
    run: Comparison,
    capture: Capture,
    state: dict[str, Tensor],
    batch: Batch,
    micro_batches: int,
    distributed: bool,
    tell: Callable[[str], None],
) -> list[Case]:
    """Compares the program on all ranks with the graph: at the example's sizes and others, with accumulated gradients,
    and as emitted source."""
    tell("running all ranks")
    cases = [run.case("outputs and gradients" if run.backward else "outputs", [batch])]
    if run.backward and any(x.is_floating_point() for x in batch.values()):
        tell("running all ranks for the gradients of inputs")
        cases.append(run.of_inputs("gradients of the inputs", batch))
    other = _at_other_sizes(capture, state, batch)
    if other is not None:
        tell("running all ranks at other sizes")
        cases.append(run.case("the same at another batch and sequence", [other]))
    if run.backward:
        n = micro_batches if micro_batches > 1 else 3
        tell(f"running all ranks over {n} micro-batches")
        cases.append(run.case(f"gradients over {n} micro-batches", [vary(capture, batch, i) for i in range(n)]))
    tell("running the emitted source")
    cases.append(emitted_case(run, [b for b in (batch, other) if b is not None]))
    if distributed:
        tell("running the emitted source in processes")
        cases.append(processes_case(run, [b for b in (batch, vary(capture, batch, 1), other) if b is not None]))
    return cases


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
    """The module's values in `dtype` by the capture's names, with noise added to floating-point parameters."""
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
    """The example's tensors by placeholder, those of a floating-point type in `dtype`."""
    leaves, _ = pytree.tree_flatten(split_example(example_inputs))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    assert len(tensors) == len(captured.inputs), f"{len(tensors)} tensors for inputs {captured.inputs}"
    return {
        n: x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x.detach()
        for n, x in zip(captured.inputs, tensors, strict=True)
    }


def is_dynamic(size: int | torch.SymInt) -> bool:
    return not isinstance(size, int) and bool(size.node.expr.free_symbols)


def _at_other_sizes(captured: Capture, state: dict[str, Tensor], batch: Batch) -> Batch | None:
    """Smaller inputs that the plain model takes: smaller in all dimensions, or only in the first, as for images. None
    if it takes neither."""
    for first in (False, True):
        other = smaller(captured, batch, first)
        if other is None:
            return None
        try:
            with torch.no_grad():
                interpret_capture(captured, state, other)
        except RuntimeError:  # the model does not take these sizes
            continue
        return other
    return None


def smaller(captured: Capture, batch: Batch, first: bool = False) -> Batch | None:
    """The inputs, one element shorter in every dimension that is not fixed, or only in the `first`. None if no
    dimension can be shorter."""
    nodes = {n.name: n for n in captured.graph.nodes if n.op == "placeholder"}
    out: Batch = {}
    changed = False
    for name, x in batch.items():
        for i, n in enumerate(nodes[name].meta["val"].shape):
            if is_dynamic(n) and x.shape[i] > 2 and not (first and i):
                x = x.narrow(i, 0, x.shape[i] - 1)
                changed = True
        out[name] = x.clone()
    return out if changed else None


def vary(captured: Capture, batch: Batch, i: int) -> Batch:
    """The inputs in another order: rolled by `i` along every dimension that is not fixed, so that values stay valid."""
    nodes = {n.name: n for n in captured.graph.nodes if n.op == "placeholder"}
    out: Batch = {}
    for name, x in batch.items():
        dims = [d for d, n in enumerate(nodes[name].meta["val"].shape) if is_dynamic(n)]
        out[name] = x.roll([i] * len(dims), dims) if dims and i else x
    return out
