"""Attention in einsum over bare parameters: no nn.Linear, no reshape; the heads are a parameter's dimension."""

import torch
import torch.nn.functional as F
from torch import Tensor, einsum, nn


def weight(*shape: int, fan_in: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * fan_in**-0.5)


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, head_dim: int, wide: int) -> None:
        super().__init__()
        self.wq = weight(hidden, heads, head_dim, fan_in=hidden)
        self.wk = weight(hidden, heads, head_dim, fan_in=hidden)
        self.wv = weight(hidden, heads, head_dim, fan_in=hidden)
        self.wo = weight(heads, head_dim, hidden, fan_in=heads * head_dim)
        self.w1 = weight(hidden, wide, fan_in=hidden)
        self.w2 = weight(wide, hidden, fan_in=wide)
        self.b1 = nn.Parameter(torch.zeros(wide))
        self.g1 = nn.Parameter(torch.ones(hidden))
        self.g2 = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, x.shape[-1:], self.g1)
        q = einsum("bsm,mhd->bshd", y, self.wq)
        k = einsum("bsm,mhd->bshd", y, self.wk)
        v = einsum("bsm,mhd->bshd", y, self.wv)
        scores = einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        p = scores.masked_fill(future, float("-inf")).softmax(-1)
        x = x + einsum("bhst,bthd,hdm->bsm", p, v, self.wo)
        y = F.rms_norm(x, x.shape[-1:], self.g2)
        return x + einsum("bsf,fm->bsm", F.gelu(einsum("bsm,mf->bsf", y, self.w1) + self.b1), self.w2)


class Einsum(nn.Module):
    def __init__(self, vocab: int = 61, hidden: int = 40, heads: int = 5, head_dim: int = 6, wide: int = 56) -> None:
        super().__init__()
        self.table = weight(vocab, hidden, fan_in=hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads, head_dim, wide) for _ in range(2))
        self.out = weight(hidden, vocab, fan_in=hidden)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = F.embedding(ids, self.table)
        for layer in self.layers:
            x = layer(x)
        logits = einsum("bsm,mv->bsv", x, self.out)
        return F.cross_entropy(logits.transpose(1, 2), targets)


Model = Einsum


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 61) -> dict[str, Tensor]:
    return {"ids": torch.randint(vocab, (batch, sequence)), "targets": torch.randint(vocab, (batch, sequence))}
