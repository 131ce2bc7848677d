"""Causal models of transformers, as they are captured for a user: steps give the logits of the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.decode.growing import growing

WIDE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
GROUPED = {**WIDE, "num_key_value_heads": 2}
OWN_NAMES = {"vocab_size": 61, "n_layer": 2, "n_head": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 8},
    "Mistral": {**GROUPED, "sliding_window": 5},
    "Gemma2": {**GROUPED, "head_dim": 8},
    "GPTNeoX": WIDE,
    "GPT2": {**OWN_NAMES, "n_embd": 32, "n_positions": 40, "bos_token_id": 0, "eos_token_id": 0},
    "Bloom": {**OWN_NAMES, "hidden_size": 32},
    "OPT": {**WIDE, "ffn_dim": 40, "word_embed_proj_dim": 32, "max_position_embeddings": 40},
}
SUFFIX = {"GPT2": "LMHeadModel"}


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


@pytest.mark.parametrize(
    "name", ["Llama", *(pytest.param(n, marks=pytest.mark.nightly) for n in FAMILIES if n != "Llama")]
)
def test_a_family_generates_token_by_token(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**FAMILIES[name])
    model = getattr(transformers, name + SUFFIX.get(name, "ForCausalLM"))(config)
    it = growing(Logits(model), {"ids": torch.randint(60, (2, 9))}, 2)
    assert it.run([0, 5, 6, 7, 13]) < 1e-10
