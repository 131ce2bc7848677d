"""Lines of ops that compute: products, sums, attention, norms, the loss, and ops that need a dimension whole."""

from __future__ import annotations

from collections.abc import Callable

from tpcompiler.ops.record import Line, OpCall, letters, line


def pointwise(call: OpCall) -> Line:
    return ", ".join("..." for s in call.operands if s is not None) + " -> ..."


def whole(*names: str) -> Callable[[OpCall], Line]:
    """An op on one tensor that needs the dimensions in the arguments `names` whole, and keeps every dimension."""

    def rule(call: OpCall) -> Line:
        d = letters(call.rank())
        for name in names:
            for i in call.dims(name):
                d[i] = f"d{i}!"
        return _same_or_reduced(call, d)

    return rule


def _same_or_reduced(call: OpCall, d: list[str]) -> Line:
    """The line of an op whose results keep every dimension, keep marked ones with one element, or drop marked ones."""
    sides = []
    for shape in call.results:
        if len(shape) == call.rank():
            kept = ["1" if n == 1 and m != 1 else x for x, n, m in zip(d, shape, call.shape(), strict=True)]
        else:
            kept = [x for x in d if not x.endswith("!")]
        sides.append(" ".join(kept))
    return " ".join(d) + " -> " + ", ".join(sides)


def reduction(call: OpCall) -> Line:
    """`sum` and `mean`: the dimensions in `dim` are contracted."""
    over, keep, d = call.dims(), bool(call.args.get("keepdim", False)), letters(call.rank())
    return line(d, [("1" if i in over else x) for i, x in enumerate(d) if keep or i not in over])


def matmul(call: OpCall) -> Line:
    a, b = call.rank(0), call.rank(1)
    left = "k" if a == 1 else "m k" if a == 2 else "... m k"
    right = "k" if b == 1 else "k n" if b == 2 else "... k n"
    out = ("... " if max(a, b) > 2 else "") + " ".join(x for x, there in (("m", a > 1), ("n", b > 1)) if there)
    return f"{left}, {right} -> {out}"


def addmm(call: OpCall) -> Line:
    """`addmm` and `baddbmm`: a product plus a bias, which is broadcast from the right."""
    batch = "b " if call.rank(1) == 3 else ""
    out = f"{batch}m n".split()
    bias = out[len(out) - call.rank(0) :]
    return f"{' '.join(bias)}, {batch}m k, {batch}k n -> {' '.join(out)}"


def einsum(call: OpCall) -> Line:
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


def attention(call: OpCall) -> Line:
    """`scaled_dot_product_attention`. The scores need s, t and d whole; heads are a batch; grouped heads are (kv g)."""
    n = call.rank(0)
    lead = letters(n - 2)
    q, k = call.shape(0), call.shape(1)
    mask = call.operands[3] if len(call.operands) > 3 else None
    heads, kv = list(lead), list(lead)
    sizes: dict[str, int] = {}
    if n >= 3 and q[-3] != k[-3]:
        if k[-3] == 1:  # one kv head, broadcast to all heads
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


def layer_norm(call: OpCall) -> Line:
    """`layer_norm` and `rms_norm`. A norm over one dimension has a form for a part of it, which reduces statistics."""
    lead = call.rank() - len(call.args["normalized_shape"])
    mark = "+" if call.rank() - lead == 1 else "!"
    d = [x if i < lead else x + mark for i, x in enumerate(letters(call.rank()))]
    rest = sum(s is not None for s in call.operands[1:])
    return ", ".join([" ".join(d)] + [" ".join(d[lead:])] * rest) + " -> " + " ".join(d)


def weight_norm(call: OpCall) -> Line:
    """`_weight_norm`: scales each slice of `v` along `dim` to the length in `g`, so other dimensions stay whole."""
    d = [x if i == call.args["dim"] else x + "!" for i, x in enumerate(letters(call.rank()))]
    lengths = [x if i == call.args["dim"] else "1" for i, x in enumerate(d)]
    return f"{' '.join(d)}, {' '.join(lengths)} -> {' '.join(d)}"


def cross_entropy(call: OpCall) -> Line:
    """Dimension 1 holds the classes (dimension 0 for a single sample). The op has a form for a part of them."""
    if call.floating[1]:
        return None  # targets are probabilities
    n = call.rank()
    d = [f"d{i}!" for i in range(n)]
    d[min(1, n - 1)] = "v+"
    target = [x for x in d if x != "v+"]
    weight = ", v+" if len(call.operands) > 2 and call.operands[2] is not None else ""
    return f"{' '.join(d)}, {' '.join(target)}{weight} -> {' '.join(target) if call.results[0] else ''}"


def last_two_whole(call: OpCall) -> Line:
    d = letters(call.rank())
    d[-2:] = [x + "!" for x in d[-2:]]
    return line(d, d)


def grouped_product(call: OpCall) -> Line:
    """Multiplies each row by the matrix of its group. There is no rule for other ranks, a bias or an output dtype."""
    plain = call.rank(0) == 2 and call.rank(1) == 3 and len([s for s in call.operands if s is not None]) == 3
    return "m k, e! k n, e! -> m n" if plain and call.args.get("out_dtype") is None else None
