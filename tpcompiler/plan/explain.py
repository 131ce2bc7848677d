"""Explains why a parameter is split or not: by the axes of its dimensions, and what keeps each one whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpcompiler.axes.algebra import Mark
from tpcompiler.axes.infer import AxisMap
from tpcompiler.errors import PlanError
from tpcompiler.plan import Plan
from tpcompiler.program import Capture, Parameter
from tpcompiler.spec.schema import covers, nearest


@dataclass(frozen=True)
class Axis:
    """One factor of a dimension. `reasons` says what keeps it whole and is empty when it is split."""

    name: str
    size: int
    over: tuple[str, ...]
    kinds: tuple[str, ...]
    reasons: tuple[str, ...]
    stands_in: tuple[str, ...]  # the parameters that have this axis: it is split in all of them or in none


@dataclass(frozen=True)
class Explained:
    """A parameter's layout. `layout` writes each dimension as a product of axes, such as `(3 heads/tensor 96)`."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    layout: tuple[str, ...]
    axes: tuple[tuple[Axis, ...], ...]  # of each dimension, major first
    split: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def explain(capture: Capture, axes: AxisMap, plan: Plan, pattern: str) -> tuple[Explained, ...]:
    """Explains the parameters that a glob over parameter or module names covers. Raises `PlanError` if none match."""
    parameters = [p for p in capture.parameters if not p.buffer]
    found = [p for p in parameters if any(covers(pattern, name) for name in p.names)]
    if not found:
        known = {name for p in parameters for name in p.names} | set(_modules(parameters))
        raise PlanError(
            f"{pattern}: no parameter or module of {capture.model} has that name; {nearest(pattern, known)}"
        )
    lines = {n.name: n.meta.get("line") for n in capture.graph.nodes}
    return tuple(_parameter(p, axes, plan, lines) for p in found)


def _modules(parameters: Iterable[Parameter]) -> Iterable[str]:
    for p in parameters:
        parts = p.name.split(".")
        yield from (".".join(parts[:n]) for n in range(1, len(parts)))


def _parameter(p: Parameter, axes: AxisMap, plan: Plan, lines: dict[str, Any]) -> Explained:
    terms = axes.values[p.node][0]
    factors = tuple(tuple(_axis(leaf, plan, lines) for leaf in axes.leaves(term)) for term in terms)
    split = any(a.over for dimension in factors for a in dimension)
    layout = tuple(str(n if term is None else plan.dim(axes, term)) for n, term in zip(p.shape, terms, strict=True))
    return Explained(p.name, p.shape, p.bytes, layout, factors, split)


def _axis(leaf: int, plan: Plan, lines: dict[str, Any]) -> Axis:
    fact, over = plan.facts.axes[leaf], plan.split.get(leaf, ())
    reasons = () if over else _reasons(leaf, plan, lines)
    return Axis(plan.names.get(leaf, "") or str(fact.size), fact.size, over, fact.kinds, reasons, fact.parameters)


def _reasons(leaf: int, plan: Plan, lines: dict[str, Any]) -> tuple[str, ...]:
    """The marks of an axis. If it has none, it could be split, and the reason lies in the plan's choice."""
    fact = plan.facts.axes[leaf]
    marks = tuple(dict.fromkeys(_told(mark, lines) for mark in fact.marks))
    if marks:
        return marks
    degree = plan.mesh.size // dict(plan.mesh.dims).get("data", 1)
    if degree == 1:
        return ("there is one rank",)
    rivals = [
        plan.names[o] for pair in plan.facts.conflicts if leaf in pair for o in pair if o != leaf and o in plan.split
    ]
    if rivals:
        return (f"legal, but {rivals[0]} is split, which stands in the same tensors",)
    if fact.size < degree:
        return (f"legal, but shorter than the degree {degree}",)
    if fact.gain <= fact.cost:
        return ("legal, but its collectives would cost more than its products save",)
    return ("legal, but the spec leaves it whole",)


def _told(mark: Mark, lines: dict[str, Any]) -> str:
    line = lines.get(mark.node)
    if line is None:
        return str(mark)
    file, number, text = line
    return f"{mark.why}: {Path(file).name}:{number}: {text}"
