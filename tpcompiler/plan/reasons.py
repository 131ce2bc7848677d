"""Why something is not split: reasons for the list of replicated parameters, and errors for unmet requests."""

from __future__ import annotations

import warnings

from tpcompiler.axes.infer import AxisMap
from tpcompiler.errors import PlanError, TpcWarning
from tpcompiler.plan.result import Plan, Replicated
from tpcompiler.plan.tally import ATTENTION
from tpcompiler.plan.weighing import AxisFacts
from tpcompiler.plan.wishes import Wishes
from tpcompiler.program import Capture, Parameter
from tpcompiler.spec.schema import Spec, covers

_COSTS_MORE = "its collectives would cost more than its products save"


def replicated(capture: Capture, axes: AxisMap, plan: Plan, wishes: Wishes) -> tuple[Replicated, ...]:
    """The parameters that every rank holds whole, each with the reason."""
    out = []
    for p in capture.parameters:
        if p.buffer or any(leaf in plan.split for leaf in axes.axes_of(axes.values[p.node][0])):
            continue
        out.append(Replicated(p.name, p.bytes, _why_whole(axes, plan, p, wishes)))
    return tuple(out)


def _why_whole(axes: AxisMap, plan: Plan, p: Parameter, wishes: Wishes) -> str:
    """Why no dimension of a parameter is split: for each of its axes, the op or the choice that keeps it whole."""
    reasons = []
    for leaf in axes.axes_of(axes.values[p.node][0]):
        fact = plan.facts.axes[leaf]
        label = f"{plan.names[leaf]} {fact.size}" if not fact.marks else f"{fact.size}"
        if plan.degree == 1:
            reasons.append("one rank")
        elif leaf in wishes.no:
            reasons.append(f"{label}: {wishes.no[leaf]}")
        elif fact.marks:
            reasons.append(f"{label}: {fact.marks[0]}")
        elif fact.size < plan.degree:
            reasons.append(f"{label}: shorter than the degree {plan.degree}")
        elif fact.sums > 0 and not fact.batchwise:
            reasons.append(f"{label}: every product that uses it would need a reduction")
        elif fact.gain <= fact.cost:
            reasons.append(f"{label}: {_COSTS_MORE}")
        else:
            reasons.append(f"{label}: excluded by another axis of the same tensors")
    return "; ".join(dict.fromkeys(reasons)) or "a scalar"


def refuse(capture: Capture, plan: Plan, spec: Spec, wishes: Wishes) -> None:
    """Raises `SpecError` or `PlanError`, with the reason, when the plan does not split what the spec asks for."""
    _refuse_axes(plan, spec, wishes)
    for kind in sorted(spec.explicit):
        if not any(b.kind == kind for b in plan.blocks):
            why = _why_no_block(plan, kind)
            what = f"no {kind} block of {capture.model} can be split {plan.degree}-way: {why}"
            raise spec.error("shard", kind, what=what)
    _refuse_overrides(capture, plan, spec)
    _uneven(plan, spec)
    if not plan.split:
        kinds = {k for fact in plan.facts.axes.values() for k in fact.kinds}
        reasons = [f"{k}: {_why_no_block(plan, k)}" for k in ("attention", "mlp", "embedding") if k in kinds]
        why = "; ".join(reasons) or "it has no axis that any weights share"
        raise PlanError(f"nothing of {capture.model} can be split {plan.degree}-way: {why}")


def _refuse_axes(plan: Plan, spec: Spec, wishes: Wishes) -> None:
    for leaf, key in wishes.asked.items():
        if leaf in plan.split:
            continue
        fact = plan.facts.axes[leaf]
        if fact.marks:
            why = str(fact.marks[0])
        elif fact.size < plan.degree:
            why = f"{fact.size} is shorter than the degree {plan.degree}"
        else:
            why = "another axis of the same tensors is split"
        what = f"{plan.names[leaf]} ({fact.size}) of {fact.parameters[0]} cannot be split: {why}"
        raise spec.error(*key, what=what)


def _uneven(plan: Plan, spec: Spec) -> None:
    """Warns of every block whose axis does not divide by its degree, or refuses the first one, as `uneven` says."""
    for block in plan.uneven if spec.uneven != "allow" else ():
        degree = len(block.local)
        divides = next(d for d in range(degree, 0, -1) if block.size % d == 0)
        what = f"{block.axis} ({block.size}) of {block.name} does not divide by {degree} ranks"
        if spec.uneven == "error":
            instead = f"{divides}-way would work, or " if divides > 1 else ""
            raise spec.error("uneven", what=f"{what}; {instead}`uneven: allow`")
        warnings.warn(f"{what}: ranks hold {max(block.local)} or {min(block.local)}", TpcWarning, stacklevel=2)


def _refuse_overrides(capture: Capture, plan: Plan, spec: Spec) -> None:
    by_name = {p.name: p for p in capture.parameters}
    for i, override in enumerate(spec.override):
        if override.as_ == "shard":
            for r in plan.replicated:
                p = by_name[r.name]
                if len(p.shape) > 1 and any(covers(override.match, n) for n in p.names):
                    raise spec.error("override", i, what=f"{r.name} is not split: {r.reason}")


def _why_no_block(plan: Plan, kind: str) -> str:
    facts = [f for f in plan.facts.axes.values() if kind in f.kinds]
    legal = [f for f in facts if not f.marks]
    if not facts:
        return "there is none"
    if not legal:
        return str(facts[0].marks[0])
    if kind == ATTENTION:
        legal = [f for f in legal if f.batchwise] or legal
    best = max(legal, key=lambda f: f.size)
    longest, what = best.size, f"its longest axis has {best.size}"
    for a, b in plan.facts.grouped_heads if kind == ATTENTION else ():  # kv heads · group = heads
        major, minor = plan.facts.axes[a].size, plan.facts.axes[b].size
        if major * minor > longest:
            longest, what = major * minor, f"it has {major} · {minor} = {major * minor} heads"
    if longest < plan.degree:
        return f"{what} ({best.parameters[0]}); {longest}-way would work"
    return _why_not(best)


def _why_not(fact: AxisFacts) -> str:
    why = _COSTS_MORE if fact.gain <= fact.cost else "excluded by the spec or by another axis of the same tensors"
    return f"{fact.size} of {fact.parameters[0]}: {why}"
