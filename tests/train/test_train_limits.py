"""Batches that a model cannot take are refused before the first step, for the right reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.bert import Bert
from models.bert import example_inputs as bert_inputs
from models.gpt2 import GPT2
from models.gpt2 import example_inputs as gpt2_inputs
from models.llama import Llama
from tpcompiler.capture import capture
from tpcompiler.errors import TpcError
from tpcompiler.program import Capture
from tpcompiler.train.step.limits import check_inputs

SIZES = {"vocab": 100, "positions": 32, "hidden": 16, "heads": 4, "layers": 1}
CASES = {"gpt2": (GPT2, gpt2_inputs), "bert": (Bert, bert_inputs), "llama": (Llama, gpt2_inputs)}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Capture, Any]:
    model, make = CASES[request.param]
    return capture(lambda: model(**SIZES), make(2, 16, 100)), make


def run(case: tuple[Capture, Any], sequence: int, largest: int | None = None) -> None:
    captured, make = case
    check_inputs(captured, dict(zip(captured.inputs, make(3, sequence, 100).values(), strict=True)), largest)


def test_what_fits_passes(case: tuple[Capture, Any]) -> None:
    for sequence in (2, 17, 32):
        run(case, sequence, 99)


def test_sequences_beyond_the_positions_are_named(case: tuple[Capture, Any]) -> None:
    with pytest.raises(TpcError, match=r"^train\.sequence: .*32") as e:
        run(case, 33)
    assert "\n" not in str(e.value)


def test_ids_beyond_the_vocabulary_are_named(case: tuple[Capture, Any]) -> None:
    with pytest.raises(TpcError, match=r"^data: holds token id 100, but .*weight has 100 rows; .* 101 or more"):
        run(case, 16, 100)


class Buckets(nn.Module):
    """Looks up clamped distances: 4 rows are enough for any length."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.near = nn.Embedding(50, 8), nn.Embedding(4, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.words(tokens) + self.near(torch.arange(tokens.shape[1], device=tokens.device).clamp(max=3))


def test_bucketed_positions_have_no_end() -> None:
    captured = capture(Buckets, {"tokens": torch.zeros(2, 5, dtype=torch.int64)})
    long = {captured.inputs[0]: torch.zeros(2, 500, dtype=torch.int64)}
    check_inputs(captured, long, 49, ids="tokens")
    with pytest.raises(TpcError, match=r"token id 50, but words\.weight has 50 rows"):
        check_inputs(captured, long, 50, ids="tokens")
