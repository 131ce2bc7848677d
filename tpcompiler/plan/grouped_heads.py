"""The axes of a capture under a spec. Grouped heads become one axis where no factoring of the degree fits them.

With 3 kv heads in groups of 2 over 5 ranks, for example, the 6 heads are split as one axis. Every rank computes all
keys and values, repeats them to all heads, and takes the heads that it needs. The gradients of keys and values are
summed over ranks.
"""

from __future__ import annotations

from tpcompiler.axes.infer import AxisMap, infer_axes
from tpcompiler.capture.repeat_heads import repeat_grouped
from tpcompiler.plan.candidates import unfit_products
from tpcompiler.plan.weighing import gather_facts
from tpcompiler.program import Capture
from tpcompiler.spec import Spec


def infer_for(capture: Capture, spec: Spec) -> tuple[Capture, AxisMap]:
    """The capture, rewritten where the spec's degree needs it, and its axes. Keys and values that are repeated to all
    heads have axes of their own there (`cut` of `infer_axes`)."""
    axes = infer_axes(capture)
    degree = spec.mesh.tensor
    if degree == 1 or spec.allow_empty or not unfit_products(gather_facts(capture, axes), degree):
        return capture, axes
    capture = repeat_grouped(capture)
    axes = infer_axes(capture)
    unfit = [set(pair) for pair in unfit_products(gather_facts(capture, axes), degree)]
    cut = {
        name for name, terms in axes.copied.items() if any(pair <= set(axes.leaves(t)) for t in terms for pair in unfit)
    }
    return capture, infer_axes(capture, frozenset(cut))
