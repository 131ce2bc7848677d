"""Steps as CUDA graphs: when they are recorded, and that a replayed run is the run."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.train_runs import GPT2, ROOT, TRAIN
from tpcompiler.capture import capture
from tpcompiler.load import load_model
from tpcompiler.runtime import Ranks
from tpcompiler.spec import Spec
from tpcompiler.train.build import compile_model, loss_output, training_inputs
from tpcompiler.train.config import Train
from tpcompiler.train.data import open_corpus
from tpcompiler.train.engine import Engine
from tpcompiler.train.place import from_constructor
from tpcompiler.train.replay import Device, Graph, Recorder, steady


class Again:
    """A recording without a device: runs the function again, into the tensors of its first result."""

    def __init__(self, fn: Any, result: Tensor) -> None:
        self.fn, self.result = fn, result

    def replay(self) -> None:
        self.result.copy_(self.fn())


class Recordings:
    def __init__(self, waits: bool = False) -> None:
        self.made, self.waits = 0, waits

    def watch(self, fn: Any) -> tuple[Any, bool]:
        return fn(), self.waits

    def record(self, fn: Any) -> tuple[Graph, Tensor]:
        self.made += 1
        result = fn()
        return Again(fn, result), result


def test_a_function_runs_twice_and_is_then_replayed_on_the_new_inputs() -> None:
    recordings = Recordings()
    recorder = Recorder(recordings)
    keys = []
    for n in range(5):
        result, key = recorder(lambda x: x * 2, torch.full((3,), float(n)))
        assert torch.equal(result, torch.full((3,), 2.0 * n))
        keys.append(key)
    assert [k is None for k in keys] == [True, True, False, False, False]
    assert recordings.made == 1


def test_other_shapes_and_other_keys_are_other_recordings_and_not_too_many() -> None:
    recordings = Recordings()
    recorder = Recorder(recordings)
    found = set()
    for n in range(1, 7):
        for _ in range(4):
            result, key = recorder(lambda x: x + 1, torch.zeros(n), key=n % 2)
            assert torch.equal(result, torch.ones(n))
        found.add(key)
    assert recordings.made == 4
    assert len(found) == 5  # four, and None


def test_what_waits_for_the_device_is_never_recorded() -> None:
    recordings = Recordings(waits=True)
    recorder = Recorder(recordings)
    assert all(recorder(lambda x: x, torch.zeros(1))[1] is None for _ in range(5))
    assert recordings.made == recorder.recorded == 0


def test_without_a_way_to_record_nothing_is_recorded() -> None:
    assert all(Recorder(None)(lambda x: x, torch.zeros(1))[1] is None for _ in range(5))


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


def run(steps: int, **train: Any) -> tuple[list[float], list[float], dict[str, Tensor], int]:
    """Losses, norms and final masters of a run on one GPU, and how many shapes were recorded."""
    sizes = {**GPT2, "model": {**GPT2["model"], "hidden": 64, "dropout": 0.1}}
    settings = {**TRAIN, "precision": "bf16", "batch": 8, "micro_batch": 8, **train}
    spec = Spec.load({"mesh": {"tensor": 1}, **sizes, "train": settings})
    wanted = spec.section(Train)
    loaded = load_model(str(ROOT / "models" / "gpt2.py"), spec)
    corpus = open_corpus(wanted)
    inputs = training_inputs(loaded, corpus.train.batch_at(0, 0).tensors)
    compiled = compile_model(loaded, spec, inputs, loss_output)
    engine = Engine(compiled, Ranks(compiled.sharded.program.mesh, 0), wanted, 0, GPU)
    engine.fill(from_constructor(lambda name: compiled.recorded.replay(name, 0)))
    losses, norms = [], []
    for step in range(steps):
        batches = [corpus.train.batch_at(step, m).to(GPU) for m in range(corpus.train.micro_batches(1))]
        outcome = engine.step(step, batches)
        losses.append(float(outcome.loss))
        norms.append(float(outcome.norm))
        if step == 4 and corpus.validation is not None:
            engine.evaluate(corpus.validation, 1)  # in between, on another stream
    return losses, norms, {n: m.detach().clone() for n, m in engine.held.masters.items()}, engine.recorded


GPU = torch.device("cuda", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["none", "layers", "whole"])
@pytest.mark.parametrize("micro_batch", [8, 4, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_replayed_run_is_the_run(compile: str, micro_batch: int, precision: str) -> None:
    settings = {"compile": compile, "micro_batch": micro_batch, "precision": precision, "evaluation": {"batches": 1}}
    issued = run(10, **settings, cuda_graphs=False)
    replayed = run(10, **settings, cuda_graphs=True)
    assert issued[3] == 0
    assert replayed[3] == (0 if micro_batch == 3 else 1), json.dumps(settings)
    # Scatters of gradients add in any order; all else is the same bits.
    torch.testing.assert_close(torch.tensor(replayed[0]), torch.tensor(issued[0]), rtol=2e-3, atol=0.0)
    torch.testing.assert_close(torch.tensor(replayed[1]), torch.tensor(issued[1]), rtol=2e-2, atol=0.0)
    for name, master in issued[2].items():
        torch.testing.assert_close(replayed[2][name], master, rtol=0.0, atol=2e-2, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("setting", [{"activation_checkpointing": "layer"}, {"precision": "fp32"}])
def test_what_is_not_the_same_work_every_time_is_not_recorded(setting: dict[str, Any]) -> None:
    assert run(4, **setting)[3] == 0


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
            result, _ = recorder(slow if waits else double, torch.full((3,), float(n), device=GPU))
            assert result.tolist() == [2.0 * n] * 3
    assert recorder.recorded == (0 if waits else 1)


FAILING = """
import torch
from tpcompiler.train.replay import Device
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
