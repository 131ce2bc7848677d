"""What is certain of a step: claims of its results and kinds of its gradients, from facts alone."""

from __future__ import annotations

from collections.abc import Sequence

from tpcompiler.check import move_forms, part_facts  # noqa: F401  (they state facts)
from tpcompiler.check.calls import Call
from tpcompiler.check.claims import Claim, Geometry
from tpcompiler.check.cones import TensorInfo
from tpcompiler.check.form import Fact, Form, Held, RefutedError, UnknownRowsError, Wrong, derive
from tpcompiler.check.op_forms import elementwise, elementwise_form
from tpcompiler.check.operator_facts import NAMES
from tpcompiler.check.site import FORMS, RANKED, Site


def certified(
    geometry: Geometry, call: Call, whole: Call, given: Sequence[Held], made: Sequence[TensorInfo | None]
) -> Fact | Wrong:
    """The fact about a step, or why it does not hold. An operation without facts takes whole operands only."""
    same = not call.by_rank and call.over is None and all(g.claim.whole for g in given)
    if same:
        claims = tuple(Claim((None,) * len(m.shape) if m is not None else ()) for m in made)
        return Fact(claims, ((),) * len(given))
    site = Site(geometry, call, whole, given, made)
    name = NAMES.get(call.target, site.name)
    if any(m is None for m in made):
        return Wrong(f"{call} reads a number from what ranks hold differently")
    try:
        if elementwise(site) and not call.by_rank:
            found: Form | Fact = elementwise_form(site)
        elif name in FORMS:
            if call.by_rank and name not in RANKED:
                return Wrong(f"no fact speaks of {call} with arguments that depend on the rank")
            found = FORMS[name](site)
        else:
            return Wrong(f"no fact is known about {call}, which therefore takes whole operands only")
        return found if isinstance(found, Fact) else derive(geometry, found, given, made)
    except (RefutedError, UnknownRowsError) as e:
        return Wrong(str(e))
