"""One bare table both ways: rows by `table[ids]`, logits by a functional linear. Gives the loss and the logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(hidden)
        self.q, self.kv, self.o = nn.Linear(hidden, hidden), nn.Linear(hidden, 2 * hidden), nn.Linear(hidden, hidden)
        self.ff = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, 80), nn.GELU(), nn.Linear(80, hidden))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, (k, v) = self.q(y), self.kv(y).chunk(2, dim=-1)
        q, k, v = (t.view(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(x.shape))
        return x + self.ff(x)


class TiedBare(nn.Module):
    def __init__(self, vocab: int = 51, hidden: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocab, hidden) * 0.2)
        self.layers = nn.ModuleList(Layer(hidden, heads) for _ in range(2))

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table[ids]
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(x, self.table)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits


Model = TiedBare


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 51) -> dict[str, Tensor]:
    return {"ids": torch.randint(vocab, (batch, sequence)), "targets": torch.randint(vocab, (batch, sequence))}
