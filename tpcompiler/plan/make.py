"""Makes a plan from the facts of the axes and the wishes of the spec."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from tpcompiler.axes.infer import AxisMap
from tpcompiler.layout import Mesh
from tpcompiler.plan.candidates import TENSOR, make_candidates
from tpcompiler.plan.choose import choose
from tpcompiler.plan.reasons import refuse, replicated
from tpcompiler.plan.result import Block, Plan
from tpcompiler.plan.titles import axis_names, common_name
from tpcompiler.plan.weighing import AxisFacts, gather_facts
from tpcompiler.plan.wishes import read_wishes
from tpcompiler.program import Capture
from tpcompiler.runtime.mesh import part
from tpcompiler.spec.schema import Spec

_ORDER = ("embedding", "attention", "mlp", "other", "head")


def make_plan(capture: Capture, axes: AxisMap, spec: Spec) -> Plan:
    """The plan for a spec. Raises `SpecError` or `PlanError` when the spec asks for a split that cannot be made."""
    facts = gather_facts(capture, axes)
    wishes = read_wishes(capture, axes, facts, spec)
    mesh, split = spec.ranks, dict[int, tuple[str, ...]]()
    if spec.mesh.tensor > 1:
        fine, candidates = make_candidates(facts, wishes, spec)
        mesh, split = _coarsened(fine, choose(candidates, facts), spec)
    plan = Plan(mesh, split, axis_names(facts, split), (), (), facts)
    plan = replace(plan, blocks=_blocks(plan), replicated=replicated(capture, axes, plan, wishes))
    if spec.mesh.tensor > 1:
        refuse(capture, plan, spec, wishes)
    return plan


def _coarsened(mesh: Mesh, split: dict[int, tuple[str, ...]], spec: Spec) -> tuple[Mesh, dict[int, tuple[str, ...]]]:
    """The mesh with a single tensor dimension again, if no chosen axis needs a factor of it."""
    fine = tuple(n for n in mesh.names if n != "data")
    if any(over != fine for over in split.values()):
        return mesh, split
    return spec.ranks, dict.fromkeys(split, (TENSOR,))


def _blocks(plan: Plan) -> tuple[Block, ...]:
    rows: dict[tuple[str, str, int, tuple[str, ...]], list[AxisFacts]] = defaultdict(list)
    for leaf, over in plan.split.items():
        fact = plan.facts.axes[leaf]
        for kind in fact.kinds:
            rows[kind, plan.names[leaf], fact.size, over].append(fact)
    out = []
    for (kind, axis, size, over), facts in rows.items():
        parameters = tuple(dict.fromkeys(p for f in facts for p in f.parameters))
        degree = plan.mesh.degree(over)
        parts = [part(size, degree, i) for i in range(degree)]
        local = tuple(stop - start for start, stop in parts)
        out.append(Block(kind, common_name(parameters), len(facts), axis, size, over, local, parameters))
    return tuple(sorted(out, key=lambda b: _ORDER.index(b.kind)))
