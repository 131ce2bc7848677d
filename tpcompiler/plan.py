"""The plan: which axes to split over which mesh dimensions, under the spec, and why the others are not.

Axes of equal layers are one decision. Two axes that stand in different factors of one tensor exclude each other on one
mesh dimension; among what is legal and wanted, the heaviest independent set is taken, an axis weighing what its
matrices save less what its collectives cost. Both are elements per token, so that a toy model is planned as its large
sister is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import networkx as nx

from tpcompiler.axes.infer import AxisMap, Dims
from tpcompiler.blocks import ATTENTION, EMBEDDING, HEAD, MLP, AxisFacts, Facts, gather_facts
from tpcompiler.errors import PlanError
from tpcompiler.layout import Concat, Dim, Factor, Mesh, Product
from tpcompiler.program import Capture, Parameter
from tpcompiler.spec import Spec, covers

TENSOR = "tensor"


@dataclass(frozen=True)
class Block:
    """An axis that is split, in all layers that are alike."""

    kind: str
    name: str  # what its parameters' names have in common, layer numbers as *
    layers: int
    axis: str
    size: int
    over: tuple[str, ...]
    local: tuple[int, ...]  # elements by place on `over`
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Replicated:
    """A parameter that every rank holds whole."""

    name: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class Plan:
    mesh: Mesh
    split: dict[int, tuple[str, ...]]  # axis → the mesh dimensions it is split over
    names: dict[int, str]  # axis → its name for the reader
    blocks: tuple[Block, ...]
    replicated: tuple[Replicated, ...]
    facts: Facts

    def dim(self, axes: AxisMap, term: int | None) -> Dim:
        """A dimension's layout, written in axes of this plan."""
        if term is None:
            return Factor(1)
        bound = axes.terms.binding(term)
        if bound is None:
            leaf = axes.terms.find(term)
            size = axes.terms.size(leaf)
            return Factor(
                size, self.names.get(leaf, axes.dynamic.get(size, "")), self.split.get(leaf, ()), size in axes.dynamic
            )
        parts = tuple(self.dim(axes, p) for p in bound.parts)
        return Product(parts) if bound.kind == "product" else Concat(parts)

    def dims(self, axes: AxisMap, dims: Dims) -> tuple[Dim, ...]:
        return tuple(self.dim(axes, t) for t in dims)

    def __str__(self) -> str:
        rows = [f"mesh {self.mesh}"]
        for b in self.blocks:
            rows.append(
                f"{b.kind:10} {b.name} × {b.layers}: {b.axis} {b.size} over {'·'.join(b.over)} = {list(b.local)}"
            )
        rows += [f"replicated {r.name}: {r.reason}" for r in self.replicated]
        return "\n".join(rows)


@dataclass(frozen=True)
class Candidate:
    """Axes that are split together or not at all, each over its mesh dimensions."""

    split: tuple[tuple[int, tuple[str, ...]], ...]
    weight: float
    asked: bool  # named by the spec

    @property
    def leaves(self) -> frozenset[int]:
        return frozenset(leaf for leaf, _ in self.split)


def make_plan(capture: Capture, axes: AxisMap, spec: Spec) -> Plan:
    """Choose. Raises `PlanError` for what the spec asks for and cannot have."""
    facts = gather_facts(capture, axes)
    degree = spec.mesh.tensor
    wishes = _Wishes(capture, axes, facts, spec)
    if degree == 1:
        mesh, split = spec.ranks, {}
    else:
        mesh, candidates = _candidates(facts, wishes, spec)
        mesh, split = _coarsen(mesh, _choose(candidates, facts), spec)
    names = _names(facts, split)
    plan = Plan(mesh, split, names, (), (), facts)
    plan = Plan(mesh, split, names, _blocks(plan), _replicated(capture, axes, plan, wishes), facts)
    if degree > 1:
        _refuse(capture, axes, plan, spec, wishes)
    return plan


class _Wishes:
    """What the spec says of each axis: allowed or not (and why not), asked for by name or not."""

    def __init__(self, capture: Capture, axes: AxisMap, facts: Facts, spec: Spec) -> None:
        self.no: dict[int, str] = {}
        self.asked: dict[int, tuple[str | int, ...]] = {}  # axis → the spec's key
        for leaf, fact in facts.axes.items():
            for kind in fact.kinds:
                choice = getattr(spec.shard, kind)
                if choice == "replicate":
                    self.no[leaf] = f"shard.{kind} says replicate"
        for i, override in enumerate(spec.override):
            self._override(i, override, capture, facts, spec)
        for i, entry in enumerate(spec.axes):
            self._axis(i, entry, capture, axes, facts, spec)

    def _override(self, i: int, override, capture: Capture, facts: Facts, spec: Spec) -> None:  # type: ignore[no-untyped-def]
        named = {p.name for p in capture.parameters if not p.buffer and any(covers(override.match, n) for n in p.names)}
        if not named:
            raise spec.error(
                "override", i, "match", what=f"{override.match!r} matches no module or parameter of {capture.model}"
            )
        for leaf, fact in facts.axes.items():
            if named.intersection(fact.parameters):
                if override.as_ == "replicate":
                    self.no[leaf] = f"override {override.match!r} says replicate"
                    self.asked.pop(leaf, None)
                elif not fact.marks:
                    self.no.pop(leaf, None)

    def _axis(self, i: int, entry, capture: Capture, axes: AxisMap, facts: Facts, spec: Spec) -> None:  # type: ignore[no-untyped-def]
        matched = [
            p for p in capture.parameters if not p.buffer and any(fnmatchcase(n, entry.parameter) for n in p.names)
        ]
        if not matched:
            raise spec.error(
                "axes", i, "parameter", what=f"{entry.parameter!r} matches no parameter of {capture.model}"
            )
        for p in matched:
            if not -len(p.shape) <= entry.dimension < len(p.shape):
                raise spec.error(
                    "axes",
                    i,
                    "dimension",
                    what=f"{p.name} has {len(p.shape)} dimensions, not dimension {entry.dimension}",
                )
            leaves = axes.leaves(axes.values[p.node][0][entry.dimension])
            chosen = self._factor(i, entry, p, leaves, facts, spec)
            for leaf in chosen:
                if entry.as_ == "replicate":
                    self.no[leaf] = "axes says replicate"
                    self.asked.pop(leaf, None)
                else:
                    self.asked[leaf] = ("axes", i)
                    self.no.pop(leaf, None)

    @staticmethod
    def _factor(i: int, entry, p: Parameter, leaves: tuple[int, ...], facts: Facts, spec: Spec) -> tuple[int, ...]:  # type: ignore[no-untyped-def]
        if isinstance(entry.factor, int):
            if not -len(leaves) <= entry.factor < len(leaves):
                raise spec.error(
                    "axes", i, "factor", what=f"dimension {entry.dimension} of {p.name} has {len(leaves)} factors"
                )
            return (leaves[entry.factor],)
        names = _names(facts, {leaf: () for leaf in leaves})
        if isinstance(entry.factor, str):
            found = tuple(leaf for leaf in leaves if names.get(leaf) == entry.factor)
            if not found:
                known = ", ".join(names[leaf] for leaf in leaves if leaf in names)
                raise spec.error(
                    "axes",
                    i,
                    "factor",
                    what=f"dimension {entry.dimension} of {p.name} has no axis {entry.factor!r}; it has {known}",
                )
            return found
        legal = [leaf for leaf in leaves if not facts.axes[leaf].marks]
        return (legal or leaves)[:1] if entry.as_ == "shard" else tuple(leaves)


def _candidates(facts: Facts, wishes: _Wishes, spec: Spec) -> tuple[Mesh, list[Candidate]]:
    degree = spec.mesh.tensor
    classes: dict[object, list[AxisFacts]] = defaultdict(list)
    for leaf, fact in facts.axes.items():
        if fact.marks or fact.dynamic or leaf in wishes.no or fact.size < 2:
            continue
        if fact.sums > 0 and not fact.batchwise and leaf not in wishes.asked:
            continue  # a residual stream, or features of the input: a reduction at every use
        if ATTENTION in fact.kinds and not fact.batchwise and leaf not in wishes.asked:
            continue  # the width of a value head: legal, but the scores would be computed on every rank
        classes[fact.signature, leaf in wishes.asked].append(fact)
    groups = [part for members in classes.values() for part in _independent(members, facts)]
    pairs = _pairs(groups, facts, degree) if not spec.allow_empty else []
    cuts = sorted({f for f, _, _ in pairs if f > 1})
    cuts = [f for i, f in enumerate(cuts) if all(f % g == 0 for g in cuts[:i]) and degree % f == 0]
    fine = _fine_dims(degree, cuts)
    mesh = Mesh((("data", spec.mesh.data), *fine)) if len(fine) > 1 else spec.ranks
    whole = tuple(n for n, _ in fine)
    out = []
    for members in groups:
        if members[0].size >= degree or spec.allow_empty:
            if spec.uneven == "error" and members[0].size % degree:
                continue
            out.append(_candidate([(f, whole) for f in members], wishes))
    for f, majors, minors in pairs:
        if f > 1 and f not in cuts:
            continue
        k = next(i for i in range(len(fine) + 1) if Mesh(fine[:i]).size == f)
        out.append(_candidate([*((a, whole[:k]) for a in majors), *((b, whole[k:]) for b in minors)], wishes))
    return mesh, out


def _coarsen(mesh: Mesh, split: dict[int, tuple[str, ...]], spec: Spec) -> tuple[Mesh, dict[int, tuple[str, ...]]]:
    """One tensor dimension again when no axis needed a part of it."""
    fine = tuple(n for n in mesh.names if n != "data")
    if any(over != fine for over in split.values()):
        return mesh, split
    return spec.ranks, dict.fromkeys(split, (TENSOR,))


def _candidate(members: list[tuple[AxisFacts, tuple[str, ...]]], wishes: _Wishes) -> Candidate:
    weight = sum(f.gain - f.cost for f, over in members if over)
    asked = any(f.leaf in wishes.asked for f, _ in members)
    return Candidate(tuple((f.leaf, over) for f, over in members if over), weight, asked)


def _independent(members: list[AxisFacts], facts: Facts) -> list[list[AxisFacts]]:
    """Equal axes are one decision unless they exclude each other."""
    leaves = {f.leaf for f in members}
    if any(a in leaves and b in leaves for a, b in facts.conflicts):
        return [[f] for f in members]
    return [members]


def _fine_dims(degree: int, cuts: list[int]) -> tuple[tuple[str, int], ...]:
    """The tensor dimension of the mesh as factors, so that an axis shorter than it can be split over some of them."""
    sizes, last = [], 1
    for f in [*cuts, degree]:
        if f // last > 1:
            sizes.append(f // last)
        last = f
    return ((TENSOR, degree),) if len(sizes) == 1 else tuple((f"{TENSOR}{i}", n) for i, n in enumerate(sizes))


def _pairs(
    groups: list[list[AxisFacts]], facts: Facts, degree: int
) -> list[tuple[int, list[AxisFacts], list[AxisFacts]]]:
    """Neighbours in a product, the major shorter than the degree (kv heads), that together are long enough."""
    where = {f.leaf: i for i, members in enumerate(groups) for f in members}
    found: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)
    for a, b in facts.products:
        if a in where and b in where and where[a] != where[b]:
            found[where[a], where[b]].add((a, b))
    out = []
    for (i, j), links in sorted(found.items()):
        a, b = groups[i], groups[j]
        if (
            a[0].size >= degree
            or {x for x, _ in links} != {f.leaf for f in a}
            or {y for _, y in links} != {f.leaf for f in b}
        ):
            continue
        factor = best_factor(a[0].size, b[0].size, degree)
        if factor is not None:
            out.append((factor, a, b))
    return out


def best_factor(major: int, minor: int, degree: int) -> int | None:
    """Over how many of `degree` ranks to split the major axis, the rest going to the minor: the most even way in which
    no rank is left without, then the one that copies least. None when there is none."""
    fits = [f for f in range(1, major + 1) if degree % f == 0 and degree // f <= minor]
    return min(fits, key=lambda f: (-(-major // f) * -(-minor // (degree // f)), -f), default=None)


def unfit_products(facts: Facts, degree: int) -> frozenset[tuple[int, int]]:
    """(kv heads, group) pairs, long enough together, that no factoring of the degree fits."""
    out = set()
    for a, b in facts.products:
        if a in facts.axes and b in facts.axes and _attends(facts, a) and _attends(facts, b):
            major, minor = facts.axes[a].size, facts.axes[b].size
            if major < degree <= major * minor and best_factor(major, minor, degree) is None:
                out.add((a, b))
    return frozenset(out)


def _choose(candidates: list[Candidate], facts: Facts) -> dict[int, tuple[str, ...]]:
    """The heaviest set of candidates that do not exclude each other; what the spec names comes first."""
    graph = nx.Graph()
    useful = [c for c in candidates if c.split and (c.asked or c.weight > 0)]
    scale = 1000 / max((abs(c.weight) for c in useful), default=1)
    bonus = 1000 * (len(useful) + 1)
    for i, c in enumerate(useful):
        graph.add_node(i, weight=max(1, round(c.weight * scale)) + (bonus if c.asked else 0))
    for i, c in enumerate(useful):
        for j in range(i):
            if _exclude(c, useful[j], facts):
                graph.add_edge(i, j)
    split: dict[int, tuple[str, ...]] = {}
    for component in nx.connected_components(graph):
        for i in _heaviest(graph.subgraph(component)):
            split.update(dict(useful[i].split))
    return split


def _heaviest(graph: nx.Graph) -> Iterable[int]:
    if len(graph) <= 40:
        other = nx.complement(graph)
        other.add_nodes_from(graph.nodes(data=True))
        return nx.max_weight_clique(other, weight="weight")[0]
    taken: set[int] = set()
    for i in sorted(graph, key=lambda n: (-graph.nodes[n]["weight"], n)):
        if taken.isdisjoint(graph[i]):
            taken.add(i)
    return taken


def _exclude(a: Candidate, b: Candidate, facts: Facts) -> bool:
    if a.leaves & b.leaves:
        return True
    return any(
        set(over) & set(other) and (min(x, y), max(x, y)) in facts.conflicts
        for x, over in a.split
        for y, other in b.split
    )


def _names(facts: Facts, split: dict[int, tuple[str, ...]]) -> dict[int, str]:
    """A short name for every axis; axes of equal layers share theirs."""
    out: dict[int, str] = {}
    used: dict[str, object] = {}
    minors = {
        b
        for a, b in facts.products
        if a in facts.axes and b in facts.axes and _attends(facts, a) and _attends(facts, b)
    }
    majors = {a for a, b in facts.products if b in minors and a in facts.axes and _attends(facts, a)}
    order = sorted(facts.axes, key=lambda leaf: (leaf not in split, leaf))
    for leaf in order:
        fact = facts.axes[leaf]
        base = _base_name(fact, leaf in minors, leaf in majors)
        name, k = base, 2
        while used.setdefault(name, (fact.signature, fact.size)) != (fact.signature, fact.size):
            name, k = f"{base}{k}", k + 1
        out[leaf] = name
    return out


def _attends(facts: Facts, leaf: int) -> bool:
    return facts.axes[leaf].batchwise and not facts.axes[leaf].marks


def _base_name(fact: AxisFacts, minor: bool, major: bool) -> str:
    if fact.marks:
        return f"d{fact.size}"
    if ATTENTION in fact.kinds:
        return "head_dim" if not fact.batchwise else "group" if minor else "kv_heads" if major else "heads"
    if fact.sums > 0:
        return "width"
    if EMBEDDING in fact.kinds and not fact.gain:
        return "rows"  # of a small table: positions, token types
    return {MLP: "ff", EMBEDDING: "vocab", HEAD: "vocab"}.get(fact.kinds[-1], "channels")


def _blocks(plan: Plan) -> tuple[Block, ...]:
    rows: dict[tuple[str, str, int, tuple[str, ...]], list[AxisFacts]] = defaultdict(list)
    for leaf, over in plan.split.items():
        fact = plan.facts.axes[leaf]
        for kind in fact.kinds:
            rows[kind, plan.names[leaf], fact.size, over].append(fact)
    out = []
    for (kind, axis, size, over), facts in rows.items():
        parameters = tuple(dict.fromkeys(p for f in facts for p in f.parameters))
        local = tuple(
            Factor(size, axis, over).local_size(plan.mesh, _place(plan.mesh, over, i))
            for i in range(plan.mesh.degree(over))
        )
        out.append(Block(kind, common_name(parameters), len(facts), axis, size, over, local, parameters))
    order = ["embedding", "attention", "mlp", "other", "head"]
    return tuple(sorted(out, key=lambda b: order.index(b.kind)))


def _place(mesh: Mesh, over: tuple[str, ...], index: int) -> dict[str, int]:
    coords = dict.fromkeys(mesh.names, 0)
    for name in reversed(over):
        index, coords[name] = divmod(index, mesh[name])
    return coords


def common_name(names: Iterable[str]) -> str:
    """What qualified names have in common, numbers that differ as `*`: h.0.mlp.c_fc.weight, h.1.mlp.… → h.*.mlp"""
    split = [n.split(".") for n in names]
    first = Counter(parts[0] for parts in split).most_common(1)[0][0]
    split = [parts for parts in split if parts[0] == first]
    out = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) == 1:
            out.append(parts[0])
        elif all(p.isdigit() for p in parts):
            out.append("*")
        else:
            break
    return ".".join(out) or "model"


def _replicated(capture: Capture, axes: AxisMap, plan: Plan, wishes: _Wishes) -> tuple[Replicated, ...]:
    out = []
    for p in capture.parameters:
        if p.buffer or any(leaf in plan.split for t in axes.values[p.node][0] for leaf in axes.leaves(t)):
            continue
        out.append(Replicated(p.name, p.bytes, why_whole(axes, plan, p, wishes)))
    return tuple(out)


def why_whole(axes: AxisMap, plan: Plan, p: Parameter, wishes: _Wishes | None = None) -> str:
    """Why no dimension of a parameter is split: for each of its axes, the op or the choice that forbids it."""
    degree = plan.mesh.size // (plan.mesh["data"] if "data" in plan.mesh else 1)
    reasons = []
    for leaf in dict.fromkeys(leaf for t in axes.values[p.node][0] for leaf in axes.leaves(t)):
        fact = plan.facts.axes[leaf]
        label = f"{plan.names[leaf]} {fact.size}" if not fact.marks else f"{fact.size}"
        if degree == 1:
            reasons.append("one rank")
        elif wishes is not None and leaf in wishes.no:
            reasons.append(f"{label}: {wishes.no[leaf]}")
        elif fact.marks:
            reasons.append(f"{label}: {fact.marks[0]}")
        elif fact.size < degree:
            reasons.append(f"{label}: shorter than the degree {degree}")
        elif fact.sums > 0 and not fact.batchwise:
            reasons.append(f"{label}: every product that uses it would need a reduction")
        elif fact.gain <= fact.cost:
            reasons.append(f"{label}: its collectives would cost more than its products save")
        else:
            reasons.append(f"{label}: excluded by another axis of the same tensors")
    return "; ".join(dict.fromkeys(reasons)) or "a scalar"


def _refuse(capture: Capture, axes: AxisMap, plan: Plan, spec: Spec, wishes: _Wishes) -> None:
    """No silent fallback: what the spec asks for and does not get is an error, with the reason."""
    degree = spec.mesh.tensor
    for leaf, key in wishes.asked.items():
        if leaf not in plan.split:
            fact = plan.facts.axes[leaf]
            why = (
                str(fact.marks[0])
                if fact.marks
                else f"{fact.size} is shorter than the degree {degree}"
                if fact.size < degree
                else "another axis of the same tensors is split"
            )
            raise spec.error(
                *key, what=f"{plan.names[leaf]} ({fact.size}) of {fact.parameters[0]} cannot be split: {why}"
            )
    for kind in sorted(spec.explicit):
        if not any(b.kind == kind for b in plan.blocks):
            raise spec.error(
                "shard",
                kind,
                what=f"no {kind} block of {capture.model} can be split {degree}-way: {_reason(plan, kind, degree)}",
            )
    for i, override in enumerate(spec.override):
        if override.as_ == "shard":
            for r in plan.replicated:
                p = next(p for p in capture.parameters if p.name == r.name)
                if len(p.shape) > 1 and any(covers(override.match, n) for n in p.names):
                    raise spec.error("override", i, what=f"{r.name} is not split: {r.reason}")
    if not plan.split:
        reasons = {
            k: _reason(plan, k, degree)
            for k in ("attention", "mlp", "embedding")
            if any(k in f.kinds for f in plan.facts.axes.values())
        }
        raise PlanError(
            f"nothing of {capture.model} can be split {degree}-way: "
            + ("; ".join(f"{k}: {v}" for k, v in reasons.items()) or "it has no axis that any weights share")
        )


def _reason(plan: Plan, kind: str, degree: int) -> str:
    facts = [f for f in plan.facts.axes.values() if kind in f.kinds]
    legal = [f for f in facts if not f.marks]
    if not facts:
        return "there is none"
    if not legal:
        return str(facts[0].marks[0])
    best = max(legal, key=lambda f: f.size)
    if best.size < degree:
        return f"its longest axis has {best.size} ({best.parameters[0]}); {best.size}-way would work"
    return why_whole_axis(best)


def why_whole_axis(fact: AxisFacts) -> str:
    if fact.gain <= fact.cost:
        return f"{fact.size} of {fact.parameters[0]}: its collectives would cost more than its products save"
    return f"{fact.size} of {fact.parameters[0]}: excluded by the spec or by another axis of the same tensors"
