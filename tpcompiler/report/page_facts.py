"""Everything that the page shows, as plain values: what the template needs to compute nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from tpcompiler.api import Sharded
from tpcompiler.cost.layer_timeline import Event
from tpcompiler.errors import format_bytes
from tpcompiler.report.predicted import Predicted

WIDTH, ROW = 1000, 34  # of the timeline's drawing
_PHASES = {"forward": "Forward", "again": "Computed again", "backward": "Backward"}
_MOST = 16  # bars; of more ranks, those with the same sizes share one


@dataclass(frozen=True)
class Part:
    """A piece of a bar: its name, its size for people, its place and width in per cent, and its colour's name."""

    name: str
    said: str
    start: float
    share: float
    colour: str


@dataclass(frozen=True)
class Bar:
    name: str
    said: str
    parts: tuple[Part, ...]


def page_facts(sharded: Sharded, found: Predicted, lines: Sequence[Mapping[str, Any]], title: str) -> dict[str, Any]:
    """The template's variables. `lines` are those of the diff, as `tpc diff --json` prints them, folded or not."""
    report = sharded.report()
    check = sharded.check
    return {
        "title": title,
        "model": report["model"],
        "ranks": str(sharded.spec.ranks),
        "blocks": _blocks(report),
        "crossing": _totals(report["collectives"]),
        "memory": _memory(sharded, found),
        "device": format_bytes(sharded.spec.hardware.memory_gib * 2**30),
        "replicated": [{**r, "said": format_bytes(r["bytes"])} for r in _largest(report["replicated"])],
        "fraction": f"{report['sharded_fraction']:.1%}",
        "step": _step(found),
        "timeline": _timeline(found),
        "lines": _diff(lines),
        "spec": yaml.safe_dump(sharded.spec.dump(), sort_keys=False, width=100, default_flow_style=None),
        "passed": check.passed,
        "verdict": str(check),
    }


def _blocks(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each block with its ranks' shares, and the collectives on the edges around it."""
    out = []
    for b in report["blocks"]:
        name = f"{b['name']} · {b['kind']}"
        shares, start = [], 0.0
        for i, n in enumerate(b["local"]):
            share = 100 * n / max(1, b["size"])
            shares.append(Part(f"rank {i}", f"{n:,}", start, share, f"rank{i % 4}"))
            start += share
        crossing = [_crossing(c) for c in report["collectives"] if c["block"] == name]
        out.append({**b, "over": " · ".join(b["over"]), "shares": shares, "crossing": crossing})
    named = {f"{b['name']} · {b['kind']}" for b in report["blocks"]}
    rest = [_crossing(c) for c in report["collectives"] if c["block"] not in named]
    if rest:
        out.append({"name": "elsewhere", "kind": "other", "axis": "", "shares": [], "crossing": rest, "layers": 1})
    return out


def _crossing(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": c["kind"].replace("_", "-"),
        "direction": c["direction"],
        "over": " · ".join(c["over"]),
        "said": format_bytes(c["bytes"]),
        "count": c["count"],
        "reason": c["reason"],
    }


def _totals(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    out = []
    for direction in ("forward", "backward"):
        mine = [c for c in rows if c["direction"] == direction]
        if mine:
            total = sum(c["bytes"] * c["count"] for c in mine)
            out.append(f"{direction}: {sum(c['count'] for c in mine)} collectives, {format_bytes(total)}")
    return out


def _largest(rows: Sequence[Mapping[str, Any]], most: int = 12) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda r: -r["bytes"])[:most]


def _memory(sharded: Sharded, found: Predicted) -> list[Bar]:
    """A bar for each tensor rank, or for those with the same sizes together, of the memory of one device."""
    mesh = sharded.program.mesh
    whole = sharded.spec.hardware.memory_gib * 2**30
    alike: dict[tuple[int, ...], list[int]] = {}
    for rank in range(mesh.degree(tuple(n for n in mesh.names if n != "data"))):
        alike.setdefault(sharded.memory_on(rank), []).append(rank)
    apart = sum(map(len, alike.values())) <= _MOST
    rows = (
        [([r], sizes) for sizes, ranks in alike.items() for r in ranks]
        if apart
        else [(ranks, sizes) for sizes, ranks in alike.items()]
    )
    more = (found.step.memory.activations, found.step.memory.loss)
    names = ("parameters", "gradients", "optimizer", "activations", "loss")
    out = []
    for ranks, held in sorted(rows, key=lambda row: row[0][0]):
        parts, start = [], 0.0
        for name, n in zip(names, (*held, *more), strict=True):
            parts.append(Part(name, format_bytes(n), start, min(100 * n / whole, 100 - start), name))
            start += parts[-1].share
        label = f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} ranks, the first is {ranks[0]}"
        total = sum(held) + sum(more)
        out.append(Bar(label, f"{format_bytes(total)}, {total / whole:.0%}", tuple(parts)))
    return out


def _step(found: Predicted) -> dict[str, Any]:
    step = found.step
    parts = [(name, f"{s * 1e3:.2f} ms") for name, s in step.parts.items() if s > 5e-7]
    return {
        "ms": f"{step.seconds * 1e3:.2f}",
        "mfu": f"{step.mfu:.0%}",
        "machine": found.machine,
        "batch": found.batch,
        "sequence": found.sequence,
        "recompute": step.layout.recompute,
        "parts": parts,
    }


def _timeline(found: Predicted) -> dict[str, Any] | None:
    line = found.timeline
    if line is None or not line.events:
        return None
    end = max(e.start + e.seconds for e in line.events) or 1.0
    drawn = [_drawn(e, end) for e in line.events]
    bounds = {p: [e for e in line.events if e.phase == p] for p in _PHASES}
    phases = [
        {"name": _PHASES[p], "x": WIDTH * events[0].start / end, "width": WIDTH * _length(events) / end}
        for p, events in bounds.items()
        if events
    ]
    return {
        "layer": line.layer,
        "layers": line.layers,
        "us": f"{line.seconds * 1e6:,.0f}",
        "computing": f"{line.total(False) * 1e6:,.0f}",
        "exposed": f"{line.total(True) * 1e6:,.0f}",
        "hidden": f"{sum(e.hidden for e in line.events) * 1e6:,.0f}",
        "events": drawn,
        "phases": phases,
        "width": WIDTH,
        "row": ROW,
    }


def _length(events: Sequence[Event]) -> float:
    return max(e.start + e.seconds for e in events) - events[0].start


def _drawn(e: Event, end: float) -> dict[str, Any]:
    return {
        "name": e.name,
        "phase": _PHASES[e.phase].lower(),
        "crosses": e.crosses,
        "x": round(WIDTH * e.start / end, 2),
        "width": round(max(WIDTH * e.seconds / end, 0.5), 2),
        "hidden_width": round(WIDTH * e.hidden / end, 2),
        "us": f"{e.seconds * 1e6:,.1f}",
        "hidden": f"{e.hidden * 1e6:,.1f}",
        "said": format_bytes(e.bytes) if e.crosses else "",
    }


def _diff(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One program with its changes marked: (what happened to the line, its mark, its text)."""
    out: list[dict[str, str]] = []
    for line in lines:
        plain, sharded, change = line["plain"], line["sharded"], line["change"]
        if change in ("same", "folded"):
            out.append({"kind": change, "mark": " ", "text": sharded or plain or ""})
            continue
        if plain is not None:
            out.append({"kind": "removed", "mark": "-", "text": plain})
        if sharded is not None:
            out.append({"kind": line["collective"] or "inserted", "mark": "+", "text": sharded})
    return out
