"""Rotary positions on neighbouring pairs (x[2i], x[2i + 1]), and queries that come from a low-rank factor."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [b, s, heads, d], [s, 1, d/2]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, d: int, low: int) -> None:
        super().__init__()
        self.heads, self.d = heads, d
        self.norm1, self.norm2, self.q_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden), nn.RMSNorm(low)
        self.q_down, self.q_up = nn.Linear(hidden, low, bias=False), nn.Linear(low, heads * d, bias=False)
        self.k, self.v = nn.Linear(hidden, heads * d, bias=False), nn.Linear(hidden, heads * d, bias=False)
        self.o = nn.Linear(heads * d, hidden, bias=False)
        self.w1, self.w2, self.w3 = nn.Linear(hidden, 88), nn.Linear(88, hidden), nn.Linear(hidden, 88)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.norm1(x)
        q = self.q_up(self.q_norm(self.q_down(y))).unflatten(-1, (self.heads, self.d))
        k, v = self.k(y).unflatten(-1, (self.heads, self.d)), self.v(y).unflatten(-1, (self.heads, self.d))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class RotaryInterleaved(nn.Module):
    inverse: Tensor

    def __init__(self, vocab: int = 57, hidden: int = 32, heads: int = 4, d: int = 8, low: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads, d, low) for _ in range(2))
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)
        self.register_buffer("inverse", 10000.0 ** (-torch.arange(0, d, 2) / d))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1], device=ids.device)
        angle = torch.einsum("s,d->sd", place.to(self.inverse.dtype), self.inverse)[:, None]
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, angle.cos(), angle.sin())
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


Model = RotaryInterleaved


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 57) -> dict[str, Tensor]:
    return {"ids": torch.randint(vocab, (batch, sequence)), "targets": torch.randint(vocab, (batch, sequence))}
