"""Names for the reader: an axis is named by its purpose, a block by the common part of its parameters' names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from tpcompiler.plan.tally import ATTENTION, EMBEDDING, HEAD, MLP
from tpcompiler.plan.weighing import AxisFacts, Facts


def axis_names(facts: Facts, split: Mapping[int, tuple[str, ...]]) -> dict[int, str]:
    """A short name for every axis. Axes of equal layers share one. Where several others would have the same name, the
    first keeps it, an axis in `split` before all others, and the rest are numbered (`heads2`)."""
    out: dict[int, str] = {}
    used: dict[str, object] = {}
    majors = {a for a, _ in facts.grouped_heads}
    minors = {b for _, b in facts.grouped_heads}
    for leaf in sorted(facts.axes, key=lambda leaf: (leaf not in split, leaf)):
        fact = facts.axes[leaf]
        base = _base_name(fact, leaf in minors, leaf in majors)
        name, k = base, 2
        while used.setdefault(name, (fact.signature, fact.size)) != (fact.signature, fact.size):
            name, k = f"{base}{k}", k + 1
        out[leaf] = name
    return out


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


def common_name(names: Iterable[str]) -> str:
    """The common part of qualified names, with `*` for numbers: h.0.mlp.c_fc.weight, h.1.mlp.… → h.*.mlp."""
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
