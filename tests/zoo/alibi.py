"""ALiBi (Press et al., arXiv 2108.12409): a slope a head, times distance, is added to the scores."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    slopes: Tensor

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.register_buffer("slopes", 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads), persistent=False)
        self.norm = nn.LayerNorm(hidden, bias=False)
        self.ffn_norm = nn.LayerNorm(hidden, bias=False)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.ffn = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.Tanh(), nn.Linear(2 * hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        b, s, hidden = x.shape
        y = self.norm(x)
        q, k, v = (w(y).view(b, s, self.heads, -1).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        place = torch.arange(s, device=x.device)
        distance = place[None, :] - place[:, None]
        bias = self.slopes[:, None, None] * distance
        bias = bias.masked_fill(distance > 0, float("-inf")).to(x.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        x = x + self.wo(y.transpose(1, 2).reshape(b, s, hidden))
        return x + self.ffn(self.ffn_norm(x))


class Alibi(nn.Module):
    def __init__(self, vocab: int = 50, hidden: int = 48, heads: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden, padding_idx=0)
        self.layers = nn.ModuleList(Layer(hidden, heads) for _ in range(2))
        self.head = nn.Linear(hidden, vocab)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).movedim(-1, 1), targets, ignore_index=0)


Model = Alibi


def example_inputs(batch: int = 2, sequence: int = 12, vocab: int = 50) -> dict[str, Tensor]:
    return {"ids": torch.randint(vocab, (batch, sequence)), "targets": torch.randint(1, vocab, (batch, sequence))}
