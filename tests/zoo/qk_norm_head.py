"""Queries and keys normalised head by head, by a hand-written norm that computes in float32 and casts back."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, d: int) -> None:
        super().__init__()
        self.heads, self.d = heads, d
        self.q_proj = nn.Linear(hidden, heads * d, bias=False)
        self.k_proj = nn.Linear(hidden, heads * d, bias=False)
        self.v_proj = nn.Linear(hidden, heads * d, bias=False)
        self.o_proj = nn.Linear(heads * d, hidden, bias=False)
        self.q_norm, self.k_norm = Norm(d), Norm(d)
        self.norm1, self.norm2 = Norm(hidden), Norm(hidden)
        self.up, self.down = nn.Linear(hidden, 96), nn.Linear(96, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        shape = (*x.shape[:-1], -1, self.d)
        q = self.q_norm(self.q_proj(y).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(y).view(shape)).transpose(1, 2)
        v = self.v_proj(y).view(shape).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(y.transpose(1, 2).reshape(*x.shape[:-1], -1))
        return x + self.down(F.silu(self.up(self.norm2(x))))


class QkNormHead(nn.Module):
    def __init__(self, vocab: int = 54, hidden: int = 32, heads: int = 6, d: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads, d) for _ in range(2))
        self.norm = Norm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


Model = QkNormHead


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 54) -> dict[str, Tensor]:
    return {"ids": torch.randint(vocab, (batch, sequence)), "targets": torch.randint(vocab, (batch, sequence))}
