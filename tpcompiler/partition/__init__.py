"""Rewrites the plain graph for one rank: local sizes, sliced constants, and the collectives that the plan implies.

The op's record (`ops`) says what the op does to a split axis. This stage knows the four consequences:

    contracted    the result is partial                   → `reduce`, and a bias is added once after it
    special       the op has a special form               → `lookup`, `cross_entropy`, and norms that reduce statistics
    lacked        an operand that needs a gradient lacks an axis that the result or the contraction has
                                                          → the operand enters, once for each value
    leaves whole  a sharded output                        → `gather`
"""

from __future__ import annotations

from tpcompiler.partition.builder import CannotSplit
from tpcompiler.partition.rewrite import partition

__all__ = ["CannotSplit", "partition"]
