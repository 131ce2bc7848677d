"""Emitted expressions mean what the graph says: literals, precedence, subscripts, idioms, line breaks."""

from __future__ import annotations

import ast
import math
import struct
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tpcompiler.emit.names.hints import targets
from tpcompiler.emit.ops.exact import spell
from tpcompiler.emit.text.expr import ADD, MULTIPLY, UNARY, Expr, binary, constant, progression
from tpcompiler.emit.text.subscript import select, slice_, unsqueeze
from tpcompiler.emit.text.wrap import LIMIT, wrap
from tpcompiler.errors import format_bytes

aten = torch.ops.aten
leaves = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=8))
values = st.recursive(
    leaves, lambda inner: st.one_of(st.lists(inner, max_size=3), st.tuples(inner, inner)), max_leaves=6
)


def bits(value: Any) -> Any:
    """Equal for equal values, down to negative zero and the type."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack("d", value)
    if isinstance(value, (list, tuple)):
        return type(value), [bits(v) for v in value]
    return type(value), value


def run(text: str, **names: Any) -> Any:
    return eval(text, {"torch": torch, "F": F}, names)


@given(values)
def test_a_literal_evaluates_to_its_value(value: Any) -> None:
    assert bits(run(constant(value).text)) == bits(value)


@pytest.mark.parametrize(
    "value", [-0.0, math.inf, -math.inf, math.nan, 128**-0.5, 8**0.5, torch.finfo(torch.float32).min, 1e-12]
)
def test_a_special_float_evaluates_to_itself(value: float) -> None:
    assert bits(run(constant(value).text)) == bits(value)


@pytest.mark.parametrize(
    "value", [torch.bfloat16, torch.strided, torch.channels_last, slice(None, 3, None), {"a": (1, None)}]
)
def test_other_constants_evaluate_to_themselves(value: Any) -> None:
    assert run(constant(value).text) == value


trees = st.recursive(
    st.integers(-5, 5),
    lambda inner: st.tuples(st.sampled_from(["+", "-", "*", "neg"]), inner, inner),
    max_leaves=12,
)


def said(tree: Any) -> tuple[Expr, int]:
    """The expression of a tree of operators, and its value."""
    if isinstance(tree, int):
        return constant(tree), tree
    symbol, (left, a), (right, b) = tree[0], said(tree[1]), said(tree[2])
    if symbol == "neg":
        return Expr(f"-{left.at(UNARY)}", UNARY), -a
    value = {"+": a + b, "-": a - b, "*": a * b}[symbol]
    return binary(left, symbol, right, MULTIPLY if symbol == "*" else ADD), value


@given(trees)
def test_parentheses_stand_where_they_must(tree: Any) -> None:
    expression, value = said(tree)
    assert run(expression.text) == value


@given(st.data())
def test_subscripts_are_the_slices_selections_and_new_dimensions_they_join(data: st.DataObject) -> None:
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    expression, want = Expr("x"), x
    for _ in range(data.draw(st.integers(1, 5))):
        kind = data.draw(st.sampled_from(["slice", "select", "unsqueeze"]))
        if kind == "unsqueeze" or not want.dim():
            dim = data.draw(st.integers(-want.dim() - 1, want.dim()))
            expression, want = unsqueeze(expression, want.dim(), dim), want.unsqueeze(dim)
            continue
        dim = data.draw(st.integers(-want.dim(), want.dim() - 1))
        size = want.shape[dim]
        if kind == "select" and size:
            i = data.draw(st.integers(-size, size - 1))
            expression, want = select(expression, want.dim(), dim, constant(i)), want.select(dim, i)
        elif kind == "slice":
            start, stop = data.draw(st.tuples(st.integers(-size, size), st.integers(-size, size)))
            bounds = [constant(start), constant(stop), constant(data.draw(st.integers(1, 2)))]
            expression = slice_(expression, want.dim(), dim, bounds)
            want = aten.slice.Tensor(want, dim, start, stop, run(bounds[2].text))
    got = run(expression.text, x=x)
    assert got.shape == want.shape and torch.equal(got, want), expression.text


class Names:
    """Says the operands of one call."""

    def expr(self, value: Any) -> Expr:
        if isinstance(value, fx.Node):
            return Expr(value.name)
        if isinstance(value, (list, tuple)) and any(isinstance(v, fx.Node) for v in value):
            return Expr(f"[{', '.join(self.expr(v).text for v in value)}]")
        return constant(value)

    def positive(self, value: Any) -> bool:
        return True

    def device(self) -> str:
        return 'torch.device("cpu")'


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


IDS = torch.tensor([[0, 2, 1], [3, 1, 0]])
CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "linear": (aten.linear.default, (x(2, 3), x(4, 3)), {}),
    "linear with bias": (aten.linear.default, (x(2, 3), x(4, 3), x(4)), {}),
    "layer_norm": (aten.layer_norm.default, (x(2, 3), [3], x(3), x(3), 1e-6), {}),
    "layer_norm plain": (aten.layer_norm.default, (x(2, 3), [3]), {}),
    "layer_norm without weight": (aten.layer_norm.default, (x(2, 3), [3], None, x(3)), {}),
    "rms_norm": (aten.rms_norm.default, (x(2, 3), [3], x(3), 1e-6), {}),
    "group_norm": (aten.group_norm.default, (x(2, 4, 3), 2), {}),
    "embedding": (aten.embedding.default, (x(5, 3), IDS), {}),
    "embedding with padding": (aten.embedding.default, (x(5, 3), IDS, 0), {}),
    "gelu": (aten.gelu.default, (x(2, 3),), {"approximate": "tanh"}),
    "softmax": (aten.softmax.int, (x(2, 3), -1, torch.float64), {}),
    "attention": (
        aten.scaled_dot_product_attention.default,
        (x(1, 2, 3, 4), x(1, 2, 3, 4), x(1, 2, 3, 4), None, 0.0, True),
        {},
    ),
    "attention with scale": (
        aten.scaled_dot_product_attention.default,
        (x(1, 2, 3, 4), x(1, 2, 3, 4), x(1, 2, 3, 4), x(3, 3)),
        {"scale": 0.3},
    ),
    "cross_entropy": (aten.cross_entropy_loss.default, (x(2, 3), IDS[0, :2], None, 2, -100, 0.1), {}),
    "cross_entropy none": (aten.cross_entropy_loss.default, (x(2, 3), IDS[0, :2], None, 0), {}),
    "mse_loss": (aten.mse_loss.default, (x(2, 3), x(2, 3) + 1, 2), {}),
    "view": (aten.view.default, (x(2, 6), [2, 3, -1]), {}),
    "view to nothing": (aten.view.default, (x(1), []), {}),
    "expand": (aten.expand.default, (x(1, 3), [4, -1]), {}),
    "permute": (aten.permute.default, (x(2, 3, 4), [2, 0, 1]), {}),
    "repeat": (aten.repeat.default, (x(2, 3), [2, 1]), {}),
    "transpose": (aten.transpose.int, (x(2, 3), 0, 1), {}),
    "flatten all": (aten.flatten.using_ints, (x(2, 3, 4),), {}),
    "flatten to the end": (aten.flatten.using_ints, (x(2, 3, 4), 1), {}),
    "flatten the first": (aten.flatten.using_ints, (x(2, 3, 4), 0, 1), {}),
    "unflatten": (aten.unflatten.int, (x(2, 6), -1, [2, 3]), {}),
    "split": (aten.split.Tensor, (x(2, 6), 2, -1), {}),
    "split unevenly": (aten.split_with_sizes.default, (x(2, 6), [1, 5], 1), {}),
    "split evenly by sizes": (aten.split_with_sizes.default, (x(2, 6), [3, 3], 1), {}),
    "chunk": (aten.chunk.default, (x(2, 6), 3, 1), {}),
    "unbind": (aten.unbind.int, (x(3, 2),), {}),
    "topk": (aten.topk.default, (x(2, 6), 2), {}),
    "max along": (aten.max.dim, (x(2, 6), 1), {}),
    "cat": (aten.cat.default, ([x(2, 3), x(2, 3)], -1), {}),
    "stack": (aten.stack.default, ([x(2, 3), x(2, 3)],), {}),
    "einsum": (aten.einsum.default, ("ij,jk->ik", [x(2, 3), x(3, 2)]), {}),
    "add": (aten.add.Tensor, (x(2, 3), 1.5), {}),
    "add scaled": (aten.add.Tensor, (x(2, 3), x(2, 3)), {"alpha": 2}),
    "rsub": (aten.rsub.Scalar, (x(2, 3), 1.0), {}),
    "sub": (aten.sub.Tensor, (x(2, 3), x(3)), {}),
    "div": (aten.div.Tensor, (x(2, 3), x(3)), {}),
    "div floor": (aten.div.Tensor_mode, (x(2, 3), 0.3), {"rounding_mode": "floor"}),
    "pow": (aten.pow.Tensor_Scalar, (x(2, 3), 2), {}),
    "pow of a number": (aten.pow.Scalar, (2.0, x(2, 3)), {}),
    "pow of tensors": (aten.pow.Tensor_Tensor, (x(2, 3).abs(), x(2, 3)), {}),
    "neg": (aten.neg.default, (x(2, 3),), {}),
    "mean": (aten.mean.dim, (x(2, 3), [-1], True), {}),
    "mean of all": (aten.mean.default, (x(2, 3),), {"dtype": torch.float64}),
    "sum over two": (aten.sum.dim_IntList, (x(2, 3, 4), [0, 2]), {}),
    "std": (aten.std.correction, (x(2, 3), [1]), {"correction": 0, "keepdim": True}),
    "matmul": (aten.matmul.default, (x(2, 3), x(3, 2)), {}),
    "bmm": (aten.bmm.default, (x(2, 3, 4), x(2, 4, 3)), {}),
    "addmm": (aten.addmm.default, (x(2), x(3, 4), x(4, 2)), {}),
    "baddbmm": (aten.baddbmm.default, (x(2, 3, 3), x(2, 3, 4), x(2, 4, 3)), {"beta": 0.5}),
    "numpy_T": (aten.numpy_T.default, (x(2, 3),), {}),
    "where": (aten.where.self, (IDS > 1, x(2, 3), x(3)), {}),
    "where with a number": (aten.where.ScalarOther, (IDS > 1, x(2, 3), -math.inf), {}),
    "masked_fill": (aten.masked_fill.Scalar, (x(2, 3), IDS > 1, -math.inf), {}),
    "comparison": (aten.lt.Scalar, (IDS, 2), {}),
    "and": (aten.__and__.Tensor, (IDS > 0, IDS < 3), {}),
    "not": (aten.bitwise_not.default, (IDS > 0,), {}),
    "to": (aten.to.dtype, (x(2, 3), torch.bfloat16), {}),
    "copy": (aten._to_copy.default, (x(2, 3),), {"dtype": torch.float64}),
    "arange": (aten.arange.start_step, (2, 12, 3), {"dtype": torch.float32}),
    "zeros": (aten.zeros.default, ([2, 3],), {"dtype": torch.bool}),
    "full": (aten.full.default, ([2, 3], -math.inf), {}),
    "scalar_tensor": (aten.scalar_tensor.default, (2,), {"dtype": torch.int64}),
    "zeros_like": (aten.zeros_like.default, (x(2, 3),), {"dtype": torch.int64}),
    "new_ones": (aten.new_ones.default, (x(2, 3), [2]), {"dtype": torch.bool}),
    "cumsum": (aten.cumsum.default, (x(2, 3), -1), {}),
    "tril": (aten.tril.default, (x(3, 3), -1), {}),
    "gather": (aten.gather.default, (x(2, 3), 1, IDS.clamp(max=2)), {}),
    "index": (aten.index.Tensor, (x(5, 3), [IDS]), {}),
    "index the second": (aten.index.Tensor, (x(2, 5), [None, IDS[0]]), {}),
    "pad": (aten.pad.default, (x(2, 3), [0, 1], "constant", -1.0), {}),
    "conv1d": (aten.conv1d.default, (x(1, 2, 5), x(3, 2, 3), None, [1], [1]), {}),
    "one_hot": (aten.one_hot.default, (IDS, 4), {}),
    "clamp": (aten.clamp.default, (x(2, 3), None, 0.5), {}),
    "repeat_interleave": (aten.repeat_interleave.self_int, (x(2, 3), 2, 1), {}),
    "roll": (aten.roll.default, (x(2, 3), [1], [1]), {}),
    "glu": (aten.glu.default, (x(2, 6),), {}),
    "logsumexp": (aten.logsumexp.default, (x(2, 3), [-1]), {}),
    "norm": (aten.linalg_vector_norm.default, (x(2, 3), 2, [-1], True), {}),
    "no idiom": (aten.slice_scatter.default, (x(2, 3), x(2, 1), 1, 1, 2), {}),
    "broadcast_tensors": (aten.broadcast_tensors.default, ([x(1, 3), x(2, 1)],), {}),
    "tensor_split": (aten.tensor_split.sections, (x(2, 7), 3, -1), {}),
    "no idiom, a list": (aten.cartesian_prod.default, ([x(3), x(2)],), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_idiom_computes_what_the_call_does(name: str) -> None:
    op, args, kwargs = CALLS[name]
    graph, operands = fx.Graph(), {}

    def node(value: Any) -> Any:
        if isinstance(value, Tensor):
            placeholder = graph.placeholder(f"t{len(operands)}")
            with FakeTensorMode() as mode:
                placeholder.meta["val"] = mode.from_tensor(value)
            operands[placeholder.name] = value
            return placeholder
        return [node(v) for v in value] if isinstance(value, list) else value

    arguments = tuple(node(a) for a in args)
    call = graph.call_function(op, arguments, kwargs)
    text = spell(call, (arguments, kwargs), Names()).text
    torch.testing.assert_close(run(text, **operands), op(*args, **kwargs), rtol=0, atol=0)


OTHERS = ("no idiom", "no idiom, a list", "split evenly by sizes")  # the last is said as `split`, a view as well


@pytest.mark.parametrize("name", [n for n in CALLS if n not in OTHERS])
def test_an_idiom_is_the_call_itself(name: str) -> None:
    """Traced, the hand-written form is the very operator and no other."""
    op, args, kwargs = CALLS[name]
    flat = [a for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, Tensor)]
    if not flat:
        return
    names = [f"t{i}" for i in range(len(flat))]
    graph = fx.Graph()
    nodes = iter([graph.placeholder(n) for n in names])

    def node(value: Any) -> Any:
        if isinstance(value, Tensor):
            placeholder = next(nodes)
            placeholder.meta["val"] = value
            return placeholder
        return [node(v) for v in value] if isinstance(value, list) else value

    arguments = tuple(node(a) for a in args)
    text = spell(graph.call_function(op, arguments, kwargs), (arguments, kwargs), Names()).text

    def called(function: Any) -> list[str]:
        traced = make_fx(function, tracing_mode="fake")(*flat)
        return [str(n.target) for n in traced.graph.nodes if n.op == "call_function"]

    rest = iter(range(len(flat)))

    def direct(*tensors: Tensor) -> Any:
        def put(value: Any) -> Any:
            return tensors[next(rest)] if isinstance(value, Tensor) else value

        return op(*torch.utils._pytree.tree_map(put, args), **kwargs)

    assert called(lambda *tensors: run(text, **dict(zip(names, tensors, strict=True)))) == called(direct), text


@given(st.integers(-9, 9), st.integers(-9, 9), st.integers(0, 4), st.integers(2, 6))
def test_a_progression_gives_its_row(base: int, step: int, start: int, n: int) -> None:
    row = [base + step * i for i in range(n)]
    text = progression(row, start)
    assert text is not None
    assert [run(text, i=i) for i in range(start, start + n)] == row


def test_no_progression_is_made_up() -> None:
    assert progression([1, 2, 4], 0) is None and progression([0.5, 1.0], 0) is None


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("q, k, v = self.qkv(x).chunk(3, dim=-1)", ("q", "k", "v")),
        ("q, (k, v) = self.q(y), self.kv(y).chunk(2)", ("q", "k", "v")),
        ("x = x + self.mlp(x)", ("x",)),
        ("x += y", ("x",)),
        ("out: Tensor = f(x)", ("out",)),
        ("self.state = x", ("",)),
        ("return x + y", ()),
        ("if x == y:", ()),
        ("y = f(", ("y",)),
        ("f(a=1)", ()),
    ],
)
def test_targets_are_the_names_that_a_line_assigns(line: str, names: tuple[str, ...]) -> None:
    assert targets(line) == names


texts = st.recursive(
    st.sampled_from(["hidden_states", "self.attention.output.dense.weight", "3 * self.heads * 96", '"a, (b"', "-1"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=5).map(lambda p: f"F.layer_norm({', '.join(p)})"),
        st.lists(inner, min_size=2, max_size=5).map(lambda p: f"({', '.join(p)})"),
        st.lists(inner, min_size=1, max_size=5).map(lambda p: f"[{', '.join(p)}]"),
        st.tuples(inner, inner).map(lambda p: f"f({p[0]}).view({p[1]}).transpose(1, 2)"),
    ),
    max_leaves=24,
)


@given(texts, st.sampled_from([0, 4, 8, 12]))
def test_broken_lines_are_the_same_statement(text: str, indent: int) -> None:
    line = f"y = {text}"
    lines = wrap(line, indent)
    assert ast.dump(ast.parse("\n".join(x[indent:] for x in lines))) == ast.dump(ast.parse(line))
    assert all(len(x) <= LIMIT or x.strip().count(",") == 0 or "(" not in x for x in lines)


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (48 << 20, "48.0 MiB"), (3 << 40, "3.0 TiB")]
)
def test_amounts_are_for_readers(n: int, text: str) -> None:
    assert format_bytes(n) == text
