"""The table of rules: one line an op, in the notation of `notation.py`; a function where the line depends on arguments.

Contraction means a plain sum: a rule may drop a letter without `!` only if splitting it leaves a result that sums up.
Ops that are not in the table are unsplittable, never an error. Users add their own with `rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from tpcompiler.axes.notation import parse
from tpcompiler.axes.views import Shape, view_pattern


@dataclass(frozen=True)
class Call:
    """A node as rules see it: shapes of its tensor operands in schema order (lists flattened, None where left out)."""

    operands: tuple[Shape | None, ...]
    results: tuple[Shape, ...]
    args: Mapping[str, Any]  # every argument by its schema name, defaults filled in; tensors are left as nodes
    floating: tuple[bool, ...] = ()  # per operand: of a floating dtype

    def rank(self, i: int = 0) -> int:
        shape = self.operands[i]
        assert shape is not None
        return len(shape)

    def dim(self, name: str = "dim", i: int = 0) -> int:
        return int(self.args[name]) % max(self.rank(i), 1)


Line = str | tuple[str, dict[str, int]] | None  # None: no rule for these arguments
Rule = str | Callable[[Call], Line]
POINTWISE = "pointwise"


def letters(n: int, prefix: str = "d") -> list[str]:
    return [f"{prefix}{i}" for i in range(n)]


def line(operand: list[str], result: list[str]) -> str:
    return f"{' '.join(operand)} -> {' '.join(result)}"


def pointwise(call: Call) -> Line:
    return ", ".join("..." for s in call.operands if s is not None) + " -> ..."


def whole(*names: str) -> Callable[[Call], Line]:
    """An op on one tensor that needs the dimensions in the arguments `names` whole, and keeps every dimension."""

    def rule(call: Call) -> Line:
        d = letters(call.rank())
        for name in names:
            value = call.args.get(name)
            dims = range(call.rank()) if value is None else value if isinstance(value, list | tuple) else [value]
            for i in dims:
                d[i % call.rank()] = f"d{i % call.rank()}!"
        return _same_or_reduced(call, d)

    return rule


def _same_or_reduced(call: Call, d: list[str]) -> Line:
    """One line for results that keep all dimensions, keep marked ones as `1`, or drop them."""
    sides = []
    for shape in call.results:
        if len(shape) == call.rank():
            sides.append(
                " ".join(
                    "1" if n == 1 and m != 1 else x for x, n, m in zip(d, shape, call.operands[0] or (), strict=True)
                )
            )
        else:
            sides.append(" ".join(x for x in d if not x.endswith("!")))
    return " ".join(d) + " -> " + ", ".join(sides)


def reduction(call: Call) -> Line:
    """sum, mean: the dimensions in `dim` (all when None) are contracted."""
    dims = call.args.get("dim")
    n = call.rank()
    over = (
        set(range(n))
        if dims is None or dims == []
        else {i % n for i in (dims if isinstance(dims, list | tuple) else [dims])}
    )
    keep = bool(call.args.get("keepdim", False))
    d = letters(n)
    return line(d, [("1" if i in over else x) for i, x in enumerate(d) if keep or i not in over])


def matmul(call: Call) -> Line:
    a, b = call.rank(0), call.rank(1)
    left = "k" if a == 1 else "... m k"
    right = "k" if b == 1 else "... k n"
    out = ("... " if max(a, b) > 2 else "") + " ".join(x for x, there in (("m", a > 1), ("n", b > 1)) if there)
    if max(a, b) <= 2:
        left, right = left.removeprefix("... "), right.removeprefix("... ")
    return f"{left if a > 2 else left.removeprefix('... ')}, {right if b > 2 else right.removeprefix('... ')} -> {out}"


def addmm(call: Call) -> Line:
    batch = "b " if call.rank(1) == 3 else ""
    out = f"{batch}m n".split()
    bias = out[len(out) - call.rank(0) :]
    return f"{' '.join(bias)}, {batch}m k, {batch}k n -> {' '.join(out)}"


def einsum(call: Call) -> Line:
    equation = str(call.args["equation"]).replace(" ", "")
    ins, _, out = equation.partition("->")
    if "->" not in equation:
        plain = ins.replace(",", "").replace("...", "")
        out = ("..." if "..." in ins else "") + "".join(sorted(c for c in set(plain) if plain.count(c) == 1))
    terms = ins.split(",")
    if any(len(set(t.replace("...", ""))) != len(t.replace("...", "")) for t in terms):
        return None  # a diagonal
    return ", ".join(map(_spaced, terms)) + " -> " + _spaced(out)


def _spaced(term: str) -> str:
    return " ".join("..." if c == "." else c for c in term.replace("...", "."))


def attention(call: Call) -> Line:
    """Scores over t and d are needed whole; heads are batch. With grouped heads, h = (kv group)."""
    n = call.rank(0)
    lead = letters(n - 2)
    q, k = call.operands[0], call.operands[1]
    assert q is not None and k is not None
    mask = call.operands[3] if len(call.operands) > 3 else None
    heads, kv = list(lead), list(lead)
    sizes: dict[str, int] = {}
    if n >= 3 and q[-3] != k[-3]:
        if k[-3] == 1:  # one for all: broadcast
            heads[-1], kv[-1], sizes = "g", "1", {"g": q[-3]}
        elif call.args.get("enable_gqa"):
            heads[-1], kv[-1] = "(kv g)", "kv"
            sizes = {"kv": k[-3], "g": q[-3] // k[-3]}
        else:
            return None
    h, j = " ".join(heads), " ".join(kv)
    parts = [f"{h} s! d!", f"{j} t! d!", f"{j} t! e"]
    if mask is not None:
        parts.append(" ".join([*heads, "s!", "t!"][n - len(mask) :]))
    return f"{', '.join(parts)} -> {h} s! e", sizes


def layer_norm(call: Call) -> Line:
    """Over one dimension there is a form for a part of it: the statistics are reduced."""
    lead = call.rank() - len(call.args["normalized_shape"])
    mark = "+" if call.rank() - lead == 1 else "!"
    d = [x if i < lead else x + mark for i, x in enumerate(letters(call.rank()))]
    rest = sum(s is not None for s in call.operands[1:])
    return ", ".join([" ".join(d)] + [" ".join(d[lead:])] * rest) + " -> " + " ".join(d)


def cross_entropy(call: Call) -> Line:
    if call.floating[1]:
        return None  # targets are probabilities
    n = call.rank()
    d = [f"d{i}!" for i in range(n)]
    d[min(1, n - 1)] = "v+"
    target = [x for x in d if x != "v+"]
    weight = ", v+" if len(call.operands) > 2 and call.operands[2] is not None else ""
    return f"{' '.join(d)}, {' '.join(target)}{weight} -> {' '.join(target) if call.results[0] else ''}"


def permuted(order: Callable[[Call], list[int]]) -> Callable[[Call], Line]:
    def rule(call: Call) -> Line:
        d = letters(call.rank())
        return line(d, [d[i] for i in order(call)])

    return rule


def _swap(call: Call, a: int, b: int) -> list[int]:
    order = list(range(call.rank()))
    order[a], order[b] = order[b], order[a]
    return order


def _transpose(call: Call) -> list[int]:
    n = max(call.rank(), 1)
    return _swap(call, call.args["dim0"] % n, call.args["dim1"] % n) if call.rank() else []


def view(call: Call) -> Line:
    before = call.operands[0]
    assert before is not None
    if 0 in before or prod(before) != prod(call.results[0]):  # sizes that are equal at run time only
        return None
    return view_pattern(before, call.results[0])


def expand(call: Call) -> Line:
    before, after = call.operands[0], call.results[0]
    assert before is not None
    d = letters(len(after))
    lead = len(after) - len(before)
    return line([x if before[i] == after[i + lead] else "1" for i, x in enumerate(d[lead:])], d)


def select(call: Call) -> Line:
    d, i = letters(call.rank()), call.dim()
    return line([*d[:i], d[i] + "!", *d[i + 1 :]], d[:i] + d[i + 1 :])


def slice_(call: Call) -> Line:
    """A slice takes its dimension apart into what is before, in and after it; one with a step takes every k-th."""
    before, after = call.operands[0], call.results[0]
    assert before is not None
    d, i = letters(call.rank()), call.dim()
    n, m, step = before[i], after[i], call.args.get("step") or 1
    if n == m:
        return line(d, d)
    start = call.args.get("start") or 0
    if not isinstance(start, int):
        return _cut(d, i, [f"{d[i]}!"], [f"m{i}!"])
    start = max(start + n if start < 0 else start, 0)
    if start + m > n:  # cut at a length known at run time only
        return _cut(d, i, [f"{d[i]}!"], [f"m{i}!"])
    if step == 1:
        parts = [(f"p{i}", start), (f"q{i}", m), (f"r{i}", n - start - m)]
        parts = [(x, k) for x, k in parts if k]
        return _cut(d, i, [f"({' | '.join(x for x, _ in parts)})"], [f"q{i}"]), dict(parts)
    if n == m * step and start < step:
        return _cut(d, i, [f"(q{i} k{i}!)"], [f"q{i}"]), {f"q{i}": m, f"k{i}": step}
    return _cut(d, i, [f"{d[i]}!"], [f"m{i}!"])


def _cut(d: list[str], i: int, before: list[str], after: list[str]) -> str:
    return line(d[:i] + before + d[i + 1 :], d[:i] + after + d[i + 1 :])


def split(call: Call) -> Line:
    """split, split_with_sizes, chunk: segments of a dimension."""
    d, i = letters(call.rank()), call.dim()
    sizes = {f"s{k}": shape[i] for k, shape in enumerate(call.results) if shape[i]}
    if len(sizes) == 1:
        return None
    whole_dim = [*d[:i], f"({' | '.join(sizes)})", *d[i + 1 :]]
    out = [" ".join([*d[:i], f"s{k}", *d[i + 1 :]]) for k in range(len(call.results))]
    return " ".join(whole_dim) + " -> " + ", ".join(out), sizes


def unbind(call: Call) -> Line:
    d, i = letters(call.rank()), call.dim()
    one = " ".join(d[:i] + d[i + 1 :])
    return " ".join([*d[:i], d[i] + "!", *d[i + 1 :]]) + " -> " + ", ".join([one] * len(call.results))


def cat(call: Call) -> Line:
    d, i = letters(len(call.results[0])), call.args["dim"] % max(len(call.results[0]), 1)
    operands, segments, sizes = [], [], {}
    for k, shape in enumerate(call.operands):
        assert shape is not None
        if len(shape) != len(d):  # torch lets empty 1-d tensors join anything
            return None
        if shape[i]:
            segments.append(f"s{k}")
        sizes[f"s{k}"] = shape[i]
        operands.append(" ".join([*d[:i], f"s{k}", *d[i + 1 :]]))
    joined = f"({' | '.join(segments)})" if len(segments) > 1 else segments[0]
    return ", ".join(operands) + " -> " + " ".join([*d[:i], joined, *d[i + 1 :]]), sizes


def stack(call: Call) -> Line:
    d = letters(call.rank())
    i = call.args["dim"] % (call.rank() + 1)
    return ", ".join([" ".join(d)] * len(call.operands)) + " -> " + " ".join([*d[:i], "n!", *d[i:]])


def unsqueeze(call: Call) -> Line:
    d = letters(call.rank())
    i = call.args["dim"] % (call.rank() + 1)
    return line(d, [*d[:i], "1", *d[i:]])


def squeeze(call: Call) -> Line:
    before = call.operands[0]
    assert before is not None
    dims = call.args.get("dim", list(range(len(before))))
    dims = dims if isinstance(dims, list | tuple) else [dims]
    gone = {i % len(before) for i in dims if before[i] == 1} if before else set()
    d = letters(len(before))
    return line(["1" if i in gone else x for i, x in enumerate(d)], [x for i, x in enumerate(d) if i not in gone])


def repeat_interleave(call: Call) -> Line:
    if call.args.get("dim") is None or not isinstance(call.args["repeats"], int):
        return None
    d, i = letters(call.rank()), call.dim()
    before = call.operands[0]
    assert before is not None
    if before[i] == 1 or call.args["repeats"] == 1:
        return line([x if j != i or before[i] != 1 else "1" for j, x in enumerate(d)], d)
    return _cut(d, i, [d[i]], [f"({d[i]} r)"]), {d[i]: before[i], "r": call.args["repeats"]}


def repeat(call: Call) -> Line:
    """Tiling: repeats are the major factor."""
    before = call.operands[0]
    assert before is not None
    lead = len(call.args["repeats"]) - len(before)
    d, sizes, out = letters(len(before)), {}, []
    for i, times in enumerate(call.args["repeats"]):
        if not isinstance(times, int):
            return None
        n = before[i - lead] if i >= lead else 1
        sizes |= {f"r{i}": times, **({f"d{i - lead}": n} if i >= lead else {})}
        names = [x for x, k in ((f"r{i}", times), (f"d{i - lead}", n)) if k != 1]
        out.append("1" if not names else names[0] if len(names) == 1 else f"({' '.join(names)})")
    return line(["1" if n == 1 else x for x, n in zip(d, before, strict=True)], out), sizes


def index(call: Call) -> Line:
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


def index_select(call: Call) -> Line:
    d, i = letters(call.rank()), call.dim()
    return f"{line([*d[:i], d[i] + '!', *d[i + 1 :]], []).removesuffix(' -> ')}, n -> {' '.join([*d[:i], 'n', *d[i + 1 :]])}"


def gather(call: Call) -> Line:
    source, picked = call.operands[0], call.operands[1]
    assert source is not None and picked is not None
    i = call.dim()
    d = [x if j != i and source[j] == picked[j] else x + "!" for j, x in enumerate(letters(call.rank()))]
    p = [x if j != i and source[j] == picked[j] else f"p{j}" for j, x in enumerate(letters(call.rank()))]
    return f"{' '.join(d)}, {' '.join(p)} -> {' '.join(p)}"


def padded(call: Call) -> Line:
    d, e, n = letters(call.rank()), letters(call.rank()), call.rank()
    for k in range(len(call.args["pad"]) // 2):
        i = n - 1 - k
        if call.args["pad"][2 * k] or call.args["pad"][2 * k + 1]:
            d[i], e[i] = f"d{i}!", f"e{i}!"
    return line(d, e)


def last_two_whole(call: Call) -> Line:
    d = letters(call.rank())
    d[-2:] = [x + "!" for x in d[-2:]]
    return line(d, d)


def halves(call: Call) -> Line:
    """glu: one half of the dimension gates the other."""
    d, i = letters(call.rank()), call.dim()
    return _cut(d, i, [f"({d[i]} | {d[i]})"], [d[i]]), {d[i]: call.results[0][i]}


def group_norm(call: Call) -> Line:
    """Channels are (groups width); groups are batch."""
    before, groups = call.operands[0], call.args["num_groups"]
    assert before is not None
    width = before[1] // groups
    channels = "g" if width == 1 else "w!" if groups == 1 else "(g w!)"
    sizes = {"g": groups} if width == 1 else {"w": width} if groups == 1 else {"g": groups, "w": width}
    x = " ".join(["n", channels, *(f"d{i}!" for i in range(2, len(before)))])
    rest = sum(s is not None for s in call.operands[1:])
    return ", ".join([x] + [channels] * rest) + f" -> {x}", sizes


RULES: dict[str, Rule] = {
    # products
    "aten::linear": "... i, o i, o -> ... o",
    "aten::matmul": matmul,
    "aten::mm": "m k, k n -> m n",
    "aten::bmm": "b m k, b k n -> b m n",
    "aten::mv": "m k, k -> m",
    "aten::dot": "k, k -> ",
    "aten::addmm": addmm,
    "aten::baddbmm": addmm,
    "aten::einsum": einsum,
    "tpcompiler::grouped_mm": "m k, e! k n, e! -> m n",
    "aten::scaled_dot_product_attention": attention,
    # tables and losses
    "aten::embedding": "v+ h, ... -> ... h",
    "aten::cross_entropy_loss": cross_entropy,
    # over a whole dimension
    "aten::softmax.int": whole("dim"),
    "aten::_softmax": whole("dim"),
    "aten::log_softmax.int": whole("dim"),
    "aten::_log_softmax": whole("dim"),
    "aten::logsumexp": whole("dim"),
    "aten::layer_norm": layer_norm,
    "aten::rms_norm": layer_norm,
    "aten::glu": halves,
    "aten::group_norm": group_norm,
    "aten::amax": whole("dim"),
    "aten::amin": whole("dim"),
    "aten::max.dim": whole("dim"),
    "aten::min.dim": whole("dim"),
    "aten::argmax": whole("dim"),
    "aten::argmin": whole("dim"),
    "aten::any.dim": whole("dim"),
    "aten::all.dim": whole("dim"),
    "aten::var.correction": whole("dim"),
    "aten::var.dim": whole("dim"),
    "aten::std.correction": whole("dim"),
    "aten::std.dim": whole("dim"),
    "aten::norm.ScalarOpt_dim": whole("dim"),
    "aten::linalg_vector_norm": whole("dim"),
    "aten::cumsum": whole("dim"),
    "aten::cumprod": whole("dim"),
    "aten::sort": whole("dim"),
    "aten::flip": whole("dims"),
    "aten::roll": whole("dims"),
    "aten::tril": last_two_whole,
    "aten::triu": last_two_whole,
    "aten::constant_pad_nd": padded,
    "aten::pad": padded,
    # sums
    "aten::sum": reduction,
    "aten::sum.dim_IntList": reduction,
    "aten::mean": reduction,
    "aten::mean.dim": reduction,
    # the same values in other shapes
    "aten::view": view,
    "aten::reshape": view,
    "aten::_unsafe_view": view,
    "aten::flatten.using_ints": view,
    "aten::unflatten.int": view,
    "aten::expand": expand,
    "aten::expand_as": POINTWISE,
    "aten::broadcast_to": expand,
    "aten::transpose.int": permuted(_transpose),
    "aten::permute": permuted(lambda c: [i % c.rank() for i in c.args["dims"]]),
    "aten::t": permuted(lambda c: list(range(c.rank()))[::-1]),
    "aten::numpy_T": permuted(lambda c: list(range(c.rank()))[::-1]),
    "aten::mT": permuted(lambda c: _swap(c, -2, -1)),
    "aten::movedim.int": permuted(lambda c: _moved(c)),
    "aten::unsqueeze": unsqueeze,
    "aten::squeeze": squeeze,
    "aten::squeeze.dim": squeeze,
    "aten::squeeze.dims": squeeze,
    "aten::repeat_interleave.self_int": repeat_interleave,
    "aten::repeat": repeat,
    # parts of values
    "aten::select.int": select,
    "aten::slice.Tensor": slice_,
    "aten::split.Tensor": split,
    "aten::split_with_sizes": split,
    "aten::chunk": split,
    "aten::tensor_split.sections": split,
    "aten::tensor_split.indices": split,
    "aten::unbind.int": unbind,
    "aten::cat": cat,
    "aten::concat": cat,
    "aten::stack": stack,
    "aten::index.Tensor": index,
    "aten::index_select": index_select,
    "aten::gather": gather,
    # values of one operand only
    "aten::type_as": "..., _ -> ...",
    "aten::to.other": "..., _ -> ...",
    **dict.fromkeys(
        [f"aten::{x}" for x in ("dropout", "contiguous", "clone", "alias", "detach", "to.dtype", "to.device")]
        + [f"aten::{x}" for x in ("to.dtype_layout", "_to_copy", "zeros_like", "ones_like", "full_like", "empty_like")]
        + [f"aten::{x}" for x in ("silu", "gelu", "relu", "softplus", "mish", "hardswish", "elu", "selu", "leaky_relu")]
        + [
            f"aten::{x}"
            for x in ("relu6", "square", "where.ScalarOther", "where.ScalarSelf", "dropout_", "float", "abs")
        ],
        POINTWISE,
    ),
}


# Ops whose contraction is a plain sum (a bias or a count apart): the partial results of ranks add up.
SUMS = {
    "linear",
    "matmul",
    "mm",
    "bmm",
    "mv",
    "dot",
    "addmm",
    "baddbmm",
    "einsum",
    "sum",
    "mean",
    "embedding",
    "cross_entropy_loss",
    "tpcompiler::grouped_mm",
}


def _moved(call: Call) -> list[int]:
    n = call.rank()
    a, b = call.args["source"] % n, call.args["destination"] % n
    order = [i for i in range(n) if i != a]
    order.insert(b, a)
    return order


def rule(op: str, pattern: str) -> None:
    """Teach the compiler an op of your own: `tpc.rule("mylib::rotate", "... h! -> ... h!")`.

    `op` is `namespace::name` or `namespace::name.overload`; the operands are the op's tensor arguments in order.
    Raises `RuleError` when the pattern cannot be read.
    """
    parse(pattern)
    RULES[op.replace(".default", "")] = pattern


def find(op: torch._ops.OpOverload) -> Rule | None:
    """The rule of an op: by overload, by name, or pointwise when torch itself tags the op so."""
    name = op._schema.name
    overload = op._overloadname
    key = name if overload in ("", "default") else f"{name}.{overload}"
    if key in RULES:
        return RULES[key]
    if torch.Tag.pointwise in op.tags:
        return POINTWISE
    return RULES.get(name) if overload in ("", "default") else None


def line_of(found: Rule, call: Call) -> tuple[str, dict[str, int]] | None:
    """The pattern of one call, with the sizes that the shapes alone do not tell."""
    if found == POINTWISE:
        found = pointwise
    text = found if isinstance(found, str) else found(call)
    if text is None:
        return None
    return text if isinstance(text, tuple) else (text, {})
