"""Whether a value that only the program computes is one of the model's, by running both from the values they share."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tpcompiler.check.calls import Call, integers, modes, numbers, outputs
from tpcompiler.check.cones import At, Cone, Operand
from tpcompiler.check.draw import SCALES, draw, maskable
from tpcompiler.check.shrink import shrinks
from tpcompiler.check.steps import Steps
from tpcompiler.check.values import BUFFER, Value, Values, leaves

_LONGEST = 16  # steps of a cone, not counting constants: longer ones are compared too bluntly
_REACH = 48  # of the model's values looked at
_NUDGE, _LEEWAY, _RELATIVE = 3.5e-14, 100.0, 1e-10  # the nudge's width
_NO_LENGTH = 1 << 31  # an open end of a slice
_DEEP = 10  # steps from the given values to one of those


class Equal:
    """Pairs of cones compared so far. `values` has all there are, `sizes` those of batch and sequence."""

    def __init__(
        self, steps: Steps, values: Values, sizes: Iterable[int], known: dict[Any, bool] | None = None
    ) -> None:
        self.steps = steps
        self.values = values
        self.sizes = frozenset(sizes)
        self.known: dict[Any, bool] = {} if known is None else known
        self.latest: tuple[Any, ...] = (None, None, None, None)  # a value, what it is computed from, its cone and key
        self.found: dict[Value, tuple[Value, ...]] = {}  # the model's, equal to what a program computed from these

    def original(self, value: Value) -> Value | None:
        """The model's value that a program's own one is; None if none is found."""
        for given in self._givens(value):
            if _cone(value, given) is None:
                return None
            for other in (*given, *self._reachable(given)) if given else self.values.constants:
                if other.original and _same_kind(value, other) and self.same(value, other, given):
                    if other not in given and not other.constant:
                        self.found.setdefault(other, given)
                    return other
        return None

    def _givens(self, value: Value) -> Iterator[tuple[Value, ...]]:
        """What a program's value may be seen as computed from: its leaves; then, for those that were found to be equal
        to something of the program's, what that was computed from.

        For such a leaf may lie beyond the value that is looked for, which is not computed from it: the first segment of
        a product is also the first segment of the product times ones, but the product comes before.
        """
        given = leaves(value)
        yield given
        before = tuple(dict.fromkeys(g for v in given for g in self.found.get(v, (v,))))
        if before != given:
            yield before

    def same(self, value: Value, other: Value, given: tuple[Value, ...] | None = None) -> bool:
        """Whether two values are equal whatever the values are from which the first is computed.

        But for integers that are constants (positions, buckets), which are what they are: drawn at random, few of them
        may be indices that both accept, and two texts may come to the same positions in two ways.
        """
        if given is None:
            return any(self.same(value, other, g) for g in self._givens(value))
        drawn = tuple(g for g in given if not (g.constant and g.call is not None and counts(g)))
        return self._equal(value, other, drawn)

    def _equal(self, value: Value, other: Value, given: tuple[Value, ...]) -> bool:
        if self.latest[:2] != (value, given):  # one value is compared with many
            cone = _cone(value, given)
            self.latest = value, given, cone, None if cone is None else _key(cone)
        a, b = self.latest[2], _cone(other, given)
        if a is None or b is None or any(g.out is None for g in given):
            return False
        operands = tuple(g.out for g in given if g.out is not None)
        key = (self.latest[3], _key(b), operands)
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
        if _drawn(calls_a) != _drawn(calls_b) or self._beyond(a, b):
            return False
        moded = any(modes(c) for c in calls_a + calls_b if not c.random)
        made_a, many_a = self.steps.describe(a, operands)
        made_b, many_b = self.steps.describe(b, operands)
        if many_a != many_b or [m and (m.shape, m.dtype) for m in made_a] != [m and (m.shape, m.dtype) for m in made_b]:
            return False
        for shrink in shrinks([a, b], operands, ()):
            small = shrink.operands(operands)
            x, y = (a.substituted(shrink.arguments), b.substituted(shrink.arguments)) if shrink.arguments else (a, b)
            runs = [
                (seed, training) for training in ((False, True) if moded else (False,)) for seed in range(len(SCALES))
            ]
            masks = [i for i, o in enumerate(small) if maskable(o)]
            return all(_agree(x, y, small, seed, training) for seed, training in runs) and all(
                _agree(x, y, small, 0, False, mask=i) for i in masks
            )
        return False

    def _beyond(self, a: Cone, b: Cone) -> bool:
        """Whether the constants (masks) of just one speak of a length that the sizes of the run do not reach."""
        only = _lengths(a) ^ _lengths(b)
        return bool(self.sizes) and any(n > min(self.sizes) and n not in self.sizes for n in only)


def _agree(a: Cone, b: Cone, operands: list[Operand], seed: int, training: bool, *, mask: int | None = None) -> bool:
    """Whether two cones give the same results and gradients on random operands, up to what rounding does to them."""
    special = {n for cone in (a, b) for c, _ in cone.steps for n in numbers(c)}
    tensors = draw(operands, lambda ts: b.run(ts, training), special, seed, mask=mask)
    generator = torch.Generator().manual_seed(seed)
    moved = [
        t * (1 + _NUDGE * (torch.rand(t.shape, generator=generator, dtype=t.dtype) - 0.5)) if _real(t) else t
        for t in tensors
    ]
    expected, live = _results(b, tensors, operands, seed, training)
    nudged, _ = _results(b, moved, operands, seed, training)
    found, alive = _results(a, tensors, operands, seed, training)
    if live != alive:
        return False
    return all(_near(x, y, z) for x, y, z in zip(found, expected, nudged, strict=True))


def _lengths(cone: Cone) -> set[int]:
    """The integers in what is computed from no operand."""
    constant: list[bool] = []
    found: set[int] = set()
    for call, given in cone.steps:
        constant.append(all(constant[g.i] if isinstance(g, At) else isinstance(g, Tensor) for g in given))
        if constant[-1]:
            found |= {abs(n) for n in integers(call) if abs(n) < _NO_LENGTH}
    return found


def _near(x: Tensor, y: Tensor, nudged: Tensor) -> bool:
    """Whether `x` is `y`, as nearly as `y` is itself when its operands are nudged."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not _real(y):
        return bool(torch.equal(x, y))
    noise = (nudged - y).abs()
    noise = noise[noise.isfinite()]
    floor = _LEEWAY * float(noise.max()) if noise.numel() else 0.0
    return bool(torch.allclose(x, y, rtol=_RELATIVE, atol=floor, equal_nan=True))


def _results(
    cone: Cone, tensors: list[Tensor], operands: list[Operand], seed: int, training: bool
) -> tuple[list[Tensor], list[bool]]:
    """The results and the operands' gradients; and which results need one."""
    mine = [t.clone().requires_grad_(o.grad) for t, o in zip(tensors, operands, strict=True)]
    made = outputs(cone.run(mine, training))
    generator = torch.Generator().manual_seed(100 + seed)
    live = [t for t in made if t.requires_grad]
    upstream = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in live]
    wanted = [t for t in mine if t.requires_grad]
    grads = torch.autograd.grad(live, wanted, upstream, allow_unused=True) if live and wanted else [None] * len(wanted)
    zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]
    return [t.detach() for t in made] + zeros, [t.requires_grad for t in made]


def counts(value: Value) -> bool:
    """Whether it holds integers."""
    out = value.out
    return out is not None and not (out.dtype.is_floating_point or out.dtype.is_complex or out.dtype == torch.bool)


def _real(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


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
        elif value.call is None or value.opaque or depth == 0:
            return False
        else:
            closed[value] = False
            closed[value] = all(_closes(o, closed, depth - 1) for o in value.operands)
    return closed[value]


def _cone(value: Value, given: tuple[Value, ...]) -> Cone | None:
    """The steps from the given values to one; None when there are too many, or it needs others."""
    place: dict[Value, Any] = {v: i for i, v in enumerate(given)}
    steps: list[tuple[Call, tuple[Any, ...]]] = []
    entered: set[Value] = set()
    counted = 0

    def visit(v: Value) -> bool:
        nonlocal counted
        if v in place:
            return True
        entered.add(v)
        if v.opaque:
            return False
        if v.call is None:
            if v.kind != BUFFER or v.stored is None:
                return False
            place[v] = v.stored
            return True
        if counted >= _LONGEST or len(entered) > 4 * _LONGEST:
            return False
        if not all(visit(o) for o in v.operands):
            return False
        place[v] = At(len(steps))
        counted += not v.constant
        steps.append((v.call, tuple(place[o] for o in v.operands)))
        return True

    if not visit(value):
        return None
    at = place[value]
    return None if isinstance(at, Tensor) else Cone(tuple(steps), at)


def _key(cone: Cone) -> Any:
    steps = tuple((c.key, tuple(id(g) if isinstance(g, Tensor) else g for g in gs)) for c, gs in cone.steps)
    return steps, cone.result
