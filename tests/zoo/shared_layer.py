"""One layer applied three times, told apart by a learned step vector; and one norm used everywhere."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.up = nn.Linear(hidden, 2 * hidden)
        self.down = nn.Linear(2 * hidden, hidden)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).split(x.shape[-1], dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.out(y)
        return x + self.down(F.silu(self.up(self.norm(x))))


class SharedLayer(nn.Module):
    def __init__(self, vocab: int = 48, hidden: int = 32, heads: int = 4, times: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.step = nn.Parameter(torch.randn(times, hidden) * 0.1)
        self.layer = Layer(hidden, heads)
        self.head = nn.Linear(hidden, vocab)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids)
        for step in self.step:
            x = self.layer(x + step)
        return F.cross_entropy(self.head(self.layer.norm(x)).transpose(1, 2), targets)


Model = SharedLayer


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 48) -> dict[str, Tensor]:
    return {"ids": torch.randint(vocab, (batch, sequence)), "targets": torch.randint(vocab, (batch, sequence))}
