"""Ranks as threads: sums in one order, everything recorded, and no way to hang."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tpcompiler import runtime
from tpcompiler.errors import TpcError
from tpcompiler.execute.simulate import (
    CollectiveError,
    Executed,
    bind_inputs,
    executed,
    interpret,
    interpret_capture,
    run_ranks,
)
from tpcompiler.layout import Dim, Factor, LocalRuns, LocalSize
from tpcompiler.program import Capture, InputLeaf, Parameter, Program, Training
from tpcompiler.runtime import Group, Mesh, Ranks, Rng, enter, reduce

aten = torch.ops.aten
PAIR = Mesh.of({"tensor": 2})


@given(data=st.integers(1, 2), kv=st.integers(1, 3), heads=st.integers(1, 2), swap=st.booleans())
def test_groups_are_those_of_the_mesh(data: int, kv: int, heads: int, swap: bool) -> None:
    mesh = Mesh.of({"data": data, "kv": kv, "heads": heads})
    over = ("heads", "kv") if swap else ("kv", "heads")

    def fn(ranks: Ranks) -> list[int]:
        group = ranks.group(*over)
        assert ranks.group(over) is group
        assert (group.size, group.index) == (kv * heads, mesh.index(over, ranks.coords))
        assert ranks.group("data").size == data
        return [int(i) for i in group.all_gather(torch.tensor([ranks.rank]), 0)]

    for rank, members in enumerate(run_ranks(mesh, fn)):
        assert tuple(members) == mesh.group(over, rank)


@given(
    degree=st.integers(2, 4),
    sizes=st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(lambda s: sum(s[:2]) > 0),
    dim=st.integers(-2, 1),
    dtype=st.sampled_from([torch.float64, torch.bfloat16, torch.int64]),
)
def test_collectives_are_what_their_names_say(degree: int, sizes: list[int], dim: int, dtype: torch.dtype) -> None:
    sizes = sizes[:degree]
    shapes = [[2, n] if dim % 2 else [n, 2] for n in sizes]
    parts = [torch.randn(s).mul(9).to(dtype) for s in shapes]
    wholes = [torch.randn(torch.cat(parts, dim).shape).mul(9).to(dtype) for _ in range(degree)]
    total = sum(wholes[1:], wholes[0])

    def fn(ranks: Ranks) -> list[Tensor]:
        g = ranks.group("tensor")
        whole = wholes[g.index].T.contiguous().T
        return [
            g.all_gather(parts[g.index], dim, sizes),
            g.all_reduce(whole),
            g.all_reduce(whole, "max"),
            g.reduce_scatter(whole, dim, sizes),
        ]

    for i, (gathered, summed, largest, scattered) in enumerate(run_ranks(Mesh.of({"tensor": degree}), fn)):
        assert torch.equal(gathered, torch.cat(parts, dim))
        assert torch.equal(summed, total)
        assert torch.equal(largest, torch.stack(wholes).amax(0))
        assert torch.equal(scattered, torch.split(total, sizes, dim)[i])


def test_results_belong_to_each_rank_alone() -> None:
    def fn(ranks: Ranks) -> list[Tensor]:
        g = ranks.group("tensor")
        x = torch.ones(3)
        results = [g.all_reduce(x), g.all_gather(x, 0)]
        x.add_(ranks.rank)
        for r in results:
            r.add_(ranks.rank)
        g.all_reduce(x)
        return results

    for rank, (summed, gathered) in enumerate(run_ranks(PAIR, fn)):
        assert torch.equal(summed, torch.full((3,), 2.0 + rank))
        assert torch.equal(gathered, torch.full((6,), 1.0 + rank))


def test_what_is_done_is_recorded() -> None:
    def fn(ranks: Ranks) -> None:
        g = ranks.group("tensor").labelled("mlp")
        x = torch.ones(3, 2, dtype=torch.bfloat16, requires_grad=True)
        reduce(enter(x, g).exp(), g).sum().backward()

    log: list[Executed] = []
    run_ranks(Mesh.of({"data": 2, "tensor": 2}), fn, log)
    assert {r.ranks for r in log} == {(0, 1), (2, 3)}
    for rank in range(4):
        mine = executed(log, rank)
        assert [(r.kind, r.op, r.direction, r.over, r.label) for r in mine] == [
            ("all_reduce", "sum", "forward", ("tensor",), "mlp"),
            ("all_reduce", "sum", "backward", ("tensor",), "mlp"),
        ]
        assert all(r.shape == (3, 2) and r.bytes == 12 for r in mine)


def test_backward_runs_in_the_thread_of_its_rank() -> None:
    seen: list[tuple[str, str]] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.thread = threading.current_thread().name
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.append((ctx.thread, threading.current_thread().name))
            return grad

    run_ranks(PAIR, lambda ranks: Look.apply(torch.ones(1, requires_grad=True)).backward())
    assert len({forward for forward, _ in seen}) == 2
    assert all(forward == backward for forward, backward in seen)


def test_threads_take_over_gradient_mode_and_device() -> None:
    with torch.no_grad(), torch.device("meta"):
        assert run_ranks(PAIR, lambda r: (torch.is_grad_enabled(), torch.ones(1).is_meta)) == [(False, True)] * 2
    assert run_ranks(PAIR, lambda r: (torch.is_grad_enabled(), torch.ones(1).is_meta)) == [(True, False)] * 2


MISMATCHES: dict[str, tuple[Callable[[Group], object], list[str]]] = {
    "shape": (lambda g: g.all_reduce(torch.ones(2 + g.index)), ["rank 0", "[2]", "rank 1", "[3]"]),
    "dtype": (lambda g: g.all_reduce(torch.ones(2, dtype=[torch.half, torch.float][g.index])), ["float16", "float32"]),
    "op": (lambda g: g.all_reduce(torch.ones(2), ["sum", "max"][g.index]), ["all_reduce(sum)", "all_reduce(max)"]),
    "kind": (
        lambda g: g.all_reduce(torch.ones(2)) if g.index else g.all_gather(torch.ones(1), 0),
        ["all_gather", "all_reduce"],
    ),
    "dimension": (lambda g: g.all_gather(torch.ones(2, 2), g.index), ["dimension 0", "dimension 1"]),
    "label": (lambda g: g.labelled("ab"[g.index]).all_reduce(torch.ones(2)), ["'a'", "'b'"]),
    "missing": (lambda g: g.all_reduce(torch.ones(2)) if g.index else None, ["rank 1 waits", "rank 0 has ended"]),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_collectives_that_do_not_match_are_told(case: str) -> None:
    fn, words = MISMATCHES[case]
    with pytest.raises(CollectiveError) as e:
        run_ranks(PAIR, lambda ranks: fn(ranks.group("tensor")))
    assert all(word in str(e.value) for word in words), str(e.value)
    assert "\n" not in str(e.value)


def test_ranks_that_wait_for_each_other_are_told() -> None:
    def fn(ranks: Ranks) -> None:
        names = ["kv", "heads"]
        for name in names if ranks.rank in (0, 3) else reversed(names):
            ranks.group(name).all_reduce(torch.ones(1))

    with pytest.raises(CollectiveError, match="for ever"):
        run_ranks(Mesh.of({"kv": 2, "heads": 2}), fn)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_first_failure_ends_all_ranks(where: str) -> None:
    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, rank: int) -> Tensor:
            ctx.rank = rank
            if where == "forward" and rank == 1:
                raise ZeroDivisionError
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            if ctx.rank == 1:
                raise ZeroDivisionError
            return grad, None

    def fn(ranks: Ranks) -> None:
        x = torch.ones(1, requires_grad=True)
        try:
            y = enter(x, ranks.group("tensor"))
            reduce(Fail.apply(y, ranks.rank), ranks.group("tensor")).backward()
        except RuntimeError:  # a rank that handles errors of its own is ended all the same
            return

    with pytest.raises(ZeroDivisionError) as e:
        run_ranks(Mesh.of({"tensor": 3}), fn)
    assert "on rank 1" in e.value.__notes__[0]
    assert not [t for t in threading.enumerate() if t.name.startswith("rank-")]


def test_an_unknown_mesh_dimension_is_told() -> None:
    with pytest.raises(TpcError, match=r"'pipeline'.*tensor 2"):
        run_ranks(PAIR, lambda ranks: ranks.group("pipeline"))


FF = Factor(7, "ff", ("tensor",))


def mlp(degree: int) -> Program:
    """An MLP with everything that `interpret` resolves: sizes, rows, modes, groups, random numbers, factories."""
    g: Any = fx.Graph()  # the type of its arguments has no place for ours
    up, down, bias, x = (g.placeholder(n) for n in ("up", "down", "bias", "x"))
    batch = g.call_function(aten.sym_size.int, (x, 0))
    h = g.call_function(aten.linear.default, (g.call_function(runtime.enter, (x, ("tensor",))), up))
    zeros = g.call_function(aten.zeros.default, ([batch, LocalSize(FF)],), {"dtype": torch.float64, "device": None})
    h = g.call_function(aten.add.Tensor, (g.call_function(aten.view.default, (h, [batch, LocalSize(FF)])), zeros))
    h = g.call_function(runtime.dropout, (h, 0.5, Training(True, False), None, 3, ((1, 7, LocalRuns(FF)),)))
    y = g.call_function(runtime.reduce, (g.call_function(aten.linear.default, (h, down)), ("tensor",)))
    y = g.call_function(aten.add.Tensor, (y, bias))
    whole = g.call_function(runtime.gather, (h, ("tensor",), 1, LocalRuns(FF)))
    g.output((y, whole))
    double = torch.float64
    parameters = (
        Parameter("up", "up", (7, 5), double, aliases=("mlp.up",)),
        Parameter("down", "down", (5, 7), double),
        Parameter("bias", "bias", (5,), double, buffer=True, value=torch.ones(5, dtype=double)),
    )
    spec = pytree.tree_structure(((1, 2), {}))
    capture = Capture(g, parameters, ("x",), spec, spec, (InputLeaf("x"), 4), "MLP", "mlp.py", ("x", "n"))
    dims: dict[str, tuple[Dim, ...]] = {"up": (FF, Factor(5)), "down": (Factor(5), FF)}
    return Program(g, Mesh.of({"tensor": degree}), capture, dims)


@pytest.mark.parametrize("training", [True, False])
def test_interpret_gives_the_same_at_every_degree(training: bool) -> None:
    up, down = torch.randn(7, 5, dtype=torch.double), torch.randn(5, 7, dtype=torch.double)
    x = torch.randn(4, 5, dtype=torch.double)

    def run(degree: int, ranks: Ranks) -> list[Tensor]:
        start, stop = ranks.group("tensor").part(7)
        program, mine = mlp(degree), x.clone().requires_grad_()
        state = {"mlp.up": up[start:stop], "down": down[:, start:stop]}
        inputs = bind_inputs(program.capture, mine, 4)
        y, whole = interpret(program, ranks, state, inputs, training=training, rng=Rng(1).at(4))
        y.sum().backward()
        assert mine.grad is not None
        return [y.detach(), whole, mine.grad]

    (plain,) = run_ranks(Mesh.of({"tensor": 1}), lambda ranks: run(1, ranks))
    assert bool((plain[1] == 0).any()) == training
    for degree in (2, 3):
        log: list[Executed] = []
        mesh = Mesh.of({"tensor": degree})
        for mine in run_ranks(mesh, lambda ranks, degree=degree: run(degree, ranks), log):  # type: ignore[misc]
            for ours, expected in zip(mine, plain, strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)
        assert [(r.direction, r.kind, r.label) for r in log] == [
            ("forward", "all_reduce", "reduce"),
            ("forward", "all_gather", "gather"),
            ("backward", "all_reduce", "enter"),
        ]


def test_interpret_capture_runs_the_plain_graph() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, torch.arange(3.0)[None]]).sum(0)

    graph = torch.export.export(Model(), (torch.ones(2, 3),)).graph
    spec = pytree.tree_structure(((1,), {}))
    capture = Capture(graph, (), ("x",), spec, spec, (InputLeaf("x"),), "Model", "model.py", ("x",))
    (y,) = interpret_capture(capture, {}, [torch.ones(2, 3)])
    assert torch.equal(y, torch.tensor([2.0, 3.0, 4.0]))


def test_interpret_says_what_is_missing() -> None:
    program, ranks = mlp(1), Ranks(Mesh.of({"tensor": 1}), 0)
    state = {"up": torch.ones(7, 5).double(), "down": torch.ones(5, 7).double()}
    x = torch.ones(4, 5).double()
    with pytest.raises(TpcError, match="'down'"):
        interpret(program, ranks, {"up": state["up"]}, [x])
    with pytest.raises(TpcError, match="'x'"):
        interpret(program, ranks, state, {})
    with pytest.raises(TpcError, match="Rng"):
        interpret(program, ranks, state, [x], training=True)
    with pytest.raises(TpcError, match="constant 4"):
        bind_inputs(program.capture, x, 5)
    with pytest.raises(TpcError, match="other arguments"):
        bind_inputs(program.capture, x)
