"""Makes the candidates for splitting: axes of equal layers, and pairs of neighbouring axes that share the degree."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from tpcompiler.layout import Mesh
from tpcompiler.plan.tally import ATTENTION
from tpcompiler.plan.weighing import AxisFacts, Facts
from tpcompiler.plan.wishes import Wishes
from tpcompiler.spec.schema import Spec

TENSOR = "tensor"


@dataclass(frozen=True)
class Candidate:
    """Axes that are split together or not at all."""

    split: tuple[tuple[int, tuple[str, ...]], ...]  # each axis with the mesh dimensions that split it
    weight: float
    asked: bool  # whether the spec names it

    @property
    def leaves(self) -> frozenset[int]:
        return frozenset(leaf for leaf, _ in self.split)


@dataclass(frozen=True)
class Pair:
    """Neighbours in a product: `factor` ranks split the major axes, degree / `factor` ranks split the minor ones."""

    factor: int
    majors: list[AxisFacts]
    minors: list[AxisFacts]


def make_candidates(facts: Facts, wishes: Wishes, spec: Spec) -> tuple[Mesh, list[Candidate]]:
    """All candidates, and their mesh. Its tensor dimension is taken apart into factors where pairs need that."""
    degree = spec.mesh.tensor
    groups = _groups(facts, wishes)
    pairs = _pairs(groups, facts, degree) if not spec.allow_empty else []
    cuts = sorted({p.factor for p in pairs if p.factor > 1})
    cuts = [f for i, f in enumerate(cuts) if all(f % g == 0 for g in cuts[:i]) and degree % f == 0]
    fine = _fine_dims(degree, cuts)
    mesh = Mesh((("data", spec.mesh.data), *fine)) if len(fine) > 1 else spec.ranks
    whole = tuple(n for n, _ in fine)
    out = []
    for members in groups:
        if members[0].size >= degree or spec.allow_empty:
            out.append(_candidate([(f, whole) for f in members], wishes))
    for p in pairs:
        if p.factor > 1 and p.factor not in cuts:
            continue
        k = next(i for i in range(len(fine) + 1) if Mesh(fine[:i]).size == p.factor)
        out.append(_candidate([*((a, whole[:k]) for a in p.majors), *((b, whole[k:]) for b in p.minors)], wishes))
    return mesh, out


def _groups(facts: Facts, wishes: Wishes) -> list[list[AxisFacts]]:
    """Groups of axes that may be split. The axes of equal layers are one group unless they exclude each other."""
    classes: dict[object, list[AxisFacts]] = defaultdict(list)
    for leaf, fact in facts.axes.items():
        if fact.marks or fact.dynamic or leaf in wishes.no or fact.size < 2:
            continue
        if fact.sums > 0 and not fact.batchwise and leaf not in wishes.asked:
            continue  # a residual stream, or features of the input: every use would need a reduction
        if ATTENTION in fact.kinds and not fact.batchwise and leaf not in wishes.asked:
            continue  # the width of a value head: splitting it is legal, but every rank would compute all scores
        classes[fact.signature, leaf in wishes.asked].append(fact)
    return [part for members in classes.values() for part in _independent(members, facts)]


def _independent(members: list[AxisFacts], facts: Facts) -> list[list[AxisFacts]]:
    leaves = {f.leaf for f in members}
    if any(a in leaves and b in leaves for a, b in facts.conflicts):
        return [[f] for f in members]
    return [members]


def _candidate(members: list[tuple[AxisFacts, tuple[str, ...]]], wishes: Wishes) -> Candidate:
    weight = sum(f.gain - f.cost for f, over in members if over)
    asked = any(f.leaf in wishes.asked for f, _ in members)
    return Candidate(tuple((f.leaf, over) for f, over in members if over), weight, asked)


def _fine_dims(degree: int, cuts: list[int]) -> tuple[tuple[str, int], ...]:
    """Takes the mesh's tensor dimension apart into factors, so that a shorter axis can be split over some of them."""
    sizes, last = [], 1
    for f in [*cuts, degree]:
        if f // last > 1:
            sizes.append(f // last)
        last = f
    return ((TENSOR, degree),) if len(sizes) == 1 else tuple((f"{TENSOR}{i}", n) for i, n in enumerate(sizes))


def _pairs(groups: list[list[AxisFacts]], facts: Facts, degree: int) -> list[Pair]:
    """Neighbours in a product that are long enough together, while the major one (kv heads) alone is too short."""
    where = {f.leaf: i for i, members in enumerate(groups) for f in members}
    found: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)
    for a, b in facts.products:
        if a in where and b in where and where[a] != where[b]:
            found[where[a], where[b]].add((a, b))
    out = []
    for (i, j), links in sorted(found.items()):
        majors, minors = groups[i], groups[j]
        linked = ({x for x, _ in links}, {y for _, y in links})
        if majors[0].size >= degree or linked != ({f.leaf for f in majors}, {f.leaf for f in minors}):
            continue
        factor = best_factor(majors[0].size, minors[0].size, degree)
        if factor is not None:
            out.append(Pair(factor, majors, minors))
    return out


def best_factor(major: int, minor: int, degree: int) -> int | None:
    """How many ranks split the major axis: a divisor of `degree`. The remaining factor splits the minor axis.

    Every rank gets a part of both axes. The most even split is preferred; of equally even ones, the one that splits the
    major axis most, because it copies least. None if no divisor fits.
    """
    fits = [f for f in range(1, major + 1) if degree % f == 0 and degree // f <= minor]
    return min(fits, key=lambda f: (-(-major // f) * -(-minor // (degree // f)), -f), default=None)


def unfit_products(facts: Facts, degree: int) -> frozenset[tuple[int, int]]:
    """The (kv heads, group) pairs that are long enough together, but that no factoring of the degree fits."""
    out = set()
    for a, b in facts.grouped_heads:
        major, minor = facts.axes[a].size, facts.axes[b].size
        if major < degree <= major * minor and best_factor(major, minor, degree) is None:
            out.add((a, b))
    return frozenset(out)
