"""Fused queries, keys and values by group, (kv (group + 2) d), as Falcon has them; the product is `x @ weight.T`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TransposedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Layer(nn.Module):
    def __init__(self, hidden: int, kv: int, group: int) -> None:
        super().__init__()
        self.kv, self.group, self.d = kv, group, hidden // (kv * group)
        self.ln_attn, self.ln_mlp = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query_key_value = TransposedLinear(hidden, kv * (group + 2) * self.d, bias=False)
        self.dense = TransposedLinear(hidden, hidden, bias=False)
        self.up = TransposedLinear(hidden, 4 * hidden)
        self.down = TransposedLinear(4 * hidden, hidden)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, s, _ = x.shape
        qkv = self.query_key_value(x).view(b, s, self.kv, self.group + 2, self.d)
        query, key, value = qkv[:, :, :, :-2], qkv[:, :, :, [-2]], qkv[:, :, :, [-1]]
        key, value = torch.broadcast_to(key, query.shape), torch.broadcast_to(value, query.shape)
        return tuple(t.flatten(2, 3).transpose(1, 2) for t in (query, key, value))  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.heads(self.ln_attn(x)), is_causal=True)
        y = self.dense(y.permute(0, 2, 1, 3).reshape(x.shape))
        return x + y + self.down(F.gelu(self.up(self.ln_mlp(x))))


class QkvFalcon(nn.Module):
    def __init__(self, vocab: int = 64, hidden: int = 48, kv: int = 2, group: int = 3) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab, hidden)
        self.h = nn.ModuleList(Layer(hidden, kv, group) for _ in range(2))
        self.ln_f = nn.LayerNorm(hidden)
        self.lm_head = nn.Linear(hidden, vocab, bias=False)
        self.lm_head.weight = self.word_embeddings.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.word_embeddings(input_ids)
        for layer in self.h:
            x = layer(x)
        logits = self.lm_head(self.ln_f(x)) * 0.2
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / labels.shape[1]


Model = QkvFalcon


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 64) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(vocab, (batch, sequence)), "labels": torch.randint(vocab, (batch, sequence))}
