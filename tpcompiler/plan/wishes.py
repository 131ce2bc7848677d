"""Reads what the spec says about each axis: whether it may be split, and whether the spec names it.

A name that the model does not have is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from tpcompiler.axes.infer import AxisMap
from tpcompiler.plan.titles import axis_names
from tpcompiler.plan.weighing import Facts
from tpcompiler.program import Capture, Parameter
from tpcompiler.spec.schema import AxisSpec, Override, Spec, covers


@dataclass(frozen=True)
class Wishes:
    """The spec's words about axes: `no` says why an axis must stay whole, `asked` is the key that asks to split it."""

    no: dict[int, str] = field(default_factory=dict)
    asked: dict[int, tuple[str | int, ...]] = field(default_factory=dict)


def read_wishes(capture: Capture, axes: AxisMap, facts: Facts, spec: Spec) -> Wishes:
    """Reads the sections `shard`, `override` and `axes` in this order. A later entry overrules earlier ones.

    Raises `SpecError` for names that the model does not have.
    """
    spec.check_outputs((str(i), name) for i, name in enumerate(capture.output_names))
    wishes = Wishes()
    for leaf, fact in facts.axes.items():
        for kind in fact.kinds:
            if getattr(spec.shard, kind) == "replicate":
                wishes.no[leaf] = f"shard.{kind} says replicate"
    for i, override in enumerate(spec.override):
        _override(wishes, i, override, capture, facts, spec)
    for i, entry in enumerate(spec.axes):
        _axis(wishes, i, entry, capture, axes, facts, spec)
    return wishes


def _override(wishes: Wishes, i: int, override: Override, capture: Capture, facts: Facts, spec: Spec) -> None:
    named = {p.name for p in capture.parameters if not p.buffer and any(covers(override.match, n) for n in p.names)}
    if not named:
        what = f"{override.match!r} matches no module or parameter of {capture.model}"
        raise spec.error("override", i, "match", what=what)
    for leaf, fact in facts.axes.items():
        if named.intersection(fact.parameters):
            if override.as_ == "replicate":
                wishes.no[leaf] = f"override {override.match!r} says replicate"
                wishes.asked.pop(leaf, None)
            elif not fact.marks:
                wishes.no.pop(leaf, None)


def _axis(wishes: Wishes, i: int, entry: AxisSpec, capture: Capture, axes: AxisMap, facts: Facts, spec: Spec) -> None:
    matched = [p for p in capture.parameters if not p.buffer and any(fnmatchcase(n, entry.parameter) for n in p.names)]
    if not matched:
        what = f"{entry.parameter!r} matches no parameter of {capture.model}"
        raise spec.error("axes", i, "parameter", what=what)
    for p in matched:
        if not -len(p.shape) <= entry.dimension < len(p.shape):
            what = f"{p.name} has {len(p.shape)} dimensions, not dimension {entry.dimension}"
            raise spec.error("axes", i, "dimension", what=what)
        leaves = axes.leaves(axes.values[p.node][0][entry.dimension])
        for leaf in _factor(i, entry, p, leaves, facts, spec):
            if entry.as_ == "replicate":
                wishes.no[leaf] = "axes says replicate"
                wishes.asked.pop(leaf, None)
            else:
                wishes.asked[leaf] = ("axes", i)
                wishes.no.pop(leaf, None)


def _factor(
    i: int, entry: AxisSpec, p: Parameter, leaves: tuple[int, ...], facts: Facts, spec: Spec
) -> tuple[int, ...]:
    """The factors of a dimension that an entry means: the one it names by index or by name; without one, all factors
    for `replicate`, and for `shard` the first that can be split."""
    if isinstance(entry.factor, int):
        if not -len(leaves) <= entry.factor < len(leaves):
            what = f"dimension {entry.dimension} of {p.name} has {len(leaves)} factors"
            raise spec.error("axes", i, "factor", what=what)
        return (leaves[entry.factor],)
    if isinstance(entry.factor, str):
        names = axis_names(facts, dict.fromkeys(leaves, ()))
        found = tuple(leaf for leaf in leaves if names.get(leaf) == entry.factor)
        if not found:
            known = ", ".join(names[leaf] for leaf in leaves if leaf in names)
            what = f"dimension {entry.dimension} of {p.name} has no axis {entry.factor!r}; it has {known}"
            raise spec.error("axes", i, "factor", what=what)
        return found
    if entry.as_ == "replicate":
        return leaves
    legal = tuple(leaf for leaf in leaves if not facts.axes[leaf].marks)
    return (legal or leaves)[:1]
