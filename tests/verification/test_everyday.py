"""Models as people write them: complex rotations, and Hugging Face's defaults."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tpcompiler.api import parallelize, shard
from tpcompiler.verification.verify import verify


class Rotated(nn.Module):
    """Queries rotated by complex numbers, as the first Llama did."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        angles = torch.outer(torch.arange(8.0), torch.tensor([1.0, 0.1]))
        self.register_buffer("freqs_cis", torch.polar(torch.ones(8, 2), angles))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = torch.view_as_complex(self.q(x).float().view(b, t, 4, 2, 2)) * self.freqs_cis[:t, None]
        return self.out(torch.view_as_real(q).flatten(2).type_as(x))  # type: ignore[no-any-return]


def test_complex_buffers_stay_complex() -> None:
    report = verify(Rotated(), (torch.randn(2, 6, 16),), {"mesh": {"tensor": 2}})
    assert report.passed, str(report)
    model = Rotated()
    module = parallelize(model, (torch.randn(2, 6, 16),), {"mesh": {"tensor": 1}}, dtype=torch.bfloat16)
    buffers = dict(module.named_buffers())
    assert buffers["freqs_cis"].dtype == torch.complex64
    assert torch.equal(buffers["freqs_cis"], model.freqs_cis)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


@pytest.mark.nightly
def test_a_model_that_returns_a_cache_by_default_is_taken_without_one() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config)
    assert config.use_cache
    example = {"input_ids": torch.randint(50, (2, 6))}
    shard(lambda: transformers.LlamaForCausalLM(config), example, {"mesh": {"tensor": 2}})
    report = verify(model, example, {"mesh": {"tensor": 2}})
    assert report.passed, str(report)
    assert config.use_cache, "the user's own configuration stays"


class Lengthened(nn.Module):
    """Adds a size to a value."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))) + x.shape[1]  # type: ignore[no-any-return]


def test_a_size_may_be_added_to_a_value() -> None:
    report = verify(Lengthened(), (torch.randn(2, 6, 8),), {"mesh": {"tensor": 2}})
    assert report.passed, str(report)
