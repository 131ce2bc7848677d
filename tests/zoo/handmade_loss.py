"""Cross-entropy by hand: log_softmax, gather, a weight for each token, and a z-loss on the normaliser."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.fc, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(3 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.proj(F.gelu(self.fc(self.norm2(x))))


class HandmadeLoss(nn.Module):
    def __init__(self, vocab: int = 53, hidden: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads) for _ in range(2))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab)

    def forward(self, ids: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        log_p = torch.log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        z = torch.logsumexp(logits, dim=-1)
        weights = weights.to(log_p.dtype)
        return (-log_p * weights).sum() / weights.sum() + 1e-2 * (z * z).mean()


Model = HandmadeLoss


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 53) -> dict[str, Tensor]:
    return {
        "ids": torch.randint(vocab, (batch, sequence)),
        "targets": torch.randint(vocab, (batch, sequence)),
        "weights": torch.rand(batch, sequence) + 0.1,
    }
