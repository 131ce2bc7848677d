"""The table of ops: one `OpRule` for each, whose line is a function where it depends on the op's arguments.

An op that torch itself tags as pointwise needs no line. Any other op that is not in the table still runs, but is never
split. Users add ops of their own with `rule`.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import torch

from tpcompiler.errors import RuleError
from tpcompiler.ops import compute, move, windows, writes
from tpcompiler.ops.notation import check_line
from tpcompiler.ops.record import OpRule, WeightProduct


def _each(names: str, record: OpRule) -> dict[str, OpRule]:
    """The same record for several ATen ops."""
    return {f"aten::{name}": record for name in names.split()}


_POINTWISE = OpRule(compute.pointwise)
_FORGETS = OpRule(compute.pointwise, forgets=True)
_WHOLE = OpRule(compute.whole("dim"))  # ops that need the dimensions in the argument `dim` whole
_SEGMENTS = OpRule(move.split, part="segments")
_CONVOLUTION = OpRule(
    windows.convolution, sizes={"g": "groups"}, products=((1, -1),), sums=True, bias="bias", kept=True
)
_GROUPED = OpRule(compute.grouped_product, sums=True, kept=True)

RULES: dict[str, OpRule] = {
    # products
    "aten::linear": OpRule(
        "... i, o i, o -> ... o", sums=True, product=WeightProduct("input", "weight", "bias", along=0), kept=True
    ),
    "aten::matmul": OpRule(compute.matmul, sums=True, product=WeightProduct("self", "other")),
    "aten::mm": OpRule("m k, k n -> m n", sums=True, product=WeightProduct("self", "mat2"), kept=True),
    "aten::bmm": OpRule("b m k, b k n -> b m n", sums=True),
    "aten::mv": OpRule("m k, k -> m", sums=True),
    "aten::dot": OpRule("k, k -> ", sums=True),
    "aten::addmm": OpRule(
        compute.addmm, sums=True, scales=("alpha", "beta"), product=WeightProduct("mat1", "mat2", "self"), kept=True
    ),
    "aten::baddbmm": OpRule(
        compute.addmm, sums=True, scales=("alpha", "beta"), product=WeightProduct("batch1", "batch2", "self")
    ),
    "aten::einsum": OpRule(compute.einsum, sums=True),
    "aten::outer": OpRule("i, j -> i j"),
    "tpcompiler::grouped_mm": _GROUPED,
    "aten::_grouped_mm": _GROUPED,
    "aten::scaled_dot_product_attention": OpRule(compute.attention, products=((0, 1), (2, -1))),
    # tables and losses
    "aten::embedding": OpRule("v+ h, ... -> ... h", sums=True, form="lookup"),
    "aten::cross_entropy_loss": OpRule(compute.cross_entropy, sums=True, form="loss"),
    # over a whole dimension
    **_each(
        "softmax.int _softmax log_softmax.int _log_softmax logsumexp amax max.dim argmax", replace(_WHOLE, neutral=-inf)
    ),
    **_each("amin min.dim argmin", replace(_WHOLE, neutral=inf)),
    **_each("any.dim", replace(_WHOLE, neutral=0.0)),
    **_each("all.dim", replace(_WHOLE, neutral=1.0)),
    **_each("cumsum cumprod logcumsumexp", replace(_WHOLE, scan=True)),
    **_each("var.correction var.dim std.correction std.dim norm.ScalarOpt_dim", _WHOLE),
    **_each("linalg_vector_norm linalg_norm sort sort.stable argsort argsort.stable", _WHOLE),
    **_each("kthvalue median.dim prod.dim_int max min any all prod std var norm.Scalar", _WHOLE),
    "aten::layer_norm": OpRule(compute.layer_norm, form="layer_norm"),
    "aten::rms_norm": OpRule(compute.layer_norm, form="rms_norm"),
    "aten::group_norm": OpRule("b (g w!) ...!, (g w!), (g w!) -> b (g w!) ...!", sizes={"g": "num_groups"}),
    "aten::_weight_norm": OpRule(compute.weight_norm),
    "aten::glu": OpRule("< (n | n) > -> < n >"),
    "aten::topk": OpRule("< n! > -> < k! >, < k! >"),
    "aten::one_hot": OpRule("... -> ... n!"),
    "aten::view_as_complex": OpRule("... c! -> ..."),
    "aten::view_as_real": OpRule("... -> ... c!"),
    **_each("flip roll", OpRule(compute.whole("dims"))),
    **_each("tril triu", OpRule(compute.last_two_whole)),
    **_each("constant_pad_nd pad", OpRule(move.padded)),
    # over a neighbourhood
    **_each("conv1d conv2d conv3d conv1d.padding conv2d.padding convolution", _CONVOLUTION),
    **_each("max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d", OpRule(windows.pooled(1))),
    **_each("max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d", OpRule(windows.pooled(2))),
    "aten::unfold": OpRule("< n! > -> < m! > k!"),
    "aten::im2col": OpRule(windows.im2col),
    # sums
    "aten::sum": OpRule(compute.reduction, sums=True),
    "aten::sum.dim_IntList": OpRule(compute.reduction, sums=True, linear=(0,)),
    **_each("mean mean.dim", OpRule(compute.reduction, sums=True, average=True)),
    # the same values in other shapes
    **_each("view _unsafe_view", OpRule(move.view, shape="size")),
    "aten::reshape": OpRule(move.view, shape="shape", linear=(0,)),
    "aten::flatten.using_ints": OpRule(move.view, linear=(0,), moves=True),
    "aten::unflatten.int": OpRule(move.view, shape="sizes", linear=(0,)),
    **_each("view_as reshape_as", OpRule(move.view_as)),
    **_each("expand broadcast_to", OpRule(move.expand, shape="size")),
    **_each("swapdims swapaxes", OpRule(move.permuted(move.swapped), moves=True)),
    "aten::transpose.int": OpRule(move.permuted(move.swapped), linear=(0,), moves=True),
    "aten::permute": OpRule(move.permuted(lambda call: call.dims("dims")), linear=(0,), moves=True),
    **_each("t numpy_T", OpRule(move.permuted(move.reversed_), moves=True)),
    "aten::mT": OpRule(move.permuted(move.swapped), moves=True),
    "aten::movedim.int": OpRule(move.permuted(move.moved), moves=True),
    "aten::unsqueeze": OpRule(move.unsqueeze, linear=(0,), moves=True),
    "aten::squeeze": OpRule(move.squeeze, moves=True),
    **_each("squeeze.dim squeeze.dims", OpRule(move.squeeze, linear=(0,), moves=True)),
    "aten::repeat_interleave.self_int": OpRule("< n > -> < (n r) >", sizes={"r": "repeats"}, shape="output_size"),
    "aten::repeat": OpRule(move.repeat, sizes={"r": "repeats"}),
    # parts of values
    "aten::select.int": OpRule("< n! > -> < >", linear=(0,), moves=True),
    "aten::slice.Tensor": OpRule(move.slice_, part="span", linear=(0,), moves=True),
    **_each("split.Tensor split_with_sizes chunk tensor_split.sections tensor_split.indices", _SEGMENTS),
    "aten::unbind.int": OpRule(move.unbind),
    **_each("cat concat concatenate", OpRule(move.cat)),
    "aten::stack": OpRule(move.stack),
    "aten::index.Tensor": OpRule(move.index, linear=(0,), sums=True, form="lookup"),
    "aten::index_select": OpRule("< n! >, m -> < m >", linear=(0,)),
    "aten::gather": OpRule(move.gather),
    # values written into a part of another
    "aten::slice_scatter": OpRule(move.slice_scatter, part="span"),
    "aten::select_scatter": OpRule("< n! >, < > -> < n! >"),
    **_each("scatter.src scatter.value scatter_add scatter_reduce.two", OpRule(writes.scatter)),
    "aten::index_put": OpRule(writes.index_put),
    **_each("index_add index_copy", OpRule("< n! >, m!, < m! > -> < n! >")),
    # only the values of the first operand are read
    **_each("type_as to.other", OpRule("..., _ -> ...")),
    # only the sizes of the first operand are read, or no gradient flows
    "aten::detach": OpRule(compute.pointwise, gradient=False, moves=True),
    **_each("zeros_like ones_like full_like empty_like", OpRule(compute.pointwise, gradient=False, sizes_alone=True)),
    **_each("new_empty new_zeros new_ones new_full", OpRule("_ -> ...", constant=True, sizes_alone=True)),
    # elementwise ops, where torch does not tag them as such or where more than the line is known
    **_each("mul.Tensor", OpRule(compute.pointwise, linear=(0, 1))),
    "aten::div.Tensor": OpRule(compute.pointwise, linear=(0,)),
    "aten::neg": OpRule(compute.pointwise, linear=(0,), forgets=True),
    "aten::contiguous": OpRule(compute.pointwise, linear=(0,), forgets=True, moves=True),
    **_each("clone alias", OpRule(compute.pointwise, forgets=True, moves=True)),
    **_each("add.Tensor add.Scalar sub.Tensor sub.Scalar dropout dropout_", _FORGETS),
    **_each("float to.dtype to.device to.dtype_layout _to_copy", _FORGETS),
    **_each("where.ScalarOther where.ScalarSelf masked_fill.Tensor fill.Scalar expand_as isclose", _POINTWISE),
    **_each("silu gelu relu relu6 softplus mish hardswish elu selu leaky_relu log_sigmoid square abs", _POINTWISE),
    **_each("real imag conj resolve_conj polar complex negative absolute floor_divide true_divide.Tensor", _POINTWISE),
    **_each("multiply.Tensor multiply.Scalar divide.Tensor divide.Scalar subtract.Tensor", _POINTWISE),
    **_each("__and__.Tensor __and__.Scalar __or__.Tensor __or__.Scalar __xor__.Tensor", _POINTWISE),
    **_each("greater.Tensor greater.Scalar less.Tensor less.Scalar", _POINTWISE),
}

UNKNOWN = OpRule("")  # the record of an op that has none


def rule(op: str, line: str | OpRule, **known: Any) -> None:
    """Teach the compiler an op of your own.

        tpc.rule("mylib::rotate", "... h! -> ... h!")
        tpc.rule("mylib::project", "... i, i o -> ... o", sums=True, linear=(0, 1))

    `op` is `namespace::name` or `namespace::name.overload`. The operands in the line are the op's tensor arguments, in
    order. `known` gives other fields of `OpRule`; a whole `OpRule` may stand in place of the line. The checker does not
    trust the rule: where no fact of its own speaks of the op, it runs the op's calls, and the verdict says so. Raises
    `RuleError` when the line cannot be read, or for a field that `OpRule` does not have.
    """
    try:
        record = replace(line, taught=True) if isinstance(line, OpRule) else OpRule(line, **{**known, "taught": True})
    except (TypeError, ValueError) as e:
        raise RuleError(f"rule of {op}: {e}") from None
    if isinstance(record.line, str):
        letters = check_line(record.line)
        for letter in record.sizes.keys() - letters:
            raise RuleError(f"rule {record.line!r} of {op}: sizes names {letter!r}, which is not in it")
    RULES[op.replace(".default", "")] = record


def find(op: object) -> OpRule | None:
    """The record of an op: the table's, else a pointwise one if torch tags the op as pointwise, else None."""
    if not isinstance(op, torch._ops.OpOverload):
        return None
    name, overload = op._schema.name, op._overloadname
    found = RULES.get(name if overload in ("", "default") else f"{name}.{overload}")
    if found is None and torch.Tag.pointwise in op.tags and torch.Tag.nondeterministic_seeded not in op.tags:
        return _POINTWISE
    return found
