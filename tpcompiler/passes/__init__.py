"""Passes: rewrites of one rank's program. Each is a function from program to program in a file of its own."""

from __future__ import annotations

from tpcompiler.passes.hoist_enters import hoist_enters
from tpcompiler.passes.merge_reductions import merge_reductions
from tpcompiler.passes.overlap_enters import overlap_enters
from tpcompiler.passes.sink_reductions import sink_reductions
from tpcompiler.passes.split_of_cat import drop_joined_segments
from tpcompiler.program import Program

PASSES = (drop_joined_segments, sink_reductions, merge_reductions, hoist_enters)


def run_passes(program: Program, overlap: bool = False) -> Program:
    """Applies all passes in order, and with `overlap` the one that hides communication after them. The given program is
    not changed, because each pass works on a copy of the graph."""
    for p in (*PASSES, overlap_enters) if overlap else PASSES:
        program = p(program)
    return program


__all__ = ["PASSES", "run_passes"]
