"""Checks that some rank holds each element of every parameter."""

from __future__ import annotations

from collections.abc import Iterator

from tpcompiler.check.claims import Geometry
from tpcompiler.check.report import Refusal
from tpcompiler.layout import Dim
from tpcompiler.program import Program


def uncovered(program: Program, geometry: Geometry) -> Iterator[Refusal]:
    """A refusal for every parameter whose slices do not fit its shape, or leave elements out."""
    for p in program.capture.parameters:
        dims = program.dims.get(p.name)
        if dims is None:
            if not p.buffer:
                yield Refusal(p.name, "", "a layout", "the program gives none")
            continue
        if tuple(d.size for d in dims) != p.shape:
            yield Refusal(p.name, "", f"slices of {[d.size for d in dims]}", f"the parameter is {list(p.shape)}")
            continue
        seen: set[str] = set()
        for i, dim in enumerate(dims):
            unknown = [n for n in dim.over if n not in program.mesh]
            twice = [n for n in dim.over if n in seen]
            seen.update(dim.over)
            if unknown or twice:
                what = (
                    f"split over {unknown[0]!r}, which the mesh lacks" if unknown else f"split twice over {twice[0]!r}"
                )
                yield Refusal(p.name, "", "every element is held", what)
            elif (wrong := _holes(geometry, dim)) is not None:
                yield Refusal(p.name, "", f"every row of dimension {i} is held: {dim}", wrong)


def _holes(geometry: Geometry, dim: Dim) -> str | None:
    """Names the first row of a dimension that no rank holds; None if there is none. A row may be held several times."""
    rows = geometry.of_dim(dim)
    if rows is None:
        return None
    end = 0
    for a, b in sorted({run for runs in rows.runs for run in runs}):
        if a > end:
            break
        end = max(end, b)
    return None if end == dim.size else f"row {end} is held by no rank"
