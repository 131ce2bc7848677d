"""The plan: which axes to split over which mesh dimensions under the spec, and why the other axes stay whole.

The axes of equal layers are one decision. Two axes that stand in different factors of one tensor exclude each other on
a mesh dimension. Among the axes that may and should be split, the plan takes the heaviest set in which no two exclude
each other. The weight of an axis is what splitting its matrices saves, less what its collectives cost. Both are counted
in elements per token, so that a small model is planned like a large one of the same shape.
"""

from __future__ import annotations

from tpcompiler.plan.candidates import unfit_products
from tpcompiler.plan.make import make_plan
from tpcompiler.plan.result import Block, Plan, Replicated
from tpcompiler.plan.titles import common_name

__all__ = ["Block", "Plan", "Replicated", "common_name", "make_plan", "unfit_products"]
