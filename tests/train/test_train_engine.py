"""The same training at every degree: losses, and the weights that come of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.train_runs import CASES, DROPPING, dropping, in_processes, in_threads, shallow
from tpcompiler.train.run.checkpoint import checkpoints
from tpcompiler.train.step.engine import Outcome
from tpcompiler.weights import Weights


def close(a: list[float], b: list[float]) -> None:
    mine, other = (torch.tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(mine, other, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        pytest.param(name, tensor, marks=() if (name, tensor) in (("gpt2", 4), ("bert", 2)) else pytest.mark.nightly)
        for name in CASES
        for tensor in (2, 4)
    ],
)
def test_losses_are_the_same_at_every_tensor_degree(name: str, tensor: int) -> None:
    alone = in_threads(CASES[name], 1, 10)
    assert alone[-1] < alone[0]
    close(in_threads(CASES[name], tensor, 10), alone)


@pytest.mark.parametrize(("tensor", "data"), [pytest.param(1, 2, marks=pytest.mark.nightly), (2, 2)])
def test_losses_are_the_same_at_every_data_degree(tensor: int, data: int, tmp_path: Path) -> None:
    """Every rank compiles for itself, as in life."""
    settings = {"steps": 5, "schedule": {"warmup": 2, "until": 10}}
    small = shallow(CASES["gpt2"])
    close(in_processes(small, tensor, data, tmp_path, fresh=True, **settings), in_threads(small, 1, 5))


@pytest.mark.nightly
@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_at_all_degrees_end_with_the_same_weights(name: str, tmp_path: Path) -> None:
    curves, ends = {}, {}
    for tensor, data in [(1, 1), (2, 1), (4, 1), (2, 2), (1, 2)]:
        here = tmp_path / f"{tensor}x{data}"
        curves[tensor, data] = in_processes(CASES[name], tensor, data, here, steps=50)
        with Weights(checkpoints(here / "run" / "checkpoints")[0]) as weights:
            parameters = [e.name for e in weights.manifest.entries if e.kind == "parameter"]
            ends[tensor, data] = {n: weights.read(n) for n in parameters}
    for degrees, curve in curves.items():
        close(curve, curves[1, 1])
        for parameter, expected in ends[1, 1].items():
            torch.testing.assert_close(ends[degrees][parameter], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("micro_batch", [8, 3])
def test_accumulation_changes_nothing(micro_batch: int) -> None:
    close(in_threads(CASES["gpt2"], 1, 5, micro_batch=micro_batch), in_threads(CASES["gpt2"], 1, 5))


@pytest.mark.parametrize("how", ["layer", "attention"])
def test_what_is_computed_again_is_the_same_dropout_on(how: str) -> None:
    close(in_threads(DROPPING, 1, 5, activation_checkpointing=how), in_threads(DROPPING, 1, 5))


AMONG_PROCESSES = [pytest.param("layer", 1, 2, marks=pytest.mark.nightly), ("attention", 2, 1)]


@pytest.mark.parametrize(("how", "tensor", "data"), AMONG_PROCESSES)
def test_what_is_computed_again_is_the_same_among_processes(how: str, tensor: int, data: int, tmp_path: Path) -> None:
    schedule = {"warmup": 2, "until": 10}
    again = in_processes(DROPPING, tensor, data, tmp_path, steps=5, schedule=schedule, activation_checkpointing=how)
    close(again, in_threads(DROPPING, 1, 5))


def test_dropout_is_the_same_at_every_degree() -> None:
    close(in_threads(DROPPING, 3, 5), in_threads(DROPPING, 1, 5))


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_with_dropout_are_the_same_at_every_degree(name: str, tmp_path: Path) -> None:
    case = dropping(CASES[name])
    alone = in_processes(case, 1, 1, tmp_path / "alone", steps=50)
    for tensor, data in [(2, 1), (3, 1), (4, 1), (2, 2)]:
        close(in_processes(case, tensor, data, tmp_path / f"{tensor}x{data}", steps=50), alone)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("micro_batch", [2, 8])
def test_every_precision_follows_float64(precision: str, micro_batch: int) -> None:
    exact = in_threads(CASES["gpt2"], 1, 10)
    low = in_threads(CASES["gpt2"], 2, 10, precision=precision, micro_batch=micro_batch)
    rtol = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}[precision]
    torch.testing.assert_close(torch.tensor(low), torch.tensor(exact), rtol=rtol, atol=0.0)


NIGHTLY = [pytest.param(precision, marks=pytest.mark.nightly) for precision in ("fp16", "fp32")]


@pytest.mark.parametrize("precision", ["bf16", *NIGHTLY])
def test_data_ranks_follow_float64_in_every_precision(precision: str, tmp_path: Path) -> None:
    exact = in_threads(CASES["gpt2"], 1, 5)
    schedule = {"warmup": 2, "until": 10}
    low = in_processes(CASES["gpt2"], 1, 2, tmp_path, steps=5, schedule=schedule, precision=precision)
    rtol = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}[precision]
    torch.testing.assert_close(torch.tensor(low), torch.tensor(exact), rtol=rtol, atol=0.0)


def test_an_overflow_skips_the_step_on_all_ranks() -> None:
    settings = {"precision": "fp16", "loss_scale": {"start": 2.0**40}}
    outcomes: list[Outcome] = []
    in_threads(CASES["gpt2"], 2, 30, watch=outcomes.append, **settings)
    ranks = [[o for o in outcomes if o.step == s] for s in range(1, 31)]
    assert all(len(pair) == 2 and pair[0].applied == pair[1].applied for pair in ranks)
    assert all(pair[0].scale == pair[1].scale for pair in ranks)
    applied = [pair[0].applied for pair in ranks]
    assert not applied[0]
    assert applied[-1]
    scale = ranks[-1][0].scale
    assert scale is not None
    assert scale.skipped == applied.count(False)
    assert scale.value == 2.0 ** (40 - scale.skipped)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("tensor", "data", "how", "again"),
    [(1, 1, "whole", "none"), (2, 1, "layers", "attention"), (2, 1, "whole", "none"), (1, 2, "layers", "layer")],
)
def test_compiled_programs_train_alike(tensor: int, data: int, how: str, again: str, tmp_path: Path) -> None:
    settings = {"precision": "fp32", "compile": how, "activation_checkpointing": again, "steps": 4}
    compiled = in_processes(
        DROPPING, tensor, data, tmp_path, patience=1000, schedule={"until": 10, "warmup": 2}, **settings
    )
    plain = in_threads(DROPPING, 1, 4, precision="fp32")
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(plain), rtol=1e-5, atol=0.0)
