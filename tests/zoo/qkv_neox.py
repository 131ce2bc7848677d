"""Fused queries, keys and values laid out head by head, (heads 3 d), as GPT-NeoX and BLOOM have them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.d = heads, hidden // heads
        self.input_layernorm = nn.LayerNorm(hidden)
        self.post_attention_layernorm = nn.LayerNorm(hidden)
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.dense = nn.Linear(hidden, hidden)
        self.dense_h_to_4h = nn.Linear(hidden, 4 * hidden)
        self.dense_4h_to_h = nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.query_key_value(self.input_layernorm(x))
        qkv = qkv.view(*qkv.shape[:-1], self.heads, 3 * self.d).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attention = self.dense(y.transpose(1, 2).contiguous().view(x.shape))
        mlp = self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(self.post_attention_layernorm(x))))
        return mlp + attention + x


class QkvNeox(nn.Module):
    def __init__(self, vocab: int = 52, hidden: int = 40, heads: int = 5, longest: int = 48) -> None:
        super().__init__()
        self.embed_in = nn.Embedding(vocab, hidden)
        self.places = nn.Parameter(torch.randn(longest, hidden) * 0.1)
        self.layers = nn.ModuleList(Layer(hidden, heads) for _ in range(2))
        self.final_layer_norm = nn.LayerNorm(hidden)
        self.embed_out = nn.Linear(hidden, vocab, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed_in(input_ids) + self.places[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.embed_out(self.final_layer_norm(x)).flatten(0, 1), labels.flatten())


Model = QkvNeox


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 52) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(vocab, (batch, sequence)), "labels": torch.randint(vocab, (batch, sequence))}
