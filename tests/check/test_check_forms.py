"""Facts about operations, held against torch: what a fact says of ranks' results and gradients is seen when they run.

Every operation is given operands that are split, uneven or partial at random over a mesh of 2 × 2 or 3 ranks. Where its
fact holds, the ranks' calls are run, forward and backward, and must give the claims and kinds that the fact names.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tpcompiler import runtime
from tpcompiler.check.calls import Call, GroupOver, RngSlot, Slot, globalise, make_call
from tpcompiler.check.certified import certified
from tpcompiler.check.claims import Claim, Geometry
from tpcompiler.check.cones import Cone, TensorInfo
from tpcompiler.check.facts import not_linear
from tpcompiler.check.form import Held, Wrong
from tpcompiler.check.sampled import Sampler
from tpcompiler.check.steps import Steps
from tpcompiler.layout import Concat, Dim, Factor, LocalRuns, LocalSize, Product
from tpcompiler.runtime import Mesh

aten = torch.ops.aten
F32, I64, BOOL, C64 = torch.float32, torch.int64, torch.bool, torch.complex64
MESHES = (Mesh.of({"t": 2, "u": 2}), Mesh.of({"t": 3}))
X, Y, Z, W = Slot(0), Slot(1), Slot(2), Slot(3)

Case = tuple[Callable[..., Any], tuple[Any, ...], list[Any]]  # the operation, its arguments, its operands' shapes

CASES: list[Case] = [
    (aten.relu.default, (X,), [(4, 6)]),
    (aten.add.Tensor, (X, Y), [(3, 4, 6), (4, 1)]),
    (aten.mul.Tensor, (X, Y), [(4, 6), (6,)]),
    (aten.mul.Tensor, (X, X), [(4, 6)]),
    (aten.div.Tensor, (X, Y), [(4, 6), (4, 6)]),
    (aten.floor.default, (X,), [(4, 6)]),
    (aten.where.self, (Z, X, Y), [(4, 6), (6,), ((4, 1), BOOL)]),
    (aten.masked_fill.Scalar, (X, Y, 0.0), [(4, 6), ((4, 6), BOOL)]),
    (aten.type_as.default, (X, Y), [(4, 6), (5,)]),
    (aten.zeros_like.default, (X,), [(4, 6)]),
    (aten.sum.dim_IntList, (X, (-1,)), [(4, 6)]),
    (aten.sum.dim_IntList, (X, (0,), True), [(4, 6)]),
    (aten.sum.default, (X,), [(4, 6)]),
    (aten.mean.dim, (X, (-1,)), [(4, 6)]),
    (aten.amax.default, (X, (0,)), [(4, 6)]),
    (aten.softmax.int, (X, -1), [(4, 6)]),
    (aten.cumsum.default, (X, 1), [(4, 6)]),
    (aten.topk.default, (X, 2), [(4, 6)]),
    (aten.sort.default, (X,), [(4, 6)]),
    (aten.var.correction, (X, (1,)), [(4, 6)]),
    (aten.linalg_vector_norm.default, (X, 2, (1,), True), [(4, 6)]),
    (aten.logsumexp.default, (X, (0,)), [(4, 6)]),
    (aten.any.dim, (X, 1), [((4, 6), BOOL)]),
    (aten.layer_norm.default, (X, (6,), Y, Z), [(4, 6), (6,), (6,)]),
    (aten.rms_norm.default, (X, (6,), Y), [(3, 4, 6), (6,)]),
    (aten.group_norm.default, (X, 2, Y, Z), [(4, 6, 5), (6,), (6,)]),
    (aten.group_norm.default, (X, LocalSize(Factor(2, "g", ("t",))), Y, Z), [(4, 6, 5), (6,), (6,)]),
    (aten._weight_norm.default, (X, Y, 0), [(4, 6), (4, 1)]),
    (aten.linear.default, (X, Y), [(3, 4, 6), (5, 6)]),
    (aten.linear.default, (X, Y, Z), [(4, 6), (5, 6), (5,)]),
    (aten.matmul.default, (X, Y), [(4, 3, 6), (4, 6, 5)]),
    (aten.matmul.default, (X, Y), [(4, 3, 6), (6, 5)]),
    (aten.matmul.default, (X, Y), [(4, 6), (6,)]),
    (aten.matmul.default, (X, Y), [(4, 1, 3, 6), (2, 6, 5)]),
    (aten.mm.default, (X, Y), [(4, 6), (6, 5)]),
    (aten.bmm.default, (X, Y), [(4, 3, 6), (4, 6, 5)]),
    (aten.dot.default, (X, Y), [(6,), (6,)]),
    (aten.mv.default, (X, Y), [(4, 6), (6,)]),
    (aten.outer.default, (X, Y), [(4,), (6,)]),
    (aten.addmm.default, (Z, X, Y), [(4, 6), (6, 5), (5,)]),
    (aten.baddbmm.default, (Z, X, Y), [(4, 3, 6), (4, 6, 5), (4, 3, 5)]),
    (aten.einsum.default, ("bsi,oi->bso", (X, Y)), [(2, 4, 6), (5, 6)]),
    (aten.einsum.default, ("bhi,bhj->bij", (X, Y)), [(2, 4, 3), (2, 4, 5)]),
    (aten.scaled_dot_product_attention.default, (X, Y, Z), [(2, 4, 5, 6), (2, 4, 7, 6), (2, 4, 7, 3)]),
    (aten.scaled_dot_product_attention.default, (X, Y, Z, None, 0.0, True), [(2, 4, 5, 6)] * 3),
    (
        aten.scaled_dot_product_attention.default,
        (X, Y, Z, W, 0.0, False),
        [(2, 4, 5, 6), (2, 4, 7, 6), (2, 4, 7, 3), (4, 1, 7)],
    ),
    (aten.conv1d.default, (X, Y), [(4, 6, 9), (5, 6, 3)]),
    (aten.conv1d.default, (X, Y, Z, (1,), (0,), (1,), 2), [(4, 6, 9), (8, 3, 3), (8,)]),
    (aten.conv2d.default, (X, Y, Z), [(2, 4, 6, 6), (3, 4, 2, 2), (3,)]),
    (aten.max_pool1d.default, (X, (2,)), [(4, 6, 8)]),
    (aten.embedding.default, (X, Y), [(7, 6), ((4, 3), I64)]),
    (aten.cross_entropy_loss.default, (X, Y, None, 0), [(4, 6, 3), ((4, 3), I64)]),
    (aten.embedding.default, (X, Y, -1, True, False), [(7, 6), ((4, 3), I64)]),
    (aten.one_hot.default, (X, 7), [((4, 6), I64)]),
    (aten.view.default, (X, (4, 3, 2)), [(4, 6)]),
    (aten.view.default, (X, (4, LocalSize(Factor(3, "h", ("t",))), 2)), [(4, 6)]),
    (aten.view.default, (X, (LocalSize(Factor(4, "b", ("u",))), LocalSize(Factor(3, "h", ("t",))), 2)), [(4, 6)]),
    (aten.reshape.default, (X, (2, -1)), [(2, 4, 6)]),
    (aten.reshape.default, (X, (8, 3)), [(4, 6)]),
    (aten.flatten.using_ints, (X, 0, 1), [(4, 3, 5)]),
    (aten.unflatten.int, (X, 1, (3, 2)), [(4, 6)]),
    (aten.unflatten.int, (X, 1, (LocalSize(Factor(3, "h", ("t",))), 2)), [(4, 6)]),
    (aten.unsqueeze.default, (X, 1), [(4, 6)]),
    (aten.squeeze.dim, (X, 1), [(4, 1, 6)]),
    (aten.view_as.default, (X, Y), [(4, 6), (4, 6)]),
    (aten.transpose.int, (X, 1, 2), [(4, 3, 6)]),
    (aten.permute.default, (X, (2, 0, 1)), [(4, 3, 6)]),
    (aten.movedim.int, (X, 0, 2), [(4, 3, 6)]),
    (aten.t.default, (X,), [(4, 6)]),
    (aten.mT.default, (X,), [(4, 3, 6)]),
    (aten.tril.default, (X,), [(4, 6, 6)]),
    (aten.flip.default, (X, (1,)), [(4, 6)]),
    (aten.roll.default, (X, (2,), (0,)), [(4, 6)]),
    (aten.constant_pad_nd.default, (X, (1, 1)), [(4, 6)]),
    (aten.diagonal.default, (X,), [(4, 6, 5)]),
    (aten.view_as_real.default, (X,), [((4, 6), C64)]),
    (aten.view_as_complex.default, (X,), [(4, 6, 2)]),
    (aten.unfold.default, (X, 1, 3, 2), [(4, 6)]),
    (aten.expand.default, (X, (3, 4, 6)), [(4, 1)]),
    (aten.expand.default, (X, (LocalSize(Factor(5, "r", ("t",))), 4, 6)), [(4, 6)]),
    (aten.expand.default, (X, (-1, LocalSize(Factor(5, "r", ("u",))), -1)), [(4, 1, 6)]),
    (aten.expand_as.default, (X, Y), [(4, 1), (4, 6)]),
    (aten.repeat.default, (X, (2, 1, 3)), [(4, 6)]),
    (aten.repeat_interleave.self_int, (X, 3, 1), [(4, 6)]),
    (aten.repeat_interleave.self_int, (X, LocalSize(Factor(3, "r", ("t",))), 1), [(4, 6)]),
    (aten.index_select.default, (X, 1, Y), [(4, 6), ((5,), I64)]),
    (aten.gather.default, (X, 1, Y), [(4, 6), ((4, 3), I64)]),
    (aten.gather.default, (X, 1, Y), [(4, 6), ((2, 3), I64)]),
    (aten.index.Tensor, (X, (None, Y)), [(4, 6, 3), ((2, 4), I64)]),
    (aten.index.Tensor, (X, (Y, None, Z)), [(4, 6, 5), ((2, 3), I64), ((3,), I64)]),
    (aten.index_put.default, (X, (Y,), Z), [(6, 4), ((2,), I64), (2, 4)]),
    (aten.scatter.src, (X, 1, Y, Z), [(4, 6), ((4, 1), I64), (4, 1)]),
    (aten.scatter_add.default, (X, 0, Y, Z), [(6, 4), ((3, 4), I64), (3, 4)]),
    (aten.index_add.default, (X, 0, Y, Z), [(6, 4), ((3,), I64), (3, 4)]),
    (aten.select_scatter.default, (X, Y, 1, 2), [(4, 6), (4,)]),
    (aten.slice_scatter.default, (X, Y, 1, 1, 3), [(4, 6), (4, 2)]),
    (aten.slice.Tensor, (X, 1, 1, 4), [(4, 6)]),
    (aten.slice.Tensor, (X, -1, 0, LocalSize(Factor(4, "q", ("t",)))), [(4, 8)]),
    (aten.select.int, (X, 1, 2), [(4, 6)]),
    (aten.split_with_sizes.default, (X, (2, 4), 1), [(4, 6)]),
    (
        aten.split_with_sizes.default,
        (X, (LocalSize(Factor(4, "q", ("t",))), LocalSize(Factor(4, "k", ("t",)))), 1),
        [(4, 8)],
    ),
    (aten.chunk.default, (X, 2, 1), [(4, 8)]),
    (aten.unbind.int, (X, 1), [(4, 3)]),
    (aten.glu.default, (X,), [(4, 8)]),
    (aten.cat.default, ((X, Y), 1), [(4, 6), (4, 2)]),
    (aten.stack.default, ((X, Y), 1), [(4, 6), (4, 6)]),
    (aten.new_zeros.default, (X, (4, LocalSize(Factor(6, "h", ("t",))))), [(3, 5)]),
]


def operators() -> Iterator[tuple[tuple[str, ...], Any, dict[str, Any], list[Any]]]:
    """The runtime's operators over each mesh dimension, with their keyword arguments."""
    for over in (("t",), ("u",), ("t", "u")):
        group, split = GroupOver(over), LocalRuns(Factor(6, "h", over))
        yield over, runtime.enter, {"x": X, "group": group}, [(4, 6)]
        yield over, runtime.reduce, {"x": X, "group": group}, [(4, 6)]
        yield over, runtime.take, {"x": X, "dim": 1, "rows": split}, [(4, 6)]
        yield over, runtime.gather, {"x": X, "group": group, "dim": -1, "rows": split}, [(4, 6)]
        yield over, runtime.gather_sequence, {"x": X, "group": group, "dim": 1, "size": 6}, [(4, 6)]
        yield over, runtime.scatter_sequence, {"x": X, "group": group, "dim": 1}, [(4, 6)]
        yield over, runtime.lookup, {"weight": X, "ids": Y, "rows": split}, [(6, 4), ((5, 3), I64)]
        yield over, runtime.lookup, {"weight": X, "ids": Y, "rows": split, "size": 6}, [(6, 4, 2), ((5, 3), I64)]
        yield over, runtime.rms_norm, {"x": X, "group": group, "size": 6, "weight": Y, "eps": 1e-5}, [(4, 6), (6,)]
        yield (
            over,
            runtime.layer_norm,
            {"x": X, "group": group, "size": 6, "weight": Y, "bias": Z},
            [(4, 6), (6,), (6,)],
        )
        loss = {"logits": X, "target": Y, "group": group, "rows": split}
        yield over, runtime.cross_entropy, loss, [(4, 6), ((4,), I64)]
        yield over, runtime.cross_entropy, {**loss, "reduction": "none"}, [(4, 6), ((4,), I64)]
        head = {"x": X, "weight": Y, "target": Z, "group": group, "rows": split}
        yield over, runtime.linear_cross_entropy, head, [(4, 5), (6, 5), ((4,), I64)]
        summed = {**head, "bias": W, "reduction": "sum"}
        yield over, runtime.linear_cross_entropy, summed, [(4, 5), (6, 5), ((4,), I64), (6,)]
        products = {"x": X, "group": group, "weights": (Y, Z), "biases": (W, None)}
        yield over, runtime.entered_linear, products, [(4, 6), (5, 6), (6, 6), (5,)]
        masked = {"x": X, "p": 0.5, "training": True, "rng": RngSlot, "site": 0}
        yield over, runtime.dropout, {**masked, "rows": ((1, 6, split),)}, [(4, 6)]


def dims_of(n: int, names: tuple[str, ...]) -> list[Dim]:
    """Ways in which ranks may hold a dimension: whole, in parts, in strided parts, in parts of two segments."""
    overs = [(name,) for name in names] + ([names] if len(names) > 1 else [])
    found: list[Dim] = [Factor(n)]
    for over in overs:
        found.append(Factor(n, "d", over))
        if n % 2 == 0:
            found.append(Product((Factor(2), Factor(n // 2, "m", over))))
            found.append(Product((Factor(n // 2, "m", over), Factor(2))))
            found.append(Concat((Factor(n // 2, "a", over), Factor(n // 2, "b", over))))
    return found


def drawn(geometry: Geometry, shapes: list[Any], rng: random.Random, over: tuple[str, ...] = ()) -> tuple[Held, ...]:
    """Operands that are held somehow, some of them as the arguments say."""
    names = geometry.names
    sums = rng.choice([(), (names[0],), names[-1:], over])
    known: dict[int, Dim] = {6: Factor(6, "h", over)} if over and rng.random() < 0.6 else {}
    out = []
    for at, said in enumerate(shapes):
        shape, dtype = said if isinstance(said[0], tuple) else (said, F32)
        rows = []
        for n in shape:
            if n not in known or rng.random() < 0.1:
                known[n] = Factor(n) if rng.random() < 0.4 else rng.choice(dims_of(n, names))
            rows.append(geometry.of_dim(known[n] if rng.random() < 0.9 else Factor(n)))
        real = dtype.is_floating_point or dtype.is_complex
        partial = sums if real and rng.random() < (0.6 if at == 0 else 0.4) else ()
        claim = Claim(tuple(rows), ())
        if not set(partial) & set(geometry.moving(claim)):
            claim = Claim(claim.rows, partial)
        out.append(Held(TensorInfo(shape, dtype, real), claim))
    return tuple(out)


def judge(geometry: Geometry, call: Call, given: tuple[Held, ...], rng: random.Random) -> bool:
    """Whether a fact holds for the step; if so, it has been run, and what the fact says of it has been seen."""
    partial = {i for i, g in enumerate(given) if g.claim.partial}
    if len({given[i].claim.partial for i in partial}) > 1 or (partial and not_linear(call, partial) is not None):
        return False
    whole = globalise(call)
    if whole is call and all(g.claim.whole for g in given):
        return False
    try:
        made, _ = Steps(geometry).describe(Cone.of(whole, len(given)), [g.operand for g in given])
    except Exception:
        return False
    fact = certified(geometry, call, whole, given, made)
    if isinstance(fact, Wrong):
        return False
    sampler = Sampler(geometry)
    outs = tuple(None if m is None else Held(m, c) for m, c in zip(made, fact.claims, strict=True))
    seen = sampler.forward(call, whole, given, made, tuple(c.rows for c in fact.claims))
    assert not isinstance(seen, Wrong), f"{call} of {given}: the fact says {fact.claims}, and running it {seen}"
    for m, mine, theirs in zip(made, outs, seen[0], strict=True):
        if m is not None and m.dtype.is_floating_point and "zeros" not in str(call):
            assert mine == theirs, f"{call} of {[str(g.claim) for g in given]}: {mine} is {theirs}"
    for _ in range(3):
        kinds = tuple(
            tuple(n for n in geometry.names if n in geometry.shared(o.claim) and rng.random() < 0.4)
            if o is not None and o.operand.grad
            else None
            for o in outs
        )
        mine_, theirs_ = fact.kinds(geometry, given, kinds), sampler.backward(call, whole, given, outs, seen[1], kinds)
        if isinstance(mine_, Wrong):
            continue
        assert not isinstance(theirs_, Wrong), f"{call} of {given}, {kinds}: {mine_} is {theirs_}"
        for a, b in zip(mine_, theirs_, strict=True):
            assert b is None or a == b, f"{call} of {[str(g.claim) for g in given]}, {kinds}: {mine_} is {theirs_}"
    return True


@pytest.mark.parametrize(("op", "args", "shapes"), CASES, ids=lambda x: str(x) if callable(x) else "")
def test_what_a_fact_says_is_seen_when_ranks_run(op: Any, args: tuple[Any, ...], shapes: list[Any]) -> None:
    assert agree(op, args, shapes, 6)


@pytest.mark.nightly
@pytest.mark.parametrize(("op", "args", "shapes"), CASES, ids=lambda x: str(x) if callable(x) else "")
def test_what_a_fact_says_is_seen_in_many_steps(op: Any, args: tuple[Any, ...], shapes: list[Any]) -> None:
    assert agree(op, args, shapes, 100)


def agree(op: Any, args: tuple[Any, ...], shapes: list[Any], most: int) -> int:
    """How many steps of an operation a fact spoke of, of `most` that were looked for."""
    rng = random.Random(str(op) + str(args))
    held = 0
    for i in range(100 * most):
        if held == most:
            break
        geometry = Geometry(MESHES[i % 2])
        call = make_call(op, args, ())
        names = {n for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, LocalSize) for n in a.dim.over}
        if names <= set(geometry.names):
            held += judge(geometry, call, drawn(geometry, shapes, rng), rng)
    return held


def test_what_a_fact_says_of_an_operator_is_seen_when_ranks_run() -> None:
    held: dict[str, int] = {}
    rng = random.Random(0)
    for over, op, kwargs, shapes in operators():
        found = 0
        for i in range(60):
            geometry = Geometry(MESHES[i % 2])
            if found == 3:
                break
            if not set(over) <= set(geometry.names):
                continue
            call = make_call(op, (), tuple(sorted(kwargs.items())))
            given = drawn(geometry, shapes, rng, over)
            found += judge(geometry, call, given, rng)
        held[op.__name__] = held.get(op.__name__, 0) + found
    assert min(held.values()) >= 2, sorted(held.items())


def test_an_operation_without_a_fact_takes_whole_operands_only() -> None:
    geometry = Geometry(MESHES[0])
    held = geometry.of_dim(Factor(6, "h", ("t",)))
    for op in (aten.fft_fft.default, aten.cdist.default, aten.nonzero.default):
        call = make_call(op, (X, X) if op is aten.cdist.default else (X,), ())
        for rows, known in (((None, None), True), ((None, held), False), ((held, None), False)):
            given = (Held(TensorInfo((6, 6), F32, True), Claim(rows)),)
            made = (TensorInfo((6, 6), F32, True),)
            assert isinstance(certified(geometry, call, call, given, made), Wrong) != known
