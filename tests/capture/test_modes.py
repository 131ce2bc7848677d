"""What a model does in training alone is in its graph, or the model is refused by the line."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpcompiler.capture import capture
from tpcompiler.errors import ModelError
from tpcompiler.program import Training
from tpcompiler.verification.source_model import same_as_module

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Tensor], p: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.drop, self.norm, self.p, self.does = nn.Dropout(0.3), nn.BatchNorm1d(4, momentum=None), p, forward

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, x)


def skip(draw: Callable[[], Any]) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and draw() < self.p:
                continue
            x = F.dropout(self.drop(layer(x)), 0.2, self.training)
        return x

    return forward


DRAWS = {
    "torch": lambda: torch.rand([]),
    "python": random.random,
    "uniform": lambda: random.uniform(0, 1),
    "numpy": lambda: np.random.uniform(0, 1),  # noqa: NPY002
}


def called(name: str) -> Callable[[], Any]:
    """Looks the generator up when it is called, as a model does."""
    return {**DRAWS, "python": lambda: random.random()}[name]


@pytest.mark.parametrize("name", DRAWS)
def test_layers_that_are_skipped_with_probability_0_stay_and_dropout_follows_the_mode(name: str) -> None:
    model = Model(skip(called(name)))
    captured = capture(model, (torch.randn(2, 4),))
    drops = [n.args[1:] for n in captured.graph.nodes if n.target is aten.dropout.default]
    assert drops == [(0.3, Training(True, False)), (0.2, Training(True, False))] * 2
    assert all(c.passed for c in same_as_module(captured, model, (torch.randn(2, 4),), True))


@pytest.mark.parametrize("name", DRAWS)
def test_layers_that_are_skipped_at_random_are_refused(name: str) -> None:
    refused(Model(skip(called(name)), p=0.1), "if self.training and draw() < self.p", "every rank would draw another")


class Noisy(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x + torch.randn_like(x) if self.training else x)  # type: ignore[no-any-return]


class Path(Model):
    def forward(self, x: Tensor) -> Tensor:
        keep = x.new_empty(x.shape[0], 1).bernoulli_(0.9) if self.training else 1.0
        return x + self.layers[0](x) * keep  # type: ignore[no-any-return]


class Scaled(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        if self.training:
            x = x * 2
        return self.layers[1](x)  # type: ignore[no-any-return]


class Branched(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x) if self.training else self.layers[1](x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "line", "said"),
    [
        (Noisy, "torch.randn_like(x)", "draws random numbers"),
        (Path, "bernoulli_(0.9)", "draws random numbers"),
        (Scaled, "x = x * 2", "something else in training than in evaluation"),
        (Branched, "self.layers[0](x) if self.training", "something else in training than in evaluation"),
    ],
)
def test_other_differences_are_refused_with_the_line(model: type[Model], line: str, said: str) -> None:
    refused(model(lambda self, x: x), line, said)


def refused(model: nn.Module, *said: str) -> None:
    with pytest.raises(ModelError) as e:
        capture(model, (torch.randn(2, 4),))
    text = str(e.value)
    assert all(s in text for s in ("test_modes.py:", *said)) and "\n" not in text, text


def test_verify_compares_the_module_in_training_too() -> None:
    """A graph of another model than the module's is noticed, also where only training differs."""
    plain = Model(lambda self, x: self.layers[1](self.layers[0](x)))
    captured = capture(plain, (torch.randn(2, 4),))
    model = Scaled(lambda self, x: x)
    model.load_state_dict(plain.state_dict())
    evaluation, training = same_as_module(captured, model, (torch.randn(2, 4),), True)
    assert evaluation.passed and not training.passed
