"""Steps as CUDA graphs: when they are recorded, and that a replayed run is the run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.train.train_runs import GPT2, ROOT, TRAIN, compile_once
from tpcompiler.capture import capture
from tpcompiler.load.model import load_model
from tpcompiler.runtime import Ranks
from tpcompiler.spec.schema import Spec
from tpcompiler.train.data.batches import Corpus, open_corpus
from tpcompiler.train.hold.owned import from_constructor
from tpcompiler.train.hold.storage import PlainStorage
from tpcompiler.train.settings import Train
from tpcompiler.train.step.compiled import loss_output, training_inputs
from tpcompiler.train.step.engine import Engine
from tpcompiler.train.step.replay import Device, Graph, Recorder, steady


class Simulated:
    """Records without a device: a recording leaves all `tensors` as they were, a replay runs the function again and
    fills the recording's result."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]] = tuple, waits: bool = False) -> None:
        self.tensors, self.waits, self.replays = tensors, waits, 0

    def watch(self, fn: Callable[[], Any]) -> tuple[Any, bool]:
        return fn(), self.waits

    def record(self, fn: Callable[[], Any]) -> tuple[Graph, Any]:
        before = [(t, t.detach().clone()) for t in self.tensors()]
        result = fn()
        with torch.no_grad():
            for t, value in before:
                t.copy_(value)
                t.grad = None  # else the replay would add to it, which a device's does not
        return Again(self, fn, result), result


class Again:
    def __init__(self, on: Simulated, fn: Callable[[], Any], result: Any) -> None:
        self.on, self.fn, self.result = on, fn, result

    def replay(self) -> None:
        self.on.replays += 1
        for mine, found in zip(tree_leaves(self.result), tree_leaves(self.fn()), strict=True):
            mine.copy_(found)


def test_a_function_runs_twice_and_is_then_replayed_on_the_new_inputs() -> None:
    simulated = Simulated()
    recorder = Recorder(simulated)
    recorded = []
    for n in range(5):
        assert torch.equal(recorder(lambda x: x * 2, torch.full((3,), float(n))), torch.full((3,), 2.0 * n))
        recorded.append(recorder.recorded)
    assert recorded == [False, False, True, True, True]
    assert simulated.replays == 3


@pytest.mark.parametrize("on", [Simulated(waits=True), None])
def test_what_waits_for_the_device_is_never_recorded(on: Simulated | None) -> None:
    recorder = Recorder(on)
    assert all(float(recorder(lambda x: x + 1, torch.full((1,), float(n)))) == n + 1 for n in range(5))
    assert not recorder.recorded


class Picking(nn.Module):
    """Computes on those rows alone that are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x[x.sum(-1) > 0] * self.weight).sum()


class Plain(Picking):
    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum()


def test_a_program_whose_sizes_follow_from_values_is_not_recorded() -> None:
    assert steady(capture(Plain, ((torch.randn(3, 4),), {})).graph)
    assert not steady(capture(Picking, ((torch.randn(3, 4),), {})).graph)


GPU = torch.device("cuda", 0)


def started(device: torch.device, attention_dropout: str = "exact", **train: Any) -> tuple[Engine, Corpus]:
    """A small GPT-2 in 16 bits, dropout on."""
    sizes = {**GPT2, "model": {**GPT2["model"], "hidden": 64, "dropout": 0.1}}
    settings = {**TRAIN, "precision": "bf16", "batch": 8, "micro_batch": 8, **train}
    spec = Spec.load({"mesh": {"tensor": 1}, **sizes, "attention_dropout": attention_dropout, "train": settings})
    wanted = spec.section(Train)
    loaded = load_model(str(ROOT / "models" / "gpt2.py"), spec)
    corpus = open_corpus(wanted)
    compiled = compile_once(loaded, spec, training_inputs(loaded, corpus.train.batch_at(0, 0).tensors), loss_output)
    engine = Engine(compiled, Ranks(compiled.sharded.program.mesh, 0), wanted, 0, device)
    engine.fill(from_constructor(lambda name: compiled.recorded.replay(name, 0)))
    return engine, corpus


def run(engine: Engine, corpus: Corpus, steps: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, norms and final masters; an evaluation in between, which is on another stream."""
    losses, norms = [], []
    for step in range(steps):
        batches = [corpus.train.batch_at(step, m).to(engine.device) for m in range(corpus.train.micro_batches(1))]
        outcome = engine.step(step, batches)
        losses.append(float(outcome.loss))
        norms.append(float(outcome.norm))
        if step == 4 and corpus.validation is not None:
            engine.evaluate(corpus.validation, 1)
    return losses, norms, {n: m.detach().clone() for n, m in engine.storage.masters.items()}


def changing(engine: Engine) -> Iterator[Tensor]:
    """What a step changes in place."""
    held = engine.storage
    assert isinstance(held, PlainStorage)
    yield from held.masters.values()
    yield from held._parameters.values()
    yield from held._totals
    for name in held.masters:
        yield from held.update.moments(name).values()


@pytest.mark.parametrize("micro_batch", [8, 4])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_simulated_recording_is_the_run_to_the_bit(micro_batch: int, precision: str) -> None:
    settings = {"micro_batch": micro_batch, "precision": precision, "evaluation": {"batches": 1}}
    issued = run(*started(torch.device("cpu"), **settings), steps=8)
    engine, corpus = started(torch.device("cpu"), **settings)
    simulated = Simulated(lambda: changing(engine))
    engine._micro_batch, engine._optimizer_step = Recorder(simulated), Recorder(simulated)
    replayed = run(engine, corpus, 8)
    assert engine.recorded
    assert engine._optimizer_step.recorded == (precision == "bf16")
    assert replayed[:2] == issued[:2]
    assert all(torch.equal(replayed[2][name], master) for name, master in issued[2].items())


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["none", "layers", "whole"])
@pytest.mark.parametrize("micro_batch", [8, 4, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_replayed_run_is_the_run(compile: str, micro_batch: int, precision: str) -> None:
    settings = {"compile": compile, "micro_batch": micro_batch, "precision": precision, "evaluation": {"batches": 1}}
    issued = run(*started(GPU, **settings, cuda_graphs=False), steps=10)
    engine, corpus = started(GPU, **settings)
    replayed = run(engine, corpus, 10)
    assert engine.recorded == (micro_batch != 3)  # 3, 3 and 2 are not the same work
    # Scatters of gradients add in any order; all else is the same bits.
    torch.testing.assert_close(torch.tensor(replayed[0]), torch.tensor(issued[0]), rtol=2e-3, atol=0.0)
    torch.testing.assert_close(torch.tensor(replayed[1]), torch.tensor(issued[1]), rtol=2e-2, atol=0.0)
    for name, master in issued[2].items():
        torch.testing.assert_close(replayed[2][name], master, rtol=0.0, atol=2e-2, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["none", "layers", "whole"])
@pytest.mark.parametrize("recompute", ["layer", "attention"])
def test_a_replayed_run_that_computes_again_is_the_run(compile: str, recompute: str) -> None:
    settings = {"compile": compile, "activation_checkpointing": recompute, "micro_batch": 4}
    issued = run(*started(GPU, **settings, cuda_graphs=False), steps=8)
    engine, corpus = started(GPU, **settings)
    replayed = run(engine, corpus, 8)
    assert engine.recorded
    torch.testing.assert_close(torch.tensor(replayed[0]), torch.tensor(issued[0]), rtol=2e-3, atol=0.0)


@pytest.mark.parametrize(
    ("dropout", "recompute", "repeats"),
    [("exact", "layer", True), ("fused", "layer", False), ("fused", "none", True)],
)
def test_what_draws_from_torch_and_is_computed_again_is_not_recorded(
    dropout: str, recompute: str, repeats: bool
) -> None:
    engine, _ = started(torch.device("cpu"), dropout, activation_checkpointing=recompute)
    assert engine._repeats() == repeats


@pytest.mark.gpu
@pytest.mark.parametrize(
    "setting", [{"activation_checkpointing": "layer", "attention_dropout": "fused"}, {"precision": "fp32"}]
)
def test_what_is_not_the_same_work_every_time_is_not_recorded(setting: dict[str, Any]) -> None:
    engine, corpus = started(GPU, **setting)
    run(engine, corpus, 4)
    assert not engine.recorded


@pytest.mark.gpu
@pytest.mark.parametrize("waits", [True, False])
def test_gpus_tell_what_waits_for_them(waits: bool) -> None:
    device = Device(GPU)
    recorder = Recorder(device)
    weight = torch.ones(3, device=GPU, requires_grad=True)

    def double(x: Tensor) -> Tensor:
        weight.grad = None
        (x * weight).sum().backward()  # its backward waits, if anything does
        return x * 2.0

    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return g * float(g.sum())

    def slow(x: Tensor) -> Tensor:
        return double(Waits.apply(x * weight)).detach()

    with device.running():
        for n in range(5):
            result = recorder(slow if waits else double, torch.full((3,), float(n), device=GPU))
            assert result.tolist() == [2.0 * n] * 3
    assert recorder.recorded != waits


FAILING = """
import torch
from tpcompiler.train.step.replay import Device
device, x = Device(torch.device("cuda", 0)), torch.ones(3, device="cuda")
with device.running():
    device.record(lambda: x * float(x.sum()))
"""


@pytest.mark.gpu
def test_a_failed_recording_says_what_would_work() -> None:
    """In a process of its own: CUDA does not recover from it."""
    done = subprocess.run([sys.executable, "-c", FAILING], cwd=ROOT, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if "TpcError" in line]
    assert "cannot be recorded" in said[-1], done.stderr
    assert said[-1].endswith("train.cuda_graphs: false would work")
