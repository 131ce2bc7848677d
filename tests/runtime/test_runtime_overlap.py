"""`entered_linear` is `enter` and products to the bit, and its weights' gradients are computed under the all-reduce."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_compile import small
from tpcompiler.api import Sharded, compile_capture
from tpcompiler.capture import capture
from tpcompiler.capture.promote import float64
from tpcompiler.check import check
from tpcompiler.emit import load_source
from tpcompiler.execute.simulate import Executed, executed, run_ranks
from tpcompiler.graphs import copy_graph
from tpcompiler.runtime import Group, Mesh, Ranks, Rng, enter, entered_linear
from tpcompiler.runtime.groups import FORWARD
from tpcompiler.spec.schema import Spec

Operands = tuple[Tensor, list[Tensor], list[Tensor | None]]


def operands(rank: int, dtype: torch.dtype, frozen: tuple[str, ...] = ()) -> Operands:
    """An input that all ranks share; three products of a rank's own, the second without a bias."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)
    x = torch.randn(3, 5, 8, generator=shared, dtype=dtype)
    weights = [torch.randn(n, 8, generator=own, dtype=dtype) for n in (4, 6, 2)]
    biases = [torch.randn(n, generator=own, dtype=dtype) if n != 6 else None for n in (4, 6, 2)]
    x.requires_grad_("x" not in frozen)
    for i, w in enumerate(weights):
        w.requires_grad_(f"w{i}" not in frozen)
    return x, weights, [None if b is None else b.requires_grad_() for b in biases]


def apart(x: Tensor, group: Group, weights: list[Tensor], biases: list[Tensor | None]) -> tuple[Tensor, ...]:
    entered = enter(x, group)
    return tuple(F.linear(entered, w, b) for w, b in zip(weights, biases, strict=True))


def results(how: Any, group: Group, given: Operands) -> list[Tensor | None]:
    """Outputs, and gradients of all operands."""
    x, weights, biases = given
    made = how(x, group, weights, biases)
    upstream = torch.Generator().manual_seed(9 + group.index)
    torch.autograd.backward(made, [torch.randn(y.shape, generator=upstream, dtype=y.dtype) for y in made])
    leaves = [x, *weights, *(b for b in biases if b is not None)]
    return [*(y.detach() for y in made), *(t.grad for t in leaves)]


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("frozen", [(), ("w1",), ("x",)])
def test_it_is_enter_and_products_to_the_bit(degree: int, dtype: torch.dtype, frozen: tuple[str, ...]) -> None:
    def on(ranks: Ranks) -> None:
        group = ranks.group("tensor")
        mine = results(entered_linear, group, operands(group.index, dtype, frozen))
        plain = results(apart, group, operands(group.index, dtype, frozen))
        for a, b in zip(mine, plain, strict=True):
            assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))

    log: list[Executed] = []
    run_ranks(Mesh.of({"tensor": degree}), on, log)
    sent = 0 if degree == 1 or "x" in frozen else 2  # one backward all-reduce each; of what is frozen none
    assert len(executed(log)) == sent


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


class Slow(Group):
    """A group whose sums are under way until `finish`; knows how many products were computed by then."""

    def __init__(self, products: Products) -> None:
        super().__init__(2, 0, ("tensor",))
        self.products = products
        self.seen: list[int] = []

    def begin_all_reduce(self, x: Tensor, direction: str = FORWARD) -> Tensor:
        self.seen.append(self.products.count)
        return x.clone()

    def finish(self, x: Tensor) -> Tensor:
        self.seen.append(self.products.count)
        return x


def test_the_weights_gradients_are_computed_meanwhile() -> None:
    products = Products()
    group = Slow(products)
    with products:
        x, weights, biases = operands(0, torch.float64)
        made = entered_linear(x, group, weights, biases)
        products.count = 0
        torch.autograd.backward(made, [torch.ones_like(y) for y in made])
    assert group.seen == [3, 6]


def compiled(name: str, degree: int, overlap: bool) -> Sharded:
    build, inputs = small(name, layers=2)
    spec = Spec.load({"mesh": {"tensor": degree}, "overlap": overlap, "attention_dropout": "exact"})
    return compile_capture(float64(capture(build, inputs)), spec)


def trained(sharded: Sharded, inputs: Any) -> list[list[Tensor]]:
    """Each rank's loss and gradients of the emitted program, in training."""
    model = load_source(sharded.source, "overlapped").Model

    def on(ranks: Ranks) -> list[Tensor]:
        module = model(ranks, Rng(3)).double().train()
        generator = torch.Generator().manual_seed(ranks.rank)
        with torch.no_grad():
            for p in module.parameters():
                p.normal_(std=0.3, generator=generator)
        args, kwargs = inputs if isinstance(inputs, tuple) and isinstance(inputs[-1], dict) else ((), inputs)
        out = module(*args, **kwargs)
        loss = sum(t.double().sum() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
        loss.backward()  # type: ignore[union-attr]
        return [loss.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]  # type: ignore[union-attr]

    return run_ranks(sharded.program.mesh, on)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_programs_loss_and_gradients_stay_with_dropout(degree: int) -> None:
    inputs = small("gpt2", layers=2)[1]
    without, beside = (trained(compiled("gpt2", degree, o), inputs) for o in (False, True))
    for a, b in zip(without, beside, strict=True):
        assert len(a) == len(b) > 10, [len(a), len(b)]
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_checker_proves_it_and_refuses_faults(name: str) -> None:
    sharded = compiled(name, 2, True)
    assert "entered_linear(" in sharded.source
    assert check(sharded.program, source=sharded.source).passed
    nodes = [n for n in sharded.program.graph.nodes if n.target is entered_linear]
    assert nodes
    assert not [n for n in sharded.program.graph.nodes if n.target is enter and n.users]
    for site in (nodes[0], nodes[1]):
        for change in (alone, other_weight):
            graph = copy_graph(sharded.program.graph)
            node = next(n for n in graph.nodes if n.name == site.name)
            change(node)
            assert not check(replace(sharded.program, graph=graph)).passed, change.__name__


def alone(node: Any) -> None:
    """The gradient is not summed."""
    node.update_arg(1, ())


def other_weight(node: Any) -> None:
    """A product with twice the weight."""
    x, group, weights, biases = node.args
    graph = node.graph
    with graph.inserting_before(node):
        twice = graph.call_function(torch.ops.aten.mul.Tensor, (weights[0], 2))
    twice.meta = dict(weights[0].meta)
    node.args = (x, group, (twice, *weights[1:]), biases)


def test_without_the_option_nothing_changes() -> None:
    assert "entered_linear" not in compiled("gpt2", 2, False).source
