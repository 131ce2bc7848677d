"""Lines of ops that move values: views and permutations, copies, and parts of values taken or joined."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch

from tpcompiler.ops.record import Line, OpCall, letters, line
from tpcompiler.ops.views import Shape, view_pattern


def view(call: OpCall) -> Line:
    before = call.shape()
    if 0 in before or prod(before) != prod(call.results[0]):  # empty, or of sizes that are equal at run time only
        return None
    return view_pattern(before, call.results[0])


def view_as(call: OpCall) -> Line:
    """`view_as`: the second operand gives only its sizes, which become the result's."""
    said = view(call)
    if said is None:
        return None
    text, sizes = said if isinstance(said, tuple) else (said, {})
    before, after = text.split(" -> ")
    return f"{before}, {after} -> {after}", sizes


def expand(call: OpCall) -> Line:
    before, after = call.shape(), call.results[0]
    d = letters(len(after))
    lead = len(after) - len(before)
    return line([x if before[i] == after[i + lead] else "1" for i, x in enumerate(d[lead:])], d)


def unsqueeze(call: OpCall) -> Line:
    d = letters(call.rank())
    i = call.args["dim"] % (call.rank() + 1)
    return line(d, [*d[:i], "1", *d[i:]])


def squeeze(call: OpCall) -> Line:
    before = call.shape()
    dims = call.args.get("dim", list(range(len(before))))
    dims = dims if isinstance(dims, list | tuple) else [dims]
    gone = {i % len(before) for i in dims if before[i] == 1} if before else set()
    d = letters(len(before))
    return line(["1" if i in gone else x for i, x in enumerate(d)], [x for i, x in enumerate(d) if i not in gone])


def permuted(order: Callable[[OpCall], list[int]]) -> Callable[[OpCall], Line]:
    def rule(call: OpCall) -> Line:
        d = letters(call.rank())
        return line(d, [d[i] for i in order(call)])

    return rule


def reversed_(call: OpCall) -> list[int]:
    return list(range(call.rank()))[::-1]


def swapped(call: OpCall) -> list[int]:
    """The order of dimensions after a swap of the two that the arguments name, or else of the last two."""
    n = call.rank()
    a, b = (call.args.get(f"dim{k}", call.args.get(f"axis{k}", k - 2)) for k in (0, 1))
    order = list(range(n))
    if n:
        order[a % n], order[b % n] = b % n, a % n
    return order


def moved(call: OpCall) -> list[int]:
    n = call.rank()
    a, b = call.args["source"] % n, call.args["destination"] % n
    order = [i for i in range(n) if i != a]
    order.insert(b, a)
    return order


def repeat(call: OpCall) -> Line:
    """Tiling repeats the whole dimension, so that the repeats are its major factor."""
    before = letters(call.rank())
    lead = len(call.args["repeats"]) - len(before)
    return line(before, [f"r{i}" if i < lead else f"(r{i} d{i - lead})" for i in range(lead + len(before))])


def slice_(call: OpCall) -> Line:
    whole, part, sizes = stretch(call, call.shape(), call.results[0], steps=True)
    return f"< {whole} > -> < {part} >", sizes


def slice_scatter(call: OpCall) -> Line:
    whole, part, sizes = stretch(call, call.shape(0), call.shape(1), steps=False)
    return f"< {whole} >, < {part} > -> < {whole} >", sizes


def stretch(call: OpCall, before: Shape, after: Shape, *, steps: bool) -> tuple[str, str, dict[str, int]]:
    """Dimension `dim` before the op, the part of it that starts at `start`, and the sizes of their letters.

    The dimension is `(p | q | r)`: what lies before the part, the part, and what lies after it. If the part is every
    k-th element, which needs `steps`, the dimension is `(q k!)`.
    """
    n, m, step, start = before[call.dim()], after[call.dim()], call.args.get("step") or 1, call.args.get("start") or 0
    if n == m:
        return "n", "n", {}
    start = max(start + n if start < 0 else start, 0) if isinstance(start, int) else n
    if step == 1 and start + m <= n:
        sizes = {x: k for x, k in (("p", start), ("q", m), ("r", n - start - m)) if k}
        return f"({' | '.join(sizes)})", "q", sizes
    if steps and n == m * step and start < step:
        return "(q k!)", "q", {"q": m, "k": step}
    return "n!", "m!", {}  # its start or end is known at run time only


def split(call: OpCall) -> Line:
    """`split`, `split_with_sizes` and `chunk`: the results are segments of dimension `dim`."""
    sizes = {f"s{k}": shape[call.dim()] for k, shape in enumerate(call.results) if shape[call.dim()]}
    if len(sizes) == 1:
        return None
    parts = ", ".join(f"< s{k} >" for k in range(len(call.results)))
    return f"< ({' | '.join(sizes)}) > -> {parts}", sizes


def unbind(call: OpCall) -> Line:
    return f"< n! > -> {', '.join(['< >'] * len(call.results))}"


def cat(call: OpCall) -> Line:
    n, dim = len(call.operands), call.args["dim"]
    if any(call.rank(k) != len(call.results[0]) for k in range(n)):  # torch lets empty 1-d tensors join anything
        return None
    sizes = {f"s{k}": call.shape(k)[dim] for k in range(n)}
    segments = [x for x, size in sizes.items() if size]
    joined = f"({' | '.join(segments)})" if len(segments) > 1 else segments[0]
    return f"{', '.join(f'< {x} >' for x in sizes)} -> < {joined} >", sizes


def stack(call: OpCall) -> Line:
    d = letters(call.rank())
    i = call.args["dim"] % (call.rank() + 1)
    return ", ".join([" ".join(d)] * len(call.operands)) + " -> " + " ".join([*d[:i], "n!", *d[i:]])


def index(call: OpCall) -> Line:
    """x[…, i, …] with tensors: indexed dimensions are needed whole, the others stay. `x[i]` with one tensor of numbers
    is a lookup, which has a form for a part of the rows."""
    slots = [*call.args["indices"], *[None] * (call.rank() - len(call.args["indices"]))]
    used = [i for i, s in enumerate(slots) if s is not None]
    if used != list(range(used[0], used[-1] + 1)):
        return None
    picked = [s for s in call.operands[1:] if s is not None]
    new = len(torch.broadcast_shapes(*picked))
    d = letters(call.rank())
    looked_up = used == [0] and len(picked) == 1 and call.results[0] == (*picked[0], *call.shape()[1:])
    mark = "+" if looked_up else "!"  # a mask of rows has another result
    operands = [" ".join(x + mark if i in used else x for i, x in enumerate(d))]
    operands += [" ".join(letters(new, "n")[new - len(s) :]) for s in picked]
    return ", ".join(operands) + " -> " + " ".join([*d[: used[0]], *letters(new, "n"), *d[used[-1] + 1 :]])


def gather(call: OpCall) -> Line:
    source, picked = call.shape(0), call.shape(1)
    i = call.dim()
    d = [x if j != i and source[j] == picked[j] else x + "!" for j, x in enumerate(letters(call.rank()))]
    p = [x if j != i and source[j] == picked[j] else f"p{j}" for j, x in enumerate(letters(call.rank()))]
    return f"{' '.join(d)}, {' '.join(p)} -> {' '.join(p)}"


def padded(call: OpCall) -> Line:
    d, e, n = letters(call.rank()), letters(call.rank()), call.rank()
    for k in range(len(call.args["pad"]) // 2):
        i = n - 1 - k
        if call.args["pad"][2 * k] or call.args["pad"][2 * k + 1]:
            d[i], e[i] = f"d{i}!", f"e{i}!"
    return line(d, e)
