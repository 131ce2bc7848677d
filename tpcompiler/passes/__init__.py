"""Passes: rewrites of one rank's program. Each is a function from program to program in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from tpcompiler.passes.fuse_losses import fuse_losses
from tpcompiler.passes.halve_batches import halve_batches
from tpcompiler.passes.hoist_enters import hoist_enters
from tpcompiler.passes.merge_reductions import merge_reductions
from tpcompiler.passes.overlap_enters import overlap_enters
from tpcompiler.passes.sink_reductions import sink_reductions
from tpcompiler.passes.split_of_cat import drop_joined_segments
from tpcompiler.program import Program

HIDING: Mapping[bool | Literal["halves"], tuple[Callable[[Program], Program], ...]] = {
    False: (),
    True: (overlap_enters,),
    "halves": (overlap_enters, halve_batches),
}
PASSES = (drop_joined_segments, sink_reductions, merge_reductions, hoist_enters, fuse_losses)


def run_passes(program: Program, overlap: bool | Literal["halves"] = False) -> Program:
    """Applies all passes in order, and after them those that hide communication, as the spec's `overlap` says.

    The given program is not changed, because each pass works on a copy of the graph.
    """
    for p in (*PASSES, *HIDING[overlap]):
        program = p(program)
    return program


__all__ = ["PASSES", "run_passes"]
