"""Whether a value that only the program computes is one of the model's, by running both from the values they share."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from tpcompiler.check.calls import Call, modes, numbers, outputs
from tpcompiler.check.compare import close
from tpcompiler.check.cones import At, Cone, Operand
from tpcompiler.check.draw import NORMAL, SMALL, draw
from tpcompiler.check.shrink import shrinks
from tpcompiler.check.steps import Steps
from tpcompiler.check.values import BUFFER, Value, leaves

_LONGEST = 40  # steps of a cone
_REACH = 48  # of the model's values looked at
_DEEP = 10  # steps from the given values to one of those


class Equal:
    """Pairs of cones compared so far."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.known: dict[Any, bool] = {}

    def original(self, value: Value) -> Value | None:
        """The model's value that a program's own one is; None if none is found."""
        given = leaves(value)
        cone = _cone(value, given)
        if cone is None or not given:
            return None
        for other in (*given, *self._reachable(given)):
            if other.original and _same_kind(value, other) and self.same(value, other, given):
                return other
        return None

    def same(self, value: Value, other: Value, given: tuple[Value, ...] | None = None) -> bool:
        """Whether two values are equal whatever the values are from which the first is computed."""
        given = leaves(value) if given is None else given
        a, b = _cone(value, given), _cone(other, given)
        if a is None or b is None or any(g.out is None for g in given):
            return False
        operands = tuple(g.out for g in given if g.out is not None)
        key = (_key(a), _key(b), operands)
        if key not in self.known:
            try:
                self.known[key] = self._compare(a, b, operands)
            except Exception:  # one of them cannot be run on these
                self.known[key] = False
        return self.known[key]

    def _reachable(self, given: tuple[Value, ...]) -> list[Value]:
        """Values of the model that are computed from the given ones alone, nearest first."""
        start = min(given, key=lambda v: len(v.users))
        closed: dict[Value, bool] = dict.fromkeys(given, True)
        found: list[Value] = []
        queue = deque([start])
        seen = {start}
        while queue and len(found) < _REACH:
            for user in queue.popleft().users:
                if user not in seen and user.original and _closes(user, closed, _DEEP):
                    seen.add(user)
                    found.append(user)
                    queue.append(user)
        return found

    def _compare(self, a: Cone, b: Cone, operands: tuple[Operand, ...]) -> bool:
        calls_a, calls_b = [c for c, _ in a.steps], [c for c, _ in b.steps]
        if _drawn(calls_a) != _drawn(calls_b):
            return False
        moded = any(modes(c) for c in calls_a + calls_b if not c.random)
        made_a, many_a = self.steps.describe(a, operands)
        made_b, many_b = self.steps.describe(b, operands)
        if many_a != many_b or [m and (m.shape, m.dtype) for m in made_a] != [m and (m.shape, m.dtype) for m in made_b]:
            return False
        for shrink in shrinks([a, b], operands, ()):
            small = shrink.operands(operands)
            x, y = (a.substituted(shrink.arguments), b.substituted(shrink.arguments)) if shrink.arguments else (a, b)
            return all(
                _agree(x, y, small, style, seed, training)
                for training in ((False, True) if moded else (False,))
                for seed, style in enumerate((NORMAL, SMALL, NORMAL))
            )
        return False


def _agree(a: Cone, b: Cone, operands: list[Operand], style: str, seed: int, training: bool) -> bool:
    special = {n for cone in (a, b) for c, _ in cone.steps for n in numbers(c)}
    tensors = draw(operands, lambda ts: b.run(ts, training), special, style, seed)
    results = []
    generator = torch.Generator().manual_seed(seed)
    upstream: list[Tensor] | None = None
    for cone in (a, b):
        mine = [t.clone().requires_grad_(o.grad) for t, o in zip(tensors, operands, strict=True)]
        made = outputs(cone.run(mine, training))
        if upstream is None:
            upstream = [torch.randn(t.shape, generator=generator, dtype=t.dtype) if t.requires_grad else t for t in made]
        live = [(t, u) for t, u in zip(made, upstream, strict=True) if t.requires_grad]
        wanted = [t for t in mine if t.requires_grad]
        grads = torch.autograd.grad([t for t, _ in live], wanted, [u for _, u in live], allow_unused=True) if live and wanted else ()
        results.append((made, [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=False)]))
    (made_a, grads_a), (made_b, grads_b) = results
    if [t.requires_grad for t in made_a] != [t.requires_grad for t in made_b]:
        return False
    return all(close(x, y) for x, y in zip([*made_a, *grads_a], [*made_b, *grads_b], strict=True))


def _drawn(calls: list[Call]) -> list[str]:
    """What random calls say of the mode."""
    return sorted(repr(m) for c in calls if c.random for m in modes(c))


def _same_kind(a: Value, b: Value) -> bool:
    if a.out is None or b.out is None:
        return a.out is None and b.out is None
    return a.out.shape == b.out.shape and a.out.dtype == b.out.dtype


def _closes(value: Value, closed: dict[Value, bool], depth: int) -> bool:
    """Whether a value is computed from closed ones and constants alone, in not too many steps."""
    if value not in closed:
        if value.constant:
            closed[value] = True
        elif value.call is None or depth == 0:
            return False
        else:
            closed[value] = False
            closed[value] = all(_closes(o, closed, depth - 1) for o in value.operands)
    return closed[value]


def _cone(value: Value, given: tuple[Value, ...]) -> Cone | None:
    """The steps from the given values to one; None when there are too many, or it needs others."""
    place: dict[Value, Any] = {v: i for i, v in enumerate(given)}
    steps: list[tuple[Call, tuple[Any, ...]]] = []

    def visit(v: Value) -> bool:
        if v in place:
            return True
        if v.call is None:
            if v.kind != BUFFER or v.stored is None:
                return False
            place[v] = v.stored
            return True
        if len(steps) >= _LONGEST:
            return False
        if not all(visit(o) for o in v.operands):
            return False
        place[v] = At(len(steps))
        steps.append((v.call, tuple(place[o] for o in v.operands)))
        return True

    if not visit(value):
        return None
    at = place[value]
    return None if isinstance(at, Tensor) else Cone(tuple(steps), at)


def _key(cone: Cone) -> Any:
    steps = tuple((c.key, tuple(id(g) if isinstance(g, Tensor) else g for g in gs)) for c, gs in cone.steps)
    return steps, cone.result
