"""The plan: which axes to split over which mesh dimensions, under the spec, and why the others are not.

Axes of equal layers are one decision. Two axes that stand in different factors of one tensor exclude each other on one
mesh dimension; among what is legal and wanted, the heaviest independent set is taken, an axis weighing what its
matrices save less what its collectives cost. Both are elements per token, so that a toy model is planned as its large
sister is.
"""

from __future__ import annotations

from tpcompiler.plan.candidates import unfit_products
from tpcompiler.plan.make import make_plan
from tpcompiler.plan.result import Block, Plan, Replicated
from tpcompiler.plan.titles import common_name

__all__ = ["Block", "Plan", "Replicated", "common_name", "make_plan", "unfit_products"]
