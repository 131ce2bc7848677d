"""Habits of other people's modules, each small: traced, proven, and the same numbers, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpcompiler.api import shard
from tpcompiler.capture import capture
from tpcompiler.errors import ModelError
from tpcompiler.verification.verify import verify

WIDTH = 12
CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)


def _encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)


def _decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 16, batch_first=True), 1)


class Normed(nn.Module):
    """Batch norm counts its batches in a buffer that no forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x.transpose(1, 2)).transpose(1, 2)).relu())


class Keeping(nn.Module):
    """A forward that keeps a table for its next call, made with autocast off on the input's own device."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.register_buffer("table", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            with torch.autocast(x.device.type, enabled=False):
                self.register_buffer("table", torch.arange(x.shape[1]).float()[:, None], persistent=False)
        return x + self.down(self.up(x + self.table).relu())


class Masks(nn.Module):
    """`&` of masks with heads, and a learned key before all others, repeated for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        k = torch.cat([self.first.repeat(x.shape[0], 1, 1), k], 1)
        v = torch.cat([torch.zeros_like(v[:, :1]), v], 1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2)
        hidden = (scores < -3) & (scores > -4)
        y = scores.masked_fill(hidden, -9.0).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).flatten(2))


class Experts(nn.Module):
    """Each expert takes the tokens that chose it: how many is known at run time only (Mixtral, as LitGPT writes it)."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weight, chosen = self.router(flat).softmax(-1).topk(1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            token, choice = torch.where(chosen == i)
            out[token] += weight[token, choice, None] * expert(flat[token])
        return x + out.reshape(x.shape)


class Scaled(nn.Module):
    """A buffer that other modules share, and writes into a copy that is none."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale, persistent=False)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(x * self.scale)
        y.type_as(x).mul_(2)
        unit = torch.eye(*self.down.weight.size(), out=torch.empty_like(self.down.weight).detach())
        return x + nn.functional.linear(y.relu(), self.down.weight + unit)


class Prompted(nn.Module):
    """Tokens before the input, whose ids a dictionary holds, and layers that share a buffer."""

    def __init__(self) -> None:
        super().__init__()
        scale = torch.linspace(0.5, 1.5, WIDTH)
        self.layers = nn.Sequential(Scaled(scale), Scaled(scale))
        self.table = nn.Embedding(4, WIDTH)
        self.ids = {"prompt": torch.arange(3)}

    def forward(self, x: Tensor) -> Tensor:
        prompt = self.table(self.ids["prompt"].unsqueeze(0).expand(x.shape[0], -1).to(x.device))
        y: Tensor = self.layers(torch.cat([prompt, x], 1))
        return y[:, 3:]


HABITS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "a constant among the arguments": (
        _encoder,
        ((torch.randn(2, 6, WIDTH),), {"src_mask": CAUSAL, "is_causal": True}),
    ),
    "a mask that torch asks whether it is causal": (
        _decoder,
        ((torch.randn(2, 6, WIDTH), torch.randn(2, 5, WIDTH)), {"tgt_mask": CAUSAL}),
    ),
    "batch norm": (Normed, torch.randn(2, 6, WIDTH)),
    "a buffer registered by the forward": (lambda: nn.Sequential(Keeping()), torch.randn(2, 6, WIDTH)),
    "experts that take a number of tokens": (Experts, torch.randn(2, 6, WIDTH)),
    "masks with heads": (Masks, torch.randn(2, 6, WIDTH)),
    "constants in a dictionary and shared buffers": (Prompted, torch.randn(2, 6, WIDTH)),
}


@pytest.mark.parametrize("name", HABITS)
def test_habit_is_compiled_and_verified(name: str) -> None:
    build, inputs = HABITS[name]
    report = verify(build, inputs, {"mesh": {"tensor": 2}}, micro_batches=2)
    assert report.passed, report


class Averaging(nn.Module):
    """A running average that the next call reads: what a program that does not keep it must refuse."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(x.mean((0, 1)).detach(), alpha=0.1)
            return self.linear(x)
        return self.linear(x - self.mean)


def test_a_write_that_a_later_call_reads_is_refused() -> None:
    with pytest.raises(ModelError, match="writes into mean"):
        capture(Averaging, torch.randn(2, 6, WIDTH))


class Variadic(nn.Module):
    """A forward that takes any number of inputs, as wrappers do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, *inputs: Tensor) -> Tensor:
        x, y = inputs
        return x + self.down(self.up(y).relu())


def test_inputs_behind_a_star_have_names_of_their_own() -> None:
    sharded = shard(Variadic, (torch.randn(2, 6, WIDTH), torch.randn(2, 6, WIDTH)), {"mesh": {"tensor": 2}})
    assert sharded.check.passed, sharded.check
    assert "inputs_0: Tensor, inputs_1: Tensor" in sharded.source


class FixedSizes(nn.Module):
    """A model that takes one batch and one sequence only."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(2, 6, WIDTH)
        return x + self.down(self.up(x).relu())


def test_a_model_of_fixed_sizes_is_split_like_any_other() -> None:
    sharded = shard(FixedSizes, torch.randn(2, 6, WIDTH), {"mesh": {"tensor": 2}})
    assert sharded.check.passed, sharded.check
    assert sharded.sharded_fraction == 1.0
