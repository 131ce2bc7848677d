"""The table of rules: one line an op, in the notation of `notation.py`; a function where the line depends on arguments.

Contraction means a plain sum: a rule may drop a letter without `!` only if splitting it leaves a result that sums up.
Ops that are not in the table are unsplittable, never an error. Users add their own with `rule`.
"""

from __future__ import annotations

import torch

from tpcompiler.ops.call import Call, Rule
from tpcompiler.ops.compute import (
    addmm,
    attention,
    cross_entropy,
    einsum,
    group_norm,
    halves,
    last_two_whole,
    layer_norm,
    matmul,
    pointwise,
    reduction,
    whole,
)
from tpcompiler.ops.move import (
    cat,
    expand,
    gather,
    index,
    index_select,
    last_two_swapped,
    moved,
    padded,
    permuted,
    repeat,
    repeat_interleave,
    resized,
    reversed_,
    select,
    slice_,
    split,
    squeeze,
    stack,
    transposed,
    unbind,
    unsqueeze,
    view,
    view_as,
)
from tpcompiler.ops.notation import parse
from tpcompiler.ops.windows import convolution, im2col, pooled, unfold
from tpcompiler.ops.writes import index_add, index_put, scatter, select_scatter, slice_scatter

# Pointwise ops that torch does not tag as such.
_UNARY = (
    "dropout dropout_ contiguous clone alias detach float to.dtype to.device to.dtype_layout _to_copy "
    "zeros_like ones_like full_like empty_like where.ScalarOther where.ScalarSelf "
    "silu gelu relu relu6 softplus mish hardswish elu selu leaky_relu log_sigmoid square abs floor_divide "
    "masked_fill.Tensor real imag conj resolve_conj polar complex fill.Scalar "
    "multiply.Tensor multiply.Scalar divide.Tensor divide.Scalar true_divide.Tensor subtract.Tensor negative absolute "
    "greater.Tensor greater.Scalar less.Tensor less.Scalar isclose"
).split()

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
    "aten::outer": "i, j -> i j",
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
    "aten::logcumsumexp": whole("dim"),
    "aten::sort": whole("dim"),
    "aten::sort.stable": whole("dim"),
    "aten::argsort": whole("dim"),
    "aten::argsort.stable": whole("dim"),
    "aten::topk": resized(),
    "aten::kthvalue": whole("dim"),
    "aten::median.dim": whole("dim"),
    "aten::prod.dim_int": whole("dim"),
    **dict.fromkeys((f"aten::{name}" for name in "max min any all prod std var norm.Scalar".split()), whole("dim")),
    "aten::one_hot": "... -> ... n!",
    "aten::view_as_complex": "... c! -> ...",
    "aten::view_as_real": "... -> ... c!",
    "aten::flip": whole("dims"),
    "aten::roll": whole("dims"),
    "aten::tril": last_two_whole,
    "aten::triu": last_two_whole,
    "aten::constant_pad_nd": padded,
    "aten::pad": padded,
    # over a neighbourhood
    **dict.fromkeys(
        (f"aten::{name}" for name in "conv1d conv2d conv3d conv1d.padding conv2d.padding".split()), convolution
    ),
    **dict.fromkeys((f"aten::{x}_pool1d" for x in "max avg adaptive_avg adaptive_max".split()), pooled(1)),
    **dict.fromkeys((f"aten::{x}_pool2d" for x in "max avg adaptive_avg adaptive_max".split()), pooled(2)),
    "aten::unfold": unfold,
    "aten::im2col": im2col,
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
    "aten::view_as": view_as,
    "aten::reshape_as": view_as,
    "aten::unflatten.int": view,
    "aten::expand": expand,
    "aten::expand_as": pointwise,
    "aten::broadcast_to": expand,
    "aten::transpose.int": permuted(transposed),
    "aten::swapdims": permuted(transposed),
    "aten::swapaxes": permuted(transposed),
    "aten::permute": permuted(lambda call: call.dims("dims")),
    "aten::t": permuted(reversed_),
    "aten::numpy_T": permuted(reversed_),
    "aten::mT": permuted(last_two_swapped),
    "aten::movedim.int": permuted(moved),
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
    "aten::concatenate": cat,
    "aten::stack": stack,
    "aten::index.Tensor": index,
    "aten::index_select": index_select,
    "aten::gather": gather,
    # values written into a part of another
    "aten::slice_scatter": slice_scatter,
    "aten::select_scatter": select_scatter,
    **dict.fromkeys(
        (f"aten::{x}" for x in "scatter.src scatter.value scatter_add scatter_reduce.two".split()), scatter
    ),
    "aten::index_put": index_put,
    "aten::index_add": index_add,
    "aten::index_copy": index_add,
    # values of one operand only
    "aten::type_as": "..., _ -> ...",
    "aten::to.other": "..., _ -> ...",
    **dict.fromkeys((f"aten::{name}" for name in _UNARY), pointwise),
}


# Ops whose contraction is a plain sum, so that the partial results of ranks add up: as they are …
PLAIN_SUMS = frozenset({*"matmul mm bmm mv dot einsum sum".split(), "tpcompiler::grouped_mm"})
# … or once a bias, a count or a lookup is taken care of.
SUMS = PLAIN_SUMS | frozenset("linear addmm baddbmm mean embedding cross_entropy_loss".split())


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
    if torch.Tag.pointwise in op.tags and torch.Tag.nondeterministic_seeded not in op.tags:
        return pointwise
    return RULES.get(name) if overload in ("", "default") else None


def line_of(found: Rule, call: Call) -> tuple[str, dict[str, int]] | None:
    """The pattern of one call, with the sizes that the shapes alone do not tell."""
    text = found if isinstance(found, str) else found(call)
    if text is None:
        return None
    return text if isinstance(text, tuple) else (text, {})
