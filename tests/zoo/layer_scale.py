"""Layer-scale vectors on both branches, one bias shared by all layers, residuals weighted by learned scalars."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, bias: nn.Parameter) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(hidden)
        self.attn_in, self.attn_out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden, bias=False)
        self.shared_bias = bias
        self.gamma1 = nn.Parameter(torch.full((hidden,), 0.5))
        self.gamma2 = nn.Parameter(torch.full((hidden,), 0.5))
        self.alpha = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        thirds = self.attn_in(self.norm(x)).tensor_split(3, dim=-1)
        q, k, v = (t.view(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in thirds)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = self.alpha * x + self.gamma1 * (self.attn_out(y) + self.shared_bias)
        return torch.addcmul(x, self.gamma2, self.down(F.mish(self.up(x))) + self.shared_bias)


class LayerScale(nn.Module):
    def __init__(self, vocab: int = 46, hidden: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.layers = nn.ModuleList(Layer(hidden, heads, self.bias) for _ in range(2))
        self.head = nn.Linear(hidden, vocab)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


Model = LayerScale


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 46) -> dict[str, Tensor]:
    return {"ids": torch.randint(vocab, (batch, sequence)), "targets": torch.randint(vocab, (batch, sequence))}
