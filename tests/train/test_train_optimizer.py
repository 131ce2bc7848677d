"""Which parameters decay, the optimizer's step, the learning rate's course, and the settings they come from."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from models.bert import Bert
from models.gpt2 import GPT2
from models.llama import Llama
from tpcompiler.errors import SpecError
from tpcompiler.spec.schema import Spec
from tpcompiler.train.optim.optimizer import make_optimizer, parameter_groups, set_learning_rate
from tpcompiler.train.optim.schedule import learning_rate
from tpcompiler.train.settings import Optimizer, Train


def settings_of(**train: object) -> Train:
    return Spec.load({"mesh": {"tensor": 1}, "train": train}).section(Train)


@pytest.mark.parametrize("model", [GPT2, Bert, Llama])
def test_weight_decay_leaves_norms_and_biases_out(model: type[nn.Module]) -> None:
    module = model(vocab=64, hidden=16, heads=4, layers=2)
    groups = parameter_groups(module.named_parameters(), Optimizer(weight_decay=0.1))
    decayed = {name for g in groups if g["weight_decay"] for name in g["names"]}
    rest = {name for g in groups if not g["weight_decay"] for name in g["names"]}
    flat = {
        f"{n}.{p}"
        for n, m in module.named_modules()
        for p, _ in m.named_parameters(recurse=False)
        if isinstance(m, (nn.LayerNorm, nn.RMSNorm)) or p == "bias"
    }
    assert rest == flat
    assert decayed | rest == {name for name, _ in module.named_parameters()}
    assert sum(len(g["params"]) for g in groups) == len(list(module.parameters()))


def test_frozen_parameters_are_left_out_and_dtypes_stand_apart() -> None:
    named = [
        ("a", nn.Parameter(torch.ones(2, 2))),
        ("b", nn.Parameter(torch.ones(2, 2, dtype=torch.float64))),
        ("c", nn.Parameter(torch.ones(2, 2), requires_grad=False)),
    ]
    groups = parameter_groups(named, Optimizer(weight_decay=0.1))
    assert sorted(g["names"] for g in groups) == [["a"], ["b"]]


def test_the_first_group_that_matches_says_how_a_parameter_is_trained() -> None:
    config = settings_of(
        optimizer={"lr": 0.1, "weight_decay": 0.1, "groups": [
            {"match": "*.bias", "lr": 2.0}, {"match": "head.*", "lr": 0.0, "weight_decay": 0.5}]}
    ).optimizer  # fmt: skip
    named = {n: nn.Parameter(torch.ones(2, 2)) for n in ("body.weight", "head.weight")}
    named |= {n: nn.Parameter(torch.ones(2)) for n in ("body.bias", "head.bias", "norm")}
    optimizer = make_optimizer(named.items(), config)
    set_learning_rate(optimizer, 0.01)
    found = {n: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for n in g["names"]}
    assert found == {
        "body.weight": (0.01, 0.1), "norm": (0.01, 0.0), "body.bias": (0.02, 0.0), "head.bias": (0.02, 0.0),
        "head.weight": (0.0, 0.5),
    }  # fmt: skip


def test_a_step_is_decoupled_adamw() -> None:
    """Against the algorithm written out (arXiv 1711.05101, algorithm 2)."""
    config = Optimizer(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    matrix, bias = nn.Parameter(torch.randn(3, 2).double()), nn.Parameter(torch.randn(3).double())
    expected = {"matrix": matrix.detach().clone(), "bias": bias.detach().clone()}
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in expected.items()}
    optimizer = make_optimizer([("matrix", matrix), ("bias", bias)], config)
    for t in range(1, 4):
        set_learning_rate(optimizer, config.lr / t)
        for (name, p), decay in (((("matrix", matrix)), 0.1), (("bias", bias), 0.0)):
            p.grad = torch.randn_like(p)
            m, v = moments[name]
            m.mul_(0.9).add_(0.1 * p.grad)
            v.mul_(0.95).add_(0.05 * p.grad**2)
            step = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            expected[name] -= config.lr / t * (step + decay * expected[name])
        optimizer.step()
    torch.testing.assert_close(matrix.detach(), expected["matrix"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(bias.detach(), expected["bias"], rtol=1e-12, atol=1e-14)


def test_the_papers_recipes_can_be_said() -> None:
    gpt2 = settings_of(
        steps=300_000,
        batch=512,
        micro_batch=8,
        sequence=1024,
        precision="fp16",
        activation_checkpointing="layer",
        optimizer={"lr": 1.5e-4, "weight_decay": 0.01, "clip": 1.0},
        schedule={"decay": "cosine", "warmup": 3000, "min_lr": 1e-5},
        data={"path": ["a.jsonl", "b.jsonl"], "task": "causal"},
    )
    assert learning_rate(gpt2, 2999) == 1.5e-4
    assert learning_rate(gpt2, 299_999) == pytest.approx(1e-5, rel=1e-6)
    bert = settings_of(
        steps=2_000_000,
        batch=1024,
        sequence=512,
        optimizer={"lr": 1e-4},
        schedule={"decay": "linear", "warmup": 10_000, "min_lr": 0.0},
        data={"task": "mlm+sop"},
    )
    assert learning_rate(bert, 10_000) == 1e-4
    assert learning_rate(bert, 1_005_000) == pytest.approx(0.5e-4)
    assert learning_rate(bert, 2_000_000) == 0


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_the_rate_rises_once_then_falls_to_its_end_and_stays(decay: str) -> None:
    train = settings_of(
        steps=100, optimizer={"lr": 1.0}, schedule={"decay": decay, "warmup": 10, "until": 60, "min_lr": 0.1}
    )
    rates = [learning_rate(train, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a >= b for a, b in pairwise(rates[9:]))
    end = 1.0 if decay == "constant" else 0.1
    assert all(r == pytest.approx(end) for r in rates[60:])
    if decay != "constant":
        assert rates[35] == pytest.approx(0.55)  # half way, both curves are half way down
    if decay == "cosine":
        assert rates[20] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 5)) / 2)


def test_a_learning_rate_in_a_tensor_is_set_in_place() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=torch.tensor(1.0))
    held = optimizer.param_groups[0]["lr"]
    set_learning_rate(optimizer, 0.25)
    assert held == 0.25


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"batchsize": 3}, r"train\.batchsize: unknown key"),
        ({"steps": 0}, r"train\.steps"),
        ({"precision": "int8"}, r"train\.precision"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, r"train\.optimizer\.betas"),
        ({"optimizer": {"lr": "fast"}}, r"train\.optimizer\.lr"),
        ({"optimizer": {"lr": 1e-5}, "schedule": {"min_lr": 1e-4}}, r"train\.schedule: needs min_lr at most"),
        ({"steps": 10, "schedule": {"warmup": 10}}, r"train\.schedule: needs warmup below 10"),
        ({"data": {"task": "translate"}}, r"train\.data\.task"),
        ({"data": {"names": {"tokens": "x"}}}, r"train\.data\.names: must have keys among input_ids"),
        ({"data": {"path": []}}, r"train\.data\.path"),
    ],
)
def test_wrong_settings_name_their_key(train: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message) as e:
        settings_of(**train)
    assert "\n" not in str(e.value)


def test_defaults_are_a_run_and_settings_do_not_change() -> None:
    train = settings_of()
    assert train.data.path == ("builtin",)
    assert settings_of(optimizer={"clip": None}).optimizer.clip is None
    with pytest.raises(ValueError, match="frozen"):
        train.steps = 3
