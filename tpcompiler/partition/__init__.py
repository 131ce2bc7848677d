"""Rewrites the plain graph for one rank: local sizes, sliced constants, and the collectives that the plan implies.

The op's record (`ops`) says what the op does to a split axis. This stage knows the four consequences:

    The axis is contracted                → the result is partial; `reduce` sums it, then a bias is added once.
    The op has a special form for a part  → the runtime's `lookup`, `cross_entropy` or norm takes the op's place.
    An operand that needs a gradient lacks an axis of the result or of the contraction
                                          → the operand gets an `enter`, one for all its users.
    An output that must be whole is split → `gather`.
"""

from __future__ import annotations

from tpcompiler.partition.builder import CannotSplit
from tpcompiler.partition.rewrite import partition

__all__ = ["CannotSplit", "partition"]
