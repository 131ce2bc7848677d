"""The average of the weights: kept at every degree, in checkpoints, and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.train_runs import CASES, in_processes
from tpcompiler.cli.main import main
from tpcompiler.train.run.checkpoint import checkpoints, name_of

GPT2 = CASES["gpt2"]


def merged(here: Path, step: int, *more: str) -> dict[str, torch.Tensor]:
    out = here / f"{step}{''.join(more)}.safetensors"
    found = here / "run" / "checkpoints" / name_of(step)
    assert main(["merge", str(found), "-o", str(out), *more]) == 0
    return load_file(out)


def test_the_average_follows_its_definition_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"checkpoints": {"every": 1, "keep": 9}, "schedule": {"warmup": 1, "until": 9}}
    settings["optimizer"] = {"lr": 1e-2, "average": 0.75}
    in_processes(GPT2, 2, 1, tmp_path, steps=2, **settings)
    in_processes(GPT2, 2, 1, tmp_path, steps=3, **settings)
    at = {step: merged(tmp_path, step) for step in (1, 2, 3)}
    averages = {step: merged(tmp_path, step, "--average") for step in (1, 2, 3)}
    for name in at[1]:
        for step in (2, 3):
            expected = 0.75 * averages[step - 1][name] + 0.25 * at[step][name]
            torch.testing.assert_close(averages[step][name], expected, rtol=1e-12, atol=1e-14)
    assert not torch.equal(averages[3]["wte.weight"], at[3]["wte.weight"])
    in_processes(GPT2, 1, 2, tmp_path / "data", steps=3, **settings)
    for name, value in merged(tmp_path / "data", 3, "--average").items():
        torch.testing.assert_close(value, averages[3][name], rtol=1e-8, atol=1e-8)


def test_a_run_without_one_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_processes(GPT2, 1, 1, tmp_path, steps=1, schedule={"warmup": 0})
    found = checkpoints(tmp_path / "run" / "checkpoints")[0]
    assert main(["merge", str(found), "-o", str(tmp_path / "m.safetensors"), "--average"]) == 2
    assert "train with train.optimizer.average" in " ".join(capsys.readouterr().err.split())
