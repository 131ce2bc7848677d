"""Scores and logits capped by tanh, norms before and after each part, weights stored as 1 + w, embeddings scaled."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cap(x: Tensor, at: float) -> Tensor:
    return at * torch.tanh(x / at)


class Norm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int, d: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.d = heads, kv_heads, d
        self.q = nn.Linear(hidden, heads * d, bias=False)
        self.kv = nn.Linear(hidden, 2 * kv_heads * d, bias=False)
        self.o = nn.Linear(heads * d, hidden, bias=False)
        self.gate, self.up, self.down = nn.Linear(hidden, 80), nn.Linear(hidden, 80), nn.Linear(80, hidden)
        self.norms = nn.ModuleList(Norm(hidden) for _ in range(4))

    def attention(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, self.kv_heads, self.heads // self.kv_heads, self.d)
        k, v = self.kv(x).view(b, s, 2, self.kv_heads, self.d).unbind(2)
        scores = cap(torch.einsum("bskgd,btkd->bkgst", q, k) * self.d**-0.5, 5.0)
        scores = scores + torch.full((s, s), float("-inf"), device=x.device, dtype=x.dtype).triu(1)
        y = torch.einsum("bkgst,btkd->bskgd", F.softmax(scores, dim=-1), v)
        return self.o(y.reshape(b, s, -1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norms[1](self.attention(self.norms[0](x)))
        y = self.norms[2](x)
        return x + self.norms[3](self.down(F.gelu(self.gate(y), approximate="tanh") * self.up(y)))


class SoftCap(nn.Module):
    def __init__(self, vocab: int = 66, hidden: int = 32, heads: int = 4, kv_heads: int = 2, d: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        nn.init.normal_(self.embed.weight, std=hidden**-0.5)
        self.layers = nn.ModuleList(Layer(hidden, heads, kv_heads, d) for _ in range(2))
        self.norm = Norm(hidden)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids) * self.embed.embedding_dim**0.5
        for layer in self.layers:
            x = layer(x)
        logits = cap(F.linear(self.norm(x), self.embed.weight), 8.0)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


Model = SoftCap


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 66) -> dict[str, Tensor]:
    return {"ids": torch.randint(vocab, (batch, sequence)), "targets": torch.randint(vocab, (batch, sequence))}
