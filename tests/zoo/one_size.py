"""All of one size: width, feed-forward, vocabulary, positions and sequence are 16; heads, head size and batch 4."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self, n: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.a, self.b, self.c, self.d = (nn.Linear(n, n) for _ in range(4))
        self.e, self.f = nn.Linear(n, n), nn.Linear(n, n)
        self.m, self.n = nn.LayerNorm(n), nn.LayerNorm(n)

    def forward(self, x: Tensor) -> Tensor:
        b, s, n = x.shape
        y = self.m(x)
        q, k, v = (f(y).reshape(b, s, self.heads, n // self.heads).transpose(1, 2) for f in (self.a, self.b, self.c))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.d(y.transpose(1, 2).reshape(b, s, n))
        return x + self.f(F.gelu(self.e(self.n(x))))


class OneSize(nn.Module):
    def __init__(self, n: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(n, n), nn.Embedding(n, n)
        self.layers = nn.Sequential(*(Layer(n, heads) for _ in range(2)))
        self.mix = nn.Linear(n, n, bias=False)  # a square weight from the residual stream to itself
        self.head = nn.Linear(n, n)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.size(1), device=ids.device))
        x = self.layers(x)
        x = x + self.mix(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


Model = OneSize


def example_inputs(batch: int = 4, sequence: int = 16, n: int = 16) -> dict[str, Tensor]:
    return {"ids": torch.randint(n, (batch, sequence)), "targets": torch.randint(n, (batch, sequence))}
