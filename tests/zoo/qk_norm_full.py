"""Queries and keys normalised over all heads at once, before they are taken apart; norms stand after each part."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.after_attention, self.after_mlp = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.gate, self.up = nn.Linear(hidden, 72, bias=False), nn.Linear(hidden, 72, bias=False)
        self.down = nn.Linear(72, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.after_attention(self.o_proj(y.transpose(1, 2).flatten(2)))
        return x + self.after_mlp(self.down(F.silu(self.gate(x)) * self.up(x)))


class QkNormFull(nn.Module):
    def __init__(self, vocab: int = 58, hidden: int = 40, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads) for _ in range(2))
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


Model = QkNormFull


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 58) -> dict[str, Tensor]:
    return {"ids": torch.randint(vocab, (batch, sequence)), "targets": torch.randint(vocab, (batch, sequence))}
