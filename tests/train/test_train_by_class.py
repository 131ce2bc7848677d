"""Optimizers by their import path: the same at every degree, in checkpoints, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.train.test_train_engine import close
from tests.train.test_train_engine_runs import newest, same
from tests.train.train_runs import CASES, in_processes, in_threads, losses
from tpcompiler.errors import TpcError
from tpcompiler.spec.schema import Spec
from tpcompiler.train.optim.by_class import ByClass, kind_of
from tpcompiler.train.run.training_run import check_changes
from tpcompiler.train.settings import Optimizer, Train

GPT2 = CASES["gpt2"]
MOMENTUM: dict[str, Any] = {"lr": 0.1, "clip": 0.5, "class": "torch.optim.SGD", "arguments": {"momentum": 0.9}}


def config(path: str, **arguments: Any) -> Optimizer:
    given = {"lr": 1e-2, "class": path, "arguments": arguments}
    return Spec.load({"mesh": {"tensor": 1}, "train": {"optimizer": given}}).section(Train).optimizer


@pytest.mark.parametrize(
    ("path", "arguments", "state"),
    [
        ("torch.optim.SGD", {}, ()),
        ("torch.optim.SGD", {"momentum": 0.9, "nesterov": True}, ("momentum_buffer",)),
        ("torch.optim.Adam", {"betas": [0.9, 0.95], "amsgrad": True}, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
        ("torch.optim.RMSprop", {}, ("square_avg",)),
        ("torch.optim.Adagrad", {}, ("sum",)),
        ("torch.optim.AdamW", {}, ("exp_avg", "exp_avg_sq")),
    ],
)
def test_a_restored_optimizer_goes_on_as_the_one_that_was_stopped(
    path: str, arguments: dict[str, Any], state: tuple[str, ...]
) -> None:
    draw = torch.Generator().manual_seed(1)

    def gradient() -> dict[str, Tensor]:
        return {n: torch.randn(p.shape, generator=draw, dtype=torch.float64) for n, p in first.items()}

    def some(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return {"a": nn.Parameter(torch.randn(3, 4).double()), "b": nn.Parameter(torch.randn(4).double())}

    given = config(path, **arguments)
    assert kind_of(given).state == state
    first, second = some(0), some(1)
    one, other = ByClass(first, given, lambda: None), ByClass(second, given, lambda: None)
    assert set(one.moments("a")) == set(state)
    for i in range(5):
        if i == 3:
            for name, p in first.items():
                second[name].data.copy_(p.data)
                for key, value in other.moments(name).items():
                    value.copy_(one.moments(name)[key])
            other.restore(3)
        g = gradient()
        for update in (one, other)[: 1 if i < 3 else 2]:
            update.prepare(0.1 / (i + 1))
            update.step(g, torch.tensor(3.0).double(), 1.0)
    for name, p in first.items():
        assert torch.equal(p, second[name]), name


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("torch.optim.Adafactor", {}, "computes an element's step from others of its parameter"),
        ("torch.optim.Muon", {}, "computes an element's step from others of its parameter"),
        ("torch.optim.NAdam", {}, "keeps mu_product, which a checkpoint has no place for"),
        ("torch.optim.LBFGS", {}, "fails"),
        ("torch.optim.Nothing", {}, "cannot be imported"),
        ("nothing.at.all", {}, "cannot be imported"),
        ("torch.nn.Linear", {}, "is not a torch.optim.Optimizer"),
        ("torch.optim.SGD", {"speed": 3}, "unexpected keyword argument 'speed'"),
        ("torch.optim.SGD", {"momentum": {"a": 1}}, "numbers, texts and lists of them would work"),
    ],
)
def test_what_cannot_be_used_is_one_line(path: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TpcError, match=message) as e:
        kind_of(config(path, **arguments))
    assert "\n" not in str(e.value)


def test_every_degree_takes_the_same_steps() -> None:
    alone = in_threads(GPT2, 1, 5, optimizer=MOMENTUM)
    close(alone, in_threads(GPT2, 2, 5, optimizer=MOMENTUM))
    assert alone[-1] < alone[0]
    mixed = in_threads(GPT2, 2, 5, optimizer=MOMENTUM, precision="bf16")
    assert mixed == pytest.approx(alone, abs=0.05) and mixed != alone


def test_its_state_moves_to_other_degrees(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"schedule": {"warmup": 1, "until": 9}, "optimizer": {**MOMENTUM, "average": 0.5}}
    for i, (tensor, data) in enumerate([(2, 1), (1, 2), (1, 1)]):
        in_processes(GPT2, tensor, data, tmp_path, steps=2 * (i + 1), **settings)
    close(losses(tmp_path / "run"), in_threads(GPT2, 1, 6, **settings))
    kept = json.loads((newest(tmp_path) / "manifest.json").read_text())
    assert "optimizer.momentum_buffer.wte.weight" in json.dumps(kept)
    in_processes(GPT2, 1, 1, tmp_path / "stopped", steps=3, **settings)
    in_processes(GPT2, 1, 1, tmp_path / "stopped", steps=5, **settings)
    in_processes(GPT2, 1, 1, tmp_path / "whole", steps=5, **settings)
    same(newest(tmp_path / "stopped"), newest(tmp_path / "whole"))


def test_a_key_younger_than_the_run_has_its_default() -> None:
    said: list[str] = []
    check_changes({"train.seed": 1}, {"train.seed": 1, "train.optimizer.class": None}, (), said.append)
    assert said == []
    with pytest.raises(TpcError, match=r"train\.optimizer\.class: the run began with nothing"):
        check_changes({"train.seed": 1}, {"train.seed": 1, "train.optimizer.class": "torch.optim.SGD"}, (), said.append)
