"""`overlap: halves`: the same loss and gradients, dropout's masks included; proven, and refused where samples mix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tests.sample import sampled
from tests.test_compile import small
from tpcompiler.api import Sharded, compile_capture
from tpcompiler.capture import capture
from tpcompiler.capture.promote import float64
from tpcompiler.check import check
from tpcompiler.emit import load_source
from tpcompiler.errors import TpcError
from tpcompiler.execute.simulate import executed, run_ranks
from tpcompiler.graphs import copy_graph
from tpcompiler.runtime import Halves, Ranks, Rng, cut_batch, dropout, join_batch, reduce
from tpcompiler.runtime.halves import twins_of
from tpcompiler.spec.schema import Spec
from tpcompiler.train.settings import Train
from tpcompiler.train.step.prepare import prepare

aten = torch.ops.aten
MODELS = ("gpt2", "llama", "bert", "encoder", "seq2seq")


@cache
def compiled(name: str, degree: int, overlap: bool | str) -> Sharded:
    build, inputs = small(name, layers=2)
    spec = Spec.load({"mesh": {"tensor": degree}, "overlap": overlap, "attention_dropout": "exact"})
    return compile_capture(float64(capture(build, inputs)), spec)


def batch_of(name: str, samples: int) -> Any:
    """The model's inputs with so many samples: those of its example, again and again in another order."""
    given = small(name, layers=2)[1]

    def longer(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return torch.cat([t.roll(i, 1) if t.dim() > 1 else t for i in range(samples)])[:samples]

    return pytree.tree_map(longer, given)


def trained(
    sharded: Sharded, inputs: Any, change: Callable[[nn.Module], None] = lambda m: None, log: list[Any] | None = None
) -> list[list[Tensor]]:
    """Each rank's loss and gradients of the emitted program, in training."""
    model = load_source(sharded.source, f"halves_{abs(hash(sharded.source))}").Model

    def on(ranks: Ranks) -> list[Tensor]:
        module = model(ranks, Rng(3).at(2, 12)).double().train()
        generator = torch.Generator().manual_seed(ranks.rank)
        with torch.no_grad():
            for p in module.parameters():
                p.normal_(std=0.3, generator=generator)
            for b in module.buffers():
                b.normal_(generator=generator)
        change(module)
        args, kwargs = inputs if isinstance(inputs, tuple) and isinstance(inputs[-1], dict) else ((), inputs)
        out = module(*args, **kwargs)
        loss: Any = sum(t.double().square().sum() for t in pytree.tree_leaves(out) if isinstance(t, Tensor))
        loss.backward()
        return [loss.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]

    return run_ranks(sharded.program.mesh, on, log)


def same(mine: list[list[Tensor]], others: list[list[Tensor]]) -> None:
    for a, b in zip(mine, others, strict=True):
        assert len(a) == len(b) > 10, [len(a), len(b)]
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "degree", "samples"),
    [
        *(("gpt2", *case) for case in ((1, 2), (2, 4), (2, 3))),
        ("llama", 2, 2),
        *(pytest.param(name, 3, 4, marks=pytest.mark.nightly) for name in MODELS),
        *(pytest.param(name, 2, 6, marks=pytest.mark.nightly) for name in MODELS),
    ],
)
def test_loss_and_gradients_stay_with_dropout(name: str, degree: int, samples: int) -> None:
    """An odd batch stays whole."""
    inputs = batch_of(name, samples)
    log: list[Any] = []
    same(trained(compiled(name, degree, "halves"), inputs, log=log), trained(compiled(name, degree, False), inputs))
    program = compiled(name, degree, "halves").program
    reduces, listed = (
        [c for c in found if c.kind == "all_reduce" and c.direction == "forward"]
        for found in (executed(log), program.collectives)
    )
    assert len(reduces) == len(listed) + sum(c.halved for c in listed) * (samples % 2 == 0)
    assert degree == 1 or any(c.halved for c in listed)


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_it_computes_the_same_again_in_backward(recompute: Any) -> None:
    train = Train(activation_checkpointing=recompute, compile="none")
    inputs = batch_of("gpt2", 4)
    mine = trained(compiled("gpt2", 2, "halves"), inputs, lambda m: prepare(m, train, hooked=False))
    same(mine, trained(compiled("gpt2", 2, False), inputs))


def test_a_second_half_follows_the_first_in_mode_and_parameters() -> None:
    sharded, inputs = compiled("gpt2", 2, "halves"), batch_of("gpt2", 4)
    model = load_source(sharded.source, "halves_modes").Model

    def on(ranks: Ranks) -> None:
        module: Any = model(ranks, Rng(1)).double()
        twins = twins_of(module)
        assert len(twins) == 2
        assert not {id(m) for m in module.modules()} & {id(t) for t in twins}
        with torch.no_grad():
            before = [module.train()(**inputs), module.eval()(**inputs)]
            module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()})
            after = module(**inputs)
        assert len({float(x) for x in (*before, after)}) == 3
        for twin, layer in zip(twins, module.h, strict=True):
            assert not any(m.training for m in twin.modules())
            assert all(p is q for p, q in zip(twin.parameters(), layer.parameters(), strict=True))

    run_ranks(sharded.program.mesh, on)


def test_layers_with_hooks_stay_whole() -> None:
    called: list[int] = []

    def watch(module: Any) -> None:
        module.h[0].register_forward_pre_hook(lambda m, args: called.append(args[0].shape[0]))

    inputs = batch_of("gpt2", 4)
    same(trained(compiled("gpt2", 2, "halves"), inputs, watch), trained(compiled("gpt2", 2, False), inputs))
    assert called == [4, 4]


@pytest.mark.parametrize("name", sampled(MODELS, 3))
def test_the_checker_proves_it(name: str) -> None:
    sharded = compiled(name, 2, "halves")
    assert "Halves(" in sharded.source
    assert sharded.check.passed, sharded.check.refused


def test_without_a_list_of_layers_there_is_a_reason() -> None:
    spec = Spec.load({"mesh": {"tensor": 2}, "overlap": "halves"})
    with pytest.raises(TpcError, match=r"overlap: halves is not possible: .*overlap: true would work"):
        compile_capture(capture(*Unlisted.small()), spec)


class Unlisted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())

    @staticmethod
    def small() -> Any:
        return Unlisted, (torch.randn(2, 3, 8),)


# -- faults: in graphs, the model's alike, so that nothing but the halves is at fault ---------------------------------


class Mixing(nn.Module):
    """Layers whose samples are apart but for `mix`."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MixingLayer(mix) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class MixingLayer(nn.Module):
    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mix, self.norm = mix, nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.wide, self.narrow = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.down(self.up(self.norm(x)).relu()))
        return x + self.narrow(self.wide(self.norm(x)).sigmoid().square() * 2).tanh()


@pytest.mark.parametrize(
    ("mix", "fine"),
    [
        (lambda y: y.softmax(1), True),
        (lambda y: y.flatten(1).unflatten(1, (-1, 8)), True),
        (lambda y: y.transpose(0, 1).cumsum(0).transpose(0, 1), True),
        (lambda y: y - y.mean(1, keepdim=True), True),
        (lambda y: y @ y.transpose(1, 2) @ y, True),
        (lambda y: y.transpose(0, 1).flatten(0, 1).unflatten(0, (3, -1)).transpose(0, 1), True),
        (lambda y: y + torch.arange(y.shape[1])[:, None].to(y.dtype), True),
        (lambda y: y + torch.arange(y.shape[0])[:, None, None].to(y.dtype), False),
        (lambda y: y.softmax(0), False),
        (lambda y: y.cumsum(0), False),
        (lambda y: y.flip(0), False),
        (lambda y: y - y.mean(0, keepdim=True), False),
        (lambda y: y * y.sum(), False),
        (lambda y: y / y.shape[0], False),
        (lambda y: y + torch.arange(y.shape[0])[:, None, None], False),
        (lambda y: (y.transpose(0, 1) @ y.permute(1, 2, 0) @ y.transpose(0, 1)).transpose(0, 1), False),
        (lambda y: y.transpose(0, 1).reshape(y.shape), False),
        (lambda y: torch.cat([y[1:], y[:1]]), False),
        (lambda y: y + y.sort(0).values, False),
    ],
)
def test_samples_that_meet_are_refused(mix: Callable[[Tensor], Tensor], fine: bool) -> None:
    spec = Spec.load({"mesh": {"tensor": 2}, "overlap": "halves"})
    found = check(compile_capture(capture(lambda: Mixing(mix), (torch.randn(4, 3, 8),)), spec).program)
    assert found.passed is fine, found.refused
    if not fine:
        assert "samples of a batch that are computed apart" in str(found.refused[0])


def moved_cut(graph: fx.Graph) -> None:
    """The cut stands before another value."""
    cut = next(n for n in graph.nodes if n.target is cut_batch)
    weight = next(n for n in graph.nodes if n.op == "placeholder" and n.meta["val"].dim() == 2)
    cut.args = (weight,)


def no_join(graph: fx.Graph) -> None:
    join = next(n for n in graph.nodes if n.target is join_batch)
    join.replace_all_uses_with(join.args[0])
    graph.erase_node(join)


def no_cut(graph: fx.Graph) -> None:
    cut = next(n for n in graph.nodes if n.target is cut_batch)
    cut.replace_all_uses_with(cut.args[0])
    graph.erase_node(cut)


def early_join(graph: fx.Graph) -> None:
    """What is joined is read on as a half."""
    made = [n for n in graph.nodes if n.target is reduce][1]
    with graph.inserting_after(made):
        joined = graph.call_function(join_batch, (made,))
    joined.meta = dict(made.meta)
    made.replace_all_uses_with(joined, lambda u: u is not joined)


def one_mask(graph: fx.Graph) -> None:
    """Dropout between the marks that does not count samples."""
    drops = [n for n in graph.nodes if n.target is dropout]
    drops[1].kwargs = {**drops[1].kwargs, "batch_dim": None}


@pytest.mark.parametrize("change", [moved_cut, no_join, no_cut, early_join, one_mask])
def test_the_checker_refuses_faults_in_graphs(change: Callable[[fx.Graph], None]) -> None:
    program = compiled("gpt2", 2, "halves").program
    graph = copy_graph(program.graph)
    change(graph)
    assert not check(replace(program, graph=graph), source=compiled("gpt2", 2, "halves").source).passed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Halves(self.layers, ranks, cut=(0, 1))", "Halves(self.layers, ranks)"),
        ("Halves(self.layers, ranks, cut=(0, 1))", "Halves(self.layers, ranks, cut=(1,))"),
        ("Halves(self.layers, ranks, cut=(0, 1))", "Halves(self.layers[1:], ranks, cut=(0, 1))"),
        ("self.halves(y, mask)", "self.layers[1](self.layers[0](y, mask), mask)"),
        ("self.halves(y, mask)", "self.halves(self.halves(y, mask), mask)"),
    ],
)
def test_the_checker_refuses_faults_in_sources(old: str, new: str) -> None:
    sharded = compiled("bert", 2, "halves")
    assert sharded.source.count(old) == 1
    assert not check(sharded.program, source=sharded.source.replace(old, new)).passed


def test_a_stand_in_computes_what_the_loop_does() -> None:
    layers = [nn.Linear(4, 4).double() for _ in range(3)]
    x = torch.randn(6, 4, dtype=torch.float64)
    expected = layers[2](layers[1](layers[0](x)))
    torch.testing.assert_close(Halves(layers, Ranks.single())(x), expected)
