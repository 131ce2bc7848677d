"""The static checker: a compiled program is proven equal to its model, forward and backward, or refused.

It does not use the axes, the plan or the partitioner that made the program. `docs/checking.md` says what is proven,
what is tested, and what is assumed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tpcompiler.check.backward import sweep_backward
from tpcompiler.check.claims import Geometry
from tpcompiler.check.forward import Refused, live_nodes, sweep_forward
from tpcompiler.check.parameters import uncovered
from tpcompiler.check.report import CheckReport, Refusal
from tpcompiler.check.sizes import Sizes, beyond, choices, example
from tpcompiler.check.source import compare_source
from tpcompiler.check.steps import Steps
from tpcompiler.check.structure import Model, compare_structure
from tpcompiler.check.values import ModelValues
from tpcompiler.check.verdicts import digest, keep, recall
from tpcompiler.program import Program
from tpcompiler.runtime import dropout

__all__ = ["CheckReport", "Refusal", "check", "proof"]


def proof(program: Program, source: str) -> CheckReport:
    """The verdict on a program and its source: one that is kept from an earlier check of the same, or a new one."""
    name = digest(program, source)
    report = recall(name)
    if report is None:
        report = check(program, source=source)
        keep(name, report)
    return report


def check(program: Program, *, source: str | None = None) -> CheckReport:
    """Decides whether `program` computes what its capture computes on every rank, and whether every gradient is right.

    The text of the emitted module, if given as `source`, is read again and compared with the graph.
    """
    start = time.perf_counter()
    geometry = Geometry(program.mesh)
    steps = Steps(geometry, program.taught)
    refused = tuple(uncovered(program, geometry))
    nodes = live_nodes(program.graph)
    if not refused:
        with _uncollected():
            taken = {n for graph in (program.graph, program.capture.graph) for n in _integers(graph)}
            refused = _structure(program, taken) or _first_that_runs(program, geometry, steps, taken)
            if not refused and source is not None:
                refused = _source(program, source, geometry, taken)
    seconds = time.perf_counter() - start
    return CheckReport(len(nodes), len(steps.known), seconds, refused, tuple(sorted(steps.ran)))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Turns the cycle collector off for a block: with a deep model's graphs in memory it takes a fifth of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _first_that_runs(program: Program, geometry: Geometry, steps: Steps, taken: set[int]) -> tuple[Refusal, ...]:
    """The sweeps' verdict at the smallest sizes that the model can be run at."""
    refused: tuple[Refusal, ...] = ()
    for sizes in choices(program.capture, taken, program.mesh.size):
        refused = _sweeps(program, geometry, steps, sizes)
        if not any(r.true.startswith("it cannot be run") for r in refused):
            break
    return refused


def _sweeps(program: Program, geometry: Geometry, steps: Steps, sizes: Sizes) -> tuple[Refusal, ...]:
    try:
        forward = sweep_forward(program, ModelValues(program.capture, sizes), geometry, steps)
        sweep_backward(program, geometry, steps, forward)
    except Refused as e:
        return (e.refusal,)
    except Exception as e:  # the model's own code at sizes that it does not take
        return (Refusal("the program", "", "steps that run", f"it cannot be run: {type(e).__name__}: {e}"),)
    return ()


def _structure(program: Program, taken: set[int]) -> tuple[Refusal, ...]:
    """Compares structure at sizes larger than every constant. A model that takes only certain sizes, such as an
    image's, is compared at those of its example."""
    read, failure = 0, ""
    computed = any(_computes_sizes(n) for g in (program.graph, program.capture.graph) for n in g.nodes)
    for sizes in (*beyond(program.capture, taken, computed=computed), *example(program.capture)):
        if read and sizes.of_example:
            break
        try:
            model = Model(program, sizes)
        except Exception as e:  # the model does not take these sizes
            failure = f"{type(e).__name__}: {e}"
            continue
        try:
            compare_structure(program, model)
        except Refused as e:
            return (e.refusal,)
        read += 1
    return () if read else (Refusal("the model", "", "a graph that can be read", failure),)


def _source(program: Program, source: str, geometry: Geometry, taken: set[int]) -> tuple[Refusal, ...]:
    try:
        compare_source(program, source, geometry, taken)
    except Refused as e:
        return (e.refusal,)
    return ()


def _computes_sizes(node: torch.fx.Node) -> bool:
    """Whether a node computes a size from other sizes."""
    is_size = isinstance(node.meta.get("val"), (torch.SymInt, int, float)) and node.op == "call_function"
    return is_size and node.target is not torch.ops.aten.sym_size.int


def _integers(graph: torch.fx.Graph) -> set[int]:
    found: set[int] = set()

    def visit(a: object) -> object:
        if type(a) is int:
            found.add(a)
        return a

    for node in graph.nodes:
        if node.target is not dropout:  # a dropout's integer numbers its site, which is no size
            torch.fx.node.map_aggregate(node.args, visit)  # type: ignore[arg-type]
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor):
            found.update(n for n in val.shape if type(n) is int)
    return found
