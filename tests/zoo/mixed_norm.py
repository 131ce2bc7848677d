"""Layer norm here, RMS norm there, a norm without weights, a group norm on the heads' output; squared ReLU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.heads, self.d = heads, hidden // heads
        self.first, self.second = first, second
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.head_norm = nn.GroupNorm(heads, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden, bias=False), nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, hidden = x.shape
        q, k, v = self.qkv(self.first(x)).view(b, s, 3, self.heads, self.d).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        y = self.head_norm(y.reshape(b * s, hidden)).view(b, s, hidden)
        x = x + self.out(y)
        return x + self.down(F.relu(self.up(self.second(x))).square())


class MixedNorm(nn.Module):
    def __init__(self, vocab: int = 59, hidden: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.Sequential(
            Layer(hidden, heads, nn.LayerNorm(hidden), nn.RMSNorm(hidden)),
            Layer(hidden, heads, nn.RMSNorm(hidden), nn.LayerNorm(hidden, elementwise_affine=False)),
        )
        self.head = nn.Linear(hidden, vocab)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.layers(self.embed(ids))).flatten(0, 1), targets.flatten())


Model = MixedNorm


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 59) -> dict[str, Tensor]:
    return {"ids": torch.randint(vocab, (batch, sequence)), "targets": torch.randint(vocab, (batch, sequence))}
