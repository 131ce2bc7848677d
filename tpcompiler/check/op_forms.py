"""Facts about operations that compute: elementwise ones, products, norms, attention, lookups and losses."""

from __future__ import annotations

from typing import Any

import torch

from tpcompiler.check.calls import Slot
from tpcompiler.check.form import Dims, Form, RefutedError, label_rows
from tpcompiler.check.row_algebra import lengths
from tpcompiler.check.site import Site, aligned, numbered, plain, states

_MORE_ELEMENTWISE = set(
    """to _to_copy type_as float double half bfloat16 clone contiguous detach alias dropout masked_fill fill where
    isclose
    relu gelu silu relu6 softplus mish hardswish elu selu leaky_relu log_sigmoid square abs absolute negative
    real imag conj resolve_conj resolve_neg polar complex floor_divide true_divide divide multiply subtract greater less
    bitwise_and bitwise_or bitwise_xor zeros_like ones_like full_like empty_like alpha_dropout feature_alpha_dropout
    lift_fresh_copy logical_and logical_or logical_not rand_like randn_like bernoulli""".split()
)
_FLAT = set("round floor ceil trunc sign heaviside floor_divide".split())  # of derivative zero
_VALUELESS = set("zeros_like ones_like full_like empty_like rand_like randn_like".split())


def elementwise(s: Site) -> bool:
    """Whether an element of the result is made of the operands' elements at the same place alone."""
    target = s.call.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags or s.name in _MORE_ELEMENTWISE


def elementwise_form(s: Site) -> Form:
    result = s.result()
    if any(m is not None and m.shape != result for m in s.made):
        raise RefutedError("its results are of different shapes")
    ignored: set[int] = set()
    if s.name in ("type_as", "to") and isinstance(s.a.get("other"), Slot):
        ignored.add(s.a["other"].i)  # only its dtype is read
        if isinstance(s.a.get("self"), Slot) and s.a["self"].i in ignored:
            ignored.clear()
    operands = [(i, aligned(g.operand.shape, result)) for i, g in enumerate(s.given) if i not in ignored]
    return Form(
        operands, [numbered(result)] * len(s.made), ignored=frozenset(ignored), flat=s.name in _FLAT | _VALUELESS
    )


# -- over some dimensions ----------------------------------------------------------------------------------------------


def _kept(s: Site, x: Slot, dims: tuple[int, ...], *, sums: bool = False) -> Form:
    """Over dimensions that the result lacks, or has with another size."""
    shape = s.shape(x)
    labels: list[Any] = [None if d in dims and not sums else d for d in range(len(shape))]
    results = []
    for m in s.made:
        assert m is not None
        if len(m.shape) == len(shape):
            results.append(plain(m.shape, [None if d in dims else d for d in range(len(shape))]))
        else:
            results.append(plain(m.shape, [d for d in range(len(shape)) if d not in dims]))
    operands = [(x.i, plain(shape, labels))]
    return Form(operands, results, frozenset(dims if sums else ()))


@states("sum")
def _(s: Site) -> Form:
    return _kept(s, s.a["self"], s.dims("dim", s.rank(s.a["self"])), sums=True)


@states(
    """softmax _softmax log_softmax _log_softmax cumsum cumprod logcumsumexp sort argsort topk kthvalue median mode
    cummax cummin mean amax amin var std var_mean std_mean any all prod max min norm linalg_vector_norm logsumexp argmax
    argmin
    count_nonzero nansum linalg_norm"""
)
def _(s: Site) -> Form:
    x = s.a["self"] if "self" in s.a else s.a["input"]
    if len(s.given) != 1:
        raise RefutedError("it takes several operands")
    name = "dim" if "dim" in s.a else "axis" if "axis" in s.a else ""
    default = {"topk": -1, "sort": -1, "argsort": -1, "kthvalue": -1, "median": -1, "mode": -1}
    if name and s.a[name] is None or not name:
        dims = tuple(range(s.rank(x)))
    elif s.name in default:
        dims = (s.dim(name, s.rank(x), -1),)
    else:
        dims = s.dims(name, s.rank(x))
    return _kept(s, x, dims)


@states("layer_norm rms_norm native_layer_norm")
def _(s: Site) -> Form:
    shape = s.shape(s.a["input"])
    last = len(s.a["normalized_shape"])
    lead = len(shape) - last
    whole = tuple(range(lead, len(shape)))
    operands = [(s.a["input"].i, numbered(shape, whole=whole))]
    for name in ("weight", "bias"):
        if isinstance(s.a.get(name), Slot):
            operands.append((s.a[name].i, plain(s.shape(s.a[name]), [None] * last)))
    results = [plain(s.result(j), [None if d >= lead else d for d in range(len(shape))]) for j in range(len(s.made))]
    return Form(operands, results)


@states("group_norm", ranked=True)
def _(s: Site) -> Form:
    shape, groups = s.shape(s.a["input"]), s.a["num_groups"]
    channels: Any = (("g", groups), (None, shape[1] // groups))
    rest = plain(shape[2:], [None] * len(shape[2:]))
    operands: list[tuple[int, Dims]] = [(s.a["input"].i, ((("b", shape[0]),), channels, *rest))]
    for name in ("weight", "bias"):
        if isinstance(s.a.get(name), Slot):
            operands.append((s.a[name].i, (channels,)))
    form = Form(operands, [((("b", shape[0]),), channels, *rest)])
    _same_groups(s, form, "num_groups")
    _some_rows(s, (s.a["input"], 0), (s.a["input"], 1))
    return form


def _same_groups(s: Site, form: Form, name: str) -> None:
    """Raises where the number of groups that a rank names is not that of the groups that it holds."""
    held = label_rows(s.geometry, form, s.given).get("g")
    if not s.agrees(s.local[name], held, s.a[name]):
        raise RefutedError("the number of groups is not that of the channels that each rank holds")


def _some_rows(s: Site, *dims: tuple[Slot, int]) -> None:
    """Raises where a rank has no rows, which torch's kernel does not take or gives wrong results for."""
    for x, d in dims:
        rows = s.rows(x, d)
        if rows is not None and 0 in lengths(rows):
            raise RefutedError(f"a rank has none of dimension {d} of operand {x.i}, which torch does not take")


@states("_weight_norm")
def _(s: Site) -> Form:
    v, g = s.shape(s.a["v"]), s.shape(s.a["g"])
    d = s.dim("dim", len(v), 0)
    _some_rows(s, (s.a["v"], d))
    return Form(
        [
            (s.a["v"].i, plain(v, [i if i == d else None for i in range(len(v))])),
            (s.a["g"].i, plain(g, [i if i == d else None for i in range(len(g))])),
        ],
        [plain(v, [i if i == d else None for i in range(len(v))])],
    )


# -- products ----------------------------------------------------------------------------------------------------------


@states("linear")
def _(s: Site) -> Form:
    x, w, bias = s.a["input"], s.a["weight"], s.a["bias"]
    shape = s.shape(x)
    lead = list(range(len(shape) - 1))
    out = ["o"] if s.rank(w) == 2 else []
    operands = [(x.i, plain(shape, [*lead, "i"])), (w.i, plain(s.shape(w), [*out, "i"]))]
    if bias is not None:
        operands.append((bias.i, plain(s.shape(bias), out)))
    return Form(operands, [plain(s.result(), [*lead, *out])], frozenset() if bias is not None else frozenset({"i"}))


@states("matmul mm bmm mv dot")
def _(s: Site) -> Form:
    x, y = s.a["self"], s.a.get("other", s.a.get("mat2", s.a.get("vec", s.a.get("tensor"))))
    assert isinstance(y, Slot)
    return Form(*_product(s, x, y), frozenset({"k"}))


def _product(s: Site, x: Slot, y: Slot) -> tuple[list[tuple[int, Dims]], list[Dims]]:
    a, b, result = s.shape(x), s.shape(y), s.result()
    rows, columns = ["m"] if len(a) > 1 else [], ["n"] if len(b) > 1 else []
    batch = result[: len(result) - len(rows) - len(columns)]
    first = (*aligned(a[:-2], batch), *plain(a[-2:], [*rows, "k"]))
    second = (*aligned(b[:-2], batch), *plain(b[-2:], ["k", *columns]))
    made = (*numbered(batch), *plain(result[len(batch) :], [*rows, *columns]))
    return [(x.i, first), (y.i, second)], [made]


@states("addmm baddbmm")
def _(s: Site) -> Form:
    x, y = s.a.get("mat1", s.a.get("batch1")), s.a.get("mat2", s.a.get("batch2"))
    assert isinstance(x, Slot)
    assert isinstance(y, Slot)
    operands, results = _product(s, x, y)
    (made,) = results
    added = s.shape(s.a["self"])
    lead = len(made) - len(added)
    of_added = tuple(((made[lead + d][0][0] if n == made[lead + d][0][1] else None, n),) for d, n in enumerate(added))
    return Form([*operands, (s.a["self"].i, of_added)], results)


@states("outer")
def _(s: Site) -> Form:
    x, y = s.a["self"], s.a["vec2"]
    return Form([(x.i, plain(s.shape(x), ["i"])), (y.i, plain(s.shape(y), ["j"]))], [plain(s.result(), ["i", "j"])])


@states("einsum")
def _(s: Site) -> Form:
    equation = s.a["equation"].replace(" ", "")
    tensors = s.a["tensors"]
    if "->" not in equation or "." in equation or s.a.get("path") is not None:
        raise RefutedError(f"no fact speaks of {equation!r}")
    left, right = equation.split("->")
    terms = left.split(",")
    sizes: dict[str, int] = {}
    for term, t in zip(terms, tensors, strict=True):
        for letter, n in zip(term, s.shape(t), strict=True):
            if len(set(term)) < len(term) or sizes.setdefault(letter, n) != n:
                raise RefutedError(f"no fact speaks of {equation!r}")
    operands = [(t.i, plain(s.shape(t), list(term))) for term, t in zip(terms, tensors, strict=True)]
    return Form(operands, [plain(s.result(), list(right))], frozenset(sizes) - set(right))


@states("_grouped_mm tpcompiler::grouped_mm")
def _(s: Site) -> Form:
    names = ("x", "weight", "ends") if s.name.startswith("tpcompiler") else ("self", "mat2", "offs")
    x, w, ends = (s.a[n] for n in names)
    if s.a.get("bias") is not None or not isinstance(ends, Slot) or s.rank(x) != 2 or s.rank(w) != 3:
        raise RefutedError("no fact speaks of its arguments")
    n, i = s.shape(x)
    operands = [
        (x.i, ((("n", n),), (("i", i),))),
        (w.i, plain(s.shape(w), [None, "i", "o"])),
        (ends.i, plain(s.shape(ends), [None])),
    ]
    operands[0] = (x.i, plain((n, i), [None, "i"]))
    return Form(operands, [plain(s.result(), [None, "o"])], frozenset({"i"}))


@states("scaled_dot_product_attention")
def _(s: Site) -> Form:
    q, k, v, mask = s.a["query"], s.a["key"], s.a["value"], s.a["attn_mask"]
    a, b, c = s.shape(q), s.shape(k), s.shape(v)
    batch = s.result()[:-2]
    grouped = bool(s.a.get("enable_gqa")) and len(a) > 2 and a[-3] != b[-3]
    length = None if s.a["is_causal"] else "s"
    made: list[Any] = [((d, n),) for d, n in enumerate(batch)]
    keys = list(aligned(b[:-2], batch)), list(aligned(c[:-2], batch))
    queries = list(aligned(a[:-2], batch))
    if grouped:
        heads, each = b[-3], a[-3] // b[-3]
        made[-1] = (("h", heads), ("r", each))
        queries[-1] = made[-1]
        keys[0][-1] = keys[1][-1] = (("h", heads),)
    operands: list[tuple[int, Dims]] = [
        (k.i, (*keys[0], *plain(b[-2:], [None, None]))),
        (v.i, (*keys[1], *plain(c[-2:], [None, "e"]))),
        (q.i, (*queries, *plain(a[-2:], [length, None]))),
    ]
    if mask is not None:
        m = s.shape(mask)
        lead = len(made) - len(m[:-2])
        dims = [made[lead + d] if n == batch[lead + d] else ((None, n),) for d, n in enumerate(m[:-2])]
        operands.append((mask.i, (*dims, *plain(m[-2:], [length if m[-2] == a[-2] else None, None]))))
    return Form(operands, [(*made, *plain(s.result()[-2:], [length, "e"]))])


@states("conv1d conv2d conv3d", ranked=True)
def _(s: Site) -> Form:
    x, w, bias, groups = s.shape(s.a["input"]), s.shape(s.a["weight"]), s.a["bias"], s.a["groups"]
    if len(x) != len(w):
        raise RefutedError("no fact speaks of an input without a batch")
    rest = [None] * (len(x) - 2)
    channels: Any = (("g", groups), ("c", x[1] // groups))
    out: Any = (("g", groups), ("o", w[0] // groups))
    operands: list[tuple[int, Dims]] = [
        (s.a["input"].i, ((("b", x[0]),), channels, *plain(x[2:], rest))),
        (s.a["weight"].i, (out, (("c", w[1]),), *plain(w[2:], rest))),
    ]
    if bias is not None:
        operands.append((bias.i, (out,)))
    form = Form(
        operands, [((("b", x[0]),), out, *plain(s.result()[2:], rest))], frozenset({"c"} if bias is None else ())
    )
    _same_groups(s, form, "groups")
    _some_rows(s, (s.a["input"], 0), (s.a["input"], 1), (s.a["weight"], 0), (s.a["weight"], 1))
    return form


@states(
    """max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d max_pool2d avg_pool2d adaptive_avg_pool2d
    adaptive_max_pool2d max_pool2d_with_indices"""
)
def _(s: Site) -> Form:
    x = s.a["self"]
    shape = s.shape(x)
    near = 1 if "1d" in s.name else 2
    labels = [d if d < len(shape) - near else None for d in range(len(shape))]
    return Form([(x.i, plain(shape, labels))], [plain(s.result(j), labels) for j in range(len(s.made))])


# -- tables and losses -------------------------------------------------------------------------------------------------


@states("embedding")
def _(s: Site) -> Form:
    weight, ids = s.a["weight"], s.a["indices"]
    shape = s.shape(ids)
    whole = range(len(shape)) if s.a["scale_grad_by_freq"] else ()  # its gradient counts how often an id occurs
    rows = numbered(shape, whole=tuple(whole))
    return Form(
        [(ids.i, rows), (weight.i, plain(s.shape(weight), [None, "h"]))],
        [(*rows, (("h", s.shape(weight)[1]),))],
    )


@states("cross_entropy_loss")
def _(s: Site) -> Form:
    logits, target, weight = s.a["self"], s.a["target"], s.a["weight"]
    shape = s.shape(logits)
    at = 1 if len(shape) > 1 else 0
    several = s.a["reduction"] == 0
    labels = [d if several and d != at else None for d in range(len(shape))]
    left = [label for d, label in enumerate(labels) if d != at]
    classes = s.rank(target) == len(shape)
    operands = [
        (logits.i, plain(shape, labels)),
        (target.i, plain(s.shape(target), labels if classes else left)),
    ]
    if weight is not None:
        operands.append((weight.i, plain(s.shape(weight), [None])))
    return Form(operands, [plain(s.result(), left if several else [])])


@states("one_hot")
def _(s: Site) -> Form:
    x = s.a["self"]
    return Form([(x.i, numbered(s.shape(x)))], [(*numbered(s.shape(x)), ((None, s.result()[-1]),))])


__all__ = ["elementwise", "elementwise_form"]
