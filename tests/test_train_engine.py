"""The same training at every degree: losses, and the weights that come of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train_runs import CASES, in_processes, in_threads
from tpcompiler.train.checkpoint import checkpoints
from tpcompiler.weights import Weights


def close(a: list[float], b: list[float]) -> None:
    mine, other = (torch.tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(mine, other, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tensor", [2, 4])
def test_losses_are_the_same_at_every_tensor_degree(name: str, tensor: int) -> None:
    alone = in_threads(CASES[name], 1, 10)
    assert alone[-1] < alone[0]
    close(in_threads(CASES[name], tensor, 10), alone)


@pytest.mark.parametrize(("tensor", "data"), [(1, 2), (2, 2)])
def test_losses_are_the_same_at_every_data_degree(tensor: int, data: int, tmp_path: Path) -> None:
    close(in_processes(CASES["gpt2"], tensor, data, tmp_path), in_threads(CASES["gpt2"], 1, 10))


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
