"""Lines of ops that write a value into a part of another. The dimension along which they write stays whole, unless the
part is one segment of it."""

from __future__ import annotations

import torch

from tpcompiler.ops.record import Line, OpCall, letters


def scatter(call: OpCall) -> Line:
    """`scatter` and `scatter_add`. Dimensions other than `dim` may be split where the operands' sizes agree."""
    i, shapes = call.dim(), [s for s in call.operands if s is not None]
    sides = []
    for name, shape in zip("dps", shapes, strict=False):
        alike = [j != i and len({s[j] for s in shapes}) == 1 for j in range(len(shape))]
        sides.append(" ".join(f"d{j}" if same else f"{name}{j}!" for j, same in enumerate(alike)))
    return f"{', '.join(sides)} -> {sides[0]}"


def index_put(call: OpCall) -> Line:
    """`x[…, i, …] = y`: the indexed dimensions are needed whole."""
    slots = [*call.args["indices"], *[None] * (call.rank() - len(call.args["indices"]))]
    used = [i for i, s in enumerate(slots) if s is not None]
    if not used or used != list(range(used[0], used[-1] + 1)):
        return None
    *picked, values = [s for s in call.operands[1:] if s is not None]
    new = letters(len(torch.broadcast_shapes(*picked)), "n")
    new = [x + "!" for x in new]
    d = letters(call.rank())
    base = [x + "!" if i in used else x for i, x in enumerate(d)]
    put = [*d[: used[0]], *new, *d[used[-1] + 1 :]]
    if len(values) > len(put):
        return None
    sides = [base, *(new[len(new) - len(s) :] for s in picked), put[len(put) - len(values) :]]
    return f"{', '.join(' '.join(x) for x in sides)} -> {' '.join(base)}"
