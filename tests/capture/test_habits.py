"""Habits of other people's modules, each small: traced, proven, and the same numbers, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tpcompiler.verification.verify import verify

WIDTH = 12
CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)


def _encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)


def _decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 16, batch_first=True), 1)


HABITS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "a constant among the arguments": (
        _encoder,
        ((torch.randn(2, 6, WIDTH),), {"src_mask": CAUSAL, "is_causal": True}),
    ),
    "a mask that torch asks whether it is causal": (
        _decoder,
        ((torch.randn(2, 6, WIDTH), torch.randn(2, 5, WIDTH)), {"tgt_mask": CAUSAL}),
    ),
}


@pytest.mark.parametrize("name", HABITS)
def test_habit_is_compiled_and_verified(name: str) -> None:
    build, inputs = HABITS[name]
    report = verify(build, inputs, {"mesh": {"tensor": 2}})
    assert report.passed, report
