"""ATen calls as one writes them by hand: `aten.linear` is `F.linear`, `aten.add` is `+`, `aten.select` is `x[:, 0]`."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from tpcompiler.emit.ops.arguments import Call
from tpcompiler.emit.text.expr import (
    ADD,
    ATOM,
    BIT_AND,
    BIT_OR,
    BIT_XOR,
    COMPARE,
    MULTIPLY,
    POWER,
    SHIFT,
    UNARY,
    Expr,
    binary,
    call,
    tuple_of,
)
from tpcompiler.emit.text.subscript import index_tensors, select, slice_, unsqueeze

_SIZES = ("size", "shape", "dims", "repeats")


def idiom(c: Call) -> Expr | None:
    """The hand-written form of a call, None where there is none that always means the same."""
    rule = _RULES.get(c.name)
    if rule is not None:
        return rule(c)
    if c.name in _OPERATORS and c.values.get("alpha", 1) == 1:
        symbol, level = _OPERATORS[c.name]
        return binary(c.x("self"), symbol, c.x("other"), level)
    if c.name in _METHODS:
        name = _METHODS[c.name] or c.name
        return Expr(f"{c.x('self').at(ATOM)}.{name}({', '.join(c.arguments(skip=('self',)))})")
    if c.name in _VARIADIC:
        return _variadic(c)
    if c.name in _TORCH:
        return call(_TORCH[c.name] or f"torch.{c.name}", c.arguments())
    if c.name in _FACTORIES:
        return call(f"torch.{c.name}", [*c.arguments(), f"device={c.scope.device()}"])
    return None


def _variadic(c: Call) -> Expr:
    """`x.view(b, s, 8)`: the sizes are the arguments."""
    items = c[next(a.name for a in c.schema if a.name in _SIZES)]
    inside = ", ".join(c.scope.expr(i).text for i in items) if items else "()"
    return Expr(f"{c.x('self').at(ATOM)}.{_VARIADIC[c.name] or c.name}({inside})")


# --- idioms that a table line cannot say ------------------------------------------------------------------------------


def _to(c: Call) -> Expr:
    if c.values.get("other") is not None:
        wanted = [c.text("other")]
    else:
        wanted = [c.text("dtype")] if c["dtype"] is not None else []
    if c.values.get("copy") is True or (c.name == "_to_copy" and _keeps_dtype(c)):
        wanted.append("copy=True")
    x = c.x("self")
    return Expr(f"{x.at(ATOM)}.to({', '.join(wanted)})") if wanted else x


def _keeps_dtype(c: Call) -> bool:
    return c["dtype"] is None or c["dtype"] == c["self"].meta["val"].dtype


def _embedding(c: Call) -> Expr | None:
    if c["scale_grad_by_freq"] or c["sparse"]:
        return None
    padding = [] if c["padding_idx"] == -1 else [c.text("padding_idx")]
    return call("F.embedding", [c.text("indices"), c.text("weight"), *padding])


def _functional(name: str, *positional: str, **renamed: Callable[[Call], str]) -> Callable[[Call], Expr]:
    """`F.name(…)`; the changed arguments, `positional` ones without a keyword, `renamed` ones said their own way."""

    def rule(c: Call) -> Expr:
        args, gap = [], False
        for a in c.schema:
            if a.has_default_value() and a.name not in c.changed or a.name in _HINTS:
                gap = True
                continue
            text = renamed[a.name](c) if a.name in renamed else c.text(a.name)
            bare = not gap and (a.name in positional or not a.has_default_value())
            args.append(text if bare else f"{a.name}={text}")
        return call(f"F.{name}", args)

    return rule


_HINTS = ("cudnn_enable", "cudnn_enabled")


def _along(name: str) -> Callable[[Call], Expr]:
    """`F.softmax(x, dim=-1)`"""
    return lambda c: call(
        f"F.{name}", [c.text("self"), *(f"{k}={c.text(k)}" for k in ("dim", "dtype") if c[k] is not None)]
    )


def _reduction(c: Call) -> str:
    return {0: '"none"', 1: '"mean"', 2: '"sum"'}[c["reduction"]]


def _dropout(c: Call) -> Expr:
    return call("F.dropout", [c.text("input"), c.text("p"), c.text("train")])


def _pad(c: Call) -> Expr:
    args = [c.text("self"), tuple_of(c.scope.expr(p).text for p in c["pad"])]
    if c.values.get("mode", "constant") != "constant":
        args.append(f"mode={c.text('mode')}")
    if c["value"] is not None and not (c["value"] == 0 and c.name == "constant_pad_nd"):
        args.append(f"value={c.text('value')}")
    return call("F.pad", args)


def _flatten(c: Call) -> Expr:
    ends = [c.text("start_dim"), c.text("end_dim")]
    if c["end_dim"] == -1:
        ends = ends[: 1 if c["start_dim"] else 0]
    return Expr(f"{c.x('self').at(ATOM)}.flatten({', '.join(ends)})")


def _rsub(c: Call) -> Expr | None:
    return binary(c.x("other"), "-", c.x("self"), ADD) if c["alpha"] == 1 else None


def _div(c: Call) -> Expr:
    if c.values.get("rounding_mode") is not None:
        return call("torch.div", c.arguments())
    return binary(c.x("self"), "/", c.x("other"), MULTIPLY)


def _pow(c: Call) -> Expr:
    base, exponent = c["self"], c["exponent"]
    if isinstance(base, fx.Node) and isinstance(exponent, (int, float)):
        return Expr(f"{c.x('self').at(ATOM)}.pow({c.text('exponent')})")
    return Expr(f"{c.x('self').at(ATOM)} ** {c.x('exponent').at(UNARY)}", POWER)


def _einsum(c: Call) -> Expr:
    return call("torch.einsum", [c.text("equation"), *(c.scope.expr(t).text for t in c["tensors"])])


def _broadcast(c: Call) -> Expr:
    return call("torch.broadcast_tensors", [c.scope.expr(t).text for t in c["tensors"]])


def _listed(name: str) -> Callable[[Call], Expr]:
    """`torch.cat([a, b], dim=-1)`"""

    def rule(c: Call) -> Expr:
        items = ", ".join(c.scope.expr(t).text for t in c["tensors"])
        return call(f"torch.{name}", [f"[{items}]", *([f"dim={c.text('dim')}"] if c["dim"] != 0 else [])])

    return rule


def _split(c: Call) -> Expr:
    sizes = c["split_sizes"] if "split_sizes" in c.values else c["split_size"]
    how = c.scope.expr(sizes).text
    if isinstance(sizes, (list, tuple)):
        said = [c.scope.expr(s).text for s in sizes]
        alike = len(set(said)) == 1 and c.scope.positive(sizes[0])
        how = said[0] if alike else f"[{', '.join(said)}]"
    dim = [f"dim={c.text('dim')}"] if c["dim"] != 0 else []
    return Expr(f"{c.x('self').at(ATOM)}.split({', '.join([how, *dim])})")


def _full(c: Call) -> Expr:
    return call("torch.full", [*c.arguments(), f"device={c.scope.device()}"])


def _scalar_tensor(c: Call) -> Expr:
    dtype = [] if c["dtype"] is None else [f"dtype={c.text('dtype')}"]
    return call("torch.scalar_tensor", [c.text("s"), *dtype, f"device={c.scope.device()}"])


def _prefix(symbol: str) -> Callable[[Call], Expr]:
    return lambda c: Expr(f"{symbol}{c.x('self').at(UNARY)}", UNARY)


def _attribute(name: str) -> Callable[[Call], Expr]:
    return lambda c: Expr(f"{c.x('self').at(ATOM)}.{name}")


def _infix(symbol: str, level: int, left: str = "self", right: str = "mat2") -> Callable[[Call], Expr]:
    return lambda c: binary(c.x(left), symbol, c.x(right), level)


def _slice(c: Call) -> Expr:
    bounds = [None if v is None else c.scope.expr(v) for v in (c["start"], c["end"], c["step"])]
    return slice_(c.x("self"), c.rank("self"), c["dim"], bounds)


def _index(c: Call) -> Expr | None:
    items = c["indices"]
    if any(isinstance(i, fx.Node) and i.meta["val"].dim() == 0 for i in items):
        return None
    return index_tensors(c.x("self"), [None if i is None else c.scope.expr(i) for i in items])


_RULES: dict[str, Callable[[Call], Expr | None]] = {
    "to": _to,
    "_to_copy": _to,
    "linear": _functional("linear", "bias"),
    "layer_norm": _functional("layer_norm", "weight", "bias", "eps"),
    "rms_norm": _functional("rms_norm", "weight", "eps"),
    "group_norm": _functional("group_norm", "weight", "bias", "eps"),
    "embedding": _embedding,
    "dropout": _dropout,
    "gelu": _functional("gelu"),
    "silu": _functional("silu"),
    "relu": _functional("relu"),
    "relu6": _functional("relu6"),
    "elu": _functional("elu"),
    "softplus": _functional("softplus"),
    "leaky_relu": _functional("leaky_relu"),
    "mish": _functional("mish"),
    "hardtanh": _functional("hardtanh"),
    "glu": _functional("glu"),
    "scaled_dot_product_attention": _functional("scaled_dot_product_attention"),
    "cross_entropy_loss": _functional("cross_entropy", reduction=_reduction),
    "nll_loss_nd": _functional("nll_loss", reduction=_reduction),
    "mse_loss": _functional("mse_loss", reduction=_reduction),
    "l1_loss": _functional("l1_loss", reduction=_reduction),
    "smooth_l1_loss": _functional("smooth_l1_loss", reduction=_reduction),
    "binary_cross_entropy_with_logits": _functional("binary_cross_entropy_with_logits", reduction=_reduction),
    "conv1d": _functional("conv1d", "bias"),
    "conv2d": _functional("conv2d", "bias"),
    "avg_pool1d": _functional("avg_pool1d"),
    "one_hot": _functional("one_hot", "num_classes"),
    "softmax": _along("softmax"),
    "log_softmax": _along("log_softmax"),
    "flatten": _flatten,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "rsub": _rsub,
    "div": _div,
    "pow": _pow,
    "einsum": _einsum,
    "broadcast_tensors": _broadcast,
    "cat": _listed("cat"),
    "stack": _listed("stack"),
    "split": _split,
    "split_with_sizes": _split,
    "full": _full,
    "scalar_tensor": _scalar_tensor,
    "neg": _prefix("-"),
    "bitwise_not": _prefix("~"),
    "numpy_T": _attribute("T"),
    "mT": _attribute("mT"),
    "real": _attribute("real"),
    "imag": _attribute("imag"),
    "mm": _infix("@", MULTIPLY),
    "matmul": _infix("@", MULTIPLY, right="other"),
    "slice": _slice,
    "select": lambda c: select(c.x("self"), c.rank("self"), c["dim"], c.x("index")),
    "unsqueeze": lambda c: unsqueeze(c.x("self"), c.rank("self"), c["dim"]),
    "index": _index,
}

_OPERATORS: dict[str, tuple[str, int]] = {
    "add": ("+", ADD),
    "sub": ("-", ADD),
    "mul": ("*", MULTIPLY),
    "floor_divide": ("//", MULTIPLY),
    "remainder": ("%", MULTIPLY),
    "bitwise_and": ("&", BIT_AND),
    "bitwise_or": ("|", BIT_OR),
    "bitwise_xor": ("^", BIT_XOR),
    "__and__": ("&", BIT_AND),
    "__or__": ("|", BIT_OR),
    "__xor__": ("^", BIT_XOR),
    "__lshift__": ("<<", SHIFT),
    "__rshift__": (">>", SHIFT),
    "eq": ("==", COMPARE),
    "ne": ("!=", COMPARE),
    "lt": ("<", COMPARE),
    "le": ("<=", COMPARE),
    "gt": (">", COMPARE),
    "ge": (">=", COMPARE),
}

# ATen name → the method's name where it differs.
_METHODS: dict[str, str] = dict.fromkeys(
    """transpose squeeze contiguous clone detach unflatten chunk unbind narrow index_select gather scatter
    scatter_add index_add masked_fill masked_scatter sum mean amax amin max min var std prod any all cumsum cumprod
    argmax argmin tensor_split topk sort clamp clamp_min clamp_max tril triu roll flip t type_as repeat_interleave
    unfold movedim rsqrt diff square reciprocal logsumexp nonzero new_zeros new_ones new_full new_empty diagonal
    count_nonzero float double half long expand_as view_as reshape_as broadcast_to logical_not swapaxes
    swapdims""".split(),
    "",
)

_VARIADIC: dict[str, str] = {"_unsafe_view": "reshape"} | dict.fromkeys(
    "view reshape expand permute repeat".split(), ""
)

_TORCH: dict[str, str] = {"linalg_vector_norm": "torch.linalg.vector_norm"} | dict.fromkeys(
    """where bmm baddbmm addmm exp expm1 log log1p sin cos tanh sigmoid sqrt abs erf floor ceil round sign maximum
    minimum outer zeros_like ones_like full_like empty_like rand_like randn_like logical_and logical_or logical_xor
    isnan isinf view_as_complex view_as_real polar addcmul lerp cross dot mv meshgrid atan2 multinomial bernoulli
    searchsorted bucketize complex rot90""".split(),
    "",
)

_FACTORIES = set("arange zeros ones empty eye linspace rand randn randint tril_indices triu_indices".split())
