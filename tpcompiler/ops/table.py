"""The table of ops: one `OpRule` for each, whose line is a function where it depends on the op's arguments.

An op that is not in the table is never split, which is no error. Users add ops of their own with `rule`.
"""

from __future__ import annotations

from typing import Any

import torch

from tpcompiler.errors import RuleError
from tpcompiler.ops.compute import (
    addmm,
    attention,
    cross_entropy,
    einsum,
    grouped_product,
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
    last_two_swapped,
    moved,
    padded,
    permuted,
    repeat,
    reversed_,
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
from tpcompiler.ops.notation import check_line
from tpcompiler.ops.record import OpRule, WeightProduct
from tpcompiler.ops.windows import convolution, im2col, pooled
from tpcompiler.ops.writes import index_put, scatter, slice_scatter


def _each(names: str, record: OpRule) -> dict[str, OpRule]:
    """The same record for several ATen ops."""
    return {f"aten::{name}": record for name in names.split()}


_POINTWISE = OpRule(pointwise)
_WHOLE = OpRule(whole("dim"))  # ops that need the dimensions in the argument `dim` whole
_SEGMENTS = OpRule(split, part="segments")
_CONVOLUTION = OpRule(convolution, sizes={"g": "groups"}, products=((1, -1),), kept=True)
_GROUPED = OpRule(grouped_product, sums=True, kept=True)

RULES: dict[str, OpRule] = {
    # products
    "aten::linear": OpRule(
        "... i, o i, o -> ... o", sums=True, product=WeightProduct("input", "weight", "bias", along=0), kept=True
    ),
    "aten::matmul": OpRule(matmul, sums=True, product=WeightProduct("self", "other")),
    "aten::mm": OpRule("m k, k n -> m n", sums=True, product=WeightProduct("self", "mat2"), kept=True),
    "aten::bmm": OpRule("b m k, b k n -> b m n", sums=True),
    "aten::mv": OpRule("m k, k -> m", sums=True),
    "aten::dot": OpRule("k, k -> ", sums=True),
    "aten::addmm": OpRule(
        addmm, sums=True, scales=("alpha", "beta"), product=WeightProduct("mat1", "mat2", "self"), kept=True
    ),
    "aten::baddbmm": OpRule(
        addmm, sums=True, scales=("alpha", "beta"), product=WeightProduct("batch1", "batch2", "self")
    ),
    "aten::einsum": OpRule(einsum, sums=True),
    "aten::outer": OpRule("i, j -> i j"),
    "tpcompiler::grouped_mm": _GROUPED,
    "aten::_grouped_mm": _GROUPED,
    "aten::scaled_dot_product_attention": OpRule(attention, products=((0, 1), (2, -1))),
    # tables and losses
    "aten::embedding": OpRule("v+ h, ... -> ... h", sums=True, form="lookup"),
    "aten::cross_entropy_loss": OpRule(cross_entropy, sums=True, form="loss"),
    # over a whole dimension
    **_each(
        "softmax.int _softmax log_softmax.int _log_softmax logsumexp amax amin max.dim min.dim argmax argmin", _WHOLE
    ),
    **_each("any.dim all.dim var.correction var.dim std.correction std.dim norm.ScalarOpt_dim", _WHOLE),
    **_each("linalg_vector_norm cumsum cumprod logcumsumexp sort sort.stable argsort argsort.stable", _WHOLE),
    **_each("kthvalue median.dim prod.dim_int max min any all prod std var norm.Scalar", _WHOLE),
    "aten::layer_norm": OpRule(layer_norm, form="layer_norm"),
    "aten::rms_norm": OpRule(layer_norm, form="rms_norm"),
    "aten::group_norm": OpRule("b (g w!) ...!, (g w!), (g w!) -> b (g w!) ...!", sizes={"g": "num_groups"}),
    "aten::glu": OpRule("< (n | n) > -> < n >"),
    "aten::topk": OpRule("< n! > -> < k! >, < k! >"),
    "aten::one_hot": OpRule("... -> ... n!"),
    "aten::view_as_complex": OpRule("... c! -> ..."),
    "aten::view_as_real": OpRule("... -> ... c!"),
    **_each("flip roll", OpRule(whole("dims"))),
    **_each("tril triu", OpRule(last_two_whole)),
    **_each("constant_pad_nd pad", OpRule(padded)),
    # over a neighbourhood
    **_each("conv1d conv2d conv3d conv1d.padding conv2d.padding convolution", _CONVOLUTION),
    **_each("max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d", OpRule(pooled(1))),
    **_each("max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d", OpRule(pooled(2))),
    "aten::unfold": OpRule("< n! > -> < m! > k!"),
    "aten::im2col": OpRule(im2col),
    # sums
    "aten::sum": OpRule(reduction, sums=True),
    "aten::sum.dim_IntList": OpRule(reduction, sums=True, linear=(0,)),
    **_each("mean mean.dim", OpRule(reduction, sums=True, average=True)),
    # the same values in other shapes
    **_each("view _unsafe_view", OpRule(view, shape="size")),
    "aten::reshape": OpRule(view, shape="shape", linear=(0,)),
    "aten::flatten.using_ints": OpRule(view, linear=(0,)),
    "aten::unflatten.int": OpRule(view, shape="sizes", linear=(0,)),
    **_each("view_as reshape_as", OpRule(view_as)),
    **_each("expand broadcast_to", OpRule(expand, shape="size")),
    **_each("swapdims swapaxes", OpRule(permuted(transposed))),
    "aten::transpose.int": OpRule(permuted(transposed), linear=(0,)),
    "aten::permute": OpRule(permuted(lambda call: call.dims("dims")), linear=(0,)),
    **_each("t numpy_T", OpRule(permuted(reversed_))),
    "aten::mT": OpRule(permuted(last_two_swapped)),
    "aten::movedim.int": OpRule(permuted(moved)),
    "aten::unsqueeze": OpRule(unsqueeze, linear=(0,)),
    "aten::squeeze": OpRule(squeeze),
    **_each("squeeze.dim squeeze.dims", OpRule(squeeze, linear=(0,))),
    "aten::repeat_interleave.self_int": OpRule("< n > -> < (n r) >", sizes={"r": "repeats"}, shape="output_size"),
    "aten::repeat": OpRule(repeat, sizes={"r": "repeats"}),
    # parts of values
    "aten::select.int": OpRule("< n! > -> < >", linear=(0,)),
    "aten::slice.Tensor": OpRule(slice_, part="span", linear=(0,)),
    **_each("split.Tensor split_with_sizes chunk tensor_split.sections tensor_split.indices", _SEGMENTS),
    "aten::unbind.int": OpRule(unbind),
    **_each("cat concat concatenate", OpRule(cat)),
    "aten::stack": OpRule(stack),
    "aten::index.Tensor": OpRule(index, linear=(0,)),
    "aten::index_select": OpRule("< n! >, m -> < m >", linear=(0,)),
    "aten::gather": OpRule(gather),
    # values written into a part of another
    "aten::slice_scatter": OpRule(slice_scatter, part="span"),
    "aten::select_scatter": OpRule("< n! >, < > -> < n! >"),
    **_each("scatter.src scatter.value scatter_add scatter_reduce.two", OpRule(scatter)),
    "aten::index_put": OpRule(index_put),
    **_each("index_add index_copy", OpRule("< n! >, m!, < m! > -> < n! >")),
    # values of one operand only
    **_each("type_as to.other", OpRule("..., _ -> ...")),
    # sizes of one operand only
    **_each("detach zeros_like ones_like full_like empty_like", OpRule(pointwise, gradient=False)),
    **_each("new_empty new_zeros new_ones new_full", OpRule("_ -> ...", constant=True)),
    # elementwise ops, where torch does not tag them as such or where more than the line is known
    **_each("mul.Tensor", OpRule(pointwise, linear=(0, 1))),
    **_each("div.Tensor neg contiguous", OpRule(pointwise, linear=(0,))),
    **_each("dropout dropout_ clone alias float to.dtype to.device to.dtype_layout _to_copy", _POINTWISE),
    **_each("where.ScalarOther where.ScalarSelf masked_fill.Tensor fill.Scalar expand_as isclose", _POINTWISE),
    **_each("silu gelu relu relu6 softplus mish hardswish elu selu leaky_relu log_sigmoid square abs", _POINTWISE),
    **_each("real imag conj resolve_conj polar complex negative absolute floor_divide true_divide.Tensor", _POINTWISE),
    **_each("multiply.Tensor multiply.Scalar divide.Tensor divide.Scalar subtract.Tensor", _POINTWISE),
    **_each("greater.Tensor greater.Scalar less.Tensor less.Scalar", _POINTWISE),
}

UNKNOWN = OpRule("")  # of an op without a rule


def rule(op: str, line: str | OpRule, **known: Any) -> None:
    """Teach the compiler an op of your own.

        tpc.rule("mylib::rotate", "... h! -> ... h!")
        tpc.rule("mylib::project", "... i, i o -> ... o", sums=True, linear=(0, 1))

    `op` is `namespace::name` or `namespace::name.overload`. The operands of the line are the op's tensor arguments, in
    order. `known` are fields of `OpRule`, which may also be given whole in place of the line. The checker does not
    trust it. Raises `RuleError` when the line cannot be read or a field is not known.
    """
    try:
        record = line if isinstance(line, OpRule) else OpRule(line, **known)
    except (TypeError, ValueError) as e:
        raise RuleError(f"rule of {op}: {e}") from None
    if isinstance(record.line, str):
        letters = check_line(record.line)
        for letter in record.sizes.keys() - letters:
            raise RuleError(f"rule {record.line!r} of {op}: sizes names {letter!r}, which is not in it")
    RULES[op.replace(".default", "")] = record


def find(op: object) -> OpRule | None:
    """The record of an op: the table's, or a pointwise one when torch itself tags the op so."""
    if not isinstance(op, torch._ops.OpOverload):
        return None
    name, overload = op._schema.name, op._overloadname
    found = RULES.get(name if overload in ("", "default") else f"{name}.{overload}")
    if found is None and torch.Tag.pointwise in op.tags and torch.Tag.nondeterministic_seeded not in op.tags:
        return _POINTWISE
    return found
