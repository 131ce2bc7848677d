"""The plain graph rewritten for one rank: local sizes, sliced constants, and the collectives that the plan implies.

What an op does to a split axis is said by its rule (`axes`); this stage knows only four consequences:

    contracted    the result is partial          → `reduce` (a bias is added after it, once)
    looked up     a special form of the op       → `lookup`, `cross_entropy`, and norms that reduce their statistics
    lacked        an operand that needs a gradient and does not carry a split axis, in an op whose result or
                  contraction does               → it enters, once per value
    leaves whole  a sharded output               → `gather`
"""

from __future__ import annotations

from tpcompiler.partition.builder import CannotSplit
from tpcompiler.partition.rewrite import partition

__all__ = ["CannotSplit", "partition"]
