"""Low-rank adapters on a frozen base: only the adapters, and the norms, learn."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapted(nn.Module):
    """A frozen linear layer plus a low-rank update: W x + scale · B (A x)."""

    def __init__(self, n_in: int, n_out: int, rank: int = 4, scale: float = 2.0) -> None:
        super().__init__()
        self.base = nn.Linear(n_in, n_out).requires_grad_(False)
        self.lora_a = nn.Linear(n_in, rank, bias=False)
        self.lora_b = nn.Linear(rank, n_out, bias=False)
        self.drop = nn.Dropout(0.05)
        self.scale = scale
        nn.init.normal_(self.lora_b.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_b(self.lora_a(self.drop(x))) * self.scale


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.v, self.o = Adapted(hidden, hidden), Adapted(hidden, hidden), Adapted(hidden, hidden)
        self.k = nn.Linear(hidden, hidden).requires_grad_(False)
        self.up, self.down = Adapted(hidden, 3 * hidden), Adapted(3 * hidden, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(b, s, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, s, -1))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class Adapters(nn.Module):
    def __init__(self, vocab: int = 48, hidden: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden).requires_grad_(False)
        self.layers = nn.ModuleList(Layer(hidden, heads) for _ in range(2))
        self.head = nn.Linear(hidden, vocab).requires_grad_(False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


Model = Adapters


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 48) -> dict[str, Tensor]:
    return {"ids": torch.randint(vocab, (batch, sequence)), "targets": torch.randint(vocab, (batch, sequence))}
