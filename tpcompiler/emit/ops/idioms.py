"""ATen calls as one writes them by hand: `aten.linear` is `F.linear`, `aten.add` is `+`, `aten.select` is `x[:, 0]`."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from tpcompiler.emit.ops.arguments import AtenCall
from tpcompiler.emit.ops.nodes import val_of
from tpcompiler.emit.text.expr import (
    ADD,
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
    list_of,
    tuple_of,
)
from tpcompiler.emit.text.subscript import index_tensors, select, slice_, unsqueeze

Idiom = Callable[[AtenCall], Expr | None]


def idiom(c: AtenCall) -> Expr | None:
    """The hand-written form of a call; None if no form always has the same meaning."""
    if c.name in _RULES:
        return _RULES[c.name](c)
    if c.name in _OPERATORS and c.values.get("alpha", 1) == 1:
        symbol, level = _OPERATORS[c.name]
        return binary(c.x("self"), symbol, c.x("other"), level)
    if c.name in _METHODS:
        return Expr(f"{c.receiver()}.{c.name}({', '.join(c.arguments(skip=('self',)))})")
    sizes = next((a.name for a in c.schema if a.name in ("size", "shape", "dims", "repeats")), None)
    if c.name in _VARIADIC and sizes is not None:
        return Expr(f"{c.receiver()}.{_VARIADIC[c.name] or c.name}({', '.join(c.listed(sizes)) or '()'})")
    if c.name in _TORCH:
        return call(_TORCH[c.name] or f"torch.{c.name}", c.arguments())
    if c.name in _FACTORIES:
        return call(f"torch.{c.name}", [*c.arguments(), f"device={c.speaker.device()}"])
    return None


# --- calls that need more than a line of a table ----------------------------------------------------------------------


def _to(c: AtenCall) -> Expr:
    if c.values.get("other") is not None:
        wanted = [c.text("other")]
    else:
        wanted = [c.text("dtype")] if c["dtype"] is not None else []
    keeps_dtype = c.name == "_to_copy" and c["dtype"] in (None, val_of(c["self"]).dtype)
    if c.values.get("copy") is True or keeps_dtype:
        wanted.append("copy=True")
    return Expr(f"{c.receiver()}.to({', '.join(wanted)})") if wanted else c.x("self")


def _embedding(c: AtenCall) -> Expr | None:
    if c["scale_grad_by_freq"] or c["sparse"]:
        return None
    padding = [] if c["padding_idx"] == -1 else [c.text("padding_idx")]
    return call("F.embedding", [c.text("indices"), c.text("weight"), *padding])


def _functional(name: str, *positional: str, **renamed: Callable[[AtenCall], str]) -> Idiom:
    """`F.name(…)` with the changed arguments: `positional` ones without a keyword, `renamed` ones by their own rule."""

    def rule(c: AtenCall) -> Expr:
        args, gap = [], False
        for a in c.schema:
            if a.has_default_value() and a.name not in c.changed or a.name in ("cudnn_enable", "cudnn_enabled"):
                gap = True
                continue
            text = renamed[a.name](c) if a.name in renamed else c.text(a.name)
            bare = not gap and (a.name in positional or not a.has_default_value())
            args.append(text if bare else f"{a.name}={text}")
        return call(f"F.{name}", args)

    return rule


def _reduction(c: AtenCall) -> str:
    return {0: '"none"', 1: '"mean"', 2: '"sum"'}[c["reduction"]]


def _along(c: AtenCall) -> Expr:
    """`F.softmax(x, dim=-1)`"""
    return call(f"F.{c.name}", [c.text("self"), *(f"{k}={c.text(k)}" for k in ("dim", "dtype") if c[k] is not None)])


def _pad(c: AtenCall) -> Expr:
    args = [c.text("self"), tuple_of(c.listed("pad"))]
    if c.values.get("mode", "constant") != "constant":
        args.append(f"mode={c.text('mode')}")
    if c["value"] is not None and not (c["value"] == 0 and c.name == "constant_pad_nd"):
        args.append(f"value={c.text('value')}")
    return call("F.pad", args)


def _flatten(c: AtenCall) -> Expr:
    ends = [c.text("start_dim"), c.text("end_dim")]
    if c["end_dim"] == -1:
        ends = ends[: 1 if c["start_dim"] else 0]
    return Expr(f"{c.receiver()}.flatten({', '.join(ends)})")


def _div(c: AtenCall) -> Expr:
    if c.values.get("rounding_mode") is not None:
        return call("torch.div", c.arguments())
    return binary(c.x("self"), "/", c.x("other"), MULTIPLY)


def _pow(c: AtenCall) -> Expr:
    if isinstance(c["self"], fx.Node) and isinstance(c["exponent"], (int, float)):
        return Expr(f"{c.receiver()}.pow({c.text('exponent')})")
    return Expr(f"{c.receiver()} ** {c.x('exponent').at(UNARY)}", POWER)


def _listed(c: AtenCall) -> Expr:
    """`torch.cat([a, b], dim=-1)`"""
    dim = [f"dim={c.text('dim')}"] if c["dim"] != 0 else []
    return call(f"torch.{c.name}", [list_of(c.listed("tensors")), *dim])


def _split(c: AtenCall) -> Expr:
    name = "split_sizes" if "split_sizes" in c.values else "split_size"
    how = c.x(name).text
    if isinstance(c[name], (list, tuple)):
        said = c.listed(name)
        alike = len(set(said)) == 1 and c.speaker.positive(c[name][0])
        how = said[0] if alike else list_of(said)
    dim = [f"dim={c.text('dim')}"] if c["dim"] != 0 else []
    return Expr(f"{c.receiver()}.split({', '.join([how, *dim])})")


def _scalar_tensor(c: AtenCall) -> Expr:
    dtype = [] if c["dtype"] is None else [f"dtype={c.text('dtype')}"]
    return call("torch.scalar_tensor", [c.text("s"), *dtype, f"device={c.speaker.device()}"])


def _slice(c: AtenCall) -> Expr:
    bounds = [None if v is None else c.speaker.expr(v) for v in (c["start"], c["end"], c["step"])]
    return slice_(c.x("self"), c.rank("self"), c["dim"], bounds)


def _index(c: AtenCall) -> Expr | None:
    indices = c["indices"]
    if any(isinstance(i, fx.Node) and val_of(i).dim() == 0 for i in indices):
        return None
    return index_tensors(c.x("self"), [None if i is None else c.speaker.expr(i) for i in indices])


def _prefix(symbol: str) -> Idiom:
    return lambda c: Expr(f"{symbol}{c.x('self').at(UNARY)}", UNARY)


def _attribute(name: str) -> Idiom:
    return lambda c: Expr(f"{c.receiver()}.{name}")


# --- the tables -------------------------------------------------------------------------------------------------------

_LOSSES = "mse_loss l1_loss smooth_l1_loss binary_cross_entropy_with_logits".split()
_FUNCTIONS = """gelu silu relu relu6 elu softplus leaky_relu mish hardtanh glu avg_pool1d
scaled_dot_product_attention""".split()

_RULES: dict[str, Idiom] = {
    **{name: _functional(name) for name in _FUNCTIONS},
    **{name: _functional(name, reduction=_reduction) for name in _LOSSES},
    "cross_entropy_loss": _functional("cross_entropy", reduction=_reduction),
    "nll_loss_nd": _functional("nll_loss", reduction=_reduction),
    "linear": _functional("linear", "bias"),
    "conv1d": _functional("conv1d", "bias"),
    "conv2d": _functional("conv2d", "bias"),
    "layer_norm": _functional("layer_norm", "weight", "bias", "eps"),
    "rms_norm": _functional("rms_norm", "weight", "eps"),
    "group_norm": _functional("group_norm", "weight", "bias", "eps"),
    "one_hot": _functional("one_hot", "num_classes"),
    "embedding": _embedding,
    "dropout": lambda c: call("F.dropout", [c.text("input"), c.text("p"), c.text("train")]),
    "softmax": _along,
    "log_softmax": _along,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "to": _to,
    "_to_copy": _to,
    "flatten": _flatten,
    "rsub": lambda c: binary(c.x("other"), "-", c.x("self"), ADD) if c["alpha"] == 1 else None,
    "div": _div,
    "pow": _pow,
    "mm": lambda c: binary(c.x("self"), "@", c.x("mat2"), MULTIPLY),
    "matmul": lambda c: binary(c.x("self"), "@", c.x("other"), MULTIPLY),
    "neg": _prefix("-"),
    "bitwise_not": _prefix("~"),
    "numpy_T": _attribute("T"),
    "mT": _attribute("mT"),
    "real": _attribute("real"),
    "imag": _attribute("imag"),
    "einsum": lambda c: call("torch.einsum", [c.text("equation"), *c.listed("tensors")]),
    "broadcast_tensors": lambda c: call("torch.broadcast_tensors", c.listed("tensors")),
    "cat": _listed,
    "stack": _listed,
    "split": _split,
    "split_with_sizes": _split,
    "full": lambda c: call("torch.full", [*c.arguments(), f"device={c.speaker.device()}"]),
    "scalar_tensor": _scalar_tensor,
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

_METHODS = set(
    """transpose squeeze contiguous clone detach unflatten chunk unbind narrow index_select gather scatter
    scatter_add index_add masked_fill masked_scatter sum mean amax amin max min var std prod any all cumsum cumprod
    argmax argmin tensor_split topk sort clamp clamp_min clamp_max tril triu roll flip t type_as repeat_interleave
    unfold movedim rsqrt diff square reciprocal logsumexp nonzero new_zeros new_ones new_full new_empty diagonal
    count_nonzero float double half long expand_as view_as reshape_as broadcast_to logical_not swapaxes
    swapdims""".split()
)

# The name in `Tensor` or in `torch` is given where it differs from ATen's.
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
