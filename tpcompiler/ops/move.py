"""Lines of ops that move values: views and permutations, copies, and parts of values taken or joined."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch

from tpcompiler.ops.record import Line, OpCall, changed, letters, line
from tpcompiler.ops.views import view_pattern


def view(call: OpCall) -> Line:
    before = call.shape()
    if 0 in before or prod(before) != prod(call.results[0]):  # sizes that are equal at run time only
        return None
    return view_pattern(before, call.results[0])


def view_as(call: OpCall) -> Line:
    """The other's values do not matter, but its sizes do: they are the result's."""
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


def last_two_swapped(call: OpCall) -> list[int]:
    return _swap(call, -2, -1)


def transposed(call: OpCall) -> list[int]:
    n = max(call.rank(), 1)
    a, b = (call.args.get(f"dim{k}", call.args.get(f"axis{k}")) % n for k in (0, 1))
    return _swap(call, a, b) if call.rank() else []


def _swap(call: OpCall, a: int, b: int) -> list[int]:
    order = list(range(call.rank()))
    order[a], order[b] = order[b], order[a]
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
    """A slice divides its dimension into what is before, in and after it. With a step it takes every k-th element."""
    before, after = call.shape(), call.results[0]
    d, i = letters(call.rank()), call.dim()
    n, m, step = before[i], after[i], call.args.get("step") or 1
    if n == m:
        return line(d, d)
    start = call.args.get("start") or 0
    if not isinstance(start, int):
        return changed(d, i, [f"{d[i]}!"], [f"m{i}!"])
    start = max(start + n if start < 0 else start, 0)
    if start + m > n:  # cut at a length known at run time only
        return changed(d, i, [f"{d[i]}!"], [f"m{i}!"])
    if step == 1:
        parts = [(f"p{i}", start), (f"q{i}", m), (f"r{i}", n - start - m)]
        parts = [(x, k) for x, k in parts if k]
        return changed(d, i, [f"({' | '.join(x for x, _ in parts)})"], [f"q{i}"]), dict(parts)
    if n == m * step and start < step:
        return changed(d, i, [f"(q{i} k{i}!)"], [f"q{i}"]), {f"q{i}": m, f"k{i}": step}
    return changed(d, i, [f"{d[i]}!"], [f"m{i}!"])


def split(call: OpCall) -> Line:
    """split, split_with_sizes, chunk: segments of a dimension."""
    d, i = letters(call.rank()), call.dim()
    sizes = {f"s{k}": shape[i] for k, shape in enumerate(call.results) if shape[i]}
    if len(sizes) == 1:
        return None
    whole_dim = [*d[:i], f"({' | '.join(sizes)})", *d[i + 1 :]]
    out = [" ".join([*d[:i], f"s{k}", *d[i + 1 :]]) for k in range(len(call.results))]
    return " ".join(whole_dim) + " -> " + ", ".join(out), sizes


def unbind(call: OpCall) -> Line:
    d, i = letters(call.rank()), call.dim()
    one = " ".join(d[:i] + d[i + 1 :])
    return " ".join([*d[:i], d[i] + "!", *d[i + 1 :]]) + " -> " + ", ".join([one] * len(call.results))


def cat(call: OpCall) -> Line:
    d, i = letters(len(call.results[0])), call.args["dim"] % max(len(call.results[0]), 1)
    operands, segments, sizes = [], [], dict[str, int]()
    for k in range(len(call.operands)):
        shape = call.shape(k)
        if len(shape) != len(d):  # torch lets empty 1-d tensors join anything
            return None
        if shape[i]:
            segments.append(f"s{k}")
        sizes[f"s{k}"] = shape[i]
        operands.append(" ".join([*d[:i], f"s{k}", *d[i + 1 :]]))
    joined = f"({' | '.join(segments)})" if len(segments) > 1 else segments[0]
    return ", ".join(operands) + " -> " + " ".join([*d[:i], joined, *d[i + 1 :]]), sizes


def stack(call: OpCall) -> Line:
    d = letters(call.rank())
    i = call.args["dim"] % (call.rank() + 1)
    return ", ".join([" ".join(d)] * len(call.operands)) + " -> " + " ".join([*d[:i], "n!", *d[i:]])


def index(call: OpCall) -> Line:
    """x[…, i, …] with tensors: indexed dimensions are needed whole, the others stay."""
    slots = [*call.args["indices"], *[None] * (call.rank() - len(call.args["indices"]))]
    used = [i for i, s in enumerate(slots) if s is not None]
    if used != list(range(used[0], used[-1] + 1)):
        return None
    picked = [s for s in call.operands[1:] if s is not None]
    new = len(torch.broadcast_shapes(*picked))
    d = letters(call.rank())
    operands = [" ".join(x + "!" if i in used else x for i, x in enumerate(d))]
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
